"""What fuzzing and reading for it found, one case each: every one is a `VariatorError` now."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_variator, prompts
from lives import FORMS

from llm_variator import VariatorConfig, VariatorError, cli
from llm_variator.cli import flags
from llm_variator.config import BaseSignature
from llm_variator.engine.contexts.inputs import encode
from llm_variator.sources.models import byte_tokenizer


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sites": None}, "sites must be a list"),
        ({"sites": 3}, "sites must be a list"),
        ({"layers": 5}, "layers must be a list"),
        ({"layers": "012"}, "layers must be a list"),
        ({"k_per_layer": {"ffn": 3}}, "must be a list"),
        ({"base": "llama"}, "signature"),
        (
            {"base": {"name": "a", "model_type": "b", "hidden_size": float("nan"), "num_layers": 1}},
            "hidden_size",
        ),
        ({"base": {"name": None, "model_type": "b", "hidden_size": 1, "num_layers": 1}}, "name"),
        ({1: 2, "x": 3}, "unknown setting"),
    ],
)
def test_settings(settings, complaint):
    with pytest.raises(VariatorError, match=complaint):
        VariatorConfig.from_dict(settings)


def test_base_of_the_wrong_kind():
    with pytest.raises(VariatorError, match="BaseSignature"):
        VariatorConfig(base={"name": "a"})
    assert VariatorConfig(base=BaseSignature("a", "llama", 8, 1)).base_model == "a"


def test_settings_nested_too_deeply(tmp_path):
    file = tmp_path / "variator_config.json"
    file.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(VariatorError, match="not readable JSON"):
        VariatorConfig.from_json(file)


def test_a_plugin_larger_than_memory():
    with pytest.raises(VariatorError, match="free memory"):
        make_variator("llama", VariatorConfig(k=10_000_000, sites=("kv",)))


@pytest.mark.parametrize("text", ["date: 2001-13-45", "k: " + "9" * 5000, "[" * 20_000, "k: " * 2_000])
def test_recipes_that_are_yaml_in_part(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(VariatorError, match="recipe"):
        cli.read_recipe(file)


def test_flags_that_exhaust():
    for words in (["--layers", "0-99999999999"], ["--k-per-layer", "[" * 100_000]):
        with pytest.raises(VariatorError, match="expected"):
            cli.read(flags.PluginConfig, words, prog="prog")


@pytest.mark.parametrize("length", [2.5, "7", [1.0], True, torch.tensor([2.0]), torch.tensor([[1]]), {}])
def test_prompt_lengths_that_are_none(length):
    model = make_variator("llama", VariatorConfig(k=2), num_hidden_layers=1)
    with pytest.raises(VariatorError, match="prompt_length"):
        model(prompts(9)[0], prompt_length=length)


def test_a_recipe_with_bytes_for_a_ratio(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("k: {null: !!binary ''}", encoding="utf-8")
    with pytest.raises(VariatorError, match="plain keys"):
        cli.read(flags.PluginConfig, ["--config", str(file)], prog="prog")


def test_a_prompt_of_one_token_in_chunks():
    model = make_variator("llama", VariatorConfig(k=2), num_hidden_layers=1)
    ids, mask = torch.tensor([[37, 24]]), torch.tensor([[0, 1]])
    new = dict(max_new_tokens=2, do_sample=False)
    alone = model.generate(ids[:, 1:], **new)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=3, **new)[:, 1:], alone)


def test_batches_without_rows_or_tokens():
    model = make_variator("llama", VariatorConfig(k=2), num_hidden_layers=1)
    for shape in ((0, 5), (0, 1), (2, 0)):
        with pytest.raises(VariatorError, match="empty"):
            model(torch.zeros(shape, dtype=torch.long))
        with pytest.raises(VariatorError, match="empty"):
            model.generate(torch.zeros(shape, dtype=torch.long), max_new_tokens=1)
    with pytest.raises(VariatorError, match="empty"):
        model.generate(
            torch.ones(2, 1, dtype=torch.long), attention_mask=torch.tensor([[1], [0]]), max_new_tokens=1
        )
    with pytest.raises(VariatorError, match="3 columns for 9 tokens"):
        model(prompts(9)[0], attention_mask=torch.ones(1, 3))


@pytest.mark.parametrize("ids", [[5, -1], [5, 10**6], [5, 10**30]])
def test_tokens_outside_the_vocabulary(ids):
    model = make_variator("llama", VariatorConfig(k=2), num_hidden_layers=1)
    with pytest.raises(VariatorError, match="vocabulary"):
        model.compress(ids)
    context = model.compress(prompts(9)[0])
    with pytest.raises(VariatorError, match="vocabulary"):
        model.generate(ids, context=context, max_new_tokens=1)


@pytest.mark.parametrize(
    "what",
    [
        {},
        {"role": "user"},
        [{"role": "user"}],
        [{}],
        torch.zeros(2, 2, 2),
        torch.zeros(3),
        torch.zeros(0),
        [False],
    ],
)
def test_prompts_of_no_known_form(what):
    with pytest.raises(VariatorError):
        encode(what, byte_tokenizer())


def test_messages_that_the_template_does_not_take():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only one message') }}"
    with pytest.raises(VariatorError, match="only one message"):
        encode([{"role": "user", "content": "hello"}], tokenizer)


def test_a_context_whose_header_was_written_by_hand(tmp_path):
    import struct
    import zlib

    from llm_variator.engine.contexts import CompressedContext

    model = make_variator("llama", VariatorConfig(k=2, sites=("kv",)), num_hidden_layers=1)
    file = tmp_path / "context.safetensors"
    model.compress(prompts(17)[0]).save(file)
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]

    def write(**changes):
        header = json.loads(content[8 : 8 + size])
        facts = json.dumps(json.loads(header["__metadata__"]["context"]) | changes)
        header["__metadata__"] = {"context": facts, "checksum": str(zlib.crc32(facts.encode()))}
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    write()
    CompressedContext.load(file, model)
    for changes in ({"layers": []}, {"layers": 3}, {"belongs_to": None}, {"messages": 5}, {"tensors": {}}):
        write(**changes)
        with pytest.raises(VariatorError, match=r"context\.safetensors"):
            CompressedContext.load(file, model)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_single_row_with_padding(form, side):
    """With kept keys its padding was read, as if all of its columns were tokens: wrong without a cache."""
    model = make_variator("llama", FORMS[form].config, num_hidden_layers=2).double()
    for row in prompts(1, 5, 30):
        padding = torch.zeros(1, 3, dtype=torch.long)
        parts = [(padding, torch.zeros_like(padding)), (row, torch.ones_like(row))]
        ids, mask = (
            torch.cat(part, dim=1) for part in zip(*parts[:: 1 if side == "left" else -1], strict=True)
        )
        for options in ({}, {"use_cache": False}, {"prompt_length": row.shape[1] // 2}):
            alone = model(row, **options).logits
            found = model(ids, attention_mask=mask, **options).logits[mask.bool()]
            torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=0)
        new = dict(max_new_tokens=5, do_sample=False)
        alone = model.generate(row, **new)[:, -5:]
        assert torch.equal(model.generate(ids, attention_mask=mask, **new)[:, -5:], alone)


def test_scores_larger_than_memory():
    config = VariatorConfig(sites=("kv",), compressor="select", score_fits=10**12)
    with pytest.raises(VariatorError, match="free memory"):
        make_variator("llama", config)


def test_guesses_for_several_rows():
    model = make_variator("llama", FORMS["keeps"].config, num_hidden_layers=2)
    with pytest.raises(VariatorError, match="generate row by row"):
        model.generate(prompts(9)[0].repeat(2, 1), prompt_lookup_num_tokens=2, max_new_tokens=2)
