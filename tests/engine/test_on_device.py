"""On a GPU, in every dtype: results are those of the plain forms in fp64 on the CPU. `--device cpu` rehearses it.

In half precision a choice between scores that nearly tie may fall the other way: there the mean error has to be a
small share of what the plugin changes.
"""

from __future__ import annotations

import pytest
import reference
import torch
from conftest import make_decoder, make_variator, pad, prompts, randomise
from selecting import CONFIGS as SELECTING
from selecting import choose, expected, held, make, wanted_entries

from llm_variator import CompressedContext, KVPool, VariatorConfig, VariatorModel

pytestmark = pytest.mark.cuda

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MERGING = {
    "ffn+kv": VariatorConfig(k={"ffn": 4, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=3),
    "attention": VariatorConfig(k=3, sites=("attention",), r=5, dense_head=1, dense_tail=2),
}
FORMS = (*MERGING, "short tail", "long tail", "ffn")
BOTH = ("ffn+kv", "short tail")
"""Site kv: merged, and kept."""
GREEDY = dict(do_sample=False, max_new_tokens=6)
FULL = dict(return_dict_in_generate=True, output_logits=True)
SHARE = {torch.float16: 0.15, torch.bfloat16: 0.4}
NOISE = {torch.float16: 0.002, torch.bfloat16: 0.016}
"""Of the values themselves: two roundings of each layer; only where the plugin changes less."""


@pytest.fixture(params=DTYPES)
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=FORMS)
def form(request) -> str:
    return request.param


def build(decoder: str, form: str, dtype: torch.dtype, **overrides) -> VariatorModel:
    """A tiny decoder with a plugin, always the same weights."""
    if form in MERGING:
        return make_variator(decoder, MERGING[form], **overrides).to(dtype)
    return make(decoder, SELECTING[form], torch.float32, **overrides).to(dtype)


