"""Labelled rows of a file, and a tokenizer or image processor, become the batches that a model is judged on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, LargeList, List
from torch import Tensor
from transformers import AutoConfig

from td_plugin.errors import TdError
from td_plugin.export.evaluation import Examples, Generation
from td_plugin.export.metrics import IGNORED
from td_plugin.export.probes import Batch
from td_plugin.integrations.data import label_column
from td_plugin.integrations.input_data import EvaluationConfig as EvaluationConfig
from td_plugin.integrations.input_data import (
    Images,
    config_of,
    find_input,
    load_part,
    load_tokenizer,
    padded,
    read_rows,
    read_texts,
    tokenized,
)

_HIDDEN = 0.15  # of the tokens, for masked_perplexity: the share that such models are trained with


def load_examples(config: EvaluationConfig) -> Examples:
    """Read the rows and turn them into batches.

    Raises:
        TdError: the data or the processor cannot be read, a column is missing, the data are empty, or a label is no
            class of the model.
    """
    rows = read_rows(config)
    own = config.metric in ("perplexity", "masked_perplexity")
    label = "" if own else label_column(rows.features, config.label_column)
    task, column = find_input(rows, config, label)
    if task == "image":
        labels = torch.tensor(_classes(rows, label, config))
        return Examples(Images(rows, column, config, labels), config.metric, source=config.data)
    return _texts(rows, column, label, config)


def examples_of(options: Mapping[str, Any], beside: Path) -> Examples:
    """`load_examples` of options of the command line.

    Args:
        options: those that were given, of the fields of `EvaluationConfig`; ``tokenizer`` is the processor's directory.
        beside: that directory unless given.

    Raises:
        TdError: as `load_examples`.
    """
    return load_examples(config_of(options, beside))


def _classes(rows: Dataset, column: str, config: EvaluationConfig) -> list[Any]:
    """Class indices of the model, from whatever the column calls them; nested like the column."""
    numbers: dict[str, int] = {}
    if (config.processor / "config.json").is_file():
        numbers = load_part(config, "model configuration", AutoConfig.from_pretrained).label2id or {}
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


def _texts(rows: Dataset, column: str, label: str, config: EvaluationConfig) -> Examples:
    if config.metric == "bleu":
        return _generating(rows, column, label, config)
    tokenizer, found = tokenized(rows, column, config)
    texts = list(rows[column])
    words = isinstance(texts[0], list)
    if config.metric in ("perplexity", "masked_perplexity"):
        hide = config.metric == "masked_perplexity"
        batches = [_own_labels(batch, tokenizer, hide) for batch in padded(tokenizer, found, config)]
        return Examples(batches, config.metric, source=config.data)
    classes = _classes(rows, label, config)
    if words:
        classes = [_word_labels(found.word_ids(row), labels, len(texts[row])) for row, labels in enumerate(classes)]
    return Examples(list(_with_labels(padded(tokenizer, found, config), classes)), config.metric, source=config.data)


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


def _generating(rows: Dataset, column: str, label: str, config: EvaluationConfig) -> Examples:
    tokenizer, texts = load_tokenizer(config), read_texts(rows, column, config)
    if isinstance(texts[0], list):
        raise TdError("a list of words is no text here", where=config.data, got=config.metric, fix="--text-column")
    about = load_part(config, "model configuration", AutoConfig.from_pretrained)
    tokenizer.padding_side = "right" if about.is_encoder_decoder else "left"
    length = min(config.max_length, tokenizer.model_max_length)
    batches = list(padded(tokenizer, tokenizer(texts, truncation=True, max_length=length), config))
    wanted = tuple(str(text) for text in rows[label])

    def decode(tokens: Tensor) -> list[str]:
        return list(tokenizer.batch_decode(tokens, skip_special_tokens=True))

    start = getattr(about, "decoder_start_token_id", None)
    generation = Generation(decode, wanted, start, tokenizer.eos_token_id, config.max_length)
    return Examples(batches, "bleu", generation, source=config.data)
