"""Run a table of measurements part by part, each once: what `eval/gpu.sh` hands its table to.

    python eval/gpu.py [--dry] [--minutes M] [--results DIR] [--wheels DIR] [PART ...] < table

A line of the table is `PART SECONDS COMMAND...`: `bench ...` is `python -m llm_variator.bench ... --json FILE`, `pytest
...` counts its tests, and `NAME:bench` leaves the part out, with a line that says so, where package NAME is missing. A
part whose result is in DIR is not run again. One is begun only if it fits into the minutes that are left. What is
finished is copied to $OUT at once, if that is set. `--dry`: all parts in this process.

Packages that are missing or too old come from wheels in the folder `--wheels`, which `eval/gpu-wheels.sh` fills: they
are unpacked beside the results, for these runs alone. Nothing is installed, nothing is asked of a network.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[1]
TESTS = ["pytest", "peft"]
"""What the tests of a GPU import beside what the library needs."""


class Part(NamedTuple):
    """A line of the table."""

    name: str
    seconds: int
    """It is stopped then."""
    needs: str | None
    words: list[str]

    @classmethod
    def of(cls, line: str) -> Part:
        """Read a line."""
        name, seconds, *words = shlex.split(line)
        needs, _, program = words[0].rpartition(":")
        if program not in ("bench", "pytest"):
            sys.exit(f"error: part {name}: unknown command {program}: use bench or pytest")
        return cls(name, int(seconds), needs or None, [program, *words[1:]])

    def command(self, folder: Path) -> list[str]:
        """What follows `python -m`."""
        if self.words[0] == "pytest":
            return ["pytest", "-q", "-rf", "-p", "no:cacheprovider", *self.words[1:]]
        return ["llm_variator.bench", *self.words[1:], "--json", str(self.result(folder))]

    def result(self, folder: Path) -> Path:
        """The file that says that it is done."""
        return folder / f"{self.name}.json"


def unsatisfied(wanted: Iterable[Requirement]) -> list[Requirement]:
    """Those of the requirements that no installed package meets."""
    found = []
    for one in wanted:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not one.specifier.contains(version, prereleases=True):
            found.append(one)
    return found


def bring(wheels: Path, site: Path) -> list[str]:
    """Unpack what is missing, and what that needs, into `site`; the names of the wheels.

    Exits where a wheel is missing too.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    offered = {parse_wheel_filename(file.name)[0]: file for file in sorted(wheels.glob("*.whl"))}
    left, brought = unsatisfied(map(Requirement, [*project["dependencies"], *TESTS])), []
    while left:
        name = canonicalize_name(left[0].name)
        file = offered.get(name)
        if file is None or parse_wheel_filename(file.name)[1] not in left[0].specifier:
            sys.exit(
                f"error: {left[0]} is not installed and not in {wheels}: run eval/gpu-wheels.sh with a network"
            )
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(site)
            metadata = next(item for item in wheel.namelist() if item.endswith(".dist-info/METADATA"))
            headers = HeaderParser().parsestr(wheel.read(metadata).decode())
        brought.append(file.name)
        if str(site) not in sys.path:
            sys.path.insert(0, str(site))
        importlib.invalidate_caches()
        needs = [Requirement(text) for text in headers.get_all("Requires-Dist") or []]
        asked = [one for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
        left = unsatisfied([*left[1:], *asked])
    return brought


def run_apart(part: Part, folder: Path) -> tuple[int, str]:
    """Exit status (124: stopped) and output, in a process of its own."""
    paths = [
        str(ROOT),
        *(path for path in sys.path[:1] if path.endswith("site")),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", *part.command(folder)]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=part.seconds,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired as stopped:
        text = stopped.stdout or b""
        return 124, text.decode(errors="replace") if isinstance(text, bytes) else text
    return done.returncode, done.stdout


def run_here(part: Part, folder: Path) -> tuple[int, str]:
    """The same in this process, which has imported everything already."""
    module, *words = part.command(folder)
    output = io.StringIO()
    with redirect_stdout(output):
        if module == "pytest":
            import pytest

            status = int(pytest.main(words))
        else:
            from llm_variator.bench.__main__ import main as bench
            from llm_variator.errors import VariatorError

            try:
                bench(words)
                status = 0
            except VariatorError as error:
                print(f"error: {error}")
                status = 2
    return status, output.getvalue()


def run(part: Part, folder: Path, *, dry: bool) -> bool:
    """Run a part and store what it printed; whether it did what it should. Tests that fail are a result, too."""
    from llm_variator.measures.results import write_result

    started, result = time.perf_counter(), part.result(folder)
    status, output = (run_here if dry else run_apart)(part, folder)
    result.with_suffix(".log").write_text(output, encoding="utf-8")
    if part.words[0] == "pytest" and status in (0, 1):
        lines = output.strip().splitlines()
        failed = [line.split()[1] for line in lines if line.startswith("FAILED")]
        figures = {"exit_status": status, "summary": lines[-1], "failed": failed}
        write_result(result, figures, command=part.command(folder), seed=None, started=started)
        print(f"   {lines[-1]}", flush=True)
    elif status:
        result.unlink(missing_ok=True)
        print("\n".join(output.strip().splitlines()[-5:]), flush=True)
    for file in (result, result.with_suffix(".log")):
        if os.environ.get("OUT") and file.is_file():
            shutil.copy(file, os.environ["OUT"])
    words = {0: "done", 1: "failed", 124: "stopped: it took too long"}.get(status, f"failed ({status})")
    print(f"== {part.name}: {words}, {time.perf_counter() - started:.0f} s", flush=True)
    return status == 0


def main() -> None:
    """Run the command line; status 1 where a part failed."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="these alone (default: all)")
    parser.add_argument("--dry", action="store_true", help="a rehearsal: everything in this process")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin nothing that may take longer"
    )
    parser.add_argument("--results", type=Path, default=Path("runs/gpu"), metavar="DIR")
    parser.add_argument("--wheels", type=Path, default=Path("runs/gpu-wheels"), metavar="DIR")
    args = parser.parse_args()
    table = [Part.of(line) for line in sys.stdin if line.strip() and not line.startswith("#")]
    if unknown := set(args.parts) - {part.name for part in table}:
        parser.error(
            f"unknown part {', '.join(sorted(unknown))}: use {', '.join(part.name for part in table)}"
        )
    args.results.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT))
    for name in bring(args.wheels, (args.results / "site").absolute()):
        print(f"== from a wheel: {name}", flush=True)
    from llm_variator.measures.results import machine, versions

    print("==", versions(), machine()["gpu"] or "no GPU", flush=True)
    good = True
    for part in table:
        if args.parts and part.name not in args.parts:
            continue
        if part.result(args.results).is_file():
            print(f"== {part.name}: done before", flush=True)
        elif part.needs and importlib.util.find_spec(part.needs) is None:
            print(f"== {part.name}: left out, {part.needs} is not installed", flush=True)
        elif part.seconds > 60 * args.minutes - (time.monotonic() - began):
            print(f"== {part.name}: left for the next run, it may take {part.seconds} s", flush=True)
        else:
            good = run(part, args.results, dry=args.dry) and good
    sys.exit(not good)


if __name__ == "__main__":
    main()
