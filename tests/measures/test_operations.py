"""The arithmetic against torch's own counter on running models, and against counting by hand."""

from __future__ import annotations

import dataclasses

import pytest
import reference
import reference_select
import torch
from conftest import ENCODERS, make_decoder, make_encoder, make_variator, prompts
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, T5EncoderModel

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.baselines import TokenPruning, make_student
from llm_variator.config import BaseSignature
from llm_variator.engine import blocks
from llm_variator.engine.groups import split
from llm_variator.measures.operations import (
    EncoderShape,
    Stack,
    encoding,
    ffn_parameters,
    ffn_share_left,
    parameters,
    prefill,
)
from llm_variator.sources.models import load_config, load_model

CONFIGS = {
    "ffn": VariatorConfig(k=2, sites=("ffn",), r=5),
    "ffn+kv": VariatorConfig(k={"ffn": 4, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=3),
    "attention": VariatorConfig(k=3, sites=("ffn", "attention"), r=5),
    "compressor per site": VariatorConfig(
        k=3, sites=("ffn", "attention"), r=5, compressor={"ffn": "mean", "attention": "weighted"}
    ),
    "bare": VariatorConfig(k=2, sites=("ffn", "kv"), compressor="mean", decompressor="copy"),
    "per layer": VariatorConfig(
        k=2, sites=("ffn", "kv"), r=5, k_per_layer={"ffn": (1, 2, 5), "kv": (3, 1, 2)}
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_arithmetic_equals_what_torch_counts(decoder, name):
    model = make_variator(decoder, CONFIGS[name], attn_implementation="eager")
    (ids,) = prompts(61)
    stack = Stack.of(model.config)
    for plugin, skip in ((None, True), ("default", False), ("default", True)):
        model.skip_unread = skip
        reads = 1 if plugin and skip else None
        with model.use_plugin(plugin), FlopCounterMode(display=False) as counter, torch.no_grad():
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        cost = prefill(stack, 61, model.plugins[plugin] if plugin else None, causal=False, reads=reads)
        # some releases of transformers compute the angles of RoPE with a small product
        assert cost.total <= counter.get_total_flops() <= 1.01 * cost.total
        if decoder != "gemma3":  # stock sliding layers drop one token more than the window shows
            assert cost.cache_entries == sum(layer.keys.shape[-2] for layer in cache.layers)


def counted(model, **batch) -> int:
    """What torch counts of one forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    return counter.get_total_flops()


def batch_of(model, n: int, answer: int) -> dict[str, torch.Tensor]:
    (ids,) = prompts(n)
    extra = {"decoder_input_ids": prompts(answer, seed=1)[0]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **extra}


def eager(name: str, **overrides):
    """A tiny T5, or BERT without its head and pooler, with the attention that torch counts."""
    return make_encoder(name, AutoModel if name == "bert" else None, attn_implementation="eager", **overrides)


def pooler(model) -> int:
    return 2 * model.config.hidden_size**2 if model.config.model_type == "bert" else 0


def answer_of(model) -> int:
    return 5 if model.config.is_encoder_decoder else 0


@pytest.mark.parametrize("n", [3, 61])
@pytest.mark.parametrize("name", CONFIGS)
def test_encoders_equal_what_torch_counts(encoder, name, n):
    model = VariatorModel(eager(encoder, d_kv=4) if encoder == "t5" else eager(encoder), CONFIGS[name])
    shape, answer = EncoderShape.of(model.base.config), answer_of(model.base)
    for plugin in (None, "default"):
        with model.use_plugin(plugin):
            found = counted(model, **batch_of(model.base, n, answer)) - pooler(model.base)
        config = model.plugins[plugin] if plugin else None
        assert found == encoding(shape, n, answer=answer, plugin=config, causal=False).total


@pytest.mark.parametrize("keep", [0.25, 0.7])
def test_token_pruning_equals_what_torch_counts(encoder, keep):
    model = eager(encoder)
    shape, answer = EncoderShape.of(model.config), answer_of(model)
    with TokenPruning(model, keep):
        found = counted(model, **batch_of(model, 30, answer)) - pooler(model)
    assert found == encoding(shape, 30, answer=answer, keep=keep, causal=False).total
    assert found < encoding(shape, 30, answer=answer, causal=False).total


@pytest.mark.parametrize("settings", [{}, {"encoder_layers": 2}, {"ffn": 0.5, "encoder_layers": 1}])
def test_students_equal_what_torch_counts(encoder, settings):
    student = make_student(eager(encoder), **settings)
    student.set_attn_implementation("eager")
    shape, answer = EncoderShape.of(student.config), answer_of(student)
    found = counted(student, **batch_of(student, 30, answer)) - pooler(student)
    assert found == encoding(shape, 30, answer=answer, causal=False).total


def test_an_encoder_alone_and_an_answer_step_by_step():
    model = T5EncoderModel(eager("t5").config)
    model.set_attn_implementation("eager")
    shape = EncoderShape.of(model.config)
    assert counted(model, input_ids=prompts(30)[0]) == encoding(shape, 30).total
    whole = EncoderShape.of(load_config("t5-base"))
    steps, given = encoding(whole, 30, answer=4), encoding(whole, 30, answer=4, causal=False)
    assert given.total - steps.total == 12 * 4 * 768 * (16 - 10)


@pytest.mark.parametrize("name", ["ffn+kv", "attention"])
def test_causal_scores_equal_counting_pairs(name):
    config = CONFIGS[name].resolved(BaseSignature("", "llama", 32, 3), decoder=True)
    stack = Stack.of(make_decoder("llama").config)
    for n in (1, 9, 40):
        whole = "attention" in config.sites
        entries = reference.entries(
            n, n, config.ratio("attention" if whole else "kv", 0), config.dense_head, config.dense_tail
        )
        last = {i: e.positions[-1] for e in entries for i in e.positions}
        queries = [e.positions[-1] for e in entries] if whole else range(n)
        pairs = sum(e.positions[-1] <= last[q] for q in queries for e in entries)
        assert prefill(stack, n, config).scores == 3 * 4 * stack.attention_width * pairs
        assert prefill(stack, n).scores == 3 * 4 * stack.attention_width * n * (n + 1) // 2


# Keys and values that are kept: against masks filled in by loops.

KEPT = {
    "short tail": dict(block=4, dense_head=2, dense_tail=3, k_per_head=((2, 4), (4, 1), (1, 1))),
    "two fits": dict(block=8, dense_head=4, dense_tail=1, k_per_head=((8, 2), (1, 1), (4, 8)), score_fits=2),
    "no edges": dict(block=4, dense_head=0, dense_tail=0, k=4),
    "ffn": dict(
        block=4,
        dense_head=2,
        dense_tail=3,
        k={"ffn": 3, "kv": 4},
        sites=("ffn", "kv"),
        compressor={"ffn": "weighted", "kv": "select"},
        r=5,
        layers=(0, 2),
    ),
}


def kept(name: str) -> VariatorConfig:
    return VariatorConfig(**{"sites": ("kv",), "compressor": "select", **KEPT[name]})


def random_scores(n: int) -> list[float]:
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).tolist()


@pytest.mark.parametrize("block", [1, 4, 8])
@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("tail", [0, 1, 4, 8])
def test_pairs_of_kept_keys_equal_counting_them(head, tail, block):
    tail = min(tail, block)
    for n in range(1, 5 * block + head + tail + 3):
        scores = random_scores(n)
        for k in (1, 2, 4, 8):
            if k <= block:
                mask = reference_select.seen_while_reading(scores, k, n, head, tail, block)
                assert blocks.seen(n, k, head, tail, block) == sum(map(sum, mask)), (n, k)


@pytest.mark.parametrize("tail", [5, 9, 14])
def test_pairs_before_a_long_tail_are_counted_on_average(tail):
    """A token of the block where the tail begins is among the chosen with probability 1/k."""
    block, head = 4, 2
    for n in range(1, 40):
        for k in (1, 2, 4):
            average = 0.0
            for query in range(n):
                for key in range(query + 1):
                    near = (key - head) // block >= (query - head) // block - 1
                    average += 1 if key < head or key >= n - tail or near else 1 / k
            assert 0 <= average - blocks.seen(n, k, head, tail, block) < n, (n, k)


@pytest.mark.parametrize("block", [1, 4, 8])
@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("tail", [0, 1, 4, 11])
def test_entries_of_kept_keys_equal_counting_them(head, tail, block):
    for n in range(1, 5 * block + head + tail + 3):
        scores = random_scores(n)
        for k in (1, 2, 4, 8):
            if k > block:
                continue
            place = blocks.Place(head, tail, 0, n)
            left = reference_select.kept_after(scores, k, n, head, tail, block)
            assert blocks.entries(place, k, block, n) == len(left), (n, k)
            if reference_select.stays_dense(n, head, tail, block):
                assert blocks.entries(place, k, block, n) == n
                continue
            for read in range(head, n):  # whole blocks that no later token sees whole have been reduced
                held = head
                for start in range(head, read, block):
                    gone = (read - head) // block >= (start - head) // block + 2 and start + block <= n - tail
                    held += block // k if gone else min(block, read - start)
                assert blocks.entries(place, k, block, read) == held, (n, k, read)


@pytest.mark.parametrize("reads", [None, 1, 5])
@pytest.mark.parametrize("name", KEPT)
def test_operations_of_kept_keys_equal_counting_them(name, reads):
    """Scores by loops over masks; all other products by torch, of a running model."""
    config, layers = kept(name).resolved(BaseSignature("", "llama", 32, 3), decoder=True), 3
    model = make_variator("llama", kept(name))
    stack, (head, tail) = Stack.of(model.config), config.ends
    for n in (9, 26, 61):
        scores, pairs, entries = random_scores(n), 0.0, 0.0
        for layer in range(layers):
            ratios = config.head_ratios(layer, 2) or (1, 1)
            for k in ratios:
                mask = reference_select.seen_while_reading(scores, k, n, head, tail, config.block)
                read = mask[-reads:] if reads and layer == layers - 1 else mask
                if reads and "ffn" in config.sites and reads > split(n, 3, head, tail).tail:
                    read = mask  # groups are restored together
                pairs += sum(map(sum, read)) / len(ratios)
                left = reference_select.kept_after(scores, k, n, head, tail, config.block)
                entries += len(left) / len(ratios)
        cost = prefill(stack, n, config, reads=reads)
        assert cost.scores == 4 * stack.attention_width * pairs
        assert cost.cache_entries == pytest.approx(entries)

        model.skip_unread = reads is not None
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            cache = model(prompts(n)[0], use_cache=True, logits_to_keep=reads or 1).past_key_values
        found = counter.get_flop_counts()["Global"]
        products = sum(count for op, count in found.items() if "attention" not in str(op))
        wanted = cost.total - cost.scores
        assert wanted <= products <= 1.01 * wanted  # see above
        report = model.kv_cache_report(cache)
        assert sum(layer.entries for layer in report.layers) == pytest.approx(entries)


def test_the_last_rows_before_a_long_tail():
    """Queries that are not read are taken away with the tail where it is."""
    config = VariatorConfig(k=4, sites=("kv",), compressor="select", block=4, dense_head=0, dense_tail=12)
    stack = dataclasses.replace(Stack.of(make_decoder("llama").config), layers=1, windows=(None,))
    seen = 0
    for query in (38, 39):  # the tail begins with a block
        near = (query // 4 - 1) * 4
        seen += sum(1 for key in range(query + 1) if key >= near or key >= 28) + 28 // 4
    assert prefill(stack, 40, config, reads=2).scores == 4 * stack.attention_width * seen


def test_sliding_windows_bound_the_scores():
    stack = dataclasses.replace(Stack.of(make_decoder("llama").config), layers=1, windows=(4,))
    pairs = sum(min(i + 1, 4) for i in range(10))
    assert prefill(stack, 10).scores == 4 * stack.attention_width * pairs


def test_the_papers_worked_example():
    """Section 3.4: k = 4, r = 64, d = 768."""
    assert f"{1 - ffn_share_left(4, 64, 768):.1%}" == "71.7%"
    assert f"{ffn_parameters(4, 64, 768) / (8 * 768**2):.1%}" == "3.4%"


@pytest.mark.parametrize(("alias", "share"), [("t5-base", "0.9%"), ("t5-large", "0.7%")])
def test_plugin_parameters_are_those_of_table_1(alias, share):
    base = load_model(alias, random_init=True, device="meta")
    shape, whole = EncoderShape.of(base.config), parameters(base)
    plugin = VariatorModel(base, VariatorConfig(k=4)).plugin()
    assert parameters(plugin) == shape.layers * ffn_parameters(4, 64, shape.dim)
    assert f"{parameters(plugin) / whole:.1%}" == share


def test_what_cannot_be_counted():
    with pytest.raises(VariatorError, match="encoder of type 'llama'"):
        EncoderShape.of(make_decoder("llama").config)
    with pytest.raises(VariatorError, match="LLaMA, T5 and BERT"):
        Stack.of(make_encoder("t5").config)
    assert {EncoderShape.of(make_encoder(name).config).layers for name in ENCODERS} == {3}
