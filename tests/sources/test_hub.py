"""push_to_hub and from_pretrained against a hub of our own, in new processes: the client reads its settings once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_stub import TOKEN, running_hub

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
START = """
import time, torch
from conftest import make_variator, make_decoder, prompts
from llm_variator import VariatorConfig, VariatorError, VariatorModel
ids = prompts(20)[0]
def logits(model):
    with torch.no_grad():
        return model(ids).logits
def pushed():
    model = make_variator("llama", VariatorConfig(k=2, sites=("ffn", "kv"), r=4))
    return model, model.push_to_hub("someone/plugin-k2")
"""


def run(script: str, hub, cache: Path, **environment: str) -> str:
    """The output of a script in a fresh process that knows no hub but this one."""
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(cache),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", START + script],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cache), **settings, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


def test_a_plugin_travels_through_the_hub(hub, tmp_path):
    """Pushed, fetched by its id, fetched again from the cache with the hub gone; refused where it is no plugin."""
    hub.repos["someone/not-a-plugin"] = {"pytorch_model.bin": b"pickle"}
    out = run(
        """
model, address = pushed()
base = make_decoder("llama")
ours = VariatorModel.from_pretrained(base, "someone/plugin-k2", plugin_name="k2")
print(address, ours.active_plugin, torch.equal(logits(model), logits(ours)))
for name in ("someone/not-a-plugin", "someone/nothing"):
    try:
        ours.load_plugin(name, "other")
    except VariatorError as error:
        print(error)
""",
        hub,
        tmp_path,
    )
    assert f"{hub.endpoint}/someone/plugin-k2" in out
    assert "k2 True" in out
    assert out.count("could not be fetched") == 2
    assert set(hub.repos["someone/plugin-k2"]) == {
        "README.md",
        "variator.safetensors",
        "variator_config.json",
    }
    card = hub.repos["someone/plugin-k2"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: llm_variator\n")
    assert 'VariatorModel.from_pretrained("llama", "someone/plugin-k2")' in card
    assert not [path for path in hub.asked if "pytorch_model.bin" in path], "pickles are not even fetched"

    asked = len(hub.asked)
    out = run(
        """
ours = VariatorModel.from_pretrained(make_decoder("llama"), "someone/plugin-k2", plugin_name="k2")
print(list(ours.plugins))
""",
        hub,
        tmp_path,
        HF_HUB_OFFLINE="1",
    )
    assert "['k2']" in out
    assert len(hub.asked) == asked, "offline nothing is asked for"


def test_a_plugin_of_a_revision_in_a_subfolder(hub, tmp_path):
    """By arguments or in the name, from the hub and again from the cache; what is not there is named."""
    run("pushed()", hub, tmp_path)
    files = hub.repos["someone/plugin-k2"]
    config = json.loads(files["variator_config.json"])
    config["dense_tail"] = 7
    other = {**files, "variator_config.json": json.dumps(config).encode()}
    config["dense_tail"] = 9
    deep = {f"llama/k2/{name}": content for name, content in files.items()}
    deep["llama/k2/variator_config.json"] = json.dumps(config).encode()
    hub.past = {"v1": other, "v2": deep}
    fetch = """
ours = VariatorModel(make_decoder("llama"))
def load(name, **given):
    if "other" in ours.plugins:
        ours.delete_plugin("other")
    try:
        print(ours.load_plugin(name, "other", **given).config.dense_tail)
    except VariatorError as error:
        print(error)
load("someone/plugin-k2")
load("someone/plugin-k2", revision="v1")
load("someone/plugin-k2@v1")
load("someone/plugin-k2/llama/k2@v2")
load("someone/plugin-k2", revision="v2", subfolder="llama/k2")
print(VariatorModel.from_pretrained(ours.unload(), "someone/plugin-k2", revision="v2", subfolder="llama/k2").plugins)
"""
    wrong = 'load("someone/plugin-k2@v9")\nload("someone/plugin-k2/none@v1")'
    *out, no_revision, no_folder = run(fetch + wrong, hub, tmp_path).splitlines()
    assert out[:5] == ["1", "7", "7", "9", "9"]
    assert "dense_tail=9" in out[5]
    assert "repo 'someone/plugin-k2', revision 'v9': " in no_revision
    assert "subfolder 'none', revision 'v1': " in no_folder
    asked = len(hub.asked)
    assert run(fetch, hub, tmp_path, HF_HUB_OFFLINE="1").splitlines() == out
    assert len(hub.asked) == asked, "offline nothing is asked for"


def test_refusals_and_silence_end_with_one_clear_error(hub, tmp_path):
    hub.silent = "/api/repos/create"
    out = run(
        """
from llm_variator.sources.models import hub
hub.UPLOAD_SECONDS = 2.0
started = time.perf_counter()
try:
    pushed()
except VariatorError as error:
    print(error)
print("seconds", time.perf_counter() - started)
""",
        hub,
        tmp_path,
    )
    assert "cannot push to 'someone/plugin-k2': no answer within 2 s" in out
    assert float(out.rsplit("seconds ", 1)[1]) < 30

    hub.silent = None
    attempt = "\ntry:\n    pushed()\nexcept VariatorError as error:\n    print(error)\n"
    assert "hf auth login" in run(attempt, hub, tmp_path, HF_TOKEN="hf_wrong")
    started = time.perf_counter()
    assert "the hub does not answer" in run(attempt, hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert time.perf_counter() - started < 120
