"""The benchmarks on tiny models: what they count and time, not how fast anything is."""

from __future__ import annotations

import json
import time

import pytest
import torch
from conftest import randomise

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.bench.__main__ import main, read
from llm_variator.bench.card import Card
from llm_variator.bench.formulations import PlainLayers, fused
from llm_variator.bench.profiling import BUSY, REST
from llm_variator.bench.profiling import table as profile_table
from llm_variator.bench.reading import random_cache
from llm_variator.bench.report import markdown
from llm_variator.bench.setting import DENSE, Setting, plugin
from llm_variator.bench.swapping import _SWAPS, Swap
from llm_variator.bench.training import ADAM_BYTES, NF4_BITS, STEP, Memory, _training_cases, kept_bytes
from llm_variator.engine.cache import KVCacheReport
from llm_variator.engine.layers import HiddenCompressor, HiddenDecompressor
from llm_variator.engine.plugin import weights_digest
from llm_variator.measures.timing import CLOCKS, Case, Spread, interleaved, ratio, timed
from llm_variator.sources.models import load_config, load_model

TINY = ["--random-init", "--device", "cpu", "--repetitions", "2", "--threads", "1"]


def setting(*flags: str, command: str = "prefill", model: str = "tiny-llama") -> Setting:
    return Setting(read([command, "--model", model, *TINY, *flags]))


def figures(tmp_path, *flags: str) -> dict:
    main([*flags, *TINY, "--json", str(tmp_path / "f.json")])
    return json.loads((tmp_path / "f.json").read_text())["figures"]


# Timing.


