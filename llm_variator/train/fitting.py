"""`python -m llm_variator.train --compressor kv=select`: scores in closed form, then ratios for what is to be kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from llm_variator.config import WEIGHTS_FILE, VariatorConfig
from llm_variator.engine.hooks import host_of
from llm_variator.engine.plugin import base_signature
from llm_variator.errors import VariatorError
from llm_variator.measures.results import peak_memory_gib, result_of, scrub_paths, store
from llm_variator.model import VariatorModel
from llm_variator.sources.corpora import parse_sources
from llm_variator.sources.models import load_model, load_tokenizer, plugin_folder
from llm_variator.train.distributed import world_size
from llm_variator.train.futures import FUTURES, Samples
from llm_variator.train.scores import TOGETHER, Explained, Fit, Moments, Watch, targets
from llm_variator.train.settings import Settings
from llm_variator.train.shares import Budget, costs

MOMENTS_FILE = "moments.safetensors"
HELD_OUT = 6  # samples
PROMPTS = 24  # for what dropping keys costs in each head
KEPT, BESIDE = "kept", "beside"
"""Names of the plugin that is fitted and of the one it is fitted beside."""
CALIBRATION = 512
"""Most tokens of those: of longer ones only what is far is asked about, and not what is read
nearby while the prompt goes on."""


def fit_scores(settings: Settings, argv: Sequence[str], started: float, result: str) -> None:
    """Fit, calibrate and save a plugin into the settings' folder, and its figures into the file `result` there.

    Raises:
        VariatorError: model, data and flags do not go together, or cannot be read.
    """
    config = settings.plugin_config()
    _check(settings, config)
    file = settings.folder / MOMENTS_FILE
    if file.exists() and not settings.resume:
        raise VariatorError(f"{file} is of an earlier run: add --resume, or choose another --output")
    if settings.resume and not file.exists():
        raise VariatorError(f"nothing to resume: there is no {file}; leave --resume out")
    base = load_model(settings.model, **settings.loading(), device=_device(settings)).eval()
    fitting = _Fitting(settings, config, base)
    with fitting.watch.attached():
        moments = fitting.gather(file)
        fits = {name: moments.solve(name) for name in moments.present()}
        tokens, samples = int(moments.tokens()), moments.samples
        del moments  # of a large model they are gigabytes
        explained = fitting.explained(fits)
        fitting.choose(fits)
        if fitting.asks_for_ratios:
            fitting.calibrate()
    model = fitting.model()
    kept = fitting.kept()
    figures = {
        "explained": explained,
        "fits": fitting.names,
        "kept": kept,
        "tokens": tokens,
        "samples": samples,
        "peak_memory_gib": peak_memory_gib(),
        "config": model.plugin().config.to_dict(),
    }
    command = ["llm_variator.train", *argv]
    fitted = result_of(figures, command=command, seed=settings.seed, started=started)
    where = fitted["machine"]["gpu"] or f"{fitted['machine']['cores']} cores of {fitted['machine']['cpu']}"
    shares = {length: f"{share:.3f} of a prompt of {length} tokens" for length, share in kept.items()}
    facts = {
        "fitted on": scrub_paths(", ".join(settings.data)),
        "fit": f"{tokens:,} tokens of {samples} contexts of {_words(settings.fit_tokens)} tokens",
        "entries": ", ".join(shares.values()),
        "explained variance, held out": ", ".join(f"{name} {r2:.2f}" for name, r2 in explained.items()),
        "wall time": f"{fitted['wall_seconds']:.0f} s on {where}",
        "command": f"`{fitted['command']}`",
    }
    model.save_pretrained(settings.folder, dtype=getattr(torch, settings.save_dtype), facts=facts)
    store(settings.folder / result, fitted)
    if settings.drop_checkpoints:
        file.unlink(missing_ok=True)
    print(f"explained variance, held out: {facts['explained variance, held out']}")
    print(f"entries kept: {facts['entries']}")
    print(f"plugin saved to {settings.folder}")


class _Fitting:
    """The steps of one run."""

    def __init__(self, settings: Settings, config: VariatorConfig, base: PreTrainedModel) -> None:
        self._settings, self._base, self._model = settings, base, VariatorModel(base)
        beside = None
        if settings.beside:
            beside = self._model.load_plugin(settings.beside, BESIDE, dtype=torch.float32)
        self.watch = Watch(base, beside)
        self._count = int(host_of(base).config.num_hidden_layers)
        self._config = config.resolved(base_signature(host_of(base), self._count), decoder=True)
        self._tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
        self._chosen = [i for i in self.watch.layers if config.layers is None or i in config.layers]
        if not self._chosen:
            raise VariatorError(
                "--layers names only layers with a sliding window, which keep their keys: name others"
            )
        self._budget = Budget(
            settings.keep,
            settings.calibrate_tokens,
            ends=self._config.ends,
            block=self._config.block,
            dense_layers=len(self.watch.layers) - len(self._chosen),
        )
        if settings.k is not None and self._config.k_per_head is None:  # one ratio for all heads
            k = self._config.k_of("kv")
            same = [[k if layer in self._chosen else 1] * self.watch.heads for layer in range(self._count)]
            self._config = dataclasses.replace(self._config, k_per_head=same)
        self._check_ratios()
        self._samples = self._read(settings.fit_samples + HELD_OUT, settings.fit_tokens, settings.seed)
        positions = getattr(host_of(base).config, "max_position_embeddings", None)
        if positions is not None and self._samples.longest > positions:
            raise VariatorError(
                f"--fit-tokens {max(settings.fit_tokens)} and what follows take {self._samples.longest} positions, "
                f"the model has {positions} positions: make contexts shorter"
            )
        self.names = _names(self._config.score_fits, questions=self._samples.has_questions)

    @property
    def asks_for_ratios(self) -> bool:
        """Whether they are not given."""
        return self._config.k_per_head is None

    def _check_ratios(self) -> None:
        """Refuse before the fit what would be refused after it."""
        if self._settings.beside:
            VariatorConfig.joined([self._model.plugins[BESIDE], self._config], base=self._model.signature)
        if not self.asks_for_ratios:
            self._model.add_plugin(KEPT, self._config)
            self._model.delete_plugin(KEPT)
        elif self._settings.keep == 1:
            raise VariatorError("--keep 1 keeps everything, and there is nothing to fit: keep less")
        else:
            self._budget.least(len(self._chosen), self.watch.heads)

    def _read(self, count: int, lengths: Sequence[int], seed: int) -> Samples:
        return Samples(
            parse_sources(self._settings.data),
            self._tokenizer,
            count=count,
            lengths=lengths,
            ends=self._config.ends,
            seed=seed,
            data_dir=self._settings.data_dir,
        )

    def gather(self, file: Path) -> Moments:
        """The sums over all samples to fit; `file` keeps what is there so far."""
        settings = self._settings
        moments = Moments(len(self.watch.layers), self.watch.dim, self.watch.heads)
        record, complete = _record(settings, self._config.ends), _record(settings, None)
        if settings.resume:
            moments.load(file, (record, complete))
        total, every = settings.fit_samples, settings.save_every
        with tqdm(
            desc="fitting scores", total=total, initial=moments.samples, unit=" contexts", smoothing=0.1
        ) as bar:
            for index in range(moments.samples, total):
                sample = self._samples[index]
                features, energies = self.watch.read(sample)
                moments.add(sample.kind, features, targets(energies))
                bar.update()
                if every and (index + 1 == total or (index + 1) % every == 0):
                    moments.save(file, complete if index + 1 == total else record)
        return moments

    def explained(self, fits: Mapping[str, Fit]) -> dict[str, float]:
        """The share of each target's variance that its fit explains on the samples left out, mean over all heads."""
        held = Explained(fits)
        for index in range(self._settings.fit_samples, len(self._samples)):
            features, energies = self.watch.read(self._samples[index])
            held.add(features, targets(energies))
        return {name: float(share.mean()) for name, share in held.shares().items()}

    def choose(self, fits: Mapping[str, Fit]) -> None:
        """Keep the fits that the score is made of."""
        self._weight = torch.stack(
            [fits[name].weight for name in self.names], dim=1
        )  # (layers, fits, heads, d)
        self._bias = torch.stack([fits[name].bias for name in self.names], dim=1)

    def calibrate(self) -> None:
        """Give every head its ratio."""
        settings, found = self._settings, []
        length = min(CALIBRATION, *settings.calibrate_tokens)
        for index, sample in enumerate(
            tqdm(self._read(PROMPTS, [length], settings.seed + 1), desc="calibrating", unit=" prompts")
        ):
            features, effects = self.watch.effects(sample, settings.seed + index)
            own = [
                costs(self._score(layer, features[layer]), effects[layer].cpu(), self._config.block)
                for layer in self._chosen
            ]
            found.append(torch.stack(own))
        ratios = [[1] * self.watch.heads for _ in range(self._count)]
        for layer, own in zip(
            self._chosen, self._budget.ratios(torch.stack(found).mean(0)).tolist(), strict=True
        ):
            ratios[layer] = own
        self._config = dataclasses.replace(self._config, k_per_head=ratios)

    def _score(self, layer: int, x: Tensor) -> Tensor:
        """(tokens, heads)."""
        place = self.watch.layers.index(layer)
        fits = x.double().cpu() @ self._weight[place].mT + self._bias[place, :, None]  # (fits, tokens, heads)
        return (2 * fits).logsumexp(0)

    def model(self) -> VariatorModel:
        """The base with the plugin, which is active."""
        model, name = self._model, KEPT
        with torch.no_grad():
            for layer, own in model.add_plugin(KEPT, self._config).selects.items():
                place = self.watch.layers.index(layer)
                own.score.weight.copy_(self._weight[place])
                own.score.bias.copy_(self._bias[place])
        if self._settings.beside:
            name = "both"
            model.join_plugins([KEPT, BESIDE], name)
        model.set_plugin(name)
        return model

    def kept(self) -> dict[int, float]:
        """The share of entries that prompts of some lengths keep."""
        assert self._config.k_per_head is not None
        ratios = torch.tensor([list(self._config.k_per_head[layer]) for layer in self._chosen])
        lengths = sorted({*self._settings.calibrate_tokens, *self._settings.fit_tokens})
        return {length: self._budget.share(ratios, length) for length in lengths}


