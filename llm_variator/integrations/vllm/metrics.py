"""Prometheus counters per ratio: requests admitted and prompt tokens, beside vLLM's own under /metrics.

The scheduler counts, in a process of its own; prometheus_client's multi-process mode (a folder named by
`PROMETHEUS_MULTIPROC_DIR`, which `llm_variator.serve` makes) brings the counts to the server.
"""

from __future__ import annotations

import functools

from prometheus_client import Counter

from llm_variator.integrations.policy import Ratio


@functools.cache
def _counters() -> tuple[Counter, Counter]:
    return (
        Counter("variator_requests", "Requests admitted, by compression ratio", ["k"]),
        Counter("variator_prompt_tokens", "Prompt tokens of admitted requests, by compression ratio", ["k"]),
    )


def count_request(k: Ratio, prompt_tokens: int) -> None:
    """Count one request that was admitted at ratio `k` (0: dense)."""
    requests, tokens = _counters()
    requests.labels(k=str(k)).inc()
    tokens.labels(k=str(k)).inc(prompt_tokens)
