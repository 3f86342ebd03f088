"""What Han et al. 2015 (arXiv 1506.02626, section 3) do between prunings, besides `recipes.iterative_magnitude`.

* Section 3.2: dropout shrinks with the layers it protects: `adjusted_rate`, `adjust_dropout`.
* Section 3.3: convolutions and linear layers are pruned and retrained in turn, the others fixed: `by_kind`, `only`.
* Section 3.5: neurons that nothing enters, or nothing leaves, are dead: `silence_dead`, then `td_plugin.export.shrink`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from td_plugin.choices import parameter_of
from td_plugin.contract import Recipe, check_fraction
from td_plugin.criteria import magnitude
from td_plugin.errors import TdError
from td_plugin.granularity import KINDS, WholeTensor
from td_plugin.parametrization import masked_tensors
from td_plugin.selection import Config, Inputs, select
from td_plugin.structure import survey
from td_plugin.units import UnitGroup

LayerKind = Literal["conv", "linear"]


def adjusted_rate(rate: float, before: int, after: int) -> float:
    """``D·√(C_r / C_o)``: the dropout rate for a layer of which `after` of `before` connections are left (equation 2).

    Args:
        rate: D in [0, 1], for the dense layer.
        before: C_o, connections of the dense layer.
        after: C_r, connections that are left.

    Raises:
        TdError: `rate` outside [0, 1], or not ``0 <= after <= before``.
    """
    check_fraction(rate, "dropout rate", closed=True)
    if not 0 <= after <= before or before == 0:
        raise TdError("more connections are left than there were", got=f"{after} of {before}", fix="after <= before")
    return rate * math.sqrt(after / before)


def adjust_dropout(model: nn.Module, rates: Mapping[str, float], masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Set every `nn.Dropout` named in `rates` to its `adjusted_rate`, by what is left of the layer behind it.

    Call it again after every pruning, with the same `rates`: those of the dense model.

    Args:
        model: masked or not.
        rates: name of the dropout module -> its rate in the dense model.
        masks: ``sparsifier.state``. The layer behind a dropout is the next one in the model's order that has a mask;
            without one the dropout gets its rate back.

    Raises:
        TdError: a name that is no dropout, a rate outside [0, 1].
    """
    left, waiting = dict(rates), []
    for name, module in model.named_modules():
        if name in left and isinstance(module, nn.Dropout):
            module.p = check_fraction(left.pop(name), "dropout rate", name, closed=True)
            waiting.append((name, module))
        mask = masks.get(f"{name}.weight")
        if mask is not None:
            for dropout, held in waiting:
                held.p = adjusted_rate(rates[dropout], mask["mask"].numel(), int(mask["mask"].sum()))
            waiting = []
    if left:
        raise TdError("the model has no such dropout", where=next(iter(left)), fix="name modules of class nn.Dropout")


def by_kind(model: nn.Module, config: Config = None) -> dict[LayerKind, list[dict[str, Any]]]:
    """The tensors that can be pruned, as two configs for `prepare`: of convolutions and of linear layers.

    Args:
        model: not prepared yet.
        config: the tensors, as for `prepare`; None takes all that a weight recipe takes.
    """
    found: dict[LayerKind, list[dict[str, Any]]] = {"conv": [], "linear": []}
    dims = {name: parameter.dim() for name, parameter in model.named_parameters(remove_duplicate=False)}
    for choice in select(model, Recipe(magnitude, WholeTensor()), config).choices:
        name = choice.ranked[0].fqn
        found["conv" if dims[name] > 2 else "linear"].append({"tensor_fqn": name, **choice.overrides})
    return found


@contextmanager
def only(model: nn.Module, kind: LayerKind) -> Iterator[None]:
    """Inside the block the weights and biases of layers of the other kind are fixed: `requires_grad` is off.

    What an earlier phase pruned of them, and `squash_mask` zeroed, so stays zero. Set the gradients to None before
    (``optimizer.zero_grad()``), or an optimizer with momentum goes on moving them.

    Args:
        model: any.
        kind: that trains on, with everything that is neither (norms, embeddings).

    Raises:
        TdError: an unknown kind, or the model has no layer of it.
    """
    if kind not in ("conv", "linear"):
        raise TdError("unknown kind of layers", got=repr(kind), fix="'conv' or 'linear'")
    weights = [(module, w) for module in model.modules() if (w := module._parameters.get("weight")) is not None]
    matrices = [(module, w.dim()) for module, w in weights if w.dim() > 1 and not isinstance(module, nn.Embedding)]
    if not any((dim > 2) == (kind == "conv") for _, dim in matrices):
        raise TdError(f"the model has no {kind} layers", where=type(model).__name__, fix="train it as a whole")
    others = [module for module, dim in matrices if (dim > 2) != (kind == "conv")]
    fixed = [p for module in others for p in module._parameters.values() if p is not None and p.requires_grad]
    for parameter in fixed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in fixed:
            parameter.requires_grad_(True)


@torch.no_grad()
def silence_dead(model: nn.Module, example_inputs: Inputs = None) -> int:
    """Zero the incoming weights and biases of units that nobody reads, in place: `shrink` then removes these units.

    It removes units that nothing enters by itself, folding the constant they emit into the layer behind.
    The model computes the same before and after.

    Args:
        model: squashed.
        example_inputs: as for `td_plugin.structure.survey`.

    Returns:
        how many scalars were zeroed that were not zero.

    Raises:
        TdError: the model carries masks.
    """
    if names := masked_tensors(model):
        raise TdError("the model carries masks", where=names[0], fix="squash_mask() first")
    groups = [group for group in survey(model, example_inputs).groups if group.kind in KINDS and group.consumers]
    zeroed, last = 0, -1
    while zeroed != last:  # what one layer loses may leave units of the layer before it unread
        last = zeroed
        for group in reversed(groups):
            zeroed += _silence(model, group, ~_read(model, group))
    return zeroed


def _read(model: nn.Module, group: UnitGroup) -> Tensor:
    """``[units]`` bool: whether any weight that reads the unit is not zero."""
    read = torch.zeros(group.units, dtype=torch.bool)
    for part in group.consumers:
        parameter = parameter_of(model, part)
        if parameter is None:
            return torch.ones_like(read)  # what the module computes is not known
        entries = (parameter.detach().movedim(part.dim, 0).flatten(1) != 0).any(1).cpu()
        owners = part.units(len(entries))
        read[owners[entries & (owners >= 0)]] = True
    return read


def _silence(model: nn.Module, group: UnitGroup, units: Tensor) -> int:
    zeroed = 0
    for part in (*group.ranked, *group.carried) if bool(units.any()) else ():
        parameter = parameter_of(model, part)
        if parameter is not None:
            owners = part.units(parameter.shape[part.dim])
            rows = ((owners >= 0) & units[owners.clamp(min=0)]).nonzero().flatten().to(parameter.device)
            zeroed += int(parameter.index_select(part.dim, rows).count_nonzero())
            parameter.index_fill_(part.dim, rows, 0)
    return zeroed
