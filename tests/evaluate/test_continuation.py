"""`python -m llm_variator.evaluate continuation` on a tiny decoder."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from conftest import randomise
from tiny import model_folder

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.groups import split
from llm_variator.evaluate.__main__ import main
from llm_variator.measures.metrics import continuation_cross_entropy
from llm_variator.sources.corpora import EMBEDDED, read_windows
from llm_variator.sources.models import load_model, load_tokenizer

CONTEXT, CONTINUATION, WINDOWS = 30, 10, 4
CONFIG = VariatorConfig(k=3, sites=("ffn", "kv"), r=4, dense_head=2, dense_tail=5)


@pytest.fixture(scope="module")
def model() -> VariatorModel:
    model = VariatorModel(load_model(model_folder()), CONFIG)
    randomise(model.plugin(), std=0.1)
    return model


@pytest.fixture(scope="module")
def plugin(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("plugin") / "k3"
    model.save_pretrained(folder)
    return str(folder)


def words(*more: str) -> list[str]:
    sizes = ["--context", CONTEXT, "--continuation", CONTINUATION, "--windows", WINDOWS, "--batch-size", 3]
    return ["continuation", "--model", model_folder(), *map(str, sizes), *more]


def test_table_and_file_hold_the_metric_of_every_condition(model, plugin, tmp_path, capsys):
    main(words("--plugin", "none", plugin, "--untrained", "--json", str(tmp_path / "r.json")))
    result = json.loads((tmp_path / "r.json").read_text())
    ((source, rows),) = result["figures"]["texts"].items()
    assert source == EMBEDDED
    scores = {score["prompt"]: score for score in rows}
    assert list(scores) == ["dense", "no context", "k3", "k3 (untrained)"]

    windows = read_windows(EMBEDDED, load_tokenizer(model_folder()), seq_length=CONTEXT + CONTINUATION)
    chosen = windows[torch.linspace(0, len(windows) - 1, WINDOWS).long()]
    assert scores["k3"]["cross_entropy"] == pytest.approx(
        continuation_cross_entropy(model, chosen, CONTEXT), abs=1e-5
    )
    with model.disable_plugin():
        dense = continuation_cross_entropy(model, chosen, CONTEXT)
    assert scores["dense"]["cross_entropy"] == pytest.approx(dense, abs=1e-5)
    entries = split(CONTEXT, 3, 2, 5).entries
    assert (
        scores["k3"]["kv_share"] == scores["k3 (untrained)"]["kv_share"] == pytest.approx(entries / CONTEXT)
    )
    assert scores["k3"]["cross_entropy"] != scores["k3 (untrained)"]["cross_entropy"]
    assert len(result["figures"]["configs"]) == 2
    assert result["command"].startswith("python -m llm_variator.evaluate continuation --model ")

    by_row = []
    for own in chosen:
        with model.disable_plugin():
            base = continuation_cross_entropy(model, own[None], CONTEXT)
        by_row.append(continuation_cross_entropy(model, own[None], CONTEXT) - base)
    assert scores["k3"]["above_dense"] == pytest.approx(statistics.fmean(by_row), abs=1e-5)
    error = statistics.stdev(by_row) / WINDOWS**0.5
    assert scores["k3"]["above_dense_error"] == pytest.approx(error, abs=1e-5)

    printed = capsys.readouterr().out
    assert f"{scores['k3']['cross_entropy']:.4f}" in printed


def test_every_text_is_shown_apart(plugin, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("some words of another kind, again and again. " * 100)
    file = tmp_path / "r.json"
    main(words("--plugin", plugin, "--data", EMBEDDED, str(other), "--json", str(file)))
    texts = json.loads(file.read_text())["figures"]["texts"]
    assert next(iter(texts)) == EMBEDDED
    embedded, repeated = texts.values()
    assert [row["prompt"] for row in embedded] == [row["prompt"] for row in repeated]
    assert embedded[0]["cross_entropy"] != repeated[0]["cross_entropy"]
    assert capsys.readouterr().out.count("above dense") == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--windows", "1000000"], "holds only"),
        (["--context", "600000"], "fewer than one window"),
        (["--context", "0"], "--context: expected a whole number of at least 1"),
        (["--plugin", "nowhere"], "nowhere"),
        (["--data", "missing.csv/"], "missing.csv"),
    ],
)
def test_wrong_input(more, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(VariatorError, match=message):
        main(words(*more))


def test_a_command_is_needed():
    with pytest.raises(VariatorError, match="required: command"):
        main([])


def test_a_plugin_given_twice_would_be_two_rows_of_one_name(plugin):
    with pytest.raises(VariatorError, match="is given twice: leave one out"):
        main(words("--plugin", plugin, plugin))
