"""The tasks of eval/tasks: every YAML loads, its prompts are those of the task table, its lengths hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
from tiny import model_folder

pytest.importorskip("lm_eval")
import datasets.config
import lm_eval.evaluator
import lm_eval.tasks
import pyarrow
import torch
from lm_eval.tasks import TaskManager
from pyarrow import parquet
from transformers import LogitsProcessor

from llm_variator import VariatorError
from llm_variator.evaluate.harness import TASKS
from llm_variator.integrations.harness import VariatorLM, VariatorSeq2SeqLM
from llm_variator.sources.models import byte_tokenizer, load_tokenizer
from llm_variator.sources.tasks import TASKS as TABLE
from llm_variator.sources.tasks import load_examples

KINDS = ("needle", "multi_needle", "variable_tracking", "passages")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three rows of each task."""
    folder = tmp_path_factory.mktemp("data")
    for task in TABLE.values():
        rows = [{task.key: n, **{c: f"{c} {n}" for c in task.columns}} for n in range(3)]
        for n, row in enumerate(rows):
            row[task.target] = (
                n % 2 if task.answers else {"text": [f"Answer {n}", "other"], "answer_start": [0, 0]}
            )
        (folder / task.name).mkdir()
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / task.name / f"{task.validation.name}.parquet"
        )
    return folder


def manager(**metadata) -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)


def load(*names: str, **metadata) -> dict:
    return manager(**metadata).load(list(names))["tasks"]


def requests(task) -> list[tuple]:
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def test_every_file_is_a_task_or_a_group_of_known_ones(data):
    known = manager()
    names = [
        re.search(r"^(?:task|group): (\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        for file in TASKS.rglob("*.yaml")
        if not file.name.startswith("_")
    ]
    assert len(names) == 14 + 2 + 2 + 16 + 5 + 1
    assert all(name and known.match_tasks([name[1]]) == [name[1]] for name in names)


@pytest.mark.parametrize("name", TABLE)
def test_templates_are_those_of_the_table(name, data):
    examples = load_examples(name, "validation", data_dir=data)
    decoder, t5 = load(f"variator_{name}", f"variator_t5_{name}", data_dir=str(data)).values()
    for task, prompt in ((decoder, "decoder_prompt"), (t5, "prompt")):
        asked = requests(task)
        answers = examples[0].task.answers
        if not answers:
            assert [args[0] for args in asked] == [getattr(example, prompt) for example in examples]
            continue
        expected = []
        for example in examples:
            for answer in answers:
                continuation = f" {answer}" if task is decoder else f"<extra_id_0> {answer}"
                expected.append((getattr(example, prompt), continuation))
        assert asked == expected
        gold = [task.doc_to_target(doc) for doc in task.eval_docs]
        assert gold == [example.label for example in examples]


def test_the_right_answer_scores(data):
    rte, mrpc, squad = load("variator_rte", "variator_mrpc", "variator_squad", data_dir=str(data)).values()
    row = dict(enumerate(rte.eval_docs))[1]  # label 1
    assert rte.process_results(row, [(-2.0, False), (-1.0, False)])["acc"] == 1
    assert rte.process_results(row, [(-1.0, False), (-2.0, False)])["acc"] == 0
    assert mrpc.process_results(row, [(-2.0, False), (-1.0, False)])["f1"] == (1, 1)
    row = squad.eval_docs[0]
    assert squad.process_results(row, ["the answer 0."]) == {"exact_match": 1.0, "f1": 1.0}
    assert squad.process_results(row, ["wrong"]) == {"exact_match": 0.0, "f1": 0.0}


def test_an_answer_of_t5_ends_where_training_ends_it(data, flan_t5_small):
    """A fine-tuned T5 writes <extra_id_1> behind its answer, no </s>, and decoding drops the one it wrote."""
    ends = load_tokenizer(flan_t5_small).convert_tokens_to_ids(["<extra_id_1>", "</s>"])
    (task,) = load("variator_t5_squad", data_dir=str(data)).values()
    task.build_all_requests(rank=0, world_size=1)
    assert all(request.args[1]["eos_token_id"] == ends for request in task.instances)
    written = iter(
        [*load_tokenizer(flan_t5_small)("Rome", add_special_tokens=False)["input_ids"], ends[0]] + [1234] * 99
    )

    class Rigged(LogitsProcessor):
        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -1e9)
            forced[:, next(written)] = 0
            return forced

    model = VariatorSeq2SeqLM(str(flan_t5_small), batch_size=3, device="cpu")
    generate = model.model.generate
    model.model.generate = lambda *args, **more: generate(*args, logits_processor=[Rigged()], **more)
    assert model.generate_until(task.instances, disable_tqdm=True) == ["Rome"] * 3


def test_rows_say_where_they_come_from(data):
    (task,) = load("variator_sst2", data_dir=str(data)).values()
    assert task.eval_docs[0]["data"] == "sst2/validation.parquet: 3 of 872 official rows (0.3%)"


