"""`python -m llm_variator.train`: plugins, the models they are adapted to, and baselines (paper section 3.3)."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainingArguments

from llm_variator import old_cli as cli
from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
from llm_variator.measures.results import peak_memory_gib, scrub_paths, write_result
from llm_variator.sources.models import load_model
from llm_variator.sources.models.quantisation import base_bytes, predicted_bytes
from llm_variator.train.distributed import is_main_process, wants_fsdp, world_size
from llm_variator.train.flags import FREE_ON_RESUME, SCHEDULES, build_parser, check_flags, default_name
from llm_variator.train.least_squares import LeastSquares
from llm_variator.train.objective import forward_arguments
from llm_variator.train.stages import Run, prepare
from llm_variator.train.trainer import VariatorTrainer, checkpoints, last_complete_checkpoint

RUN_FILE = "run.json"
RESULT_FILE = "training.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say; what is trained and training.json end up in the output folder."""
    started = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = cli.parse(build_parser(), argv)
    check_flags(args)
    args.output = args.output or Path("runs") / (args.name or default_name(args))
    checkpoint = _check_output(args)

    run = prepare(args)
    if is_main_process():
        _print_trainable(run)
        write_atomically(args.output / RUN_FILE, json.dumps(_settings(args), indent=2) + "\n")
    trainer = _trainer(args, run, resuming=checkpoint is not None)
    if args.init == "least-squares" and checkpoint is None:
        _start_by_least_squares(args, run, trainer)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        if checkpoints(args.output):
            print(f"\n--resume goes on from the last checkpoint in {args.output}", file=sys.stderr)
        raise
    if args.stage == "pretrain" and (
        not trainer.evaluations or trainer.evaluations[-1]["step"] != trainer.state.global_step
    ):
        trainer.evaluate()
    held_out = _held_out(args, trainer, run)
    if trainer.is_world_process_zero():
        _finish(args, argv, trainer, run, held_out, started)


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
    kept["grad_accum"] *= (
        world_size()
    )  # what is learned depends on the micro-batches of a step, wherever they run
    settings: dict[str, Any] = json.loads(json.dumps(kept))
    return settings


def _check_same_settings(args: argparse.Namespace) -> None:
    record = args.output / RUN_FILE
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VariatorError(f"cannot resume: {record} is not readable ({error}); start anew") from None
    now = _settings(args)
    for key in now.keys() - before.keys():  # a flag that is younger than the run: it ran as the default does
        before[key] = build_parser().get_default(key)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed == ["grad_accum"]:
        raise VariatorError(
            f"cannot resume {args.output}: its steps have {before['grad_accum']} micro-batches, here they would have "
            f"{now['grad_accum']} (--grad-accum times {world_size()} processes): change --grad-accum"
        )
    if changed:
        was = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed)
        raise VariatorError(f"cannot resume {args.output} with other settings: {was}")


def _print_trainable(run: Run) -> None:
    if run.plugin is not None:
        run.plugin.print_trainable_parameters()
        return
    parameters = list(run.learner.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    print(f"{trained:,} of {sum(parameter.numel() for parameter in parameters):,} parameters are trained")


def _trainer(args: argparse.Namespace, run: Run, *, resuming: bool) -> VariatorTrainer:
    if args.tensorboard:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(args.output / "runs"))
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    keeps_best = args.stage != "pretrain" and args.save_every > 0
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
        load_best_model_at_end=keeps_best,
        metric_for_best_model=run.judge.figure if keeps_best else None,
        greater_is_better=run.judge.higher_is_better if keeps_best else None,
        logging_steps=args.logging_every,
        report_to=["tensorboard"] if args.tensorboard else "none",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
    )
    return VariatorTrainer(
        run.learner,
        arguments,
        run.stream(arguments),
        run.collate,
        objective=run.objective,
        judge=run.judge,
    )


