"""Labelled rows of a file, and a tokenizer or image processor, become the batches that a model is judged on."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import ClassLabel, Dataset, LargeList, List
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from td_plugin.errors import TdError, first_line
from td_plugin.export.evaluation import Examples, Generation
from td_plugin.export.metrics import IGNORED
from td_plugin.export.probes import Batch
from td_plugin.export.scores import Metric, check_metric
from td_plugin.integrations.config import DataConfig
from td_plugin.integrations.data import EVALUATION_SPLITS, _input_column, _label_column, _read, _require

Loaded = TypeVar("Loaded")
_HIDDEN = 0.15  # of the tokens, for masked_perplexity: the share that such models are trained with


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


def load_examples(config: EvaluationConfig) -> Examples:
    """Read the rows and turn them into batches.

    Raises:
        TdError: the data or the processor cannot be read, a column is missing, the data are empty, or a label is no
            class of the model.
    """
    rows = _rows(config)
    own = config.metric in ("perplexity", "masked_perplexity")
    label = "" if own else _label_column(rows.features, config.label_column)
    named = DataConfig(config.data, text_column=config.text_column, image_column=config.image_column)
    task, column = _input_column(rows.features, named, label)
    for name, option in ((column, f"--{task}-column"), (config.pair_column, "--pair-column")):
        if name:
            _require(rows.features, name, option)
    if task == "image":
        labels = torch.tensor(_classes(rows, label, config))
        return Examples(_Images(rows, column, labels, config), config.metric, source=config.data)
    return _texts(rows, column, label, config)


def _rows(config: EvaluationConfig) -> Dataset:
    found = _read(config.data)
    if config.split and config.split not in found:
        raise TdError("the data set has no such split", where=config.data, got=config.split, fix=f"{sorted(found)}")
    split = config.split or next((name for name in EVALUATION_SPLITS if name in found), next(iter(found), ""))
    if not split or not len(found[split]):
        raise TdError("the data are empty", where=config.data)
    rows = found[split]
    return rows.shuffle(seed=0).select(range(config.max_rows)) if 0 < config.max_rows < len(rows) else rows


def _loaded(config: EvaluationConfig, what: str, load: Callable[[str], Loaded]) -> Loaded:
    try:
        return load(str(config.processor))
    except (OSError, ValueError, KeyError, TypeError) as error:  # transformers raises all of these on damaged files
        got = f"{type(error).__name__}: {first_line(error)}"
        raise TdError(f"the {what} cannot be read", where=str(config.processor), got=got, fix="--tokenizer") from error


def _classes(rows: Dataset, column: str, config: EvaluationConfig) -> list[Any]:
    """Class indices of the model, from whatever the column calls them; nested like the column."""
    numbers: dict[str, int] = {}
    if (config.processor / "config.json").is_file():
        numbers = _loaded(config, "model configuration", AutoConfig.from_pretrained).label2id or {}
    feature = rows.features[column]
    if isinstance(feature, (List, LargeList)):
        feature = feature.feature
    names = feature.names if isinstance(feature, ClassLabel) else []
    renumbered = bool(names) and set(names) <= set(numbers)  # the data count the classes as they like

    def index(label: Any) -> Any:
        if isinstance(label, list):
            return [index(entry) for entry in label]
        if isinstance(label, int) and (label >= 0 or label == IGNORED):
            return numbers[names[label]] if renumbered and label >= 0 else int(label)
        if isinstance(label, str) and label in numbers:
            return numbers[label]
        nearest = difflib.get_close_matches(str(label), list(numbers), n=1)
        hint = f"the model knows {list(numbers) or 'no names'}" + (f"; nearest: {nearest[0]!r}" if nearest else "")
        raise TdError("a label is no class of the model", where=f"{config.data}: {column}", got=repr(label), fix=hint)

    return [index(label) for label in rows[column]]


class _Images:
    """Batches of images, decoded each time they are read: a data set of pixels does not fit in memory."""

    def __init__(self, rows: Dataset, column: str, labels: Tensor, config: EvaluationConfig) -> None:
        self._rows, self._column, self._labels, self._size = rows, column, labels, config.batch_size
        self._processor = _loaded(config, "image processor", AutoImageProcessor.from_pretrained)

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self._size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._rows), self._size):
            images = [image.convert("RGB") for image in self._rows[start : start + self._size][self._column]]
            labels = self._labels[start : start + self._size]
            yield {**self._processor(images, return_tensors="pt"), "labels": labels}


def _texts(rows: Dataset, column: str, label: str, config: EvaluationConfig) -> Examples:
    tokenizer = _loaded(config, "tokenizer", AutoTokenizer.from_pretrained)
    if tokenizer.pad_token is None:  # decoders often have none; what it is does not matter under the mask
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    texts = list(rows[column])
    pairs = list(rows[config.pair_column]) if config.pair_column else None
    words = isinstance(texts[0], list)
    for position, text in enumerate([*texts, *(pairs or [])]):
        if not isinstance(text, list if words else str) or not text:
            raise TdError("a row has no text", where=config.data, got=f"row {position % len(texts)}: {text!r}")
    if words and (config.metric == "bleu" or not tokenizer.is_fast):
        raise TdError("a list of words is no text here", where=config.data, got=config.metric, fix="--text-column")
    if config.metric == "bleu":
        return _generating(tokenizer, texts, [str(text) for text in rows[label]], config)
    length = min(config.max_length, tokenizer.model_max_length)
    found = tokenizer(texts, pairs, truncation=True, max_length=length, is_split_into_words=words)
    if config.metric in ("perplexity", "masked_perplexity"):
        hide = config.metric == "masked_perplexity"
        batches = [_own_labels(batch, tokenizer, hide) for batch in _padded(tokenizer, found, config)]
        return Examples(batches, config.metric, source=config.data)
    classes = _classes(rows, label, config)
    if words:
        classes = [_word_labels(found.word_ids(row), labels, len(texts[row])) for row, labels in enumerate(classes)]
    return Examples(list(_with_labels(_padded(tokenizer, found, config), classes)), config.metric, source=config.data)


def _padded(tokenizer: Any, found: Any, config: EvaluationConfig) -> Iterator[dict[str, Tensor]]:
    count = len(found["input_ids"])
    for start in range(0, count, config.batch_size):
        part = {name: values[start : start + config.batch_size] for name, values in found.items()}
        yield dict(tokenizer.pad(part, return_tensors="pt"))


def _with_labels(batches: Iterable[dict[str, Tensor]], classes: Sequence[Any]) -> Iterator[Batch]:
    """Word labels are filled up with what does not count, on the side where the tokens are padded: the right."""
    done = 0
    for batch in batches:
        rows, length = batch["input_ids"].shape
        part = classes[done : done + rows]
        done += rows
        filled = [row + [IGNORED] * (length - len(row)) for row in part] if isinstance(part[0], list) else part
        yield {**batch, "labels": torch.tensor(filled)}


def _word_labels(words: Sequence[int | None], labels: Any, count: int) -> list[int]:
    """Of each word's first token its label; the others do not count."""
    if not isinstance(labels, list) or len(labels) != count:
        raise TdError("words and labels do not go together", got=f"{count} words, labels {labels}")
    first = [word is not None and word not in words[:place] for place, word in enumerate(words)]
    return [labels[word] if new and word is not None else IGNORED for word, new in zip(words, first, strict=True)]


