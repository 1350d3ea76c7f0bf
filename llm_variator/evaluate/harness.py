"""`python -m llm_variator.evaluate harness`: lm-eval's own command line with our model types, tasks and plugins.

lm-eval is imported when its command line is asked for, not before.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants

from llm_variator import old_cli as cli
from llm_variator.errors import VariatorError
from llm_variator.evaluate import table
from llm_variator.sources.corpora import DATA_DIR_VARIABLE, data_folder
from llm_variator.sources.models import hub_reachable, load_config

TASKS = Path(__file__).parents[2] / "eval" / "tasks"
"""The tasks of this repository; an installed package comes without them."""
DEFAULT_MODEL = "smollm2-135m"
_OURS = ("plugin", "k", "data_dir", "compare", "prompt_tokens", "repetitions")


def build_parser() -> argparse.ArgumentParser:
    """lm-eval's flags for a run, and ours beside them."""
    from lm_eval._cli.run import Run

    commands = cli.Parser().add_subparsers()
    Run.create(commands)
    parser: argparse.ArgumentParser = commands.choices["run"]
    parser.prog, parser.usage = "python -m llm_variator.evaluate harness", None
    parser.description = (
        "Run lm-eval with the model types `variator` and `variator-seq2seq` and the tasks of eval/tasks. All of "
        "lm-eval's flags work. --model takes its model types, or a base model as everywhere else in llm_variator."
    )
    parser.epilog = (
        "examples:\n"
        "  --model smollm2-135m --plugin smollm2-135m/k2 --tasks variator_sst2 --limit 200 --data-dir DIR\n"
        "  --model variator --model_args pretrained=smollm2-135m,plugin=smollm2-135m/k2 --tasks hellaswag\n"
        "  --model smollm2-135m --compare none,k2,k4=4 --tasks variator_offline --output_path table.json"
    )
    group = parser.add_argument_group("llm_variator")
    add = group.add_argument
    add("--plugin", metavar="PLUGIN", help="shipped name, folder or hub id (default: none)")
    add(
        "--k",
        type=cli.positive_int,
        help="without --plugin: an untrained one that merges k vectors by their mean",
    )
    add(
        "--data-dir",
        type=Path,
        help=f"local copies TASK/SPLIT.parquet (default: ${DATA_DIR_VARIABLE}, else the hub)",
    )
    add(
        "--compare",
        metavar="LIST",
        help="a table instead of one run: none (the base model), hf (lm-eval's own model type), NAME (a plugin), "
        "LABEL=PLUGIN or LABEL=K (untrained, by means), separated by commas; with --output_path FILE.json it is stored "
        "as FILE.json, FILE.md and FILE.png",
    )
    add(
        "--prompt-tokens",
        type=cli.positive_int,
        nargs="+",
        default=[512, 2048],
        help="with --compare: prompts whose reading is timed (default: 512 2048)",
    )
    add(
        "--repetitions",
        type=cli.natural,
        default=5,
        help="with --compare: of the timing, in turns; 0: nothing is timed (default: 5)",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Run lm-eval, or with --compare once per plugin.

    Raises:
        VariatorError: wrong flags, unknown tasks, or data that is not to be had.
    """
    started = time.perf_counter()
    args = _with_recipe(build_parser().parse_args(list(argv)))
    if args.data_dir is not None:
        os.environ[DATA_DIR_VARIABLE] = str(data_folder(args.data_dir))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    reachable = _go_offline_unless_reachable()
    if TASKS.is_dir():
        args.include_path = [str(TASKS), *([args.include_path] if args.include_path else [])]
    ours = {name: vars(args).pop(name) for name in _OURS}
    try:
        if ours["compare"]:
            if ours["plugin"] or ours["k"] or {"plugin", "k"} & set(args.model_args or ()):
                raise VariatorError("--compare names all plugins itself; leave out plugin and k")
            args.model = args.model or DEFAULT_MODEL
            table.main(args, ours, argv=argv, started=started)
        else:
            _run(args, ours["plugin"], ours["k"])
    except VariatorError:
        raise
    except (OSError, ValueError, KeyError) as error:  # how lm-eval, datasets and transformers say no
        reason = (str(error).strip().strip("'\"") or type(error).__name__).splitlines()[0]
        mend = (
            ""
            if reachable
            else "; the Hugging Face hub does not answer, so only data in its local cache or in --data-dir can be used"
        )
        raise VariatorError(f"{reason}{mend}") from error


def _run(args: argparse.Namespace, plugin: str | None, k: int | None) -> None:
    import lm_eval.models  # noqa: F401  (fills the registry)
    from lm_eval._cli.run import Run
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import setup_logging

    import llm_variator.integrations.harness  # noqa: F401  (registers our model types)

    setup_logging()
    args.model_args = dict(args.model_args or {})
    if args.model is None and "pretrained" in args.model_args:
        args.model = "variator"
    elif args.model is None or args.model not in model_registry:
        args.model_args["pretrained"] = args.model or DEFAULT_MODEL
        args.model = model_type(args.model_args["pretrained"])
    given = {name: value for name, value in (("plugin", plugin), ("k", k)) if value is not None}
    if given and not args.model.startswith("variator"):
        raise VariatorError(f"--plugin and --k need a model of ours, not lm-eval's {args.model!r}")
    args.model_args |= given
    Run._execute(args)


def model_type(model: str) -> str:
    """The lm-eval model type for a base model."""
    return "variator-seq2seq" if load_config(model).is_encoder_decoder else "variator"


def _with_recipe(args: argparse.Namespace) -> argparse.Namespace:
    """`--config FILE`, lm-eval's own and with our flags as further keys; flags given win.

    Raises:
        VariatorError: the file cannot be read or holds an unknown key.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    if not args.config:
        return args
    known = {field.name for field in dataclasses.fields(EvaluatorConfig)} | set(_OURS)
    defaults = vars(build_parser().parse_args([]))
    for key, value in cli.read_recipe(Path(args.config)).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise VariatorError(f"recipe {args.config}: unknown key {key!r}; {mend}")
        if getattr(args, key, None) == defaults.get(key):
            setattr(args, key, Path(value) if key == "data_dir" else value)
    args.config = None
    return args


def _go_offline_unless_reachable() -> bool:
    """Whether the hub answers. If not, its libraries look into their caches only, instead of trying for minutes."""
    if hub_reachable():
        return True
    import datasets

    constants: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    for module in constants:
        module.HF_HUB_OFFLINE = True
    return False