def test_cases_run_in_turns_and_preparation_is_not_timed():
    order = []
    cases = {
        "a": Case(lambda state: order.append(state), prepare=lambda: time.sleep(0.05) or "a"),
        "b": Case(lambda state: (order.append("b"), time.sleep(0.02))),
    }
    seconds = interleaved(cases, 3, warmups=1)
    assert order == ["a", "b"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert max(seconds["a"]) < 0.05
    assert min(seconds["b"]) >= 0.02


def test_the_processor_clock_does_not_see_waiting():
    seconds = interleaved({"sleep": Case(lambda _: time.sleep(0.05))}, 2, clock="cpu")
    assert max(seconds["sleep"]) < 0.04


def test_ratios_are_taken_within_a_repetition():
    """A machine that gets ten times slower moves the median time, not the median ratio."""
    seconds = {"dense": [1.0, 10.0, 2.0], "k2": [0.5, 5.0, 1.0]}
    row = timed(seconds, "k2", "dense")
    assert (row["of_dense_low"], row["of_dense"], row["of_dense_high"]) == (0.5, 0.5, 0.5)
    assert row["ms"] == 1000
    assert ratio([1, 2, 6], [1, 1, 2]).median == 2
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([4.0, 1.0]) == Spread(2.5, 1.0, 4.0)


# What is measured.


def test_prefill_stores_counted_operations_and_real_cache_bytes(tmp_path):
    """By hand: 2 layers, d = 32, FFN 64, 2 query heads and 1 KV head of 16; 64 tokens, vocabulary 384."""
    flags = ["prefill", "--model", "tiny-llama", "--plugins", "ffn,kv:2", "--tokens", "64", "--r", "8"]
    flags += ["--markdown", str(tmp_path / "f.md")]
    dense, ours = figures(tmp_path, *flags)["rows"]
    n = 64
    layer = n * 2 * (3 * 32 * 64 + 2 * 32 * 32 + 2 * 32 * 16) + 2 * 2 * 32 * n * (n + 1) // 2
    head = 2 * 32 * 384
    assert dense["operations"] == 2 * layer + head
    groups = (n - 4 - 1) // 2
    held = n - groups
    tail = n - 4 - 2 * groups
    seen = 4 * 5 // 2 + 2 * (groups * 4 + groups * (groups + 1) // 2) + tail * (4 + groups)
    seen += tail * (tail + 1) // 2
    merge = 2 * 32 * 2 * (2 * groups) + 2 * 32 * 2 * groups
    restore = 2 * 32 * 8 * (groups + 2 * 2 * groups)
    first = held * 2 * (3 * 32 * 64 + 2 * 32 * 16) + n * 2 * 2 * 32 * 32 + 2 * 2 * 32 * seen
    last = 2 * (3 * 32 * 64 + 2 * 32 * 32) + held * 2 * 2 * 32 * 16 + 2 * 2 * 32 * held
    assert ours["operations"] == first + 3 * merge + restore + last + head  # of the last, KV alone
    assert ours["bound"] == pytest.approx(ours["operations"] / dense["operations"])
    assert ours["of_bound"] == pytest.approx(ours["bound"] / ours["of_dense"])
    assert dense["kv_mib"] * 2**20 == 2 * 2 * n * 16 * 4
    assert ours["kv_mib"] * 2**20 == 2 * 2 * held * 16 * 4
    assert "ffn+kv k=2" in (tmp_path / "f.md").read_text()


def test_prefill_shows_what_was_timed_elsewhere(tmp_path, monkeypatch):
    own = setting("--dtype", "bfloat16")
    measured = {
        "weights": weights_digest(own.base.get_input_embeddings().weight),
        "dtype": "bfloat16",
        "versions": {"kvpress": "9.9"},
        "rows": [{"case": "SnapKV 50%", "tokens": 64, "batch": 1, "of_dense": 1.1, "kv_mib": 2.0}],
    }
    file = tmp_path / "presses.json"
    flags = ["prefill", "--model", "tiny-llama", "--tokens", "64", "--elsewhere", str(file)]
    file.write_text(json.dumps(measured))
    *_, last = figures(tmp_path, *flags, "--dtype", "bfloat16")["rows"]
    assert last == measured["rows"][0] | {"case": "kvpress 9.9: SnapKV 50%"}
    monkeypatch.setattr(
        "llm_variator.bench.setting.interleaved", None
    )  # nothing is timed before it is refused
    with pytest.raises(VariatorError, match="other weights or in another dtype"):
        main([*flags, *TINY, "--dtype", "float32"])
    file.write_text("{}")
    with pytest.raises(VariatorError, match="not a file of eval/kvpress_prefill"):
        main([*flags, *TINY])


def test_the_last_layer_can_be_measured_whole(tmp_path):
    flags = ["prefill", "--model", "tiny-llama", "--plugins", "ffn:2", "--tokens", "64"]
    skipped = figures(tmp_path, *flags)["rows"][1]
    whole = figures(tmp_path, *flags, "--whole-last-layer")["rows"][1]
    assert whole["operations"] > skipped["operations"]


@pytest.mark.parametrize("model", ["tiny-t5", "tiny-bert"])
def test_encoders(tmp_path, model):
    rows = figures(tmp_path, "prefill", "--model", model, "--plugins", "ffn:4", "--tokens", "32")["rows"]
    assert [row["case"] for row in rows] == [DENSE, "ffn k=4"]
    assert "kv_mib" not in rows[1]


def test_decode_reads_a_cache_like_the_one_a_prompt_leaves(tmp_path):
    made = setting("--plugins", "kv:4", "ffn,kv:2", "--tokens", "50")
    ids = made.ids(2, 50)
    for name in [DENSE, *made.names]:
        ours = random_cache(made, name, 2, 50)
        with made.using(name)(), torch.no_grad():
            real = made.model(ids, use_cache=True, logits_to_keep=1).past_key_values
        assert [layer.keys.shape for layer in ours.layers] == [layer.keys.shape for layer in real.layers]
        assert ours.get_seq_length() == real.get_seq_length() == 50
        for a, b in zip(ours.layers, real.layers, strict=True):
            assert name == DENSE or torch.equal(a.columns, b.columns)
    flags = ["decode", "--model", "tiny-llama", "--plugins", "kv:4", "--tokens", "50", "--steps", "2"]
    ours = figures(tmp_path, *flags)["rows"][1]
    weights = 4 * (2 * (3 * 32 * 64 + 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32) + 32 + 32 * 384)
    held = 50 - 3 * ((50 - 4 - 1) // 4)
    assert ours["bound"] == pytest.approx((weights + 2 * 2 * held * 16 * 4) / (weights + 2 * 2 * 50 * 16 * 4))


@pytest.mark.parametrize("tokens", [40, 300])
def test_decode_reads_kept_keys_like_those_of_a_prompt(tokens):
    made = setting("--plugins", "kept:0.4", "kept:0.7", "--tokens", "300", "--dense-tail", "70")
    ids = made.ids(2, tokens)
    for name in made.names:
        ours = random_cache(made, name, 2, tokens)
        with made.using(name)(), torch.no_grad():
            real = made.model(ids, use_cache=True, logits_to_keep=1).past_key_values
            for layer, (a, b) in enumerate(zip(ours.layers, real.layers, strict=True)):
                assert a.keys.shape == b.keys.shape
                if layer in made.model.plugin(name).selects:
                    assert a.counts == b.counts
                    shapes = [[one.store.keys.shape for one in each.classes] for each in (a, b)]
                    assert shapes[0] == shapes[1]
            assert ours.get_seq_length() == real.get_seq_length() == tokens
            made.model(ids[:, :1], past_key_values=ours, use_cache=True)


def test_prefill_and_decode_of_kept_keys(tmp_path):
    flags = ["--model", "tiny-llama", "--plugins", "kept:0.5", "--tokens", "300"]
    dense, ours = figures(tmp_path, "prefill", *flags)["rows"]
    assert 0.1 < ours["kv_mib"] / dense["kv_mib"] <= 0.5
    assert ours["operations"] < dense["operations"]
    _, step = figures(tmp_path, "decode", *flags, "--steps", "2")["rows"]
    assert step["kv_mib"] == ours["kv_mib"]


@pytest.mark.parametrize("command", ["prefill", "decode"])
def test_times_stand_beside_the_rates_of_the_card(tmp_path, command):
    """Over what the device does at best nothing can be faster; by hand the least time of a dense pass."""
    flags = [
        command,
        "--model",
        "tiny-llama",
        "--plugins",
        "kept:0.5",
        "--tokens",
        "300",
        "--batch-sizes",
        "2",
        "--card",
    ]
    stored = figures(tmp_path, *flags)
    rates, dense = stored["card"], stored["rows"][0]
    weights = 2 * (3 * 32 * 64 + 2 * 32 * 32 + 2 * 32 * 16) + 32 * 384
    norms, scores = 5 * 32, 2 * 2 * 32 * 2  # queries times keys in two layers, and weights times values
    if command == "prefill":
        operations, moved = dense["operations"], 4 * (weights + norms)
    else:
        operations = 2 * 2 * weights + 2 * scores * 300
        moved = 4 * (weights + norms) + dense["kv_mib"] * 2**20
    least = max(operations / rates["flops_per_second"], moved / rates["bytes_per_second"])
    assert dense["card_ms"] == pytest.approx(1e3 * least)
    assert dense["of_card"] == pytest.approx(dense["card_ms"] / dense["ms"])
    assert all(0 < row["of_card"] < 1 for row in stored["rows"])


def test_the_rates_of_a_card_are_those_of_a_product_and_a_copy():
    card = Card.measured("cpu", torch.float32)
    a, b = (torch.randn(512, 512) for _ in range(2))
    source, target = torch.zeros(2**22), torch.empty(2**22)
    seconds = interleaved({"mm": Case(lambda _: a @ b), "copy": Case(lambda _: target.copy_(source))}, 9)
    assert 0.2 < card.flops_per_second / (2 * 512**3 / min(seconds["mm"])) < 5
    assert 0.2 < card.bytes_per_second / (2 * 4 * 2**22 / min(seconds["copy"])) < 5
    assert Card(10.0, 2.0).seconds(20, 10) == 5
    assert Card(10.0, 2.0).seconds(200, 10) == 20


def test_a_size_that_does_not_fit_leaves_the_others(tmp_path, monkeypatch):
    ids = Setting.ids

    def too_many(self, rows, tokens):
        if tokens == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ids(self, rows, tokens)

    monkeypatch.setattr(Setting, "ids", too_many)
    flags = ["prefill", "--model", "tiny-llama", "--tokens", "32", "64", "16", "--plugins", "ffn:2"]
    rows = figures(tmp_path, *flags)["rows"]
    assert [(row["case"], row["tokens"]) for row in rows] == [
        *((name, 32) for name in (DENSE, "ffn k=2")),
        ("out of memory", 64),
        *((name, 16) for name in (DENSE, "ffn k=2")),
    ]


def test_profile_tells_kernels_by_time(tmp_path):
    flags = ["--model", "tiny-llama", "--plugins", "kept:0.5", "--tokens", "300", "--kernels", "4"]
    rows = figures(tmp_path, "profile", *flags)["rows"]
    cases = {row["case"] for row in rows}
    assert cases == {
        f"{name}, {kind}" for name in (DENSE, "kv keeps 500 of 1000") for kind in ("prefill", "decode")
    }
    for case in cases:
        whole, *kernels, rest = [row for row in rows if row["case"] == case]
        assert whole["kernel"] == BUSY
        assert whole["of_busy"] > 0
        assert rest["kernel"] == REST
        assert len(kernels) == 4
        assert [row["ms"] for row in kernels] == sorted((row["ms"] for row in kernels), reverse=True)
        for column in ("ms", "calls", "share"):
            assert sum(row[column] for row in (*kernels, rest)) == pytest.approx(whole[column])
    products = [
        row["calls"]
        for row in rows
        if row["case"] == "dense, decode" and row["kernel"] in ("aten::mm", "aten::addmm")
    ]
    assert sum(products) == 2 * 7 + 1  # every matrix of two layers, and the head: each is read once


def test_a_table_of_kernels_by_hand():
    times = [("a", 10.0, 2), ("b", 30.0, 1), ("none", 0.0, 5), ("c", 60.0, 3)]
    whole, first, rest = profile_table(times, 2e-4, 1)
    assert (whole["ms"], whole["calls"], whole["of_busy"]) == (0.1, 6, pytest.approx(2.0))
    assert (first["kernel"], first["share"]) == ("c", 0.6)
    assert (rest["ms"], rest["calls"], rest["share"]) == (0.04, 3, 0.4)


def test_swap_measures_the_bare_base(tmp_path, monkeypatch):
    rows = figures(tmp_path, "swap", "--model", "tiny-llama", "--tokens", "8")["rows"]
    assert [row["case"] for row in rows] == [
        "load_plugin, ffn+kv k=2",
        "set_plugin, ffn+kv k=2",
        "base without plugins",
        "plugins attached, off",
    ]


def test_a_training_step_of_kept_keys_moves_their_scores(tmp_path):
    flags = ["train", "--model", "tiny-llama", "--plugins", "kept:0.4", "--tokens", "200"]
    rows = figures(tmp_path, *flags)["rows"]
    assert next(row for row in rows if row["case"] == "training step")["of_bound"] > 0
    made = setting(*flags[3:], command="train")
    (name,) = made.names
    plugin = made.model.plugin(name)
    before = {key: value.clone() for key, value in plugin.state_dict().items()}
    step = _training_cases(made, name, 1, 200)[STEP]
    step.run(step.prepare())
    changed = {key for key, value in plugin.state_dict().items() if not torch.equal(value, before[key])}
    assert any("weight" in key for key in changed)


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-t5", "tiny-bert"])
def test_train_times_a_step_and_its_parts(tmp_path, model):
    rows = figures(tmp_path, "train", "--model", model, "--tokens", "24")["rows"]
    step = next(row for row in rows if row["case"] == "training step")
    assert step["of_bound"] > 0
    assert {row["case"] for row in rows} >= {"teacher forward", "student forward", "student backward"}


def test_memory_grows_by_a_layer_and_fits_the_arithmetic(tmp_path):
    models = [setting("--num-layers", str(n), "--plugins", "ffn:2") for n in (2, 3, 4)]
    two, three, four = (kept_bytes(s, s.names[0], 1, 40) for s in models)
    assert four - three == three - two > 40 * 32 * 4
    flags = ["--model", "tiny-llama", "--tokens", "40", "--json", str(tmp_path / "f.json"), "--device", "cpu"]
    main(["memory", *flags])
    stored = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert stored["activations"]["1x40"]["all"] == two
    assert stored["base_bytes"]["layers"] == int(
        2 * (3 * 32 * 64 + 2 * 32 * 32 + 2 * 32 * 16) * 4.126953125 / 8
    )
    assert stored["plugin_bytes"] == 16 * 2 * (4 * 32 + 2 + 3 * 64 * 32 + 64 + 32)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_the_plain_formulation_is_the_same_function(k, activation):
    torch.manual_seed(0)
    compressor, decompressor = HiddenCompressor(16, k), HiddenDecompressor(16, 5, activation=activation)
    randomise(compressor)
    randomise(decompressor)
    plain = PlainLayers(compressor, decompressor).double()
    ffn = torch.nn.Linear(16, 16).double()
    x = torch.randn(2, 5 * k, 16, dtype=torch.double)
    ours = fused(compressor, decompressor, ffn, x)
    torch.testing.assert_close(ours, plain.restore(ffn(plain.merge(x)), x), atol=1e-12, rtol=0)


def test_compare_reports_both_ways(tmp_path):
    flags = ["compare", "--model", "tiny-llama", "--plugins", "ffn:2", "--tokens", "32"]
    rows = {row["case"]: row for row in figures(tmp_path, *flags)["rows"]}
    assert rows["plain over fused, k=2"]["gain"] > 0
    assert rows["merge+restore k=2"]["of_dense"] > 0


# The command.


@pytest.mark.parametrize("command", ["prefill", "decode", "train"])
def test_plot(tmp_path, command):
    pytest.importorskip("matplotlib")
    flags = [command, "--model", "tiny-llama", "--plugins", "ffn,kv:2", "--tokens", "16", "32"]
    main([*flags, *TINY, "--plot", str(tmp_path / "f.svg")])
    assert "<svg" in (tmp_path / "f.svg").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["prefill", "--plugins", "ffn"], "expected sites and a ratio"),
        (["prefill", "--plugins", "nose:2"], "expected sites and a ratio"),
        (["decode", "--model", "tiny-t5"], "bench decode is for decoders"),
        (["memory", "--num-layers", "2"], "leave out --num-layers"),
        (["memory", "--quantize", "nf4"], "leave out --quantize"),
        (["memory", "--model", "tiny-t5"], "takes a decoder"),
        (["swap", "--attention", "nothing"], "--attention nothing"),
        (["prefill", "--clock", "cpu", "--device", "cuda"], "--clock cpu cannot time a GPU"),
        (["prefill", "--plot", "x.txt"], "ends with one of .png, .svg, .pdf"),
        (["memory", "--plot", "x.svg"], "--plot"),
        (["prefill", "--plugins", "kept:1.5"], "between 0 and 1"),
        (["prefill", "--plugins", "kept:0.3", "--model", "tiny-bert"], "is for decoders"),
        *(([c, "--plugins", "kept:0.3"], "leave it out") for c in ("memory", "compare")),
        (["memory", "--plugins", "runs/k2"], "leave it out"),
        (["compare", "--plugins", "runs/k2"], "give SITES:K in place of k2"),
        *(
            ([c, "--plugins", "ffn:2", "ffn:8"], "takes one plugin, not ffn:2 ffn:8")
            for c in ("train", "swap")
        ),
        (["compare", "--plugins", "kv:2"], "give ffn:2 in place of kv k=2"),
        (["compare", "--tokens", "20", "--plugins", "ffn:3", "ffn:8"], "give 24 or more"),
        (["prefill", "--plugins", "./nowhere"], "nowhere"),
        (["prefill", "--plugins", "smollm2-135m/k2", "runs/k2"], "two plugins are called 'k2'"),
        (["prefill", "--plugins", "smollm2-135m/k2", "--dense-tail", "3"], "leave out --dense-tail"),
        (["train", "--plugins", "kept:0.3", "--tokens", "100"], "make it longer"),
        (["profile", "--model", "tiny-t5"], "is for decoders"),
    ],
)
def test_wrong_flags_get_one_clear_error(flags, message):
    if "--model" not in flags:
        flags = [*flags, "--model", "tiny-llama"]
    with pytest.raises(VariatorError, match=message):
        main([flags[0], "--random-init", "--device", "cpu", *flags[1:]])


