"""Measurements are found again for what they were made of, and for nothing else."""

from __future__ import annotations

import dataclasses

from llm_variator.evaluate import store
from llm_variator.evaluate.alternatives import Drop
from llm_variator.evaluate.conditions import Dense


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


def test_measurements_depend_on_the_code(tmp_path, monkeypatch):
    assert all(list(store.PACKAGE.glob(pattern)) for pattern in store._MEASURING)
    (tmp_path / "model.py").write_text("one")
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    before = store.source_digest()
    assert store.source_digest() == before
    (tmp_path / "model.py").write_text("two")
    assert store.source_digest() != before
