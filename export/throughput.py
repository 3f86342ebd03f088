"""Requests per second when several come at a time, of several ONNX files in turn."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from td_plugin.errors import TdError
from td_plugin.export.engines import Execute
from td_plugin.export.progress import bar
from td_plugin.export.runners import Form, Inputs, as_examples, as_forms, make_runner
from td_plugin.export.speedup import Speedup, paired_speedup
from td_plugin.export.timing import interleaved
from td_plugin.report import table


@dataclass(frozen=True)
class Load:
    """How the requests come.

    Attributes:
        workers: threads that share one session, each of which sends its next request when its last is answered.
        threads: threads inside one operator.
        slices: measurements per file.
        slice_seconds: length of each. Files take turns, so that other load hits all alike.
        seed: of the order of the files and of the bootstrap.
    """

    workers: int = 2
    threads: int = 1
    slices: int = 20
    slice_seconds: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.workers, self.threads, self.slices) < 1 or not self.slice_seconds > 0:
            raise TdError("no load to measure under", got=self, fix="every number of a Load is above 0")


@dataclass(frozen=True)
class ThroughputRow:
    """One file under load.

    Attributes:
        name: what the caller calls it.
        rates: requests per second, one per slice.
        seconds: latency of every request, from when it was sent to when it was answered.
    """

    name: str
    rates: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Median requests per second."""
        return torch.tensor(self.rates, dtype=torch.float64).quantile(0.5).item()

    def percentile(self, percent: float) -> float:
        """Seconds that `percent` % of the requests did not exceed (linear interpolation)."""
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(percent / 100).item()


@dataclass(frozen=True)
class ThroughputReport:
    """Files under the same load; `str()` is a table.

    Attributes:
        rows: in the order in which they were given.
        load: that they were under.
        batch: items per request.
    """

    rows: tuple[ThroughputRow, ...]
    load: Load
    batch: int

    def gain(self, name: str, over: str) -> Speedup:
        """How many times more requests per second `name` answers than `over`, slice by slice.

        Raises:
            TdError: one of them was not measured.
        """
        one, other = ([1 / rate for rate in self.row(asked).rates] for asked in (over, name))
        return paired_speedup(one, other, seed=self.load.seed)

    def row(self, name: str) -> ThroughputRow:
        """The one of this name.

        Raises:
            TdError: it was not measured.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise TdError("no such file in this report", got=name, fix=f"one of {[row.name for row in self.rows]}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; single requests are left out."""
        first = self.rows[0].name
        rows = [
            {
                "name": row.name,
                "requests_per_second": row.rate,
                "items_per_second": self.batch * row.rate,
                **{f"p{percent}_seconds": row.percentile(percent) for percent in (50, 90)},
                "rates": list(row.rates),
                "gain": None if row.name == first else self.gain(row.name, first).to_dict(),
            }
            for row in self.rows
        ]
        return {"files": rows, "load": asdict(self.load), "batch": self.batch}

    def __str__(self) -> str:
        first = self.rows[0].name
        rows = [
            [row.name, f"{row.rate:.1f}", f"{self.batch * row.rate:.1f}"]
            + [f"{row.percentile(percent) * 1e3:.2f}" for percent in (50, 90)]
            + ["" if row.name == first else str(self.gain(row.name, first))]
            for row in self.rows
        ]
        header = ["under load", "requests/s", "items/s", "p50 ms", "p90 ms", f"over {first}"]
        load = self.load
        about = f"{load.workers} workers, threads {load.threads}, {load.slices} slices of {load.slice_seconds:g} s"
        return f"{table(header, rows)}\n{about} in turn"


def throughput(
    files: Mapping[str, str | os.PathLike[str] | Form],
    example_inputs: Inputs | Sequence[Inputs],
    load: Load | None = None,
    *,
    progress: bool = False,
) -> ThroughputReport:
    """Measure how many requests per second each file answers.

    Args:
        files: name -> path or `Form`; the first one is what the others are compared with.
        example_inputs: as for `benchmark`; of a list, the workers take one after the other.
        load: how the requests come; two workers of one thread unless given.
        progress: show a bar on the terminal.

    Raises:
        TdError: a file is missing or damaged, a provider is not installed, or inputs do not fit a graph.
    """
    forms, examples, asked = as_forms(files), as_examples(example_inputs), load or Load()
    runners = {
        name: make_runner(form, examples, threads=asked.threads, workers=asked.workers) for name, form in forms.items()
    }
    executes = {name: runner.open() for name, runner in runners.items()}
    rates: dict[str, list[float]] = {name: [] for name in forms}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    with ThreadPoolExecutor(asked.workers) as pool, bar("slices", asked.slices * len(forms), progress) as steps:
        for order in interleaved(list(forms), asked.slices, asked.seed):
            for name in order:
                rate, taken = _slice(pool, executes[name], runners[name].feeds, asked)
                rates[name].append(rate)
                seconds[name] += taken
                steps.advance()
    rows = tuple(ThroughputRow(name, tuple(rates[name]), tuple(seconds[name])) for name in forms)
    return ThroughputReport(rows, asked, next(iter(runners.values())).batch)


def _slice(
    pool: ThreadPoolExecutor, execute: Execute, feeds: tuple[Mapping[str, Any], ...], load: Load
) -> tuple[float, list[float]]:
    """Requests per second over one slice, and the seconds of each."""
    together = threading.Barrier(load.workers)
    work = [pool.submit(_serve, execute, feeds[i:] + feeds[:i], together, load) for i in _starts(len(feeds), load)]
    taken = [future.result() for future in work]
    # Worker by worker: one that ends early must not count as idle while the last request of another is answered.
    return sum(len(seconds) / sum(seconds) for seconds in taken), [value for seconds in taken for value in seconds]


def _starts(examples: int, load: Load) -> list[int]:
    return [worker * examples // load.workers % examples for worker in range(load.workers)]


def _serve(
    execute: Execute,
    feeds: Sequence[Mapping[str, Any]],
    together: threading.Barrier,
    load: Load,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """The seconds of the requests that one worker sent, one after the other, until the slice was over."""
    together.wait()
    start = before = clock()
    taken: list[float] = []
    while before - start < load.slice_seconds:
        execute(feeds[len(taken) % len(feeds)])
        now = clock()
        taken.append(now - before)
        before = now
    return taken
