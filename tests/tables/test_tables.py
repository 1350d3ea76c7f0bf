"""Tables of experiments: recipes, runs that are shared and skipped, and a table that was killed on its way."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_tasks import write_tasks
from transformers import PreTrainedTokenizerBase

from llm_variator import VariatorError, VariatorModel
from llm_variator.sources.models import load_model, load_tokenizer
from llm_variator.tables.__main__ import main
from llm_variator.tables.cost import row_costs
from llm_variator.tables.recipe import read_table
from llm_variator.tables.render import markdown
from llm_variator.tables.runner import Runner, _best_score
from llm_variator.train.least_squares import LeastSquares
from llm_variator.train.trainer import VariatorTrainer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "tables"
SHARED = "t5.yaml"  # what others extend
TABLES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml") if path.name != SHARED)
SMOKE = [name for name in TABLES if name.startswith("smoke/")]
PAPER = [name for name in TABLES if name.startswith("paper/")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Where the smoke tables run; they share their runs."""
    return tmp_path_factory.mktemp("work")


def run(recipe: Path, work: Path, data: Path, *flags: str) -> dict:
    places = ["--runs", str(work / "runs"), "--results", str(work / "results"), "--data-dir", str(data)]
    main([str(recipe), *places, *flags])
    files = list((work / "results").glob(f"*{recipe.stem}.json"))
    return json.loads(files[0].read_text(encoding="utf-8"))["figures"]


# --- the recipes of this repository


@pytest.mark.parametrize("name", TABLES)
def test_every_flag_of_every_run_is_known(name):
    table = read_table(FOLDER / name)
    planned: list[str] = []
    runner = Runner(table, Path("nowhere"), dry=True, say=planned.append)
    assert all(runner.cell(row, task) == {} for row in table.rows for task in table.columns)
    assert len(planned) >= len(table.columns) * (len(table.rows) - 1)
    assert len(planned) == len(set(planned)), "a run that could be shared is planned twice"
    first = (FOLDER / name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# python -m llm_variator.tables recipes/tables/{name}")


@pytest.mark.parametrize("name", SMOKE)
def test_smoke_tables_run(name, work, data, tmp_path):
    flags = []
    if name == "smoke/figure4.yaml":  # a LoRA names its base, which must be found again
        load_model("tiny-t5", random_init=True).save_pretrained(tmp_path)
        load_tokenizer("tiny-t5", stand_in=True).save_pretrained(tmp_path)
        flags = ["--model", str(tmp_path)]
    figures = run(FOLDER / name, work, data, *flags)
    table = read_table(FOLDER / name)
    assert list(figures["cells"]) == [row.name for row in table.rows]
    for columns in figures["cells"].values():
        assert list(columns) == list(table.columns)
        for cell in columns.values():
            assert all(0 <= value <= 100 for value in cell["score"].values())
            assert "of" in cell["data"]["measured on"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("paper/table1.yaml", {"Variator": 0.9, "LTP": 100.0, "Distillation": 61.9}),
        ("paper/table1-large.yaml", {"Variator": 0.7, "LTP": 100.0, "Distillation": 59.1}),
    ],
)
def test_parameters_are_those_of_the_papers_table_1(name, parameters):
    table = read_table(FOLDER / name)
    costs = row_costs(table, table.model)
    assert {row: round(costs[row]["parameters"], 1) for row in parameters} == parameters
    assert costs["LTP"]["operations"] < costs["Variator"]["operations"] < 60


@pytest.mark.parametrize("layers", ["1-7", [1, 2, 3, 4, 5, 6, 7]])
def test_plugin_flags_of_a_recipe_mean_what_they_mean_on_the_command_line(tmp_path, layers):
    rows = {"whole": {"plugin": {"k": 4}}, "part": {"plugin": {"k": 4, "layers": layers}}}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(GOOD | {"rows": rows}))
    costs = row_costs(read_table(tmp_path / "t.yaml"), "t5-base")
    whole, part = costs["whole"], costs["part"]  # 7 of 12 layers
    assert part["parameters"] == pytest.approx(7 / 12 * whole["parameters"])
    assert part["operations"] > whole["operations"]


