"""Cross-entropy of continuations against a loop that scores one token at a time."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, make_variator

from llm_variator import VariatorConfig, VariatorError
from llm_variator.measures.metrics import continuation_cross_entropy, reference_conditions

PROMPT, LENGTH, ROWS = 14, 20, 5


@pytest.fixture(scope="module")
def model():
    return make_variator("llama", VariatorConfig(k=2, sites=("ffn", "kv"), r=4, dense_head=1, dense_tail=2))


@pytest.fixture(scope="module")
def rows():
    return torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def by_hand(model, rows, prompt: int, start: int = 0) -> float:
    """Mean nats of the tokens from `PROMPT` on: one pass per row, full logits, one token at a time."""
    nats = []
    for row in rows:
        logits = model(row[None, start:], prompt_length=prompt).logits[0].double()
        for position in range(PROMPT, LENGTH):
            nats.append(-logits[position - 1 - start].log_softmax(-1)[row[position]])
    return torch.stack(nats).mean().item()


def test_three_conditions_score_the_same_tokens(model, rows):
    with model.disable_plugin():
        dense, no_context = by_hand(model, rows, PROMPT), by_hand(model, rows, 1, start=PROMPT - 1)
    expected = {"compressed": by_hand(model, rows, PROMPT), "dense": dense, "no_context": no_context}
    compressed = continuation_cross_entropy(model, rows, PROMPT)
    found = {"compressed": compressed, **reference_conditions(model, rows, PROMPT)}
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(nats, 3) for nats in expected.values()}) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batch_size_changes_nothing(model, rows, batch_size):
    expected = continuation_cross_entropy(model, rows, PROMPT)
    assert continuation_cross_entropy(model, rows, PROMPT, batch_size=batch_size) == pytest.approx(
        expected, abs=1e-5
    )


def test_int32_windows_are_accepted(model, rows):
    assert continuation_cross_entropy(model, rows.int(), PROMPT) == continuation_cross_entropy(
        model, rows, PROMPT
    )


def test_mode_of_the_model_is_kept(model, rows):
    model.train()
    continuation_cross_entropy(model, rows, PROMPT)
    assert model.training
    model.eval()
    continuation_cross_entropy(model, rows, PROMPT)
    assert not model.training


@pytest.mark.parametrize("prompt", [0, -1, LENGTH, LENGTH + 1])
def test_prompt_must_leave_a_continuation(model, rows, prompt):
    with pytest.raises(VariatorError, match="prompt_length must be between 1 and 19"):
        continuation_cross_entropy(model, rows, prompt)


def test_what_is_no_number_is_no_figure(rows):
    model = make_variator("llama", VariatorConfig(k=2, sites=("ffn",), r=4, dense_head=1, dense_tail=2))
    with torch.no_grad():
        model.plugin().sites["ffn", 1].decompressor.up.weight[0, 0] = float("inf")
    with pytest.raises(VariatorError, match="predictions are no numbers"):
        continuation_cross_entropy(model, rows, 16)


def test_no_rows(model, rows):
    with pytest.raises(VariatorError, match="no text to score"):
        continuation_cross_entropy(model, rows[:0], PROMPT)
