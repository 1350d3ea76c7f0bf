"""Does this release of transformers run this model as the hooks expect? Asked with a few tokens when attaching."""

from __future__ import annotations

import functools
import logging
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from transformers import PreTrainedModel

from llm_variator.config import BaseSignature, VariatorConfig
from llm_variator.engine.hooks.architecture import Architecture
from llm_variator.engine.plan import Plan, kv_heads
from llm_variator.engine.plugin import CompressionPlugin
from llm_variator.engine.session import Session, scope
from llm_variator.errors import VariatorError

OLDEST_TESTED, NEWEST_TESTED = "5.18.0", "5.24.0"
"""The ends of the range of transformers that `make test-matrix` has passed; those between were not run."""

logger = logging.getLogger(__name__)


@torch.no_grad()
def check_attachment(base: PreTrainedModel, architecture: Architecture, signature: BaseSignature) -> None:
    """Read five tokens, and one more, with groups of two merged at every site: each pass proves what it did.

    Skipped where weights are not in memory (on the meta device, offloaded or partitioned): there the first real
    pass proves the same.

    Raises:
        VariatorError: a pass failed, or did not compress as planned.
    """
    _warn_if_untested(version("transformers"))
    if any(parameter.is_meta or not parameter.numel() for parameter in base.parameters()):
        return
    plugin = _untrained(base, architecture, signature)
    embedding: Any = base.get_input_embeddings()
    ids = torch.zeros(1, 5, dtype=torch.long, device=embedding.weight.device)
    session = Session(plugin)
    try:
        with scope(session), torch.compiler.set_stance("force_eager"):
            if architecture.decoder:
                base(input_ids=ids, use_cache=True)
                base(input_ids=ids[:, :1], use_cache=True, cache=session.cache)
            else:
                architecture.stack(base)(input_ids=ids)
        session.finish()
    except Exception as error:
        raise VariatorError(
            f"{type(base).__name__} cannot be compressed with transformers {version('transformers')} (tested are "
            f"{OLDEST_TESTED} and {NEWEST_TESTED}): {error}"
        ) from error


def _untrained(
    base: PreTrainedModel, architecture: Architecture, signature: BaseSignature
) -> CompressionPlugin:
    """Means and copies at the sites that every model of the family has, where it has layers for them."""
    slides = functools.partial(architecture.slides, base)
    dense = all(slides(layer) for layer in range(signature.num_layers))
    config = VariatorConfig(
        k=2,
        sites=("ffn",) if dense else ("ffn", "kv"),
        compressor="mean",
        decompressor="copy",
        dense_head=0,
        dense_tail=1,
    )
    heads = kv_heads(base.config)
    plan = Plan.of(config, signature, decoder=architecture.decoder, slides=slides, kv_heads=heads)
    return CompressionPlugin(plan, signature.hidden_size)


@functools.cache
def _warn_if_untested(release: str) -> None:
    """Once per process."""
    if Version(release) > Version(NEWEST_TESTED):
        logger.warning(
            "transformers %s is newer than %s, the newest that llm_variator was tested with; every pass proves that it "
            "compresses. `make test-matrix` runs the tests with it",
            release,
            NEWEST_TESTED,
        )
