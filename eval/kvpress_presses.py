"""Measure kvpress's presses on the windows and questions of `python -m llm_variator.evaluate frontier --export`.

    make kvpress
    .venv-kvpress/bin/python eval/kvpress_presses.py --tasks tasks.json --model DIR --entries 0.5 --output presses.json

Runs in kvpress's own environment and imports nothing of llm_variator. `frontier --elsewhere presses.json` adds the
figures to its tables. A press reads the whole prompt densely, then keeps a share of its keys and values: so a prompt
is read once for all presses. A run that was stopped goes on where it was: at a text, or at the questions of one place.

Presses are named as kvpress's classes without "Press", settings behind a comma (ExpectedAttention,epsilon=0.01);
AdaKV:NAME shares NAME's budget among the heads of a layer, KVzap takes what eval/kvpress_kvzap.py fitted. AdaKV, KVzip
and KVzap keep unlike numbers for the heads: kvpress then only masks, all memory stays in use, and what is counted here
is what they would hold. Their labels say "masked". The mask here is an ordinary one for every head: kvpress's own, a
key that no query may like, is not found for many queries.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
    args.output.parent.mkdir(parents=True, exist_ok=True)
    tasks = json.loads(args.tasks.read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, trust_remote_code=False
    ).eval()
    if weights_of(model) != tasks["model"]["weights"]:
        parser.error(
            f"{args.model} holds other weights than {tasks['model']['name']} that the tasks were made with"
        )
    if "KVzap" in args.presses and args.kvzap is None:
        parser.error("the press KVzap needs --kvzap")
    for module in attentions(model):
        module.masked_key_indices = None
    check_dense(model, tasks, args.batch_size)
    ways = [way for name in args.presses for way in ways_of(name, args.entries, args.kvzap, args.window)]
    check_presses(model, ways, tasks)

    kvzap = kvzap_settings(args.kvzap, args.window) if "KVzap" in args.presses else None
    result = begun(args.output, tasks["digest"], [way.label for way in ways], kvzap)
    for part in measure(model, ways, tasks, args.batch_size, result["conditions"][0]):
        for condition, found in zip(result["conditions"], part, strict=True):
            condition["texts"] += found.get("texts", [])
            condition["answers"] |= found.get("answers", {})
        args.output.write_text(json.dumps(result) + "\n", encoding="utf-8")


def kvzap_settings(folder: Path, window: int) -> str:
    """What of KVzap its label does not say: its fit, by the contents of its files, and its window."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    fit = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    return f"{fit}, window {window}"


def begun(path: Path, digest: str, labels: list[str], kvzap: str | None) -> dict[str, Any]:
    """What a run that was stopped has measured of the same tasks with the same presses; else nothing yet."""
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    if path.is_file():
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = before["digest"] == digest and before["versions"] == versions and before.get("kvzap") == kvzap
        if same and [one["label"] for one in before["conditions"]] == labels:
            return before
    return {
        "digest": digest,
        "versions": versions,
        "kvzap": kvzap,
        "conditions": [{"label": label, "texts": [], "answers": {}} for label in labels],
    }


