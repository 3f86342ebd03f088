"""Pretrained classifiers: the model with a head that fits the labels, its tokenizer or image processor, its inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    default_data_collator,
)

from td_plugin.errors import TdError
from td_plugin.integrations.data import LabelledData

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Classifier:
    """A model and all that turns rows into its inputs.

    Attributes:
        model: with one output per label.
        processor: the tokenizer or image processor; has `save_pretrained`.
        train: rows as model inputs, with ``labels``.
        validation: the same for evaluation.
        collate: rows -> batch of tensors.
    """

    model: PreTrainedModel
    processor: Any
    train: Dataset
    validation: Dataset
    collate: Callable[[list[Any]], dict[str, Any]]


def load_classifier(name: str, data: LabelledData, max_length: int) -> Classifier:
    """Load model and processor from a local directory or the hub and prepare both splits.

    A head for another number of classes is replaced, with a warning.

    Raises:
        TdError: the model or its processor cannot be read.
    """
    config = _read(name, "model configuration", AutoConfig.from_pretrained)
    replaced = _replaces_head(name, config, data.labels)
    processor = _processor(name, data.task)
    auto = AutoModelForSequenceClassification if data.task == "text" else AutoModelForImageClassification
    config.id2label = dict(enumerate(data.labels))
    config.label2id = {label: index for index, label in enumerate(data.labels)}
    # Only the head can differ in size: everything else is built from the checkpoint's own configuration.
    model = _read(
        name, "model", lambda path: auto.from_pretrained(path, config=config, ignore_mismatched_sizes=replaced)
    )
    if data.task == "text":
        train, validation = (_tokenized(split, data, processor, max_length) for split in (data.train, data.validation))
        return Classifier(model, processor, train, validation, DataCollatorWithPadding(processor))
    train, validation = (_with_pixels(split, data, processor) for split in (data.train, data.validation))
    return Classifier(model, processor, train, validation, default_data_collator)


def load_teacher(name: str, data: LabelledData, model: PreTrainedModel) -> PreTrainedModel:
    """Load a fine-tuned classifier that is to teach `model`, from a local directory or the hub.

    Raises:
        TdError: it cannot be read, has no head for these labels in this order, or reads other tokens than `model`.
    """
    config = _read(name, "model configuration", AutoConfig.from_pretrained)
    fix = "fine-tune it on these data first: td-plugin finetune --recipe none"
    if not any(architecture.endswith("Classification") for architecture in config.architectures or []):
        raise TdError("the teacher is no classifier", where=name, got=config.architectures, fix=fix)
    labels = [config.id2label[index] for index in range(config.num_labels)]
    unnamed = labels == [f"LABEL_{index}" for index in range(len(data.labels))]
    if labels != list(data.labels) and not unnamed:
        raise TdError("the teacher has other labels than the data set", where=name, got=labels, fix=fix)
    words, known = (getattr(entry, "vocab_size", None) for entry in (model.config, config))
    if words != known:
        raise TdError(f"the teacher's vocabulary is not the model's, which has {words}", where=name, got=known)
    auto = AutoModelForSequenceClassification if data.task == "text" else AutoModelForImageClassification
    teacher: PreTrainedModel = _read(name, "teacher", auto.from_pretrained)
    return teacher


def _read(name: str, what: str, load: Callable[[str], Loaded]) -> Loaded:
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise TdError("no such model directory", where=name)
    try:
        return load(name)
    except (OSError, ValueError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise TdError(f"the {what} cannot be read", where=name, got=reason) from error


def _processor(name: str, task: str) -> Any:
    if task == "text":
        return _read(name, "tokenizer", AutoTokenizer.from_pretrained)
    return _read(name, "image processor", AutoImageProcessor.from_pretrained)


def _replaces_head(name: str, config: PreTrainedConfig, labels: tuple[str, ...]) -> bool:
    """Whether the checkpoint's head was trained for another number of classes; said, since it starts anew then."""
    has_head = any(architecture.endswith("Classification") for architecture in config.architectures or [])
    if not has_head or config.num_labels == len(labels):
        return False
    warnings.warn(
        f"the head of {name} has {config.num_labels} classes, the data set {len(labels)}: a new head is trained",
        stacklevel=3,
    )
    return True


def _tokenized(split: Dataset, data: LabelledData, tokenizer: Any, max_length: int) -> Dataset:
    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        inputs = tokenizer(rows[data.input_column], truncation=True, max_length=max_length)
        return {**inputs, "labels": rows[data.label_column]}

    return split.map(encode, batched=True, remove_columns=split.column_names, desc="tokenize")


def _with_pixels(split: Dataset, data: LabelledData, processor: Any) -> Dataset:
    """Images are decoded when they are read: a whole split of pixels does not fit in memory."""

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows[data.input_column]]
        return {**processor(images, return_tensors="pt"), "labels": rows[data.label_column]}

    return split.with_transform(encode)
