"""Flags of single weights, eight to a byte: in the order of ``flatten()``, the first of eight in the lowest bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def size(flags: int) -> int:
    """Bytes that so many flags take."""
    return -(-flags // 8)


def pack(flags: Tensor) -> Tensor:
    """Bool of any shape -> uint8 ``[size(flags.numel())]``; bits behind the last flag are 0."""
    flat = flags.flatten()
    eights = pad(flat, (0, -len(flat) % 8)).to(torch.uint8).view(-1, 8)
    packed = eights[:, 0].clone()
    for place in range(1, 8):  # seven passes over a part; a sum over so short a dimension takes ten times as long
        packed |= eights[:, place] << place
    return packed


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """What `pack` was given: bool ``[*shape]``."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flags = (bits.unsqueeze(1) >> places) & 1
    return flags.to(torch.bool).flatten()[: torch.Size(shape).numel()].view(*shape)


def ones(bits: Tensor) -> int:
    """How many flags are set."""
    histogram = torch.bincount(bits, minlength=256)
    return int((histogram * torch.tensor([byte.bit_count() for byte in range(256)], device=bits.device)).sum())


def flags_of(keep: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask of a tensor of `shape`, packed or not, as bool, broadcastable to it."""
    return unpack(keep, shape) if keep.dtype == torch.uint8 else keep


def dropped_by(keep: Tensor, numel: int) -> int:
    """How many of a tensor's `numel` scalars a mask drops, packed or not."""
    if keep.dtype == torch.uint8:
        return numel - ones(keep)
    # A mask of one entry per unit stands for equally many scalars each.
    return (keep.numel() - int(keep.count_nonzero())) * numel // keep.numel()
