"""How each kind of model reads a task: layout of the batches, and predictions against brute force."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import make_decoder, make_encoder, randomise
from tokenizers import Tokenizer, normalizers
from tokenizers.models import Unigram
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.sources.models import byte_tokenizer
from llm_variator.sources.tasks import TASKS, Example, Origin, forms, label_from_log_likelihoods
from llm_variator.sources.tasks.forms import IGNORED, fitted, following, form_for, predict_all

T5, BERT, LLAMA = (byte_tokenizer(kind) for kind in ("t5", "bert", "llama"))
ORIGIN = Origin("made up", 4, 4, official=False)


def example(task: str, *inputs: str, label: int = 0, answer: str | None = None) -> Example:
    entry = TASKS[task]
    given = dict(zip(entry.columns, inputs, strict=True))
    golds = (entry.answers[label],) if entry.answers else (answer or "",)
    return Example(entry, "0", given, label if entry.answers else None, golds, ORIGIN)


MOVIES = [
    example("sst2", sentence, label=number % 2)
    for number, sentence in enumerate(["fun", "a dull and endless film", "so so", "what a joy !"])
]
PASSAGES = [
    example("squad", "who ?", "Ann ran home .", answer="Ann"),
    example("squad", "where ?", "At sea", answer="sea"),
]


def t5_model(dtype=torch.float64):
    model = make_encoder("t5", vocab_size=384).to(dtype)
    model.config.decoder_start_token_id = 0
    return model


def llama_model(dtype=torch.float64):
    return make_decoder("llama", vocab_size=384).to(dtype)


def compressed(model, **settings) -> VariatorModel:
    wrapped = VariatorModel(model, VariatorConfig(k=2, r=4, **settings))
    randomise(wrapped.plugin(), std=0.1)
    wrapped.plugin().to(model.dtype)
    return wrapped


# --- layout


def test_t5_reads_the_template_and_answers_after_the_sentinel():
    form = form_for(t5_model(), TASKS["sst2"], T5)
    batch = form.collate(MOVIES[:2])
    first = T5.convert_tokens_to_ids("<extra_id_0>")
    answer = T5("negative", add_special_tokens=False)["input_ids"]
    assert T5.decode(batch["input_ids"][0], skip_special_tokens=False).startswith(
        "Sentence: fun Does this sentence express positive or negative emotions? <extra_id_0></s>"
    )
    assert batch["decoder_input_ids"][0].tolist() == [0, first, *answer[:-1]]
    assert batch["labels"][0].tolist() == [IGNORED, *answer]
    assert batch["attention_mask"].sum(1).tolist() == [
        len(T5(movie.prompt)["input_ids"]) for movie in MOVIES[:2]
    ]


def test_free_text_of_t5_ends_with_the_next_sentinel():
    form = form_for(t5_model(), TASKS["squad"], T5)
    batch = form.collate(PASSAGES)
    first, last = T5.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    answer = T5("Ann", add_special_tokens=False)["input_ids"]
    assert batch["decoder_input_ids"][0].tolist() == [0, first, *answer]
    assert batch["labels"][0].tolist() == [IGNORED, *answer, last]


def test_decoder_reads_prompt_and_answer_in_one_row():
    form = form_for(llama_model(), TASKS["squad"], LLAMA)
    batch = form.collate(PASSAGES)
    for row, passage in enumerate(PASSAGES):
        prompt = LLAMA(passage.decoder_prompt)["input_ids"]
        answer = LLAMA(f" {passage.answer}\n")["input_ids"]
        assert batch["prompt_length"][row] == len(prompt)
        assert batch["input_ids"][row, : len(prompt) + len(answer)].tolist() == prompt + answer
        labels = batch["labels"][row]
        assert labels[labels != IGNORED].tolist() == answer
        assert (labels[: len(prompt)] == IGNORED).all()
        assert batch["attention_mask"][row].sum() == len(prompt) + len(answer)


def test_classifier_reads_the_bare_inputs():
    model = make_encoder("bert", AutoModelForSequenceClassification, vocab_size=384)
    form = form_for(model, TASKS["rte"], BERT)
    batch = form.collate([example("rte", "ab", "c", label=1)])
    assert BERT.decode(batch["input_ids"][0]) == "<s> ab </s> c </s>".replace(" ", "")
    assert batch["labels"].tolist() == [1]
    with pytest.raises(VariatorError, match="a classifier cannot give"):
        form_for(model, TASKS["squad"], BERT)


def test_t5_form_needs_t5s_tokenizer():
    with pytest.raises(VariatorError, match="has no '<extra_id_0>'"):
        form_for(t5_model(), TASKS["sst2"], LLAMA)


# --- long inputs


def test_long_input_loses_its_end_and_the_template_stays():
    long = example("squad", "who ?", "x" * 500)
    short = fitted(long, lambda item: len(T5(item.prompt)["input_ids"]), 120)
    assert len(T5(short.prompt)["input_ids"]) == 120
    assert short.inputs["question"] == "who ?"
    assert short.prompt.endswith("Answer: <extra_id_0>")
    assert fitted(short, lambda item: len(item.prompt), 10_000) is short
    with pytest.raises(VariatorError, match="does not fit in 20 tokens; raise --max-length"):
        fitted(long, lambda item: len(item.prompt), 20)


def test_of_two_long_inputs_both_lose_their_ends():
    both = example("mrpc", "x" * 600, "y" * 500)
    short = fitted(both, lambda item: len(item.prompt), 512)
    assert 511 <= len(short.prompt) <= 512
    assert len(short.inputs["sentence1"]) == len(short.inputs["sentence2"])
    uneven = fitted(example("mrpc", "x" * 600, "y" * 50), lambda item: len(item.prompt), 512)
    assert uneven.inputs["sentence2"] == "y" * 50


@pytest.fixture(scope="module")
def spaced() -> PreTrainedTokenizerFast:
    """As LLaMA's first two: a space before every text, and words that begin with theirs."""
    words = ["<unk>", "▁", "▁Answer", ":", "▁Yes", "▁No", "\n", "▁a", "▁Ann", "▁ab", "▁b"]
    made = Tokenizer(Unigram([(word, -1.0) for word in words], unk_id=0))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_what_follows_a_prompt_has_the_tokens_that_it_has_there(spaced):
    read = spaced.convert_ids_to_tokens
    assert read(spaced(" Yes")["input_ids"]) == ["▁", "▁Yes"]
    assert read(following(spaced, "Answer:", " Yes")) == ["▁Yes"]
    assert read(following(spaced, "a", "b")) == ["▁b"]  # not the end of "▁ab"
    assert following(LLAMA, "Answer:", " Yes") == LLAMA(" Yes")["input_ids"]
    form = form_for(llama_model(), TASKS["squad"], spaced)
    labels = form.collate([example("squad", "a", "a", answer="Ann")])["labels"][0]
    assert read(labels[labels != IGNORED].tolist()) == ["▁Ann", "\n"]


