"""Situations from public reports about libraries of this kind: the right answer, or one line that names the mend."""

from __future__ import annotations

import copy
import warnings
from inspect import signature

import numpy as np
import pytest
import torch
import transformers
from conftest import make_decoder, make_encoder, make_variator, pad, prompts, randomise
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    LogitsProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

from llm_variator import CompressedContext, VariatorConfig, VariatorError, VariatorModel
from llm_variator.sources.models import byte_tokenizer

CONFIG = VariatorConfig(k=2, sites=("ffn", "kv"), r=5, dense_head=1, dense_tail=2)
GREEDY = dict(max_new_tokens=6, do_sample=False)


# A context belongs to the function that its base computed.


@pytest.fixture
def adapted():
    """A plugin on a base with two LoRA adapters, "a" in use."""
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    base = get_peft_model(make_decoder("llama"), lora, adapter_name="a")
    base.add_adapter("b", lora)
    model = VariatorModel(base, CONFIG)
    randomise(model.plugin())
    return model


def rescale(model):
    for module in model.base.modules():
        if isinstance(module.__dict__.get("scaling"), dict):
            module.scaling["a"] *= 2


@torch.no_grad()
def train_a_step(model, of):
    next(weights for name, weights in model.base.named_parameters() if of in name).add_(0.01)


def take_weights(model):
    model.base.load_state_dict(
        {name: value + 0.01 for name, value in model.base.state_dict().items()}, assign=True
    )


