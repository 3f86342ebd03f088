"""Schedules: frozen values ``time -> fraction``, with no counter inside.

`begin` and `end` carry the unit of time. A recipe's schedules are called with the share of the ramp that is done, so
their defaults span 0 to 1; the same classes drive `torch.ao.pruning.LambdaSL` in steps, as ``Cubic(0, 10_000)``.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from td_plugin.errors import TdError


def _share(time: float, begin: float, end: float) -> float:
    """The share in [0, 1] of the span from `begin` to `end` that has passed at `time`."""
    return min(max((time - begin) / (end - begin), 0.0), 1.0)


def _check_span(begin: float, end: float) -> None:
    if not begin < end:
        raise TdError("a schedule ends before it begins", got=f"begin={begin}, end={end}", fix="give begin < end")


@dataclass(frozen=True)
class Constant:
    """``time -> value``."""

    value: float = 1.0

    def __call__(self, time: float) -> float:
        """Return `value` at any time."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """0 until `begin`, then a straight line to 1 at `end`.

    Raises:
        TdError: `begin` is not before `end`.
    """

    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check_span(self.begin, self.end)

    def __call__(self, time: float) -> float:
        """Return the fraction at `time`."""
        return _share(time, self.begin, self.end)


@dataclass(frozen=True)
class Cubic:
    """``1 - (1 - s)^3`` with s the share of the span done: fast at first, slow at the end.

    Zhu and Gupta, arXiv 1710.01878, equation 1.

    Raises:
        TdError: `begin` is not before `end`.
    """

    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check_span(self.begin, self.end)

    def __call__(self, time: float) -> float:
        """Return the fraction at `time`."""
        return 1.0 - (1.0 - _share(time, self.begin, self.end)) ** 3


@dataclass(frozen=True)
class After:
    """0 before `begin`, 1 from then on.

    "Delayed" pruning in the authors' code of targeted dropout: nothing until a step, then all of it.
    """

    begin: float = 0.5

    def __call__(self, time: float) -> float:
        """Return 0 or 1."""
        return float(time >= self.begin)


@dataclass(frozen=True)
class Stairs:
    """`steps` equal steps up to 1: 0 before `begin`, the last one at `end`, the others evenly between.

    Prune, retrain, prune again: Han et al. 2015, arXiv 1506.02626, section 3.

    Raises:
        TdError: `begin` is not before `end`, or `steps` is below 1.
    """

    begin: float = 0.0
    end: float = 1.0
    steps: int = 5

    def __post_init__(self) -> None:
        _check_span(self.begin, self.end)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise TdError("a staircase has at least one step", got=repr(self.steps), fix="for example 5")

    def __call__(self, time: float) -> float:
        """Return the fraction at `time`."""
        if time < self.begin:
            return 0.0
        done = 1.0 if self.steps == 1 else _share(time, self.begin, self.end)
        # The slack keeps the last step at `end`, where the sums of floats fall short.
        return min(int(done * (self.steps - 1) + 1e-9) + 1, self.steps) / self.steps


@dataclass(frozen=True)
class Piecewise:
    """Straight lines between ``(time, fraction)`` points; the first and last fraction hold outside them.

    Raises:
        TdError: no points, or their times do not increase.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        times = [time for time, _ in self.points]
        if not times or any(a >= b for a, b in pairwise(times)):
            raise TdError("the times of a piecewise schedule must increase", got=times, fix="sort the points by time")

    def __call__(self, time: float) -> float:
        """Return the fraction at `time`."""
        right = bisect_right([t for t, _ in self.points], time)
        if right == 0:
            return self.points[0][1]
        if right == len(self.points):
            return self.points[-1][1]
        (t0, f0), (t1, f1) = self.points[right - 1], self.points[right]
        return f0 + (f1 - f0) * _share(time, t0, t1)


def paper_ramp(begin: float = 0.0, end: float = 1.0) -> Piecewise:
    """The ramp of γ in ramping targeted dropout: to 95 % over the first half, to 100 % over the second.

    Gomez et al., arXiv 1905.13678, section 5.3: ``0.95·min(1, t/T) + 0.05·clip((t - T)/T, 0, 1)`` with T half the span.
    """
    _check_span(begin, end)
    return Piecewise(((begin, 0.0), ((begin + end) / 2, 0.95), (end, 1.0)))
