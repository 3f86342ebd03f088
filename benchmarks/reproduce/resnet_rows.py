"""What `resnet.py` and `ablation.py` train: every method is one recipe with its γ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import td_plugin as td
from td_plugin import gates, recipes
from td_plugin.granularity import OutputRow, Units
from td_plugin.penalties import L1

ROW, UNIT = OutputRow(), Units(("channels",), "producers")
SHARES = tuple(tenth / 10 for tenth in range(10))
JUDGED = (*SHARES, 0.75, 0.99)  # every γ that something is trained with
HIGH = (0.95, 0.96, 0.97, 0.98, 0.985, 0.986, 0.987, 0.988, 0.989, 0.99, 0.991, 0.992, 0.993, 0.994)

Group = Literal["weights", "units", "random", "ablation", "dependence"]
What = Literal["weights", "units"]


@dataclass(frozen=True)
class Strengths:
    """What the penalties cost, per weight.

    Attributes:
        l1: λ of `td_plugin.penalties.L1`.
        l0: λ of `td_plugin.gates.hard_concrete`.
        variational: λ of `td_plugin.gates.variational`.
    """

    l1: float = 1e-4
    l0: float = 1e-4
    variational: float = 1e-4


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        title: in tables and legends.
        group: the comparison it belongs to.
        recipe: of the method; None: nothing is dropped, or see `rescaled`.
        level: γ in training.
        what: is removed when it is judged; both for the one that training does not prepare for.
        shares: it is judged at; empty: at `level` only, with the mask of the recipe.
        gate: whether the recipe's gate scales weights, which it goes on doing when they are judged.
        rescaled: α of the variant that divides the candidates that stay by 1 - α (tensor2tensor).
        only_full: whether the quick comparison does without.
    """

    title: str
    group: Group
    recipe: Callable[[Strengths], td.Recipe] | None
    level: float = 0.0
    what: tuple[What, ...] = ("weights",)
    shares: tuple[float, ...] = JUDGED
    gate: bool = False
    rescaled: float = 0.0
    only_full: bool = False


def _weight(alpha: float, gamma: float, group: Group = "weights") -> Row:
    return Row(f"TD α {alpha:g} γ {gamma:g}", group, lambda _: recipes.targeted_weight(alpha), gamma)


def _ramping(alpha: float, gamma: float, group: Group, shares: tuple[float, ...] = JUDGED) -> Row:
    title = f"ramping TD α {alpha:g} γ {gamma:g}"
    return Row(title, group, lambda _: recipes.ramping_targeted_weight(alpha), gamma, shares=shares)


def _unit(alpha: float, gamma: float, draw: Literal["unit", "weight"] = "unit", group: Group = "units") -> Row:
    title = f"TD α {alpha:g} γ {gamma:g}" + (", drawn per weight" if draw == "weight" else "")
    return Row(title, group, lambda _: recipes.targeted_unit(alpha, ("channels",), draw=draw), gamma, ("units",))


def _ramping_unit(alpha: float, gamma: float, group: Group, shares: tuple[float, ...] = JUDGED) -> Row:
    title = f"ramping TD α {alpha:g} γ {gamma:g}"
    return Row(
        title, group, lambda _: recipes.ramping_targeted_unit(alpha, ("channels",)), gamma, ("units",), shares=shares
    )


def _random(gamma: float) -> Row:
    title = f"random before training, {gamma:.0%} of weights"
    return Row(title, "random", lambda _: recipes.random_weight(1.0), gamma, shares=())


def _random_unit(gamma: float) -> Row:
    title = f"random before training, {gamma:.0%} of units"
    return Row(title, "random", lambda _: recipes.random_unit(1.0, ("channels",)), gamma, ("units",), shares=())


def _rescaled(alpha: float, gamma: float) -> Row:
    return Row(f"TD α {alpha:g} γ {gamma:g}, rescaled", "ablation", None, gamma, rescaled=alpha)


ROWS: dict[str, Row] = {
    "none": Row("none", "weights", None, what=("weights", "units")),
    "dropout": Row("dropout .25", "weights", lambda _: recipes.dropconnect(0.25)),
    "td-50-50": _weight(0.5, 0.5),
    "td-66-75": _weight(0.66, 0.75),
    "td-75-90": _weight(0.75, 0.9),
    "variational": Row("variational", "weights", lambda s: gates.variational(ROW, strength=s.variational), gate=True),
    "l1": Row("L1", "weights", lambda s: replace(recipes.magnitude(ROW), penalty=L1(s.l1), name="l1")),
    "l0": Row("L0", "weights", lambda s: gates.hard_concrete(ROW, strength=s.l0), gate=True),
    "ramp-99-99": _ramping(0.99, 0.99, "weights", (*SHARES, 0.75, *HIGH)),
    "unit-50-50": _unit(0.5, 0.5),
    "unit-90-75": _unit(0.9, 0.75),
    "unit-ramp-99-90": _ramping_unit(0.99, 0.9, "units"),
    "random-50": replace(_random(0.5), only_full=True),
    "random-75": _random(0.75),
    "random-90": _random(0.9),
    "random-99": _random(0.99),
    "ramp-99-50": replace(_ramping(0.99, 0.5, "random", (0.5,)), only_full=True),
    "ramp-99-75": _ramping(0.99, 0.75, "random", (0.75,)),
    "ramp-99-90": _ramping(0.99, 0.9, "random", (0.9,)),
    "random-unit-75": _random_unit(0.75),
    "random-unit-90": _random_unit(0.9),
    "unit-ramp-99-75": _ramping_unit(0.99, 0.75, "random", (0.75,)),
    # what paper, authors' code and tensor2tensor disagree about
    "unit-50-50-w": _unit(0.5, 0.5, "weight", "ablation"),
    "unit-90-75-w": _unit(0.9, 0.75, "weight", "ablation"),
    "rescaled-50-50": _rescaled(0.5, 0.5),
    "rescaled-66-75": _rescaled(0.66, 0.75),
    "rescaled-75-90": _rescaled(0.75, 0.9),
    "ramp-75-90": _ramping(0.75, 0.9, "ablation"),
    "fixed-99-99": _weight(0.99, 0.99, "ablation"),
    "unit-fixed-99-90": _unit(0.99, 0.9, group="ablation"),
    # α and γ of the paper's analysis
    "td-50-75": _weight(0.5, 0.75, "dependence"),
}


def names(groups: tuple[Group, ...], full: bool) -> list[str]:
    """The rows of some comparisons."""
    return [name for name, row in ROWS.items() if row.group in groups and (full or not row.only_full)]
