"""What people do to a wrapped model, one step after another, and a model made anew that must compute the same."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import make_decoder, prompts, randomise
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llm_variator import CompressedContext, VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.hooks import host_of

GREEDY = dict(max_new_tokens=4, do_sample=False)  # three of them are read
NAMES = ("first", "second")


class Form(NamedTuple):
    """A kind of plugin, and what the heads of the first layer hold after 23 tokens and three generated ones."""

    config: VariatorConfig
    entries: float


_BOTH = dict(sites=("ffn", "kv"), r=3, dense_head=1)
FORMS = {
    # head, groups of three, the rest with the tail
    "merges": Form(VariatorConfig(k={"ffn": 2, "kv": 3}, dense_tail=2, **_BOTH), 1 + 6 + 4 + 3),
    # of four blocks of four and one of three, one head keeps 2 each, the other 1 each
    "keeps": Form(
        VariatorConfig(
            k={"ffn": 2, "kv": 4},
            compressor={"ffn": "weighted", "kv": "select"},
            k_per_head=((2, 4), (4, 1)),
            block=4,
            score_fits=2,
            dense_tail=3,
            **_BOTH,
        ),
        1 + (10 + 5) / 2 + 3 + 3,
    ),
    # of nine blocks of two and one of one, and of the two oldest of a window of six, one each
    "keeps and ages": Form(
        VariatorConfig(
            sites=("kv",),
            compressor="select",
            k_per_head=((2, 2), (1, 2)),
            block=2,
            dense_head=1,
            dense_tail=3,
            decode_block=2,
        ),
        1 + 10 + 1 + 4,
    ),
}


def fresh() -> nn.Module:
    return make_decoder("llama", num_hidden_layers=2)


def lora(name: str) -> LoraConfig:
    where = {"first": ["k_proj", "v_proj", "down_proj"], "second": ["q_proj", "gate_proj", "v_proj"]}[name]
    return LoraConfig(r=2, lora_alpha=32, target_modules=where, init_lora_weights=False)


class Life:
    """A `VariatorModel` on a tiny decoder, through whatever is done to it."""

    def __init__(self, start: str, form: str, folder: Path) -> None:
        """`start`: how adapters came before wrapping: "plain", "peft" (a PEFT model), "injected"; `form` of `FORMS`."""
        self.folder = folder
        self.config, self.entries = FORMS[form]
        self.adapters: dict[str, LoraConfig] = {}
        self.plugin = "default"
        self.context = None
        base = fresh()
        if start == "peft":
            self.adapters["first"] = lora("first")
            base = get_peft_model(base, lora("first"), adapter_name="first")
        elif start == "injected":
            self.adapters["first"] = lora("first")
            base = inject_adapter_in_model(lora("first"), base, adapter_name="first")
        self.model = VariatorModel(base, self.config)
        randomise(self.model.plugin())

    # --- what is done

    def wrap_again(self) -> None:
        with pytest.raises(VariatorError, match="already has"):
            VariatorModel(self.model.base, self.config)

    def wrap_anew(self) -> None:
        weights = self.model.plugin().state_dict()
        self._become(VariatorModel(self.model.unload(), self.config))
        self.plugin = "default"
        self.model.plugin().load_state_dict(weights, assign=True)

    def deep_copy(self) -> None:
        self._leave(copy.deepcopy(self.model))

    def pickled(self) -> None:
        self._leave(pickle.loads(pickle.dumps(self.model)))

    def copy_of_the_base(self) -> None:
        weights = self.model.plugin().state_dict()
        base = copy.deepcopy(self.model.base)
        with self.model.disable_plugin():
            ids = prompts(19)[0]
            assert torch.equal(base(input_ids=ids).logits, self.model(ids).logits)
        self.plugin = "default"
        again = VariatorModel(base, self.config)
        again.plugin().load_state_dict(copy.deepcopy(weights), assign=True)
        self._leave(again)

    def to_bfloat16(self) -> None:
        self.model.to(torch.bfloat16)

    def to_float64(self) -> None:
        self.model.double()

    def to_float32(self) -> None:
        self.model.float()

    def to_device(self) -> None:
        self.model.to("cpu")

    def add_adapter(self) -> None:
        for name in NAMES:
            if name not in self.adapters:
                self.adapters[name] = lora(name)
                if self.model.base is not self.host:
                    self.model.base.add_adapter(name, lora(name))
                else:
                    inject_adapter_in_model(lora(name), self.host, adapter_name=name)
                return

    def switch(self, name: str) -> None:
        if name in self.adapters:
            for layer in self._tuned():
                layer.set_adapter(name)

    def switch_to_first(self) -> None:
        self.switch("first")

    def switch_to_second(self) -> None:
        self.switch("second")

    def adapters_off(self) -> None:
        self._adapters(enabled=False)

    def adapters_on(self) -> None:
        self._adapters(enabled=True)

    def merge(self) -> None:
        for layer in self._tuned():
            if not layer.merged and not layer.disable_adapters:
                layer.merge()

    def unmerge(self) -> None:
        for layer in self._tuned():
            if layer.merged:
                layer.unmerge()

    def other_plugin(self) -> None:
        self.context = None  # a question may be read by another plugin than its context
        idle = "other" if self.plugin == "default" else "default"
        if idle in self.model.plugins:
            self.model.delete_plugin(idle)
        else:
            self.plugin = idle
            self.model.add_plugin(idle, self.config)
            self.model.set_plugin(idle)
            randomise(self.model.plugin(), seed=2)

    def save_and_load(self) -> None:
        self.model.save_pretrained(self.folder)
        name = self.plugin
        dtype = next(self.model.plugin().parameters()).dtype
        self.model.delete_plugin(name)
        self.model.load_plugin(self.folder, name, dtype=dtype)
        self.model.set_plugin(name)

    def train_a_step(self) -> None:
        self.context = None
        self.model.train()
        ids = prompts(17, seed=3)[0]
        parameters = [*self.model.plugin().parameters()]
        gradients = torch.autograd.grad(self.model(ids, labels=ids).loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.01 * gradient
        self.model.eval()

    def compress(self) -> None:
        self.context = self.model.compress(prompts(23)[0])

    def context_in_a_file(self) -> None:
        if self.context is None:
            return
        file = self.folder / "context.safetensors"
        try:
            self.context.save(file)
            self.context = CompressedContext.load(file, self.model)
        except VariatorError:  # another function than it was made with; tokens that wait to be reduced
            return

    # --- what must hold then

    def check(self) -> str:
        """With the plugin and without, this model computes what one made anew from its weights does.

        "refused" where it does not take a context of before; else "accepted".
        """
        ids, question = prompts(23, 5)
        base = self.made_anew()
        dense = base(input_ids=ids).logits
        with self.model.disable_plugin():
            assert torch.equal(self.model(ids).logits, dense)
        anew = VariatorModel(base, self.config)
        anew.plugin().load_state_dict(copy.deepcopy(self.model.plugin().state_dict()), assign=True)
        expected = anew(ids).logits
        assert torch.equal(self.model(ids).logits, expected)
        assert not torch.equal(expected, dense)
        answer = anew.generate(ids, **GREEDY)
        assert torch.equal(self.model.generate(ids, **GREEDY), answer)
        held = self.model.kv_cache_report().layers[0]
        assert held.entries == self.entries
        if self.context is not None:
            try:
                out = self.model.generate(question, context=self.context, **GREEDY)
            except VariatorError:
                return "refused"
            own = anew.generate(question, context=anew.compress(ids), **GREEDY)
            assert torch.equal(out, own), "a context of another function was taken"
        return "accepted"

    def made_anew(self) -> nn.Module:
        """The base without a history: its shape, its adapters, its values."""
        base: nn.Module = fresh()
        for name, config in self.adapters.items():
            base = inject_adapter_in_model(config, base, adapter_name=name)
        values = copy.deepcopy(self.host.state_dict())
        base.load_state_dict(values, assign=True)
        for name, value in self.host.named_buffers():
            owner, _, own = name.rpartition(".")
            setattr(base.get_submodule(owner), own, value.clone())
        for one, other in zip(self._tuned(base), self._tuned(), strict=True):
            one.set_adapter(list(other.active_adapters))
            one.enable_adapters(not other.disable_adapters)
            one.merged_adapters = list(other.merged_adapters)
        return base.eval()

    @property
    def host(self) -> nn.Module:
        return host_of(self.model.base)

    def _tuned(self, base: nn.Module | None = None) -> list[LoraLayer]:
        return [module for module in (base or self.host).modules() if isinstance(module, BaseTunerLayer)]

    def _adapters(self, *, enabled: bool) -> None:
        for layer in self._tuned():
            layer.enable_adapters(enabled)

    def _become(self, model: VariatorModel) -> None:
        self.model = model

    def _leave(self, model: VariatorModel) -> None:
        """Go on with a copy; what becomes of the original must not matter."""
        old, self.model = self.model, model
        with torch.no_grad():
            for value in [*old.base.parameters(), *old.plugin().parameters()]:
                value.fill_(0.5)
        old.unload()


DEEDS = [
    Life.wrap_again,
    Life.wrap_anew,
    Life.deep_copy,
    Life.pickled,
    Life.copy_of_the_base,
    Life.to_bfloat16,
    Life.to_float64,
    Life.to_float32,
    Life.to_device,
    Life.add_adapter,
    Life.switch_to_first,
    Life.switch_to_second,
    Life.adapters_off,
    Life.adapters_on,
    Life.merge,
    Life.unmerge,
    Life.other_plugin,
    Life.save_and_load,
    Life.train_a_step,
    Life.compress,
    Life.context_in_a_file,
]
