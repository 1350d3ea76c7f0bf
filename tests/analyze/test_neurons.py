"""Sets C, I and U by hand, activated neurons against a plain computation, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import VOCAB, make_decoder, make_encoder, randomise

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.analyze.__main__ import main, read
from llm_variator.analyze.activations import define, threshold, watching
from llm_variator.analyze.neurons import Settings, measure
from llm_variator.analyze.sets import SetCounts, count_sets
from llm_variator.sources.models import load_model


def neurons(*active: int) -> list[bool]:
    """Of four neurons, those activated."""
    return [place in active for place in range(4)]


# --- four neurons, by hand


def test_relations_of_one_group():
    # I = {1}, U = {0, 1, 2}, C = {1, 3}
    counts = count_sets(torch.tensor([[neurons(0, 1), neurons(1, 2)]]), torch.tensor([neurons(1, 3)]))
    assert counts == SetCounts(
        groups=1, neurons=4, c=2, i=1, u=3, c_and_i=1, c_and_u=1, by_chance_i=0.5, by_chance_u=1.5
    )
    shares = counts.shares()
    assert shares["c_and_i_of_i"] == 1
    assert shares["c_and_u_of_c"] == 1 / 2
    assert shares["chance_i"] == 1 / 2  # C holds half of the neurons
    assert shares["chance_u"] == 3 / 4  # U holds three of four


def test_relations_are_sums_over_groups():
    # the second group: I = {0}, U = {0, 1, 3}, C = {1}
    original = torch.tensor([[neurons(0, 1), neurons(1, 2)], [neurons(0, 1), neurons(0, 3)]])
    merged = torch.tensor([neurons(1, 3), neurons(1)])
    together = count_sets(original, merged)
    assert together == count_sets(original[:1], merged[:1]) + count_sets(original[1:], merged[1:])
    shares = together.shares()
    assert shares["c_and_i_of_i"] == 1 / 2
    assert shares["c_and_u_of_c"] == 2 / 3
    assert (shares["c"], shares["i"], shares["u"]) == (3 / 8, 2 / 8, 6 / 8)


def test_share_of_an_empty_set_is_none():
    shares = count_sets(torch.tensor([[neurons(0), neurons(1)]]), torch.tensor([neurons()])).shares()
    assert shares["c_and_i_of_i"] is None
    assert shares["c_and_u_of_c"] is None
    assert shares["u"] == 1 / 2


def test_merged_vector_between_two_has_its_sets_by_hand():
    """Four neurons that fire for one half-plane each: the mean of two vectors lies in no other than theirs."""
    weight = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    vectors = torch.tensor([[3.0, 1], [1, -2]])  # their mean: (2, -1/2)
    original = (vectors @ weight.T).relu() != 0
    merged = (vectors.mean(0, keepdim=True) @ weight.T).relu() != 0
    assert original.tolist() == [neurons(0, 2), neurons(0, 3)]
    assert merged.tolist() == [neurons(0, 3)]
    shares = count_sets(original[None], merged).shares()
    assert (shares["c_and_i_of_i"], shares["c_and_u_of_c"]) == (1, 1)


# --- the threshold of models without ReLU


def test_threshold_by_hand():
    # Output (0, 3, 4, 1), length 5.10. Without the 1 it changes by 0.196 of that, without 1 and 3 by 0.62.
    values = torch.tensor([[0.0, 3, 4, 1]])
    found = threshold(values, torch.eye(4), torch.ones(4), tolerance=0.2)
    assert found == pytest.approx(3, rel=1e-3)
    assert found <= 3


def test_threshold_weighs_a_value_by_its_weights():
    weight = torch.diag(torch.tensor([10.0, 1, 1, 1]))
    values = torch.tensor([[0.3, 3, 4, 1]])  # contributions 3, 3, 4, 1
    assert threshold(values, weight, weight.norm(dim=0), tolerance=0.2) == pytest.approx(3, rel=1e-3)


# --- a whole model against a plain computation


@pytest.mark.parametrize("name", ["t5", "t5-gated", "bert"])
def test_encoder_against_a_plain_computation(name):
    model = VariatorModel(make_encoder(name))
    model.add_plugin("k2", VariatorConfig(k=2, sites=("ffn",)))
    randomise(model.plugin("k2"))
    ids = torch.randint(3, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
    definition = define(model, ids)
    assert definition.name == ("nonzero" if name == "t5" else "threshold")
    found = measure(model, ids, definition, {2: "k2"}, batch_size=2)

    inputs: list[torch.Tensor] = []
    first = model.base.get_submodule("bert.encoder.layer.0" if name == "bert" else "encoder.block.0")
    ffn = first.intermediate if name == "bert" else first.layer[-1].DenseReluDense
    handle = ffn.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with model.disable_plugin(), torch.no_grad():
        model(ids) if name == "bert" else model(ids, decoder_input_ids=ids[:, :1])
    handle.remove()

    def fire(x: torch.Tensor) -> torch.Tensor:
        if name == "t5":
            return ffn.wi(x).relu() > 0
        if name == "bert":
            values, last = torch.nn.functional.gelu(ffn.dense(x)), first.output.dense.weight
        else:
            values, last = ffn.act(ffn.wi_0(x)) * ffn.wi_1(x), ffn.wo.weight
        return values.abs() * last.norm(dim=0) >= definition.thresholds[0]

    with torch.no_grad():
        tokens = fire(inputs[0])
        weights = model.plugin("k2").at("ffn", 0).compressor.weights(inputs[0].unflatten(1, (4, 2)))
        merged = fire((inputs[0].unflatten(1, (4, 2)) * weights.unsqueeze(-1)).sum(2))
    pairs = tokens.unflatten(1, (4, 2))
    both, either = pairs[:, :, 0] & pairs[:, :, 1], pairs[:, :, 0] | pairs[:, :, 1]
    assert found["activated"]["1"][0] == pytest.approx(tokens.double().mean().item())
    assert found["activated"]["2"][0] == pytest.approx(merged.double().mean().item())
    layer = {key: values[0] for key, values in found["sets_per_layer"]["2"].items()}
    assert layer["c_and_i_of_i"] == pytest.approx(((merged & both).sum() / both.sum()).item())
    assert layer["c_and_u_of_c"] == pytest.approx(((merged & either).sum() / merged.sum()).item())


def test_identity_plugin_activates_what_the_model_does():
    model = VariatorModel(make_decoder("llama"))
    identity = VariatorConfig(k=1, sites=("ffn",), compressor="mean", decompressor="copy")
    model.add_plugin("k1", identity)
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    found = measure(model, ids, define(model, ids), {1: "k1"}, batch_size=2)
    assert found["sets"]["1"]["c_and_i_of_i"] == 1
    assert found["sets"]["1"]["c_and_u_of_c"] == 1


def test_layers_left_dense_have_no_share():
    model = VariatorModel(make_decoder("llama"))
    model.add_plugin("k2", VariatorConfig(k=2, sites=("ffn",), layers=(1,)))
    ids = torch.randint(3, VOCAB, (1, 16), generator=torch.Generator().manual_seed(0))
    found = measure(model, ids, define(model, ids), {2: "k2"}, batch_size=1)
    assert [share is None for share in found["activated"]["2"]] == [True, False, True]
    assert found["activated_mean"]["2"] == found["activated"]["2"][1]


def test_hooks_are_gone_after_an_error():
    model = VariatorModel(make_decoder("llama"))
    module = model.base.model.layers[0].mlp.down_proj
    before = len(module._forward_pre_hooks)

    def broken() -> None:
        with watching(model, lambda layer, values: None):
            assert len(module._forward_pre_hooks) == before + 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert len(module._forward_pre_hooks) == before


# --- the command


@pytest.mark.parametrize(("model", "name"), [("tiny-t5", "nonzero"), ("tiny-llama", "threshold")])
def test_command(model, name, tmp_path, capsys):
    file = tmp_path / "neurons.json"
    flags = ["--data", "pydoc-topics", "--tokens", "64", "--windows", "3", "--batch-size", "2"]
    flags += [
        "--ratios",
        "4",
        "2",
        "--train-steps",
        "1",
        "--train-tokens",
        "32",
        "--work",
        str(tmp_path / "work"),
    ]
    main(["neurons", "--model", model, "--random-init", *flags, "--json", str(file)])
    result = json.loads(file.read_text(encoding="utf-8"))
    figures = result["figures"]
    assert result["command"].startswith(f"python -m llm_variator.analyze neurons --model {model}")
    assert figures["definition"]["name"] == name
    assert list(figures["activated_mean"]) == ["1", "2", "4"]
    assert all(len(layers) == 2 for layers in figures["activated"].values())
    assert all(0 <= share <= 1 for layers in figures["activated"].values() for share in layers)
    assert figures["plugins"]["2"]["training"] == "1 steps of 4 x 32 tokens of pydoc-topics"
    assert "by chance" in capsys.readouterr().out


def test_wrong_plugin_flag_is_refused():
    flags = ["--random-init", "--data", "pydoc-topics", "--windows", "1", "--tokens", "8"]
    with pytest.raises(VariatorError, match="write K=PLUGIN"):
        main(["neurons", "--model", "tiny-llama", *flags, "--plugin", "smollm2-135m/k2"])


def test_figures_are_of_the_ratio_they_are_filed_under(tmp_path):
    model = VariatorModel(load_model("tiny-llama", random_init=True))
    for name, ratios in (("mixed", [2, 16]), ("part", [1, 2])):
        model.add_plugin(name, VariatorConfig(k=2, sites=("ffn",), k_per_layer={"ffn": ratios}))
        model.save_pretrained(tmp_path / name, plugin_name=name)
    flags = ["--random-init", "--data", "pydoc-topics", "--windows", "1", "--tokens", "40", "--ratios", "2"]
    command = ["neurons", "--model", "tiny-llama", *flags]
    with pytest.raises(
        VariatorError, match=r"--plugin 2=.*mixed merges FFNs by 16: give one that merges by 2"
    ):
        main([*command, "--plugin", f"2={tmp_path / 'mixed'}"])
    main([*command, "--plugin", f"2={tmp_path / 'part'}"])
    with pytest.raises(VariatorError, match="--tokens 40 hold no group of 64"):
        main([*command, "--ratios", "64"])


@pytest.mark.parametrize("words", [["neurons"], ["merge", "--plugin", "p"]])
def test_quantised_weights_are_refused(words):
    with pytest.raises(VariatorError, match=r"--quantize: .* leave it out"):
        read([*words, "--model", "tiny-llama", "--quantize", "nf4"])


def test_settings_from_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "model: m\nratios: [4, 2]\nplugin: [2=a]\ntolerance: 0.1\n", encoding="utf-8"
    )
    settings = read(["neurons", "--config", str(tmp_path / "r.yaml"), "--windows", "3"])
    assert isinstance(settings, Settings)
    assert (settings.ratios, settings.plugins(), settings.tolerance) == ((4, 2), {2: "a"}, 0.1)
    assert (settings.dtype, settings.data, settings.windows, settings.batch_size) == (
        "float32",
        "wikitext2/test",
        3,
        4,
    )
