"""The load measurement without a server: arrivals, quantiles and what is said of answers."""

from __future__ import annotations

import asyncio
import json

import pytest
from tiny import model_folder
from tiny_tasks import write_tasks

from llm_variator import VariatorError
from llm_variator.serve.load import (
    Answer,
    Load,
    _ask,
    _compared,
    _shared,
    _summary,
    arrivals,
    measure_load,
    quantile,
)
from llm_variator.serve.measure import Prefill, main, read
from llm_variator.serve.prompts import QUESTIONS, Asked, prompts_from
from llm_variator.sources.models import load_tokenizer


def test_arrivals_rise_to_the_peak():
    times = arrivals(20_000, 0.5, 10.0)
    assert times == sorted(times)
    # the rate is linear in time, so 20,000 requests take 20,000 / 5.25 seconds
    assert times[-1] == pytest.approx(20_000 / 5.25, rel=0.02)
    end = times[-1]
    rates = [sum(a <= t < b for t in times) / (b - a) for a, b in ((0, end / 10), (end * 0.9, end))]
    assert rates == pytest.approx([0.5 + 0.95 / 2, 10 - 0.95 / 2], rel=0.1)
    assert arrivals(5, 0.5, 10.0) == arrivals(5, 0.5, 10.0)


def test_settings_from_flags_and_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("choices: [0, auto]\ntokens: [30, 50]\npolicy: {target_seconds: 0.5}\n")
    words = [
        "load",
        "--config",
        str(recipe),
        "--tokens",
        "40",
        "--plugin",
        "k2=a",
        "k4=b",
        "--",
        "--port",
        "1",
    ]
    settings = Load(
        choices=(0, "auto"), tokens=(40,), policy={"target_seconds": 0.5}, plugin=("k2=a", "k4=b")
    )
    assert read(words) == settings
    assert read(["load", "--choices", "0", "kv4", "auto"]).choices == (0, "kv4", "auto")
    assert read(["prefill", "--k", "2", "--sites", "ffn"]) == Prefill(k=(2,), sites=("ffn",))
    with pytest.raises(
        VariatorError, match="--choices: expected 0, a ratio, a name \\(kv4\\) or \"auto\", got 'two'"
    ):
        read(["load", "--choices", "0", "two"])
    with pytest.raises(VariatorError, match="--requests"):
        read(["prefill", "--requests", "3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["load", "--peak", "0.1"], "--peak is where arrivals rise to from 0.1: give more, not 0.1"),
        (
            ["load", "--url", "http://a", "--policy", "{}", "--log", "f"],
            "--policy, --log: of a server that is started",
        ),
        (
            ["load", "--url", "http://a", "--", "--enforce-eager"],
            "--enforce-eager: of a server that is started",
        ),
        (["prefill", "--", "--enforce-eager"], "--enforce-eager: words after -- are a server's"),
    ],
)
def test_flags_that_nothing_would_read(words, message):
    with pytest.raises(VariatorError, match=message):
        main(words)


def test_earlier_runs_with_other_settings_are_refused_before_a_server_starts(tmp_path):
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"figures": {"settings": {"model": "m", "peak": 2.0}, "choices": {}}}))
    words = ["--model", "m", "--data", "d", "--requests", "3", "--tokens", "4", "--max-tokens", "5"]
    settings = read(["load", *words, "--peak", "3", "--earlier", str(earlier), "--", "--enforce-eager"])
    with pytest.raises(VariatorError, match=r"other settings: data, requests, .*peak, server_flags"):
        measure_load(settings, {}, ["--enforce-eager"])


def test_answers_of_an_earlier_run_are_judged_anew(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("words and words " * 400)
    words = [
        "load",
        "--model",
        model_folder(),
        "--data",
        str(text),
        "--requests",
        "3",
        "--tokens",
        "30",
        "--choices",
    ]
    shared = _shared(read(words), [])
    rows = {
        "0": {"answers": ["1 2", "3 4", "5 6"]},
        "auto": {"answers": ["1 2", "3 9", "5 6"], "tokens_as_dense": 9},
    }
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"figures": {"settings": shared, "arriving_seconds": 7, "choices": rows}}))
    found = measure_load(read([*words, "--earlier", str(earlier)]), {}, [])
    assert (found["arriving_seconds"], found["settings"]) == (7, shared)
    assert found["choices"]["auto"]["tokens_as_dense"] == 5 / 6
    assert found["choices"]["auto"]["answers_unlike_every_fixed_ratio"] == 1
    with pytest.raises(VariatorError, match="nothing to do: give --choices"):
        measure_load(read(words), {}, [])
    earlier.write_text(json.dumps({"figures": {"rows": []}}))
    with pytest.raises(VariatorError, match="is no result of this command"):
        measure_load(read([*words, "--earlier", str(earlier)]), {}, [])