CHANGES = {
    "another adapter": (lambda m: m.base.set_adapter("b"), "adapters"),
    "adapters off": (lambda m: m.base.base_model.disable_adapter_layers(), "adapters"),
    "rescaled": (rescale, "adapters"),
    "another number format": (lambda m: m.bfloat16(), "number format"),
    "another setting": (lambda m: setattr(m.base.config, "rms_norm_eps", 0.1), "settings"),
    "a trained base": (lambda m: train_a_step(m, "up_proj.weight"), "weights"),
    "a trained adapter": (lambda m: train_a_step(m, "lora_B.a"), "weights"),
    "loaded weights": (take_weights, "weights"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_context_of_another_function_is_refused(adapted, change, tmp_path):
    alter, what = CHANGES[change]
    document, question = prompts(30, 7)
    context = adapted.compress(document)
    expected = adapted.generate(question, context=context, **GREEDY)
    context.save(tmp_path / "context.safetensors")
    again = CompressedContext.load(tmp_path / "context.safetensors", adapted)
    assert torch.equal(adapted.generate(question, context=again, **GREEDY), expected)
    alter(adapted)
    for use in (
        lambda: adapted.generate(question, context=context, **GREEDY),
        lambda: context.fork().extend(question),
        lambda: copy.deepcopy(context),
        lambda: context.save(tmp_path / "another.safetensors"),
    ):
        with pytest.raises(VariatorError, match=rf"other {what} of the base model|has changed since"):
            use()
    assert not (tmp_path / "another.safetensors").exists()
    with pytest.raises(
        VariatorError, match=rf"other {what} of the base model|was made in torch.float32|has other weights"
    ):
        CompressedContext.load(tmp_path / "context.safetensors", adapted)


def test_what_does_not_change_the_function_is_no_reason_to_refuse():
    model, (document, question) = make_variator("llama", CONFIG), prompts(30, 7)
    context = model.compress(document)
    expected = model.generate(question, context=context, **GREEDY)
    model.base.config.use_cache = False
    model.base.config.eos_token_id = 5
    model.base._apply(torch.clone)  # what moving to another device does
    other, twin = copy.deepcopy((model, context))
    assert torch.equal(other.generate(question, context=twin, use_cache=True, **GREEDY), expected)
    assert torch.equal(model.generate(question, context=context, use_cache=True, **GREEDY), expected)


def test_one_changed_value_is_enough(tmp_path):
    model, (document,) = make_variator("llama", CONFIG), prompts(30)
    model.compress(document).save(tmp_path / "context.safetensors")
    with torch.no_grad():
        model.base.model.layers[1].mlp.up_proj.weight[7, 11] += 1e-3  # none of a sample of values
    with pytest.raises(VariatorError, match="other weights"):
        CompressedContext.load(tmp_path / "context.safetensors", model)


# Several documents in a row.


@pytest.mark.parametrize("sites", [("ffn",), ("ffn", "kv")])
def test_packed_sequences_are_refused(sites):
    model = make_variator("llama", VariatorConfig(k=2, sites=sites, r=5))
    row = torch.cat(prompts(24, 24), dim=1)
    positions = torch.arange(24).repeat(2)[None]
    with pytest.raises(VariatorError, match="packed sequences"):
        model(row, position_ids=positions)
    with pytest.raises(VariatorError, match="packed sequences"):
        model(row, cu_seq_lens_q=torch.tensor([0, 24, 48]))
    with model.disable_plugin():
        model(row, position_ids=positions)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padding_are_no_packing(side):
    model = make_variator("llama", CONFIG)
    batch = pad(prompts(20, 9), side)
    positions = (batch["attention_mask"].cumsum(1) - 1).masked_fill(batch["attention_mask"] == 0, 1)
    model(**batch, position_ids=positions)
    model(prompts(20)[0], position_ids=torch.arange(5, 25)[None])


# Bases with virtual tokens, and generation that reads more than its prompt.


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_soft_prompts_are_refused(config):
    base = get_peft_model(make_decoder("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(VariatorError, match="soft prompts"):
        VariatorModel(base, CONFIG)


def test_guidance_is_refused_before_anything_is_computed():
    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    with pytest.raises(VariatorError, match="guidance_scale"):
        model.generate(ids, guidance_scale=1.5, **GREEDY)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, guidance_scale=1.0, **GREEDY), expected)


class _Second(LogitsProcessor):
    """Reads another prompt at every step."""

    def __init__(self, call):
        self.call = call

    def __call__(self, ids, scores):
        return scores + 0.5 * self.call(prompts(11, seed=3)[0]).logits[:, -1]


def test_a_processor_that_reads_a_prompt_of_its_own():
    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    with pytest.raises(VariatorError, match="have it call the VariatorModel"):
        model.generate(ids, logits_processor=[_Second(lambda x: model.base(input_ids=x))], **GREEDY)
    with pytest.raises(VariatorError, match="have it call the VariatorModel"):
        model.generate(ids, logits_processor=[_Second(lambda x: model.base(x))], **GREEDY)
    added = 0.5 * model(prompts(11, seed=3)[0]).logits[:, -1]
    by_hand = model.generate(ids, logits_processor=[lambda _, scores: scores + added], **GREEDY)
    out = model.generate(ids, logits_processor=[_Second(model)], **GREEDY)
    assert torch.equal(out, by_hand)
    assert model.kv_cache_report().layers[0].dense_entries >= 20, (
        "of the answer, not of the processor's prompt"
    )


# Offloaded bases.


def test_contexts_of_a_base_whose_layers_lie_on_disk(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    document, question = prompts(30, 7)
    plain = make_variator("llama", CONFIG)
    expected = plain.generate(question, context=plain.compress(document), **GREEDY)
    plain.compress(document).save(tmp_path / "context.safetensors")
    base = accelerate.disk_offload(make_decoder("llama"), tmp_path / "weights", execution_device="cpu")
    assert all(parameter.is_meta for parameter in base.parameters())
    model = VariatorModel(base, CONFIG)
    model.plugin().load_state_dict(plain.plugin().state_dict())
    context = model.compress(document)
    assert torch.equal(model.generate(question, context=context, **GREEDY), expected)
    context.save(tmp_path / "own.safetensors")
    for file in ("own", "context"):
        again = CompressedContext.load(tmp_path / f"{file}.safetensors", model)
        assert torch.equal(model.generate(question, context=again, **GREEDY), expected)


# Model cards.


@pytest.mark.parametrize("name", ["run: 1", "no", "v2 #best", "123", "a\nb", 'quo"ted'])
def test_any_name_fits_a_model_card(name, tmp_path):
    base = make_decoder("llama")
    base.config._name_or_path = name
    model = VariatorModel(base, CONFIG)
    model.save_pretrained(tmp_path, facts={"data": "a | b\nc"})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == name
    (row,) = [line for line in card.content.splitlines() if line.startswith("| data")]
    assert row == r"| data | a \| b c |"
    assert [line.count("|") for line in card.content.splitlines() if line.startswith("| k ")] == [3]


# The Trainer as everybody uses it.


def data(column="labels"):
    rows = [row[0].tolist() for row in prompts(*[24] * 8)]
    return Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * 24] * 8, column: rows, "note": ["x"] * 8}
    )


