"""`bench prefill`: reading a prompt. `bench decode`: one token after a long prompt."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llm_variator.bench.setting import DENSE, Batches, Plotted, Setting, Settings
from llm_variator.cli import flag
from llm_variator.cli.values import PositiveInt
from llm_variator.engine.blocks import Place, entries
from llm_variator.engine.cache import CompressedLayer, KVCacheReport, SelectedLayer, adopt
from llm_variator.engine.cache.naming import cache_of
from llm_variator.engine.groups import Segment
from llm_variator.engine.plan import Plan
from llm_variator.engine.plugin import weights_digest
from llm_variator.engine.session import Session, scope
from llm_variator.errors import VariatorError
from llm_variator.measures.operations import EncoderShape, Stack, encoding, prefill
from llm_variator.measures.timing import Case, bar


@dataclass(frozen=True, kw_only=True)
class Prefill(Batches, Plotted, Settings):
    """Time to read a prompt.

    of dense: median over the repetitions of time over the dense time of the same repetition, with quartiles; bound:
    operations over dense operations; of bound: measured speed-up over the one by operations. Dense computes its last
    layer whole; plugins leave out what is not read of it unless --whole-last-layer.
    """

    plugins: tuple[str, ...] = ("ffn:2", "ffn:4", "ffn,kv:2", "ffn,kv:4")
    tokens: tuple[PositiveInt, ...] = (128, 512, 2048)
    whole_last_layer: bool = flag(False, "plugins compute all of it, as dense does")
    elsewhere: Path | None = flag(
        None, "what eval/kvpress_prefill.py measured, for the same table", metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class Decode(Batches, Plotted, Settings):
    """Time of a token after a prompt.

    bound: bytes that one step has to read (weights and KV cache) over the dense model's; of bound: measured speed-up
    over the one by bytes. The cache holds random values of the size that the plugin leaves.
    """

    plugins: tuple[str, ...] = ("kv:2", "kv:4")
    tokens: tuple[PositiveInt, ...] = (4096,)
    steps: PositiveInt = flag(8, "tokens per timed run")


def prefill_rows(setting: Setting[Prefill]) -> list[dict[str, Any]]:
    """Time of reading a prompt, up to the logits of its last token (encoders: up to the hidden states)."""
    settings, model, peers = setting.settings, setting.model, _peers(setting)
    model.skip_unread = not settings.whole_last_layer
    names = [DENSE, *setting.names]
    total = len(names) * len(settings.tokens) * len(settings.batch_sizes) * (settings.repetitions + 1)
    moved = _weight_bytes(setting) if model.is_decoder else 0
    with bar(total, "prefill") as advance, torch.inference_mode():

        def measure(tokens: int, batch: int) -> list[dict[str, Any]]:
            ids = setting.ids(batch, tokens)
            seconds = setting.interleaved({name: _reading(setting, name, ids) for name in names}, advance)
            counts = {name: _operations(setting, name, tokens) for name in names}
            rows = []
            for name in names:
                row: dict[str, Any] = {"case": name, "tokens": tokens, "batch": batch}
                row |= setting.timed(seconds, name, DENSE)
                row |= {"operations": batch * counts[name], "bound": counts[name] / counts[DENSE]}
                row["of_bound"] = row["bound"] / row["of_dense"]
                if setting.card is not None:
                    row |= setting.card.columns(row["ms"], row["operations"], moved)
                if model.is_decoder:
                    with setting.using(name)():
                        cache = cache_of(model(ids, use_cache=True, logits_to_keep=1))
                    row["kv_mib"] = KVCacheReport.of(cache).bytes / 2**20
                rows.append(row)
            return rows

        return setting.each_size(measure) + peers


def _peers(setting: Setting[Prefill]) -> list[dict[str, Any]]:
    """The rows of `eval/kvpress_prefill.py`, of the same weights and dtype; none without `--elsewhere`."""
    path = setting.settings.elsewhere
    if path is None:
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        weights, dtype, rows = content["weights"], content["dtype"], content["rows"]
        release = content["versions"]["kvpress"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VariatorError(f"--elsewhere {path}: not a file of eval/kvpress_prefill.py ({error})") from None
    if (weights, dtype) != (
        weights_digest(setting.base.get_input_embeddings().weight),
        str(setting.base.dtype).removeprefix("torch."),
    ):
        raise VariatorError(f"--elsewhere {path} was measured with other weights or in another dtype")
    return [row | {"case": f"kvpress {release}: {row['case']}"} for row in rows]


def _reading(setting: Setting[Settings], name: str, ids: Tensor) -> Case:
    model = setting.model
    if model.is_decoder:
        return Case(lambda _: model(ids, use_cache=True, logits_to_keep=1), inside=setting.using(name))
    reader, plugin = setting.reader(), None if name == DENSE else model.plugin(name)

    def inside() -> AbstractContextManager[Any]:
        return scope(None if plugin is None else Session(plugin))  # one that lives on would keep the hooks on

    return Case(lambda _: reader(input_ids=ids), inside=inside)


def _operations(setting: Setting[Prefill], name: str, tokens: int) -> int:
    config, plugin = setting.base.config, setting.config(name)
    if not setting.model.is_decoder:
        return encoding(EncoderShape.of(config), tokens, plugin=plugin).total
    reads = 1 if plugin and not setting.settings.whole_last_layer else None
    return prefill(Stack.of(config), tokens, plugin, reads=reads).total


def decode_rows(setting: Setting[Decode]) -> list[dict[str, Any]]:
    """Time of `--steps` tokens, one after the other, each read after a prompt and those before it."""
    settings, model = setting.settings, setting.model
    model.decoder_only("bench decode", "an encoder decodes nothing")
    names = [DENSE, *setting.names]
    total = len(names) * len(settings.tokens) * len(settings.batch_sizes) * (settings.repetitions + 1)
    weights = _weight_bytes(setting)
    with bar(total, "decode") as advance, torch.inference_mode():

        def measure(tokens: int, batch: int) -> list[dict[str, Any]]:
            token = setting.ids(batch, 1)
            caches = {name: random_cache(setting, name, batch, tokens) for name in names}
            held = {name: KVCacheReport.of(caches[name]).bytes for name in names}
            cases = {name: _steps(setting, name, token, caches[name], settings.steps) for name in names}
            seconds = setting.interleaved(cases, advance)
            rows = []
            for name in names:
                row: dict[str, Any] = {"case": name, "tokens": tokens, "batch": batch}
                row |= setting.timed(seconds, name, DENSE)
                for column in ("ms", "ms_low", "ms_high"):
                    row[column] /= settings.steps
                row["bound"] = (weights + held[name]) / (weights + held[DENSE])
                if setting.card is not None:
                    operations = _step_operations(setting, batch, held[name])
                    row |= setting.card.columns(row["ms"], operations, weights + held[name])
                row |= {"of_bound": row["bound"] / row["of_dense"], "kv_mib": held[name] / 2**20}
                rows.append(row)
            return rows

        return setting.each_size(measure)


def _step_operations(setting: Setting[Decode], batch: int, held: int) -> float:
    """Operations of one step: every weight once per row, every held key and value once per query head that reads it."""
    shape = Stack.of(setting.base.config)
    layer = shape.ffn_weights + shape.query_weights + shape.key_value_weights
    weights = shape.layers * layer + shape.dim * shape.vocabulary
    numbers = held / setting.base.dtype.itemsize
    return 2 * batch * weights + 2 * numbers * shape.attention_width / shape.key_value_width


def _steps(setting: Setting[Settings], name: str, token: Tensor, cache: DynamicCache, steps: int) -> Case:
    def run(_: object) -> None:
        for _step in range(steps):
            setting.model(token, cache=cache, use_cache=True)

    return Case(run, inside=setting.using(name))


def random_cache(setting: Setting[Settings], name: str, rows: int, tokens: int) -> DynamicCache:
    """A cache as a prompt of `tokens` leaves it, of random values: for decoding, what it holds does not matter."""
    config, plugin = setting.base.config, setting.config(name)
    cache = DynamicCache(config=config)
    layers = setting.model.signature.num_layers
    segment = None
    if plugin is not None:
        made = setting.model.plugin(name)
        adopt(cache, made.cache_layers, layers, made.plan.selected)
        head, tail = plugin.ends
        segment = Segment(tokens, tokens, head=head, tail=tail, device=torch.device(setting.device))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index in range(layers):
        layer = cache.layers[index] if index < len(cache.layers) else None
        if isinstance(layer, SelectedLayer):
            _fill(setting, layer, made.plan, rows, tokens, index)
            continue
        grouping, size = None, tokens
        if isinstance(layer, CompressedLayer) and plugin is not None:
            assert segment is not None
            ratio = plugin.ratio("attention", index) or plugin.ratio("kv", index)
            assert ratio is not None
            grouping = segment.grouping(ratio)
            size = grouping.columns.shape[1]
        shape = (rows, config.num_key_value_heads, size, width)
        keys, values = (_random(setting, shape) for _ in range(2))
        if grouping is not None and isinstance(layer, CompressedLayer):
            layer.update(keys, values, grouping=grouping, width=tokens)
        else:
            cache.update(keys, values, index)
    return cache


def _fill(
    setting: Setting[Settings], layer: SelectedLayer, plan: Plan, rows: int, tokens: int, index: int
) -> None:
    """Random keys and values, as many as each head keeps of a prompt of `tokens`."""
    config = setting.base.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer.refine(plan.selected[index])
    for one in layer.classes:
        place = Place(plan.head, plan.tail, 0, tokens)
        shape = (rows, len(one.heads), entries(place, one.k, plan.config.block, tokens), width)
        one.store.update(*(_random(setting, shape) for _ in range(2)))
    layer.tokens = tokens


def _random(setting: Setting[Settings], shape: tuple[int, ...]) -> Tensor:
    """Made where it stays: gigabytes would take longer to make on the CPU and to move than to measure with."""
    return torch.randn(shape, generator=setting.on_device, device=setting.device, dtype=setting.base.dtype)


def _weight_bytes(setting: Setting[Settings]) -> int:
    """Bytes of the weights that a decoding step multiplies with: of the embeddings it looks up a row only."""
    base = setting.base
    shared = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    skipped = None if shared else base.get_input_embeddings().weight
    return sum(p.numel() * p.element_size() for p in base.parameters() if p is not skipped)
