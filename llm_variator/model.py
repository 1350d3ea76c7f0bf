"""`VariatorModel`: a frozen Hugging Face model with compression plugins that can be swapped at run time."""

from __future__ import annotations

import dataclasses
import inspect
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.pipelines import base as pipelines

from llm_variator.config import CONFIG_FILE, VariatorConfig
from llm_variator.engine.cache import (
    CompressedLayer,
    KVCacheReport,
    is_compressed,
    release,
    released_on_error,
)
from llm_variator.engine.cache.naming import cache_argument, cache_of, take_cache
from llm_variator.engine.cache.paging import KVPool, PagedStore
from llm_variator.engine.contexts import CompressedContext
from llm_variator.engine.contexts.fingerprints import function_state, plugin_fingerprint
from llm_variator.engine.contexts.inputs import (
    NO_TOKEN,
    chats,
    check_embeddings,
    encode,
    padding_first,
    prompt_lengths,
    template_options,
)
from llm_variator.engine.contexts.prefill import read
from llm_variator.engine.devices import input_device
from llm_variator.engine.hooks.compiled import CompiledStack
from llm_variator.engine.plugin import CompressionPlugin, warn_if_other_weights
from llm_variator.engine.prompts import (
    check_generation,
    check_vocabulary,
    drafts,
    normalised,
    read_ahead,
    refuse_drafts_after,
    refuse_other_adapters,
    refuse_reading_twice,
    setting,
    turned,
    uncompiled,
    with_own_cache,
    without_padding,
)
from llm_variator.engine.session import Session, answered, broken, outside, scope
from llm_variator.engine.trainable import TrainableHolder
from llm_variator.errors import VariatorError
from llm_variator.sources.models import load_model, plugin_folder
from llm_variator.sources.models.hub import upload


