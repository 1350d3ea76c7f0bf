"""`python -m llm_variator.evaluate harness`: lm-eval's flags, ours, and plugins side by side."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import huggingface_hub.constants
import pyarrow
import pytest
from conftest import make_encoder, prompts
from pyarrow import parquet
from tiny import model_folder

pytest.importorskip("lm_eval")
import datasets.config
import lm_eval.evaluator
import lm_eval.tasks

from llm_variator import VariatorError, VariatorModel
from llm_variator.engine.groups import split
from llm_variator.evaluate import harness
from llm_variator.evaluate.__main__ import main, read
from llm_variator.evaluate.render import Entry
from llm_variator.evaluate.table import agreement, measure_prefill, parse_entries
from llm_variator.integrations.harness import VariatorLM, mean_config
from llm_variator.sources.models import byte_tokenizer, load_model


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network, and nothing that a run sets outlives its test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    (folder / "sst2").mkdir()
    rows = [
        {"idx": n, "sentence": f"sentence number {n}, with words to merge", "label": n % 2} for n in range(4)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "sst2" / "validation.parquet")
    return str(folder)


@pytest.fixture(autouse=True)
def only_our_tasks(monkeypatch):
    """Reading lm-eval's index of some ten thousand tasks takes seconds; the tests that need it ask for it."""
    from lm_eval.tasks import TaskManager

    init = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **given: init(self, **(given | dict(include_defaults=False)))
    )


def words(data: str, *more: str) -> list[str]:
    line = ["harness", "--model", model_folder(), "--tasks", "variator_sst2", "--data-dir", data]
    return [*line, "--limit", "3", "--batch_size", "2", "--device", "cpu", *more]


def test_lm_evals_own_output(data, tmp_path, capsys):
    main(words(data, "--k", "2", "--output_path", str(tmp_path), "--log_samples"))
    assert "variator_sst2" in capsys.readouterr().out
    (results,) = tmp_path.rglob("results_*.json")
    stored = json.loads(results.read_text())
    assert stored["config"]["model"] == "variator"
    assert stored["n-samples"]["variator_sst2"]["effective"] == 3
    assert stored["config"]["model_args"]["k"] == 2
    assert len(list(tmp_path.rglob("samples_variator_sst2_*.jsonl"))) == 1


def test_the_word_harness_may_be_left_out(monkeypatch):
    seen = []
    monkeypatch.setattr(harness, "run", lambda *given: seen.append(given))
    main(["harness", "--tasks", "x"])
    main(["--tasks", "x"])
    assert seen == [(read(["harness", "--tasks", "x"]), ["harness", "--tasks", "x"])] * 2
    assert seen[0][0].theirs["tasks"] == ["x"]


def test_help_names_both_sides(capsys):
    with pytest.raises(SystemExit):
        main(["harness", "--help"])
    printed = capsys.readouterr().out
    for flag in ("--tasks", "--num_fewshot", "--apply_chat_template", "--plugin", "--compare", "--data-dir"):
        assert flag in printed


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("models") / "t5")
    make_encoder("t5", vocab_size=259).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def compare(model: str, data: str, output: Path, *more: str) -> dict:
    line = words(data, "--compare", "hf,none,one=1,k4=4", "--output_path", str(output), *more)
    line[2] = model
    main([*line, "--prompt-tokens", "40", "--repetitions", "1"])
    return json.loads(output.read_text())


def test_side_by_side(data, tmp_path, capsys):
    result = compare(model_folder(), data, tmp_path / "t.json")
    figures = result["figures"]
    assert result["command"].startswith("python -m llm_variator.evaluate harness --model ")
    (row,) = figures["quality"]
    assert (row["task"], row["metric"], row["items"]) == ("variator_sst2", "acc", 3)
    assert row["data"] == "sst2/validation.parquet: 4 of 872 official rows (0.5%)"
    assert list(row["values"]) == ["hf", "none", "one", "k4"]
    found = figures["agreement"]["variator_sst2"]
    assert found["none"]["digest"] == found["hf"]["digest"]
    assert (found["none"]["equal"], found["none"]["largest_difference"]) == (6, 0)
    assert found["one"]["largest_difference"] <= 1e-4
    assert found["k4"]["largest_difference"] > 1e-3
    assert found["k4"]["digest"] != found["hf"]["digest"]
    (cost,) = figures["prefill"]
    entries = split(40, 4, 4, 1).entries
    assert cost["tokens"] == 40
    assert cost["kv_bytes"]["none"] == cost["kv_bytes"]["one"]
    assert cost["kv_bytes"]["k4"] * 40 == cost["kv_bytes"]["none"] * entries
    assert set(cost["seconds"]) == {"none", "one", "k4"}
    text = (tmp_path / "t.md").read_text()
    assert f"| variator_sst2 acc | {row['values']['hf']:.4f} |" in text
    assert "untrained, means, k=4" in text
    assert str(Path(model_folder()).parent) not in text + (tmp_path / "t.json").read_text()
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert "variator_sst2 acc" in capsys.readouterr().out


