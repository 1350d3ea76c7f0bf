"""The live page in a real browser: load, read, ask, stream, stop, save, errors, two users; narrow, wide, light, dark.

`SHOTS=folder` keeps the pictures.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import urllib.request
from pathlib import Path

import pytest
from small import IMAGE, TEXT, holding_back, line, make_playground, pdf

gradio = pytest.importorskip("gradio", reason="the live page is Gradio's: the extra [playground]")
sync_api = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")

from browser import NAMES, find_browser  # noqa: E402

from llm_variator.measures.operations import Stack, prefill  # noqa: E402
from llm_variator.playground import page as live  # noqa: E402
from llm_variator.playground.__main__ import main  # noqa: E402

MOST = 60_000  # ms: machines are slow
expect = sync_api.expect
expect.set_options(timeout=MOST)


@pytest.fixture(scope="module")
def playground():
    return make_playground()


@contextlib.contextmanager
def served(playground):
    blocks = live.build(playground, "a tiny model")
    yield live.launch(blocks, host="127.0.0.1", port=None, upload_megabytes=1)
    blocks.close()


@pytest.fixture(scope="module")
def folder():
    with live.temporary_folder() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def address(playground, folder):
    with served(playground) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser to open the page with: set CHROME, or install one of {', '.join(NAMES)}")
    with sync_api.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class User:
    """One window on the page; notes whom it asks, and what goes wrong."""

    def __init__(self, browser, address: str, **options) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(MOST)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)
        expect(self.page.locator("#ask")).to_be_visible()

    def write(self, text: str, question: str | None = None) -> None:
        self.page.locator("#text textarea").fill(text)
        if question is not None:
            self.page.locator("#question textarea, #question input").first.fill(question)

    def ask(self, text: str = TEXT, question: str = "Who?") -> None:
        self.write(text, question)
        self.page.locator("#ask").click()
        expect(self.page.locator("#said")).to_contain_text("answered")

    def note_lengths(self) -> None:
        """From now on: `lengths` in the page holds each length that an answer has had."""
        self.page.evaluate(
            "window.lengths = new Set(); new MutationObserver(() => document.querySelectorAll('#answers .text')"
            ".forEach(t => lengths.add(t.textContent.length))).observe(document.body, {subtree: true, childList: true})"
        )

    def says(self) -> str:
        alert = self.page.locator("#said [role=alert]")
        expect(alert).to_be_visible()
        return alert.inner_text()

    def drop(self, name: str, content: bytes) -> None:
        """As a file dragged onto the box for documents."""
        dragged = self.page.evaluate_handle(
            "([name, bytes]) => { const all = new DataTransfer();"
            "all.items.add(new File([new Uint8Array(bytes)], name)); return all }",
            [name, [*content]],
        )
        box = self.page.locator("#file button:has(input[type=file])")
        for event in ("dragenter", "dragover", "drop"):
            box.dispatch_event(event, {"dataTransfer": dragged})

    @property
    def answers(self) -> dict[str, str]:
        return {
            each.get_attribute("data-plugin"): each.locator(".text").inner_text()
            for each in self.page.locator("#answers .answer").all()
        }

    @property
    def view(self):
        return self.page.frame_locator("iframe.view")


@pytest.fixture
def user(browser, address):
    user = User(browser, address, viewport={"width": 1280, "height": 900})
    yield user
    assert user.complaints == []
    user.context.close()


def last(playground, text: str = TEXT, question: str = "Who?", plugins=("keep", "ffn")):
    return list(playground.ask(playground.open(text, chat=False), question, plugins))[-1]


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_answers_and_figures_are_the_sessions(user, playground):
    user.ask()
    for panel in last(playground):
        own = user.page.locator(f'.answer[data-plugin="{panel.plugin}"]')
        assert squeezed(own.locator(".text").inner_text()) == squeezed(panel.same + panel.parted)
        assert own.locator("[data-figure=kv]").get_attribute("data-bytes") == str(panel.kv_bytes)
        assert own.locator("[data-figure=operations]").inner_text() == f"{panel.operations:.3f} of dense"
        assert (
            own.locator("[data-figure=same]").inner_text()
            == f"{panel.same_tokens} token{'s' * (panel.same_tokens != 1)}"
        )
        assert re.fullmatch(r"[\d.]+ s", own.locator("[data-figure=read]").inner_text())


def test_a_chat_is_what_generate_says(browser, folder):
    """Answers and figures against the model itself; the page of a model with a chat template begins as a chat."""
    playground = make_playground(40, template=True)
    playground.model.base.model.layers[0].register_forward_hook(lambda *_: time.sleep(0.05))
    model, tokenizer = playground.model, playground.tokenizer
    with served(playground) as address:
        user = User(browser, address, viewport={"width": 1280, "height": 900})
        expect(user.page.locator("#chat input")).to_be_checked()
        user.write(TEXT, "Who?")
        user.note_lengths()
        user.page.locator("#read").click()
        expect(user.page.locator("#said")).to_contain_text(f"read: {len('<user></>' + TEXT)} tokens")
        user.page.locator("#ask").click()
        expect(user.page.locator("#said")).to_contain_text("answered")
        assert user.page.evaluate("lengths.size") > 3, "answers grow"
        boxes = [user.page.locator(f'.answer[data-plugin="{name}"]') for name in ("none", "keep", "ffn")]
        places = [box.bounding_box() for box in boxes]
        assert len({place["y"] for place in places}) == 1, "side by side"
        assert places[0]["x"] < places[1]["x"] < places[2]["x"]
        dense = None
        for name, box in zip((None, "keep", "ffn"), boxes, strict=True):
            with model.use_plugin(name):
                context = model.compress([{"role": "user", "content": TEXT}], tokenizer=tokenizer)
                output = model.generate(
                    [{"role": "user", "content": "Who?"}], context=context, max_new_tokens=40, do_sample=False,
                    pad_token_id=0,
                )  # fmt: skip
            tokens = output[0, -40:].tolist()
            dense = tokens if dense is None else dense
            same = next((place for place in range(40) if tokens[place] != dense[place]), 40)
            report, stack = context.report(), Stack.of(model.config)
            plugin = None if name is None else model.plugins[name]
            share = prefill(stack, context.tokens, plugin).total / prefill(stack, context.tokens, None).total
            figures = {
                each.get_attribute("data-figure"): each.inner_text()
                for each in box.locator("[data-figure]").all()
            }
            assert squeezed(box.locator(".text").inner_text()) == squeezed(
                tokenizer.decode(tokens, skip_special_tokens=True)
            )
            assert box.locator("[data-figure=kv]").get_attribute("data-bytes") == str(report.bytes)
            assert figures["kv"] == (
                f"{report.bytes / 2**20:.2f} MiB, {report.bytes / report.dense_bytes:.3f} of dense"
            )
            assert figures["operations"] == f"{share:.3f} of dense"
            assert figures["same"] == f"{same} token{'s' * (same != 1)}"
            assert (box.locator("mark").count() == 0) == (same == 40)
        assert user.complaints == []
        user.context.close()


def test_nobody_else_is_asked_for_anything(user, address):
    user.ask()
    inside = ("data:", "blob:", "about:")
    assert [url for url in user.asked if not url.startswith((address, *inside))] == []


def test_answers_stream(browser, address, playground):
    playground.max_new_tokens = 40
    slow = playground.model.base.model.layers[0].register_forward_hook(lambda *_: time.sleep(0.05))
    try:
        user = User(browser, address)
        user.write(TEXT, "Stream?")
        user.note_lengths()
        user.page.locator("#ask").click()
        expect(user.page.locator("#said")).to_contain_text("answered")
        assert user.page.evaluate("lengths.size") > 3
        user.context.close()
    finally:
        playground.max_new_tokens = 12
        slow.remove()


@pytest.mark.parametrize("button", ["read", "ask"])
@pytest.mark.parametrize("leaves", [False, True])
def test_a_document_that_nobody_waits_for_is_not_read_to_its_end(
    button, leaves, browser, address, playground, monkeypatch
):
    """Whoever stops, or closes the page: the next one's turn comes although the model is inside a pass."""
    long, stops, until = TEXT * 2, [], playground._until
    monkeypatch.setattr(playground, "_until", lambda stop: stops.append(stop) or until(stop))
    one, other = User(browser, address), User(browser, address)
    one.write(long, "Who?")
    with holding_back(playground) as (began, go, passed):
        one.page.locator(f"#{button}").click()
        expect(one.page.locator("#said")).to_contain_text("dense reads the document")
        assert began.wait(60)
        if leaves:
            one.context.close()
        else:
            one.page.locator("#stop").click()
            expect(one.page.locator("#said")).to_contain_text("stopped")
            expect(one.page.locator("#answers small")).to_have_count(0)
        other.write(TEXT, "Who?")
        other.page.locator("#ask").click()
        expect(other.page.locator("#said")).to_contain_text("dense reads the document")
        assert stops[0].wait(60)
        go.set()
        expect(other.page.locator("#said")).to_contain_text("answered")
        assert passed
        assert len(long) not in passed, "no second layer read the first document"
    if not leaves:
        one.ask(long)
        one.context.close()
    other.context.close()