def test_notes_tell_the_numbers_that_are_used():
    assert f"mean of {_SWAPS}." in Swap.note()
    assert f"({NF4_BITS:.3f} bits per weight)" in Memory.note()
    assert f"Plugin: {ADAM_BYTES} bytes per parameter" in Memory.note()


def test_a_saved_plugin_is_measured_as_it_is(tmp_path):
    made = VariatorModel(load_model("tiny-llama", random_init=True))
    made.add_plugin("a", VariatorConfig(k=4, sites=("ffn",), r=8, dense_tail=3, dense_head=1))
    made.save_pretrained(tmp_path / "mine", plugin_name="a")
    flags = ["prefill", "--model", "tiny-llama", "--tokens", "41", "--plugins"]
    (dense, saved) = figures(tmp_path, *flags, str(tmp_path / "mine"))["rows"]
    new = figures(tmp_path, *flags, "ffn:4", "--r", "8", "--dense-tail", "3", "--dense-head", "1")["rows"][1]
    assert (saved["case"], new["case"]) == ("mine", "ffn k=4")
    assert saved["operations"] == new["operations"] < dense["operations"]
    measured = setting("--plugins", f"it-is={tmp_path / 'mine'}").model.plugin("it-is").state_dict()
    for name, value in made.plugin("a").state_dict().items():
        assert torch.equal(measured[name], value), name


