"""Whole runs of finetune, pretrain and adapt on tiny models: what is written, and that a stop changes nothing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_tasks import write_tasks

from llm_variator import VariatorError, VariatorModel
from llm_variator.baselines.ltp import LTP_FILE
from llm_variator.evaluate.__main__ import main as evaluate
from llm_variator.sources.models import load_config, load_model, load_tokenizer
from llm_variator.sources.tasks import find_task, load_examples
from llm_variator.sources.tasks.forms import form_for
from llm_variator.train.__main__ import main
from llm_variator.train.judges import LossJudge
from llm_variator.train.least_squares import LeastSquares
from llm_variator.train.trainer import VariatorTrainer

SHORT = {
    "max_steps": 4,
    "batch_size": 4,
    "eval_every": 2,
    "save_every": 2,
    "logging_every": 1,
    "warmup_steps": 1,
    "max_length": 300,
    "device": "cpu",
}


def train(output: Path, *flags: str, **settings) -> dict:
    argv = [*flags, "--output", str(output)]
    for name, value in {**SHORT, **settings}.items():
        if value is not None:
            argv.append(f"--{name.replace('_', '-')}={value}")
    main(argv)
    return json.loads((output / "training.json").read_text(encoding="utf-8"))["figures"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"), "rte", "squad")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, data) -> dict[str, Path]:
    """A fine-tuned model of each kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "teacher" for kind in ("t5", "bert", "llama")}
    for kind, folder in folders.items():
        train(folder, "--random-init", stage="finetune", model=f"tiny-{kind}", task="rte", data_dir=data)
    return folders


def adapt(output: Path, teacher: Path, data: Path, *flags: str, **settings) -> dict:
    return train(output, *flags, **dict(stage="adapt", model=teacher, task="rte", data_dir=data) | settings)


@pytest.mark.parametrize("kind", ["t5", "bert", "llama"])
def test_finetuned_model_is_a_folder_like_any_other(teachers, kind):
    folder = teachers[kind]
    figures = json.loads((folder / "training.json").read_text(encoding="utf-8"))["figures"]
    assert [step for step, _ in figures["held_out_history"]] == [0, 2, 4]
    assert set(figures["held_out"]) == {"accuracy"}
    assert figures["nats_from_teacher"] is None
    assert figures["data"]["trained on"] == "rte/train.parquet: 16 of 2,490 official rows (0.6%)"
    model = load_model(folder)
    assert len(load_tokenizer(folder)) <= model.config.vocab_size
    if kind == "bert":
        assert model.config.num_labels == 2


@pytest.mark.parametrize("kind", ["t5", "bert", "llama"])
def test_plugin_is_adapted_and_the_teacher_left_alone(teachers, data, tmp_path, kind):
    before = load_file(teachers[kind] / "model.safetensors")
    figures = adapt(tmp_path / "plugin", teachers[kind], data, k=2, r=4)
    assert {path.name for path in (tmp_path / "plugin").iterdir() if path.is_file()} >= {
        "variator.safetensors", "variator_config.json", "README.md", "training.json",
    }  # fmt: skip
    assert "rte/train.parquet" in (tmp_path / "plugin" / "README.md").read_text(encoding="utf-8")
    assert figures["config"]["k"] == 2
    model = VariatorModel.from_pretrained(load_model(teachers[kind]), tmp_path / "plugin")
    assert any(parameter.abs().sum() > 0 for parameter in model.plugin().parameters())
    after = load_file(teachers[kind] / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["t5", "bert", "llama"])
def test_distance_is_the_kl_of_the_answers_from_the_teacher(teachers, data, tmp_path, kind):
    more = {"learning_rate": 3.0, "eval_limit": 4, "save_every": 0}  # the last weights, not the best
    figures = adapt(tmp_path / "plugin", teachers[kind], data, k=4, r=4, **more)
    examples = load_examples(find_task("rte"), "validation", data_dir=data)
    few = [examples[index] for index in torch.linspace(0, len(examples) - 1, 4).long().tolist()]
    teacher = load_model(teachers[kind])
    plugin = VariatorModel.from_pretrained(load_model(teachers[kind]), tmp_path / "plugin")
    form = form_for(teacher, find_task("rte"), load_tokenizer(teachers[kind]), max_length=300)
    terms = []
    for batch in (form.collate([example]) for example in few):  # one by one, in fp64
        labels = batch.pop("labels")
        with torch.no_grad():
            ours = plugin(**batch).logits.double().softmax(-1)
            batch.pop("prompt_length", None)
            theirs = teacher(**batch).logits.double().softmax(-1)
        kl = (theirs * (theirs / ours).log()).sum(-1)
        if kind == "llama":  # a token's logits predict the next
            kl, labels = kl[:, :-1], labels[:, 1:]
        terms += (kl if kind == "bert" else kl[labels != -100]).flatten().tolist()
    assert min(terms) > 1e-6  # float32 knows it to a hundredth
    assert figures["nats_from_teacher"] == pytest.approx(sum(terms) / len(terms), rel=0.02)


