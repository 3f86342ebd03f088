"""Rows of a file, and a tokenizer or image processor, become what a model is fed; labels or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from datasets import Dataset
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from td_plugin.errors import TdError, first_line
from td_plugin.export.probes import Batch
from td_plugin.export.scores import Metric, check_metric
from td_plugin.integrations.config import DataConfig
from td_plugin.integrations.data import EVALUATION_SPLITS, input_column, read_data, require_column

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class EvaluationConfig:
    """Which rows, which columns and how they are read; what is left empty is found out.

    Attributes:
        data: a parquet, csv or json file, a directory, or a hub id.
        processor: directory with the tokenizer or image processor, as a rule the model's.
        metric: see `Examples`.
        split: of the data; empty: the evaluation split if there is one, else all rows.
        text_column: the text, or the words of a text in a list.
        pair_column: a second text of the same row.
        image_column: the image.
        label_column: the class, a list of classes for a list of words, or for BLEU the text wanted.
        max_length: texts are cut after so many tokens.
        max_rows: judge on so many rows, drawn at random; 0 = all.
        batch_size: rows per call.
    """

    data: str
    processor: Path
    metric: Metric = "accuracy"
    split: str = ""
    text_column: str = ""
    pair_column: str = ""
    image_column: str = ""
    label_column: str = ""
    max_length: int = 128
    max_rows: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_metric(self.metric)
        for name, least in (("max_length", 2), ("max_rows", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise TdError(f"a whole number of at least {least} is needed", where=name, got=repr(value))


def config_of(options: Mapping[str, Any], beside: Path) -> EvaluationConfig:
    """The configuration that options of the command line make, checked before anything is read.

    Args:
        options: those that were given, of the fields of `EvaluationConfig`; ``tokenizer`` is the processor's directory.
        beside: that directory unless given.

    Raises:
        TdError: a number is too small, or there is no such metric.
    """
    names = {field.name for field in fields(EvaluationConfig)} & options.keys()
    return EvaluationConfig(processor=Path(options.get("tokenizer", beside)), **{name: options[name] for name in names})


def load_inputs(config: EvaluationConfig) -> Iterable[Batch]:
    """Batches without labels, such as static quantization is calibrated on.

    The rows are those of the training split unless `EvaluationConfig.split` names another.

    Raises:
        TdError: the data or the processor cannot be read, a column is missing, or the data are empty.
    """
    rows = read_rows(config, ("train",))
    task, column = find_input(rows, config, config.label_column)
    if task == "image":
        return Images(rows, column, config)
    tokenizer, found = tokenized(rows, column, config)
    return list(padded(tokenizer, found, config))


def read_rows(config: EvaluationConfig, preferred: Sequence[str] = EVALUATION_SPLITS) -> Dataset:
    """The rows of the split that `config` names, else of the first of `preferred`, else of the first there is.

    Raises:
        TdError: there is no such split, or it is empty.
    """
    found = read_data(config.data)
    if config.split and config.split not in found:
        raise TdError("the data set has no such split", where=config.data, got=config.split, fix=f"{sorted(found)}")
    split = config.split or next((name for name in preferred if name in found), next(iter(found), ""))
    if not split or not len(found[split]):
        raise TdError("the data are empty", where=config.data)
    rows = found[split]
    return rows.shuffle(seed=0).select(range(config.max_rows)) if 0 < config.max_rows < len(rows) else rows


def find_input(rows: Dataset, config: EvaluationConfig, label: str) -> tuple[Literal["text", "image"], str]:
    """What the model is fed, and the column it is in; `label` is the column that it is not in.

    Raises:
        TdError: there is no such column, or several could be meant.
    """
    named = DataConfig(config.data, text_column=config.text_column, image_column=config.image_column)
    task, column = input_column(rows.features, named, label)
    for name, option in ((column, f"--{task}-column"), (config.pair_column, "--pair-column")):
        if name:
            require_column(rows.features, name, option)
    return task, column


def load_part(config: EvaluationConfig, what: str, load: Callable[[str], Loaded]) -> Loaded:
    """Read the tokenizer, processor or configuration from the directory of `config`.

    Raises:
        TdError: it is not there, or damaged.
    """
    try:
        return load(str(config.processor))
    except (OSError, ValueError, KeyError, TypeError) as error:  # transformers raises all of these on damaged files
        got = f"{type(error).__name__}: {first_line(error)}"
        raise TdError(f"the {what} cannot be read", where=str(config.processor), got=got, fix="--tokenizer") from error


class Images:
    """Batches of images, decoded each time they are read: a data set of pixels does not fit in memory.

    Args:
        rows: of the data.
        column: the images.
        config: the processor and the size of a batch.
        labels: classes ``[rows]``, if the batches shall have any.
    """

    def __init__(self, rows: Dataset, column: str, config: EvaluationConfig, labels: Tensor | None = None) -> None:
        self._rows, self._column, self._labels, self._size = rows, column, labels, config.batch_size
        self._processor = load_part(config, "image processor", AutoImageProcessor.from_pretrained)

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self._size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._rows), self._size):
            images = [image.convert("RGB") for image in self._rows[start : start + self._size][self._column]]
            labels = {} if self._labels is None else {"labels": self._labels[start : start + self._size]}
            yield {**self._processor(images, return_tensors="pt"), **labels}


def load_tokenizer(config: EvaluationConfig) -> Any:
    """The tokenizer, which can pad.

    Raises:
        TdError: it cannot be read.
    """
    tokenizer = load_part(config, "tokenizer", AutoTokenizer.from_pretrained)
    if tokenizer.pad_token is None:  # decoders often have none; what it is does not matter under the mask
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def tokenized(rows: Dataset, column: str, config: EvaluationConfig) -> tuple[Any, Any]:
    """The tokenizer, and what it makes of a column of texts or of lists of words, cut but not padded.

    Raises:
        TdError: the tokenizer cannot be read, or a row has no text.
    """
    tokenizer, texts = load_tokenizer(config), read_texts(rows, column, config)
    pairs = list(rows[config.pair_column]) if config.pair_column else None
    words = isinstance(texts[0], list)
    if words and not tokenizer.is_fast:
        raise TdError("a list of words is no text here", where=config.data, got=config.metric, fix="--text-column")
    length = min(config.max_length, tokenizer.model_max_length)
    return tokenizer, tokenizer(texts, pairs, truncation=True, max_length=length, is_split_into_words=words)


def read_texts(rows: Dataset, column: str, config: EvaluationConfig) -> list[Any]:
    """A column of texts, or of lists of words, none of them empty; nor is any of `EvaluationConfig.pair_column`.

    Raises:
        TdError: one is.
    """
    texts = list(rows[column])
    pairs = list(rows[config.pair_column]) if config.pair_column else []
    kind = list if isinstance(texts[0], list) else str
    for position, text in enumerate([*texts, *pairs]):
        if not isinstance(text, kind) or not text:
            raise TdError("a row has no text", where=config.data, got=f"row {position % len(texts)}: {text!r}")
    return texts


def padded(tokenizer: Any, found: Any, config: EvaluationConfig) -> Iterator[dict[str, Tensor]]:
    """Batches of what a tokenizer made, each padded to its longest row."""
    count = len(found["input_ids"])
    for start in range(0, count, config.batch_size):
        part = {name: values[start : start + config.batch_size] for name, values in found.items()}
        yield dict(tokenizer.pad(part, return_tensors="pt"))
