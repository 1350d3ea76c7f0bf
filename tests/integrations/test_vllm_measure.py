"""`serve.measure` in this process: blocks by arithmetic, answers against the Hugging Face path. `make test-vllm`."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm.v1", reason="vllm is not installed here: make test-vllm")

from vllm_engine import BOTH, make_model, make_plugin

from llm_variator.serve.measure import main as measure
from llm_variator.sources.models import byte_tokenizer

HEADS = [[4, 1], [2, 8], [16, 4]]
SELECT = dict(sites=("kv",), compressor="select", block=16, dense_head=4, dense_tail=5, k_per_head=HEADS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_model("llama", tmp_path_factory.mktemp("model"), vocab_size=259)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    kept = make_plugin(model, folder / "kv8", 8, **SELECT)
    merged = make_plugin(model, folder / "k2", 2, **BOTH)
    return ["--model", model, "--k", "2", "--plugin", f"kv8={kept}", f"k2={merged}"]


def test_blocks(words, tmp_path):
    measure(["blocks", *words, "--tokens", "500", "--requests", "4", "--json", str(tmp_path / "blocks.json")])
    found = json.loads((tmp_path / "blocks.json").read_text())["figures"]

    def peak(entries):  # of four requests in blocks of 32; the last token is never read
        return 4 * sum(-(-count // 32) for count in entries)

    ratios = [k for heads in HEADS for k in heads]
    # 515 tokens: head 4, 30 whole blocks of 16, 11 tokens of another, tail 5 and 15 more; or pairs of 491 tokens
    assert found["peak_blocks"] == {
        "0": peak([515] * 6),
        "kv8": peak([4 + 30 * 16 // k + -(-11 // k) + 5 + 15 for k in ratios]),
        "2": peak([4 + 245 + 6 + 15] * 6),
    }
    assert found["block_tables"] == 6
    dense = found["without_plugins"]
    assert dense["peak_blocks"] == {"0": peak([515])}
    assert dense["block_bytes"] == 6 * found["block_bytes"] == 6 * 32 * 32 * 2 * 4
    assert found["share_of_dense_bytes"]["0"] == 1.0
    assert found["share_of_dense_bytes"]["kv8"] == found["peak_blocks"]["kv8"] / found["peak_blocks"]["0"]
    assert found["small_pool"] == 6 * dense["small_pool"]
    assert dense["concurrent"] == {"0": 2}
    assert found["concurrent"]["kv8"] == 4


def test_answers(words, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(number) for number in range(2000)))
    options = ["--lengths", "1", "70", "300", "--max-tokens", "9", "--chunk", "64", "--data", str(text)]
    measure(["answers", *words, *options, "--json", str(tmp_path / "answers.json")])
    found = json.loads((tmp_path / "answers.json").read_text())["figures"]
    same = {"tokens": 27, "equal_tokens": 27, "prompts_with_other_answers": []}
    assert found["choices"] == {"0": same, "kv8": same, "2": same}
    assert (found["requests"], found["prompt_tokens"]) == (9, [1, 70, 300])


def test_answers_that_differ_are_counted(words, tmp_path, monkeypatch):
    from llm_variator.serve import answers

    real = answers.generate
    monkeypatch.setattr(answers, "generate", lambda *args: [[-1, *one[1:]] for one in real(*args)])
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(number) for number in range(2000)))
    options = ["--lengths", "5", "70", "--max-tokens", "4", "--data", str(text)]
    measure(["answers", *words, *options, "--json", str(tmp_path / "answers.json")])
    found = json.loads((tmp_path / "answers.json").read_text())["figures"]["choices"]
    assert found["kv8"] == {"tokens": 8, "equal_tokens": 6, "prompts_with_other_answers": [5, 70]}
