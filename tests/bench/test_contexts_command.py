"""`python -m llm_variator.bench.contexts` on a tiny decoder: every figure it prints, checked where it can be."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import randomise
from tiny import model_folder

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.bench.contexts.__main__ import main, read
from llm_variator.bench.contexts.setting import build_model, words
from llm_variator.sources.models import load_model

CONFIG = VariatorConfig(k=3, sites=("ffn", "kv"), r=4, dense_head=2, dense_tail=5)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> str:
    model = VariatorModel(load_model(model_folder()), CONFIG)
    randomise(model.plugin(), std=0.1)
    folder = tmp_path_factory.mktemp("plugin") / "k3"
    model.save_pretrained(folder)
    return str(folder)


def measure(tmp_path, plugin: str, command: str, *sizes: object) -> dict:
    file = tmp_path / "figures.json"
    main([command, "--model", model_folder(), "--plugin", plugin, "--json", str(file), *map(str, sizes)])
    return json.loads(file.read_text(encoding="utf-8"))["figures"]


@pytest.mark.parametrize(
    "line",
    [
        "questions",
        "load --context 60 --repeats 1 --answer-from some/file --data-dir there --seed 3",
        "prefill --lengths 80 90 --memory-of 80 0 --random-init --num-layers 2 --dtype bfloat16",
    ],
)
def test_another_process_gets_the_same_settings(line):
    settings = read(line.split())
    assert read(words(settings)) == settings
    assert sorted(words(settings)) == sorted(line.split())


def test_rounding_has_no_truth_for_a_quantised_base():
    with pytest.raises(VariatorError, match="leave out --quantize"):
        read(["rounding", "--quantize", "nf4"])


def test_questions(tmp_path, plugin):
    sizes = ["--context", 60, "--question", 5, "--questions", 3, "--new-tokens", 2, "--repeats", 1]
    figures = measure(tmp_path, plugin, "questions", *sizes)
    assert figures["batch_equals_one_by_one"]
    assert figures["copies_of_the_context"] == 1
    assert (
        figures["context_bytes"] < figures["all_sessions_bytes"] < figures["dense_bytes_of_all_sessions"] / 3
    )


@pytest.fixture(scope="module")
def chooser(tmp_path_factory) -> str:
    config = VariatorConfig(
        sites=("kv",), compressor="select", k_per_head=((2, 4),) * 3, block=4, dense_head=2, dense_tail=5
    )
    model = VariatorModel(load_model(model_folder()), config)
    randomise(model.plugin())
    folder = tmp_path_factory.mktemp("plugin") / "kept"
    model.save_pretrained(folder)
    return str(folder)


def test_questions_after_kept_keys(tmp_path, chooser):
    sizes = ["--context", 60, "--question", 5, "--questions", 3, "--new-tokens", 2, "--repeats", 1]
    figures = measure(tmp_path, chooser, "questions", *sizes)
    assert figures["batch_equals_one_by_one"]
    assert figures["copies_of_the_context"] == 1
    assert figures["context_bytes"] < figures["all_sessions_bytes"] < figures["context_bytes"] * 2


def test_kept_keys_age_in_whole_blocks(tmp_path, chooser):
    with pytest.raises(VariatorError, match="multiple of block"):
        measure(tmp_path, chooser, "decode", "--context", 40, "--decode-block", 6)


def test_decode_with_kept_keys(tmp_path, chooser):
    figures = measure(tmp_path, chooser, "decode", "--context", 30, "--new-tokens", 60, "--decode-block", 4)
    assert figures["within"]
    assert figures["window"] == 5 + 4
    assert figures["dense"]["entries"] == [90]
    # of 30 - 2 - 5 tokens of the prompt, and of 56 of its window's 65, one head keeps a half, the other a quarter
    prompt = (12 + 6) / 2
    assert figures["decoding_intact"]["entries"] == [2 + prompt + 65]
    assert figures["ageing"]["entries"] == [2 + prompt + 56 * 3 / 8 + 9]
    assert figures["ageing"]["index_bytes"] > 0


def test_decode(tmp_path, plugin):
    figures = measure(tmp_path, plugin, "decode", "--context", 30, "--new-tokens", 60, "--decode-block", 6)
    assert figures["within"]
    assert figures["dense"]["entries"] == [90]
    assert figures["decoding_intact"]["entries"] == [90 - 7 * 2]  # (30 - 2 - 5) // 3 groups
    # 2 + 5 window tokens and 83 others: at most 5 of them wait for their group or block
    assert 2 + 5 + 83 // 3 <= figures["ageing"]["entries"][0] <= figures["bound"]


@pytest.mark.parametrize("more", [[], ["--mixed"]])
@pytest.mark.parametrize("which", ["plugin", "chooser"])
def test_pool(tmp_path, request, which, more):
    plugin = request.getfixturevalue(which)
    sizes = ["--context", 20, "--documents", 2, "--sessions", 6, "--operations", 25, "--block-size", 4]
    figures = measure(tmp_path, plugin, "pool", *sizes, "--blocks", 2000, *more)
    assert figures["plugins"] == 1 + len(more)
    assert sum(figures["operations"].values()) == 25
    assert figures["wrong_answers"] == figures["blocks_left_after_all_are_freed"] == 0
    assert figures["peak_blocks"] < figures["peak_blocks_without_sharing"]


def test_an_untrained_plugin_that_keeps_keys():
    line = ["pool", "--model", model_folder(), "--random-init", "--untrained", "keeps"]
    model = build_model(read(line))
    assert model.plugins["plugin"].k_per_head == ((2, 4),) * 3
    document = model.compress([[*range(3, 90)]])
    plain = document.cache.layers[0].classes
    with torch.no_grad():
        for own in model.plugin("plugin").selects.values():
            own.score.weight.zero_()
    first = model.compress([[*range(3, 90)]]).cache.layers[0].classes
    assert [one.entries for one in plain] == [one.entries for one in first]
    assert not all(torch.equal(a.columns, b.columns) for a, b in zip(plain, first, strict=True))


@pytest.mark.parametrize("which", ["plugin", "chooser"])
def test_load_answers_alike_in_another_process(tmp_path, request, which):
    plugin = request.getfixturevalue(which)
    sizes = ["--context", 60, "--question", 5, "--new-tokens", 4, "--repeats", 1]
    figures = measure(tmp_path, plugin, "load", *sizes)
    assert figures["answers_equal"]
    assert figures["load_seconds"] > 0


def assert_chunks_are_only_rounding(errors: list[dict]) -> None:
    """In fp64 chunks give what one pass gives; in fp32 they are as near to that, with the plugin and without."""
    for case in errors:
        for name, chunked in case.items():
            if name.startswith("chunks_of_"):
                assert chunked["from_one_pass_in_fp64"] < 1e-8 * case["greatest"]
                assert 0 < chunked["root_mean_square"] < 1.5 * case["one_pass"]["root_mean_square"]


def test_rounding(tmp_path, plugin):
    sizes = ["--context", 90, "--ratios", 2, 8, "--chunks", 16, 64]
    figures = measure(tmp_path, plugin, "rounding", *sizes)
    assert [case["k"] for case in figures["errors"]] == ["dense", 2, 8]
    assert_chunks_are_only_rounding(figures["errors"])


@pytest.mark.slow
def test_rounding_of_smollm2(tmp_path, smollm2):
    """Where one pass and chunks differ by a thousandth, neither is nearer to the truth."""
    file = tmp_path / "figures.json"
    sizes = ["--context", "64", "--ratios", "8", "--chunks", "32", "--json", str(file)]
    main(["rounding", *sizes])
    assert_chunks_are_only_rounding(json.loads(file.read_text(encoding="utf-8"))["figures"]["errors"])
