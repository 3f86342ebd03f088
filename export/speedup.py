"""Ratios of paired timings: their median, an interval for it, and what may be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from td_plugin.errors import TdError

_RESAMPLES = 2000
# Two sessions of one and the same file differ by up to 2 % as long as they are open (where their memory lies), which no
# number of rounds averages out and the bootstrap cannot see.
_INDISTINGUISHABLE = 1.03

Verdict = Literal["faster", "slower", "no difference"]


@dataclass(frozen=True)
class Speedup:
    """How many times faster one file is than another, from rounds in which both ran.

    Attributes:
        median: of the ratios ``seconds(over) / seconds(name)``, one per round; above 1 is faster.
        low: lower end of the 95 % bootstrap interval of that median.
        high: its upper end.
    """

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """``"no difference"`` unless the whole interval lies more than 3 % off 1, what two sessions can differ by."""
        if self.low > _INDISTINGUISHABLE:
            return "faster"
        return "slower" if self.high < 1 / _INDISTINGUISHABLE else "no difference"

    @property
    def width(self) -> float:
        """Of the interval, as a share of the median."""
        return (self.high - self.low) / self.median

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"median": self.median, "low": self.low, "high": self.high, "verdict": self.verdict}

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}] {self.verdict}"


def paired_speedup(baseline: Sequence[float], candidate: Sequence[float], *, seed: int = 0) -> Speedup:
    """The median of the paired ratios ``baseline / candidate`` with its 95 % percentile-bootstrap interval.

    On a machine with other load this repeats within 3 % at 50 rounds; ratios of means or of separate medians do not.

    Args:
        baseline: seconds, one per round.
        candidate: seconds in the same rounds.
        seed: of the resampling.

    Raises:
        TdError: the two do not have the same number of rounds, or none.
    """
    if len(baseline) != len(candidate) or not baseline:
        raise TdError("paired timings need the same rounds", got=f"{len(baseline)} and {len(candidate)}")
    ratios = torch.tensor(baseline, dtype=torch.float64) / torch.tensor(candidate, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rounds = len(ratios)
    medians = torch.cat(
        [  # in ten portions: quantile takes no more than 16 million values at once
            ratios[torch.randint(rounds, (_RESAMPLES // 10, rounds), generator=generator)].quantile(0.5, dim=1)
            for _ in range(10)
        ]
    )
    return Speedup(ratios.quantile(0.5).item(), medians.quantile(0.025).item(), medians.quantile(0.975).item())


@dataclass(frozen=True)
class Efficiency:
    """How much of the work that was saved shows as time.

    Attributes:
        speedup: measured.
        flop_ratio: FLOPs of the one over FLOPs of the other.
    """

    speedup: Speedup
    flop_ratio: float

    @property
    def median(self) -> float:
        """Speed-up over FLOP ratio; 1 where time falls as the work does. Other number formats go beyond it."""
        return self.speedup.median / self.flop_ratio

    @property
    def low(self) -> float:
        """From the lower end of the speed-up's interval."""
        return self.speedup.low / self.flop_ratio

    @property
    def high(self) -> float:
        """From its upper end."""
        return self.speedup.high / self.flop_ratio

    def to_dict(self) -> dict[str, float]:
        """JSON-able."""
        return {"flop_ratio": self.flop_ratio, "median": self.median, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}] of {self.flop_ratio:.2f}x fewer FLOPs"
