"""Contexts of plugins that keep keys and values: saved, in few bits, in pools, shared; each against the plain form."""

from __future__ import annotations

import gc
import json
import zlib

import pytest
import reference_select as plain
import torch
from conftest import DECODERS, pad, prompts
from reference_select import Segment
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from selecting import CONFIGS, FEW, FULL, GREEDY, MAIN, add, check_steps, make, rule

from llm_variator import CompressedContext, KVPool, PoolExhaustedError, VariatorConfig, VariatorError
from llm_variator.engine.cache import SelectedLayer
from llm_variator.engine.cache.paging import PagedStore
from llm_variator.engine.cache.quantised import Quantised
from llm_variator.engine.cache.stores import SharedStore, whole

SWAPPED = dict(MAIN, ratios=((4, 2), (1, 1), (2, 2)))


def selected(context: CompressedContext) -> list[SelectedLayer]:
    return [layer for layer in context.cache.layers if isinstance(layer, SelectedLayer)]


def held_by(layer: SelectedLayer) -> list[tuple[torch.Tensor, ...]]:
    """Per class keys, values and columns, as they are."""
    return [(*whole(one.store), layer.columns(one)) for one in layer.classes]


def same_cache(one: CompressedContext, other: CompressedContext) -> None:
    for mine, yours in zip(selected(one), selected(other), strict=True):
        assert mine.tokens == yours.tokens
        assert mine.has_fillers == yours.has_fillers
        for a, b in zip(mine.classes, yours.classes, strict=True):
            assert (a.heads, a.k) == (b.heads, b.k)
        for a, b in zip(held_by(mine), held_by(yours), strict=True):
            assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))


# Files.


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_a_loaded_context_answers_as_the_saved_one(tmp_path, decoder):
    model = make(decoder)
    document, question, second = prompts(41, 19, 17)
    rows = pad(prompts(50, 21, 1, 36), "left")
    contexts = [
        model.compress(document),
        model.compress(document, prefill_chunk_size=13).extend(second),
        model.compress(rows),
        model.compress(rows, prefill_chunk_size=9),
        model.generate(second, context=model.compress(document), return_context=True, **GREEDY)[1],
    ]
    for number, context in enumerate(contexts):
        context.save(tmp_path / "context")
        for options in ({}, {"verify": False}, {"pool": KVPool(2000, 4)}):
            loaded = CompressedContext.load(tmp_path / "context", model, **options)
            same_cache(loaded, context)
            wanted, after = model.generate(question, context=context, return_context=True, **GREEDY)
            found, after_too = model.generate(question, context=loaded, return_context=True, **GREEDY)
            assert torch.equal(found, wanted), number
            again = model.generate(second, context=after, **GREEDY)
            assert torch.equal(model.generate(second, context=after_too, **GREEDY), again), number
    out = model.generate(
        question, context=CompressedContext.load(tmp_path / "context", model), **FULL, **GREEDY
    )
    ids = torch.cat((contexts[-1].input_ids, question), dim=1)
    parts = [Segment(41, rule(model), 2), Segment(17, rule(model)), Segment(5), Segment(20, rule(model), 1)]
    check_steps(model, out, ids, parts)


@torch.no_grad()
def test_a_saved_context_belongs_to_its_scores_and_settings(tmp_path):
    model = make("llama")
    model.compress(prompts(41)[0]).save(tmp_path / "context")
    for settings in (
        dict(MAIN, block=8),
        SWAPPED,
        dict(MAIN, dense_tail=4),
        dict(MAIN, dense_head=1),
        dict(MAIN, score_fits=2),
    ):
        with pytest.raises(VariatorError, match="which this model has not loaded or has with"):
            CompressedContext.load(tmp_path / "context", make("llama", settings))
    other = make("llama")
    other.plugin().selects[1].score.bias[0].add_(0.01)
    with pytest.raises(VariatorError, match="with other weights or settings"):
        CompressedContext.load(tmp_path / "context", other)
    assert CompressedContext.load(tmp_path / "context", make("llama")).tokens == 41