def plain_form(decoder: str, form: str, dtype: torch.dtype, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """(n, vocab) in fp64 on the CPU, of the weights rounded to `dtype`."""
    twin = build(decoder, form, dtype).double()
    if form in MERGING:
        with torch.no_grad():
            return reference.logits(twin.base, twin.plugin(), ids, prompt)
    return expected(twin, ids, prompt).logits


def close(found: torch.Tensor, wanted: torch.Tensor, without: torch.Tensor) -> None:
    """Whether `found` is `wanted`, by the error that would be without the plugin."""
    error = (found.double().cpu() - wanted.double().cpu()).abs()
    felt = (without.double().cpu() - wanted.double().cpu()).abs()
    assert felt.max() > 1e-4, "the plugin is not felt: this would prove nothing"
    if found.dtype == torch.float32:
        assert error.max() < min(1e-3, felt.max() / 20)
    else:
        most = max(SHARE[found.dtype] * felt.mean(), NOISE[found.dtype] * wanted.double().abs().mean().cpu())
        assert error.mean() < most, f"{error.mean():.4f}, {felt.mean():.4f} without the plugin"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.inference_mode()
def test_logits_equal_the_plain_form(decoder, form, dtype, implementation, device):
    model = build(decoder, form, dtype, attn_implementation=implementation).to(device)
    (ids,) = prompts(47)
    for prompt in (47, 39):
        found = model(ids.to(device), prompt_length=prompt).logits[0]
        with model.disable_plugin():
            without = model(ids.to(device)).logits[0]
        assert found.device.type == torch.device(device).type
        assert found.dtype == dtype
        close(found, plain_form(decoder, form, dtype, ids, prompt), without)


@pytest.mark.parametrize("form", BOTH)
@torch.inference_mode()
def test_generated_tokens_are_read_as_in_one_pass(decoder, form, dtype, device):
    model, (ids,) = build(decoder, form, dtype).to(device), prompts(41)
    out = model.generate(ids.to(device), **GREEDY, **FULL)
    entries = held(model)
    steps = torch.stack(out.logits)[:, 0].to(dtype)
    once = model(out.sequences, prompt_length=41).logits[0, 40:-1]
    with model.disable_plugin():
        without = model(out.sequences).logits[0, 40:-1]
    close(steps, once, without)
    twin = build(decoder, form, torch.float64)
    if form in MERGING:
        twin.generate(ids, **GREEDY)
        assert entries == held(twin)
    else:
        read = expected(twin, out.sequences.cpu(), 41)
        assert entries == pytest.approx(wanted_entries(twin, read, unread=1))


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_padding_changes_nothing(decoder, form, dtype, side, device):
    model, rows = build(decoder, form, dtype).to(device), prompts(12, 45, 31)
    batch = {name: value.to(device) for name, value in pad(rows, side).items()}
    logits, real = model(**batch).logits, batch["attention_mask"].bool()
    with model.disable_plugin():
        without = torch.cat([model(row.to(device)).logits[0] for row in rows])
    alone = torch.cat([model(row.to(device)).logits[0] for row in rows])
    close(torch.cat([row[own] for row, own in zip(logits, real, strict=True)]), alone, without)


@pytest.mark.parametrize("form", BOTH)
@torch.inference_mode()
def test_off_is_bit_identical(decoder, form, dtype, device):
    base = make_decoder(decoder).to(device, dtype)
    batch = {name: value.to(device) for name, value in pad(prompts(9, 41), "left").items()}
    wanted, tokens = base(**batch).logits, base.generate(**batch, **GREEDY)
    model = VariatorModel(base, build(decoder, form, dtype).plugin().config)
    with model.disable_plugin():
        assert torch.equal(model(**batch).logits, wanted)
        assert torch.equal(model.generate(**batch, **GREEDY), tokens)


@pytest.mark.parametrize("site", ["ffn", "kv", "attention"])
@torch.inference_mode()
def test_encoders_equal_those_of_the_cpu(encoder, site, dtype, device):
    """What a CPU computes in fp64 is compared with its plain form elsewhere."""
    config = VariatorConfig(k=3, sites=(site,), r=5)
    rows = pad(prompts(13, 29), "right")
    inputs = rows if encoder == "bert" else rows | {"decoder_input_ids": torch.tensor([[0, 5], [0, 7]])}
    near = {name: value.to(device) for name, value in inputs.items()}
    model = make_variator(encoder, config).to(dtype)
    wide = make_variator(encoder, config).to(dtype).double()
    wanted, found = wide(**inputs).logits, model.to(device)(**near).logits
    with wide.disable_plugin():
        without = wide(**inputs).logits
    real = rows["attention_mask"].bool() if encoder == "bert" else torch.ones(2, 2, dtype=torch.bool)
    close(found.to(dtype)[real.to(device)], wanted[real], without[real])


# A model as wide as a small one, a prompt of many blocks: strips of several blocks, long biases, other kernels.


@pytest.mark.parametrize("kv_heads", [2, 8])
@torch.inference_mode()
def test_long_prompts_are_read_as_on_the_cpu(kv_heads, dtype, device):
    shape = dict(hidden_size=256, num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=32)
    shape |= dict(num_hidden_layers=2, max_position_embeddings=4096)
    ratios = tuple(tuple(2 ** ((layer + head) % 7) for head in range(kv_heads)) for layer in range(2))
    config = VariatorConfig(
        sites=("kv",), compressor="select", k_per_head=ratios, dense_head=4, dense_tail=100
    )

    def made() -> VariatorModel:
        base = make_decoder("llama", **shape)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.mul_(0.4)  # so that attention is not all on one key
        model = VariatorModel(base, config)
        choose(model.plugin())
        return model.to(dtype)

    (ids,) = prompts(1203)
    model, wide = made().to(device), made().double()
    wanted = wide(ids, prompt_length=1190, logits_to_keep=400).logits[0]
    with wide.disable_plugin():
        without = wide(ids, logits_to_keep=400).logits[0]
    close(model(ids.to(device), prompt_length=1190, logits_to_keep=400).logits[0], wanted, without)


# Contexts, pools, caches elsewhere.


@pytest.mark.parametrize("form", BOTH)
@torch.inference_mode()
def test_contexts_answer_as_prompts_do(form, dtype, tmp_path, device):
    model = build("llama", form, dtype).to(device)
    document, question = (ids.to(device) for ids in prompts(45, 19))
    context = model.compress(document)
    wanted = model.generate(question, context=context, **GREEDY)
    for changed in (
        context.fork(),
        model.compress(document, pool=KVPool(400, 4)),
        model.compress(document, prefill_chunk_size=20),
    ):
        assert torch.equal(model.generate(question, context=changed, **GREEDY), wanted)
    context.save(tmp_path / "context")
    for options in ({}, {"pool": KVPool(400, 4)}):
        loaded = CompressedContext.load(tmp_path / "context", model, **options)
        assert torch.equal(model.generate(question, context=loaded, **GREEDY), wanted)
    packed = context.quantised(8)
    out = model.generate(question, context=packed, **GREEDY, **FULL)
    exact = model.generate(question, context=context, **GREEDY, **FULL)
    error = (out.logits[0] - exact.logits[0]).abs().mean()
    assert error < 0.1 * exact.logits[0].abs().mean()


@pytest.mark.parametrize("form", BOTH)
@torch.inference_mode()
def test_beams_and_batches_from_a_pool(form, dtype, device):
    model, rows = build("llama", form, dtype).to(device), pad(prompts(12, 45), "left")
    rows = {name: value.to(device) for name, value in rows.items()}
    options = dict(GREEDY, num_beams=3)
    before = rows["input_ids"][:, :-1], rows["attention_mask"][:, :-1]
    last = rows["input_ids"][:, -1:]
    wanted = model.generate(last, context=model.compress(*before), **options)
    found = model.generate(last, context=model.compress(*before, pool=KVPool(3000, 4)), **options)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("form", BOTH)
@torch.inference_mode()
def test_an_offloaded_cache(form, dtype, device):
    if device == "cpu":
        pytest.skip("a cache is offloaded from a GPU")
    model, (ids,) = build("llama", form, dtype).to(device), prompts(45)
    wanted = model.generate(ids.to(device), **GREEDY)
    assert torch.equal(model.generate(ids.to(device), cache_implementation="offloaded", **GREEDY), wanted)


@pytest.mark.parametrize("form", BOTH)
@torch.inference_mode()
def test_generated_tokens_age(form, dtype, device):
    """Of a prompt of one token nothing is known beforehand: the first keys come from generation."""
    model = build("llama", form, dtype)
    block = 4 if form in BOTH[1:] else 6
    config = model.plugin().config
    model.add_plugin("ages", VariatorConfig.from_dict(config.to_dict() | {"decode_block": block}))
    randomise(model.plugin("ages"))
    if form not in MERGING:
        choose(model.plugin("ages"))
    model.to(dtype).to(device).set_plugin("ages")
    twin_held = []
    for ids in prompts(1, 41):
        out = model.generate(ids.to(device), do_sample=False, max_new_tokens=24, **FULL)
        assert all(bool(step.isfinite().all()) for step in out.logits)
        twin_held.append(sum(layer.entries for layer in model.kv_cache_report().layers))
    assert twin_held[0] < 3 * 24  # three layers: something has aged


@pytest.mark.parametrize("decoder", ["llama", "qwen3"])
@torch.inference_mode()
def test_compiled_layers_make_the_same_tokens(decoder, device):
    torch._dynamo.reset()
    model = build(decoder, "ffn+kv", torch.float32, num_hidden_layers=2).to(device)
    wanted = [model.generate(ids.to(device), **GREEDY) for ids in prompts(40, 33)]
    model.compile(**({"backend": "eager"} if device == "cpu" else {}))
    for ids, tokens in zip(prompts(40, 33), wanted, strict=True):
        assert torch.equal(model.generate(ids.to(device), **GREEDY), tokens)
    torch._dynamo.reset()


@pytest.mark.parametrize("form", BOTH)
def test_gradients_are_those_of_the_cpu(form, dtype, device):
    (ids,) = prompts(47)

    def gradients(model: VariatorModel, where: str) -> dict[str, torch.Tensor]:
        states = model.base.model(ids.to(where)).last_hidden_state.detach().float()
        out = model.base.model.register_forward_hook(lambda module, args, output: found.append(output[0]))
        found: list[torch.Tensor] = []
        model(ids.to(where), prompt_length=47, use_cache=False, logits_to_keep=1)
        out.remove()
        (found[0].float() - states).square().mean().backward()
        return {
            name: p.grad.double().cpu() for name, p in model.plugin().named_parameters() if p.grad is not None
        }

    ours = gradients(build("llama", form, dtype).to(device), device)
    wanted = gradients(build("llama", form, dtype).double(), "cpu")
    assert ours.keys() == wanted.keys()
    assert ours
    a, b = (torch.cat([each[name].flatten() for name in sorted(each)]) for each in (ours, wanted))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > (0.9999 if dtype == torch.float32 else 0.8)
