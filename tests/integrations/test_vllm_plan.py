"""The plan of a flattened batch against the Hugging Face path's groups, and hand arithmetic. Needs no vLLM."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_variator.engine.groups import Segment, split
from llm_variator.engine.layers import HiddenCompressor, HiddenDecompressor
from llm_variator.integrations.vllm.plan import Chunk, Layout, Shape, cut, held, parts, settled, whole_step

SHAPES = {2: Shape(4, 5, (2,)), 4: Shape(4, 5, (4,)), 16: Shape(1, 3, (2, 4, 16))}


def layers(k, dim=6):
    torch.manual_seed(k)
    compressor, decompressor = HiddenCompressor(dim, k), HiddenDecompressor(dim, 3)
    for parameter in [*compressor.parameters(), *decompressor.parameters()]:
        parameter.data.normal_()
    return compressor, decompressor


def test_parts_by_hand():
    # 20 tokens, head 4, tail 5, k 4: groups are tokens 4-7 and 8-11
    assert parts(Chunk(0, 20, 0, 20, 4), 4, 4, 5) == (4, 8, 8)
    assert parts(Chunk(0, 8, 0, 20, 4), 4, 4, 5) == (4, 4, 0)
    assert parts(Chunk(0, 6, 8, 20, 4), 4, 4, 5) == (0, 4, 2)
    assert parts(Chunk(0, 3, 12, 20, 4), 4, 4, 5) == (3, 0, 0)
    assert parts(Chunk(0, 12, 0, 12, 4), 4, 4, 5) == (12, 0, 0)  # 12 - 4 - 5 tokens make no group


def test_generated_tokens_read_again_after_a_pre_emption_stay_dense():
    # a request of 20 prompt and 9 generated tokens starts over: the second chunk covers tokens 12 to 29
    assert parts(Chunk(0, 17, 12, 20, 4), 4, 4, 5) == (17, 0, 0)
    assert parts(Chunk(0, 29, 0, 20, 4), 4, 4, 5) == (4, 8, 17)


def test_a_chunk_that_cuts_a_group_is_our_mistake():
    with pytest.raises(AssertionError, match="ends inside"):
        parts(Chunk(0, 6, 0, 20, 4), 4, 4, 5)
    with pytest.raises(AssertionError, match="begins inside"):
        parts(Chunk(0, 6, 6, 20, 4), 4, 4, 5)


def test_cut_by_hand():
    shape = Shape(4, 5, (4,))
    assert [cut(p, 20, shape) for p in range(14)] == [0, 1, 2, 3, 4, 4, 4, 4, 8, 8, 8, 8, 12, 13]
    assert cut(7, 12, shape) == 7  # no groups, no cuts to mind
    assert cut(9, 40, Shape(0, 0, (2, 4))) == 8
    assert cut(6, 40, Shape(0, 0, (2, 4))) == 4


@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from([2, 4, 16]))
def test_cuts_are_allowed_and_the_largest(prompt, position, plugin):
    shape = SHAPES[plugin]

    def allowed(place):
        for k in shape.ratios:
            head, groups, _ = split(prompt, k, shape.head, shape.tail)
            inside = {t for g in range(groups) for t in range(head + g * k + 1, head + (g + 1) * k)}
            if place in inside:
                return False
        return True

    best = max(place for place in range(position + 1) if allowed(place))
    assert cut(position, prompt, shape) == best


@given(st.integers(1, 80), st.sampled_from([2, 4, 16]))
def test_a_whole_step_always_gets_on(prompt, plugin):
    shape, place = SHAPES[plugin], 0
    while place < prompt:
        onward = min(prompt, cut(min(prompt, place + whole_step(shape)), prompt, shape))
        assert onward > place
        place = onward


@given(
    st.integers(1, 60), st.integers(0, 20), st.sampled_from([2, 3, 4]), st.integers(0, 4), st.integers(0, 6)
)
def test_held_counts_the_entries_of_the_split(prompt, generated, k, head, tail):
    part = split(prompt, k, head, tail)
    assert held(prompt + generated, prompt, k, head, tail) == part.entries + generated
    counts = [held(t, prompt, k, head, tail) for t in range(prompt + 1)]
    assert counts == sorted(counts)
    assert counts[0] == 0


def test_settled_ends_where_the_shortest_groups_end():
    # 50 tokens, head 1, tail 3: k 2 ends at 47, k 4 at 45, k 16 at 33
    assert settled(50, Shape(1, 3, (2, 4, 16))) == 33
    assert settled(5, Shape(4, 5, (2,))) == 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 2, 4])), min_size=1, max_size=5), st.data())
def test_a_chunked_batch_equals_whole_rows(requests, data):
    """Each request alone and whole, through the Hugging Face path's grouping, against chunks of all side by side."""
    dim = 6
    shapes, made = {k: SHAPES[k] for k in (2, 4)}, {k: layers(k) for k in (2, 4)}
    frozen = torch.nn.Linear(dim, dim)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(n, dim, generator=generator) for n, _ in requests]
    places, outputs = [0] * len(rows), [[] for _ in rows]
    while any(place < len(row) for place, row in zip(places, rows, strict=True)):
        chunks, pieces, start = [], [], 0
        for i, (row, (n, k)) in enumerate(zip(rows, requests, strict=True)):
            end = min(n, places[i] + data.draw(st.integers(8, 24)))
            end = end if k == 0 or end == n else cut(end, n, shapes[k])
            if end > places[i]:
                chunks.append(Chunk(start, end - places[i], places[i], n, k))
                pieces.append(row[places[i] : end])
                start += end - places[i]
        x = torch.cat([*pieces, torch.full((3, dim), torch.nan)])  # padding
        layout = Layout(chunks, {2: 2, 4: 4}, shapes)
        members = {k: layout.members(x, k) for k in layout.groups}
        entries = layout.compress(members, x, {k: layer[0] for k, layer in made.items()})
        assert len(entries) == layout.entries
        out = layout.restore(frozen(entries), members, x, {k: layer[1] for k, layer in made.items()})
        assert (out[layout.rows :] == 0).all()
        done = iter(chunks)
        for i, (n, _) in enumerate(requests):
            if places[i] < n:
                chunk = next(done)
                outputs[i].append(out[chunk.start : chunk.start + chunk.tokens])
                places[i] += chunk.tokens
    for row, (n, k), pieces in zip(rows, requests, outputs, strict=True):
        wanted = frozen(row)
        if k:
            grouping = Segment(n, n, head=4, tail=5, device=row.device).grouping(k)
            wanted = frozen(grouping.compress(row[None], made[k][0]))
            wanted = grouping.restore(wanted, row[None], made[k][1])[0]
        torch.testing.assert_close(torch.cat(pieces), wanted)


