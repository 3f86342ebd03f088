"""Inputs made up from what a model or a graph says of itself, for tracing, comparing and timing; not for accuracy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from td_plugin.errors import TdError
from td_plugin.export.session import open_session
from td_plugin.model_inputs import model_inputs

if TYPE_CHECKING:  # files are timed without transformers
    from transformers import PreTrainedModel

TOKENS = 10  # ids drawn for a graph, which does not state its vocabulary; every vocabulary has more


def inputs_for_model(model: PreTrainedModel, batch: int = 4, length: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs for a text or image model of transformers.

    Args:
        model: its configuration gives vocabulary, or channels and image size.
        batch: rows.
        length: tokens per row; every second row is padded by a quarter.
        seed: of the draw.

    Returns:
        ``pixel_values [batch, channels, height, width]``, or ``input_ids``, ``attention_mask`` and, where the model
        tells segments apart, ``token_type_ids``, all ``[batch, length]``; see `td_plugin.model_inputs` for the rest.

    Raises:
        TdError: the model takes neither text nor images.
    """
    made = model_inputs(model, batch=batch, length=length, seed=seed)
    if made is None or model.main_input_name not in ("input_ids", "pixel_values"):
        raise TdError(
            "only text and image models are supported", got=model.main_input_name, fix="call to_onnx yourself"
        )
    inputs = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    if "input_ids" in inputs:
        mask = inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        mask[1::2, mask.shape[1] - mask.shape[1] // 4 :] = 0
    return inputs


def inputs_for_graph(
    path: str | os.PathLike[str], batch: int = 1, length: int = 128, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs for an ONNX file: its input names and types, its fixed sizes, `batch` and `length` for the others.

    Args:
        path: the ONNX file.
        batch: size of the first dimension, where the graph leaves it open.
        length: size of the second, where the graph leaves it open.
        seed: of the draw.

    Raises:
        TdError: the file cannot be read, leaves another dimension open, or takes neither floats nor integers.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for entry in open_session(path).get_inputs():
        open_sizes = (batch, length)
        if any(not isinstance(size, int) for size in entry.shape[2:]):
            raise TdError("the graph leaves more than batch and length open", where=str(path), got=entry.shape)
        shape = [s if isinstance(s, int) else open_sizes[i] for i, s in enumerate(entry.shape)]
        if entry.type == "tensor(float)":
            inputs[entry.name] = torch.randn(shape, generator=generator)
        elif entry.type == "tensor(int64)":
            inputs[entry.name] = _integers(entry.name, shape, generator)
        else:
            raise TdError("cannot make up an input of this type", where=f"{path}: {entry.name}", got=entry.type)
    return inputs


def _integers(name: str, shape: list[int], generator: torch.Generator) -> Tensor:
    if "mask" in name:
        return torch.ones(shape, dtype=torch.long)
    if "type" in name:
        return torch.zeros(shape, dtype=torch.long)
    return torch.randint(1, TOKENS, shape, generator=generator)
