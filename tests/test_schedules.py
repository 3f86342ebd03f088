"""Schedules: frozen values that map time to a fraction."""

from __future__ import annotations

import dataclasses

import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.ao.pruning import LambdaSL

import td_plugin as td
from td_plugin.contract import Schedule
from td_plugin.schedules import Constant, Cubic, Linear, Piecewise, paper_ramp

ALL = (Constant(0.3), Linear(10, 20), Cubic(10, 20), Piecewise(((0, 0.1), (5, 0.9), (6, 0.2))), paper_ramp(0, 100))
TIMES = st.floats(-1e6, 1e6)
SPANS = st.tuples(st.floats(-1e3, 1e3), st.floats(0.01, 1e3)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def test_constant() -> None:
    assert [Constant(0.3)(t) for t in (-1, 0, 0.5, 1e9)] == [0.3] * 4
    assert Constant()(0) == 1.0


def test_linear() -> None:
    assert [Linear(10, 20)(t) for t in (0, 10, 12.5, 15, 20, 99)] == [0, 0, 0.25, 0.5, 1, 1]
    assert [Linear()(t) for t in (0, 0.25, 1)] == [0, 0.25, 1]


def test_cubic_is_equation_1_of_zhu_and_gupta() -> None:
    """``s_f + (s_i - s_f)(1 - (t - t_0)/(nΔt))³`` with s_i = 0 and s_f = 1."""
    for t in range(10, 21):
        assert Cubic(10, 20)(t) == pytest.approx(1 + (0 - 1) * (1 - (t - 10) / 10) ** 3)
    assert (Cubic(10, 20)(0), Cubic(10, 20)(21)) == (0, 1)


def test_piecewise_holds_outside_and_joins_points_by_lines() -> None:
    ramp = Piecewise(((0, 0.1), (10, 0.9), (12, 0.5)))
    assert [ramp(t) for t in (-5, 0, 5, 10, 11, 12, 13)] == pytest.approx([0.1, 0.1, 0.5, 0.9, 0.7, 0.5, 0.5])
    assert Piecewise(((3, 0.4),))(0) == Piecewise(((3, 0.4),))(9) == 0.4


@given(st.floats(0, 60000), st.floats(0, 0.999))
def test_paper_ramp_is_the_published_formula(step: float, gamma: float) -> None:
    assert gamma * paper_ramp(0, 40000)(step) == pytest.approx(reference.ramped_gamma(step, gamma), abs=1e-12)
    assert gamma * paper_ramp()(step / 40000) == pytest.approx(reference.ramped_gamma(step, gamma), abs=1e-12)
    assert gamma * Linear(0, 40000)(step) == pytest.approx(reference.ramped_alpha(step, gamma), abs=1e-12)


def test_paper_ramp_milestones() -> None:
    assert [paper_ramp()(t) for t in (0, 0.25, 0.5, 0.75, 1, 2)] == pytest.approx([0, 0.475, 0.95, 0.975, 1, 1])
    assert paper_ramp()(1) == 1.0  # exactly: the target γ is reached, not nearly


@given(SPANS, TIMES, TIMES)
def test_ramps_rise_from_0_to_1(span: tuple[float, float], a: float, b: float) -> None:
    early, late = min(a, b), max(a, b)
    for make in (Linear, Cubic, paper_ramp):
        ramp = make(*span)
        assert 0.0 <= ramp(early) <= ramp(late) <= 1.0
        assert (ramp(span[0]), ramp(span[1])) == (0.0, 1.0)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_frozen_hashable_and_compared_by_value(schedule: Schedule) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, dataclasses.fields(schedule)[0].name, 0)
    twin = dataclasses.replace(schedule)
    assert twin == schedule and hash(twin) == hash(schedule)
    assert [schedule(t) for t in (3, 7, 3)] == [twin(3), twin(7), twin(3)]  # no counter inside


@pytest.mark.parametrize("make", [Linear, Cubic, paper_ramp])
@pytest.mark.parametrize("span", [(1, 1), (2, 1)])
def test_a_span_must_have_a_length(make: type[Linear], span: tuple[float, float]) -> None:
    with pytest.raises(td.TdError, match="ends before it begins"):
        make(*span)


@pytest.mark.parametrize("points", [(), ((1, 0.5), (1, 0.6)), ((2, 0.5), (1, 0.6))])
def test_the_times_of_a_piecewise_schedule_must_increase(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(td.TdError, match="must increase"):
        Piecewise(points)


@pytest.mark.parametrize("schedule", [Linear(0, 4), Cubic(0, 4), paper_ramp(0, 4)], ids=repr)
def test_drives_torchs_lambda_scheduler(schedule: Schedule) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(), 0.8)
    sparsifier.prepare(model)
    scheduler = LambdaSL(sparsifier, schedule)
    for t in range(6):
        assert sparsifier.groups[0]["sparsity_level"] == pytest.approx(0.8 * schedule(t))
        sparsifier.step()
        scheduler.step()
