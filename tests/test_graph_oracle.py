"""Independent oracles for the units of a traced graph: hooks that zero activations, and the cut model."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterable, Mapping
from operator import attrgetter

import pytest
import torch
from graph_models import CASES, Where, build
from torch import Tensor, nn

from td_plugin.cutting import cut_all
from td_plugin.structure import Structure, UnitGroup, survey

TIGHT = 1e-9  # double precision


@functools.cache
def surveyed(name: str) -> Structure:
    return survey(build(name), CASES[name].inputs, source="graph")


def groups_of(name: str) -> list[UnitGroup]:
    return [group for group in surveyed(name).groups if group.kind != "layers"]


def output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)


def masked(model: nn.Module, gone: Iterable[tuple[UnitGroup, list[int]]]) -> nn.Module:
    """A copy in which the ranked and carried slices of the units are zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for group, units in gone:
            for part in group.ranked + group.carried:
                tensor = attrgetter(part.fqn)(model).movedim(part.dim, 0)
                tensor[torch.isin(part.units(len(tensor)), torch.tensor(units, dtype=torch.long))] = 0
    return model


def shrunk(model: nn.Module, gone: Iterable[tuple[UnitGroup, list[int]]]) -> nn.Module:
    model = copy.deepcopy(model)
    cut_all(model, [(g, torch.tensor([u for u in range(g.units) if u not in units])) for g, units in gone])
    return model


def some(group: UnitGroup, seed: str) -> list[int]:
    """Some units, never all."""
    draw = random.Random(seed)
    return sorted(draw.sample(range(group.units), draw.randint(1, group.units - 1)))


def zeroing(where: Where, units: list[int]):
    def hook(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        entries = torch.tensor([entry for unit in units for entry in where.entries(unit)])
        return out.index_fill(where.dim, entries, 0)

    return hook


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.groups])
def test_shrunk_equals_masked(name: str) -> None:
    model, inputs, groups = build(name), CASES[name].inputs, groups_of(name)
    dense = output(model, inputs)
    together = [(group, some(group, f"{name} all")) for group in groups]
    alone = [[(group, some(group, f"{name} {group.name}"))] for group in groups] if len(groups) > 1 else []
    for gone in (together, *alone):
        expected, small = output(masked(model, gone), inputs), shrunk(model, gone)
        assert (expected - dense).abs().max() > 1e-6  # the units do something
        assert (output(small, inputs) - expected).abs().max() < TIGHT
        sizes = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
        assert sizes[0] > sizes[1]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.units])
def test_masked_equals_activations_that_are_zeroed_by_hooks(name: str) -> None:
    model, case = build(name), CASES[name]
    for group in groups_of(name):
        gone = some(group, f"{name} hooks")
        hooked = copy.deepcopy(model)
        for where in case.units.get(group.name, ()):
            hooked.get_submodule(where.module).register_forward_hook(zeroing(where, gone))
        if group.name in case.units:
            expected = output(hooked, case.inputs)
            assert (output(masked(model, [(group, gone)]), case.inputs) - expected).abs().max() < TIGHT


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.groups])
def test_a_second_survey_finds_what_is_left(name: str) -> None:
    gone = [(group, some(group, f"{name} all")) for group in groups_of(name)]
    again = survey(shrunk(build(name), gone), CASES[name].inputs, source="graph")
    left = {group.name: group.units for group in again.groups if group.kind != "layers"}
    expected = {group.name: group.units - len(units) for group, units in gone}
    several = {name for name, units in expected.items() if units > 1}  # one channel in each group is depthwise
    assert {name: left.get(name) for name in several} == {name: expected[name] for name in several}
