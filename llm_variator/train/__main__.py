"""`python -m llm_variator.train`: train a compression plugin on plain text.

This is the plugin pre-training of the paper's section 3.3.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from llm_variator import cli
from llm_variator.config import VariatorConfig
from llm_variator.corpora import EMBEDDED, parse_sources
from llm_variator.errors import VariatorError
from llm_variator.files import write_atomically
from llm_variator.groups import split
from llm_variator.loading import load_model, load_tokenizer
from llm_variator.model import VariatorModel
from llm_variator.plugin import SiteLayers
from llm_variator.results import scrub_paths, write_result
from llm_variator.train.data import Corpus, build_corpus
from llm_variator.train.distill import DistillationTrainer, checkpoints, last_complete_checkpoint
from llm_variator.train.losses import LOSSES

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
RUN_FILE = "run.json"
RESULT_FILE = "training.json"

# Flags that a resumed run may change: all but --max-steps leave what is learned as it was.
FREE_ON_RESUME = frozenset(
    {"config", "data_dir", "device", "eval_every", "logging_every", "max_steps", "name", "output", "resume"}
    | {"save_dtype", "save_every", "save_total_limit", "tensorboard"}
)


def build_parser() -> cli.Parser:
    """Every flag of the command."""
    parser = cli.Parser(
        prog="python -m llm_variator.train",
        description="Train a compression plugin: the model with it learns to reproduce the model without it.",
    )
    add = parser.add_argument
    add("--model", required=True, help="base model: alias, local folder or hub id")
    add("--stage", choices=["pretrain"], default="pretrain", help="pretrain: on plain text, for any task")
    add("--name", help="name of the run and of its default output folder (default: from model, k and sites)")
    add("--output", type=Path, metavar="DIR", help="for plugin and checkpoints (default: runs/NAME)")
    add("--resume", action="store_true", help="go on from the last complete checkpoint in the output folder")
    add("--plugin", metavar="DIR", help="start from this plugin instead of a new one")
    add("--seed", type=cli.natural, default=0, help="of text order, prompt lengths and initial weights")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    add("--dtype", help="of the frozen base (default: as stored); the trained weights are float32")
    add("--random-init", action="store_true", help="the model's shape with random weights; no download")
    add("--num-layers", type=cli.positive_int, help="with --random-init: this many layers")
    cli.add_variator_flags(parser)

    add = parser.add_argument_group("text").add_argument
    add(
        "--data",
        nargs="+",
        default=[EMBEDDED],
        metavar="SOURCE",
        help="text to train on: NAME[/SPLIT] in --data-dir, a .parquet, .jsonl or .txt file, a folder of "
        "them, or a hub dataset name[:config][:split][:column]; several are joined, SOURCE=2 counts twice",
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
    add("--seq-length", type=cli.positive_int, default=384, help="tokens in a window")
    add("--continuation", type=cli.positive_int, default=128, help="last tokens of a window, never prompt")
    add(
        "--prompt-tokens",
        type=cli.positive_int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="prompt length, drawn for each micro-batch (default: half to all of what --continuation leaves)",
    )
    add("--eval-windows", type=cli.positive_int, default=16, help="held-out windows to score")

    add = parser.add_argument_group("optimisation").add_argument
    add("--max-steps", type=cli.positive_int, default=1000, help="optimiser steps")
    add("--batch-size", type=cli.positive_int, default=2, help="windows in a micro-batch, on each device")
    add("--grad-accum", type=cli.positive_int, default=1, help="micro-batches in a step")
    add(
        "--loss",
        choices=sorted(LOSSES),
        default="mse",
        help="mse: hidden states, as in the paper; mse+kl: also next-token distributions of the continuation",
    )
    add("--kl-weight", type=cli.natural_float, default=1.0, help="with --loss mse+kl")
    add("--learning-rate", type=cli.positive_float, default=1e-3, help="at its highest")
    add("--schedule", choices=sorted(SCHEDULES), default="linear", help="of the rate after the warm-up")
    add("--warmup-steps", type=cli.natural, default=10, help="in which the learning rate rises from 0")
    add("--weight-decay", type=cli.natural_float, default=0.0, help="of AdamW")
    add("--max-grad-norm", type=cli.natural_float, default=1.0, help="clip gradients to this norm; 0: never")
    add("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, more time")

    add = parser.add_argument_group("logs and checkpoints").add_argument
    add("--eval-every", type=cli.positive_int, default=100, help="steps between held-out evaluations")
    add("--save-every", type=cli.natural, default=100, help="steps between checkpoints; 0: none")
    add("--save-total-limit", type=cli.positive_int, default=2, help="checkpoints kept")
    add("--save-dtype", choices=["float32", "bfloat16"], default="float32", help="of the finished plugin")
    add("--logging-every", type=cli.positive_int, default=10, help="steps between log lines")
    add("--tensorboard", action="store_true", help="write TensorBoard logs to OUTPUT/runs")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say; plugin, model card and training.json end up in the output folder."""
    started = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = cli.parse(build_parser(), argv)
    config = None if args.plugin else cli.variator_config_from(args)
    prompt_tokens = _check_flags(args)
    args.output = args.output or Path("runs") / (args.name or _default_name(args, config))
    checkpoint = _check_output(args)

    corpus = build_corpus(
        parse_sources(args.data),
        load_tokenizer(args.model, stand_in=args.random_init),
        seq_length=args.seq_length,
        eval_windows=args.eval_windows,
        eval_sources=parse_sources(args.eval_data) if args.eval_data else (),
        data_dir=args.data_dir,
    )
    model = _load(args, config)
    _check_trainable(model, prompt_tokens[0])
    print(
        f"{sum(map(len, corpus.train)):,} windows of {args.seq_length} tokens to train on, "
        f"{len(corpus.held_out)} held out; prompts of {prompt_tokens[0]} to {prompt_tokens[1]} tokens"
    )
    model.print_trainable_parameters()

    write_atomically(args.output / RUN_FILE, json.dumps(_settings(args), indent=2) + "\n")
    trainer = _trainer(args, model, corpus, prompt_tokens, resuming=checkpoint is not None)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        if checkpoints(args.output):
            print(f"\n--resume goes on from the last checkpoint in {args.output}", file=sys.stderr)
        raise
    if not trainer.evaluations or trainer.evaluations[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    if trainer.is_world_process_zero():
        _finish(args, argv, trainer, model, started)


def _check_flags(args: argparse.Namespace) -> tuple[int, int]:
    """The least and the most prompt tokens; raises for flags that contradict each other."""
    room = args.seq_length - args.continuation
    if room < 1:
        raise VariatorError(
            f"--seq-length {args.seq_length} leaves no prompt before --continuation {args.continuation}: "
            "make it longer, or the continuation shorter"
        )
    least, most = args.prompt_tokens or (max(1, room // 2), room)
    if not least <= most <= room:
        raise VariatorError(
            f"--prompt-tokens {least} {most} must rise, to {room} at most (--seq-length minus --continuation)"
        )
    if args.plugin and (given := cli.variator_flags_given(args)):
        raise VariatorError(f"--plugin keeps its own configuration: leave out {', '.join(given)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise VariatorError("--device cuda: PyTorch finds no CUDA device here; try --device auto")
    # The Trainer would put torch's DataParallel around the model, whose threads do not see the active plugin.
    if args.device != "cpu" and torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise VariatorError(
            "several GPUs are visible: start with torchrun, or name one in CUDA_VISIBLE_DEVICES"
        )
    return least, most


def _default_name(args: argparse.Namespace, config: VariatorConfig | None) -> str:
    model = Path(args.model).name
    if config is None:
        return f"{model}-from-{Path(args.plugin).name}"
    ratios = [config.k] if isinstance(config.k, int) else config.k.values()
    return f"{model}-k{'-'.join(map(str, ratios))}-{'-'.join(config.sites)}"


def _check_output(args: argparse.Namespace) -> Path | None:
    """The checkpoint to resume from, if any; raises before any long work if the folder cannot be used."""
    if args.resume:
        checkpoint = last_complete_checkpoint(args.output)
        _check_same_settings(args)
        return checkpoint
    if checkpoints(args.output):
        raise VariatorError(f"{args.output} holds checkpoints: add --resume, or choose another --output")
    place = args.output.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise VariatorError(f"cannot write to {args.output}: choose another --output")
    return None


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that decide what is learned, as plain JSON."""
    kept = {key: value for key, value in vars(args).items() if key not in FREE_ON_RESUME}
    settings: dict[str, Any] = json.loads(json.dumps(kept))
    return settings


def _check_same_settings(args: argparse.Namespace) -> None:
    record = args.output / RUN_FILE
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VariatorError(f"cannot resume: {record} is not readable ({error}); start anew") from None
    now = _settings(args)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        was = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed)
        raise VariatorError(f"cannot resume {args.output} with other settings: {was}")


def _load(args: argparse.Namespace, config: VariatorConfig | None) -> VariatorModel:
    base = load_model(args.model, **cli.model_options(args))
    set_seed(args.seed)
    model = VariatorModel(base, config)
    model.decoder_only("this command", "training encoders is not built yet")
    if args.plugin:
        model.load_plugin(args.plugin, "default", dtype=torch.float32)
        model.set_plugin("default")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _check_trainable(model: VariatorModel, prompt_tokens: int) -> None:
    """Raise where a step could have nothing to learn: no parameters, or a prompt too short for a group."""
    plugin = model.plugin()
    if not any(True for _ in plugin.parameters()):
        raise VariatorError(
            "nothing to train in mean and copy: choose --compressor weighted or --decompressor adapter"
        )
    head, tail = plugin.config.dense_head or 0, plugin.config.dense_tail or 0
    k = min(module.k for module in plugin.modules() if isinstance(module, SiteLayers))
    if not split(prompt_tokens, k, head, tail).groups:
        raise VariatorError(
            f"prompts of {prompt_tokens} tokens hold no group of {k} between {head} dense first and {tail} "
            "dense last tokens: raise --prompt-tokens or --seq-length, or lower --dense-tail"
        )


def _trainer(
    args: argparse.Namespace,
    model: VariatorModel,
    corpus: Corpus,
    prompt_tokens: tuple[int, int],
    *,
    resuming: bool,
) -> DistillationTrainer:
    if args.tensorboard:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(args.output / "runs"))
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        learning_rate=args.learning_rate,
        lr_scheduler_type=SCHEDULES[args.schedule],
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        bf16=args.bf16,
        use_cpu=on_cpu,
        seed=args.seed,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        eval_on_start=not resuming,
        save_strategy="steps" if args.save_every else "no",
        save_steps=args.save_every or args.max_steps,
        save_total_limit=args.save_total_limit,
        logging_steps=args.logging_every,
        report_to=["tensorboard"] if args.tensorboard else "none",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
    )
    return DistillationTrainer(
        model,
        arguments,
        corpus,
        loss=args.loss,
        kl_weight=args.kl_weight,
        continuation=args.continuation,
        prompt_tokens=prompt_tokens,
    )


def _finish(
    args: argparse.Namespace,
    argv: Sequence[str],
    trainer: DistillationTrainer,
    model: VariatorModel,
    started: float,
) -> None:
    """Write training.json, the plugin and its card, and print the held-out figures."""
    last = {name: trainer.evaluations[-1][f"eval_{name}"] for name in ("compressed", "dense", "no_context")}
    figures = {
        "held_out_cross_entropy": last,
        "held_out_history": [[entry["step"], entry["eval_compressed"]] for entry in trainer.evaluations],
        "loss_history": [
            [entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry
        ],
        "steps": trainer.state.global_step,
        "config": model.plugin().config.to_dict(),
    }
    command = ["llm_variator.train", *argv]
    result = write_result(
        args.output / RESULT_FILE, figures, command=command, seed=args.seed, started=started
    )
    prompt = args.seq_length - args.continuation
    held_out = f"{last['compressed']:.3f} (dense {last['dense']:.3f}, no context {last['no_context']:.3f})"
    where = result["machine"]["gpu"] or f"{result['machine']['cores']} cores of {result['machine']['cpu']}"
    facts = {
        "trained on": scrub_paths(", ".join(args.data)),
        "held out": scrub_paths(", ".join(args.eval_data)) or "other documents of the same text",
        "steps": f"{args.max_steps}, each {args.batch_size * args.grad_accum} x {args.seq_length} tokens",
        "loss": args.loss,
        "wall time": f"{result['wall_seconds']:.0f} s on {where}",
        f"cross-entropy of {args.continuation} held-out tokens after {prompt}": f"{held_out} nats per token",
        "command": f"`{result['command']}`",
    }
    model.save_pretrained(args.output, dtype=getattr(torch, args.save_dtype), facts=facts)
    print(f"held-out cross-entropy of the continuation, nats per token: {held_out}")
    print(f"plugin saved to {args.output}")


if __name__ == "__main__":
    cli.run(main)
