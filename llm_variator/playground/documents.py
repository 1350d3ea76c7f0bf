"""Documents as text: pasted, or from a file of text, Markdown or PDF. Nothing in a file is executed."""

from __future__ import annotations

import codecs
from pathlib import Path

from llm_variator.errors import VariatorError
from llm_variator.extras import needed

KINDS = (".txt", ".md", ".markdown", ".text", ".pdf")
MOST_BYTES = 20_000_000


def read_document(file: Path) -> str:
    """The text of a document, read once and never written.

    Raises:
        VariatorError: a kind that is not known, more than `MOST_BYTES`, not UTF-8, a PDF that is broken, locked or
            without text.
    """
    if file.suffix.lower() not in KINDS:
        raise VariatorError(
            f"{file.name}: give text, Markdown or PDF, a file that ends with one of {', '.join(KINDS)}"
        )
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise VariatorError(
                f"{file.name} has {size / 1e6:.0f} MB, the most is {MOST_BYTES / 1e6:.0f}: give a part of it"
            )
        raw = file.read_bytes()
    except OSError as error:
        raise VariatorError(f"{file.name} cannot be read ({error.strerror}): check the path") from None
    if file.suffix.lower() == ".pdf":
        return _pdf(file)
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise VariatorError(f"{file.name} is not UTF-8 (byte {error.start}): convert it first") from None


def _pdf(file: Path) -> str:
    pypdf = needed("pypdf", "a PDF", "playground")
    try:
        reader = pypdf.PdfReader(file)
        if reader.is_encrypted and not reader.decrypt(""):
            raise VariatorError(f"{file.name} is locked with a password: unlock it first")
        pages = [page.extract_text() for page in reader.pages]
    except VariatorError:
        raise
    except Exception as error:  # a broken file makes it raise whatever it meets
        raise VariatorError(
            f"{file.name} is no readable PDF ({type(error).__name__}): save it anew"
        ) from None
    text = "\n\n".join(page.strip() for page in pages).strip()
    if not text:
        raise VariatorError(f"{file.name} holds pictures and no text: run a text recognition over it first")
    return text