def test_site_cross_shows_what_the_decoder_saves(tmp_path):
    rows = {
        "Original": {"method": "original"},
        "KV": {"plugin": {"k": 4, "sites": ["kv"]}, "pretrain": False},
        "cross": {"plugin": {"k": 4, "sites": ["cross"]}, "pretrain": False},
    }
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(GOOD | {"columns": ["squad"], "rows": rows}))
    table = read_table(tmp_path / "t.yaml")
    costs = row_costs(table, "t5-base")

    # T5-base by hand: 12 layers, width 768 in and between the heads, FFN 768 -> 3072 -> 768, 32,128 tokens
    def decoding(states):
        own = 2 * 32 * (6 * 768**2 + 2 * 768 * 3072)
        read = 2 * 2 * 768**2 * states
        scores = 2 * 2 * 768 * (32 * 33 / 2 + 32 * states)
        return 12 * (own + read + scores) + 2 * 32 * 768 * 32128

    merging = 2 * 768 * 4 * 512 + 2 * 768 * 512
    assert costs["cross"]["decoder"] == pytest.approx(100 * (decoding(128) + merging) / decoding(512))
    assert costs["cross"]["cross_entries"] == 25
    assert costs["KV"]["decoder"] == costs["KV"]["cross_entries"] == 100
    text = markdown(table, "tiny", {}, costs)
    assert "operations | decoder's operations | entries of cross-attention |" in text
    assert "| cross | pending | +0.0 % | 100.0 % |" in text
    assert "| Original | pending | 100 % | 100 % | 100 % | 100 % |" in text


@pytest.mark.parametrize("name", PAPER)
def test_paper_tables_build_on_the_meta_device(name):
    table = read_table(FOLDER / name)
    costs = row_costs(table, table.model)
    assert all(0 < cost["parameters"] <= 100 and 0 < cost["operations"] < 100 for cost in costs.values())


# --- wrong recipes


