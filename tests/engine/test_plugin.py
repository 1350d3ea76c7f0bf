"""Plugin files: exact keys, round trips, and every way a folder can be wrong."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct

import pytest
import torch
from conftest import make_decoder, make_variator, prompts, randomise
from safetensors.torch import load_file, save_file

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine import plugin
from llm_variator.engine.files import write_atomically

CONFIG = VariatorConfig(k=2, sites=("ffn", "kv"), r=5, layers=(0, 2))
KEYS = {
    *(f"ffn.{i}.compressor.{name}" for i in (0, 2) for name in ("weight", "bias")),
    *(
        f"ffn.{i}.decompressor.{half}.{name}"
        for i in (0, 2)
        for half in ("down", "up")
        for name in ("weight", "bias")
    ),
    *(f"kv.{i}.compressor.{name}" for i in (0, 2) for name in ("weight", "bias")),
}


@pytest.fixture
def saved(tmp_path):
    """A model and the folder of its plugin."""
    model = make_variator("llama", CONFIG)
    model.save_pretrained(tmp_path / "plugin", facts={"steps": 7})
    return model, tmp_path / "plugin"


def test_exactly_the_plugin_is_saved(saved):
    model, folder = saved
    assert {file.name for file in folder.iterdir()} == {
        "variator_config.json",
        "variator.safetensors",
        "README.md",
    }
    weights = load_file(folder / "variator.safetensors")
    assert set(weights) == KEYS
    trained = {name for name, parameter in model.plugin().named_parameters() if parameter.requires_grad}
    assert trained == KEYS
    k, r, d = 2, 5, 32
    count = 2 * (k * k * d + k) * 2 + 2 * (3 * r * d + r + d)  # section 3.4: two FFN sites, two K/V sites
    assert sum(value.numel() for value in weights.values()) == count
    card = (folder / "README.md").read_text()
    assert "| steps | 7 |" in card
    assert f"{count:,}" in card


def test_round_trip(saved):
    model, folder = saved
    (ids,) = prompts(30)
    expected = model(ids).logits
    base = model.unload()
    again = VariatorModel.from_pretrained(base, folder, plugin_name="k2")
    assert again.active_plugin == "k2"
    assert again.plugins["k2"] == model.plugins["default"]
    assert torch.equal(again(ids).logits, expected)


def test_weights_take_the_dtype_asked_for(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(tmp_path / "half/variator.safetensors").values()} == {
        torch.bfloat16
    }
    model.load_plugin(tmp_path / "half", "half")
    assert {p.dtype for p in model.plugin("half").parameters()} == {torch.float32}  # the base's
    model.load_plugin(tmp_path / "half", "kept", dtype=torch.bfloat16)
    assert {p.dtype for p in model.plugin("kept").parameters()} == {torch.bfloat16}


def test_a_base_whose_plugin_could_not_be_loaded_is_as_before(saved):
    model, folder = saved
    base = model.unload()
    with pytest.raises(VariatorError, match="nowhere"):
        VariatorModel.from_pretrained(base, folder / "nowhere")
    assert VariatorModel.from_pretrained(base, folder).active_plugin


def test_float16_files_hold_large_factors(saved, tmp_path):
    """Least squares leave weights beyond 65,504: cast as they are, the plugin answered with NaN."""
    model, _ = saved
    layer = model.plugin().sites["ffn", 0].decompressor
    with torch.no_grad():
        layer.down.weight.mul_(2.0**20), layer.down.bias.mul_(2.0**20), layer.up.weight.mul_(2.0**-20)
    (ids,) = prompts(30)
    expected = model(ids).logits
    kept = {name: value.clone() for name, value in model.plugin().state_dict().items()}
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert all(torch.equal(value, kept[name]) for name, value in model.plugin().state_dict().items())
    model.load_plugin(tmp_path / "half", "half")
    with model.use_plugin("half"):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-2, atol=1e-2)
    model.save_pretrained(tmp_path / "wide")
    base = model.unload().half()
    model = VariatorModel.from_pretrained(base, tmp_path / "wide", plugin_name="wide")
    assert model(ids).logits.isfinite().all()
    model.load_plugin(tmp_path / "wide", "fine", dtype=torch.float32)  # its weights are cast in the pass
    with model.use_plugin("fine"):
        assert model(ids).logits.isfinite().all()


def test_what_float16_cannot_hold_is_neither_saved_nor_loaded(tmp_path):
    model = make_variator("llama", dataclasses.replace(CONFIG, activation="tanh"))
    model.save_pretrained(tmp_path / "good", dtype=torch.float16)
    with torch.no_grad():
        model.plugin().sites["ffn", 0].decompressor.down.weight.fill_(1e5)
    with pytest.raises(VariatorError, match=r"down\.weight has values that float16 does not hold"):
        model.save_pretrained(tmp_path / "good", dtype=torch.float16)
    assert (
        load_file(tmp_path / "good/variator.safetensors")["ffn.0.decompressor.down.weight"].isfinite().all()
    )
    model.save_pretrained(tmp_path / "wide")
    base = model.unload().half()
    with pytest.raises(VariatorError, match="onto a base in bfloat16 or float32"):
        VariatorModel.from_pretrained(base, tmp_path / "wide", plugin_name="wide")
    with pytest.raises(VariatorError, match="onto a base in bfloat16 or float32"):
        VariatorModel(base).load_plugin(tmp_path / "wide", "fine", dtype=torch.float32)


def test_a_plugin_without_weights_can_be_saved(tmp_path):
    model = make_variator("llama", VariatorConfig(k=3, compressor="mean", decompressor="copy"))
    model.save_pretrained(tmp_path)
    model.load_plugin(tmp_path, "again")
    assert not list(model.plugin("again").parameters())


def drop(folder, name):
    (folder / name).unlink()


def edit(folder, change):
    weights = load_file(folder / "variator.safetensors")
    change(weights)
    save_file(weights, folder / "variator.safetensors")


def cut(folder, size):
    file = folder / "variator.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def settings(folder, **changes):
    file = folder / "variator_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def base(folder, **changes):
    file = folder / "variator_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"base": values["base"] | changes}))


NAME = "ffn.0.compressor.weight"
DAMAGE = {
    "no config": (lambda f: drop(f, "variator_config.json"), "variator_config.json not found"),
    "no weights": (lambda f: drop(f, "variator.safetensors"), "variator.safetensors not found"),
    "empty weights": (lambda f: cut(f, 0), "not a whole safetensors file"),
    "truncated header": (lambda f: cut(f, 20), "not a whole safetensors file"),
    "truncated data": (lambda f: cut(f, -7), "not a whole safetensors file"),
    "pickle": (
        lambda f: (f / "variator.safetensors").write_bytes(pickle.dumps({"a": 1})),
        "not a whole safetensors file",
    ),
    "torch file": (
        lambda f: torch.save({"a": 1}, f / "variator.safetensors"),
        "not a whole safetensors file",
    ),
    "absurd header": (
        lambda f: (f / "variator.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "not a whole safetensors file",
    ),
    "missing key": (lambda f: edit(f, lambda w: w.pop(NAME)), f"lacks {NAME}"),
    "surplus key": (lambda f: edit(f, lambda w: w.update(extra=torch.ones(1))), "surplus extra"),
    "wrong shape": (lambda f: edit(f, lambda w: w.update({NAME: torch.ones(2, 2)})), f"{NAME} has shape"),
    "wrong dtype": (lambda f: edit(f, lambda w: w.update({NAME: w[NAME].int()})), f"{NAME} is torch.int32"),
    "no number": (
        lambda f: edit(f, lambda w: w[NAME].view(-1)[3:4].fill_(float("inf"))),
        f"{NAME} holds values that are",
    ),
    "other ratio": (lambda f: settings(f, k=4), "has shape"),
    "other layers": (lambda f: settings(f, layers=[0, 1]), "lacks"),
    "unknown setting": (lambda f: settings(f, speed=9), "unknown setting speed"),
    "newer format": (lambda f: settings(f, format_version=2), "format_version 2"),
    "no base": (lambda f: settings(f, base=None), "does not name its base"),
    "other architecture": (lambda f: base(f, model_type="mistral"), "load it onto its own base"),
    "other width": (lambda f: base(f, hidden_size=64), "hidden_size 64"),
    "other depth": (lambda f: base(f, num_layers=12), "num_layers 12"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_folder_changes_nothing(saved, damage):
    model, folder = saved
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(VariatorError, match=message) as caught:
        model.load_plugin(folder, "broken")
    assert str(folder) in str(caught.value)
    assert list(model.plugins) == ["default"]
    assert model.active_plugin == "default"


def test_other_base_weights_are_worth_a_warning(saved, caplog):
    _, folder = saved
    other = make_decoder("llama")
    randomise(other, seed=5)
    VariatorModel.from_pretrained(other, folder)
    assert "other weights" in caplog.text


def test_weights_and_settings_of_two_saves_are_worth_a_warning(saved, caplog, monkeypatch):
    model, folder = saved
    other = VariatorModel(
        model.unload(), VariatorConfig(k=2, sites=("ffn", "kv"), r=5, layers=(0, 2), dense_tail=9)
    )
    writes = []

    def interrupted(path, write):
        writes.append(path.name)
        if len(writes) == 2:
            raise KeyboardInterrupt
        write_atomically(path, write)

    monkeypatch.setattr(plugin, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(folder)
    monkeypatch.undo()
    other.load_plugin(folder, "mixed")
    assert "is not the variator_config.json that these weights were saved with" in caplog.text
    caplog.clear()
    other.save_pretrained(folder)
    other.load_plugin(folder, "whole", decode_block=2)
    assert not caplog.text


def test_an_unwritable_folder_is_named(saved, tmp_path):
    model, _ = saved
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(VariatorError, match="cannot write"):
        model.save_pretrained(tmp_path / "file" / "plugin")


def test_an_interrupted_save_leaves_the_old_files(saved, monkeypatch):
    model, folder = saved
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    randomise(model.plugin(), seed=3)

    def fail(weights, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm_variator.engine.plugin.save_file", fail)
    with pytest.raises(VariatorError, match="No space left"):
        model.save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
