"""Keys and values that are kept, in the real vLLM engine, against the Hugging Face path. `make test-vllm`."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.v1", reason="vllm is not installed here: make test-vllm")

from test_vllm_engine import random_prompts
from vllm_engine import BOTH, Engine, expected, make_model, make_plugin, reference_model

from llm_variator.errors import VariatorError

HEADS = [[4, 1], [2, 8], [16, 4]]
SELECT = dict(sites=("kv",), compressor="select", block=16, dense_head=4)
PLUGINS = {
    8: SELECT | dict(k_per_head=HEADS, dense_tail=5),
    4: SELECT | dict(sites=("ffn", "kv"), compressor={"ffn": "weighted", "kv": "select"}, r=8, dense_tail=37),
    2: BOTH,
}
LENGTHS = (1, 3, 9, 33, 37, 64, 117, 250, 333, 700)
KS = (4, 8, 0, 8, 4, 2, 8, 4, 2, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plugins(model, tmp_path_factory):
    """Two that keep, one of them with FFNs merged and a tail longer than a block, and one that merges."""
    folder = tmp_path_factory.mktemp("plugins")
    return {f"k{k}": make_plugin(model, folder / f"k{k}", k, **settings) for k, settings in PLUGINS.items()}


@pytest.mark.parametrize("chunk", [64, 40, 1024])
def test_mixed_batches(model, plugins, chunk):
    """Dense, merged and kept side by side, in another order as well; every block comes back."""
    prompts = random_prompts(*LENGTHS)
    wanted = expected(reference_model(model, plugins), prompts, KS, 24)
    with Engine(model, plugins, max_num_batched_tokens=chunk, num_gpu_blocks_override=900) as engine:
        free = engine.free_blocks
        assert engine.tokens(prompts, KS, 24) == wanted
        assert engine.tokens(prompts[::-1], KS[::-1], 24) == wanted[::-1]
        assert engine.free_blocks == free
        classes = {
            tuple(keep.k for _, keep in manager.kv_cache_spec.keeps)
            for manager in engine.scheduler.kv_cache_manager.coordinator.single_type_managers
        }
        assert classes == {(k, 4) for heads in HEADS for k in heads}


def test_pre_emption(model, plugins, monkeypatch):
    """A request that lost its blocks is read again, its generated tokens dense."""
    prompts = random_prompts(*(190, 230, 160, 210, 177, 250, 195, 164))
    ks = [8, 4, 0, 4, 2, 8, 4, 8]
    wanted = expected(reference_model(model, plugins), prompts, ks, 60)
    options = dict(max_model_len=512, max_num_seqs=16, num_gpu_blocks_override=110)
    with Engine(model, plugins, **options) as engine:
        scheduler, free, preempted = engine.scheduler, engine.free_blocks, []
        preempt = scheduler._preempt_request
        monkeypatch.setattr(
            scheduler, "_preempt_request", lambda *args, **kw: preempted.append(1) or preempt(*args, **kw)
        )
        assert engine.tokens(prompts, ks, 60) == wanted
        assert engine.free_blocks == free
        assert preempted


def test_requests_that_end_early_and_rows_that_move(model, plugins):
    """More requests than rows, of different length: rows are taken over and moved while others are being read."""
    lengths = [300, 20, 250, 31, 7, 400, 90, 15, 333, 41, 130, 500]
    prompts, ks = random_prompts(*lengths), [8, 0, 4, 2, 8, 4, 8, 4, 8, 0, 2, 8]
    wanted = expected(reference_model(model, plugins), prompts, ks, 9)
    with Engine(
        model, plugins, max_num_seqs=4, max_num_batched_tokens=48, num_gpu_blocks_override=600
    ) as engine:
        assert engine.tokens(prompts, ks, 9) == wanted


def test_several_answers_to_a_prompt(model, plugins):
    """They are requests of their own with the same parameters, and read side by side."""
    from vllm import SamplingParams

    (prompt,) = random_prompts(300)
    asked = SamplingParams(
        n=3,
        temperature=1.0,
        top_k=1,
        max_tokens=9,
        ignore_eos=True,
        detokenize=False,
        extra_args={"variator_k": 8},
    )
    (wanted,) = expected(reference_model(model, plugins), [prompt], [8], 9)
    side_by_side = dict(max_num_batched_tokens=144, long_prefill_token_threshold=48)
    with Engine(model, plugins, num_gpu_blocks_override=600, **side_by_side) as engine:
        (found,) = engine.llm.generate([{"prompt_token_ids": prompt}], [asked], use_tqdm=False)
    assert [list(one.token_ids) for one in found.outputs] == [wanted] * 3


@pytest.mark.parametrize(
    "options", [dict(async_scheduling=True), dict(async_scheduling=False), dict(block_size=64)]
)
def test_other_engines(model, plugins, options):
    prompts, ks = random_prompts(50, 200, 33, 333), [8, 4, 0, 8]
    wanted = expected(reference_model(model, plugins), prompts, ks, 12)
    with Engine(model, plugins, **options, num_gpu_blocks_override=600) as engine:
        assert engine.tokens(prompts, ks, 12) == wanted


def test_compiled_graphs(model, plugins):
    prompts, ks = random_prompts(50, 200, 33), [8, 4, 0]
    wanted = expected(reference_model(model, plugins), prompts, ks, 12)
    with Engine(model, plugins, enforce_eager=False, num_gpu_blocks_override=600) as engine:
        assert engine.tokens(prompts, ks, 12) == wanted


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families(family, tmp_path):
    model = make_model(family, tmp_path)
    plugins = {f"k{k}": make_plugin(model, tmp_path / f"k{k}", k, **PLUGINS[k]) for k in (4, 2)}
    prompts, ks = random_prompts(50, 200, 33), [4, 4, 2]
    wanted = expected(reference_model(model, plugins), prompts, ks, 12)
    with Engine(model, plugins, num_gpu_blocks_override=600) as engine:
        assert engine.tokens(prompts, ks, 12) == wanted


def test_blocks(model, tmp_path):
    """What each class of heads holds of a long prompt, in blocks, read at once and in chunks."""
    plugins = {"k8": make_plugin(model, tmp_path / "k8", 8, **PLUGINS[8])}
    (prompt,) = random_prompts(900)
    for chunk in (1024, 64):
        with Engine(model, plugins, max_num_batched_tokens=chunk, num_gpu_blocks_override=600) as engine:
            held: dict[int, int] = {}
            for manager in engine.scheduler.kv_cache_manager.coordinator.single_type_managers:
                allocate = manager.allocate_new_blocks

                def count(request, *args, of=manager, allocate=allocate, held=held):
                    found = allocate(request, *args)
                    ((_, keep),) = of.kv_cache_spec.keeps
                    held[keep.k] = len(of.req_to_blocks[request])
                    return found

                manager.allocate_new_blocks = count
            engine.tokens([prompt], [8], 4)
        # 903 tokens: head 4, 55 whole blocks of 16, 11 tokens of another, tail 5, three more; in blocks of 32
        least = {k: -(-(4 + 55 * 16 // k + -(-11 // k) + 5 + 3) // 32) for k in (1, 2, 4, 8, 16)}
        assert least == {1: 29, 2: 15, 4: 8, 8: 4, 16: 3}
        assert held == least


@pytest.mark.parametrize("asynchronous", [False, True])
def test_blocks_are_given_back(model, tmp_path, asynchronous):
    """Two blocks of 128 tokens are whole while a prompt is read; others need what they took, and get it."""
    keeps = SELECT | dict(block=128, k_per_head=[[16, 64], [4, 16], [16, 16]], dense_tail=5)
    plugins = {"k8": make_plugin(model, tmp_path / "k8", 8, **keeps)}
    prompts = random_prompts(*(390, 520, 160, 477, 650, 395, 264, 530))
    ks = [8, 8, 0, 8, 8, 8, 0, 8]
    wanted = expected(reference_model(model, plugins), prompts, ks, 60)
    options = dict(max_model_len=720, num_gpu_blocks_override=145, async_scheduling=asynchronous)
    with Engine(model, plugins, **options) as engine:
        free, given, taken = engine.free_blocks, {}, set()
        for manager in engine.scheduler.kv_cache_manager.coordinator.single_type_managers:
            watch(manager, given, taken, engine.scheduler.requests)
        assert engine.tokens(prompts, ks, 60) == wanted
        assert engine.free_blocks == free
    assert len(taken) > 10


def watch(manager, given, taken, running):
    """Note in `given` who gave which block back, and in `taken` those that another got while the giver was running."""
    remove, allocate = manager.remove_skipped_blocks, manager.allocate_new_blocks

    def held(request):
        return {block.block_id for block in manager.req_to_blocks.get(request, ())}

    def removing(request, *args):
        before = held(request)
        remove(request, *args)
        given.update(dict.fromkeys(before - held(request), request))

    def allocating(request, *args):
        found = allocate(request, *args)
        for block in found:
            giver = given.pop(block.block_id, request)
            if giver != request and giver in running:
                taken.add((giver, block.block_id))
        return found

    manager.remove_skipped_blocks, manager.allocate_new_blocks = removing, allocating


def test_what_is_lost_between_chunks_is_found(model, plugins, monkeypatch):
    from llm_variator.integrations.vllm import rows_v1

    class Forgetful(dict):
        def __setitem__(self, *_):
            return

    real = rows_v1.Request
    monkeypatch.setattr(rows_v1, "Request", lambda prompt, plugin, memory: real(prompt, plugin, Forgetful()))
    with (
        Engine(model, plugins, num_gpu_blocks_override=600) as engine,
        pytest.raises(Exception, match="what is remembered ends at 0"),
    ):
        engine.tokens(random_prompts(300), [8], 2)


def test_refused(model, plugins):
    with pytest.raises(VariatorError, match="leave out one"):
        Engine(model, plugins, enable_prefix_caching=True)
    with pytest.raises(Exception, match="quantised KV cache"):
        Engine(model, plugins, kv_cache_dtype="fp8")
    with pytest.raises(Exception, match="disable_hybrid_kv_cache_manager"):
        Engine(model, plugins, disable_hybrid_kv_cache_manager=True)
