"""One layer of `channel_prune`: choose its units, silence the others, mend the layers that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from td_plugin.export.activations import matrix_of, write_matrix
from td_plugin.export.least_squares import Samples, plain, rank_by_lasso, reconstruct
from td_plugin.export.removal import tensor_of
from td_plugin.units import Slice, UnitGroup


@dataclass(frozen=True)
class LayerError:
    """One group of units. Errors are ``‖y - ŷ‖² / ‖y‖²`` of what the layers that read them compute, on the samples.

    Attributes:
        name: fully qualified name of the layer whose units these are.
        kind: what a unit is.
        units: how many there were.
        kept: how many are left.
        rows: sampled outputs.
        removed: error if the smallest units (by the norm of their weights) were removed and nothing else done.
        reconstructed: error as it is now; never above `removed`.
        chosen_by: ``"lasso"``, or ``"magnitude"`` where reconstruction does better on those units.
    """

    name: str
    kind: str
    units: int
    kept: int
    rows: int
    removed: float
    reconstructed: float
    chosen_by: str


def samples_of(model: nn.Module, part: Slice, x: Tensor, y: Tensor) -> Samples:
    """What one layer reads of the units, and what it is to compute.

    Args:
        model: pruned so far.
        part: the entries of its weight that read the units.
        x: ``[rows, in · kernel]``, from `model`.
        y: ``[rows, out]``, from the dense model, at the same places.
    """
    module, weight = model.get_submodule(part.module), tensor_of(model, part)
    owners = part.units(weight.shape[part.dim])
    matrix, bias = matrix_of(module), module._parameters.get("bias")
    owners = owners.repeat_interleave(matrix.shape[1] // len(owners))  # the places of a kernel
    return Samples(x.double(), y.double(), matrix, None if bias is None else bias.detach().double().cpu(), owners)


def treat(model: nn.Module, group: UnitGroup, width: int, readers: Sequence[Samples]) -> LayerError:
    """Choose units, silence the others, and write what the readers are left with, in place."""
    dtype = tensor_of(model, group.consumers[0]).dtype
    by_norm = _by_norm(model, group)
    ranked = {"lasso": rank_by_lasso(readers, by_norm, width), "magnitude": by_norm}
    errors, solved = {}, {}
    for name, order in ranked.items():
        solved[name] = [reconstruct(reader, order[:width], dtype) for reader in readers]
        errors[name] = _mean([r.error(*found) for r, found in zip(readers, solved[name], strict=True)])
    best = min(ranked, key=lambda name: errors[name])
    removed = _mean([reader.error(plain(reader, by_norm[:width]), reader.bias) for reader in readers])
    _silence(model, group, ranked[best][width:])
    for part, (weight, bias) in zip(group.consumers, solved[best], strict=True):
        module = model.get_submodule(part.module)
        write_matrix(module, weight)
        if bias is not None:
            with torch.no_grad():
                module._parameters["bias"].copy_(bias)  # type: ignore[union-attr]
    rows = min(len(reader.x) for reader in readers)
    return LayerError(group.name, group.kind, group.units, width, rows, removed, errors[best], best)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _by_norm(model: nn.Module, group: UnitGroup) -> Tensor:
    """``[units]``: the largest first, by the norm of the weights that compute them."""
    squares = torch.zeros(group.units, dtype=torch.float64)
    for part in group.ranked:
        rows = tensor_of(model, part).detach().double().cpu().movedim(part.dim, 0).flatten(1).square().sum(1)
        owners = part.units(len(rows))
        squares.index_add_(0, owners[owners >= 0], rows[owners >= 0])
    return squares.argsort(descending=True, stable=True)


@torch.no_grad()
def _silence(model: nn.Module, group: UnitGroup, gone: Tensor) -> None:
    for part in group.ranked + group.carried:
        tensor = tensor_of(model, part).detach()
        dropped = torch.isin(part.units(tensor.shape[part.dim]), gone)
        tensor.movedim(part.dim, 0)[dropped.to(tensor.device)] = 0
