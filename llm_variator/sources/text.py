"""Text that can be written as UTF-8."""

from __future__ import annotations


def without_surrogates(text: str) -> str:
    """`text` with U+FFFD for every lone surrogate, which no tokenizer takes; two that belong together are joined.

    JSON escapes and arguments of a shell can hold surrogates, files in UTF-8 cannot.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