def arguments(folder, **more):
    given = dict(
        max_steps=4, per_device_train_batch_size=2, save_steps=2, logging_steps=1, eval_strategy="steps"
    )
    return TrainingArguments(str(folder), **given, eval_steps=2, use_cpu=True, report_to="none", **more)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plain_trainer_trains_saves_and_resumes_the_plugin_alone(tmp_path, checkpointing):
    config = VariatorConfig(k=2, sites=("ffn", "kv"), r=5)

    def trainer(folder):
        model = VariatorModel(make_decoder("llama"), config)
        name = (
            "activation"
            if "activation_checkpointing" in signature(TrainingArguments).parameters
            else "gradient"
        )
        more = {f"{name}_checkpointing": True} if checkpointing else {}
        return Trainer(model, arguments(folder, **more), train_dataset=data(), eval_dataset=data())

    whole = trainer(tmp_path / "whole")
    before = {name: value.clone() for name, value in whole.model.base.state_dict().items()}
    start = {name: value.clone() for name, value in whole.model.plugin().state_dict().items()}
    whole.train()
    assert {"loss", "eval_loss"} <= {name for entry in whole.state.log_history for name in entry}
    assert all(torch.equal(value, before[name]) for name, value in whole.model.base.state_dict().items())
    trained = whole.model.plugin().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in trained.items())
    saved = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == {f"plugin_default.{name}" for name in trained}
    again = trainer(tmp_path / "whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in again.model.plugin().state_dict().items():
        torch.testing.assert_close(value, trained[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["activation", "gradient"])
def test_checkpointing_under_either_name_keeps_less(kind):
    def kept(enable):
        model = make_variator("llama", CONFIG)
        model.train()
        if enable:
            getattr(model, f"{kind}_checkpointing_enable")()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(prompts(40)[0], labels=prompts(40)[0]).loss.backward()
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


def test_weights_that_are_not_the_plugins_are_refused():
    model = make_variator("llama", CONFIG)
    weights = model.state_dict()
    with pytest.raises(VariatorError, match="not the plugins' weights: 0 missing"):
        model.load_state_dict({**weights, "base.lm_head.weight": torch.zeros(1)})
    doubled = {name: value * 2 for name, value in weights.items()}
    model.load_state_dict(doubled)
    assert all(torch.equal(value, doubled[name]) for name, value in model.state_dict().items())


def test_what_a_base_takes_by_position():
    model, (ids,) = make_variator("bert", VariatorConfig(k=2, sites=("ffn",), r=5)), prompts(20)
    mask, kinds = torch.ones_like(ids), (torch.arange(20) > 9).long()[None]
    by_name = model(ids, mask, token_type_ids=kinds).logits
    assert torch.equal(model(ids, mask, kinds).logits, by_name)
    assert not torch.equal(model(ids, mask).logits, by_name)


# What is given in another form than expected.


def test_lists_and_numpy_integers():
    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids[0].tolist(), **GREEDY), expected)
    assert torch.equal(model.generate([ids[0].numpy()[i] for i in range(20)], **GREEDY), expected)
    two = model.generate([ids[0].tolist(), ids[0, :9].tolist()], **GREEDY)
    assert torch.equal(two[0], expected[0])
    with pytest.raises(VariatorError, match="need a tokenizer"):
        model.generate("a text", **GREEDY)
    logits = model(ids, prompt_length=12).logits
    assert torch.equal(model(ids, prompt_length=np.int64(12)).logits, logits)
    assert torch.equal(model(ids, prompt_length=np.array([12])).logits, logits)


