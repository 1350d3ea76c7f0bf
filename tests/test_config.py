"""Configuration: defaults, validation, JSON."""

from __future__ import annotations

import json

import pytest

from llm_variator import VariatorConfig, VariatorError
from llm_variator.config import BaseSignature

BASE = BaseSignature("base", "llama", 32, 3)
SELECT = {"k": 4, "sites": ("kv",), "compressor": "select"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be an integer >= 1"),
        ({"k": -2}, "k must be an integer >= 1"),
        ({"k": 2.0}, "k must be an integer"),
        ({"k": True}, "k must be an integer"),
        ({"k": {"ffn": 2}, "sites": ("ffn", "kv")}, "must name ffn, kv"),
        ({"k": {"ffn": 2, "kv": 2}}, "must name ffn"),
        ({"k": {"ffn": 0}}, "k\\['ffn'\\] must be an integer >= 1"),
        ({"sites": ()}, "sites must name each"),
        ({"sites": ("ffn", "ffn")}, "at most once"),
        ({"sites": ("mlp",)}, "site must be one of ffn, attention, kv, cross; got 'mlp'"),
        ({"sites": ("kv", "attention")}, "exclude each other"),
        ({"r": 0}, "r must be"),
        ({"compressor": "max"}, "compressor must be one of weighted, mean"),
        ({"decompressor": "none"}, "decompressor must be one of"),
        ({"activation": "relu"}, "activation must be one of identity, tanh"),
        ({"layers": ()}, "at least one"),
        ({"layers": (0, 0)}, "distinct"),
        ({"layers": (-1,)}, "layers must be an integer >= 0"),
        ({"k_per_layer": {"kv": (2, 2, 2)}}, "must name ffn"),
        ({"k_per_layer": {"ffn": (2, 0, 2)}}, "k_per_layer\\['ffn'\\] must be"),
        ({"k_per_layer": (2, 2)}, "must map a site"),
        ({"dense_head": -1}, "dense_head must be"),
        ({"dense_tail": 1.5}, "dense_tail must be"),
        ({"format_version": 2}, "format_version 2 is not supported"),
        ({"compressor": "select"}, 'select.*"kv"'),
        ({"sites": ("attention",), "compressor": "select"}, 'select.*"kv"'),
        ({"sites": ("cross",), "compressor": "select"}, 'select.*"kv"'),
        ({"sites": ("ffn", "kv"), "compressor": "select"}, 'select.*"kv"'),
        ({"compressor": {"ffn": "select"}}, 'select.*"kv"'),
        ({"compressor": {"kv": "select"}}, "compressor.*must name ffn"),
        ({"sites": ("ffn", "kv"), "compressor": {"kv": "select"}}, "compressor.*must name ffn, kv"),
        ({"sites": ("kv",), "compressor": {"kv": "max"}}, "compressor must be one of"),
        ({"sites": ("kv",), "compressor": ["select"]}, "compressor must be one of"),
        ({"k_per_head": ((2, 2),)}, "k_per_head.*select"),
        (SELECT | {"k": 3}, "power of two"),
        (SELECT | {"k": {"kv": 6}}, "power of two"),
        (SELECT | {"k": 128}, "up to block"),
        (SELECT | {"k": 8, "block": 4}, "up to block"),
        (SELECT | {"k_per_head": ((2, 3),)}, "power of two"),
        (SELECT | {"k_per_head": ((2, 128),)}, "up to block"),
        (SELECT | {"k_per_head": ((2, 0),)}, "k_per_head must be an integer >= 1"),
        (SELECT | {"k_per_head": ((2, -2),)}, "k_per_head must be an integer >= 1"),
        (SELECT | {"k_per_head": ((2, 2.0),)}, "k_per_head must be an integer"),
        (SELECT | {"k_per_head": ((2, True),)}, "k_per_head must be an integer"),
        (SELECT | {"k_per_head": ((2, "4"),)}, "k_per_head must be an integer"),
        (SELECT | {"k_per_head": ((2, [4]),)}, "k_per_head must be an integer"),
        (SELECT | {"k_per_head": ((2, None),)}, "k_per_head must be an integer"),
        (SELECT | {"k_per_head": ((2, 4), (2,))}, "k_per_head must"),
        (SELECT | {"k_per_head": ((), ())}, "k_per_head must"),
        (SELECT | {"k_per_head": ()}, "k_per_head must"),
        (SELECT | {"k_per_head": (2, 4)}, "k_per_head must"),
        (SELECT | {"k_per_head": "24"}, "k_per_head must"),
        (SELECT | {"k_per_head": 2}, "k_per_head must"),
        (SELECT | {"block": 48}, "block must be a power of two"),
        (SELECT | {"block": 0}, "block must be"),
        (SELECT | {"block": 64.0}, "block must be an integer"),
        (SELECT | {"block": None}, "block must be an integer"),
        (SELECT | {"score_fits": 0}, "score_fits must be"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(VariatorError, match=message):
        VariatorConfig(**settings)
    with pytest.raises(ValueError, match=message):  # and so users may catch ValueError
        VariatorConfig(**settings)


def test_paper_preset():
    config = VariatorConfig.paper(4)
    assert (config.k, config.sites, config.dense_head, config.dense_tail) == (4, ("ffn",), 0, 1)
    assert (config.r, config.compressor, config.decompressor, config.activation) == (
        64,
        "weighted",
        "adapter",
        "identity",
    )
    assert VariatorConfig.paper(2, r=8).r == 8


@pytest.mark.parametrize("decoder", [True, False])
def test_defaults_depend_on_the_model(decoder):
    resolved = VariatorConfig().resolved(BASE, decoder=decoder)
    assert (resolved.dense_head, resolved.dense_tail) == ((4, 1) if decoder else (0, 0))
    assert VariatorConfig(dense_head=0, dense_tail=9).resolved(BASE, decoder=True).dense_tail == 9


def test_ratio_of_a_layer():
    config = VariatorConfig(
        k={"ffn": 2, "kv": 4}, sites=("kv", "ffn"), layers=(0, 2), k_per_layer={"ffn": (1, 3, 8)}
    )
    assert config.sites == ("ffn", "kv")
    assert [config.ratio("ffn", i) for i in range(3)] == [None, None, 8]
    assert [config.ratio("kv", i) for i in range(3)] == [4, None, 4]
    assert config.ratio("attention", 0) is None
    assert VariatorConfig(k=1).ratio("ffn", 0) == 1  # groups of one: attached, unlike k_per_layer's 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VariatorConfig(layers=(3,)), "layer 3, but 'base' has 3 layers"),
        (VariatorConfig(k_per_layer={"ffn": (2, 2)}), "2 entries, but 'base' has 3 layers"),
        (
            VariatorConfig(base=BaseSignature("other", "mistral", 32, 3)),
            "made for 'other' \\(model_type mistral\\)",
        ),
        (VariatorConfig(base=BaseSignature("other", "llama", 64, 3)), "hidden_size 64"),
        (VariatorConfig(base=BaseSignature("other", "llama", 32, 4)), "num_layers 4"),
        (VariatorConfig(**SELECT, k_per_head=((2, 2),) * 2), "k_per_head has 2 layers, but 'base' has 3"),
        (VariatorConfig(**SELECT, k_per_head=((2, 2),) * 4), "k_per_head has 4 layers, but 'base' has 3"),
    ],
)
def test_config_and_model_must_fit(config, message):
    with pytest.raises(VariatorError, match=message):
        config.resolved(BASE, decoder=True)


