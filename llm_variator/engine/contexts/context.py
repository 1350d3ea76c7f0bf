"""`CompressedContext`: what goes on from a compressed prompt."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from llm_variator.engine.cache import (
    CompressedLayer,
    KVCacheReport,
    SelectedLayer,
    columns_of,
    expand,
    fork,
    release,
    released_on_error,
)
from llm_variator.engine.cache.paging import KVPool
from llm_variator.engine.cache.quantised import Quantised
from llm_variator.engine.cache.stores import KVStore, SharedStore, whole
from llm_variator.engine.contexts import files
from llm_variator.engine.contexts.fingerprints import check_function, function_state, plugin_fingerprint
from llm_variator.engine.contexts.host import Host
from llm_variator.engine.contexts.inputs import (
    Chat,
    Prompt,
    chats,
    check_embeddings,
    continued_chat,
    encode,
    pads_first,
    template_options,
)
from llm_variator.engine.contexts.prefill import read
from llm_variator.engine.groups import FILLER
from llm_variator.engine.plan import kv_heads
from llm_variator.errors import VariatorError


@dataclasses.dataclass(frozen=True, eq=False)
class CompressedContext:
    """The KV cache of a prompt and what is needed to go on from it. Made by `VariatorModel.compress` or `load`.

    Nothing changes a context once it is made: threads may share it, and what goes on from it (`extend`,
    `generate(question, context=...)`) holds only what it adds.
    """

    model: Host = dataclasses.field(repr=False)
    plugin: str | None
    """Name of the plugin in `model` that compressed it; None: dense."""
    input_ids: Tensor = dataclasses.field(repr=False)
    """(rows, tokens), padded on the left; a last generated token may not be in the cache yet. -1 for embeddings."""
    attention_mask: Tensor = dataclasses.field(repr=False)
    """(rows, tokens)."""
    cache: Cache = dataclasses.field(repr=False)
    """For reading. A model that went on from it would change it: go on from a fork."""
    tokenizer: Any = dataclasses.field(default=None, repr=False)
    """For questions that are text or messages."""
    messages: list[Chat] | None = dataclasses.field(default=None, repr=False)
    """Each row's conversation so far, where the context was given as messages."""
    fingerprint: str | None = dataclasses.field(default=None, repr=False)
    """Of the plugin as it was when it compressed this."""
    function: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    """Of the base as it was then: `fingerprints.function_state`."""
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    """Options that the chat template got, for messages to come too."""

    @property
    def rows(self) -> int:
        """Sequences in the batch."""
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Columns of the batch: the tokens of the longest row."""
        return self.input_ids.shape[1]

    @property
    def entries(self) -> tuple[float, ...]:
        """Entries of the KV cache per row, layer by layer."""
        return tuple(layer.entries for layer in self.report().layers)

    def report(self) -> KVCacheReport:
        """Entries and bytes of every layer."""
        return KVCacheReport.of(self._alive())

    def kept(self, row: int = 0) -> list[list[Tensor]]:
        """Where the entries of every layer's KV heads stand: `kept()[layer][head]` (entries,) int64, ascending columns.

        Read from the cache, so it is what attention sees. Columns count as in `input_ids`, without those of padding.
        Where tokens were merged, an entry stands at the last token of its group.

        Raises:
            VariatorError: there is no such row, or the context was freed.
        """
        if not 0 <= row < self.rows:
            raise VariatorError(f"the context has no row {row}: it has {self.rows}, counted from 0")
        mask = self.attention_mask[row].bool()
        heads = kv_heads(self.model.base.config)
        return [
            [_own(columns, row, mask) for columns in columns_of(layer, heads)]
            for layer in self._alive().layers
        ]

    def extend(
        self,
        more: Any = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        prefill_chunk_size: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> CompressedContext:
        """A context with `more` behind this one. Only `more` is read; this context stays as it is.

        Args:
            more: as for `VariatorModel.compress`; of one row, or of as many rows as this context has. A context
                of one row serves any number.
            attention_mask: of ids given as a tensor, or of embeddings.
            inputs_embeds: (rows, tokens, d) in place of `more`.
            prefill_chunk_size: read so many tokens at a time; the result is the same.
            chat_template_kwargs: as for `VariatorModel.compress`, beside those that this context was made with.
        """
        plugin = None if self.plugin is None else self.model.plugin(self.plugin)
        if plugin is not None and plugin_fingerprint(plugin) != self.fingerprint:
            raise VariatorError(
                f"the plugin {self.plugin!r} has changed since it compressed this context: compress it again"
            )
        after, new = self.appended(
            more, attention_mask, embeds=inputs_embeds, options=chat_template_kwargs, answer=False
        )
        cache, past = after.cache, after.cache.get_seq_length()
        ids, mask = after.input_ids, after.attention_mask
        with released_on_error(cache):
            unread = ids[:, past:] if new.embeds is None else after.unread(new)
            if read(self.model.base, plugin, cache, unread, mask, chunk=prefill_chunk_size):
                ids, mask, _ = pads_first(ids, mask)
        return dataclasses.replace(after, input_ids=ids, attention_mask=mask)

    def fork(self) -> CompressedContext:
        """The same context once more, sharing everything; each of the two is freed by itself."""
        return dataclasses.replace(self, cache=fork(self._alive()))

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedContext:
        check_function(self.model.base, self.function, "the context")
        cache, model = copy.deepcopy(self._alive(), memo), memo.get(id(self.model), self.model)
        return dataclasses.replace(self, model=model, cache=cache, function=function_state(model.base))

    def quantised(self, bits: int = 4) -> CompressedContext:
        """This context with keys and values in 4 or 8 bits, in memory and in files; what comes after is dense.

        Layers with a sliding window stay as they are.

        Raises:
            VariatorError: other bits, or an odd head_dim with 4.
        """
        cache = fork(self._alive())
        for layer in cache.layers:
            if isinstance(layer, SelectedLayer):
                layer.classes = [
                    dataclasses.replace(one, store=_in_bits(one.store, bits)) for one in layer.classes
                ]
            elif isinstance(layer, CompressedLayer):
                layer.store = _in_bits(layer.store, bits)
        return dataclasses.replace(self, cache=cache)

    def free(self) -> None:
        """Give the memory back. Needed for contexts in a pool where Python still refers to them.

        Raises:
            VariatorError: it was freed before.
        """
        release(self._alive())
        self.cache.layers.clear()

    def _alive(self) -> Cache:
        if not self.cache.layers:
            raise VariatorError("this context was freed: compress or load it again")
        return self.cache

    def appended(
        self,
        more: Any,
        attention_mask: Tensor | None,
        *,
        embeds: Tensor | None = None,
        options: Mapping[str, Any] | None = None,
        answer: bool = True,
    ) -> tuple[CompressedContext, Prompt]:
        """A context of its own with the tokens of `more`, whose cache has not read them yet; and these tokens.

        `embeds`: in place of `more`. `options`: of the chat template, beside those of this context. `answer`: whether
        messages end where an answer begins.
        """
        check_function(self.model.base, self.function, "the context")
        talk = chats(more) if self.messages is not None else None
        given = template_options(options)
        merged = {**self.chat_template_kwargs, **given}
        if talk is not None:
            more, talk = self._continued(talk, answer, merged)
            given = {}
        new = encode(
            more,
            self.tokenizer,
            attention_mask,
            special=False,
            embeds=embeds,
            options=given,
            answer=answer,
        )
        new = new.to(self.input_ids.device)
        rows = max(self.rows, len(new.ids))
        if len(new.ids) not in (1, rows) or self.rows not in (1, rows):
            raise VariatorError(
                f"the context has {self.rows} rows and what comes after it {len(new.ids)}: give one, or as many"
            )
        if new.embeds is not None:
            check_embeddings(new.embeds, self.model.base.get_input_embeddings())
        cache = fork(self._alive())
        if self.rows == 1 < rows:
            expand(cache, rows)
        new = new.repeated(rows)
        after = dataclasses.replace(
            self,
            input_ids=torch.cat((self.input_ids.expand(rows, -1), new.ids), dim=1),
            attention_mask=torch.cat(
                (self.attention_mask.expand(rows, -1), new.mask.to(self.attention_mask)), dim=1
            ),
            cache=cache,
            messages=talk,
            chat_template_kwargs=merged,
        )
        return after, new

    def unread(self, new: Prompt) -> Tensor:
        """Embeddings (rows, n, d) of what the cache has not read yet, where that ends with the tokens of `new`."""
        table: Any = self.model.base.get_input_embeddings()
        vectors = table(self.input_ids[:, self.cache.get_seq_length() :].clamp(min=0))
        if new.embeds is None:
            return vectors
        return torch.cat((vectors[:, : vectors.shape[1] - new.embeds.shape[1]], new.embeds), dim=1)

    def answered(self, ids: Tensor, mask: Tensor, sequences: Tensor, ends: Any) -> CompressedContext:
        """This context after its cache has read all of `sequences` (rows, tokens) but the last token.

        `ids` and `mask` are what `sequences` begin with, one row for every one or several of them. `ends`: ids that
        end a row; what comes after is padding.
        """
        new, repeats = sequences[:, ids.shape[1] :], len(sequences) // len(ids)
        ended = torch.isin(new, torch.tensor([] if ends is None else ends, device=new.device)).long()
        valid = ended.cumsum(1) - ended == 0
        mask = torch.cat((mask.repeat_interleave(repeats, dim=0), valid.to(mask)), dim=1)
        if not bool(valid.all()):
            for layer in self.cache.layers:
                if isinstance(layer, (CompressedLayer, SelectedLayer)):
                    layer.hide(mask)
        messages = None
        if self.messages is not None:
            answers = [
                {"role": "assistant", "content": self.tokenizer.decode(row[own], skip_special_tokens=True)}
                for row, own in zip(new, valid, strict=True)
            ]
            messages = [[*self.messages[row // repeats], answer] for row, answer in enumerate(answers)]
        return dataclasses.replace(self, input_ids=sequences, attention_mask=mask, messages=messages)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the context to one file (safetensors), whole or not at all: an old file stays until then."""
        self._alive()
        files.save(self, Path(path))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Host,
        *,
        tokenizer: Any = None,
        pool: KVPool | None = None,
        verify: bool = True,
    ) -> CompressedContext:
        """Read a file that `save` wrote, for the model, plugin and tokenizer it was made with.

        Keys and values stay in the file: on the CPU they are mapped into memory, and read when they are used.

        Args:
            path: the file.
            model: has the plugin loaded, under any name.
            tokenizer: for text and messages in questions.
            pool: copy keys and values into its blocks.
            verify: compare checksums, which reads the file once. False: only what is used is ever read.

        Raises:
            VariatorError: the file is damaged or no context, or belongs to another model, plugin or tokenizer.
        """
        fields = files.load(Path(path), model, tokenizer, pool=pool, verify=verify)
        return cls(model, tokenizer=tokenizer, **fields)

    def _continued(
        self, talk: list[Chat], answer: bool, options: Mapping[str, Any]
    ) -> tuple[list[list[int]], list[Chat]]:
        assert self.messages is not None
        rows = max(len(talk), len(self.messages))
        before, after = (list(chat) * (rows // len(chat)) for chat in (self.messages, talk))
        if not len(before) == len(after) == rows:
            raise VariatorError(f"the context has {self.rows} conversations, the question {len(talk)}")
        seen = [
            row[own.bool()].tolist() for row, own in zip(self.input_ids, self.attention_mask, strict=True)
        ]
        ids = [
            continued_chat(
                before[i], after[i], self.tokenizer, seen[i % len(seen)], prompt=answer, options=options
            )
            for i in range(rows)
        ]
        return ids, [[*before[i], *after[i]] for i in range(rows)]


def _own(columns: Tensor, row: int, mask: Tensor) -> Tensor:
    """Those of one row that stand for a token of it, ascending."""
    own = columns[min(row, len(columns) - 1)].long().to(mask.device)
    own = own[own != FILLER]
    return own[mask[own]].sort().values


def _in_bits(store: DynamicLayer, bits: int) -> SharedStore:
    """A store of the same entries in 4 or 8 bits; `store` is of no use afterwards."""
    keys, values = (Quantised.of(t, bits) for t in whole(store))
    if isinstance(store, KVStore):
        store.free()
    return SharedStore(((keys, values),))
