"""The settings of `python -m llm_variator.train`, and what they may not say together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llm_variator.cli import flag, flags
from llm_variator.cli.values import Names, Natural, NaturalFloat, PositiveFloat, PositiveInt, Seed, Share
from llm_variator.errors import VariatorError
from llm_variator.sources.corpora import EMBEDDED
from llm_variator.sources.tasks.table import TASKS
from llm_variator.train.losses import LOSSES

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}

# Settings that a resumed run may change: each step stays as it was. How many there are, and after which of them weights
# may be kept, is for --max-steps, --patience and --eval-every to say.
# `config` is the recipe's name, as the flags of a table may hold it.
FREE_ON_RESUME = frozenset(
    {"config", "data_dir", "device", "eval_every", "logging_every", "max_steps", "name", "output", "resume"}
    | {"save_dtype", "save_every", "save_total_limit", "tensorboard", "drop_checkpoints", "test_limit"}
    | {"patience"}
)


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Baselines and fine-tuning."""

    lora: bool = flag(False, "finetune by LoRA on q and v instead of all weights")
    lora_r: PositiveInt = flag(16, "rank (default: the paper's released code)")
    lora_alpha: PositiveInt = flag(32, "scale, divided by the rank")
    student: str | None = flag(
        None, "--method distill: start from this student instead of a new one", metavar="DIR"
    )
    student_layers: PositiveInt | None = flag(None, "encoder layers of a new student (default: by FLOPs)")
    keep: Share = flag(
        0.25, "--method ltp: share of tokens with an FFN; --compressor kv=select: share of keys and values"
    )


