"""What each stage of training puts together: a learner, its examples, its objective and its judge."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from llm_variator.baselines import TokenPruning, make_student, take_head
from llm_variator.engine.blocks import Place, reduces
from llm_variator.engine.groups import split
from llm_variator.errors import VariatorError
from llm_variator.model import VariatorModel
from llm_variator.sources.corpora import parse_sources
from llm_variator.sources.models import load_config, load_model, load_tokenizer
from llm_variator.sources.tasks import find_task, load_examples
from llm_variator.sources.tasks.examples import Example
from llm_variator.sources.tasks.forms import IGNORED, TaskForm, form_for
from llm_variator.sources.tasks.table import Task
from llm_variator.train.corruption import SPECIAL_TOKENS, Corrupted, span_corruption, stack, token_masking
from llm_variator.train.data import Corpus, ExampleStream, TrainingStream, build_corpus, collate
from llm_variator.train.distributed import announce
from llm_variator.train.judges import ContinuationJudge, Judge, LossJudge, TaskJudge
from llm_variator.train.learners import Learner, ModelLearner, PluginLearner
from llm_variator.train.least_squares import restoring_sites
from llm_variator.train.objective import Objective
from llm_variator.train.settings import Settings
from llm_variator.train.trainer import examples_in

SEQ_LENGTH = {"decoder": 384, "encoder": 128}  # of windows; 128 is the paper's (appendix A.1)
LORA_TARGETS = {"t5": ["q", "v"], "mt5": ["q", "v"], "bert": ["query", "value"]}


@dataclasses.dataclass
class Run:
    """Everything a trainer needs for one run."""

    learner: Learner
    tokenizer: PreTrainedTokenizerBase
    stream: Callable[[TrainingArguments], Any]
    """All examples of the run, once its length is known."""
    collate: Callable[[Any], dict[str, Any]]
    objective: Objective
    judge: Judge
    """Of the evaluations on the way."""
    final_judge: Judge
    """Of the result."""
    data: dict[str, str]
    """What it is trained and measured on, in words: for the model card and the result file."""
    distance: Judge | None = None
    """Of the result too, where a fine-tuned model teaches: how far its predictions are from the teacher's."""

    @property
    def plugin(self) -> VariatorModel | None:
        """The model whose plugin is trained, if it is a plugin that is trained."""
        model = self.learner.model
        return model if isinstance(model, VariatorModel) else None


def prepare(settings: Settings) -> Run:
    """Load model and data for the stage that the flags name.

    Raises:
        VariatorError: they cannot be loaded, or do not go together.
    """
    if settings.stage == "pretrain":
        config = load_config(settings.model)
        is_decoder = not config.is_encoder_decoder and config.model_type != "bert"
        return _pretrain_decoder(settings) if is_decoder else _pretrain_encoder(settings)
    return _task_run(settings)


# --- plain text


def _pretrain_decoder(settings: Settings) -> Run:
    if settings.method != "variator":
        raise VariatorError("the baselines of the paper are encoders': T5 or BERT, not a decoder")
    seq_length = settings.seq_length or SEQ_LENGTH["decoder"]
    prompt_tokens = settings.prompt_range(seq_length)
    tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
    corpus = _corpus(settings, tokenizer, seq_length)
    learner = _plugin_learner(settings, _base(settings))
    _check_prompts(learner.model, prompt_tokens[0])
    judge = ContinuationJudge(
        corpus.held_out, continuation=settings.continuation, batch_size=settings.batch_size
    )

    def stream(arguments: TrainingArguments) -> TrainingStream:
        return TrainingStream(
            corpus,
            length=examples_in(arguments),
            batch_size=arguments.train_batch_size,
            prompt_tokens=prompt_tokens,
            seed=settings.seed,
            recall=settings.recall,
        )

    announce(
        f"{sum(map(len, corpus.train)):,} windows of {seq_length} tokens to train on, "
        f"{len(corpus.held_out)} held out; prompts of {prompt_tokens[0]} to {prompt_tokens[1]} tokens"
    )
    objective = Objective(
        learner, settings.loss, kl_weight=settings.kl_weight, continuation=settings.continuation
    )
    return Run(learner, tokenizer, stream, collate, objective, judge, judge, _texts(settings))


