"""What users pass as context or question, as token ids: ids, text or chat messages, one row or several.

Embeddings in place of ids have the id `NO_TOKEN`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers.utils import get_json_schema

from llm_variator.errors import VariatorError
from llm_variator.sources.text import without_surrogates

Chat = list[dict[str, Any]]
NO_TOKEN = -1
_NO_TEMPLATE = {"add_generation_prompt", "continue_final_message", "conversation", "max_length", "padding"}
_NO_TEMPLATE |= {
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
}
_NO_TEMPLATE |= {"truncation"}  # what `apply_chat_template` takes beside a template's own options
_ANSWER = "\u2402\u2403"  # stands for an answer where only what a chat template prints after it is wanted


class Prompt(NamedTuple):
    """Token ids (rows, n), padded on the left, and the mask (rows, n) that says where padding is."""

    ids: Tensor
    mask: Tensor
    embeds: Tensor | None = None
    """(rows, n, d) in place of the ids."""

    def to(self, device: torch.device) -> Prompt:
        """The same on `device`."""
        embeds = None if self.embeds is None else self.embeds.to(device)
        return Prompt(self.ids.to(device), self.mask.to(device), embeds)

    def repeated(self, rows: int) -> Prompt:
        """The same for `rows` rows, where this is one."""
        embeds = None if self.embeds is None else self.embeds.expand(rows, -1, -1)
        return Prompt(self.ids.expand(rows, -1), self.mask.expand(rows, -1), embeds)

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None = None, embeds: Tensor | None = None) -> Prompt:
        """Of ids padded on either side; `mask` None: nothing is padding.

        Raises:
            VariatorError: a row has no token.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        refuse_empty(ids.numel(), mask)
        return cls(ids, mask, embeds) if bool(mask[:, -1].all()) else pads_first(ids, mask, embeds)


def refuse_empty(size: int, valid: Tensor | None) -> None:
    """Raise unless every row of `size` columns in all has a token; `valid` (rows, n): where; None: everywhere."""
    if size == 0 or (valid is not None and not bool(valid.bool().any(1).all())):
        raise VariatorError("the prompt is empty: every row needs at least one token")


def encode(
    what: Any,
    tokenizer: Any = None,
    mask: Tensor | None = None,
    *,
    special: bool = True,
    embeds: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    answer: bool = False,
) -> Prompt:
    """The prompt in whatever form a user gives it.

    Args:
        what: ids (a tensor (n,) or (rows, n), a list, a list of lists), a tokenizer's output, a text, a list of
            texts, or chat messages (a list of `{"role": ..., "content": ...}`, or a list of such lists).
        tokenizer: for texts and messages.
        mask: of ids: False, or 0, where they are padding.
        special: whether a text gets the tokenizer's special tokens.
        embeds: (rows, n, d), or (n, d), in place of `what`.
        options: of the chat template: `template_options`.
        answer: whether messages end where an answer begins.

    Raises:
        VariatorError: the form is unknown, a tokenizer is missing, or a row is empty.
    """
    if isinstance(what, Mapping):
        if not {"input_ids", "inputs_embeds"} & what.keys():
            raise VariatorError("a tokenizer's output needs input_ids; messages come in a list")
        mask = what.get("attention_mask", mask)
        embeds, what = what.get("inputs_embeds", embeds), what.get("input_ids")
    if embeds is not None:
        if what is not None:
            raise VariatorError("inputs_embeds and what else is given are two prompts: leave one out")
        return _embedded(embeds, mask)
    if options and chats(what) is None:
        raise VariatorError(
            "chat_template_kwargs are for chat messages: leave them out with text or token ids"
        )
    if isinstance(what, Tensor):
        ids = what if what.ndim == 2 else what[None]
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
            raise VariatorError(
                f"token ids must be whole numbers (tokens,) or (rows, tokens), at least one; got {what.dtype} "
                f"{tuple(what.shape)}"
            )
        mask = None if mask is None else torch.as_tensor(mask)
        if mask is not None and mask.numel() != ids.numel():
            raise VariatorError(
                f"attention_mask {tuple(mask.shape)} does not fit token ids {tuple(ids.shape)}"
            )
        mask = torch.ones_like(ids) if mask is None else mask.reshape(ids.shape).to(ids.device)
        return Prompt.of(ids, mask)
    several = isinstance(what, (list, tuple)) and not _is_chat(what) and not _is_ids(what)
    rows = list(what) if several else [what]
    tokens = [_row(row, tokenizer, special, options, answer) for row in rows]
    if mask is not None:
        tokens = _without_padding(tokens, mask)
    refuse_empty(min(map(len, tokens), default=0), None)
    if not all(0 <= token < 2**31 for row in tokens for token in row):
        raise VariatorError("token ids must lie in the vocabulary")
    width = max(map(len, tokens))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in tokens], device="cpu")
    seen = [[0] * (width - len(row)) + [1] * len(row) for row in tokens]
    return Prompt(ids, torch.tensor(seen, device="cpu"))