def test_profile_times_by_the_clock_that_is_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(
        CLOCKS, "cpu", lambda: calls.append(0) or float(len(calls))
    )  # each pass takes a second
    flags = ["profile", "--model", "tiny-llama", "--plugins", "ffn:2", "--tokens", "8", "--clock", "cpu"]
    for row in figures(tmp_path, *flags)["rows"]:
        if row["kernel"] == BUSY:
            assert row["of_busy"] == pytest.approx(1e3 / row["ms"])


@pytest.mark.parametrize("command", ["decode", "swap", "profile", "train"])
def test_every_benchmark_takes_a_saved_plugin(command, tmp_path):
    made = VariatorModel(load_model("tiny-llama", random_init=True))
    layers = load_config("tiny-llama").num_hidden_layers
    config = VariatorConfig(
        k=4, sites=("ffn", "kv"), r=8, dense_tail=70, compressor={"ffn": "mean", "kv": "select"}, block=8,
        k_per_layer={"ffn": [1] + [4] * (layers - 1)},
    )  # fmt: skip
    made.add_plugin("a", config)
    made.save_pretrained(tmp_path / "mine", plugin_name="a")
    flags = [command, "--model", "tiny-llama", "--tokens", "150", "--plugins", str(tmp_path / "mine")]
    assert ("mine" in json.dumps(figures(tmp_path, *flags))) == (
        command != "train"
    )  # its rows are parts of a step


