"""A CPU without products in bfloat16: said when a model is loaded, and left out of training."""

import logging

import pytest
import torch
from tiny import model_folder, train

from llm_variator.sources.models import cpu, load_model


@pytest.fixture
def seconds(monkeypatch):
    """What a product is to take, by dtype, in place of what it takes here."""
    told = {torch.float32: 1.0, torch.bfloat16: 70.0, torch.float16: 2.0}
    monkeypatch.setattr(cpu, "product_seconds", told.__getitem__)
    return told


def test_complaint_of_slow_products_only(seconds):
    assert cpu.complaint(torch.bfloat16) == (
        "this CPU has no products in bfloat16: one of 256 x 256 takes 70 times as long as in float32"
    )
    assert cpu.complaint(torch.float16) is None
    assert cpu.complaint(torch.float32) is None
    assert cpu.complaint(torch.int8) is None


def test_products_are_timed_here():
    assert 0 < cpu.product_seconds(torch.float32) < 1
    # by a loop over all entries, or by instructions of its own, it is no thousand times slower nor faster
    assert 1e-3 < cpu.product_seconds(torch.bfloat16) / cpu.product_seconds(torch.float32) < 1e3


@pytest.mark.parametrize(("dtype", "warns"), [("bfloat16", True), ("float16", False), ("float32", False)])
def test_a_slow_dtype_is_said_when_a_model_is_loaded(seconds, caplog, dtype, warns):
    with caplog.at_level(logging.WARNING, "llm_variator"):
        load_model(model_folder(), dtype=dtype)
    assert ("no products in bfloat16" in caplog.text) is warns
    assert ("--dtype float32" in caplog.text) is warns


def test_bf16_training_is_left_out_in_so_many_words(seconds, capsys, tmp_path):
    plain = train(tmp_path / "plain")
    assert "left out" not in capsys.readouterr().out
    slow = train(tmp_path / "slow", "--bf16")
    assert slow["loss_history"] == plain["loss_history"]
    assert slow["bf16"] is False
    assert "--bf16 is left out: this CPU has no products in bfloat16" in capsys.readouterr().out
    seconds[torch.bfloat16] = 0.5
    fast = train(tmp_path / "fast", "--bf16")
    assert fast["loss_history"] != plain["loss_history"]
    assert fast["bf16"] is True
    assert "left out" not in capsys.readouterr().out
