"""Quantised bases by bitsandbytes on a CPU: what is quantised, what stays, and plugins over it."""

import pytest
import torch
from conftest import make_decoder, make_encoder, make_variator, prompts, randomise
from tiny import model_folder, train

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.sources.models import load_model
from llm_variator.sources.models.quantisation import base_bytes, predicted_bytes, quantise

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")

KINDS = ("nf4", "int8")
WIDE = dict(hidden_size=128, intermediate_size=256, head_dim=32)  # matrices that fill NF4's blocks
# Rounding error of normal weights, relative to them: NF4's 16 levels, and 127 steps up to a row's largest weight.
ROUNDING = {"nf4": 0.12, "int8": 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    make_decoder("llama", **WIDE).save_pretrained(folder)
    return folder


def plain_weight(module) -> torch.Tensor:
    """What a quantised matrix stands for, by its own scales."""
    if hasattr(module.weight, "quant_state"):
        return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.data.float() * scales[:, None] / 127


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [True, False], ids=["while reading", "in place"])
def test_layers_are_rounded_and_the_rest_stays(folder, kind, read):
    plain = load_model(folder)
    model = load_model(folder, quantize=kind) if read else load_model(folder)
    if not read:
        quantise(model, kind, torch.device("cpu"))
    ours, theirs = model.model.layers[1].mlp.up_proj, plain.model.layers[1].mlp.up_proj
    assert type(ours).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    error = (plain_weight(ours).float() - theirs.weight).norm() / theirs.weight.norm()
    assert 0.001 < error < ROUNDING[kind]
    for name, kept in plain.named_parameters():
        if "proj" not in name:
            assert torch.equal(model.get_parameter(name), kept), name
    assert model.is_quantized
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_what_arithmetic_says(folder, kind):
    plain = load_model(folder)
    assert base_bytes(plain) == predicted_bytes(plain, None) + sum(
        b.untyped_storage().nbytes() for b in plain.buffers()
    )
    measured, predicted = base_bytes(load_model(folder, quantize=kind)), predicted_bytes(plain, kind)
    layers = 3 * (128 * (128 + 2 * 64 + 128) + 3 * 128 * 256)  # q, k and v, o; gate, up, down
    by_hand = layers + 4 * 3 * (128 + 64 + 64 + 128 + 2 * 256 + 128) if kind == "int8" else layers * 4.127 / 8
    rest = 4 * (2 * 97 * 128 + 7 * 128)
    assert predicted == pytest.approx(rest + by_hand, rel=1e-3)
    # blocks of scales are not full in matrices this small, and a codebook of 16 or 256 values comes with each
    assert predicted <= measured < predicted + 21 * (1500 if kind == "nf4" else 0) + 4096


@pytest.mark.parametrize("kind", KINDS)
def test_a_plugin_moves_between_quantised_and_plain_bases(folder, kind, tmp_path, caplog):
    config = VariatorConfig(k=2, sites=("ffn", "kv"), r=4, dense_head=1, dense_tail=2)
    quantised = VariatorModel(load_model(folder, quantize=kind), config)
    randomise(quantised.plugin(), std=0.05)
    quantised.save_pretrained(tmp_path / "plugin")
    plain = VariatorModel.from_pretrained(load_model(folder), tmp_path / "plugin")
    plain.save_pretrained(tmp_path / "back")
    quantised.load_plugin(tmp_path / "back", "back")
    assert "other weights" not in caplog.text, "the same base, by its fingerprint"
    ids = prompts(24)[0]
    with torch.no_grad():
        ours, again, theirs = quantised(ids).logits, None, plain(ids).logits
        with quantised.use_plugin("back"):
            again = quantised(ids).logits
    assert torch.equal(ours, again)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean() > (
        0.9 if kind == "nf4" else 0.99
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_plugin_through_a_quantised_base(folder, kind):
    """Against the same model with its quantised matrices written out in full."""
    config = VariatorConfig(k=2, sites=("ffn", "kv"), r=4, dense_head=1)
    model = load_model(folder, quantize=kind)
    written_out = load_model(folder)
    with torch.no_grad():
        model(prompts(8)[0])  # bitsandbytes may repack a matrix here, and then has no gradients for it
        for name, module in model.named_modules():
            if type(module).__name__.startswith("Linear") and type(module) is not torch.nn.Linear:
                written_out.get_submodule(name).weight.copy_(plain_weight(module))
    gradients = []
    for base in (model, written_out):
        variator = VariatorModel(base, config)
        randomise(variator.plugin(), std=0.05)
        variator(prompts(24)[0], use_cache=False).logits.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in variator.plugin().parameters()]))
    ours, theirs = gradients
    # int8 rounds activations too
    assert (ours - theirs).norm() / theirs.norm() < (1e-3 if kind == "nf4" else 0.1)


@pytest.mark.parametrize("compressor", ["weighted", {"ffn": "weighted", "kv": "select"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_generation_equals_teacher_forcing(folder, kind, compressor):
    config = VariatorConfig(k=2, sites=("ffn", "kv"), compressor=compressor, r=4, block=4)
    model = VariatorModel(load_model(folder, quantize=kind), config)
    randomise(model.plugin(), std=0.05)
    ids = prompts(20)[0]
    out = model.generate(
        ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        whole = model(out.sequences, prompt_length=20).logits[:, 19:-1]
    # int8 rounds each call's activations by row, fp16 inside: the same rows, other sums
    torch.testing.assert_close(
        torch.stack(out.logits, 1), whole, atol=1e-4 if kind == "nf4" else 0.02, rtol=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_training_over_a_quantised_base(kind, tmp_path):
    options = dict(quantize=kind, max_steps=20, save_every=10, learning_rate=0.003, prompt_tokens=(16, 16))
    figures = train(tmp_path / kind, **options)
    losses = [loss for _, loss in figures["loss_history"]]
    assert sum(losses[-5:]) < sum(losses[:5])
    checkpoint = tmp_path / kind / "checkpoint-20"
    assert max(file.stat().st_size for file in checkpoint.iterdir()) < 100_000
    assert figures["base"]["quantize"] == kind
    assert train(tmp_path / kind, "--resume", **{**options, "max_steps": 22})["steps"] == 22


def test_t5_keeps_what_transformers_keeps_in_fp32():
    model = make_encoder("t5")
    quantise(model, "int8", torch.device("cpu"))
    layer = model.encoder.block[0].layer[-1].DenseReluDense
    assert type(layer.wi).__name__ == "Linear8bitLt"
    assert type(layer.wo) is torch.nn.Linear


def test_wrong_arguments():
    with pytest.raises(VariatorError, match="unknown quantisation 'int3'"):
        load_model(model_folder(), quantize="int3")
    with pytest.raises(VariatorError, match="device_map is for pretrained"):
        load_model("tiny-llama", random_init=True, device_map="auto")


def test_random_weights_can_be_quantised():
    model = load_model("tiny-llama", random_init=True, quantize="nf4")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert make_variator("llama", VariatorConfig(k=2)) is not None
