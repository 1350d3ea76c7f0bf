"""The command: what it prints and stores (the arithmetic itself is in test_operations.py)."""

from __future__ import annotations

import json

import pytest

from llm_variator import VariatorError
from llm_variator.flops import main


def test_a_decoder_prints_and_stores(tmp_path, capsys):
    flags = ["--model", "llama-7b", "--k", "2", "--sites", "ffn,kv", "--tokens", "2048"]
    main([*flags, "--json", str(tmp_path / "f.json")])
    assert "0.584" in capsys.readouterr().out
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    prompt = figures["prompts"]["2048"]
    assert prompt["dense"]["ffn"] == 2 * 3 * 4096 * 11008 * 2048 * 32
    assert prompt["dense"]["cache_entries"] == 32 * 2048
    assert prompt["plugin"]["cache_entries"] == 32 * (2048 - (2048 - 4 - 1) // 2)
    assert figures["parameters"]["model"] == 6_738_415_616


def test_an_encoder_prints_and_stores(tmp_path, capsys):
    main(["--model", "t5-base", "--k", "4", "--json", str(tmp_path / "f.json")])
    printed = capsys.readouterr().out
    for share in ("+0.9%", "61.9%", "100.0%", "46.8%", "44.3%", "71.7%", "3.4%", "60.0%"):
        assert share in printed
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    dense, pruned = figures["prompts"]["512"]["dense"], figures["prompts"]["512"]["token pruning"]
    assert dense["ffn"] == 12 * 2 * 2 * 768 * 3072 * 512
    assert dense["projections"] == 12 * 2 * 4 * 768 * 768 * 512
    assert dense["scores"] == 12 * 2 * 2 * 512 * 512 * 768
    assert pruned["ffn"] * 4 == dense["ffn"]
    assert figures["parameters"]["dense"] == 222_903_552


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "t5-base", "--k", "2"],
        ["--model", "t5-base", "--k", "4", "--student-layers", "6", "6"],
        ["--model", "bert-base", "--k", "4"],
        ["--model", "t5-base", "--k", "4", "--tokens", "256"],
    ],
)
def test_the_papers_figures_stand_beside_its_own_settings_only(flags, capsys):
    main(flags)
    assert "paper: FLOPs" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "llama-7b", "--k", "2", "--plugin", "nowhere"], "leave out --k"),
        (["--model", "llama-7b", "--layers", "40"], "has 32 layers"),
        (["--model", "t5-base", "--keep", "2"], "--keep: expected a share above 0, at most 1, got '2'"),
        (
            ["--model", "llama-7b", "--sites", "kv", "--compressor", "kv=select", "--keep", "0.4"],
            "--keep: for T5",
        ),
        (["--model", "llama-7b", "--answer", "9", "--student-ffn", "1"], "--answer, --student-ffn: for T5"),
        (["--model", "bert-base", "--student-layers", "6", "6"], "no decoder"),
        (["--model", "t5-base", "--student-layers", "6", "6", "6"], "one number for the encoder"),
        (
            ["--model", "t5-base", "--student-ffn", "0"],
            "--student-ffn: expected a share above 0, at most 1, got '0'",
        ),
    ],
)
def test_bad_input(flags, message):
    with pytest.raises(VariatorError, match=message):
        main(flags)
