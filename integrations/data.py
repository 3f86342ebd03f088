"""Labelled data for classification: files, columns and labels are settled before a model is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from datasets.exceptions import DatasetsError

from td_plugin.errors import TdError
from td_plugin.integrations.config import DataConfig

READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
EVALUATION_SPLITS = ("validation", "valid", "dev", "test")
TEXT_NAMES = ("text", "sentence", "content", "review", "question")
LABEL_NAMES = ("label", "labels", "class", "target")


@dataclass(frozen=True)
class LabelledData:
    """Two splits whose label column holds class indices.

    Attributes:
        task: what the input column holds.
        input_column: its name.
        label_column: the column with indices into `labels`.
        labels: the class names.
        train: training rows.
        validation: evaluation rows.
    """

    task: Literal["text", "image"]
    input_column: str
    label_column: str
    labels: tuple[str, ...]
    train: Dataset
    validation: Dataset


def load_data(config: DataConfig, seed: int = 0) -> LabelledData:
    """Load both splits, choose the columns and encode the labels.

    Raises:
        TdError: the data cannot be read, a column is missing or ambiguous, or the labels are no classes.
    """
    train, validation = _splits(config, seed)
    label = label_column(train.features, config.label_column)
    task, column = input_column(train.features, config, label)
    for split in (train, validation):
        require_column(split.features, column, "--text-column" if task == "text" else "--image-column")
        require_column(split.features, label, "--label-column")
    train, validation, names = _encode_labels(
        train.select_columns([column, label]), validation.select_columns([column, label]), label
    )
    if 0 < config.max_train_samples < len(train):
        train = train.shuffle(seed=seed).select(range(config.max_train_samples))
    return LabelledData(task, column, label, names, train, validation)


def read_data(source: str) -> DatasetDict:
    """The splits of a parquet, csv or json file, a directory, or a data set of the hub.

    Raises:
        TdError: it is missing, or cannot be read.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in READERS:
        raise TdError("unknown file type", where=source, got=path.suffix, fix=f"use one of {', '.join(READERS)}")
    if not path.exists() and (path.suffix in READERS or path.is_absolute()):
        raise TdError("no such data file or directory", where=source)
    try:
        if path.is_file():
            return load_dataset(READERS[path.suffix], data_files={"train": str(path)})
        return load_dataset(source)
    except (DatasetsError, OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise TdError("the data set cannot be read", where=source, got=_root_cause(error)) from error


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _splits(config: DataConfig, seed: int) -> tuple[Dataset, Dataset]:
    found = read_data(config.dataset)
    if "train" not in found:
        raise TdError("the data set has no split 'train'", where=config.dataset, got=sorted(found))
    train = found["train"]
    if config.validation:
        return train, read_data(config.validation)["train"]
    for name in EVALUATION_SPLITS:
        if name in found:
            return train, found[name]
    if len(train) < 2:
        raise TdError("too few rows to hold some out", where=config.dataset, got=len(train), fix="give --validation")
    halves = train.train_test_split(test_size=max(1, len(train) // 10), seed=seed)
    return halves["train"], halves["test"]


def require_column(features: Features, column: str, option: str) -> None:
    """Nothing, if there is such a column.

    Raises:
        TdError: there is none; `option` names the one of the command line that takes another.
    """
    if column in features:
        return
    nearest = difflib.get_close_matches(column, list(features), n=1)
    hint = f"; nearest: {nearest[0]!r}" if nearest else ""
    raise TdError(f"the data set has no column {column!r}", got=f"columns {list(features)}{hint}", fix=f"give {option}")


def _only(candidates: Sequence[str], preferred: Sequence[str], option: str, features: Features) -> str:
    """The one candidate, or the first preferred name among several."""
    for name in preferred:
        if name in candidates:
            return name
    if len(candidates) == 1:
        return candidates[0]
    what = "several columns could be meant" if candidates else "no column fits"
    raise TdError(f"{what} for {option}", got=f"columns {list(features)}", fix=f"give {option}")


def label_column(features: Features, chosen: str) -> str:
    """The column of the class: `chosen`, or by its type or name.

    Raises:
        TdError: there is none, or several could be meant.
    """
    if chosen:
        require_column(features, chosen, "--label-column")
        return chosen
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel) or name in LABEL_NAMES]
    return _only(classes, LABEL_NAMES, "--label-column", features)


def input_column(features: Features, config: DataConfig, label: str) -> tuple[Literal["text", "image"], str]:
    """What a model is fed and the column it is in: as `config` says, or by its type.

    Raises:
        TdError: there is none, or several could be meant.
    """
    if config.text_column:
        return "text", config.text_column
    if config.image_column:
        return "image", config.image_column
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if images:
        return "image", _only(images, ("image", "img"), "--image-column", features)
    texts = [
        name
        for name, feature in features.items()
        if name != label and isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    ]
    return "text", _only(texts, TEXT_NAMES, "--text-column", features)


def _encode_labels(train: Dataset, validation: Dataset, column: str) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    feature = train.features[column]
    values = set(train.unique(column))
    others = set(validation.unique(column))
    if isinstance(feature, ClassLabel):
        unlabelled = [value for value in values | others if value is None or not 0 <= value < len(feature.names)]
        if unlabelled:
            raise TdError("rows without a valid label", where=column, got=sorted(map(str, unlabelled)))
        return train, validation, tuple(feature.names)
    if any(not isinstance(value, int | str) for value in values):
        raise TdError("the labels are no classes", where=column, got=str(feature), fix="use integers or strings")
    if len(values) < 2:
        raise TdError("all training rows have one class", where=column, got=sorted(map(str, values)))
    if others - values:
        raise TdError("the evaluation rows have labels that the training rows lack", where=column, got=others - values)
    index = {value: position for position, value in enumerate(sorted(values))}
    names = tuple(str(value) for value in index)

    def encoded(split: Dataset) -> Dataset:
        indices = [index[value] for value in split[column]]
        return split.remove_columns(column).add_column(column, indices, feature=ClassLabel(names=list(names)))

    return encoded(train), encoded(validation), names
