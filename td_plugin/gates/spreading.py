"""From values per unit to the entries of a tensor, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from td_plugin.units import Slice


def spread(values: Tensor, slice_: Slice, size: int) -> Tensor:
    """``[units] -> [size]``: the value of the unit that each entry along the slice's dimension belongs to, else 0."""
    if not slice_.owners:
        return values.repeat_interleave(slice_.span)
    return pad(values, (0, 1))[slice_.units(size).to(values.device)]  # no unit is -1: the last


def along(values: Tensor, slice_: Slice, shape: Sequence[int]) -> Tensor:
    """``[units] -> [1, .., entries, .., 1]``, so that it broadcasts to a tensor of `shape`."""
    sizes = [1] * len(shape)
    sizes[slice_.dim] = shape[slice_.dim]
    return spread(values, slice_, shape[slice_.dim]).view(sizes)


def unit_sums(tensors: Sequence[Tensor], slices: Sequence[Slice]) -> Tensor:
    """``[*w] each -> [units]``: the sum over all entries of each unit, differentiable, in a fixed order."""
    parts = [_by_unit(tensor, slice_) for tensor, slice_ in zip(tensors, slices, strict=True)]
    units = max(map(len, parts))
    return torch.stack([pad(part, (0, units - len(part))).to(parts[0].device) for part in parts]).sum(0)


def _by_unit(tensor: Tensor, slice_: Slice) -> Tensor:
    entries = tensor.movedim(slice_.dim, 0).flatten(1).sum(1) if tensor.dim() > 1 else tensor
    if not slice_.owners:
        return entries.view(-1, slice_.span).sum(1)
    owners = slice_.units(len(entries)).to(entries.device)
    units = torch.arange(int(owners.max()) + 1, device=entries.device)
    return (owners == units.unsqueeze(1)).to(entries.dtype) @ entries
