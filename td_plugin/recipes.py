"""Every named method: one expression, one citation."""

from __future__ import annotations

from td_plugin.contract import Recipe
from td_plugin.criteria import magnitude
from td_plugin.granularity import KINDS, Members, OutputRow, Units
from td_plugin.schedules import Linear, paper_ramp


def targeted_weight(drop_rate: float = 0.66) -> Recipe:
    """Targeted weight dropout: the smallest weights of every output row are dropped with probability α.

    Gomez et al., arXiv 1905.13678, section 3.

    Args:
        drop_rate: α in [0, 1).

    Raises:
        TdError: `drop_rate` outside [0, 1).
    """
    return Recipe(magnitude, OutputRow(), drop_rate, name="targeted_weight")


def targeted_unit(drop_rate: float = 0.66, kinds: tuple[str, ...] = KINDS, members: Members = "producers") -> Recipe:
    """Targeted unit dropout: the units with the smallest incoming weights are dropped with probability α.

    Gomez et al., arXiv 1905.13678, section 3. A dropped unit is silent: its bias, and the scale and shift of a norm
    behind it, are dropped with its weights.

    Args:
        drop_rate: α in [0, 1).
        kinds: which units take part: ``"neurons"``, ``"channels"``, ``"heads"`` (these three by default), or one of
            ``"hidden"``, the width of the residual stream, and ``"layers"``, whole residual layers.
        members: ``"producers"`` ranks a unit by its incoming weights, as the paper does; ``"all"`` by those that read
            it as well.

    Raises:
        TdError: `drop_rate` outside [0, 1), an unknown kind or unknown `members`.
    """
    return Recipe(magnitude, Units(kinds, members), drop_rate, name="targeted_unit")


def ramping_targeted_weight(drop_rate: float = 0.99) -> Recipe:
    """Ramping targeted weight dropout: γ reaches 95 % of its target half-way, α grows linearly.

    Gomez et al., arXiv 1905.13678, section 5.3.

    Args:
        drop_rate: α at the end of the ramp, in [0, 1).

    Raises:
        TdError: `drop_rate` outside [0, 1).
    """
    return Recipe(magnitude, OutputRow(), drop_rate, paper_ramp(), Linear(), name="ramping_targeted_weight")


def ramping_targeted_unit(
    drop_rate: float = 0.99, kinds: tuple[str, ...] = KINDS, members: Members = "producers"
) -> Recipe:
    """Ramping targeted unit dropout: as `targeted_unit`, with the ramps of `ramping_targeted_weight`.

    Gomez et al., arXiv 1905.13678, section 5.3.

    Args:
        drop_rate: α at the end of the ramp, in [0, 1).
        kinds: which units take part: ``"neurons"``, ``"channels"``, ``"heads"`` (these three by default), or one of
            ``"hidden"``, the width of the residual stream, and ``"layers"``, whole residual layers.
        members: ``"producers"`` ranks a unit by its incoming weights, as the paper does; ``"all"`` by those that read
            it as well.

    Raises:
        TdError: `drop_rate` outside [0, 1), an unknown kind or unknown `members`.
    """
    return Recipe(magnitude, Units(kinds, members), drop_rate, paper_ramp(), Linear(), name="ramping_targeted_unit")
