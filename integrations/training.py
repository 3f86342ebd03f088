"""A transformers Trainer for classification, and accuracy measured the same way on a model and on its ONNX file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from td_plugin.export.session import graph_inputs, open_session
from td_plugin.integrations.classifiers import Classifier
from td_plugin.integrations.config import TrainConfig


def make_trainer(
    classifier: Classifier, config: TrainConfig, scratch: str, callbacks: list[TrainerCallback] | None = None
) -> Trainer:
    """A Trainer with linear decay and a tenth of warm-up, which reports accuracy.

    Args:
        classifier: model and data.
        config: length, speed and seed.
        scratch: directory that the Trainer may use; nothing of value is left there.
        callbacks: for instance a `TargetedDropoutCallback`.
    """
    arguments = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=max(config.batch_size, 64),
        learning_rate=config.learning_rate,
        warmup_steps=0.1,
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=torch.accelerator.current_accelerator(check_available=True) is None,  # else bf16 is refused
        # Texts of one length are batched together: less padding, about half the time.
        train_sampling_strategy="group_by_length" if _has_tokens(classifier.train) else "random",
        remove_unused_columns=False,  # images are made from their column on access
        save_strategy="no",
        logging_steps=50,
        report_to="none",
    )
    return Trainer(
        model=classifier.model,
        args=arguments,
        data_collator=classifier.collate,
        train_dataset=classifier.train,
        eval_dataset=classifier.validation,
        compute_metrics=_accuracy,
        callbacks=callbacks,
    )


def model_accuracy(trainer: Trainer, model: PreTrainedModel) -> float:
    """Share of the evaluation rows that `model`, as it is now, gets right."""
    judge = Trainer(
        model=model,
        args=trainer.args,
        data_collator=trainer.data_collator,
        eval_dataset=trainer.eval_dataset,
        compute_metrics=_accuracy,
    )
    return float(judge.evaluate()["eval_accuracy"])


def onnx_accuracy(path: Path, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Share of the rows in `batches` (with ``labels``) that the ONNX file gets right, run by onnxruntime on the CPU."""
    session = open_session(path, threads=torch.get_num_threads())
    right = rows = 0
    for batch in batches:
        inputs = graph_inputs(session, batch, str(path))
        (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
        right += int((logits.argmax(-1) == batch["labels"].cpu().numpy()).sum())
        rows += len(logits)
    return right / rows


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits: Any = prediction.predictions
    return {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}


def _has_tokens(split: Dataset) -> bool:
    return "input_ids" in split.column_names