def test_side_by_side_for_t5(data, t5_folder, tmp_path):
    found = compare(t5_folder, data, tmp_path / "t5.json")["figures"]
    same = found["agreement"]["variator_sst2"]
    assert same["none"]["digest"] == same["hf"]["digest"]
    assert same["one"]["largest_difference"] <= 1e-4
    assert found["prefill"][0]["kv_bytes"] is None


@pytest.mark.parametrize("kind", [[], ["--model", "variator"]])
def test_the_base_and_its_batches_may_be_arguments_of_the_model(data, tmp_path, kind):
    line = ["harness", *kind, "--tasks", "variator_sst2", "--data-dir", data, "--limit", "3"]
    line += ["--model_args", f"pretrained={model_folder()},batch_size=3,device=cpu"]
    main([*line, "--compare", "none", "--repetitions", "0", "--output_path", str(tmp_path / "t.json")])
    figures = json.loads((tmp_path / "t.json").read_text())["figures"]
    assert Path(figures["model"]).name == Path(model_folder()).name
    assert figures["batch_size"] == 3
    main([*line, "--output_path", str(tmp_path / "one")])
    (results,) = (tmp_path / "one").rglob("results_*.json")
    config = json.loads(results.read_text())["config"]
    assert (config["batch_size"], config["model_args"]["pretrained"]) == (3, model_folder())


def test_nothing_timed(data, tmp_path):
    main(words(data, "--compare", "none", "--output_path", str(tmp_path / "t.json"), "--repetitions", "0"))
    assert json.loads((tmp_path / "t.json").read_text())["figures"]["prefill"] == []
    assert (tmp_path / "t.png").is_file()


def test_a_recipe_holds_flags_of_both(data, tmp_path):
    recipe = tmp_path / "table.yaml"
    recipe.write_text(
        f"model: {model_folder()}\ntasks: [variator_sst2]\ncompare: none\ndata_dir: {data}\nlimit: 3\n"
        f"repetitions: 0\nbatch_size: 2\nmodel_args: {{max_length: 300}}\noutput_path: {tmp_path / 'a.json'}\n"
    )
    main(["harness", "--config", str(recipe), "--limit", "2"])
    figures = json.loads((tmp_path / "a.json").read_text())["figures"]
    assert figures["limit"] == 2  # the flag goes before the recipe
    for wrong, message in (("tassks: x", "did you mean 'tasks'"), ("k: two", "--k: expected a whole number")):
        recipe.write_text(f"{wrong}\n")
        with pytest.raises(VariatorError, match=f"table.yaml: .*{message}"):
            main(["harness", "--config", str(recipe)])


def test_cached_answers_are_of_the_same_model(data, tmp_path, monkeypatch):
    def answers(*more: str) -> list:
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        main(words(data, "--output_path", str(output), "--log_samples", *more))
        (samples,) = output.rglob("samples_*.jsonl")
        return [json.loads(line)["resps"] for line in samples.read_text().splitlines()]

    models = ([], ["--k", "2"], ["--k", "4"])
    cache = ["--use_cache", str(tmp_path / "cache" / "answers")]
    expected = [answers(*model) for model in models]
    assert all(one != other for one, other in itertools.combinations(expected, 2))
    assert [answers(*model, *cache) for model in models] == expected
    assert len(list((tmp_path / "cache").glob("answers-*.db"))) == len(models)

    def ask(*given, **how):
        raise AssertionError("asked again")

    monkeypatch.setattr(VariatorLM, "_loglikelihood_tokens", ask)
    assert [answers(*model, *cache) for model in models] == expected


