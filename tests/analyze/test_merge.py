"""What a plugin has learned, on plugins whose weights are set by hand; tokens that lose most, counted by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import VOCAB, make_decoder, make_variator, randomise
from tiny import model_folder

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.analyze import token_losses as module
from llm_variator.analyze.__main__ import main
from llm_variator.analyze.merge import observed
from llm_variator.analyze.observe import Moments, Observer, drift
from llm_variator.analyze.token_losses import (
    FAR,
    NEAR,
    NEW,
    SEEN,
    Losses,
    by_kind,
    origins,
    shape,
    token_losses,
)
from llm_variator.measures.metrics import continuation_cross_entropy
from llm_variator.sources.models import load_model


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(0))


def test_moments_by_hand():
    moments = Moments()
    moments.add(torch.tensor([[1.0, 10.0]]))
    moments.add(torch.tensor([[3.0, 10.0]]))
    assert moments.mean == [2.0, 10.0]
    assert moments.deviation == [1.0, 0.0]


def test_weights_set_by_hand_are_found():
    model = VariatorModel(make_decoder("llama"), VariatorConfig(k=2, sites=("ffn", "kv"), r=4))
    for (site, _layer), layers in model.plugin().sites.items():
        with torch.no_grad():
            layers.compressor.bias[1] = math.log(3) if site == "kv" else -math.log(3)
    found = observed(model, ids(2, 21), batch_size=1)
    assert set(found["weights"]) == {"ffn", "kv"}
    for layer in found["weights"]["kv"].values():
        assert layer["mean"] == pytest.approx([0.25, 0.75])
        assert layer["deviation"] == pytest.approx([0, 0], abs=1e-4)
        assert layer["last_wins"] == 1
        assert layer["groups"] == 2 * 8  # 21 tokens: 4 dense first, 1 dense last
    assert found["last_wins"] == {"ffn": 0, "kv": 1}


def test_reconstruction_against_a_plain_computation():
    model = make_variator("llama", VariatorConfig(k=2, sites=("ffn",), r=4, dense_head=0, dense_tail=0))
    tokens = ids(1, 12)
    found = observed(model, tokens, batch_size=1)["reconstruction"]["0"]
    mlp, seen = model.base.model.layers[0].mlp, []
    handle = model.base.model.layers[0].post_attention_layernorm.register_forward_hook(
        lambda _module, _args, output: seen.append(output)
    )
    with torch.no_grad(), model.disable_plugin():
        model(tokens)
    handle.remove()
    layers = model.plugin().at("ffn", 0)
    with torch.no_grad():
        groups = seen[0].unflatten(1, (6, 2))
        g = mlp.forward((layers.compressor.weights(groups).unsqueeze(-1) * groups).sum(2))
        ours = layers.decompressor(g, groups)
        true = mlp.forward(seen[0]).unflatten(1, (6, 2))
        error = ((ours - true).norm(dim=-1) / true.norm(dim=-1)).mean().item()
        copied = ((g.unsqueeze(2) - true).norm(dim=-1) / true.norm(dim=-1)).mean().item()
    assert found["restored"] == pytest.approx(error, rel=1e-4)
    assert found["copied"] == pytest.approx(copied, rel=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bert"])
@torch.inference_mode()
def test_a_short_last_group_counts_nowhere(kind):
    """Computed from the whole groups alone; the sixteenth token would be one of a group with two zeros."""
    model = make_variator(kind, VariatorConfig(k=3, sites=("ffn",), r=4, dense_head=0, dense_tail=0))
    groups, errors = [], []
    for own in model.plugin().sites.values():
        own.compressor.register_forward_hook(lambda own, args, out: groups.append((own, args[0][:, :5])))
        own.decompressor.register_forward_hook(lambda own, args, out: errors.append(out[:, :5]))
    found = observed(model, ids(1, 16), batch_size=1)
    for (_, layer), (compressor, whole), restored in zip(model.plugin().sites, groups, errors, strict=True):
        mean = compressor.weights(whole).mean((0, 1)).tolist()
        weights, reconstruction = (
            found["weights"]["ffn"][str(layer)],
            found["reconstruction"][str(layer)],
        )
        assert weights["mean"] == pytest.approx(mean, rel=1e-4)
        assert weights["groups"] == 5
        true = whole
        for part in Observer(model)._ffn[layer]:
            true = part.forward(true)
        error = ((restored - true).norm(dim=-1) / true.norm(dim=-1)).mean().item()
        assert reconstruction["restored"] == pytest.approx(error, rel=1e-4)


def test_tokens_that_fill_no_group_are_dense():
    """A decoder's tail takes the seven that are left of 23 in groups of eight."""
    model = make_variator("llama", VariatorConfig(k=8, sites=("ffn",), r=4, dense_head=4, dense_tail=16))
    tokens, outputs = ids(1, 43), []
    for active in ("default", None):
        with torch.no_grad(), model.use_plugin(active):
            outputs.append(model(tokens, output_hidden_states=True, prompt_length=43).hidden_states[1])
    error = ((outputs[0] - outputs[1]).norm(dim=-1) / outputs[1].norm(dim=-1))[0]
    found = drift(model, tokens, 1)
    assert found["merged"][0] == pytest.approx(error[4:20].mean().item(), rel=1e-3)
    assert found["dense"][0] == pytest.approx(0, abs=1e-6)


