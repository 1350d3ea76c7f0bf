"""Mixed calls for a long time: memory stays flat."""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics

import psutil
import torch
from conftest import make_decoder, make_variator, pad, prompts, randomise

from llm_variator import CompressedContext, VariatorConfig, VariatorError
from llm_variator.engine.cache.paging import KVPool

WARM_UP = 0.25  # of the calls
EVERY = 20  # calls between two looks at the memory
TOLERANCE = 0.02
KEPT = VariatorConfig(
    k={"ffn": 2, "kv": 4},
    sites=("ffn", "kv"),
    compressor={"ffn": "weighted", "kv": "select"},
    k_per_head=((2, 4), (4, 1)),
    block=4,
    r=4,
    dense_tail=2,
)


SHORT = dict(max_new_tokens=6, do_sample=False)
CALLS = [
    "generate",
    "generate",
    "train",
    "train",
    "swap",
    "swap",
    "beams",
    "talk",
    "store",
    "scope",
    "reload",
]
CALLS += ["guess", "take_back"]


class Work:
    """A model in use: every method is one call that a server or a trainer would make."""

    def __init__(self, folder) -> None:
        self.random = random.Random(0)
        self.folder = folder
        self.model = make_variator(
            "llama", VariatorConfig(k=2, sites=("ffn", "kv"), r=4), num_hidden_layers=2
        )
        others = {"k3": VariatorConfig(k=3, sites=("ffn",), r=4), "kept": KEPT}
        others["ages"] = dataclasses.replace(KEPT, decode_block=4)
        for seed, (name, config) in enumerate(others.items(), 2):
            randomise(self.model.add_plugin(name, config), seed=seed)
        self.model.save_pretrained(folder / "plugin")
        self.assistant = make_decoder("llama", num_hidden_layers=1)
        self.pool = KVPool(blocks=512, block_size=8)
        self.optimiser = torch.optim.Adam(self.model.plugin("default").parameters(), lr=1e-4)

    def ids(self) -> torch.Tensor:
        return prompts(self.random.randint(1, 60), seed=self.random.randrange(99))[0]

    def generate(self) -> None:
        batch = pad([self.ids() for _ in range(self.random.randint(1, 3))], "left")
        self.model.generate(**batch, max_new_tokens=self.random.randint(1, 6), do_sample=False)

    def beams(self) -> None:
        self.model.generate(self.ids(), max_new_tokens=3, num_beams=2)

    def talk(self) -> None:
        pool, chunk = self.random.choice([None, self.pool]), self.random.choice([None, 7])
        rows = self.random.randint(1, 3)
        documents, questions = ([self.ids()[0].tolist() for _ in range(rows)] for _ in range(2))
        context = self.model.compress(documents, pool=pool, prefill_chunk_size=chunk)
        self.model.generate(questions, context=context, max_new_tokens=2, prefill_chunk_size=chunk)
        context.free()

    def store(self) -> None:
        context, file = self.model.compress(self.ids()), self.folder / "context.safetensors"
        if self.random.random() < 0.5:
            context = context.quantised(self.random.choice([4, 8]))
        try:
            context.save(file)
        except VariatorError:
            assert self.model.active_plugin == "ages"
            return
        loaded, question = CompressedContext.load(file, self.model), self.ids()
        answers = [self.model.generate(question, context=each, **SHORT) for each in (context, loaded)]
        assert torch.equal(*answers)

    def take_back(self) -> None:
        count, more = self.random.randint(1, 6), prompts(6)[0]
        with self.model.use_plugin("kept"), torch.no_grad():
            cache = self.model(self.ids(), use_cache=True).past_key_values
            held = [layer.counts for layer in cache.layers]
            self.model(more[:, :count], prompt_length=0, past_key_values=cache)
            cache.crop(-count)
        assert [layer.counts for layer in cache.layers] == held

    def swap(self) -> None:
        self.model.set_plugin(self.random.choice([*self.model.plugins, None]))

    def scope(self) -> None:
        with self.model.use_plugin("k3"), self.model.disable_plugin(), torch.no_grad():
            self.model(self.ids())

    def reload(self) -> None:
        self.model.load_plugin(self.folder / "plugin", "loaded")
        with self.model.use_plugin("loaded"):
            self.model.generate(self.ids(), max_new_tokens=1)
        self.model.delete_plugin("loaded")

    def guess(self) -> None:
        guesses = self.random.choice([dict(prompt_lookup_num_tokens=2), dict(assistant_model=self.assistant)])
        ids = self.ids()
        try:
            found = self.model.generate(ids, **guesses, **SHORT)
        except ValueError:
            assert self.model.active_plugin in ("default", "k3", "ages") or ids.shape[1] < 2
            return
        assert torch.equal(found, self.model.generate(ids, **SHORT))

    def train(self) -> None:
        (ids,) = prompts(self.random.randint(12, 60))
        with self.model.disable_plugin(), torch.no_grad():
            wanted = self.model(ids).logits
        self.model.train()
        with self.model.use_plugin("default"):
            loss = (self.model(ids).logits - wanted).square().mean()
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.model.eval()

    def call(self) -> str:
        name = self.random.choice(CALLS)
        getattr(self, name)()
        return name


def test_memory_stays_flat(request, figures, tmp_path):
    calls = request.config.getoption("calls") or 80
    work, process = Work(tmp_path), psutil.Process()
    made: dict[str, int] = {}
    memory, tensors = [], []
    for call in range(calls):
        name = work.call()
        made[name] = made.get(name, 0) + 1
        if call >= WARM_UP * calls and call % EVERY == 0:
            gc.collect()
            memory.append(process.memory_info().rss)
            tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    third = max(1, len(memory) // 3)
    first, last = (statistics.median(part) for part in (memory[:third], memory[-third:]))
    figures |= {
        "calls": calls,
        "calls by kind": made,
        "rss_mib after warm-up": first / 2**20,
        "rss_mib at the end": last / 2**20,
        "rss_mib highest": max(memory) / 2**20,
        "growth": last / first - 1,
        "blocks in use at the end": work.pool.report().used,
        "live tensors": [min(tensors), max(tensors)],
    }
    assert max(memory) <= (1 + TOLERANCE) * first, figures
    assert work.pool.report().used == 0
    # the optimiser's state comes with its first step, a report with the first compressed call
    assert tensors[-1] <= tensors[len(tensors) // 2], figures
