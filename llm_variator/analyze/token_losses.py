"""The loss of every token after a compressed prompt, dense and compressed, sorted by kind: which tokens lose most."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_variator.model import VariatorModel

NEAR, FAR, SEEN, NEW = (
    "pair of tokens also in dense text",
    "pair of tokens only in merged text",
    "token seen, pair new",
    "token new",
)
_FEW = 5  # a token that occurs less often says nothing about itself


@dataclasses.dataclass(frozen=True)
class Losses:
    """Nats of every token after the prompt, (rows, t) each."""

    dense: Tensor
    compressed: Tensor

    @property
    def harm(self) -> Tensor:
        """Compressed over dense."""
        return self.compressed - self.dense


@torch.inference_mode()
def token_losses(model: VariatorModel, windows: Tensor, context: int, batch_size: int) -> Losses:
    """Loss of every token after `context` prompt tokens of `windows` (rows, tokens), without and with the plugin."""

    def nats() -> Tensor:
        found = []
        for batch in windows.split(batch_size):
            batch = batch.to(model.device, torch.long)
            kept = batch.shape[1] - context + 1
            logits = model(batch, prompt_length=context, logits_to_keep=kept, use_cache=False).logits
            found += [
                F.cross_entropy(row[:-1].float(), tokens[context:], reduction="none").cpu()
                for row, tokens in zip(logits, batch, strict=True)
            ]
        return torch.stack(found)

    with model.disable_plugin():
        dense = nats()
    return Losses(dense, nats())


def origins(tokens: Sequence[int], context: int, merged: range) -> list[str]:
    """For each token after the prompt, where the same token, and it with the token before it, occurred earlier.

    Args:
        tokens: one row, prompt and what follows.
        context: prompt tokens.
        merged: positions of the prompt that are merged; all others are dense.
    """
    near: set[tuple[int, int]] = set()
    far: set[tuple[int, int]] = set()
    seen = set(tokens[:context])
    for place in range(1, context):
        inside = place in merged or place - 1 in merged
        (far if inside else near).add((tokens[place - 1], tokens[place]))
    found = []
    for place in range(context, len(tokens)):
        pair = (tokens[place - 1], tokens[place])
        if pair in near:
            found.append(NEAR)
        elif pair in far:
            found.append(FAR)
        else:
            found.append(SEEN if tokens[place] in seen else NEW)
        near.add(pair)
        seen.add(tokens[place])
    return found


def shape(text: str) -> str:
    """What a token's text looks like."""
    word = text.strip()
    if any(letter.isdigit() for letter in word):
        return "number"
    if not any(letter.isalpha() for letter in word):
        return "punctuation or space"
    if not text[:1].isspace():
        return "inside a word"
    return "capitalised word" if word[:1].isupper() else "other word"


def by_kind(losses: Losses, kinds: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Mean losses of each kind, `kinds` (rows, t); the most harmed first."""
    flat = [kind for row in kinds for kind in row]
    dense, compressed = losses.dense.flatten().tolist(), losses.compressed.flatten().tolist()
    rows: list[dict[str, Any]] = []
    for kind in sorted(set(flat)):
        chosen = [place for place, own in enumerate(flat) if own == kind]
        before, after = (fmean(nats[place] for place in chosen) for nats in (dense, compressed))
        rows.append(
            {
                "kind": kind,
                "tokens": len(chosen),
                "dense": before,
                "compressed": after,
                "harm": after - before,
            }
        )
    return sorted(rows, key=lambda row: -row["harm"])


def by_category(
    losses: Losses,
    windows: Tensor,
    context: int,
    merged: range,
    decode: Callable[[list[int]], str],
    *,
    most: int = 12,
) -> dict[str, Any]:
    """Losses by where a token comes from, by its looks, and the tokens and places that lose most.

    Args:
        losses: of the tokens after the prompt.
        windows: (rows, tokens).
        context: prompt tokens.
        merged: positions of the prompt that are merged.
        decode: token ids to text.
        most: length of the lists.
    """
    rows = windows.tolist()
    after = [row[context:] for row in rows]
    texts = {token: decode([token]) for row in after for token in row}
    by_token = by_kind(losses, [[texts[token] for token in row] for row in after])
    worst = losses.harm.flatten().topk(min(most, losses.harm.numel())).indices.tolist()
    width = losses.harm.shape[1]
    examples = []
    for place in worst:
        row, column = divmod(place, width)
        position = context + column
        examples.append(
            {
                "before": decode(rows[row][position - 12 : position]),
                "token": texts[rows[row][position]],
                "dense": losses.dense[row, column].item(),
                "compressed": losses.compressed[row, column].item(),
            }
        )
    return {
        "mean": {"dense": losses.dense.mean().item(), "compressed": losses.compressed.mean().item()},
        "by_origin": by_kind(losses, [origins(row, context, merged) for row in rows]),
        "by_shape": by_kind(losses, [[shape(texts[token]) for token in row] for row in after]),
        "by_token": [row for row in by_token if row["tokens"] >= _FEW][:most],
        "examples": examples,
    }
