"""`python -m llm_variator.train`: plugins, the models they are adapted to, and baselines (paper section 3.3)."""

from __future__ import annotations

import dataclasses
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
from transformers import TrainerState, TrainingArguments

from llm_variator import cli
from llm_variator.cli.values import can_hold_files
from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
from llm_variator.extras import needed
from llm_variator.measures.results import peak_memory_gib, result_of, scrub_paths, store
from llm_variator.sources.models import cpu, load_model
from llm_variator.sources.models.quantisation import base_bytes, predicted_bytes
from llm_variator.train.distributed import announce, is_main_process, wants_fsdp, world_size
from llm_variator.train.fitting import fit_scores
from llm_variator.train.judges import LossJudge
from llm_variator.train.least_squares import LeastSquares
from llm_variator.train.objective import forward_arguments
from llm_variator.train.settings import FREE_ON_RESUME, SCHEDULES, Settings, check_machine
from llm_variator.train.stages import Run, prepare
from llm_variator.train.trainer import (
    START,
    STATE_FILE,
    VariatorTrainer,
    checkpoints,
    is_in_vain,
    keep_start,
    last_complete_checkpoint,
)

RUN_FILE = "run.json"
RESULT_FILE = "training.json"


def read(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line, with its recipe, gives."""
    return cli.read(Settings, argv, prog="python -m llm_variator.train")


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say; what is trained and training.json end up in the output folder."""
    started = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = read(argv)
    check_machine(settings)
    if settings.lora:
        needed("peft", "--lora", "train")
    if settings.tensorboard:
        needed("torch.utils.tensorboard", "--tensorboard", "train")
    if settings.fits_scores:
        _check_writable(settings)
        fit_scores(settings, argv, started, RESULT_FILE)
        return
    checkpoint = _check_output(settings)
    if settings.bf16 and not _in_bf16(settings):
        announce(f"--bf16 is left out: {cpu.complaint(torch.bfloat16)}")

    run = prepare(settings)
    if is_main_process():
        _print_trainable(run)
        write_atomically(settings.folder / RUN_FILE, json.dumps(_deciding(settings), indent=2) + "\n")
    trainer = _trainer(settings, run, checkpoint)
    if settings.init == "least-squares" and checkpoint is None:
        if settings.resume:
            run.learner.load(settings.folder / START)
        else:
            _start_by_least_squares(settings, run, trainer)
    try:
        if settings.steps:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        if checkpoints(settings.folder):
            print(f"\n--resume goes on from the last checkpoint in {settings.folder}", file=sys.stderr)
        raise
    if settings.stage == "pretrain" and (
        not trainer.evaluations or trainer.evaluations[-1]["step"] != trainer.state.global_step
    ):
        trainer.evaluate()
    held_out = _held_out(settings, trainer, run)
    distance = None if run.distance is None else run.distance(run.learner)
    if trainer.is_world_process_zero():
        _finish(settings, argv, trainer, run, held_out, distance, started)


def _check_output(settings: Settings) -> Path | None:
    """The checkpoint to resume from, if any; raises before any long work if the folder cannot be used."""
    if settings.resume:
        try:
            checkpoint = last_complete_checkpoint(settings.folder)
        except VariatorError:
            if not (settings.folder / START).exists():
                raise
            checkpoint = None
        _check_same_settings(settings)
        return checkpoint
    if checkpoints(settings.folder):
        raise VariatorError(f"{settings.folder} holds checkpoints: add --resume, or choose another --output")
    _check_writable(settings)
    if is_main_process():  # of an earlier attempt, maybe with other settings
        shutil.rmtree(settings.folder / START, ignore_errors=True)
    return None


def _check_writable(settings: Settings) -> None:
    if not can_hold_files(settings.folder):
        raise VariatorError(f"cannot write to {settings.folder}: choose another --output")


def _deciding(settings: Settings) -> dict[str, Any]:
    """The flags that decide what is learned, as plain JSON."""
    kept = {key: value for key, value in vars(settings).items() if key not in FREE_ON_RESUME}
    # what is learned depends on the micro-batches of a step, wherever they run, and on what this CPU can
    kept["grad_accum"] *= world_size()
    kept["bf16"] = _in_bf16(settings)
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def _check_same_settings(settings: Settings) -> None:
    record = settings.folder / RUN_FILE
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VariatorError(f"cannot resume: {record} is not readable ({error}); start anew") from None
    before = {key: value for key, value in before.items() if key not in FREE_ON_RESUME}
    if isinstance(before.get("plugin"), str):  # of a version that took one
        before["plugin"] = [before["plugin"]]
    before = {key: value for key, value in before.items() if (key, value) != ("plugin", None)}
    now = _deciding(settings)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    # a flag that is younger than the run: it ran as the default does
    for key in now.keys() - before.keys() - {"model"}:
        before[key] = json.loads(json.dumps(defaults[key]))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed == ["grad_accum"]:
        raise VariatorError(
            f"cannot resume {settings.folder}: its steps have {before['grad_accum']} micro-batches, "
            f"here they would have {now['grad_accum']} "
            f"(--grad-accum times {world_size()} processes): change --grad-accum"
        )
    if changed:
        was = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed)
        raise VariatorError(f"cannot resume {settings.folder} with other settings: {was}")


