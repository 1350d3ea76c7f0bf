"""Pre-training examples for encoders: T5's span corruption and BERT's masked tokens.

Every example is a pure function of its window, the seed and its number, as `TrainingStream` promises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llm_variator.errors import VariatorError

SHARE = 0.15  # of the tokens that are corrupted: Raffel et al. 2020, Devlin et al. 2019, paper appendix A.2
MEAN_SPAN = 3.0

Corruption = Callable[[np.ndarray, np.random.Generator], dict[str, Tensor]]


class Corrupted(Dataset[dict[str, Tensor]]):
    """The windows of a stream, each corrupted in its own way."""

    def __init__(
        self, windows: Sequence[Tensor] | Dataset[Any], corruption: Corruption, *, seed: int
    ) -> None:
        """`windows`: tensors of token ids, or dicts with `input_ids`, by index."""
        self._windows: Any = windows
        self._corruption = corruption
        self._seed = seed

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """What the model's forward takes, each (tokens,)."""
        window = self._windows[index]
        ids = window["input_ids"] if isinstance(window, dict) else window
        return self._corruption(ids.numpy(), np.random.default_rng((self._seed, 2, index)))


def span_corruption(tokenizer: PreTrainedTokenizerBase, decoder_start: int) -> Corruption:
    """T5's: 15 % of the tokens, in spans of 3 on average, each replaced by a sentinel; the target names them.

    The counts are fixed by the window's length, so that all windows of one length give one shape.

    Raises:
        VariatorError: the tokenizer has no sentinels.
    """
    known = tokenizer.get_vocab()
    sentinels = [known[name] for number in range(100) if (name := f"<extra_id_{number}>") in known]
    if not sentinels:
        raise VariatorError("span corruption needs T5's tokenizer: this one has no sentinels")
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]

    def corrupt(ids: np.ndarray, draw: np.random.Generator) -> dict[str, Tensor]:
        source: list[int] = []
        target: list[int] = []
        for number, (kept, lost) in enumerate(_spans(len(ids), len(sentinels), draw)):
            source += [*ids[kept].tolist(), sentinels[number]]
            target += [sentinels[number], *ids[lost].tolist()]
        target += end
        return {
            "input_ids": torch.tensor(source + end),
            "decoder_input_ids": torch.tensor([decoder_start, *target[:-1]]),
            "labels": torch.tensor(target),
        }

    return corrupt


def _spans(length: int, most: int, draw: np.random.Generator) -> list[tuple[slice, slice]]:
    """At most `most` pairs of a kept and a lost stretch that cover `length` tokens, none of them empty."""
    lost = min(max(round(SHARE * length), 1), length - 1)
    count = min(max(round(lost / MEAN_SPAN), 1), length - lost, most)
    spans, start = [], 0
    for keep, lose in zip(_parts(length - lost, count, draw), _parts(lost, count, draw), strict=True):
        spans.append((slice(start, start + keep), slice(start + keep, start + keep + lose)))
        start += keep + lose
    return spans


def _parts(total: int, count: int, draw: np.random.Generator) -> list[int]:
    """`total` as a sum of `count` positive numbers, all sums being equally likely."""
    cuts = np.sort(draw.choice(total - 1, count - 1, replace=False)) + 1
    return [int(part) for part in np.diff([0, *cuts, total])]


SPECIAL_TOKENS = 2
"""Of BERT, around a window."""


def token_masking(tokenizer: PreTrainedTokenizerBase) -> Corruption:
    """BERT's: of 15 % of the tokens 80 % become the mask token, 10 % a random one, 10 % stay.

    Raises:
        VariatorError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise VariatorError("masked tokens need BERT's tokenizer: this one has no mask token")
    mask, size = int(tokenizer.mask_token_id), len(tokenizer)
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id

    def corrupt(ids: np.ndarray, draw: np.random.Generator) -> dict[str, Tensor]:
        ids = ids.copy()
        chosen = draw.choice(len(ids), max(round(SHARE * len(ids)), 1), replace=False)
        fate = draw.random(len(chosen))
        ids[chosen[fate < 0.8]] = mask
        swapped = chosen[fate >= 0.9]
        ids[swapped] = draw.integers(0, size, len(swapped))
        return {"input_ids": torch.tensor([first, *ids.tolist(), last])}

    return corrupt


def stack(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A micro-batch of examples of one shape."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
