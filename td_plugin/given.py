"""Groups of units that the user gives by hand, checked against the model before anything is masked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import get_args

from torch import Tensor, nn

from td_plugin.errors import TdError
from td_plugin.units import Kind, Slice, Structure, UnitGroup


def nearest(name: str, known: Iterable[str]) -> str:
    """What the user may have meant, for the fix of an error."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"nearest: {match[0]!r}" if match else "the model has no parameters"


def given_structure(model: nn.Module, groups: Sequence[UnitGroup]) -> Structure:
    """`groups` as the structure of `model`, in place of what `survey` would find.

    Args:
        model: not masked.
        groups: which tensors share which units; nothing else of the model is looked at.

    Raises:
        TdError: no group, an unknown kind, a tensor or module the model does not have, entries that do not divide
            among the units, a unit that no ranked tensor computes, or a tensor to mask that is no float parameter.
    """
    if not isinstance(groups, Sequence) or not all(isinstance(group, UnitGroup) for group in groups) or not groups:
        fix = "a list of td_plugin.structure.UnitGroup; None looks the units up"
        raise TdError("not groups of units", where="groups", got=repr(groups)[:80], fix=fix)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {**dict(model.named_buffers(remove_duplicate=False)), **parameters}
    modules = dict(model.named_modules(remove_duplicate=False))
    for group in groups:
        _check_group(group)
        for part in group.slices:
            _check_slice(group, part, tensors)
        for part in group.ranked + group.carried:
            if part.fqn not in parameters or not parameters[part.fqn].is_floating_point():
                raise TdError(f"{_name(group)} masks what is no floating-point parameter", where=part.fqn)
        if lost := set(range(group.units)) - _units_of(group.ranked, tensors):
            raise TdError(f"{_name(group)}: no ranked tensor computes some units", got=sorted(lost)[:8])
        for name in _modules_of(group):
            if name not in modules:
                raise TdError(f"{_name(group)} names no module of the model", where=name, fix=nearest(name, modules))
    return Structure(tuple(groups), (), "given")


def _name(group: UnitGroup) -> str:
    return f"the given group {group.name!r}"


def _check_group(group: UnitGroup) -> None:
    if group.kind not in get_args(Kind):
        raise TdError(f"{_name(group)} has an unknown kind", got=group.kind, fix=f"one of {get_args(Kind)}")
    if group.units < 1 or not group.ranked:
        problem = f"{_name(group)} needs units and at least one ranked tensor"
        raise TdError(problem, got=f"{group.units} units, {len(group.ranked)} ranked tensors")


def _check_slice(group: UnitGroup, part: Slice, tensors: dict[str, Tensor]) -> None:
    """Every entry along the dimension belongs to one of the group's units, or says that it belongs to none."""
    if part.fqn not in tensors:
        raise TdError(f"{_name(group)} names no tensor of the model", where=part.fqn, fix=nearest(part.fqn, tensors))
    shape = tuple(tensors[part.fqn].shape)
    if not 0 <= part.dim < len(shape):
        raise TdError(f"{_name(group)} names a dimension that is not there", where=part.fqn, got=(part.dim, shape))
    size = shape[part.dim]
    if part.owners:
        if len(part.owners) != size or not all(-1 <= owner < group.units for owner in part.owners):
            got = f"{len(part.owners)} owners up to {max(part.owners)} for {size} entries, {group.units} units"
            fix = f"one of -1 to {group.units - 1} for each entry"
            raise TdError(f"{_name(group)}: owners do not fit", where=part.fqn, got=got, fix=fix)
    elif size != group.units * part.span:
        got, fix = f"{group.units} units of {part.span}, {size} entries", "another span, or owners"
        raise TdError(f"{_name(group)}: entries do not divide among the units", where=part.fqn, got=got, fix=fix)


def _units_of(parts: Sequence[Slice], tensors: dict[str, Tensor]) -> set[int]:
    return set(chain.from_iterable(part.units(tensors[part.fqn].shape[part.dim]).tolist() for part in parts))


def _modules_of(group: UnitGroup) -> list[str]:
    """Every module named besides those of the slices."""
    residue = (group.residue.module, *group.residue.through) if group.residue else ()
    return [*(size.module for size in group.sizes), *(norm.module for norm in group.norms), *residue]