def test_distance_counts_every_token_of_the_answers_once(teachers, data, tmp_path):
    more = dict(task="squad", k=4, r=4, learning_rate=3.0, eval_limit=6, max_steps=2, save_every=0)
    figures = [
        adapt(tmp_path / "all", teachers["t5"], data, batch_size=6, **more),
        json.loads((tmp_path / "all" / "training.json").read_text(encoding="utf-8"))["figures"],
    ]
    plugin = dict(more, k=None, r=None, plugin=tmp_path / "all", learning_rate=1e-30, batch_size=1)
    figures[1] = adapt(tmp_path / "one by one", teachers["t5"], data, **plugin)
    assert figures[0]["nats_from_teacher"] > 1e-4
    assert figures[1]["nats_from_teacher"] == pytest.approx(figures[0]["nats_from_teacher"], rel=1e-3)


def test_loss_on_held_out_batches_counts_rows_and_is_a_number():
    learner = SimpleNamespace(model=torch.nn.Linear(1, 1))
    batches = [{"x": torch.tensor([1.0, 3.0])}, {"x": torch.tensor([8.0])}]

    def loss(model, batch):
        return batch["x"].mean()

    assert LossJudge(loss, batches)(learner) == {"distillation_loss": pytest.approx(4.0)}
    batches[0]["x"][1] = float("nan")
    with pytest.raises(VariatorError, match="no number: train with a lower --learning-rate"):
        LossJudge(loss, batches)(learner)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_pretrained_plugin_is_where_adaptation_starts(teachers, data, tmp_path, kind):
    figures = train(
        tmp_path / "pre", "--random-init", model=f"tiny-{kind}", k=4, r=4, seq_length=40, eval_windows=4,
        max_length=None, learning_rate=1e-3,
    )  # fmt: skip
    assert set(figures["held_out"]) == {"distillation_loss"}
    history = [loss for _, loss in figures["held_out_history"]]
    assert history[-1] < history[0]
    adapt(tmp_path / "on", teachers[kind], data, plugin=tmp_path / "pre", learning_rate=1e-9)
    pre, on = (load_file(tmp_path / name / "variator.safetensors") for name in ("pre", "on"))
    for name, value in pre.items():
        torch.testing.assert_close(on[name], value, rtol=0, atol=1e-6)


def test_window_longer_than_berts_positions_is_refused(tmp_path):
    with pytest.raises(VariatorError, match=r"--seq-length 1023: .* 1024 positions; give 1022 or less"):
        train(tmp_path, "--random-init", model="tiny-bert", k=4, r=4, seq_length=1023, max_length=None)


def test_lora_is_small_and_loads_merged(teachers, data, tmp_path):
    figures = train(
        tmp_path / "lora", "--lora", stage="finetune", model=teachers["t5"], task="rte", data_dir=data, lora_r=2,
        learning_rate=0.1,
    )  # fmt: skip
    assert set(figures["held_out"]) == {"accuracy"}
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    adapter = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter} == {"q", "v"}
    merged, plain = load_model(tmp_path / "lora"), load_model(teachers["t5"])
    assert load_config(tmp_path / "lora").d_model == plain.config.d_model
    for (name, value), (_, base) in zip(merged.state_dict().items(), plain.state_dict().items(), strict=True):
        stem = name.removesuffix(".weight")
        pair = [adapter.get(f"base_model.model.{stem}.lora_{side}.weight") for side in "BA"]
        expected = base if pair[0] is None else base + 32 / 2 * pair[0] @ pair[1]
        torch.testing.assert_close(value, expected)
    adapt(tmp_path / "plugin", tmp_path / "lora", data, k=2, r=4)


