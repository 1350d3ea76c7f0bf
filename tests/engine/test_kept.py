"""`CompressedContext.kept`, which original tokens each head still holds, against the plain form and by hand."""

from __future__ import annotations

import pytest
import reference_select as plain
import torch
from conftest import DECODERS, make_variator, pad, prompts
from reference_select import Segment
from selecting import CONFIGS, make, rule

from llm_variator import CompressedContext, KVPool, VariatorConfig, VariatorError

LISTS = lambda kept: [[head.tolist() for head in layer] for layer in kept]  # noqa: E731


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "gemma3"])
@torch.no_grad()
def test_every_head_keeps_what_the_plain_form_keeps(decoder, settings, tmp_path):
    """A prompt, a second segment behind it, chunks, a pool, a file, few bits: the same tokens."""
    settings = dict(settings)
    if decoder == "llama-mha" and "ratios" in settings:
        settings["ratios"] = tuple(row * 2 for row in settings["ratios"])
    model = make(decoder, settings)
    first, second = prompts(43, 21)
    head, select = model.plugin().config.dense_head, rule(model)
    wanted = plain.read(model.base, first, [Segment(43, select, head)]).kept
    context = model.compress(first)
    assert LISTS(context.kept()) == wanted
    if "ffn" not in model.plugin().config.sites:
        assert LISTS(model.compress(first, prefill_chunk_size=11).kept()) == wanted
    assert LISTS(model.compress(first, pool=KVPool(2000, 4)).kept()) == wanted
    assert LISTS(context.quantised(8).kept()) == wanted
    context.save(tmp_path / "file")
    assert LISTS(CompressedContext.load(tmp_path / "file", model).kept()) == wanted
    both = plain.read(
        model.base, torch.cat((first, second), 1), [Segment(43, select, head), Segment(21, select)]
    ).kept
    assert LISTS(context.extend(second).kept()) == both


@torch.no_grad()
def test_rows_of_a_batch_keep_what_they_keep_alone():
    model, rows = make("llama"), prompts(50, 21, 36)
    context = model.compress(pad(rows, "left"))
    for row, ids in enumerate(rows):
        alone = LISTS(model.compress(ids).kept())
        shifted = [[[column + 50 - ids.shape[1] for column in head] for head in layer] for layer in alone]
        assert LISTS(context.kept(row)) == shifted


@torch.no_grad()
def test_merged_entries_stand_at_their_groups_last_tokens():
    """By hand: 11 tokens, head 1, tail 2, k=3: dense 0, groups ending at 3 and 6, dense from 7."""
    config = VariatorConfig(k=3, sites=("kv",), r=4, dense_head=1, dense_tail=2)
    model = make_variator("llama", config)
    assert LISTS(model.compress(prompts(11)[0]).kept()) == [[[0, 3, 6, 7, 8, 9, 10]] * 2] * 3


@torch.no_grad()
def test_dense_layers_hold_all_and_windows_their_last():
    model = make_variator("gemma3", VariatorConfig(k=2, sites=("kv",), r=4, dense_head=1, dense_tail=1))
    with model.disable_plugin():
        kept = LISTS(model.compress(prompts(20)[0]).kept())
    assert kept[0] == kept[2] == [list(range(20))] * 2
    window = len(kept[1][0])
    assert window < 20
    assert kept[1] == [list(range(20 - window, 20))] * 2


def test_a_row_that_is_not_there_is_refused():
    context = make("llama").compress(prompts(20)[0])
    with pytest.raises(VariatorError, match="no row 1: it has 1"):
        context.kept(1)
    context.free()
    with pytest.raises(VariatorError, match="freed"):
        context.kept()
