"""Token pruning as the paper compares with it (section 4.3, after LTP, Kim et al. 2022): only FFNs are skipped.

In every encoder layer the tokens that receive the most attention pass the FFN; the others keep the residual.
No token leaves the sequence. The model itself is trained, so nothing is frozen and nothing is added to it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from llm_variator.engine.files import write_atomically
from llm_variator.engine.hooks import architecture_of, host_of
from llm_variator.engine.hooks.attention import OwnAttentionFunction
from llm_variator.engine.hooks.hook import ATTACHED, refuse_attached
from llm_variator.errors import VariatorError

LTP_FILE = "ltp.json"
FORMAT_VERSION = 1
ATTENTION_FUNCTION = "variator_ltp"  # the name under which transformers finds `attention_with_probabilities`


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """The FFN of one layer with its norm and residual, as paths of real modules from the layer."""

    first: str
    """Its first argument is the tokens."""
    last: str
    """Returns the tokens, the residual added. If not `first`: its second argument is the residual."""


T5_FFN = FeedForward("layer.1", "layer.1")
FEED_FORWARD = {"t5": T5_FFN, "mt5": T5_FFN, "bert": FeedForward("intermediate", "output")}


def kept_tokens(tokens: int, keep: float) -> int:
    """How many of a row's `tokens` pass the FFN: the share `keep`, rounded up, at least one."""
    return max(1, math.ceil(round(keep * tokens, 9)))  # 0.1 * 30 is a little more than 3


def importance(probabilities: Tensor, valid: Tensor | None) -> Tensor:
    """Attention each token receives, averaged over heads and over the row's real queries.

    probabilities (b, H, queries, tokens), valid (b, tokens) bool, None where no token is padding -> (b, tokens).
    """
    received = probabilities.mean(1)
    if valid is None:
        return received.mean(1)
    queries = valid.unsqueeze(-1)
    return received.masked_fill(~queries, 0).sum(1) / queries.sum(1).clamp(min=1)


def select(scores: Tensor, valid: Tensor | None, keep: float) -> Tensor:
    """The most important tokens of every row: scores (b, n) -> indices (kept,) into the b*n tokens."""
    rows, width = scores.shape
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    order = scores.argsort(dim=1, descending=True, stable=True)
    flat = order + torch.arange(rows, device=scores.device)[:, None] * width
    if valid is None:
        return flat[:, : kept_tokens(width, keep)].flatten()
    counts = [kept_tokens(tokens, keep) for tokens in valid.sum(1).tolist()]
    return torch.cat([row[:count] for row, count in zip(flat, counts, strict=True)])


class _Passing(threading.local):
    """What a layer's attention leaves for its FFN, private to a thread."""

    def __init__(self) -> None:
        self.tokens: dict[int, tuple[Tensor, Any]] = {}
        """layer -> indices of the tokens that pass, and once the FFN has begun: all tokens (b, n, d)."""


