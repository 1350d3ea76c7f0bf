"""Run a tiny decoder with each kind of plugin on a device that does not exist, with `PYTHONPATH=.:tests`.

Tensors have shapes and devices and no values (torch's FakeTensorMode). An operation between devices fails here as it
would on a GPU, and so does one that asks a device for a value, for which a GPU would be waited for. Prints a line per
plugin: how many tensors our own code made of Python's numbers on the device, in a prefill with its first step and in
all later steps.
"""

from __future__ import annotations

import sys

import torch
from conftest import make_decoder
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from llm_variator import VariatorConfig, VariatorModel
from llm_variator.engine.devices import places

DEVICE = "gpu"
SELECT = dict(sites=("kv",), compressor="select", k_per_head=((4, 1), (2, 8), (4, 4)), block=8, dense_head=2)
CASES = {
    "ffn and kv": (dict(k=2, sites=("ffn", "kv"), r=4), 40, 3),
    "attention": (dict(k=2, sites=("attention",), r=4), 40, 3),
    "kv ages": (dict(k=2, sites=("kv",), dense_tail=4, decode_block=4), 40, 9),
    "select": (dict(dense_tail=3, **SELECT), 60, 3),
    "select, long tail": (dict(dense_tail=20, **SELECT), 60, 3),
    "select ages": (dict(dense_tail=8, decode_block=8, **SELECT), 60, 20),
    "select ages from one token": (dict(dense_tail=8, decode_block=8, **SELECT), 1, 30),
}
made_of_numbers = 0
_tensor = torch.tensor


def tensor(*args, device=None, **kwargs) -> Tensor:
    """`torch.tensor` without values: torch would compute with those of small tensors, on the device."""
    global made_of_numbers
    made = _tensor(*args, **kwargs)
    if not isinstance(made, FakeTensor):
        return made
    caller = sys._getframe(1).f_globals["__name__"]
    there = device is not None and torch.device(device).type != "cpu"
    made_of_numbers += there and caller.startswith("llm_variator")
    return torch.empty(made.shape, dtype=made.dtype, device=device)


def attention(query, key, value, attn_mask=None, scale=None, enable_gqa=False, **_) -> Tensor:
    """Shapes and devices of torch's, which has no kernel for this device."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(attn_mask, 0) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores @ value


def move(model: nn.Module) -> None:
    """Parameters and buffers to the device."""
    for module in model.modules():
        for own, kind in ((module._parameters, nn.Parameter), (module._buffers, lambda t: t)):
            for name, value in own.items():
                if value is not None:
                    own[name] = kind(torch.empty(value.shape, dtype=value.dtype, device=DEVICE))


def main() -> None:
    """Run all cases."""
    _setup_privateuseone_for_python_backend(DEVICE)
    torch.tensor, F.scaled_dot_product_attention = tensor, attention
    for name, (settings, prompt, steps) in CASES.items():
        model = VariatorModel(make_decoder("llama"), VariatorConfig(**settings)).to(torch.bfloat16)
        global made_of_numbers
        with FakeTensorMode(), torch.no_grad():
            move(model)
            ids = torch.zeros(2, prompt, dtype=torch.long, device=DEVICE)
            made_of_numbers = 0
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            for step in range(steps + 1):
                if step == 1:
                    first, made_of_numbers = made_of_numbers, 0
                model(ids[:, :1], past_key_values=cache, use_cache=True)
        print(f"{name}: {first} {made_of_numbers}", flush=True)
        places.cache_clear()  # tensors of this mode


if __name__ == "__main__":
    main()
