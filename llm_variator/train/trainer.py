"""One subclass of Hugging Face's Trainer for every stage.

Only what is particular to this is here: the objective, the judge, and checkpoints that hold no more than what
is trained. The loop, schedules, clipping, logging and device handling are the Trainer's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from llm_variator.errors import VariatorError
from llm_variator.train.judges import Judge
from llm_variator.train.learners import Learner
from llm_variator.train.objective import Objective

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STATE_FILE = "trainer_state.json"  # the last file the Trainer writes into a checkpoint
_CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", _STATE_FILE)


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
    ) -> None:
        """Set up the run.

        Args:
            learner: what is trained.
            args: with `max_steps` set and `train_sampling_strategy="sequential"`.
            stream: all examples of the run in the order they are trained on; see `examples_in`.
            collate: a micro-batch from its examples.
            objective: the loss.
            judge: the figures of an evaluation.
        """
        assert args.max_steps > 0, "the stream of examples needs its length"
        assert args.train_sampling_strategy == "sequential", "the stream is shuffled already"
        # The Trainer wants a dataset to evaluate on; the judge brings its own.
        super().__init__(learner.model, args, collate, stream, eval_dataset=[None])
        self.model_accepts_loss_kwargs = False  # compute_loss gives a mean per micro-batch
        self._learner = learner
        self._objective = objective
        self._judge = judge

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
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """What `evaluate` logged so far, with the step."""
        return [entry for entry in self.state.log_history if f"eval_{self._judge.figure}" in entry]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._learner.save(Path(output_dir or self.args.output_dir or "."))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._learner.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._learner.load(Path(self.state.best_model_checkpoint))


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
        else:
            shutil.rmtree(checkpoint)
    if not complete:
        raise VariatorError(
            f"nothing to resume: {folder} holds no complete checkpoint; start without --resume"
        )
    return complete[-1]


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(checkpoint.glob("*.safetensors")) and all(
        (checkpoint / name).is_file() for name in _CHECKPOINT_FILES
    )
