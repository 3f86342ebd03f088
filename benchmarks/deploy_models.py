"""The models of `deploy.py`, dense and shrunk, the forms that are made of them, and what these answer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

import td_plugin as td
from td_plugin.export import derive, shrink, to_onnx
from td_plugin.export.benchmark import file_size
from td_plugin.export.flops import count_flops
from td_plugin.export.forms import UNFUSED, Form
from td_plugin.export.runners import Form as File
from td_plugin.export.runners import make_runner
from td_plugin.export.session import graph_inputs, open_session

LEVELS = (0.0, 0.5, 0.75)
"""γ of the models; 0 is the dense one."""
TORCH = ("eager", "compile")
TIMED: tuple[Form, ...] = ("fp32", "fused", "int8", "int8-static")
STORED: tuple[Form, ...] = ("bf16", "fp16", "int8-weight", "int4")
"""Forms whose size and answers are told but that are not timed: on a CPU they are for the disk."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """What a model is judged on.

    Attributes:
        batches: with ``labels`` where there are any.
        calibration: rows that the static form takes its scales from.
        vocabulary: token ids of the timed inputs lie below it.
    """

    batches: list[Batch]
    calibration: list[Batch]
    vocabulary: int


@dataclass(frozen=True)
class Subject:
    """A model in all its levels.

    Attributes:
        name: in the names of files.
        title: in tables.
        load: γ -> the model with zeros, and the shrunk one.
        data: read when it is needed.
    """

    name: str
    title: str
    load: Callable[[float], tuple[PreTrainedModel, PreTrainedModel]]
    data: Callable[[], Data]


def trained(args: argparse.Namespace) -> Subject:
    """The runs of `sst2.py` with seed 0."""

    def load(level: float) -> tuple[PreTrainedModel, PreTrainedModel]:
        name = f"targeted-{level:g}-seed0" if level else "dense-seed0"
        model = AutoModelForSequenceClassification.from_pretrained(args.runs / name).eval()
        return model, shrink(model) if level else model

    def data() -> Data:
        from td_plugin.integrations.classifiers import load_classifier
        from td_plugin.integrations.config import DataConfig
        from td_plugin.integrations.data import load_data

        rows = load_data(DataConfig(args.train, args.validation, max_train_samples=args.calibration), seed=0)
        found = load_classifier(args.model, rows, 64)

        def batches(split: Any, size: int) -> list[Batch]:
            starts = range(0, len(split), size)
            return [dict(found.collate([split[i] for i in range(s, min(s + size, len(split)))])) for s in starts]

        training = [{k: v for k, v in b.items() if k != "labels"} for b in batches(found.train, 32)]
        return Data(batches(found.validation, 64), training, 20000)

    return Subject("minilm", "MiniLM fine-tuned on SST-2 (6 layers, hidden 384)", load, data)


def from_config(config: BertConfig, name: str, title: str, rows: int = 32) -> Subject:
    """Random weights; the units of smallest norm removed."""

    def load(level: float) -> tuple[PreTrainedModel, PreTrainedModel]:
        set_seed(0)
        model = BertForSequenceClassification(config).eval()
        if not level:
            return model, model
        sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), level)
        sparsifier.prepare(model)
        sparsifier.squash_mask()
        return model, shrink(model)

    def data() -> Data:
        batches = [random_inputs(8, length, config.vocab_size, length) for length in (16, 32, 61)]
        calibration = [random_inputs(8, 32, config.vocab_size, 100 + seed) for seed in range(rows // 8)]
        return Data(batches, calibration, config.vocab_size)

    return Subject(name, title, load, data)


def random_inputs(batch: int, sequence: int, vocabulary: int, seed: int = 0) -> Batch:
    """Tokens without padding: what is computed depends on their number only."""
    ids = torch.randint(1, vocabulary, (batch, sequence), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def key(level: float, form: str) -> str:
    """How a row is called in the JSON files: ``"0.5/int8"``."""
    return f"{level:g}/{form}"


def file_of(folder: Path, subject: Subject, level: float, form: str) -> Path:
    """Where a form lies."""
    return folder / subject.name / f"{level:g}.{form}.onnx"


def make(
    subject: Subject, level: float, data: Data, folder: Path, shapes: Iterable[tuple[int, int]], backend: str
) -> dict[str, Any]:
    """Write all forms of one level, and say of each how large it is and what it answers."""
    masked, small = subject.load(level)
    source = file_of(folder, subject, level, "fp32")
    to_onnx(small, source, data.batches[0])
    rows: dict[str, Any] = {}
    reference = answers(asking(masked), data.batches)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in small.parameters())
    for form in TORCH:
        model = torch.compile(small, backend=backend, dynamic=True) if form == "compile" else small
        rows[form] = {"bytes": weights, **judged(answers(asking(model), data.batches), reference, data.batches)}
    for form in (*TIMED, *STORED):
        path, about = source, {}
        if form != "fp32":
            path = file_of(folder, subject, level, form)
            given = data.calibration if form == "int8-static" else None
            report = derive(source, path, form, calibration=given, example_inputs=data.batches[:2])
            unfused = [note.replace(str(folder), "") for note in report.notes if note.startswith(UNFUSED)]
            about = {"written": report.form, "problem": report.problem.replace(str(folder), ""), "notes": unfused}
        found = answers(asking_file(path), data.batches)
        rows[form] = {"bytes": file_size(path), **judged(found, reference, data.batches), **about}
    return {
        "level": level,
        "parameters": small.num_parameters(),
        "rows": rows,
        "flops": {f"{b}x{s}": flops(source, random_inputs(b, s, data.vocabulary)) for b, s in shapes},
    }


def flops(path: Path, inputs: Batch) -> int:
    """Of one run of a file; a multiplication and an addition are two."""
    return count_flops(path, make_runner(File(path), [inputs]).feeds[0]).total


def asking(model: Callable[..., Any]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Inputs -> logits of a torch model."""

    def ask(batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return logits

    return ask


def asking_file(path: Path) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Inputs -> logits of an ONNX file."""
    session = open_session(path)

    def ask(batch: Mapping[str, Tensor]) -> Tensor:
        inputs = graph_inputs(session, batch, path.name)
        (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(logits)

    return ask


def answers(ask: Callable[[Mapping[str, Tensor]], Tensor], batches: Iterable[Batch]) -> Tensor:
    """``[rows, classes]``: the logits of all batches."""
    return torch.cat([ask(batch) for batch in batches])


def judged(logits: Tensor, reference: Tensor, batches: Iterable[Batch]) -> dict[str, float | None]:
    """Accuracy, None without labels; and how far the logits are from those of the model with zeros."""
    predicted, labels = logits.argmax(-1), [batch["labels"] for batch in batches if "labels" in batch]
    return {
        "accuracy": (predicted == torch.cat(labels)).double().mean().item() if labels else None,
        "agreement": (predicted == reference.argmax(-1)).double().mean().item(),
        "max_abs": (logits - reference).abs().max().item(),
        "relative": ((logits - reference).norm() / reference.norm()).item(),
    }