def test_identity_plugin_drifts_nowhere():
    identity = VariatorConfig(k=1, sites=("ffn", "kv"), compressor="mean", decompressor="copy")
    model = VariatorModel(make_decoder("llama"), identity)
    found = drift(model, ids(2, 16), 1)
    assert set(found) == {"merged", "dense"}
    assert max(map(max, found.values())) < 1e-4


def test_drift_grows_from_nothing():
    model = make_variator("llama", VariatorConfig(k=2, sites=("ffn",), r=4, layers=(1, 2)))
    found = drift(model, ids(2, 16), 2)
    assert found["merged"][0] == 0
    assert found["merged"][1] > 0


def test_token_losses_average_to_the_cross_entropy():
    model = make_variator("llama", VariatorConfig(k=2, sites=("ffn", "kv"), r=4))
    windows = ids(3, 24)
    losses = token_losses(model, windows, 16, batch_size=2)
    assert losses.compressed.mean().item() == pytest.approx(
        continuation_cross_entropy(model, windows, 16), rel=1e-5
    )
    with model.disable_plugin():
        assert losses.dense.mean().item() == pytest.approx(
            continuation_cross_entropy(model, windows, 16), rel=1e-5
        )


def test_origins_by_hand():
    #        dense   merged   dense |  after the prompt
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 3, 4, 5, 9, 3, 9]
    found = origins(tokens, 8, range(2, 6))
    # 8-7 is a new pair of a seen token; 7-8 stands in the dense tail; 8-3 is new; 3-4 and 4-5 were merged;
    # 9 is new; 9-3 is new, its token not; 3-9 likewise
    assert found == [SEEN, NEAR, SEEN, FAR, FAR, NEW, SEEN, SEEN]


def test_a_pair_seen_in_the_continuation_is_dense():
    assert origins([1, 2, 3, 4, 9, 4, 9], 4, range(0, 4)) == [NEW, SEEN, NEAR]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" 1984", "number"),
        (" Paris", "capitalised word"),
        (" the", "other word"),
        ("ing", "inside a word"),
        (" ,", "punctuation or space"),
    ],
)
def test_shapes(text, kind):
    assert shape(text) == kind


def test_kinds_by_hand():
    losses = Losses(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.5, 2.0], [5.0, 4.0]]))
    rows = by_kind(losses, [["a", "b"], ["a", "b"]])
    assert rows == [
        {"kind": "a", "tokens": 2, "dense": 2.0, "compressed": 3.25, "harm": 1.25},
        {"kind": "b", "tokens": 2, "dense": 3.0, "compressed": 3.0, "harm": 0.0},
    ]