def test_data_from_the_environment(data, monkeypatch):
    monkeypatch.setenv("VARIATOR_DATA", str(data))
    assert len(next(iter(load("variator_sst2").values())).eval_docs) == 3


def test_continuation_windows(tmp_path):
    text = " ".join(f"word{n}" for n in range(60_000))
    (task,) = load("variator_continuation").values()
    documents = task.config.custom_dataset
    (tmp_path / "text.txt").write_text(text)
    rows = documents(source=str(tmp_path / "text.txt"))["test"]
    assert len(rows) == 64
    ends = 0
    for row in rows:
        whole = row["context"] + row["continuation"]
        place = text.index(whole)
        assert place >= ends  # windows never overlap
        ends = place + len(whole)
        assert row["continuation"][0] == " "
        assert text[place - 1 : place] in ("", " ")
        assert text[ends : ends + 1] in ("", " ")
        assert 1_990 <= len(row["context"]) <= 2_010
    found = task.process_results(rows[0], [(-12.5, False)])
    assert found["bits_per_byte"] == (-12.5, len(rows[0]["continuation"]))
    assert found["word_perplexity"] == (-12.5, len(rows[0]["continuation"].split()))


@pytest.mark.parametrize("thousands", [2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_retrieval_lengths_answers_and_depths(kind, thousands):
    tokenizer, tokens = byte_tokenizer(), 1024 * thousands
    (task,) = load(f"variator_{kind}_{thousands}k", tokenizer=model_folder()).values()
    rows = task.eval_docs
    make = task.config.custom_dataset
    again = make(kind=kind, tokens=tokens, tokenizer=model_folder())["test"]
    assert rows.to_list() == again.to_list()  # from the seed alone
    other = make(kind=kind, tokens=tokens, seed=1, tokenizer=model_folder())["test"]
    assert rows.to_list() != other.to_list()
    depths = []
    for row in rows:
        used = len(tokenizer(f"{row['prompt']} {row['cue']}")["input_ids"])
        assert 0.8 * tokens <= used <= tokens
        for answer in row["answers"]:
            assert answer in row["prompt"]
            assert answer not in row["cue"]
            assert answer not in row["prompt"].split("\n\n")[-1]  # the question does not give it away
        asked = row["answers"][len(row["answers"]) // 2]
        depths.append(row["prompt"].index(asked) / len(row["prompt"]))
    assert min(depths) < 0.2
    assert max(depths) > 0.8
    right = " " + " and ".join(rows[0]["answers"]) + "."
    assert task.process_results(rows[0], [right]) == {"found": 1.0}
    assert task.process_results(rows[0], [" none of these"]) == {"found": 0.0}


def test_retrieval_prompts_end_with_the_cue():
    (task,) = load("variator_needle_1k", tokenizer=model_folder()).values()
    context, settings = requests(task)[0]
    assert context.endswith(task.eval_docs[0]["cue"])
    assert settings["until"] == ["\n"]


def test_only_one_passage_answers():
    (task,) = load("variator_passages_4k", tokenizer=model_folder()).values()
    for row in task.eval_docs:
        editor = re.search(r"that (.+) edited", row["cue"])[1]
        pairs = re.findall(r"written by (\w+ \w+) and edited by (\w+ \w+)", row["prompt"])
        assert [author for author, name in pairs if name == editor] == row["answers"]
        assert len(pairs) > 3


def test_chains_lead_to_the_answers():
    (task,) = load("variator_variable_tracking_4k", tokenizer=model_folder()).values()
    for row in task.eval_docs:
        values: dict[str, str] = {}
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", row["prompt"]):
            values[name] = values.get(value, value)
        wanted = re.search(r"value (\d+)", row["cue"])[1]
        assert [name for name, value in values.items() if value == wanted] == row["answers"]
        assert len(values) == 6


def test_retrieval_needs_a_tokenizer():
    with pytest.raises(VariatorError, match="metadata tokenizer"):
        load("variator_needle_1k")


def test_hub_tasks_by_name_unchanged(tmp_path, monkeypatch):
    """lm-eval's own `sst2`, whose hub id names a folder made by hand here."""
    folder = tmp_path / "nyu-mll" / "glue"
    folder.mkdir(parents=True)
    rows = [{"sentence": f"text {n}", "label": n % 2, "idx": n} for n in range(4)]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = "".join(f"      - {{split: {split}, path: {split}.jsonl}}\n" for split in ("train", "validation"))
    (folder / "README.md").write_text(f"---\nconfigs:\n  - config_name: sst2\n    data_files:\n{files}---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # asks pip, which is slow
    glue = Path(lm_eval.tasks.__file__).parent / "glue" / "sst2"
    results = lm_eval.simple_evaluate(
        VariatorLM(model_folder(), k=2, device="cpu", batch_size=4),
        tasks=["sst2"],
        task_manager=TaskManager(include_path=str(glue), include_defaults=False),
        bootstrap_iters=0,
    )
    assert 0 <= results["results"]["sst2"]["acc,none"] <= 1
    assert len(results["samples"]["sst2"]) == 4
