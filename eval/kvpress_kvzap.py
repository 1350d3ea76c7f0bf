"""Fit KVzap's linear scores on a model, for `eval/kvpress_presses.py --presses KVzap --kvzap FOLDER`.

    make kvpress
    .venv-kvpress/bin/python eval/kvpress_kvzap.py --model DIR --text wikitext2/train.parquet --output FOLDER

kvpress offers fitted scores for some large models only. The recipe is that of its repository (kvzap/train.py): texts
of about a thousand tokens are read and repeated, the target is the logarithm of KVzip+'s score, scikit-learn's Ridge
with its default penalty of 1 predicts it from what the attention reads, layer by layer. There the texts are half a
million from Nemotron's pre-training sample, here those that are given; its other form, a network of one hidden layer,
is not fitted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
from kvpress_presses import Prompt, Zip, weights_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PENALTY = 1.0
COLUMNS = ("text", "context")  # the first of these that a file has


def main() -> None:
    """Read, score, solve, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="parquet files")
    parser.add_argument("--output", type=Path, required=True, help="folder for the fitted scores")
    parser.add_argument("--pieces", type=int, default=24, help="stretches of text, evenly from all files")
    parser.add_argument("--tokens", type=int, default=1000, help="of each")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, trust_remote_code=False
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    each = -(-args.pieces // len(args.text))
    pieces = [piece for file in args.text for piece in stretches(tokenizer, file, each, args.tokens)]
    fitted, r2 = fit(model, pieces)
    fitted.save_pretrained(args.output)
    about = {"weights": weights_of(model), "pieces": len(pieces), "tokens": args.tokens, "r2": r2}
    (args.output / "fit.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    print(about)


def stretches(tokenizer: Any, file: Path, count: int, length: int) -> Iterator[Tensor]:
    """`count` stretches (1, length) of a file's text, evenly spread over it."""
    table = pq.read_table(file)
    column = next(name for name in COLUMNS if name in table.column_names)
    texts = "\n".join(dict.fromkeys(table.column(column).to_pylist()))
    for number in range(count):
        start = number * len(texts) // count
        # a token has fewer than 20 characters on average
        ids = tokenizer(texts[start : start + 20 * length], add_special_tokens=False)["input_ids"]
        yield torch.tensor([ids[:length]])


@torch.inference_mode()
def fit(model: Any, pieces: list[Tensor]) -> tuple[KVzapModel, float]:
    """The model of scores, and the share of variance that it explains on these pieces, over all heads."""
    config = model.config
    layers, width, heads = config.num_hidden_layers, config.hidden_size, config.num_key_value_heads
    gram = torch.zeros(layers, width + 1, width + 1, dtype=torch.float64)
    right = torch.zeros(layers, width + 1, heads, dtype=torch.float64)
    squares = torch.zeros(layers, heads, dtype=torch.float64)
    press = Zip(compression_ratio=0.5, kvzip_plus_normalization=True)
    for number, ids in enumerate(pieces):
        prompt = Prompt.read(model, ids)
        targets = press.of(model, prompt).clamp_min(1e-12).log()  # (layers, heads, n)
        for layer, call in enumerate(prompt.calls):
            x = torch.nn.functional.pad(call["hidden_states"][0].double(), (0, 1), value=1.0)
            y = targets[layer].T.double()
            gram[layer] += x.T @ x
            right[layer] += x.T @ y
            squares[layer] += y.square().sum(0)
        print(f"{number + 1} of {len(pieces)} pieces", flush=True)
    count, sums, means = gram[:, -1, -1], gram[:, -1, :-1], right[:, -1] / gram[:, -1, -1, None]
    centred = gram[:, :-1, :-1] - sums[:, :, None] * sums[:, None] / count[:, None, None]
    other = right[:, :-1] - sums[:, :, None] * means[:, None]
    centred += PENALTY * torch.eye(width, dtype=torch.float64)
    weights = torch.cholesky_solve(other, torch.linalg.cholesky(centred))  # (layers, width, heads)
    bias = means - torch.einsum("ld,ldh->lh", sums / count[:, None], weights)
    variance = squares - count[:, None] * means.square()
    explained = (weights * other).sum(1)  # to first order in the penalty
    fitted = KVzapModel(KVzapConfig(input_dim=width, output_dim=heads, n_modules=layers))
    for layer, linear in enumerate(fitted.layers):
        linear.weight.copy_(weights[layer].T)
        linear.bias.copy_(bias[layer])
    return fitted, float(explained.sum() / variance.sum())


if __name__ == "__main__":
    main()
