"""A CPU without products in bfloat16: said when a model is loaded, and left out of training."""

import logging
from pathlib import Path

import pytest
import torch
from tiny import model_folder, train

from llm_variator.sources.models import cpu, load_model


@pytest.fixture
def multiplied(monkeypatch):
    """The dtypes in which an x86 CPU is to have products."""
    told = {torch.float32, torch.float16}
    monkeypatch.setattr(cpu, "multiplies", told.__contains__)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return told


def test_complaint_of_missing_products_only(multiplied, monkeypatch):
    assert cpu.complaint(torch.bfloat16).startswith("this CPU has no products in bfloat16: ")
    assert cpu.complaint(torch.float16) is None
    assert cpu.complaint(torch.float32) is None
    monkeypatch.setattr("platform.machine", lambda: "arm64")  # torch has loops of its own there
    assert cpu.complaint(torch.bfloat16) is None


def test_torch_says_what_it_multiplies():
    assert cpu.multiplies(torch.float32)
    assert cpu.multiplies(torch.int8)
    flags = Path("/proc/cpuinfo")
    known = flags.is_file() and "avx_ne_convert" not in flags.read_text(encoding="utf-8")
    if known and torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert not cpu.multiplies(torch.bfloat16)
        assert not cpu.multiplies(torch.float16)
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        assert cpu.multiplies(torch.bfloat16)


@pytest.mark.parametrize("how", [{}, {"random_init": True}])
@pytest.mark.parametrize(("dtype", "warns"), [("bfloat16", True), ("float16", False), ("float32", False)])
def test_a_slow_dtype_is_said_when_a_model_is_loaded(multiplied, caplog, dtype, warns, how):
    with caplog.at_level(logging.WARNING, "llm_variator"):
        load_model(model_folder(), dtype=dtype, **how)
        load_model(model_folder(), dtype=dtype, random_init=True, device="meta")  # computes nothing
    assert caplog.text.count("no products in bfloat16") == warns
    assert ("--dtype float32" in caplog.text) is warns


def test_a_torch_that_cannot_be_asked_is_not_blamed(monkeypatch):
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert cpu.multiplies(torch.bfloat16)


def test_bf16_training_is_left_out_in_so_many_words(multiplied, capsys, tmp_path):
    plain = train(tmp_path / "plain")
    assert "left out" not in capsys.readouterr().out
    slow = train(tmp_path / "slow", "--bf16")
    assert slow["loss_history"] == plain["loss_history"]
    assert slow["bf16"] is False
    assert "--bf16 is left out: this CPU has no products in bfloat16" in capsys.readouterr().out
    multiplied.add(torch.bfloat16)
    fast = train(tmp_path / "fast", "--bf16")
    assert fast["loss_history"] != plain["loss_history"]
    assert fast["bf16"] is True
    assert "left out" not in capsys.readouterr().out
