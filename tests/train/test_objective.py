"""The objective of T5, BERT and task batches, against plain passes without any padding."""

from __future__ import annotations

import pytest
import torch
from conftest import make_decoder, make_encoder, randomise
from transformers import AutoModelForSequenceClassification

from llm_variator import VariatorConfig, VariatorModel
from llm_variator.sources.models import byte_tokenizer
from llm_variator.sources.tasks import TASKS, Example, Origin
from llm_variator.sources.tasks.forms import form_for
from llm_variator.train.learners import ModelLearner, PluginLearner
from llm_variator.train.objective import Objective

ORIGIN = Origin("made up", 4, 4, official=False)
TASK = TASKS["rte"]
PAIRS = [
    Example(
        TASK,
        str(number),
        {"sentence1": one, "sentence2": two},
        number % 2,
        (TASK.answers[number % 2],),
        ORIGIN,
    )
    for number, (one, two) in enumerate([("ab", "c"), ("defg hij", "klm nop"), ("q", "r")])
]


def make(kind: str):
    if kind == "bert":
        model = make_encoder(
            "bert", AutoModelForSequenceClassification, vocab_size=384, max_position_embeddings=300
        )
    elif kind == "t5":
        model = make_encoder("t5", vocab_size=384)
    else:
        model = make_decoder("llama", vocab_size=384)
    return model.double()


def form_of(model, kind: str):
    base = model.base if isinstance(model, VariatorModel) else model
    return form_for(base, TASK, byte_tokenizer(kind))


def plugin_of(model) -> VariatorModel:
    wrapped = VariatorModel(model, VariatorConfig(k=2, r=4))
    randomise(wrapped.plugin(), std=0.1)
    wrapped.plugin().double()
    return wrapped


def hidden_of(model, batch) -> list[torch.Tensor]:
    """Last hidden states of a batch of one row: without padding there is nothing to mask."""
    out = model(**batch, output_hidden_states=True)
    if hasattr(out, "encoder_hidden_states"):
        return [out.encoder_last_hidden_state, out.decoder_hidden_states[-1]]
    return [out.hidden_states[-1]]


@pytest.mark.parametrize("kind", ["t5", "bert", "llama"])
def test_mse_of_a_padded_batch_is_the_mean_over_real_tokens(kind):
    model = plugin_of(make(kind))
    form = form_of(model, kind)
    loss = Objective(PluginLearner(model), "mse")(model, form.collate(PAIRS))
    errors: dict[int, list[torch.Tensor]] = {}
    for pair in PAIRS:
        row = form.collate([pair])
        del row["labels"]
        with model.disable_plugin():
            theirs = hidden_of(model, row)
        for stack, (one, other) in enumerate(zip(hidden_of(model, row), theirs, strict=True)):
            errors.setdefault(stack, []).append((one - other).square().mean(-1).flatten())
    expected = sum(torch.cat(parts).mean() for parts in errors.values())
    assert len(errors) == (2 if kind == "t5" else 1)
    assert expected > 1e-4
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["t5", "bert", "llama"])
def test_kl_counts_what_predicts_an_answer(kind):
    model = plugin_of(make(kind))
    form = form_of(model, kind)
    learner = PluginLearner(model)
    batch = form.collate(PAIRS)
    both = Objective(learner, "mse+kl", kl_weight=1.0)(model, batch)
    kl = (both - Objective(learner, "mse")(model, batch)).double()
    nats = []
    for pair in PAIRS:
        row = form.collate([pair])
        labels = row.pop("labels")
        ours = model(**row).logits
        with model.disable_plugin():
            theirs = model(**row).logits
        ours, theirs = (logits.reshape(-1, logits.shape[-1]).log_softmax(-1) for logits in (ours, theirs))
        if kind == "llama":
            ours, theirs, labels = ours[:-1], theirs[:-1], labels[:, 1:]
        each = (theirs.exp() * (theirs - ours)).sum(-1)
        nats.append(each if kind == "bert" else each[(labels != -100).flatten()])
    torch.testing.assert_close(kl, torch.cat(nats).mean(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["t5", "bert", "llama"])
def test_task_loss_is_the_models_own(kind):
    model = plugin_of(make(kind))
    batch = form_of(model, kind).collate(PAIRS)
    learner = PluginLearner(model)
    plain = Objective(learner, "mse")(model, batch)
    weighted = Objective(learner, "mse", task_weight=0.5)(model, batch)
    torch.testing.assert_close(
        (weighted - plain).double(), 0.5 * model(**batch).loss.double(), rtol=1e-5, atol=0
    )
    alone = ModelLearner(model.base)
    batch.pop("prompt_length", None)
    torch.testing.assert_close(Objective(alone, None)(model.base, batch), model.base(**batch).loss)


@pytest.mark.parametrize("kind", ["t5", "bert", "llama"])
def test_teacher_gets_no_gradient(kind):
    model = plugin_of(make(kind))
    learner = PluginLearner(model)
    Objective(learner, "mse+kl")(model, form_of(model, kind).collate(PAIRS)).backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())
    assert all(parameter.grad is not None for parameter in model.plugin().parameters())


def test_distillation_runs_without_dropout():
    student, teacher = make("t5"), make("t5")
    student.train()
    assert any(module.p > 0 for module in student.modules() if isinstance(module, torch.nn.Dropout))
    loss = Objective(ModelLearner(student, teacher), "mse")(student, form_of(student, "t5").collate(PAIRS))
    assert loss.item() == 0


def test_separate_teacher_is_frozen_and_teaches():
    student, teacher = make("t5"), make("t5")
    with torch.no_grad():
        for parameter in student.encoder.parameters():
            parameter.add_(0.01)
    learner = ModelLearner(student, teacher)
    Objective(learner, "mse")(student, form_of(student, "t5").collate(PAIRS)).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.encoder.block[0].layer[1].DenseReluDense.wi.weight.grad.abs().sum() > 0
