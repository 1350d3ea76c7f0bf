"""Scores of kept keys: against plain loops over attention weights, and numpy's least squares."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DECODERS, make_decoder, make_encoder, randomise
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.sources.models import load_model
from llm_variator.train import scores
from llm_variator.train.futures import FUTURES, KINDS, Sample
from llm_variator.train.scores import TOGETHER, Explained, Moments, Watch, targets

CONTEXT, ROWS = 40, slice(3, 31)


def sample(seed: int = 0, kind: str = "text") -> Sample:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (CONTEXT,), generator=draw)
    futures = {
        "continuation": torch.randint(3, 97, (9,), generator=draw),
        "repetition": torch.cat((torch.tensor([5, 6]), ids[ROWS])),
    }
    if kind == "passages":
        futures["questions"] = torch.randint(3, 97, (13,), generator=draw)
    return Sample(kind, ids, ROWS, futures)


def values_of(base, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """(KV heads, n, e) by the value projection alone."""
    attention = base.model.layers[layer].self_attn
    return attention.v_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)


def by_loops(base, one: Sample, future: torch.Tensor, output_weight, run=None) -> tuple[dict, dict]:
    """What attention reads of the fitted tokens, and their energies, token by token, from eager attention weights.

    `run` in place of `base` on all tokens.
    """
    reads: dict[int, torch.Tensor] = {}
    handles = [
        block.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: reads.update(
                {i: (args[0] if args else kwargs["hidden_states"])[0]}
            ),
            with_kwargs=True,
        )
        for i, block in enumerate(base.model.layers)
    ]
    with torch.no_grad():
        ids = torch.cat((one.context, future))[None]
        weights = (run or base)(ids, output_attentions=True, use_cache=False).attentions
    for handle in handles:
        handle.remove()
    found = {}
    for layer, own in enumerate(weights):
        value = values_of(base, layer, reads[layer])
        groups = own.shape[1] // len(value)
        energy = torch.zeros(ROWS.stop - ROWS.start, len(value), dtype=torch.float64)
        for head in range(own.shape[1]):
            part = output_weight(layer)[:, head * value.shape[-1] : (head + 1) * value.shape[-1]]
            for row, token in enumerate(range(ROWS.start, ROWS.stop)):
                size = (part @ value[head // groups, token]).norm()
                read = own[0, head, CONTEXT:, token] * size
                energy[row, head // groups] += read.double().square().mean()
        found[layer] = energy
    return {layer: x[ROWS] for layer, x in reads.items()}, found


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_energies_are_those_of_eager_attention(name):
    base = make_decoder(name, attn_implementation="eager")
    one = sample(kind="passages")
    watch = Watch(base)
    with watch.attached():
        features, energies = watch.read(one)
    assert set(energies) == set(FUTURES)
    assert watch.layers == [i for i in range(3) if name != "gemma3" or i != 1]
    for future, ids in one.futures.items():
        reads, wanted = by_loops(
            base, one, ids, lambda layer: base.model.layers[layer].self_attn.o_proj.weight
        )
        for layer in watch.layers:
            assert torch.allclose(features[layer], reads[layer], atol=1e-4)
            assert torch.allclose(energies[future][layer].double(), wanted[layer], rtol=1e-3), (future, layer)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_energies_beside_a_plugin_are_those_of_its_model(name):
    base = make_decoder(name, attn_implementation="eager")
    model = VariatorModel(base)
    model.add_plugin("ffn", VariatorConfig(k=4, r=5, dense_head=2, dense_tail=5))
    randomise(model.plugin("ffn"))
    one = sample(kind="passages")
    watch = Watch(base, model.plugin("ffn"))
    with watch.attached():
        features, energies = watch.read(one)

    def run(ids, **options):
        with model.use_plugin("ffn"):
            return model(ids, prompt_length=CONTEXT, **options)

    weight = {layer: base.model.layers[layer].self_attn.o_proj.weight for layer in watch.layers}
    for future, ids in one.futures.items():
        reads, wanted = by_loops(base, one, ids, weight.__getitem__, run)
        dense, _ = by_loops(base, one, ids, weight.__getitem__)
        for layer in watch.layers:
            assert torch.allclose(features[layer], reads[layer], atol=1e-4)
            assert torch.allclose(energies[future][layer].double(), wanted[layer], rtol=1e-3), (future, layer)
        assert not torch.allclose(features[2], dense[2], atol=1e-2)


@torch.no_grad()
def test_the_base_is_left_as_it_was():
    base = make_decoder("llama")
    ids = sample().context[None]
    before = base(ids).logits
    watch = Watch(base)
    with watch.attached():
        assert torch.equal(base(ids).logits, before)
    assert all(block.self_attn.config is base.config for block in base.model.layers)
    assert not any(block.self_attn._forward_pre_hooks for block in base.model.layers)


@pytest.mark.parametrize("beside", [False, True])
@torch.no_grad()
def test_a_wrapped_base_is_left_as_it_was(beside):
    """Whichever of both functions of attention goes first."""
    base = make_decoder("llama")
    model = VariatorModel(base)
    model.add_plugin("ffn", VariatorConfig(k=4, r=5))
    model.add_plugin("kv", VariatorConfig(sites=("kv",), compressor="select", block=4))
    ids = sample().context[None]
    with model.use_plugin("kv"):
        wanted = model(ids).logits
    watch = Watch(base, model.plugin("ffn") if beside else None)
    with watch.attached():
        watch.read(sample(kind="passages"))
        with model.use_plugin("kv"):
            assert torch.equal(model(ids).logits, wanted)
        base(ids)
    with model.use_plugin("kv"):
        assert torch.equal(model(ids).logits, wanted)
    model.unload()
    assert all(block.self_attn.config is base.config for block in base.model.layers)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra `quant` is not installed"
)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@torch.no_grad()
def test_a_quantised_base_is_fitted_on_what_it_computes(tmp_path, kind):
    import bitsandbytes

    make_decoder("llama", hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(tmp_path)
    base = load_model(str(tmp_path), quantize=kind)
    base.set_attn_implementation("eager")

    def weight(layer: int) -> torch.Tensor:
        own = base.model.layers[layer].self_attn.o_proj.weight
        if kind == "nf4":
            return bitsandbytes.functional.dequantize_4bit(own.data, own.quant_state).float()
        state = base.model.layers[layer].self_attn.o_proj.state
        scales = own.SCB if own.SCB is not None else state.SCB
        return own.data.float() * scales[:, None] / 127

    one, watch = sample(), Watch(base)
    with watch.attached():
        _, energies = watch.read(one)
    _, wanted = by_loops(base, one, one.futures["continuation"], weight)
    for layer in watch.layers:
        assert torch.allclose(energies["continuation"][layer].double(), wanted[layer], rtol=0.03), layer


def test_an_encoder_is_refused():
    with pytest.raises(VariatorError, match='compressor "select" is for decoders, T5'):
        Watch(make_encoder("t5"))


@torch.no_grad()
def test_fits_are_numpy_s_least_squares():
    watch = Watch(make_decoder("llama"))
    moments = Moments(len(watch.layers), watch.dim, watch.heads)
    rows: dict[str, list] = {}
    seen: list[tuple] = []
    with watch.attached():
        for seed in range(6):
            one = sample(seed, KINDS[seed % 2])
            features, energies = watch.read(one)
            moments.add(one.kind, features, targets(energies))
            seen.append((features, dict(energies)))
            energies[TOGETHER] = {
                layer: sum(own[layer] for own in energies.values()) for layer in watch.layers
            }
            for name, own in energies.items():
                rows.setdefault(name, []).append((features[1].double().numpy(), own[1].double().numpy()))
    assert moments.present() == [*FUTURES, TOGETHER]
    for name, parts in rows.items():
        x = np.concatenate([part[0] for part in parts])
        y = 0.5 * np.log(np.concatenate([part[1] for part in parts]))
        ridge = math.sqrt(scores.RIDGE * np.mean((x**2).sum(0)))
        tall = np.concatenate((np.c_[x, np.ones(len(x))], np.c_[ridge * np.eye(32), np.zeros(32)]))
        solution, *_ = np.linalg.lstsq(tall, np.concatenate((y, np.zeros((32, 2)))), rcond=None)
        fit = moments.solve(name)
        assert np.allclose(fit.weight[1].T, solution[:-1], atol=1e-8), name
        assert np.allclose(fit.bias[1], solution[-1], atol=1e-8), name
        left = ((y - np.c_[x, np.ones(len(x))] @ solution) ** 2).sum(0)
        wanted = 1 - left / ((y - y.mean(0)) ** 2).sum(0)
        held = Explained({name: fit})
        for features, energies in seen:
            held.add(features, targets(energies))
        assert np.allclose(held.shares()[name][1], wanted, atol=1e-8), name


def test_weights_that_stay_on_the_disk(tmp_path):
    """What a model reads is the same where its layers are on the disk and come for their pass alone."""
    make_decoder("llama").save_pretrained(tmp_path)
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(parts, "cpu") | {"model.layers": "disk"}
    found = []
    for more in ({}, {"device_map": places}):
        base = load_model(tmp_path, **more)
        assert base.model.layers[0].mlp.up_proj.weight.is_meta == bool(more)
        watch = Watch(base)
        with watch.attached():
            found.append((*watch.read(sample()), *watch.effects(sample(), seed=1)))
    assert_equal(*found)


def assert_equal(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
        return
    assert len(ours) == len(theirs) > 0
    for key in ours if isinstance(ours, dict) else range(len(ours)):
        assert_equal(ours[key], theirs[key])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what Linux says of its memory")
def test_the_checkpoint_of_a_model_is_not_copied_into_memory(tmp_path):
    """Its pages can be given up and read again, so scores of a model can be fitted that is larger than the memory."""
    config = make_decoder("llama").config
    config.hidden_size, config.intermediate_size, config.head_dim = 512, 8192, 128
    type(make_decoder("llama"))(config).bfloat16().save_pretrained(tmp_path)
    base = load_model(tmp_path)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if line[-1] == str(tmp_path / "model.safetensors")]
    place = base.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert any(int(first, 16) <= place < int(end, 16) for first, end in ranges), (
        "recipes/llama-3.1-8b/kv.yaml"
    )


@pytest.mark.parametrize("name", DECODERS)
def test_effects_are_the_gradients_of_gates(name):
    """Each key of each KV head gets a factor of 1 on what it adds to each query's output, in eager code of our own."""
    base = make_decoder(name, attn_implementation="eager").double()
    one = sample(kind="passages")
    watch = Watch(base)
    with watch.attached():
        _, effects = watch.effects(one, seed=3)
    assert set(effects) == set(watch.layers)
    assert all(parameter.grad is None for parameter in base.parameters())
    draw, wanted = torch.Generator().manual_seed(3), dict.fromkeys(watch.layers, 0.0)
    for future in one.futures.values():
        gates: dict[int, torch.Tensor] = {}

        def gated(module, query, key, value, mask, scaling, gates=gates, **kwargs):
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
            weights = (query @ key.mT * scaling + mask[:, :, :, : key.shape[2]]).softmax(-1)
            gate = torch.ones(query.shape[1] // groups, query.shape[2], key.shape[2], dtype=query.dtype)
            gates[module.layer_idx] = gate.requires_grad_()
            out = (weights * gate.repeat_interleave(groups, dim=0)) @ value
            return out.transpose(1, 2), weights

        ALL_ATTENTION_FUNCTIONS.register("gated", gated)
        ALL_MASK_ATTENTION_FUNCTIONS.register("gated", eager_mask)
        base.set_attn_implementation("gated")
        logits = base(torch.cat((one.context, future))[None], use_cache=False).logits[0, CONTEXT:]
        shares = logits.detach().float().softmax(-1)
        drawn = torch.multinomial(shares, 1, generator=draw)[:, 0]
        torch.nn.functional.cross_entropy(logits.float(), drawn, reduction="sum").backward()
        base.set_attn_implementation("eager")
        base.zero_grad()
        for layer in watch.layers:
            own = gates[layer].grad[:, CONTEXT:, ROWS].square().sum(1).T
            wanted[layer] = wanted[layer] + own / len(future) / len(one.futures)
    for layer in watch.layers:
        assert torch.allclose(effects[layer].double(), wanted[layer], rtol=1e-3, atol=1e-12), layer
