"""`python -m llm_variator.report`: one HTML page of all stored results, and its drawings for papers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_variator import old_cli as cli
from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
from llm_variator.report.charts import save
from llm_variator.report.page import build
from llm_variator.report.results import read_results


def build_parser() -> cli.Parser:
    """Every flag of the command."""
    parser = cli.Parser(
        prog="python -m llm_variator.report",
        description="One self-contained HTML page of all stored results: quality against cost, the paper's tables and "
        "figures beside ours, speed against its bound. What is not stored is shown as missing.",
    )
    add = parser.add_argument
    add("--results", type=Path, default=Path("eval/results"), metavar="DIR", help="folder of result files")
    add("--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page")
    add("--figures", type=Path, metavar="DIR", help="write every drawing there too, as SVG and PNG")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    args = cli.parse(build_parser(), list(sys.argv[1:] if argv is None else argv))
    if not args.results.is_dir():
        raise VariatorError(f"--results {args.results}: no such folder; results are stored by --json")
    results, problems = read_results(args.results)
    folder = Path(os.path.relpath(args.results.absolute(), args.output.absolute().parent)).as_posix()
    page = build(results, problems, folder=folder)
    write_atomically(args.output, page.html)
    print(f"{args.output}: {len(results)} result files, {len(page.html) / 1e3:,.0f} kB")
    for problem in problems:
        print(f"not shown: {problem.file}: {problem.reason}")
    if args.figures:
        drawings = [each for each in page.drawings.by_name.values() if any(s.points for s in each.series)]
        files = [file for drawing in drawings for file in save(drawing, args.figures)]
        print(f"{len(files)} files in {args.figures}")


if __name__ == "__main__":
    cli.run(main)
