"""The generate command line, end to end on a tiny saved model with a tokenizer of its own."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.generate import main, parse_plugins, read_prompt

PROMPT = "the quick brown fox jumps over the lazy dog and runs away into the wood"
TOKENS = len(PROMPT)  # one token per character
HEAD, TAIL, K = 4, 8, 2
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model with a character tokenizer, a k=2 plugin, and one that changes nothing."""
    root = tmp_path_factory.mktemp("generate")
    characters = [chr(code) for code in range(32, 127)]
    core = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "</s>", *characters])}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(root / "model")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    base = LlamaForCausalLM(config).eval()
    base.save_pretrained(root / "model")
    model = VariatorModel(
        base, VariatorConfig(k=K, sites=("ffn", "kv"), r=4, dense_head=HEAD, dense_tail=TAIL)
    )
    model.save_pretrained(root / "k2")
    model.add_plugin("same", VariatorConfig(k=1, sites=("ffn", "kv"), compressor="mean", decompressor="copy"))
    model.save_pretrained(root / "same", plugin_name="same")
    (root / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    return SimpleNamespace(
        model=str(root / "model"),
        k2=str(root / "k2"),
        same=str(root / "same"),
        prompt=str(root / "prompt.txt"),
        root=root,
        tokenizer=tokenizer,
    )


@pytest.fixture
def run(files, capsys):
    """Runs the command line; gives its stdout and stderr."""

    def run(*flags, max_new_tokens=12):
        main(["--model", files.model, "--max-new-tokens", str(max_new_tokens), *flags])
        return capsys.readouterr()

    return run


def ids_of(files, text=PROMPT):
    return files.tokenizer(text, return_tensors="pt")["input_ids"]


def reference(files, text=PROMPT, plugin=None, max_new_tokens=12):
    """The greedy continuation, by the library instead of the command line."""
    base = AutoModelForCausalLM.from_pretrained(files.model)
    model = base if plugin is None else VariatorModel.from_pretrained(base, plugin)
    ids = ids_of(files, text)
    out = model.generate(input_ids=ids, max_new_tokens=max_new_tokens, do_sample=False)[0, ids.shape[1] :]
    return out, files.tokenizer.decode(out, skip_special_tokens=True)


# --- generating -----------------------------------------------------------------------------------------


def test_dense_text_is_the_base_models(run, files):
    assert run("--prompt", PROMPT).out == reference(files)[1] + "\n"


def test_plugin_text_is_the_librarys(run, files):
    done = run("--prompt", PROMPT, "--plugin", files.k2)
    assert done.out == reference(files, plugin=files.k2)[1] + "\n"
    assert f"plugin k2: {TOKENS} prompt tokens" in done.err


def test_prompt_file_stdin_and_flag_are_the_same_prompt(run, files, monkeypatch):
    expected = run("--prompt", PROMPT).out
    assert run("--prompt-file", files.prompt).out == expected
    for flags in ([], ["--prompt-file", "-"]):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(PROMPT.encode())))
        assert run(*flags).out == expected


def test_streaming_prints_the_same_text(run, files):
    flags = ("--prompt", PROMPT, "--plugin", files.k2)
    assert run(*flags, "--stream").out.strip() == run(*flags).out.strip()


def test_sampling_follows_the_seed(run):
    def sample(*flags):
        return run("--prompt", PROMPT, "--temperature", "5", *flags, max_new_tokens=40).out

    assert sample("--seed", "1") == sample("--seed", "1")
    assert sample("--seed", "1") != sample("--seed", "2")
    assert run("--prompt", PROMPT, "--temperature", "0").out == run("--prompt", PROMPT).out
    assert run("--prompt", PROMPT, "--top-k", "1").out == run("--prompt", PROMPT).out


def test_chat_uses_the_models_template(run, files, tmp_path):
    chatty = tmp_path / "chatty"
    AutoModelForCausalLM.from_pretrained(files.model).save_pretrained(chatty)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(files.model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chatty)
    assert (
        run("--model", str(chatty), "--prompt", "hello", "--chat").out
        == reference(files, "[hello]>")[1] + "\n"
    )


