"""Which dimensions of which parameters live and die together.

A *unit* (a neuron, a convolution channel, an attention head) is a slice of several tensors: the rows that compute it,
its biases and norm parameters, and the columns that read it. A unit is *silenced* by zeroing its ranked and carried
slices; what it then still emits is constant, so it can be removed exactly.

`survey` finds the units of any model. It reads the families of `td_plugin.families` and plain `nn.Sequential` chains
directly, and every other model from its traced graph (`td_plugin.graph`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from td_plugin.layers import in_table, read_layers
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


def survey(model: nn.Module, example_inputs: Mapping[str, Any] | None = None, *, source: Source = "auto") -> Structure:
    """The units of `model`, and what cannot shrink, with reasons.

    Args:
        model: any module, not masked.
        example_inputs: as the model is called, by name; a transformers model needs none.
        source: ``"graph"`` always traces; ``"known"`` never does; ``"auto"`` traces where the model is neither in the
            table of families nor an `nn.Sequential`, and can be called.

    Raises:
        TdError: ``"graph"``, and the model cannot be traced; the operator and its line are named.
    """
    return _known(model)


def _known(model: nn.Module) -> Structure:
    found = read_layers(model)
    fixed = tuple(FixedGroup(name, (), 0, reason) for name, reason in found if isinstance(reason, str))
    groups = tuple(group for _, group in found if isinstance(group, UnitGroup))
    return Structure(groups, fixed, "table" if in_table(model) else "chains")


def unit_groups(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> list[UnitGroup]:
    """The removable units of `model`, group by group in the order the model computes them; [] if none are known."""
    return list(survey(model, example_inputs).groups)


def refused_groups(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Layers whose units look removable but are not: fully qualified layer name -> reason."""
    return {group.name: group.reason for group in survey(model, example_inputs).fixed}
