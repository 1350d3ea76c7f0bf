"""Many sessions over few documents in one pool, beside contexts that share nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from llm_variator.bench.contexts.setting import GREEDY, Documents, Figures, stretches
from llm_variator.cli import flag
from llm_variator.cli.values import PositiveInt
from llm_variator.engine.cache import KVPool
from llm_variator.model import VariatorModel


@dataclass(frozen=True, kw_only=True)
class Pool(Documents):
    """Sessions over shared documents in one pool, against contexts that share nothing."""

    context: PositiveInt = 64
    documents: PositiveInt = flag(10, "how many")
    sessions: PositiveInt = flag(100, "most at a time")
    operations: PositiveInt = flag(2000, "random extends, forks, frees and questions")
    blocks: PositiveInt = flag(60000, "in the pool")
    block_size: PositiveInt = flag(16, "entries in a block")


def pool(model: VariatorModel, settings: Pool) -> Figures:
    """Random order of extend, fork, free and question; every answer against contexts outside the pool."""
    rng, shared = random.Random(settings.seed), KVPool(settings.blocks, settings.block_size)
    (text,) = stretches(settings, settings.documents * settings.context + 4096)
    documents = [text[:, i * settings.context :][:, : settings.context] for i in range(settings.documents)]
    first = [(model.compress(row, pool=shared), model.compress(row)) for row in documents]
    sessions = [(paged.fork(), plain) for paged, plain in first]
    counts = {"extend": 0, "fork": 0, "free": 0, "ask": 0}
    wrong, peak = 0, shared.report()
    for _ in range(settings.operations):
        paged, plain = session = rng.choice(sessions)
        action = rng.choice(sorted(counts))
        if action == "free" and len(sessions) <= settings.documents:
            action = "fork"
        if action in ("fork", "extend") and len(sessions) >= settings.sessions:
            action = "free"
        counts[action] += 1
        start = rng.randrange(text.shape[1] - 32)
        piece = text[:, start : start + rng.randint(1, 24)]
        if action == "extend":
            sessions.append((paged.extend(piece), plain.extend(piece)))
        elif action == "fork":
            sessions.append((paged.fork(), plain))
        elif action == "free":
            sessions = [each for each in sessions if each is not session]
            paged.free()
        else:
            answers = [
                model.generate(piece, context=context, max_new_tokens=4, **GREEDY) for context in session
            ]
            wrong += not torch.equal(*answers)
        peak = max(peak, shared.report(), key=lambda report: report.references)
    for context in [*(paged for paged, _ in first), *(paged for paged, _ in sessions)]:
        context.free()
    return {
        "operations": counts,
        "wrong_answers": wrong,
        "peak_blocks": peak.used,
        "peak_blocks_without_sharing": peak.references,
        "blocks_left_after_all_are_freed": shared.report().used,
    }
