"""Measurements are found again for what they were made of, and for nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import make_decoder
from tiny import model_folder

from llm_variator import VariatorModel
from llm_variator.evaluate.alternatives import Drop
from llm_variator.loading import load_model
from llm_variator.measures import store
from llm_variator.measures.conditions import Dense


@dataclasses.dataclass(frozen=True)
class Number:
    value: int


def test_a_measurement_depends_on_all_it_was_made_of(tmp_path):
    numbers = iter(range(9))
    drop = Drop(2, 1, 1)

    def get(condition=drop, about=2, settings=3, read=tmp_path) -> int:
        kept = store.Store(read, tmp_path, {"settings": settings})
        return kept.get(condition, {"about": about}, lambda: Number(next(numbers)), Number).value

    assert [get(), get()] == [0, 0]
    assert [get(Drop(3, 1, 1)), get(Dense()), get(about=4), get(settings=5)] == [1, 2, 3, 4]
    assert get(read=None) == 5  # measured afresh, and kept
    assert get() == 5


def key(model) -> dict:
    return store.Store.of(model, None, Path())._settings


@pytest.mark.parametrize(
    "file", ["model.py", "engine/cache/layer.py", "sources/models/model.py", "sources/tasks/table.py"]
)
def test_measurements_depend_on_the_code(file, tmp_path, monkeypatch):
    assert all(list(store.PACKAGE.glob(pattern)) for pattern in store._MEASURING)
    assert (store.PACKAGE / file).is_file()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("one")
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    before = store.source_digest()
    assert store.source_digest() == before
    (tmp_path / file).write_text("two")
    assert store.source_digest() != before
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "other.py").write_text("measures nothing of this")
    changed = store.source_digest()
    (tmp_path / "bench" / "other.py").write_text("still")
    assert store.source_digest() == changed


def test_measurements_depend_on_the_base_and_its_form():
    model = VariatorModel(make_decoder("llama"))
    before = key(model)
    assert key(VariatorModel(make_decoder("llama"))) == before
    assert key(VariatorModel(make_decoder("llama").bfloat16())) != before
    assert key(VariatorModel(make_decoder("llama", attn_implementation="eager"))) != before
    with torch.no_grad():
        model.base.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert key(model) != before


def test_quantised_and_plain_never_share():
    pytest.importorskip("bitsandbytes")
    plain, nf4 = (load_model(model_folder(), quantize=form) for form in (None, "nf4"))
    assert key(VariatorModel(plain)) != key(VariatorModel(nf4))