def _check(settings: Settings, config: VariatorConfig) -> None:
    if config.sites != ("kv",):
        raise VariatorError(
            "scores are fitted for site kv by itself: give --sites kv, other sites their own run"
        )
    if settings.max_steps:
        raise VariatorError("--compressor kv=select is fitted in closed form: leave --max-steps out, or at 0")
    if settings.init != "copy":
        raise VariatorError(f"--init {settings.init} is for what restores tokens: leave it out")
    if world_size() > 1:
        raise VariatorError("scores are fitted by one process: start it without a launcher")


def _names(count: int, *, questions: bool) -> tuple[str, ...]:
    """The targets of a score of `count` linear maps."""
    if count == 1:
        return (TOGETHER,)
    there = FUTURES if questions else tuple(name for name in FUTURES if name != "questions")
    if count != len(there):
        raise VariatorError(
            f"--score-fits {count}: 1 fits all futures together, {len(there)} each by itself ({', '.join(there)})"
        )
    return there


def _record(settings: Settings, ends: tuple[int, int] | None) -> str:
    """What the sums depend on; without dense `ends` once they are complete, so that other ends can be tried on them."""
    names = (
        "model",
        "dtype",
        "random_init",
        "num_layers",
        "quantize",
        "data",
        "seed",
        "fit_samples",
        "fit_tokens",
    )
    record = {"ends": ends} | {name: getattr(settings, name) for name in names}
    if settings.beside:
        record["beside"] = hashlib.sha256(
            (plugin_folder(settings.beside) / WEIGHTS_FILE).read_bytes()
        ).hexdigest()
    return json.dumps(record, sort_keys=True)


def _device(settings: Settings) -> str:
    return "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)