def _without_padding(rows: list[list[int]], mask: Any) -> list[list[int]]:
    """Of every row what `mask`, in any form, says is no padding."""
    plain = mask.tolist() if hasattr(mask, "tolist") else list(mask)
    own = plain if plain and isinstance(plain[0], (list, tuple)) else [plain]
    if [len(row) for row in own] != [len(row) for row in rows]:
        raise VariatorError(
            f"attention_mask of {[len(row) for row in own]} entries does not fit rows of {[len(row) for row in rows]} "
            "tokens"
        )
    return [
        [token for token, seen in zip(row, seens, strict=True) if seen]
        for row, seens in zip(rows, own, strict=True)
    ]


def _embedded(embeds: Any, mask: Tensor | None) -> Prompt:
    if isinstance(embeds, Tensor) and embeds.ndim == 2:
        embeds = embeds[None]
    check_embeddings(embeds)
    shape = embeds.shape[:2]
    if mask is not None and mask.numel() != shape.numel():
        raise VariatorError(
            f"attention_mask {tuple(mask.shape)} does not fit inputs_embeds {tuple(embeds.shape)}"
        )
    ids = torch.full(shape, NO_TOKEN, device=embeds.device)
    mask = torch.ones_like(ids) if mask is None else mask.reshape(shape).to(embeds.device)
    return Prompt.of(ids, mask, embeds)


def check_embeddings(embeds: Any, table: Any = None) -> None:
    """Raise unless `embeds` are (rows, n, d) such as `table`, a model's embedding, gives."""
    weight: Tensor | None = None if table is None else table.weight
    width = "d" if weight is None else weight.shape[-1]
    shaped = isinstance(embeds, Tensor) and embeds.ndim == 3 and embeds.is_floating_point()
    if not shaped or width not in ("d", embeds.shape[2]):
        got = f"{embeds.dtype} {tuple(embeds.shape)}" if isinstance(embeds, Tensor) else type(embeds).__name__
        raise VariatorError(f"inputs_embeds must be floating point (rows, tokens, {width}); got {got}")
    if weight is None or embeds.dtype == weight.dtype or torch.is_autocast_enabled(embeds.device.type):
        return
    raise VariatorError(
        f"inputs_embeds are {embeds.dtype}, the model's are {weight.dtype}: convert them with .to({weight.dtype})"
    )


def prompt_lengths(given: Any) -> int | list[int] | None:
    """What `VariatorModel.forward` takes as `prompt_length`: an int, or one per row in a tensor or list.

    Raises:
        VariatorError: anything else.
    """
    plain = given.tolist() if hasattr(given, "tolist") else given  # tensors and arrays
    each = list(plain) if isinstance(plain, (list, tuple)) else [plain]
    if plain is not None and not all(isinstance(n, Integral) and not isinstance(n, bool) for n in each):
        raise VariatorError(
            f"prompt_length must be a whole number, or one for every row (rows,); got {given!r}"
        )
    each = [int(n) for n in each if n is not None]
    return each if isinstance(plain, (list, tuple)) else (each[0] if each else None)


def pads_first(ids: Tensor, mask: Tensor, embeds: Tensor | None = None) -> Prompt:
    """Move all padding to the beginning of its row; generation continues at the right edge."""
    moved = None if embeds is None else padding_first(embeds, mask)
    return Prompt(padding_first(ids, mask), padding_first(mask, mask), moved)


def padding_first(values: Tensor, mask: Tensor) -> Tensor:
    """`values` (rows, n) or (rows, n, d) with those of padding first in each row, the others in their order."""
    order = mask.bool().long().argsort(dim=1, stable=True)
    return values.take_along_dim(order.view(*order.shape, *[1] * (values.ndim - 2)), dim=1)


