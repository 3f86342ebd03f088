"""Does a comparison come out the same when it is made again?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from td_plugin.errors import TdError
from td_plugin.export.latency import LatencyReport
from td_plugin.report import table

AGREEMENT = 0.03
"""How far the speed-ups of two runs may lie apart, as a share, to be called the same."""


@dataclass(frozen=True)
class Repeats:
    """The same files, timed several times; `str()` is a table of the speed-ups over the first file.

    Attributes:
        reports: one per run.
    """

    reports: tuple[LatencyReport, ...]

    @property
    def speedups(self) -> dict[str, tuple[float, ...]]:
        """Name -> speed-up over the first file, one per run."""
        first, *others = (file.name for file in self.reports[0].files)
        return {name: tuple(report.speedup(name, first).median for report in self.reports) for name in others}

    @property
    def disagreement(self) -> dict[str, float]:
        """Name -> how far its speed-ups lie apart: the largest over the smallest, less 1."""
        return {name: max(ratios) / min(ratios) - 1 for name, ratios in self.speedups.items()}

    @property
    def agree(self) -> bool:
        """Whether no two runs differ by more than `AGREEMENT`."""
        return max(self.disagreement.values(), default=0.0) <= AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "speedups": {name: list(ratios) for name, ratios in self.speedups.items()},
            "disagreement": self.disagreement,
            "agree": self.agree,
            "reports": [report.to_dict() for report in self.reports],
        }

    def __str__(self) -> str:
        first = self.reports[0].files[0].name
        apart = self.disagreement
        runs = range(len(self.reports))
        header = [f"over {first}", *(f"run {run + 1}" for run in runs), "apart"]
        rows = [
            [name, *(str(report.speedup(name, first)) for report in self.reports), f"{apart[name]:.1%}"]
            for name in self.speedups
        ]
        answer = "yes" if self.agree else "no"
        notes = [f"run {run + 1}: {note}" for run in runs for note in self.reports[run].notes]
        return "\n".join([table(header, rows), f"within {AGREEMENT:.0%}: {answer}", *notes])


def repeat(measure: Callable[[int], LatencyReport], times: int = 2) -> Repeats:
    """Make one comparison several times: ``repeat(lambda seed: benchmark(files, inputs, seed=seed))``.

    Args:
        measure: times the files, given a seed; each run has another one, and opens the files anew.
        times: runs.

    Raises:
        TdError: fewer than two runs are asked for.
    """
    if times < 2:
        raise TdError("one run cannot agree with another", got=times, fix="times=2 at least")
    return Repeats(tuple(measure(seed) for seed in range(times)))
