"""Whether the Hugging Face hub answers, asked once before its client would retry for long."""

from __future__ import annotations

import logging
import threading

from huggingface_hub import constants as hub_constants
from huggingface_hub.utils import get_session

logger = logging.getLogger(__name__)

HUB_PROBE_SECONDS = 3.0


def hub_reachable(seconds: float = HUB_PROBE_SECONDS) -> bool:
    """Whether the Hugging Face hub answers within `seconds`; False at once under HF_HUB_OFFLINE.

    huggingface_hub retries an unreachable host for more than 20 seconds per file. One probe up front, in a
    thread because name resolution knows no time-out, lets callers fall back to the local cache instead.
    """
    if hub_constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def probe() -> None:
        try:
            get_session().head(hub_constants.ENDPOINT, timeout=seconds)
        except Exception as error:  # any failure of any HTTP backend means the same: not reachable
            logger.debug("hub probe failed: %s", error)
        else:
            answered.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