@torch.no_grad()
def test_damaged_files_are_refused(tmp_path):
    """Written by somebody else with checksums that are right."""
    model, file, broken = make("llama"), tmp_path / "context", tmp_path / "broken"
    model.compress(prompts(41)[0]).save(file)
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["context"])
    tensors = load_file(file)

    def write(facts: dict, changed: dict[str, torch.Tensor]) -> None:
        facts["tensors"] |= {
            name: [str(t.dtype), [*t.shape], zlib.crc32(t.numpy().tobytes())] for name, t in changed.items()
        }
        text = json.dumps(facts)
        save_file(
            tensors | changed,
            broken,
            metadata={"context": text, "checksum": str(zlib.crc32(text.encode()))},
        )

    def damage(what: str) -> tuple[dict, dict[str, torch.Tensor]]:
        facts = json.loads(json.dumps(header))
        first, second = facts["layers"][0]["classes"]
        keys, columns = tensors["0.0.keys"], tensors["0.0.columns"]
        changed: dict[str, torch.Tensor] = {}
        if what == "heads twice":
            second["heads"] = first["heads"]
        elif what == "heads from 1 on":
            second["heads"] = [2]
        elif what == "no heads":
            first["heads"] = []
        elif what == "heads of another count":
            first["heads"] = [0, 1]
        elif what == "ratio":
            first["k"] = 0
        elif what == "a class missing":
            facts["layers"][0]["classes"] = [first]
        elif what == "columns":
            changed["0.0.columns"] = columns[..., 1:].contiguous()
        elif what == "columns of another type":
            changed["0.0.columns"] = columns.float()
        elif what == "rows of columns":
            changed["0.0.columns"] = columns.repeat(2, 1, 1)
        elif what == "keys":
            changed["0.0.keys"] = keys[:, :, 1:].contiguous()
        elif what == "fillers":
            facts["layers"][0]["has_fillers"] = 3
        else:
            facts["layers"][0]["tokens"] = 5
        return facts, changed

    for what in (
        "heads twice",
        "heads from 1 on",
        "no heads",
        "heads of another count",
        "ratio",
        "a class missing",
        "columns",
        "columns of another type",
        "rows of columns",
        "keys",
        "fillers",
        "tokens",
    ):
        write(*damage(what))
        for pool in (None, KVPool(1000, 4)):
            with pytest.raises(VariatorError, match=r"broken is damaged|lacks tensors") as told:
                CompressedContext.load(broken, model, pool=pool)
            assert "\n" not in str(told.value)
    facts = json.loads(json.dumps(header)) | {"format_version": 3}
    write(facts, {})
    with pytest.raises(VariatorError, match="format_version 3 is not supported"):
        CompressedContext.load(broken, model)


@torch.no_grad()
def test_rows_that_ended_early(tmp_path):
    """What stands behind the end of a row is hidden, in a pool and in a file too."""
    model, pool = make("llama"), KVPool(1000, 4)
    documents, again = prompts(41, 30), prompts(25, 25, seed=6)
    rows, more = [row[0].tolist() for row in documents], torch.cat(again)
    end = None
    for seed in range(20):  # until the first row says something that the second does not
        asked = torch.cat(prompts(19, 19, seed=seed))
        early, late = model.generate(asked, context=model.compress(rows), **GREEDY)[:, 19:].tolist()
        end = next((token for token in early[:3] if token not in late), end)
        if end is not None:
            break
    answer = early.index(end) + 1
    options = dict(GREEDY, eos_token_id=end, pad_token_id=0)
    found = []
    for where in (None, pool):
        out, after = model.generate(
            asked, context=model.compress(rows, pool=where), return_context=True, **options
        )
        assert after.attention_mask[0].sum() == 41 + 19 + answer
        assert any(layer.has_fillers for layer in selected(after))
        after.save(tmp_path / "after")
        loaded = CompressedContext.load(tmp_path / "after", model, pool=where)
        same_cache(loaded, after)
        found += [model.generate(more, context=each, **FULL, **GREEDY) for each in (after, loaded)]
    for each in found[1:]:
        assert torch.equal(each.sequences, found[0].sequences)
        assert torch.equal(torch.stack(each.logits), torch.stack(found[0].logits))
    # its end is read, so the first token of the next question stays dense in its place
    parts = [
        Segment(41, rule(model), 2),
        Segment(19, rule(model)),
        Segment(answer),
        Segment(25, rule(model), 1),
    ]
    ids = torch.cat((documents[0], out[:1, : 19 + answer], again[0]), dim=1)
    check_steps(model, found[0], ids, parts)


