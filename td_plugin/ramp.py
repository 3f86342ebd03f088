"""When a run ramps: where γ and α start to rise, where they reach their targets, and from where the mask is frozen."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

from td_plugin.errors import TdError

Unit = Literal["share", "steps", "epochs"]
"""Of the times of a `Ramp`: shares of the run, optimizer steps or epochs."""


@dataclass(frozen=True)
class Moment:
    """What holds in one step.

    Attributes:
        progress: the share of the ramp that is done, in [0, 1]; None before it starts: nothing is dropped.
        frozen: whether the mask is held from here on.
    """

    progress: float | None
    frozen: bool = False


@dataclass(frozen=True)
class Ramp:
    """From step to progress; a value without a counter, for every loop.

    Before `start` (a warm-up) nothing is dropped, whatever the recipe. From `start` to `end` the recipe's schedules go
    from 0 to 1, after that γ and α stay at their targets. From `freeze` on the mask is held (`TargetedDropout.hold`).

    Attributes:
        start: when the ramp starts.
        end: when γ and α reach their targets; None: at `freeze`, or at the end of the run.
        freeze: from when the mask is held; None: never.
        unit: of the three: ``"share"`` of the run, ``"steps"`` of the optimizer, or ``"epochs"``.

    Raises:
        TdError: an unknown unit, a time below 0 or (shares) above 1, not ``start < end <= freeze``.

    Example:
        >>> ramp = Ramp(start=0.1, end=0.6, freeze=0.8)
        >>> [ramp.at(step, total=100).progress for step in (0, 10, 35, 60, 99)]
        [None, 0.0, 0.5, 1.0, 1.0]
        >>> ramp.at(80, total=100).frozen
        True
    """

    start: float = 0.0
    end: float | None = None
    freeze: float | None = None
    unit: Unit = "share"

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise TdError("unknown unit of a ramp", got=repr(self.unit), fix="'share', 'steps' or 'epochs'")
        most = 1.0 if self.unit == "share" else math.inf
        for name in ("start", "end", "freeze"):
            time = getattr(self, name)
            number = isinstance(time, (int, float)) and not isinstance(time, bool) and math.isfinite(time)
            if not (number and 0 <= time <= most) and (time is not None or name == "start"):
                span = "in [0, 1]" if self.unit == "share" else "of at least 0"
                raise TdError(
                    f"the {name} of a ramp in {self.unit} is a number {span}",
                    got=repr(time),
                    fix="unit='steps' or 'epochs' for times that are no shares",
                )
        last = math.inf if self.freeze is None else self.freeze
        if not self.start < min(most if self.end is None else self.end, last):
            raise TdError("a ramp ends after it starts", got=self, fix="give start < end, and start < freeze")
        if self.end is not None and self.end > last:
            raise TdError("the mask is frozen before the ramp ends", got=self, fix="give end <= freeze")

    def at(self, step: int, total: int | None = None, per_epoch: int | None = None) -> Moment:
        """What holds in optimizer step `step`, from 0.

        Args:
            step: done so far, in all epochs; after a resume as well.
            total: optimizer steps of the whole run.
            per_epoch: optimizer steps of an epoch.

        Raises:
            TdError: as `in_steps` says.
        """
        start, end, freeze = self.in_steps(total, per_epoch)
        frozen = freeze is not None and step >= freeze
        if step < start:
            return Moment(None, frozen)
        return Moment(1.0 if step >= end else (step - start) / (end - start), frozen)

    def in_steps(self, total: int | None = None, per_epoch: int | None = None) -> tuple[int, int, int | None]:
        """`start`, `end` and `freeze` as numbers of optimizer steps, rounded up.

        Raises:
            TdError: `total` or `per_epoch` is not known, and the times need it.
        """
        steps = self._length(total, per_epoch)
        start = math.ceil(self.start * steps - 1e-9)
        freeze = None if self.freeze is None else math.ceil(self.freeze * steps - 1e-9)
        if self.end is not None:
            return start, math.ceil(self.end * steps - 1e-9), freeze
        if freeze is None and total is None:
            raise TdError("the ramp ends with the run, whose length is not known", got=self, fix="give its end")
        return start, (freeze if freeze is not None else total) or 0, freeze

    def _length(self, total: int | None, per_epoch: int | None) -> int:
        """Optimizer steps of one unit."""
        known = {"share": total, "steps": 1, "epochs": per_epoch}[self.unit]
        if known is None:
            missing = "the length of the run" if self.unit == "share" else "the length of an epoch"
            raise TdError(f"{missing} is not known", got=self, fix="give the ramp in steps: unit='steps'")
        return known

    def warn_if_longer(self, total: int, per_epoch: int | None = None) -> None:
        """Say that a run of `total` optimizer steps does not reach what the ramp is for."""
        _, end, freeze = self.in_steps(total, per_epoch)
        if end > total:
            warnings.warn(
                f"the ramp takes {end} steps, the run {total}: training never reaches the target γ, at which the model "
                "is evaluated and pruned; give an earlier end, or a share of the run",
                stacklevel=3,
            )
        elif freeze is not None and freeze >= total and total > 0:
            warnings.warn(f"the mask freezes at step {freeze}, the run ends at {total}: it never does", stacklevel=3)


def ramp_of(length: float | None, ramp: Ramp | None) -> Ramp:
    """The ramp that the two arguments of a callback say.

    Raises:
        TdError: both are given, or `length` is neither a number of steps nor a share in (0, 1].
    """
    if ramp is not None and length is not None:
        raise TdError("both recipe_steps and ramp are given", got=(length, ramp), fix="leave recipe_steps out")
    if length is None:
        return ramp or Ramp()
    if isinstance(length, bool) or length <= 0 or (isinstance(length, float) and length > 1):
        raise TdError(
            "recipe_steps must be a number of steps (int) or a share of the run in (0, 1]",
            got=length,
            fix="None ramps over the whole run",
        )
    return Ramp(end=length, unit="share" if isinstance(length, float) else "steps")