GOOD = {"title": "t", "model": "tiny-t5", "columns": ["rte"], "rows": {"Variator": {"plugin": {"k": 2}}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colums": ["rte"]}, "unknown 'colums'; did you mean 'columns'"),
        ({"columns": ["rtee"]}, "unknown 'rtee'; did you mean 'rte'"),
        ({"rows": {}}, "'rows' is missing"),
        ({"rows": ["A"]}, r"'rows' must be a mapping of names, got \['A'\]"),
        ({"rows": {"A": "ltp"}}, "row 'A' must be a mapping of names, got 'ltp'"),
        ({"rows": {"A": {"plugin": [1]}}}, r"row 'A', plugin must be a mapping of names, got \[1\]"),
        ({"rows": {"A": {"plugin": {"k": 2}, "adapt": True}}}, "row 'A', adapt must be a mapping"),
        ({"columns": [["rte"]]}, r"unknown \['rte'\]"),
        ({"methods": {"ltp": 5}}, "method 'ltp' must be a mapping"),
        ({"methods": {"ltp": {"adapt": 5}}}, "method 'ltp', adapt must be a mapping"),
        ({"tasks": {"squad": 3}}, "task 'squad' must be a mapping"),
        ({"adapt": {"grid": 3}}, "grid of 'adapt' must be a mapping"),
        (
            {"adapt": {"grid": {"learning_rate": 3}}},
            "grid of 'adapt': learning_rate must be a list of values",
        ),
        ({"columns": 3}, "'columns' must be a list of tasks, got 3"),
        ({"extends": "table.yaml"}, "it extends itself"),
        ({"rows": {"A": {"methd": "ltp"}}}, "unknown 'methd'; did you mean 'method'"),
        ({"rows": {"A": {"method": "prune"}}}, "unknown 'prune'; known: distill"),
        ({"rows": {"A": {}}}, "row 'A' needs its plugin flags"),
        ({"paper": {"B": {}}}, "unknown 'B'"),
        ({"methods": {"ltp": {"train": {}}}}, "unknown 'train'"),
        ({"extends": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
        ({"adapt": {"config": "a.yaml"}}, "'adapt': flags stand here, not in a file that config names"),
        (
            {"rows": {"A": {"plugin": {"k": 2}}}, "pretrain": {"grid": {"learning_rate": [1e-4]}}},
            "pretrain has no grid",
        ),
        ({"seeds": 0}, "seeds: 0 is no number of adaptations; give 1 or more"),
        ({"seeds": [0, 1]}, "is no number of adaptations"),
        ({"seeds": 2, "adapt": {"grid": {"seed": [0, 1]}}}, "seeds counts up from one whole number"),
        ({"seeds": 2, "options": {"seed": "a"}}, "seeds counts up from one whole number"),
    ],
)
def test_wrong_recipe(tmp_path, change, message):
    file = tmp_path / "table.yaml"
    file.write_text(yaml.safe_dump(GOOD | change), encoding="utf-8")
    with pytest.raises(VariatorError, match=message):
        read_table(file)


def test_wrong_flag_of_a_run_is_found_before_anything_runs(tmp_path, data):
    file = tmp_path / "table.yaml"
    file.write_text(yaml.safe_dump(GOOD | {"adapt": {"max_stepps": 3}}), encoding="utf-8")
    with pytest.raises(VariatorError, match="max-stepps"):
        main([str(file), "--runs", str(tmp_path / "runs"), "--data-dir", str(data)])
    assert not (tmp_path / "runs").exists()


def test_unknown_row_or_column_is_refused(tmp_path, data):
    with pytest.raises(VariatorError, match="has no row 'Orignal'; it has Original"):
        run(FOLDER / "smoke/table1.yaml", tmp_path, data, "--rows", "Orignal")
    with pytest.raises(VariatorError, match="has no column 'mnli'"):
        run(FOLDER / "smoke/table1.yaml", tmp_path, data, "--columns", "mnli")


# --- settings


def test_the_more_particular_flags_win(tmp_path):
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump(GOOD | {"adapt": {"max_steps": 1, "seed": 1}, "options": {"seed": 0, "r": 2}})
    )
    rows = {"LTP": {"method": "ltp", "adapt": {"seed": 4}}}
    over = {"extends": "base.yaml", "rows": rows, "methods": {"ltp": {"adapt": {"seed": 3, "keep": 0.5}}}}
    over |= {"tasks": {"rte": {"seed": 2, "max_length": 9}}}
    (tmp_path / "over.yaml").write_text(yaml.safe_dump(over))
    table = read_table(tmp_path / "over.yaml")
    row = table.rows[-1]
    assert row.name == "LTP"
    assert table.flags("adapt", row, "rte") == dict(seed=4, r=2, max_steps=1, max_length=9, keep=0.5)
    assert table.flags("adapt") == dict(seed=1, r=2, max_steps=1)


def test_what_a_row_says_leaves_the_grid(tmp_path):
    grid = {"learning_rate": [1e-4, 5e-5], "batch_size": [16, 32]}
    rows = {"LTP": {"method": "ltp", "adapt": {"learning_rate": 1e-3}}}
    recipe = GOOD | {"adapt": {"grid": grid}, "tasks": {"rte": {"batch_size": 8}}, "rows": rows}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(recipe))
    table = read_table(tmp_path / "t.yaml")
    row = table.rows[-1]
    assert table.flags("adapt", row, "rte").items() >= {"learning_rate": 1e-3, "batch_size": 8}.items()
    assert "grid" not in table.flags("adapt", row, "rte")
    assert table.flags("adapt", row)["grid"] == {"batch_size": [16, 32]}
    assert table.flags("adapt")["grid"] == grid


