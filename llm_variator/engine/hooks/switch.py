"""The hooks of one `VariatorModel` on its base: found again where modules changed, off where nobody compresses."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llm_variator.engine.hooks.compiled import CompiledStack
from llm_variator.engine.session import current


class Part(Protocol):
    """Something on a module that can be off."""

    def put(self) -> None:
        """Back, as it was."""
        ...

    def remove(self) -> None:
        """Off."""
        ...


@dataclasses.dataclass(frozen=True)
class Hung:
    """What hangs on a base, and on which of its modules."""

    handles: list[RemovableHandle]
    """Of hooks."""
    others: list[Part]
    links: list[tuple[nn.Module, str, nn.Module]]
    """(parent, name, module) of everything between the base and the modules with hooks."""

    @property
    def modules(self) -> Iterator[nn.Module]:
        """All of these modules."""
        return (module for _, _, module in self.links)

    def fits(self) -> bool:
        """Whether the modules are still those of the base."""
        return all(parent._modules.get(name) is module for parent, name, module in self.links)


class HookSwitch:
    """Puts the hooks of one base on at the first pass with a session and off at the first pass without.

    Torch takes a slower path through every module that has a hook, which a small model feels at every token.
    They stay on while a session runs, in whatever thread, and for good where torch.compile reads the model's
    code for somebody else: it does not notice hooks that come later.

    Adapters put modules in place of others and take them out again (PEFT's `add_adapter`, `merge_and_unload`).
    Each session begins with a look whether the hooks are where they were hung, and hangs them anew if not.
    """

    def __init__(self, hang: Callable[[], Hung]) -> None:
        """`hang` puts hooks on the modules that the base has now."""
        self._hang = hang
        self._lock = threading.RLock()  # a dropped model may be collected while this thread holds it
        self._holders = 0
        self._stays = False
        self._begin()

    def _begin(self) -> None:
        self._hung = self._hang()
        self._parts: list[Part] = [*map(HookPart, self._hung.handles), *self._hung.others]
        self._on = True

    def before(self, begin: Callable[..., Any]) -> Callable[..., Any]:
        """`begin`, a pre-hook of the module whose pass starts, with the hooks as they have to be for the pass."""

        def started(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            session = current()
            if session is not None:
                if session.passes == 0 and not self._hung.fits():
                    self._hang_anew(module)
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

    def remove(self) -> None:
        """Take everything off for good."""
        with self._lock:
            self._turn(on=False)
            for handle in self._hung.handles:
                handle.remove()

    @torch.compiler.disable
    def _hang_anew(self, host: Any) -> None:
        self.remove()
        with self._lock:
            self._begin()
        if isinstance(call := host.base_model._compiled_call_impl, CompiledStack):
            call.forget()

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
        calls: Iterator[Any] = (module._compiled_call_impl for module in self._hung.modules)
        return any(call is not None and not isinstance(call, CompiledStack) for call in calls)

    def _turn(self, *, on: bool) -> None:
        if self._on != on:
            parts: Iterable[Part] = self._parts if on else reversed(self._parts)
            for part in parts:
                part.put() if on else part.remove()
            self._on = on


class HookPart:
    """A hook that can be taken out of its module and put back in its place among others."""

    def __init__(self, handle: RemovableHandle) -> None:
        self._id = handle.id
        among: Any = handle.hooks_dict_ref()
        self._among = among
        self._hook = self._among[handle.id]
        self._earlier: frozenset[int] = frozenset()

    def remove(self) -> None:
        """Out of the module; where it is out already, nothing."""
        if self._id in self._among:  # somebody else may have removed it
            keys = list(self._among)
            self._earlier = frozenset(keys[: keys.index(self._id)])
            del self._among[self._id]

    def put(self) -> None:
        """Back, behind those hooks that it stood behind."""
        keys = list(self._among)
        place = max((number + 1 for number, key in enumerate(keys) if key in self._earlier), default=0)
        self._among[self._id] = self._hook
        for key in keys[place:]:
            self._among.move_to_end(key)
