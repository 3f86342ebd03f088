"""Greedy removal by loss increase per cost: against a loop that tries every unit, and measured time."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
import torch
from test_evidence import UNITS, batch, constant, mlp, prepared
from torch import nn

import td_plugin as td
from td_plugin.budget import Budget, flops_left
from td_plugin.criteria import fisher_information
from td_plugin.evidence import evidence_of
from td_plugin.export import shrink
from td_plugin.export.unit_time import milliseconds_per_unit
from td_plugin.greedy import aim, cheapest
from td_plugin.structure import survey
from td_plugin.units import Structure


def trained(level: float = 0.1) -> tuple[nn.Module, td.TargetedDropout, Structure]:
    model = mlp(nn.GELU)  # every unit matters
    structure = survey(model, {"input": batch(4, 5)[0]}, source="graph")
    sparsifier = prepared(model, constant(td.recipes.fisher(UNITS)), level, example_inputs={"input": batch(4, 5)[0]})
    for step in range(3):
        x, y = batch(8, 5, seed=step)
        sparsifier.step()
        nn.functional.cross_entropy(model(x), y).backward()
    return model, sparsifier, structure


def by_trying(structure: Structure, scores: Mapping[str, list[float]], most: float) -> dict[str, int]:
    """Remove the unit with the least loss per FLOP, as the forward would be counted anew, until `most` is left."""
    kept = {group.name: group.units for group in structure.groups}
    left = {name: sorted(values) for name, values in scores.items()}
    while flops_left(structure, kept) > most:
        ratios = {}
        for name in kept:
            if kept[name] > 1:
                saved = flops_left(structure, kept) - flops_left(structure, {**kept, name: kept[name] - 1})
                ratios[name] = left[name][0] / saved
        best = min(ratios, key=lambda name: ratios[name])
        kept[best] -= 1
        left[best].pop(0)
    return kept


@pytest.mark.parametrize("level", [0.1, 0.4, 0.7])
def test_it_takes_what_a_loop_over_all_units_takes(level: float) -> None:
    _, sparsifier, structure = trained()
    evidence = evidence_of(sparsifier)
    scores = {
        group.name: fisher_information(evidence[group.ranked[0].fqn]).double().tolist() for group in structure.groups
    }
    found = cheapest(sparsifier, structure, Budget(level, of="flops", round_to=1))
    dense = flops_left(structure, {})
    assert dict(found) == by_trying(structure, scores, dense * (1 - level))
    assert found.flops is not None and found.flops[1] <= dense * (1 - level)


def test_the_sparsifier_goes_there_and_shrinks() -> None:
    model, sparsifier, structure = trained()
    found = cheapest(sparsifier, structure, Budget(0.5, of="parameters", round_to=1))
    aim(sparsifier, found)
    sparsifier.step()
    sparsifier.squash_mask()
    small = shrink(model, round_to=1, example_inputs={"input": batch(4, 5)[0]})
    assert (small[0].out_features, small[2].out_features) == tuple(found.values())
    assert sum(p.numel() for p in small.parameters()) == found.parameters[1]


def test_measured_time_decides_which_layer_pays() -> None:
    _, sparsifier, structure = trained()
    first, second = (group.name for group in structure.groups)
    budget = Budget(0.3, of="flops", round_to=1)
    dear = cheapest(sparsifier, structure, budget, {first: 1.0, second: 1e-9})
    cheap = cheapest(sparsifier, structure, budget, {first: 1e-9, second: 1.0})
    assert dear[first] < 8 and dear[second] == 6
    assert cheap[first] == 8 and cheap[second] < 6


def test_milliseconds_of_a_wide_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", time.process_time)  # other processes do not count
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64), nn.ReLU(), nn.Linear(64, 4))
    inputs = {"input": torch.randn(256, 64)}
    structure = survey(model, inputs, source="graph")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = milliseconds_per_unit(model, structure, inputs, rounds=5)
    assert set(found) == {"0", "2"} and found["0"] > 0.0 and min(found.values()) >= 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_errors() -> None:
    _, sparsifier, structure = trained()
    with pytest.raises(td.TdError, match="no cost of their own"):
        cheapest(sparsifier, structure, Budget(0.5))
    with pytest.raises(td.TdError, match=r"so much cannot be removed.*at most"):
        cheapest(sparsifier, structure, Budget(0.9, of="flops", round_to=1, floors={"neurons": 5}))
    with pytest.raises(td.TdError, match="gathers no evidence"):
        cheapest(prepared(mlp(), td.recipes.targeted_unit()), structure, Budget(0.5, of="flops"))
    with pytest.raises(td.TdError, match="not in the structure"):
        cheapest(prepared_on_weights(), structure, Budget(0.5, of="flops"))


def prepared_on_weights() -> td.TargetedDropout:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    sparsifier = prepared(model, constant(td.recipes.fisher(UNITS)))
    sparsifier.step()
    nn.functional.cross_entropy(model(batch(4, 5)[0]), batch(4, 5)[1]).backward()
    return sparsifier
