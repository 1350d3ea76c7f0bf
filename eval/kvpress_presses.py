"""Measure kvpress's presses on the windows and questions of `python -m llm_variator.evaluate frontier --export`.

    make kvpress
    .venv-kvpress/bin/python eval/kvpress_presses.py --tasks tasks.json --model DIR --entries 0.5 --output presses.json

Runs in kvpress's own environment and imports nothing of llm_variator. `frontier --elsewhere presses.json` adds the
figures to its tables. A press reads the whole prompt densely, then keeps a share of its keys and values: so a prompt
is read once for all presses.

Presses are named as kvpress's classes without "Press"; AdaKV:NAME shares NAME's budget among the heads of a layer,
KVzap takes what eval/kvpress_kvzap.py fitted. AdaKV, KVzip and KVzap keep unlike numbers for the heads: kvpress then
only masks, all memory stays in use, and what is counted here is what they would hold. Their labels say "masked". The
mask here is an ordinary one for every head: kvpress's own, a key that no query may like, is not found for many queries.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import kvpress
import torch
import torch.nn.functional as F
from kvpress.presses.kvzap_press import KVzapModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

PRESSES = ("ExpectedAttention", "AdaKV:ExpectedAttention", "SnapKV", "KVzip", "TOVA")
OFFICIAL_TOKENS = 200
"""Of the first prompt: what `check_presses` reads as kvpress itself does, beside this program's way."""


def main() -> None:
    """Measure every press at every share of entries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tasks", type=Path, required=True, help="what frontier --export wrote")
    parser.add_argument("--model", type=Path, required=True, help="folder of the same weights")
    parser.add_argument("--output", type=Path, required=True, help="the file for frontier --elsewhere")
    parser.add_argument(
        "--entries", type=float, nargs="+", default=[0.5], help="shares of the prompt's entries kept"
    )
    parser.add_argument(
        "--presses", nargs="+", default=list(PRESSES), help="kvpress's classes without Press, or AdaKV:CLASS"
    )
    parser.add_argument(
        "--kvzap", type=Path, help="folder that eval/kvpress_kvzap.py wrote; for the press KVzap"
    )
    parser.add_argument(
        "--window", type=int, default=64, help="last tokens that KVzap keeps (its default is 128)"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="windows in one forward pass")
    args = parser.parse_args()
    tasks = json.loads(args.tasks.read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, trust_remote_code=False
    ).eval()
    for module in attentions(model):
        module.register_forward_pre_hook(mask_dropped, with_kwargs=True)
    if weights_of(model) != tasks["model"]["weights"]:
        parser.error(
            f"{args.model} holds other weights than {tasks['model']['name']} that the tasks were made with"
        )
    if "KVzap" in args.presses and args.kvzap is None:
        parser.error("the press KVzap needs --kvzap")
    check_dense(model, tasks, args.batch_size)
    ways = [way for name in args.presses for way in ways_of(name, args.entries, args.kvzap, args.window)]
    check_presses(model, ways, tasks)

    found = measure(model, ways, tasks, args.batch_size)
    result = {
        "digest": tasks["digest"],
        "conditions": found,
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
    }
    args.output.write_text(json.dumps(result) + "\n", encoding="utf-8")


@torch.inference_mode()
def measure(model: Any, ways: Sequence[Way], tasks: dict[str, Any], batch_size: int) -> list[dict[str, Any]]:
    """One condition per way: its label, and figures of every text and of the questions in every place."""
    texts = [
        on_windows(model, ways, text, dense["greedy"], tasks["generate"], batch_size)
        for text, dense in zip(tasks["texts"], tasks["dense"], strict=True)
    ]
    for text in texts:
        for way, found in zip(ways, text, strict=True):
            print(way.label, sum(found["nats"]) / len(found["nats"]), flush=True)
    places = {
        place: on_questions(model, ways, asked, tasks["questions"])
        for place, asked in tasks["questions"]["asked"].items()
    }
    for place, each in places.items():
        for way, found in zip(ways, each, strict=True):
            nats = [token for answer in found["nats"] for token in answer]
            print(place, way.label, sum(nats) / len(nats), flush=True)
    return [
        {
            "label": way.label,
            "texts": [text[number] for text in texts],
            "answers": {place: each[number] for place, each in places.items()},
        }
        for number, way in enumerate(ways)
    ]


def weights_of(model: Any) -> str:
    """The short hash by which llm_variator knows a base model."""
    sample = model.get_input_embeddings().weight.detach()[:64].to(torch.bfloat16).contiguous()
    return hashlib.sha256(sample.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


@torch.inference_mode()
def check_dense(model: Any, tasks: dict[str, Any], batch_size: int) -> None:
    """Stop unless both environments agree on the first text's dense cross-entropy."""
    for text, dense in zip(tasks["texts"][:1], tasks["dense"], strict=False):
        (ours,) = on_windows(model, [Whole()], text, dense["greedy"], 1, batch_size)
        if max(abs(a - b) for a, b in zip(ours["nats"], dense["nats"], strict=True)) > 1e-3:
            raise SystemExit(
                "error: the dense model gives other figures here; install the versions of the Makefile"
            )