def test_the_picture_switches_plugins_layers_and_heads(user, playground):
    user.write(TEXT)
    user.page.locator("#read").click()
    expect(user.page.locator("#said")).to_contain_text(f"read: {len(TEXT)} tokens")
    kept = playground.read(playground.open(TEXT, chat=False), "keep").kept()
    user.view.locator("input[value=keep]").check()
    token = next(n for n in range(len(TEXT)) if n not in kept[0][0].tolist())
    count = sum(token in head.tolist() for layer in kept for head in layer)
    span = user.view.locator(f'[data-token="{token}"]')
    span.hover()
    expect(user.view.locator(".readout")).to_contain_text(f"token {token}: held by {count} of 6 heads")
    user.view.locator("#layer").select_option("0")
    user.view.locator("#head").select_option("0")
    shade = span.evaluate("s => s.style.getPropertyValue('--s')")
    assert float(shade) == 0
    shaded = user.view.locator(".document").evaluate(
        "d => [...d.children].flatMap((s, i) => Number(s.style.getPropertyValue('--s')) ? [i] : [])"
    )
    assert shaded == kept[0][0].tolist()
    user.view.locator("input[value=ffn]").check()
    expect(user.view.locator("#share")).to_contain_text("ffn: 100.0 %")
    user.view.locator('[data-token="5"]').hover()
    expect(user.view.locator(".readout")).to_contain_text("in the FFNs group 1 of 3 tokens (3 layers at k=3)")