def test_lora_of_a_classifier_is_evaluated_with_its_head(teachers, data, tmp_path):
    load_model("tiny-bert", random_init=True).save_pretrained(tmp_path / "base")
    load_tokenizer("tiny-bert", stand_in=True).save_pretrained(tmp_path / "base")
    settings = dict(stage="finetune", model=tmp_path / "base", task="rte", data_dir=data, learning_rate=0.1)
    figures = train(tmp_path / "lora", "--lora", **settings)
    assert load_model(tmp_path / "lora").config.num_labels == 2
    evaluate(
        ["task", "--model", str(tmp_path / "lora"), "--task", "rte", "--max-length", "300", "--data-dir", str(data),
         "--json", str(tmp_path / "r.json")]
    )  # fmt: skip
    read = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert read["figures"]["held_out"] == figures["held_out"]


def test_baselines(teachers, data, tmp_path):
    ltp = adapt(tmp_path / "ltp", teachers["t5"], data, method="ltp", keep=0.5)
    assert json.loads((tmp_path / "ltp" / LTP_FILE).read_text(encoding="utf-8"))["keep"] == 0.5
    student = adapt(tmp_path / "student", teachers["t5"], data, method="distill")
    sizes = [load_model(folder).num_parameters() for folder in (tmp_path / "student", teachers["t5"])]
    assert sizes[0] < sizes[1]
    for name, figures in (("ltp", ltp), ("student", student)):
        evaluate(
            ["task", "--model", str(tmp_path / name), "--task", "rte", "--max-length", "300",
             "--data-dir", str(data), "--json", str(tmp_path / f"{name}.json")]
        )  # fmt: skip
        read = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert read["figures"]["held_out"] == figures["held_out"]


def test_free_text_task(data, tmp_path):
    teacher = tmp_path / "teacher"
    flags = dict(task="squad", data_dir=data, max_length=200)
    figures = train(teacher, "--random-init", stage="finetune", model="tiny-t5", **flags)
    assert set(figures["held_out"]) == {"exact_match", "f1"}
    assert set(train(tmp_path / "k2", stage="adapt", model=teacher, k=2, r=4, **flags)["held_out"]) == {
        "exact_match", "f1",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["variator", "ltp", "distill"])
