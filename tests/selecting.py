"""Tiny decoders whose heads keep keys and values of their own choice, beside their plain form (reference_select)."""

from __future__ import annotations

import pytest
import reference_select as plain
import torch
from conftest import DECODERS, SHAPE, make_decoder, randomise
from reference_select import Segment

from llm_variator import VariatorConfig, VariatorModel

LAYERS = 3
EXACT = 1e-8
"""In fp64."""
STEP = 1e-5
"""Of the logits that generate gives back: always in fp32."""

CONFIGS = {
    "short tail": dict(block=4, dense_head=2, dense_tail=3, ratios=((2, 4), (4, 2), (4, 1))),
    "long tail": dict(block=4, dense_head=0, dense_tail=10, ratios=((4, 4), (2, 2), (1, 4))),
    "dense layer": dict(block=8, dense_head=4, dense_tail=1, ratios=((8, 2), (1, 1), (4, 8))),
    "no tail": dict(block=8, dense_head=1, dense_tail=0, ratios=((1, 8), (8, 4), (2, 8))),
    "two fits": dict(block=8, dense_head=3, dense_tail=5, score_fits=2, ratios=((8, 4), (4, 8), (8, 8))),
    "one ratio": dict(block=4, dense_head=2, dense_tail=2, k=4),
    "some layers": dict(block=4, dense_head=2, dense_tail=2, k=2, layers=(0, 2)),
    "ffn": dict(
        block=4,
        dense_head=2,
        dense_tail=3,
        ratios=((2, 4), (4, 2), (4, 4)),
        k={"ffn": 3, "kv": 4},
        sites=("ffn", "kv"),
        compressor={"ffn": "weighted", "kv": "select"},
        r=5,
    ),
}
MAIN = CONFIGS["short tail"]
GREEDY = dict(do_sample=False, max_new_tokens=6)
FULL = dict(return_dict_in_generate=True, output_logits=True)

FEW = ("llama", "gemma3")
"""Decoders for what does not depend on their layers: with full attention alone, and with sliding windows."""
EVERYWHERE = {
    "test_logits_equal_the_plain_form",
    "test_generated_tokens_equal_the_plain_form",
    "test_plugin_off_is_bit_identical",
}
WHOLE_PROMPTS = ("no tail", "ffn")
"""What chunks need of other compressors is tested with them."""


def every_setting(metafunc) -> None:
    """Llama with all settings, other families with some."""
    if "settings" not in metafunc.fixturenames:
        return
    cases = [("llama", name) for name in CONFIGS]
    cases += [(decoder, "short tail") for decoder in DECODERS if decoder != "llama"] + [("gemma3", "ffn")]
    if metafunc.definition.originalname not in EVERYWHERE:
        cases = [case for case in cases if case[0] in (*FEW, "llama-mha")]
    if "chunk" in metafunc.fixturenames:
        cases = [case for case in cases if case[0] in FEW and case[1] not in WHOLE_PROMPTS]
    if metafunc.definition.originalname == "test_no_token_moves_what_comes_before_it":
        cases = [case for case in cases if case[1] != "ffn"]  # groups of the FFN do see their own tokens
    values = [pytest.param(decoder, CONFIGS[name], id=f"{decoder}-{name}") for decoder, name in cases]
    metafunc.parametrize(("decoder", "settings"), values)


def kv_heads(name: str) -> int:
    return (SHAPE | DECODERS[name])["num_key_value_heads"]


def config_for(settings: dict, groups: int) -> VariatorConfig:
    """The settings, their ratios for two heads repeated for models with more."""
    settings = {"sites": ("kv",), "compressor": "select"} | settings
    ratios = settings.pop("ratios", None)
    if ratios is not None:
        settings["k_per_head"] = tuple((row * groups)[:groups] for row in ratios)
    return VariatorConfig(**settings)


def choose(plugin, seed: int = 3) -> None:
    """Random scores, as far apart as the ratios are felt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sorted(plugin.selects):
            for parameter, std in (
                (plugin.selects[layer].score.weight, 1.0),
                (plugin.selects[layer].score.bias, 0.3),
            ):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def make(name: str, settings: dict = MAIN, dtype: torch.dtype = torch.float64, **overrides) -> VariatorModel:
    """A tiny decoder whose heads choose by random scores."""
    base = make_decoder(name, **overrides)
    model = VariatorModel(base, config_for(settings, base.config.num_key_value_heads))
    randomise(model.plugin())
    choose(model.plugin())
    return model.to(dtype)


def rule(model: VariatorModel, plugin_name: str | None = None) -> plain.Select:
    """What the plain form needs to know of a plugin."""
    return plain.of_plugin(model.plugin(plugin_name), LAYERS, model.base.config.num_key_value_heads)


@torch.no_grad()
def expected(model: VariatorModel, ids: torch.Tensor, prompt: int) -> plain.Read:
    """The plain form of one prompt and its continuation."""
    select, head = rule(model), model.plugin().config.dense_head
    return plain.read(model.base, ids, [Segment(prompt, select, head), Segment(ids.shape[1] - prompt)])


def close(actual: torch.Tensor, wanted: torch.Tensor, atol: float = EXACT) -> None:
    torch.testing.assert_close(actual, wanted, atol=atol, rtol=0)


def first(model: VariatorModel, tokens: int) -> Segment:
    """The prompt that begins a sequence."""
    return Segment(tokens, rule(model), model.plugin().config.dense_head)


@torch.no_grad()
def check_steps(
    model: VariatorModel,
    out,
    ids: torch.Tensor,
    segments: list[Segment],
    row: int = 0,
    *,
    greedy: bool = True,
) -> plain.Read:
    """What was generated after `ids` has the plain form's logits, and is what it would generate."""
    new = out.sequences[row, -len(out.logits) :]
    read = plain.read(model.base, torch.cat((ids, new[None]), 1), [*segments, Segment(len(new))])
    wanted = read.logits[-len(new) - 1 : -1]
    assert not greedy or torch.equal(wanted.argmax(-1), new)
    close(torch.stack(out.logits)[:, row].double(), wanted, STEP)
    return read


def slides(model: VariatorModel, layer: int) -> bool:
    kinds = getattr(model.base.config, "layer_types", None)
    return kinds is not None and kinds[layer] == "sliding_attention"


def held(model: VariatorModel, report=None) -> list[float]:
    """Entries per head of each layer that sees all of its past."""
    report = report or model.kv_cache_report()
    return [layer.entries for i, layer in enumerate(report.layers) if not slides(model, i)]


def wanted_entries(model: VariatorModel, read: plain.Read, unread: int = 0) -> list[float]:
    """The same, of the plain form; `unread` last tokens have not been read by the cache."""
    counts = [read.entries(i) for i in range(LAYERS) if not slides(model, i)]
    return [sum(layer) / len(layer) - unread for layer in counts]


def by_hand(n: int, ratio: int, block: int, head: int, tail: int) -> int:
    """Entries of one head after a prompt of `n` tokens."""
    inner = n - head - tail
    if n - head < 2 * block or inner <= 0:
        return n
    return head + inner // block * (block // ratio) + -(-(inner % block) // ratio) + tail


def add(model: VariatorModel, name: str, settings: dict) -> None:
    plugin = model.add_plugin(name, config_for(settings, model.base.config.num_key_value_heads))
    choose(plugin, seed=7)
    plugin.double()