def _pretrain_encoder(settings: Settings) -> Run:
    if settings.recall:
        raise VariatorError("--recall is for decoders: nothing follows what an encoder reads")
    tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
    base = _for_short_rows(settings, _base(settings))
    if settings.method == "variator":
        learner: Learner = _plugin_learner(settings, base)
    else:
        learner = ModelLearner(_student(settings, base), base)
    if base.config.is_encoder_decoder:
        corruption = span_corruption(tokenizer, base.config.decoder_start_token_id)
    else:
        corruption = token_masking(tokenizer)
    seq_length = settings.seq_length or SEQ_LENGTH["encoder"]
    positions = getattr(base.config, "max_position_embeddings", None)  # BERT's
    if positions is not None and seq_length + SPECIAL_TOKENS > positions:
        raise VariatorError(
            f"--seq-length {seq_length}: with its {SPECIAL_TOKENS} special tokens a window is longer than the model's "
            f"{positions} positions; give {positions - SPECIAL_TOKENS} or less"
        )
    corpus = _corpus(settings, tokenizer, seq_length)
    objective = Objective(learner, settings.loss, kl_weight=settings.kl_weight)
    held_out = Corrupted(list(corpus.held_out), corruption, seed=0)
    rows = [held_out[index] for index in range(len(held_out))]
    size = settings.batch_size
    judge = LossJudge(objective, [stack(rows[start : start + size]) for start in range(0, len(rows), size)])

    def stream(arguments: TrainingArguments) -> Corrupted:
        windows = TrainingStream(
            corpus,
            length=examples_in(arguments),
            batch_size=arguments.train_batch_size,
            prompt_tokens=(seq_length, seq_length),
            seed=settings.seed,
        )
        return Corrupted(windows, corruption, seed=settings.seed)

    announce(
        f"{sum(map(len, corpus.train)):,} windows of {seq_length} tokens to train on, "
        f"{len(corpus.held_out)} held out"
    )
    return Run(learner, tokenizer, stream, stack, objective, judge, judge, _texts(settings))


def _base(settings: Settings, num_labels: int | None = None) -> PreTrainedModel:
    """The base model. A quantised one is made where it is used; the Trainer moves the others there."""
    device = "cpu"
    if settings.quantize and not settings.on_cpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return load_model(settings.model, **settings.loading(), num_labels=num_labels, device=device)


def _corpus(settings: Settings, tokenizer: PreTrainedTokenizerBase, seq_length: int) -> Corpus:
    return build_corpus(
        parse_sources(settings.data),
        tokenizer,
        seq_length=seq_length,
        eval_windows=settings.eval_windows,
        eval_sources=parse_sources(settings.eval_data) if settings.eval_data else (),
        data_dir=settings.data_dir,
    )


def _texts(settings: Settings) -> dict[str, str]:
    return {
        "trained on": ", ".join(settings.data),
        "held out": ", ".join(settings.eval_data) or "other documents of the same text",
    }


# --- tasks


def _task_run(settings: Settings) -> Run:
    task = _task(settings)
    tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
    train = load_examples(task, "train", data_dir=settings.data_dir, limit=settings.train_limit)
    test = load_examples(task, "validation", data_dir=settings.data_dir, limit=settings.test_limit)
    validation = _part(test, settings.eval_limit)
    base = _load(settings)
    form = form_for(base, task, tokenizer, max_length=settings.max_length)
    learner = _finetuned(settings, base) if settings.stage == "finetune" else _adapted(settings, base)
    distillation = None if settings.stage == "finetune" else settings.loss
    objective = Objective(
        learner, distillation, kl_weight=settings.kl_weight, task_weight=settings.task_weight
    )

    def stream(arguments: TrainingArguments) -> ExampleStream:
        return ExampleStream(
            train,
            length=examples_in(arguments),
            batch_size=arguments.train_batch_size,
            seed=settings.seed,
        )

    announce(f"{task.name}: {len(train):,} examples to train on, {len(test):,} to test on")
    data = {
        "trained on": f"{train[0].origin.name}: {train[0].origin.describe(len(train))}",
        "measured on": f"{test[0].origin.name}: {test[0].origin.describe(len(test))}",
    }
    judges = (_judge(form, validation, settings), _judge(form, test, settings))
    distance = None if distillation is None else _distance(learner, form, validation, settings)
    return Run(learner, tokenizer, stream, form.collate, objective, *judges, data, distance)


def _task(settings: Settings) -> Task:
    assert settings.task is not None  # of every stage but pretrain
    return find_task(settings.task)


def _load(settings: Settings) -> PreTrainedModel:
    """The model; a BERT with a head for the task's labels."""
    labels = len(_task(settings).answers) or None
    is_bert = load_config(settings.model).model_type == "bert"
    return _for_short_rows(settings, _base(settings, num_labels=labels if is_bert else None))


def _judge(form: TaskForm, examples: Sequence[Example], settings: Settings) -> TaskJudge:
    return TaskJudge(form, examples, batch_size=max(8, settings.batch_size))


