"""All tests in several environments, with the versions that each of them has: what `make test-matrix` runs.

    python eval/matrix.py oldest=.venv-oldest locked=.venv newest=.venv-newest --output eval/results/test-matrix.json

Each environment is a folder with a virtual environment; the tests of one end before those of the next begin. The
result is written whatever the outcome; the command ends with status 1 where a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from llm_variator.measures.results import write_result

DECISIVE = "accelerate datasets huggingface_hub lm_eval numpy peft safetensors tokenizers torch transformers"
_ASK = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


def run(python: Path, tests: list[str]) -> dict[str, Any]:
    """The tests of the working directory with one interpreter: versions, counts, names of what failed, wall time."""
    asked = subprocess.run(
        [python, "-c", _ASK, *DECISIVE.split()], check=True, capture_output=True, text=True
    )
    versions = json.loads(asked.stdout)
    print("\n==", *(f"{name} {version}" for name, version in versions.items()), flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # the test of what this command writes comes after it
        later = "tests/engine/test_proof.py::test_the_matrix_has_passed_what_is_claimed"
        flags = [
            f"--deselect={later}",
            "-n",
            "2",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *tests,
        ]
        code = subprocess.run(
            [python, "-m", "pytest", *flags], env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
        if not report.is_file():  # pytest itself ended before it could say anything
            report.write_text('<testsuite errors="1" tests="1"/>')
        suite = next(ET.parse(report).getroot().iter("testsuite"))
        cases = [
            case
            for case in suite.iter("testcase")
            if any(case.find(tag) is not None for tag in ("failure", "error"))
        ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases]
    seconds = round(time.perf_counter() - started)
    return {"versions": versions, **counts, "failed": failed, "exit_status": code, "seconds": seconds}


def main() -> None:
    """Run the command line."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environments", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="what pytest gets")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    pythons = {}
    for each in args.environments:
        name, _, folder = each.partition("=")
        pythons[name] = Path(folder) / "bin" / "python"
        if not pythons[name].is_file():
            parser.error(f"{each}: no environment there: run make test-matrix")
    found = {name: run(python, args.tests) for name, python in pythons.items()}
    write_result(
        args.output,
        {"environments": found},
        command=["eval.matrix", *sys.argv[1:]],
        seed=None,
        started=started,
    )
    for name, figures in found.items():
        good = figures["tests"] - figures["failures"] - figures["errors"] - figures["skipped"]
        print(
            f"{name}: transformers {figures['versions']['transformers']}: {good} passed, {figures['skipped']} skipped,",
            f"{figures['failures'] + figures['errors']} failed in {figures['seconds']} s",
        )
    sys.exit(any(figures["exit_status"] for figures in found.values()))


if __name__ == "__main__":
    main()
