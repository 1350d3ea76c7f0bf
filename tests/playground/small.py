"""A tiny model with a byte tokenizer and two plugins, for the playground's tests."""

from __future__ import annotations

from conftest import make_decoder, randomise

from llm_variator import VariatorConfig, VariatorModel
from llm_variator.playground.session import Playground
from llm_variator.sources.models import byte_tokenizer

TEXT = "The ferry crossed the river Ell twice a day. The bridge was built in 1871 by Tomas Vell, whom Corbin Hask told."
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
KEEP = dict(
    sites=("kv",), compressor={"kv": "select"}, k_per_head=((4, 2), (2, 8), (1, 4)), block=8, dense_head=2,
    dense_tail=6,
)  # fmt: skip


def make_playground(new_tokens: int = 12, *, template: bool = False) -> Playground:
    """Random weights; texts mean nothing."""
    base = make_decoder("llama", vocab_size=259)
    model = VariatorModel(base).eval()
    model.add_plugin("keep", VariatorConfig(**KEEP))
    model.add_plugin("ffn", VariatorConfig(k=3, sites=("ffn",), r=4, dense_head=2, dense_tail=5))
    for name in model.plugins:
        randomise(model.plugin(name))
    tokenizer = byte_tokenizer()
    if template:
        tokenizer.chat_template = TEMPLATE
    return Playground(model, tokenizer, new_tokens)