@pytest.mark.parametrize("more", [{"save_every": 0}, {"seed": 1}])
def test_what_decides_the_result_makes_another_run(tmp_path, more):
    rows = {"A": {"method": "ltp"}, "B": {"method": "ltp", "adapt": more}}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(GOOD | {"rows": rows}))
    table, planned = read_table(tmp_path / "t.yaml"), []
    runner = Runner(table, tmp_path, dry=True, say=planned.append)
    for row in table.rows:
        runner.cell(row, table.columns[0])
    assert len([line for line in planned if line.startswith("adapt")]) == 2


def test_costs_are_those_of_the_plugin_and_student_that_are_made(tmp_path):
    def costs(**row):
        (tmp_path / "t.yaml").write_text(yaml.safe_dump(GOOD | {"rows": {"A": row}}))
        return row_costs(read_table(tmp_path / "t.yaml"), "t5-base")["A"]

    plain = {"plugin": {"k": 4}, "pretrain": False}
    assert (
        costs(**plain, adapt={"r": 256}) == costs(plugin={"k": 4, "r": 256}, pretrain=False) != costs(**plain)
    )
    student = {"method": "distill"}
    made = costs(**student, pretrain={"student_layers": 6})
    assert made == costs(**student, pretrain=False, adapt={"student_layers": 6}) != costs(**student)


def test_grid_takes_the_best_of_all_combinations(tmp_path, data):
    recipe = {
        "extends": str(FOLDER / "smoke" / SHARED),
        "title": "grid",
        "columns": ["rte"],
        "rows": {"Original": {"method": "original"}},
        "finetune": {"grid": {"learning_rate": [1e-3, 0.1], "batch_size": [2, 4]}},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(recipe))
    figures = run(tmp_path / "grid.yaml", tmp_path, data)
    results = [
        json.loads(file.read_text(encoding="utf-8"))["figures"]
        for file in (tmp_path / "runs").glob("finetune-*/training.json")
    ]
    assert len(results) == 4
    best = max(max(score for step, score in result["held_out_history"] if step) for result in results)
    chosen = figures["cells"]["Original"]["rte"]
    assert max(score for step, score in chosen["held_out_history"] if step) == best


def test_best_of_a_grid_does_not_count_what_was_never_kept(tmp_path):
    folders: dict = {
        "its best": (2, [[0, 84.0], [2, 83.8], [4, 83.0]]),
        "its start": (0, [[0, 84.0], [2, 80.0]]),
        "its last": (None, [[0, 84.0], [2, 83.0], [4, 82.0]]),
        "its only one": (None, [[0, 83.9]]),
        "closed form": (None, []),
    }
    for name, (step, history) in folders.items():
        (tmp_path / name).mkdir()
        figures = {"held_out_history": history, "best_step": step, "held_out": {"f1": 83.5, "accuracy": 1.0}}
        (tmp_path / name / "training.json").write_text(json.dumps({"figures": figures}))
    assert [_best_score(tmp_path / name) for name in folders] == [83.8, 84.0, 82.0, 83.9, 83.5]


