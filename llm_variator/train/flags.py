"""The flags of `python -m llm_variator.train`, and what they may not say together."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from llm_variator import old_cli as cli
from llm_variator.errors import VariatorError
from llm_variator.sources.corpora import EMBEDDED
from llm_variator.sources.tasks.table import TASKS
from llm_variator.train.losses import LOSSES

STAGES = ("pretrain", "finetune", "adapt")
METHODS = ("variator", "distill", "ltp")
INITS = ("copy", "least-squares")
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}

# Flags that a resumed run may change: all but --max-steps leave what is learned as it was.
FREE_ON_RESUME = frozenset(
    {"config", "data_dir", "device", "eval_every", "logging_every", "max_steps", "name", "output", "resume"}
    | {"save_dtype", "save_every", "save_total_limit", "tensorboard", "drop_checkpoints", "test_limit"}
)


def build_parser() -> cli.Parser:
    """Every flag of the command."""
    parser = cli.Parser(
        prog="python -m llm_variator.train",
        description="Train a compression plugin: the model with it learns to reproduce the model without it. "
        "Also the fine-tuned models it is adapted to, and the baselines it is compared with.",
    )
    add = parser.add_argument
    add("--model", required=True, help="base model: alias, local folder or hub id")
    add(
        "--stage",
        choices=STAGES,
        default="pretrain",
        help="pretrain: on plain text, for any task; finetune: the model itself on a task; adapt: on a task, "
        "with the fine-tuned --model as teacher",
    )
    add("--task", choices=list(TASKS), help="for finetune and adapt")
    add(
        "--method",
        choices=METHODS,
        default="variator",
        help="variator: a plugin; distill: a smaller student; ltp: token pruning (adapt only)",
    )
    add("--name", help="name of the run and of its default output folder (default: from the flags)")
    add("--output", type=Path, metavar="DIR", help="for what is trained and checkpoints (default: runs/NAME)")
    add("--resume", action="store_true", help="go on from the last complete checkpoint in the output folder")
    add("--plugin", metavar="DIR", help="start from this plugin instead of a new one")
    add("--seed", type=cli.natural, default=0, help="of data order, prompt lengths and initial weights")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    add(
        "--dtype",
        help="of the frozen base (default: as stored); weights that are trained are float32, whole models too",
    )
    add("--random-init", action="store_true", help="the model's shape with random weights; no download")
    add("--num-layers", type=cli.positive_int, help="with --random-init: this many layers")
    cli.add_quantize_flag(add)
    cli.add_variator_flags(parser)

    add = parser.add_argument_group("baselines and fine-tuning").add_argument
    add("--lora", action="store_true", help="finetune by LoRA on q and v instead of all weights")
    add("--lora-r", type=cli.positive_int, default=16, help="rank (default: the paper's released code)")
    add("--lora-alpha", type=cli.positive_int, default=32, help="scale, divided by the rank")
    add("--student", metavar="DIR", help="--method distill: start from this student instead of a new one")
    add("--student-layers", type=cli.positive_int, help="encoder layers of a new student (default: by FLOPs)")
    add("--keep", type=cli.positive_float, default=0.25, help="--method ltp: share of tokens with an FFN")

    add = parser.add_argument_group("text (pretrain)").add_argument
    add(
        "--data",
        nargs="+",
        default=[EMBEDDED],
        metavar="SOURCE",
        help="text to train on: NAME[/SPLIT] in --data-dir, a .parquet, .jsonl or .txt file, a folder of "
        "them, a hub dataset name[:config][:split][:column], or task:TASK, a task's training examples as prompts "
        "with answers; several are joined, SOURCE=2 counts twice",
    )
    add(
        "--eval-data",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="held-out text (default: documents of --data, which are then not trained on)",
    )
    add(
        "--data-dir", type=Path, help="folder of local data sets NAME/SPLIT.parquet (default: $VARIATOR_DATA)"
    )
    add(
        "--seq-length", type=cli.positive_int, help="tokens in a window (default: decoders 384, encoders 128)"
    )
    add("--continuation", type=cli.positive_int, default=128, help="last tokens of a window, never prompt")
    add(
        "--prompt-tokens",
        type=cli.positive_int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="prompt length, drawn for each micro-batch (default: half to all of what --continuation leaves)",
    )
    add(
        "--recall",
        type=cli.natural_float,
        default=0.0,
        help="share of a decoder's windows that go on with passages of their prompt: practice in finding them",
    )
    add("--eval-windows", type=cli.positive_int, default=16, help="held-out windows to score")

    add = parser.add_argument_group("task (finetune, adapt)").add_argument
    add("--max-length", type=cli.positive_int, default=512, help="most prompt tokens; longer inputs are cut")
    add("--train-limit", type=cli.positive_int, help="train on so many examples, drawn at random")
    add("--eval-limit", type=cli.positive_int, default=500, help="examples scored at each evaluation")
    add("--test-limit", type=cli.positive_int, help="examples scored at the end (default: all)")
    add("--task-weight", type=cli.natural_float, default=0.0, help="lambda of the task's own loss in adapt")

    add = parser.add_argument_group("optimisation").add_argument
    add("--max-steps", type=cli.positive_int, default=1000, help="optimiser steps")
    add("--batch-size", type=cli.positive_int, default=2, help="rows in a micro-batch, on each device")
    add("--grad-accum", type=cli.positive_int, default=1, help="micro-batches in a step")
    add(
        "--loss",
        choices=sorted(LOSSES),
        default="mse",
        help="mse: hidden states, as in the paper; mse+kl: also the predicted distributions",
    )
    add("--kl-weight", type=cli.natural_float, default=1.0, help="with --loss mse+kl")
    add("--learning-rate", type=cli.positive_float, default=1e-3, help="at its highest")
    add("--schedule", choices=sorted(SCHEDULES), default="linear", help="of the rate after the warm-up")
    add("--warmup-steps", type=cli.natural, default=10, help="in which the learning rate rises from 0")
    add("--weight-decay", type=cli.natural_float, default=0.0, help="of AdamW")
    add("--max-grad-norm", type=cli.natural_float, default=1.0, help="clip gradients to this norm; 0: never")
    add("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, more time")

    add = parser.add_argument_group("start").add_argument
    add(
        "--init",
        choices=INITS,
        default="copy",
        help="of a plugin's adapters. copy: every token gets its group's output, as in the paper. least-squares: the "
        "best linear map in closed form, layer by layer, whatever --plugin holds",
    )
    add("--init-tokens", type=cli.positive_int, default=16384, help="tokens that least squares read")

    add = parser.add_argument_group("logs and checkpoints").add_argument
    add("--eval-every", type=cli.positive_int, default=100, help="steps between held-out evaluations")
    add(
        "--save-every",
        type=cli.natural,
        default=100,
        help="steps between checkpoints; 0: none. finetune and adapt keep the best of them",
    )
    add("--save-total-limit", type=cli.positive_int, default=2, help="checkpoints kept")
    add("--drop-checkpoints", action="store_true", help="delete the checkpoints once the run is finished")
    add("--save-dtype", choices=["float32", "bfloat16"], default="float32", help="of the finished plugin")
    add("--logging-every", type=cli.positive_int, default=10, help="steps between log lines")
    add("--tensorboard", action="store_true", help="write TensorBoard logs to OUTPUT/runs")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise for flags that contradict each other, before anything is loaded."""
    if args.stage != "pretrain" and args.task is None:
        raise VariatorError(f"--stage {args.stage} needs a --task: one of {', '.join(TASKS)}")
    if args.stage == "pretrain" and args.task is not None:
        raise VariatorError("--stage pretrain knows no task: leave --task out, or give --stage adapt")
    if args.stage == "pretrain" and args.method == "ltp":
        raise VariatorError("token pruning has nothing to pre-train: give --stage adapt and a --task")
    if args.stage != "pretrain" and args.recall:
        raise VariatorError("--recall belongs to --stage pretrain")
    if args.stage != "adapt" and args.task_weight:
        raise VariatorError("--task-weight belongs to --stage adapt")
    if args.stage != "finetune" and args.lora:
        raise VariatorError("--lora belongs to --stage finetune")
    if args.recall > 1:
        raise VariatorError(f"--recall is a share of the windows, at most 1; got {args.recall:g}")
    if args.keep > 1:
        raise VariatorError(f"--keep is a share of the tokens, at most 1; got {args.keep:g}")
    is_plugin = args.stage != "finetune" and args.method == "variator"
    if args.quantize and not (is_plugin or args.lora):
        raise VariatorError(
            "--quantize is for a frozen base: train a plugin on it, or add --lora; whole models learn in float32"
        )
    given = cli.variator_flags_given(args) + (["--plugin"] if args.plugin else [])
    if not is_plugin and given:
        what = "--stage finetune" if args.stage == "finetune" else f"--method {args.method}"
        raise VariatorError(f"{what} trains no plugin: leave out {', '.join(given)}")
    if not is_plugin and args.init != "copy":
        raise VariatorError(f"--init {args.init} is for plugins: leave it out")
    if args.plugin and (given := cli.variator_flags_given(args)):
        raise VariatorError(f"--plugin keeps its own configuration: leave out {', '.join(given)}")
    if args.student and args.method != "distill":
        raise VariatorError("--student belongs to --method distill")
    if args.stage != "pretrain" and args.save_every and args.save_every % args.eval_every:
        raise VariatorError(
            f"the best checkpoint can only be kept if --save-every {args.save_every} is a multiple of "
            f"--eval-every {args.eval_every}"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise VariatorError("--device cuda: PyTorch finds no CUDA device here; try --device auto")
    # The Trainer would put torch's DataParallel around the model, whose threads do not see the active plugin.
    if args.device != "cpu" and torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise VariatorError(
            "several GPUs are visible: start with torchrun, or name one in CUDA_VISIBLE_DEVICES"
        )


def prompt_range(args: argparse.Namespace, seq_length: int) -> tuple[int, int]:
    """The least and the most prompt tokens of a decoder's windows; raises where they leave no room."""
    room = seq_length - args.continuation
    if room < 1:
        raise VariatorError(
            f"--seq-length {seq_length} leaves no prompt before --continuation {args.continuation}: "
            "make it longer, or the continuation shorter"
        )
    least, most = args.prompt_tokens or (max(1, room // 2), room)
    if not least <= most <= room:
        raise VariatorError(
            f"--prompt-tokens {least} {most} must rise, to {room} at most (--seq-length minus --continuation)"
        )
    return least, most


def default_name(args: argparse.Namespace) -> str:
    """A name that tells apart runs of different model, stage, method, ratio and sites."""
    parts = [Path(args.model).name]
    if args.stage != "pretrain":
        parts += [args.stage, args.task]
    if args.stage != "finetune":
        if args.method != "variator":
            parts.append(args.method)
        elif args.plugin:
            parts.append(f"from-{Path(args.plugin).name}")
        else:
            config = cli.variator_config_from(args)
            ratios = [config.k] if isinstance(config.k, int) else config.k.values()
            parts += [f"k{'-'.join(map(str, ratios))}", *config.sites]
    return "-".join(parts)