# 4 and 8 bits.


def rounded(context: CompressedContext, bits: int) -> CompressedContext:
    """The context in plain tensors that were rounded by hand."""
    new = context.fork()
    for layer in selected(new):
        for one in layer.classes:
            keys, values = (Quantised.of(t, bits).dense() for t in whole(one.store))
            one.store.parts = ((keys, values),)
    return new


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("decoder", [*FEW, "llama-mha"])
@torch.no_grad()
def test_contexts_in_few_bits(tmp_path, decoder, bits):
    """As with keys and values rounded by hand, through questions, another plugin's turn, and a file."""
    model = make(decoder)
    add(model, "swapped", SWAPPED)
    document, question, second = prompts(41, 27, 18)
    for context in (model.compress(document), model.compress(pad(prompts(41, 18, 30), "left"))):
        small, wanted = context.quantised(bits), rounded(context, bits)
        small.save(tmp_path / "small")
        loaded = CompressedContext.load(tmp_path / "small", model)
        for name in ("default", "swapped", None):
            with model.use_plugin(name):
                first, after = model.generate(
                    question, context=wanted, return_context=True, prefill_chunk_size=9, **GREEDY
                )
                again = model.generate(second, context=after, **GREEDY)
                for found in (small, loaded):
                    same, after = model.generate(
                        question, context=found, return_context=True, prefill_chunk_size=9, **GREEDY
                    )
                    assert torch.equal(same, first)
                    assert torch.equal(model.generate(second, context=after, **GREEDY), again)
    longer = small.extend(second)
    same_cache(longer, wanted.extend(second))


@torch.no_grad()
def test_bytes_in_few_bits_by_hand():
    """Every vector of 8: 8 or 4 bytes of codes, and 4 of scale."""
    model = make("llama")
    context = model.compress(prompts(41)[0])
    counts = sum(sum(layer.counts) for layer in selected(context))
    for bits, each in ((8, 12), (4, 8)):
        report = context.quantised(bits).report()
        assert (report.bytes, report.shared_bytes) == (counts * 2 * each,) * 2
    assert context.report().bytes == counts * 2 * 8 * 8


# Sharing.


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_what_goes_on_from_a_context_shares_its_entries(decoder):
    model = make(decoder)
    document, question = prompts(41, 19)
    context = model.compress(document)
    before = context.report()
    parts = {keys.data_ptr() for layer in selected(context) for keys, *_ in held_by(layer)}
    for chunk in (None, 9):
        _, after = model.generate(
            question.expand(5, -1), context=context, return_context=True, prefill_chunk_size=chunk, **GREEDY
        )
        found = {one.store.parts[0][0].data_ptr() for layer in selected(after) for one in layer.classes}
        assert all(isinstance(one.store, SharedStore) for layer in selected(after) for one in layer.classes)
        assert found == parts
        kept = [layer for layer in before.layers if layer.classes]
        assert after.report().shared_bytes == sum(layer.bytes for layer in kept)
    assert context.report() == before
    forks = [context.fork() for _ in range(3)]
    assert all(fork.report().shared_bytes == after.report().shared_bytes for fork in forks)


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_a_plugin_with_other_classes_goes_on_from_a_shared_context(tmp_path, decoder):
    model = make(decoder)
    add(model, "swapped", SWAPPED)
    model.add_plugin("merged", VariatorConfig(k=2, sites=("kv",), dense_head=2, dense_tail=2)).double()
    document, question = prompts(41, 27)
    context, kept = model.compress(document), model.compress(document)
    for pool in (None, KVPool(1000, 4)):
        begun = model.compress(document, pool=pool)
        with model.use_plugin("swapped"):
            out = model.generate(question, context=begun, **FULL, **GREEDY)
            parts = [Segment(41, rule(model, "default"), 2), Segment(27, rule(model, "swapped"))]
            check_steps(model, out, torch.cat((document, question), 1), parts)
            some = model.generate(pad(prompts(27, 5, 18), "left")["input_ids"][:1], context=begun, **GREEDY)
            assert some.shape[0] == 1
            _, after = model.generate(question, context=begun, return_context=True, **GREEDY)
        after.save(tmp_path / "after")
        same_cache(CompressedContext.load(tmp_path / "after", model, pool=pool), after)
        same_cache(begun, kept)
        with model.use_plugin("merged"):
            merged = model.compress(document, pool=pool)
            wanted = model.generate(question, context=model.compress(document), **GREEDY)
            assert torch.equal(model.generate(question, context=merged, **GREEDY), wanted)
        for name in ("default", "swapped"):
            with model.use_plugin("merged"):
                plain_too = model.compress(document)
            with model.use_plugin(name):
                wanted = model.generate(question, context=plain_too, **GREEDY)
                assert torch.equal(model.generate(question, context=merged, **GREEDY), wanted)
    same_cache(context, kept)