def test_several_seeds_share_their_teacher_and_show_their_spread(tmp_path, data):
    recipe = {
        "extends": str(FOLDER / "smoke" / SHARED),
        "title": "seeds",
        "seeds": 3,
        "columns": ["mrpc"],
        "adapt": {"max_steps": 4, "learning_rate": 0.05},
        "rows": {"Original": {"method": "original"}, "LTP": {"method": "ltp"}},
    }
    file = tmp_path / "seeds.yaml"
    file.write_text(yaml.safe_dump(recipe))
    cells = run(file, tmp_path, data)["cells"]
    kinds = sorted(folder.name.rsplit("-", 1)[0] for folder in (tmp_path / "runs").iterdir())
    assert kinds == ["adapt-mrpc-ltp"] * 3 + ["finetune-mrpc"]
    assert "spread" not in cells["Original"]["mrpc"]
    cell = cells["LTP"]["mrpc"]
    assert ["--seed=1" in each["command"] for each in cell["runs"]] == [False, True, False]
    for metric, mean in cell["score"].items():
        found = [each["score"][metric] for each in cell["runs"]]
        assert mean == pytest.approx(sum(found) / 3)
        squares = sum((value - mean) ** 2 for value in found)
        assert cell["spread"][metric] == pytest.approx((squares / 2) ** 0.5)
    nats = [each["nats_from_teacher"] for each in cell["runs"]]
    mean = sum(nats) / 3
    spread = (sum((value - mean) ** 2 for value in nats) / 2) ** 0.5
    text = (tmp_path / "results" / f"{tmp_path.name}-seeds.md").read_text(encoding="utf-8")
    assert f"| LTP | {cell['score']['f1']:.1f} ± {cell['spread']['f1']:.1f}/" in text
    assert f"| LTP | {mean:.3f} ± {spread:.3f} |" in text
    for folder in (tmp_path / "runs").glob("adapt-*"):  # one of them is yet to run
        if cell["runs"][1]["command"] in (folder / "training.json").read_text(encoding="utf-8"):
            shutil.rmtree(folder)
    (tmp_path / "results" / f"{tmp_path.name}-seeds.json").unlink()
    again = run(file, tmp_path, data)["cells"]["LTP"]["mrpc"]
    assert (again["score"], again["spread"]) == (cell["score"], cell["spread"])
    recipe["seeds"] = 2
    file.write_text(yaml.safe_dump(recipe))
    table = read_table(file)
    marks = {row.name: table.digest(row, "mrpc", table.model) for row in table.rows}
    assert marks["Original"] == cells["Original"]["mrpc"]["recipe"]
    assert marks["LTP"] != cell["recipe"]


def test_markdown_shows_ours_the_papers_and_what_is_pending(tmp_path):
    (tmp_path / "t.yaml").write_text(
        yaml.safe_dump(GOOD | {"columns": ["rte", "squad"], "paper": {"Variator": {"rte": 81.1}}})
    )
    table = read_table(tmp_path / "t.yaml")
    cell = {"score": {"accuracy": 70.04}, "data": {"measured on": "all"}, "steps": 3}
    costs = {"Variator": {"parameters": 0.94, "operations": 56.5}}
    text = markdown(table, "tiny", {"Variator": {"rte": cell}}, costs)
    assert "| Variator | 70.0 (81.1) | pending | +0.9 % | 56.5 % |" in text


# --- stopping and going on


def figures_only(figures: dict) -> dict:
    """Without what differs between two runs of the same."""
    for columns in figures["cells"].values():
        for cell in columns.values():
            del cell["wall_seconds"], cell["command"]
    return figures


def test_finished_runs_are_not_repeated(work, data):
    first = run(FOLDER / "smoke/table3.yaml", work, data)
    stamps = {file: file.stat().st_mtime_ns for file in (work / "runs").rglob("training.json")}
    again = run(FOLDER / "smoke/table3.yaml", work, data, "--again")
    assert again == first
    assert stamps == {file: file.stat().st_mtime_ns for file in (work / "runs").rglob("training.json")}


def test_stored_cells_outlive_their_runs(tmp_path, data, capsys):
    recipe = FOLDER / "smoke/table3.yaml"
    first = run(recipe, tmp_path, data)
    shutil.rmtree(tmp_path / "runs")
    page = next((tmp_path / "results").glob("*.md"))
    said = page.read_text(encoding="utf-8")
    page.unlink()
    assert run(recipe, tmp_path, data) == first
    assert "--again measures them anew" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == said
    assert not (tmp_path / "runs").exists()
    row, *others = first["cells"]
    run(recipe, tmp_path, data, "--again", "--rows", row)
    assert len(list((tmp_path / "runs").iterdir())) == 1, "the fine-tuned model alone"
    assert others


def test_table_goes_on_where_the_teacher_is_gone(tmp_path, data):
    recipe, rows = FOLDER / "smoke/table3.yaml", ["--rows", "Variator (FFN)"]
    first = run(recipe, tmp_path, data, *rows)
    for folder in (tmp_path / "runs").glob("finetune-*"):
        shutil.rmtree(folder)
    assert run(recipe, tmp_path, data, "--again", *rows, "--dry-run") == first
    assert figures_only(run(recipe, tmp_path, data, "--again", *rows)) == figures_only(first)