@pytest.mark.parametrize("labels", [1, 3])
def test_a_head_of_other_labels_is_refused(labels):
    model = make_encoder("bert", AutoModelForSequenceClassification, vocab_size=384, num_labels=labels)
    with pytest.raises(VariatorError, match=f"has {labels} labels, sst2 2: fine-tune it first"):
        form_for(model, TASKS["sst2"], BERT)


# --- predictions


def brute_force_t5(model, movie: Example) -> list[float]:
    """Summed log-probability of every answer, one row and one answer at a time, without padding."""
    first = T5.convert_tokens_to_ids("<extra_id_0>")
    scores = []
    for answer in movie.task.answers:
        tokens = T5(answer, add_special_tokens=False)["input_ids"]
        logits = model(
            input_ids=torch.tensor([T5(movie.prompt)["input_ids"]]),
            decoder_input_ids=torch.tensor([[0, first, *tokens]]),
        ).logits[0, 1:-1]
        scores.append(logits.log_softmax(-1)[range(len(tokens)), tokens].sum().item())
    return scores


def brute_force_decoder(model, movie: Example) -> list[float]:
    prompt = LLAMA(movie.decoder_prompt)["input_ids"]
    scores = []
    for answer in movie.task.answers:
        tokens = LLAMA(f" {answer}")["input_ids"]
        extra = {"prompt_length": len(prompt)} if isinstance(model, VariatorModel) else {}
        logits = model(input_ids=torch.tensor([prompt + tokens]), **extra).logits[0, len(prompt) - 1 : -1]
        scores.append(logits.log_softmax(-1)[range(len(tokens)), tokens].sum().item())
    return scores