def template_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """A chat template's options (`enable_thinking`, `tools`, ...) as plain JSON: functions become their schemas.

    Raises:
        VariatorError: they are no mapping of names, cannot be kept in a file, or are none of a template.
    """
    if given is None:
        return {}
    try:
        options = {str(name): value for name, value in given.items()}
        if isinstance(options.get("tools"), (list, tuple)):
            options["tools"] = [
                get_json_schema(tool) if callable(tool) else tool for tool in options["tools"]
            ]
        options = json.loads(json.dumps(options))
    except Exception as error:  # transformers has errors of its own for functions that say too little
        raise VariatorError(
            "chat_template_kwargs must be a dict of plain values, with tools as schemas or documented functions: "
            f"{error}"
        ) from None
    if wrong := sorted(_NO_TEMPLATE & options.keys()):
        raise VariatorError(
            f"chat_template_kwargs: {', '.join(wrong)} is no option of a chat template, leave it out"
        )
    return options


def chats(what: Any) -> list[Chat] | None:
    """The conversations, where `what` is one or several; else None."""
    if _is_chat(what):
        return [list(what)]
    if isinstance(what, Sequence) and not isinstance(what, str) and what and all(map(_is_chat, what)):
        return [list(chat) for chat in what]
    return None


def continued_chat(
    before: Chat,
    after: Chat,
    tokenizer: Any,
    seen: list[int],
    *,
    prompt: bool,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of the messages `after`, to be read behind the ids `seen` of `before`; `prompt`: and an answer's beginning.

    Raises:
        VariatorError: the tokenizer's template does not print `before` as the beginning of the whole.
    """
    if before and before[-1].get("role") == "assistant" and not before[-1].get("tool_calls"):
        marked = [*before[:-1], {**before[-1], "content": _ANSWER}]
        text = _printed(tokenizer, [*marked, *after], prompt, options)
        rest = text.rpartition(_ANSWER)[2]
        last = tokenizer.decode(seen[-1:])
        return _tokens(tokenizer, rest.removeprefix(last) if last.strip() else rest, special=False)
    ids = _template(tokenizer, [*before, *after], prompt=prompt, options=options)
    if ids[: len(seen)] != seen:
        raise VariatorError(
            "the tokenizer's chat template does not print the context's messages as the beginning of the whole "
            "conversation; give the question as text"
        )
    return ids[len(seen) :]


def _row(
    row: Any, tokenizer: Any, special: bool, options: Mapping[str, Any] | None, answer: bool
) -> list[int]:
    if _is_ids(row) or row is None or (isinstance(row, (list, tuple)) and not row):
        return [int(token) for token in row or ()]
    if tokenizer is None and (isinstance(row, str) or _is_chat(row)):
        raise VariatorError("text and messages need a tokenizer: pass tokenizer=..., or token ids")
    if isinstance(row, str):
        return _tokens(tokenizer, row, special)
    if _is_chat(row):
        return _template(tokenizer, row, prompt=answer, options=options)
    raise VariatorError(
        f"expected token ids, text or chat messages, one or several; got a {type(row).__name__}"
    )


def _template(
    tokenizer: Any, chat: Chat, *, prompt: bool, options: Mapping[str, Any] | None = None
) -> list[int]:
    return _tokens(tokenizer, _printed(tokenizer, chat, prompt, options), special=False)


def _printed(tokenizer: Any, chat: Chat, prompt: bool, options: Mapping[str, Any] | None) -> str:
    if not all("role" in message and {"content", "tool_calls"} & message.keys() for message in chat):
        raise VariatorError('every message needs "role" and "content" (or "tool_calls")')
    try:
        return tokenizer.apply_chat_template(
            chat, add_generation_prompt=prompt, tokenize=False, **(options or {})
        )
    except (ValueError, TypeError, LookupError, TemplateError) as error:
        raise VariatorError(f"the tokenizer's chat template does not take these messages: {error}") from None


def _tokens(tokenizer: Any, text: str, special: bool) -> list[int]:
    return tokenizer(without_surrogates(text), add_special_tokens=special).input_ids


def _is_chat(what: Any) -> bool:
    return isinstance(what, (list, tuple)) and bool(what) and all(isinstance(m, Mapping) for m in what)


def _is_ids(what: Any) -> bool:
    return (
        isinstance(what, (list, tuple))
        and bool(what)
        and all(isinstance(token, Integral) and not isinstance(token, bool) for token in what)
    )
