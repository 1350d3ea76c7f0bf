"""A base model that nobody compresses runs as if nothing were attached: its hooks are on while a session may run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llm_variator.compiled import CompiledStack
from llm_variator.session import current


class Part(Protocol):
    """Something on a module that can be off."""

    def put(self) -> None:
        """Back, as it was."""
        ...

    def remove(self) -> None:
        """Off."""
        ...


class HookSwitch:
    """Puts the hooks of one base on at the first pass with a session and off at the first pass without.

    Torch takes a slower path through every module that has a hook, which a small model feels at every token.
    They stay on while a session runs, in whatever thread, and for good where torch.compile reads the model's
    code for somebody else: it does not notice hooks that come later.
    """

    def __init__(
        self, handles: Iterable[RemovableHandle], others: Iterable[Part], modules: Iterable[nn.Module]
    ) -> None:
        """`handles`: what `modules` gave for their hooks; these, and `others`, are on."""
        self._parts: list[Part] = [*map(_Hook, handles), *others]
        self._modules = tuple(modules)
        self._holders = 0
        self._lock = threading.Lock()
        self._on = True
        self._stays = False

    def before(self, begin: Callable[..., Any]) -> Callable[..., Any]:
        """`begin`, a pre-hook of the module whose pass starts, with the hooks as they have to be for the pass."""

        def started(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            session = current()
            if session is not None:
                session.needs(self)
            elif self._is_compiled():
                self._stay()
            elif self._on:
                self._rest()
            return begin(module, args, kwargs)

        return started

    def hold(self) -> None:
        """Hooks on until `release` is called as often as this was."""
        with self._lock:
            self._holders += 1
            self._turn(on=True)

    def release(self) -> None:
        """Undo one `hold`; the hooks go off when the next pass can do without."""
        with self._lock:
            self._holders -= 1

    def _rest(self) -> None:
        with self._lock:
            if not self._holders and not self._stays:
                self._turn(on=False)

    @torch.compiler.disable
    def _stay(self) -> None:
        with self._lock:
            self._stays = True
            self._turn(on=True)

    def _is_compiled(self) -> bool:
        """Whether torch.compile reads the model for somebody else, or may in the pass that begins."""
        if torch.compiler.is_compiling():
            return True
        calls: Iterator[Any] = (module._compiled_call_impl for module in self._modules)
        return any(call is not None and not isinstance(call, CompiledStack) for call in calls)

    def _turn(self, *, on: bool) -> None:
        if self._on != on:
            for part in self._parts if on else reversed(self._parts):
                part.put() if on else part.remove()
            self._on = on


class _Hook:
    """A hook that can be taken out of its module and put back in its place among others."""

    def __init__(self, handle: RemovableHandle) -> None:
        self._id = handle.id
        among: Any = handle.hooks_dict_ref()
        self._among = among
        self._hook = self._among[handle.id]
        self._earlier: frozenset[int] = frozenset()

    def remove(self) -> None:
        keys = list(self._among)
        self._earlier = frozenset(keys[: keys.index(self._id)])
        del self._among[self._id]

    def put(self) -> None:
        keys = list(self._among)
        place = max((number + 1 for number, key in enumerate(keys) if key in self._earlier), default=0)
        self._among[self._id] = self._hook
        for key in keys[place:]:
            self._among.move_to_end(key)