def test_a_cache_belongs_to_base_plugin_and_ratio(tmp_path):
    model = VariatorModel(load_model(model_folder()))
    model.add_plugin("two", mean_config(2))
    model.save_pretrained(tmp_path / "two", plugin_name="two")
    base, trained = {"pretrained": "tiny"}, {"pretrained": "tiny", "plugin": str(tmp_path / "two")}
    arguments = [
        base, base | {"pretrained": "other"}, base | {"dtype": "bfloat16"}, base | {"load_in_4bit": True},
        base | {"k": 2}, base | {"k": 4}, base | {"k": 4, "sites": "kv"}, trained, trained | {"load_in_8bit": True},
    ]  # fmt: skip
    caches = [harness.cache_file("c", "variator", each) for each in arguments]
    assert len({*caches, harness.cache_file("c", "hf", base)}) == len(arguments) + 1
    model.add_plugin("four", mean_config(4))
    model.save_pretrained(tmp_path / "two", plugin_name="four")  # another plugin in its place
    assert harness.cache_file("c", "variator", trained) not in caches
    with pytest.raises(VariatorError, match="nowhere"):
        harness.cache_file("c", "variator", base | {"plugin": "nowhere"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "no_such_task"], "no_such_task"),
        (["--compare", "none,k9"], "no plugin 'k9' is shipped"),
        (["--compare", "none,none"], "every label once"),
        (["--compare", "none", "--plugin", "x/y"], "names all plugins itself"),
        (["--compare", "none", "--model_args", "k=2"], "names all plugins itself"),
        (["--compare", "none", "--use_cache", "c"], "knows requests, not plugins"),
        (["--compare", "none", "--output_path", "folder"], "ends in .json"),
        (
            ["--compare", "none", "--output_path", f"{__file__}/t.json"],
            "--output_path: expected a file that can be",
        ),
        (["--compare", "none,none=2"], "none is a column of its own; give another label"),
        (["--compare", "none", "--log_samples"], "no samples: leave out --log_samples"),
        (["--compare", "none", "--model", "hf"], "hf is one of its columns"),
        (["--model_args", "pretrained=other"], "and pretrained=other are two models"),
        (["--compare", "none", "--model_args", "pretrained=other"], "and pretrained=other are two models"),
        (["--model_args", "device=cuda"], "--device cpu and device=cuda in --model_args: leave one out"),
        (["--model_args", "plugn=x"], "unexpected keyword argument 'plugn'"),
        (["--plugin", "nowhere"], "nowhere"),
        (["--k", "0"], "--k: expected a whole number"),
        (["--use_cache", "c", "--plugin", "nowhere"], "nowhere"),
        (["--no-such-flag"], "no-such-flag"),
        (["--data-dir", "missing"], "data folder missing does not exist"),
        (["--model", "hf", "--plugin", "x/y"], "not lm-eval's 'hf'"),
    ],
)
def test_wrong_input(data, more, message):
    with pytest.raises(VariatorError, match=message):
        main(words(data, *more))


def test_a_hub_task_without_network(data, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    glue = Path(lm_eval.tasks.__file__).parent / "glue" / "sst2"
    with pytest.raises(VariatorError, match="hub does not answer") as raised:
        main(words(data, "--tasks", "sst2", "--include_path", str(glue)))
    assert "nyu-mll/glue" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_entries(tmp_path):
    (tmp_path / "mine").mkdir()
    folder = str(tmp_path / "mine")
    assert parse_entries(f"none, k2,four=4,{folder},x={folder},y=a/b,hf,kept=0.25", "smollm2-135m") == [
        Entry("none"),
        Entry("k2", plugin="smollm2-135m/k2"),
        Entry("four", k=4),
        Entry("mine", plugin=folder),
        Entry("x", plugin=folder),
        Entry("y", plugin="a/b"),
        Entry("hf"),
        Entry("kept", keep=0.25),
    ]
    for wrong in ("", "a=0", "k2"):
        with pytest.raises(VariatorError, match="--compare"):
            parse_entries(wrong, "llama-7b")


def test_agreement_counts():
    def run(*answers) -> dict:
        samples = [
            {"doc_id": n, "filter": "none", "filtered_resps": [answer]} for n, answer in enumerate(answers)
        ]
        return {"samples": {"t": samples[::-1]}}

    found = agreement({"a": run((-1.0, True), (-2.0, False)), "b": run((-1.0, True), (-2.5, False))})["t"]
    assert (found["b"]["equal"], found["b"]["answers"], found["b"]["largest_difference"]) == (1, 2, 0.5)
    wholes = agreement({"a": run(-9.0, -8.0), "b": run(-9.0, -8.25)})["t"]  # log-likelihoods of whole texts
    assert (wholes["b"]["equal"], wholes["b"]["largest_difference"]) == (1, 0.25)
    lists = agreement({"a": run(["x"], ["y"]), "b": run(["x"], ["z"])})["t"]  # of humaneval's filter
    assert (lists["b"]["equal"], lists["b"]["largest_difference"]) == (1, None)
    texts = agreement({"a": run("x", ""), "b": run("x", "z")})["t"]
    assert (texts["b"]["equal"], texts["b"]["largest_difference"]) == (1, None)


def test_prefill_is_timed_in_turns(monkeypatch):
    model = VariatorModel(load_model(model_folder()))
    model.add_plugin("two", mean_config(2))
    turns = []
    forward = VariatorModel.forward

    def noted(self, *args, **kwargs):
        turns.append(self.active_plugin)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(VariatorModel, "forward", noted)
    cost = measure_prefill(model, {"none": None, "two": "two"}, prompts(30)[0], repetitions=2)
    assert turns == [None, "two"] * 3
    assert cost.kv_bytes["two"] < cost.kv_bytes["none"]
    assert all(seconds > 0 for seconds in cost.seconds.values())