# Pools.


IN_POOLS = {
    "llama": ("short tail", "long tail", "dense layer", "one ratio", "some layers", "ffn"),
    "gemma3": ("short tail", "dense layer", "ffn"),
    "llama-mha": ("long tail", "one ratio"),
}


@pytest.mark.parametrize(
    ("decoder", "name"), [(decoder, name) for decoder in IN_POOLS for name in IN_POOLS[decoder]]
)
@torch.no_grad()
def test_contexts_in_a_pool_answer_as_without(decoder, name):
    model, pool = make(decoder, CONFIGS[name]), KVPool(3000, block_size=3)
    document, question = prompts(41, 19)
    batch = [row[0].tolist() for row in prompts(50, 21, 36)]
    beams, chunks = dict(num_beams=3, **GREEDY), dict(prefill_chunk_size=7, **GREEDY)
    cases = (
        (document, None, (GREEDY, chunks)),
        (document, 9, (beams,)),
        (batch, None, (beams,)),
        (batch, 13, (chunks,)),
    )
    for what, chunk, ways in cases:
        paged, plain_one = (model.compress(what, pool=p, prefill_chunk_size=chunk) for p in (pool, None))
        same_cache(paged, plain_one)
        longer = [context.extend(question, prefill_chunk_size=chunk) for context in (paged, plain_one)]
        same_cache(*longer)
        for options in ways:
            wanted = model.generate(question, context=longer[1], **options)
            assert torch.equal(model.generate(question, context=longer[0], **options), wanted)
        (_, after), (_, wanted) = (
            model.generate(question, context=context, return_context=True, **GREEDY) for context in longer
        )
        same_cache(after, wanted)
        for context in (after, longer[0], paged):
            context.free()
        gc.collect()
        assert pool.report().used == 0
    asked = pad(prompts(19, 3, 26, seed=5), "left")
    paged, plain_one = model.compress(document, pool=pool), model.compress(document)
    wanted = model.generate(**asked, context=plain_one, **GREEDY)
    assert torch.equal(model.generate(**asked, context=paged, **GREEDY), wanted)
    paged.free()
    gc.collect()
    assert pool.report().used == 0


