"""The vocabulary every other file uses: `Evidence`, the four axes and `Recipe`.

A method of the targeted-dropout family is a point on four axes, each a value or a pure function:

* **Criterion** ``Evidence -> importance``: how much each weight matters (same shape as the weight, higher = keep).
* **Granularity** ``importance -> [pools, groups]``: a *pool* is what is ranked together (one output row, one
  tensor, the units of one layer), a *group* is what lives or dies together (one weight, one unit, one head).
* **Schedule** ``time -> fraction``: how the target share γ (`sparsity_level`) and the drop probability α
  (`drop_rate`) grow over the run.
* **Sampler**: whether the draw is made once per group or, as in the authors' code for units, once per weight.

Three worked compositions:

1. *Targeted weight dropout* (Gomez et al., arXiv 1905.13678, section 3): magnitude x `OutputRow` x constant x
   constant. In each training forward the ``int(γ·n)`` smallest weights of every output row are candidates, and each
   candidate is dropped with probability α.
2. *Ramping targeted unit dropout* (same paper, section 5.3): magnitude x `Units` x `paper_ramp` x `Linear`. The
   candidates are whole units, ranked by the L2 norm of their incoming weights; γ reaches 95 % of its target half-way
   and α grows linearly.
3. *Random-head dropout, a control*: random x ``Units(kinds=("heads",))`` x `Cubic` x constant. The same machinery with
   a fixed random ranking: what remains of the gain is not due to the ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from td_plugin.errors import TdError
from td_plugin.schedules import Constant

if TYPE_CHECKING:
    from torch import Tensor

    from td_plugin.units import Slice


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at. The weight is the dense one, never the masked view.

    Attributes:
        weight: ``[*w]`` dense weight, detached.
        name: fully qualified tensor name; keys the fixed random importance.
        seed: the sparsifier's seed.
    """

    weight: Tensor
    name: str = ""
    seed: int = 0


Criterion = Callable[[Evidence], "Tensor"]
"""``Evidence -> importance [*w]``, float32, higher = keep."""

Schedule = Callable[[float], float]
"""``time -> fraction in [0, 1]``; the unit of time is the caller's (steps, epochs or the share of the run done)."""


class Granularity(Protocol):
    """How importances are pooled and grouped, and how a choice of groups masks each tensor."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units this granularity drops whole; empty when it drops single weights."""
        ...

    @property
    def members(self) -> Literal["all", "producers"]:
        """Whether the weights that read a unit are evidence of its importance, besides those that compute it."""
        ...

    def to_groups(self, importances: Sequence[Tensor], slices: Sequence[Slice]) -> Tensor:
        """``[*w] each -> [pools, groups]``."""
        ...

    def to_mask(self, groups: Tensor, slice_: Slice, shape: Sequence[int]) -> Tensor:
        """``[pools, groups] -> `` a tensor that broadcasts to `shape`; False for entries of no group."""
        ...


def check_fraction(value: float, name: str, where: str = "") -> float:
    """Return `value` if it lies in [0, 1).

    Raises:
        TdError: it does not, or is no number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise TdError(f"{name} must be a fraction in [0, 1)", where=where, got=value, fix="for example 0.75")
    return float(value)


@dataclass(frozen=True)
class Recipe:
    """One method, as a frozen value.

    Attributes:
        criterion: importance of each weight.
        granularity: what is ranked and dropped together.
        drop_rate: α, the chance in [0, 1) that a candidate is dropped in a training forward.
        sparsity_schedule: multiplies `sparsity_level`; called with the share of the ramp that is done.
        drop_schedule: multiplies `drop_rate`; called likewise.
        sampler: ``"group"`` draws once per group, ``"weight"`` once per weight (the authors' code for units).
        name: what reports and provenance call it.

    Raises:
        TdError: `drop_rate` outside [0, 1) or an unknown `sampler`.
    """

    criterion: Criterion
    granularity: Granularity
    drop_rate: float = 0.5
    sparsity_schedule: Schedule = Constant()
    drop_schedule: Schedule = Constant()
    sampler: Literal["group", "weight"] = "group"
    name: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        check_fraction(self.drop_rate, "drop_rate (α)", where=f"recipe {self.name!r}")
        if self.sampler not in ("group", "weight"):
            raise TdError("unknown sampler", where=f"recipe {self.name!r}", got=self.sampler, fix="'group' or 'weight'")

    @property
    def ramps(self) -> bool:
        """Whether γ or α changes over the run, so that something must drive the schedules."""
        return not (isinstance(self.sparsity_schedule, Constant) and isinstance(self.drop_schedule, Constant))
