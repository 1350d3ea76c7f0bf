"""Training of scores: the forward pass stays as it is, effects of single keys as a loop counts them, and it pays."""

from __future__ import annotations

import json

import pytest
import reference_select as plain
import torch
from conftest import VOCAB, make_decoder, pad, prompts, randomise
from safetensors.torch import load_file
from tiny import model_folder, train
from transformers.cache_utils import DynamicLayer

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.blocks import Place, Region, Rows
from llm_variator.engine.cache.selected import HeadClass
from llm_variator.engine.groups import Segment
from llm_variator.engine.hooks.gates import Gates
from llm_variator.sources.models import load_model
from llm_variator.train.learners import PluginLearner
from llm_variator.train.objective import Objective

HEAD, TAIL, BLOCK = 2, 4, 8
NONE = dict(k=None, r=None, dense_head=None)  # what --plugin decides


def make(
    name: str, dtype: torch.dtype = torch.float64, *, seed: int = 3, layers: int = 3, **settings
) -> VariatorModel:
    """A tiny decoder whose heads choose by random scores."""
    base = make_decoder(name, num_hidden_layers=layers)
    with torch.no_grad():
        for parameter_name, parameter in base.named_parameters():
            if "norm" in parameter_name:
                parameter.fill_(1)  # so that attention outweighs the embedding
            if parameter_name.endswith("q_proj.bias"):
                parameter.mul_(
                    10
                )  # queries have much in common: which keys they like can be told from the keys
    heads = base.config.num_key_value_heads
    ratios = tuple(((4, 8) * heads)[:heads] for _ in range(base.config.num_hidden_layers))
    chosen = dict(sites=("kv",), compressor="select", k_per_head=ratios)
    config = VariatorConfig(**chosen | dict(block=BLOCK, dense_head=HEAD, dense_tail=TAIL) | settings)
    model = VariatorModel(base, config)
    randomise(model.plugin(), seed=seed)
    return model.to(dtype)


def objective(model: VariatorModel, continuation: int) -> Objective:
    return Objective(PluginLearner(model), "kl", continuation=continuation)


def batch(rows: int, prompt: int, more: int, generator: torch.Generator) -> dict:
    ids = torch.randint(3, VOCAB, (rows, prompt + more), generator=generator)
    return {"input_ids": ids, "prompt_length": prompt}


def kept(model: VariatorModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """The columns that each layer's heads hold after a prompt."""
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    return [layer.columns(one) for layer in cache.layers for one in getattr(layer, "classes", ())]


# --- nothing but the gradient changes


@pytest.mark.parametrize("tail", [TAIL, 13])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_forward_is_the_ordinary_one(decoder, side, tail):
    model = make(decoder, dense_tail=tail)
    rows = prompts(60, *((47, 60) if side else ()))
    inputs = pad(rows, side) if side else {"input_ids": rows[0]}
    lengths = [45, 41, 30] if side else 45
    with torch.no_grad():
        wanted = model(**inputs, prompt_length=lengths, use_cache=False).logits
    gated = model(**inputs, prompt_length=lengths, use_cache=False).logits
    assert gated.requires_grad
    assert not wanted.requires_grad
    torch.testing.assert_close(gated, wanted, atol=1e-9, rtol=0)


def test_only_scores_learn(decoder):
    model = make(decoder, torch.float32)
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    loss = objective(model, 12)(model, batch(2, 50, 12, torch.Generator().manual_seed(0)))
    loss.backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())
    for name, parameter in model.plugin().named_parameters():
        assert parameter.grad.isfinite().all(), name
        if name.endswith("weight"):  # what all scores of a block have in common moves nothing
            assert (parameter.grad.abs().sum(-1) > 0).all(), name
        else:
            assert parameter.grad.abs().max() < 1e-5, name
    torch.optim.AdamW(model.plugin().parameters(), lr=1e-2).step()
    assert all(torch.equal(value, before[name]) for name, value in model.base.state_dict().items())


def test_without_parameters_that_learn_nothing_is_gated():
    model = make("llama")
    model.plugin().requires_grad_(False)
    (ids,) = prompts(60)
    assert not model(ids, prompt_length=45, use_cache=False).logits.requires_grad


def test_a_cache_can_be_filled_and_gone_on_with_under_gradients():
    model = make("llama")
    (ids,) = prompts(60)
    with torch.no_grad():
        wanted = model(ids, prompt_length=50, use_cache=False).logits
    first = model(ids[:, :50], use_cache=True)
    rest = model(ids[:, 50:], past_key_values=first.past_key_values, prompt_length=0)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("sites", [("kv",), ("ffn", "kv")])
