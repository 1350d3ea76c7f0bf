"""What the hooks of one call know: which plugin runs, over which tokens. One session per call and thread."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers import Cache

from llm_variator.groups import Segment
from llm_variator.plugin import CompressionPlugin


@dataclasses.dataclass
class Session:
    """State of one `VariatorModel.forward` or `generate`, from its first layer to its last token."""

    plugin: CompressionPlugin | None
    prompts: Tensor | int | None = None
    """Prompt tokens of each row; None: every token of the first pass is prompt."""
    generating: bool = False
    """Inside `generate`: after the first pass all tokens are continuation."""
    segment: Segment | None = None
    """Tokens of the current pass; None when each row has one token, which is always dense."""
    cache: Cache | None = None
    passes: int = 0
    stash: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """What a layer's first hook leaves for its later ones."""


_session: ContextVar[Session | None] = ContextVar("variator_session", default=None)


def current() -> Session | None:
    """The session of the running call, None outside of one: then every hook steps aside."""
    return _session.get()


@contextlib.contextmanager
def scope(session: Session | None) -> Iterator[Session | None]:
    """Make `session` current inside the block, in this thread only."""
    token = _session.set(session)
    try:
        yield session
    finally:
        _session.reset(token)