def test_a_generation_config_draws_no_warning():
    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    settings = copy.deepcopy(model.generation_config)
    settings.update(**GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model.generate(ids, generation_config=settings)
    assert torch.equal(out, model.generate(ids, **GREEDY))


def test_what_cannot_be_used_is_refused(tmp_path):
    model = make_variator("llama", CONFIG)
    model.save_pretrained(tmp_path)
    with pytest.raises(VariatorError, match="dtype, nonsense: for loading a model by name"):
        VariatorModel.from_pretrained(make_decoder("llama"), tmp_path, dtype=torch.bfloat16, nonsense=1)


# Pipelines of transformers.


@pytest.fixture
def errors(monkeypatch):
    """What transformers logs as an error, which it does not pass on to others' handlers."""
    found = []
    monkeypatch.setattr(transformers.pipelines.base.logger, "error", lambda *args: found.append(args))
    return found


def test_a_pipeline_generates_with_the_plugin(errors):
    model, tokenizer = make_variator("llama", CONFIG, vocab_size=259), byte_tokenizer()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["a text of some length, long enough to be merged", "a shorter one"]
    options = dict(GREEDY, return_full_text=False)

    def expected(text):
        ids = tokenizer(text, return_tensors="pt")
        return tokenizer.decode(model.generate(**ids, **GREEDY)[0, ids.input_ids.shape[1] :])

    merged = [expected(text) for text in texts]
    assert [generator(text, **options)[0]["generated_text"] for text in texts] == merged
    batch = generator(texts, batch_size=2, **options)
    assert [rows[0]["generated_text"] for rows in batch] == merged
    with model.disable_plugin():
        dense = expected(texts[0])
        assert generator(texts[0], **options)[0]["generated_text"] == dense != merged[0]
    assert not errors


def test_other_pipelines_are_quiet_and_right(errors):
    tokenizer = byte_tokenizer("bert")
    base = make_encoder("bert", vocab_size=260)
    model = VariatorModel(base, VariatorConfig(k=2, sites=("ffn", "attention"), r=5))
    randomise(model.plugin())
    text = "some text <mask> of a length"
    ids = tokenizer(text, return_tensors="pt")
    place = ids.input_ids[0].tolist().index(tokenizer.mask_token_id)
    best = model(**ids).logits[0, place].argmax().item()
    assert pipeline("fill-mask", model=model, tokenizer=tokenizer)(text)[0]["token"] == best

    tokenizer = byte_tokenizer()
    body = VariatorModel(make_decoder("llama", vocab_size=259).base_model, CONFIG)
    randomise(body.plugin())
    states = body(**tokenizer(text, return_tensors="pt")).last_hidden_state
    features = pipeline("feature-extraction", model=body, tokenizer=tokenizer)(text, return_tensors=True)
    assert torch.equal(features, states)

    base = make_encoder("bert", AutoModelForSequenceClassification, vocab_size=260)
    model = VariatorModel(base, VariatorConfig(k=2, sites=("ffn",), r=5))
    tokenizer = byte_tokenizer("bert")
    scores = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
    (found,) = pipeline("text-classification", model=model, tokenizer=tokenizer)(text)
    assert found["score"] == pytest.approx(scores.max().item(), rel=1e-5)
    assert not errors


def test_what_pipelines_do_not_know_is_still_said(errors):
    class Wrapped(VariatorModel):
        pass

    model = Wrapped(make_decoder("llama", vocab_size=259), CONFIG)
    pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    assert errors, "the list is transformers': a class of somebody else's is not on it"