@torch.no_grad()
def test_blocks_by_hand():
    """A block of 4 entries of 2 heads holds 8 of one head; a prompt of 42 after head 2, tail 3, blocks of 4."""
    model, pool = make("llama"), KVPool(200, block_size=4)
    context = model.compress(prompts(42)[0], pool=pool)
    # 37 tokens before the tail: 9 whole blocks, and 1 token: 2 + 9 * 4 / k + 1 + 3 entries
    counts = {k: 2 + 36 // k + 1 + 3 for k in (1, 2, 4)}
    assert [layer.counts for layer in selected(context)] == [
        tuple(counts[k] for k in ratios) for ratios in MAIN["ratios"]
    ]
    blocks = sum(-(-counts[k] // 8) for ratios in MAIN["ratios"] for k in ratios)
    assert (pool.report().used, pool.report().shared) == (blocks, 0)
    block = 4 * 2 * 8 * 8 * 2  # entries, heads, width, bytes, keys and values
    report = context.report()
    assert pool.report().block_bytes == block
    assert (report.bytes, report.shared_bytes, report.pool) == (blocks * block, 0, pool.report())
    assert report.dense_bytes == 3 * 42 * 2 * 8 * 8 * 2
    fork = context.fork()
    assert (pool.report().used, pool.report().references) == (blocks, 2 * blocks)
    assert fork.report().shared_bytes == blocks * block
    longer = fork.extend(prompts(1)[0])  # a copy of each last block that is not full, else a new one
    assert pool.report().used == blocks + 6
    assert (
        longer.report().shared_bytes
        == sum(counts[k] // 8 for ratios in MAIN["ratios"] for k in ratios) * block
    )
    for one in (context, fork, longer):
        one.free()
    assert pool.report().used == 0


@torch.no_grad()
def test_heads_that_do_not_divide_a_block():
    """3 of 4 heads: 5 * 4 // 3 = 6 entries in a block of 5."""
    pool = KVPool(200, block_size=5)
    store, single = PagedStore(pool, of=4), PagedStore(pool, of=4)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 17, 8, generator=generator) for _ in range(2))
    one = torch.randn(2, 1, 41, 8, generator=generator)
    for start in range(0, 17, 4):
        store.update(keys[:, :, start : start + 4], values[:, :, start : start + 4])
        single.update(one[:, :, 3 * start : 3 * start + 12], one[:, :, 3 * start : 3 * start + 12])
    assert pool.capacity(3) == 6
    assert pool.capacity(1) == 20
    assert pool.report().used == 2 * 3 + 2 * 3
    assert torch.equal(store.whole()[0], keys)
    assert torch.equal(store.whole()[1], values)
    assert torch.equal(single.whole()[0], one)
    parts = store.split([[0, 2], [1]])
    assert torch.equal(parts[0].whole()[0], keys[:, [0, 2]])
    assert torch.equal(parts[1].whole()[1], values[:, [1]])
    assert pool.report().used == 2 * (2 + 1) + 2 * 3
    for each in (*parts, single):
        each.free()
    assert pool.report().used == 0
    with pytest.raises(VariatorError, match="was freed"):
        store.whole()


@torch.no_grad()
def test_exhaustion_leaves_everything_as_it_was():
    model = make("llama")
    add(model, "swapped", SWAPPED)
    document, question = prompts(50, 4)
    pool = KVPool(60, block_size=4)
    context = model.compress(document, pool=pool)
    other = context.extend(prompts(7)[0])
    expected = model.generate(question, context=other, **GREEDY)
    before = pool.report()

    def with_other_classes() -> None:
        with model.use_plugin("swapped"):
            model.generate(prompts(60)[0].repeat(3, 1), context=context, **GREEDY)

    for call in (
        lambda: model.compress(prompts(220)[0], pool=pool),
        lambda: context.extend(prompts(220)[0], prefill_chunk_size=20),
        lambda: model.generate(prompts(220)[0], context=context, **GREEDY),
        lambda: model.generate(question, context=context, do_sample=False, max_new_tokens=200),
        lambda: model.generate(question.repeat(30, 1), context=context, **GREEDY),
        with_other_classes,
    ):
        with pytest.raises(PoolExhaustedError, match=r"exhausted: \d+ more of its 60 blocks are needed"):
            call()
        assert pool.report() == before
    assert torch.equal(model.generate(question, context=other, **GREEDY), expected)
    context.free()
    other.free()
    assert pool.report().used == 0


@torch.no_grad()
def test_use_after_free():
    model, pool = make("llama"), KVPool(100)
    context = model.compress(prompts(41)[0], pool=pool)
    context.free()
    for misuse in (context.free, context.fork, context.report, lambda: context.save("never")):
        with pytest.raises(VariatorError, match="was freed"):
            misuse()
    assert pool.report().used == 0


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_pooled_questions_have_the_plain_forms_logits(decoder):
    model, pool = make(decoder), KVPool(1000, 4)
    document, questions = prompts(41)[0], prompts(19, 3, 26, seed=5)
    context = model.compress(document, pool=pool)
    out = model.generate(**pad(questions, "left"), context=context, **FULL, **GREEDY)
    for i, question in enumerate(questions):
        parts = [Segment(41, rule(model), 2), Segment(question.shape[1], rule(model))]
        check_steps(model, out, torch.cat((document, question), 1), parts, i)
    read = plain.read(model.base, document, [Segment(41, rule(model), 2)])
    for i, layer in enumerate(context.cache.layers):
        if isinstance(layer, SelectedLayer):
            assert sorted(layer.counts) == sorted(read.entries(i))
