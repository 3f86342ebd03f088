"""The structure of any model, from its traced graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from td_plugin.errors import first_line
from td_plugin.graph.attributes import with_sizes
from td_plugin.graph.classes import find_groups
from td_plugin.graph.depth import layer_groups
from td_plugin.graph.trace import read_labels, trace
from td_plugin.graph.trial import Run, meta_run, skeleton
from td_plugin.layer_cutting import remove_layers
from td_plugin.units import FixedGroup, Structure, UnitGroup


def read_graph(model: nn.Module, example_inputs: Mapping[str, Any], keep: Sequence[str] = ()) -> Structure:
    """Trace `model`, equate labels, and find out which attributes state the widths.

    Args:
        model: not masked; its weights are not read, so the meta device will do.
        example_inputs: as the model is called, by name.
        keep: fully qualified names of tensors whose units must all stay.

    Raises:
        TdError: the model cannot be traced.
    """
    program = trace(model, example_inputs)
    found = find_groups(read_labels(model, program), keep)
    groups, fixed = [], list(found.fixed)
    run = meta_run(example_inputs)
    sized = with_sizes(model, found.groups, found.visitors, run)
    for group, result in zip(found.groups, sized, strict=True):
        if isinstance(result, UnitGroup):
            groups.append(result)
        else:
            tensors = tuple(part.fqn for part in group.slices)
            fixed.append(FixedGroup(group.name, tensors, group.units, result))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    for group in layer_groups(model, program, shapes):
        fault = _layer_fault(model, group, run)
        if fault:
            fixed.append(FixedGroup(group.name, tuple(part.fqn for part in group.slices), group.units, fault))
        else:
            groups.append(group)
    return Structure(tuple(groups), tuple(fixed), "graph", found.work, program)


def _layer_fault(model: nn.Module, group: UnitGroup, run: Run) -> str:
    """Why the model does not run without the first, or without the last, of its layers; empty if it does."""
    for gone in {0, group.units - 1}:
        small = skeleton(model)
        remove_layers(small, group, torch.tensor([unit for unit in range(group.units) if unit != gone]))
        try:
            run(small)
        except Exception as error:  # whatever the model's own code raises
            return f"without one of its layers the model does not run: {first_line(error)}"
    return ""
