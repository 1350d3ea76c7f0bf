"""The page: sections from results, rendered by a template into one file that needs nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

import llm_variator
from llm_variator.report.blocks import Chart, Choice, Missing, Section, Table
from llm_variator.report.choice import RULE, choices
from llm_variator.report.drawings import Drawings
from llm_variator.report.frontier_parts import frontier_section
from llm_variator.report.inside_parts import inside_section, rest_section, superseded_section
from llm_variator.report.paper_parts import figures_section, tables_section
from llm_variator.report.results import Problem, Result
from llm_variator.report.user_parts import operations_section, speed_section, tasks_section


@dataclasses.dataclass(frozen=True)
class Source:
    """Where numbers come from: a file and its circumstances, as far as it tells them."""

    name: str
    facts: Sequence[tuple[str, str]]
    command: str


@dataclasses.dataclass(frozen=True)
class Page:
    """A rendered page and its drawings."""

    html: str
    drawings: Drawings
    sections: Sequence[Section]


def build(results: Sequence[Result], problems: Sequence[Problem], *, folder: str) -> Page:
    """The page of these results; `folder` is the way from the page to their files.

    A section that a strange file breaks is shown as missing, with the reason; the others are not touched.
    """
    drawings = Drawings()
    current = [result for result in results if not result.superseded_by]
    parts: list[tuple[str, Callable[[], Section]]] = [
        ("Quality against cost", lambda: frontier_section(current, drawings)),
        ("Tasks of lm-eval", lambda: tasks_section(current)),
        ("Speed against its bound", lambda: speed_section(current, drawings)),
        ("Figures of the paper", lambda: figures_section(current, drawings)),
        ("Tables of the paper", lambda: tables_section(current)),
        ("Inside a plugin", lambda: inside_section(current, drawings)),
        ("Operations by arithmetic", lambda: operations_section(current)),
    ]
    sections = [_guarded(title, make) for title, make in parts]
    shown = {name for section in sections for block in section.blocks for name in _sources(block)}
    rest = rest_section(current, shown)
    if rest is not None:
        sections.append(rest)
    if len(current) < len(results):
        sections.append(_guarded("Superseded", lambda: superseded_section(results)))
    chosen: Sequence[Choice] = ()
    no_choice = "no text was read with a shipped plugin"
    try:
        chosen = choices(current)
    except Exception as error:  # as in `_guarded`
        no_choice = f"{type(error).__name__}: {error}"
    html = (
        _environment()
        .get_template("page.html.j2")
        .render(
            version=llm_variator.__version__,
            written=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
            choices=chosen,
            no_choice=no_choice,
            rule=RULE,
            sections=sections,
            sources=[_source(result) for result in results],
            problems=problems,
            folder=folder,
            anchor=drawings.slug,
        )
    )
    return Page(html, drawings, sections)


def _guarded(title: str, make: Callable[[], Section]) -> Section:
    try:
        return make()
    except Exception as error:  # one strange file must not take the page with it
        reason = f"{title} could not be shown ({type(error).__name__}: {error})"
        return Section(Drawings.slug(title), title, "", [Missing(reason, "")])


def _sources(block: Table | Chart | Missing) -> Sequence[str]:
    return () if isinstance(block, Missing) else block.sources


def _source(result: Result) -> Source:
    root = result.root
    versions = ", ".join(f"{name} {node.text}" for name, node in root["versions"].items())
    machine = root["machine"]
    parts = [machine["cpu"].text]
    if machine["cores"].number is not None:
        parts.append(f"{machine['cores'].number} cores")
    if machine["memory_gib"].number is not None:
        parts.append(f"{machine['memory_gib'].number} GiB")
    parts += [node.text for node in machine["gpu"]]
    facts = [
        ("superseded by", result.superseded_by),
        ("machine", ", ".join(filter(None, parts))),
        ("versions", versions),
        ("seed", "" if root["seed"].number is None else f"{root['seed'].number}"),
        ("date", root["date"].text),
        ("commit", root["commit"].text[:12] + ("-dirty" if root["commit"].text.endswith("-dirty") else "")),
        ("wall time", "" if root["wall_seconds"].number is None else f"{root['wall_seconds'].number:,.0f} s"),
    ]
    return Source(result.name, [fact for fact in facts if fact[1]], root["command"].text)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["number"] = lambda value: _is(value, "Number")
    environment.tests["paper"] = lambda value: _is(value, "Paper")
    environment.tests["pair"] = lambda value: _is(value, "Pair")
    return environment


def _is(value: Any, kind: str) -> bool:
    return type(value).__name__ == kind