def test_select_is_for_decoders():
    with pytest.raises(VariatorError, match=r"select.*decoders"):
        VariatorConfig(**SELECT).resolved(BASE, decoder=False)


def test_json_round_trip(tmp_path):
    config = VariatorConfig(
        k={"ffn": 2, "kv": 4},
        sites=("ffn", "kv"),
        layers=(0, 1),
        k_per_layer={"ffn": (1, 2, 3)},
        activation="tanh",
    ).resolved(BASE, decoder=True)
    file = tmp_path / "variator_config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert VariatorConfig.from_json(file) == config


def test_select_round_trip(tmp_path):
    config = VariatorConfig(
        k={"ffn": 3, "kv": 4},
        sites=("kv", "ffn"),
        compressor={"kv": "select", "ffn": "mean"},
        k_per_head=[[1, 2], [8, 8], [1, 1]],
        block=8,
        score_fits=3,
    ).resolved(BASE, decoder=True)
    assert (config.compressor_of("ffn"), config.compressor_of("kv")) == ("mean", "select")
    file = tmp_path / "variator_config.json"
    file.write_text(json.dumps(config.to_dict()))
    read = VariatorConfig.from_json(file)
    assert read == config
    assert read.k_per_head == ((1, 2), (8, 8), (1, 1))
    assert (read.block, read.score_fits) == (8, 3)
    assert json.loads(file.read_text())["k_per_head"] == [[1, 2], [8, 8], [1, 1]]


def test_defaults_of_select():
    config = VariatorConfig(**SELECT)
    assert (config.block, config.score_fits, config.k_per_head) == (64, 1, None)
    assert config.compressor_of("kv") == "select"
    assert VariatorConfig(**SELECT | {"k": 64}).k == 64
    assert VariatorConfig().compressor_of("ffn") == "weighted"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "must hold a JSON object"),
        ('{"ratio": 2}', "unknown setting ratio; known are"),
        ('{"k": "two"}', "k must be an integer"),
        ('{"sites": 3}', "sites must be a list"),
        ('{"base": {"name": "x"}}', "base: "),
        ('{"format_version": 99}', "format_version 99"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message):
    file = tmp_path / "variator_config.json"
    file.write_text(text)
    with pytest.raises(VariatorError, match=message) as caught:
        VariatorConfig.from_json(file)
    assert str(file) in str(caught.value)
