"""The page: every number traced to its file, missing and broken results, charts, and a look with a real browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from browser import NAMES, browsing, find_browser, look

from llm_variator import VariatorError
from llm_variator.report.__main__ import main
from llm_variator.report.charts import Drawing, Series, inline, save
from llm_variator.report.labels import beside
from llm_variator.report.paper_parts import paper
from llm_variator.report.results import Node, Problem, read_results

ROOT = Path(__file__).parents[2]
STORED = ROOT / "eval" / "results"


class Numbers(html.parser.HTMLParser):
    """The numbers of a page with their origin, and the ids it defines and refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[dict[str, str]] = []
        self.ids: list[str] = []
        self.targets: set[str] = set()
        self._inside: dict[str, str] | None = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        if "id" in about:
            self.ids.append(about["id"])
        if tag == "a" and about.get("href", "").startswith("#"):
            self.targets.add(about["href"][1:])
        if tag == "a" and about.get("class") == "n":
            self._inside = about | {"text": ""}

    def handle_data(self, data):
        if self._inside is not None:
            self._inside["text"] += data

    def handle_endtag(self, tag):
        if tag == "a" and self._inside is not None:
            self.found.append(self._inside)
            self._inside = None


def write_page(results: Path, folder: Path) -> str:
    main(["--results", str(results), "--output", str(folder / "report.html")])
    return (folder / "report.html").read_text(encoding="utf-8")


def resolve(document, pointer: str):
    """The value at a JSON pointer (RFC 6901)."""
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        document = document[int(name)] if isinstance(document, list) else document[name]
    return document


def table_result(title: str, cells: dict, **more) -> dict:
    figures = {"title": title, "model": "m", "cells": cells, "averages": {}, "costs": {}, "paper": {}}
    return {
        "figures": figures | more,
        "command": "python -m llm_variator.tables x",
        "versions": {},
        "machine": {},
    }


