"""The vocabulary every other file uses: `Evidence`, the four axes and `Recipe`.

A method of the targeted-dropout family is a point on four axes, each a value or a pure function:

* **Criterion** ``Evidence -> importance``: how much each weight matters (same shape as the weight, higher = keep).
* **Granularity** ``importance -> [pools, groups]``: a *pool* is what is ranked together (one output row, one
  tensor, the units of one layer), a *group* is what lives or dies together (one weight, one unit, one head).
* **Schedule** ``time -> fraction``: how the target share γ (`sparsity_level`) and the drop probability α
  (`drop_rate`) grow over the run.
* **Sampler**: whether the draw is made once per group or, as in the authors' code for units, once per weight; or
  among all groups, whatever their importance, as in dropout and DropConnect.

Three further fields have defaults that leave all this alone: `regrowth` (whether the ranking remembers what it
dropped), `gradient` (whether what is dropped goes on learning) and `rates` (how γ is spread over the tensors).

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

    from td_plugin.gates.contract import Gate
    from td_plugin.penalties import Penalty
    from td_plugin.rates import Rates
    from td_plugin.units import Slice


Need = Literal["squared_gradient", "squared_product", "movement", "activation"]
"""The fields of `Evidence` that only training steps can give; `td_plugin.evidence` gathers them."""


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at. The weight is the dense one, never the masked view.

    Whole units are seen through their gates: a unit's output is multiplied by a gate of value 1, the gates of a group
    are the ``[units]`` weight, and the gradients are those with respect to them.

    Attributes:
        weight: ``[*w]`` dense weight, detached; ``[units]`` ones for gates.
        name: fully qualified tensor name; keys the fixed random importance.
        seed: the sparsifier's seed.
        squared_gradient: ``[*w]``, mean over examples of the square of the gradient of each example's loss.
        squared_product: ``[*w]``, mean over steps of ``(w·g)²``.
        movement: ``[*w]``, minus the sum over steps of ``w·g``.
        activation: broadcastable to ``[*w]``, mean over examples and positions of the magnitude of each input.
    """

    weight: Tensor
    name: str = ""
    seed: int = 0
    squared_gradient: Tensor | None = None
    squared_product: Tensor | None = None
    movement: Tensor | None = None
    activation: Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """A criterion that needs more than the weight: the sparsifier gathers it from the training steps.

    Attributes:
        score: ``Evidence -> importance``.
        need: the field of the evidence that `score` reads.
        decay: what the evidence so far is multiplied by in every step; 1 forgets nothing.

    Raises:
        TdError: `decay` outside [0, 1]; when called, the evidence is missing.
    """

    score: Callable[[Evidence], Tensor]
    need: Need
    decay: float = 1.0

    def __post_init__(self) -> None:
        check_fraction(self.decay, "decay", closed=True)

    def __call__(self, evidence: Evidence) -> Tensor:
        """``Evidence -> importance [*w]``."""
        return self.score(evidence)


Criterion = Callable[[Evidence], "Tensor"]
"""``Evidence -> importance [*w]``, float32, higher = keep; one that needs training steps is `Measured`."""

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

    @property
    def single(self) -> bool:
        """Whether a group is one weight, so that `to_groups` merely rearranges them."""
        ...

    @property
    def keeps(self) -> int | None:
        """How many groups of every pool stay when a ramp is done, where that is fixed; None where γ says it."""
        ...

    def to_groups(self, importances: Sequence[Tensor], slices: Sequence[Slice]) -> Tensor:
        """``[*w] each -> [pools, groups]``; a `TdError` names the tensor that cannot be divided so."""
        ...

    def to_mask(self, groups: Tensor, slice_: Slice, shape: Sequence[int]) -> Tensor:
        """``[pools, groups] -> `` a tensor that broadcasts to `shape`; False for entries of no group."""
        ...


def check_fraction(value: float, name: str, where: str = "", closed: bool = False) -> float:
    """Return `value` if it lies in [0, 1); in [0, 1] if `closed`.

    Raises:
        TdError: it does not, or is no number.
    """
    number = not isinstance(value, bool) and isinstance(value, (int, float)) and 0.0 <= value <= 1.0
    if not number or (value == 1.0 and not closed):
        span = "[0, 1]" if closed else "[0, 1)"
        raise TdError(f"{name} must be a fraction in {span}", where=where, got=value, fix="for example 0.75")
    return float(value)


@dataclass(frozen=True)
class Recipe:
    """One method, as a frozen value.

    Attributes:
        criterion: importance of each weight.
        granularity: what is ranked and dropped together.
        drop_rate: α, the chance in [0, 1] that a candidate is dropped in a training forward; 1 prunes, 0 leaves the
            training alone.
        sparsity_schedule: multiplies `sparsity_level`; called with the share of the ramp that is done.
        drop_schedule: multiplies `drop_rate`; called likewise.
        sampler: ``"group"`` draws once per group, ``"weight"`` once per weight (the authors' code for units).
            ``"uninformed"`` draws once per group among all of them, and what stays is divided by 1 - α: γ and the
            ranking then count in evaluation and in `squash_mask` only.
        regrowth: what the importance of a dropped group is multiplied by when the weights are ranked the next time. 1:
            it counts as any other; below, the ranking has a memory, saved with the sparsifier; 0: it never comes back.
        gradient: ``"kept"``: what is dropped gets none. ``"all"``: it gets that of the masked weight, so that it goes
            on learning.
        rates: how γ is spread over the tensors whenever they are ranked (`td_plugin.rates`); None: each has its own.
        gate: a learned mask (`td_plugin.gates`); it multiplies the criterion's importance by its own.
        penalty: on the ranked weights (`td_plugin.penalties`), taken after each step of the user's optimizer.
        name: what reports and provenance call it.

    Raises:
        TdError: `drop_rate` or `regrowth` outside [0, 1], `drop_rate` 1 where all is dropped with that chance, an
            unknown `sampler` or `gradient`.
    """

    criterion: Criterion
    granularity: Granularity
    drop_rate: float = 0.5
    sparsity_schedule: Schedule = Constant()
    drop_schedule: Schedule = Constant()
    sampler: Literal["group", "weight", "uninformed"] = "group"
    regrowth: float = 1.0
    gradient: Literal["kept", "all"] = "kept"
    rates: Rates | None = None
    gate: Gate | None = None
    penalty: Penalty | None = None
    name: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        where = f"recipe {self.name!r}"
        check_fraction(self.drop_rate, "drop_rate (α)", where, closed=not self.uninformed)
        check_fraction(self.regrowth, "regrowth", where, closed=True)
        if self.sampler not in ("group", "weight", "uninformed"):
            raise TdError("unknown sampler", where=where, got=self.sampler, fix="'group', 'weight' or 'uninformed'")
        if self.gradient not in ("kept", "all"):
            raise TdError("unknown gradient", where=where, got=self.gradient, fix="'kept' or 'all'")

    @property
    def uninformed(self) -> bool:
        """Whether training drops groups whatever their importance, and rescales the others."""
        return self.sampler == "uninformed"

    @property
    def ramps(self) -> bool:
        """Whether γ or α changes over the run, so that something must drive the schedules."""
        return not (isinstance(self.sparsity_schedule, Constant) and isinstance(self.drop_schedule, Constant))

    def level(self, asked: float | None) -> float:
        """γ, checked; where none is asked for, 0.5, or 0 if the training does not need one.

        Raises:
            TdError: `asked` outside [0, 1).
        """
        default = 0.0 if self.uninformed else 0.5
        return check_fraction(default if asked is None else asked, "sparsity_level (γ)")
