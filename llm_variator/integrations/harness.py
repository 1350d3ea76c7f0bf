"""lm-eval model types: `variator` for decoders, `variator-seq2seq` for T5.

Both are lm-eval's own `hf` with a `VariatorModel` inside. Without a plugin they compute what `hf` computes, to
the last digit. With one, the context of a request is the compressed prompt and the continuation stays dense:
see `scoring`. Importing this module imports lm-eval, which takes seconds, and registers the two names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype
from tqdm import tqdm
from transformers import BitsAndBytesConfig, PreTrainedModel

from llm_variator.config import VariatorConfig
from llm_variator.errors import VariatorError
from llm_variator.integrations import scoring
from llm_variator.model import VariatorModel
from llm_variator.sources.models import model_source

logger = logging.getLogger(__name__)

CPU_TOKENS_PER_BATCH = 16_384
"""`batch_size=auto` on a CPU, where memory cannot be probed by running out of it."""

OURS = frozenset({"rolling_context", "rolling_stride", "tie_head"})
"""Arguments of the model types that `hf` does not know, beside those of the plugin."""

_FIELDS = ("sites", "dense_head", "dense_tail")
_BITSANDBYTES = ("load_in_4bit", "load_in_8bit")


@register_model("variator")
class VariatorLM(HFLM):
    """A decoder with a compression plugin.

    Args:
        pretrained: alias, local folder or hub id; or a loaded model, with or without its `VariatorModel`.
        plugin: shipped name, folder or hub id; "none" or nothing: the base model.
        plugin_name: the plugin's name in the `VariatorModel`.
        k: without `plugin`, an untrained plugin that merges k vectors into their mean; with one, must be its k.
        keep: without `plugin`, an untrained one that merges nothing and keeps this share, a half, a quarter, ..., of
            the keys and values between the dense ends: the first of every block, what any scores have to beat.
        sites, dense_head, dense_tail: of such an untrained plugin (see `VariatorConfig`); several sites as
            "ffn+kv", which is the default of `k`; `keep` knows "kv" alone.
        tie_head: tie a T5's own output head to its embeddings, as `hf` of lm-eval 0.4.13 does with transformers 5;
            its scores are then those of `hf`, but not of the checkpoint.
        rolling_context, rolling_stride: tokens; see `loglikelihood_rolling`.
        logits_cache: as in `hf`, without a plugin only: it merges requests of the same text wherever their
            contexts end. That decides what is compressed; and of requests whose contexts end at different places
            `hf` scores the wrong tokens (lm-eval 0.4.13), so those are never merged here.
        **kwargs: everything that `hf` takes: `dtype`, `device`, `batch_size` (also "auto"), `parallelize`,
            `peft`, `load_in_4bit`, `load_in_8bit` and the `bnb_` settings, chat templates.

    Raises:
        VariatorError: arguments do not fit together, or to the model.
    """

    _BACKEND = "causal"
    _model: Any
    _tie_head: bool
    logits_cache: bool

    def __init__(
        self,
        pretrained: str | PreTrainedModel | VariatorModel,
        plugin: str | None = None,
        plugin_name: str = "default",
        k: int | None = None,
        keep: float | None = None,
        sites: str | Sequence[str] | None = None,
        dense_head: int | None = None,
        dense_tail: int | None = None,
        rolling_context: int | None = None,
        rolling_stride: int = 128,
        tie_head: bool = False,
        logits_cache: bool | None = None,
        **kwargs: Any,
    ) -> None:
        plugin = None if plugin in (None, "", "none") else plugin
        config = _untrained(plugin, k, keep, dict(zip(_FIELDS, (sites, dense_head, dense_tail), strict=True)))
        if logits_cache and (plugin or config):
            raise VariatorError(
                "logits_cache=True merges requests of the same text wherever their contexts end, but that decides "
                "what is compressed; leave it out"
            )
        for name, value in (("rolling_context", rolling_context), ("rolling_stride", rolling_stride)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise VariatorError(f"{name} must be a whole number of at least 1, got {value!r}")
        if isinstance(pretrained, str):
            pretrained = model_source(pretrained)
        self.rolling_context, self.rolling_stride = rolling_context, rolling_stride
        self._tie_head = tie_head
        super().__init__(
            pretrained,
            backend=kwargs.pop("backend", self._BACKEND),
            logits_cache=True if logits_cache is None else logits_cache,
            **kwargs,
        )
        if not isinstance(self._model, VariatorModel):
            self._model = VariatorModel(self._model)
        if plugin:
            self.variator.load_plugin(plugin, plugin_name)
            _check_ratio(plugin, k, self.variator.plugins[plugin_name])
        elif config:
            self.variator.add_plugin(plugin_name, config)
        if plugin or config:
            self.variator.set_plugin(plugin_name)

    @property
    def variator(self) -> VariatorModel:
        """The model under evaluation; its `set_plugin` may be used between evaluations."""
        assert isinstance(self.model, VariatorModel)
        return self.model

    # --- what lm-eval calls

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in nats.

        lm-eval gives each window a context of one token, so there is nothing to compress. With
        `rolling_context=C` a text is scored in consecutive pieces of `rolling_stride` tokens instead, each after
        the (up to) C tokens before it, the first after the prefix token: every token is scored once, and what
        stands before its piece is a compressed context. The same pieces are used without a plugin, so that
        figures can be compared.

        Raises:
            VariatorError: a plugin is active and `rolling_context` is not set.
        """
        if self.rolling_context is None:
            if self.variator.active_plugin is None:
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            raise VariatorError(
                "this task scores whole texts, and lm-eval would give each window a context of one token, which leaves "
                "nothing to compress; set rolling_context=512 (tokens, also for the base model to compare with)"
            )
        texts = [request.args[0] for request in requests]
        pieces = [self._pieces(self.tok_encode(text)) for text in texts]
        flat = [(None, context, piece) for each in pieces for context, piece in each]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in each) for each in pieces]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _pieces(self, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        """(context, piece) pairs whose pieces make up `tokens`."""
        context, stride = self.rolling_context or 1, self.rolling_stride
        return [
            (
                tokens[max(0, start - context) : start] or [self.prefix_token_id],
                tokens[start : start + stride],
            )
            for start in range(0, len(tokens), stride)
        ]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if self.variator.active_plugin is None:
            return self._dense(requests, disable_tqdm, override_bs)
        wanted = [self._request(context, continuation) for _, context, continuation in requests]
        if not wanted:
            return []
        batch_size = override_bs or self.batch_size
        if batch_size == "auto":
            longest = max(wanted, key=lambda request: len(request.context) + len(request.continuation))
            batch_size = self._detect_batch_size([(None, *map(list, longest))])
        bar = tqdm(
            total=len(set(wanted)),
            disable=disable_tqdm or self.rank != 0,
            desc="Scoring after compressed contexts",
        )
        with (
            bar,
            torch.autocast(
                self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            scores = scoring.score(
                self.variator,
                wanted,
                batch_size=int(batch_size),
                softmax_dtype=self.softmax_dtype,
                progress=bar.update,
            )
        answers = [(score.total, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _dense(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        """As `hf`, but for requests that its `logits_cache` answers wrongly: those of one text split differently."""
        ends: dict[tuple[int, ...], int] = {}
        same = all(
            ends.setdefault((*context, *continuation[:-1]), len(context)) == len(context)
            for _, context, continuation in requests
        )
        asked, self.logits_cache = self.logits_cache, self.logits_cache and same
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        finally:
            self.logits_cache = asked

    def _request(self, context: list[int], continuation: list[int]) -> scoring.ScoringRequest:
        """Too long a context loses its beginning, as in `hf`."""
        if self.backend == "seq2seq":
            context, continuation = context[-self.max_length :], continuation[-self.max_length :]
        else:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise VariatorError(
                    f"a continuation of {len(continuation)} tokens exceeds the model's {self.max_length}; "
                    "raise max_length or leave the task out"
                )
            context = context[-room:]
        return scoring.ScoringRequest(tuple(context), tuple(continuation))

    # --- loading

    def _get_backend(
        self, config: Any, backend: Any = "default", trust_remote_code: bool | None = False
    ) -> None:
        seq2seq = bool(getattr(config, "is_encoder_decoder", False))
        if backend != self._BACKEND or seq2seq != (backend == "seq2seq"):
            raise VariatorError(
                f"a {config.model_type} model is evaluated as --model {'variator-seq2seq' if seq2seq else 'variator'}"
            )
        super()._get_backend(config, backend, trust_remote_code)

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        given = {
            name: kwargs.pop(name)
            for name in list(kwargs)
            if name in _BITSANDBYTES or name.startswith("bnb_")
        }
        if given:
            if dtype := given.get("bnb_4bit_compute_dtype"):
                given["bnb_4bit_compute_dtype"] = get_dtype(dtype)
            kwargs["quantization_config"] = BitsAndBytesConfig(**given)
        super()._create_model(pretrained, **kwargs)
        # Set by hand, because T5's configuration always says tied, also where the checkpoint has a head of its own
        # (flan-t5, T5 1.1), and lm-eval's `hf` ties the weights again after loading.
        if _is_untied(self._model) and not self._tie_head:
            self._model.config.tie_word_embeddings = False

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        if self.device.type != "cpu":
            return int(super()._detect_batch_size(requests, pos))
        tokens = sum(map(len, requests[pos][1:])) if requests else self.max_length
        return max(1, min(int(self.max_batch_size or 1), CPU_TOKENS_PER_BATCH // tokens))


@register_model("variator-seq2seq")
class VariatorSeq2SeqLM(VariatorLM):
    """A T5 with a compression plugin: the context is the encoder's input, all of it compressed."""

    _BACKEND = "seq2seq"


def _is_untied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is not model.get_input_embeddings().weight


def _untrained(
    plugin: str | None, k: int | None, keep: float | None, fields: Mapping[str, Any]
) -> VariatorConfig | None:
    """The untrained plugin that the arguments describe, None where they describe none."""
    given = {name: value for name, value in fields.items() if value is not None}
    if keep is not None and (plugin or k is not None):
        raise VariatorError("keep describes an untrained plugin alone: leave out plugin and k, or keep")
    if plugin or (k is None and keep is None):
        if given:
            raise VariatorError(
                f"{', '.join(given)}: these describe an untrained plugin, give k or keep with them and no plugin"
            )
        return None
    if isinstance(given.get("sites"), str):
        given["sites"] = tuple(given["sites"].split("+"))
    return mean_config(k, **given) if k is not None else kept_config(keep, **given)


def mean_config(k: int, **fields: Any) -> VariatorConfig:
    """An untrained plugin: groups become their mean, which every member gets back."""
    return VariatorConfig(
        **{"k": k, "sites": ("ffn", "kv"), "compressor": "mean", "decompressor": "copy", **fields}
    )


def kept_config(keep: float | None, **fields: Any) -> VariatorConfig:
    """An untrained plugin: of every block its first keys and values are kept, the same share in all heads.

    Raises:
        VariatorError: a share that is not a half, a quarter, and so on, down to one key of a block.
    """
    shares = {2.0**-power: 2**power for power in range(1, VariatorConfig.block.bit_length())}
    if keep not in shares:
        raise VariatorError(
            f"keep={keep!r}: heads of an untrained plugin keep one of {', '.join(map(str, shares))}; for another "
            "share fit scores, python -m llm_variator.train --sites kv --compressor kv=select --keep SHARE"
        )
    return VariatorConfig(**{"k": shares[keep], "sites": ("kv",), "compressor": "select", **fields})


def _check_ratio(plugin: str, k: int | None, config: VariatorConfig) -> None:
    if k is not None and config.k_per_head is not None:
        raise VariatorError(f"plugin {plugin!r} has a ratio for every head, and not k={k}: leave k out")
    ratios = set(config.k.values()) if isinstance(config.k, Mapping) else {config.k}
    if k is not None and ratios != {k}:
        raise VariatorError(
            f"plugin {plugin!r} has k={', '.join(map(str, sorted(ratios)))}, not {k}; leave k out"
        )