def cell(score: float) -> dict:
    return {"score": {"accuracy": score}, "data": {"measured on": "sst2/validation: all 872"}, "steps": 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The results of this repository and made-up ones of every kind that it may lack."""
    folder = tmp_path_factory.mktemp("results")
    for file in STORED.glob("*.json"):
        shutil.copy(file, folder)
    ratios = {f"k={k}": {"sst2": cell(90 - k / 2)} for k in (2, 4, 8)}
    ratios |= {"Original": {"sst2": cell(93.0)}}
    made = {
        "small-figure3": table_result("Figure 3: compression ratios, m", ratios),
        "small-figure4": table_result("Figure 4: backbone sizes, m", {"Original": {"sst2": cell(93.0)}}),
        "small-table1": table_result(
            "Table 1: main results, m",
            {"w/o ~ odd": {"sst2": cell(50.04)}, "Variator": {"squad": {"score": {"exact_match": 1.0, "f1": 2.0}}},
             "LTP": {"sst2": cell(60.0) | {"spread": {"accuracy": 0.21}},
                     "squad": {"score": {"exact_match": 52.1, "f1": 61.0},
                               "spread": {"exact_match": 1.3, "f1": 0.4}}}},
            costs={"Variator": {"parameters": 0.94, "operations": 56.5}},
        ),
        "smoke-table3": table_result("Table 3, smoke", {"Original": {"rte": cell(12.3)}}),
        "bench-prefill": {
            "figures": {
                "model": "llama-7b",
                "layers": 4,
                "rows": [
                    {"case": case, "tokens": n, "batch": 1, "ms": 10.0 * n, "of_dense": 0.7, "of_dense_low": 0.6,
                     "of_dense_high": 0.8, "bound": 0.55}
                    for n in (128, 512) for case in ("dense", "ffn k=2")
                ],
            }
        },
        "analysis": {
            "figures": {
                "model": "made/up",
                "activated": {"1": [0.25, 0.5], "2": [0.2, None]},
                "activated_mean": {"1": 0.375, "2": 0.2},
                "sets": {"2": {"c_and_i_of_i": 0.9, "c_and_u_of_c": 0.8, "chance_i": 0.1, "chance_u": 0.3}},
                "definition": {"name": "nonzero", "activation": "relu"},
                "plugins": {"2": {"training": "untrained: means"}},
            }
        },
    }  # fmt: skip
    for name, content in made.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory) -> str:
    return write_page(folder, tmp_path_factory.mktemp("page"))


# --- where numbers come from


def test_every_number_is_in_its_file(page, folder):
    numbers = Numbers(page).found
    assert len(numbers) > 300
    for number in numbers:
        document = json.loads((folder / number["data-file"]).read_text(encoding="utf-8"))
        value, form = resolve(document, number["data-key"]), number["data-format"]
        value = value * float(number["data-scale"]) if number["data-scale"] != "1.0" else value
        assert format(int(value) if form.endswith("d") else value, form) == number["text"], number


def test_every_link_has_its_target_and_ids_are_unique(page):
    read = Numbers(page)
    assert read.targets <= set(read.ids)
    assert len(read.ids) == len(set(read.ids))


def test_page_needs_nothing_else(page):
    assert not re.search(r"(?:src|@import|url\()\s*=?\s*[\"']?(?:https?:)?//", page)
    assert "<script" not in page
    links = re.findall(r'href="([^"#][^"]*)"', page)
    assert {link.rsplit(".", 1)[-1] for link in links if not link.startswith("data:")} == {"json"}


def test_sources_show_the_command(page, folder):
    for file in STORED.glob("*.json"):
        command = json.loads(file.read_text(encoding="utf-8"))["command"]
        assert command.split()[2] in page
    assert "python -m llm_variator.tables x" in page


# --- the paper beside ours


def test_ours_stands_above_the_papers(page):
    row = page[page.index("Table 1: main results, m") :]
    row = row[row.index('<th scope="row">Variator</th>') :]
    row = row[: row.index("</tr>")]
    assert row.count(">missing<") == 7  # six tasks and the average; SQuAD and the costs are there
    assert "80.4/88.1" in row
    assert ">1.0</a>/<a" in row
    assert ">0.9</a>" in row


def test_spread_between_seeds_stands_beside_the_mean_and_is_explained(page):
    table = page[page.index("Table 1: main results, m") :]
    row = table[table.index('<th scope="row">LTP</th>') :]
    row = re.sub("<[^>]*>", "", row[: row.index("</tr>")])
    assert "60.0 ± 0.2" in row
    assert "52.1 ± 1.3/61.0 ± 0.4" in row
    assert "the standard deviation between adaptations" in table[: table.index("</section>")]


def test_results_that_only_prove_that_they_run_stay_out_of_the_tables(tmp_path, folder):
    results = tmp_path / "results"
    results.mkdir()
    shutil.copy(folder / "smoke-table3.json", results)
    page = write_page(results, tmp_path)
    tables = page[page.index('<section id="tables"') : page.index('<section id="inside"')]
    assert "12.3" not in tables
    assert "Table 3: none of our runs is stored" in tables


def test_the_papers_rows_are_those_of_the_recipes():
    for table in paper()["tables"]:
        recipe = yaml.safe_load((ROOT / "recipes/tables/paper" / table["recipe"]).read_text(encoding="utf-8"))
        costs = {"parameters", "operations"}
        printed = {
            name: {task: value for task, value in row.items() if task not in costs}
            for name, row in table["rows"].items()
        }
        assert printed == recipe["paper"]
        assert table["columns"] == recipe["columns"]


def test_all_tables_and_figures_of_the_paper_have_a_place(tmp_path):
    (tmp_path / "empty").mkdir()
    empty = write_page(tmp_path / "empty", tmp_path)
    for number in range(1, 9):
        assert f"Table {number}" in empty
    for number in (3, 4, 5):
        assert f"Figure {number}" in empty
    assert empty.count(">missing<") > 20


# --- which results hold


def frontier(
    losses: dict, *, date: str, by: str | None = None, command: str = "", f1: dict | None = None
) -> dict:
    def row(name, loss):
        return {"condition": name, "above_dense": loss, "above_dense_error": 0.01, "operations": 1 - loss,
                "kv_entries": 0.5 + loss}  # fmt: skip

    figures: dict = {
        "model": "m",
        "continuation": 8,
        "texts": [{"data": "d", "context": 9, "windows": 2, "rows": [row(n, v) for n, v in losses.items()]}],
    }
    if f1:
        rows = [
            {"condition": n, "f1": 20 + v, "f1_above_dense": v, "f1_above_dense_error": 2.0}
            for n, v in f1.items()
        ]
        figures["questions"] = {"data": "q", "rows": rows}
    return {"figures": figures, "date": date, "command": command} | ({"superseded_by": by} if by else {})


def of(tmp_path, **files: dict) -> str:
    (tmp_path / "results").mkdir()
    for name, content in files.items():
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return write_page(tmp_path / "results", tmp_path)


def part(page: str, anchor: str) -> str:
    start = page.index(f'<section id="{anchor}"')
    return page[start : page.index("</section>", start)]


def test_superseded_results_are_shown_last_and_decide_nothing(tmp_path):
    """`a` comes first by name, and its plugin loses less than the current one: still nothing is read from it."""
    plugin = "smollm2-135m/k2"
    page = of(
        tmp_path,
        a=frontier({"dense": 0.0, plugin: 0.031}, date="2026-01-02", by="b.json"),
        b=frontier({"dense": 0.0, plugin: 0.123}, date="2026-01-01"),
    )
    origins = [
        number["data-file"] for number in Numbers(page[: page.index('<section id="superseded"')]).found
    ]
    assert set(origins) == {"b.json"}
    assert "+0.123" in page[: page.index("</header>")]
    last = part(page, "superseded")
    assert "+0.031" in last
    assert "Superseded by b.json." in last
    assert page.index('id="superseded"') > page.index('id="operations"')


@pytest.mark.parametrize("by", ["nowhere.json", "a.json", "c.json", 7, ""])
def test_a_result_superseded_by_nothing_current_is_a_problem(by, tmp_path, capsys):
    both = {"dense": 0.0, "smollm2-135m/k2": 0.2}
    page = of(
        tmp_path,
        a=frontier(both, date="1") | {"superseded_by": by},
        c=frontier(both, date="1", by="b.json"),
        b=frontier(both, date="2"),
    )
    assert "not shown: a.json" in capsys.readouterr().out
    assert "which is no current result in this folder" in page


def test_conditions_of_all_files_are_one_frontier_the_newest_counts_and_a_conflict_is_told(tmp_path):
    page = of(
        tmp_path,
        a=frontier({"dense": 0.0, "x": 0.3, "y": 0.1}, date="2026-01-01"),
        b=frontier({"dense": 0.0, "x": 0.2, "z": 0.4}, date="2026-01-02"),
    )
    quality = part(page, "quality")
    assert quality.count("<figure") == 2  # against compute, against memory
    assert quality.count("<table>") == 1
    assert re.findall(r'scope="row">([^<]+)', quality) == ["dense", "y", "x", "z"]
    assert "+0.200" in quality
    assert "+0.300" not in quality
    assert "x is 0.300 in a.json, and 0.200 in the newer b.json, which is shown" in quality


def test_a_shipped_plugin_is_itself_under_any_label(tmp_path):
    page = of(
        tmp_path,
        a=frontier(
            {"dense": 0.0, "mine": 0.1}, date="1", command="python -m x --plugin mine=smollm2-135m/kv4"
        ),
        b=frontier({"dense": 0.0, "smollm2-135m/kv4": 0.1}, date="2"),
    )
    rows = re.findall(r'scope="row">([^<]+)', part(page, "quality"))
    assert rows == ["dense", "smollm2-135m/kv4"]


def test_choices_keep_answers_where_answers_matter(tmp_path):
    """By hand: k4 is cheapest, but its answers may be 14 points below; of the rest kv4 has the smaller cache."""
    losses = {"dense": 0.0, "smollm2-135m/k2": 0.3, "smollm2-135m/kv4": 0.2, "smollm2-135m/k4": 0.4}
    f1 = {"dense": 0.0, "smollm2-135m/k2": -0.9, "smollm2-135m/kv4": -1.0, "smollm2-135m/k4": -10.0}
    content = frontier(losses, date="1", f1=f1)
    head = of(tmp_path, a=content).partition("</header>")[0]
    assert re.findall(r'class="value">([^<]+)', head) == ["k2", "kv4", "k4"]


def test_what_was_not_asked_is_not_recommended_for_answers(tmp_path):
    head = of(tmp_path, a=frontier({"dense": 0.0, "smollm2-135m/k2": 0.3}, date="1")).partition("</header>")[
        0
    ]
    assert re.findall(r'class="label">([^<]+)', head) == ["Cheapest, for text that only goes on"]


def test_the_page_says_of_the_shipped_plugins_what_the_readme_says(page):
    """The README's table by hand, against the first screen."""
    head = page[: page.index("</header>")]
    assert re.findall(r'class="value">([^<]+)', head) == ["kv4", "kv4", "k8"]
    assert ">35.8</a>" in head, "of questions in the prompt; the README gives those that come after it"
    for figure in ("+0.104", "0.487", "+0.004", "0.415"):
        assert f">{figure}</a>" in head
        assert figure in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "+0.031" not in page[: page.index('<section id="superseded"')]


def test_stored_results_of_earlier_plugins_say_so():
    results, problems = read_results(STORED)
    assert problems == []
    assert {r.name for r in results if "earlier" in r.name} <= {r.name for r in results if r.superseded_by}


# --- broken and strange files


BROKEN = {
    "truncated": '{"figures": {"model": "a", "cells": {"x": ',
    "empty": "",
    "binary": "\x00\x01",
    "list": "[1, 2, 3]",
    "number": "7",
    "foreign": '{"name": "package", "dependencies": {}}',
    "no figures": '{"figures": null, "command": "x"}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_and_nothing_else_suffers(name, tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    good = STORED / "llama-7b-k2-flops.json"
    shutil.copy(good, results)
    (results / f"{name}.json").write_text(BROKEN[name], encoding="utf-8")
    page = write_page(results, tmp_path)
    assert f"not shown: {name}.json" in capsys.readouterr().out
    assert f"<h3>{name}.json</h3>" in page
    assert "giga-operations" in page


STRANGE = [7, "text", [[]], [{"case": 3}], {"a": None}, {"1": "x"}]


@pytest.mark.parametrize("strange", STRANGE, ids=repr)
def test_files_of_an_unknown_version_never_break_the_page(strange, tmp_path):
    """Each part of each stored result is replaced by something else, one kind of thing at a time."""
    results = tmp_path / "results"
    results.mkdir()
    keys = ("texts", "questions", "quality", "prefill", "rows", "cells", "sets", "activated", "activated_mean",
            "weights", "drift", "tokens", "sensitivity", "reconstruction", "prompts", "definition", "config", "title",
            "plugins", "model", "costs", "averages", "paper", "entries", "last_wins")  # fmt: skip
    whole = {key: {"a": {"b": {"c": 1.0}}} for key in keys} | {"title": "Table 1: main results"}
    for key in keys:
        content = {
            "figures": whole | {key: strange},
            "machine": strange,
            "versions": strange,
            "command": strange,
        }
        (results / f"{key}.json").write_text(json.dumps(content), encoding="utf-8")
    page = write_page(results, tmp_path)
    assert "could not be shown" not in page


def test_stored_results_break_no_section(page):
    assert "could not be shown" not in page


def test_parts_of_stored_results_break_no_section(folder, tmp_path):
    """As after a run that was killed: of every file only its first so many characters' worth of keys."""
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        figures = content["figures"]
        half = dict(list(figures.items())[: len(figures) // 2])
        (tmp_path / file.name).write_text(json.dumps({"figures": half}), encoding="utf-8")
    assert "could not be shown" not in write_page(tmp_path, tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(VariatorError, match="no such folder"):
        main(["--results", str(tmp_path / "nowhere"), "--output", str(tmp_path / "page.html")])


def test_nodes_give_nothing_for_what_is_not_there():
    node = Node("f.json", "", {"a": [1, True, float("nan")], "b/c": {"~": 2}})
    assert node["a"][0].number == 1
    assert node["a"][1].number is None  # a truth value is no number
    assert node["a"][2].show() is None
    assert node["a"]["x"]["y"][3].value is None
    assert node["b/c"]["~"].key == "/b~1c/~0"
    assert node["b/c"]["~"].show("d").text == "2"
    assert list(node["b/c"]) == []


def test_unreadable_files_are_problems(tmp_path):
    (tmp_path / "x.json").mkdir()
    (tmp_path / "latin.json").write_bytes(b'{"figures": "\xe9"}')
    results, problems = read_results(tmp_path)
    assert not results
    assert [type(each) for each in problems] == [Problem, Problem]


# --- drawings


DRAWING = Drawing(
    "one", "x", "y", [Series("a", [(2, 1.0), (4, 3.0)]), Series("b", [(2, 2.0)], line=False)], log2=True
)


def test_inline_drawing_takes_the_pages_colours():
    svg = inline(DRAWING)
    assert svg.startswith("<svg")
    assert "var(--c1)" in svg
    assert not re.search(r"#(?:1f6fb2|1f2328|d5dae1)", svg)
    assert not re.search(r"[\s;:]#[0-9a-f]{6}", svg), "a colour that dark mode cannot change"
    assert all(found.startswith("one-") for found in re.findall(r'id="([^"]+)"', svg))
    assert svg == inline(DRAWING), "the same result must give the same page"


def test_labels_cover_no_other_label_and_no_point():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), dpi=72)
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    points = [(x, y) for x in (2, 5) for y in (3, 3.2, 3.4, 3.6)]
    beside(axes, points, [f"label {i}" for i in range(8)], 8)
    boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*axes.transData.transform(point)) for box in boxes for point in points)


def test_saved_drawings_are_whole_files(tmp_path):
    svg, png = save(DRAWING, tmp_path)
    assert "<svg" in svg.read_text(encoding="utf-8")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_figures_for_papers(folder, tmp_path):
    main(
        [
            "--results",
            str(folder),
            "--output",
            str(tmp_path / "r.html"),
            "--figures",
            str(tmp_path / "figures"),
        ]
    )
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert {"figure3.svg", "figure3.png", "figure5.svg", "bench-bench-prefill.svg"} <= names


# --- in a browser


@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(width, folder, tmp_path):
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser to open the page with: set CHROME, or install one of {', '.join(NAMES)}")
    write_page(folder, tmp_path)
    overflow = "document.documentElement.scrollWidth - window.innerWidth"
    small = (
        "Math.min(...[...document.querySelectorAll('.drawing text')].map(t => "
        "t.getBoundingClientRect().height).filter(h => h > 0))"
    )
    drawn = "[...document.querySelectorAll('.drawing svg')].filter(s => s.getBoundingClientRect().width > 200).length"
    with browsing(program) as browser:
        for dark in (False, True):
            ask = {"overflow": overflow, "small": small, "drawn": drawn}
            seen = look(browser, tmp_path / "report.html", width=width, dark=dark, ask=ask)
            assert seen.complaints == []
            assert seen.answers["overflow"] <= 0, "the page scrolls sideways"
            assert seen.answers["small"] >= 9, "letters in a drawing are smaller than 9 pixels"
            assert seen.answers["drawn"] >= 5
            assert len(seen.screen) > 50_000
