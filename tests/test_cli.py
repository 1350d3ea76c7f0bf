"""Settings from flags and recipes, and how errors are shown."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Literal

import pytest

from llm_variator import VariatorConfig, VariatorError, cli
from llm_variator.cli import REQUIRED, flag, flags
from llm_variator.cli.values import PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class Start:
    """Start: how it begins."""

    model: str = flag(REQUIRED, "the model")
    data: tuple[str, ...] = flag(("x",), "where 100% of the text is", metavar="SOURCE")
    resume: bool = flag(False, "go on")
    warm: bool = flag(True, "warm up")


@dataclass(frozen=True, kw_only=True)
class Settings(flags.PluginConfig, Start):
    """Do something."""

    steps: PositiveInt = flag(5, "how many")
    rate: PositiveFloat = flag(0.5, "how fast")
    loss: Literal["mse", "mse+kl"] = flag("mse", "what is learned")
    task: str | None = flag(None, "which task", choices=("sst2", "mnli"))
    pair: tuple[PositiveInt, PositiveInt] | None = flag(None, "least and most", metavar=("MIN", "MAX"))
    plugin: tuple[str, ...] = flag((), "some plugins", repeats=True)
    out: Path | None = flag(None, "a folder")
    data: tuple[str, ...] = ("y",)

    def __post_init__(self) -> None:
        if self.steps > 100:
            raise VariatorError("--steps: at most 100")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Fill a table."""

    file: Path = flag(REQUIRED, "the table", positional=True)
    secret: int = flag(0, "not told", hidden=True)
    least: int = flag(0, "at least")


def read(*argv: str) -> Settings:
    return cli.read(Settings, argv, prog="prog")


def with_recipe(tmp_path, recipe: str, *argv: str) -> Settings:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe, encoding="utf-8")
    return read(*argv, "--config", str(file))


def test_defaults_are_the_dataclasses():
    assert read("--model", "m") == Settings(model="m")
    with pytest.raises(FrozenInstanceError):
        read("--model", "m").steps = 3


def test_recipe_values_are_read_as_flags_are(tmp_path):
    settings = with_recipe(
        tmp_path,
        """
        model: tiny
        steps: 7
        rate: 1e-3
        resume: true
        warm: false
        pair: [3, 4]
        data: [a, b]
        plugin: p
        out: runs/a
        k: {ffn: 2, kv: 4}
        sites: [ffn, kv]
        layers: 0-2,5
        k_per_layer: {ffn: [1, 2]}
        r: null
        """,
    )
    words = (
        "--model tiny --steps 7 --rate 1e-3 --resume --no-warm --pair 3 4 --data a b --plugin p --out runs/a"
    )
    words += " --k ffn=2,kv=4 --sites ffn,kv --layers 0-2,5"
    assert settings == read(*words.split(), "--k-per-layer", '{"ffn": [1, 2]}')
    assert (settings.model, settings.steps, settings.rate, settings.resume) == ("tiny", 7, 1e-3, True)
    assert (settings.pair, settings.data, settings.plugin, settings.warm) == (
        (3, 4),
        ("a", "b"),
        ("p",),
        False,
    )
    assert (settings.k, settings.sites, settings.layers) == ({"ffn": 2, "kv": 4}, ("ffn", "kv"), (0, 1, 2, 5))
    assert settings.k_per_layer == {"ffn": [1, 2]}
    assert (settings.r, settings.loss, settings.out) == (None, "mse", Path("runs/a"))


def test_command_line_overrides_the_recipe(tmp_path):
    recipe = "model: tiny\nsteps: 7\ndata: [a, b]\nplugin: [p, q]\nk: {ffn: 4}\n"
    words = ["--steps", "9", "--data", "c", "--k", "3", "--plugin", "r", "s", "--plugin", "t", "--plugin=u"]
    settings = with_recipe(tmp_path, recipe, *words)
    assert (settings.model, settings.steps, settings.data, settings.k) == ("tiny", 9, ("c",), 3)
    assert settings.plugin == ("r", "s", "t", "u")


def test_texts_stay_as_they_are():
    for text in ("null", "true", "3", "[a]", "{a: 1}", "-1", ""):
        assert read("--model", text).model == text


@dataclass(frozen=True, kw_only=True)
class Several:
    """Take several."""

    some: tuple[str, ...] = flag(("a", "b"), "one at least")
    any: tuple[str, ...] = flag(("a", "b"), "or none", may_be_empty=True)
    places: tuple[Literal["here", "there"], ...] = flag(("here",), "where")