def test_a_context_is_saved_and_loaded_by_another_user(user, browser, address, tmp_path):
    user.ask()
    before = user.answers
    user.page.locator("#save").click()
    link = user.page.locator("#download a[download], #download a").first
    expect(link).to_be_visible()
    with user.page.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "kept.safetensors")
    other = User(browser, address)
    other.page.locator("#saved input[type=file]").set_input_files(tmp_path / "kept.safetensors")
    expect(other.page.locator("#said")).to_contain_text("loaded: keep has read it")
    assert other.page.locator("#text textarea").input_value() == TEXT
    other.ask(TEXT)
    assert other.answers == before
    other.context.close()


def test_a_file_is_dropped(user, tmp_path):
    (tmp_path / "a.md").write_text("# The Ell\n\nA river.", encoding="utf-8")
    user.page.locator("#file input[type=file]").set_input_files(tmp_path / "a.md")
    expect(user.page.locator("#text textarea")).to_have_value("# The Ell\n\nA river.")
    assert [*Path(os.environ["GRADIO_TEMP_DIR"]).rglob("a.md")], "uploads lie in the temporary folder"


def test_a_pdf_is_dropped_and_read(user):
    first, second = "The ferry crossed the river Ell.", "The bridge was built in 1871."
    user.drop("ell.pdf", pdf(line(first), line(second)))
    text = f"{first}\n\n{second}"
    expect(user.page.locator("#text textarea")).to_have_value(text)
    user.page.locator("#read").click()
    expect(user.page.locator("#said")).to_contain_text(f"read: {len(text)} tokens")
    expect(user.view.locator("#share")).to_contain_text("keep: ")
    assert user.view.locator(".document").inner_text() == text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"%PDF-1.4 broken", "ell.pdf is no readable PDF"),
        (pdf(line("The Ell"))[:150], "ell.pdf is no readable PDF"),
        (pdf(IMAGE), "ell.pdf holds pictures and no text"),
        (b"", "ell.pdf is no readable PDF"),
    ],
)
def test_a_pdf_without_text_gets_a_sentence(content, sentence, user, capfd):
    user.drop("ell.pdf", content)
    expect(user.page.locator("#said [role=alert]")).to_contain_text(sentence)
    assert user.page.locator("#text textarea").input_value() == ""
    assert "Traceback" not in capfd.readouterr().err
    user.drop("ell.pdf", pdf(line("The Ell")))  # the next one is taken at once
    expect(user.page.locator("#text textarea")).to_have_value("The Ell")


