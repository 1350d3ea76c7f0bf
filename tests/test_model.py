"""The Python API: swapping, threads, reports, training mode."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from threading import Barrier, Thread

import pytest
import torch
from conftest import make_decoder, make_variator, pad, prompts, randomise
from peft import LoraConfig, get_peft_model

from llm_variator import VariatorConfig, VariatorModel

CONFIG = VariatorConfig(k=2, sites=("ffn", "kv"), r=5)


@pytest.fixture
def model() -> VariatorModel:
    """Plugins "default" (k=2) and "k4", both with random weights."""
    model = make_variator("llama", CONFIG)
    randomise(model.add_plugin("k4", VariatorConfig(k=4, sites=("ffn",), r=5)), seed=2)
    return model


def test_scopes_nest_and_end(model):
    (ids,) = prompts(30)
    logits = {}
    for name in ("default", "k4", None):
        with model.use_plugin(name):
            logits[name] = model(ids).logits
    assert len({float(value.detach().sum()) for value in logits.values()}) == 3
    with model.use_plugin("k4"):
        with model.disable_plugin():
            assert model.active_plugin is None
            with model.use_plugin("default"):
                assert torch.equal(model(ids).logits, logits["default"])
        assert torch.equal(model(ids).logits, logits["k4"])
        with pytest.raises(RuntimeError, match="boom"), model.use_plugin("default"):
            raise RuntimeError("boom")
        assert model.active_plugin == "k4"
    assert model.active_plugin == "default"
    assert list(model.plugins) == ["default", "k4"]
    model.delete_plugin("default")
    assert model.active_plugin is None
    assert torch.equal(model(ids).logits, logits[None])


def test_threads_with_different_plugins_never_mix(model):
    (ids,) = prompts(30)
    names = ["default", "k4", None]
    expected = {}
    for name in names:
        with model.use_plugin(name):
            expected[name] = model.generate(ids, max_new_tokens=5, do_sample=False)
    barrier, failures = Barrier(len(names)), []

    def work(name):
        with model.use_plugin(name):
            barrier.wait()
            for _ in range(15):
                if not torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected[name]):
                    failures.append(name)

    threads = [Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_async_tasks_keep_their_own_plugin(model):
    async def work(name):
        with model.use_plugin(name):
            await asyncio.sleep(0)
            return model.active_plugin

    async def both():
        return await asyncio.gather(work("k4"), work(None), work("default"))

    assert asyncio.run(both()) == ["k4", None, "default"]


def test_swapping_is_instant_and_allocates_nothing(model):
    names = ["default", None, "k4"]
    start = time.perf_counter()
    for i in range(3000):
        model.set_plugin(names[i % 3])
    assert (time.perf_counter() - start) / 3000 < 1e-3
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    for i in range(300):
        model.set_plugin(names[i % 3])
    grown = tracemalloc.take_snapshot().compare_to(before, "filename")
    tracemalloc.stop()
    assert not [row for row in grown if "llm_variator" in row.traceback[0].filename and row.size_diff > 0]


def test_cache_report_counts_real_tensors(model):
    batch = pad(prompts(30, 30), "left")
    out = model.generate(**batch, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    cache, report = out.past_key_values, model.kv_cache_report()
    assert report == model.kv_cache_report(cache)
    entries = 4 + 12 + 2 + 4  # head, (30 - 4 - 1) // 2 groups, the rest, generated tokens but the last
    assert [layer.entries for layer in report.layers] == [entries] * 3
    assert [layer.dense_entries for layer in report.layers] == [34] * 3
    per_entry = 2 * 2 * 8 * 4 * 2  # K and V, KV heads, head width, fp32, rows
    assert (
        report.bytes
        == 3 * entries * per_entry
        == sum(2 * t.numel() * 4 for t in [x.keys for x in cache.layers])
    )
    assert report.dense_bytes == 3 * 34 * per_entry
    assert f"{report.bytes:,} bytes" in str(report)


def test_a_lora_model_can_be_the_base():
    """The plugin composes with a PEFT model: its adapters see the merged vectors, and come back on unload."""
    torch.manual_seed(0)
    tuned = get_peft_model(make_decoder("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.eval()
    (ids,) = prompts(30)
    dense = tuned(ids).logits
    trainable = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    model = VariatorModel(tuned, CONFIG)
    randomise(model.plugin())
    merged = VariatorModel(make_decoder("llama"), CONFIG)
    randomise(merged.plugin())
    assert not torch.allclose(model(ids).logits, merged(ids).logits, atol=1e-2)  # LoRA is felt
    generated = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    forced = model(generated, prompt_length=30).logits[0, 29:-1].argmax(-1)
    assert torch.equal(forced, generated[0, 30:])
    with model.disable_plugin():
        assert torch.equal(model(ids).logits, dense)
    model.unload()
    assert {name for name, parameter in tuned.named_parameters() if parameter.requires_grad} == trainable


def hooks_in(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.base.modules())


def configured(model):
    """Attention modules that a plugin may give a config of their own."""
    return [m for m in model.base.modules() if hasattr(m, "config") and hasattr(m, "k_proj")]


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_hooks_are_there_only_while_a_plugin_runs(kind):
    model = make_variator(kind, VariatorConfig(k=2, sites=("ffn", "kv"), r=5))
    (ids,) = prompts(30)
    more = {"decoder_input_ids": ids[:, :3]} if kind == "t5" else {}
    logits = model(ids, **more)[0]
    attached = hooks_in(model)
    with model.disable_plugin():
        model(ids, **more)
        starts = hooks_in(model)
        assert starts == (2 if kind == "t5" else 1)
        assert not any(getattr(m, "config", None) is not model.base.config for m in configured(model))
        with pytest.raises(RuntimeError, match=r"mat1 and mat2|normalized_shape|size"):
            model(inputs_embeds=torch.zeros(1, 30, 7), **more)
    with pytest.raises(RuntimeError), model.use_plugin("default"):
        model(inputs_embeds=torch.zeros(1, 30, 7), **more)
    assert torch.equal(model(ids, **more)[0], logits)
    assert hooks_in(model) == attached
    with model.disable_plugin():
        model(ids, **more)
    assert hooks_in(model) == starts
    base = model.unload()
    base(ids, **more)
    assert hooks_in(VariatorModel(base)) == attached


def test_hooks_keep_their_place_among_others():
    base = make_decoder("llama")
    ffn, seen = base.model.layers[0].mlp, []

    def watch(label):
        def see(module, args, output=None):
            seen.append((label, (args[0] if output is None else output).shape[1]))

        return see

    handles = [ffn.register_forward_pre_hook(watch("before, first"))]
    handles.append(ffn.register_forward_hook(watch("after, first")))
    model = VariatorModel(base, VariatorConfig(k=2, sites=("ffn",), dense_head=0, dense_tail=0))
    handles.append(ffn.register_forward_pre_hook(watch("before, last")))
    handles.append(ffn.register_forward_hook(watch("after, last")))
    (ids,) = prompts(30)
    entries = [("before, first", 30), ("before, last", 15), ("after, first", 15), ("after, last", 30)]
    for _ in range(3):
        seen.clear()
        model(ids)
        assert seen == entries
        seen.clear()
        with model.disable_plugin():
            model(ids)
        assert {tokens for _, tokens in seen} == {30}
    ffn.register_forward_pre_hook(watch("new"), prepend=True)
    handles[2].remove()
    seen.clear()
    model(ids)
    assert seen == [("new", 30), *entries[:1], *entries[2:]]


@pytest.mark.parametrize("sites", [("ffn", "kv"), ("ffn", "attention")])
def test_gradient_checkpointing_gives_the_same_gradients(sites):
    (ids,) = prompts(40)
    model = make_variator("llama", VariatorConfig(k=2, sites=sites, r=5)).train()
    assert not any(m.training for m in model.base.modules())

    def gradients():
        model.zero_grad()
        output = model(torch.cat((ids, ids.flip(1))), prompt_length=torch.tensor([30, 22]))
        with model.disable_plugin():  # the plugin of the forward pass counts, not that of the backward pass
            with torch.no_grad():
                model(ids)
            output.logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.plugin().named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable()
    recomputed = gradients()
    for name, value in expected.items():
        torch.testing.assert_close(recomputed[name], value)
    model.gradient_checkpointing_disable()
    assert not any(m.training for m in model.base.modules())


def test_the_mask_may_be_positional(model):
    batch = pad(prompts(9, 25), "left")
    expected = model(**batch).logits
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, expected)
    with model.disable_plugin():
        expected = model(**batch).logits
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, expected)


def test_embeddings_may_replace_ids(model):
    (ids,) = prompts(25)
    embedded = model.base.get_input_embeddings()(ids)
    assert torch.equal(
        model(inputs_embeds=embedded, prompt_length=20).logits, model(ids, prompt_length=20).logits
    )


def test_the_base_is_found_through_the_model(model):
    assert model.config is model.base.config
    assert model.device == torch.device("cpu")
    with pytest.raises(AttributeError):
        model.no_such_thing  # noqa: B018


def test_trainable_parameters_are_printed(model, capsys):
    model.print_trainable_parameters()
    count = sum(p.numel() for p in model.plugin().parameters())
    assert f"{count:,} trainable" in capsys.readouterr().out
    assert count < sum(p.numel() for p in make_decoder("llama").parameters())