def test_choices_that_were_measured_outlive_the_server(tmp_path, monkeypatch):
    aiohttp = pytest.importorskip("aiohttp")
    text = tmp_path / "text.txt"
    text.write_text("words and words " * 400)
    words = ["load", "--model", model_folder(), "--data", str(text), "--requests", "3", "--tokens", "30"]
    good = {"answers": ["1 2", "3 4", "5 6"]}

    async def run(session, settings, prompts, offsets, choice):
        if choice == 4:
            raise aiohttp.ServerDisconnectedError
        return dict(good)

    async def sustained(*args):
        return 1.0

    monkeypatch.setattr("llm_variator.serve.load._run", run)
    monkeypatch.setattr("llm_variator.serve.load._sustained", sustained)
    url = ["--url", "http://127.0.0.1:9", "--choices"]
    found = measure_load(read([*words, *url, "0", "2", "4", "auto"]), {}, [])
    assert list(found["choices"]) == ["0", "2"]
    assert found["choices"]["2"]["tokens_as_dense"] == 1
    assert found["stopped"].startswith("at 4: ServerDisconnectedError")
    with pytest.raises(VariatorError, match="the server was lost at 4"):
        measure_load(read([*words, *url, "4"]), {}, [])


def test_no_request_finds_what_another_left_in_the_server(monkeypatch):
    bodies = []

    class Session:
        def post(self, path, json):
            bodies.append(json)
            raise OSError

    settings = read(["load", "--model", "m"])
    for _ in range(2):
        assert asyncio.run(_ask(Session(), settings, [1, 2], 0)).error
    assert len({body["cache_salt"] for body in bodies}) == 2


def test_quantile():
    values = list(range(1, 101))
    assert [quantile(values, q) for q in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert quantile([3.0], 0.5) == 3.0


def test_failures_are_counted_and_do_not_wait():
    answers = [Answer(i, float(i), i + 1.0, [1], "") for i in range(7)]
    answers += [Answer(7, None, 1.0, [], "HTTP 500"), Answer(8, 9.0, 1.0, [1], "1 tokens")]
    figures = _summary(answers, wall=14.0)
    assert (figures["answered"], figures["failed"], figures["errors"]) == (7, 2, ["1 tokens", "HTTP 500"])
    assert figures["requests_per_second"] == 0.5
    assert (figures["first_token_p50"], figures["first_token_p99"]) == (3.0, 6.0)
    assert figures["peak_first_token_p99"] == 6.0  # of the last quarter, one answer is good


def test_answers_are_compared():
    known = {
        "0": {"answers": ["1 2", "3 4", "5 6"]},
        "2": {"answers": ["1 9", "8 4", "5 6"]},
        "auto": {"answers": ["7 7"] * 3},
    }
    assert _compared(2, known["2"], known) == {"tokens_as_dense": 4 / 6, "first_tokens_as_dense": 2 / 3}
    found = _compared("auto", {"answers": ["1 9", "3 4", "5 7"]}, known)
    assert found["answers_unlike_every_fixed_ratio"] == 1
    assert found["fixed_ratios"] == ["0", "2"]


def prompts(source: str, count: int, lengths: tuple[int, int], max_tokens: int = 8) -> Asked:
    return prompts_from(source, model_folder(), count=count, lengths=lengths, seed=0, max_tokens=max_tokens)


def test_prompts_are_distinct_stretches_of_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(str(number) for number in range(2000)))
    asked = prompts(str(file), 20, (30, 50))
    assert asked.judge is None
    assert len(asked.prompts) == len({tuple(prompt[:4]) for prompt in asked.prompts}) == 20
    assert {len(prompt) for prompt in asked.prompts} <= set(range(30, 51))
    assert len({len(prompt) for prompt in asked.prompts}) > 3
    with pytest.raises(VariatorError, match="cannot be cut"):
        prompts(str(file), 20, (30, 50_000))


def test_answers_to_questions_are_judged(tmp_path, monkeypatch):
    write_tasks(tmp_path, "squad", validation=8)
    monkeypatch.setenv("VARIATOR_DATA", str(tmp_path))
    asked = prompts(QUESTIONS, 6, (20, 2000), max_tokens=24)
    lengths = sorted(map(len, asked.prompts))
    tokenizer = load_tokenizer(model_folder())
    assert all(tokenizer.decode(prompt).endswith("Answer:") for prompt in asked.prompts)
    # the right answer is the first word of each passage
    gold = [tokenizer.decode(prompt).split("\n\n")[-1].split()[1] for prompt in asked.prompts]
    right = [tokenizer(f" {word}\nmore", add_special_tokens=False)["input_ids"] for word in gold]
    right[0] = [*right[0][:-5], tokenizer.eos_token_id, *right[0]]  # what comes after the end does not count
    wrong = [tokenizer(" nothing", add_special_tokens=False)["input_ids"]] * 6
    assert asked.judge(right, None) == {"exact_match": 100.0, "f1": 100.0}
    half = asked.judge(right[:3] + wrong[3:], right)
    assert (half["exact_match"], half["f1"], half["f1_above_dense"]) == (50.0, 50.0, -50.0)
    assert half["f1_above_dense_error"] == pytest.approx(
        50 * (6 / 5) ** 0.5 / 6**0.5
    )  # of +-50 about the mean
    assert asked.judge([[]] * 6, right)["f1"] == 0.0  # what was not answered
    # prompts outside the range are passed over
    kept = prompts(QUESTIONS, 2, (lengths[-2], lengths[-1]), max_tokens=24).prompts
    assert all(lengths[-2] <= len(prompt) <= lengths[-1] for prompt in kept)
    with pytest.raises(VariatorError, match=r"only 0 of 4 questions .* widen --tokens"):
        prompts(QUESTIONS, 1, (1, 2), max_tokens=24)
    with pytest.raises(VariatorError, match="raise --max-tokens 8"):
        prompts(QUESTIONS, 1, (20, 2000))
