"""Time kvpress's presses over a prompt, beside the dense model in the same process, for `bench prefill --elsewhere`.

    make kvpress
    .venv-kvpress/bin/python eval/kvpress_prefill.py --model DIR --tokens 2048 --entries 0.5 0.25 --output presses.json

Runs in kvpress's own environment and imports nothing of llm_variator. Times are compared as ratios to this
environment's own dense model, taken in turns: every repetition times every press once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from kvpress_presses import weights_of
from transformers import AutoModelForCausalLM, DynamicCache

DENSE = "dense"
PRESSES = ("ExpectedAttention", "SnapKV", "TOVA", "StreamingLLM", "Knorm")


def main() -> None:
    """Time dense and every press at every share of entries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of the weights that bench gets, too"
    )
    parser.add_argument("--output", type=Path, required=True, help="the file for bench prefill --elsewhere")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="lengths of the prompt")
    parser.add_argument("--entries", type=float, nargs="+", default=[0.5], help="shares of the entries kept")
    parser.add_argument("--presses", nargs="+", default=list(PRESSES), help="kvpress's classes without Press")
    parser.add_argument("--repetitions", type=int, default=7, help="times that every case is timed, in turns")
    args = parser.parse_args()
    if args.repetitions < 2:
        parser.error("--repetitions: quartiles need at least 2")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), trust_remote_code=False
    ).eval()
    cases: dict[str, Any] = {DENSE: None}
    for share in args.entries:
        for name in args.presses:
            cases[f"{name} {share:.0%}"] = getattr(kvpress, f"{name}Press")(compression_ratio=1 - share)
    rows = [row for tokens in args.tokens for row in timed(model, cases, tokens, args.repetitions)]
    result = {
        "weights": weights_of(model),
        "dtype": args.dtype,
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def timed(model: Any, cases: dict[str, Any], tokens: int, repetitions: int) -> list[dict[str, Any]]:
    """One row per case: milliseconds and ratio to dense, medians with quartiles, and MiB of keys and values."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=draw)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    held: dict[str, int] = {}
    for repetition in range(-1, repetitions):  # the first warms up
        for name, press in cases.items():
            cache = DynamicCache()
            started = time.perf_counter()
            with contextlib.nullcontext() if press is None else press(model):
                model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            passed = time.perf_counter() - started
            held[name] = sum(
                t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
            )
            if repetition >= 0:
                seconds[name].append(passed)
    rows = []
    for name in cases:
        relative = [own / dense for own, dense in zip(seconds[name], seconds[DENSE], strict=True)]
        row: dict[str, Any] = {"case": name, "tokens": tokens, "batch": 1}
        row |= spread("ms", [1e3 * value for value in seconds[name]]) | spread("of_dense", relative)
        rows.append(row | {"kv_mib": held[name] / 2**20})
        print(row["case"], tokens, round(row["of_dense"], 3), flush=True)
    return rows


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {name: median, f"{name}_low": low, f"{name}_high": high}


if __name__ == "__main__":
    main()
