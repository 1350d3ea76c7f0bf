"""Slots, lengths and readers of heads that keep keys, against hand-made expectations and the rules' plain form.

Needs no vLLM.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_select import kept_after

from llm_variator.engine.blocks import Kept, Place, Region
from llm_variator.integrations.vllm.heads import HeadStep, Keep, kept, reduced, slots
from llm_variator.integrations.vllm.plan import Chunk, Shape

SHAPES = {2: Shape(2, 3, (2,)), 4: Shape(2, 3, ())}
KEEP = Keep(4, 8)


def step(chunks, table, *, keeps=None, ratios=None, size=4, rows=None):
    return HeadStep(
        chunks,
        list(range(len(chunks))) if rows is None else rows,
        {2: 2} if ratios is None else ratios,
        {4: KEEP} if keeps is None else keeps,
        SHAPES,
        np.array(table, dtype=np.int32),
        size,
    )


def test_kept_by_hand():
    # head 2, blocks 2-9, 10-17, 18-25, tail 3 of 30 tokens: it cuts block 26-33 after one token
    counts = [kept(n, 30, KEEP, 2, 3) for n in range(33)]
    assert counts[:18] == list(range(18))  # two blocks after the head are still whole
    assert counts[18] == 12  # the first of them holds 2 of 8 from now on
    assert counts[25] == 19
    assert counts[26] == 14
    assert counts[29] == 17
    assert counts[30] == 2 + 3 * 2 + 1 + 3  # read to the end: head, blocks, one of one, tail
    assert counts[31:] == [13, 14]  # what follows is dense
    assert [kept(n, 17, KEEP, 2, 3) for n in range(19)] == list(range(19))  # too short to lose anything
    assert not reduced(17, KEEP, 2, 3)
    assert reduced(18, KEEP, 2, 3)
    assert not reduced(30, Keep(1, 8), 2, 3)


def test_slots_by_hand():
    assert slots(np.array([7, 3, 9]), 2, 9, 4).tolist() == [30, 31, 12, 13, 14, 15, 36]


def test_the_second_chunk_of_a_prompt_by_hand():
    # 20 of 30 tokens are read: 2 + 2 entries that stay, and tokens 10 to 19, which are pending
    found = step([Chunk(0, 8, 20, 30, 4)], [[5, 6, 7, 8]])
    (reading,) = found.reading.values()
    assert (reading.held, reading.before, reading.pending) == (14, 4, 10)
    assert reading.blocks.tolist() == [5, 6, 7, 8]
    # up to token 27 one more block is reduced: 4 stay, 2 of tokens 10-17, all of 18-27
    assert kept(28, 30, KEEP, 2, 3) == 4 + 2 + 10
    assert reading.slots.tolist() == [*range(24, 28), *range(28, 32), *range(32, 36)]
    assert reading.place == Place(2, 3, 20, 10)
    assert (reading.start, reading.entry, reading.tokens) == (0, 0, 8)
    assert found.written.size == found.slots.size == 0
    assert not found.dense.rows


def test_the_end_of_a_prompt_with_generated_tokens_behind_by_hand():
    # after a pre-emption: the prompt's last 4 tokens and 3 generated ones in one chunk, behind another's token
    chunks = [Chunk(0, 1, 9, 5, 0), Chunk(1, 7, 26, 30, 4)]
    found = step(chunks, [[1, 2, 3, 0], [5, 6, 7, 8]])
    (reading,) = found.reading.values()
    assert (reading.row, reading.start, reading.entry, reading.tokens) == (1, 1, 1, 4)
    assert (reading.held, reading.before) == (14, 6)
    # 12 entries are left of the prompt; 6 of them are new or moved
    assert reading.slots.tolist() == [26, 27, 28, 29, 30, 31]
    assert found.dense.rows == [0, 1]
    assert found.dense.lengths == [10, 15]
    assert found.dense.starts.tolist() == [0, 1, 4]
    assert found.dense_index.tolist() == [0, 5, 6, 7]
    assert found.written.tolist() == [0, 5, 6, 7]
    assert found.slots.tolist() == [3 * 4 + 1, 32, 33, 34]


def test_dense_and_merged_requests_beside_by_hand():
    # plugin 2 merges tokens 2-3 and 4-5 of 9; plugin 4 decodes behind a reduced prompt of 30
    chunks = [Chunk(0, 9, 0, 9, 2), Chunk(9, 1, 30, 30, 4), Chunk(10, 2, 0, 2, 0)]
    found = step(chunks, [[1, 2, 0, 0], [5, 6, 7, 8], [3, 0, 0, 0]])
    assert found.layout.groups == {2: [slice(2, 6)]}
    assert found.grouped[2].lengths == [4]
    assert found.dense.rows == [0, 0, 1, 2]
    assert found.dense.lengths == [2, 7, 13, 2]
    assert found.dense_index.tolist() == [0, 1, 6, 7, 8, 9, 10, 11]
    # two groups first, then every other row
    assert found.written.tolist() == list(range(10))
    assert found.slots.tolist() == [6, 7, 4, 5, 8, 9, 10, 8 * 4, 12, 13]
    assert not found.reading


def test_a_head_that_keeps_all_reads_as_ever():
    found = step([Chunk(0, 12, 20, 40, 4)], [list(range(16))], keeps={4: Keep(1, 8)})
    assert not found.reading
    assert found.dense.lengths == [32]
    assert found.slots.tolist() == list(range(20, 32))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_what_lies_in_the_blocks_at_the_end(seed):
    """Any chunks of any requests: afterwards every head's blocks hold what the rules' plain form keeps."""
    draw = random.Random(seed)
    size, batch = 4, draw.randint(1, 3)
    requests = []
    for row in range(batch):
        prompt = draw.randint(1, 90)
        generator = torch.Generator().manual_seed(row)
        requests.append(
            SimpleNamespace(
                prompt=prompt,
                total=prompt + draw.randint(0, 9),
                plugin=draw.choice([0, 4, 4]),
                scores=torch.rand(1, 1, prompt, generator=generator),
                done=0,
                open=None,
            )
        )
    keep, shape = Keep(draw.choice([2, 4, 8]), 8), Shape(2, draw.randint(0, 20), ())
    table = np.arange(1, 1 + 40 * batch, dtype=np.int32).reshape(batch, 40)
    memory = np.full(size * (1 + 40 * batch), -1)  # slot -> token
    while any(one.done < one.total for one in requests):
        rows, chunks, start = [], [], 0
        for row, one in enumerate(requests):
            tokens = min(one.total - one.done, draw.randint(0, 40))
            if tokens:
                rows.append(row)
                chunks.append(Chunk(start, tokens, one.done, one.prompt, one.plugin))
                start += tokens
        if not rows:
            continue
        found = HeadStep(chunks, rows, {}, {4: keep}, {4: shape}, table, size)
        token = np.concatenate([np.arange(c.position, c.position + c.tokens) for c in chunks])
        for row, reading in found.reading.items():
            one = requests[row]
            place, new = reading.place, slice(reading.entry, reading.entry + reading.tokens)
            held = slots(reading.blocks, 0, reading.held, size)
            region = Region([place], [reading.tokens], keep.block, torch.device("cpu"))
            region_tokens = np.concatenate((memory[held[reading.before :]], token[new]))
            assert region_tokens.tolist() == list(range(region_tokens[0], place.done + reading.tokens))
            scores = one.scores[..., torch.from_numpy(region_tokens)]
            order = region.order(scores)
            left = Kept.of(region.keep(scores, order, keep.k), region.counts(keep.k)).index[0, 0]
            memory[reading.slots] = region_tokens[left.numpy()]
        memory[found.slots] = token[found.written]
        for row, chunk in zip(rows, chunks, strict=True):
            requests[row].done += chunk.tokens
    for row, one in enumerate(requests):
        wanted = list(range(one.prompt))
        if one.plugin:
            scores = one.scores[0, 0].tolist()
            wanted = kept_after(scores, keep.k, one.prompt, 2, shape.tail, keep.block)
        wanted = [*wanted, *range(one.prompt, one.total)]
        assert memory[slots(table[row], 0, len(wanted), size)].tolist() == wanted
        if one.plugin:
            assert kept(one.total, one.prompt, keep, 2, shape.tail) == len(wanted)


@given(st.integers(1, 300), st.sampled_from([1, 2, 8]), st.integers(0, 40), st.integers(0, 4))
@example(prompt=14, k=8, tail=0, head=0)  # stays dense, and the generated tokens come on top
def test_a_head_never_needs_more_than_its_tokens(prompt, k, tail, head):
    block, generated = 8, 30
    counts = [kept(n, prompt, Keep(k, block), head, tail) for n in range(prompt + generated)]
    assert all(count <= n for n, count in enumerate(counts))
    # while reading: the head, what is left of the closed blocks, and fewer tokens than two blocks or one and the tail
    whole = min(prompt, head) + max(0, prompt - head) // block * (block // k) + max(2 * block, tail + block)
    assert k == 1 or max(counts[: prompt + 1]) < whole
    # behind it every generated token
    assert counts[prompt:] == list(range(counts[prompt], counts[prompt] + generated))
