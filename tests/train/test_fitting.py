"""The command that fits scores: what it writes, resumes and refuses."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import randomise
from safetensors import safe_open
from safetensors.torch import load_file
from test_shares import kept_by_hand
from tiny import fit_words, model_folder

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.sources.models import load_model
from llm_variator.train import fitting
from llm_variator.train.__main__ import main
from llm_variator.train.futures import FUTURES
from llm_variator.train.scores import TOGETHER, Moments, Watch


def run(output, *flags, **changes):
    main(fit_words(output, *flags, **changes))
    return json.loads((output / "training.json").read_text())["figures"]


def test_the_command_makes_a_plugin_that_loads(tmp_path, squad, capsys):
    figures = run(tmp_path / "run", score_fits=3, data=("pydoc-topics", "task:squad"), data_dir=squad)
    assert figures["fits"] == list(FUTURES)
    assert 0.3 < figures["kept"]["96"] <= 0.5
    assert figures["samples"] == 8
    config = VariatorConfig.from_json(tmp_path / "run" / "variator_config.json")
    kept = sum(kept_by_hand(96, k, 4, 6, 8) if k > 1 else 96 for row in config.k_per_head for k in row)
    assert kept / 96 / 6 == pytest.approx(figures["kept"]["96"])
    model = VariatorModel(load_model(model_folder()))
    model.load_plugin(tmp_path / "run", "kv")
    weights = load_file(tmp_path / "run" / "variator.safetensors")
    assert any(weight.abs().max() > 0 for weight in weights.values())
    layer = next(i for i, row in enumerate(config.k_per_head) if max(row) > 1)
    assert weights[f"kv.{layer}.score.weight"].shape == (3, 2, 32)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "explained variance, held out" in card
    assert "of a prompt of 96 tokens" in card
    printed = capsys.readouterr()
    assert "entries kept: " in printed.out
    assert "contexts/s" in printed.err or "s/ contexts" in printed.err


def test_scores_beside_a_plugin_that_merges_in_ffns(tmp_path):
    config = VariatorConfig(k=4, r=5, dense_tail=6)
    model = VariatorModel(load_model(model_folder()), config)
    randomise(model.plugin())
    model.save_pretrained(tmp_path / "ffn")
    run(tmp_path / "alone")
    run(tmp_path / "both", beside=tmp_path / "ffn", dtype="bfloat16")  # rounds the base, not the plugin
    ffn, alone, both = (
        load_file(tmp_path / name / "variator.safetensors") for name in ("ffn", "alone", "both")
    )
    assert all(torch.equal(both.pop(name), value) for name, value in ffn.items())
    assert both
    assert all(name.startswith("kv.") for name in both)
    assert not any(torch.equal(value, alone.get(name, value + 1)) for name, value in both.items())
    model.load_plugin(tmp_path / "both", "both")
    with pytest.raises(VariatorError, match="same dense_tail, these have 6 and 9"):
        run(tmp_path / "other", beside=tmp_path / "ffn", dense_tail=9)
    with pytest.raises(VariatorError, match="is of another run"):  # sums of other reads
        run(tmp_path / "alone", "--resume", beside=tmp_path / "ffn")
    randomise(model.plugin("default"), seed=5)
    model.save_pretrained(tmp_path / "ffn", plugin_name="default")
    with pytest.raises(VariatorError, match="is of another run"):  # of a plugin that is another one by now
        run(tmp_path / "both", "--resume", beside=tmp_path / "ffn", dtype="bfloat16")
    with pytest.raises(VariatorError, match="--beside is for scores"):
        main(["--model", model_folder(), "--beside", str(tmp_path / "ffn")])


def test_scores_are_the_solution_of_all_samples(tmp_path):
    run(tmp_path / "run")
    moments = Moments(3, 32, 2)
    file = tmp_path / "run" / fitting.MOMENTS_FILE
    with safe_open(file, framework="pt") as opened:
        moments.load(file, [opened.metadata()["record"]])
    fit = moments.solve(TOGETHER)
    weights = load_file(tmp_path / "run" / "variator.safetensors")
    for layer in range(3):
        if f"kv.{layer}.score.weight" in weights:
            assert torch.allclose(weights[f"kv.{layer}.score.weight"][0], fit.weight[layer].float())
            assert torch.allclose(weights[f"kv.{layer}.score.bias"][0], fit.bias[layer].float())


@pytest.mark.parametrize("after", [4, 7])
def test_a_killed_run_goes_on_to_the_same_plugin(tmp_path, monkeypatch, after):
    run(tmp_path / "whole")
    read = Watch.read

    class Killed(Exception):  # noqa: N818
        pass

    calls = []

    def dies(self, sample):
        calls.append(1)
        if len(calls) > after:
            raise Killed
        return read(self, sample)

    monkeypatch.setattr(Watch, "read", dies)
    with pytest.raises(Killed):
        run(tmp_path / "cut")
    assert not (tmp_path / "cut" / "variator_config.json").exists()
    monkeypatch.setattr(Watch, "read", read)
    with pytest.raises(VariatorError, match="is of an earlier run: add --resume"):
        run(tmp_path / "cut")
    with pytest.raises(VariatorError, match="is of another run"):
        run(tmp_path / "cut", "--resume", seed=1)
    seen = []
    monkeypatch.setattr(Watch, "read", lambda self, sample: seen.append(1) or read(self, sample))
    run(tmp_path / "cut", "--resume")
    assert len(seen) == 8 - after // 3 * 3 + fitting.HELD_OUT
    cut, whole = (tmp_path / name for name in ("cut", "whole"))
    config = "variator_config.json"
    assert (cut / config).read_text() == (whole / config).read_text()
    ours, theirs = (load_file(folder / "variator.safetensors") for folder in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_share_needs_no_new_pass(tmp_path, monkeypatch):
    run(tmp_path / "run")
    read, seen = Watch.read, []
    monkeypatch.setattr(Watch, "read", lambda self, sample: seen.append(1) or read(self, sample))
    figures = run(tmp_path / "run", "--resume", keep=0.8)
    assert len(seen) == fitting.HELD_OUT
    assert 0.5 < figures["kept"]["96"] <= 0.8
    figures = run(tmp_path / "run", "--resume", keep=0.8, dense_tail=20)
    assert len(seen) == 2 * fitting.HELD_OUT
    assert figures["config"]["dense_tail"] == 20


def test_given_ratios_stay(tmp_path):
    ratios = [[2, 1], [1, 1], [8, 4]]
    figures = run(tmp_path / "run", k_per_head=json.dumps(ratios))
    assert figures["config"]["k_per_head"] == ratios
    assert set(load_file(tmp_path / "run" / "variator.safetensors")) == {
        f"kv.{layer}.score.{name}" for layer in (0, 2) for name in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(keep=0.05), "--keep 0.05 is too little"),
        (dict(fit_tokens=400), "--fit-tokens 400 .* the model has 512 positions"),
        (dict(fit_tokens=9), "--fit-tokens 9 leaves no token"),
        (dict(calibrate_tokens=15), "--calibrate-tokens 15: such a prompt stays whole"),
        (dict(data="nowhere/nothing"), "no such file or folder"),
        (dict(sites="ffn,kv", compressor="ffn=weighted,kv=select"), "give --sites kv"),
        (dict(max_steps=3), "leave --max-steps out"),
        (dict(score_fits=3), "--score-fits 3: 1 fits all futures together, 2 each by itself"),
        (dict(layers="7"), "layers names layer 7"),
        (dict(init="least-squares"), "--init least-squares"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(VariatorError, match=message) as raised:
        run(tmp_path / "run", **changes)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "variator_config.json").exists()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(VariatorError, match="nothing to resume: there is no"):
        run(tmp_path / "run", "--resume")
