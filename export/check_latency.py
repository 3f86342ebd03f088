"""Latency against its bars: sessions of timing, what they measure, and which end of the interval counts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from td_plugin.errors import TdError
from td_plugin.export.benchmark import benchmark
from td_plugin.export.check_bars import Bars
from td_plugin.export.check_report import BarResult
from td_plugin.export.latency import LatencyReport, paired_speedup
from td_plugin.export.probes import Batch

MODEL, AGAINST = "model", "against"
"""Names of the two files in the latency reports of a check."""

_PERCENTILES = {"max_p50_ms": 50, "max_p95_ms": 95, "max_p99_ms": 99}
_RATIOS = ("min_speedup", "min_efficiency")
LATENCY_BARS = (*_RATIOS, *_PERCENTILES)
_ROUNDS, _ROUNDS_FOR_P99 = 200, 500
_TAIL = 0.025  # on either side of a 95 % interval


@dataclass(frozen=True)
class Timing:
    """How a check measures latency.

    Attributes:
        inputs: what the files are fed; None: made up from their graphs, `batch` rows of `sequence` tokens.
        batch: rows per call, where the graph leaves it open.
        sequence: tokens per row, where the graph leaves it open.
        threads: threads inside one operator.
        rounds: timings per file and session; None: 200, for a p99 500.
        sessions: while a bar is missed the files are opened and timed anew, so often at most. A miss is confirmed by
            that many sessions before it stands.
        seed: of the order of the runs and of the bootstrap.
        progress: show bars on the terminal, of the data too.
        reports: measured before, by ``benchmark({"model": ..., "against": ...}, ...)``; nothing is timed then.
    """

    inputs: Batch | None = None
    batch: int = 1
    sequence: int = 128
    threads: int = 1
    rounds: int | None = None
    sessions: int = 3
    seed: int = 0
    progress: bool = False
    reports: tuple[LatencyReport, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "sequence", "threads", "sessions", *(() if self.rounds is None else ("rounds",))):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TdError("a count is a whole number of at least 1", where=name, got=repr(value))
        for report in self.reports:
            if MODEL not in [file.name for file in report.files]:
                raise TdError(f"the report times no file {MODEL!r}", got=[file.name for file in report.files])


def measure(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None,
    bars: Bars,
    timing: Timing,
) -> tuple[LatencyReport, ...]:
    """Time the files until every latency bar holds, or `Timing.sessions` times.

    Raises:
        TdError: a file is missing or damaged, or the inputs do not fit its graph.
    """
    if timing.reports or not bars.uses(*LATENCY_BARS):
        return timing.reports
    files = {MODEL: path}
    if against is not None and bars.uses(*_RATIOS):
        files[AGAINST] = against
    inputs = timing.inputs or _made_up(files, timing)
    rounds = timing.rounds or (_ROUNDS_FOR_P99 if bars.uses("max_p99_ms") else _ROUNDS)
    reports: list[LatencyReport] = []
    while len(reports) < timing.sessions:
        seed = timing.seed + len(reports)
        reports.append(
            benchmark(files, inputs, threads=timing.threads, rounds=rounds, seed=seed, progress=timing.progress)
        )
        if all(result.passed or not result.judged for result in latency_results(bars, reports)):
            break
    return tuple(reports)


def _made_up(files: Mapping[str, str | os.PathLike[str]], timing: Timing) -> dict[str, Any]:
    """What either of the files takes."""
    from td_plugin.export.example_inputs import inputs_for_graph  # loads transformers

    found: dict[str, Any] = {}
    for file in reversed(list(files.values())):
        found.update(inputs_for_graph(file, timing.batch, timing.sequence))
    return found


def latency_results(bars: Bars, reports: Sequence[LatencyReport]) -> list[BarResult]:
    """The latency bars that are set, held against what was measured."""
    given = bars.given
    results = [_ratio(name, given[name], reports) for name in _RATIOS if name in given]
    return results + [_percentile(name, given[name], reports) for name in _PERCENTILES if name in given]


def _ratio(name: str, limit: float, reports: Sequence[LatencyReport]) -> BarResult:
    """Of the rounds of all sessions together; the lower end counts."""
    theirs, ours = (
        [seconds for report in reports for file in report.files if file.name == which for seconds in file.seconds]
        for which in (AGAINST, MODEL)
    )
    if not theirs:
        return BarResult(name, limit, note="not judged: needs a file to compare with, --against")
    found = paired_speedup(theirs, ours, seed=reports[0].conditions.seed)
    saved = 1.0
    if name == "min_efficiency":
        dense, pruned = (reports[0].file(which).flops for which in (AGAINST, MODEL))
        if not dense or not pruned:
            return BarResult(name, limit, note="not judged: the FLOPs could not be counted")
        saved = dense / pruned
    median, low, high = (value / saved for value in (found.median, found.low, found.high))
    note = _close(low, high) if low < limit <= high else f"{len(ours)} rounds"
    if saved != 1.0:
        note += f"; {saved:.3g} times fewer FLOPs"
    return BarResult(name, limit, median, low, low, high, note)


def _close(low: float, high: float) -> str:
    return f"too close to call: the bar lies within [{low:.4g}, {high:.4g}]"


def _percentile(name: str, limit: float, reports: Sequence[LatencyReport]) -> BarResult:
    """Of the calmest session, since load from outside only ever adds time; the upper end counts."""
    percent = _PERCENTILES[name]
    found = []
    for report in reports:
        file = next(file for file in report.files if file.name == MODEL)
        interval = quantile_interval(file.seconds, percent / 100)
        if interval is not None:
            found.append((interval[1] * 1e3, interval[0] * 1e3, file.percentile(percent) * 1e3))
    if not found:
        needed = math.ceil(math.log(_TAIL) / math.log(percent / 100))
        return BarResult(name, limit, note=f"not judged: an interval of p{percent} needs {needed} rounds or more")
    high, low, value = min(found)
    return BarResult(name, limit, value, high, low, high, _close(low, high) if low <= limit < high else "")


def quantile_interval(values: Sequence[float], share: float) -> tuple[float, float] | None:
    """A 95 % interval of a quantile, from order statistics: no assumption about the distribution.

    The number of values below the quantile is binomial; the ends are the values at the ranks where its tails hold
    2.5 % each. Bursts of load make neighbouring timings alike, which no such interval knows of.

    Args:
        values: independent draws.
        share: of the values that lie below the quantile, in (0, 1).

    Returns:
        The ends, or None if there are too few values for an upper one.
    """
    count = len(values)
    ranks = list(range(count + 1))
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(share) + (count - k) * math.log1p(-share)
        for k in ranks
    ]  # fmt: skip
    below = 0.0
    low = high = None
    for k in ranks:
        below += math.exp(logs[k])
        if below <= _TAIL:
            low = k + 1
        if high is None and below >= 1 - _TAIL and k + 1 <= count:
            high = k + 1
    if high is None:
        return None
    ordered = sorted(values)
    return ordered[max(0, (low or 1) - 1)], ordered[high - 1]
