"""The table of a latency report, and the sentences under it."""

from __future__ import annotations

from td_plugin.export.latency import ENOUGH_FOR_P99, Conditions, FileLatency, LatencyReport
from td_plugin.report import table


def text(report: LatencyReport) -> str:
    """What `str()` of a report prints."""
    named = any(file.provider != report.files[0].provider for file in report.files)
    rows = [[_name(file, named), *_cells(report, file)] for file in report.files]
    columns = ["p50 ms", "p90 ms", "p99 ms", "items/s", "size MB", "memory MB", "load ms", "first ms"]
    columns += ["accuracy"] if report.accuracy else []
    lines = [table(["file", *columns], rows), *speedups(report)]
    if report.conditions.rounds < ENOUGH_FOR_P99:
        lines.append(f"no p99: it takes {ENOUGH_FOR_P99} rounds")
    lines += [f"note: {note}" for note in report.notes]
    lines += [str(part) for part in (report.load, report.operators) if part is not None]
    return "\n".join([*lines, f"{workload(report.conditions)}; {machine(report.conditions)}"])


def speedups(report: LatencyReport) -> list[str]:
    """One line per file: how many times faster than the first, and how much of the saved FLOPs that is."""
    first = report.files[0].name
    lines = []
    for file in report.files[1:]:
        efficiency = report.known_efficiency(file.name)
        line = f"{file.name} over {first}: {report.speedup(file.name, over=first)}"
        lines.append(line if efficiency is None else f"{line}; efficiency {efficiency}")
    return lines


def workload(conditions: Conditions) -> str:
    """What was run, in words."""
    c = conditions
    shape = f"batch {c.batch}" + ("" if c.sequence is None else f", sequence {c.sequence}")
    if c.lengths:
        low, *_, high = lengths = sorted(c.lengths)
        shape += f", {len(lengths)} texts of {low} to {high} tokens, median {lengths[len(lengths) // 2]}"
    opened = f" over {c.sessions} openings" if c.sessions > 1 else ""
    return f"{shape}, threads {c.threads}, {c.rounds} rounds in random order{opened}"


def machine(conditions: Conditions) -> str:
    """What it ran on, in words."""
    return "; ".join(f"{name} {fact}" for name, fact in conditions.machine.items() if fact)


def milliseconds(seconds: float | None, digits: int = 2) -> str:
    """In milliseconds, a dash for what is not known."""
    return "-" if seconds is None else f"{seconds * 1e3:.{digits}f}"


def megabytes(count: int | None, digits: int = 2) -> str:
    """In millions, a dash for what is not known."""
    return "-" if count is None else f"{count / 1e6:.{digits}f}"


def _name(file: FileLatency, with_provider: bool) -> str:
    return f"{file.name} ({file.provider.removesuffix('ExecutionProvider')})" if with_provider else file.name


def _cells(report: LatencyReport, file: FileLatency) -> list[str]:
    percentiles = file.percentiles()
    cells = [
        *(milliseconds(percentiles[percent]) for percent in (50, 90, 99)),
        f"{report.throughput(file.name):.1f}",
        megabytes(file.bytes),
        megabytes(file.cold.peak_memory, 1),
        milliseconds(file.cold.load_seconds, 0),
        milliseconds(file.cold.first_seconds, 1),
    ]
    if report.accuracy:
        accuracy = report.accuracy.get(file.name)
        cells.append("-" if accuracy is None else f"{accuracy:.4f}")
    return cells
