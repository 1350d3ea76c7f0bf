"""Log-probabilities of continuations after compressed contexts. Knows `VariatorModel`, not lm-eval.

Each distinct context is read once, compressed as the active plugin has it; then all of its continuations are
scored on copies of that state, dense. A continuation is never part of a prompt, so it cannot be merged into
the context, and no token of it sees a later one.

What is read together is decided by the set of requests alone, so their order never changes a bit of a score.
Batch size, and what else shares a batch, change shapes and with them the rounding of the last digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from llm_variator.engine.cache import fork
from llm_variator.engine.cache.naming import cache_of
from llm_variator.errors import VariatorError
from llm_variator.model import VariatorModel

T = TypeVar("T")
Tokens = tuple[int, ...]


class ScoringRequest(NamedTuple):
    """A continuation to score after a context."""

    context: Tokens
    continuation: Tokens


class TokenScores(NamedTuple):
    """What the model thinks of one continuation."""

    log_probs: Tensor
    """(tokens,) natural logarithms, on the CPU."""
    greedy: bool
    """Whether every token is the likeliest one at its place."""

    @property
    def total(self) -> float:
        """Log-likelihood of the continuation, in nats."""
        return float(self.log_probs.sum())


class Group(NamedTuple):
    """A context with all continuations that are scored on its one reading."""

    context: Tokens
    continuations: tuple[Tokens, ...]


@torch.inference_mode()
def score(
    model: VariatorModel,
    requests: Sequence[ScoringRequest],
    *,
    batch_size: int = 1,
    softmax_dtype: torch.dtype | None = None,
    progress: Callable[[int], object] = lambda scored: None,
) -> list[TokenScores]:
    """Score every request with the active plugin, in the order of the requests.

    Of a decoder the context is the compressed prompt. Of a T5 the context is the encoder's input, and the
    continuation is read by the decoder.

    Args:
        model: the model, with the plugin to use active.
        requests: tokens of context and continuation, at least one each.
        batch_size: contexts, and then continuations, in one forward pass.
        softmax_dtype: number format of the softmax; default: that of the model.
        progress: called with the number of distinct requests that a batch has finished.

    Raises:
        VariatorError: a context or a continuation is empty.
    """
    if any(not request.context or not request.continuation for request in requests):
        raise VariatorError("a request needs at least one token of context and one of continuation")
    run = _score_seq2seq if model.config.is_encoder_decoder else _score_decoder
    scores: dict[ScoringRequest, TokenScores] = {}
    for groups in _batched(grouped(requests), batch_size):
        before = len(scores)
        for request, logits in run(model, groups, batch_size):
            scores[request] = _token_scores(logits, request.continuation, softmax_dtype)
        progress(len(scores) - before)
    return [scores[request] for request in requests]


def grouped(requests: Sequence[ScoringRequest]) -> list[Group]:
    """The distinct requests by context, longest first, in an order that depends on their set alone.

    The context itself is the key: of the same text, where the context ends decides what is compressed.
    """
    by_context: dict[Tokens, set[Tokens]] = {}
    for request in requests:
        by_context.setdefault(request.context, set()).add(request.continuation)
    return [
        Group(context, tuple(sorted(by_context[context], key=_longest_first)))
        for context in sorted(by_context, key=_longest_first)
    ]


def _longest_first(tokens: Tokens) -> tuple[int, Tokens]:
    return -len(tokens), tokens


def _token_scores(logits: Tensor, tokens: Tokens, dtype: torch.dtype | None) -> TokenScores:
    """`logits` (tokens, vocabulary): what was predicted for each of `tokens`."""
    targets = torch.tensor(tokens, device=logits.device)
    log_probs = torch.log_softmax(logits, dim=-1, dtype=dtype)
    chosen = log_probs.gather(1, targets[:, None]).squeeze(1)
    return TokenScores(chosen.cpu(), bool((log_probs.argmax(dim=-1) == targets).all()))


def _score_decoder(
    model: VariatorModel, groups: Sequence[Group], batch_size: int
) -> Iterator[tuple[ScoringRequest, Tensor]]:
    """The first token of a continuation is predicted by the context's last, the others on its cache."""
    context, mask = _padded([group.context for group in groups], left=True, device=model.device)
    wanted = [(row, tokens) for row, group in enumerate(groups) for tokens in group.continuations]
    longer = sorted((pair for pair in wanted if len(pair[1]) > 1), key=lambda pair: -len(pair[1]))
    output = model(
        context,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=bool(longer),
        logits_to_keep=1,
    )
    first = output.logits[:, -1:]  # (groups, 1, vocabulary)
    for row, tokens in wanted:
        if len(tokens) == 1:
            yield ScoringRequest(groups[row].context, tokens), first[row]

    lengths = mask.sum(dim=1)
    for batch in _batched(longer, batch_size):
        rows = torch.tensor([row for row, _ in batch], device=model.device)
        inputs, valid = _padded([tokens[:-1] for _, tokens in batch], left=False, device=model.device)
        places = torch.arange(inputs.shape[1], device=model.device)
        logits = model(
            inputs,
            attention_mask=torch.cat((mask[rows], valid), dim=1),
            position_ids=lengths[rows, None] + places,
            cache=_rows_of(cache_of(output), rows),
            prompt_length=0,
            use_cache=True,
        ).logits
        for place, (row, tokens) in enumerate(batch):
            rest = logits[place, : len(tokens) - 1]
            yield ScoringRequest(groups[row].context, tokens), torch.cat((first[row], rest))


def _score_seq2seq(
    model: VariatorModel, groups: Sequence[Group], batch_size: int
) -> Iterator[tuple[ScoringRequest, Tensor]]:
    """The encoder reads each context once, with its longest continuation; its output serves the others."""
    context, mask = _padded([group.context for group in groups], left=False, device=model.device)
    first = [(row, group.continuations[0]) for row, group in enumerate(groups)]
    others = [(row, tokens) for row, group in enumerate(groups) for tokens in group.continuations[1:]]
    source: dict[str, Any] = dict(input_ids=context)
    encoded = torch.empty(0)
    for batch in (first, *_batched(others, batch_size)):
        rows = torch.tensor([row for row, _ in batch], device=model.device)
        labels, _ = _padded([tokens for _, tokens in batch], left=False, device=model.device)
        if batch is not first:
            source = dict(encoder_outputs=BaseModelOutput(last_hidden_state=encoded[rows]))
        output = model(attention_mask=mask[rows], labels=labels, use_cache=False, **source)
        if batch is first:
            encoded = output.encoder_last_hidden_state
        for place, (row, tokens) in enumerate(batch):
            yield ScoringRequest(groups[row].context, tokens), output.logits[place, : len(tokens)]


def _batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _padded(rows: Sequence[Tokens], *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask (rows, longest), padded on one side; what stands in padding is never seen."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), None) if left else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def _rows_of(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of its own for the `rows` of another, which stays as it is."""
    own = fork(cache)
    own.batch_select_indices(rows)
    return own