def test_json_holds_the_figures(run, files, tmp_path):
    run("--prompt", PROMPT, "--plugin", f"mine={files.k2}", "--json", str(tmp_path / "out.json"))
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    tokens, text = reference(files, plugin=files.k2)
    assert figures["plugin"] == "mine"
    assert figures["prompt_tokens"] == TOKENS
    assert figures["tokens"] == tokens.tolist()
    assert figures["text"] == text
    assert figures["kv_bytes"] < figures["kv_dense_bytes"]


def test_random_init_needs_neither_weights_nor_tokenizer(tmp_path):
    flags = ["--model", "smollm2-135m", "--random-init", "--num-layers", "1", "--dtype", "bfloat16"]
    main([*flags, "--prompt", "hi", "--max-new-tokens", "3", "--json", str(tmp_path / "out.json")])
    assert len(json.loads((tmp_path / "out.json").read_text())["figures"]["tokens"]) == 3


def test_a_recipe_gives_flags_that_the_command_line_overrides(run, files, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"prompt_file: {files.prompt}\nplugin: [{files.k2}]\nmax_new_tokens: 3\n")
    flags = ["--model", files.model, "--config", str(recipe)]
    main([*flags, "--json", str(tmp_path / "a.json")])
    main([*flags, "--json", str(tmp_path / "b.json"), "--plugin", files.same, "--max-new-tokens", "5"])
    a, b = (json.loads((tmp_path / name).read_text())["figures"] for name in ("a.json", "b.json"))
    assert (a["plugin"], len(a["tokens"])) == ("k2", 3)
    assert (b["plugin"], len(b["tokens"])) == ("same", 5)


# --- comparing ------------------------------------------------------------------------------------------


def test_compare(run, files, tmp_path):
    out = run(
        *("--prompt", PROMPT, "--compare", "--repetitions", "2", "--json", str(tmp_path / "out.json")),
        *("--plugin", files.same, "--plugin", files.k2),
    ).out
    dense, same, k2 = json.loads((tmp_path / "out.json").read_text())["figures"]["rows"]
    assert [dense["plugin"], same["plugin"], k2["plugin"]] == ["none", "same", "k2"]
    assert dense["first_token_ratio"] == dense["kv_ratio"] == 1
    assert all(row["first_token_seconds"] > 0 and row["tokens_per_second"] > 0 for row in (dense, same, k2))

    tokens, text = reference(files)
    assert dense["text"] == text
    assert k2["text"] == reference(files, plugin=files.k2)[1]
    whole = torch.cat((ids_of(files), tokens[None]), dim=1)
    base = AutoModelForCausalLM.from_pretrained(files.model)
    with torch.no_grad():
        expected = F.cross_entropy(base(whole).logits[0, TOKENS - 1 : -1], tokens).item()
    assert dense["cross_entropy"] == pytest.approx(expected, abs=1e-5)
    assert dense["same_tokens"] == len(tokens)

    assert same["cross_entropy"] == pytest.approx(expected, abs=1e-4)
    assert same["same_tokens"] == len(tokens)
    assert same["text"] == text

    entry = 2 * 2 * 8 * 4 * 2  # keys and values, 2 heads of 8, 4 bytes, 2 layers
    groups = (TOKENS - HEAD - TAIL) // K
    assert dense["kv_bytes"] == TOKENS * entry
    assert k2["kv_bytes"] == (groups + TOKENS - groups * K) * entry
    assert "none" in out
    assert "k2" in out