def test_several_values_or_none(tmp_path):
    def read(*argv: str) -> Several:
        return cli.read(Several, argv, prog="prog")

    assert read("--any", "--some", "c").any == ()
    assert read("--some", "c", "--any").any == ()
    assert read().any == ("a", "b")
    assert read("--any", "c", "d").any == ("c", "d")
    assert read("--places", "there", "here").places == ("there", "here")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("any: []\n")
    assert read("--config", str(recipe)).any == ()
    with pytest.raises(VariatorError, match="--some"):
        read("--some", "--any")
    with pytest.raises(VariatorError, match="--places"):
        read("--places", "elsewhere")
    recipe.write_text("some: []\n")
    with pytest.raises(VariatorError, match="some: expected plain values"):
        read("--config", str(recipe))


def test_positionals(tmp_path):
    assert cli.read(Table, ["a.yaml", "--secret", "3"], prog="prog") == Table(file=Path("a.yaml"), secret=3)
    with pytest.raises(VariatorError, match="required: file"):
        cli.read(Table, [], prog="prog")


def test_commands():
    def read(*argv: str) -> object:
        return cli.read_command({"do": Settings, "fill": Table}, argv, prog="prog", text="Do things.")

    assert read("do", "--model", "m") == Settings(model="m")
    assert read("fill", "f") == Table(file=Path("f"))
    with pytest.raises(VariatorError, match=r"see `prog do --help`"):
        read("do", "--nothing")
    for words in (["undo"], ["--model", "m"], []):
        with pytest.raises(VariatorError, match="see `prog --help`"):
            read(*words)
    with pytest.raises(VariatorError, match=r"'undo'.*'do', 'fill'"):
        read("undo")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("model: tiny\nstep: 3\n", "unknown key 'step'; did you mean 'steps'"),
        ("model: tiny\nqqq: 3\n", "unknown key 'qqq'; known keys: .*data"),
        ("model: tiny\nconfig: other.yaml\n", "unknown key 'config'"),
        ("model: tiny\nmodel.name: 3\n", "unknown key 'model.name'"),
        ("model: tiny\nsteps: many\n", "steps: .*whole number"),
        ("model: tiny\nsteps: 2.5\n", "steps: .*whole number"),
        ("model: tiny\nsteps: true\n", "steps: .*got True"),
        ("model: tiny\nsteps: [1, 2]\n", r"steps: expected a whole number of at least 1, got \[1, 2\]"),
        ("model: tiny\nsteps: {a: 1}\n", "steps: expected a whole number of at least 1, got {'a': 1}"),
        ("model: tiny\nsteps: 1000\n", None),
        ("model: [a]\n", r"model: expected str, got \['a'\]"),
        ("model: {a: 1}\n", "model: expected str, got {'a': 1}"),
        ("model: tiny\nr: [1]\n", r"r: expected a whole number, got \[1\]"),
        ("model: tiny\nr: true\n", "r: expected a whole number, got True"),
        ("model: tiny\nr: a\n", "r: expected a whole number, got 'a'"),
        ("model: tiny\nout: [a]\n", "out: expected str, .*PathLike object, not list"),
        ("model: tiny\ndata: [[a], b]\n", r"data: expected plain values in the list, got \[\['a'\], 'b'\]"),
        ("model: tiny\nplugin: [[a], b]\n", "plugin: expected plain values in the list"),
        ("model: tiny\ndata: [1]\n", "data: expected str, got 1"),
        ("model: tiny\ndata: []\n", "data: expected plain values in the list"),
        ("model: tiny\npair: [1, 2, 3]\n", r"pair: expected a list of 2, got \[1, 2, 3\]"),
        ("model: tiny\npair: [1, x]\n", "pair: expected a whole number of at least 1, got 'x'"),
        ("model: tiny\nresume: maybe\n", "resume: expected true or false, got 'maybe'"),
        ("model: tiny\nwarm: 1\n", "warm: expected true or false, got 1"),
        ("model: tiny\nloss: l1\n", "loss: .*mse"),
        ("model: tiny\ntask: l1\n", "task: .*sst2"),
        ("model: tiny\nk: true\n", "k: expected a whole number or one per site"),
        ("model: tiny\nk: 2.5\n", "k: expected a whole number or one per site"),
        ("model: tiny\nk: {null: !!binary ''}\n", "k: expected plain keys"),
        ("model: tiny\nsites: 3\n", "sites: expected names"),
        ("model: tiny\nlayers: {a: 1}\n", "layers: expected layer numbers"),
        ("model: tiny\nk_per_layer: 3\n", "k_per_layer: .*JSON object"),
        ("- model\n- tiny\n", "expected a mapping"),
        ("just text", "expected a mapping"),
        ("", "expected a mapping"),
        ("model: [unclosed\n", "not a YAML file"),
    ],
)
def test_bad_recipe_names_file_and_key(tmp_path, recipe, message):
    with pytest.raises(
        VariatorError, match=rf"recipe .*recipe\.yaml: {message}" if message else "at most 100"
    ):
        with_recipe(tmp_path, recipe)


