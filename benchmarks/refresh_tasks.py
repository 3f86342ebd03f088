"""The trainings that `benchmarks/refresh.py` repeats: two fine-tunes, two from scratch. All are transformers models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch
from datasets import load_dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from td_plugin.integrations import digits
from td_plugin.integrations.classifiers import Classifier, load_classifier
from td_plugin.integrations.config import DataConfig
from td_plugin.integrations.data import load_data

Batch = dict[str, Tensor]
MAX_LENGTH = 64  # tokens of a text, and characters of a window
SORTED_TOGETHER = 8  # batches; texts of like length go together, which halves the padding


@dataclass(frozen=True)
class Settings:
    """How long and how fast.

    Attributes:
        learning_rate: peak of AdamW's; a tenth of warm-up, then linear decay.
        steps: optimizer steps.
        batch: rows per step.
        held_out: rows that are judged, which training never sees.
        width: of the model, where it is made here.
    """

    learning_rate: float
    steps: int
    batch: int
    held_out: int
    width: int = 0


SETTINGS = {
    "sst2": Settings(2e-4, 200, 16, 400),
    "trec": Settings(2e-4, 200, 16, 400),
    "characters": Settings(3e-3, 500, 16, 1000, width=128),
    "digits": Settings(3e-3, 400, 32, 450),
}


@dataclass(frozen=True)
class Task:
    """One training, to be repeated.

    Attributes:
        settings: of the optimisation.
        model: makes it, ready to train; what is random in it follows torch's global seed.
        batches: seed -> one batch per step.
        held_out: batches to judge by.
    """

    settings: Settings
    model: Callable[[], PreTrainedModel]
    batches: Callable[[int], Iterator[Batch]]
    held_out: list[Batch]


def finetune(settings: Settings, data: str, encoder: str) -> Task:
    """A classifier of texts on a pretrained encoder; a tenth of the rows is held out, at most `settings.held_out`."""
    datasets.disable_progress_bars()
    found = load_data(DataConfig(data), seed=0)
    few, many = min(settings.held_out, len(found.validation)), min(settings.steps * settings.batch, len(found.train))
    rows = found.train.shuffle(seed=0).select(range(many))
    found = replace(found, train=rows, validation=found.validation.select(range(few)))
    classifier = load_classifier(encoder, found, MAX_LENGTH)

    def batches(seed: int) -> Iterator[Batch]:
        return _batches(_lengths(classifier.train["input_ids"]), settings, seed, lambda i: _rows(classifier, i))

    lengths = torch.tensor(_lengths(classifier.validation["input_ids"]))
    order = lengths.argsort(stable=True).split(2 * settings.batch)
    held_out = [classifier.collate([classifier.validation[i] for i in part.tolist()]) for part in order]
    return Task(settings, lambda: load_classifier(encoder, found, MAX_LENGTH).model, batches, held_out)


def _lengths(rows: Sequence[Sequence[int]]) -> list[int]:
    return [len(row) for row in rows]


def _rows(classifier: Classifier, indices: list[int]) -> Batch:
    return classifier.collate([classifier.train[i] for i in indices])


def characters(settings: Settings, data: str) -> Task:
    """A language model of characters, from scratch: a decoder of three layers; the last 5 % of the text is held out."""
    text = _text(data)
    code = {character: index for index, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([code[character] for character in text])
    train, held_out = codes[: -len(codes) // 20], codes[-len(codes) // 20 :]

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(settings.steps):
            starts = torch.randint(len(train) - MAX_LENGTH, (settings.batch,), generator=generator)
            yield _windows(torch.stack([train[start : start + MAX_LENGTH] for start in starts.tolist()]))

    rows = held_out[: len(held_out) // MAX_LENGTH * MAX_LENGTH].view(-1, MAX_LENGTH)[: settings.held_out]
    judged = [_windows(part) for part in rows.split(2 * settings.batch)]
    return Task(settings, lambda: _decoder(len(code), settings.width), batches, judged)


def _windows(ids: Tensor) -> Batch:
    return {"input_ids": ids, "labels": ids}


def _text(data: str) -> str:
    """A text file, the first column of texts of a parquet file, or, of no name, the sources of a part of torch."""
    if not data:
        return inspect.getsource(torch.nn.functional)
    if Path(data).suffix != ".parquet":
        return Path(data).read_text(encoding="utf-8")
    rows = load_dataset("parquet", data_files={"train": data})["train"]
    return "\n".join(rows[rows.column_names[0]])


def _decoder(vocabulary: int, width: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            initializer_range=0.5 * width**-0.5,  # transformers' 0.02 is meant for widths of 768 and more
            use_cache=False,
        )
    )


def digit_images(settings: Settings) -> Task:
    """The demo's: scikit-learn's digits and a small vision transformer, from scratch."""
    data = digits.load()

    def batches(seed: int) -> Iterator[Batch]:
        return _batches([1] * len(data.train), settings, seed, lambda i: _stack([data.train[k] for k in i]))

    return Task(settings, digits.small_vit, batches, [{"pixel_values": data.pixels, "labels": data.labels}])


def _stack(rows: list[Batch]) -> Batch:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _batches(
    lengths: list[int], settings: Settings, seed: int, collate: Callable[[list[int]], Batch]
) -> Iterator[Batch]:
    """One batch per step, in epochs of a new order each."""
    generator, sizes = torch.Generator().manual_seed(seed), torch.tensor(lengths)
    made = 0
    while made < settings.steps:
        order = torch.randperm(len(sizes), generator=generator)
        parts = order.split(SORTED_TOGETHER * settings.batch)
        ordered = torch.cat([part[sizes[part].argsort(stable=True)] for part in parts])
        whole = ordered[: max(len(ordered) // settings.batch, 1) * settings.batch].split(settings.batch)
        for turn in torch.randperm(len(whole), generator=generator).tolist()[: settings.steps - made]:
            yield collate(whole[turn].tolist())
            made += 1
