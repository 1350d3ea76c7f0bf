"""The pool: outputs of unshared caches, blocks counted by hand, and every misuse an error."""

from __future__ import annotations

import copy
import gc
import pickle
import random

import pytest
import selecting
import torch
from conftest import make_decoder, make_variator, prompts

from llm_variator import (
    CompressedContext,
    KVPool,
    PoolExhaustedError,
    VariatorConfig,
    VariatorError,
    VariatorModel,
)
from llm_variator.engine.cache.lifecycle import stores_of
from llm_variator.engine.cache.paging import PagedStore

MIXED = VariatorConfig(k={"ffn": 4, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=3)
GREEDY = dict(do_sample=False, max_new_tokens=5)


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def merging() -> VariatorModel:
    return make_variator("llama", MIXED, num_hidden_layers=2)


def keeping() -> VariatorModel:
    """With a plugin whose heads form other classes."""
    model = selecting.make("llama")
    selecting.add(model, "swapped", dict(selecting.MAIN, ratios=((4, 2), (1, 1), (2, 2))))
    return model


def test_a_paged_store_is_what_concatenation_is():
    """Random appends, forks, cuts and row changes against plain tensors."""
    pool, rng = KVPool(400, block_size=4), random.Random(0)
    stores: list[tuple[PagedStore, torch.Tensor]] = [(PagedStore(pool), torch.zeros(2, 3, 0, 8))]
    for step in range(300):
        store, plain = rng.choice(stores)
        action = rng.choice(["append", "append", "fork", "truncate", "rows", "free"])
        if action == "append" and plain.shape[2] < 30:
            new = states(len(plain), 3, rng.randint(1, 9), 8, seed=step)
            stores.remove((store, plain))
            plain = torch.cat((plain, new), dim=2)
            keys, values = store.update(new, -new)
            assert torch.equal(keys, plain)
            assert torch.equal(values, -plain)
            stores.append((store, plain))
        elif action == "fork" and len(stores) < 8:
            stores.append((store.fork(), plain))
        elif action in ("truncate", "rows") and plain.shape[2]:
            stores.remove((store, plain))
            if action == "truncate":
                plain = plain[:, :, : rng.randint(1, plain.shape[2])]
                store.truncate(plain.shape[2])
            else:
                rows = torch.tensor([rng.randrange(len(plain)) for _ in range(rng.randint(1, 3))])
                plain = plain[rows]
                store.batch_select_indices(rows)
            stores.append((store, plain))
        elif action == "free" and len(stores) > 2:
            stores.remove((store, plain))
            store.free()
        references = [block for other, _ in stores for table in other.tables for block in table]
        report = pool.report()
        assert (report.references, report.used) == (len(references), len(set(references)))
        for other, expected in stores:
            if expected.shape[2]:
                assert torch.equal(other.whole()[0], expected)
    while stores:
        stores.pop()[0].free()
    assert pool.report().used == 0


def test_contexts_in_a_pool_answer_as_without(decoder):
    model, pool = make_variator(decoder, MIXED), KVPool(2000, block_size=4)
    documents, questions = prompts(50, 21, 36), prompts(9, 4, 12, seed=5)
    rows = [row[0].tolist() for row in documents]
    for chunk in (None, 13):
        paged = model.compress(rows, pool=pool, prefill_chunk_size=chunk)
        plain = model.compress(rows)
        for options in (GREEDY, dict(num_beams=3, **GREEDY)):
            asked = [row[0].tolist() for row in questions]
            expected = model.generate(asked, context=plain, **options)
            assert torch.equal(model.generate(asked, context=paged, **options), expected)
        longer = [context.extend(questions[0]) for context in (paged, plain)]
        answers = [model.generate(questions[1], context=context, **GREEDY) for context in longer]
        assert torch.equal(*answers)
        longer[0].free()
        paged.free()
        assert pool.report().used == 0


def test_ageing_contexts_in_a_pool(tmp_path):
    config = VariatorConfig(k=2, sites=("kv",), r=5, dense_tail=3, decode_block=4)
    model, pool = make_variator("llama", config), KVPool(500, block_size=4)
    document, question = prompts(40, 9)
    paged, plain = model.compress(document, pool=pool), model.compress(document)
    paged.save(tmp_path / "context")
    loaded = CompressedContext.load(tmp_path / "context", model, pool=pool)
    for _ in range(2):
        answer, plain = model.generate(
            question, context=plain, return_context=True, do_sample=False, max_new_tokens=20
        )
        for name in ("paged", "loaded"):
            old = {"paged": paged, "loaded": loaded}[name]
            same, new = model.generate(
                question, context=old, return_context=True, do_sample=False, max_new_tokens=20
            )
            assert torch.equal(same, answer)
            assert new.entries == plain.entries
            old.free()
            if name == "paged":
                paged = new
            else:
                loaded = new
    paged.free()
    loaded.free()
    assert pool.report().used == 0


def test_blocks_and_sharing_by_hand():
    """A document of 8 + 3 entries in blocks of 4, in 3 layers: 3 blocks a layer, the last of them not full."""
    model = make_variator("llama", VariatorConfig(k=2, sites=("kv",), r=5, dense_head=2, dense_tail=3))
    pool = KVPool(100, block_size=4)
    document = model.compress(prompts(17)[0], pool=pool)  # 2 + 6 groups + 3
    assert document.entries == (11, 11, 11)
    assert (pool.report().used, pool.report().shared) == (9, 0)
    fork = document.fork()
    assert (pool.report().used, pool.report().shared, pool.report().references) == (9, 9, 18)
    longer = fork.extend(prompts(2)[0])  # 13 entries: a copy of the last block, and one more
    fork.free()
    assert (pool.report().used, pool.report().shared, pool.report().references) == (9 + 6, 6, 9 + 12)
    report = longer.report()
    block = 4 * 2 * 8 * 4 * 2  # entries, heads, width, bytes, keys and values
    assert pool.report().block_bytes == block
    assert (report.bytes, report.shared_bytes) == (12 * block, 6 * block)
    assert report.dense_bytes == 3 * 19 * block // 4
    assert "12" in str(report) or str(pool.report()) in str(report)
    model.generate(prompts(4)[0], context=longer, **GREEDY)
    assert report.pool == model.kv_cache_report().pool or model.kv_cache_report().pool.used > 15
    assert pool.report().used == 15
    longer.free()
    assert (pool.report().used, pool.report().shared) == (9, 0)
    del document
    gc.collect()
    assert pool.report().used == 0  # a context that nobody refers to gives its blocks back by itself


@pytest.mark.parametrize("make", [merging, keeping])
def test_a_deep_copy_is_a_fork(make):
    """As a saved prompt is reused with transformers: `copy.deepcopy` of its cache, for each question."""
    model, pool = make(), KVPool(1000, block_size=4)
    document, question = prompts(40, 6)
    context = model.compress(document, pool=pool)
    used, expected = pool.report().used, model.generate(question, context=context, **GREEDY)
    copied = copy.deepcopy(context)
    assert copied.model is model
    assert (pool.report().used, pool.report().shared) == (used, used)
    assert torch.equal(model.generate(question, context=copied, **GREEDY), expected)
    whole = torch.cat((document, question), dim=1)
    answer = model.generate(whole, past_key_values=copy.deepcopy(context.cache), **GREEDY)
    assert torch.equal(answer[:, 40:], expected)
    context.free()
    assert torch.equal(model.generate(question, context=copied, **GREEDY), expected)
    with pytest.raises(VariatorError, match="its save"):
        pickle.dumps(copied.cache)
    copied.free()
    del answer
    gc.collect()
    assert pool.report().used == 0
    together = copy.deepcopy((model, model.compress(document)))
    assert together[1].model is together[0]


def test_double_free_and_use_after_free():
    model, pool = make_variator("llama", MIXED), KVPool(100)
    for context in (model.compress(prompts(30)[0], pool=pool), model.compress(prompts(30)[0])):
        context.free()
        for misuse in (
            context.free,
            context.fork,
            context.report,
            lambda context=context: context.extend([4]),
            lambda context=context: context.save("never"),
            lambda context=context: model.generate([4], context=context, **GREEDY),
        ):
            with pytest.raises(VariatorError, match="was freed"):
                misuse()
    store = PagedStore(pool)
    store.update(states(1, 2, 3, 8), states(1, 2, 3, 8))
    store.free()
    for misuse in (store.free, store.fork, store.whole, lambda: store.update(*[states(1, 2, 3, 8)] * 2)):
        with pytest.raises(VariatorError, match="was freed"):
            misuse()


def test_exhaustion_leaves_everything_as_it_was():
    model = make_variator("llama", MIXED)
    pool = KVPool(34, block_size=4)
    context = model.compress(prompts(50)[0], pool=pool)  # 20 entries: 5 blocks in each of 3 layers
    other = context.extend(prompts(7)[0])
    expected = model.generate(prompts(4)[0], context=other, **GREEDY)
    before = pool.report()
    for call in (
        lambda: model.compress(prompts(120)[0], pool=pool),
        lambda: context.extend(prompts(120)[0]),
        lambda: model.generate(prompts(120)[0], context=context, **GREEDY),
        lambda: model.generate(prompts(4)[0], context=context, do_sample=False, max_new_tokens=300),
        lambda: model.generate(prompts(4)[0].repeat(30, 1), context=context, **GREEDY),
    ):
        with pytest.raises(PoolExhaustedError, match=r"exhausted: \d+ more of its 34 blocks are needed"):
            call()
        assert pool.report() == before
    assert torch.equal(model.generate(prompts(4)[0], context=other, **GREEDY), expected)


def test_a_pool_holds_one_shape():
    pool = KVPool(100)
    model = make_variator("llama", MIXED)
    context = model.compress(prompts(30)[0], pool=pool)
    before = pool.report()
    with pytest.raises(VariatorError, match="another shape or dtype"):
        make_variator("llama-mha", MIXED).compress(prompts(30)[0], pool=pool)
    assert pool.report() == before
    context.free()
    with pytest.raises(VariatorError, match="at least one block"):
        KVPool(0)


@pytest.mark.parametrize("make", [merging, keeping])
@torch.no_grad()
def test_interleaved_sessions_over_shared_documents(make):
    """Random extends, forks, frees and questions; each session equals one that shares nothing, no block is lost."""
    model = make()
    pool, rng = KVPool(4000, block_size=4), random.Random(0)
    documents = prompts(*(rng.randint(20, 40) for _ in range(4)))
    shared = [model.compress(row, pool=pool) for row in documents]
    sessions = [(context.fork(), [row]) for context, row in zip(shared, documents, strict=True)]
    for step in range(100):
        context, history = rng.choice(sessions)
        action = rng.choice(["extend", "fork", "free", "ask", "bits"])
        if action == "extend" and len(history) < 4:
            more = prompts(rng.randint(1, 25), seed=step)[0]
            longer = context.extend(more, prefill_chunk_size=rng.choice([None, 7]))
            sessions.append((longer, [*history, more]))
        elif action == "fork":
            sessions.append((context.fork(), history))
        elif action == "free" and len(sessions) > 4:
            sessions = [session for session in sessions if session[0] is not context]
            context.free()
        elif action == "ask":
            alone = model.compress(history[0])
            for more in history[1:]:
                alone = alone.extend(more)
            question = prompts(rng.randint(1, 20), seed=step)[0]
            with model.use_plugin(rng.choice([*model.plugins, None])):
                expected = model.generate(question, context=alone, **GREEDY)
                assert torch.equal(model.generate(question, context=context, **GREEDY), expected)
        elif action == "bits":
            used = pool.report().used
            context.quantised(8)
            assert pool.report().used == used
        if step % 20:
            continue
        living = [*shared, *(session for session, _ in sessions)]
        stores = [store for each in living for layer in each.cache.layers for store in stores_of(layer)]
        gc.collect()
        references = [block for store in stores for table in store.tables for block in table]
        report = pool.report()
        assert (report.references, report.used) == (len(references), len(set(references)))
    for context in [*shared, *(session for session, _ in sessions)]:
        context.free()
    assert pool.report().used == 0


def test_plain_models_and_pools():
    """Without a plugin a pool shares dense entries."""
    model, pool = VariatorModel(make_decoder("llama")), KVPool(100)
    context = model.compress(prompts(30)[0], pool=pool)
    expected = model.base.generate(torch.cat((prompts(30)[0], prompts(4)[0]), dim=1), **GREEDY)
    assert torch.equal(model.generate(prompts(4)[0], context=context, **GREEDY), expected[:, 30:])
