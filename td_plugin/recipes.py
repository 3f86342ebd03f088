"""Every named method: one expression, one citation.

Those of targeted dropout are here; magnitude pruning and its kin come from `td_plugin.recipes_pruning`, dropout without
a target and random candidates from `td_plugin.recipes_dropout`, what needs gradients or activations from
`td_plugin.recipes_evidence`.
"""

from __future__ import annotations

from typing import Literal

from td_plugin.contract import Recipe
from td_plugin.criteria import magnitude as by_magnitude
from td_plugin.errors import TdError
from td_plugin.granularity import KINDS, Members, OutputRow, Units
from td_plugin.recipes_dropout import dropconnect, random_unit, random_weight, unit_dropout
from td_plugin.recipes_evidence import ard, fisher, movement, taylor
from td_plugin.recipes_pruning import (
    block,
    gradual_magnitude,
    iterative_magnitude,
    magnitude,
    n_m,
    network_surgery,
)
from td_plugin.schedules import After, Linear, paper_ramp

__all__ = [
    "ard",
    "block",
    "delayed_targeted_unit",
    "delayed_targeted_weight",
    "dropconnect",
    "fisher",
    "gradual_magnitude",
    "iterative_magnitude",
    "magnitude",
    "movement",
    "n_m",
    "network_surgery",
    "ramping_targeted_unit",
    "ramping_targeted_weight",
    "random_unit",
    "random_weight",
    "targeted_unit",
    "targeted_weight",
    "taylor",
    "unit_dropout",
    "xtreme",
]

Draw = Literal["unit", "weight"]
"""What is dropped by itself of a unit that is a candidate: the unit, or each of its weights."""


def _sampler(draw: Draw) -> Literal["group", "weight"]:
    if draw not in ("unit", "weight"):
        raise TdError("unknown draw", got=repr(draw), fix="'unit' or 'weight'")
    return "group" if draw == "unit" else "weight"


def targeted_weight(drop_rate: float = 0.66) -> Recipe:
    """Targeted weight dropout: the smallest weights of every output row are dropped with probability α.

    Gomez et al., arXiv 1905.13678, section 3.

    Args:
        drop_rate: α in [0, 1].

    Raises:
        TdError: `drop_rate` outside [0, 1].
    """
    return Recipe(by_magnitude, OutputRow(), drop_rate, name="targeted_weight")


def targeted_unit(
    drop_rate: float = 0.66, kinds: tuple[str, ...] = KINDS, members: Members = "producers", draw: Draw = "unit"
) -> Recipe:
    """Targeted unit dropout: the units with the smallest incoming weights are dropped with probability α.

    Gomez et al., arXiv 1905.13678, section 3. A dropped unit is silent: its bias, and the scale and shift of a norm
    behind it, are dropped with its weights.

    Args:
        drop_rate: α in [0, 1].
        kinds: which units take part: ``"neurons"``, ``"channels"``, ``"heads"`` (these three by default), or one of
            ``"hidden"``, the width of the residual stream, and ``"layers"``, whole residual layers.
        members: ``"producers"`` ranks a unit by its incoming weights, as the paper does; ``"all"`` by those that read
            it as well.
        draw: ``"unit"`` drops whole units, as the paper says; ``"weight"`` each weight of a candidate by itself, as
            the authors' code does.

    Raises:
        TdError: `drop_rate` outside [0, 1], an unknown kind, unknown `members` or `draw`.
    """
    return Recipe(by_magnitude, Units(kinds, members), drop_rate, sampler=_sampler(draw), name="targeted_unit")


def ramping_targeted_weight(drop_rate: float = 0.99) -> Recipe:
    """Ramping targeted weight dropout: γ reaches 95 % of its target half-way, α grows linearly.

    Gomez et al., arXiv 1905.13678, section 5.3.

    Args:
        drop_rate: α at the end of the ramp, in [0, 1].

    Raises:
        TdError: `drop_rate` outside [0, 1].
    """
    return Recipe(by_magnitude, OutputRow(), drop_rate, paper_ramp(), Linear(), name="ramping_targeted_weight")


def ramping_targeted_unit(
    drop_rate: float = 0.99, kinds: tuple[str, ...] = KINDS, members: Members = "producers", draw: Draw = "unit"
) -> Recipe:
    """Ramping targeted unit dropout: as `targeted_unit`, with the ramps of `ramping_targeted_weight`.

    Gomez et al., arXiv 1905.13678, section 5.3.

    Args:
        drop_rate: α at the end of the ramp, in [0, 1].
        kinds: which units take part: ``"neurons"``, ``"channels"``, ``"heads"`` (these three by default), or one of
            ``"hidden"``, the width of the residual stream, and ``"layers"``, whole residual layers.
        members: ``"producers"`` ranks a unit by its incoming weights, as the paper does; ``"all"`` by those that read
            it as well.
        draw: ``"unit"`` drops whole units, as the paper says; ``"weight"`` each weight of a candidate by itself, as
            the authors' code does.

    Raises:
        TdError: `drop_rate` outside [0, 1], an unknown kind, unknown `members` or `draw`.
    """
    name, units, sampler = "ramping_targeted_unit", Units(kinds, members), _sampler(draw)
    return Recipe(by_magnitude, units, drop_rate, paper_ramp(), Linear(), sampler, name=name)


def delayed_targeted_weight(begin: float = 0.5, drop_rate: float = 1.0) -> Recipe:
    """Delayed pruning: nothing until a point of the run, then the smallest weights of every output row.

    `delayed_targeted_weight_prune` of the authors' code (Gomez et al., arXiv 1905.13678), where α is 1 and the point a
    step (`dropout_delay_steps`).

    Args:
        begin: the share of the ramp before which γ is 0.
        drop_rate: α in [0, 1].

    Raises:
        TdError: `drop_rate` outside [0, 1].
    """
    return Recipe(by_magnitude, OutputRow(), drop_rate, After(begin), name="delayed_targeted_weight")


def delayed_targeted_unit(begin: float = 0.5, drop_rate: float = 1.0, kinds: tuple[str, ...] = KINDS) -> Recipe:
    """Delayed pruning of units: `delayed_targeted_unit_prune` of the authors' code.

    Args:
        begin: the share of the ramp before which γ is 0.
        drop_rate: α in [0, 1].
        kinds: as for `targeted_unit`.

    Raises:
        TdError: `drop_rate` outside [0, 1], an unknown kind.
    """
    return Recipe(by_magnitude, Units(kinds, "producers"), drop_rate, After(begin), name="delayed_targeted_unit")


def xtreme(keeps: int = 3, drop_rate: float = 0.99) -> Recipe:
    """Xtreme pruning: ramping targeted dropout after which `keeps` weights of every filter (output row) are left.

    Gomez et al., arXiv 1905.13678 (Xtreme-3, Xtreme-4). γ is ``1 - keeps/n`` with n the weights of a row,
    whatever the sparsifier is given.

    Args:
        keeps: weights that stay per row; a row that has no more of them stays dense.
        drop_rate: α at the end of the ramp, in [0, 1].

    Raises:
        TdError: `keeps` below 1, `drop_rate` outside [0, 1].
    """
    return Recipe(by_magnitude, OutputRow(keeps), drop_rate, paper_ramp(), Linear(), name="xtreme")
