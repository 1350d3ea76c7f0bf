"""What every analysis is given: a model, text, and a file for the figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_variator.cli import flag, flags
from llm_variator.errors import VariatorError
from llm_variator.sources.corpora import enough, read_windows, spread


@dataclass(frozen=True, kw_only=True)
class Reading(flags.Stored, flags.Text, flags.BaseModel):
    """How it is read."""

    dtype: str = flag("float32", "of base model and plugins")
    data: str = "wikitext2/test"
    quantize: Literal["nf4", "int8"] | None = flag(None, "refused", hidden=True)

    def __post_init__(self) -> None:
        if self.quantize:
            raise VariatorError("--quantize: an analysis needs whole weights; leave it out")

    def stretches(self, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Tensor:
        """The stretches of text that are read, int32 (windows, tokens)."""
        windows = read_windows(self.data, tokenizer, seq_length=tokens, data_dir=self.data_dir)
        return spread(enough(windows, self.windows, self.data), self.windows)
