"""Distillation: its losses by hand, and what they do to a Trainer's loss, gradients, checkpoints and evaluation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_hf import assert_equal, make_model, make_trainer, rows, weights
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import td_plugin as td
from td_plugin.distillation import hidden_states, soft_targets
from td_plugin.integrations.distillation import Distillation
from td_plugin.integrations.hf import TargetedDropoutCallback


def callback(distillation: Distillation | None, level: float = 0.0) -> TargetedDropoutCallback:
    recipe = td.recipes.targeted_unit(0.5)
    return TargetedDropoutCallback(recipe, level, distillation=distillation, squash=False)


def kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """T² times the mean Kullback-Leibler divergence, from the definition, in float64."""
    total = 0.0
    for s, t in zip(student.astype(np.float64), teacher.astype(np.float64), strict=True):
        q, p = (np.exp(z / temperature) / np.exp(z / temperature).sum() for z in (s, t))
        total += float((p * np.log(p / q)).sum())
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_soft_targets_are_the_divergence_by_hand(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    assert float(soft_targets(student, teacher, temperature)) == pytest.approx(
        kl(student.numpy(), teacher.numpy(), temperature), rel=1e-5
    )
    assert float(soft_targets(student, student, temperature)) == pytest.approx(0.0, abs=1e-7)
    where = torch.tensor([True, False, True, True, False])
    chosen = kl(student[where].numpy(), teacher[where].numpy(), temperature)
    assert float(soft_targets(student, teacher, temperature, where)) == pytest.approx(chosen, rel=1e-5)


def test_the_squared_temperature_keeps_the_gradient() -> None:
    # For a high temperature the gradient is (z - v) / N of centred logits, whatever T is: section 2.1 of the paper.
    student, teacher = torch.tensor([[1.0, -2.0, 1.0]], requires_grad=True), torch.tensor([[0.5, 0.0, -0.5]])
    soft_targets(student, teacher, 1000.0).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, (student.detach() - teacher) / 3, atol=2e-3)


def test_edges_of_the_losses() -> None:
    one, other = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    assert float(soft_targets(one, other, 2.0)) == pytest.approx((1.0 + 4.0) / 2)
    nothing = torch.zeros(2, dtype=torch.bool)
    assert float(soft_targets(one, other, 2.0, nothing)) == 0.0 and float(hidden_states([one], [other], nothing)) == 0.0
    states = [torch.zeros(2, 3, 4), torch.ones(2, 3, 4)]
    assert float(hidden_states(states, [torch.ones(2, 3, 4)] * 2)) == pytest.approx(0.5)
    with pytest.raises(td.TdError, match="do not fit"):
        soft_targets(one, other.expand(2, 3), 2.0)
    with pytest.raises(td.TdError, match="hidden=0"):
        hidden_states(states, states[:1])


@pytest.mark.parametrize("hidden", [0.0, 3.0])
def test_the_first_loss_and_the_evaluation(tmp_path: Path, hidden: float) -> None:
    model, teacher = make_model(dropout=0.0), make_model(dropout=0.0, seed=4)
    mine = callback(Distillation(teacher, temperature=3.0, logits=0.25, hidden=hidden))
    options: dict[str, Any] = {"per_device_train_batch_size": 22, "gradient_accumulation_steps": 1, "max_steps": 1}
    trainer = make_trainer(tmp_path, model, mine, learning_rate=1e-12, eval_strategy="steps", eval_steps=1, **options)
    data = rows()
    inputs = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    with torch.no_grad():
        student, taught = (m.eval()(**inputs, output_hidden_states=True) for m in (model, teacher))
    task = float(student.loss)
    loss = 0.75 * task + 0.25 * kl(student.logits.numpy(), taught.logits.numpy(), 3.0)
    pairs = zip(student.hidden_states, taught.hidden_states, strict=True)
    loss += hidden * float(np.mean([np.square((s - t).numpy()).mean() for s, t in pairs]))
    trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert logged["loss"] == pytest.approx(loss, rel=1e-4)
    assert logged["eval_loss"] == pytest.approx(task, rel=1e-4), "evaluation knows no teacher"


def test_the_student_comes_closer_and_the_teacher_stays(tmp_path: Path) -> None:
    teacher = make_model(dropout=0.0, seed=4)
    with torch.no_grad():
        teacher.classifier.weight.mul_(100)
    before = weights(teacher)
    inputs = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "attention_mask")}

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model.eval()(**inputs).logits - teacher(**inputs).logits).square().mean())

    model = make_model(dropout=0.0)
    far = distance(model)
    trainer = make_trainer(tmp_path, model, callback(Distillation(teacher, logits=1.0)), num_train_epochs=6)
    trainer.train()
    assert distance(trainer.model) < 0.75 * far
    assert_equal(before, weights(teacher))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_accumulation_makes_no_difference(tmp_path: Path) -> None:
    found = []
    for batch, steps in ((6, 1), (2, 3)):
        mine = callback(Distillation(make_model(seed=4), hidden=1.0))
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 3}
        # This model ignores how many labels a step has, which the Trainer of this version takes for a division.
        mean = type("Mean", (Trainer,), {"loss_is_scaled_for_ga": False})
        model, out = make_model(dropout=0.0), tmp_path / str(batch)
        trainer = make_trainer(out, model, mine, cls=mean, optim="sgd", max_grad_norm=0.0, **options)
        trainer.train()
        found.append(weights(trainer.model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


@pytest.mark.parametrize("mode", [{}, {"bf16": True}, {"activation_checkpointing": True}], ids=str)
def test_the_default_teacher_is_the_dense_model_as_it_came(tmp_path: Path, mode: dict[str, Any]) -> None:
    def make() -> TargetedDropoutCallback:
        return callback(Distillation(hidden=0.5), 0.5)

    plain = set(make_model().state_dict())
    mode = {**mode, "num_train_epochs": 2}
    whole = make_trainer(tmp_path / "whole", make_model(), make(), **mode)
    whole.train()
    saved = sorted((tmp_path / "whole").glob("checkpoint-*"))
    assert saved and all(set(load_file(path / "model.safetensors")) == plain for path in saved)
    assert set(whole.model.state_dict()) == plain
    assert not whole.model._forward_hooks and not whole.model._forward_pre_hooks
    resumed = make_trainer(tmp_path / "resumed", make_model(), make(), **mode)  # the same model to begin with
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert_equal(weights(whole.model), weights(resumed.model))


def test_a_teacher_copied_from_a_masked_model_is_dense(tmp_path: Path) -> None:
    model = make_model(dropout=0.0)
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(0.5), 0.5)
    sparsifier.prepare(model)
    mine = callback(Distillation(logits=1.0))
    trainer = make_trainer(tmp_path, model, mine, max_steps=1)
    assert mine._teaching is not None and mine._teaching._teacher is not None
    assert_equal(weights(model), weights(mine._teaching._teacher))
    assert type(mine._teaching._teacher.bert.encoder.layer[0].intermediate.dense) is nn.Linear
    trainer.train()


def causal() -> tuple[GPT2LMHeadModel, list[dict[str, Tensor]]]:
    set_seed(0)
    config = GPT2Config(
        vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    ids = torch.randint(1, 30, (12, 6), generator=torch.Generator().manual_seed(1))
    lengths = [6, 3, 4, 6, 5, 2] * 2
    data = []
    for row, length in zip(ids, lengths, strict=True):
        marked = row.clone()
        marked[length:] = -100
        data.append({"input_ids": row, "labels": marked})
    return GPT2LMHeadModel(config), data


@pytest.mark.parametrize("bf16", [False, True])
def test_the_teacher_computes_in_the_type_of_the_student(tmp_path: Path, bf16: bool) -> None:
    model, teacher = make_model(dropout=0.0), make_model(dropout=0.0, seed=4)
    seen: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}

    def watch(of: BertForSequenceClassification, name: str) -> None:
        of.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *now: seen[name].add(now[2].dtype))

    watch(model, "student")
    watch(teacher, "teacher")
    mine = callback(Distillation(teacher, logits=0.5))
    make_trainer(tmp_path, model, mine, max_steps=2, save_strategy="no", bf16=bf16).train()
    assert seen["student"] == seen["teacher"] == {torch.bfloat16 if bf16 else torch.float32}


def test_a_model_that_divides_by_all_labels_of_a_step(tmp_path: Path) -> None:
    """The Trainer tells language models the number of labels of a whole step; rows are of unequal lengths here."""
    found = []
    for batch, steps in ((6, 1), (2, 3)):
        model, data = causal()
        set_seed(5)
        teacher = GPT2LMHeadModel(model.config)
        settings: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "optim": "sgd"}
        settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 2}
        arguments = TrainingArguments(str(tmp_path), learning_rate=0.1, max_grad_norm=0.0, seed=3, **settings)
        recipe = td.recipes.targeted_weight(0.5)
        mine = TargetedDropoutCallback(recipe, 0.0, distillation=Distillation(teacher), squash=False)
        Trainer(model, arguments, train_dataset=data, callbacks=[mine]).train()
        found.append(weights(model))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


class TestErrors:
    def test_a_loss_of_the_trainer_cannot_be_reached(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, make_model(), callback(Distillation()), label_smoothing_factor=0.1)
        with pytest.raises(td.TdError, match="label_smoothing_factor"):
            trainer.train()

    def test_a_teacher_of_another_width(self, tmp_path: Path) -> None:
        config = copy.deepcopy(make_model().config)
        config.num_labels = 3
        teacher = BertForSequenceClassification(config)
        trainer = make_trainer(tmp_path, make_model(), callback(Distillation(teacher)))
        with pytest.raises(td.TdError, match="do not fit"):
            trainer.train()

    def test_a_resumed_run_needs_its_teacher(self, tmp_path: Path) -> None:
        make_trainer(tmp_path / "a", make_model(), callback(Distillation()), max_steps=2).train()
        trainer = make_trainer(tmp_path / "b", make_model(), None)
        trainer.add_callback(callback(Distillation()))
        with pytest.raises(td.TdError, match="teacher of a resumed run"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))

    @pytest.mark.parametrize(
        "options", [{"temperature": 0.0}, {"logits": 1.5}, {"hidden": -1.0}, {"logits": 0.0}], ids=str
    )
    def test_numbers_out_of_range(self, options: dict[str, float]) -> None:
        with pytest.raises(td.TdError, match="Distillation"):
            Distillation(**options)
