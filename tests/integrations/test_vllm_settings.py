"""What is served and what is refused at start, and the serve command's arguments. Needs no vLLM."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace

import pytest
from conftest import make_decoder
from tiny import model_folder

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.integrations.policy import LoadPolicy
from llm_variator.integrations.vllm.arguments import as_flags, engine_arguments
from llm_variator.integrations.vllm.plan import Chunk, Shape
from llm_variator.integrations.vllm.rows import Request, RowTable, check_choice, tracker_path
from llm_variator.integrations.vllm.settings import Settings
from llm_variator.serve.__main__ import main
from llm_variator.sources.models import load_config, load_model


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """A maker of plugin folders for the tiny llama."""
    base = load_model(model_folder())

    def make(k, **settings):
        folder = tmp_path_factory.mktemp("plugin") / "p"
        host = VariatorModel(base, VariatorConfig(k=k, **settings))
        host.save_pretrained(folder)
        host.unload()
        return str(folder)

    return make


def read(folders, config=None, **others):
    return Settings.of({"plugins": folders, **others}, config or load_config(model_folder()))


def test_what_is_served(plugins):
    both = dict(sites=("ffn", "kv"), dense_head=4, dense_tail=7)
    found = read({"k2": plugins(2), "k4": plugins({"ffn": 2, "kv": 4}, **both)}, default="auto")
    assert found.served == (2, 4)
    assert found.shapes == {2: Shape(4, 1, (2,)), 4: Shape(4, 7, (2, 4))}
    assert found.compresses_kv
    assert isinstance(found.make_policy(), LoadPolicy)


def test_layers_of_other_ratios(plugins):
    some = plugins(2, sites=("ffn", "kv"), k_per_layer={"ffn": [1, 8, 2], "kv": [2, 1, 2]})
    found = read({"k2": some, "k4": plugins(4)})  # named after k, whatever single layers do
    assert found.served == (2, 4)
    assert found.shapes[2].ratios == (2, 8)


def test_the_plugin_of_the_file(plugins):
    folder = plugins(2)
    built = read({"k2": folder}).plugins[2].build(32)
    assert sorted(built.sites) == [("ffn", 0), ("ffn", 1), ("ffn", 2)]


@pytest.mark.parametrize("name", ["two", "k1", "k", "2"])
def test_names(plugins, name):
    with pytest.raises(VariatorError, match="named after the ratio"):
        read({name: plugins(2)})


def test_refused_plugins(plugins, tmp_path):
    with pytest.raises(VariatorError, match="serve it as k4, not as k2"):
        read({"k2": plugins(4)})
    with pytest.raises(VariatorError, match='site "attention" is not served'):
        read({"k2": plugins(2, sites=("attention",))})
    with pytest.raises(VariatorError, match="decode_block"):
        read({"k2": plugins(2, sites=("kv",), decode_block=8)})
    with pytest.raises(VariatorError, match="not found"):
        read({"k2": str(tmp_path)})
    with pytest.raises(VariatorError, match="num_layers"):
        read({"k2": plugins(2)}, make_decoder("llama", num_hidden_layers=2).config)
    with pytest.raises(VariatorError, match="model_type"):
        read({"k2": plugins(2)}, make_decoder("qwen3").config)
    window = load_config(model_folder())
    window.sliding_window = 8
    with pytest.raises(VariatorError, match="every layer has a sliding window"):
        read({"k2": plugins(2, sites=("kv",))}, window)


def test_refused_settings(plugins):
    with pytest.raises(VariatorError, match="unknown serving setting colour"):
        read({}, colour=1)
    with pytest.raises(VariatorError, match="one of 0, 2 or"):
        read({"k2": plugins(2)}, default=4)
    with pytest.raises(VariatorError, match="needs at least one plugin"):
        read({}, default="auto")
    with pytest.raises(VariatorError, match="target_seconds"):
        read({"k2": plugins(2)}, policy={"target_seconds": -1})
    with pytest.raises(VariatorError, match="policy"):
        read({"k2": plugins(2)}, policy={"colour": 1})
    with pytest.raises(VariatorError, match="cannot be imported"):
        read({"k2": plugins(2)}, policy={"class": "llm_variator.integrations.policy:Missing"})
    assert read({"k2": plugins(2)}, policy={"class": "collections:Counter"}).make_policy() == {2: 1}
    with pytest.raises(VariatorError, match="serve some, or leave the policy out"):
        read({}, policy={"target_seconds": 1})
    with pytest.raises(VariatorError, match="costs of 4, which is not served; 2 are"):
        read({"k2": plugins(2)}, policy={"costs": {"k4": 0.5}})
    with pytest.raises(VariatorError, match="shares are numbers by ratio"):
        read({"k2": plugins(2)}, policy={"shares": 0.5})


@pytest.mark.parametrize("name", ["2", "k2", 2])
def test_costs_of_a_policy_go_before_those_that_are_reckoned(plugins, name):
    """The keys of JSON are texts."""
    found = read({"k2": plugins(2), "k4": plugins(4)}, policy={"costs": {name: 0.9}})
    assert found.make_policy().costs == {0: 1.0, 2: 0.9, 4: found.costs[4]}
    assert found.make_policy().shares == {0: 1.0, **found.shares}


def parallel(**changes):
    values = dict(decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False)
    return SimpleNamespace(**(values | changes))


def scheduler(**changes):
    values = dict(max_num_batched_tokens=64, long_prefill_token_threshold=0)
    return SimpleNamespace(**(values | dict(disable_hybrid_kv_cache_manager=False) | changes))


def engine(**changes):
    mode = SimpleNamespace(name=changes.pop("mode", "FULL_AND_PIECEWISE"))
    values = dict(
        speculative_config=None,
        kv_transfer_config=None,
        model_config=SimpleNamespace(
            enable_prompt_embeds=False, hf_config=SimpleNamespace(num_hidden_layers=3)
        ),
        parallel_config=parallel(),
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        scheduler_config=scheduler(),
    )
    return SimpleNamespace(**(values | changes))


def test_refused_engines(plugins):
    ffn, kv = read({"k2": plugins(2)}), read({"k2": plugins(2, sites=("kv",))})
    ffn.check_engine(engine())
    cases = {
        "speculative decoding": dict(speculative_config=1),
        "KV connector": dict(kv_transfer_config=1),
        "prompt embeddings": dict(model_config=SimpleNamespace(enable_prompt_embeds=True, hf_config=None)),
        "context parallelism": dict(parallel_config=parallel(decode_context_parallel_size=2)),
        "micro-batches": dict(parallel_config=parallel(use_ubatching=True)),
        "cudagraph_mode FULL": dict(mode="FULL"),
        "at least 6 tokens": dict(scheduler_config=scheduler(max_num_batched_tokens=5)),
        "threshold, now 64 and 5": dict(scheduler_config=scheduler(long_prefill_token_threshold=5)),
    }
    for message, changes in cases.items():
        with pytest.raises(VariatorError, match=message):
            ffn.check_engine(engine(**changes))
    with pytest.raises(VariatorError, match="prefix caching"):
        kv.check_engine(engine())
    uncached = dict(cache_config=SimpleNamespace(enable_prefix_caching=False))
    kv.check_engine(engine(**uncached))
    some = read({"k2": plugins(2, sites=("kv",), k_per_layer={"kv": [2, 1, 2]})})
    some.check_engine(engine(**uncached))
    with pytest.raises(VariatorError, match="disable_hybrid_kv_cache_manager"):
        some.check_engine(
            engine(**uncached, scheduler_config=scheduler(disable_hybrid_kv_cache_manager=True))
        )


def test_plugins_that_keep_keys(plugins):
    some = dict(sites=("kv",), compressor="select", k_per_head=[[4, 1], [2, 2], [1, 1]], dense_tail=70)
    found = read({"k4": plugins(4, **some), "k2": plugins(2, sites=("kv",))})
    assert found.served == (4, 2)
    assert found.selects
    assert found.compresses_kv
    assert not read({"k2": plugins(2, sites=("kv",))}).selects
    assert found.shapes[4] == Shape(4, 70, ())
    uncached = SimpleNamespace(enable_prefix_caching=False, cache_dtype="auto")
    found.check_engine(engine(cache_config=uncached))
    cases = {
        "prefix caching": dict(),
        "tensor or pipeline parallelism": dict(parallel_config=parallel(tensor_parallel_size=2)),
        "quantised KV cache": dict(
            cache_config=SimpleNamespace(enable_prefix_caching=False, cache_dtype="fp8")
        ),
        "disable_hybrid": dict(scheduler_config=scheduler(disable_hybrid_kv_cache_manager=True)),
        "another worker": dict(parallel_config=parallel(worker_cls="auto")),
    }
    for message, changes in cases.items():
        with pytest.raises(VariatorError, match=message):
            found.check_engine(engine(**{"cache_config": uncached} | changes) if changes else engine())


def test_a_plugin_that_keeps_keys_beside_another_of_its_ratio(plugins):
    some = dict(
        sites=("kv",), compressor="select", k_per_head=[[4, 1], [2, 2], [1, 1]], dense_tail=1, block=64
    )
    folders = {"k4": plugins(4, sites=("kv",)), "kv4": plugins(2, **some), "k2": plugins(2, sites=("ffn",))}
    found = read(folders, default="kv4")
    assert found.served == (4, "kv4", 2)
    assert found.default == "kv4"
    policy = found.make_policy()
    assert isinstance(policy, LoadPolicy)
    assert policy.ratios == (0, "kv4", 2, 4)
    # of 1,024 tokens: head 4 and tail 1; 1,019 in 15 blocks of 64 and one of 59, in six heads of these ratios
    entries = sum(4 + 1 + 15 * 64 // k + -(-59 // k) for k in (4, 1, 2, 2, 1, 1)) / 6
    assert policy.shares["kv4"] == pytest.approx(entries / 1024)
    assert policy.shares[2] == 1.0
    assert policy.costs["kv4"] == found.costs["kv4"] < 1.0
    with pytest.raises(VariatorError, match="keeps no keys and values: serve it as k2, not as kv2"):
        read({"kv2": plugins(2)})
    assert tracker_path("auto", found.served).endswith(":RowTracker_auto_0_4_kv4_2")


def test_choices():
    assert check_choice("kv4", ("kv4", 2)) == "kv4"
    assert [check_choice(choice, (2, 4)) for choice in (0, 1, 2, 4, "auto")] == [0, 0, 2, 4, "auto"]
    for wrong in (3, -1, 2.0, True, "2", None, [2]):
        with pytest.raises(VariatorError, match="must be one of 0, 2, 4"):
            check_choice(wrong, (2, 4))


def test_row_table():
    table = RowTable()
    table.requests = {0: Request(20, 2), 2: Request(7, 0)}
    assert table.any_plugin
    starts, lengths = [0, 5, 5, 6, 8], [17, 3, 9, 2]
    assert table.chunks(starts, lengths) == [
        Chunk(0, 5, 12, 20, 2),
        Chunk(5, 1, 8, 7, 0),
        Chunk(6, 2, 0, 0, 0),
    ]
    assert table.chunks([0, 1, 2], [4, 5], keys=[-1, 0]) == [Chunk(0, 1, 3, 0, 0), Chunk(1, 1, 4, 20, 2)]


def test_engine_arguments(plugins):
    folder = plugins(2, sites=("ffn", "kv"))
    found = engine_arguments(model_folder(), {"k2": folder}, default=2, max_model_len=64)
    assert found["model"] == model_folder()
    assert found["hf_overrides"] == {"architectures": ["VariatorLlamaForCausalLM"]}
    assert found["logits_processors"] == ["llm_variator.integrations.vllm.rows_v1:RowTracker_2_0_2"]
    assert found["enable_prefix_caching"] is False
    assert found["max_model_len"] == 64
    assert "enable_prefix_caching" not in engine_arguments(model_folder(), {"k2": plugins(2)})
    with pytest.raises(VariatorError, match="is not served in vLLM"):
        engine_arguments("t5-base", {})
    flags = as_flags({"a_b": True, "c": False, "d": {"x": [1]}, "e": ["f", "g"], "h": 1.5})
    assert flags == ["--a-b", "--no-c", "--d", '{"x": [1]}', "--e", "f", "g", "--h", "1.5"]


def test_serve_prints_its_command(plugins, capsys):
    folder = plugins(2)
    words = ["--model", model_folder(), "--plugin", f"k2={folder}", "--default-k", "auto"]
    main([*words, "--target-seconds", "0.5", "--port", "8123", "--dry-run", "--", "--max-model-len", "64"])
    line = shlex.split(capsys.readouterr().out)
    assert line[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    at = dict(zip(line[3::2], line[4::2], strict=True))
    assert at["--port"] == "8123"
    assert at["--served-model-name"] == model_folder()
    assert at["--max-model-len"] == "64"
    served = json.loads(at["--additional-config"])["variator"]
    assert served == {"plugins": {"k2": folder}, "default": "auto", "policy": {"target_seconds": 0.5}}


def test_serve_refuses(plugins):
    words = ["--model", model_folder(), "--dry-run"]
    for wrong, message in {
        "k2": "takes kN=PLUGIN",
        "k2=missing-plugin": "no plugin 'missing-plugin'",
        "k3=" + plugins(2): "serve it as k2",
    }.items():
        with pytest.raises(VariatorError, match=message):
            main([*words, "--plugin", wrong])
    with pytest.raises(VariatorError, match="names k2 twice"):
        main([*words, "--plugin", "k2=a", "k2=b"])
    with pytest.raises(VariatorError, match="leave it out"):
        main([*words, "--", "--scheduler-cls", "mine"])
    with pytest.raises(VariatorError, match="default-k"):
        main([*words, "--default-k", "two"])
