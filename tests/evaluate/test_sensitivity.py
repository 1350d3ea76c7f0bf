"""`python -m llm_variator.evaluate sensitivity`: harms against the definition, the choice against trying everything."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import pytest
import torch
from conftest import VOCAB, make_decoder
from tiny import model_folder

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.evaluate.__main__ import main
from llm_variator.evaluate.probe import Harm, Probe
from llm_variator.evaluate.sensitivity import Option, choose, layer_options, measure_layers
from llm_variator.measures.operations import Stack, prefill
from llm_variator.measures.store import Store
from llm_variator.sources.corpora import EMBEDDED, read_documents
from llm_variator.train.least_squares import LeastSquares

CONTEXT, LENGTH = 24, 30
TEMPLATE = VariatorConfig(r=4, dense_head=1, dense_tail=3, compressor="mean", decompressor="copy")


def strong(name: str):
    """A tiny decoder whose layers outweigh the embedding, so that merging in one of them is felt."""
    model = make_decoder(name)
    with torch.no_grad():
        for block in model.model.layers:
            for parameter in block.parameters():
                parameter.mul_(3)
    return model


def probe_of(name: str, work) -> Probe:
    windows = torch.randint(3, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    return Probe(VariatorModel(strong(name)).eval(), windows, CONTEXT, 2, Store(work, work, {}))


@torch.no_grad()
def test_harm_is_the_divergence_from_the_dense_predictions(tmp_path):
    probe = probe_of("llama", tmp_path)
    config = VariatorConfig(
        k=3, layers=(1,), compressor="mean", decompressor="copy", dense_head=1, dense_tail=3
    )
    model = VariatorModel(strong("llama"), config)
    ours = model(probe.windows, prompt_length=CONTEXT).logits[:, CONTEXT - 1 : -1].double().log_softmax(-1)
    with model.disable_plugin():
        dense = model(probe.windows).logits[:, CONTEXT - 1 : -1].double().log_softmax(-1)
    divergence = (dense.exp() * (dense - ours)).sum(-1).mean().item()
    targets = probe.windows[:, CONTEXT:, None]
    harm = probe.harm(config)
    assert harm.divergence == pytest.approx(divergence, rel=1e-3)
    assert harm.cross_entropy == pytest.approx(-ours.gather(-1, targets).mean().item(), abs=1e-5)
    assert probe.dense_cross_entropy == pytest.approx(-dense.gather(-1, targets).mean().item(), abs=1e-5)
    assert probe.model.plugins == {}
    assert probe._store.found == 0
    assert probe.harm(config) == harm
    assert probe._store.found == 1


def test_every_layer_is_measured_alone(tmp_path):
    probe = probe_of("llama", tmp_path)
    harms = measure_layers(probe, TEMPLATE, "ffn", [2, 4])
    assert [set(merged) for merged in harms] == [{2, 4}] * 3
    assert (
        harms[2][4]
        == probe.harm(
            VariatorConfig(
                k=4, r=4, layers=(2,), compressor="mean", decompressor="copy", dense_head=1, dense_tail=3
            )
        ).divergence
    )
    assert harms[2][4] == pytest.approx(0, abs=1e-6)  # the prompt's last FFN is read by nobody
    assert harms[0][4] > 1e-4


def test_layers_with_a_sliding_window_keep_their_cache(tmp_path):
    harms = measure_layers(probe_of("gemma3", tmp_path), TEMPLATE, "kv", [2])
    assert [list(merged) for merged in harms] == [[2], [], [2]]


def test_costs_are_those_of_the_whole_model():
    stack = Stack.of(make_decoder("llama").config)
    harms = [{2: 0.1, 4: 0.2}] * 3
    trained = VariatorConfig(
        sites=("ffn", "kv"), r=4, dense_head=1, dense_tail=3, k_per_layer={"ffn": (1, 4, 2), "kv": (2, 1, 4)}
    )
    whole = prefill(stack, 40, trained)
    ffn, kv = (layer_options(stack, 40, TEMPLATE, site, harms) for site in ("ffn", "kv"))
    entries = kv[0][1].cost + kv[1][0].cost + kv[2][2].cost
    assert entries == whole.cache_entries
    ffn_only = prefill(
        stack, 40, VariatorConfig(r=4, dense_head=1, dense_tail=3, k_per_layer={"ffn": (1, 4, 2)})
    )
    assert ffn[0][0].cost + ffn[1][2].cost + ffn[2][1].cost == ffn_only.ffn + ffn_only.plugin


@pytest.mark.parametrize("seed", range(20))
def test_choice_is_the_best_of_all(seed):
    chance = random.Random(seed)
    layers = [
        [
            Option(1, 100, 0.0),
            *(Option(k, 100 // k + chance.randrange(9), chance.random()) for k in (2, 4, 8)),
        ]
        for _ in range(5)
    ]
    budget = chance.randrange(120, 400)
    allowed = [
        picks for picks in itertools.product(*layers) if sum(option.cost for option in picks) <= budget
    ]
    best = min(sum(option.harm for option in picks) for picks in allowed)
    found = choose(layers, budget)
    assert sum(option.cost for option in found) <= budget
    assert sum(option.harm for option in found) == pytest.approx(best)
    assert all(option in layer for option, layer in zip(found, layers, strict=True))


def test_a_budget_out_of_reach():
    with pytest.raises(VariatorError, match=r"0\.500 is the least"):
        choose([[Option(1, 10, 0.0), Option(2, 5, 0.1)]] * 2, 9)


def words(work, *more) -> list[str]:
    text = work / "text.txt"
    text.write_text(read_documents(EMBEDDED)[0][:600], encoding="utf-8")
    line = ["sensitivity", "--model", model_folder(), "--data", text, "--work", work, "--context", CONTEXT]
    line += [
        "--continuation",
        6,
        "--windows",
        2,
        "--ratios",
        2,
        4,
        "--r",
        2,
        "--dense-head",
        1,
        "--dense-tail",
        3,
    ]
    return list(map(str, [*line, *more]))


def test_command(tmp_path, capsys):
    main(words(tmp_path, "--budget", "kv=0.6", "ffn=0.7", "--json", tmp_path / "s.json"))
    figures = json.loads((tmp_path / "s.json").read_text())["figures"]
    chosen = figures["k_per_layer"]
    assert list(chosen) == ["ffn", "kv"]
    assert figures["left"]["ffn"] <= 0.7
    assert figures["left"]["kv"] <= 0.6
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed == f"--sites ffn,kv --k-per-layer '{json.dumps(chosen)}'"
    config = VariatorConfig(
        sites=("ffn", "kv"),
        k_per_layer=chosen,
        compressor="mean",
        decompressor="copy",
        dense_head=1,
        dense_tail=3,
    )
    assert set(figures["together"]) == {*Harm.__dataclass_fields__, "dense_cross_entropy"}
    assert figures["left"]["kv"] == pytest.approx(
        prefill(Stack.of(make_decoder("llama").config), CONTEXT, config).cache_entries / (3 * CONTEXT)
    )


@torch.no_grad()
def test_adapters_are_fitted_before_they_are_measured(tmp_path):
    windows = torch.randint(3, VOCAB, (20, LENGTH), generator=torch.Generator().manual_seed(2))
    config = dataclasses.replace(TEMPLATE, k=2, layers=(0,), decompressor="adapter")
    probe = Probe(
        VariatorModel(strong("llama")), windows[:3], CONTEXT, 2, Store(tmp_path, tmp_path, {}), windows[3:]
    )
    model = VariatorModel(strong("llama"), config)
    LeastSquares(model, [{"input_ids": windows[3:]}]).fit()
    targets = probe.windows[:, CONTEXT:, None]
    ours = model(probe.windows, prompt_length=CONTEXT).logits[:, CONTEXT - 1 : -1].log_softmax(-1)
    harm = probe.harm(config)
    assert harm.cross_entropy == pytest.approx(-ours.gather(-1, targets).mean().item(), abs=1e-5)
    assert harm.cross_entropy != pytest.approx(
        Probe(probe.model, windows[:3], CONTEXT, 2, Store(tmp_path, tmp_path, {})).harm(config).cross_entropy,
        abs=1e-5,
    )
    assert probe.harm(dataclasses.replace(config, sites=("kv",))).divergence > 0, "nothing to fit there"


def test_recall_compares_passages_of_the_prompt(tmp_path):
    main(words(tmp_path, "--recall", "--fitted", 60, "--json", tmp_path / "s.json"))
    figures = json.loads((tmp_path / "s.json").read_text())["figures"]
    assert figures["recall"]
    main(words(tmp_path, "--json", tmp_path / "t.json"))
    plain = json.loads((tmp_path / "t.json").read_text())["figures"]
    assert figures["together"]["dense_cross_entropy"] != plain["together"]["dense_cross_entropy"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fitted", "99999"], "tokens more"),
        (["--budget", "cross=0.5"], "write ffn=SHARE"),
        (["--budget", "ffn"], "write ffn=SHARE"),
        (["--budget", "kv=1.5"], "below 1"),
        (["--budget", "ffn=0.05"], "is the least"),
        (["--ratios", "1"], "above 1"),
        (["--windows", "9999"], "holds only"),
    ],
)
def test_wrong_input_is_found_before_anything_is_measured(more, message, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_variator.evaluate.probe.Probe.harm", None)
    with pytest.raises(VariatorError, match=message):
        main(words(tmp_path, *more))
