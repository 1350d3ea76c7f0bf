"""Generated settings, files, recipes, prompts and lives of a model: no crash, no hang, no error but `VariatorError`.

Some cases in every run; as many as one likes with `--cases` (`make fuzz`).
"""

from __future__ import annotations

import json
import signal
import struct
import zlib
from collections import Counter
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, make_variator, pad, prompts
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from lives import DEEDS, FORMS, Life
from safetensors.torch import load_file

from llm_variator import VariatorConfig, VariatorError, cli
from llm_variator.config import ACTIVATIONS, COMPRESSORS, CONFIG_FILE, DECOMPRESSORS, SITES, BaseSignature
from llm_variator.engine.contexts import CompressedContext
from llm_variator.engine.plan import Plan
from llm_variator.sources.models import byte_tokenizer
from llm_variator.train.__main__ import read
from llm_variator.train.settings import Settings

ACCEPTED, REFUSED = "accepted", "refused"  # a VariatorError
KEEPS = "accepted, keeps keys"
CPU_SECONDS = 30  # of one generated case; more is a hang. Processor time: the machine may be busy


@pytest.fixture
def fuzz(request, figures):
    """`fuzz(check, strategy, ..., share=, little=)`: `check` generated values, as many as the share of `--cases`."""

    def run(check, *strategies, share: float, little: int) -> None:
        outcomes: Counter[str] = Counter()

        @seed(0)
        @settings(
            max_examples=int(share * (request.config.getoption("cases") or 0)) or little,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.tuples(*strategies))
        def one(values) -> None:
            outcomes["cases"] += 1
            outcomes[_without_hanging(check, *values)] += 1

        one()
        figures["cases"] = figures.get("cases", 0) + outcomes["cases"]
        figures.setdefault("by target", {})[request.node.name.removeprefix("test_")] = dict(outcomes)

    return run


def _without_hanging(check, *values) -> str:
    def hang(*_: object) -> None:
        raise AssertionError(f"no answer after {CPU_SECONDS} s of processor time")

    previous = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        return check(*values)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


# --- settings

numbers = st.one_of(st.integers(-3, 9), st.integers(), st.floats(), st.booleans())
scalars = st.one_of(st.none(), numbers, st.text(max_size=4), st.sampled_from(SITES))
anything = st.recursive(
    scalars | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3) | st.tuples(inner)
    ),
    max_leaves=5,
)
some_sites = st.lists(st.sampled_from(SITES), max_size=3)
small = st.integers(0, 5)
LIKELY = {
    "k": st.integers(1, 9) | st.dictionaries(st.sampled_from(SITES), small, max_size=3),
    "sites": some_sites | some_sites.map(tuple) | st.sampled_from(SITES),
    "r": st.integers(1, 70),
    "compressor": st.sampled_from(COMPRESSORS)
    | st.dictionaries(st.sampled_from(SITES), st.sampled_from(COMPRESSORS), max_size=2),
    "decompressor": st.sampled_from(DECOMPRESSORS),
    "activation": st.sampled_from(ACTIVATIONS),
    "layers": st.none() | st.lists(small, max_size=4),
    "k_per_layer": st.none()
    | st.dictionaries(st.sampled_from(SITES), st.lists(small, max_size=4), max_size=2),
    "dense_head": st.none() | small,
    "dense_tail": st.none() | small,
    "decode_block": st.none() | small,
    "k_per_head": st.none() | st.lists(st.lists(small, max_size=3), max_size=4),
    "block": small,
    "score_fits": small,
    "base": st.none()
    | st.fixed_dictionaries(
        {"name": scalars, "model_type": scalars, "hidden_size": scalars, "num_layers": scalars}
    ),
    "format_version": st.just(1),
}
likely = st.fixed_dictionaries({}, optional=LIKELY)
odd = st.dictionaries(st.sampled_from(sorted(LIKELY)) | st.text(max_size=3), anything, max_size=4)
powers = st.sampled_from([1, 2, 4, 8, 64])
keeping = st.sampled_from(
    [
        {"sites": "kv", "compressor": "select"},
        {"sites": ["kv"], "compressor": {"kv": "select"}},
        {"sites": ["kv", "ffn"], "compressor": {"ffn": "mean", "kv": "select"}},
    ]
)
of_heads = {
    "k": powers,
    "k_per_head": st.none() | st.lists(st.tuples(powers, powers), min_size=2, max_size=3),
    "block": powers,
    "score_fits": st.integers(1, 4),
    "layers": LIKELY["layers"],
    "dense_head": LIKELY["dense_head"],
    "dense_tail": LIKELY["dense_tail"],
    "decode_block": st.none() | powers | small,
}
kept = st.builds(dict.__or__, keeping, st.fixed_dictionaries({}, optional=of_heads))
settings_ = st.builds(
    lambda a, b, which: {**a, **(b if which else {})},
    likely | kept,
    odd,
    st.sampled_from([False, False, True]),
)

