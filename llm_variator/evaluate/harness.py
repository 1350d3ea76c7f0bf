"""`python -m llm_variator.evaluate harness`: lm-eval's own command line with our model types, tasks and plugins.

lm-eval is imported when its command line is asked for, not before.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import os
import re
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import huggingface_hub.constants

from llm_variator import cli
from llm_variator.cli.values import Natural, PositiveInt, output_file
from llm_variator.config import CONFIG_FILE, WEIGHTS_FILE
from llm_variator.errors import VariatorError
from llm_variator.evaluate import table
from llm_variator.extras import needed
from llm_variator.measures.store import digest
from llm_variator.sources.corpora import DATA_DIR_VARIABLE, data_folder
from llm_variator.sources.models import hub_reachable, load_config, plugin_folder

TASKS = Path(__file__).parents[2] / "eval" / "tasks"
"""The tasks of this repository; an installed package comes without them."""
DEFAULT_MODEL = "smollm2-135m"
_OURS = ("plugin", "k", "keep", "data_dir", "compare", "prompt_tokens", "repetitions")
_PLUGIN = ("plugin", "k", "keep")
"""Those of a run with one plugin."""
_WRONG_ARGUMENT = re.compile("unexpected keyword argument|missing .* required")
_POSITIVE, _NATURAL = get_args(PositiveInt)[1], get_args(Natural)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """lm-eval's tasks and flags, one run or plugins side by side; `harness` itself may be left out."""

    plugin: str | None
    k: int | None
    keep: float | None
    data_dir: Path | None
    compare: str | None
    prompt_tokens: tuple[int, ...]
    repetitions: int
    theirs: Mapping[str, Any]
    """lm-eval's flags."""


class _Parser(argparse.ArgumentParser):
    """Complains by VariatorErrors, and takes no flag abbreviated."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **given})

    def error(self, message: str) -> NoReturn:
        raise VariatorError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    """lm-eval's flags for a run, and ours beside them."""
    commands = _Parser().add_subparsers()
    needed("lm_eval._cli.run", "evaluate harness", "eval").Run.create(commands)
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
        "  --model smollm2-135m --compare none,k2,means4=4 --tasks variator_offline --output_path table.json"
    )
    group = parser.add_argument_group("llm_variator")
    add = group.add_argument
    add("--plugin", metavar="PLUGIN", help="shipped name, folder or hub id (default: none)")
    add(
        "--k",
        type=_POSITIVE,
        help="without --plugin: an untrained one that merges k vectors by their mean",
    )
    add(
        "--keep",
        type=float,
        help="without --plugin: an untrained one that keeps this share of each block's keys, the first of them: 0.5, "
        "0.25, ...",
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
        "LABEL=PLUGIN, LABEL=K (untrained, by means) or LABEL=0.25 (untrained, the first quarter of each block kept), "
        "separated by commas; with --output_path FILE.json it is stored as FILE.json, FILE.md and FILE.png",
    )
    add(
        "--prompt-tokens",
        type=_POSITIVE,
        nargs="+",
        default=[512, 2048],
        help="with --compare: prompts whose reading is timed (default: 512 2048)",
    )
    add(
        "--repetitions",
        type=_NATURAL,
        default=5,
        help="with --compare: of the timing, in turns; 0: nothing is timed (default: 5)",
    )
    return parser


def read(argv: Sequence[str]) -> Settings:
    """The settings that a command line, with its recipe, gives.

    Raises:
        VariatorError: wrong flags, or a recipe that is missing, holds an unknown key or a wrong value of ours.
    """
    parser = _parser()
    theirs = vars(_with_recipe(parser, parser.parse_args(list(argv))))
    ours = {name: theirs.pop(name) for name in _OURS}
    settings = Settings(**ours | {"prompt_tokens": tuple(ours["prompt_tokens"])}, theirs=theirs)
    if settings.compare and (
        any(getattr(settings, name) is not None for name in _PLUGIN)
        or set(_PLUGIN) & set(theirs["model_args"] or ())
    ):
        raise VariatorError("--compare names all plugins itself; leave out plugin, k and keep")
    return settings


def run(settings: Settings, argv: Sequence[str]) -> None:
    """Run lm-eval, or with --compare once per plugin.

    Raises:
        VariatorError: flags that do not fit together, unknown tasks, or data that is not to be had.
    """
    started = time.perf_counter()
    if settings.data_dir is not None:
        os.environ[DATA_DIR_VARIABLE] = str(data_folder(settings.data_dir))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    reachable = _go_offline_unless_reachable()
    try:
        if settings.compare:
            table.run(_comparison(settings, settings.compare), argv, started=started)
        else:
            _run(settings)
    except VariatorError:
        raise
    except TypeError as error:
        if not _WRONG_ARGUMENT.search(str(error)):
            raise
        raise VariatorError(f"--model_args: {error}") from error
    except (OSError, ValueError, KeyError) as error:  # how lm-eval, datasets and transformers say no
        reason = (str(error).strip().strip("'\"") or type(error).__name__).splitlines()[0]
        mend = (
            ""
            if reachable
            else "; the Hugging Face hub does not answer, so only data in its local cache or in --data-dir can be used"
        )
        raise VariatorError(f"{reason}{mend}") from error