def test_what_a_lost_teacher_taught_is_taught_anew(tmp_path, data, monkeypatch):
    recipe = FOLDER / "smoke/table3.yaml"
    run(recipe, tmp_path, data, "--rows", "Variator (FFN)")
    (teacher,) = (tmp_path / "runs").glob("finetune-*")
    (taught,) = (tmp_path / "runs").glob("adapt-*")
    before = (taught / "training.json").read_bytes()
    run(recipe, tmp_path, data, "--again", "--rows", "Variator (FFN)")
    assert (taught / "training.json").read_bytes() == before
    result = json.loads((teacher / "training.json").read_text())
    result["figures"]["loss_history"][-1][1] += 1e-6  # as another machine would have it
    (teacher / "training.json").write_text(json.dumps(result))
    run(recipe, tmp_path, data, "--again", "--rows", "Variator (FFN)", "--dry-run")
    assert (taught / "training.json").read_bytes() == before
    run(recipe, tmp_path, data, "--again", "--rows", "Variator (FFN)")
    assert (taught / "training.json").read_bytes() != before


def test_results_of_another_model_are_not_overwritten(tmp_path, data):
    recipe = FOLDER / "smoke/table3.yaml"
    run(recipe, tmp_path, data, "--rows", "Original")
    with pytest.raises(
        VariatorError, match="has the cells of tiny-t5: give those of t5-small another folder"
    ):
        run(recipe, tmp_path, data, "--model", "t5-small", "--rows", "Original")


def test_column_is_of_one_teacher(tmp_path, data):
    recipe, rows = FOLDER / "smoke/table3.yaml", ["Variator (FFN)", "Variator (Att)"]
    first = run(recipe, tmp_path, data)
    (file,) = (tmp_path / "results").glob("*.json")
    stored = json.loads(file.read_text(encoding="utf-8"))
    cells = stored["figures"]["cells"]
    del cells[rows[0]]["sst2"]
    cells[rows[1]]["sst2"] |= {"teacher": {"accuracy": 12.5}, "score": {"accuracy": 12.5}}
    file.write_text(json.dumps(stored), encoding="utf-8")
    alone = run(recipe, tmp_path, data, "--rows", rows[0])["cells"]
    assert alone[rows[1]]["sst2"]["teacher"] == {"accuracy": 12.5}, "what was not asked for stays"
    file.write_text(json.dumps(stored), encoding="utf-8")
    assert run(recipe, tmp_path, data)["cells"] == first["cells"]