class VariatorModel(TrainableHolder):
    """A base model, frozen, and its plugins by name. Anything not found here is looked up on the base model."""

    _hf_peft_config_loaded = True
    """What transformers' Trainer asks of a model with a quantised base: that something on it can be trained."""

    skip_unread = True
    """Leave out what nobody reads of a decoder's last layer: see `engine.hooks.last_layer`."""
    _report: KVCacheReport | None = None

    # --- plugins

    @classmethod
    def from_pretrained(
        cls,
        base: PreTrainedModel | str,
        plugin: str | os.PathLike[str],
        plugin_name: str = "default",
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> VariatorModel:
        """Attach a saved plugin (folder, hub id or shipped name such as "smollm2-135m/k2") and activate it.

        Args:
            base: a loaded model, or a name for `loading.load_model`, which gets `kwargs` (dtype, device, ...).
            plugin: as for `load_plugin`, with `revision` and `subfolder`.
            plugin_name: its name in this model.
            revision: of the plugin's repository on the hub.
            subfolder: the folder in it that holds the plugin.
            **kwargs: of `load_model`.
        """
        if kwargs and not isinstance(base, str):
            raise VariatorError(
                f"{', '.join(kwargs)}: for loading a model by name; this one is loaded already"
            )
        model = cls(load_model(base, **kwargs) if isinstance(base, str) else base)
        try:
            model.load_plugin(plugin, plugin_name, revision=revision, subfolder=subfolder)
        except BaseException:
            model.unload()  # nobody else could: a base that was given is as before
            raise
        model.set_plugin(plugin_name)
        return model

    def load_plugin(
        self,
        plugin: str | os.PathLike[str],
        plugin_name: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        decode_block: int | None = None,
    ) -> CompressionPlugin:
        """Load a saved plugin without activating it. Nothing changes on error.

        Args:
            plugin: a folder, a shipped name, or a hub id; on the hub also owner/name/subfolder@revision.
            plugin_name: its name in this model.
            revision: of a repository on the hub: a branch, a tag or a commit.
            subfolder: the folder in it that holds the plugin.
            dtype: of its weights; default: the base's.
            decode_block: replaces the plugin's own: compressing generated tokens needs no other weights.
        """
        folder = plugin_folder(plugin, revision=revision, subfolder=subfolder)
        config = VariatorConfig.from_json(folder / CONFIG_FILE)
        if decode_block is not None:
            config = dataclasses.replace(config, decode_block=decode_block)
        if config.base is None:
            raise VariatorError(f"{folder / CONFIG_FILE} does not name its base model; save the plugin again")
        try:
            built = self._build(config)
        except VariatorError as error:
            raise VariatorError(f"{folder}: {error}") from None
        built.load_weights(folder)
        warn_if_other_weights(folder, config.base, self.signature.weights)
        return self._put(plugin_name, built.to(dtype or self._host.dtype))

    # --- running

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        prompt_length: int | Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward with the prompt compressed by the active plugin; returns what the base returns.

        Args:
            input_ids: (rows, tokens).
            attention_mask: 2D, over cache and input; None: no padding.
            prompt_length: the first so many tokens of each row are prompt, the rest stays dense (teacher
                forcing); an int, or one per row (rows,), padding not counted. None: all tokens are prompt; a
                single token after a cache is always dense. Not for encoders (T5, BERT), which compress all
                of their tokens.
            *args: what the base takes third and further by position.
            position_ids: (rows, tokens), the base's, as all that follow: named because Hugging Face's Trainer gives a
                model the columns of a data set that its forward names.
            token_type_ids: (rows, tokens), of BERT.
            inputs_embeds: (rows, tokens, d) in place of `input_ids`.
            labels: the loss counts every one: leave those of the prompt out (-100), tokens of a group see each other.
            decoder_input_ids: (rows, answer), of T5.
            decoder_attention_mask: (rows, answer), of T5.
            start_positions: (rows,), of BERT for question answering.
            end_positions: (rows,), likewise.
            **kwargs: the base's further arguments (a cache, ...).
        """
        names_left = self._positional()[2:]
        if len(args) > len(names_left):
            raise TypeError(f"forward takes at most {len(names_left) + 2} arguments by position")
        kwargs |= dict(zip(names_left, args, strict=False))
        named = dict(
            position_ids=position_ids, token_type_ids=token_type_ids, inputs_embeds=inputs_embeds, labels=labels,
            decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask,
            start_positions=start_positions, end_positions=end_positions,
        )  # fmt: skip
        kwargs |= {name: value for name, value in named.items() if value is not None}
        if prompt_length is not None:
            self.decoder_only("prompt_length", "all tokens of an encoder are compressed, leave it out")
        plugin, cache = self._active(), self._give_cache(kwargs)
        if plugin is None and not is_compressed(cache):
            return outside(self.base, input_ids, attention_mask, **kwargs)
        if self.training and cache is None:
            kwargs.setdefault("use_cache", False)
        session = Session(plugin, prompt_lengths(prompt_length), skip_unread=self.skip_unread)
        with scope(session):
            output = self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        self._finish(session, kwargs)
        return output

    @torch.no_grad()
    def generate(
        self,
        inputs: Any = None,
        *args: Any,
        context: CompressedContext | None = None,
        return_context: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hugging Face's `generate` with the prompt compressed by the active plugin; decoding is dense.

        Right-padded batches are re-padded on the left first. A cache of an earlier turn can be continued: each
        new prompt segment is compressed in its turn. Of T5 the prompt is the encoder's input, and all of the
        decoder's ways to generate are as ever.

        Args:
            inputs: token ids (rows, tokens), or `input_ids=`; after a `context`, or with `tokenizer=`, text and
                messages too, which an answer follows. Embeddings (rows, tokens, d) go by `inputs_embeds=`: as in
                Hugging Face, the output begins behind them.
            *args: what Hugging Face's takes second and further by position, a `generation_config` first.
            context: what comes before `inputs`, read by `compress`; one row serves any number of questions.
                It is shared, not changed. Sequences come back without it: question and answer.
            return_context: return (output, context after the answer), for the next turn. Not with beams.
            chat_template_kwargs: for messages after a `context`, beside those that it was made with: see `compress`.
            **kwargs: Hugging Face's. `prefill_chunk_size`: read the prompt so many tokens at a time, as far as
                groups allow; the result is the same.
        """
        self._refuse_headless("generate")
        if args:
            names = list(inspect.signature(GenerationMixin.generate).parameters)[2:-1]
            if len(args) > len(names):
                raise TypeError(f"generate takes at most {len(names) + 1} arguments by position")
            kwargs |= dict(zip(names, args, strict=False))
        if inputs is not None:
            kwargs["input_ids"] = inputs
        given = kwargs.get("input_ids")
        plain = isinstance(given, (list, tuple, str, Mapping)) or (
            isinstance(given, Tensor) and given.ndim == 1
        )
        if context is None and plain:
            prompt = encode(given, kwargs.get("tokenizer"), kwargs.get("attention_mask"), answer=True)
            device = input_device(self._host)
            kwargs |= {"input_ids": prompt.ids.to(device), "attention_mask": prompt.mask.to(device)}
        if context is not None:
            return self._generate_after(context, return_context, chat_template_kwargs, kwargs)
        if return_context or chat_template_kwargs:
            name = "return_context" if return_context else "chat_template_kwargs"
            raise VariatorError(f"{name} needs a context to go on from: see VariatorModel.compress")
        plugin, cache = self._active(), self._give_cache(kwargs)
        if plugin is None and not is_compressed(cache):
            try:
                output = outside(self.base.generate, **kwargs)
                if cache is None and not isinstance(output, Tensor):
                    cache = cache_of(output)
            finally:
                if cache is not None:
                    answered(cache)
            return output
        if self._architecture.decoder:
            check_generation(self._host, plugin, kwargs)
            if past := cache.get_seq_length() if cache is not None else 0:
                refuse_reading_twice(self._host, kwargs, past)
                kwargs = turned(kwargs, past)
            else:
                kwargs = normalised(self._host, kwargs)
            kwargs = read_ahead(self.base, self._host, plugin, kwargs)
        return self._generate(plugin, kwargs)

    def _generate(self, plugin: CompressionPlugin | None, kwargs: Mapping[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        session = Session(plugin, generating=True, skip_unread=self.skip_unread)
        session.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if plugin is not None and self._architecture.decoder and drafts(self._host, kwargs):
            refuse_drafts_after(self._give_cache(dict(kwargs)))
            session.drafts, session.prompts = True, kwargs["input_ids"].shape[1]
        try:
            with scope(session):
                output = self.base.generate(**uncompiled(kwargs))
        finally:  # also where it is interrupted
            if session.cache is not None:
                answered(session.cache)
        self._finish(session, kwargs)
        return output

    def _generate_after(
        self,
        context: CompressedContext,
        return_context: bool,
        options: Mapping[str, Any] | None,
        kwargs: dict[str, Any],
    ) -> Any:
        plugin = self._active()
        check_generation(self._host, plugin, kwargs)
        refuse_reading_twice(self._host, kwargs)
        refuse_other_adapters(kwargs)
        kwargs = with_own_cache(self._host, kwargs)
        if return_context and (setting(self._host, kwargs, "num_beams") or 1) > 1:
            raise VariatorError(
                "return_context does not work with beams: their caches are of other sequences"
            )
        if context.model is not self:
            raise VariatorError(
                "the context belongs to another VariatorModel: save it and load it for this one"
            )
        if take_cache(kwargs) is not None:
            raise VariatorError("give either a context or a cache, not both")
        names = ("input_ids", "attention_mask", "inputs_embeds")
        given, mask, embeds = (kwargs.pop(name, None) for name in names)
        after, question = context.appended(given, mask, embeds=embeds, options=options)
        kwargs |= {"attention_mask": after.attention_mask, cache_argument(self._host): after.cache}
        with released_on_error(after.cache):
            stops = kwargs.get("stopping_criteria") or setting(self._host, kwargs, "stop_strings")
            answers = len(after.input_ids) * (setting(self._host, kwargs, "num_return_sequences") or 1)
            if return_context and stops and answers > 1:
                raise VariatorError(
                    "return_context tells by eos_token_id alone where each of several rows ended: leave out "
                    "stop_strings and stopping_criteria, or ask for one answer at a time"
                )
            if question.embeds is None:
                check_vocabulary(self._host, question.ids)
            embedded = bool((after.input_ids == NO_TOKEN).any())
            if embedded:  # what lies in the cache is never read
                new = after.unread(question)
                seen = new.new_zeros(len(new), after.tokens - new.shape[1], new.shape[2])
                kwargs["inputs_embeds"] = torch.cat((seen, new), dim=1)
            else:
                kwargs["input_ids"] = without_padding(after.input_ids, after.attention_mask)
            kwargs = read_ahead(self.base, self._host, plugin, kwargs, forked=True)
            output = self._generate(plugin, kwargs)
        whole = output if isinstance(output, Tensor) else output.sequences
        answer = whole if embedded else whole[:, after.tokens :]
        repeats, sequences = len(answer) // len(question.ids), answer
        if question.embeds is None:
            sequences = torch.cat((question.ids.repeat_interleave(repeats, dim=0), answer), dim=1)
        if isinstance(output, Tensor):
            output = sequences
        else:
            output.sequences = sequences
        if not return_context:
            if isinstance(output, Tensor):
                release(after.cache)
            return output
        ids, mask = after.input_ids, kwargs["attention_mask"]
        if not torch.equal(mask, after.attention_mask):  # rows were read apart
            ids = padding_first(ids, after.attention_mask)
        whole = torch.cat((ids.repeat_interleave(repeats, dim=0), answer), dim=1)
        return output, after.answered(ids, mask, whole, setting(self._host, kwargs, "eos_token_id"))

    @torch.no_grad()
    def compress(
        self,
        context: Any = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        tokenizer: Any = None,
        prefill_chunk_size: int | None = None,
        pool: KVPool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> CompressedContext:
        """Read a prompt once with the active plugin, for `generate(question, context=...)`.

        Args:
            context: token ids (a tensor (tokens,) or (rows, tokens), or lists), a tokenizer's output, text, or
                chat messages; one row or several.
            attention_mask: of ids given as a tensor, or of embeddings.
            inputs_embeds: (rows, tokens, d) in place of `context`.
            tokenizer: for text and messages, here and in questions.
            prefill_chunk_size: read so many tokens at a time, as far as groups allow, so that activations need
                memory for so many only; the result is the same.
            pool: keep keys and values in its blocks, as everything that goes on from this context will.
            chat_template_kwargs: options of the tokenizer's chat template for messages, here and in questions:
                `enable_thinking`, `tools` (schemas or documented functions), `documents`, and what else it reads.

        Raises:
            VariatorError: nothing to read, a form that is not known, or the model is no decoder.
        """
        self.decoder_only("compress", "an encoder keeps no KV cache")
        plugin = self._active()
        self._refuse_headless("compress")
        options = template_options(chat_template_kwargs)
        prompt = encode(context, tokenizer, attention_mask, embeds=inputs_embeds, options=options)
        ids, mask, embeds = prompt.to(input_device(self._host))
        if embeds is None:
            check_vocabulary(self._host, ids)
        else:
            check_embeddings(embeds, self._host.get_input_embeddings())
        layers = range(self.signature.num_layers)
        cache: Any = DynamicCache(config=self._host.config)
        for layer in layers:
            if not self._architecture.slides(self._host, layer):
                cache.layers[layer] = CompressedLayer(None if pool is None else PagedStore(pool))
        with released_on_error(cache):
            tokens = ids if embeds is None else embeds
            read(self.base, plugin, cache, tokens, mask, chunk=prefill_chunk_size)
        self._report = KVCacheReport.of(cache)
        made_by = None if plugin is None else plugin_fingerprint(plugin)
        state = function_state(self.base)
        return CompressedContext(
            self, self.active_plugin, ids, mask, cache, tokenizer, chats(context), made_by, state, options
        )

    def kv_cache_report(self, cache: Any = None) -> KVCacheReport:
        """Entries and bytes per layer of a cache or context, by default as they were after the last compressed call.

        Of what lies in a pool also its blocks, how many of them are shared, and what unshared ones would need.
        """
        self.decoder_only("kv_cache_report", "an encoder keeps no KV cache")
        if isinstance(cache, CompressedContext):
            return cache.report()
        if cache is not None:
            return KVCacheReport.of(cache)
        if self._report is None:
            raise VariatorError(
                "no cache to report yet: run generate or forward(use_cache=True) with a plugin first"
            )
        return self._report

    def _refuse_headless(self, what: str) -> None:
        if not self._host.can_generate():
            raise VariatorError(
                f"{type(self._host).__name__} cannot {what}: it has no language-model head to generate with; load it "
                "with one (AutoModelForCausalLM), or call the model for its hidden states"
            )

    def _positional(self) -> list[str]:
        """The names of the base's arguments, in its order."""
        return list(inspect.signature(type(self._host).forward).parameters)[1:]

    def _give_cache(self, kwargs: dict[str, Any]) -> Any:
        """The cache among a caller's arguments, which the base gets under the name that it knows."""
        cache = take_cache(kwargs)
        if cache is not None:
            kwargs[cache_argument(self._host)] = cache
        return cache

    @torch.compiler.disable
    def _finish(self, session: Session, kwargs: Mapping[str, Any]) -> None:
        """After a call: raise if its passes bypassed the hooks, else remember what its cache holds."""
        if kwargs.get("encoder_outputs") is None:
            session.finish()
        if session.plugin is not None and "cross" in session.plugin.config.sites and session.cross is None:
            raise broken("the decoder did not read merged states")
        if session.cache is not None:
            self._report = KVCacheReport.of(session.cache)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile prefill and decode with torch.compile, with every plugin and without; results stay the same.

        Code is compiled when it is first needed, once per plugin and kind of pass, and for prompts again when their
        length or padding first differs.
        What cannot be compiled (passes with gradients, caches with stores of their own, `decode_block`) runs as
        before, with one warning each. Every call checks that its plugin really merged.

        Args:
            *args: none.
            **options: of `torch.compile`; default `fullgraph=True`: a graph break is an error.

        Raises:
            VariatorError: the base is no decoder.
        """
        self.decoder_only(
            "compile", "an encoder splits its input inside the module to compile, where torch stops"
        )
        if self._host.base_model is self._host:
            raise VariatorError(
                f"compile is for decoders with a head, which {type(self._host).__name__} has not: load it with one "
                "(AutoModelForCausalLM), or run it uncompiled"
            )
        if args:
            raise VariatorError("compile takes options of torch.compile by name, as in backend='inductor'")
        # where torch's own Module.compile puts its call: copies of the module leave it out
        stack = self._host.base_model
        stack._compiled_call_impl = CompiledStack(stack, options)

    def uncompile(self) -> None:
        """Undo `compile`."""
        if isinstance(self._host.base_model._compiled_call_impl, CompiledStack):
            self._host.base_model._compiled_call_impl = None

    def _detach(self) -> None:
        self.uncompile()
        super()._detach()

    # --- files

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        plugin_name: str | None = None,
        dtype: torch.dtype | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a plugin (default: the active one): weights, config and a model card that lists `facts`.

        `dtype`: of the saved weights, default as they are. The base model is never written.
        """
        plugin = self.plugin(plugin_name)
        plugin.save(folder, dtype=dtype, card=plugin.card(facts))

    def push_to_hub(
        self, repo_id: str, *, plugin_name: str | None = None, private: bool | None = None
    ) -> str:
        """Upload a plugin to the Hugging Face hub; returns the commit's address."""
        plugin = self.plugin(plugin_name)
        with tempfile.TemporaryDirectory() as folder:
            plugin.save(folder, card=plugin.card(source=repo_id))
            return upload(Path(folder), repo_id, private=private)


# transformers' pipelines log an error for every class that they have not heard of; this is their list of wrappers.
_wrappers = getattr(pipelines, "SUPPORTED_PEFT_TASKS", {})
for _task in {*_wrappers, "fill-mask", "question-answering"}:
    _wrappers.setdefault(_task, []).append(VariatorModel.__name__)
