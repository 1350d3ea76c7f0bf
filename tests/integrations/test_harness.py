"""lm-eval's model types: equal to `hf` without a plugin, right with one."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import make_decoder, make_encoder, randomise
from safetensors.torch import load_file
from tiny import model_folder

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.integrations.harness import VariatorLM, VariatorSeq2SeqLM, mean_config
from llm_variator.integrations.scoring import ScoringRequest, score
from llm_variator.sources.models import byte_tokenizer, load_model

CONFIG = VariatorConfig(k=3, sites=("ffn", "kv"), r=4, dense_head=1, dense_tail=2)
PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " green"),
    ("The sky is", " b"),
    ("A much longer context, of several words, so that there is something to merge.", " yes"),
    ("A much longer context, of several words, so that there is something to merge.", " no"),
    ("A much longer context, of several words, so that there is something else.", " no"),
    ("", "text without a context"),
]


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def log_likelihoods(lm: HFLM, pairs: list[tuple[str, str]] = PAIRS) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def generations(lm: HFLM) -> list[str]:
    settings = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    wanted = [(context, settings) for context, _ in PAIRS[:6:3]]
    return lm.generate_until(instances("generate_until", wanted), disable_tqdm=True)


def decoder(**arguments) -> VariatorLM:
    return VariatorLM(model_folder(), device="cpu", **{"batch_size": 3} | arguments)


@pytest.fixture(scope="module")
def hf() -> HFLM:
    return HFLM(model_folder(), device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def compressed() -> VariatorLM:
    model = VariatorModel(load_model(model_folder()), CONFIG)
    randomise(model.plugin(), std=0.1)
    return VariatorLM(model, tokenizer=byte_tokenizer(), batch_size=3)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("models") / "t5")
    make_encoder("t5", vocab_size=259).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def teacher_forced(lm: VariatorLM, context: str, continuation: str) -> float:
    encode = lm.tok_encode
    prompt, answer = lm._encode_pair(context, continuation) if context else ([1], encode(continuation))
    with torch.no_grad():
        logits = lm.variator(torch.tensor([prompt + answer]), prompt_length=len(prompt)).logits[0]
    log_probs = torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)
    return float(log_probs[torch.arange(len(answer)), torch.tensor(answer)].sum())


def test_registered():
    assert get_model("variator") is VariatorLM
    assert get_model("variator-seq2seq") is VariatorSeq2SeqLM


def test_declared_for_the_coming_release():
    import tomllib
    from importlib import import_module
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    for name, target in project["entry-points"]["lm_eval.models"].items():
        module, _, attribute = target.partition(":")
        assert getattr(import_module(module), attribute) is get_model(name)


def test_without_a_plugin_equal_to_the_last_digit(hf):
    lm = decoder()
    assert log_likelihoods(lm) == log_likelihoods(hf)
    assert generations(lm) == generations(hf)
    texts = instances("loglikelihood_rolling", [(context,) for context, _ in PAIRS if context])
    assert lm.loglikelihood_rolling(texts, disable_tqdm=True) == hf.loglikelihood_rolling(
        texts, disable_tqdm=True
    )


def test_identity_within_a_ten_thousandth(hf):
    lm = decoder(k=1)
    assert lm.variator.active_plugin == "default"
    for ours, theirs in zip(log_likelihoods(lm), log_likelihoods(hf), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
        assert ours[1] == theirs[1]
    assert generations(lm) == generations(hf)


def test_compressed_scores_and_texts(compressed):
    found = log_likelihoods(compressed)
    for (context, continuation), (value, _) in zip(PAIRS, found, strict=True):
        assert value == pytest.approx(teacher_forced(compressed, context, continuation), abs=1e-4)
    with compressed.variator.disable_plugin():
        dense = log_likelihoods(compressed)
    assert abs(found[3][0] - dense[3][0]) > 1e-2
    for (context, _), text in zip(PAIRS[:6:3], generations(compressed), strict=True):
        ids = torch.tensor([compressed.tok_encode(context)])
        own = compressed.variator.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert text == compressed.tok_decode(own.tolist()).split("\n\n")[0]


def test_kept_without_training():
    """The first quarter of each block: what a model that is told so scores, and fewer entries than dense."""
    lm = decoder(keep=0.25, dense_head=1, dense_tail=3)
    config = lm.variator.plugins["default"]
    assert (config.compressor, config.sites, config.k, config.dense_head) == ("select", ("kv",), 4, 1)
    pair = ("Some words to be read. " * 9, " yes")
    [(value, _)] = log_likelihoods(lm, [pair])
    assert value == pytest.approx(teacher_forced(lm, *pair), abs=1e-4)
    prompt = len(lm.tok_encode(pair[0]))
    held = lm.variator.kv_cache_report().layers[0].entries
    assert held < prompt - 64
    assert abs(value - log_likelihoods(decoder(), [pair])[0][0]) > 1e-4


def test_order_and_batch_size_do_not_matter(compressed):
    expected = dict(zip(PAIRS, log_likelihoods(compressed), strict=True))
    for seed in range(20):
        shuffled = random.Random(seed).sample(PAIRS, len(PAIRS))
        assert dict(zip(shuffled, log_likelihoods(compressed, shuffled), strict=True)) == expected
    for batch_size in (1, 2, 64, "auto"):
        compressed.batch_size_per_gpu = batch_size
        for pair, (value, greedy) in zip(PAIRS, log_likelihoods(compressed), strict=True):
            assert value == pytest.approx(expected[pair][0], abs=1e-4)
            assert greedy == expected[pair][1]
    compressed.batch_size_per_gpu = 3


def with_logits_cache(lm: VariatorLM, requests: list[tuple[str, list[int], list[int]]]) -> list[float]:
    """What lm-eval's `logits_cache` would make of compressed contexts: its own collator, one pass per text."""
    collator = Collator(
        requests,
        sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
        group_by="contexts",
        group_fn=lambda request: request[-2] + request[-1][:-1],
    )
    results = []
    for [(text, context, continuation)] in collator.get_batched(n=1):
        with torch.no_grad():
            row = torch.tensor([context + continuation])
            logits = lm.variator(row, prompt_length=len(context)).logits[:, len(context) - 1 : -1]
        for _, tokens, shared in collator.get_cache(text, context, continuation, logits.log_softmax(-1)):
            last = shared[0, -len(tokens) :]
            results.append(float(last[torch.arange(len(tokens)), torch.tensor(tokens)].sum()))
    return collator.get_original(results)


