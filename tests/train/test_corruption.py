"""Span corruption and token masking, against what they promise for any window."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_variator import VariatorError
from llm_variator.sources.models import byte_tokenizer
from llm_variator.train.corruption import Corrupted, span_corruption, stack, token_masking

T5 = byte_tokenizer("t5")
BERT = byte_tokenizer("bert")
FIRST_SENTINEL = 259


def window(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(seed))


def undo(source: list[int], target: list[int]) -> list[int]:
    """The window that was corrupted: every sentinel replaced by what the target says after it."""
    said: dict[int, list[int]] = {}
    for token in target:
        if token >= FIRST_SENTINEL:
            said[token] = []
        else:
            said[max(said)].append(token)
    whole: list[int] = []
    for token in source:
        whole += said.pop(token) if token >= FIRST_SENTINEL else [token]
    assert not said
    return whole


@pytest.mark.parametrize("length", [2, 3, 10, 64, 128, 1000])
def test_source_and_target_hold_the_window_between_them(length):
    corrupt = span_corruption(T5, decoder_start=0)
    ids = window(length)
    for seed in range(5):
        example = corrupt(ids.numpy(), np.random.default_rng(seed))
        source, target = example["input_ids"].tolist(), example["labels"].tolist()
        assert source.pop() == target.pop() == T5.eos_token_id
        assert undo(source, target) == ids.tolist()
        assert example["decoder_input_ids"].tolist() == [0, *target]


def test_share_and_mean_length_of_spans_are_the_papers():
    example = span_corruption(T5, decoder_start=0)(window(128).numpy(), np.random.default_rng(0))
    sentinels = (example["labels"] >= FIRST_SENTINEL).sum().item()
    assert sentinels == 6  # 19 of 128 tokens in spans of 3 on average
    assert len(example["labels"]) == 19 + 6 + 1
    assert len(example["input_ids"]) == 128 - 19 + 6 + 1


def test_examples_of_one_length_stack_and_do_not_depend_on_the_order_of_reading():
    stream = Corrupted([window(40, seed) for seed in range(4)], span_corruption(T5, 0), seed=3)
    backwards = {index: stream[index] for index in reversed(range(4))}
    batch = stack([stream[index] for index in range(4)])
    for index in range(4):
        assert torch.equal(batch["labels"][index], backwards[index]["labels"])
    assert not torch.equal(batch["labels"][0], batch["labels"][1])


def test_masking_changes_few_tokens_and_most_of_them_to_the_mask():
    corrupt = token_masking(BERT)
    masked = swapped = 0
    for seed in range(50):
        ids = window(200, seed)
        out = corrupt(ids.numpy(), np.random.default_rng(seed))["input_ids"]
        assert (out[0].item(), out[-1].item()) == (BERT.cls_token_id, BERT.sep_token_id)
        changed = out[1:-1] != ids
        assert changed.sum() <= 30
        masked += (out == BERT.mask_token_id).sum().item()
        swapped += (changed & (out[1:-1] != BERT.mask_token_id)).sum().item()
    assert masked / (50 * 30) == pytest.approx(0.8, abs=0.04)
    assert swapped / (50 * 30) == pytest.approx(0.1, abs=0.03)


def test_foreign_tokenizers_are_refused():
    with pytest.raises(VariatorError, match="needs T5's tokenizer"):
        span_corruption(BERT, 0)
    with pytest.raises(VariatorError, match="need BERT's tokenizer"):
        token_masking(T5)
