"""The real vLLM engine on tiny models against the Hugging Face path. Runs in its own environment: `make test-vllm`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm.v1", reason="vllm is not installed here: make test-vllm")

from vllm.exceptions import VLLMValidationError
from vllm_engine import BLOCK, BOTH, FFN, Engine, expected, make_model, make_plugin, reference_model

from llm_variator.errors import VariatorError

LENGTHS = (1, 3, 9, 33, 64, 117, 250, 700)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ffn(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ffn")
    return {f"k{k}": make_plugin(model, folder / f"k{k}", k, **FFN) for k in (2, 4)}


@pytest.fixture(scope="module")
def both(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    return {f"k{k}": make_plugin(model, folder / f"k{k}", k, **BOTH) for k in (2, 4)}


def random_prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 211, (n,), generator=generator).tolist() for n in lengths]


def small_pool(**options):
    return dict(max_model_len=512, num_gpu_blocks_override=18, max_num_seqs=16) | options


def watch(engine, monkeypatch):
    """Peak blocks and requests that hold some, and pre-emptions, of all that follows."""
    seen = dict(blocks=0, requests=0, preempted=0)
    scheduler = engine.scheduler
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    allocate, preempt = manager.allocate_new_blocks, scheduler._preempt_request

    def allocate_and_count(*args, **kwargs):
        found = allocate(*args, **kwargs)
        held = [blocks for blocks in manager.req_to_blocks.values() if blocks]
        seen["blocks"] = max(seen["blocks"], sum(map(len, held)))
        seen["requests"] = max(seen["requests"], len(held))
        return found

    def preempt_and_count(*args, **kwargs):
        seen["preempted"] += 1
        return preempt(*args, **kwargs)

    monkeypatch.setattr(manager, "allocate_new_blocks", allocate_and_count)
    monkeypatch.setattr(scheduler, "_preempt_request", preempt_and_count)
    return seen


def test_ffn(model, ffn):
    """One engine, prefix caching on: a mixed batch, other orders, cached prefixes, and what is refused."""
    prompts, ks = random_prompts(*LENGTHS), [2, 4, 0, 2, 4, 0, 4, 2]
    wanted = expected(reference_model(model, ffn), prompts, ks, 24)
    with Engine(model, ffn) as engine:
        assert engine.tokens(prompts, ks, 24) == wanted
        again = engine.outputs(prompts[::-1], ks[::-1], 24)  # another order, every prefix cached
        assert [list(out.outputs[0].token_ids) for out in again] == wanted[::-1]
        assert sum(out.num_cached_tokens for out in again) > 700

        for choice in (3, -1, 2.0, True, "2", "all", [2]):
            with pytest.raises(VLLMValidationError, match="variator_k must be one of 0, 2, 4"):
                engine.tokens(prompts[:1], [choice], 1)
        with pytest.raises(VLLMValidationError, match="prompt_logprobs"):
            engine.tokens(prompts[:1], [2], 1, prompt_logprobs=1)
        assert engine.outputs(prompts[:1], [0], 1, prompt_logprobs=1)

        found = engine.outputs(prompts[:4], [2, 0, 1, "auto"], 1)
        assert [out.kv_transfer_params for out in found] == [{"variator_k": k} for k in (2, 0, 0, 0)]


def test_prefix_caches_never_mix(model, ffn):
    """Ratios share nothing, and prompts of other lengths only what their endings do not change."""
    (long,) = random_prompts(640)
    prompts = [long[:n] for n in (600, 601, 437, 640, 300)]
    variator = reference_model(model, ffn)
    with Engine(model, ffn) as engine:
        cached = {}
        for k in (2, 4, 0):
            for prompt in prompts:
                (out,) = engine.outputs([prompt], [k], 12)
                assert list(out.outputs[0].token_ids) == expected(variator, [prompt], [k], 12)[0], (
                    k,
                    len(prompt),
                )
                cached[k, len(prompt)] = out.num_cached_tokens
        assert [cached[k, 600] for k in (2, 4, 0)] == [0, 0, 0]
        # the groups of 437 tokens end at 432 (k 2 and 4): 13 blocks are shared with the longer prompt
        assert cached[2, 437] == cached[4, 437] == 13 * BLOCK
        changed = [*long[:50], 5, *long[51:600]]  # within a cached prefix: only the block before it is shared
        (out,) = engine.outputs([changed], [4], 12)
        assert out.num_cached_tokens == BLOCK
        assert list(out.outputs[0].token_ids) == expected(variator, [changed], [4], 12)[0]


def test_dense_requests_equal_stock_vllm(model, ffn):
    prompts = random_prompts(*LENGTHS)
    with Engine(model) as stock:
        plain = stock.outputs(prompts, [None] * 8, 16, logprobs=5)
    with Engine(model, ffn) as engine:
        ours = engine.outputs(prompts, [0, 1] * 4, 16, logprobs=5)
    for theirs, mine in zip(plain, ours, strict=True):
        assert theirs.outputs[0].token_ids == mine.outputs[0].token_ids
        assert theirs.outputs[0].logprobs == mine.outputs[0].logprobs


def test_pre_emption(model, ffn, monkeypatch):
    prompts, ks = random_prompts(*(90, 130, 60, 110, 77, 150, 95, 64)), [2, 4, 0, 4, 2, 2, 4, 2]
    wanted = expected(reference_model(model, ffn), prompts, ks, 60)
    with Engine(model, ffn, **small_pool(enable_prefix_caching=False)) as engine:
        seen = watch(engine, monkeypatch)
        assert engine.tokens(prompts, ks, 60) == wanted
        assert seen["preempted"] > 0


def test_kv(model, both, monkeypatch):
    """Mixed ratios, and pre-emption; every block comes back."""
    prompts, ks = random_prompts(*LENGTHS), [2, 4, 0, 2, 4, 0, 4, 2]
    wanted = expected(reference_model(model, both), prompts, ks, 24)
    with Engine(model, both) as engine:
        free = engine.free_blocks
        assert engine.tokens(prompts, ks, 24) == wanted
        assert engine.free_blocks == free
    prompts = random_prompts(*(190, 230, 160, 210, 177, 250, 195, 164))
    ks = [2, 4, 0, 4, 2, 2, 4, 2]
    wanted = expected(reference_model(model, both), prompts, ks, 60)
    with Engine(model, both, **small_pool()) as engine:
        free, seen = engine.free_blocks, watch(engine, monkeypatch)
        assert engine.tokens(prompts, ks, 60) == wanted
        assert engine.free_blocks == free
        assert seen["preempted"] > 0


@pytest.mark.parametrize(
    ("kv", "tables"),
    [
        ({2: [1, 2, 2], 4: [1, 4, 4]}, {(): 29, ((2, 2), (4, 4)): 8}),
        ({2: [2, 1, 2], 4: [2, 8, 1]}, {((2, 2), (4, 2)): 15, ((4, 8),): 4, ((2, 2),): 29}),
    ],
)
def test_kv_ratios_by_layer(model, tmp_path, kv, tables):
    """Layers of the same ratios share a block table, and each holds its own number of entries."""
    folders = {}
    for k, ratios in kv.items():
        layers = {"kv": ratios, "ffn": [1, 8, k]}
        folders[f"k{k}"] = make_plugin(model, tmp_path / f"k{k}", k, **BOTH | {"k_per_layer": layers})
    prompts, ks = random_prompts(*LENGTHS), [2, 4, 0, 2, 4, 0, 4, 2]
    wanted = expected(reference_model(model, folders), prompts, ks, 24)
    with Engine(model, folders, num_gpu_blocks_override=600) as engine:
        free, managers = (
            engine.free_blocks,
            engine.scheduler.kv_cache_manager.coordinator.single_type_managers,
        )
        assert engine.tokens(prompts, ks, 24) == wanted
        assert engine.free_blocks == free
        held = {}
        for manager in managers:
            allocate = manager.allocate_new_blocks

            def count(request, *args, of=manager, allocate=allocate):
                found = allocate(request, *args)
                held[of.kv_cache_spec.ratios] = len(of.req_to_blocks[request])
                return found

            manager.allocate_new_blocks = count
        engine.tokens(random_prompts(900), [4], 2)
        # 901 tokens, or 4 + 445 + 7 entries at ratio 2, 4 + 222 + 9 at 4, 4 + 111 + 9 at 8, in blocks of 32
        assert held == tables


def test_kv_blocks(model, both, monkeypatch):
    """Peak blocks of 8 long prompts, and how many requests fit into a small pool."""
    prompts = random_prompts(*[900] * 8)
    blocks, requests = {}, {}
    together = dict(max_num_batched_tokens=8192, max_num_seqs=8)  # nobody ends before the last has begun
    with Engine(model, both, num_gpu_blocks_override=300, **together) as engine:
        for k in (0, 2, 4):
            seen = watch(engine, monkeypatch)
            engine.tokens(prompts, [k] * 8, 20)
            blocks[k] = seen["blocks"]
    with Engine(model, both, num_gpu_blocks_override=100, **together) as engine:
        for k in (0, 2, 4):
            seen = watch(engine, monkeypatch)
            engine.tokens(prompts, [k] * 8, 4)
            requests[k] = seen["requests"]
    assert blocks[0] == 8 * 29  # 920 tokens and one more place, 32 to a block
    assert blocks[0] / blocks[2] > 1.6
    assert blocks[0] / blocks[4] > 2.4
    assert requests[0] == 3  # 29 blocks each, of 99
    assert requests[2] >= 6
    assert requests[4] == 8


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families(family, tmp_path):
    model = make_model(family, tmp_path)
    plugins = {f"k{k}": make_plugin(model, tmp_path / f"k{k}", k, **BOTH) for k in (2, 4)}
    prompts, ks = random_prompts(50, 200, 33), [2, 4, 0]
    wanted = expected(reference_model(model, plugins), prompts, ks, 12)
    with Engine(model, plugins) as engine:
        assert engine.tokens(prompts, ks, 12) == wanted


def test_compiled_graph_compresses_and_the_self_check_finds_when_not(model, both, monkeypatch, caplog):
    from llm_variator.integrations.vllm.model import CompressedFFN

    prompts, ks = random_prompts(50, 200, 33), [2, 4, 0]
    wanted = expected(reference_model(model, both), prompts, ks, 12)
    with Engine(model, both, enforce_eager=False) as engine:
        assert engine.tokens(prompts, ks, 12) == wanted
    monkeypatch.setattr(CompressedFFN, "forward", lambda self, x: super(CompressedFFN, self).forward(x))
    with pytest.raises(RuntimeError, match="compression did not run"):
        Engine(model, both, enforce_eager=False)


def test_auto_follows_the_load(model, ffn):
    options = dict(target_seconds=1.0, tokens_per_second=1000.0, window_seconds=60.0)
    with Engine(model, ffn, default="auto", policy=options) as engine:
        assert isinstance(engine.scheduler._policy.speed, float)
        prompts = random_prompts(*[500] * 12)
        found = [out.kv_transfer_params["variator_k"] for out in engine.outputs(prompts, [None] * 12, 2)]
        # 1,000 tokens a second at first: two dense prompts fit into a second, and more and more wait
        assert found[:2] == [0, 0]
        assert found == sorted(found)
        assert found[-1] == 4
        assert engine.scheduler._policy.speed != 1000.0


def test_tensor_parallel(model, both, monkeypatch):
    """Two CPU ranks: the plugins are replicated, their vectors full-width."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    prompts, ks = random_prompts(50, 200, 33), [2, 4, 0]
    wanted = expected(reference_model(model, both), prompts, ks, 12)
    with Engine(model, both, tensor_parallel_size=2, distributed_executor_backend="mp") as engine:
        assert engine.tokens(prompts, ks, 12) == wanted


def test_refused_engine_settings(model, ffn, both):
    with pytest.raises(VariatorError, match="leave out one"):
        Engine(model, both, enable_prefix_caching=True)
    with pytest.raises(Exception, match="chunks of at least 8 tokens"):
        Engine(model, ffn, max_num_batched_tokens=7, max_num_seqs=4, max_model_len=64)
    with pytest.raises(VariatorError, match="scheduler_cls"):
        Engine(model, ffn, scheduler_cls="another")