@pytest.fixture
def scores(monkeypatch) -> list[list[float]]:
    """The log-likelihoods of every prediction, in the order in which they are made."""
    seen: list[list[float]] = []

    def remember(task, values):
        seen.append(values)
        return label_from_log_likelihoods(task, values)

    monkeypatch.setattr(forms, "label_from_log_likelihoods", remember)
    return seen


def check(form, model, movies, batch_size, expected, scores) -> None:
    scores.clear()
    labels = predict_all(form, model, movies, batch_size=batch_size)
    assert labels == [values.index(max(values)) for values in expected]
    assert sorted(scores) == [pytest.approx(values, abs=2e-5) for values in sorted(expected)]


@pytest.mark.parametrize("with_plugin", [False, True])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_labels_equal_brute_force_whatever_the_batch(kind, with_plugin, scores):
    model = t5_model() if kind == "t5" else llama_model()
    tokenizer, brute_force = (T5, brute_force_t5) if kind == "t5" else (LLAMA, brute_force_decoder)
    base = model
    if with_plugin:
        model = compressed(model)
    with torch.no_grad():
        expected = [brute_force(model, movie) for movie in MOVIES]
    form = form_for(base, TASKS["sst2"], tokenizer)
    for batch_size in (1, 3):
        check(form, model, MOVIES, batch_size, expected, scores)


@pytest.mark.parametrize("with_plugin", [False, True])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_texts_do_not_depend_on_the_batch(kind, with_plugin):
    model = t5_model() if kind == "t5" else llama_model()
    form = form_for(model, TASKS["squad"], T5 if kind == "t5" else LLAMA)
    if with_plugin:
        model = compressed(model)
    alone = [predict_all(form, model, [passage], batch_size=1)[0] for passage in PASSAGES]
    assert predict_all(form, model, PASSAGES, batch_size=2) == alone
    assert all("\n" not in text and "extra_id" not in text for text in alone)


def test_answers_of_several_tokens_are_summed(scores):
    """Two answers that share their first token: only the sum tells them apart."""
    task = dataclasses.replace(TASKS["sst2"], answers=("aab", "aac"))
    model = llama_model()
    form = form_for(model, task, LLAMA)
    movies = [dataclasses.replace(movie, task=task) for movie in MOVIES]
    with torch.no_grad():
        expected = [brute_force_decoder(model, movie) for movie in movies]
    check(form, model, movies, 3, expected, scores)


def test_classifier_predicts_the_largest_logit():
    model = make_encoder("bert", AutoModelForSequenceClassification, vocab_size=384, num_labels=3).eval()
    form = form_for(model, TASKS["mnli"], BERT)
    pairs = [example("mnli", first, second) for first in ("ab", "c d e") for second in ("x", "yy zz")]
    alone = []
    for pair in pairs:
        ids = BERT(*pair.inputs.values(), return_tensors="pt")
        alone.append(model(**ids).logits.argmax().item())
    assert predict_all(form, model, pairs, batch_size=4) == alone


def test_training_mode_comes_back():
    model = t5_model(torch.float32).train()
    predict_all(form_for(model, TASKS["sst2"], T5), model, MOVIES, batch_size=4)
    assert model.training
