"""What was measured, as values: timings, paired speed-ups, the machine; and the files that show it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from td_plugin.errors import TdError
from td_plugin.export.cold_start import ColdStart
from td_plugin.export.engines import CPU
from td_plugin.export.graph_widths import Widths
from td_plugin.export.speedup import Efficiency
from td_plugin.export.speedup import Speedup as Speedup
from td_plugin.export.speedup import paired_speedup as paired_speedup

if TYPE_CHECKING:
    from td_plugin.export.operators import OperatorReport
    from td_plugin.export.throughput import ThroughputReport

PERCENTILES = (50, 90, 95, 99)
ENOUGH_FOR_P99 = 200  # rounds; with fewer, p99 is one or two of the slowest runs


@dataclass(frozen=True)
class FileLatency:
    """One ONNX file.

    Attributes:
        name: what the caller calls it.
        bytes: size of the file and of the weights it keeps outside.
        cold: what its first use costs.
        seconds: one timing per round.
        provider: what ran it.
        flops: of one run, mean over the examples; None where they could not be counted.
    """

    name: str
    bytes: int
    cold: ColdStart
    seconds: tuple[float, ...]
    provider: str = CPU
    flops: float | None = None

    def percentile(self, percent: float) -> float:
        """Seconds that `percent` % of the rounds did not exceed (linear interpolation)."""
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(percent / 100).item()

    def percentiles(self) -> dict[int, float | None]:
        """`PERCENTILES` -> seconds; p99 is None with fewer rounds than `ENOUGH_FOR_P99`."""
        few = len(self.seconds) < ENOUGH_FOR_P99
        return {percent: None if percent == 99 and few else self.percentile(percent) for percent in PERCENTILES}


@dataclass(frozen=True)
class Conditions:
    """What a latency depends on besides the file.

    Attributes:
        threads: threads inside one operator.
        batch: items per run.
        sequence: tokens per item; None for other inputs than text, and for several lengths.
        rounds: timings per file.
        seed: of the order, of the draws and of the bootstrap.
        machine: processor, instruction sets, cores, load, versions.
        lengths: tokens per item of every example, where there are several.
        sessions: how often each file was opened.
    """

    threads: int
    batch: int
    sequence: int | None
    rounds: int
    seed: int
    machine: dict[str, str]
    lengths: tuple[int, ...] = ()
    sessions: int = 1


@dataclass(frozen=True)
class LatencyReport:
    """Files that were timed in turn; `str()` is a table.

    Attributes:
        files: in the order in which they were given; the first is what the table compares with.
        conditions: under which all of them were timed.
        notes: signs of a noisy machine, one line each.
        load: what they do under concurrent requests, if that was measured.
        operators: where their time goes, if that was recorded.
        accuracy: name -> what the caller measured, in [0, 1].
        widths: name -> layers whose width changed, before and after.
    """

    files: tuple[FileLatency, ...]
    conditions: Conditions
    notes: tuple[str, ...] = ()
    load: ThroughputReport | None = None
    operators: OperatorReport | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)
    widths: Mapping[str, Widths] = field(default_factory=dict)

    def speedup(self, name: str, over: str) -> Speedup:
        """How many times faster `name` is than `over`, round by round.

        Raises:
            TdError: one of them was not timed.
        """
        return paired_speedup(self.file(over).seconds, self.file(name).seconds, seed=self.conditions.seed)

    def efficiency(self, name: str, over: str) -> Efficiency:
        """How much of the FLOPs that `name` saves over `over` shows as time.

        Raises:
            TdError: one of them was not timed, or its FLOPs are not known.
        """
        flops = {}
        for asked in (name, over):
            counted = self.file(asked).flops
            if not counted:
                raise TdError("its FLOPs are not known", where=asked, got=counted, fix="compare with the fp32 form")
            flops[asked] = counted
        return Efficiency(self.speedup(name, over), flops[over] / flops[name])

    def throughput(self, name: str) -> float:
        """Items per second at the median latency, one run after the other.

        Raises:
            TdError: it was not timed.
        """
        return self.conditions.batch / self.file(name).percentile(50)

    def file(self, name: str) -> FileLatency:
        """The one of this name.

        Raises:
            TdError: it was not timed.
        """
        for file in self.files:
            if file.name == name:
                return file
        raise TdError("no such file in this report", got=name, fix=f"one of {[file.name for file in self.files]}")

    def with_results(
        self,
        *,
        load: ThroughputReport | None = None,
        operators: OperatorReport | None = None,
        accuracy: Mapping[str, float] | None = None,
        widths: Mapping[str, Widths] | None = None,
    ) -> LatencyReport:
        """This report with more in it: every output shows what is there.

        Raises:
            TdError: something is about a file that was not timed.
        """
        named = [*(accuracy or {}), *(widths or {})]
        named += [row.name for row in load.rows] if load else []
        named += [form.name for form in operators.forms] if operators else []
        for name in named:
            self.file(name)
        return replace(
            self,
            load=load or self.load,
            operators=operators or self.operators,
            accuracy=self.accuracy if accuracy is None else accuracy,
            widths=self.widths if widths is None else widths,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-able values; times in seconds, sizes in bytes."""
        from td_plugin.export.report_files import values

        return values(self)

    def known_efficiency(self, name: str) -> Efficiency | None:
        """`efficiency` over the first file; None for that itself, and where FLOPs are not known."""
        first = self.files[0]
        known = name != first.name and first.flops and self.file(name).flops
        return self.efficiency(name, first.name) if known else None

    def to_json(self, target: str | os.PathLike[str]) -> Path:
        """Write `to_dict` as a JSON file.

        Raises:
            TdError: the file cannot be written.
        """
        from td_plugin.export.report_files import write_json

        return write_json(self, target)

    def to_csv(self, target: str | os.PathLike[str]) -> Path:
        """Write one line per file, as `report_files.COLUMNS` says.

        Raises:
            TdError: the file cannot be written.
        """
        from td_plugin.export.report_files import write_csv

        return write_csv(self, target)

    def to_png(self, target: str | os.PathLike[str]) -> Path:
        """Draw the distributions of the latencies.

        Raises:
            TdError: matplotlib is not installed, or the file cannot be written.
        """
        from td_plugin.export.report_files import write_png

        return write_png(self, target)

    def to_html(self, target: str | os.PathLike[str], *, title: str = "Latency") -> Path:
        """Write a page that needs nothing but a browser: no script, no network.

        Raises:
            TdError: the file cannot be written.
        """
        from td_plugin.export.html_report import write_html

        return write_html(self, target, title)

    def __str__(self) -> str:
        from td_plugin.export.latency_table import text

        return text(self)