def test_the_logits_cache_trap(compressed):
    """Requests of one text whose contexts end at different places: right without the cache, wrong with it."""
    text = compressed.tok_encode("One text, whose context may end early or late.")
    requests = [("a", text[:20], text[20:30]), ("b", text[:29], text[29:30]), ("c", text[:29], [7])]
    expected = [
        score(compressed.variator, [ScoringRequest(tuple(context), tuple(continuation))])[0].total
        for _, context, continuation in requests
    ]

    def check(found: list[float]) -> None:
        assert found == pytest.approx(expected, abs=1e-4)

    check([value for value, _ in compressed._loglikelihood_tokens(requests, disable_tqdm=True)])
    with pytest.raises(AssertionError):
        check(with_logits_cache(compressed, requests))


def test_the_trap_without_a_plugin():
    """There `hf` itself is wrong, if its cache is on; ours switches it off for such requests."""
    lm = decoder()
    text = lm.tok_encode("One text, whose context may end early or late.")
    requests = [("a", text[:20], text[20:30]), ("b", text[:29], text[29:30]), ("c", text[:29], [7])]
    wanted = [ScoringRequest(tuple(context), tuple(continuation)) for _, context, continuation in requests]
    expected = pytest.approx([each.total for each in score(lm.variator, wanted)], abs=1e-4)
    assert lm.logits_cache
    assert [value for value, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)] == expected
    assert lm.logits_cache
    assert [value for value, _ in HFLM._loglikelihood_tokens(lm, requests, disable_tqdm=True)] != expected


def test_logits_cache_is_refused_with_a_plugin():
    with pytest.raises(VariatorError, match="logits_cache"):
        decoder(k=2, logits_cache=True)
    assert decoder(logits_cache=False).logits_cache is False