def test_neighbouring_dense_rows_are_one_slice():
    chunks = [Chunk(0, 1, 30, 20, 2), Chunk(1, 1, 9, 8, 0), Chunk(2, 13, 0, 13, 2), Chunk(15, 1, 5, 3, 4)]
    layout = Layout(chunks, {2: 2, 4: 4}, SHAPES)
    assert layout.groups == {2: [slice(6, 10)]}
    assert layout.dense == [slice(0, 6), slice(10, 16)]
    assert (layout.rows, layout.grouped, layout.entries) == (16, 2, 14)


def test_a_layer_that_a_plugin_leaves_dense():
    layout = Layout([Chunk(0, 20, 0, 20, 2)], {2: None}, SHAPES)
    assert not layout.groups
    assert layout.dense == [slice(0, 20)]


def test_tensor_parallel_ranks_restore_the_same_vectors():
    """Sharded linears reduce at the MLP's end: every rank merges, and restores, full-width vectors."""
    torch.manual_seed(0)
    dim, inner = 6, 8
    gate, up, down = torch.randn(inner, dim), torch.randn(inner, dim), torch.randn(dim, inner)
    chunks = [Chunk(0, 30, 0, 30, 2), Chunk(30, 3, 7, 4, 0), Chunk(33, 21, 0, 21, 4)]
    layout = Layout(chunks, {2: 2, 4: 4}, SHAPES)
    made = {k: layers(k) for k in (2, 4)}
    x = torch.randn(layout.rows, dim)

    def run(mlp):
        members = {k: layout.members(x, k) for k in layout.groups}
        entries = layout.compress(members, x, {k: layer[0] for k, layer in made.items()})
        return layout.restore(mlp(entries), members, x, {k: layer[1] for k, layer in made.items()})

    def whole(h):
        return (torch.nn.functional.silu(h @ gate.T) * (h @ up.T)) @ down.T

    def sharded(h):
        parts_ = [slice(0, inner // 2), slice(inner // 2, inner)]
        outputs = [
            (torch.nn.functional.silu(h @ gate[own].T) * (h @ up[own].T)) @ down[:, own].T for own in parts_
        ]
        return outputs[0] + outputs[1]  # the all-reduce of a row-parallel linear

    torch.testing.assert_close(run(sharded), run(whole))
