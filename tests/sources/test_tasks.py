"""The seven tasks: templates, data and metrics against the paper's words, small files and hand arithmetic."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_variator import VariatorError
from llm_variator.sources.tasks import (
    SPLITS,
    TASKS,
    Example,
    Origin,
    average,
    exact_match,
    examples,
    find_task,
    label_from_log_likelihoods,
    label_from_text,
    load_examples,
    score,
    token_f1,
)

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch):
    monkeypatch.delenv("VARIATOR_DATA", raising=False)
    monkeypatch.setattr(examples, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(examples, "hub_reachable", lambda: False)


def write_parquet(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_sst2(folder: Path, file: str = "train", rows: int = 4) -> Path:
    sentences = [f" sentence {row} " for row in range(rows)]
    labels = [row % 2 for row in range(rows)]
    return write_parquet(
        folder / "sst2" / f"{file}.parquet", sentence=sentences, label=labels, idx=list(range(rows))
    )


def make_examples(task: str, golds: list) -> list[Example]:
    """Examples with the given labels, or for SQuAD the given lists of answers."""
    entry, origin = TASKS[task], Origin("made up", 1, 1, official=False)
    inputs = dict.fromkeys(entry.columns, "")
    return [
        Example(entry, "0", inputs, gold, (entry.answers[gold],), origin)
        if entry.answers
        else Example(entry, "0", inputs, None, tuple(gold), origin)
        for gold in golds
    ]


# --- the table -------------------------------------------------------------------------------------------

TABLE_6 = {
    "mnli": (
        dict(premise="PREMISE", hypothesis="HYPOTHESIS"),
        "Sentence 1: PREMISE Sentence 2: HYPOTHESIS Does sentence 1 entails sentence 2? <extra_id_0>",
    ),
    "qnli": (
        dict(question="QUESTION", sentence="SENTENCE"),
        "Question: QUESTION Sentence: SENTENCE Does the sentence contains the answer to the question? "
        "<extra_id_0>",
    ),
    "qqp": (
        dict(question1="QUESTION1", question2="QUESTION2"),
        "Question 1: QUESTION1 Question 2: QUESTION2 Are the two questions paraphrase of each other? "
        "<extra_id_0>",
    ),
    "rte": (
        dict(sentence1="SENTENCE1", sentence2="SENTENCE2"),
        "Sentence 1: SENTENCE1 Sentence 2: SENTENCE2 Does sentence 1 entails sentence 2? <extra_id_0>",
    ),
    "sst2": (
        dict(sentence="SENTENCE"),
        "Sentence: SENTENCE Does this sentence express positive or negative emotions? <extra_id_0>",
    ),
    "mrpc": (
        dict(sentence1="SENTENCE1", sentence2="SENTENCE2"),
        "Sentence 1: SENTENCE1 Sentence 2: SENTENCE2 Are the two sentences paraphrase of each other? "
        "<extra_id_0>",
    ),
    "squad": (
        dict(question="QUESTION", context="CONTEXT"),
        "Question: QUESTION Context: CONTEXT Answer: <extra_id_0>",
    ),
}

DECODER_PROMPTS = {
    "mnli": "Sentence 1: PREMISE\nSentence 2: HYPOTHESIS\n"
    "Does sentence 1 entail sentence 2? Yes, Maybe or No?\nAnswer:",
    "qnli": "Question: QUESTION\nSentence: SENTENCE\n"
    "Does the sentence contain the answer to the question? Yes or No?\nAnswer:",
    "qqp": "Question 1: QUESTION1\nQuestion 2: QUESTION2\n"
    "Are the two questions paraphrases of each other? Yes or No?\nAnswer:",
    "rte": "Sentence 1: SENTENCE1\nSentence 2: SENTENCE2\n"
    "Does sentence 1 entail sentence 2? Yes or No?\nAnswer:",
    "sst2": "Sentence: SENTENCE\nDoes this sentence express positive or negative emotions?\nAnswer:",
    "mrpc": "Sentence 1: SENTENCE1\nSentence 2: SENTENCE2\n"
    "Are the two sentences paraphrases of each other? Yes or No?\nAnswer:",
    "squad": "Context: CONTEXT\nQuestion: QUESTION\nAnswer:",
}


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_the_papers_table_6_and_the_decoder_form(name):
    inputs, expected = TABLE_6[name]
    task = TASKS[name]
    example = Example(task, "0", inputs, None, ("gold",), Origin("made up", 1, 1, official=False))
    assert example.prompt == expected
    assert example.decoder_prompt == DECODER_PROMPTS[name]
    assert example.continuation == " gold"
    for template in (task.template, task.decoder_template):
        assert sorted(field for _, field, _, _ in Formatter().parse(template) if field) == sorted(
            task.columns
        )


def test_texts_with_braces_stay_as_they_are(tmp_path):
    write_parquet(tmp_path / "sst2" / "train.parquet", sentence=["a {sentence} {0} {"], label=[1], idx=[0])
    (example,) = load_examples("sst2", "train", data_dir=tmp_path)
    assert example.prompt.startswith("Sentence: a {sentence} {0} { Does")


@pytest.mark.parametrize(
    ("name", "answers"),
    {
        "mnli": ("Yes", "Maybe", "No"),  # entailment, neutral, contradiction
        "qnli": ("Yes", "No"),  # entailment, not_entailment
        "qqp": ("No", "Yes"),  # no duplicate, duplicate
        "rte": ("Yes", "No"),  # entailment, not_entailment
        "sst2": ("negative", "positive"),
        "mrpc": ("No", "Yes"),  # not equivalent, equivalent
        "squad": (),
    }.items(),
)
def test_answers_by_label(name, answers):
    assert TASKS[name].answers == answers


def test_metrics_and_validation_split_of_mnli():
    first = {name: task.metrics[0] for name, task in TASKS.items()}
    assert first == dict.fromkeys(TASKS, "accuracy") | {"mrpc": "f1", "squad": "exact_match"}
    assert TASKS["mnli"].split("validation").name == "validation_matched"


def test_unknown_tasks_and_splits():
    assert find_task("sst2") is TASKS["sst2"]
    with pytest.raises(VariatorError, match=r"unknown task 'SST-2'; did you mean 'sst2'\?"):
        find_task("SST-2")
    with pytest.raises(VariatorError, match="known are mnli, qnli, qqp, rte, sst2, mrpc, squad"):
        load_examples("winogrande", "train")
    with pytest.raises(VariatorError, match="'mnli' has no split 'test'; choose one of train, validation"):
        load_examples("mnli", "test")


# --- data ------------------------------------------------------------------------------------------------


def test_rows_become_examples(tmp_path, monkeypatch):
    write_sst2(tmp_path)
    monkeypatch.setenv("VARIATOR_DATA", str(tmp_path))
    loaded = load_examples("sst2", "train")
    assert [(example.id, example.label, example.answer) for example in loaded] == [
        ("0", 0, "negative"),
        ("1", 1, "positive"),
        ("2", 0, "negative"),
        ("3", 1, "positive"),
    ]
    assert loaded[1].prompt == (
        "Sentence: sentence 1 Does this sentence express positive or negative emotions? <extra_id_0>"
    )
    assert loaded == load_examples(TASKS["sst2"], "train", data_dir=tmp_path)


def test_mnli_validates_on_the_matched_split(tmp_path):
    write_parquet(
        tmp_path / "mnli" / "validation_matched.parquet",
        premise=["p"],
        hypothesis=["h "],
        label=[2],
        idx=[7],
        source=["not needed"],
    )
    (example,) = load_examples("mnli", "validation", data_dir=tmp_path)
    assert (example.id, example.inputs, example.answer) == ("7", {"premise": "p", "hypothesis": "h"}, "No")


def test_squad_keeps_every_gold_answer(tmp_path):
    write_parquet(
        tmp_path / "squad" / "validation.parquet",
        id=["x1"],
        title=["T"],
        context=[" In May 1066. "],
        question=["When?"],
        answers=[{"text": ["May 1066", "1066", "1066"], "answer_start": [4, 8, 8]}],
    )
    (example,) = load_examples("squad", "validation", data_dir=tmp_path)
    assert example.label is None
    assert example.golds == ("May 1066", "1066", "1066")
    assert example.answer == "May 1066"
    assert example.prompt == "Question: When? Context: In May 1066. Answer: <extra_id_0>"


def test_origin_tells_official_rows_from_others(tmp_path):
    def origin() -> Origin:
        (found,) = {example.origin for example in load_examples("sst2", "validation", data_dir=tmp_path)}
        return found

    write_sst2(tmp_path, "validation_rebuilt", rows=872)
    assert origin() == Origin("sst2/validation_rebuilt.parquet", 872, 872, official=False)
    assert not origin().complete
    assert origin().describe() == "872 rows, not the official ones"

    write_sst2(tmp_path, "validation_subset", rows=218)
    assert origin() == Origin("sst2/validation_subset.parquet", 218, 872, official=True)
    assert not origin().complete
    assert origin().describe() == "218 of 872 official rows (25.0%)"

    write_sst2(tmp_path, "validation", rows=872)
    assert origin() == Origin("sst2/validation.parquet", 872, 872, official=True)
    assert origin().complete
    assert origin().describe() == "all 872 official rows"
    assert origin().describe(used=109) == "109 of 872 official rows (12.5%)"

    write_sst2(tmp_path, "validation", rows=873)
    assert origin().describe() == "873 rows, not the official ones"


def test_limit_draws_rows_by_seed_in_order_and_nested(tmp_path):
    write_sst2(tmp_path, rows=100)

    def ids(limit, seed=0):
        return [
            int(example.id)
            for example in load_examples("sst2", "train", data_dir=tmp_path, limit=limit, seed=seed)
        ]

    assert len(ids(10)) == 10
    assert ids(10) == ids(10) == sorted(ids(10))
    assert set(ids(10)) < set(ids(30))
    assert ids(10) != ids(10, seed=1)
    assert ids(10) != list(range(10))
    assert ids(100) == ids(1000) == ids(None) == list(range(100))
    with pytest.raises(VariatorError, match="limit must be at least 1, got 0"):
        ids(0)


GOOD_SST2 = dict(sentence=["a"], label=[0], idx=[3])
GOOD_SQUAD = dict(id=["i"], context=["c"], question=["q"], answers=[{"text": ["c"]}])


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        (
            "sst2",
            dict(text=["a"], label=[0], idx=[0]),
            r"train\.parquet: task 'sst2' needs the columns idx, sentence, label; "
            r"missing sentence among text, label, idx",
        ),
        ("sst2", GOOD_SST2 | dict(label=[-1]), "row with idx 3: label must be one of 0, 1, got -1"),
        ("sst2", GOOD_SST2 | dict(label=[2]), "label must be one of 0, 1, got 2"),
        ("sst2", GOOD_SST2 | dict(label=["positive"]), "label must be one of 0, 1, got 'positive'"),
        ("sst2", GOOD_SST2 | dict(label=[1.0]), r"label must be one of 0, 1, got 1\.0"),
        ("sst2", GOOD_SST2 | dict(sentence=pa.array([None], pa.string())), "sentence must be text, got None"),
        ("sst2", dict.fromkeys(GOOD_SST2, pa.array([], pa.int64())), "no rows"),
        ("squad", GOOD_SQUAD | dict(answers=["c"]), "answers must be a struct"),
        (
            "squad",
            GOOD_SQUAD | dict(answers=[{"text": pa.scalar([], pa.list_(pa.string())).as_py()}]),
            "at least",
        ),
    ],
)
def test_wrong_columns_and_values_are_named(tmp_path, task, columns, message):
    write_parquet(tmp_path / task / "train.parquet", **columns)
    with pytest.raises(VariatorError, match=message):
        load_examples(task, "train", data_dir=tmp_path)


def test_missing_and_unreadable_data(tmp_path, monkeypatch):
    with pytest.raises(VariatorError, match=r"data folder .*nowhere does not exist; correct --data-dir"):
        load_examples("sst2", "train", data_dir=tmp_path / "nowhere")
    with pytest.raises(
        VariatorError,
        match=r"'mnli', split 'validation': none of mnli/validation_matched\.parquet, mnli/validation_matched_"
        r"subset\.parquet, .* and nyu-mll/glue is not .* does not answer; HF_HUB_OFFLINE=1 reads .*; give --data",
    ):
        load_examples("mnli", "validation", data_dir=tmp_path)
    with pytest.raises(VariatorError, match="no --data-dir given to look in"):
        load_examples("mnli", "validation")
    file = write_sst2(tmp_path)
    file.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(VariatorError, match=r"train\.parquet: not a readable Parquet file"):
        load_examples("sst2", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("task", "split", "asked", "source"),
    [
        (
            "mnli",
            "validation",
            ("nyu-mll/glue", "mnli", "validation_matched"),
            "nyu-mll/glue:mnli:validation_matched",
        ),
        ("squad", "train", ("rajpurkar/squad", None, "train"), "rajpurkar/squad:train"),
    ],
)
def test_hub_is_asked_last(tmp_path, monkeypatch, task, split, asked, source):
    import datasets

    calls = []
    columns = (
        dict(premise=["p"], hypothesis=["h"], label=[1], idx=[0])
        if task == "mnli"
        else dict(id=["i"], context=["c"], question=["q"], answers=[{"text": ["c"], "answer_start": [0]}])
    )

    def load_dataset(dataset, config, split):
        calls.append((dataset, config, split))
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(examples, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = load_examples(task, split, data_dir=tmp_path)
    assert calls == [asked]
    assert example.answer == ("Maybe" if task == "mnli" else "c")
    assert (example.origin.name, example.origin.rows, example.origin.official) == (source, 1, True)


def test_failure_of_the_hub_is_explained(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(examples, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(VariatorError, match=r"glue is not to be had from the Hugging Face Hub \(no route\);"):
        load_examples("rte", "train")


@pytest.mark.skipif(
    not (SHARED_DATA / "PROVENANCE.md").is_file(),
    reason="no data sets beside the checkout, in ../shared/data",
)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TASKS)
def test_real_data_are_what_their_provenance_says(name, split):
    loaded = load_examples(name, split, data_dir=SHARED_DATA)
    origin = loaded[0].origin
    line = rf"^\| `{re.escape(origin.name)}` \| ([\d,]+) \| ([\d,]+) \|[^|]*\| (.*?) \|"
    listed = re.search(line, (SHARED_DATA / "PROVENANCE.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed is not None
    rows, official_rows = (int(listed[group].replace(",", "")) for group in (1, 2))
    assert (len(loaded), origin.rows, origin.official_rows) == (rows, rows, official_rows)
    assert origin.complete == listed[3].startswith("complete")
    assert origin.official == ("not the official rows" not in listed[3])
    labels = {example.label for example in loaded}
    assert labels == (set(range(len(TASKS[name].answers))) or {None})


# --- metrics ---------------------------------------------------------------------------------------------

# prediction, gold answers, exact match, F1; the arithmetic: precision p, recall r, F1 = 2pr / (p + r)
SQUAD_CASES = [
    ("Denver Broncos", ["Denver Broncos"], 1, 1),
    ("the Denver Broncos", ["Denver Broncos"], 1, 1),  # article
    ("Denver Broncos.", ["Denver Broncos"], 1, 1),  # punctuation
    ("DENVER broncos", ["Denver Broncos"], 1, 1),  # case
    (" Denver \n\t Broncos  ", ["Denver Broncos"], 1, 1),  # white space
    ("a cat and the dog", ["cat and dog"], 1, 1),  # articles inside
    ("t.h.e. map", ["map"], 1, 1),  # punctuation goes before articles
    ("theatre", ["atre"], 0, 0),  # an article is a whole word
    ("Broncos", ["Denver Broncos"], 0, 2 / 3),  # p = 1, r = 1/2
    ("Broncos Denver", ["Denver Broncos"], 0, 1),  # F1 knows no order
    ("Carolina Panthers", ["Denver Broncos"], 0, 0),
    ("Saint Bernadette Soubirous in 1858", ["Saint Bernadette Soubirous"], 0, 3 / 4),  # p = 3/5, r = 1
    ("New York New York", ["New York"], 0, 2 / 3),  # a word counts as often as both have it: p = 1/2, r = 1
    ("1066", ["in 1066", "1066", "year 1066"], 1, 1),  # the best of several
    ("October 1973 oil", ["October", "October 1973", "1973"], 0, 4 / 5),  # with the second: p = 2/3, r = 1
    ("blue whale", ["red whale", "blue green whale song"], 0, 2 / 3),  # 1/2; p = 1, r = 2/4
    ("", ["Denver Broncos"], 0, 0),
    ("...", ["Denver Broncos"], 0, 0),  # empty after normalisation
    ("The", ["a"], 1, 0),  # both empty: equal, but no word is shared
    ("1,000", ["1000"], 1, 1),
    ("3.5 million", ["35 million"], 1, 1),  # the decimal point is punctuation too
    ("7 million", ["seven million"], 0, 1 / 2),  # p = r = 1/2
    ("$50", ["50"], 1, 1),
    ("£50", ["50"], 0, 0),  # only ASCII punctuation goes
    ("U.S. Army", ["US army"], 1, 1),
    ("mother-in-law", ["mother in law"], 0, 0),  # one word: motherinlaw
    ("Beyoncé", ["Beyonce"], 0, 0),  # accents stay
    ("ÉCOLE normale", ["école Normale"], 1, 1),
    ("“Café” society", ['"café" society'], 0, 1 / 2),  # curly quotes stay: p = r = 1/2
    ("10\u00a0km", ["10 km"], 1, 1),  # a no-break space is white space
]


@pytest.mark.parametrize(("prediction", "golds", "em", "f1"), SQUAD_CASES)
def test_squad_by_hand(prediction, golds, em, f1):
    assert exact_match(prediction, golds) == em
    assert token_f1(prediction, golds) == pytest.approx(f1, abs=1e-12)


def test_squad_score_is_the_mean_in_percent():
    cases = [("the 1066", ["in 1066", "1066"]), ("Broncos", ["Denver Broncos"]), ("", ["x"]), ("y", ["z"])]
    made = make_examples("squad", [golds for _, golds in cases])
    figures = score("squad", [prediction for prediction, _ in cases], made)
    assert figures == pytest.approx({"exact_match": 100 / 4, "f1": 100 * (1 + 2 / 3) / 4})


@pytest.mark.parametrize(
    ("golds", "predictions", "f1", "accuracy"),
    [
        # hits 2, misses 1, false alarms 1: precision 2/3, recall 2/3; 5 of 7 right
        ([1, 1, 1, 0, 0, 0, 0], ["Yes", "Yes", "No", "Yes", "No", "No", "No"], 2 / 3, 5 / 7),
        # hits 1, misses 2, false alarms 2: what is no answer is wrong on either class
        ([1, 1, 1, 0, 0, 0], ["Yes", "No", "yes", "Yes", "", "No"], 1 / 3, 2 / 6),
        ([1, 1, 0, 0], [1, 0, 1, 0], 1 / 2, 1 / 2),  # labels do as well
        ([1, 1, 1, 0], [1, 1, 1, 1], 6 / 7, 3 / 4),  # precision 3/4, recall 1
        ([1, 0], [0, 1], 0, 0),
        ([0, 0], [0, 0], 0, 1),  # no positive anywhere
    ],
)
def test_f1_of_mrpc_by_hand(golds, predictions, f1, accuracy):
    figures = score("mrpc", predictions, make_examples("mrpc", golds))
    assert figures == pytest.approx({"f1": 100 * f1, "accuracy": 100 * accuracy})


def test_accuracy_of_three_classes():
    made = make_examples("mnli", [0, 1, 2, 2])
    assert score("mnli", [" Yes\n", "Maybe", "Yes", "No."], made) == {"accuracy": 50.0}
    assert score(TASKS["mnli"], [0, 1, 2, 2], made) == {"accuracy": 100.0}


def test_every_example_needs_a_prediction():
    with pytest.raises(VariatorError, match="got 1 predictions for 2 examples"):
        score("rte", ["Yes"], make_examples("rte", [0, 1]))
    with pytest.raises(VariatorError, match="got 0 predictions for 0 examples"):
        score("rte", [], [])


@pytest.mark.parametrize(
    ("text", "label"),
    [("Yes", 0), (" No\n", 2), ("Maybe", 1), ("yes", None), ("Yes.", None), ("Yes No", None), ("", None)],
)
def test_label_from_text(text, label):
    assert label_from_text(TASKS["mnli"], text) == label


@pytest.mark.parametrize(
    ("values", "label"), [([-1.0, -2.0, -3.0], 0), ([-5, -4, float("-inf")], 1), ([-2.0, -1.0, -1.0], 1)]
)
def test_label_from_log_likelihoods(values, label):
    assert label_from_log_likelihoods(TASKS["mnli"], values) == label


def test_log_likelihoods_must_be_one_number_per_answer():
    with pytest.raises(VariatorError, match="got 2 log-likelihoods for 3 answers"):
        label_from_log_likelihoods(TASKS["mnli"], [0.0, 1.0])
    with pytest.raises(VariatorError, match="not a number"):
        label_from_log_likelihoods(TASKS["rte"], [0.0, float("nan")])


# The paper's Table 1: MNLI-m, QNLI, QQP, RTE, SST-2, MRPC, SQuAD EM, SQuAD F1, and the average it prints.
TABLE_1 = {
    "T5-base original": (86.7, 93.0, 91.2, 82.9, 94.3, 92.6, 82.8, 90.0, 89.1),
    "T5-base distillation": (84.6, 91.8, 89.3, 81.4, 93.1, 93.1, 81.1, 89.3, 87.8),
    "T5-base LTP": (84.0, 91.7, 86.5, 76.8, 92.6, 92.5, 81.1, 89.2, 86.4),
    "T5-base Variator": (84.6, 91.5, 88.4, 81.1, 93.6, 93.8, 80.4, 88.1, 87.6),
    "T5-large original": (88.9, 94.0, 91.5, 88.6, 95.4, 93.0, 85.3, 92.5, 91.0),
    "T5-large distillation": (88.4, 94.2, 90.4, 84.3, 94.5, 91.9, 81.3, 90.9, 89.3),
    "T5-large LTP": (87.0, 93.1, 88.0, 82.5, 94.4, 93.3, 84.3, 91.7, 88.9),
    "T5-large Variator": (87.1, 93.5, 89.4, 85.4, 93.7, 92.8, 83.1, 90.7, 89.3),
}


@pytest.mark.parametrize("row", TABLE_1)
def test_average_is_the_papers(row):
    mnli, qnli, qqp, rte, sst2, mrpc, em, f1, printed = TABLE_1[row]
    accuracies = dict(mnli=mnli, qnli=qnli, qqp=qqp, rte=rte, sst2=sst2)
    scores = {name: {"accuracy": value} for name, value in accuracies.items()}
    scores |= {"mrpc": {"f1": mrpc, "accuracy": 0.0}, "squad": {"exact_match": em, "f1": f1}}
    # Its cells are rounded, and the average of T5-base LTP's is 86.46, printed as 86.4.
    assert average(scores) == pytest.approx(printed, abs=0.1)
    with pytest.raises(VariatorError, match="scores are missing for squad"):
        average({name: figures for name, figures in scores.items() if name != "squad"})
