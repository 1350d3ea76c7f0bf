"""`bench swap`: what a plugin costs that is not used, and how long loading and choosing one takes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from llm_variator.bench.setting import Setting, Settings
from llm_variator.cli.values import PositiveInt
from llm_variator.engine.hooks.hook import ATTACHED
from llm_variator.measures.timing import Case, Spread, bar, timed

BARE, OFF = "base without plugins", "plugins attached, off"
_SWAPS = 1000
_TOKENS_TIMED = 64  # short passes are repeated: one of them is too short to tell a thousandth


@dataclass(frozen=True, kw_only=True)
class Swap(Settings):
    """Loading, choosing, and plugins that are off.

    of dense: over the time of the base model that nothing is attached to, in the same repetition. set_plugin: mean of
    1000. load_plugin: from a folder on disk, in the model's dtype.
    """

    plugins: tuple[str, ...] = ("ffn,kv:2",)
    tokens: tuple[PositiveInt, ...] = (1, 512)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_plugin()


def rows(setting: Setting[Swap]) -> list[dict[str, Any]]:
    """Forward passes of the bare base and of the base with plugins switched off; loading; choosing."""
    settings = setting.settings
    found: list[dict[str, Any]] = []
    name = setting.names[0]
    with bar((2 * len(settings.tokens) + 2) * (settings.repetitions + 1), "swap") as advance:
        with tempfile.TemporaryDirectory() as folder:
            setting.model.save_pretrained(folder, plugin_name=name)
            model = setting.model
            extra = {
                f"load_plugin, {name}": Case(
                    lambda _: model.load_plugin(folder, "again"), prepare=lambda: _forget(model, "again")
                ),
                f"set_plugin, {name}": Case(lambda _: _swap(model, name)),
            }
            # both of them in turns with the rest would say nothing more: they are no ratios
            seconds = setting.interleaved(extra, advance)
            _forget(model, "again")
        for label, values in seconds.items():
            spread = Spread.of(values)
            scale = 1e3 / (2 * _SWAPS if label.startswith("set") else 1)
            found.append({"case": label, "ms": scale * spread.median, "ms_low": scale * spread.low})
            found[-1]["ms_high"] = scale * spread.high
        for tokens in settings.tokens:
            seconds = _attached_or_not(setting, tokens, advance)
            for label in (BARE, OFF):
                found.append({"case": label, "tokens": tokens, **timed(seconds, label, BARE)})
    return found


def _attached_or_not(setting: Setting[Swap], tokens: int, advance: Any) -> dict[str, list[float]]:
    """The same forward passes with hooks and without: they are put on and taken off, and warmed up, in between."""
    ids = setting.ids(1, tokens)
    options: dict[str, Any] = {"logits_to_keep": 1} if setting.model.is_decoder else {}
    call = setting.base if setting.model.is_decoder else setting.reader()

    passes = max(1, _TOKENS_TIMED // tokens)

    def detach() -> None:
        if setting.base.__dict__.get(ATTACHED, False):
            setting.model.unload()
        call(input_ids=ids, **options)

    def attach() -> None:
        if not setting.base.__dict__.get(ATTACHED, False):
            setting.attach()
        call(input_ids=ids, **options)

    def run(_: None) -> None:
        for _pass in range(passes):
            call(input_ids=ids, **options)

    with torch.inference_mode():
        seconds = setting.interleaved(
            {BARE: Case(run, prepare=detach), OFF: Case(run, prepare=attach)}, advance
        )
        attach()
    return {label: [value / passes for value in values] for label, values in seconds.items()}


def _forget(model: Any, name: str) -> None:
    if name in model.plugins:
        model.delete_plugin(name)


def _swap(model: Any, name: str) -> None:
    for _ in range(_SWAPS):
        model.set_plugin(name)
        model.set_plugin(None)