class TokenPruning:
    """Prune the FFNs of an encoder (T5 or BERT, any head) until `remove`; usable as a context manager.

    Attributes:
        keep: share of the tokens that pass each FFN.
    """

    def __init__(self, model: PreTrainedModel, keep: float = 0.25) -> None:
        """Attach to `model`, whose weights stay as trainable as they are.

        Raises:
            VariatorError: `model` is no supported encoder, has something attached already, or `keep` is not
                above 0 and at most 1.
        """
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
            raise VariatorError(f"keep must be a share above 0 and at most 1, got {keep!r}")
        host = host_of(model)
        architecture = architecture_of(host)
        model_type = host.config.model_type
        if architecture.decoder or model_type not in FEED_FORWARD:
            raise VariatorError(
                f"token pruning is for encoders ({', '.join(FEED_FORWARD)}), not {model_type!r}"
            )
        refuse_attached(host)
        self.keep = float(keep)
        self._host = host
        self._passing = _Passing()
        self._handles: list[Any] = []
        ffn = FEED_FORWARD[model_type]
        for index, block in enumerate(architecture.blocks(host)):
            attention = block.get_submodule(architecture.attention)
            first, last = block.get_submodule(ffn.first), block.get_submodule(ffn.last)
            self._handles.append(
                OwnAttentionFunction(attention, ATTENTION_FUNCTION, attention_with_probabilities)
            )
            self._hook(attention, first, last, index)
        setattr(host, ATTACHED, True)

    def _hook(self, attention: nn.Module, first: nn.Module, last: nn.Module, layer: int) -> None:
        passing = self._passing

        def after_attention(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            probabilities = output[-1].detach()
            valid = _valid(kwargs.get("mask", kwargs.get("attention_mask")))
            passing.tokens[layer] = select(importance(probabilities, valid), valid, self.keep), None

        def before_first(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            kept, _ = passing.tokens[layer]
            passing.tokens[layer] = kept, args[0]
            return (args[0].flatten(0, 1)[kept],)

        def before_last(module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            kept, _ = passing.tokens[layer]
            return args[0], args[1].flatten(0, 1)[kept]

        def after_last(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            kept, tokens = passing.tokens.pop(layer)
            # an fp16 T5 keeps the last weight of its FFN, and so this output, in fp32
            return tokens.to(output.dtype).flatten(0, 1).index_copy(0, kept, output).view_as(tokens)

        self._handles.append(attention.register_forward_hook(after_attention, with_kwargs=True))
        self._handles.append(first.register_forward_pre_hook(before_first))
        if last is not first:
            self._handles.append(last.register_forward_pre_hook(before_last))
        self._handles.append(last.register_forward_hook(after_last))

    def remove(self) -> None:
        """Detach: the model computes all tokens again."""
        if self._handles:
            delattr(self._host, ATTACHED)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> TokenPruning:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `ltp.json`; the weights are the model's own, saved by its `save_pretrained`."""
        settings = {"format_version": FORMAT_VERSION, "keep": self.keep}
        write_atomically(Path(folder) / LTP_FILE, json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, model: PreTrainedModel, folder: str | os.PathLike[str]) -> TokenPruning:
        """Attach to `model` with the settings that `save` wrote.

        Raises:
            VariatorError: the file is missing or wrong; the message names it.
        """
        file = Path(folder) / LTP_FILE
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise VariatorError(f"{file} not found: no model with token pruning was saved there") from None
        except (OSError, ValueError) as error:
            raise VariatorError(f"{file} is not readable JSON ({error}); save it again") from None
        if not isinstance(settings, dict) or settings.keys() != {"format_version", "keep"}:
            raise VariatorError(f"{file} must hold format_version and keep, nothing else; save it again")
        if settings["format_version"] != FORMAT_VERSION:
            raise VariatorError(
                f"{file}: format_version {settings['format_version']!r} is not supported, this version reads "
                f"{FORMAT_VERSION}"
            )
        try:
            return cls(model, settings["keep"])
        except VariatorError as error:
            raise VariatorError(f"{file}: {error}") from None


def _valid(mask: Any) -> Tensor | None:
    """(b, tokens) bool from the mask that an encoder layer gets; None where no token is padding."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise VariatorError(
            f"token pruning cannot read an attention mask of type {type(mask).__name__}: load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    seen = mask if mask.dtype == torch.bool else mask > 0 if mask.ndim == 2 else mask >= 0
    return seen if mask.ndim == 2 else seen[:, 0].any(1)


def attention_with_probabilities(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Transformers' attention function of the pruned layers: always returns the probabilities, before dropout.

    query, key and value (b, H, n, d) -> (b, n, H, d), (b, H, n, n).
    """
    scores = query @ key.transpose(2, 3) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if (valid := _valid(attention_mask)) is not None:
        scores = scores.masked_fill(~valid[:, None, None], torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1)
    out = F.dropout(probabilities, dropout, training=module.training) @ value
    return out.transpose(1, 2).contiguous(), probabilities