@dataclass(frozen=True, kw_only=True)
class PlainText(flags.LocalData):
    """Text (pretrain)."""

    data: tuple[str, ...] = flag(
        (EMBEDDED,),
        "text to train on: NAME[/SPLIT] in --data-dir, a .parquet, .jsonl or .txt file, a folder of "
        "them, a hub dataset name[:config][:split][:column], or task:TASK, a task's training examples as prompts "
        "with answers; several are joined, SOURCE=2 counts twice",
        metavar="SOURCE",
    )
    eval_data: tuple[str, ...] = flag(
        (),
        "held-out text (default: documents of --data, which are then not trained on)",
        metavar="SOURCE",
    )
    seq_length: PositiveInt | None = flag(None, "tokens in a window (default: decoders 384, encoders 128)")
    continuation: PositiveInt = flag(128, "last tokens of a window, never prompt")
    prompt_tokens: tuple[PositiveInt, PositiveInt] | None = flag(
        None,
        "prompt length, drawn for each micro-batch (default: half to all of what --continuation leaves)",
        metavar=("MIN", "MAX"),
    )
    recall: NaturalFloat = flag(
        0.0,
        "share of a decoder's windows that go on with passages of their prompt: practice in finding them",
    )
    eval_windows: PositiveInt = flag(16, "held-out windows to score")

    def prompt_range(self, seq_length: int) -> tuple[int, int]:
        """The least and the most prompt tokens of a decoder's windows; raises where they leave no room."""
        room = seq_length - self.continuation
        if room < 1:
            raise VariatorError(
                f"--seq-length {seq_length} leaves no prompt before --continuation {self.continuation}: "
                "make it longer, or the continuation shorter"
            )
        least, most = self.prompt_tokens or (max(1, room // 2), room)
        if not least <= most <= room:
            raise VariatorError(
                f"--prompt-tokens {least} {most} must rise, to {room} at most (--seq-length minus --continuation)"
            )
        return least, most


@dataclass(frozen=True, kw_only=True)
class OnTask:
    """Task (finetune, adapt)."""

    max_length: PositiveInt = flag(512, "most prompt tokens; longer inputs are cut")
    train_limit: PositiveInt | None = flag(None, "train on so many examples, drawn at random")
    eval_limit: PositiveInt = flag(500, "examples scored at each evaluation")
    test_limit: PositiveInt | None = flag(None, "examples scored at the end (default: all)")
    task_weight: NaturalFloat = flag(0.0, "lambda of the task's own loss in adapt")


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Optimisation."""

    max_steps: Natural | None = flag(
        None,
        "optimiser steps (default: 1000; with --compressor kv=select none, its scores are fitted); 0: what least "
        "squares set, or the plugins that are joined, as they are",
    )
    batch_size: PositiveInt = flag(2, "rows in a micro-batch, on each device")
    grad_accum: PositiveInt = flag(1, "micro-batches in a step")
    loss: str = flag(
        "mse",
        "mse: hidden states, as in the paper; mse+kl: also the predicted distributions; kl: these alone, for "
        "compressor select",
        choices=sorted(LOSSES),
    )
    kl_weight: NaturalFloat = flag(1.0, "with --loss mse+kl")
    learning_rate: PositiveFloat = flag(1e-3, "at its highest")
    schedule: str = flag("linear", "of the rate after the warm-up", choices=sorted(SCHEDULES))
    warmup_steps: Natural = flag(10, "in which the learning rate rises from 0")
    relative_steps: bool = flag(
        False, "the rate is a share of each weight's size at the start: for what least squares set"
    )
    weight_decay: NaturalFloat = flag(0.0, "of AdamW")
    max_grad_norm: NaturalFloat = flag(1.0, "clip gradients to this norm; 0: never")
    bf16: bool = flag(False, "compute in bfloat16 (autocast); in float32 on CPUs without such products")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, more time")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Start."""

    init: Literal["copy", "least-squares"] = flag(
        "copy",
        "of a plugin's adapters. copy: every token gets its group's output, as in the paper. least-squares: the "
        "best linear map in closed form, layer by layer, whatever --plugin holds",
    )
    init_tokens: PositiveInt = flag(16384, "tokens that least squares read")
    init_steps: PositiveInt = flag(
        1000, "with --activation tanh: gradient steps of each layer by itself, after its least squares"
    )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores (--compressor kv=select)."""

    fit_samples: PositiveInt = flag(200, "contexts that the scores are fitted on")
    fit_tokens: tuple[PositiveInt, ...] = flag(
        (512, 2048, 4096), "their lengths; each of them gets as many tokens", metavar="TOKENS"
    )
    calibrate_tokens: tuple[PositiveInt, ...] = flag(
        (512,), "prompt lengths at which no more than --keep is kept", metavar="TOKENS"
    )
    beside: str | None = flag(
        None,
        "fit them to the model as it reads with this plugin, which merges in FFNs; what is saved does both",
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True)
class Logs:
    """Logs and checkpoints."""

    eval_every: PositiveInt = flag(100, "steps between held-out evaluations")
    save_every: Natural = flag(
        100,
        "steps between checkpoints; 0: none. finetune and adapt keep the best, and need one at every evaluation",
    )
    patience: PositiveInt | None = flag(
        None, "stop after this many evaluations without a new best (finetune and adapt; default: never)"
    )
    save_total_limit: PositiveInt = flag(2, "checkpoints kept")
    drop_checkpoints: bool = flag(False, "delete the checkpoints once the run is finished")
    save_dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "of the finished plugin")
    logging_every: PositiveInt = flag(10, "steps between log lines")
    tensorboard: bool = flag(False, "write TensorBoard logs to OUTPUT/runs")


@dataclass(frozen=True, kw_only=True)
class Settings(
    Logs, Scores, Start, Optimisation, OnTask, PlainText, Baselines, flags.PluginConfig, flags.BaseModel
):
    """Train a compression plugin: the model with it learns to reproduce the model without it.

    Also the fine-tuned models it is adapted to, and the baselines it is compared with.
    """

    stage: Literal["pretrain", "finetune", "adapt"] = flag(
        "pretrain",
        "pretrain: on plain text, for any task; finetune: the model itself on a task; adapt: on a task, "
        "with the fine-tuned --model as teacher",
    )
    task: str | None = flag(None, "for finetune and adapt", choices=tuple(TASKS))
    method: Literal["variator", "distill", "ltp"] = flag(
        "variator", "variator: a plugin; distill: a smaller student; ltp: token pruning (adapt only)"
    )
    name: str | None = flag(
        None, "name of the run and of its default output folder (default: from the flags)"
    )
    output: Path | None = flag(
        None, "for what is trained and checkpoints (default: runs/NAME)", metavar="DIR"
    )
    resume: bool = flag(False, "go on from the last complete checkpoint in the output folder")
    plugin: Names = flag(
        (),
        "start from this plugin instead of a new one; several of different sites, A,B, are joined",
        metavar="DIR",
    )
    seed: Seed = flag(0, "of data order, prompt lengths and initial weights")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to train")
    dtype: str | None = flag(
        None,
        "of the frozen base (default: as stored); weights that are trained are float32, whole models too",
    )

    def __post_init__(self) -> None:
        if self.stage != "pretrain" and self.task is None:
            raise VariatorError(f"--stage {self.stage} needs a --task: one of {', '.join(TASKS)}")
        if self.stage == "pretrain" and self.task is not None:
            raise VariatorError("--stage pretrain knows no task: leave --task out, or give --stage adapt")
        if self.stage == "pretrain" and self.method == "ltp":
            raise VariatorError("token pruning has nothing to pre-train: give --stage adapt and a --task")
        if self.stage != "pretrain" and self.recall:
            raise VariatorError("--recall belongs to --stage pretrain")
        if self.stage != "adapt" and self.task_weight:
            raise VariatorError("--task-weight belongs to --stage adapt")
        if self.stage != "finetune" and self.lora:
            raise VariatorError("--lora belongs to --stage finetune")
        if self.gradient_checkpointing and self.stage != "finetune" and self.method != "variator":
            raise VariatorError(
                f"--gradient-checkpointing is for plugins and --stage finetune: leave it out for --method {self.method}"
            )
        if self.recall > 1:
            raise VariatorError(f"--recall is a share of the windows, at most 1; got {self.recall:g}")
        is_plugin = self.stage != "finetune" and self.method == "variator"
        if self.quantize and not (is_plugin or self.lora):
            raise VariatorError(
                "--quantize is for a frozen base: train a plugin on it, or add --lora; whole models learn in float32"
            )
        config_flags = self.plugin_flags_given()
        if not is_plugin and (given := config_flags + ["--plugin"] * bool(self.plugin)):
            what = "--stage finetune" if self.stage == "finetune" else f"--method {self.method}"
            raise VariatorError(f"{what} trains no plugin: leave out {', '.join(given)}")
        if not is_plugin and self.init != "copy":
            raise VariatorError(f"--init {self.init} is for plugins: leave it out")
        if len(self.plugin) > 1:
            config_flags = [name for name in config_flags if name not in ("--dense-head", "--dense-tail")]
        if self.plugin and config_flags:
            raise VariatorError(f"--plugin keeps its own configuration: leave out {', '.join(config_flags)}")
        if self.student and self.method != "distill":
            raise VariatorError("--student belongs to --method distill")
        if self.patience and not self.keeps_best:
            raise VariatorError(
                "--patience needs a best checkpoint to go back to: give --stage finetune or adapt, and --save-every"
            )
        if self.keeps_best and self.save_every != self.eval_every:
            raise VariatorError(
                f"the best checkpoint can only be kept if every evaluation has one: give --save-every "
                f"{self.eval_every}, as --eval-every, or --save-every 0 to keep the last weights"
            )
        if self.beside and not self.fits_scores:
            raise VariatorError(
                "--beside is for scores that are fitted: give --sites kv --compressor kv=select, and no --plugin"
            )
        if self.keep != Baselines.keep and self.method != "ltp" and not self.fits_scores:
            raise VariatorError(
                "--keep is for --method ltp, and for scores that are fitted: --sites kv --compressor kv=select"
            )
        if self.max_steps == 0 and not self._is_closed_form():
            raise VariatorError(
                "--max-steps 0 leaves nothing to do: give steps, --init least-squares, or --plugin A,B to join them"
            )

    def _is_closed_form(self) -> bool:
        """Whether something is left to do without steps."""
        return self.fits_scores or len(self.plugin) > 1 or self.init == "least-squares"

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return 1000 if self.max_steps is None else self.max_steps

    @property
    def keeps_best(self) -> bool:
        """Whether the best checkpoint is what is kept in the end, not the last."""
        return self.stage != "pretrain" and self.save_every > 0

    @property
    def fits_scores(self) -> bool:
        """Whether a plugin is asked for whose scores are fitted in closed form."""
        is_new = self.stage == "pretrain" and self.method == "variator" and not self.plugin
        return is_new and self.plugin_config().selects

    @property
    def on_cpu(self) -> bool:
        """Whether it trains on the CPU."""
        return self.device == "cpu" or not torch.cuda.is_available()

    def ends_given(self) -> dict[str, int]:
        """The dense ends that the user or the recipe gave."""
        ends = {"dense_head": self.dense_head, "dense_tail": self.dense_tail}
        return {name: count for name, count in ends.items() if count is not None}

    @property
    def folder(self) -> Path:
        """Where the run is kept: --output, or runs/NAME."""
        return self.output or Path("runs") / (self.name or self._default_name())

    def _default_name(self) -> str:
        """A name that tells apart runs of different model, stage, method, ratio and sites."""
        parts = [Path(self.model).name]
        if self.stage != "pretrain":
            parts += [self.stage, str(self.task)]
        if self.stage != "finetune":
            if self.method != "variator":
                parts.append(self.method)
            elif self.plugin:
                parts.append(f"from-{'-'.join(Path(plugin).name for plugin in self.plugin)}")
            else:
                config = self.plugin_config()
                ratios = [config.k] if isinstance(config.k, int) else config.k.values()
                kept = [f"keep{self.keep:g}"] if config.selects else [f"k{'-'.join(map(str, ratios))}"]
                parts += [*kept, *config.sites]
                parts += [f"beside-{Path(self.beside).name}"] if self.beside else []
        return "-".join(parts)


def check_machine(settings: Settings) -> None:
    """Raise for devices that are not here, or that one process cannot use."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise VariatorError("--device cuda: PyTorch finds no CUDA device here; try --device auto")
    # The Trainer would put torch's DataParallel around the model, whose threads do not see the active plugin.
    if settings.device != "cpu" and torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise VariatorError(
            "several GPUs are visible: start with torchrun, or name one in CUDA_VISIBLE_DEVICES"
        )
