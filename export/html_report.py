"""A latency report as one page that needs nothing but a browser: no script, no network, pictures inside."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from td_plugin.export.latency import ENOUGH_FOR_P99, FileLatency, LatencyReport
from td_plugin.export.latency_table import megabytes, milliseconds, workload
from td_plugin.export.operators import OperatorReport, columns
from td_plugin.export.svg import distributions, paired_bars
from td_plugin.export.throughput import ThroughputReport
from td_plugin.files import staged_file

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } .faster { color: #00694f; } .slower { color: #a33b00; }
p.note { background: #fff3d6; padding: .4rem .7rem; } small, footer { color: #666; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #222; }
"""


def write_html(report: LatencyReport, target: str | os.PathLike[str], title: str = "Latency") -> Path:
    """Write the page.

    Args:
        report: what to show; parts that it lacks are left out.
        target: the file to write.
        title: of the page.

    Raises:
        TdError: the file cannot be written.
    """
    with staged_file(target) as path:
        path.write_text(page(report, title), encoding="utf-8")
    return Path(target)


def page(report: LatencyReport, title: str) -> str:
    """The text of the page."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(workload(report.conditions))}.</p>",
        *(f'<p class="note">{escape(note)}</p>' for note in report.notes),
        _section("How much faster", _verdicts(report)),
        _section(
            "Latency of one run after another",
            distributions({file.name: file.seconds for file in report.files}),
            "<small>Lines: p50, dashed p90. On this axis equal distances are equal speed-ups.</small>",
            _latencies(report),
        ),
        _section("Size and first use", _costs(report)),
        *([_section("Under concurrent requests", *_load(report.load))] if report.load else []),
        *([_section("Where the time goes", *_operators(report.operators))] if report.operators else []),
        *_widths(report),
        _section("Machine and versions", _rows((), [[key, fact] for key, fact in report.conditions.machine.items()])),
        f"<footer>{_method(report)}</footer>",
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "</section>"


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; every cell is escaped."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)] if header else []
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _verdicts(report: LatencyReport) -> str:
    first, *others = report.files
    if not others:
        return f"<p>Nothing to compare {escape(first.name)} with.</p>"
    header = ("file", f"times as fast as {first.name}", "95 % interval", "verdict", "FLOPs", "efficiency")
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    for file in others:
        speedup, efficiency = report.speedup(file.name, first.name), report.known_efficiency(file.name)
        fewer, share = ("-", "-")
        if efficiency is not None:
            fewer = f"{efficiency.flop_ratio:.2f}× fewer"
            share = f"{efficiency.median:.2f} [{efficiency.low:.2f}, {efficiency.high:.2f}]"
        mark = speedup.verdict.replace(" ", "-")
        cells = [file.name, f"{speedup.median:.2f}×", f"{speedup.low:.2f} to {speedup.high:.2f}"]
        lines.append(
            "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + f'<td class="{mark}">{speedup.verdict}</td><td>{fewer}</td><td>{share}</td>'
        )
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _latencies(report: LatencyReport) -> str:
    header = ["file", "runs on", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "items/s"]
    rows = [
        [file.name, file.provider.removesuffix("ExecutionProvider")]
        + [milliseconds(value) for value in file.percentiles().values()]
        + [f"{report.throughput(file.name):.1f}"]
        for file in report.files
    ]
    few = f"<small>No p99: it takes {ENOUGH_FOR_P99} rounds.</small>"
    return _rows(header, rows) + (few if report.conditions.rounds < ENOUGH_FOR_P99 else "")


def _costs(report: LatencyReport) -> str:
    header = ["file", "size MB", "of the first", "peak memory MB", "load ms", "first run ms"]
    header += ["accuracy"] if report.accuracy else []
    return _rows(header, [_cost(report, file) for file in report.files])


def _cost(report: LatencyReport, file: FileLatency) -> list[str]:
    accuracy = report.accuracy.get(file.name)
    return [
        file.name,
        megabytes(file.bytes),
        f"{file.bytes / max(report.files[0].bytes, 1):.0%}",
        megabytes(file.cold.peak_memory, 1),
        milliseconds(file.cold.load_seconds, 0),
        milliseconds(file.cold.first_seconds, 1),
        *([] if not report.accuracy else ["-" if accuracy is None else f"{accuracy:.4f}"]),
    ]


def _load(load: ThroughputReport) -> list[str]:
    first = load.rows[0].name
    rows = [
        [row.name, f"{row.rate:.1f}", *(milliseconds(row.percentile(percent)) for percent in (50, 90))]
        + ["" if row.name == first else str(load.gain(row.name, first))]
        for row in load.rows
    ]
    asked = load.load
    about = f"{asked.workers} workers sharing one session, threads {asked.threads}, {asked.slices} slices in turn."
    return [_rows(("file", "requests/s", "p50 ms", "p90 ms", f"over {first}"), rows), f"<small>{about}</small>"]


def _operators(operators: OperatorReport) -> list[str]:
    header = ["operator", *(f"{form.name}, {unit}" for form in operators.forms for unit in ("ms", "%"))]
    rows = [[name, *columns(cells)] for name, cells in operators.rows()]
    said = [f"<p>{escape(sentence)}.</p>" for sentence in operators.sentences()]
    return [_rows(header, rows), *said, f"<small>Median of {operators.runs} recorded runs.</small>"]


def _widths(report: LatencyReport) -> list[str]:
    return [_section(f"Widths of the layers: {name}", paired_bars(widths)) for name, widths in report.widths.items()]


def _method(report: LatencyReport) -> str:
    c = report.conditions
    return (
        f"{c.rounds} rounds, in each of which every file ran once, in random order (seed {c.seed}); every file was "
        f"opened {c.sessions} times. Speed-up: median over the rounds of the ratio of two timings, with the 95 % "
        "bootstrap interval of that median. An interval that reaches within 3 % of 1 is no difference. Efficiency: "
        "speed-up over FLOP ratio; FLOPs are those of matrix products and convolutions."
    )
