"""Wrong input of `python -m llm_variator.train`: one clear error each, nothing left behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import randomise
from safetensors.torch import load_file
from tiny import model_folder, train, words

from llm_variator import VariatorConfig, VariatorError, VariatorModel, cli
from llm_variator.sources.models import load_model
from llm_variator.train.__main__ import main
from llm_variator.train.least_squares import LeastSquares
from llm_variator.train.settings import Settings
from llm_variator.train.trainer import VariatorTrainer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k=0), "k must be an integer >= 1, got 0"),
        (dict(k=-2), "k must be an integer >= 1"),
        (dict(sites="ffn,mlp"), "site must be one of"),
        (dict(compressor="max"), "compressor must be one of"),
        (dict(layers="7"), "layers names layer 7"),
        (dict(k_per_layer='{"ffn": [1, 2]}'), "has 2 entries"),
        (dict(max_steps=0), "--max-steps 0 leaves nothing to do: give steps, --init least-squares"),
        (dict(batch_size=-1), "--batch-size"),
        (dict(learning_rate=0), "--learning-rate: expected a number above 0"),
        (dict(schedule="step"), "--schedule"),
        (dict(loss="l1"), "--loss"),
        (dict(stage="distil"), "--stage"),
        (dict(stage="adapt"), "--stage adapt needs a --task: one of mnli"),
        (dict(stage="finetune", task="sst2"), "--stage finetune trains no plugin: leave out --k"),
        (dict(stage="adapt", task="sst2", method="ltp"), "--method ltp trains no plugin: leave out --k"),
        (dict(stage="adapt", task="sst3"), "--task"),
        (dict(task="sst2"), "--stage pretrain knows no task"),
        (dict(method="ltp"), "token pruning has nothing to pre-train"),
        (dict(method="distill", k=None, r=None, dense_head=None), "not a decoder"),
        (dict(task_weight=0.5), "--task-weight belongs to --stage adapt"),
        (dict(student="somewhere"), "--student belongs to --method distill"),
        (dict(keep=0.5), "--keep is for --method ltp"),
        (dict(stage="adapt", task="sst2", eval_every=3), "every evaluation has one: give --save-every 3"),
        (dict(stage="adapt", task="sst2", eval_every=1), "every evaluation has one: give --save-every 1"),
        (dict(sites="kv", init="least-squares"), "this plugin restores none"),
        (dict(init="zeros"), "--init"),
        (dict(recall=1.5), "--recall is a share of the windows, at most 1; got 1.5"),
        (dict(keep=1.5), "--keep: expected a share above 0, at most 1, got '1.5'"),
        (dict(seq_length=8), "leaves no prompt before --continuation 8"),
        (dict(prompt_tokens=(12, 8)), "--prompt-tokens 12 8 must rise, to 16 at most"),
        (dict(prompt_tokens=(8, 17)), "--prompt-tokens 8 17 must rise, to 16 at most"),
        (dict(dense_tail=7), "prompts of 8 tokens hold no group of 2"),
        (dict(k=9), "prompts of 8 tokens hold no group of 9"),
        (dict(compressor="mean", decompressor="copy"), "nothing to train"),
        (dict(seq_length=700_000), "too few to train on windows"),
        (dict(data="a=0"), "weight must be a number above 0"),
        (dict(data_dir="nowhere"), "data folder nowhere does not exist"),
        (dict(plugin="nowhere"), "--plugin keeps its own configuration: leave out --k, --r, --dense-head"),
        (dict(plugin="nowhere", k=None, r=None, dense_head=None), "nowhere"),
        (dict(model="no-such-model/at all"), "no such folder"),
        (dict(model=None), "--model"),
        (dict(dtype="int3"), "unknown dtype 'int3'"),
        (dict(num_layers=1), "add --random-init"),
        (dict(config="nowhere.yaml"), "recipe nowhere.yaml: cannot be read"),
    ],
)
def test_wrong_flag(tmp_path, changes, message):
    with pytest.raises(VariatorError, match=message):
        train(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device", "count", "message"),
    [("cuda", 0, "--device cuda: PyTorch finds no CUDA device"), ("auto", 2, "several GPUs are visible")],
)
def test_device_that_cannot_be_used(tmp_path, monkeypatch, device, count, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(VariatorError, match=message):
        train(tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()


def test_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(VariatorError, match="holds no text"):
        train(tmp_path / "run", data=tmp_path / "a.txt")
    assert not (tmp_path / "run").exists()


def test_output_under_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VariatorError, match=r"cannot write to .*file/run: choose another --output"):
        train(tmp_path / "file" / "run")


def test_resume_from_nothing(tmp_path):
    with pytest.raises(VariatorError, match="nothing to resume"):
        train(tmp_path / "run", "--resume")
    assert not (tmp_path / "run").exists()


def test_checkpoints_are_not_overwritten_by_accident(tmp_path):
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(VariatorError, match="holds checkpoints: add --resume"):
        train(tmp_path / "run")


def test_default_output_is_named_after_the_plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(words(None, max_steps=1, k="ffn=2,kv=3", sites="ffn,kv"))
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-k2-3-ffn-kv")
    assert (folder / "variator.safetensors").is_file()


def test_least_squares_reads_more_than_a_short_run(tmp_path, capsys):
    train(tmp_path / "run", max_steps=1, init="least-squares", init_tokens=1000)
    wanted = re.search(r"least squares over ([\d,]+) tokens", capsys.readouterr().err)
    assert 1000 <= int(wanted[1].replace(",", "")) < 1100


def test_least_squares_alone(tmp_path):
    figures = train(tmp_path / "run", max_steps=0, init="least-squares", init_tokens=200)
    assert figures["steps"] == 0
    assert figures["held_out"]["compressed"] > 0
    assert load_file(tmp_path / "run" / "variator.safetensors")["ffn.0.decompressor.down.weight"].norm() > 0


def test_a_start_by_least_squares_outlives_a_kill_before_the_first_checkpoint(tmp_path, monkeypatch):
    given = dict(max_steps=2, init="least-squares", init_tokens=200, save_every=2)
    train(tmp_path / "whole", **given)
    assert not (tmp_path / "whole" / "start").exists()
    with monkeypatch.context() as patch:
        patch.setattr(
            VariatorTrainer, "training_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", **given)
    (tmp_path / "run" / "checkpoint-2").mkdir()  # the kill came while it was written
    monkeypatch.setattr(LeastSquares, "__init__", lambda *args: pytest.fail("fitted anew"))
    train(tmp_path / "run", "--resume", **given)
    ours, theirs = (load_file(tmp_path / name / "variator.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("init", ["copy", "least-squares"])
def test_a_plugin_that_merges_and_keeps_is_trained_on(tmp_path, init):
    config = VariatorConfig(
        k=2, sites=("ffn", "kv"), compressor={"ffn": "weighted", "kv": "select"}, block=4, r=4, dense_head=1
    )
    model = VariatorModel(load_model(model_folder()), config)
    randomise(model.plugin(), std=0.1)
    model.save_pretrained(tmp_path / "both")
    none = dict(k=None, r=None, dense_head=None)
    train(tmp_path / "run", plugin=tmp_path / "both", init=init, init_tokens=200, **none)
    before, after = (load_file(tmp_path / name / "variator.safetensors") for name in ("both", "run"))
    assert after.keys() == before.keys()
    assert not torch.equal(after["ffn.0.decompressor.down.weight"], before["ffn.0.decompressor.down.weight"])


def test_plugins_of_different_sites_are_trained_on_together(tmp_path):
    sites = {
        "ffn": VariatorConfig(k=2, sites=("ffn",), r=4, dense_head=1),
        "kv": VariatorConfig(k=2, sites=("kv",), compressor="select", block=4, dense_head=1),
    }
    for name, config in sites.items():
        model = VariatorModel(load_model(model_folder()), config)
        randomise(model.plugin(), std=0.1)
        model.save_pretrained(tmp_path / name)
    none = dict(k=None, r=None, dense_head=None)
    train(
        tmp_path / "run", plugin=f"{tmp_path / 'ffn'},{tmp_path / 'kv'}", loss="mse+kl", save_every=1, **none
    )
    ffn, kv, run = (load_file(tmp_path / name / "variator.safetensors") for name in ("ffn", "kv", "run"))
    assert run.keys() == ffn.keys() | kv.keys()
    train(tmp_path / "joined", plugin=f"{tmp_path / 'ffn'},{tmp_path / 'kv'}", max_steps=0, **none)
    joined = load_file(tmp_path / "joined" / "variator.safetensors")
    assert joined.keys() == run.keys()
    assert all(torch.equal(value, (ffn | kv)[name]) for name, value in joined.items())
    model = VariatorModel(load_model(model_folder()), VariatorConfig(sites=("kv",), dense_head=2))
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(VariatorError, match=r"same dense_head, these have 1 and 2"):
        train(tmp_path / "new", plugin=f"{tmp_path / 'ffn'},{tmp_path / 'other'}", **none)
    train(tmp_path / "new", plugin=f"{tmp_path / 'ffn'},{tmp_path / 'other'}", **none | dict(dense_head=2))
    assert json.loads((tmp_path / "new" / "variator_config.json").read_text())["dense_head"] == 2
    with pytest.raises(VariatorError, match="--plugin keeps its own configuration: leave out --dense-head"):
        train(tmp_path / "newer", plugin=tmp_path / "ffn", k=None, r=None, dense_head=2)


def test_process_prints_one_line_and_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "llm_variator.train", *words(tmp_path / "run", seq_length=8)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    # bitsandbytes, where it is installed, says at its import by PEFT which kernel it would rather have
    said = [line for line in done.stderr.splitlines() if not line.startswith("Failed to load CPU gemm_4bit")]
    assert len(said) == 1
    assert said[0].startswith("error: --seq-length 8 leaves no prompt")
    assert done.stdout == ""


def test_help_names_every_flag():
    parser = cli.parser_of(Settings, prog="train")
    text = parser.format_help()
    for action in parser._actions:
        assert action.help, action.dest
        assert action.option_strings[-1] in text
