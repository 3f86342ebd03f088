"""The demo's task: scikit-learn's 1,797 digits (8 × 8 pixels, 10 classes) and a small vision transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

Row = dict[str, Tensor]


@dataclass(frozen=True)
class Digits:
    """A fixed stratified split, three quarters for training.

    Attributes:
        train: rows with ``pixel_values`` ``[1, 8, 8]`` in [-1, 1] and ``labels`` ``[]``.
        pixels: test images ``[450, 1, 8, 8]``.
        labels: their classes ``[450]``.
    """

    train: list[Row]
    pixels: Tensor
    labels: Tensor

    @torch.no_grad()
    def accuracy(self, model: ViTForImageClassification) -> float:
        """Share of the test images that `model` gets right."""
        model.train(False)
        return float((model(pixel_values=self.pixels).logits.argmax(-1) == self.labels).float().mean())


def load() -> Digits:
    """Read the digits from scikit-learn's own files; nothing is downloaded."""
    images, classes = load_digits(return_X_y=True)
    pixels = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.as_tensor(classes, dtype=torch.long)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=classes)
    rows = [{"pixel_values": pixels[index], "labels": labels[index]} for index in train]
    return Digits(rows, pixels[test], labels[test])


def small_vit() -> ViTForImageClassification:
    """Untrained: three layers, 64 wide, 4 heads, 256 feed-forward neurons, patches of 2 × 2 pixels."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        initializer_range=0.1,  # transformers' 0.02 is meant for widths of 768 and more
        num_labels=10,  # type: ignore[call-arg]
    )
    return ViTForImageClassification(config)
