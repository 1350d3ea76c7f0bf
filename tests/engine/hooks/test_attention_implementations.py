"""transformers' own switch selects the attention kernel; results stay the same."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
from conftest import make_variator, pad, prompts

from llm_variator import VariatorConfig

CONFIGS = {
    "ffn+kv": VariatorConfig(k=2, sites=("ffn", "kv"), r=5),
    "attention": VariatorConfig(k=3, sites=("attention",), r=5, dense_tail=2),
}


def _missing(name: str) -> str | None:
    """Why an implementation cannot run here."""
    if name == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            return "the package flash-attn is not installed"
        return None if torch.cuda.is_available() else "flash-attn needs a GPU"
    if name == "flex_attention" and not torch.cuda.is_available() and shutil.which("g++") is None:
        return "flex_attention compiles, on a CPU with g++"
    return None


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flex_attention"])
def test_same_results_as_eager(name, config):
    if (reason := _missing(name)) is not None:
        pytest.skip(reason)
    flash = name.startswith("flash")
    device, dtype = ("cuda", torch.bfloat16) if flash else ("cpu", torch.float32)
    model = make_variator(
        "llama", CONFIGS[config], num_hidden_layers=2, head_dim=16, attn_implementation="eager"
    )
    model.to(device, dtype)
    model.eval()
    (row,) = prompts(29)
    batch = pad(prompts(13, 29), "left")
    inputs = [{"input_ids": row}, {"input_ids": row, "prompt_length": 21}, batch]
    inputs = [{k: v.to(device) if hasattr(v, "to") else v for k, v in one.items()} for one in inputs]
    with torch.inference_mode():
        expected = [model(**one).logits for one in inputs]
        tokens = model.generate(**inputs[2], max_new_tokens=4, do_sample=False)
        model.base.set_attn_implementation(name)
        for one, wanted in zip(inputs, expected, strict=True):
            real = one.get("attention_mask", torch.ones_like(one["input_ids"])).bool()
            found = model(**one).logits
            torch.testing.assert_close(found[real], wanted[real], atol=5e-2 if flash else 1e-4, rtol=0)
        if not flash:
            assert torch.equal(model.generate(**inputs[2], max_new_tokens=4, do_sample=False), tokens)


def test_the_switch_is_read_at_every_call():
    model = make_variator("llama", CONFIGS["ffn+kv"], num_hidden_layers=1)
    (ids,) = prompts(20)
    with torch.inference_mode():
        assert model(ids, output_attentions=False).attentions is None
        model.base.set_attn_implementation("eager")
        assert model(ids, output_attentions=True).attentions[0] is not None
