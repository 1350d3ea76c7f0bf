"""Documents, questions and figures without a browser: against `generate`, `--compare` and the cache."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import re
import threading
import time

import pytest
import torch
from small import IMAGE, TEXT, holding_back, line, make_playground, pdf

from llm_variator import CompressedContext, VariatorError
from llm_variator.engine.files import write_atomically
from llm_variator.generate import main as run_generate
from llm_variator.measures.compare import compare
from llm_variator.measures.operations import Stack, prefill
from llm_variator.playground import documents, render
from llm_variator.playground.__main__ import main as run_playground
from llm_variator.playground.export import export
from llm_variator.playground.panels import operations, parted
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


def test_an_answer_is_shown_while_it_grows():
    playground = make_playground()
    playground.model.base.model.layers[0].register_forward_hook(lambda *_: time.sleep(0.05))
    steps = ask(playground, playground.open(TEXT, chat=False), plugins=("keep",))
    for place in (0, 1):
        assert len({panels[place].same + panels[place].parted for panels in steps}) > 3


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


@pytest.mark.parametrize("plugin", [None, "keep", "ffn"])
def test_who_stops_listening_stops_the_reading(plugin):
    playground = make_playground()
    document = playground.open(TEXT, chat=False)
    with holding_back(playground) as (began, go, passed):
        reading = playground.reading(document, plugin)
        next(reading)  # comes although the model is at work
        assert began.wait(60)
        reading.close()
        go.set()
        with playground._running:  # comes free before the next layer
            assert passed == []
    assert document.contexts == {}
    again = ask(playground, document)[-1]
    other = make_playground()
    assert [(p.same, p.parted, p.kv_bytes) for p in again] == [
        (p.same, p.parted, p.kv_bytes) for p in ask(other, other.open(TEXT, chat=False))[-1]
    ]


def test_who_stops_asking_stops_the_reading():
    playground = make_playground()
    with holding_back(playground) as (began, go, passed):
        asking = playground.ask(playground.open(TEXT, chat=False), "Who?", ("keep",))
        next(asking)
        next(asking)
        assert began.wait(60)
        asking.close()
        go.set()
        with playground._running:
            assert passed == []


def test_who_leaves_before_their_turn_is_not_served():
    playground = make_playground()
    document = playground.open(TEXT, chat=False)
    with holding_back(playground) as (_, go, passed):
        with playground._running:
            reading = playground.reading(document, None)
            next(reading)
            reading.close()
        go.set()
        playground.read(document, "keep")
        assert len(passed) == 1
    assert [*document.contexts] == ["keep"]


def test_an_error_of_the_model_reaches_who_waits(monkeypatch):
    playground = make_playground()
    document = playground.open(TEXT, chat=False)
    with monkeypatch.context() as patch:
        patch.setattr(playground.model, "compress", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            playground.read(document, "keep")
    assert playground.read(document, "keep").tokens == len(TEXT)


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


def test_what_stands_around_document_and_question_needs_room_too():
    """512 tokens: the answer's 12, for a question 64; the rest is the document's."""
    playground = make_playground(template=True)
    around = len("<user></>")
    assert playground.open("a" * (436 - around), chat=True)
    with pytest.raises(VariatorError, match="document has 437 tokens"):
        playground.open("a" * (437 - around), chat=True)
    for chat, around in ((False, len("\n\nQuestion: \nAnswer:")), (True, len("<user></><assistant>"))):
        document = playground.open(TEXT, chat=chat)
        room = 512 - 12 - playground.read(document, None).tokens - around
        assert ask(playground, document, "x" * room, ())[-1][0].same
        with pytest.raises(VariatorError, match="need 513 tokens, the model reads 512"):
            ask(playground, document, "x" * (room + 1), ())


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


def test_a_saved_conversation_is_refused(tmp_path):
    playground = make_playground(template=True)
    model, ask = playground.model, [{"role": "user", "content": "Who?"}]
    context = model.compress([{"role": "user", "content": TEXT}], tokenizer=playground.tokenizer)
    _, context = model.generate(ask, context=context, return_context=True, max_new_tokens=3, pad_token_id=0)
    context.save(tmp_path / "talk.safetensors")
    with pytest.raises(VariatorError, match=r"talk\.safetensors holds a conversation"):
        playground.load(tmp_path / "talk.safetensors")


def test_a_saved_context_of_more_than_its_text_is_refused(tmp_path):
    """What stands beside it would read less than it did."""
    playground = make_playground()
    ids = playground.tokenizer(TEXT)["input_ids"]
    special = playground.tokenizer.all_special_ids[0]
    playground.model.compress([*ids[:50], special, *ids[50:]]).save(tmp_path / "more.safetensors")
    with pytest.raises(VariatorError, match=r"more\.safetensors was not read from a text alone"):
        playground.load(tmp_path / "more.safetensors")


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
    (tmp_path / "g.pdf").write_bytes(pdf(line("The river Ell")))
    assert documents.read_document(tmp_path / "g.pdf") == "The river Ell"
    (tmp_path / "h.pdf").write_bytes(pdf(IMAGE))
    with pytest.raises(VariatorError, match="pictures and no text"):
        documents.read_document(tmp_path / "h.pdf")


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
    assert any(0 < row.same_tokens < 8 for row in rows), "one that parts on the way"
    for row, other in zip(rows, again, strict=True):
        fixed = ("plugin", "kv_bytes", "kv_ratio", "cross_entropy", "same_tokens", "text")
        assert [getattr(row, name) for name in fixed] == [getattr(other, name) for name in fixed]
        own = page[page.index(f'data-plugin="{row.plugin}"') :].partition("</article>")[0]
        assert f'data-bytes="{row.kv_bytes}"' in own
        assert f"{row.kv_ratio:.3f} of dense" in own
        assert f"{row.cross_entropy:.3f} nats/token" in own
        assert f'data-figure="same">{row.same_tokens} token' in own
        assert f"{row.first_token_seconds * 1e3:.0f} ms, {row.first_token_ratio:.2f} of dense" in own
        assert f"{row.tokens_per_second:.1f} tokens/s" in own
        share = operations(playground.model, None if row.plugin == "none" else row.plugin, len(TEXT))
        assert f'data-figure="operations">{share:.3f} of dense' in own
        said = re.search(r'<p class="text">(.*?)</p>', own, re.DOTALL)[1]
        assert html.unescape(re.sub("<.*?>", "", said)) == row.text
        same, rest, _ = parted(playground.tokenizer, row.tokens, rows[0].tokens)
        assert [html.unescape(part) for part in re.split("<mark.*?>|</mark>", said)[:2]] == [same, rest][
            : 1 + bool(rest)
        ]
    data = json.loads(re.search(r'id="views">(.*?)</script>', page)[1])
    assert "".join(data["pieces"]) == TEXT
    assert [view["plugin"] for view in data["views"]] == ["none", "keep", "ffn"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--prompt", "a", "--chat"],
            "the live page does without --prompt, --chat: leave it out, or add --export",
        ),
        (["--repetitions", "3"], "the live page does without --repetitions"),
        (
            ["--export", "x.html", "--prompt", "a", "--port", "80"],
            "--export does without --port: leave it out$",
        ),
    ],
)
def test_flags_of_the_other_mode_are_refused(words, message):
    with pytest.raises(VariatorError, match=message):
        run_playground(words)


def test_the_export_command_writes_what_the_compare_command_prints(tmp_path, capsys):
    """All but the times, which are those of each run."""
    playground = make_playground()
    playground.model.base.save_pretrained(tmp_path / "model")
    playground.tokenizer.save_pretrained(tmp_path / "model")
    given = [
        "--model",
        str(tmp_path / "model"),
        "--max-new-tokens",
        "8",
        "--repetitions",
        "1",
        "--prompt",
        TEXT,
    ]
    for name in playground.model.plugins:
        playground.model.save_pretrained(tmp_path / name, plugin_name=name)
        given += ["--plugin", str(tmp_path / name)]
    file = tmp_path / "page.html"
    run_playground([*given, "--export", str(file)])
    printed = capsys.readouterr().out
    run_generate([*given, "--compare", "--json", str(tmp_path / "rows.json")])
    compared = capsys.readouterr().out
    page = file.read_text(encoding="utf-8")
    rows = json.loads((tmp_path / "rows.json").read_text())["figures"]["rows"]
    assert [row["plugin"] for row in rows] == ["none", "keep", "ffn"]
    for row in rows:
        own = page[page.index(f'data-plugin="{row["plugin"]}"') :].partition("</article>")[0]
        assert f'data-bytes="{row["kv_bytes"]}"' in own
        assert f"{row['kv_ratio']:.3f} of dense" in own
        assert f"{row['cross_entropy']:.3f} nats/token" in own
        assert f'data-figure="same">{row["same_tokens"]} token' in own
        said = re.search(r'<p class="text">(.*?)</p>', own, re.DOTALL)[1]
        assert html.unescape(re.sub("<.*?>", "", said)) == row["text"]
        printed_rows = [
            re.search(rf"^.*\b{row['plugin']}\b.*\d.*$", text, re.M)[0].split()
            for text in (printed, compared)
        ]
        assert printed_rows[0][-4:] == printed_rows[1][-4:], "both print one table"


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
