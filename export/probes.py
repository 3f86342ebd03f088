"""Batches of other sizes and lengths, made of an example's rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
"""Inputs by name, as the model is called; the first dimension of each is the batch."""


def is_sequence(tensor: Tensor) -> bool:
    """Whether the second dimension of an input is the length of a text: rank 2, integer or bool."""
    return tensor.ndim == 2 and not tensor.is_floating_point()


def resized(inputs: Batch, rows: int, length: int | None = None) -> dict[str, Tensor]:
    """`inputs` cut or repeated to `rows` rows and, for text inputs, `length` tokens."""
    result = {}
    for name, tensor in inputs.items():
        result[name] = tensor[torch.arange(rows) % tensor.shape[0]]
        if length is not None and is_sequence(tensor):
            result[name] = result[name][:, torch.arange(length) % tensor.shape[1]]
    return result


def text_length(inputs: Batch) -> int | None:
    """Tokens of the text inputs; None where there are none."""
    return next((tensor.shape[1] for tensor in inputs.values() if is_sequence(tensor)), None)


def make_probe_batches(example_inputs: Batch) -> list[dict[str, Tensor]]:
    """Batches made of the example's rows that a faithful ONNX file must get right.

    One and three rows; for text also two lengths (the example's and a third of it), and among three rows one padded
    on the right and one on the left.

    Args:
        example_inputs: dict of tensors, first dimension the batch.
    """
    length = text_length(example_inputs)
    lengths: list[int | None] = [None]
    if length is not None:
        lengths = [max(1, length // 3), max(2, length)]
    batches = [resized(example_inputs, rows, size) for rows in (1, 3) for size in lengths]
    for batch in batches:
        mask = batch.get("attention_mask")
        if mask is not None and is_sequence(mask) and len(mask) == 3:
            padding = mask.shape[1] // 3
            mask[0, mask.shape[1] - padding :] = 0
            mask[1, :padding] = 0
    return batches
