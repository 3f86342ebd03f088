"""What the command ``benchmark`` asks for: the timing, the parts that join it, and the files that show it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from td_plugin.errors import TdError
from td_plugin.export.benchmark import benchmark
from td_plugin.export.example_inputs import inputs_for_graph
from td_plugin.export.latency import LatencyReport
from td_plugin.export.lengths import at_lengths
from td_plugin.export.operator_profile import profile_operators
from td_plugin.export.repeats import Repeats, repeat
from td_plugin.export.runners import Form, Inputs
from td_plugin.export.throughput import Load, throughput
from td_plugin.files import check_file


@dataclass(frozen=True)
class Job:
    """One use of the command.

    Attributes:
        files: name -> what to time; the first is the baseline.
        rounds: the least and the most.
        batch: rows per call.
        sequence: tokens per row.
        lengths: file of sequence lengths to draw from instead.
        threads: threads inside one operator.
        workers: concurrent requests to measure under, too; 0 for none.
        profile: record the operators, too.
        repeat: how often to time everything.
        accuracy: name -> what the caller measured, in [0, 1].
        csv: table to write.
        html: page to write.
        png: picture to write.
        progress: show bars on the terminal.
    """

    files: Mapping[str, Form]
    rounds: tuple[int, int]
    batch: int = 1
    sequence: int = 128
    lengths: Path | None = None
    threads: int = 1
    workers: int = 0
    profile: bool = False
    repeat: int = 1
    accuracy: Mapping[str, float] = field(default_factory=dict)
    csv: Path | None = None
    html: Path | None = None
    png: Path | None = None
    progress: bool = False


@dataclass(frozen=True)
class RepeatedReport:
    """Several runs: the first in full, then whether the others agree with it.

    Attributes:
        repeats: all of them.
    """

    repeats: Repeats

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return self.repeats.to_dict()

    def __str__(self) -> str:
        return f"{self.repeats.reports[0]}\n\n{self.repeats}"


def run_job(job: Job) -> LatencyReport | RepeatedReport:
    """Time the files, measure what else is asked for, write what is asked for.

    Load, operators, accuracy and the files belong to the first run.

    Raises:
        TdError: an ONNX file, a provider, an input or the file of lengths is wrong, or a result cannot be written.
            What can be known beforehand is said before anything is timed.
    """
    _check(job)
    examples = _examples(job)
    if job.repeat == 1:
        report = _complete(job, examples, _timed(job, examples, 0))
        _write(job, report)
        return report
    first, *others = repeat(lambda seed: _timed(job, examples, seed), job.repeat).reports
    first = _complete(job, examples, first)
    _write(job, first)
    return RepeatedReport(Repeats((first, *others)))


def read_lengths(path: Path) -> list[int]:
    """Sequence lengths: a JSON list, or one per line.

    Raises:
        TdError: the file cannot be read, is empty, or holds something else than whole numbers above 0.
    """
    fix = "one whole number above 0 per line, or a JSON list of them"
    try:
        text = path.read_text(encoding="utf-8").strip()
        found = json.loads(text) if text.startswith("[") else [int(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:  # JSON's and Unicode's errors are ValueErrors
        raise TdError("the sequence lengths cannot be read", where=str(path), got=error, fix=fix) from error
    wrong = [value for value in found if type(value) is not int or value < 1]
    if wrong or not found:
        got = f"{wrong[0]!r}" if wrong else "none"
        raise TdError("these are no sequence lengths", where=str(path), got=got, fix=fix)
    return found


def _check(job: Job) -> None:
    for name, value in job.accuracy.items():
        if name not in job.files:
            raise TdError("accuracy of a file that is not timed", got=name, fix=f"one of {list(job.files)}")
        if not 0 <= value <= 1:
            raise TdError("an accuracy lies in [0, 1]", where=name, got=value, fix="0.91, not 91")
    for target in (job.csv, job.html, job.png):
        if target is not None:
            check_file(target)
    if job.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise TdError("matplotlib draws the picture", got="not installed", fix="pip install 'td-plugin[plots]'")


def _examples(job: Job) -> list[Inputs]:
    path = next(iter(job.files.values())).path
    if job.lengths is None:
        return [inputs_for_graph(path, job.batch, job.sequence)]
    lengths = read_lengths(job.lengths)  # before the model is opened
    return [*at_lengths(inputs_for_graph(path, job.batch, max(lengths)), lengths, batch=job.batch)]


def _timed(job: Job, examples: Sequence[Inputs], seed: int) -> LatencyReport:
    return benchmark(job.files, examples, threads=job.threads, rounds=job.rounds, seed=seed, progress=job.progress)


def _complete(job: Job, examples: Sequence[Inputs], report: LatencyReport) -> LatencyReport:
    load = operators = None
    if job.workers:
        asked = Load(workers=job.workers, threads=job.threads)
        load = throughput(job.files, examples, asked, progress=job.progress)
    if job.profile:
        by_size = sorted(examples, key=lambda inputs: sum(len(value.reshape(-1)) for value in inputs.values()))
        typical = by_size[len(by_size) // 2]  # the recorder takes one example: the one of median size
        operators = profile_operators(job.files, typical, threads=job.threads, progress=job.progress)
    return report.with_results(load=load, operators=operators, accuracy=job.accuracy)


def _write(job: Job, report: LatencyReport) -> None:
    for target, write in ((job.csv, report.to_csv), (job.html, report.to_html), (job.png, report.to_png)):
        if target is not None:
            write(target)
