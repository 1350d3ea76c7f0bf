"""Conversations that a model writes, on a tiny one: their form, their seed, and a run that was stopped."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_decoder
from tiny_tasks import write_tasks

from llm_variator import VariatorError
from llm_variator.sources.corpora import read_windows
from llm_variator.sources.models import byte_tokenizer, load_model, load_tokenizer
from llm_variator.sources.tasks import load_examples
from llm_variator.train import dialogue

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    make_decoder("llama", vocab_size=259).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(model, file, *more):
    words = [
        "--model",
        model,
        "--output",
        file,
        "--count",
        5,
        "--tokens",
        90,
        "--turn-tokens",
        30,
        "--batch-size",
        2,
    ]
    dialogue.main([*map(str, words), *map(str, more)])
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_turns_are_framed_as_the_template_says(model, tmp_path):
    tokenizer = load_tokenizer(model)
    frame = dialogue.frame_of(tokenizer)
    assert [tokenizer.decode(part) for part in (frame.opening, frame.answering, frame.asking)] == [
        "<user>",
        "</s><assistant>",
        "</s><user>",
    ]
    settings = dialogue.Settings(model=model, output=tmp_path / "x.jsonl", tokens=90, turn_tokens=30)
    torch.manual_seed(0)
    rows = dialogue.write(make_decoder("llama", vocab_size=259), tokenizer, frame, 3, settings)
    assert [len(row) for row in rows] == [90] * 3
    for row in rows:  # frames take turns, and no turn is longer than it may be or holds what ends one
        assert row[: len(frame.opening)] == frame.opening
        rest, between = row[len(frame.opening) :], [frame.answering, frame.asking]
        while len(rest) > 30 + 20:
            end = rest.index(frame.answering[0])
            assert 0 < end <= 30
            assert rest[end : end + len(between[0])] == between[0]
            rest, between = rest[end + len(between[0]) :], between[::-1]


def test_the_same_seed_writes_the_same_and_a_stopped_run_goes_on(model, tmp_path, monkeypatch):
    whole = run(model, tmp_path / "whole.jsonl")
    assert len(whole) == len(set(whole)) == 5
    assert run(model, tmp_path / "other.jsonl", "--seed", 9) != whole
    write, calls = dialogue.write, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(dialogue, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut.jsonl")
    assert not (tmp_path / "cut.jsonl").exists()
    with pytest.raises(VariatorError, match=r"cut\.part is of a run with other settings"):
        run(model, tmp_path / "cut.jsonl", "--seed", 1)
    assert run(model, tmp_path / "cut.jsonl") == whole
    assert len(calls) == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cut.jsonl", "other.jsonl", "whole.jsonl"]
    # what is written is text to train on, special tokens and all
    assert read_windows(str(tmp_path / "whole.jsonl"), load_tokenizer(model), seq_length=60).shape[1] == 60


def test_going_on_with_texts_and_questions(model, tmp_path):
    """The likeliest tokens after the end of a text, and after a question without its answer."""
    data = write_tasks(tmp_path / "data", "squad", train=60)
    (tmp_path / "a.txt").write_text("abcdefgh " * 200)
    sources = ["--after", "task:squad", tmp_path / "a.txt", "--temperature", 0, "--data-dir", data]
    texts = run(model, tmp_path / "out.jsonl", *sources)
    tokenizer = load_tokenizer(model)
    base = load_model(model)
    given = openings(tokenizer, tmp_path, data)
    assert len(texts) == len(given) == 5
    assert {len(row) for row in given} == {60}
    kinds = [tokenizer.decode(row).endswith("\nAnswer:") for row in given]
    assert sum(kinds) in (2, 3)
    examples = load_examples("squad", "train", data_dir=data)
    asked = [
        tokenizer.decode(row)[-20:] for row, is_question in zip(given, kinds, strict=True) if is_question
    ]
    assert len(set(asked)) == len(asked)
    assert all(any(one.decoder_prompt.endswith(end) for one in examples) for end in asked)
    for row, written in zip(given, texts, strict=True):
        ids = torch.tensor([row])
        for _ in range(30):
            with torch.no_grad():
                likeliest = base(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, likeliest), dim=1)
        assert written == tokenizer.decode(ids[0])


def openings(tokenizer, folder, data):
    settings = dialogue.Settings(
        model="m",
        output=folder / "x.jsonl",
        after=("task:squad", str(folder / "a.txt")),
        data_dir=data,
        count=5,
        tokens=90,
        turn_tokens=30,
    )
    return dialogue.openings(tokenizer, settings)


def test_too_little_to_go_on_with(model, tmp_path):
    data = write_tasks(tmp_path / "data", "squad", train=4)
    (tmp_path / "a.txt").write_text("abcdefgh " * 10)
    with pytest.raises(
        VariatorError, match=r"task:squad has examples for \d prompts of 60 tokens, 5 are wanted"
    ):
        run(model, tmp_path / "x.jsonl", "--after", "task:squad", "--data-dir", data)
    with pytest.raises(VariatorError, match=r"a\.txt has 1 texts of 60 tokens, 5 are wanted"):
        run(model, tmp_path / "x.jsonl", "--after", tmp_path / "a.txt")
    with pytest.raises(VariatorError, match="--turn-tokens 90 leaves nothing to go on with"):
        run(model, tmp_path / "x.jsonl", "--after", "task:squad", "--turn-tokens", 90)


def test_lines_that_hold_what_breaks_lines_elsewhere(tmp_path):
    lines = [json.dumps({"text": f"one{mark}two"}, ensure_ascii=False) for mark in "\u2028\u0085\x1e"]
    (tmp_path / "x.part").write_text("\n".join(["record", *lines]) + "\n", encoding="utf-8")
    assert dialogue._done(tmp_path / "x.part", "record") == lines


def test_wrong_input(model, tmp_path):
    (tmp_path / "there.jsonl").write_text("{}")
    with pytest.raises(VariatorError, match="is there already"):
        run(model, tmp_path / "there.jsonl")
    with pytest.raises(VariatorError, match=r"name it FILE\.jsonl"):
        run(model, tmp_path / "x.txt")
    with pytest.raises(VariatorError, match="no chat template"):
        dialogue.frame_of(byte_tokenizer())
    endless = byte_tokenizer()
    endless.chat_template = TEMPLATE.replace("</s>", "\n")
    with pytest.raises(VariatorError, match="does not end turns with a special token"):
        dialogue.frame_of(endless)
    shouting = byte_tokenizer()
    shouting.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | lower }}</s>{% endfor %}"
    )
    with pytest.raises(VariatorError, match="does not write every turn as it is"):
        dialogue.frame_of(shouting)