def test_the_worst_place_comes_first(monkeypatch):
    monkeypatch.setattr(module, "_FEW", 1)
    losses = Losses(torch.zeros(1, 3), torch.tensor([[0.1, 2.0, 0.3]]))
    found = module.by_category(
        losses,
        torch.tensor([[1, 2, 3, 4, 5]]),
        2,
        range(0, 2),
        lambda tokens: "".join(map(str, tokens)),
        most=2,
    )
    assert [each["token"] for each in found["examples"]] == ["4", "5"]
    assert found["examples"][0]["compressed"] == 2.0
    assert found["by_token"][0]["kind"] == "4"
    assert found["mean"]["compressed"] == pytest.approx(0.8)


def test_command(tmp_path, capsys):
    model = VariatorModel(
        make_decoder("llama", vocab_size=384), VariatorConfig(k=2, sites=("ffn", "kv"), r=4)
    )
    randomise(model.plugin(), std=0.05)
    model.save_pretrained(tmp_path / "plugin")
    model.unload().save_pretrained(tmp_path / "model")
    from llm_variator.sources.models import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "merge.json"
    flags = ["--data", "pydoc-topics", "--context", "48", "--continuation", "16", "--windows", "2"]
    flags += ["--sensitivity-windows", "1", "--work", str(tmp_path / "work"), "--json", str(file)]
    main(["merge", "--model", str(tmp_path / "model"), "--plugin", str(tmp_path / "plugin"), *flags])
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    assert all(sum(each["mean"]) == pytest.approx(1) for each in figures["weights"]["kv"].values())
    assert len(figures["sensitivity"]["ffn"]["divergence"]) == 3
    assert sum(row["tokens"] for row in figures["tokens"]["by_origin"]) == 2 * 16
    assert len(figures["drift"]["merged"]) == 3
    assert "restored" in capsys.readouterr().out
    flags[flags.index("48")] = "5"
    with pytest.raises(VariatorError, match="--context 5 holds no group"):
        main(["merge", "--model", str(tmp_path / "model"), "--plugin", str(tmp_path / "plugin"), *flags])


def kept(folder, **more) -> str:
    """The folder of a plugin that keeps keys, on the tiny model of `tiny`."""
    config = VariatorConfig(
        **{"sites": ("kv",), "compressor": "select", "k": 4, "block": 8, "dense_tail": 3, **more}
    )
    model = VariatorModel(load_model(model_folder()), config)
    randomise(model.plugin(), std=0.05)
    model.save_pretrained(folder)
    return str(folder)


def test_of_plugins_that_keep_keys_what_they_merge_is_analysed(tmp_path):
    flags = ["--model", model_folder(), "--data", "pydoc-topics", "--windows", "2"]
    sizes = ["--context", "48", "--continuation", "16", "--sensitivity-windows", "1", "--work", str(tmp_path)]
    with pytest.raises(VariatorError, match="merges nothing, it keeps single keys"):
        main(["merge", *flags, *sizes, "--plugin", kept(tmp_path / "kept")])
    with pytest.raises(VariatorError, match="give plugins with the site ffn"):
        main(["neurons", *flags, "--tokens", "16", "--ratios", "4", "--plugin", f"4={tmp_path / 'kept'}"])
    both = kept(
        tmp_path / "both",
        k={"ffn": 3, "kv": 2},
        sites=("ffn", "kv"),
        compressor={"ffn": "weighted", "kv": "select"},
        r=4,
    )
    main(["merge", *flags, *sizes, "--plugin", both, "--json", str(tmp_path / "f.json")])
    figures = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))["figures"]
    assert set(figures["weights"]) == set(figures["sensitivity"]) == {"ffn"}
    assert figures["sensitivity"]["ffn"]["k"] == 3
    assert all(len(each["mean"]) == 3 for each in figures["weights"]["ffn"].values())
