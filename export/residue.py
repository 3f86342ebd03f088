"""The constants of units in layers known beforehand: computed from the layer's own bias, norm and activation."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor, nn

from td_plugin.errors import TdError
from td_plugin.export.constants import unfoldable
from td_plugin.export.removal import tensor_of
from td_plugin.units import Residue, UnitGroup


def fold_residue(model: nn.Module, group: UnitGroup, keep: Tensor) -> list[str]:
    """Move what the units outside `keep` emit into the biases of the layers that read them; which of those are new."""
    if group.residue is None:
        refuse_carried(model, group, keep)
        return []
    gone, residue = _gone(group, keep), group.residue
    emitted = _emitted(model, group, residue)[gone]  # [gone, rows per unit]
    if not emitted.any():
        return []
    if residue.unfoldable:
        raise unfoldable(group, residue.unfoldable)
    made = []
    for part in group.consumers:
        module, columns = model.get_submodule(part.module), tensor_of(model, part).detach().movedim(part.dim, 0)
        exact = torch.promote_types(columns.dtype, torch.float32)
        weights = columns.to(exact).reshape(group.units, part.span, columns.shape[1], -1)[gone].sum(-1)
        added = torch.einsum("uso,us->o", weights, emitted.to(exact).expand(-1, part.span))
        old = dict(module.named_parameters(recurse=False)).get("bias")
        new = added if old is None else added + old.detach()
        module.bias = nn.Parameter(new.to(columns.dtype), requires_grad=old is None or old.requires_grad)
        if old is None:
            made.append(f"{part.module}.bias" if part.module else "bias")
    return made


def _gone(group: UnitGroup, keep: Tensor) -> Tensor:
    gone = torch.ones(group.units, dtype=torch.bool)
    gone[keep] = False
    return gone


def refuse_carried(model: nn.Module, group: UnitGroup, keep: Tensor) -> None:
    """Where nobody knows what follows from them, biases and norms of the units outside `keep` must be zero.

    Raises:
        TdError: one is not.
    """
    gone = _gone(group, keep)
    for part in group.carried:
        tensor = tensor_of(model, part).detach().movedim(part.dim, 0)
        owners = part.units(len(tensor))
        if bool(tensor[(owners >= 0) & gone[owners.clamp(min=0)]].any()):
            fix = "silence its biases too, or give a group with a residue"
            raise TdError("what a silent unit of this group emits is not known", where=part.fqn, fix=fix)


def _emitted(model: nn.Module, group: UnitGroup, residue: Residue) -> Tensor:
    """``[units, rows per unit]``: what each unit would emit if its weights were zero."""
    producer = dict(model.get_submodule(residue.module).named_parameters(recurse=False))
    weight, bias = producer["weight"], producer.get("bias")
    constant = weight.new_zeros(group.units * group.ranked[0].span) if bias is None else bias.detach().clone()
    constant = constant.reshape(1, -1, *[1] * (weight.ndim - 2))  # one sample; for convolutions an image of one pixel
    for name in residue.through:
        constant = attrgetter(name)(model)(constant)
    return constant.reshape(group.units, -1)