def _own_labels(batch: dict[str, Tensor], tokenizer: Any, hide: bool) -> Batch:
    """The tokens themselves as labels: all, or 15 % that are hidden from the model, the same ones every time."""
    ids, real = batch["input_ids"], batch["attention_mask"] != 0
    if not hide:
        return {**batch, "labels": ids.masked_fill(~real, IGNORED)}
    if tokenizer.mask_token_id is None:
        raise TdError("this tokenizer hides no tokens", got=type(tokenizer).__name__, fix="metric perplexity")
    ordinary = real & ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~ordinary, 2.0)
    hidden = (drawn < _HIDDEN) | (ordinary & (drawn == drawn.amin(1, keepdim=True)))  # one in every row at least
    return {**batch, "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id)} | {
        "labels": ids.masked_fill(~hidden, IGNORED)
    }


def _generating(tokenizer: Any, texts: list[str], wanted: list[str], config: EvaluationConfig) -> Examples:
    about = _loaded(config, "model configuration", AutoConfig.from_pretrained)
    tokenizer.padding_side = "right" if about.is_encoder_decoder else "left"
    length = min(config.max_length, tokenizer.model_max_length)
    batches = list(_padded(tokenizer, tokenizer(texts, truncation=True, max_length=length), config))

    def decode(tokens: Tensor) -> list[str]:
        return list(tokenizer.batch_decode(tokens, skip_special_tokens=True))

    start = getattr(about, "decoder_start_token_id", None)
    generation = Generation(decode, tuple(wanted), start, tokenizer.eos_token_id, config.max_length)
    return Examples(batches, "bleu", generation, source=config.data)
