"""`python -m llm_variator.evaluate frontier` on a tiny decoder: what is measured, kept, exchanged and shown."""

from __future__ import annotations

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import randomise
from tiny import model_folder
from tiny_tasks import LINES, write_tasks

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.groups import split
from llm_variator.evaluate import frontier, questions
from llm_variator.evaluate.__main__ import main, read
from llm_variator.evaluate.rows import pair_rows
from llm_variator.measures.conditions import WithPlugin
from llm_variator.measures.metrics import continuation_cross_entropy
from llm_variator.measures.operations import Stack, prefill
from llm_variator.measures.quality import Answers, Continuation
from llm_variator.sources.corpora import EMBEDDED, read_documents, read_windows, spread
from llm_variator.sources.models import load_model, load_tokenizer
from llm_variator.sources.tasks import load_examples

CONTEXT, CONTINUATION, WINDOWS = 30, 6, 3
CONFIG = VariatorConfig(k=3, sites=("ffn", "kv"), r=4, dense_head=2, dense_tail=5)


@pytest.fixture(scope="module")
def model() -> VariatorModel:
    model = VariatorModel(load_model(model_folder()), CONFIG)
    randomise(model.plugin(), std=0.1)
    return model


@pytest.fixture(scope="module")
def plugin(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("plugin") / "k3"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data"), "squad")


def text_file(work) -> str:
    """A text long enough for some windows, short enough to be read often."""
    file = work / "text.txt"
    file.write_text(read_documents(EMBEDDED)[0][:2000], encoding="utf-8")
    return str(file)


def words(work, *more) -> list[str]:
    sizes = ["--context", CONTEXT, "--continuation", CONTINUATION, "--windows", WINDOWS, "--batch-size", 2]
    sizes += ["--generate", 4, "--questions", 0, "--repetitions", 0, "--dense-head", 2, "--dense-tail", 5]
    line = ["frontier", "--model", model_folder(), "--data", text_file(work), "--work", work, *sizes, *more]
    return list(map(str, line))


def frontier_of(work, *more) -> dict:
    file = work / "result.json"
    main(words(work, "--json", file, *more))
    return json.loads(file.read_text())


def test_rows_hold_quality_and_cost_of_every_condition(model, plugin, tmp_path, capsys):
    result = frontier_of(
        tmp_path, "--plugin", f"mine={plugin}", "--untrained", "--also", "drop:3", "late-skip:1", "mean:2",
        "--repetitions", 2, "--markdown", tmp_path / "t.md", "--plot", tmp_path / "p.png",
    )  # fmt: skip
    (text,) = result["figures"]["texts"]
    rows = {row["condition"]: row for row in text["rows"]}
    expected = ["dense", "no context", "mine", "mine (untrained)", "drop:3", "late-skip:1", "mean:2"]
    assert list(rows) == expected
    assert (text["context"], text["windows"]) == (CONTEXT, WINDOWS)

    windows = read_windows(
        text_file(tmp_path), load_tokenizer(model_folder()), seq_length=CONTEXT + CONTINUATION
    )
    chosen = spread(windows, WINDOWS)
    assert rows["mine"]["cross_entropy"] == pytest.approx(
        continuation_cross_entropy(model, chosen, CONTEXT), abs=1e-5
    )
    with model.disable_plugin():
        dense = continuation_cross_entropy(model, chosen, CONTEXT)
    assert rows["mine"]["above_dense"] == pytest.approx(rows["mine"]["cross_entropy"] - dense, abs=1e-5)
    bare = VariatorModel(
        load_model(model_folder()),
        VariatorConfig(
            k=3, sites=("ffn", "kv"), compressor="mean", decompressor="copy", dense_head=2, dense_tail=5
        ),
    )
    assert rows["mine (untrained)"]["cross_entropy"] == pytest.approx(
        continuation_cross_entropy(bare, chosen, CONTEXT), abs=1e-5
    )

    stack = Stack.of(model.config)
    cost, whole = prefill(stack, CONTEXT, model.plugins["default"]), prefill(stack, CONTEXT)
    assert rows["mine"]["operations"] == pytest.approx(cost.total / whole.total)
    assert rows["mine"]["ffn_operations"] == pytest.approx((cost.ffn + cost.plugin) / whole.ffn)
    entries = split(CONTEXT, 3, 2, 5).entries / CONTEXT
    for share in ("kv_entries", "kv_bytes"):
        assert rows["mine"][share] == rows["drop:3"][share] == pytest.approx(entries)
        assert rows["late-skip:1"][share] == rows["dense"][share] == 1
    assert rows["dense"]["prefill"] == 1
    assert all(row["prefill_seconds"] > 0 for row in rows.values())

    assert set(result["figures"]["configs"]) == {"mine", "mine (untrained)", "mean:2"}
    assert result["command"].startswith("python -m llm_variator.evaluate frontier --model ")
    nats = f"{rows['mine']['cross_entropy']:.4f}"
    assert nats in capsys.readouterr().out
    line = next(line for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith("| mine |"))
    assert nats in line
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_plugins_that_keep_keys(tmp_path):
    """Untrained, they keep the first tokens of every block, and merge by means."""
    config = VariatorConfig(
        k={"ffn": 3, "kv": 2},
        sites=("ffn", "kv"),
        compressor={"ffn": "weighted", "kv": "select"},
        k_per_head=((2, 4),) * 3,
        block=4,
        r=4,
        dense_head=2,
        dense_tail=5,
    )
    own = VariatorModel(load_model(model_folder()), config)
    randomise(own.plugin(), std=0.1)
    own.save_pretrained(tmp_path / "kept")
    line = ["--plugin", f"mine={tmp_path / 'kept'}", "--untrained", "--also", "drop:3"]
    result = frontier_of(tmp_path, *line)["figures"]
    rows = {row["condition"]: row for row in result["texts"][0]["rows"]}
    bare = result["configs"]["mine (untrained)"]
    assert (bare["compressor"], bare["decompressor"]) == ({"ffn": "mean", "kv": "select"}, "copy")
    assert rows["mine"]["kv_bytes"] == rows["mine (untrained)"]["kv_bytes"]
    inner = CONTEXT - 2 - 5
    counts = [2 + inner // 4 * (4 // k) + -(-(inner % 4) // k) + 5 for k in (2, 4)]
    assert rows["mine"]["kv_bytes"] == pytest.approx(sum(counts) / 2 / CONTEXT)
    windows = read_windows(
        text_file(tmp_path), load_tokenizer(model_folder()), seq_length=CONTEXT + CONTINUATION
    )
    assert rows["mine"]["cross_entropy"] == pytest.approx(
        continuation_cross_entropy(own, spread(windows, WINDOWS), CONTEXT), abs=1e-5
    )


def test_competitors_and_texts_may_be_none():
    settings = read(["frontier", "--model", "m", "--also", "--json", "x.json", "--data"])
    assert settings.also == settings.data == ()
    assert str(settings.json) == "x.json"
    assert read(["frontier", "--model", "m"]).also == ("drop:2", "late-skip", "mean:2")
    assert read(["frontier", "--model", "m", "--data", "a", "b", "--fresh"]).data == ("a", "b")


def test_what_was_measured_is_kept(plugin, tmp_path, monkeypatch):
    first = frontier_of(tmp_path, "--plugin", plugin)["figures"]
    asked = []

    def counting(model, condition, *args, **kwargs):
        asked.append(condition.label)
        return continue_windows(model, condition, *args, **kwargs)

    continue_windows = frontier.continue_windows
    monkeypatch.setattr(frontier, "continue_windows", counting)
    again = frontier_of(tmp_path, "--plugin", f"renamed={plugin}")["figures"]
    assert asked == []
    assert again["read_from_cache"] == len(first["texts"][0]["rows"])
    assert again["texts"][0]["rows"][2] == first["texts"][0]["rows"][2] | {"condition": "renamed"}
    frontier_of(tmp_path, "--also", "drop:4", "--plugin", plugin)
    assert asked == ["drop:4"]
    frontier_of(tmp_path, "--generate", "3")
    assert asked[1:] == ["dense", "no context", "drop:2", "late-skip:1", "mean:2"]
    frontier_of(tmp_path, "--fresh")
    assert len(asked) == 11


def test_other_weights_are_measured_again(model, plugin, tmp_path):
    other = tmp_path / "other"
    changed = VariatorModel.from_pretrained(load_model(model_folder()), plugin)
    randomise(changed.plugin(), std=0.1, seed=9)
    changed.save_pretrained(other)
    one, two = (
        frontier_of(tmp_path, "--plugin", f"a={folder}", "--also")["figures"]["texts"][0]["rows"][2]
        for folder in (plugin, other)
    )
    assert one["cross_entropy"] != two["cross_entropy"]


def test_questions(model, plugin, data, tmp_path, capsys):
    flags = [
        "--data",
        "--plugin",
        f"k3={plugin}",
        "--also",
        "drop:2",
        "--questions",
        4,
        "--shots",
        2,
        "--data-dir",
        data,
    ]
    result = frontier_of(tmp_path, *flags)["figures"]
    assert result["texts"] == []
    about = result["questions"]
    assert about["form"] == "text"
    assert about["shots"] == 2
    rows = {row["condition"]: row for row in about["rows"]}
    assert list(rows) == ["dense", "no context", "k3", "drop:2"]
    assert rows["dense"]["same_answer"] == 100
    assert rows["dense"]["f1_above_dense"] == 0
    tokenizer = load_tokenizer(model_folder())
    examples = load_examples("squad", "validation", data_dir=data, limit=4)
    shots = questions.load_shots(data, 2)
    lengths = [
        len(questions.encode_question(tokenizer, example, form="text", shots=shots).prompt)
        for example in examples
    ]
    held = sum(split(n, 3, 2, 5).entries for n in lengths) / sum(lengths)
    assert rows["k3"]["kv_entries"] == rows["k3"]["kv_bytes"] == pytest.approx(held)
    assert about["mean_prompt_tokens"] == pytest.approx(sum(lengths) / 4)

    # the gold answers, whole prompts and answers in one pass each
    def nats_of(hidden) -> float:
        total = count = 0
        for example in examples:
            asked = questions.encode_question(tokenizer, example, form="text", shots=shots, hidden=hidden)
            ids = asked.prompt + asked.after + asked.gold
            with torch.no_grad():
                logits = model(torch.tensor([ids]), prompt_length=len(asked.prompt)).logits[0].double()
            first = len(ids) - len(asked.gold)
            total -= sum(logits[first - 1 + i].log_softmax(-1)[t].item() for i, t in enumerate(asked.gold))
            count += len(asked.gold)
        return total / count

    hidden = result["hidden_questions"]
    after = {row["condition"]: row for row in hidden["rows"]}
    assert rows["k3"]["gold_nats"] == pytest.approx(nats_of(hidden=False), abs=1e-5)
    assert after["k3"]["gold_nats"] == pytest.approx(nats_of(hidden=True), abs=1e-5)
    with model.disable_plugin():
        dense = nats_of(hidden=True)
    assert after["dense"]["gold_nats"] == pytest.approx(dense, abs=1e-5)
    assert after["k3"]["gold_above_dense"] == pytest.approx(after["k3"]["gold_nats"] - dense, abs=1e-5)
    assert rows["dense"]["gold_above_dense"] == rows["dense"]["gold_above_dense_error"] == 0
    assert rows["k3"]["gold_above_dense_error"] > 0
    assert about["mean_prompt_tokens"] > hidden["mean_prompt_tokens"]
    assert about["mean_answer_tokens"] == hidden["mean_answer_tokens"]
    assert rows["no context"] == after["no context"] | {
        key: rows["no context"][key] for key in rows["no context"] if "above_dense" in key or "kv" in key
    } | {"same_answer": rows["no context"]["same_answer"]}
    text = capsys.readouterr().out
    assert "the question in the prompt" in " ".join(text.split())
    assert f"{after['k3']['gold_nats']:.3f}" in text

    seen = frontier_of(tmp_path, *flags, "--question-place", "seen")["figures"]
    assert "hidden_questions" not in seen
    assert seen["questions"] == about


@pytest.fixture(scope="module")
def article(tmp_path_factory):
    """One article of five paragraphs with two questions on each, behind one of a single paragraph."""
    folder = write_tasks(tmp_path_factory.mktemp("article"), "squad", validation=11)
    file = folder / "squad" / "validation.parquet"
    columns = pq.read_table(file).to_pydict()
    columns["title"] = ["a", *["b"] * 10]
    columns["context"] = ["a red boat"] + [f"{LINES[i % 2]} number {i}" for i in range(5) for _ in range(2)]
    columns["answers"] = [{"text": [text.split()[1]], "answer_start": [4]} for text in columns["context"]]
    pq.write_table(pa.table(columns), file)
    return folder


def test_many_questions_on_one_passage(model, plugin, article, tmp_path, monkeypatch):
    tokenizer, shots = load_tokenizer(model_folder()), questions.load_shots(article, 1)
    shot, passage = (
        f"{shots[0].decoder_prompt} {shots[0].answer}",
        [f"{LINES[i % 2]} number {i}" for i in (0, 1, 2)],
    )
    wanted = f"{shot}\n\nContext: " + "\n".join(passage)
    size, reads = len(tokenizer(wanted)["input_ids"]), []
    read = WithPlugin.read
    monkeypatch.setattr(WithPlugin, "read", lambda self, *args: reads.append(args[1]) or read(self, *args))
    flags = [
        "--data",
        "--plugin",
        f"k3={plugin}",
        "--also",
        "--questions",
        4,
        "--shots",
        1,
        "--data-dir",
        article,
    ]
    flags += ["--question-place", "hidden", "--question-context"]
    result = frontier_of(tmp_path, *flags, size + 9)["figures"]
    about = result["hidden_questions"]
    assert about["data"].endswith(", on one passage")
    assert about["mean_prompt_tokens"] == size
    (ids,) = reads
    assert tokenizer.decode(ids[0]) == wanted

    # each question by itself, in one pass
    examples = questions.load_joined(article, 4, lambda one: one.inputs["context"].count("\n") < 3)
    assert len({one.inputs["question"] for one in examples}) == 4
    total = count = 0
    for example in examples:
        rest = f"\nQuestion: {example.inputs['question']}\nAnswer:"
        after, gold = tokenizer(rest)["input_ids"], tokenizer(f"{example.continuation}\n")["input_ids"]
        whole = torch.tensor([ids[0].tolist() + after + gold])
        with torch.no_grad():
            logits = model(whole, prompt_length=size).logits[0, -len(gold) - 1 : -1].double()
        total -= float(logits.log_softmax(-1)[range(len(gold)), gold].sum())
        count += len(gold)
    row = next(row for row in about["rows"] if row["condition"] == "k3")
    assert row["gold_nats"] == pytest.approx(total / count, abs=1e-5)
    assert row["kv_entries"] == pytest.approx(split(size, 3, 2, 5).entries / size)

    wrongs = {
        5: "0 of the article's 5 paragraphs fit, with 0 questions",
        size - 9: "2 of the article's 5 paragraphs fit, with 4 questions on them, 5 are wanted",
        10_000: "the 5 paragraphs .* do not fill one context",
    }
    for wrong, message in wrongs.items():
        with pytest.raises(VariatorError, match=message):
            frontier_of(tmp_path, *flags, wrong, "--questions", 5)


def test_prompts_of_questions(data):
    tokenizer = load_tokenizer(model_folder())
    (example, *_) = load_examples("squad", "validation", data_dir=data)
    (shot,) = questions.load_shots(data, 1)

    def text(**options):
        asked = questions.encode_question(tokenizer, example, **options)
        assert asked.after == []
        gold = tokenizer.decode(asked.gold)
        assert gold == (f" {example.answer}\n" if options["form"] == "text" else f"{example.answer}<end>")
        return tokenizer.decode(asked.prompt)

    assert text(form="text") == example.decoder_prompt
    shown = f"{shot.decoder_prompt} {shot.answer}"
    assert text(form="text", shots=[shot]) == f"{shown}\n\n{example.decoder_prompt}"
    bare = text(form="text", shots=[shot], passage=False)
    assert bare == f"{shown}\n\nQuestion: {example.inputs['question']}\nAnswer:"
    with pytest.raises(VariatorError, match="no chat template"):
        text(form="chat")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    tokenizer.chat_template += "{% if m.role == 'assistant' %}<end>\n{% endif %}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    asked = "Question: {question}\nAnswer in a few words."
    ask, asked_before = (asked.format_map(one.inputs) for one in (example, shot))
    turns = f"<user>Passage: {shot.inputs['context']}\n{asked_before}<assistant>{shot.answer}<end>\n<user>"
    assert text(form="chat", shots=[shot], passage=False) == f"{turns}{ask}<assistant>"
    passage = f"Passage: {example.inputs['context']}\n"
    assert text(form="chat", shots=[shot]) == f"{turns}{passage}{ask}<assistant>"
    assert questions.decode_answer(tokenizer, tokenizer(" two birds\nand more")["input_ids"]) == "two birds"
    newline = tokenizer("\n")["input_ids"]
    assert {*newline, tokenizer.eos_token_id} <= questions.stop_tokens(tokenizer)


@pytest.mark.parametrize("form", ["text", "chat"])
def test_hidden_questions_are_cut_off_before_their_line(data, form):
    tokenizer = load_tokenizer(model_folder())
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (example, *_) = load_examples("squad", "validation", data_dir=data)
    (shot,) = questions.load_shots(data, 1)
    seen, hidden = (
        questions.encode_question(tokenizer, example, form=form, shots=[shot], hidden=hidden)
        for hidden in (False, True)
    )
    whole = tokenizer.decode(seen.prompt)
    before, _, rest = whole.rpartition("\nQuestion:")
    assert before.endswith(example.inputs["context"])
    assert hidden.prompt == tokenizer(before)["input_ids"]
    assert hidden.after == tokenizer(f"\nQuestion:{rest}", add_special_tokens=False)["input_ids"]
    assert hidden.gold == seen.gold
    tokenizer.chat_template = (
        "{% if not add_generation_prompt %}all else{% endif %}{{ messages[-1].content }}"
    )
    if form == "chat":
        with pytest.raises(VariatorError, match="choose --question-form text"):
            questions.encode_question(tokenizer, example, form=form)


def test_long_prompts_come_in_smaller_batches():
    sizes = {context: frontier.rows_at_once(8, context) for context in (30, 512, 513, 2048, 4096, 100_000)}
    assert list(sizes.values()) == [8, 8, 7, 2, 1, 1]


def test_articles_hold_each_paragraph_once(tmp_path):
    file = tmp_path / "squad" / "validation.parquet"
    file.parent.mkdir()
    columns = {"title": list("aaab"), "context": ["one", "one ", "two", "one"]}
    pq.write_table(pa.table(columns), file)
    assert questions.read_articles(tmp_path) == ["one\n\ntwo", "one"]


def test_figures_of_another_environment(plugin, data, tmp_path, monkeypatch):
    flags = ["--also", "--questions", 2, "--shots", 0, "--data-dir", data]
    figures = frontier_of(tmp_path, "--export", tmp_path / "tasks.json", *flags)["figures"]
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    windows = torch.tensor(tasks["texts"][0]["windows"])
    assert windows.shape == (WINDOWS, CONTEXT + CONTINUATION)
    assert {place: len(asked) for place, asked in tasks["questions"]["asked"].items()} == {
        "seen": 2,
        "hidden": 2,
    }
    assert set(tasks["questions"]["asked"]["hidden"][0]) == {"prompt", "after", "gold"}
    gold = [len(question["gold"]) for question in tasks["questions"]["asked"]["hidden"]]
    answers = {
        "tokens": [[5], [6]],
        "nats": [[2.0] * n for n in gold],
        "entries": [10, 11],
        "bytes": [100, 110],
    }
    press = {
        "label": "press",
        "texts": [tasks["dense"][0] | {"nats": [9.0] * WINDOWS, "entries": 3 * CONTEXT / 2}],
        "answers": {"hidden": answers, "seen": answers},
    }
    there = tmp_path / "there.json"
    there.write_text(json.dumps({"digest": tasks["digest"], "conditions": [press]}))
    both = frontier_of(tmp_path, "--elsewhere", there, *flags)["figures"]
    row = both["texts"][0]["rows"][-1]
    dense = figures["texts"][0]["rows"][0]["cross_entropy"]
    assert (row["condition"], row["kv_entries"], row["operations"], row["prefill"]) == ("press", 0.5, 1, None)
    assert row["above_dense"] == pytest.approx(9 - dense)
    assert row["greedy_agreement"] == 1
    assert not both["texts"][0]["pairs"], "the press holds as many bytes as dense"
    row = both["hidden_questions"]["rows"][-1]
    assert (row["condition"], row["gold_nats"]) == ("press", 2)
    assert both["questions"]["rows"][:-1] == figures["questions"]["rows"]
    assert both["questions"]["rows"][-1]["gold_nats"] == 2
    with pytest.raises(VariatorError, match="other windows or questions"):
        frontier_of(tmp_path, "--elsewhere", there, *flags, "--generate", 3)
    for stopped in (press | {"texts": []}, press | {"answers": {"hidden": answers}}):
        there.write_text(json.dumps({"digest": tasks["digest"], "conditions": [stopped]}))
        with pytest.raises(VariatorError, match="of a run that was stopped: run it again"):
            frontier_of(tmp_path, "--elsewhere", there, *flags)
    there.write_text("{}")
    monkeypatch.setattr(frontier, "_measure_text", None)  # it is read before anything is measured
    with pytest.raises(VariatorError, match="not a file of measurements"):
        frontier_of(tmp_path, "--elsewhere", there, *flags)


def test_pairs_are_of_the_same_tokens_and_about_as_many_bytes():
    """By hand: two questions, 3 and 1 tokens; their errors are those of a ratio of sums."""
    ours = Answers([], [[1.0, 1.0, 1.0], [2.0]], [], [50, 50])
    theirs = Answers([], [[2.0, 2.0, 2.0], [2.0]], [], [54, 54])
    larger = Answers([], [[0.0] * 3, [0.0]], [], [56, 56])
    dense = Answers([], [[0.0] * 3, [0.0]], [], [100, 100])
    (row,) = pair_rows({"ours": ours}, {"theirs": theirs, "larger": larger}, dense)
    rest = [-3 + 0.75 * 3, 0 + 0.75 * 1]
    assert dataclasses.asdict(row) == {
        "condition": "ours",
        "other": "theirs",
        "nats": -0.75,
        "nats_error": pytest.approx((2 * sum(r * r for r in rest)) ** 0.5 / 4),
        "kv_bytes": 0.5,
        "other_kv_bytes": 0.54,
    }
    windows = [Continuation([a, b], [], [], 1, size) for a, b, size in ((1.0, 4.0, 5.0), (2.0, 2.0, 5.5))]
    (row,) = pair_rows({"ours": windows[0]}, {"theirs": windows[1]}, windows[0])
    assert (row.nats, row.nats_error) == (0.5, pytest.approx(1.5))  # of -1 and 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--windows", "1000000"], "holds only"),
        (["--also", "prune:3"], "known are drop:K"),
        (["--also", "mean:x"], "known are drop:K"),
        (["--also", "mean:²"], "known are drop:K"),
        (["--data", "--questions", "0"], "nothing to measure: give --data, --questions, or both"),
        (["--also", "mean:2", "mean"], "two conditions are called mean:2"),
        (["--also", "--plot", "frontier.txt"], "ends with one of"),
        (["--data", "--plot", "frontier.png"], "--plot draws a row for each text: give --data"),
        (["--plugin", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input(more, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(VariatorError, match=message):
        main(words(tmp_path, *more))
