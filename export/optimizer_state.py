"""`carry_over`: the optimizer of a model goes on with the model that `shrink` made of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from td_plugin.errors import TdError
from td_plugin.given import nearest

Kept = Mapping[str, Mapping[int, Tensor]]
"""Fully qualified tensor name -> {dimension: ``[kept]`` int64 indices of the entries that stay}."""


@dataclass(frozen=True)
class _Cut:
    """A parameter of the model, the one of the small model that was made of it, and what stayed."""

    name: str
    old: nn.Parameter
    new: nn.Parameter
    kept: Mapping[int, Tensor]


def carry_over(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    small: nn.Module,
    kept: Kept,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Make the optimizer of `model` drive the parameters of `small`, in place, so that training goes on.

    State of a parameter's shape (moments, momentum) is cut as the parameter was; so are master copies in a higher
    precision, but for values that the cut has changed. Scalars (the step) stay. Factored state (Adafactor) is cut along
    the dimensions it has; the means it holds over the others stay. A tensor with state of any other shape starts anew,
    with a warning. A parameter that only `small` has (a bias made by folding) joins the group of its module's weight,
    without state; parameters that `small` lacks leave. Learning-rate schedulers hold the optimizer itself and go on.
    Gradients are not carried.

    Args:
        optimizer: made for parameters of `model`; parameters of other modules stay in it untouched.
        model: before the cut.
        small: after it.
        kept: what stays of each parameter that was cut, by its name in `model`.
        renamed: name in `model` -> name in `small`, where a removed layer has moved those behind it.

    Raises:
        TdError: an optimizer of other parameters, one that keeps state across parameters (LBFGS), or a `kept` that does
            not explain the shapes of `small`. The optimizer is unchanged then.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        fix = "make a new one for the small model"
        raise TdError("LBFGS keeps one state for all parameters together, which cannot be cut", fix=fix)
    known = {id(parameter) for parameter in model.parameters()}
    if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
        raise TdError("the optimizer drives no parameter of the model", where=type(optimizer).__name__)
    cuts = _cuts(model, small, kept, renamed or {})
    groups: list[list[nn.Parameter]] = []
    states: dict[Tensor, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for cut in (cuts[id(p)] for p in group["params"] if id(p) in cuts):
            if cut.old in optimizer.state:
                states[cut.new] = _carried(optimizer.state[cut.old], cut) or _fresh(optimizer, group, cut.new)
        stay = (p for p in group["params"] if id(p) in cuts or id(p) not in known)
        groups.append([cuts[id(p)].new if id(p) in cuts else p for p in stay])
    for parameter, index in _newcomers(small, cuts, groups):
        states[parameter] = _fresh(optimizer, optimizer.param_groups[index], parameter)
    for old in (p for group in optimizer.param_groups for p in group["params"] if id(p) in known):
        optimizer.state.pop(old, None)
    optimizer.state.update(states)
    _put(optimizer, small, groups)


def _put(optimizer: torch.optim.Optimizer, small: nn.Module, groups: list[list[nn.Parameter]]) -> None:
    """Write the new members into the parameter groups; the lists stay the same objects."""
    names = {id(parameter): name for name, parameter in small.named_parameters()}
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        if "param_names" in group:
            before = {id(p): name for p, name in zip(group["params"], group["param_names"], strict=True)}
            group["param_names"] = [names[id(p)] if id(p) in names else before[id(p)] for p in members]
        group["params"][:] = members


def _cuts(model: nn.Module, small: nn.Module, kept: Kept, renamed: Mapping[str, str]) -> dict[int, _Cut]:
    """The fate of every parameter of `model` that `small` still has, by its id; tied ones under any of their names."""
    old, new = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, small))
    for name in (*kept, *renamed):
        if name not in old:
            raise TdError("the model has no such parameter", where=name, fix=nearest(name, old))
    names: dict[int, list[str]] = {}
    for name, parameter in old.items():
        names.setdefault(id(parameter), []).append(name)
    cuts, moved = {}, set(renamed.values())
    for key, aliases in names.items():
        # A name that another tensor has taken over is not this tensor's any more.
        later = [renamed.get(name, "" if name in moved else name) for name in aliases]
        found = next((new[name] for name in later if name in new), None)
        if found is not None:
            dims = {dim: index for name in aliases for dim, index in kept.get(name, {}).items()}
            cuts[key] = _checked(_Cut(aliases[0], old[aliases[0]], found, dims))
    return cuts


def _checked(cut: _Cut) -> _Cut:
    shape = list(cut.old.shape)
    for dim, index in cut.kept.items():
        fits = 0 <= dim < len(shape) and index.ndim == 1 and not index.is_floating_point() and index.dtype != torch.bool
        if not fits or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < shape[dim]):
            fix = "indices of the entries that stay, int64"
            raise TdError("what is kept does not fit the tensor", where=cut.name, got=(dim, tuple(shape)), fix=fix)
        shape[dim] = len(index)
    if tuple(shape) != tuple(cut.new.shape):
        got = f"{tuple(cut.old.shape)} -> {tuple(shape)}, but the small model has {tuple(cut.new.shape)}"
        raise TdError("what is kept does not explain the small model", where=cut.name, got=got)
    return cut


def _select(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    tensor = tensor.detach()
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _carried(state: Mapping[str, Any], cut: _Cut) -> dict[str, Any]:
    """The state of one parameter, cut; empty, with a warning, where it cannot be."""
    carried = {}
    for key, value in state.items():
        dims = _dims(key, value, cut)
        if dims is None:
            text = f"the optimizer's state of {cut.name} starts anew: {key!r} has no dimension to cut it along"
            warnings.warn(text, stacklevel=3)
            return {}
        if isinstance(value, Tensor) and value.shape == cut.old.shape:
            carried[key] = _alike(value, cut)
        elif isinstance(value, Tensor):
            here = {at: cut.kept[dim] for at, dim in enumerate(dims) if dim in cut.kept and value.shape[at] > 1}
            carried[key] = _select(value, here)
        else:
            carried[key] = value
    return carried


def _dims(key: str, value: object, cut: _Cut) -> Sequence[int] | None:
    """The parameter's dimension behind each dimension of `value`; none to cut in a scalar; None if there must be some.

    torch's Adafactor keeps the dimension it averages over, as 1. transformers' leaves it out: the last for ``_row``,
    the one before for ``_col``, which alone tells them apart where a weight is square.
    """
    if not isinstance(value, Tensor):
        return None if cut.kept and isinstance(value, (list, tuple, dict)) else []
    shape, full = tuple(value.shape), tuple(cut.old.shape)
    if not cut.kept or value.numel() == 1:
        return []
    dims = range(len(full))
    if len(shape) == len(full) and all(size in (1, whole) for size, whole in zip(shape, full, strict=True)):
        return dims
    averaged = [dim for dim in dims if shape == (*full[:dim], *full[dim + 1 :])]
    if len(averaged) > 1:
        said = len(full) - (1 if key.endswith("_row") else 2 if key.endswith("_col") else 0)
        averaged = [dim for dim in averaged if dim == said]
    return [dim for dim in dims if dim != averaged[0]] if averaged else None


def _alike(value: Tensor, cut: _Cut) -> Tensor:
    """State of the parameter's own shape. A master copy takes over what folding and rescaling have changed."""
    carried = _select(value, cut.kept)
    old = cut.old.detach().to(value.device)
    finer = value.is_floating_point() and value.element_size() > old.element_size()
    if finer and old.any() and torch.equal(value.to(old.dtype), old):
        new = cut.new.detach().to(value.device)
        carried = carried.where(_select(old, cut.kept) == new, new.to(value.dtype))
    return carried