def _comparison(settings: Settings, entries: str) -> table.Comparison:
    from lm_eval.config.evaluate_config import EvaluatorConfig

    theirs, arguments = _flags_and_arguments(settings.theirs)
    kind = theirs["model"] if theirs["model"] in _model_types() else None
    if kind is not None and not kind.startswith("variator"):
        raise VariatorError(
            f"--compare is of models of ours: leave --model {kind} out, hf is one of its columns"
        )
    model = _base_of(theirs, arguments) or DEFAULT_MODEL
    if surplus := [name for name in ("log_samples", "predict_only") if theirs.get(name)]:
        raise VariatorError(f"--compare stores figures, no samples: leave out --{' and --'.join(surplus)}")
    parsed = table.parse_entries(entries, model)
    if theirs["use_cache"]:
        raise VariatorError(
            "--use_cache knows requests, not plugins: all columns would be the same; leave it out"
        )
    output = Path(theirs["output_path"]) if theirs["output_path"] else None
    if output and output.suffix == ".json":
        try:
            output_file(output)
        except argparse.ArgumentTypeError as error:
            raise VariatorError(f"--output_path: {error}") from None
    elif output:
        raise VariatorError(f"--output_path {output}: with --compare give a file that ends in .json")
    arguments["pretrained"] = model
    return table.Comparison(
        model=model,
        entries=parsed,
        prompt_tokens=settings.prompt_tokens,
        repetitions=settings.repetitions,
        output=output,
        config=EvaluatorConfig.from_cli(_for_lm_eval(theirs, model_type(model), arguments)),
    )


def _run(settings: Settings) -> None:
    from lm_eval._cli.run import Run
    from lm_eval.utils import setup_logging

    setup_logging()
    theirs, arguments = _flags_and_arguments(settings.theirs)
    model, base = theirs["model"], _base_of(theirs, arguments)
    if model is None or model not in _model_types():
        arguments["pretrained"] = base or DEFAULT_MODEL
        model = model_type(arguments["pretrained"])
    given = {name: getattr(settings, name) for name in _PLUGIN}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not model.startswith("variator"):
        raise VariatorError(f"--plugin, --k and --keep need a model of ours, not lm-eval's {model!r}")
    arguments |= given
    if theirs["use_cache"]:
        theirs["use_cache"] = cache_file(theirs["use_cache"], model, arguments)
    Run._execute(_for_lm_eval(theirs, model, arguments))


def _model_types() -> Container[str]:
    """Those that lm-eval knows, ours among them."""
    import lm_eval.models  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import model_registry

    import llm_variator.integrations.harness  # noqa: F401  (registers our model types)

    known: Container[str] = model_registry
    return known


def _flags_and_arguments(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """lm-eval's flags and the arguments of the model, of which some are flags as well."""
    flags, arguments = dict(given), dict(given["model_args"] or {})
    for name in ("batch_size", "max_batch_size", "device"):
        if name in arguments:
            value = arguments.pop(name)
            if flags.get(name) is not None and str(flags[name]) != str(value):
                raise VariatorError(
                    f"--{name} {flags[name]} and {name}={value} in --model_args: leave one out"
                )
            flags[name] = value
    return flags, arguments


def _base_of(flags: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    """The base model, by --model where that is no model type, or by its argument `pretrained`."""
    named, base = flags["model"], arguments.get("pretrained")
    if named is None or named in _model_types():
        return base
    if base not in (None, named):
        raise VariatorError(f"--model {named} and pretrained={base} are two models: leave one out")
    return str(named)


def _for_lm_eval(theirs: Mapping[str, Any], model: str, arguments: Mapping[str, Any]) -> argparse.Namespace:
    folders = [theirs["include_path"]] if theirs["include_path"] else []
    own = {"include_path": [str(TASKS), *folders]} if TASKS.is_dir() else {}
    return argparse.Namespace(**{**theirs, **own, "model": model, "model_args": dict(arguments)})


def cache_file(path: str, model: str, arguments: Mapping[str, Any]) -> str:
    """lm-eval's cache file, one per model: its type, its base as it is held, its plugin or ratio.

    lm-eval itself keys answers by their requests only, and would give one model's to the next.

    Raises:
        VariatorError: there is no such plugin.
    """
    about = {"type": model, **{name: str(value) for name, value in arguments.items()}}
    if (plugin := about.get("plugin", "none")) not in ("", "none", "None"):
        folder = plugin_folder(plugin)  # may be trained again where it lies
        contents = [(folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)]
        about["plugin"] = hashlib.sha256(b"".join(contents)).hexdigest()
    return f"{path}-{digest(about)}"


def model_type(model: str) -> str:
    """The lm-eval model type for a base model."""
    return "variator-seq2seq" if load_config(model).is_encoder_decoder else "variator"


def _with_recipe(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """`--config FILE`, lm-eval's own and with our flags as further keys; flags given win.

    Raises:
        VariatorError: the file cannot be read, holds an unknown key, or a wrong value of ours.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    if not args.config:
        return args
    known = {field.name for field in dataclasses.fields(EvaluatorConfig)} | set(_OURS)
    defaults = vars(parser.parse_args([]))
    for key, value in cli.read_recipe(Path(args.config)).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise VariatorError(f"recipe {args.config}: unknown key {key!r}; {mend}")
        if getattr(args, key, None) != defaults.get(key):
            continue
        if key in _OURS:
            try:
                words = map(str, value if isinstance(value, list) else [value])
                value = getattr(parser.parse_args([cli.spelled(key), *words]), key)
            except VariatorError as error:
                raise VariatorError(f"recipe {args.config}: {error}") from None
        setattr(args, key, value)
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
