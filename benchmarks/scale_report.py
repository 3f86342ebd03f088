"""Line fits, tables and plot of `benchmarks/scale.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from td_plugin.files import staged_file

COMPARED = ("prepare", "step", "squash_mask", "state_dict", "load_state_dict")
WORTH_A_FIT = 0.01  # seconds; what is shorter jitters


def fits(rows: list[dict[str, Any]], call: str) -> dict[str, float]:
    """``seconds = a + b · tensors + c · weights``, none below zero, with the smallest squares of relative errors."""
    seconds = np.array([row["copy"] if call == "copy" else row["calls"][call]["seconds"] for row in rows])
    terms = np.array([[1.0, row["tensors"], row["weights"]] for row in rows])
    used = [0, 1, 2]
    while True:
        solved = np.linalg.lstsq(terms[:, used] / seconds[:, None], np.ones(len(rows)), rcond=None)[0]
        if solved.min() >= 0 or len(used) == 1:
            break
        used.pop(int(solved.argmin()))
    factors = np.zeros(3)
    factors[used] = solved
    errors = np.abs(terms @ factors / seconds - 1)[seconds > WORTH_A_FIT]
    named = {"seconds": factors[0], "us_per_tensor": 1e6 * factors[1], "ns_per_weight": 1e9 * factors[2]}
    return {key: float(value) for key, value in {**named, "off_by": errors.max(initial=0.0)}.items()}


def _table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def _size(row: dict[str, Any]) -> list[str]:
    return [f"{row['weights'] / 1e6:,.1f} M", f"{row['tensors']:,} × {row['width']:,}²"]


def _ratios(rows: list[dict[str, Any]], copy: str) -> str:
    """Every compared call over `copy`; in parentheses what is left without finding the candidates."""
    lines = []
    for row in rows:
        calls = [row["calls"][name] for name in COMPARED]
        times = [f"{call[f'times_{copy}']:.2f} ({call[f'times_{copy}_without_selection']:.2f})" for call in calls]
        lines.append([*_size(row), f"{1e3 * row[copy]:,.1f}", *times])
    return _table(("weights", "tensors", "copy, ms", *COMPARED), lines)


def markdown(found: dict[str, Any]) -> str:
    """Conditions and tables: ratios to the copies, parts per weight, memory, fitted lines."""
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    conditions = f"{machine}; {found['dtype']}, γ = {found['gamma']}, medians of {found['rounds']} rounds."
    size = ("weights", "tensors")
    parts, memory = [], []
    for row in found["rows"]:
        calls, per = row["calls"], 1e9 / row["weights"]
        pieces = [row["copy"] * per, *(1e9 * row["selection"][name] for name in ("first step", "step"))]
        pieces += [calls[name]["seconds"] * per for name in ("redraw", "step", "report", "squash_mask")]
        parts.append([*_size(row), *(f"{piece:.2f}" for piece in pieces)])
        peaks = [f"{calls[name]['peak'] / row['weights']:.1f}" for name in COMPARED]
        memory.append([*_size(row), f"{row['held_bytes_per_weight']:.3f}", *peaks])
    lines = []
    for name, fit in found["fits"].items():
        cells = [f"{fit['us_per_tensor']:.1f}", f"{fit['ns_per_weight']:.3f}", f"{100 * fit['off_by']:.0f} %"]
        lines.append([name, f"{1e3 * fit['seconds']:.2f}", *cells])
    ns = ("copy", "selection, first", "selection, later", "redraw", "step", "report", "squash_mask")
    return "\n\n".join(
        [
            conditions,
            "Seconds over those of copying the weights (the same without finding the candidates):",
            _ratios(found["rows"], "copy"),
            "The same over copying into memory that is there already:",
            _ratios(found["rows"], "copy_at_hand"),
            "ns per weight:",
            _table((*size, *ns), parts),
            "Bytes per weight: held after a step, and the peak of each call over what there was before it:",
            _table((*size, "held", *COMPARED), memory),
            "Fitted lines:",
            _table(("call", "ms", "µs per tensor", "ns per weight", "off by"), lines),
        ]
    )


def plot(found: dict[str, Any], target: Path) -> None:
    """Seconds against weights, both logarithmic; small tensors apart, since there the number of tensors counts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.0), dpi=150, layout="constrained")
    halves = [("large tensors", 100), ("tensors of 32² weights or so", 0)]
    colours = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
    for axes, (title, smallest) in zip(figure.subplots(1, 2, sharey=True), halves, strict=True):
        rows = [row for row in found["rows"] if (row["width"] >= 100) == (smallest > 0)]
        count = "weights" if smallest else "tensors"
        for name, colour in zip(("copy", *COMPARED), colours, strict=True):
            seconds = [row["copy"] if name == "copy" else row["calls"][name]["seconds"] for row in rows]
            style = "--" if name == "copy" else "none"
            axes.plot(
                [row[count] for row in rows],
                seconds,
                label=name,
                color=colour,
                marker="o",
                markersize=4,
                linestyle=style,
            )
        axes.set(title=title, xlabel=count, xscale="log", yscale="log")
        axes.grid(color="#e0e0e0", linewidth=0.7)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(frameon=False, fontsize=8)
    with staged_file(target) as path:
        figure.savefig(path)