def test_run_stopped_after_least_squares_does_not_fit_again(tmp_path, data, monkeypatch):
    recipe = yaml.safe_load((FOLDER / "smoke/table3.yaml").read_text()) | {
        "extends": str(FOLDER / "smoke" / SHARED)
    }
    start = {"init": "least-squares", "init_tokens": 2000}
    recipe["rows"] = {"fitted": {"plugin": {"k": 4, "r": 4}, "pretrain": False, "adapt": start}}
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(recipe))
    whole = run(file, tmp_path / "whole", data)

    def stopped(trainer, **options):
        if "start" in {path.name for path in Path(trainer.args.output_dir).iterdir()}:
            raise KeyboardInterrupt
        return train(trainer, **options)

    train = VariatorTrainer.train
    with monkeypatch.context() as patch:
        patch.setattr(VariatorTrainer, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(file, tmp_path, data)
    (half,) = (tmp_path / "runs").glob("adapt-*")
    (half / "checkpoint-2").mkdir()  # of which nothing else was written
    monkeypatch.setattr(LeastSquares, "fit", None)
    assert figures_only(run(file, tmp_path, data)) == figures_only(whole)


def test_cells_of_several_teachers_say_so(tmp_path):
    (tmp_path / "t.yaml").write_text(
        yaml.safe_dump(GOOD | {"rows": {"Original": {"method": "original"}, "LTP": {"method": "ltp"}}})
    )
    table = read_table(tmp_path / "t.yaml")
    shown = {"data": {"measured on": "all"}, "steps": 3}
    cells = {
        "Original": {"rte": shown | {"score": {"accuracy": 70.04}}},
        "LTP": {"rte": shown | {"score": {"accuracy": 60.0}, "teacher": {"accuracy": 70.0}}},
    }
    costs = {"LTP": {"parameters": 100.0, "operations": 56.5}}
    assert "several" not in markdown(table, "tiny", cells, costs)
    cells["LTP"]["rte"]["teacher"] = {"accuracy": 71.5}
    assert "Of several fine-tuned models: 70.0, 71.5." in markdown(table, "tiny", cells, costs)


def test_cells_of_another_recipe_are_not_kept(tmp_path, data):
    recipe = {
        "extends": str(FOLDER / "smoke" / SHARED),
        "title": "changing",
        "columns": ["rte", "sst2"],
        "rows": {"Original": {"method": "original"}, "LTP": {"method": "ltp"}},
    }
    file = tmp_path / "changing.yaml"
    file.write_text(yaml.safe_dump(recipe))
    run(file, tmp_path, data, "--columns", "rte")
    recipe["methods"] = {"ltp": {"adapt": {"learning_rate": 2e-3}}}
    file.write_text(yaml.safe_dump(recipe))
    cells = run(file, tmp_path, data, "--columns", "sst2")["cells"]
    assert set(cells["Original"]) == {"rte", "sst2"}
    assert set(cells["LTP"]) == {"sst2"}


@pytest.mark.parametrize("what", ["fine-tuned model", "plugin"])
def test_run_stopped_while_it_is_saved_is_not_done(what, tmp_path, data, monkeypatch):
    recipe, flags = FOLDER / "smoke/table3.yaml", ["--rows", "Variator (FFN)"]
    whole = run(recipe, tmp_path / "whole", data, *flags)
    owner = PreTrainedTokenizerBase if what == "fine-tuned model" else VariatorModel
    save = owner.save_pretrained

    def stop(model, folder, *args, **options):
        if "checkpoint-" not in str(folder):
            raise KeyboardInterrupt
        return save(model, folder, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path, data, *flags)
    assert figures_only(run(recipe, tmp_path, data, *flags)) == figures_only(whole)
    saved = [
        sorted(file.name for file in (tmp_path / place).glob("*/*.*")) for place in ("runs", "whole/runs")
    ]
    assert saved[0] == saved[1]


def test_table_killed_twice_ends_like_the_one_that_was_not(tmp_path, data):
    recipe = {
        "extends": str(FOLDER / "smoke" / SHARED),
        "title": "killed",
        "columns": ["rte", "sst2"],
        "finetune": {"max_steps": 8},
        "adapt": {"max_steps": 12},
        "rows": {"LTP": {"method": "ltp"}, "Variator": {"plugin": {"k": 2, "r": 4}}},
    }
    file = tmp_path / "killed.yaml"
    file.write_text(yaml.safe_dump(recipe))
    whole = run(file, tmp_path / "whole", data)
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "llm_variator.tables", str(file), "--data-dir", str(data)]
    command += ["--runs", str(killed / "runs"), "--results", str(killed / "results")]
    draw = random.Random()

    def entries() -> int:  # os.walk passes over folders that the table deletes meanwhile; rglob raises
        return sum(len(folders) + len(files) for _, folders, files in os.walk(killed))

    said = tmp_path / "said"
    for _ in range(2):
        with said.open("w") as log:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        before = entries()
        while entries() <= before + 3:
            assert process.poll() is None, (
                f"the table ended before it could be killed: {said.read_text()[-500:]}"
            )
            time.sleep(0.01)
        time.sleep(draw.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = figures_only(run(file, killed, data))
    nats = [
        [cell.pop("nats_from_teacher") for columns in figures["cells"].values() for cell in columns.values()]
        for figures in (again, figures_only(whole))
    ]
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)  # float32, measured in another process
    assert again == whole
