"""The data and the two networks that `methods.py` compares pruning methods on, and a plain training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WEIGHTS, UNITS = (0.5, 0.75, 0.9, 0.95), (0.25, 0.5, 0.75)
"""Shares that are removed; 0 is the row "none"."""

HELD_OUT = 0.25


@dataclass(frozen=True)
class Settings:
    """One budget for every method; nothing of it was chosen by looking at the test rows.

    Attributes:
        steps: optimizer steps.
        batch: rows per step.
        learning_rate: Adam's peak; linear decay to a tenth.
        ramp: share of the steps over which recipes that ramp do so.
        rows: of the images, where they come from a file.
    """

    steps: int = 300
    batch: int = 64
    learning_rate: float = 2e-3
    ramp: float = 0.75
    rows: int = 5000


@dataclass(frozen=True)
class Images:
    """A fixed split: ``[n, channels, size, size]`` in [-1, 1] and classes ``[n]``."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def batches(self, settings: Settings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One per step, in epochs of a new order each."""
        generator, done = torch.Generator().manual_seed(seed), 0
        while True:
            for rows in torch.randperm(len(self.train), generator=generator).split(settings.batch):
                if done == settings.steps:
                    return
                done += 1
                yield self.train[rows], self.train_labels[rows]


def load(path: str, settings: Settings) -> Images:
    """scikit-learn's digits, or the first rows of a parquet file with the columns ``image`` and ``label``."""
    from sklearn.model_selection import train_test_split

    pixels, labels = _digits() if not path else _parquet(path, settings.rows)
    train, test = train_test_split(range(len(labels)), test_size=HELD_OUT, random_state=0, stratify=labels)
    return Images(pixels[train], labels[train], pixels[test], labels[test])


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    return torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.as_tensor(classes)


def _parquet(path: str, rows: int) -> tuple[Tensor, Tensor]:
    import datasets
    import numpy as np

    datasets.disable_progress_bars()
    found = datasets.load_dataset("parquet", data_files={"train": path})["train"]
    found = found.select(range(min(rows, len(found))))
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in found["image"]])
    return pixels.movedim(-1, 1).float() / 127.5 - 1, torch.tensor(found["label"])


def lenet_300_100(images: Images) -> nn.Module:
    """LeCun et al. 1998: two hidden layers."""
    size = images.train[0].numel()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet_5(images: Images) -> nn.Module:
    """LeNet-5 in the widths of Caffe (20-50-500), with 3 × 3 filters and padding for images of 8 × 8 pixels."""
    channels, size = images.train.shape[1], images.train.shape[-1] // 4
    return nn.Sequential(
        nn.Conv2d(channels, 20, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(50 * size * size, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


NETWORKS = {"LeNet-300-100": lenet_300_100, "LeNet-5": lenet_5}


def fit(model: nn.Module, images: Images, settings: Settings, seed: int, before: Callable[[int], None]) -> None:
    """Train for the whole budget; `before` is called with the step's index before each forward."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    pace = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, settings.steps)
    model.train()
    for step, (pixels, labels) in enumerate(images.batches(settings, seed)):
        before(step)
        optimizer.zero_grad()
        cross_entropy(model(pixels), labels).backward()
        optimizer.step()
        pace.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the test rows that are right, in evaluation mode."""
    model.train(False)
    return float((model(images.test).argmax(-1) == images.test_labels).float().mean())
