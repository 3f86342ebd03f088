"""Tensors as text, bit for bit, for states that are written as JSON."""

from __future__ import annotations

import base64

import torch
from torch import Tensor

from td_plugin.errors import TdError


def to_text(tensor: Tensor) -> str:
    """The bytes of `tensor` in base64."""
    return base64.b64encode(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).decode()


def from_text(text: object, like: Tensor, where: str) -> Tensor:
    """What `to_text` was given, on the CPU.

    Args:
        text: from `to_text`.
        like: a tensor of the shape and dtype it had.
        where: what is read, for the error.

    Raises:
        TdError: no text, or not of such a tensor.
    """
    try:
        raw = bytearray(base64.b64decode(text if isinstance(text, str) else "?", validate=True))
    except ValueError as error:
        raise TdError("the saved state is damaged", where=where, got=repr(text)[:40], fix="another file") from error
    if len(raw) != like.numel() * like.element_size():
        raise TdError("the saved state is of another tensor", where=where, got=f"{len(raw)} bytes", fix="another file")
    return torch.frombuffer(raw, dtype=like.dtype).view(like.shape)
