"""What is never done silently: code out of files (pickle, remote code), shells, and secrets in files."""

import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import make_decoder, make_variator

from llm_variator import VariatorConfig, VariatorError, VariatorModel

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "llm_variator").rglob("*.py"))
RUNNABLE = [*SOURCES, *sorted((ROOT / "eval").rglob("*.py"))]
# Modules whose `load`s run code out of a file.
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def calls(path: Path) -> list[tuple[int, str, dict[str | None, ast.expr], ast.Call]]:
    """(line, dotted name, keywords, node) of every call in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            found.append((node.lineno, ast.unparse(node.func), keywords, node))
    return found


def test_torch_load_reads_weights_only():
    for path in RUNNABLE:
        for line, name, keywords, _ in calls(path):
            if name == "torch.load":
                value = keywords.get("weights_only")
                assert isinstance(value, ast.Constant), f"{path.name}:{line}"
                assert value.value is True, f"{path.name}:{line}"


def test_nothing_unpickles_evaluates_or_runs_a_shell():
    for path in RUNNABLE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
            if isinstance(node, ast.Import) or node.module in PICKLES
        }
        assert not imported & PICKLES, path.name
        for line, name, keywords, _ in calls(path):
            assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"), (
                f"{path.name}:{line}: {name}"
            )
            shell = keywords.get("shell")
            assert not (isinstance(shell, ast.Constant) and shell.value), f"{path.name}:{line}"


def test_remote_code_is_never_asked_for():
    """Passed as False wherever an Auto class of transformers reads a name that a user gave."""
    seen = 0
    for path in RUNNABLE:
        for line, name, keywords, _ in calls(path):
            if "trust_remote_code" in keywords:
                value = keywords["trust_remote_code"]
                assert isinstance(value, ast.Constant), f"{path.name}:{line}"
                assert value.value is False, f"{path.name}:{line}"
                seen += 1
            elif re.search(r"\b(Auto\w+|auto)\.from_pretrained$", name):
                pytest.fail(f"{path.name}:{line}: {name} without trust_remote_code=False")
    assert seen >= 3


def test_no_file_holds_a_secret():
    pattern = re.compile(
        r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY)"
    )
    for folder in ("llm_variator", "recipes", "eval", "docs", "tests", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".yaml", ".json", ".md", ".txt"):
                assert not pattern.search(path.read_text(encoding="utf-8")), path.name


@pytest.mark.parametrize("name", ["pytorch_model.bin", "variator.bin", "variator.pt", "variator.pth"])
def test_pickled_plugins_are_refused(tmp_path, name):
    model = make_variator("llama", VariatorConfig(k=2))
    model.save_pretrained(tmp_path)
    torch.save(model.plugin().state_dict(), tmp_path / name)
    (tmp_path / "variator.safetensors").unlink()
    base = VariatorModel(make_decoder("llama"))
    with pytest.raises(VariatorError, match=f"{name} is a pickle, which could run code"):
        base.load_plugin(tmp_path, "pickled")
    assert base.plugins == {}


def test_a_pickle_under_the_right_name_is_refused(tmp_path):
    model = make_variator("llama", VariatorConfig(k=2))
    model.save_pretrained(tmp_path)
    torch.save(model.plugin().state_dict(), tmp_path / "variator.safetensors")
    with pytest.raises(VariatorError, match="not a whole safetensors file"):
        VariatorModel(make_decoder("llama")).load_plugin(tmp_path, "pickled")