def _distance(learner: Learner, form: TaskForm, examples: Sequence[Example], settings: Settings) -> LossJudge:
    rows = sorted(examples, key=lambda example: example.size)
    size = settings.batch_size
    batches = [form.collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    tokens = [int((batch["labels"] != IGNORED).sum()) for batch in batches]  # of answers; a classifier's rows
    return LossJudge(Objective(learner, "kl"), batches, tokens)


def _part(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """`count` examples, evenly spread; all where there are fewer."""
    if len(examples) <= count:
        return examples
    return [examples[index] for index in torch.linspace(0, len(examples) - 1, count).long().tolist()]


def _finetuned(settings: Settings, base: PreTrainedModel) -> ModelLearner:
    """The downstream model M_T, which learns from the labels: whole, or by LoRA on q and v."""
    set_seed(settings.seed)
    if settings.gradient_checkpointing:
        # the newer releases of transformers call it so
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if not settings.lora:
        return ModelLearner(base.float().requires_grad_(True))
    from peft import LoraConfig, get_peft_model

    targets = LORA_TARGETS.get(base.config.model_type, ["q_proj", "v_proj"])
    lora = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        target_modules=targets,
        modules_to_save=["classifier"] if hasattr(base, "classifier") else None,
    )
    model = get_peft_model(base, lora)
    model.peft_config[
        "default"
    ].base_model_name_or_path = settings.model  # what load_model reads, not a cache
    return ModelLearner(model)


def _adapted(settings: Settings, teacher: PreTrainedModel) -> Learner:
    """A plugin on M_T, or a baseline that M_T teaches."""
    if settings.method == "variator":
        return _plugin_learner(settings, teacher)
    if settings.method == "distill":
        return ModelLearner(_student(settings, teacher), teacher)
    student = _load(settings).float().requires_grad_(True)
    return ModelLearner(student, teacher, extra=TokenPruning(student, settings.keep))


# --- learners


def _plugin_learner(settings: Settings, base: PreTrainedModel) -> PluginLearner:
    set_seed(settings.seed)
    model = VariatorModel(base, None if settings.plugin else settings.plugin_config())
    if len(settings.plugin) == 1:
        model.load_plugin(settings.plugin[0], "default", dtype=torch.float32)
        model.set_plugin("default")
    elif settings.plugin:
        for folder in settings.plugin:
            model.load_plugin(folder, f"part {len(model.plugins)}", dtype=torch.float32)
        parts = list(model.plugins)
        model.join_plugins(parts, "default", **settings.ends_given())
        model.set_plugin("default")
        for part in parts:
            model.delete_plugin(part)
    plugin = model.plugin()
    if not any(True for _ in plugin.parameters()):
        raise VariatorError(
            "nothing to train in mean and copy: choose --compressor weighted or --decompressor adapter"
        )
    if settings.init == "least-squares":
        restoring_sites(plugin)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return PluginLearner(model)


def _for_short_rows(settings: Settings, model: PreTrainedModel) -> PreTrainedModel:
    """On a CPU with attention as plain products: the backward pass of torch's fused one is slower there."""
    if settings.on_cpu:
        model.set_attn_implementation("eager")
    return model


def _student(settings: Settings, teacher: PreTrainedModel) -> PreTrainedModel:
    if settings.student is None:
        student = make_student(teacher, settings.student_layers)
    elif not hasattr(teacher, "classifier"):
        student = load_model(settings.student)
    else:
        student = load_model(settings.student, num_labels=teacher.config.num_labels)
        if type(student).__name__ not in (load_config(settings.student).architectures or ()):
            take_head(student, teacher)  # it was pre-trained without one
    return _for_short_rows(settings, student).float().requires_grad_(True)


def _check_prompts(model: VariatorModel, prompt_tokens: int) -> None:
    """Raise where a prompt could be too short for a group."""
    plugin = model.plugin()
    head, tail = plugin.config.ends
    if not plugin.sites:
        block = plugin.config.block
        if not reduces(Place(head, tail), block, prompt_tokens):
            raise VariatorError(
                f"prompts of {prompt_tokens} tokens stay dense, no block of {block} is reduced between {head} dense "
                f"first and {tail} dense last tokens: raise --prompt-tokens or --seq-length"
            )
        return
    k = min(site.k for site in plugin.sites.values())
    if not split(prompt_tokens, k, head, tail).groups:
        raise VariatorError(
            f"prompts of {prompt_tokens} tokens hold no group of {k} between {head} dense first and {tail} "
            "dense last tokens: raise --prompt-tokens or --seq-length, or lower --dense-tail"
        )
