"""Kept keys in real memory: the cache holds exactly the chosen entries."""

from __future__ import annotations

import pytest
import torch
from conftest import pad, prompts
from selecting import FULL, GREEDY, MAIN, by_hand, held, make


def real_bytes(held_by) -> int:
    """Bytes of all keys and values (4D floating-point tensors) within reach of an object, each storage once."""
    found, seen, left = {}, set(), [held_by]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.dim() == 4 and item.is_floating_point():
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            left += item.values()
        elif isinstance(item, (list, tuple, set)):
            left += item
        elif type(item).__module__.startswith(("llm_variator.", "transformers.cache_utils")):
            left += [*getattr(item, "__dict__", {}).values()]
            left += [
                getattr(item, name) for name in getattr(type(item), "__slots__", ()) if hasattr(item, name)
            ]
    return sum(found.values())


def check_memory(
    cache, report, counts: list[dict[int, tuple[int, int]]], itemsize: int, rows: int = 1
) -> None:
    """`counts`: of each layer ratio -> (heads, entries of each); head_dim is 8."""
    entry = 2 * 8 * itemsize * rows
    for layer, told, classes in zip(cache.layers, report.layers, counts, strict=True):
        heads = sum(number for number, _ in classes.values())
        total = sum(number * entries for number, entries in classes.values())
        assert told.entries == pytest.approx(total / heads)
        assert told.bytes == total * entry == real_bytes(layer)
        assert told.dense_entries == cache.get_seq_length()
        assert told.dense_bytes == cache.get_seq_length() * heads * entry
        if max(classes) > 1:
            found = {part.ratio: (part.heads, part.entries, part.bytes) for part in told.classes}
            assert found == {k: (number, n, number * n * entry) for k, (number, n) in classes.items()}
            assert len(told.classes) == len(classes)
    assert report.bytes == sum(layer.bytes for layer in report.layers)


@pytest.mark.parametrize("tail", [0, 1, 4, 11])
@pytest.mark.parametrize("head", [0, 3])
@torch.no_grad()
def test_cache_holds_exactly_the_entries(head, tail):
    block, ratios = 4, ((2, 2, 4, 1), (4, 4, 4, 4), (1, 1, 1, 1))
    settings = dict(block=block, dense_head=head, dense_tail=tail, ratios=ratios)
    model = make("llama-mha", settings, torch.float32)
    for n in [*range(1, head + tail + 3 * block + 3), 77]:
        (ids,) = prompts(n)
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        counts = [{k: (row.count(k), by_hand(n, k, block, head, tail)) for k in set(row)} for row in ratios]
        assert cache.get_seq_length() == n
        report = model.kv_cache_report()
        assert model.kv_cache_report(cache) == report
        check_memory(cache, report, counts, itemsize=4)


@torch.no_grad()
def test_cache_of_a_batch_after_generation():
    model = make("llama")
    rows = torch.cat(prompts(39, 39, 39))
    out = model.generate(rows, **FULL, **GREEDY)
    counts = [{k: (row.count(k), by_hand(39, k, 4, 2, 3) + 5) for k in set(row)} for row in MAIN["ratios"]]
    check_memory(out.past_key_values, model.kv_cache_report(), counts, itemsize=8, rows=3)


@torch.no_grad()
def test_the_report_of_a_ragged_batch_counts_its_longest_row():
    model = make("llama")
    model(**pad(prompts(12, 39, 25), "left"), use_cache=True)
    wanted = [sum(by_hand(39, k, 4, 2, 3) for k in row) / 2 for row in MAIN["ratios"]]
    assert held(model) == pytest.approx(wanted)


@torch.no_grad()
def test_sliding_layers_keep_their_window():
    model = make("gemma3")
    cache = model(prompts(45)[0], use_cache=True).past_key_values
    assert 1 not in model.plugin().selects
    assert cache.layers[1].keys.shape[-2] == 7
    assert model.kv_cache_report().layers[1].entries == 7
