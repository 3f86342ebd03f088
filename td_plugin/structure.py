"""Which dimensions of which parameters live and die together.

A *unit* (a neuron, a convolution channel, an attention head) is a slice of several tensors: the rows that compute it,
its biases and norm parameters, and the columns that read it. A unit is *silenced* by zeroing its ranked and carried
slices; what it then still emits is constant, so it can be removed exactly.

`survey` finds the units of any model. It reads the families of `td_plugin.families` and plain `nn.Sequential` chains
directly, and every other model from its traced graph (`td_plugin.graph`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import NoneType
from typing import Any, Literal

from torch import nn

from td_plugin.errors import TdError
from td_plugin.given import nearest
from td_plugin.layers import in_table, read_layers
from td_plugin.model_inputs import model_inputs
from td_plugin.units import (
    FixedGroup,
    Kind,
    MeanNorm,
    Read,
    Residue,
    Setting,
    Size,
    Slice,
    Structure,
    UnitGroup,
    Work,
)

__all__ = [
    "FixedGroup",
    "Kind",
    "MeanNorm",
    "Read",
    "Residue",
    "Setting",
    "Size",
    "Slice",
    "Structure",
    "UnitGroup",
    "Work",
    "refused_groups",
    "survey",
    "unit_groups",
]

Source = Literal["auto", "graph", "known"]


def survey(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    source: Source = "auto",
    keep: Sequence[str] = (),
) -> Structure:
    """The units of `model`, and what cannot shrink, with reasons.

    Args:
        model: any module, not masked.
        example_inputs: as the model is called, by name; a transformers model needs none.
        source: ``"graph"`` always traces; ``"known"`` never does; ``"auto"`` traces where the model is neither in the
            table of families nor a plain `nn.Sequential`, and it is known how to call it.
        keep: fully qualified names of tensors whose units must all stay.

    Raises:
        TdError: ``"graph"``, and the model cannot be traced; the operator and its line are named. Or `keep` names what
            is no tensor of the model.
    """
    _check(model, example_inputs, keep)
    if source == "known":
        return _known(model, keep)
    known = _known(model, keep) if source == "auto" else None
    if known is not None and (known.source == "table" or (example_inputs is None and known.groups)):
        return known
    given = model_inputs(model) if example_inputs is None else example_inputs
    if given is None:
        if known is not None:
            return known
        fix = "give example_inputs: a dict of what the model is called with"
        raise TdError("the model cannot be traced without inputs", where=type(model).__name__, fix=fix)
    from td_plugin.graph.survey import read_graph  # torch.export takes a while to import

    if example_inputs is not None or known is None:
        return read_graph(model, given, keep)
    try:
        return read_graph(model, given, keep)
    except TdError as error:  # without its own structure a model can still be pruned by single weights
        return replace(known, fixed=(*known.fixed, FixedGroup(type(model).__name__, (), 0, str(error))))


def _check(model: nn.Module, example_inputs: object, keep: Sequence[str]) -> None:
    if not isinstance(example_inputs, (Mapping, NoneType)):
        fix = "a dict: the name of an argument of the forward -> what it is called with"
        raise TdError("inputs are given by name", where="example_inputs", got=type(example_inputs).__name__, fix=fix)
    if isinstance(keep, str):
        raise TdError("several names are asked for", where="keep", got=keep, fix=f"keep=[{keep!r}]")
    known = {
        name for found in (model.named_parameters, model.named_buffers) for name, _ in found(remove_duplicate=False)
    }
    for name in keep:
        if name not in known:
            raise TdError("no such tensor to keep", where=name, fix=nearest(name, known))


def _known(model: nn.Module, keep: Sequence[str]) -> Structure:
    found = read_layers(model)
    fixed = [FixedGroup(name, (), 0, reason) for name, reason in found if isinstance(reason, str)]
    groups = []
    for group in (group for _, group in found if isinstance(group, UnitGroup)):
        tensors = tuple(part.fqn for part in group.slices)
        if set(tensors).isdisjoint(keep):
            groups.append(group)
        else:
            fixed.append(FixedGroup(group.name, tensors, group.units, "the user keeps it"))
    return Structure(tuple(groups), tuple(fixed), "table" if in_table(model) else "chains")


def unit_groups(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> list[UnitGroup]:
    """The removable units of `model`, group by group in the order the model computes them; [] if none are known."""
    return list(survey(model, example_inputs).groups)


def refused_groups(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Layers whose units look removable but are not: fully qualified layer name -> reason."""
    return {group.name: group.reason for group in survey(model, example_inputs).fixed}
