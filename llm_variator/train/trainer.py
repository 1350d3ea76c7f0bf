"""One subclass of Hugging Face's Trainer for every stage.

Only what is particular to this is here: the objective, the judge, and checkpoints that hold no more than what
is trained. The loop, schedules, clipping, logging and device handling are the Trainer's.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from llm_variator.errors import VariatorError
from llm_variator.train.distributed import (
    average_gradients,
    is_main_process,
    shard_only,
    wants_fsdp,
    world_size,
)
from llm_variator.train.judges import Judge
from llm_variator.train.learners import Learner, PluginLearner
from llm_variator.train.objective import Objective
from llm_variator.train.optimizer import RelativeAdamW

START = "start"
"""Folder of what a run begins with, where that took long."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "trainer_state.json"  # the last file the Trainer writes into a checkpoint
_UNSHOWN = {
    "epoch",
    "total_flos",
    "train_loss",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
}
_CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", STATE_FILE)


class VariatorTrainer(Trainer):
    """Trains what a `Learner` lets be trained, by an `Objective`, and evaluates it by a `Judge`.

    Checkpoints hold the learner's weights and the state of optimizer, schedule and random numbers, never a
    frozen base model.
    """

    def __init__(
        self,
        learner: Learner,
        args: TrainingArguments,
        stream: Dataset[Any],
        collate: Callable[[Any], dict[str, Any]],
        *,
        objective: Objective,
        judge: Judge,
        patience: int | None = None,
        relative_steps: bool = False,
    ) -> None:
        """Set up the run.

        Args:
            learner: what is trained.
            args: with `max_steps` set and `train_sampling_strategy="sequential"`.
            stream: all examples of the run in the order they are trained on; see `examples_in`.
            collate: a micro-batch from its examples.
            objective: the loss.
            judge: the figures of an evaluation.
            patience: stop after this many evaluations without a new best.
            relative_steps: train by `RelativeAdamW`.
        """
        assert args.max_steps > 0, "the stream of examples needs its length"
        assert args.train_sampling_strategy == "sequential", "the stream is shuffled already"
        self._learner = learner  # asked for while the Trainer sets itself up
        clock = _Clock()
        callbacks: list[TrainerCallback] = [clock, _Resumed(), *([_Patience(patience)] if patience else [])]
        # The Trainer wants a dataset to evaluate on; the judge brings its own.
        super().__init__(
            learner.model,
            args,
            collate,
            stream,
            eval_dataset=[None],
            callbacks=callbacks,
            optimizer_cls_and_kwargs=(RelativeAdamW, {"lr": args.learning_rate}) if relative_steps else None,
        )
        learner.prepare(self.accelerator)
        if self.pop_callback(ProgressCallback) is not None:  # the Trainer has none with disable_tqdm
            self.add_callback(_Progress())
        self.step_seconds = clock.seconds
        """Wall time of every step of this process, without evaluations and checkpoints."""
        self.model_accepts_loss_kwargs = False  # compute_loss gives a mean per micro-batch
        self._objective = objective
        self._judge = judge

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's; with FSDP the plugin stays whole on every process."""
        super().create_accelerator_and_postprocess()
        if wants_fsdp() and world_size() > 1:
            if not isinstance(self._learner, PluginLearner):
                raise VariatorError(
                    "FSDP is for plugins on a frozen base: train whole models and LoRA with DDP"
                )
            shard_only(self.accelerator, self._learner.model.base, self._learner.model.plugin())
            self.is_fsdp_enabled = True

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch; after the last of a step the gradients of an unsharded plugin are averaged."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.is_fsdp_enabled and self.accelerator.sync_gradients:
            average_gradients(self._learner.model.plugin().parameters())
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective of one micro-batch."""
        loss = self._objective(model, inputs)
        return (loss, None) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The judge's figures, logged."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._judge(self._learner).items()}
        (metrics,) = broadcast_object_list([metrics])  # all processes keep the same best, and stop together
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """What `evaluate` logged so far, with the step."""
        return [entry for entry in self.state.log_history if f"eval_{self._judge.figure}" in entry]

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A block in which the Trainer reads and writes what is not sharded: all that a checkpoint holds."""
        sharded, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        try:
            yield
        finally:
            self.is_fsdp_enabled = sharded

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained, never the base."""
        with self._whole():
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._whole():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._whole():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        self._learner.save(Path(output_dir or self.args.output_dir or "."))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._learner.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        best, start = Path(self.state.best_model_checkpoint), Path(self.args.output_dir or ".") / START
        scores = {entry["step"]: entry[f"eval_{self._judge.figure}"] for entry in self.evaluations}
        pick = max if self._judge.higher_is_better else min
        if start.is_dir() and pick(scores, key=scores.__getitem__) == 0:  # of equals the earliest
            best, self.state.best_global_step = start, 0
        self._learner.load(best)


class _Progress(ProgressCallback):
    """The Trainer's progress bar, with figures as a person reads them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        bar: Any = self.training_bar
        if bar is not None and not sys.stderr.isatty():
            bar.mininterval = bar.maxinterval  # seconds: a file keeps every update

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        figures = {name.removeprefix("eval_"): value for name, value in logs.items() if name not in _UNSHOWN}
        bar: Any = self.training_bar
        if bar is not None and figures:
            words = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()]
            bar.write(f"step {state.global_step:>4}: {', '.join(words)}")


class _Patience(TrainerCallback):
    """Ends a run whose deciding figure has not improved for long; counted in the log, which a resumed run has too."""

    def __init__(self, evaluations: int) -> None:
        self._evaluations = evaluations

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        figure, higher = args.metric_for_best_model, args.greater_is_better
        if is_in_vain(state.log_history, figure, self._evaluations, higher_is_better=higher):
            control.should_training_stop = True


def is_in_vain(
    log: Sequence[Mapping[str, Any]], figure: str, evaluations: int, *, higher_is_better: bool
) -> bool:
    """Whether the last so many evaluations of a Trainer's log, from step 1 on, have not improved the figure."""
    name = f"eval_{figure}"
    figures = [entry[name] for entry in log if name in entry and entry["step"]]
    if not figures:
        return False
    best = (max if higher_is_better else min)(figures)
    return len(figures) - 1 - figures.index(best) >= evaluations


class _Resumed(TrainerCallback):
    """What this run's flags and folder say goes before what a checkpoint remembers of them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)
        if state.best_global_step and args.load_best_model_at_end:  # the folder may have been moved
            best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None


class _Clock(TrainerCallback):
    """Times the steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def examples_in(args: TrainingArguments) -> int:
    """Number of examples that a run of `args.max_steps` steps reads, on all devices together."""
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, whether complete or not."""
    found = [
        path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_complete_checkpoint(folder: Path) -> Path:
    """The newest checkpoint that was written to its end; what a killed run left half-written is deleted.

    Raises:
        VariatorError: there is none.
    """
    complete = []
    for checkpoint in checkpoints(folder):
        if _is_complete(checkpoint):
            complete.append(checkpoint)
        elif is_main_process():
            shutil.rmtree(checkpoint)
    if not complete:
        raise VariatorError(
            f"nothing to resume: {folder} holds no complete checkpoint; start without --resume"
        )
    return complete[-1]


def keep_start(learner: Learner, folder: Path) -> None:
    """Write what was set before the first step into `folder`/start, whole or not at all."""
    part = folder / f"{START}.part"
    for old in (part, folder / START):
        shutil.rmtree(old, ignore_errors=True)
    learner.save(part)
    part.rename(folder / START)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(checkpoint.glob("*.safetensors")) and all(
        (checkpoint / name).is_file() for name in _CHECKPOINT_FILES
    )