def _print_trainable(run: Run) -> None:
    if run.plugin is not None:
        run.plugin.print_trainable_parameters()
        return
    parameters = list(run.learner.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    print(f"{trained:,} of {sum(parameter.numel() for parameter in parameters):,} parameters are trained")


def _trainer(settings: Settings, run: Run, checkpoint: Path | None) -> VariatorTrainer:
    if settings.tensorboard:  # read where the Trainer is made
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(settings.folder / "runs")
    arguments = TrainingArguments(
        output_dir=str(settings.folder),
        max_steps=max(1, _last_step(settings, run, checkpoint)),  # with none it only evaluates
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=_in_bf16(settings),
        use_cpu=settings.on_cpu,
        seed=settings.seed,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        eval_on_start=checkpoint is None,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or max(1, settings.steps),
        # of one the Trainer would drop the last as it ends, and a run killed then would go back to its best
        save_total_limit=max(settings.save_total_limit, 1 + settings.keeps_best),
        load_best_model_at_end=settings.keeps_best,
        metric_for_best_model=run.judge.figure if settings.keeps_best else None,
        greater_is_better=run.judge.higher_is_better if settings.keeps_best else None,
        logging_steps=settings.logging_every,
        report_to=["tensorboard"] if settings.tensorboard else "none",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=not settings.on_cpu,
    )
    return VariatorTrainer(
        run.learner,
        arguments,
        run.stream(arguments),
        run.collate,
        objective=run.objective,
        judge=run.judge,
        patience=settings.patience,
        relative_steps=settings.relative_steps,
    )


def _in_bf16(settings: Settings) -> bool:
    """Whether steps really compute in bfloat16."""
    return settings.bf16 and not (settings.on_cpu and cpu.complaint(torch.bfloat16))


def _last_step(settings: Settings, run: Run, checkpoint: Path | None) -> int:
    """Where the run ends at the latest: at its checkpoint, if it was killed after its patience had ended there."""
    if settings.patience and checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        figure, higher = run.judge.figure, run.judge.higher_is_better
        if is_in_vain(state.log_history, figure, settings.patience, higher_is_better=higher):
            return state.global_step
    return settings.steps


def _start_by_least_squares(settings: Settings, run: Run, trainer: VariatorTrainer) -> None:
    """On the first examples of the run, and those a longer run would read next."""
    assert run.plugin is not None
    if wants_fsdp():
        raise VariatorError(
            "--init least-squares reads whole layers: run it without FSDP first, then give --plugin"
        )
    stream: Any = trainer.train_dataset
    batches, tokens, start = [], 0, 0
    while tokens < settings.init_tokens:
        examples = [stream[index] for index in range(start, start + settings.batch_size)]
        batches.append(forward_arguments(run.plugin, trainer._prepare_inputs(run.collate(examples))))
        tokens += batches[-1]["input_ids"].numel()
        start += settings.batch_size
    with tqdm(
        desc=f"least squares over {tokens:,} tokens", unit=" layers", disable=not is_main_process()
    ) as bar:

        def fitted(layer: str, said: str) -> None:
            bar.update()
            if said and is_main_process():
                bar.write(f"{layer}: {said}")

        LeastSquares(run.plugin, batches).fit(fitted, steps=settings.init_steps)
    if is_main_process():
        keep_start(run.learner, settings.folder)


def _held_out(settings: Settings, trainer: VariatorTrainer, run: Run) -> dict[str, float]:
    """The figures of the result; all processes measure, as a sharded base takes all of them."""
    if settings.stage != "pretrain":
        return run.final_judge(run.learner)
    last = trainer.evaluations[-1]
    return {
        name[5:]: value for name, value in last.items() if name.startswith("eval_") and name != "eval_runtime"
    }


def _finish(
    settings: Settings,
    argv: Sequence[str],
    trainer: VariatorTrainer,
    run: Run,
    held_out: dict[str, float],
    distance: dict[str, float] | None,
    started: float,
) -> None:
    """Write what was trained, then training.json, and print the figures."""
    on_the_way = trainer.evaluations
    figure = run.judge.figure
    resumed_at = trainer.state.global_step - len(trainer.step_seconds)
    figures = {
        "held_out": held_out,
        "nats_from_teacher": distance and distance[LossJudge.figure],
        "held_out_history": [[entry["step"], entry[f"eval_{figure}"]] for entry in on_the_way],
        "best_step": trainer.state.best_global_step,
        "loss_history": [
            [entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry
        ],
        "steps": trainer.state.global_step,
        "resumed_at": resumed_at or None,  # what is timed is of the steps from there on
        "processes": world_size(),
        "seconds_per_step": statistics.median(trainer.step_seconds) if trainer.step_seconds else None,
        "bf16": trainer.args.bf16 and settings.steps > 0,
        "peak_memory_gib": peak_memory_gib(),
        "data": run.data,
        "config": None if run.plugin is None else run.plugin.plugin().config.to_dict(),
        "base": None if run.plugin is None else _base_facts(settings, run.plugin.base),
    }
    command = ["llm_variator.train", *argv]
    result = result_of(figures, command=command, seed=settings.seed, started=started)
    words = ", ".join(f"{name} {value:.3f}" for name, value in held_out.items())
    if run.plugin is not None:
        where = (
            result["machine"]["gpu"] or f"{result['machine']['cores']} cores of {result['machine']['cpu']}"
        )
        read = settings.steps or settings.init == "least-squares"
        rows = settings.batch_size * settings.grad_accum * world_size()
        facts = {
            **{name: scrub_paths(value) for name, value in run.data.items() if read or name != "trained on"},
            **({"made of": ", ".join(settings.plugin)} if settings.plugin else {}),
            "steps": f"{trainer.state.global_step}, each {rows} rows",
            "loss": settings.loss,
            "wall time": f"{result['wall_seconds']:.0f} s on {where}"
            + f", from step {resumed_at} on" * bool(resumed_at),
            "held out" if settings.stage != "pretrain" else "held-out figures": words,
            "command": f"`{result['command']}`",
        }
        run.plugin.save_pretrained(settings.folder, dtype=getattr(torch, settings.save_dtype), facts=facts)
    else:
        run.learner.save(settings.folder)
        run.tokenizer.save_pretrained(settings.folder)
    store(settings.folder / RESULT_FILE, result)  # after the weights: it says that the run is done
    shutil.rmtree(settings.folder / START, ignore_errors=True)
    if settings.drop_checkpoints:
        for checkpoint in checkpoints(settings.folder):
            shutil.rmtree(checkpoint)
    print(f"held out: {words}")
    print(f"{'plugin' if run.plugin is not None else 'model'} saved to {settings.folder}")


def _base_facts(settings: Settings, base: Any) -> dict[str, Any]:
    """How the frozen base is held; the bytes of its weights, and what arithmetic expects of them."""
    shape = load_model(
        settings.model, random_init=True, num_layers=settings.num_layers, device="meta", dtype=base.dtype
    )
    return {
        "quantize": settings.quantize,
        "dtype": str(base.dtype).removeprefix("torch."),
        "bytes": base_bytes(base),
        "predicted_bytes": predicted_bytes(shape, settings.quantize),
    }


if __name__ == "__main__":
    cli.run(main)