def _newcomers(
    small: nn.Module, cuts: Mapping[int, _Cut], groups: list[list[nn.Parameter]]
) -> Iterator[tuple[nn.Parameter, int]]:
    """Parameters that only `small` has, put behind the weight of their module, with the index of its group."""
    inherited = {id(cut.new) for cut in cuts.values()}
    place = {id(parameter): index for index, members in enumerate(groups) for parameter in members}
    for name, parameter in small.named_parameters():
        if id(parameter) in inherited or not parameter.requires_grad:
            continue
        module = small.get_submodule(name.rpartition(".")[0])
        siblings = [p for p in (module._parameters.get("weight"), *module._parameters.values()) if p is not None]
        leader = next((p for p in siblings if id(p) in place), None)
        if leader is not None:
            index = place[id(leader)]
            at = next(i for i, p in enumerate(groups[index]) if p is leader)
            groups[index].insert(at + 1, parameter)
            yield parameter, index
        elif all(id(p) not in inherited for p in siblings):
            warnings.warn(f"{name} is in no group of the optimizer: it has no like in the model before", stacklevel=3)


def _fresh(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """The state before the first step: none, but that Adagrad makes its own when it is built."""
    if not isinstance(optimizer, torch.optim.Adagrad):
        return {}
    return {"step": torch.tensor(0.0), "sum": torch.full_like(parameter, group["initial_accumulator_value"])}
