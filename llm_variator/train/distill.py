"""Plugin training by self-distillation (paper section 3.3) on Hugging Face's Trainer.

Teacher and student are one set of weights: the teacher is the model with the plugin off, run without
gradients in the same step. Only what is particular to this is here; the loop, schedules, clipping, logging
and device handling are the Trainer's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from llm_variator.config import WEIGHTS_FILE
from llm_variator.errors import VariatorError
from llm_variator.metrics import continuation_cross_entropy, reference_conditions
from llm_variator.model import VariatorModel
from llm_variator.train.data import Corpus, TrainingStream, collate
from llm_variator.train.losses import LOSSES, Outputs

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STATE_FILE = "trainer_state.json"  # the last file the Trainer writes into a checkpoint
_CHECKPOINT_FILES = (WEIGHTS_FILE, "optimizer.pt", "scheduler.pt", _STATE_FILE)


class DistillationTrainer(Trainer):
    """Trains the active plugin of a `VariatorModel` to reproduce what the model computes without it.

    Evaluation gives the cross-entropy of held-out continuations with the prompt compressed, dense and absent.
    Checkpoints hold the plugin's weights and the state of optimizer, schedule and random numbers, not the
    base model.
    """

    def __init__(
        self,
        model: VariatorModel,
        args: TrainingArguments,
        corpus: Corpus,
        *,
        loss: str,
        kl_weight: float,
        continuation: int,
        prompt_tokens: tuple[int, int],
    ) -> None:
        """Set up the run.

        Args:
            model: with the plugin to train active.
            args: with `max_steps` set and `train_sampling_strategy="sequential"`.
            corpus: windows of one length n.
            loss: a key of `LOSSES`.
            kl_weight: weight of the KL term where the loss has one.
            continuation: the last tokens of a window; held-out figures score them, the KL term compares them.
            prompt_tokens: least and most prompt tokens in training, the most being at most n - continuation.
        """
        assert args.max_steps > 0, "the stream of examples needs its length"
        assert args.train_sampling_strategy == "sequential", "the stream is shuffled already"
        stream = TrainingStream(
            corpus,
            length=args.max_steps
            * args.train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size,
            batch_size=args.train_batch_size,
            prompt_tokens=prompt_tokens,
            seed=args.seed,
        )
        super().__init__(model, args, collate, stream, eval_dataset=corpus.held_out)
        self.model_accepts_loss_kwargs = False  # compute_loss gives a mean per micro-batch
        self._loss = LOSSES[loss]
        self._kl_weight = kl_weight
        self._continuation = continuation
        self._held_out = corpus.held_out
        self._references: dict[str, float] | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Outputs]:
        """The loss between the model with and without its plugin, over prompt and continuation."""
        bare = self.accelerator.unwrap_model(model)
        with torch.no_grad(), bare.disable_plugin():
            teacher = self._outputs(bare, bare, inputs)
        student = self._outputs(model, bare, inputs)
        loss = self._loss.function(student, teacher, inputs.get("attention_mask"), self._kl_weight)
        return (loss, student) if return_outputs else loss

    def _outputs(self, model: nn.Module, bare: VariatorModel, inputs: dict[str, Any]) -> Outputs:
        # One row of logits is the least a forward pass can be asked for.
        keep = self._continuation if self._loss.needs_logits else 1
        with _last_hidden_states(bare) as hidden:
            output = model(**inputs, logits_to_keep=keep, use_cache=False)
        return Outputs(hidden[0], output.logits if self._loss.needs_logits else None)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out cross-entropy of the continuation, nats per token: compressed, dense, no context."""
        model = self.accelerator.unwrap_model(self.model)
        prompt = self._held_out.shape[1] - self._continuation
        rows = self.args.per_device_eval_batch_size
        if self._references is None:  # the plugin cannot change them
            self._references = reference_conditions(model, self._held_out, prompt, batch_size=rows)
        compressed = continuation_cross_entropy(model, self._held_out, prompt, batch_size=rows)
        figures = {"compressed": compressed, **self._references}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """What `evaluate` logged so far, with the step."""
        return [entry for entry in self.state.log_history if "eval_compressed" in entry]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        bare = self.accelerator.unwrap_model(model or self.model)
        bare.plugin().load_weights(Path(resume_from_checkpoint))


@contextmanager
def _last_hidden_states(model: VariatorModel) -> Iterator[list[Tensor]]:
    """Collect the decoder's last hidden states, after the final norm, from the pass that makes the logits.

    `output_hidden_states` would keep those of every layer.
    """
    collected: list[Tensor] = []

    def collect(module: nn.Module, args: Any, output: Any) -> None:
        collected.append(output.last_hidden_state)

    handle = model.base.get_decoder().register_forward_hook(collect)
    try:
        yield collected
    finally:
        handle.remove()


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
    return all((checkpoint / name).is_file() for name in _CHECKPOINT_FILES)
