"""A latency report as JSON, CSV and PNG files; each is whole or absent."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from td_plugin.errors import TdError
from td_plugin.export.latency import ENOUGH_FOR_P99, PERCENTILES, FileLatency, LatencyReport
from td_plugin.files import staged_file

COLUMNS = (
    "name", "provider", "threads", "batch", "sequence", "rounds",
    *(f"p{percent}_seconds" for percent in PERCENTILES),
    "items_per_second", "speedup", "speedup_low", "speedup_high", "verdict", "flops", "flop_ratio", "efficiency",
    "requests_per_second_under_load", "bytes", "load_seconds", "first_seconds", "peak_memory", "accuracy",
)  # fmt: skip
"""Of the CSV file, in SI units; speed-up and efficiency are over the first file, and empty for that itself."""


def values(report: LatencyReport) -> dict[str, Any]:
    """What `LatencyReport.to_dict` returns."""
    files = [
        {
            **asdict(file),
            **{f"p{percent}_seconds": value for percent, value in file.percentiles().items()},
            "p99_reliable": report.conditions.rounds >= ENOUGH_FOR_P99,
            "items_per_second": report.throughput(file.name),
            "accuracy": report.accuracy.get(file.name),
        }
        for file in report.files
    ]
    first = report.files[0].name
    speedups = []
    for file in report.files[1:]:
        efficiency = report.known_efficiency(file.name)
        entry = {"name": file.name, "over": first, **report.speedup(file.name, first).to_dict()}
        speedups.append({**entry, "efficiency": None if efficiency is None else efficiency.to_dict()})
    return {
        "files": files,
        "speedups": speedups,
        "conditions": asdict(report.conditions),
        "notes": list(report.notes),
        "load": None if report.load is None else report.load.to_dict(),
        "operators": None if report.operators is None else report.operators.to_dict(),
        "widths": {name: {layer: list(pair) for layer, pair in w.items()} for name, w in report.widths.items()},
    }


def write_json(report: LatencyReport, target: str | os.PathLike[str]) -> Path:
    """Write ``report.to_dict()``.

    Raises:
        TdError: the file cannot be written.
    """
    with staged_file(target) as path:
        path.write_text(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Path(target)


def write_csv(report: LatencyReport, target: str | os.PathLike[str]) -> Path:
    """Write a header and one line per file.

    Raises:
        TdError: the file cannot be written.
    """
    with staged_file(target) as path, path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(_line(report, file) for file in report.files)
    return Path(target)


def write_png(report: LatencyReport, target: str | os.PathLike[str]) -> Path:
    """Draw the distributions of the latencies.

    Raises:
        TdError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from td_plugin.export.plots import plot_latency
    except ImportError as error:
        raise TdError("matplotlib draws the picture", got=error, fix="pip install 'td-plugin[plots]'") from error
    return plot_latency(report, target)


def _line(report: LatencyReport, file: FileLatency) -> dict[str, Any]:
    conditions, first = report.conditions, report.files[0].name
    speedup = None if file.name == first else report.speedup(file.name, first)
    efficiency = report.known_efficiency(file.name)
    under_load = {} if report.load is None else {row.name: row.rate for row in report.load.rows}
    return {
        "name": file.name,
        "provider": file.provider,
        **{name: getattr(conditions, name) for name in ("threads", "batch", "sequence", "rounds")},
        **{f"p{percent}_seconds": value for percent, value in file.percentiles().items()},
        "items_per_second": report.throughput(file.name),
        "flops": file.flops,
        "requests_per_second_under_load": under_load.get(file.name),
        "bytes": file.bytes,
        "load_seconds": file.cold.load_seconds,
        "first_seconds": file.cold.first_seconds,
        "peak_memory": file.cold.peak_memory,
        "accuracy": report.accuracy.get(file.name),
        **(
            {}
            if speedup is None
            else {
                "speedup": speedup.median,
                "speedup_low": speedup.low,
                "speedup_high": speedup.high,
                "verdict": speedup.verdict,
            }
        ),
        **({} if efficiency is None else {"flop_ratio": efficiency.flop_ratio, "efficiency": efficiency.median}),
    }
