"""Continuations scored after compressed contexts: equal to teacher forcing row by row, and to nothing else."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from conftest import DECODERS, ENCODERS, make_decoder, make_encoder, make_variator, prompts

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.integrations.scoring import ScoringRequest, score

CONFIG = VariatorConfig(k=3, sites=("ffn", "kv"), r=4, dense_head=2, dense_tail=3)
KEPT = VariatorConfig(
    k={"ffn": 3, "kv": 4},
    sites=("ffn", "kv"),
    compressor={"ffn": "weighted", "kv": "select"},
    r=4,
    block=4,
    dense_head=2,
    dense_tail=3,
)
SEQ2SEQ = [name for name in ENCODERS if name != "bert"]


def tokens(n: int, seed: int) -> tuple[int, ...]:
    return tuple(prompts(n, seed=seed)[0][0].tolist())


def requests() -> list[ScoringRequest]:
    """Contexts of several lengths; continuations of one and more tokens, some shared, one asked twice."""
    contexts = [tokens(n, seed=n) for n in (23, 23 + 7, 17, 5, 1, 23)]
    contexts[1] = contexts[0] + contexts[1][23:]  # one context is the beginning of another
    found = [ScoringRequest(c, tokens(n, seed=50 + n)) for c in contexts for n in (1, 2, 6)]
    return [*found, ScoringRequest(contexts[2], tokens(3, seed=7)), found[0]]


@torch.no_grad()
def teacher_forced(model: VariatorModel, request: ScoringRequest) -> torch.Tensor:
    """One row on its own, prompt and continuation in one pass."""
    if model.config.is_encoder_decoder:
        labels = torch.tensor([request.continuation])
        logits = model(torch.tensor([request.context]), labels=labels).logits[0]
    else:
        row = torch.tensor([request.context + request.continuation])
        logits = model(row, prompt_length=len(request.context)).logits[0, len(request.context) - 1 : -1]
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    return log_probs[torch.arange(len(request.continuation)), torch.tensor(request.continuation)]


def assert_right(model: VariatorModel, wanted: list[ScoringRequest], **how) -> None:
    for request, found in zip(wanted, score(model, wanted, **how), strict=True):
        expected = teacher_forced(model, request)
        torch.testing.assert_close(found.log_probs.double(), expected, atol=2e-5, rtol=1e-5)
        assert found.total == pytest.approx(float(expected.sum()), abs=1e-4)


def differs(model: VariatorModel, request: ScoringRequest) -> float:
    """How far the plugin moves the log-probabilities."""
    with_plugin = teacher_forced(model, request)
    with model.disable_plugin():
        return float((teacher_forced(model, request) - with_plugin).abs().max())


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_equal_to_teacher_forcing(name, batch_size):
    config = CONFIG if name in DECODERS else VariatorConfig(k=3, r=4)
    model = make_variator(name, config)
    assert differs(model, requests()[2]) > 1e-2  # the plugin is felt
    assert_right(model, requests(), batch_size=batch_size)


@pytest.mark.parametrize("sites", [("ffn",), ("kv",), ("attention",)])
def test_every_site(sites):
    assert_right(make_variator("llama", VariatorConfig(k=2, sites=sites, r=4)), requests(), batch_size=5)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_kept_keys(name, batch_size):
    model = make_variator(name, KEPT)
    assert differs(model, requests()[2]) > 1e-2
    assert_right(model, requests(), batch_size=batch_size)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_without_a_plugin(name):
    model = make_variator(name, CONFIG if name == "llama" else VariatorConfig(k=3, r=4))
    with model.disable_plugin():
        assert_right(model, requests(), batch_size=4)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_identity_plugin_changes_nothing(name):
    """k=1 with mean and copy against the base model itself."""
    model = VariatorModel((make_decoder if name == "llama" else make_encoder)(name))
    model.add_plugin("one", VariatorConfig(k=1, sites=("ffn", "kv"), compressor="mean", decompressor="copy"))
    wanted = requests()
    dense = score(model, wanted, batch_size=4)
    with model.use_plugin("one"):
        for ours, theirs in zip(score(model, wanted, batch_size=4), dense, strict=True):
            assert ours.total == pytest.approx(theirs.total, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_order_batch_size_and_company_do_not_matter(name):
    model = make_variator(name, CONFIG if name == "llama" else VariatorConfig(k=3, r=4))
    wanted = requests()
    expected = dict(zip(wanted, score(model, wanted, batch_size=4), strict=True))
    for seed in range(20):
        shuffled = random.Random(seed).sample(wanted, len(wanted))
        for request, found in zip(shuffled, score(model, shuffled, batch_size=4), strict=True):
            assert found.log_probs.equal(expected[request].log_probs)  # order: not one bit
        some = shuffled[: 1 + seed % len(shuffled)]  # other company, other batches
        for request, found in zip(some, score(model, some, batch_size=1 + seed % 7), strict=True):
            torch.testing.assert_close(found.log_probs, expected[request].log_probs, atol=2e-5, rtol=1e-5)
            assert found.greedy == expected[request].greedy


def test_where_the_context_ends_matters():
    """The same text with its context ending elsewhere: neither scores nor readings are shared."""
    model = make_variator("llama", CONFIG)
    text = tokens(24, seed=3)
    trap = [ScoringRequest(text[:20], text[20:]), ScoringRequest(text[:23], text[23:])]
    last = [float(teacher_forced(model, request)[-1]) for request in trap]
    assert abs(last[0] - last[1]) > 1e-3
    assert_right(model, trap, batch_size=4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_later_tokens_do_not_leak(name):
    """Bit for bit: other tokens at the end of a continuation leave the scores before them as they are."""
    model = make_variator(name, CONFIG if name in DECODERS else VariatorConfig(k=3, r=4))
    context, continuation = tokens(23, seed=1), tokens(9, seed=2)
    whole = score(model, [ScoringRequest(context, continuation)])[0].log_probs
    for length in range(1, len(continuation)):
        changed = continuation[:length] + tokens(len(continuation) - length, seed=90 + length)
        found = score(model, [ScoringRequest(context, changed)])[0].log_probs
        assert found[:length].equal(whole[:length])
        assert not found[length:].equal(whole[length:])


def test_each_context_is_read_once(monkeypatch):
    model = make_variator("llama", CONFIG)
    seen = []
    forward = model.base.forward

    def counting(*args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.base, "forward", counting)
    context = tokens(30, seed=1)
    score(model, [ScoringRequest(context, (n, n + 1, n + 2)) for n in range(3, 11)], batch_size=4)
    assert seen == [(1, 30), (4, 2), (4, 2)]


def test_greedy_means_every_token():
    model = make_variator("llama", CONFIG)
    context = prompts(20)[0]
    best = tuple(model.generate(context, max_new_tokens=4, do_sample=False)[0, 20:].tolist())
    other = (*best[:-1], (best[-1] + 1) % 97)
    right, wrong = score(model, [ScoringRequest(tuple(context[0].tolist()), c) for c in (best, other)])
    assert right.greedy
    assert not wrong.greedy


@pytest.mark.parametrize("request_", [ScoringRequest((), (1,)), ScoringRequest((1,), ())])
def test_empty_is_refused(request_):
    with pytest.raises(VariatorError, match="at least one token"):
        score(make_variator("llama", CONFIG), [request_])


def test_no_requests():
    assert score(make_variator("llama", CONFIG), []) == []


def test_lm_eval_is_not_imported():
    code = "import sys, llm_variator, llm_variator.integrations.scoring; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
