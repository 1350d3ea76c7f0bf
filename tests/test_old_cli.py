"""Recipes, plugin flags, and how errors are shown."""

from __future__ import annotations

import pytest

from llm_variator import VariatorConfig, VariatorError
from llm_variator import old_cli as cli


def build() -> cli.Parser:
    parser = cli.Parser(prog="prog")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=cli.positive_int, default=5)
    parser.add_argument("--rate", type=cli.positive_float, default=0.5)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--loss", choices=["mse", "mse+kl"], default="mse")
    parser.add_argument("--pair", type=int, nargs=2)
    parser.add_argument("--data", nargs="+", default=["x"])
    cli.add_variator_flags(parser)
    return parser


def parse(tmp_path, recipe: str, *argv: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe, encoding="utf-8")
    return cli.parse(build(), ["--config", str(file), *argv])


def test_recipe_values_go_through_their_flags(tmp_path):
    args = parse(
        tmp_path,
        """
        model: tiny
        steps: 7
        rate: 1e-3
        resume: true
        pair: [3, 4]
        data: [a, b]
        k: {ffn: 2, kv: 4}
        sites: [ffn, kv]
        layers: 0-2,5
        k_per_layer: {ffn: [1, 2]}
        r: null
        """,
    )
    assert (args.model, args.steps, args.rate, args.resume) == ("tiny", 7, 1e-3, True)
    assert (args.pair, args.data) == ([3, 4], ["a", "b"])
    assert (args.k, args.sites, args.layers) == ({"ffn": 2, "kv": 4}, ("ffn", "kv"), (0, 1, 2, 5))
    assert args.k_per_layer == {"ffn": [1, 2]}
    assert not hasattr(args, "r")
    assert args.loss == "mse"


def test_command_line_overrides_the_recipe(tmp_path):
    args = parse(tmp_path, "model: tiny\nsteps: 7\ndata: [a, b]\n", "--steps", "9", "--data", "c", "--k", "3")
    assert (args.model, args.steps, args.data, args.k) == ("tiny", 9, ["c"], 3)


def test_recipe_serves_sub_commands(tmp_path):
    parser = cli.Parser(prog="prog")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("one").add_argument("--size", type=int, default=1)
    commands.add_parser("two").add_argument("--speed", type=int, required=True)
    file = tmp_path / "recipe.yaml"
    file.write_text("speed: 3\n", encoding="utf-8")
    assert cli.parse(parser, ["two", "--config", str(file)]).speed == 3
    with pytest.raises(VariatorError, match="unknown key 'speed'"):
        cli.parse(build_two(), ["one", "--config", str(file)])


def build_two() -> cli.Parser:
    parser = cli.Parser(prog="prog")
    parser.add_subparsers(dest="command", required=True).add_parser("one").add_argument("--size", type=int)
    return parser


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("model: tiny\nstep: 3\n", "unknown key 'step'; did you mean 'steps'"),
        ("model: tiny\nqqq: 3\n", "unknown key 'qqq'; known keys: .*data"),
        ("model: tiny\nconfig: other.yaml\n", "unknown key 'config'"),
        ("model: tiny\nsteps: many\n", "steps: .*whole number"),
        ("model: tiny\nsteps: 2.5\n", "steps: .*whole number"),
        ("model: tiny\nsteps: true\n", "steps: .*got True"),
        ("model: tiny\nsteps: [1, 2]\n", "steps: expected one value, got a list"),
        ("model: tiny\nsteps: {a: 1}\n", "steps: expected a plain value, got a mapping"),
        ("model: tiny\ndata: [[a], b]\n", "data: expected plain values in the list"),
        ("model: tiny\npair: [1, 2, 3]\n", "pair: "),
        ("model: tiny\nresume: maybe\n", "resume: expected true or false"),
        ("model: tiny\nloss: l1\n", "loss: .*mse"),
        ("model: tiny\nk_per_layer: 3\n", "k_per_layer: .*JSON object"),
        ("- model\n- tiny\n", "expected a mapping"),
        ("just text", "expected a mapping"),
        ("", "expected a mapping"),
        ("model: [unclosed\n", "not a YAML file"),
    ],
)
def test_bad_recipe_names_file_and_key(tmp_path, recipe, message):
    with pytest.raises(VariatorError, match=rf"recipe .*recipe\.yaml: {message}"):
        parse(tmp_path, recipe)


def test_missing_recipe_names_the_file():
    with pytest.raises(VariatorError, match=r"recipe nowhere\.yaml: cannot be read"):
        cli.parse(build(), ["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model"),
        (["--model", "m", "--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["--model", "m", "--rate", "-1"], "--rate: expected a number above 0"),
        (["--model", "m", "--rate", "nan"], "--rate: expected a number above 0"),
        (["--model", "m", "--ste", "3"], "unrecognized arguments: --ste"),
        (["--model", "m", "--k", "two"], "--k: expected a whole number or one per site"),
        (["--model", "m", "--k", "ffn=two"], "--k: expected a whole number or one per site"),
        (["--model", "m", "--layers", "3-1"], "--layers: expected layer numbers"),
        (["--model", "m", "--k-per-layer", "{"], "--k-per-layer: expected a JSON object"),
    ],
)
def test_bad_flag_is_an_error_that_names_it(argv, message):
    with pytest.raises(VariatorError, match=message):
        cli.parse(build(), argv)


def test_plugin_flags_make_a_config():
    argv = "--model m --k ffn=2,kv=4 --sites kv,ffn --r 8 --layers 0-2,5 --dense-tail 7 --activation tanh"
    assert cli.variator_config_from(cli.parse(build(), argv.split())) == VariatorConfig(
        k={"ffn": 2, "kv": 4}, sites=("ffn", "kv"), r=8, layers=(0, 1, 2, 5), dense_tail=7, activation="tanh"
    )
    assert cli.variator_config_from(cli.parse(build(), ["--model", "m"])) == VariatorConfig()


def test_preset_gives_way_to_flags():
    args = cli.parse(build(), ["--model", "m", "--preset", "paper", "--k", "2", "--dense-tail", "9"])
    assert cli.variator_config_from(args) == VariatorConfig.paper(2, dense_tail=9)
    assert cli.variator_flags_given(args) == ["--preset", "--k", "--dense-tail"]


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