def test_gradient_checkpointing_changes_nothing(sites):
    gradients = []
    for checkpointing in (False, True):
        settings = {} if sites == ("kv",) else dict(r=4, k={"ffn": 2, "kv": 4})
        names = {site: "select" if site == "kv" else "weighted" for site in sites}
        model = make("llama", sites=sites, compressor=names, **settings)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        objective(model, 12)(model, batch(2, 50, 12, torch.Generator().manual_seed(0))).backward()
        gradients.append([parameter.grad for parameter in model.plugin().parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# --- the gradient, counted


def effects(row: dict, length: int, ratio: int, after: list[int], others: int) -> torch.Tensor:
    """(length,): what letting a key in does to the loss sum(R * o), added up over queries; one head, by loops."""
    scores, read = row["scores"].tolist(), torch.zeros(length, dtype=torch.float64)
    seen = plain.seen_while_reading(scores, ratio, length, HEAD, TAIL, BLOCK)
    for i, towards in enumerate(row["towards"]):
        causal = range(i + 1) if i < length else [*range(length), *range(length, length + others)]
        causal = [j for j in causal if j <= i]
        if i < length:
            chosen = [j for j in causal if seen[i][j]]
            asked = [
                j
                for j in causal
                if HEAD <= j < length - TAIL and (j - HEAD) // BLOCK < (i - HEAD) // BLOCK - 1
            ]
        else:
            chosen = [j for j in causal if j >= length or j in after]
            asked = list(range(HEAD, length - TAIL))

        def loss(gates: dict[int, float], i=i, towards=towards) -> float:
            keys, size = row["keys"][list(gates)], torch.tensor(list(gates.values()), dtype=torch.float64)
            weights = size * (row["query"][i] @ keys.T * 0.5).exp()
            return float(towards @ (weights @ row["values"][list(gates)] / weights.sum()))

        gates = dict.fromkeys(chosen, 1.0)
        for j in asked:
            if j in gates:  # a kept key: the slope
                change = (loss(gates | {j: 1 + 1e-6}) - loss(gates | {j: 1 - 1e-6})) / 2e-6
                read[j] += 0 if i >= length else change
                row["after"][j] += change if i >= length else 0
            else:  # a dropped one: all of it
                change = loss(gates | {j: 1.0}) - loss(gates)
                read[j] += 0 if i >= length else change
                row["after"][j] += change if i >= length else 0
    return read


def soft_gradient(scores: torch.Tensor, effect: torch.Tensor, count: int) -> torch.Tensor:
    """Of one block: soft gates whose sum stays, by moving every score a little and finding the threshold anew."""
    best = scores.sort(descending=True).values
    if count >= len(scores):
        return torch.zeros_like(scores)
    middle, spread = float(best[count - 1] + best[count]) / 2, float(scores.std(correction=0))
    budget = ((scores - middle) / spread).sigmoid().sum()

    def gates(moved: torch.Tensor) -> torch.Tensor:
        low, high = middle - 1, middle + 1
        for _ in range(60):
            t = (low + high) / 2
            low, high = (t, high) if ((moved - t) / spread).sigmoid().sum() > budget else (low, t)
        return ((moved - low) / spread).sigmoid()

    step = 1e-4 * torch.eye(len(scores), dtype=scores.dtype)
    return torch.stack([effect @ (gates(scores + d) - gates(scores - d)) / 2e-4 for d in step])


@pytest.mark.parametrize("lengths", [(45,), (45, 31), (12, 37)])
def test_gradient_is_that_of_the_loops(lengths):
    heads, groups, width, others = 2, 2, 4, 5
    ratios, generator = (4, 2), torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    rows, most = len(lengths), max(lengths)
    total = most + others
    valid = None
    if rows > 1:
        valid = torch.arange(total) < torch.tensor(lengths)[:, None] + others
    segment = Segment(
        total,
        list(lengths) if rows > 1 else lengths[0],
        head=HEAD,
        tail=TAIL,
        device=torch.device("cpu"),
        valid=valid,
    )
    places = [Place(HEAD, TAIL, 0, n) for n in lengths]
    region, packed = Region(places, list(lengths), BLOCK, torch.device("cpu")), Rows(segment)
    assert region.holds_whole_prompts
    scores = draw(rows, heads, most).requires_grad_()
    query, towards = (draw(rows, heads * groups, total, width) for _ in range(2))
    keys, values = (draw(rows, heads, total, width) for _ in range(2))
    columns = torch.empty(1, 1, 0, dtype=torch.int32)
    classes = [HeadClass((head,), DynamicLayer(), columns, k) for head, k in enumerate(ratios)]
    gates = Gates(scores, region.order(scores.detach()), region, packed, classes)

    # what attention gives: dense softmax over what is seen
    out, wanted = torch.zeros_like(query), torch.zeros_like(scores)
    for r, length in enumerate(lengths):
        for head, k in enumerate(ratios):
            own = scores[r, head, :length].detach()
            after = plain.kept_after(own.tolist(), k, length, HEAD, TAIL, BLOCK)
            seen = plain.seen_while_reading(own.tolist(), k, length, HEAD, TAIL, BLOCK)
            counted = torch.zeros(2, length, dtype=torch.float64)
            for g in range(groups):
                index = head * groups + g
                q, towards_own = query[r, index], towards[r, index]
                real = [*range(length), *range(most, total)]  # prompts are left-aligned, what follows behind
                for i in range(length + others):
                    see = [
                        j for j in range(i + 1) if (j >= length or (seen[i][j] if i < length else j in after))
                    ]
                    at = [real[j] for j in see]
                    weights = (q[real[i]] @ keys[r, head, at].T * 0.5).softmax(-1)
                    out[r, index, real[i]] = weights @ values[r, head, at]
                row = {
                    "scores": own,
                    "query": q[real],
                    "keys": keys[r, head, real],
                    "values": values[r, head, real],
                    "towards": towards_own[real],
                    "after": counted[1],
                }
                if plain.stays_dense(length, HEAD, TAIL, BLOCK):
                    continue
                counted[0] += effects(row, length, k, after, others)
            for start in range(HEAD, length, BLOCK):
                for effect, end, exact in ((counted[0], length, True), (counted[1], length - TAIL, False)):
                    stop = min(start + BLOCK, end)
                    if stop <= start or (exact and stop - start < BLOCK):
                        continue
                    count = -(-(stop - start) // k)
                    wanted[r, head, start:stop] += soft_gradient(own[start:stop], effect[start:stop], count)

    first = gates.reading(out[:, :, :most], query[:, :, :most], keys, values, 0.5)
    rest = gates.following(out[:, :, most:], query[:, :, most:], keys, values, 0.5)
    assert torch.equal(torch.cat((first, rest), 2), out)
    for r, length in enumerate(lengths):
        towards[r, :, length:most] = 0  # fillers
    (first * towards[:, :, :most]).sum().backward(retain_graph=True)
    (rest * towards[:, :, most:]).sum().backward()
    torch.testing.assert_close(scores.grad, wanted, atol=1e-5, rtol=1e-4)
    for r, length in enumerate(lengths):
        whole = not plain.stays_dense(length, HEAD, TAIL, BLOCK)
        for head, k in enumerate(ratios):
            own = scores[r, head, :length].tolist()
            after = plain.kept_after(own, k, length, HEAD, TAIL, BLOCK)
            grad = scores.grad[r, head]
            inner = range(HEAD, HEAD + (length - TAIL - HEAD) // BLOCK * BLOCK)
            for side in ([j for j in inner if j in after], [j for j in inner if j not in after]):
                assert not whole or grad[side].abs().min() > 0
            assert not grad[:HEAD].any()


# --- it pays


def test_training_lowers_what_the_hard_choice_costs():
    """The acceptance: from random scores, on held-out prompts, under the choice that decoding makes."""
    prompt, more = 60, 16
    model = make("qwen2", torch.float32, layers=2)
    held_out = batch(16, prompt, more, torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(0)
    loss = objective(model, more)
    others = []
    for seed in range(3):
        other = make("qwen2", torch.float32, seed=10 + seed, layers=2)
        with torch.no_grad():
            others.append(objective(other, more)(other, held_out).item())
    with torch.no_grad():
        before = loss(model, held_out).item()
    chosen = kept(model, held_out["input_ids"][:, :prompt])
    optimizer = torch.optim.AdamW(model.plugin().parameters(), lr=1e-2, weight_decay=0)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model, batch(8, prompt, more, generator)).backward()
        optimizer.step()
    with torch.no_grad():
        after = loss(model, held_out).item()
    assert after < 0.8 * min(before, *others)
    now = kept(model, held_out["input_ids"][:, :prompt])
    assert [one.shape for one in now] == [one.shape for one in chosen]
    assert all((one != old).float().mean() > 0.1 for one, old in zip(now, chosen, strict=True))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A plugin folder for the tiny model on disk."""
    config = VariatorConfig(sites=("kv",), compressor="select", k=4, block=4, dense_head=1, dense_tail=2)
    model = VariatorModel(load_model(model_folder()), config)
    randomise(model.plugin())
    folder = tmp_path_factory.mktemp("fitted") / "plugin"
    model.save_pretrained(folder)
    return folder


def test_command_line(fitted, tmp_path):
    figures = train(tmp_path / "on", plugin=fitted, loss="kl", prompt_tokens=(12, 16), **NONE)
    before, after = (load_file(folder / "variator.safetensors") for folder in (fitted, tmp_path / "on"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(after[name], value) for name, value in before.items() if "weight" in name)
    assert figures["config"] == json.loads((fitted / "variator_config.json").read_text(encoding="utf-8"))
    assert all(loss > 0 for _, loss in figures["loss_history"])
    again = VariatorModel.from_pretrained(model_folder(), tmp_path / "on")
    assert again.plugin().config.k == 4


def test_prompts_that_stay_dense_are_refused(fitted, tmp_path):
    with pytest.raises(VariatorError, match="prompts of 8 tokens stay dense, no block of 4 is reduced"):
        train(tmp_path / "on", plugin=fitted, loss="kl", **NONE)
