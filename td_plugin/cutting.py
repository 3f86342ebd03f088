"""Removing units from a model in place: parameters, buffers, and the attributes that state widths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from td_plugin.errors import TdError
from td_plugin.units import MeanNorm, Size, Slice, UnitGroup

Places = Mapping[int, list[tuple[nn.Module, str]]]
"""id of a tensor -> every module that holds it, under which name."""


def cut(model: nn.Module, group: UnitGroup, keep: Tensor) -> None:
    """Keep only the units `keep` of `group`, in place. For several groups of one survey use `cut_all`.

    Args:
        model: the model `group` was found in.
        group: its `sizes` are changed relative to what the attributes say now.
        keep: ``[kept]`` int64 indices of units, ascending.

    Raises:
        TdError: a tensor is not as wide as the group says: the group belongs to another model, or to this one before
            another cut.
    """
    cut_all(model, [(group, keep)])


def cut_all(model: nn.Module, cuts: Iterable[tuple[UnitGroup, Tensor]]) -> None:
    """Keep only the given units of several groups of one survey, in place; each ``keep`` is as for `cut`.

    Groups may share a dimension of a tensor, as the columns behind a concatenation do. A tensor that several modules
    share is cut once and stays shared.

    Raises:
        TdError: as for `cut`; nothing was changed.
    """
    cuts = list(cuts)
    places = tensor_places(model)
    tensors, masks = _stays(model, cuts)
    shared = dict.fromkeys(norm for group, _ in cuts for norm in group.norms)  # over a concatenation: of two groups
    norms = [(norm, _weight(model, norm)) for norm in shared]
    for key, by_dim in masks.items():
        old = tensors[key]
        new = old.detach()
        for dim, stays in by_dim.items():
            new = new.index_select(dim, stays.nonzero().flatten().to(new.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for module, name in places[key]:
            setattr(module, name, new)
    for norm, before in norms:
        _rescale(model, norm, before.numel())
    for group, keep in cuts:
        for size in group.sizes:
            _restate(model, size, group.units - len(keep))


def tensor_places(model: nn.Module) -> Places:
    """Where every parameter and buffer of `model` stands; a shared one stands at several places."""
    found: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for tensors in (
            module.named_parameters(recurse=False, remove_duplicate=False),
            module.named_buffers(recurse=False, remove_duplicate=False),
        ):
            for name, tensor in tensors:
                found[id(tensor)].append((module, name))
    return found


def alignment(model: nn.Module, group: UnitGroup) -> int:
    """What the width must be a multiple of: fused experts, whose grouped products want rows of 16 bytes; else 1."""
    for part in group.slices:
        tensor: Tensor = attrgetter(part.fqn)(model)
        convolution = isinstance(model.get_submodule(part.module), _ConvNd)
        several = tensor.ndim == 3 and len(tensor) > 1  # a positional embedding stands alone
        if group.kind not in ("layers", "heads") and several and part.dim > 0 and not convolution:
            return max(1, 16 // tensor.element_size())
    return 1


def _stays(
    model: nn.Module, cuts: Iterable[tuple[UnitGroup, Tensor]]
) -> tuple[dict[int, Tensor], dict[int, dict[int, Tensor]]]:
    """The tensors that change, and of each and each of its dimensions which entries stay: ``[size]`` bool."""
    tensors: dict[int, Tensor] = {}
    masks: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for group, keep in cuts:
        for part in group.slices:
            tensor: Tensor = attrgetter(part.fqn)(model)
            stays = entries_kept(group, keep, part, tensor.shape[part.dim])
            others = masks[id(tensor)].get(part.dim)
            tensors[id(tensor)] = tensor
            masks[id(tensor)][part.dim] = stays if others is None else stays & others
    return tensors, masks


def entries_kept(group: UnitGroup, keep: Tensor, part: Slice, size: int) -> Tensor:
    """``[size]`` bool: which entries of one slice of `group` stay when its units `keep` do.

    Raises:
        TdError: the tensor is not as wide as the group says.
    """
    alive = torch.zeros(group.units + 1, dtype=torch.bool)
    alive[keep.cpu()] = True
    alive[-1] = True  # entries of no unit are numbered -1
    return alive[_units(part, group, size)]


def _units(part: Slice, group: UnitGroup, size: int) -> Tensor:
    if size != (len(part.owners) or part.span * group.units):
        expected = len(part.owners) or part.span * group.units
        fix = "find the groups anew after a cut, or cut several at once with cut_all"
        raise TdError(f"{group.name} was {expected} wide when it was found", where=part.fqn, got=size, fix=fix)
    return part.units(size)


def _restate(model: nn.Module, size: Size, removed: int) -> None:
    module = model.get_submodule(size.module)
    old = attrgetter(size.attribute)(module)
    if size.index is None:
        setattr(module, size.attribute, old - size.per_unit * removed)
        return
    entries = list(old)
    entries[size.index] -= size.per_unit * removed
    setattr(module, size.attribute, type(old)(entries))


def _weight(model: nn.Module, norm: MeanNorm) -> Tensor:
    weight: Tensor = attrgetter("weight")(model.get_submodule(norm.module))
    return weight


def _rescale(model: nn.Module, norm: MeanNorm, before: int) -> None:
    """Undo that the mean now runs over fewer entries, of which those removed were zero.

    With S the sum of squares, ``w / sqrt(S/n + eps)`` equals ``w' / sqrt(S/n' + eps')`` for ``eps' = eps * n/n'`` and
    ``w' = w * sqrt(n/n')``.
    """
    module, weight = model.get_submodule(norm.module), _weight(model, norm)
    ratio = before / weight.numel()
    epsilon = attrgetter(norm.epsilon)(module)
    epsilon = torch.finfo(weight.dtype).eps if epsilon is None else epsilon  # what nn.RMSNorm takes None for
    if ratio == 1:
        return
    setattr(module, norm.epsilon, epsilon * ratio)
    with torch.no_grad():
        weight.mul_(ratio**0.5)
