"""The token algebra against loops over positions."""

from __future__ import annotations

import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_variator.engine.groups import FILLER, Indices, Segment, Slices, split

CPU = torch.device("cpu")
sizes = dict(k=st.integers(1, 9), head=st.integers(0, 6), tail=st.integers(0, 9))


def sum_merge(groups, members):
    """Wrong where a missing member is not zero."""
    assert members is None or members.shape == groups.shape[-3:-1]
    return groups.sum(-2)


@given(n=st.integers(0, 60), **sizes)
def test_split_is_the_formula(n, k, head, tail):
    part = split(n, k, head, tail)
    assert part.groups == max(0, (n - head - tail) // k)
    assert part.head + part.groups * k + part.tail == n
    assert part.entries == part.groups + (n - part.groups * k)
    assert part.tail >= min(n, tail)


@given(n=st.integers(0, 60), **sizes)
def test_a_ragged_split_leaves_only_the_tail_asked_for(n, k, head, tail):
    part = split(n, k, head, tail, ragged=True)
    if n <= head + tail:
        assert part == (0, 0, n)
    else:
        assert (part.head, part.tail) == (head, tail)
        assert 0 <= part.groups * k - (n - head - tail) < k


@given(st.data(), st.integers(1, 30), *(sizes[name] for name in ("k", "head", "tail")))
@settings(max_examples=150, deadline=None)
def test_every_operation_equals_a_loop(data, width, k, head, tail):
    """Random rows: padding anywhere, any prompt length, short last groups or none."""
    rows, ragged = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    padded = data.draw(st.booleans())
    valid = torch.tensor(
        [[not padded or data.draw(st.booleans()) for _ in range(width)] for _ in range(rows)]
    )
    counts = valid.sum(1).tolist()
    lengths = [data.draw(st.integers(0, count)) for count in counts]
    segment = Segment(width, lengths, head=head, tail=tail, device=CPU, valid=valid, ragged=ragged)
    grouping = segment.grouping(k)
    assert isinstance(grouping, Slices if valid.all() and len(set(lengths)) == 1 else Indices)
    assert segment.grouping(k) is grouping

    x = torch.randn(rows, width, 4, dtype=torch.float64)
    compressed = grouping.compress(x, sum_merge)
    restored = grouping.restore(compressed, x, lambda merged, groups: merged.unsqueeze(-2) + groups)
    taken, placed = grouping.take(x[:, None], 2)[:, 0], grouping.place(compressed)
    columns, reach = grouping.columns.expand(rows, -1), grouping.reach.expand(rows, -1)
    most, some = 0, False
    for row in range(rows):
        tokens = [column for column in range(width) if valid[row, column]]
        entries = [
            ([tokens[i] for i in entry.positions], entry.merged)
            for entry in reference.entries(len(tokens), lengths[row], k, head, tail, ragged=ragged)
        ]
        first = compressed.shape[1] - len(entries)  # right-aligned
        assert (columns[row, :first] == FILLER).all()
        most, some = max(most, len(entries)), some or any(merged for _, merged in entries)
        for slot, (own, merged) in enumerate(entries, start=first):
            expected = x[row, own].sum(0)
            assert columns[row, slot] == own[-1]
            torch.testing.assert_close(compressed[row, slot], expected)
            torch.testing.assert_close(placed[row, own[-1]], expected)
            assert torch.equal(taken[row, slot], x[row, own[-1]])
            for column in own:
                assert reach[row, column] == own[-1]
                torch.testing.assert_close(
                    restored[row, column], expected + x[row, column] if merged else expected
                )
    assert compressed.shape[1] == most
    assert grouping.has_groups == some
    assert grouping.has_fillers == bool((columns == FILLER).any())
    assert placed.isfinite().all()


def test_position_embeddings_of_one_row_serve_all():
    grouping = Segment(6, [6, 4], head=0, tail=0, device=CPU).grouping(2)
    assert grouping.take(torch.arange(6.0)[None, :, None], 1)[..., 0].tolist() == [[0, 1, 3, 5], [1, 3, 4, 5]]