SIGNATURE, KV_HEADS = BaseSignature("base", "llama", 32, 3), 2


def check_settings(values) -> str:
    try:
        config = VariatorConfig.from_dict(values)
    except VariatorError:
        return REFUSED
    again = VariatorConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    try:
        resolved = config.resolved(SIGNATURE, decoder=True)
    except VariatorError:
        return REFUSED
    for site in SITES:
        for layer in range(SIGNATURE.num_layers):
            ratio = resolved.ratio(site, layer)
            assert ratio is None or ratio >= 1
    try:
        plan = Plan.of(config, SIGNATURE, decoder=True, slides=lambda layer: layer == 1, kv_heads=KV_HEADS)
    except VariatorError:
        return REFUSED
    for layer, ratios in plan.selected.items():
        assert layer != 1
        assert len(ratios) == KV_HEADS
        assert max(ratios) > 1
        assert all(config.block % k == 0 for k in ratios)
    return KEEPS if plan.selected else ACCEPTED


def check_keywords(values) -> str:
    try:
        VariatorConfig(**{name: value for name, value in values.items() if name in LIKELY})
    except VariatorError:
        return REFUSED
    return ACCEPTED


def test_settings(fuzz):
    fuzz(check_settings, settings_, share=0.3, little=60)


def test_keywords(fuzz):
    fuzz(check_keywords, settings_, share=0.1, little=30)


# --- files

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)), max_size=3)
damage = st.tuples(edits, st.none() | st.floats(0, 1), st.binary(max_size=3))


def damaged(content: bytes, how) -> bytes:
    """`content` with bytes overwritten, cut short and continued."""
    changes, keep, more = how
    out = bytearray(content)
    for place, new in changes:
        start = int(place * len(out))
        out[start : start + len(new)] = new
    return bytes(out[: int((1 if keep is None else keep) * len(out))] + more)