@torch.inference_mode()
def check_presses(model: Any, ways: Sequence[Way], tasks: dict[str, Any]) -> None:
    """Stop unless presses leave here what they leave when kvpress attaches them to a model that reads."""
    first = [text["windows"][0][: text["context"]] for text in tasks["texts"]]
    first += [asked[0]["prompt"] for asked in tasks["questions"]["asked"].values()]
    ids = torch.tensor([first[0][:OFFICIAL_TOKENS]])
    prompt = Prompt.read(model, ids)
    for way in ways:
        if way.press is None:
            continue
        ours = way.press_on(model, prompt)
        masked = [module.dropped for module in attentions(model)]
        forget_dropped(model)
        cache = DynamicCache()
        with way.press(model):
            if isinstance(way.press, kvpress.KVzipPress):
                way.press.prefix_length = 0  # no chat template stands before these prompts
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        note_dropped(model, cache)
        same = True
        for a, b, before, module in zip(ours.layers, cache.layers, masked, attentions(model), strict=True):
            same &= torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
            here, there = (
                torch.zeros(a.keys.shape[:3], dtype=torch.bool) if each is None else each
                for each in (before, module.dropped)
            )
            same &= torch.equal(here, there)
        forget_dropped(model)
        if not same:
            raise SystemExit(f"error: {way.label} leaves another cache when kvpress attaches it")


# How a prompt is read, once, and what presses make of it


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Prompts (rows, n) that were read densely, with all that a press looks at."""

    ids: Tensor
    cache: Cache
    logits: Tensor
    """(rows, vocabulary) after the last token."""
    calls: list[dict[str, Any]]
    """Of each layer's attention, its keyword arguments."""

    @classmethod
    def read(cls, model: Any, ids: Tensor) -> Prompt:
        """One forward pass."""
        forget_dropped(model)
        calls: list[dict[str, Any]] = []
        handles = [
            module.register_forward_hook(
                lambda module, args, kwargs, output: calls.append(kwargs), with_kwargs=True
            )
            for module in attentions(model)
        ]
        cache = DynamicCache()
        try:
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        return cls(ids, cache, output.logits[:, -1], calls)


class Way(Protocol):
    """One press at one share of the entries."""

    label: str
    press: Any
    """kvpress's own; None where it has none."""
    rows: int | None
    """Prompts at once; None: any number."""

    def press_on(self, model: Any, prompt: Prompt) -> Cache:
        """A new cache of what is kept; what is only masked is noted on the model's attention, as `dropped`."""
        ...


@dataclasses.dataclass(frozen=True)
class Whole:
    """Everything is kept."""

    label: str = "dense"
    press: None = None
    rows: int | None = None

    def press_on(self, model: Any, prompt: Prompt) -> Cache:
        """The whole cache."""
        forget_dropped(model)
        return copy.deepcopy(prompt.cache)


@dataclasses.dataclass(frozen=True)
class Hooked:
    """A press that looks at one layer after the other: its own hook is called on a prompt that has been read."""

    label: str
    press: Any
    rows: int | None = None

    def press_on(self, model: Any, prompt: Prompt) -> Cache:
        """What kvpress's hook leaves."""
        forget_dropped(model)
        cache = copy.deepcopy(prompt.cache)
        self.press.post_init_from_model(model)
        for module, call in zip(attentions(model), prompt.calls, strict=True):
            module.rotary_emb = model.model.rotary_emb
            self.press.forward_hook(module, [], {**call, "past_key_values": cache}, [None, None])
        note_dropped(model, cache)
        return cache


class Zip(kvpress.KVzipPress):
    """KVzip that shows its scores. The prompts here are plain text: no chat template stands before them."""

    scores: Tensor
    _repeating: tuple[Any, Tensor] | None = None
    """Tokenizer, and what stands between "Repeat ..." and the repetition: loaded once."""

    def of(self, model: Any, prompt: Prompt) -> Tensor:
        """(layers, KV heads, n) scores of the prompt, from the model repeating it."""
        if self._repeating is None:
            with self(model):
                suffix = self._suffix_ids
            self._repeating = AutoTokenizer.from_pretrained(model.config.name_or_path), suffix
        tokenizer, self._suffix_ids = self._repeating
        for module in attentions(model):
            module.rotary_emb = model.model.rotary_emb
        self.prefix_length = 0
        self._context_ids, self._cache = prompt.ids, copy.deepcopy(prompt.cache)
        self._perform_kvzip_compression(model, tokenizer)
        self._reset_internal_parameters()
        return self.scores

    def compress_post(self, model: Any) -> None:
        """Keep the scores instead of masking by them."""
        self.scores = self.score_val[:, 0].clone()


