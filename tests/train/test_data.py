"""Corpora, held-out split, windows and the stream of examples."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_tasks import write_tasks

from llm_variator import VariatorError
from llm_variator.sources import corpora
from llm_variator.sources.corpora import (
    EMBEDDED,
    Source,
    cut_windows,
    end_windows,
    parse_sources,
    read_documents,
    read_windows,
    repeat_passages,
    tokenize,
)
from llm_variator.sources.models import byte_tokenizer
from llm_variator.sources.tasks import load_examples
from llm_variator.train.data import Corpus, TrainingStream, build_corpus, collate, hold_out

EOS = 2


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


# --- sources ---------------------------------------------------------------------------------------------


def test_sources_and_weights():
    assert parse_sources(["a,b/c=0.5", "d:text"]) == [Source("a", 1), Source("b/c", 0.5), Source("d:text", 1)]
    assert parse_sources(["dir/year=one/f.txt"]) == [Source("dir/year=one/f.txt", 1)]
    assert parse_sources([]) == [Source(EMBEDDED, 1)]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weight_must_be_above_zero(weight):
    with pytest.raises(VariatorError, match="weight must be a number above 0"):
        parse_sources([f"a={weight}"])


def test_embedded_corpus_is_english_prose():
    documents = read_documents(EMBEDDED)
    assert len(documents) > 50
    assert sum(map(len, documents)) > 200_000
    assert sum(document.count(" the ") for document in documents) > 1000


@pytest.mark.parametrize("place", ["file", "named", "named split", "environment"])
def test_parquet_is_found(tmp_path, monkeypatch, place):
    write_parquet(tmp_path / "wiki" / "train.parquet", title=["A", "B"], text=["one", "two"])
    write_parquet(tmp_path / "wiki" / "test.parquet", text=["three"])
    if place == "file":
        assert read_documents(str(tmp_path / "wiki" / "train.parquet")) == ["one", "two"]
    elif place == "named":
        assert read_documents("wiki", tmp_path) == ["one", "two"]
    elif place == "named split":
        assert read_documents("wiki/test", tmp_path) == ["three"]
        monkeypatch.chdir(tmp_path)  # where a folder has the same name
        assert read_documents("wiki", tmp_path) == ["one", "two"]
        assert read_documents("./wiki", tmp_path) == ["three", "one", "two"]
    else:
        monkeypatch.setenv("VARIATOR_DATA", str(tmp_path))
        assert read_documents("wiki/test") == ["three"]


def test_column_is_named_or_the_only_text(tmp_path):
    only = write_parquet(tmp_path / "only.parquet", sentence=["one", None], label=[1, 2])
    assert read_documents(str(only)) == ["one"]
    two = write_parquet(tmp_path / "two.parquet", question=["q"], answer=["a"])
    assert read_documents(f"{two}:answer") == ["a"]
    with pytest.raises(VariatorError, match=r"no text column 'text'; name one of \[question, answer\]"):
        read_documents(str(two))
    with pytest.raises(VariatorError, match="no text column 'label'"):
        read_documents(f"{only}:label")


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_strings_of_every_arrow_type_are_read(tmp_path, kind):
    words = pa.array(["one", None, "two", "one"])
    column = words.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else words.cast(kind)
    file = write_parquet(tmp_path / "d.parquet", body=column, n=[1, 2, 3, 4])
    assert read_documents(str(file)) == ["one", "two", "one"]


def test_text_as_pandas_writes_it(tmp_path):
    import pandas

    frame = pandas.DataFrame({"text": ["one", None, "two"], "kind": pandas.Categorical(["a", "b", "a"])})
    frame.to_parquet(tmp_path / "d.parquet")
    assert read_documents(str(tmp_path / "d.parquet")) == ["one", "two"]
    assert read_documents(f"{tmp_path / 'd.parquet'}:kind") == ["a", "b", "a"]


def test_numbers_in_a_dictionary_are_no_text(tmp_path):
    file = write_parquet(tmp_path / "d.parquet", text=pa.array([1, 2]).dictionary_encode(), more=["a", "b"])
    with pytest.raises(VariatorError, match=r"no text column 'text'; name one of \[more\]"):
        read_documents(f"{file}:text")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (r'{"text": "caf\ud83d x"}', "caf\ufffd x"),
        (r'{"text": "caf\udce9"}', "caf\ufffd"),
        (r'"\ud83d"', "\ufffd"),
        (r'{"text": "\ude00\ud83d"}', "\ufffd\ufffd"),
        (r'{"text": "\ud83d\ude00 \ufeff"}', "\N{GRINNING FACE} \ufeff"),
    ],
)
def test_lone_surrogates_become_replacement_characters(tmp_path, tokenizer, line, expected):
    (tmp_path / "a.jsonl").write_text(line + "\n", encoding="utf-8")
    documents = read_documents(str(tmp_path / "a.jsonl"))
    assert documents == [expected]
    assert tokenizer.decode(tokenize(documents, tokenizer)[0]) == expected


@pytest.mark.parametrize(
    ("lines", "column", "expected"),
    [
        (['{"text": "a"}', '{"text": null}', '{"text": "b"}'], "", ["a", "b"]),
        (['{"text": null, "title": "x"}', '{"text": "a", "title": "y"}'], "", ["a"]),
        (['{"sentence": null, "n": 1}', '{"sentence": "a", "n": 2}'], "", ["a"]),
        (['{"body": null, "text": "x"}', '{"body": "a", "text": "y"}'], ":body", ["a"]),
        (['{"body": "a", "note": null}'], "", ["a"]),
    ],
)
def test_nulls_are_left_out_as_in_parquet(tmp_path, lines, column, expected):
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_documents(f"{tmp_path / 'a.jsonl'}{column}") == expected


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", '{"text": "one"}\n"two"'), ("a.txt", "one")])
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_documents(str(tmp_path / name))[0] == "one"


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "d.parquet", text=["one"])
    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        VariatorError, match=r"needs the package pyarrow: pip install 'llm-variator\[train\]'"
    ):
        read_documents(str(file))
    with pytest.raises(VariatorError, match="needs the package datasets"):
        read_documents("owner/name")
    (tmp_path / "a.txt").write_text("two", encoding="utf-8")
    assert read_documents(str(tmp_path / "a.txt")) == ["two"], "needs neither"


def test_jsonl_and_folder(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "n": 1}\n\n"two"\n', encoding="utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("three\nfour", encoding="utf-8")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert read_documents(str(tmp_path)) == ["one", "two", "three\nfour"]


def test_documents_that_end_with_their_line_stay_documents(tmp_path):
    texts = [f"a {n}\nb {n}\n" for n in range(3)] + ["one line\n"]
    assert read_documents(str(write_parquet(tmp_path / "d.parquet", text=texts))) == texts


def test_lines_are_joined_into_documents_that_end_at_empty_lines(tmp_path):
    lines = []
    for chapter in range(60):
        lines += [f" = {chapter} = \n", "word " * 200 + "\n", ""]
    file = write_parquet(tmp_path / "lines.parquet", text=lines)
    documents = read_documents(str(file))
    assert "".join(documents) == "".join(line or "\n" for line in lines)
    assert len(documents) == 3
    assert all(document.endswith("\n\n") for document in documents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"not parquet", "not a readable Parquet file"),
        ("a.jsonl", b"{broken\n", "line 1: expected a JSON object"),
        ("a.jsonl", b"[1]\n", "line 1: expected a JSON object"),
        ("a.jsonl", b'"one"\nnull\n', "line 2: expected a JSON object"),
        ("a.jsonl", b'{"text": null}\n', "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: no text column 'text'"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "line 1: expected a JSON object"),
        ("a.jsonl", b"[" * 200_000, "line 1: expected a JSON object"),
        ("a.jsonl", '{"text": "one"}'.encode("utf-16"), "not UTF-8"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.csv", b"x", "cannot read .csv"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VariatorError, match=rf"{name}.*{message}"):
        read_documents(str(tmp_path / name))


def test_missing_data_folder_and_empty_folder(tmp_path):
    with pytest.raises(VariatorError, match=r"data folder .*nowhere does not exist"):
        read_documents("wiki", tmp_path / "nowhere")
    with pytest.raises(VariatorError, match=r"holds no \.parquet"):
        read_documents(str(tmp_path))


def test_hub_is_asked_last_and_its_failure_explained(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        raise ConnectionError("no route")

    monkeypatch.setattr(corpora, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(VariatorError, match=r"'owner/name:en:test': no such file.*no route.*embedded corpus"):
        read_documents("owner/name:en:test", tmp_path)
    assert asked == [(("owner/name", "en"), {"split": "test"})]
    with pytest.raises(VariatorError, match="too many parts"):
        read_documents("owner/name:a:b:c:d")


def test_unreachable_hub_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(corpora, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(corpora, "hub_reachable", lambda: False)
    with pytest.raises(VariatorError, match="it does not answer; HF_HUB_OFFLINE=1 reads what is cached"):
        read_documents("owner/name")


def test_hub_dataset_is_read(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"body": ["one", "two"], "n": [1, 2]})
    monkeypatch.setattr(corpora, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    assert read_documents("owner/name:::body") == ["one", "two"]
    assert read_documents("owner/name") == ["one", "two"]
    rows = datasets.Dataset.from_dict(
        {"body": ["one", None], "n": [1, 2]},
        features=datasets.Features(body=datasets.Value("string_view"), n=datasets.Value("int64")),
    )
    assert read_documents("owner/name") == ["one"]


# --- windows ---------------------------------------------------------------------------------------------


def test_windows_hold_the_text_in_order(tokenizer):
    documents = ["hello world", "äöü", "third"]
    tokens = tokenize(documents, tokenizer)
    assert [tokenizer.decode(row) for row in tokens] == documents
    assert all(row.dtype == torch.int32 for row in tokens)
    windows = cut_windows(tokens, 5, tokenizer)
    stream = [token for row in tokens for token in (*row.tolist(), EOS)]
    assert windows.dtype == torch.int32
    assert windows.flatten().tolist() == stream[: len(stream) // 5 * 5]


def test_end_windows_are_the_ends_of_single_documents(tmp_path, tokenizer):
    texts = ["one two three", "short", "four five six seven"]
    windows = end_windows(tokenize(texts, tokenizer), 8, tokenizer)
    assert windows.dtype == torch.int32
    assert [tokenizer.decode(row) for row in windows] == [texts[0][-8:], texts[2][-8:]]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    more = dict(eval_windows=1, eval_sources=[Source(EMBEDDED, 1.0)])
    corpus = build_corpus([Source(f"end:{file}", 2.0)], tokenizer, seq_length=8, **more)
    assert torch.equal(corpus.train[0], windows)
    with pytest.raises(VariatorError, match="no document has the 30 tokens of a window"):
        build_corpus([Source(f"end:{file}", 2.0)], tokenizer, seq_length=30, **more)


def test_end_windows_open_as_others_do():
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    windows = end_windows(tokenize(["hello world", "rld", "x"], tokenizer), 4, tokenizer)
    assert (
        windows.tolist()
        == [[tokenizer.bos_token_id, *tokenizer("rld", add_special_tokens=False)["input_ids"]]] * 2
    )


def test_windows_open_as_the_tokenizer_opens_a_text():
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    windows = cut_windows(tokenize(["hello world"], tokenizer), 4, tokenizer)
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    assert tokenizer.decode(windows[:, 1:].flatten()) == "hello wor"[: 3 * len(windows)] + "ld</s>"


def test_held_out_documents_are_whole_few_and_always_the_same():
    documents = [torch.arange(i, i + 50) for i in range(0, 5000, 50)]
    train, held = hold_out(documents, tokens=120)
    assert len(held) == 3
    assert sorted(int(row[0]) for row in train + held) == list(range(0, 5000, 50))
    again = hold_out(documents, tokens=120)[1]
    assert all(torch.equal(a, b) for a, b in zip(held, again, strict=True))
    assert len(hold_out(documents, tokens=10**6)[1]) == 10, "a tenth at most"
    assert hold_out([torch.arange(100)], tokens=10)[1] == []


def test_documents_that_stand_in_others_are_held_out_last(tmp_path, tokenizer):
    alone = [chr(200 + i) * 40 for i in range(60)]
    twice = [chr(300 + i) * 40 for i in range(30)]
    texts = [*alone, *twice, *(f"{text}\n\n{chr(400 + i) * 20}" for i, text in enumerate(twice))]
    source = Source(str(write_parquet(tmp_path / "d.parquet", text=texts)), 1.0)
    corpus = build_corpus([source], tokenizer, seq_length=30, eval_windows=8)
    seen = set(tokenizer.decode(corpus.held_out.flatten()).replace("</s>", ""))
    assert {ord(letter) for letter in seen if ord(letter) < 0xFFFD} <= set(range(200, 260))
    same = Source(str(write_parquet(tmp_path / "same.parquet", text=["x" * 40] * 50)), 1.0)
    assert len(build_corpus([same], tokenizer, seq_length=30, eval_windows=2).held_out) == 2, (
        "there are no others"
    )


@pytest.mark.parametrize("end", ["", "end:"])
@pytest.mark.parametrize("name", ["squad", "rte"])
def test_held_out_passages_of_a_task_are_not_trained_on(tmp_path, tokenizer, name, end, monkeypatch):
    data = write_tasks(tmp_path, name, train=60)
    examples = load_examples(name, "train", data_dir=data)
    passages = [f"passage {i // 3} " + "word " * 30 for i in range(60)]  # three questions each
    column = max(examples[0].inputs, key=lambda column: len(examples[0].inputs[column]))
    told = [
        dataclasses.replace(example, inputs={**example.inputs, column: passage})
        for example, passage in zip(examples, passages, strict=True)
    ]
    monkeypatch.setattr("llm_variator.train.data.load_examples", lambda *args, **options: told)
    source = Source(f"{end}task:{name}", 1.0)
    corpus = build_corpus([source], tokenizer, seq_length=300, eval_windows=2, data_dir=data)
    found = [
        set(re.findall(r"passage \d+ ", tokenizer.decode(windows.flatten())))
        for windows in (corpus.train[0], corpus.held_out)
    ]
    assert len(found[0]) > (3 if end else 10)
    assert found[1]
    assert not found[0] & found[1]


def test_validation_text_is_never_trained_on(tmp_path, tokenizer):
    texts = [chr(200 + i) * 40 for i in range(100)]  # every document has a letter of its own
    source = Source(str(write_parquet(tmp_path / "d.parquet", text=texts)), 1.0)
    corpus = build_corpus([source], tokenizer, seq_length=30, eval_windows=4)
    letters = lambda windows: set(tokenizer.decode(windows.flatten()).replace("</s>", ""))  # noqa: E731
    assert corpus.held_out.shape == (4, 30)
    whole = {letter for letter in letters(corpus.held_out) if ord(letter) < 0xFFFD}
    assert whole
    assert not whole & letters(corpus.train[0])


def test_own_validation_text_leaves_all_of_the_rest_to_train_on(tmp_path, tokenizer):
    train = write_parquet(tmp_path / "train.parquet", text=["a" * 299])
    test = write_parquet(tmp_path / "test.parquet", text=["b" * 299])
    corpus = build_corpus(
        [Source(str(train), 1.0)],
        tokenizer,
        seq_length=30,
        eval_windows=4,
        eval_sources=[Source(str(test), 1.0)],
    )
    assert [len(part) for part in corpus.train] == [10]
    assert corpus.held_out.shape == (4, 30)
    assert set(tokenizer.decode(corpus.held_out.flatten()).replace("</s>", "")) == {"b"}


def test_examples_of_a_task_as_text(tmp_path, tokenizer):
    data = write_tasks(tmp_path, "squad", train=20)
    arguments = dict(seq_length=40, eval_windows=2, eval_sources=[Source(EMBEDDED, 1.0)], data_dir=data)
    windows = build_corpus([Source("task:squad", 1.0)], tokenizer, **arguments).train[0]
    text = tokenizer.decode(windows.flatten())
    examples = load_examples("squad", "train", data_dir=data)
    shown = [f"{one.decoder_prompt} {one.answer}" in text for one in examples]
    assert sum(shown) >= 19, "all but one that the ragged end may cut"
    places = [text.find(one.decoder_prompt) for one in examples]
    assert places != sorted(places), "neighbours often share their passage"
    with pytest.raises(VariatorError, match="unknown task 'squat'; did you mean 'squad'"):
        build_corpus([Source("task:squat", 1.0)], tokenizer, **arguments)


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        (["short"], 30, "has 5 tokens, too few to train"),
        (["x" * 100], 30, "too little text to hold out one window"),
    ],
)
def test_too_little_text(tmp_path, tokenizer, text, length, message):
    source = Source(str(write_parquet(tmp_path / "d.parquet", text=text)), 1.0)
    with pytest.raises(VariatorError, match=message):
        build_corpus([source], tokenizer, seq_length=length, eval_windows=2)


def test_reading_windows_of_a_short_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8")
    assert read_windows(str(tmp_path / "a.txt"), tokenizer, seq_length=4).shape == (1, 4)
    with pytest.raises(VariatorError, match="fewer than one window of 5"):
        read_windows(str(tmp_path / "a.txt"), tokenizer, seq_length=5)


# --- the stream ------------------------------------------------------------------------------------------


def stream(weights=(1.0, 1.0), sizes=(6, 4), seed=0, length=60, batch_size=2, **more) -> TrainingStream:
    parts = tuple(
        (100 * i + torch.arange(size, dtype=torch.int32))[:, None].expand(size, 8)
        for i, size in enumerate(sizes)
    )
    corpus = Corpus(parts, weights, torch.zeros(1, 8, dtype=torch.int32))
    return TrainingStream(
        corpus, length=length, batch_size=batch_size, prompt_tokens=(2, 6), seed=seed, **more
    )


def numbers(examples: TrainingStream, start=0, stop=None) -> list[int]:
    return [int(examples[i]["input_ids"][0]) for i in range(start, stop or len(examples))]


def test_each_pass_reads_every_window_once_in_an_order_of_its_own():
    seen = np.array(numbers(stream())).reshape(6, 10)
    for row in seen:
        assert sorted(row) == [0, 1, 2, 3, 4, 5, 100, 101, 102, 103]
    assert len({tuple(row) for row in seen}) == 6


def test_example_depends_on_seed_and_place_alone():
    whole, again = stream(), stream()
    assert numbers(again, 37) == numbers(whole, 37), "starting in the middle gives the same examples"
    assert [again[i]["prompt_length"] for i in range(60)] == [whole[i]["prompt_length"] for i in range(60)]
    assert numbers(stream(seed=1)) != numbers(whole)
    assert numbers(stream(length=20)) == numbers(whole, 0, 20), "a longer run begins like a shorter one"


def test_prompt_lengths_fill_their_range_and_are_shared_by_a_micro_batch():
    examples = stream(length=400)
    lengths = [examples[i]["prompt_length"] for i in range(400)]
    assert set(lengths) == {2, 3, 4, 5, 6}
    assert lengths[::2] == lengths[1::2]


@pytest.mark.parametrize(
    ("weights", "expected"), [((2.0, 1.0), (12, 4)), ((0.5, 1.0), (3, 4)), ((1.5, 0.01), (9, 1))]
)
def test_weights_are_draws_per_pass(weights, expected):
    examples = stream(weights)
    first = np.array(numbers(examples, 0, sum(expected)))
    assert ((first < 100).sum(), (first >= 100).sum()) == expected
    counts = np.unique(first[first < 100], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1, "no window is drawn twice before all were drawn once"


def test_recall_repeats_passages_of_the_prompt():
    corpus = Corpus((torch.arange(400, dtype=torch.int32).view(4, 100),), (1.0,), torch.zeros(1, 100))
    settings = {"length": 60, "batch_size": 2, "prompt_tokens": (60, 70), "seed": 0}
    plain, some = TrainingStream(corpus, **settings), TrainingStream(corpus, **settings, recall=0.5)
    changed = 0
    for before, after in zip(
        map(plain.__getitem__, range(60)), map(some.__getitem__, range(60)), strict=True
    ):
        length, ids = before["prompt_length"], after["input_ids"]
        assert after["prompt_length"] == length
        assert torch.equal(ids[:length], before["input_ids"][:length])
        if not torch.equal(ids, before["input_ids"]):
            changed += 1
            rest = ids[length:]
            assert len(ids) == 100
            assert set(rest.tolist()) <= set(ids[:length].tolist())
            runs = (rest.diff() != 1).sum() + 1
            assert len(rest) / 48 <= runs <= len(rest) / 16 + 1, "passages of 16 to 48 tokens"
    assert 20 <= changed <= 40
    assert torch.equal(some[7]["input_ids"], TrainingStream(corpus, **settings, recall=0.5)[7]["input_ids"])


def test_passages_of_a_short_prompt_are_as_short_as_it():
    window = torch.arange(40)
    assert repeat_passages(window, 1, np.random.default_rng(0)).tolist() == [0] * 40
    assert set(repeat_passages(window, 5, np.random.default_rng(0)).tolist()) == {0, 1, 2, 3, 4}


def test_collate():
    batch = collate([stream()[0], stream()[1]])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["input_ids"].dtype == torch.int64
    assert batch["prompt_length"] == stream()[0]["prompt_length"]
    json.dumps(batch["prompt_length"])
