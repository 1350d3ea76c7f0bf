"""Every recipe opens with its launch command, and that command accepts it."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from llm_variator import VariatorConfig, cli
from llm_variator.config import BaseSignature
from llm_variator.sources.models import load_config
from llm_variator.train import __main__ as train

ROOT = Path(__file__).parent.parent
RECIPES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "recipes").rglob("*.yaml")
    if not {"tables", "accelerate"} & set(path.parts)
)
LAUNCHERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes/accelerate").glob("*.yaml"))


def launch(recipe: str, monkeypatch):
    """The settings that the command in the recipe's first line makes."""
    monkeypatch.chdir(ROOT)
    words = command_of(recipe)
    assert recipe in words, "the launch command names the recipe itself"
    return importlib.import_module(f"{words[2]}.__main__").read(words[3:])


def command_of(recipe: str) -> list[str]:
    """The command in the first line, as words from `python -m` on; `accelerate launch`'s own flags are left out."""
    first = (ROOT / recipe).read_text(encoding="utf-8").splitlines()[0]
    words = shlex.split(first.removeprefix("#"))
    if words[:2] == ["accelerate", "launch"]:
        assert words[2] == "--config_file"
        assert (ROOT / words[3]).is_file()
        words = ["python", *words[4:]]
    assert words[:2] == ["python", "-m"]
    return words


def test_there_are_recipes():
    assert {"recipes/demo.yaml", "recipes/smollm2-135m/k2.yaml", "recipes/llama-7b/k2.yaml"} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_launch_command_reads_every_key(recipe, monkeypatch):
    settings = launch(recipe, monkeypatch)
    for key, value in cli.read_recipe(ROOT / recipe).items():
        read = getattr(settings, key)
        assert (list(read) if isinstance(read, tuple) else read) == value or str(read) == str(value), key


@pytest.mark.parametrize("recipe", RECIPES)
def test_plugin_fits_the_model(recipe, monkeypatch):
    settings = launch(recipe, monkeypatch)
    config = settings.plugin_config()
    # or what an earlier recipe makes of it
    model = load_config("t5-11b" if (ROOT / recipe).parent.name == "t5-11b" else settings.model)
    signature = BaseSignature("base", model.model_type, model.hidden_size, model.num_hidden_layers)
    assert isinstance(config.resolved(signature, decoder=True), VariatorConfig)


def test_plugins_that_are_joined_have_the_same_dense_ends():
    """The FFN plugin is another recipe's output, the scores are made by the command in the comment."""
    made = {read["output"]: read for name in RECIPES if "output" in (read := cli.read_recipe(ROOT / name))}
    joined = [name for name in RECIPES if len(cli.read_recipe(ROOT / name).get("plugin", ())) > 1]
    assert len(joined) == 3
    for name in joined:
        ffn, scores = cli.read_recipe(ROOT / name)["plugin"]
        comment = " ".join(re.findall(r"(?m)^#\s*(.*?)\\?$", (ROOT / name).read_text(encoding="utf-8")))
        tail, output = re.search(r"--dense-tail (\d+)\s+--output (\S+)", comment).groups()
        assert output == scores, name
        assert int(tail) == made[ffn]["dense_tail"], name
        assert made["runs/smollm2-135m-kv4"]["dense_head"] == made[ffn]["dense_head"], name


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_go_before_the_recipe(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = train.read(["--config", recipe, "--max-steps", "7", "--seed", "3"])
    assert (settings.max_steps, settings.seed) == (7, 3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_machine_path(recipe):
    assert not re.search(r"(?<![\w.])(/|~/)\w", (ROOT / recipe).read_text(encoding="utf-8"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_accelerate_takes_its_configuration(launcher):
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    config = config_args.load_config_from_file(str(ROOT / launcher))
    assert config.num_processes == 8
    assert config.distributed_type == ("FSDP" if "fsdp" in launcher else "MULTI_GPU")
    words = command_of(launcher)
    assert (ROOT / words[words.index("--config") + 1]).is_file()


def test_fsdp_is_configured_as_the_trainer_wants_it():
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    fsdp = config_args.load_config_from_file(str(ROOT / "recipes/accelerate/fsdp-8.yaml")).fsdp_config
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_cpu_ram_efficient_loading"] is False