def _start_by_least_squares(args: argparse.Namespace, run: Run, trainer: VariatorTrainer) -> None:
    """On the first examples of the run, and those a longer run would read next."""
    assert run.plugin is not None
    if wants_fsdp():
        raise VariatorError(
            "--init least-squares reads whole layers: run it without FSDP first, then give --plugin"
        )
    stream: Any = trainer.train_dataset
    batches, tokens, start = [], 0, 0
    while tokens < args.init_tokens:
        examples = [stream[index] for index in range(start, start + args.batch_size)]
        batches.append(forward_arguments(run.plugin, trainer._prepare_inputs(run.collate(examples))))
        tokens += batches[-1]["input_ids"].numel()
        start += args.batch_size
    with tqdm(
        desc=f"least squares over {tokens:,} tokens", unit=" layers", disable=not is_main_process()
    ) as bar:
        LeastSquares(run.plugin, batches).fit(progress=lambda name: bar.update() or None)


def _held_out(args: argparse.Namespace, trainer: VariatorTrainer, run: Run) -> dict[str, float]:
    """The figures of the result; all processes measure, as a sharded base takes all of them."""
    if args.stage != "pretrain":
        return run.final_judge(run.learner)
    last = trainer.evaluations[-1]
    return {
        name[5:]: value for name, value in last.items() if name.startswith("eval_") and name != "eval_runtime"
    }


def _finish(
    args: argparse.Namespace,
    argv: Sequence[str],
    trainer: VariatorTrainer,
    run: Run,
    held_out: dict[str, float],
    started: float,
) -> None:
    """Write what was trained and training.json, and print the figures."""
    on_the_way = trainer.evaluations
    figure = run.judge.figure
    figures = {
        "held_out": held_out,
        "held_out_history": [[entry["step"], entry[f"eval_{figure}"]] for entry in on_the_way],
        "best_step": trainer.state.best_global_step,
        "loss_history": [
            [entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry
        ],
        "steps": trainer.state.global_step,
        "processes": world_size(),
        "seconds_per_step": statistics.median(trainer.step_seconds) if trainer.step_seconds else None,
        "peak_memory_gib": peak_memory_gib(),
        "data": run.data,
        "config": None if run.plugin is None else run.plugin.plugin().config.to_dict(),
        "base": None if run.plugin is None else _base_facts(args, run.plugin.base),
    }
    result = write_result(
        args.output / RESULT_FILE,
        figures,
        command=["llm_variator.train", *argv],
        seed=args.seed,
        started=started,
    )
    words = ", ".join(f"{name} {value:.3f}" for name, value in held_out.items())
    if run.plugin is not None:
        where = (
            result["machine"]["gpu"] or f"{result['machine']['cores']} cores of {result['machine']['cpu']}"
        )
        facts = {
            **{name: scrub_paths(value) for name, value in run.data.items()},
            "steps": f"{args.max_steps}, each {args.batch_size * args.grad_accum * world_size()} rows",
            "loss": args.loss,
            "wall time": f"{result['wall_seconds']:.0f} s on {where}",
            "held out" if args.stage != "pretrain" else "held-out figures": words,
            "command": f"`{result['command']}`",
        }
        run.plugin.save_pretrained(args.output, dtype=getattr(torch, args.save_dtype), facts=facts)
    else:
        run.learner.save(args.output)
        run.tokenizer.save_pretrained(args.output)
    if args.drop_checkpoints:
        for checkpoint in checkpoints(args.output):
            shutil.rmtree(checkpoint)
    print(f"held out: {words}")
    print(f"{'plugin' if run.plugin is not None else 'model'} saved to {args.output}")


def _base_facts(args: argparse.Namespace, base: Any) -> dict[str, Any]:
    """How the frozen base is held; the bytes of its weights, and what arithmetic expects of them."""
    shape = load_model(
        args.model, random_init=True, num_layers=args.num_layers, device="meta", dtype=base.dtype
    )
    return {
        "quantize": args.quantize,
        "dtype": str(base.dtype).removeprefix("torch."),
        "bytes": base_bytes(base),
        "predicted_bytes": predicted_bytes(shape, args.quantize),
    }


if __name__ == "__main__":
    cli.run(main)
