"""Saved contexts: the same answers in another process, and every wrong, damaged or half-written file refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from conftest import make_decoder, make_variator, pad, prompts, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llm_variator import CompressedContext, VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.cache.stores import whole
from llm_variator.engine.contexts import files
from llm_variator.sources.models import byte_tokenizer

MIXED = VariatorConfig(k={"ffn": 4, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=3)
GREEDY = dict(do_sample=False, max_new_tokens=5)


@pytest.fixture
def model() -> VariatorModel:
    return make_variator("llama", MIXED, vocab_size=259)


@pytest.fixture
def file(model, tmp_path) -> Path:
    model.compress(prompts(40)[0], tokenizer=byte_tokenizer()).save(tmp_path / "document.safetensors")
    return tmp_path / "document.safetensors"


def test_a_loaded_context_answers_as_the_saved_one(decoder, tmp_path):
    model = make_variator(decoder, MIXED)
    rows = prompts(50, 21, 1, 36)
    contexts = [
        model.compress(rows[0]),
        model.compress(**{"context": pad(rows, "left")}),
        model.compress(pad(rows, "right"), prefill_chunk_size=13),
        model.generate(prompts(9)[0], context=model.compress(rows[1]), return_context=True, **GREEDY)[1],
    ]
    with model.disable_plugin():
        contexts.append(model.compress(rows[0]))
    for context in contexts:
        context.save(tmp_path / "context")
        loaded = CompressedContext.load(tmp_path / "context", model)
        assert loaded.plugin == context.plugin
        assert loaded.entries == context.entries
        for question in prompts(7, 15, seed=3):
            expected = model.generate(question, context=context, **GREEDY)
            assert torch.equal(model.generate(question, context=loaded, **GREEDY), expected)


def test_another_process_goes_on_where_this_one_stopped(file, model):
    question = prompts(9, seed=5)[0]
    expected = model.generate(question, context=CompressedContext.load(file, model), **GREEDY)
    program = (
        "import sys, torch; from conftest import *; from llm_variator import CompressedContext\n"
        "from test_context_files import MIXED, GREEDY\n"
        "model = make_variator('llama', MIXED, vocab_size=259)\n"
        "context = CompressedContext.load(sys.argv[1], model)\n"
        "print(model.generate(prompts(9, seed=5)[0], context=context, **GREEDY).tolist())\n"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", program, file],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [here.parents[2], here.parents[1], here]))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected.tolist()


def test_messages_are_kept(model, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    chat = [{"role": "system", "content": "A document."}]
    context = model.compress(chat, tokenizer=tokenizer)
    context.save(tmp_path / "chat")
    loaded = CompressedContext.load(tmp_path / "chat", model, tokenizer=tokenizer)
    asked = [{"role": "user", "content": "Why?"}]
    assert loaded.messages == [chat]
    assert torch.equal(
        model.generate(asked, context=loaded, **GREEDY), model.generate(asked, context=context, **GREEDY)
    )
    tokenizer.chat_template += "!"
    with pytest.raises(VariatorError, match="made with another tokenizer"):
        CompressedContext.load(tmp_path / "chat", model, tokenizer=tokenizer)


def test_keys_and_values_are_mapped_not_read(file, model):
    """On the CPU the entries are views of the file: nothing is copied before it is used."""
    context = CompressedContext.load(file, model, verify=False)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc to look into")
    address = context.cache.layers[0].store.parts[0][0].data_ptr()
    for line in maps.read_text(encoding="utf-8").splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            assert line.endswith(file.name)
            return
    pytest.fail("no mapping holds the keys")


def test_wrong_pairings_are_refused_with_the_reason(file, model):
    def refused(other, message, **options):
        with pytest.raises(VariatorError, match=message):
            CompressedContext.load(file, other, **options)

    refused(make_variator("llama", MIXED), "this model .* has other weights")
    tuned = make_variator("llama", MIXED, vocab_size=259)
    with torch.no_grad():
        tuned.base.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    refused(tuned, "this model .* has other weights")
    refused(
        VariatorModel(make_decoder("llama", vocab_size=259)), "which this model has not loaded.*loaded: none"
    )
    stale = make_variator("llama", MIXED, vocab_size=259)
    randomise(stale.plugin(), seed=2)
    refused(stale, "'default', which this model has not loaded or has with other weights")
    refused(make_variator("llama", MIXED, vocab_size=259).to(torch.bfloat16), "made in torch.float32")
    refused(model, "another tokenizer", tokenizer=_other_tokenizer())
    renamed = VariatorModel(make_decoder("llama", vocab_size=259))
    randomise(renamed.add_plugin("other name", MIXED))
    assert CompressedContext.load(file, renamed).plugin == "other name"


def test_a_plugin_that_changed_after_compressing_is_another(model, tmp_path):
    context = model.compress(prompts(40)[0])
    randomise(model.plugin(), seed=2)
    context.save(tmp_path / "context")
    with pytest.raises(VariatorError, match="or has with other weights"):
        CompressedContext.load(tmp_path / "context", model)
    with pytest.raises(VariatorError, match="has changed since it compressed"):
        context.extend([4, 5])
    randomise(model.plugin())
    assert CompressedContext.load(tmp_path / "context", model).extend([4, 5]).tokens == 42


def _other_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["more"])
    return tokenizer


@pytest.fixture
def small(tmp_path) -> tuple[VariatorModel, Path, bytes]:
    """A model of one layer, a saved context of few bytes, and these bytes."""
    model = make_variator("llama", MIXED, num_hidden_layers=1)
    model.compress(prompts(14)[0]).save(tmp_path / "small")
    return model, tmp_path / "small", (tmp_path / "small").read_bytes()


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def refused_or_harmless(model: VariatorModel, file: Path, data: bytes, expected: CompressedContext) -> bool:
    """Whether a file of these bytes is refused; if not, what it loads as must be the whole of `expected`."""
    file.write_bytes(data)
    try:
        loaded = CompressedContext.load(file, model)
    except VariatorError:
        return True
    assert loaded.plugin == expected.plugin
    assert loaded.messages == expected.messages
    assert torch.equal(loaded.input_ids, expected.input_ids)
    assert torch.equal(loaded.attention_mask, expected.attention_mask)
    for was, now in zip(expected.cache.layers, loaded.cache.layers, strict=True):
        assert (now.tokens, now.entries, now.has_fillers) == (was.tokens, was.entries, was.has_fillers)
        assert torch.equal(now.columns, was.columns)
        assert all(torch.equal(*pair) for pair in zip(whole(now.store), whole(was.store), strict=True))
    return False


def test_a_file_cut_anywhere_is_refused(small, tmp_path):
    model, _, data = small
    cut = tmp_path / "cut"
    for place in range(len(data)):
        cut.write_bytes(data[:place])
        with pytest.raises(
            VariatorError, match=r"cut is not a whole safetensors file .*; save the context again"
        ):
            CompressedContext.load(cut, model)
    cut.write_bytes(data + b"\0")
    with pytest.raises(VariatorError, match="not a whole safetensors file"):
        CompressedContext.load(cut, model)


def test_a_change_of_any_byte_is_refused_or_harmless(small, tmp_path):
    model, file, data = small
    expected, broken = CompressedContext.load(file, model), tmp_path / "broken"
    start = header_size(data)
    for place in range(len(data)):
        for bits in (0x01, 0xFF) if place < start else (0x01,):
            changed = data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]
            refused = refused_or_harmless(model, broken, changed, expected)
            assert refused or place < start, place


def test_a_header_that_reads_the_same_bytes_as_something_else_is_refused(small, tmp_path):
    """Other types and shapes of the same size: no byte of the values differs, and no checksum of them."""
    model, file, data = small
    expected, broken, start = CompressedContext.load(file, model), tmp_path / "broken", header_size(data)
    keys = expected.cache.layers[0].store.parts[0][0]
    shape = ",".join(map(str, keys.shape))
    other = ",".join(map(str, [keys.shape[1], keys.shape[0], *keys.shape[2:]]))
    for old, new in [
        ('"F32"', '"I32"'),
        ('"F32"', '"U32"'),
        ('"I64"', '"F64"'),
        (f"[{shape}]", f"[{other}]"),
    ]:
        assert old.encode() in data[:start]
        changed = data[:start].replace(old.encode(), new.encode()) + data[start:]
        for verify in (True, False):
            broken.write_bytes(changed)
            with pytest.raises(VariatorError, match="save the context again"):
                CompressedContext.load(broken, model, verify=verify)


def test_a_missing_file_is_named(model, tmp_path):
    with pytest.raises(VariatorError, match="nothing not found: save a context there first"):
        CompressedContext.load(tmp_path / "nothing", model)


def test_foreign_files_are_refused(file, model, tmp_path):
    foreign = tmp_path / "foreign"
    save_file({"weight": torch.ones(3)}, foreign)
    with pytest.raises(VariatorError, match="no compressed context"):
        CompressedContext.load(foreign, model)
    with safe_open(file, framework="pt") as opened:
        facts = json.loads(opened.metadata()["context"])
    tensors = load_file(file)
    for change, message in [
        ({"format_version": 1}, "format_version 1 is not supported"),
        ({"tensors": {}}, "lacks tensors or has surplus ones"),
    ]:
        text = json.dumps(facts | change)
        header = {"context": text, "checksum": str(zlib.crc32(text.encode()))}
        save_file(tensors, foreign, metadata=header)
        with pytest.raises(VariatorError, match=message):
            CompressedContext.load(foreign, model)


def test_a_disk_full_at_any_byte_leaves_the_old_file(small):
    """The system itself refuses every byte behind a limit, whatever call writes it."""
    resource = pytest.importorskip("resource")
    model, file, old = small
    other = model.compress(prompts(17)[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = 0
    while file.read_bytes() == old:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            other.save(file)
        except VariatorError as error:
            assert "cannot write" in str(error)  # noqa: PT017 (the limit must be lifted before pytest writes)
            assert file.read_bytes() == old
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        size += 1
    assert size == len(file.read_bytes()) + 1
    assert CompressedContext.load(file, model).tokens == 17


CALLS = [
    (Path, "mkdir"),
    (tempfile, "mkstemp"),
    (os, "close"),
    (files, "save_file"),
    (os, "fsync"),
    (Path, "chmod"),
    (Path, "replace"),
]


@pytest.mark.parametrize(("owner", "name"), CALLS, ids=[name for _, name in CALLS])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_save_interrupted_at_any_call(small, monkeypatch, owner, name, when):
    """The old file is there, or after its last call the new one; nothing else is left once the name is known."""
    model, file, old = small
    other, real = model.compress(prompts(17)[0]), getattr(owner, name)

    def dies(*args, **kwargs):
        if when == "after":
            real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(KeyboardInterrupt):
            other.save(file)
    if (name, when) == ("replace", "after"):
        assert CompressedContext.load(file, model).tokens == 17
    else:
        assert file.read_bytes() == old
    if (name, when) != ("mkstemp", "after"):
        assert [path.name for path in file.parent.iterdir()] == [file.name]
    other.save(file)
    assert CompressedContext.load(file, model).tokens == 17