@dataclasses.dataclass
class Ranked:
    """One ranking of a prompt's entries over all layers and heads; those below are masked, as KVzip does it."""

    label: str
    share: float
    scores: Callable[[Any, Prompt], Tensor]
    press: Any = None
    rows: int | None = 1

    def press_on(self, model: Any, prompt: Prompt) -> Cache:
        """The whole cache; the lowest entries are masked."""
        forget_dropped(model)
        scores = self.scores(model, prompt)  # (layers, heads, n)
        drop = int(scores.numel() * (1 - self.share))
        out = torch.zeros(scores.numel(), dtype=torch.bool)
        out[scores.flatten().topk(drop, largest=False).indices] = True
        for module, lost in zip(attentions(model), out.view_as(scores), strict=True):
            module.dropped = lost[None]
        return copy.deepcopy(prompt.cache)


def remembered(scores: Callable[[Any, Prompt], Tensor]) -> Callable[[Any, Prompt], Tensor]:
    """The same function, which is not called again for the prompt of its last call."""
    last: list[tuple[Prompt, Tensor]] = []

    def recall(model: Any, prompt: Prompt) -> Tensor:
        if not last or last[0][0] is not prompt:
            last[:] = [(prompt, scores(model, prompt))]
        return last[0][1]

    return recall


def zip_scores(sinks: int = 4) -> Callable[[Any, Prompt], Tensor]:
    """KVzip's, whose first tokens are never dropped."""
    press = Zip(compression_ratio=0.5)  # at 0 it would score nothing

    def scores(model: Any, prompt: Prompt) -> Tensor:
        found = press.of(model, prompt)
        found[..., :sinks] = torch.inf
        return found

    return scores


def zap_scores(folder: Path, window: int) -> Callable[[Any, Prompt], Tensor]:
    """Those of a fitted KVzap; the last tokens are never dropped."""
    fitted = KVzapModel.from_pretrained(folder).eval()

    def scores(model: Any, prompt: Prompt) -> Tensor:
        hidden = torch.stack([call["hidden_states"][0] for call in prompt.calls], dim=1)  # (n, layers, d)
        found: Tensor = fitted(hidden).permute(1, 2, 0).contiguous()
        found[..., -window:] = torch.inf
        return found

    return scores


def ways_of(name: str, shares: Sequence[float], kvzap: Path | None, window: int) -> list[Way]:
    """A press by name, at every share."""
    outer, _, inner = name.rpartition(":")
    if name in ("KVzip", "KVzap"):
        zips = name == "KVzip"
        scores = remembered(zip_scores() if zips else zap_scores(kvzap, window))  # type: ignore[arg-type]
        return [
            Ranked(
                f"{name} {100 * share:g}%, masked",
                share,
                scores,
                kvpress.KVzipPress(compression_ratio=1 - share) if zips else None,
            )
            for share in shares
        ]
    ways: list[Way] = []
    for share in shares:
        press = getattr(kvpress, f"{inner}Press")(compression_ratio=1 - share)
        label = f"{inner} {100 * share:g}%"
        if outer:
            press = getattr(kvpress, f"{outer}Press")(press)
            label = f"{outer} of {label}, masked"
        ways.append(Hooked(label, press))
    return ways


def attentions(model: Any) -> list[Any]:
    """The attention of every layer."""
    return [layer.self_attn for layer in model.model.layers]


def forget_dropped(model: Any) -> None:
    """Every entry counts again."""
    for module in attentions(model):
        module.dropped = module.masked_key_indices = None


def note_dropped(model: Any, cache: Cache) -> None:
    """Take over what a press wants masked: `dropped` (rows, KV heads, n) on every attention, or None."""
    for module, layer in zip(attentions(model), cache.layers, strict=True):
        module.dropped = None
        if module.masked_key_indices is not None:
            module.dropped = torch.zeros(layer.keys.shape[:3], dtype=torch.bool)
            module.dropped[tuple(module.masked_key_indices)] = True
            module.masked_key_indices = None