def test_kept_keys_fill_the_share_that_is_asked_for():
    made = setting("--plugins", "kept:0.5", "--tokens", "400")
    (name,) = made.names
    cache = random_cache(made, name, rows=3, tokens=400)
    with made.using(name)():
        real = KVCacheReport.of(made.model(made.ids(3, 400), use_cache=True).past_key_values)
    held = KVCacheReport.of(cache)
    assert [layer.classes for layer in held.layers] == [layer.classes for layer in real.layers]
    assert 0.2 < held.bytes / held.dense_bytes <= 0.5  # four heads are few
    assert len({one.ratio for layer in held.layers for one in layer.classes}) > 1


def test_a_share_is_a_share():
    with pytest.raises(VariatorError, match="between 0 and 1"):
        plugin("kept:4")


def test_plugin_specification():
    assert str(plugin("ffn,kv:2")) == "ffn+kv k=2"
    assert VariatorConfig(k=2, sites=plugin("ffn,kv:2").sites).sites == ("ffn", "kv")


def test_markdown_leaves_out_columns_that_no_row_has():
    text = markdown("title", [{"case": "a", "ms": 1.5}, {"case": "b", "ms": 2000.0}])
    assert text.splitlines()[2:] == ["|  | ms |", "| --- | --- |", "| a | 1.50 |", "| b | 2,000.00 |"]
