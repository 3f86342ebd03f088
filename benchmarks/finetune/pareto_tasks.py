"""The task that all methods are compared on: its rows, the model they start from, and how one run trains."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pareto_memory import Remembering
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, set_seed

from td_plugin.integrations.classifiers import Classifier, load_classifier
from td_plugin.integrations.config import DataConfig, TrainConfig
from td_plugin.integrations.data import load_data
from td_plugin.integrations.distillation import Distillation, Lesson
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.integrations.training import make_trainer, model_accuracy

BATCH = 32


@dataclass(frozen=True)
class Task:
    """Data and model; the same rows for every method and seed.

    Attributes:
        model: directory of the pretrained encoder.
        train: file with the training rows.
        test: file with the rows of the final numbers; nothing is chosen by them.
        rows: how many training rows are used, drawn at random (seed 0); 0: all that are not held out.
        held_out: how many further training rows decide learning rates and recipes.
        length: texts are cut after so many tokens.
        output: where runs are kept.
    """

    model: str
    train: str
    test: str
    rows: int = 20_000
    held_out: int = 2_000
    length: int = 64
    output: Path = Path("build/finetune")

    def classifier(self, *, final: bool) -> Classifier:
        """Model with a fresh head and rows; evaluation is on the test rows if `final`, else on those held out."""
        return _classifier(self, final)

    @property
    def scratch(self) -> str:
        """A folder of the Trainer's; nothing of value is left there."""
        return str(self.output / "scratch")


@lru_cache(maxsize=2)
def _classifier(task: Task, final: bool) -> Classifier:
    data = load_data(DataConfig(task.train, task.test), seed=0)
    order = data.train.shuffle(seed=0)
    end = task.held_out + task.rows if task.rows else len(order)
    held, rows = order.select(range(task.held_out)), order.select(range(task.held_out, min(end, len(order))))
    return load_classifier(
        task.model, replace(data, train=rows, validation=data.validation if final else held), task.length
    )


def pretrained(task: Task, seed: int) -> PreTrainedModel:
    """The encoder with a fresh head, which the seed decides."""
    classifier = task.classifier(final=False)
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(task.model, config=classifier.model.config)
    return model  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Training:
    """How long and how fast one run trains, and what it learns from.

    Attributes:
        seed: of order, dropout and masks.
        epochs: passes over the rows.
        learning_rate: peak of the linear decay.
        teacher: a dense model to learn from, too.
        answers: the file that keeps the teacher's logits.
        logits: λ, share of the teacher's part in the loss.
        temperature: T.
        hidden: μ, weight of the distance between hidden states.
    """

    seed: int
    epochs: float
    learning_rate: float
    teacher: PreTrainedModel | None = None
    answers: Path = Path("answers.safetensors")
    logits: float = 0.9
    temperature: float = 2.0
    hidden: float = 0.0

    def trainer(self, task: Task, model: PreTrainedModel, callback: TargetedDropoutCallback | None = None) -> Trainer:
        """A Trainer for `model`, which has its optimizer made by the Trainer unless it is given one."""
        classifier = replace(task.classifier(final=False), model=model)
        config = TrainConfig(self.epochs, BATCH, self.learning_rate, self.seed, bf16=True)
        return make_trainer(classifier, config, task.scratch, [] if callback is None else [callback])

    def fit(
        self, task: Task, model: PreTrainedModel, callback: TargetedDropoutCallback | None = None, optimizer: Any = None
    ) -> None:
        """Train `model` in place."""
        trainer = self.trainer(task, model, callback)
        if optimizer is not None:
            trainer.optimizer = optimizer
        lesson, teacher = None, None
        if self.teacher is not None:
            terms = Distillation(None, self.temperature, self.logits, self.hidden)
            teacher = Remembering(copy.deepcopy(self.teacher), self.answers)
            lesson = Lesson(terms, teacher, model, torch.bfloat16)
        try:
            trainer.train()
        finally:
            if lesson is not None and teacher is not None:
                lesson.end()
                teacher.save()
            # The Trainer wraps what it trains with: nothing of it may stay on a model that is saved.
            model.eval()

    def steps(self, task: Task) -> int:
        """Optimizer steps of the run."""
        return int(-(-len(task.classifier(final=False).train) // BATCH) * self.epochs)


def accuracy(task: Task, model: PreTrainedModel, *, final: bool) -> float:
    """Share of rows that `model` gets right, in fp32."""
    judge = make_trainer(task.classifier(final=final), TrainConfig(batch_size=64), task.scratch)
    with torch.no_grad():
        return model_accuracy(judge, model)


def decay_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """All parameters in one group, as the Trainer's default of no weight decay amounts to."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]
