"""`shrink`: a physically smaller model that computes what the masked one does."""

from __future__ import annotations

import copy
from operator import attrgetter
from typing import TypeVar

import torch
from torch import Tensor, nn

from td_plugin.errors import TdError
from td_plugin.export.modes import evaluating
from td_plugin.parametrization import bake
from td_plugin.structure import Slice, UnitGroup, refused_groups, unit_groups

Model = TypeVar("Model", bound=nn.Module)


def shrink(model: Model, *, round_to: int | None = None) -> Model:
    """A smaller copy of `model` without the units whose weights are all zero; `model` itself is left as it was.

    Masks are baked first. A unit goes if all its ranked weight rows are exactly zero; the constant it still emits
    in evaluation (its bias, through norm and activation) moves into the bias of the layer that reads it. At least one
    unit of each layer stays. An optimizer made for `model` does not know the new parameters.

    Args:
        model: any model with layers that `td_plugin.structure.unit_groups` knows, masked or squashed.
        round_to: widths are rounded up to multiples of it, by keeping some of the zero units; 1 removes all of them.
            None follows what onnxruntime gains from (`runtime_width`). Heads are never rounded.

    Returns:
        an ordinary module of the same classes, in the same mode, dtype and device.

    Raises:
        TdError: nothing can be removed (the reason is named), or a unit emits a constant that cannot be folded.

    Source: targeted dropout (arXiv 1905.13678) leaves the units zero; the folding is exact algebra.
    """
    if round_to is not None and round_to < 1:
        raise TdError("widths are rounded to a positive multiple", where="round_to", got=round_to, fix="give 1 or more")
    small = copy.deepcopy(model)
    bake(small)
    groups = unit_groups(small)
    if not groups:
        raise TdError("no units of a known structure", where=type(model).__name__, got=_reasons(model), fix=_KNOWN)
    with evaluating(small), torch.no_grad():  # constants are those of evaluation: norms use their running statistics
        zeros, removed = _remove_zero_units(small, groups, round_to)
    if removed == 0:
        raise _nothing_removed(model, zeros)
    return small


def _remove_zero_units(model: nn.Module, groups: list[UnitGroup], round_to: int | None) -> tuple[int, int]:
    """The number of zero units found and removed, in place."""
    zeros, removed = 0, 0
    for index in range(len(groups)):  # in computing order: a cut may leave a unit of the next layer without weights
        group = groups[index]
        zero = zero_units(model, group)
        keep = _kept(group, zero, round_to)
        zeros, removed = zeros + int(zero.sum()), removed + group.units - len(keep)
        if len(keep) == group.units:
            continue
        gains_bias = _fold(model, group, keep)
        cut(model, group, keep)
        if gains_bias:
            groups = unit_groups(model)  # the new bias belongs to the units of a later group
    return zeros, removed


_KNOWN = "BERT, RoBERTa, DistilBERT, ViT, or nn.Sequential chains of Linear, Conv1d and Conv2d"


def _reasons(model: nn.Module) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in refused_groups(model).items()) or "no such layer"


def _nothing_removed(model: nn.Module, zeros: int) -> TdError:
    where = type(model).__name__
    if zeros:
        fix = "pass round_to=1, or prune more"
        return TdError("rounding up keeps every zero unit", where=where, got=f"{zeros} zero units", fix=fix)
    fix = "train with a unit recipe and squash; a model that is already shrunk stays as it is"
    refused = _reasons(model) if refused_groups(model) else None
    return TdError("no unit is zero, nothing to remove", where=where, got=refused, fix=fix)


def runtime_width(kind: str, keep: int, dense: int) -> int:
    """The width to build for `keep` units of `dense`, by what onnxruntime's kernels gain from on CPUs.

    Linear layers of 256 and more: a multiple of 16, at least 64, and not a multiple of 1024 (rows 4 KiB apart alias
    in the cache). Convolutions of 32 channels and more: a multiple of 16, its block. Never more than `dense`.
    """
    width = keep
    if kind == "neurons" and dense >= 256:
        width = max(64, _ceil(keep, 16))
        width += 16 if width % 1024 == 0 else 0
    elif kind == "channels" and dense >= 32:
        width = _ceil(keep, 16)
    return min(width, dense)


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def zero_units(model: nn.Module, group: UnitGroup) -> Tensor:
    """``[units]`` bool, on the CPU: every ranked slice of the unit is exactly zero, so `shrink` can remove it."""
    rows = [_by_unit(_tensor(model, part), part) for part in group.ranked]
    return torch.stack([(row == 0).all(dim=1).cpu() for row in rows]).all(dim=0)