def mask_dropped(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pre-hook of an attention: what is dropped is hidden from tokens that follow the prompt. None is padded."""
    if getattr(module, "dropped", None) is None:
        return args, kwargs
    rows, heads, prompt = module.dropped.shape
    new = kwargs["hidden_states"].shape[1]
    total = kwargs["past_key_values"].layers[module.layer_idx].keys.shape[2] + new
    seen = torch.ones(rows, heads, new, total, dtype=torch.bool).tril(total - new)
    seen[..., :prompt] &= ~module.dropped[:, :, None]
    groups = module.config.num_attention_heads // heads
    return args, {**kwargs, "attention_mask": seen.repeat_interleave(groups, dim=1)}


def held(model: Any, cache: Cache) -> tuple[float, float]:
    """Entries of one row, summed over the layers, heads by their mean, and their bytes; masked ones are not held."""
    entries = size = 0.0
    for module, layer in zip(attentions(model), cache.layers, strict=True):
        rows, heads, tokens, _ = layer.keys.shape
        lost = 0 if module.dropped is None else int(module.dropped.sum())
        share = 1 - lost / (rows * heads * tokens)
        entries += share * tokens
        size += share * (layer.keys.nbytes + layer.values.nbytes) / rows
    return entries, size


# What is measured


def follow(model: Any, cache: Cache, position: int, ids: Tensor) -> Tensor:
    """Logits (rows, t, vocabulary) of tokens that begin at `position`."""
    positions = torch.arange(position, position + ids.shape[1])[None]
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True, position_ids=positions).logits
    return logits


def after(model: Any, cache: Cache, first: Tensor, position: int, tokens: Tensor) -> Tensor:
    """Logits (rows, t, vocabulary) that predict `tokens` (rows, t); `first` are those before them."""
    if tokens.shape[1] == 1:
        return first[:, None]
    return torch.cat((first[:, None], follow(model, cache, position, tokens[:, :-1])), dim=1)


def greedy(
    model: Any, cache: Cache, logits: Tensor, position: int, tokens: int, stop: frozenset[int]
) -> Tensor:
    """The likeliest tokens (rows, tokens); of one row they end with the first that stops."""
    chosen = [logits.argmax(-1, keepdim=True)]
    while len(chosen) < tokens and not (stop and int(chosen[-1]) in stop):
        logits = follow(model, cache, position + len(chosen) - 1, chosen[-1])[:, -1]
        chosen.append(logits.argmax(-1, keepdim=True))
    return torch.cat(chosen, dim=1)


def on_windows(
    model: Any,
    ways: Sequence[Way],
    text: dict[str, Any],
    dense: list[list[int]],
    generate: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Cross-entropy, greedy tokens and agreement of every window, and what is held; one item per way."""
    context, windows, reference = text["context"], torch.tensor(text["windows"]), torch.tensor(dense)
    found: list[dict[str, Any]] = [{"nats": [], "greedy": [], "same_choice": []} for _ in ways]
    for at_once in dict.fromkeys(way.rows for way in ways):
        size = at_once or max(1, batch_size * 512 // max(context, 512))
        for rows, theirs in zip(windows.split(size), reference.split(size), strict=True):
            prompt = Prompt.read(model, rows[:, :context])
            for way, one in zip(ways, found, strict=True):
                if way.rows != at_once:
                    continue
                cache, first = way.press_on(model, prompt), prompt.logits
                one["entries"], one["bytes"] = held(model, cache)
                one["greedy"] += greedy(
                    model, copy.deepcopy(cache), first, context, generate, frozenset()
                ).tolist()
                chosen = after(model, copy.deepcopy(cache), first, context, theirs).argmax(-1)
                one["same_choice"] += (chosen == theirs).double().mean(1).tolist()
                targets = rows[:, context:]
                logits = after(model, cache, first, context, targets)
                one["nats"] += [F.cross_entropy(*pair).item() for pair in zip(logits, targets, strict=True)]
    return found


def on_questions(
    model: Any, ways: Sequence[Way], asked: list[dict[str, Any]], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Nats of the gold answers, greedy answers and what is held of every prompt; one item per way."""
    found: list[dict[str, Any]] = [{"tokens": [], "nats": [], "entries": [], "bytes": []} for _ in ways]
    stop = frozenset(about["stop"])
    for number, question in enumerate(asked):
        prompt = Prompt.read(model, torch.tensor([question["prompt"]]))
        gold = torch.tensor([question["gold"]])
        for way, one in zip(ways, found, strict=True):
            cache, first, position = way.press_on(model, prompt), prompt.logits, prompt.ids.shape[1]
            entries, size = held(model, cache)
            if question["after"]:
                rest = torch.tensor([question["after"]])
                first = follow(model, cache, position, rest)[:, -1]
                position += rest.shape[1]
            logits = after(model, copy.deepcopy(cache), first, position, gold)[0]
            one["nats"].append(F.cross_entropy(logits, gold[0], reduction="none").tolist())
            one["tokens"] += greedy(model, cache, first, position, about["tokens"], stop).tolist()
            one["entries"].append(entries)
            one["bytes"].append(size)
        if number % 10 == 9:
            print(f"{number + 1} of {len(asked)} questions", flush=True)
    return found


if __name__ == "__main__":
    main()
