"""What was measured, as values: timings, paired speed-ups, the machine; and the table that prints them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from td_plugin.errors import TdError
from td_plugin.export.cold_start import ColdStart
from td_plugin.report import table

_RESAMPLES = 2000
# Two sessions of one and the same file differ by up to 2 % as long as they are open (where their memory lies), which no
# number of rounds averages out and the bootstrap cannot see.
_INDISTINGUISHABLE = 1.03
_ENOUGH_FOR_P99 = 200  # rounds; with fewer, p99 is one or two of the slowest runs


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
    def verdict(self) -> Literal["faster", "slower", "no difference"]:
        """``"no difference"`` unless the whole interval lies more than 3 % off 1, what two sessions can differ by."""
        if self.low > _INDISTINGUISHABLE:
            return "faster"
        return "slower" if self.high < 1 / _INDISTINGUISHABLE else "no difference"

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
class FileLatency:
    """One ONNX file.

    Attributes:
        name: what the caller calls it.
        bytes: size of the file and of the weights it keeps outside.
        cold: what its first use costs.
        seconds: one timing per round.
    """

    name: str
    bytes: int
    cold: ColdStart
    seconds: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Seconds that `percent` % of the rounds did not exceed (linear interpolation)."""
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(percent / 100).item()


@dataclass(frozen=True)
class Conditions:
    """What a latency depends on besides the file.

    Attributes:
        threads: threads inside one operator.
        batch: items per run.
        sequence: tokens per item; None for other inputs than text.
        rounds: timings per file.
        seed: of the order and of the bootstrap.
        machine: processor, instruction sets, cores, load, versions.
    """

    threads: int
    batch: int
    sequence: int | None
    rounds: int
    seed: int
    machine: dict[str, str]


@dataclass(frozen=True)
class LatencyReport:
    """Files that were timed in turn; `str()` is a table.

    Attributes:
        files: in the order in which they were given; the first is what the table compares with.
        conditions: under which all of them were timed.
    """

    files: tuple[FileLatency, ...]
    conditions: Conditions

    def speedup(self, name: str, over: str) -> Speedup:
        """How many times faster `name` is than `over`, round by round.

        Raises:
            TdError: one of them was not timed.
        """
        return paired_speedup(self._file(over).seconds, self._file(name).seconds, seed=self.conditions.seed)

    def throughput(self, name: str) -> float:
        """Items per second at the median latency.

        Raises:
            TdError: it was not timed.
        """
        return self.conditions.batch / self._file(name).percentile(50)

    def _file(self, name: str) -> FileLatency:
        for file in self.files:
            if file.name == name:
                return file
        raise TdError("no such file in this report", got=name, fix=f"one of {[file.name for file in self.files]}")

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-able values; times in seconds, sizes in bytes."""
        files = [
            {
                **asdict(file),
                **{f"p{percent}_seconds": file.percentile(percent) for percent in (50, 90, 99)},
                "p99_reliable": self.conditions.rounds >= _ENOUGH_FOR_P99,
                "items_per_second": self.throughput(file.name),
            }
            for file in self.files
        ]
        first = self.files[0].name
        speedups = [
            {"name": file.name, "over": first, **asdict(s), "verdict": s.verdict}
            for file in self.files[1:]
            for s in [self.speedup(file.name, over=first)]
        ]
        return {"files": files, "speedups": speedups, "conditions": asdict(self.conditions)}

    def __str__(self) -> str:
        mark = "" if self.conditions.rounds >= _ENOUGH_FOR_P99 else "~"
        first = self.files[0].name
        rows = [
            [
                file.name,
                f"{file.percentile(50) * 1e3:.2f}",
                f"{file.percentile(90) * 1e3:.2f}",
                f"{mark}{file.percentile(99) * 1e3:.2f}",
                f"{self.throughput(file.name):.1f}",
                f"{file.bytes / 1e6:.2f}",
                "-" if file.cold.peak_memory is None else f"{file.cold.peak_memory / 1e6:.1f}",
                f"{file.cold.load_seconds * 1e3:.0f}",
                f"{file.cold.first_seconds * 1e3:.1f}",
            ]
            for file in self.files
        ]
        header = ["file", "p50 ms", "p90 ms", "p99 ms", "items/s", "size MB", "memory MB", "load ms", "first ms"]
        speedups = [f"{file.name} over {first}: {self.speedup(file.name, over=first)}" for file in self.files[1:]]
        unsure = [f"~ fewer than {_ENOUGH_FOR_P99} rounds: p99 is one or two of the slowest runs"] if mark else []
        return "\n".join([table(header, rows), *speedups, *unsure, self._conditions()])

    def _conditions(self) -> str:
        c = self.conditions
        shape = f"batch {c.batch}" + ("" if c.sequence is None else f", sequence {c.sequence}")
        machine = "; ".join(f"{key} {value}" for key, value in c.machine.items() if value)
        return f"{shape}, threads {c.threads}, {c.rounds} rounds in random order; {machine}"
