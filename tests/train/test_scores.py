"""Scores of kept keys: against plain loops over attention weights, numpy's least squares and counts by hand."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DECODERS, make_decoder, make_encoder, randomise
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import fit_words, model_folder
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.sources.corpora import parse_sources
from llm_variator.sources.models import byte_tokenizer, load_model
from llm_variator.train import fitting, scores
from llm_variator.train.__main__ import main
from llm_variator.train.futures import FUTURES, KINDS, Sample, Samples
from llm_variator.train.scores import TOGETHER, Explained, Moments, Watch, targets
from llm_variator.train.shares import Budget, costs, entries

CONTEXT, ROWS = 40, slice(3, 31)


def sample(seed: int = 0, kind: str = "text") -> Sample:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (CONTEXT,), generator=draw)
    futures = {
        "continuation": torch.randint(3, 97, (9,), generator=draw),
        "repetition": torch.cat((torch.tensor([5, 6]), ids[ROWS])),
    }
    if kind == "passages":
        futures["questions"] = torch.randint(3, 97, (13,), generator=draw)
    return Sample(kind, ids, ROWS, futures)


def values_of(base, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """(KV heads, n, e) by the value projection alone."""
    attention = base.model.layers[layer].self_attn
    return attention.v_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)


def by_loops(base, one: Sample, future: torch.Tensor, output_weight, run=None) -> tuple[dict, dict]:
    """What attention reads of the fitted tokens, and their energies, token by token, from eager attention weights.

    `run` in place of `base` on all tokens.
    """
    reads: dict[int, torch.Tensor] = {}
    handles = [
        block.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: reads.update(
                {i: (args[0] if args else kwargs["hidden_states"])[0]}
            ),
            with_kwargs=True,
        )
        for i, block in enumerate(base.model.layers)
    ]
    with torch.no_grad():
        ids = torch.cat((one.context, future))[None]
        weights = (run or base)(ids, output_attentions=True, use_cache=False).attentions
    for handle in handles:
        handle.remove()
    found = {}
    for layer, own in enumerate(weights):
        value = values_of(base, layer, reads[layer])
        groups = own.shape[1] // len(value)
        energy = torch.zeros(ROWS.stop - ROWS.start, len(value), dtype=torch.float64)
        for head in range(own.shape[1]):
            part = output_weight(layer)[:, head * value.shape[-1] : (head + 1) * value.shape[-1]]
            for row, token in enumerate(range(ROWS.start, ROWS.stop)):
                size = (part @ value[head // groups, token]).norm()
                read = own[0, head, CONTEXT:, token] * size
                energy[row, head // groups] += read.double().square().mean()
        found[layer] = energy
    return {layer: x[ROWS] for layer, x in reads.items()}, found


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_energies_are_those_of_eager_attention(name):
    base = make_decoder(name, attn_implementation="eager")
    one = sample(kind="passages")
    watch = Watch(base)
    with watch.attached():
        features, energies = watch.read(one)
    assert set(energies) == set(FUTURES)
    assert watch.layers == [i for i in range(3) if name != "gemma3" or i != 1]
    for future, ids in one.futures.items():
        reads, wanted = by_loops(
            base, one, ids, lambda layer: base.model.layers[layer].self_attn.o_proj.weight
        )
        for layer in watch.layers:
            assert torch.allclose(features[layer], reads[layer], atol=1e-4)
            assert torch.allclose(energies[future][layer].double(), wanted[layer], rtol=1e-3), (future, layer)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_energies_beside_a_plugin_are_those_of_its_model(name):
    base = make_decoder(name, attn_implementation="eager")
    model = VariatorModel(base)
    model.add_plugin("ffn", VariatorConfig(k=4, r=5, dense_head=2, dense_tail=5))
    randomise(model.plugin("ffn"))
    one = sample(kind="passages")
    watch = Watch(base, model.plugin("ffn"))
    with watch.attached():
        features, energies = watch.read(one)

    def run(ids, **options):
        with model.use_plugin("ffn"):
            return model(ids, prompt_length=CONTEXT, **options)

    weight = {layer: base.model.layers[layer].self_attn.o_proj.weight for layer in watch.layers}
    for future, ids in one.futures.items():
        reads, wanted = by_loops(base, one, ids, weight.__getitem__, run)
        dense, _ = by_loops(base, one, ids, weight.__getitem__)
        for layer in watch.layers:
            assert torch.allclose(features[layer], reads[layer], atol=1e-4)
            assert torch.allclose(energies[future][layer].double(), wanted[layer], rtol=1e-3), (future, layer)
        assert not torch.allclose(features[2], dense[2], atol=1e-2)


@torch.no_grad()
def test_the_base_is_left_as_it_was():
    base = make_decoder("llama")
    ids = sample().context[None]
    before = base(ids).logits
    watch = Watch(base)
    with watch.attached():
        assert torch.equal(base(ids).logits, before)
    assert all(block.self_attn.config is base.config for block in base.model.layers)
    assert not any(block.self_attn._forward_pre_hooks for block in base.model.layers)


@pytest.mark.parametrize("beside", [False, True])
@torch.no_grad()
def test_a_wrapped_base_is_left_as_it_was(beside):
    """Whichever of both functions of attention goes first."""
    base = make_decoder("llama")
    model = VariatorModel(base)
    model.add_plugin("ffn", VariatorConfig(k=4, r=5))
    model.add_plugin("kv", VariatorConfig(sites=("kv",), compressor="select", block=4))
    ids = sample().context[None]
    with model.use_plugin("kv"):
        wanted = model(ids).logits
    watch = Watch(base, model.plugin("ffn") if beside else None)
    with watch.attached():
        watch.read(sample(kind="passages"))
        with model.use_plugin("kv"):
            assert torch.equal(model(ids).logits, wanted)
        base(ids)
    with model.use_plugin("kv"):
        assert torch.equal(model(ids).logits, wanted)
    model.unload()
    assert all(block.self_attn.config is base.config for block in base.model.layers)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra `quant` is not installed"
)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@torch.no_grad()
def test_a_quantised_base_is_fitted_on_what_it_computes(tmp_path, kind):
    import bitsandbytes

    make_decoder("llama", hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(tmp_path)
    base = load_model(str(tmp_path), quantize=kind)
    base.set_attn_implementation("eager")

    def weight(layer: int) -> torch.Tensor:
        own = base.model.layers[layer].self_attn.o_proj.weight
        if kind == "nf4":
            return bitsandbytes.functional.dequantize_4bit(own.data, own.quant_state).float()
        state = base.model.layers[layer].self_attn.o_proj.state
        scales = own.SCB if own.SCB is not None else state.SCB
        return own.data.float() * scales[:, None] / 127

    one, watch = sample(), Watch(base)
    with watch.attached():
        _, energies = watch.read(one)
    _, wanted = by_loops(base, one, one.futures["continuation"], weight)
    for layer in watch.layers:
        assert torch.allclose(energies["continuation"][layer].double(), wanted[layer], rtol=0.03), layer


def test_an_encoder_is_refused():
    with pytest.raises(VariatorError, match='compressor "select" is for decoders, T5'):
        Watch(make_encoder("t5"))


@torch.no_grad()
def test_fits_are_numpy_s_least_squares():
    watch = Watch(make_decoder("llama"))
    moments = Moments(len(watch.layers), watch.dim, watch.heads)
    rows: dict[str, list] = {}
    seen: list[tuple] = []
    with watch.attached():
        for seed in range(6):
            one = sample(seed, KINDS[seed % 2])
            features, energies = watch.read(one)
            moments.add(one.kind, features, targets(energies))
            seen.append((features, dict(energies)))
            energies[TOGETHER] = {
                layer: sum(own[layer] for own in energies.values()) for layer in watch.layers
            }
            for name, own in energies.items():
                rows.setdefault(name, []).append((features[1].double().numpy(), own[1].double().numpy()))
    assert moments.present() == [*FUTURES, TOGETHER]
    for name, parts in rows.items():
        x = np.concatenate([part[0] for part in parts])
        y = 0.5 * np.log(np.concatenate([part[1] for part in parts]))
        ridge = math.sqrt(scores.RIDGE * np.mean((x**2).sum(0)))
        tall = np.concatenate((np.c_[x, np.ones(len(x))], np.c_[ridge * np.eye(32), np.zeros(32)]))
        solution, *_ = np.linalg.lstsq(tall, np.concatenate((y, np.zeros((32, 2)))), rcond=None)
        fit = moments.solve(name)
        assert np.allclose(fit.weight[1].T, solution[:-1], atol=1e-8), name
        assert np.allclose(fit.bias[1], solution[-1], atol=1e-8), name
        left = ((y - np.c_[x, np.ones(len(x))] @ solution) ** 2).sum(0)
        wanted = 1 - left / ((y - y.mean(0)) ** 2).sum(0)
        held = Explained({name: fit})
        for features, energies in seen:
            held.add(features, targets(energies))
        assert np.allclose(held.shares()[name][1], wanted, atol=1e-8), name


def test_weights_that_stay_on_the_disk(tmp_path):
    """What a model reads is the same where its layers are on the disk and come for their pass alone."""
    make_decoder("llama").save_pretrained(tmp_path)
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(parts, "cpu") | {"model.layers": "disk"}
    found = []
    for more in ({}, {"device_map": places}):
        base = load_model(tmp_path, **more)
        assert base.model.layers[0].mlp.up_proj.weight.is_meta == bool(more)
        watch = Watch(base)
        with watch.attached():
            found.append((*watch.read(sample()), *watch.effects(sample(), seed=1)))
    assert_equal(*found)


def assert_equal(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
        return
    assert len(ours) == len(theirs) > 0
    for key in ours if isinstance(ours, dict) else range(len(ours)):
        assert_equal(ours[key], theirs[key])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what Linux says of its memory")
def test_the_checkpoint_of_a_model_is_not_copied_into_memory(tmp_path):
    """Its pages can be given up and read again, so scores of a model can be fitted that is larger than the memory."""
    config = make_decoder("llama").config
    config.hidden_size, config.intermediate_size, config.head_dim = 512, 8192, 128
    type(make_decoder("llama"))(config).bfloat16().save_pretrained(tmp_path)
    base = load_model(tmp_path)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if line[-1] == str(tmp_path / "model.safetensors")]
    place = base.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert any(int(first, 16) <= place < int(end, 16) for first, end in ranges), (
        "recipes/llama-3.1-8b/kv.yaml"
    )


# --- ratios


def kept_by_hand(n: int, k: int, head: int, tail: int, block: int) -> int:
    """Token by token."""
    if n - head < 2 * block or n - head - tail <= 0:
        return n
    kept = head + tail
    for start in range(head, n - tail, block):
        size = len(range(start, min(start + block, n - tail)))
        kept += math.ceil(size / k)
    return kept


@pytest.mark.parametrize("n", [5, 19, 20, 21, 36, 47, 100])
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize(("head", "tail"), [(4, 1), (0, 0), (3, 17), (4, 40)])
def test_entries_are_counted_exactly(n, k, head, tail):
    got = entries(n, k, ends=(head, tail), block=8)
    assert got == (n if k == 1 else kept_by_hand(n, k, head, tail, 8))


@pytest.mark.parametrize("keep", [0.15, 0.3, 0.415, 0.77, 1.0])
@pytest.mark.parametrize("dense", [0, 1])
def test_ratios_never_keep_more_than_asked(keep, dense):
    draw = torch.Generator().manual_seed(int(100 * keep))
    steps = torch.rand(12, 3, 6, generator=draw) ** 3
    steps[..., 0] = 0
    keep = keep * 12 / (12 + dense) + dense / (12 + dense)
    budget = Budget(keep, (300, 700), ends=(4, 20), block=32, dense_layers=dense)
    ratios = budget.ratios(steps.cumsum(-1))
    for n in (300, 700):
        entries_of_all = sum(kept_by_hand(n, k, 4, 20, 32) for k in ratios.flatten().tolist()) + dense * 3 * n
        assert budget.share(ratios, n) == pytest.approx(entries_of_all / (36 + 3 * dense) / n)
        assert entries_of_all <= keep * (36 + 3 * dense) * n
    assert set(ratios.flatten().tolist()) <= {1, 2, 4, 8, 16, 32}
    for place in ratios.flatten().nonzero().flatten().tolist():  # and no head could have more
        more = ratios.clone()
        more.view(-1)[place] //= 2
        assert more.min() < 1 or not budget.holds(more)


def test_ratios_are_the_cheapest_of_all_that_the_budget_allows():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):  # convex costs, entries that fill the budget to the last: all 4^4 tried
        steps = torch.rand(2, 2, 4, generator=draw).double().sort(dim=-1).values
        steps[..., 0] = 0
        own = steps.cumsum(-1) * torch.rand(2, 2, 1, generator=draw) ** 4
        budget = Budget(float(0.2 + 0.7 * torch.rand(1, generator=draw)), (80,), ends=(0, 0), block=8)
        ratios = budget.ratios(own)
        sums = {
            ks: sum(float(own.view(4, 4)[head, k.bit_length() - 1]) for head, k in enumerate(ks))
            for ks in itertools.product((1, 2, 4, 8), repeat=4)
            if sum(80 // k for k in ks) <= budget.keep * 320
        }
        got, best = sums[tuple(ratios.flatten().tolist())], min(sums.values())
        # a price per entry leaves at most one step of one head unspent
        assert best <= got <= best + float(own.diff(dim=-1).max())
        assert sum(own.flatten(0, 1)[:, -1]).item() >= got


def test_costs_are_the_effects_of_what_is_dropped():
    scores = torch.tensor([[3.0], [1.0], [2.0], [0.0], [0.0], [5.0], [0.0], [0.0], [9.0]])
    effects = torch.tensor([[7.0], [1.0], [2.0], [4.0], [1.0], [0.5], [2.0], [3.0], [99.0]])
    # blocks of 4: kept first are 7, 2, 1, 4, and 0.5, 1, 2, 3 (of equal scores the earlier); the ninth is cut off
    assert costs(scores, effects, 4).tolist() == [[0.0, (1 + 4 + 2 + 3) / 2, (2 + 1 + 4 + 1 + 2 + 3) / 2]]
    assert costs(scores[:3], effects[:3], 8).tolist() == [
        [0.0, 1.0, 3.0, 3.0]
    ]  # 2, 1 and 1 of three tokens are kept


@pytest.mark.parametrize("name", DECODERS)
def test_effects_are_the_gradients_of_gates(name):
    """Each key of each KV head gets a factor of 1 on what it adds to each query's output, in eager code of our own."""
    base = make_decoder(name, attn_implementation="eager").double()
    one = sample(kind="passages")
    watch = Watch(base)
    with watch.attached():
        _, effects = watch.effects(one, seed=3)
    assert set(effects) == set(watch.layers)
    assert all(parameter.grad is None for parameter in base.parameters())
    draw, wanted = torch.Generator().manual_seed(3), dict.fromkeys(watch.layers, 0.0)
    for future in one.futures.values():
        gates: dict[int, torch.Tensor] = {}

        def gated(module, query, key, value, mask, scaling, gates=gates, **kwargs):
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
            weights = (query @ key.mT * scaling + mask[:, :, :, : key.shape[2]]).softmax(-1)
            gate = torch.ones(query.shape[1] // groups, query.shape[2], key.shape[2], dtype=query.dtype)
            gates[module.layer_idx] = gate.requires_grad_()
            out = (weights * gate.repeat_interleave(groups, dim=0)) @ value
            return out.transpose(1, 2), weights

        ALL_ATTENTION_FUNCTIONS.register("gated", gated)
        ALL_MASK_ATTENTION_FUNCTIONS.register("gated", eager_mask)
        base.set_attn_implementation("gated")
        logits = base(torch.cat((one.context, future))[None], use_cache=False).logits[0, CONTEXT:]
        shares = logits.detach().float().softmax(-1)
        drawn = torch.multinomial(shares, 1, generator=draw)[:, 0]
        torch.nn.functional.cross_entropy(logits.float(), drawn, reduction="sum").backward()
        base.set_attn_implementation("eager")
        base.zero_grad()
        for layer in watch.layers:
            own = gates[layer].grad[:, CONTEXT:, ROWS].square().sum(1).T
            wanted[layer] = wanted[layer] + own / len(future) / len(one.futures)
    for layer in watch.layers:
        assert torch.allclose(effects[layer].double(), wanted[layer], rtol=1e-3, atol=1e-12), layer


def test_too_little_to_keep_is_refused():
    with pytest.raises(
        VariatorError, match=r"--keep 0\.1 is too little: .* are already 0\.150 of the entries"
    ):
        Budget(0.1, (1000,), ends=(4, 132), block=64).ratios(torch.ones(1, 1, 7))
    with pytest.raises(VariatorError, match="--calibrate-tokens 100: such a prompt stays whole"):
        Budget(0.5, (100,), ends=(4, 4), block=64)


# --- samples


@pytest.fixture
def squad(tmp_path):
    """A data folder with three passages."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [
        {
            "id": f"{passage}-{question}",
            "context": f"Passage {passage} is about {'many ' * 20}things.",
            "question": f"What is {passage}, for the {question}. time?",
            "answers": {"text": [f"thing {passage}{question}"], "answer_start": [0]},
        }
        for passage in range(12)
        for question in range(3)
    ]
    (tmp_path / "squad").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "squad" / "train.parquet")
    return tmp_path


def make_samples(data, squad=None, **changes):
    settings = dict(count=9, lengths=(60, 240), ends=(4, 8), seed=0, data_dir=squad) | changes
    return Samples(parse_sources(data), byte_tokenizer(), **settings)


def test_samples_are_functions_of_their_number(squad):
    made, again = (make_samples(["pydoc-topics", "task:squad"], squad) for _ in range(2))
    assert [one.kind for one in made] == [*(KINDS * 4), "text"]
    assert sorted({len(one.context) for one in made}) == [60, 240]
    for index in (8, 1, 5):
        one, other = made[index], again[index]
        assert torch.equal(one.context, other.context)
        assert one.rows == other.rows
        assert all(torch.equal(one.futures[name], other.futures[name]) for name in one.futures)
    assert made.has_questions


def test_what_follows_belongs_to_the_context(squad):
    tokenizer = byte_tokenizer()
    for one in make_samples(["pydoc-topics", "task:squad"], squad):
        assert 4 <= one.rows.start < one.rows.stop <= len(one.context) - 8
        again = tokenizer.decode(one.futures["repetition"])
        assert again.endswith("exactly.\n\n" + tokenizer.decode(one.context[one.rows]))
        if one.kind == "text":
            assert set(one.futures) == {"continuation", "repetition"}
            continue
        text = tokenizer.decode(one.context)
        asked = tokenizer.decode(one.futures["questions"])
        assert asked.startswith("\nQuestion: What is ")
        passage = asked.split("What is ")[1].split(",")[0]
        assert f"Passage {passage} "[:9] in text
        shown = [line for line in text.split("\n") if line.startswith("Question: ")]
        assert not any(len(line) > 25 and line in asked for line in shown), (
            "a question that was answered already"
        )


def test_texts_of_different_samples_do_not_overlap():
    made = make_samples(["pydoc-topics"], count=12, lengths=(200,))
    assert len({tuple(one.context.tolist()) for one in made}) == 12
    assert not make_samples(["pydoc-topics"]).has_questions


def test_too_little_text_is_refused(tmp_path, squad):
    (tmp_path / "a.txt").write_text("Some words, and then some more. " * 20)
    with pytest.raises(VariatorError, match=r"text for \d contexts of 200 tokens, 9 are wanted"):
        make_samples([str(tmp_path / "a.txt")], lengths=(200,))
    with pytest.raises(
        VariatorError, match=r"the passages of the data have .* too few for a context of 9000"
    ):
        make_samples(["task:squad"], squad, lengths=(9000,))
    with pytest.raises(VariatorError, match="--fit-tokens 12 leaves no token between --dense-head 4"):
        make_samples(["pydoc-topics"], lengths=(12,))


# --- the command


def run(output, *flags, **changes):
    main(fit_words(output, *flags, **changes))
    return json.loads((output / "training.json").read_text())["figures"]


def test_the_command_makes_a_plugin_that_loads(tmp_path, squad, capsys):
    figures = run(tmp_path / "run", score_fits=3, data=("pydoc-topics", "task:squad"), data_dir=squad)
    assert figures["fits"] == list(FUTURES)
    assert 0.3 < figures["kept"]["96"] <= 0.5
    assert figures["samples"] == 8
    config = VariatorConfig.from_json(tmp_path / "run" / "variator_config.json")
    kept = sum(kept_by_hand(96, k, 4, 6, 8) if k > 1 else 96 for row in config.k_per_head for k in row)
    assert kept / 96 / 6 == pytest.approx(figures["kept"]["96"])
    model = VariatorModel(load_model(model_folder()))
    model.load_plugin(tmp_path / "run", "kv")
    weights = load_file(tmp_path / "run" / "variator.safetensors")
    assert any(weight.abs().max() > 0 for weight in weights.values())
    layer = next(i for i, row in enumerate(config.k_per_head) if max(row) > 1)
    assert weights[f"kv.{layer}.score.weight"].shape == (3, 2, 32)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "explained variance, held out" in card
    assert "of a prompt of 96 tokens" in card
    printed = capsys.readouterr()
    assert "entries kept: " in printed.out
    assert "contexts/s" in printed.err or "s/ contexts" in printed.err


def test_scores_beside_a_plugin_that_merges_in_ffns(tmp_path):
    config = VariatorConfig(k=4, r=5, dense_tail=6)
    model = VariatorModel(load_model(model_folder()), config)
    randomise(model.plugin())
    model.save_pretrained(tmp_path / "ffn")
    run(tmp_path / "alone")
    run(tmp_path / "both", beside=tmp_path / "ffn", dtype="bfloat16")  # rounds the base, not the plugin
    ffn, alone, both = (
        load_file(tmp_path / name / "variator.safetensors") for name in ("ffn", "alone", "both")
    )
    assert all(torch.equal(both.pop(name), value) for name, value in ffn.items())
    assert both
    assert all(name.startswith("kv.") for name in both)
    assert not any(torch.equal(value, alone.get(name, value + 1)) for name, value in both.items())
    model.load_plugin(tmp_path / "both", "both")
    with pytest.raises(VariatorError, match="same dense_tail, these have 6 and 9"):
        run(tmp_path / "other", beside=tmp_path / "ffn", dense_tail=9)
    with pytest.raises(VariatorError, match="is of another run"):  # sums of other reads
        run(tmp_path / "alone", "--resume", beside=tmp_path / "ffn")
    randomise(model.plugin("default"), seed=5)
    model.save_pretrained(tmp_path / "ffn", plugin_name="default")
    with pytest.raises(VariatorError, match="is of another run"):  # of a plugin that is another one by now
        run(tmp_path / "both", "--resume", beside=tmp_path / "ffn", dtype="bfloat16")
    with pytest.raises(VariatorError, match="--beside is for scores"):
        main(["--model", model_folder(), "--beside", str(tmp_path / "ffn")])


def test_scores_are_the_solution_of_all_samples(tmp_path):
    run(tmp_path / "run")
    moments = Moments(3, 32, 2)
    file = tmp_path / "run" / fitting.MOMENTS_FILE
    with safe_open(file, framework="pt") as opened:
        moments.load(file, [opened.metadata()["record"]])
    fit = moments.solve(TOGETHER)
    weights = load_file(tmp_path / "run" / "variator.safetensors")
    for layer in range(3):
        if f"kv.{layer}.score.weight" in weights:
            assert torch.allclose(weights[f"kv.{layer}.score.weight"][0], fit.weight[layer].float())
            assert torch.allclose(weights[f"kv.{layer}.score.bias"][0], fit.bias[layer].float())


@pytest.mark.parametrize("after", [4, 7])
def test_a_killed_run_goes_on_to_the_same_plugin(tmp_path, monkeypatch, after):
    run(tmp_path / "whole")
    read = Watch.read

    class Killed(Exception):  # noqa: N818
        pass

    calls = []

    def dies(self, sample):
        calls.append(1)
        if len(calls) > after:
            raise Killed
        return read(self, sample)

    monkeypatch.setattr(Watch, "read", dies)
    with pytest.raises(Killed):
        run(tmp_path / "cut")
    assert not (tmp_path / "cut" / "variator_config.json").exists()
    monkeypatch.setattr(Watch, "read", read)
    with pytest.raises(VariatorError, match="is of an earlier run: add --resume"):
        run(tmp_path / "cut")
    with pytest.raises(VariatorError, match="is of another run"):
        run(tmp_path / "cut", "--resume", seed=1)
    seen = []
    monkeypatch.setattr(Watch, "read", lambda self, sample: seen.append(1) or read(self, sample))
    run(tmp_path / "cut", "--resume")
    assert len(seen) == 8 - after // 3 * 3 + fitting.HELD_OUT
    cut, whole = (tmp_path / name for name in ("cut", "whole"))
    config = "variator_config.json"
    assert (cut / config).read_text() == (whole / config).read_text()
    ours, theirs = (load_file(folder / "variator.safetensors") for folder in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_share_needs_no_new_pass(tmp_path, monkeypatch):
    run(tmp_path / "run")
    read, seen = Watch.read, []
    monkeypatch.setattr(Watch, "read", lambda self, sample: seen.append(1) or read(self, sample))
    figures = run(tmp_path / "run", "--resume", keep=0.8)
    assert len(seen) == fitting.HELD_OUT
    assert 0.5 < figures["kept"]["96"] <= 0.8
    figures = run(tmp_path / "run", "--resume", keep=0.8, dense_tail=20)
    assert len(seen) == 2 * fitting.HELD_OUT
    assert figures["config"]["dense_tail"] == 20


def test_given_ratios_stay(tmp_path):
    ratios = [[2, 1], [1, 1], [8, 4]]
    figures = run(tmp_path / "run", k_per_head=json.dumps(ratios))
    assert figures["config"]["k_per_head"] == ratios
    assert set(load_file(tmp_path / "run" / "variator.safetensors")) == {
        f"kv.{layer}.score.{name}" for layer in (0, 2) for name in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(keep=0.05), "--keep 0.05 is too little"),
        (dict(fit_tokens=400), "--fit-tokens 400 .* the model has 512 positions"),
        (dict(fit_tokens=9), "--fit-tokens 9 leaves no token"),
        (dict(calibrate_tokens=15), "--calibrate-tokens 15: such a prompt stays whole"),
        (dict(data="nowhere/nothing"), "no such file or folder"),
        (dict(sites="ffn,kv", compressor="ffn=weighted,kv=select"), "give --sites kv"),
        (dict(max_steps=3), "leave --max-steps out"),
        (dict(score_fits=3), "--score-fits 3: 1 fits all futures together, 2 each by itself"),
        (dict(layers="7"), "layers names layer 7"),
        (dict(init="least-squares"), "--init least-squares"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(VariatorError, match=message) as raised:
        run(tmp_path / "run", **changes)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "variator_config.json").exists()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(VariatorError, match="nothing to resume: there is no"):
        run(tmp_path / "run", "--resume")