def test_seq2seq(t5_folder):
    hf = HFLM(t5_folder, device="cpu", batch_size=3)
    pairs = PAIRS[:-1]
    expected = log_likelihoods(hf, pairs)
    plain = VariatorSeq2SeqLM(t5_folder, device="cpu", batch_size=3)
    assert log_likelihoods(plain, pairs) == expected
    assert generations(plain) == generations(hf)
    plain.variator.add_plugin("one", mean_config(1))
    plain.variator.add_plugin("three", mean_config(3))
    plain.variator.set_plugin("one")
    for ours, theirs in zip(log_likelihoods(plain, pairs), expected, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    plain.variator.set_plugin("three")
    found = log_likelihoods(plain, pairs)
    assert max(abs(ours[0] - theirs[0]) for ours, theirs in zip(found, expected, strict=True)) > 1e-2
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        ids, labels = (torch.tensor([each]) for each in plain._encode_pair(context, continuation))
        with torch.no_grad():
            log_probs = plain.variator(ids, labels=labels).logits[0].log_softmax(-1)
        assert value == pytest.approx(
            float(log_probs[torch.arange(labels.shape[1]), labels[0]].sum()), abs=1e-4
        )


def test_rolling_needs_windows_with_a_plugin(compressed):
    text = "A text that is long enough for several pieces of it to be scored one after the other."
    request = instances("loglikelihood_rolling", [(text,), ("short",)])
    with pytest.raises(VariatorError, match="rolling_context=512"):
        compressed.loglikelihood_rolling(request, disable_tqdm=True)
    lm = VariatorLM(compressed.variator, tokenizer=byte_tokenizer(), rolling_context=30, rolling_stride=8)
    found = lm.loglikelihood_rolling(request, disable_tqdm=True)
    tokens = lm.tok_encode(text)
    pieces = lm._pieces(tokens)
    assert [token for _, piece in pieces for token in piece] == tokens
    assert all(context == tokens[max(0, 8 * n - 30) : 8 * n] for n, (context, _) in enumerate(pieces) if n)
    assert pieces[0][0] == [lm.prefix_token_id]
    expected = score(lm.variator, [ScoringRequest(tuple(context), tuple(piece)) for context, piece in pieces])
    assert found[0] == pytest.approx(sum(each.total for each in expected), abs=1e-4)
    with lm.variator.disable_plugin():  # the same windows
        dense = lm.loglikelihood_rolling(request, disable_tqdm=True)
    assert abs(dense[0] - found[0]) > 1e-2


def test_too_long_a_context_loses_its_beginning(compressed):
    lm = VariatorLM(compressed.variator, tokenizer=byte_tokenizer(), max_length=40)
    context, continuation = "x" * 20 + PAIRS[3][0][:36], " yes!"
    expected = log_likelihoods(lm, [(context[-36:], continuation)])
    assert log_likelihoods(lm, [(context, continuation)]) == expected
    with pytest.raises(VariatorError, match="exceeds the model's 40"):
        log_likelihoods(lm, [("a", "b" * 41)])


def test_saved_and_shipped_plugins(compressed, tmp_path):
    compressed.variator.save_pretrained(tmp_path / "k3")
    lm = decoder(plugin=str(tmp_path / "k3"), plugin_name="mine", k=3)
    assert lm.variator.active_plugin == "mine"
    assert log_likelihoods(lm) == log_likelihoods(compressed)
    with pytest.raises(VariatorError, match="k=3, not 2"):
        decoder(plugin=str(tmp_path / "k3"), k=2)


def test_a_plugin_that_keeps_keys(tmp_path):
    config = VariatorConfig(
        sites=("kv",), compressor="select", k_per_head=((2, 4),) * 3, block=4, dense_head=1, dense_tail=2
    )
    model = VariatorModel(load_model(model_folder()), config)
    randomise(model.plugin())
    model.save_pretrained(tmp_path)
    lm = decoder(plugin=str(tmp_path))
    for (context, continuation), (total, _) in zip(PAIRS, log_likelihoods(lm), strict=True):
        assert total == pytest.approx(teacher_forced(lm, context, continuation), abs=1e-3)
    assert len(generations(lm)) == 2
    with pytest.raises(VariatorError, match="a ratio for every head"):
        decoder(plugin=str(tmp_path), k=4)


def test_untrained_plugin_by_k():
    lm = decoder(k=4, sites="kv", dense_head=0, dense_tail=8)
    config = lm.variator.plugins["default"]
    assert (config.k, config.sites, config.dense_head, config.dense_tail) == (4, ("kv",), 0, 8)
    assert (config.compressor, config.decompressor) == ("mean", "copy")
    assert decoder(plugin="none").variator.active_plugin is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(plugin="nowhere"), "nowhere"),
        (dict(dense_tail=3), "dense_tail: these describe an untrained plugin"),
        (dict(k=0), "k must be"),
        (dict(keep=0.3), "--keep SHARE"),
        (dict(keep=1), "keep=1"),
        (dict(keep=0.5, k=2), "leave out plugin and k, or keep"),
        (dict(keep=0.5, sites="ffn"), "select"),
        (dict(k=2, sites="ffm"), "site must be one of"),
        (dict(rolling_context=0), "rolling_context must be"),
        (dict(backend="seq2seq"), "--model variator$"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(VariatorError, match=message):
        decoder(**arguments)


def test_the_other_model_type_is_named(t5_folder):
    with pytest.raises(VariatorError, match="--model variator-seq2seq"):
        VariatorLM(t5_folder, device="cpu")
    with pytest.raises(VariatorError, match=r"--model variator$"):
        VariatorSeq2SeqLM(model_folder(), device="cpu")


def test_loaded_models_and_dtype():
    lm = VariatorLM(make_decoder("llama", vocab_size=259), tokenizer=byte_tokenizer(), k=2)
    assert isinstance(lm.variator, VariatorModel)
    assert decoder(dtype="bfloat16").variator.dtype is torch.bfloat16


def test_quantisation_flags_reach_transformers(monkeypatch):
    seen = {}

    def create(self, pretrained, **kwargs):
        seen.update(kwargs)
        self._model = load_model(pretrained)

    monkeypatch.setattr(HFLM, "_create_model", create)
    decoder(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16", parallelize=True)
    config = seen["quantization_config"]
    assert config.load_in_4bit
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    assert seen["parallelize"]
    assert "load_in_4bit" not in seen


def test_chat_template(compressed):
    compressed.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert compressed.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<user>Hi"


def test_automatic_batch_size_on_a_processor(compressed):
    long, short = (None, [5] * 10_000, [5]), (None, [5] * 10, [5])
    assert compressed._detect_batch_size([long]) == 1
    assert compressed._detect_batch_size([short]) == 64


def test_the_shipped_plugin_on_real_weights(smollm2):
    base, tokenizer = smollm2
    lm = VariatorLM(base, tokenizer=tokenizer, plugin="smollm2-135m/k2", batch_size=2)
    try:
        context = "The town has a market, a school and two bridges. " * 20 + "The number of its bridges is"
        pairs = [(context, " two"), (context, " seven, as everybody knows"), (context[49:], " two")]
        found = log_likelihoods(lm, pairs)
        for (text, continuation), (value, _) in zip(pairs, found, strict=True):
            assert value == pytest.approx(teacher_forced(lm, text, continuation), abs=1e-3)
        assert lm.variator.kv_cache_report().bytes < lm.variator.kv_cache_report().dense_bytes
        with lm.variator.disable_plugin():
            dense = log_likelihoods(lm, pairs)
            assert dense == log_likelihoods(HFLM(base, tokenizer=tokenizer, batch_size=2), pairs)
        assert abs(found[0][0] - dense[0][0]) > 1e-3
    finally:
        lm.variator.unload()


def test_a_t5_keeps_its_own_head_unless_hf_is_to_be_equalled(flan_t5_small):
    """lm-eval's hf ties the head of FLAN-T5 to its embeddings, which the checkpoint does not."""
    own, tied = (
        VariatorSeq2SeqLM(str(flan_t5_small), device="cpu", tie_head=tie).variator for tie in (False, True)
    )
    expected = load_file(flan_t5_small / "model.safetensors")
    assert torch.equal(own.base.lm_head.weight, expected["lm_head.weight"].to(own.base.dtype))
    assert torch.equal(tied.base.lm_head.weight, expected["shared.weight"].to(tied.base.dtype))
    for model in (own, tied):
        assert model.base.encoder.embed_tokens.weight is model.base.shared.weight
