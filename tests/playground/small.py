"""A tiny model with a byte tokenizer and two plugins, and tiny PDFs, for the playground's tests."""

from __future__ import annotations

import contextlib
import threading

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


@contextlib.contextmanager
def holding_back(playground: Playground):
    """The first layer waits. Yields events (it began, let it go), and the widths of passes that leave the second."""
    began, go, passed = threading.Event(), threading.Event(), []

    def first(*_) -> None:
        began.set()
        go.wait(60)

    def second(_, args, *outputs) -> None:
        passed.append(args[0].shape[1])

    layers = playground.model.base.model.layers
    handles = [layers[0].register_forward_hook(first), layers[1].register_forward_hook(second)]
    try:
        yield began, go, passed
    finally:
        go.set()
        for handle in handles:
            handle.remove()


IMAGE = "q 100 0 0 100 20 20 cm BI /W 1 /H 1 /BPC 8 /CS /G ID A EI Q"
"""A grey pixel, as the content of a page."""


def line(text: str) -> str:
    """A line of text, as the content of a page."""
    return f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET"


def pdf(*pages: str) -> bytes:
    """Pages with such contents, by hand from the PDF reference."""
    places = range(4, 4 + 2 * len(pages), 2)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(b"%d 0 R" % n for n in places), len(pages)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, content in zip(places, pages, strict=True):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % (number + 1)
        )
        objects.append(b"<< /Length %d >> stream\n%s\nendstream" % (len(content), content.encode()))
    out, starts = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        starts.append(len(out))
        out += b"%d 0 obj %s endobj\n" % (number, body)
    table = b"0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % start for start in starts)
    size = len(objects) + 1
    end = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (size, len(out))
    return out + b"xref\n0 %d\n" % size + table + end