def measure(
    model: Any, ways: Sequence[Way], tasks: dict[str, Any], batch_size: int, done: dict[str, Any]
) -> Iterator[list[dict[str, Any]]]:
    """Figures of one text, or of the questions in one place, after the other: for every way a part of its condition.

    `done` is a condition as far as it was measured before.
    """
    first = len(done["texts"])
    for text, dense in zip(tasks["texts"][first:], tasks["dense"][first:], strict=True):
        each = on_windows(model, ways, text, dense["greedy"], tasks["generate"], batch_size)
        for way, found in zip(ways, each, strict=True):
            print(text["data"], way.label, sum(found["nats"]) / len(found["nats"]), flush=True)
        yield [{"texts": [found]} for found in each]
    for place in [place for place in tasks["questions"]["asked"] if place not in done["answers"]]:
        asked = tasks["questions"]["asked"][place]
        each = on_questions(model, ways, asked, tasks["questions"])
        for way, found in zip(ways, each, strict=True):
            nats = [token for answer in found["nats"] for token in answer]
            print(place, way.label, sum(nats) / len(nats), flush=True)
        yield [{"answers": {place: found}} for found in each]


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
        cache = DynamicCache()
        with way.press(model):
            if isinstance(way.press, kvpress.KVzipPress):
                way.press.prefix_length = 0  # no chat template stands before these prompts
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        theirs = Kept.of(model, cache)
        same = all(map(torch.equal, ours.dropped, theirs.dropped))
        for a, b in zip(ours.cache.layers, theirs.cache.layers, strict=True):
            same &= torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
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

    def rows(self) -> Iterator[Prompt]:
        """Each alone, for `Zip`, which needs no `calls`."""
        for row in range(len(self.ids)):
            cache = copy.deepcopy(self.cache)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[row : row + 1], layer.values[row : row + 1]
            yield Prompt(self.ids[row : row + 1], cache, self.logits[row : row + 1], [])


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a press leaves of prompts."""

    cache: Cache
    dropped: list[Tensor]
    """Of each layer (rows, KV heads, entries of the cache): which are masked, where kvpress frees no memory."""

    @classmethod
    def of(cls, model: Any, cache: Cache) -> Kept:
        """`cache`, without what a press has noted on the model's attention to be masked: it is taken off there."""
        dropped = []
        for module, layer in zip(attentions(model), cache.layers, strict=True):
            dropped.append(torch.zeros(layer.keys.shape[:3], dtype=torch.bool))
            if module.masked_key_indices is not None:
                dropped[-1][tuple(module.masked_key_indices)] = True
                module.masked_key_indices = None
        return cls(cache, dropped)

    @classmethod
    def join(cls, parts: Sequence[Kept]) -> Kept:
        """Rows of several, all of as many entries."""
        cache = copy.deepcopy(parts[0].cache)
        for number, layer in enumerate(cache.layers):
            layer.keys = torch.cat([part.cache.layers[number].keys for part in parts])
            layer.values = torch.cat([part.cache.layers[number].values for part in parts])
        return cls(
            cache, [torch.cat(layers) for layers in zip(*(part.dropped for part in parts), strict=True)]
        )

    def clone(self) -> Kept:
        """The same again, to be continued in another way."""
        return Kept(copy.deepcopy(self.cache), self.dropped)

    def held(self) -> tuple[float, float]:
        """Entries of one row, summed over the layers, heads by their mean; their bytes. Masked ones are not held."""
        entries = size = 0.0
        for layer, dropped in zip(self.cache.layers, self.dropped, strict=True):
            rows, heads, _, width = layer.keys.shape
            kept = int((~dropped).sum())
            entries += kept / (rows * heads)
            size += kept * 2 * width * layer.keys.element_size() / rows
        return entries, size

    @contextlib.contextmanager
    def masking(self, model: Any) -> Iterator[None]:
        """What is dropped is hidden from the tokens that follow; none is padded."""

        def hide(dropped: Tensor, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            rows, heads, prompt = dropped.shape
            new = kwargs["hidden_states"].shape[1]
            total = kwargs["past_key_values"].layers[module.layer_idx].keys.shape[2] + new
            seen = torch.ones(rows, heads, new, total, dtype=torch.bool).tril(total - new)
            seen[..., :prompt] &= ~dropped[:, :, None]
            groups = module.config.num_attention_heads // heads
            return args, {**kwargs, "attention_mask": seen.repeat_interleave(groups, dim=1)}

        handles = [
            module.register_forward_pre_hook(partial(hide, dropped), with_kwargs=True)
            for module, dropped in zip(attentions(model), self.dropped, strict=True)
            if dropped.any()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Way(Protocol):
    """One press at one share of the entries."""

    label: str
    press: Any
    """kvpress's own; None where it has none."""

    def press_on(self, model: Any, prompt: Prompt) -> Kept:
        """What is kept of the prompts, which stay as they are."""
        ...


@dataclasses.dataclass(frozen=True)
class Whole:
    """Everything is kept."""

    label: str = "dense"
    press: None = None

    def press_on(self, model: Any, prompt: Prompt) -> Kept:
        """The whole cache."""
        return Kept.of(model, copy.deepcopy(prompt.cache))


@dataclasses.dataclass(frozen=True)
class Hooked:
    """A press that looks at one layer after the other: its own hook is called on a prompt that has been read."""

    label: str
    press: Any

    def press_on(self, model: Any, prompt: Prompt) -> Kept:
        """What kvpress's hook leaves."""
        cache = copy.deepcopy(prompt.cache)
        self.press.post_init_from_model(model)
        for module, call in zip(attentions(model), prompt.calls, strict=True):
            module.rotary_emb = model.model.rotary_emb
            self.press.forward_hook(module, [], {**call, "past_key_values": cache}, [None, None])
        return Kept.of(model, cache)


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
            self._repeating = (
                AutoTokenizer.from_pretrained(model.config.name_or_path, trust_remote_code=False),
                suffix,
            )
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

    def press_on(self, model: Any, prompt: Prompt) -> Kept:
        """The whole cache; of each prompt the lowest entries are masked."""
        scores = self.scores(model, prompt)  # (rows, layers, heads, n)
        drop = int(scores[0].numel() * (1 - self.share))
        lowest = scores.flatten(1).topk(drop, largest=False).indices
        dropped = torch.zeros(scores.flatten(1).shape, dtype=torch.bool).scatter_(1, lowest, True)
        return Kept(copy.deepcopy(prompt.cache), list(dropped.view_as(scores).unbind(1)))


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
        found = torch.stack([press.of(model, row) for row in prompt.rows()])
        found[..., :sinks] = torch.inf
        return found

    return scores


def zap_scores(folder: Path, window: int) -> Callable[[Any, Prompt], Tensor]:
    """Those of a fitted KVzap; the last tokens are never dropped."""
    fitted = KVzapModel.from_pretrained(folder).eval()

    def scores(model: Any, prompt: Prompt) -> Tensor:
        hidden = torch.stack([call["hidden_states"].flatten(0, 1) for call in prompt.calls], dim=1)
        found: Tensor = fitted(hidden).unflatten(0, prompt.ids.shape)  # (rows, n, layers, heads)
        found = found.permute(0, 2, 3, 1).contiguous()
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
    inner, *settings = inner.split(",")
    values = {key: float(value) for key, value in (setting.split("=") for setting in settings)}
    ways: list[Way] = []
    for share in shares:
        press = getattr(kvpress, f"{inner}Press")(compression_ratio=1 - share, **values)
        label = f"{' '.join([inner, *settings])} {100 * share:g}%"
        if outer:
            press = getattr(kvpress, f"{outer}Press")(press)
            label = f"{outer} of {label}, masked"
        ways.append(Hooked(label, press))
    return ways


def attentions(model: Any) -> list[Any]:
    """The attention of every layer."""
    return [layer.self_attn for layer in model.model.layers]


# What is measured


def follow(model: Any, kept: Kept, position: int, ids: Tensor) -> Tensor:
    """Logits (rows, t, vocabulary) of tokens that begin at `position`; the cache grows by them."""
    positions = torch.arange(position, position + ids.shape[1])[None]
    with kept.masking(model):
        output = model(ids, past_key_values=kept.cache, use_cache=True, position_ids=positions)
    logits: Tensor = output.logits
    return logits


def after(model: Any, kept: Kept, first: Tensor, position: int, tokens: Tensor) -> Tensor:
    """Logits (rows, t, vocabulary) that predict `tokens` (rows, t); `first` are those before them."""
    if tokens.shape[1] == 1:
        return first[:, None]
    return torch.cat((first[:, None], follow(model, kept, position, tokens[:, :-1])), dim=1)


def greedy(
    model: Any, kept: Kept, logits: Tensor, position: int, tokens: int, stop: set[int]
) -> list[list[int]]:
    """The likeliest tokens of each row; they end with the first that stops."""
    chosen = [logits.argmax(-1, keepdim=True)]
    ends = torch.tensor(sorted(stop), dtype=torch.long)
    done = torch.isin(chosen[-1], ends)
    while len(chosen) < tokens and not done.all():
        logits = follow(model, kept, position + len(chosen) - 1, chosen[-1])[:, -1]
        chosen.append(logits.argmax(-1, keepdim=True))
        done |= torch.isin(chosen[-1], ends)
    rows = torch.cat(chosen, dim=1).tolist()
    last = [next((place for place, token in enumerate(row) if token in stop), len(row)) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, last, strict=True)]


@torch.inference_mode()
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
    size = max(1, batch_size * 512 // max(context, 512))
    for rows, theirs in zip(windows.split(size), reference.split(size), strict=True):
        prompt = Prompt.read(model, rows[:, :context])
        first = prompt.logits
        for way, one in zip(ways, found, strict=True):
            kept = way.press_on(model, prompt)
            one["entries"], one["bytes"] = kept.held()
            one["greedy"] += greedy(model, kept.clone(), first, context, generate, set())
            chosen = after(model, kept.clone(), first, context, theirs).argmax(-1)
            one["same_choice"] += (chosen == theirs).double().mean(1).tolist()
            targets = rows[:, context:]
            logits = after(model, kept, first, context, targets)
            one["nats"] += [F.cross_entropy(*pair).item() for pair in zip(logits, targets, strict=True)]
    return found


@torch.inference_mode()
def on_questions(
    model: Any, ways: Sequence[Way], asked: list[dict[str, Any]], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Nats of the gold answers, greedy answers and what is held of every prompt; one item per way."""
    found: list[dict[str, Any]] = [{"tokens": [], "nats": [], "entries": [], "bytes": []} for _ in ways]
    stop = set(about["stop"])
    for number, question in enumerate(asked):
        prompt = Prompt.read(model, torch.tensor([question["prompt"]]))
        alike: dict[tuple[int, bool], list[tuple[dict[str, Any], Kept]]] = {}
        for way, one in zip(ways, found, strict=True):
            kept = way.press_on(model, prompt)
            entries, size = kept.held()
            one["entries"].append(entries)
            one["bytes"].append(size)
            key = kept.cache.layers[0].keys.shape[2], any(dropped.any() for dropped in kept.dropped)
            alike.setdefault(key, []).append((one, kept))
        for group in alike.values():  # caches of as many entries are rows of one
            rows, position = len(group), prompt.ids.shape[1]
            kept = Kept.join([each for _, each in group])
            first = prompt.logits.expand(rows, -1)
            rest, gold = (torch.tensor(question[part]).expand(rows, -1) for part in ("after", "gold"))
            if question["after"]:
                first = follow(model, kept, position, rest)[:, -1]
                position += rest.shape[1]
            logits = after(model, kept.clone(), first, position, gold)
            texts = greedy(model, kept, first, position, about["tokens"], stop)
            for (one, _), row, text in zip(group, logits, texts, strict=True):
                one["nats"].append(F.cross_entropy(row, gold[0], reduction="none").tolist())
                one["tokens"].append(text)
        if number % 10 == 9:
            print(f"{number + 1} of {len(asked)} questions", flush=True)
    return found


if __name__ == "__main__":
    main()
