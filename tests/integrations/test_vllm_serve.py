"""`python -m llm_variator.serve` over HTTP: choices, refusals, counters, and a server killed under load."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm.v1", reason="vllm is not installed here: make test-vllm")

import psutil
from vllm_engine import FFN, KEPT, expected, make_byte_model, make_plugin, reference_model

from llm_variator.serve.measure import main as measure
from llm_variator.sources.models import byte_tokenizer

CHOICES = (0, 2, 4, "kv8")
TEXT = "A long prompt of many words. " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plugins(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    merging = {f"k{k}": make_plugin(model, folder / f"k{k}", k, **FFN) for k in (2, 4)}
    return merging | {"kv8": make_plugin(model, folder / "kv8", 8, **KEPT)}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(model, plugins, port, folder):
    """A server on `port`, its temporary files under `folder`."""
    words = [sys.executable, "-m", "llm_variator.serve", "--model", model, "--port", str(port)]
    words += ["--plugin", *(f"{name}={plugin}" for name, plugin in plugins.items()), "--host", "127.0.0.1"]
    words += ["--dtype", "float32", "--", "--enforce-eager", "--max-model-len", "1024"]
    words += ["--max-num-batched-tokens", "64", "--max-num-seqs", "8", "--num-gpu-blocks-override", "200"]
    words += ["--block-size", "32", "--distributed-executor-backend", "uni", "--return-tokens-as-token-ids"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TMPDIR": str(folder)}
    process = subprocess.Popen(words, env=environment)
    try:
        deadline = time.monotonic() + 500
        while True:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def ask(url, model, k=None, **others):
    body = {
        "model": model,
        "prompt": TEXT,
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
    }
    body |= others | ({} if k is None else {"vllm_xargs": {"variator_k": k}})
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def folder():
    """A short path: sockets have names of at most 107 characters."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def left_behind(folder):
    """What a server keeps while it runs: its folder, sockets, shared memory."""
    sockets = [path.name for path in folder.rglob("*") if path.is_socket()]
    memory = {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("psm_", "vllm"))}
    return [path.name for path in folder.glob("variator-*")], sockets, memory


def test_served_over_http_killed_and_served_again(model, plugins, tmp_path, folder):
    port, memory = free_port(), left_behind(folder)[2]
    ids = byte_tokenizer()(TEXT)["input_ids"]
    wanted = dict(zip(CHOICES, expected(reference_model(model, plugins), [ids] * 4, CHOICES, 6), strict=True))
    with server(model, plugins, port, folder) as (process, url):
        for k in CHOICES:
            status, answer = ask(url, model, k)
            assert status == 200
            assert answer["kv_transfer_params"] == {"variator_k": k}
            tokens = answer["choices"][0]["logprobs"]["tokens"]
            assert [int(token.removeprefix("token_id:")) for token in tokens] == wanted[k]
        status, answer = ask(url, model, "auto")
        assert (status, answer["kv_transfer_params"]["variator_k"]) == (200, 0)
        for wrong in (3, "two", "kv2", 8, -2, [2], 2.5):
            status, answer = ask(url, model, wrong)
            assert status == 400
            assert "variator_k must be one of 0, 2, 4, kv8" in answer["error"]["message"]
        assert ask(url, model, 2, prompt_logprobs=1)[0] == 400
        with urllib.request.urlopen(f"{url}/metrics") as page:
            counted = [
                line for line in page.read().decode().splitlines() if line.startswith("variator_requests_t")
            ]
        assert sorted(counted) == [
            'variator_requests_total{k="0"} 2.0',
            'variator_requests_total{k="2"} 1.0',
            'variator_requests_total{k="4"} 1.0',
            'variator_requests_total{k="kv8"} 1.0',
        ]
        text = tmp_path / "text.txt"
        text.write_text(TEXT * 20)
        words = ["load", "--url", url, "--model", model, "--data", str(text), "--requests", "12"]
        words += ["--tokens", "90", "110"]
        measure([*words, "--choices", "0", "2", "auto", "--json", str(tmp_path / "load.json")])
        figures = json.loads((tmp_path / "load.json").read_text())["figures"]["choices"]
        assert [(row["answered"], row["failed"]) for row in figures.values()] == [(12, 0)] * 3
        assert figures["0"]["tokens_as_dense"] == 1.0
        assert figures["2"]["requests_by_ratio"]["2"] == 12
        assert sum(figures["auto"]["requests_by_ratio"].values()) == 12
        assert figures["auto"]["answers_unlike_every_fixed_ratio"] == 0

        # killed in the middle of its work: clients hear of it, nothing stays behind
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        outcomes = []

        def client():
            try:
                outcomes.append(ask(url, model, 2, max_tokens=600)[0])
            except OSError as error:
                outcomes.append(type(error).__name__)

        clients = [threading.Thread(target=client) for _ in range(6)]
        for each in clients:
            each.start()
        time.sleep(1)
        process.send_signal(signal.SIGKILL)
        for each in clients:
            each.join(120)
        assert len(outcomes) == 6
        assert 200 not in outcomes
        process.wait(60)
        _, alive = psutil.wait_procs(family[1:], timeout=120)
        assert not alive
        assert left_behind(folder)[1]  # a killed process removes nothing
        assert not listens(port)
    with server(model, plugins, port, folder) as (_, url):
        assert len(left_behind(folder)[0]) == 1  # the first server's are gone
        assert ask(url, model, 2)[1]["kv_transfer_params"] == {"variator_k": 2}
    assert left_behind(folder) == ([], [], memory)
    assert not listens(port)


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
