"""Images for `resnet.py`: rows of a parquet file as tensors, cropped and flipped at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EDGE, SIZE = 4, 32


@dataclass(frozen=True)
class Images:
    """Rows to train on, with a black edge, and rows to judge on; uint8, ``[n, h, w, 3]``, and classes ``[n]``."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def to(self, device: str) -> Images:
        """The same on another device."""
        return Images(*(x.to(device) for x in (self.train, self.train_labels, self.test, self.test_labels)))


def load(train: str, test: str, rows: int, test_rows: int) -> Images:
    """The first rows of two files with the columns ``image`` and ``label``; 0: all.

    Args:
        train: parquet file.
        test: parquet file; empty: the last `test_rows` of `train` are judged, which is what to choose settings by.
        rows: to train on.
        test_rows: to judge on.
    """
    pixels, labels = _read(train, 0, rows)
    judged = _read(test, 0, test_rows) if test else _read(train, -test_rows, test_rows)
    if not test and rows == 0:
        pixels, labels = pixels[:-test_rows], labels[:-test_rows]
    edged = torch.zeros(len(pixels), SIZE + 2 * EDGE, SIZE + 2 * EDGE, 3, dtype=torch.uint8)
    edged[:, EDGE:-EDGE, EDGE:-EDGE] = pixels
    return Images(edged, labels, *judged)


def _read(path: str, first: int, count: int) -> tuple[Tensor, Tensor]:
    import datasets
    import numpy as np

    datasets.disable_progress_bars()
    found = datasets.load_dataset("parquet", data_files={"rows": path})["rows"]
    first = first % len(found)
    found = found.select(range(first, min(first + count, len(found)) if count else len(found)))
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in found["image"]])
    return pixels, torch.tensor(found["label"])


def standardised(pixels: Tensor) -> Tensor:
    """``[n, h, w, 3] -> [n, 3, h, w]``, channels last in memory: mean 0 and deviation 1 in every image."""
    values = pixels.float()
    deviation, mean = torch.std_mean(values, dim=(1, 2, 3), correction=0, keepdim=True)
    floor = values[0].numel() ** -0.5  # TensorFlow's per_image_standardization
    return ((values - mean) / deviation.clamp_min(floor)).permute(0, 3, 1, 2)


def batch(images: Images, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The rows of one step, in epochs of a new order each; a function of `step` and `seed`, so nothing is to be saved.

    Rows that do not fill a batch at the end of an epoch are left out of it.
    """
    per_epoch = len(images.train) // size
    epoch, index = divmod(step, per_epoch)
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    rows = order[index * size : (index + 1) * size]
    draws = torch.Generator().manual_seed((seed * 100_003 + step) * 2 + 1)
    shift = torch.randint(0, 2 * EDGE + 1, (2, size, 1), generator=draws)
    flipped = torch.rand(size, 1, generator=draws) < 0.5
    along = torch.arange(SIZE)
    down, across = shift[0] + along, shift[1] + torch.where(flipped, along.flip(0), along)
    device = images.train.device
    rows, down, across = rows.to(device), down.to(device), across.to(device)
    pixels = images.train[rows[:, None, None], down[:, :, None], across[:, None, :]]
    return standardised(pixels), images.train_labels[rows]
