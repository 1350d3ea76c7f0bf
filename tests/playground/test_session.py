"""Documents, questions and figures without a browser: against `generate`, `--compare` and the cache."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import threading

import pytest
import torch
from small import TEXT, make_playground

from llm_variator import CompressedContext, VariatorError
from llm_variator.engine.files import write_atomically
from llm_variator.measures.compare import compare
from llm_variator.measures.operations import Stack, prefill
from llm_variator.playground import documents, render
from llm_variator.playground.export import export
from llm_variator.playground.panels import parted
from llm_variator.playground.view import View, pieces


def ask(playground, document, question="Who?", plugins=("keep", "ffn")):
    return list(playground.ask(document, question, plugins))


# Answers.


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_those_of_generate_on_the_same_context(chat):
    playground = make_playground(template=True)
    model, tokenizer = playground.model, playground.tokenizer
    document = playground.open(TEXT, chat=chat)
    steps = ask(playground, document)
    said = [{"role": "user", "content": "Who?"}] if chat else "\n\nQuestion: Who?\nAnswer:"
    what = [{"role": "user", "content": TEXT}] if chat else TEXT
    dense = None
    for name, panel in zip((None, "keep", "ffn"), steps[-1], strict=True):
        with model.use_plugin(name):
            context = model.compress(what, tokenizer=tokenizer)
            output = model.generate(said, context=context, max_new_tokens=12, do_sample=False, pad_token_id=0)
        tokens = output[0, -12:].tolist()
        dense = tokens if dense is None else dense
        assert panel.same + panel.parted == tokenizer.decode(tokens, skip_special_tokens=True)
        assert panel.same_tokens == next((i for i in range(12) if tokens[i] != dense[i]), 12)
        assert panel.kv_bytes == context.report().bytes
        costs = [prefill(Stack.of(model.config), context.tokens, c).total for c in
                 ((None,) if name is None else (model.plugins[name], None))]  # fmt: skip
        assert panel.operations == costs[0] / costs[-1]
        assert panel.state == ""
    assert len(steps) > 3 * 12, "every token is shown when it comes"


def test_a_document_is_read_once():
    playground = make_playground()
    document = playground.open(TEXT, chat=False)
    ask(playground, document)
    before = dict(document.contexts)
    ask(playground, document, "Another?")
    assert document.contexts == before


def test_where_texts_part():
    tokenizer = make_playground().tokenizer
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    assert parted(tokenizer, ids("abcd"), ids("abXd")) == ("ab", "cd", 2)
    assert parted(tokenizer, ids("ab"), ids("ab")) == ("ab", "", 2)
    assert parted(tokenizer, ids("ab"), None) == ("ab", "", None)
    same, rest, _ = parted(tokenizer, ids("aé"), ids("aè"))  # the second letters begin with the same byte
    assert same + rest == "aé"


def test_users_run_one_after_the_other_and_do_not_mix():
    playground = make_playground()
    alone = [ask(playground, playground.open(text, chat=False))[-1] for text in (TEXT, TEXT[::-1])]
    found: dict[int, list] = {}

    def user(place: int, text: str) -> None:
        found[place] = ask(playground, playground.open(text, chat=False))[-1]

    threads = [threading.Thread(target=user, args=each) for each in enumerate((TEXT, TEXT[::-1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in (0, 1):
        texts = [(p.same, p.parted, p.kv_bytes) for p in found[place]]
        assert texts == [(p.same, p.parted, p.kv_bytes) for p in alone[place]]


def test_who_stops_listening_stops_the_answer():
    playground = make_playground(200)
    running = playground.ask(playground.open(TEXT, chat=False), "Who?", ())
    for panels in running:
        if panels[0].state == "writes":
            break
    running.close()
    with playground._running:  # comes free at once, not after 200 tokens' panels
        pass
    assert ask(playground, playground.open(TEXT, chat=False), plugins=())[-1][0].same


# Sentences in place of tracebacks.


def test_what_cannot_be_asked_gets_a_sentence():
    playground = make_playground()
    with pytest.raises(VariatorError, match="document is empty"):
        playground.open("  \n", chat=False)
    with pytest.raises(VariatorError, match="no chat template"):
        playground.open(TEXT, chat=True)
    with pytest.raises(
        VariatorError, match=r"document has 600 tokens; this model reads 512, which leaves 436"
    ):
        playground.open("a" * 600, chat=False)
    document = playground.open(TEXT, chat=False)
    with pytest.raises(VariatorError, match="question is empty"):
        ask(playground, document, " ")
    with pytest.raises(VariatorError, match="shorten the question"):
        ask(playground, document, "x" * 500)


# Files.


def test_a_saved_context_is_loaded_with_its_text(tmp_path):
    for template in (False, True):
        playground = make_playground(template=template)
        document = playground.open(TEXT, chat=template)
        expected = ask(playground, document)[-1]
        file = playground.save(document, "keep", tmp_path)
        loaded = playground.load(file)
        assert (loaded.text, loaded.chat, [*loaded.contexts]) == (TEXT, template, ["keep"])
        texts = [(p.same, p.parted) for p in ask(playground, loaded)[-1]]
        assert texts == [(p.same, p.parted) for p in expected]


def test_a_file_that_is_none_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no context")
    with pytest.raises(VariatorError, match=r"x\.safetensors"):
        make_playground().load(tmp_path / "x.safetensors")


def test_documents(tmp_path):
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf# Ell\n")
    assert documents.read_document(tmp_path / "a.md") == "# Ell\n"
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.pdf").write_bytes(b"%PDF-1.4 broken")
    (tmp_path / "d.py").write_text("raise SystemExit")
    (tmp_path / "e.txt").write_bytes(b"a" * (documents.MOST_BYTES + 1))
    for name, said in {
        "b.txt": "not UTF-8",
        "d.py": "Markdown or PDF",
        "e.txt": "a part of it",
        "f.txt": "read",
    }.items():
        with pytest.raises(VariatorError, match=said):
            documents.read_document(tmp_path / name)
    pytest.importorskip("pypdf", reason="PDFs are read by pypdf, the extra [playground]")
    with pytest.raises(VariatorError, match="no readable PDF"):
        documents.read_document(tmp_path / "c.pdf")
    (tmp_path / "g.pdf").write_bytes(pdf("The river Ell"))
    assert documents.read_document(tmp_path / "g.pdf") == "The river Ell"
    (tmp_path / "h.pdf").write_bytes(pdf(""))
    with pytest.raises(VariatorError, match="pictures and no text"):
        documents.read_document(tmp_path / "h.pdf")


def pdf(text: str) -> bytes:
    """One page with one line, by hand from the PDF reference."""
    stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >> stream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj %s endobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + end


# The picture.


def unpacked(data: dict) -> torch.Tensor:
    """(tokens, layers, heads) bool."""
    bits = [bool(byte >> (7 - i) & 1) for byte in base64.b64decode(data["held"]) for i in range(8)]
    size = data["tokens"] * data["layers"] * data["heads"]
    return torch.tensor(bits[:size]).view(data["tokens"], data["layers"], data["heads"])


def test_the_picture_shows_what_the_cache_holds():
    playground = make_playground()
    document = playground.open(TEXT, chat=False)
    context = playground.read(document, "keep")
    data = View.of(context).data()
    for layer, heads in enumerate(context.kept()):
        for head, columns in enumerate(heads):
            assert unpacked(data)[:, layer, head].nonzero()[:, 0].tolist() == columns.tolist()
    counts = [one.entries * one.heads for layer in context.report().layers for one in layer.classes]
    assert int(unpacked(data).sum()) == sum(counts), "as many entries as the cache reports"
    assert data["share"] == sum(counts) / (len(TEXT) * 6)


def test_ffn_groups_are_those_of_the_plan():
    """By hand: n tokens, head 2, tail at least 5, k=3."""
    playground = make_playground()
    view = View.of(playground.read(playground.open(TEXT, chat=False), "ffn"))
    (ffn,) = view.ffn
    assert (ffn.k, ffn.head, ffn.groups, ffn.layers) == (3, 2, (len(TEXT) - 7) // 3, (0, 1, 2))
    assert view.share == 1.0


def test_pieces_make_the_text():
    tokenizer = make_playground().tokenizer
    text = "a é 日本 \U0001f600!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text


# The export.


def test_the_export_says_what_compare_says(tmp_path):
    playground = make_playground()
    ids = torch.tensor([playground.tokenizer(TEXT)["input_ids"]])
    options = dict(max_new_tokens=8, repetitions=1)
    rows = export(
        tmp_path / "page.html", playground.model, playground.tokenizer, ids, name="m", command="c", **options
    )
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    again = compare(playground.model, playground.tokenizer, ids, **options)
    for row, other in zip(rows, again, strict=True):
        fixed = ("plugin", "kv_bytes", "kv_ratio", "cross_entropy", "same_tokens", "text")
        assert [getattr(row, name) for name in fixed] == [getattr(other, name) for name in fixed]
        own = page[page.index(f'data-plugin="{row.plugin}"') :].partition("</article>")[0]
        assert f'data-bytes="{row.kv_bytes}"' in own
        assert f"{row.kv_ratio:.3f} of dense" in own
        assert f"{row.cross_entropy:.3f} nats/token" in own
        assert f"{row.same_tokens} tokens" in own
        assert f"{row.first_token_seconds * 1e3:.0f} ms" in own
    data = json.loads(re.search(r'id="views">(.*?)</script>', page)[1])
    assert "".join(data["pieces"]) == TEXT
    assert [view["plugin"] for view in data["views"]] == ["none", "keep", "ffn"]


def test_the_export_needs_nothing_else_and_prints_no_markup_of_the_document(tmp_path):
    playground = make_playground()
    evil = '</script><img src=x onerror="alert(1)"> ' + TEXT
    document = playground.open(evil, chat=False)
    panels = [dataclasses.replace(panel, same=evil) for panel in ask(playground, document)[-1]]
    text, views = playground.views(document)
    page = render.whole(text, views, panels, model=evil, command=evil)
    write_atomically(tmp_path / "page.html", page)
    assert "<img" not in page
    assert page.count("<script") == 2
    assert not re.search(r"(?:src|href|@import|url\()\s*=?\s*[\"']?(?:https?:)?//", page)


def test_contexts_of_a_document_belong_to_its_model():
    one, other = make_playground(), make_playground()
    context = one.read(one.open(TEXT, chat=False), "keep")
    assert isinstance(context, CompressedContext)
    with pytest.raises(VariatorError, match="another VariatorModel"):
        other.model.generate("Who?", context=context, max_new_tokens=1)
