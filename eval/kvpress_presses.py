"""Measure kvpress's presses on the windows and questions of `python -m llm_variator.evaluate frontier --export`.

    make kvpress
    .venv-kvpress/bin/python eval/kvpress_presses.py --tasks tasks.json --model DIR --entries 0.5 --output presses.json

Runs in kvpress's own environment and imports nothing of llm_variator. `frontier --elsewhere presses.json` adds the
figures to its tables. A press reads the whole prompt densely, then keeps a share of its keys and values.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import kvpress
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache

PRESSES = ("ExpectedAttention", "SnapKV", "TOVA", "StreamingLLM", "Knorm")


def main() -> None:
    """Measure every press at every share of entries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tasks", type=Path, required=True, help="what frontier --export wrote")
    parser.add_argument("--model", type=Path, required=True, help="folder of the same weights")
    parser.add_argument("--output", type=Path, required=True, help="the file for frontier --elsewhere")
    parser.add_argument(
        "--entries", type=float, nargs="+", default=[0.5], help="shares of the prompt's entries kept"
    )
    parser.add_argument("--presses", nargs="+", default=list(PRESSES), help="kvpress's classes without Press")
    parser.add_argument("--batch-size", type=int, default=4, help="windows in one forward pass")
    args = parser.parse_args()
    tasks = json.loads(args.tasks.read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, trust_remote_code=False
    ).eval()
    if weights_of(model) != tasks["model"]["weights"]:
        parser.error(
            f"{args.model} holds other weights than {tasks['model']['name']} that the tasks were made with"
        )
    check_dense(model, tasks, args.batch_size)

    conditions = []
    for share in args.entries:
        for name in args.presses:
            press = getattr(kvpress, f"{name}Press")(compression_ratio=1 - share)
            label = f"{name} {share:.0%}"
            texts = [
                on_windows(model, press, text, dense["greedy"], tasks["generate"], args.batch_size)
                for text, dense in zip(tasks["texts"], tasks["dense"], strict=True)
            ]
            answers = on_questions(model, press, tasks["questions"])
            conditions.append({"label": label, "texts": texts, "answers": answers})
            print(label, [sum(text["nats"]) / len(text["nats"]) for text in texts], flush=True)
            result = {"digest": tasks["digest"], "conditions": conditions, "kvpress": "0.5.5"}
            args.output.write_text(json.dumps(result) + "\n", encoding="utf-8")


def weights_of(model: Any) -> str:
    """The short hash by which llm_variator knows a base model."""
    sample = model.get_input_embeddings().weight.detach()[:64].to(torch.bfloat16).contiguous()
    return hashlib.sha256(sample.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def check_dense(model: Any, tasks: dict[str, Any], batch_size: int) -> None:
    """Stop unless both environments agree on the first text's dense cross-entropy."""
    for text, dense in zip(tasks["texts"][:1], tasks["dense"], strict=False):
        ours = on_windows(model, None, text, dense["greedy"], 1, batch_size)["nats"]
        if max(abs(a - b) for a, b in zip(ours, dense["nats"], strict=True)) > 1e-3:
            raise SystemExit(
                "error: the dense model gives other figures here; install the versions of the Makefile"
            )


def read(model: Any, press: Any, ids: Tensor) -> tuple[Cache, Tensor]:
    """Read prompts (rows, n): the cache that the press leaves, and the last token's logits (rows, vocabulary)."""
    cache = DynamicCache()
    within: AbstractContextManager[Any] = nullcontext() if press is None else press(model)
    with within:
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, output.logits[:, -1]


def follow(model: Any, cache: Cache, position: int, ids: Tensor) -> Tensor:
    """Logits (rows, t, vocabulary) of tokens that begin at `position`."""
    positions = torch.arange(position, position + ids.shape[1])[None]
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True, position_ids=positions).logits
    return logits


def after(model: Any, cache: Cache, first: Tensor, position: int, tokens: Tensor) -> Tensor:
    """Logits (rows, t, vocabulary) that predict `tokens` (rows, t); `first` are those after the prompt."""
    if tokens.shape[1] == 1:
        return first[:, None]
    return torch.cat((first[:, None], follow(model, cache, position, tokens[:, :-1])), dim=1)


def greedy(
    model: Any, cache: Cache, logits: Tensor, position: int, tokens: int, stop: frozenset[int]
) -> Tensor:
    """The likeliest tokens (rows, tokens); of one row they end with the first that stops."""
    chosen = [logits.argmax(-1, keepdim=True)]
    while len(chosen) < tokens and not (stop and int(chosen[-1]) in stop):
        logits = follow(model, cache, position + len(chosen) - 1, chosen[-1])[:, -1]
        chosen.append(logits.argmax(-1, keepdim=True))
    return torch.cat(chosen, dim=1)


@torch.inference_mode()
def on_windows(
    model: Any, press: Any, text: dict[str, Any], dense: list[list[int]], generate: int, batch_size: int
) -> dict[str, Any]:
    """Cross-entropy, greedy tokens and agreement of every window, and the entries held."""
    context, windows, reference = text["context"], torch.tensor(text["windows"]), torch.tensor(dense)
    nats: list[float] = []
    texts: list[list[int]] = []
    same: list[float] = []
    entries = 0
    for rows, theirs in zip(windows.split(batch_size), reference.split(batch_size), strict=True):
        cache, first = read(model, press, rows[:, :context])
        entries = sum(layer.keys.shape[-2] for layer in cache.layers)
        texts += greedy(model, copy.deepcopy(cache), first, context, generate, frozenset()).tolist()
        chosen = after(model, copy.deepcopy(cache), first, context, theirs).argmax(-1)
        same += (chosen == theirs).double().mean(1).tolist()
        targets = rows[:, context:]
        logits = after(model, cache, first, context, targets)
        nats += [F.cross_entropy(*pair).item() for pair in zip(logits, targets, strict=True)]
    return {"nats": nats, "greedy": texts, "same_choice": same, "entries": entries}


@torch.inference_mode()
def on_questions(model: Any, press: Any, questions: dict[str, Any]) -> dict[str, Any] | None:
    """Greedy answers; None where there are no questions."""
    found: dict[str, Any] = {"tokens": [], "entries": []}
    stop = frozenset(questions["stop"])
    for prompt in questions["prompts"]:
        cache, first = read(model, press, torch.tensor([prompt]))
        found["entries"].append(sum(layer.keys.shape[-2] for layer in cache.layers))
        found["tokens"] += greedy(model, cache, first, len(prompt), questions["tokens"], stop).tolist()
    return found if questions["prompts"] else None


if __name__ == "__main__":
    main()