def test_what_nobody_foresaw_gets_a_sentence_too(user, playground, monkeypatch, capfd):
    monkeypatch.setattr(playground.model, "compress", lambda *_, **__: [][0])
    user.write(TEXT)
    user.page.locator("#read").click()
    expect(user.page.locator("#said [role=alert]")).to_contain_text("that failed (IndexError)")
    assert "Traceback" in capfd.readouterr().err
    monkeypatch.undo()
    user.ask()


def test_a_file_that_is_too_large_is_refused(user, tmp_path):
    """More than the megabyte that this server takes."""
    (tmp_path / "large.txt").write_bytes(b"a" * 2_000_000)
    user.page.locator("#file input[type=file]").set_input_files(tmp_path / "large.txt")
    expect(user.page.get_by_text(re.compile("maximum|exceed|too large", re.IGNORECASE)).first).to_be_visible()
    assert not [*Path(os.environ["GRADIO_TEMP_DIR"]).rglob("large.txt")]
    assert user.page.locator("#text textarea").input_value() == ""


def test_what_goes_wrong_is_a_sentence(user, tmp_path):
    user.write(" ", "Who?")
    user.page.locator("#ask").click()
    assert "document is empty" in user.says()
    user.write(TEXT, " ")
    user.page.locator("#ask").click()
    expect(user.page.locator("#said")).to_contain_text("question is empty")
    user.write("a" * 600)
    user.page.locator("#read").click()
    expect(user.page.locator("#said")).to_contain_text("the document has 600 tokens")
    user.write(TEXT)
    user.page.locator("#chat input").check()
    user.page.locator("#read").click()
    expect(user.page.locator("#said")).to_contain_text("no chat template")
    user.page.locator("#chat input").uncheck()
    (tmp_path / "x.safetensors").write_bytes(b"none")
    user.page.locator("#saved input[type=file]").set_input_files(tmp_path / "x.safetensors")
    expect(user.page.locator("#said")).to_contain_text("x.safetensors")
    (tmp_path / "run.py").write_text("raise SystemExit", encoding="utf-8")
    user.page.locator("#file input[type=file]").set_input_files(tmp_path / "run.py")
    expect(user.page.locator("#said")).to_contain_text("Markdown or PDF")
    user.ask()


def test_two_users_wait_their_turn_and_keep_their_answers(browser, address, playground):
    texts = TEXT, TEXT[::-1]
    users = [User(browser, address) for _ in texts]
    for user, text in zip(users, texts, strict=True):
        user.write(text, "Who?")
    for user in users:
        user.page.locator("#ask").click()
    for user, text in zip(users, texts, strict=True):
        expect(user.page.locator("#said")).to_contain_text("answered")
        wanted = {panel.plugin: squeezed(panel.same + panel.parted) for panel in last(playground, text)}
        assert {name: squeezed(said) for name, said in user.answers.items()} == wanted
        user.context.close()


def test_the_command_says_where_it_serves(playground, tmp_path, monkeypatch, capsys):
    playground.model.base.save_pretrained(tmp_path / "model")
    playground.tokenizer.save_pretrained(tmp_path / "model")
    pages = []

    def visit(blocks) -> None:
        with urllib.request.urlopen(capsys.readouterr().out.split()[0]) as page:
            pages.append(page.read().decode())
        blocks.close()

    monkeypatch.setattr(gradio.Blocks, "block_thread", visit)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # put back afterwards
    main(["--model", str(tmp_path / "model")])
    assert "llm_variator playground" in pages[0]


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_looks_right(width, scheme, browser, address):
    user = User(browser, address, viewport={"width": width, "height": 2400}, color_scheme=scheme)
    user.ask()
    expect(user.view.locator(".document span").first).to_be_visible()
    assert user.page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    colour, paper = user.page.locator(".answer .text").first.evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(e.parentElement).backgroundColor]"
    )
    light = [sum(map(int, re.findall(r"\d+", each)[:3])) for each in (colour, paper)]
    assert (light[0] < light[1]) == (scheme == "light"), (colour, paper)
    assert user.view.locator("#plugins input:checked").input_value() == "keep", (
        "the dense picture is all of one shade"
    )
    inked = user.view.locator("body").evaluate(
        "b => [getComputedStyle(b).color, getComputedStyle(b).backgroundColor].map(c => c.match(/\\d+/g)[0])"
    )
    assert (int(inked[0]) < int(inked[1])) == (scheme == "light"), inked
    if os.environ.get("SHOTS"):
        user.page.wait_for_timeout(1000)  # the picture is drawn in a process of its own
        user.page.screenshot(path=Path(os.environ["SHOTS"]) / f"live-{width}-{scheme}.png", full_page=True)
    user.context.close()