def test_resumed_run_ends_like_the_whole_one(teachers, data, tmp_path, method):
    settings = dict(method=method, save_total_limit=9)
    if method == "variator":
        settings |= dict(k=2, r=4)
    whole = adapt(tmp_path / "whole", teachers["t5"], data, **settings)
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", half / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "run.json", half)
    resumed = adapt(half, teachers["t5"], data, "--resume", **settings)
    assert (resumed["resumed_at"], whole["resumed_at"]) == (2, None)
    assert resumed["held_out"] == whole["held_out"]
    assert resumed["loss_history"] == whole["loss_history"]
    name = "variator.safetensors" if method == "variator" else "model.safetensors"
    one, other = load_file(half / name), load_file(tmp_path / "whole" / name)
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def test_best_checkpoint_is_kept(teachers, data, tmp_path):
    """With a rate that ruins the model after step 2, the result is what step 2 was."""
    figures = train(
        tmp_path / "run", stage="finetune", model=teachers["t5"], task="rte", data_dir=data, learning_rate=30.0,
        max_steps=6, save_total_limit=9,
    )  # fmt: skip
    scores = dict(figures["held_out_history"])
    best = figures["best_step"]
    assert best
    assert scores[best] == max(score for step, score in scores.items() if step)
    kept = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in load_file(tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors").items():
        assert torch.equal(value, kept[name]), name


@pytest.mark.parametrize("killed", [False, True])
def test_start_by_least_squares_is_kept_where_steps_ruin_it(teachers, data, tmp_path, killed):
    settings = dict(k=2, r=4, init="least-squares", init_tokens=2000, save_total_limit=9)
    adapt(tmp_path / "start", teachers["t5"], data, **settings | {"max_steps": 0})
    settings |= dict(learning_rate=30.0)
    figures = adapt(tmp_path / "run", teachers["t5"], data, **settings)
    scores = dict(figures["held_out_history"])
    assert scores[0] >= max(scores.values())
    if killed:  # before it was saved
        (tmp_path / "run" / "training.json").unlink()
        shutil.copytree(tmp_path / "start", tmp_path / "run" / "start")
        figures = adapt(tmp_path / "run", teachers["t5"], data, "--resume", **settings)
    assert figures["best_step"] == 0
    theirs, ours = (load_file(tmp_path / name / "variator.safetensors") for name in ("start", "run"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_patience_ends_what_no_longer_improves(teachers, data, tmp_path):
    settings = dict(stage="finetune", model=teachers["t5"], task="rte", data_dir=data, learning_rate=30.0)
    settings |= dict(max_steps=40, save_total_limit=99, patience=2)
    figures = train(tmp_path / "run", **settings)
    scores = [score for step, score in figures["held_out_history"] if step]
    assert figures["steps"] == 2 * len(scores) < 40
    best = scores.index(max(scores))
    assert len(scores) - 1 - best == 2
    assert all(max(scores[place + 1 : place + 3]) > max(scores[: place + 1]) for place in range(best))
    kept = load_file(tmp_path / "run" / "model.safetensors")
    # killed between the last checkpoint and the end
    for name in ("training.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    again = train(tmp_path / "run", "--resume", **settings)
    for name in ("held_out", "held_out_history", "loss_history", "steps", "best_step"):
        assert again[name] == figures[name], name
    for name, value in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.equal(value, kept[name]), name


@pytest.mark.parametrize("limit", [1, 2])
def test_run_that_was_moved_still_ends_with_its_best(teachers, data, tmp_path, limit):
    settings = dict(stage="finetune", model=teachers["t5"], task="rte", data_dir=data, learning_rate=30.0)
    settings |= dict(max_steps=8, save_total_limit=limit)
    figures = train(tmp_path / "run", **settings)
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert figures["best_step"] < 8, "the last weights are the best: nothing is shown"
    for name in ("training.json", "model.safetensors"):  # killed before it was saved
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    again = train(tmp_path / "moved", "--resume", **settings)
    assert again["best_step"] == figures["best_step"]
    assert again["loss_history"] == figures["loss_history"]
    for name, value in load_file(tmp_path / "moved" / "model.safetensors").items():
        assert torch.equal(value, kept[name]), name


def test_start_of_an_earlier_attempt_is_not_taken(teachers, data, tmp_path, monkeypatch):
    settings = dict(k=2, r=4, init="least-squares", init_tokens=2000)
    whole = adapt(tmp_path / "whole", teachers["t5"], data, **settings)

    def stopped(*args, **more):
        raise KeyboardInterrupt

    for part, tokens in ((VariatorTrainer, 100), (LeastSquares, 2000)):  # after its start, and before
        with monkeypatch.context() as patch:
            patch.setattr(part, "train" if part is VariatorTrainer else "fit", stopped)
            with pytest.raises(KeyboardInterrupt):
                adapt(tmp_path / "run", teachers["t5"], data, **settings | {"init_tokens": tokens})
        assert (tmp_path / "run" / "start").exists() == (part is VariatorTrainer)
    with pytest.raises(VariatorError, match="nothing to resume"):
        adapt(tmp_path / "run", teachers["t5"], data, "--resume", **settings)
    assert (
        adapt(tmp_path / "run", teachers["t5"], data, **settings)["held_out_history"]
        == whole["held_out_history"]
    )


def test_pretrained_bert_student_takes_its_teachers_head(teachers, data, tmp_path):
    words = dict(seq_length=24, eval_windows=2, max_steps=1, method="distill")
    train(
        tmp_path / "student", "--random-init", stage="pretrain", model="tiny-bert", max_length=None, **words
    )
    more = dict(
        method="distill", student=tmp_path / "student", max_steps=1, save_every=0, learning_rate=1e-30
    )
    adapt(tmp_path / "run", teachers["bert"], data, **more)
    theirs, ours = (
        load_file(folder / "model.safetensors") for folder in (teachers["bert"], tmp_path / "run")
    )
    heads = [name for name in theirs if name.startswith(("classifier.", "bert.pooler."))]
    assert len(heads) == 4
    assert all(torch.equal(theirs[name], ours[name]) for name in heads)
    with pytest.raises(VariatorError, match="BertForMaskedLM has no head for rte: fine-tune it first"):
        evaluate(["task", "--model", str(tmp_path / "student"), "--task=rte", f"--data-dir={data}"])


@pytest.mark.parametrize("flags", [[], ["--lora"]])
def test_gradient_checkpointing_of_finetuning_recomputes_and_changes_nothing(
    teachers, data, tmp_path, flags, monkeypatch
):
    calls = []
    recompute = torch.utils.checkpoint.checkpoint

    def counted(*args, **options):
        calls.append(args)
        return recompute(*args, **options)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    settings = dict(stage="finetune", model=teachers["t5"], task="rte", data_dir=data, max_steps=2)
    plain = train(tmp_path / "plain", *flags, **settings)
    assert not calls
    again = train(tmp_path / "run", *flags, "--gradient-checkpointing", **settings)
    assert calls
    assert again["loss_history"] == plain["loss_history"]


def test_each_run_logs_into_its_own_folder(teachers, data, tmp_path):
    pytest.importorskip("tensorboard")
    for name in ("a", "b"):
        adapt(tmp_path / name, teachers["t5"], data, "--tensorboard", k=2, r=4, max_steps=2)
    assert [len(list((tmp_path / name / "runs").rglob("events*"))) for name in ("a", "b")] == [1, 1]


@pytest.mark.parametrize(("flag", "package"), [("--tensorboard", "tensorboard"), ("--lora", "peft")])
def test_packages_of_a_flag_are_asked_for_before_any_work(tmp_path, monkeypatch, flag, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    settings = dict(stage="finetune", model=tmp_path / "none", task="rte", max_steps=2)
    with pytest.raises(VariatorError, match=rf"{flag} needs the package {package}: pip install"):
        train(tmp_path / "run", flag, **settings)


def test_teacher_of_a_baseline_computes_as_its_student_does(teachers, data, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_variator.sources.models.cpu.complaint", lambda dtype: None)
    more = dict(method="distill", student=teachers["t5"], max_steps=1, save_every=0, learning_rate=1e-30)
    figures = adapt(tmp_path / "run", teachers["t5"], data, "--bf16", **more)
    assert figures["bf16"]
    assert figures["nats_from_teacher"] == pytest.approx(0, abs=1e-7)


def test_run_is_not_resumed_in_another_precision(teachers, data, tmp_path, monkeypatch):
    settings = dict(k=2, r=4, max_steps=2)
    monkeypatch.setattr("llm_variator.sources.models.cpu.complaint", lambda dtype: None)
    assert adapt(tmp_path / "run", teachers["t5"], data, "--bf16", **settings)["bf16"]
    monkeypatch.setattr("llm_variator.sources.models.cpu.complaint", lambda dtype: "slow")
    with pytest.raises(VariatorError, match="with other settings: bf16 was True, is False"):
        adapt(tmp_path / "run", teachers["t5"], data, "--bf16", "--resume", **settings)
    assert not adapt(tmp_path / "other", teachers["t5"], data, "--bf16", **settings)["bf16"]


def test_checkpoints_can_be_dropped_at_the_end(teachers, data, tmp_path):
    adapt(tmp_path / "run", teachers["t5"], data, "--drop-checkpoints", k=2, r=4)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert (tmp_path / "run" / "variator.safetensors").is_file()


def test_wrong_combinations(teachers, data, tmp_path):
    with pytest.raises(VariatorError, match="a classifier cannot give"):
        adapt(tmp_path / "a", teachers["bert"], data, k=2, task="squad")
    with pytest.raises(
        VariatorError, match="is for plugins and --stage finetune: leave it out for --method ltp"
    ):
        adapt(tmp_path / "a", teachers["t5"], data, "--gradient-checkpointing", method="ltp")
    with pytest.raises(VariatorError, match="token pruning is for encoders"):
        adapt(tmp_path / "b", teachers["llama"], data, method="ltp")
    with pytest.raises(VariatorError, match="nothing to train in mean and copy"):
        adapt(tmp_path / "c", teachers["t5"], data, k=2, compressor="mean", decompressor="copy")
    with pytest.raises(VariatorError, match="--patience needs a best checkpoint to go back to"):
        adapt(tmp_path / "d", teachers["t5"], data, k=2, r=4, patience=2, save_every=0)
    with pytest.raises(VariatorError, match="every evaluation has one: give --save-every 2, as --eval-every"):
        adapt(tmp_path / "e", teachers["t5"], data, k=2, r=4, patience=2, save_every=4)
    assert not list(tmp_path.iterdir())
