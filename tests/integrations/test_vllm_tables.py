"""How heads are cut into block tables, against hand-made expectations. Needs no vLLM."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_variator.integrations.vllm.heads import Keep
from llm_variator.integrations.vllm.settings import Settings
from llm_variator.integrations.vllm.tables import Kind, cut, own_tables
from llm_variator.sources.models import load_config, plugin_folder


def test_vllms_own_rule():
    assert own_tables([9, 15, 12]) == (9, 5, None)  # the smallest class
    assert own_tables([9, 13, 12]) == (13, 3, None)  # or the largest, where they are nearly equal
    assert own_tables([7]) == (7, 1, None)


def test_a_part_of_a_class_sets_the_size():
    # 6 tables of 9, vLLM's own, have 54 places for 39 heads; 10 of the 20 make all of them 10: 40 places
    assert own_tables([9, 10, 20])[:2] == (9, 6)
    assert cut({"a": 9, "b": 10, "c": 20}, dict.fromkeys("abc", 1.0)) == (10, 4, "c")
    # entries count, not heads: the class that is filled up holds next to nothing
    assert cut({"a": 9, "b": 10, "c": 18}, {"a": 100.0, "b": 1.0, "c": 100.0}) == (9, 5, None)


def test_one_class_is_one_table():
    assert cut({"a": 90}, {"a": 1.0}) == (90, 1, None)


@given(st.dictionaries(st.integers(), st.integers(1, 40), min_size=1, max_size=8), st.randoms())
def test_what_is_promised_is_what_vllm_makes(classes, random):
    entries = {kind: random.uniform(1, 100) for kind in classes}
    found = cut(classes, entries)
    counts = dict(classes)
    if found.parted is not None:
        counts[found.parted] -= found.size
        counts["part"] = found.size
    assert own_tables(counts.values())[:2] == found[:2]
    own = own_tables(classes.values())

    def held(size):
        return sum(-(-count // size) * size * entries[kind] for kind, count in classes.items())

    assert held(found.size) <= max(held(own.size), 9 / 8 * held(1))


def test_the_shipped_plugin():
    config = load_config("smollm2-135m")
    settings = Settings.of({"plugins": {"kv4": str(plugin_folder("smollm2-135m/kv4"))}}, config)
    found, parted = settings.tables(config)
    # 9, 16, 10, 10, 19, 14 and 12 heads of ratios 1 to 64: in threes 3 + 6 + 4 + 4 + 7 + 5 + 4 tables
    assert found == (3, 33, Kind((), (("kv4", Keep(16, 64)),)))
    plan = settings.plugins["kv4"].plan
    assert [plan.selected[layer][head] for layer, head in parted] == [16] * 3
