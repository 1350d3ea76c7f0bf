"""Tokenizers, and one without a vocabulary for models with random weights."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm_variator.errors import VariatorError
from llm_variator.sources.models import smollm2
from llm_variator.sources.models.configuration import holds_adapter, load_config
from llm_variator.sources.models.names import checked_name, load_error, local_only, local_path, source_of


def load_tokenizer(name: str | os.PathLike[str], *, stand_in: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a name.

    Args:
        name: alias, local folder or hub id.
        stand_in: give a byte-level tokenizer (256 bytes and 3 special tokens) where the real one would have
            to be fetched or is missing. For models with random weights, whose texts mean nothing anyway.

    Raises:
        VariatorError: there is no tokenizer, and no stand-in was allowed.
    """
    name = checked_name(name)
    if stand_in and not (local_path(name).is_dir() or (name == "smollm2-135m" and smollm2.find_gguf())):
        return _stand_in(name)
    source = local_path(name) if holds_adapter(name) else source_of(name)
    only_local = local_only(source)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(source), trust_remote_code=False, local_files_only=only_local
        )
    except Exception as error:  # the tokenizers library raises bare ones for files of a newer version
        if stand_in:
            return _stand_in(name)
        raise load_error(name, source, "tokenizer", error, only_local) from error
    return tokenizer


def _stand_in(name: str) -> PreTrainedTokenizerFast:
    try:
        model_type = load_config(name).model_type
    except VariatorError:  # not even a configuration: whatever is tried next will say so
        model_type = "llama"
    return byte_tokenizer(model_type)


def byte_tokenizer(model_type: str = "llama") -> PreTrainedTokenizerFast:
    """A tokenizer without a vocabulary file: one token per UTF-8 byte, plus the special tokens of the family.

    Those are `<pad>`, `<s>` and `</s>`; for T5 also the 100 sentinels, and `</s>` after every text; for BERT
    also the mask token, and `<s>` and `</s>` around every text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options: dict[str, Any] = {}
    template = None
    if model_type in ("t5", "mt5"):
        options["extra_special_tokens"] = [f"<extra_id_{number}>" for number in range(100)]
        template = ("$A </s>", "$A </s> $B </s>")
    elif model_type == "bert":
        options |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
        template = ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1")
    extra = [*options.get("extra_special_tokens", []), *(["<mask>"] if "mask_token" in options else [])]
    vocab = {token: index for index, token in enumerate(specials + alphabet + extra)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if template is not None:
        core.post_processor = processors.TemplateProcessing(
            single=template[0], pair=template[1], special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=2**31,
        **options,
    )