def header_changed(content: bytes, change) -> bytes:
    """A safetensors file whose header went through `change`: still one by its lengths."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


@st.composite
def json_change(draw):
    """A function that replaces, removes or adds something somewhere in plain JSON."""
    path, value, removes = (
        draw(st.lists(st.integers(0, 99), min_size=1, max_size=5)),
        draw(json_values),
        draw(st.booleans()),
    )
    name = draw(st.text(max_size=5))

    def change(content):
        here = content
        for step in path:
            inside = [*here] if isinstance(here, dict) else [*range(len(here))]
            if not inside:
                break
            key = inside[step % len(inside)]
            if not isinstance(here[key], (dict, list)) or step == path[-1]:
                if removes:
                    del here[key]
                else:
                    here[key] = value
                return content
            here = here[key]
        if isinstance(here, dict):
            here[name] = value
        return content

    return change


class Files:
    """A tiny model with the files of its plugin and of its contexts, to damage and load again."""

    def __init__(self, config: VariatorConfig, folder: Path) -> None:
        self.folder = folder
        self.model = make_variator("llama", config, num_hidden_layers=2)
        self.model.save_pretrained(folder / "plugin")
        self.plugin = {file.name: file.read_bytes() for file in (folder / "plugin").iterdir()}
        self.weights = load_file(folder / "plugin" / "variator.safetensors")
        self.file = folder / "context.safetensors"
        context = self.model.compress(prompts(17)[0])
        ragged = self.model.compress(pad(prompts(17, 3, 12), "left"))
        self.contexts = []
        for each in (context, context.quantised(8), context.quantised(4), ragged):
            each.save(self.file)
            self.contexts.append(self.file.read_bytes())

    def load_plugin(self, name: str, content: bytes) -> str:
        file = self.folder / "plugin" / name
        file.write_bytes(content)
        try:
            self.model.load_plugin(self.folder / "plugin", "again")
        except VariatorError:
            return REFUSED
        finally:
            file.write_bytes(self.plugin[name])
        try:
            with self.model.use_plugin("again"):
                self.model.generate(prompts(12)[0], max_new_tokens=1)
        finally:
            self.model.delete_plugin("again")
        return ACCEPTED

    def load_context(self, content: bytes, verify: bool) -> str:
        self.file.write_bytes(content)
        try:
            context = CompressedContext.load(self.file, self.model, verify=verify)
            self.model.generate([[5, 6]], context=context, max_new_tokens=1)
        except VariatorError:
            return REFUSED
        return ACCEPTED


SAVED = {"merges": FORMS["merges"].config, "keeps": FORMS["keeps"].config}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Files]:
    return {form: Files(config, tmp_path_factory.mktemp("fuzz")) for form, config in SAVED.items()}


saved = st.sampled_from(sorted(SAVED))
which = st.integers(0, 3)  # of the contexts


@pytest.mark.parametrize("name", ["variator.safetensors", CONFIG_FILE])
def test_damaged_plugin(fuzz, files, name):
    def check(form, how) -> str:
        return files[form].load_plugin(name, damaged(files[form].plugin[name], how))

    fuzz(check, saved, damage, share=0.05, little=15)


def test_plugin_with_other_settings(fuzz, files):
    def check(form, change) -> str:
        content = json.dumps(change(json.loads(files[form].plugin[CONFIG_FILE])))
        return files[form].load_plugin(CONFIG_FILE, content.encode())

    fuzz(check, saved, json_change(), share=0.1, little=25)


def test_plugin_with_another_header(fuzz, files):
    name = "variator.safetensors"

    def check(form, change) -> str:
        return files[form].load_plugin(name, header_changed(files[form].plugin[name], change))

    fuzz(check, saved, json_change(), share=0.05, little=15)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"k":' * 50_000, '{"k": ' + "9" * 5000 + "}", '{"k": 9999999}']
)
def test_plugin_with_settings_that_exhaust(files, text):
    assert files["merges"].load_plugin(CONFIG_FILE, text.encode()) == REFUSED


def test_damaged_context(fuzz, files):
    def check(form, number, how) -> str:
        return files[form].load_context(damaged(files[form].contexts[number], how), True)

    fuzz(check, saved, which, damage, share=0.05, little=15)


def test_context_with_another_header(fuzz, files):
    """Signed anew, as somebody would who wrote it on purpose."""

    def check(form, number, change, verify) -> str:
        def edit(header):
            facts = json.dumps(change(json.loads(header["__metadata__"]["context"])))
            header["__metadata__"] = {"context": facts, "checksum": str(zlib.crc32(facts.encode()))}
            return header

        return files[form].load_context(header_changed(files[form].contexts[number], edit), verify)

    fuzz(check, saved, which, json_change(), st.booleans(), share=0.05, little=20)


# --- recipes and flags

FLAGS = sorted(
    (
        action
        for action in cli.parser_of(Settings, prog="train")._actions
        if action.option_strings and action.dest != "help"
    ),
    key=lambda action: action.dest,
)
keys = st.sampled_from([action.dest for action in FLAGS]) | st.text(max_size=6)
yaml_values = st.one_of(
    scalars, anything, st.sampled_from(["ffn,kv", "ffn=2,kv=4", "0-5,8", "1e-3", "float32"])
)


def check_recipe(content: bytes, folder: Path, *words: str) -> str:
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    try:
        read(["--config", str(file), *words])
    except VariatorError:
        return REFUSED
    return ACCEPTED


def test_recipe(fuzz, tmp_path):
    import yaml

    def check(values) -> str:
        try:
            content = yaml.safe_dump(values, allow_unicode=True)
        except yaml.YAMLError:
            content = repr(values)
        return check_recipe(content.encode("utf-8", "surrogatepass"), tmp_path)

    fuzz(check, st.dictionaries(keys, yaml_values, max_size=3) | anything, share=0.12, little=30)


def test_damaged_recipe(fuzz, tmp_path):
    whole = (
        b"# a recipe\nk: {ffn: 2, kv: 4}\nsites: [ffn, kv]\nmax_steps: 7\nlearning_rate: 1.0e-3\nbf16: true\n"
    )
    fuzz(lambda how: check_recipe(damaged(whole, how), tmp_path), damage, share=0.05, little=15)


@pytest.mark.parametrize(
    "text", ["[" * 20_000, "k: " * 5_000, "layers: 0-99999999999\n", "k: " + "9" * 5_000]
)
def test_recipe_that_exhausts(tmp_path, text):
    assert check_recipe(text.encode(), tmp_path) == REFUSED


def test_flags(fuzz):
    flag = st.sampled_from([action.option_strings[0] for action in FLAGS if action.dest != "config"])
    words = st.lists(flag | st.text(max_size=5) | st.integers().map(str) | st.floats().map(str), max_size=5)

    def check(line) -> str:
        if {"-h", "--help"} & set(line):
            return REFUSED
        try:
            read(line)
        except VariatorError:
            return REFUSED
        return ACCEPTED

    fuzz(check, words, share=0.06, little=20)


# --- prompts


@cache
def model(form: str):
    made = make_variator("llama", FORMS[form].config, num_hidden_layers=2, vocab_size=259)
    made.skip_unread = True
    return made


@cache
def tokenizer():
    made = byte_tokenizer()
    made.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    return made


lengths = st.integers(0, 14)
ids = st.tuples(st.integers(0, 3), lengths, st.integers(0, 10**6)).map(
    lambda shape: torch.randint(3, VOCAB, shape[:2], generator=torch.Generator().manual_seed(shape[2]))
)


@st.composite
def batch(draw):
    """Ids with a mask that may be anything, and a prompt length that may be anything."""
    tokens = draw(ids)
    mask = draw(st.none() | st.lists(st.booleans(), min_size=tokens.numel(), max_size=tokens.numel()))
    if mask is not None:
        mask = torch.tensor(mask, dtype=torch.long).view(tokens.shape)
    prompt = draw(st.none() | st.integers(-2, 20) | st.lists(st.integers(-1, 16), max_size=3) | anything)
    if isinstance(prompt, list) and all(type(n) is int for n in prompt) and draw(st.booleans()):
        prompt = torch.tensor(prompt, dtype=torch.long)
    return tokens, mask, prompt


def alone(tokens, mask):
    """Each row that has no hole, which would move the positions behind it: its number and its own columns."""
    for row, own in enumerate(tokens.new_ones(tokens.shape).bool() if mask is None else mask.bool()):
        columns = own.nonzero().squeeze(-1)
        if len(columns) and columns[-1] - columns[0] == len(columns) - 1:
            yield row, columns


same = partial(torch.testing.assert_close, atol=1e-3, rtol=1e-3)


def check_forward(form, values) -> str:
    tokens, mask, prompt = values
    try:
        with torch.no_grad():
            logits = model(form)(tokens, attention_mask=mask, prompt_length=prompt).logits
    except VariatorError:
        return REFUSED
    assert logits.shape[:2] == tokens.shape
    real = tokens.new_ones(tokens.shape).bool() if mask is None else mask.bool()
    assert bool(logits[real].isfinite().all())
    for row, columns in alone(tokens, mask) if prompt is None else ():
        with torch.no_grad():
            same(logits[row, columns], model(form)(tokens[row : row + 1, columns]).logits[0])
    return ACCEPTED


def check_generate(form, values, options) -> str:
    tokens, mask, _ = values
    told = dict(max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    try:
        out = model(form).generate(tokens, attention_mask=mask, **told, **options)
    except VariatorError:
        return REFUSED
    rows = options.get("num_return_sequences", 1) * len(tokens)
    assert out.sequences.shape == (rows, tokens.shape[1] + 2)
    for row, columns in alone(tokens, mask) if rows == len(out.logits[0]) == len(tokens) else ():
        same(out.logits[0][row], model(form).generate(tokens[row : row + 1, columns], **told).logits[0][0])
    return ACCEPTED


forms = st.sampled_from(sorted(FORMS))


def test_forward(fuzz):
    """Rows that are accepted in a batch are read as they are alone."""
    fuzz(check_forward, forms, batch(), share=0.04, little=20)


def test_generate(fuzz):
    options = st.sampled_from(
        [
            {},
            {"prefill_chunk_size": 3},
            {"num_beams": 2},
            {"do_sample": True, "num_return_sequences": 2},
            {"prompt_lookup_num_tokens": 2},
        ]
    )
    fuzz(check_generate, forms, batch(), options, share=0.02, little=15)


def check_text(form, what, question, bits) -> str:
    try:
        context = model(form).compress(what, tokenizer=tokenizer())
        if bits is not None:
            context = context.quantised(bits)
        out = model(form).generate(question, context=context, max_new_tokens=1)
    except VariatorError:
        return REFUSED
    assert out.ndim == 2
    return ACCEPTED


def test_text_and_messages(fuzz):
    text = st.text(max_size=12)
    message = st.dictionaries(st.sampled_from(["role", "content"]) | text, text | anything, max_size=3)
    chat = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": text}), min_size=1, max_size=2)
    what = st.one_of(text, chat, st.lists(text, max_size=3), st.lists(message, max_size=2), anything)
    fuzz(check_text, forms, what, what, st.sampled_from([None, 4, 8]), share=0.03, little=20)


# --- what is done to a wrapped model

deeds = st.lists(st.sampled_from(DEEDS), min_size=1, max_size=6)
starts = st.sampled_from(["plain", "peft", "injected"])


def check_life(start, form, done, folder: Path) -> str:
    life = Life(start, form, folder)
    for deed in done:
        deed(life)
    with torch.no_grad():
        return life.check()


def test_lives(fuzz, tmp_path):
    """In any order: wrapped again, copied, pickled, moved, adapted, switched, trained; then computed anew."""
    fuzz(partial(check_life, folder=tmp_path), starts, forms, deeds, share=0.05, little=25)


def test_as_many_cases_as_asked_for(request, figures):
    asked = request.config.getoption("cases")
    if asked is None:
        pytest.skip("a number is asked for with --cases")
    assert figures["cases"] >= asked
