"""The whole way on scikit-learn's digits: train, prune, shrink, export, verify, time; one table and one picture."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from td_plugin import TargetedDropout
from td_plugin.contract import check_fraction
from td_plugin.export import benchmark, save_pretrained, shrink, to_onnx
from td_plugin.export.latency import LatencyReport, Speedup
from td_plugin.export.plots import plot_accuracy
from td_plugin.integrations import digits
from td_plugin.integrations.digits import Digits
from td_plugin.integrations.finetune import check_writable, count_parameters, started
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.recipes import ramping_targeted_unit, targeted_unit
from td_plugin.report import table

DENSE, TARGETED = "dense", "targeted dropout"
FILES = {DENSE: "dense.onnx", TARGETED: "shrunk.onnx"}
LEARNING_RATE = 2e-3
RAMP = 0.5  # γ and α reach their targets half-way; the other half trains what stays
LEVELS = (0.0, 0.25, 0.5, 0.625, 0.75, 0.8125, 0.875, 0.9)
BATCH = 32  # images per timed call


@dataclass(frozen=True)
class DemoConfig:
    """What may be changed.

    Attributes:
        output: directory for the models, the picture and the numbers.
        sparsity_level: γ, the share of neurons and heads to remove.
        epochs: of both trainings.
        seed: of initialisation, order and masks.
        rounds: timed rounds of the latency measurement.
    """

    output: Path = Path("td-demo")
    sparsity_level: float = 0.75
    epochs: int = 30
    seed: int = 0
    rounds: int = 100


@dataclass(frozen=True)
class DemoRow:
    """One way of training.

    Attributes:
        training: how.
        accuracy: on the test images, nothing pruned.
        pruned_accuracy: the same with γ of the units removed.
        parameters: of the model that ships.
        bytes: of its ONNX file.
        latency_ms: median milliseconds of one call with `BATCH` images.
    """

    training: str
    accuracy: float
    pruned_accuracy: float
    parameters: int
    bytes: int
    latency_ms: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; `str()` is the table.

    Attributes:
        sparsity_level: γ.
        rows: dense training, then targeted dropout, which ships shrunk.
        speedup: of the shrunk model over the dense one.
        curves: per training, (share of units pruned, accuracy).
        output: where the files are.
    """

    sparsity_level: float
    rows: tuple[DemoRow, ...]
    speedup: Speedup
    curves: dict[str, list[tuple[float, float]]]
    output: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "verdict": self.speedup.verdict}

    def __str__(self) -> str:
        """The table and where the picture is."""
        header: tuple[str, ...] = ("training", "accuracy", f"pruned γ={self.sparsity_level:g}", "ships", "parameters")
        header += ("ONNX file", f"p50, batch {BATCH}", "speed-up")
        ships = {DENSE: ("dense", "1"), TARGETED: ("shrunk", str(self.speedup))}
        rows = [
            (r.training, f"{r.accuracy:.1%}", f"{r.pruned_accuracy:.1%}", ships[r.training][0], f"{r.parameters:,}")
            + (f"{r.bytes / 1e3:,.0f} kB", f"{r.latency_ms:.2f} ms", ships[r.training][1])
            for r in self.rows
        ]
        return f"{table(header, rows)}\naccuracy against sparsity: {Path(self.output) / 'accuracy.png'}"


def run_demo(config: DemoConfig) -> DemoResult:
    """Train a small ViT twice, densely and with targeted unit dropout, and follow both to the latency table.

    Writes ``dense.onnx``, ``shrunk.onnx``, ``shrunk/`` and ``accuracy.png`` into `config.output`.

    Raises:
        TdError: the output cannot be written, or γ is outside [0, 1).
    """
    check_writable(config.output)
    check_fraction(config.sparsity_level, "sparsity_level (γ)")
    data = digits.load()
    callback = TargetedDropoutCallback(
        ramping_targeted_unit(), config.sparsity_level, seed=config.seed, recipe_steps=RAMP, squash=False
    )
    with _one_thread():
        dense, targeted = _train(data, config, []), _train(data, config, [callback])
    models = {DENSE: dense, TARGETED: _unmasked(targeted)}
    curves = {name: [(level, data.accuracy(prune(model, level))) for level in LEVELS] for name, model in models.items()}
    plot_accuracy(curves, config.output / "accuracy.png", title="Digits, small ViT", trained_at=config.sparsity_level)
    started(callback).squash_mask()
    small = shrink(targeted)
    save_pretrained(small, config.output / "shrunk")
    latency = _ship({DENSE: dense, TARGETED: small}, data, config)
    speedup = latency.speedup(TARGETED, over=DENSE)
    pruned = {DENSE: data.accuracy(prune(dense, config.sparsity_level)), TARGETED: data.accuracy(small)}
    parameters = {DENSE: count_parameters(dense), TARGETED: count_parameters(small)}
    rows = tuple(
        DemoRow(name, data.accuracy(model), pruned[name], parameters[name], file.bytes, file.percentile(50) * 1e3)
        for (name, model), file in zip(models.items(), latency.files, strict=True)
    )
    return DemoResult(config.sparsity_level, rows, speedup, curves, str(config.output))


def _unmasked(model: ViTForImageClassification) -> ViTForImageClassification:
    """A copy of a masked model without its masks: the keys of its state are the plain model's."""
    copied = digits.small_vit()
    copied.load_state_dict(model.state_dict())
    return copied


def _ship(models: dict[str, ViTForImageClassification], data: Digits, config: DemoConfig) -> LatencyReport:
    """Export and verify both models on test images, then time them in turn."""
    inputs = {"pixel_values": data.pixels[:BATCH]}
    files = {name: to_onnx(model, config.output / FILES[name], inputs) for name, model in models.items()}
    return benchmark(files, inputs, rounds=config.rounds)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from a second thread, and loses much when another program wants the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(data: Digits, config: DemoConfig, callbacks: list[TrainerCallback]) -> ViTForImageClassification:
    set_seed(config.seed)
    model = digits.small_vit()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=64,
            learning_rate=LEARNING_RATE,
            warmup_steps=0.1,
            seed=config.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        Trainer(
            model, arguments, data_collator=default_data_collator, train_dataset=data.train, callbacks=callbacks
        ).train()
    return model


def prune(model: ViTForImageClassification, sparsity_level: float) -> ViTForImageClassification:
    """A copy of `model` with the smallest units of every layer silenced: pruning by magnitude after training."""
    pruned = copy.deepcopy(model)
    if sparsity_level > 0:
        sparsifier = TargetedDropout(targeted_unit(drop_rate=0.0), sparsity_level)
        sparsifier.prepare(pruned)
        sparsifier.squash_mask()
    return pruned
