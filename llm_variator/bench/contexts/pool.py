"""Many sessions over few documents in one pool, beside contexts that share nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_variator.bench.contexts.setting import GREEDY, Documents, Figures, stretches, untrained
from llm_variator.cli import flag
from llm_variator.cli.values import PositiveInt
from llm_variator.engine.cache import KVPool
from llm_variator.engine.contexts import CompressedContext
from llm_variator.model import VariatorModel


@dataclass(frozen=True, kw_only=True)
class Pool(Documents):
    """Sessions over shared documents in one pool, against contexts that share nothing."""

    context: PositiveInt = 64
    documents: PositiveInt = flag(10, "how many")
    sessions: PositiveInt = flag(100, "most at a time")
    operations: PositiveInt = flag(
        2000, "random reads, extends, forks, frees, questions and batches of questions"
    )
    mixed: bool = flag(False, "every other context by an untrained plugin that merges, in the same pool")
    blocks: PositiveInt = flag(60000, "in the pool")
    block_size: PositiveInt = flag(16, "entries in a block")


@dataclass(frozen=True, eq=False)
class Session:
    """One context twice: in the pool, and sharing nothing."""

    plugin: str
    paged: CompressedContext
    plain: CompressedContext

    def forked(self) -> Session:
        """Once more."""
        return replace(self, paged=self.paged.fork())

    def extended(self, more: Tensor) -> Session:
        """With `more` behind both."""
        return replace(self, paged=self.paged.extend(more), plain=self.plain.extend(more))


def pool(model: VariatorModel, settings: Pool) -> Figures:
    """Operations in random order; every answer against contexts outside the pool."""
    rng, shared = random.Random(settings.seed), KVPool(settings.blocks, settings.block_size)
    plugins = ["plugin", "merging"] if settings.mixed else ["plugin"]
    if settings.mixed:
        untrained(model, "merging", keeps=False)
    (text,) = stretches(settings, settings.documents * settings.context + 4096)

    def piece() -> Tensor:
        start = rng.randrange(text.shape[1] - 32)
        return text[:, start : start + rng.randint(1, 24)]

    def made(number: int) -> Session:
        row = text[:, number * settings.context :][:, : settings.context]
        name = plugins[number % len(plugins)]
        with model.use_plugin(name):
            return Session(name, model.compress(row, pool=shared), model.compress(row))

    first = [made(number) for number in range(settings.documents)]
    sessions = [session.forked() for session in first]
    counts = dict.fromkeys(("make", "extend", "fork", "free", "ask", "ask three"), 0)
    wrong, peak = 0, shared.report()
    for _ in range(settings.operations):
        session = rng.choice(sessions)
        action = rng.choice(sorted(counts))
        if action == "free" and len(sessions) <= settings.documents:
            action = "fork"
        if action in ("make", "fork", "extend") and len(sessions) >= settings.sessions:
            action = "free"
        counts[action] += 1
        if action == "make":
            sessions.append(made(rng.randrange(settings.documents)))
        elif action == "extend":
            sessions.append(session.extended(piece()))
        elif action == "fork":
            sessions.append(session.forked())
        elif action == "free":
            sessions = [each for each in sessions if each is not session]
            session.paged.free()
        else:
            question = piece()
            if action == "ask three":
                question = torch.cat([question, *(piece()[:, :1].expand_as(question) for _ in range(2))])
            with model.use_plugin(session.plugin):
                answers = [
                    model.generate(question, context=context, max_new_tokens=4, **GREEDY)
                    for context in (session.paged, session.plain)
                ]
            wrong += not torch.equal(*answers)
        peak = max(peak, shared.report(), key=lambda report: report.references)
    for session in [*first, *sessions]:
        session.paged.free()
    return {
        "plugins": len(plugins),
        "operations": counts,
        "wrong_answers": wrong,
        "peak_blocks": peak.used,
        "peak_blocks_without_sharing": peak.references,
        "blocks_left_after_all_are_freed": shared.report().used,
    }