def _by_unit(tensor: Tensor, part: Slice) -> Tensor:
    """``[units, all entries of a unit]``."""
    rows = tensor.detach().movedim(part.dim, 0)
    return rows.reshape(rows.shape[0] // part.span, -1)


def _kept(group: UnitGroup, zero: Tensor, round_to: int | None) -> Tensor:
    """Indices of the units to keep, ascending: all others are zero; the first zero ones fill up to the width."""
    needed = max(1, group.units - int(zero.sum()))
    if round_to is None:
        width = runtime_width(group.kind, needed, group.units)
    else:
        width = needed if group.kind == "heads" else min(_ceil(needed, round_to), group.units)
    return zero.to(torch.uint8).argsort(stable=True)[:width].sort().values


def _tensor(model: nn.Module, part: Slice) -> Tensor:
    found: Tensor = attrgetter(part.fqn)(model)
    return found


def _fold(model: nn.Module, group: UnitGroup, keep: Tensor) -> bool:
    """Move what the units outside `keep` emit into the biases of the layers that read them; whether one is new."""
    gone = torch.ones(group.units, dtype=torch.bool)
    gone[keep] = False
    emitted = _emitted(model, group)[gone]  # [gone, rows per unit]
    if not emitted.any():
        return False
    if group.residue.unfoldable:
        raise TdError(
            "a unit without weights still emits a constant that cannot be moved into the next bias",
            where=group.name,
            got=group.residue.unfoldable,
            fix="silence its bias and its norm's scale and shift too, and use an activation with act(0) = 0",
        )
    gains_bias = False
    for part in group.consumers:
        module, columns = model.get_submodule(part.module), _tensor(model, part).detach().movedim(part.dim, 0)
        exact = torch.promote_types(columns.dtype, torch.float32)
        weights = columns.to(exact).reshape(group.units, part.span, columns.shape[1], -1)[gone].sum(-1)
        added = torch.einsum("uso,us->o", weights, emitted.to(exact).expand(-1, part.span))
        old = dict(module.named_parameters(recurse=False)).get("bias")
        new = added if old is None else added + old.detach()
        module.bias = nn.Parameter(new.to(columns.dtype), requires_grad=old is None or old.requires_grad)
        gains_bias = gains_bias or old is None
    return gains_bias


def _emitted(model: nn.Module, group: UnitGroup) -> Tensor:
    """``[units, rows per unit]``: what each unit would emit if its weights were zero."""
    producer = dict(model.get_submodule(group.residue.module).named_parameters(recurse=False))
    weight, bias = producer["weight"], producer.get("bias")
    constant = weight.new_zeros(group.units * group.ranked[0].span) if bias is None else bias.detach().clone()
    constant = constant.reshape(1, -1, *[1] * (weight.ndim - 2))  # one sample; for convolutions an image of one pixel
    for name in group.residue.through:
        constant = attrgetter(name)(model)(constant)
    return constant.reshape(group.units, -1)


def cut(model: nn.Module, group: UnitGroup, keep: Tensor) -> None:
    """Keep only the units `keep` of `group`, in place: parameters, buffers and the attributes that state widths.

    Args:
        model: the model `group` was found in.
        group: from `unit_groups(model)`.
        keep: ``[kept]`` int64 indices of units, ascending.
    """
    for part in group.slices:
        module, old = model.get_submodule(part.module), _tensor(model, part)
        index = keep.to(old.device)
        entries = (index[:, None] * part.span + torch.arange(part.span, device=old.device)).flatten()
        new = old.detach().index_select(part.dim, entries)
        is_parameter = isinstance(old, nn.Parameter)
        setattr(module, part.tensor, nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new)
    for size in group.sizes:
        setattr(model.get_submodule(size.module), size.attribute, size.per_unit * len(keep))