def test_missing_recipe_names_the_file():
    with pytest.raises(VariatorError, match=r"recipe nowhere\.yaml: cannot be read"):
        read("--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --model; see `prog --help`"),
        (["--model", "m", "--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["--model", "m", "--steps", "2.5"], "--steps: expected a whole number of at least 1, got '2.5'"),
        (["--model", "m", "--steps"], "--steps: expected one argument"),
        (["--model", "m", "--steps", "101"], "--steps: at most 100"),
        (["--model", "m", "--rate", "-1"], "--rate: expected a number above 0"),
        (["--model", "m", "--rate", "nan"], "--rate: expected a number above 0"),
        (["--model", "m", "--r", "x"], "--r: expected a whole number, got 'x'"),
        (["--model", "m", "--ste", "3"], "unrecognized arguments: --ste 3; did you mean --steps"),
        (["--model", "m", "--step=3"], "unrecognized arguments: --step=3; did you mean --steps"),
        (["--model", "m", "--wholly-other"], "unrecognized arguments: --wholly-other; see"),
        (["--model", "m", "--max_steps", "3"], "unrecognized arguments: --max_steps"),
        (["--model", "m", "stray"], "unrecognized arguments: stray"),
        (["--model", "m", "--resume=yes"], "--resume"),
        (["--model", "m", "--loss", "l1"], r"--loss: expected one of \['mse', 'mse\+kl'\], got l1"),
        (["--model", "m", "--task", "l1"], "--task: .*'sst2'"),
        (["--model", "m", "--pair", "1"], "--pair: expected 2 arguments"),
        (["--model", "m", "--k", "two"], "--k: expected a whole number or one per site"),
        (["--model", "m", "--k", "ffn=two"], "--k: expected a whole number or one per site"),
        (["--model", "m", "--layers", "3-1"], "--layers: expected layer numbers"),
        (["--model", "m", "--layers", "0-99999999999"], "--layers: expected layer numbers"),
        (["--model", "m", "--k-per-layer", "{"], "--k-per-layer: expected a JSON object"),
        (["--model", "m", "--k-per-layer", "[" * 100_000], "--k-per-layer: expected a JSON object"),
    ],
)
def test_bad_flag_is_an_error_of_one_line_that_names_it(argv, message):
    with pytest.raises(VariatorError, match=message) as error:
        read(*argv)
    assert "\n" not in str(error.value)


def test_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for wrong in (tmp_path, tmp_path / "file" / "r.json", ""):
        with pytest.raises(VariatorError, match="--json: expected a file that can be written"):
            cli.read(flags.Stored, ["--json", str(wrong)], prog="prog")
    for right in (tmp_path / "file", tmp_path / "new" / "folder" / "r.json"):
        assert cli.read(flags.Stored, ["--json", str(right)], prog="prog").json == right
    assert not (tmp_path / "new").exists()


def test_help_tells_every_flag_with_its_default():
    text = " ".join(cli.parser_of(Settings, prog="prog").format_help().split())
    assert "Do something." in text
    assert "Start: how it begins:" in text
    assert "--model MODEL the model (required)" in text
    assert "--data SOURCE [SOURCE ...] where 100% of the text is (default: y)" in text
    assert "--warm, --no-warm warm up (default: True)" in text
    assert "--steps STEPS how many (default: 5)" in text
    assert "--loss {mse,mse+kl} what is learned (default: mse)" in text
    assert "--pair MIN MAX least and most" in text
    assert "--k-per-layer JSON" in text
    assert "(default: None)" not in text
    other = cli.parser_of(Table, prog="prog").format_help()
    assert "--secret" not in other
    assert "(default: 0)" in other


def test_plugin_flags_make_a_config():
    argv = "--model m --k ffn=2,kv=4 --sites kv,ffn --r 8 --layers 0-2,5 --dense-tail 7 --activation tanh"
    assert read(*argv.split()).plugin_config() == VariatorConfig(
        k={"ffn": 2, "kv": 4}, sites=("ffn", "kv"), r=8, layers=(0, 1, 2, 5), dense_tail=7, activation="tanh"
    )
    assert read("--model", "m").plugin_config() == VariatorConfig()


def test_preset_gives_way_to_flags():
    settings = read("--model", "m", "--preset", "paper", "--k", "2", "--dense-tail", "9")
    assert settings.plugin_config() == VariatorConfig.paper(2, dense_tail=9)
    assert settings.plugin_flags_given() == ["--preset", "--k", "--dense-tail"]


def test_run_prints_one_line_and_exits_with_2(capsys):
    def main(argv):
        raise VariatorError("k must be\n  at least 1")

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: k must be at least 1\n"


def test_run_takes_an_interrupt_politely(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_run_does_not_hide_bugs():
    def main(argv):
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        cli.run(main)