# --- wrong input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", " \n\t"], "prompt is empty"),
        (["--prompt", "a", "--prompt-file", "b"], "leave one out"),
        (["--prompt-file", "absent.txt"], "absent.txt: No such file"),
        (["--prompt-file", "."], "Is a directory"),
        (["--prompt", "x" * 250], "250 tokens and 12 are to be generated, but the model's context is 256"),
        (["--prompt", "a", "--max-new-tokens", "0"], "at least 1"),
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--prompt", "a", "--plugin", "absent"], "no plugin 'absent'"),
        (["--prompt", "a", "--plugin", "./absent"], "no plugin"),
        (["--prompt", "a", "--plugin", "a=x", "b=y"], "--compare"),
        (["--prompt", "a", "--plugin", "x/a", "y/a"], "two plugins are called 'a'"),
        (["--prompt", "a", "--plugin", "none=x"], "'none' is the dense model"),
        (["--prompt", "a", "--plugin", "dense=x"], "'dense' is the dense model"),
        (["--prompt", "a", "--compare"], "add --plugin"),
        (["--prompt", "a", "--repetitions", "3"], "of --compare"),
        (["--prompt", "a", "--compare", "--plugin", "x", "--top-k", "5"], "--compare is greedy"),
        (["--prompt", "a", "--compare", "--plugin", "x", "--stream"], "--compare is greedy"),
        (["--prompt", "a", "--temperature", "-1"], "at least 0"),
        (["--prompt", "a", "--temperature", "1e-320"], "overflows: give 0 for greedy"),
        (["--prompt", "a", "--seed", str(2**32)], "a whole number from 0 to"),
        (["--prompt", "a", "--device", "meta"], "expected a device that computes"),
        (["--prompt", "a", "--top-p", "2"], "at most 1"),
        (["--prompt", "a", "--dtype", "int7"], "unknown dtype"),
        (["--prompt", "a", "--device", "nowhere"], "cannot be used here"),
        (["--prompt", "a", "--num-layers", "1"], "--random-init"),
        (["--prompt", "a", "--model", "./absent"], "no such folder"),
        (["--prompt", "a", "--no-such-flag"], "--no-such-flag"),
    ],
)
def test_wrong_input_is_one_clear_error(run, flags, message):
    with pytest.raises(VariatorError, match=message):
        run(*flags)


def test_a_prompt_in_another_encoding(tmp_path):
    (tmp_path / "latin").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(VariatorError, match="not UTF-8 \\(byte 4\\)"):
        read_prompt(None, str(tmp_path / "latin"))


@pytest.mark.parametrize(("text", "place"), [("Stra\udcdfe", 4), ("\ud83d", 0), ("a\ud83d\ude00", 1)])
def test_a_prompt_flag_in_another_encoding(text, place):
    with pytest.raises(VariatorError, match=f"--prompt is not UTF-8 \\(character {place}\\)"):
        read_prompt(text, None)


def test_a_latin1_byte_on_the_command_line_is_one_line(files):
    done = subprocess.run(
        [sys.executable, "-m", "llm_variator.generate", "--model", files.model, "--prompt", b"Stra\xdfe"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 2
    assert done.stderr == "error: --prompt is not UTF-8 (character 4): convert it first\n"


def test_a_byte_order_mark_is_not_part_of_the_prompt(tmp_path):
    (tmp_path / "marked").write_text("Straße", encoding="utf-8-sig")
    assert read_prompt(None, str(tmp_path / "marked")) == "Straße"


def test_a_tokenizer_of_another_model(run, files, tmp_path):
    config = LlamaConfig.from_pretrained(files.model)
    config.vocab_size = 20
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(files.model).save_pretrained(tmp_path)
    with pytest.raises(VariatorError, match="outside the model's vocabulary of 20"):
        run("--model", str(tmp_path), "--prompt", "z")


def test_plugin_names():
    values = ["smollm2-135m/k2", "a=runs/x=y", "./run.1/", "owner/v1.5", "owner/name/k4@v2.0"]
    assert parse_plugins(values) == {
        "k2": "smollm2-135m/k2",
        "a": "runs/x=y",
        "run-1": "./run.1/",
        "v1-5": "owner/v1.5",
        "k4@v2-0": "owner/name/k4@v2.0",
    }


def test_the_process_ends_with_status_2_and_one_line(files):
    done = subprocess.run(
        [sys.executable, "-m", "llm_variator.generate", "--model", files.model, "--prompt", ""],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 2
    assert done.stdout == ""
    # bitsandbytes, where it is installed, says at its import by transformers which kernel it would rather have
    said = [line for line in done.stderr.splitlines() if not line.startswith("Failed to load CPU gemm_4bit")]
    assert len(said) == 1
    assert said[0].startswith("error: the prompt is empty")
