"""Rows, tables and plot of `benchmarks/methods.py`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from methods_rows import ROWS
from methods_tasks import NETWORKS, UNITS, WEIGHTS

from td_plugin.files import staged_file


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per network, method and share, in the order of the tables; mean and deviation over the seeds."""
    rows = []
    for network in NETWORKS:
        for method, row in ROWS.items():
            for level in row.levels:
                key = (network, method, level)
                these = [run for run in runs if (run["network"], run["method"], run["level"]) == key]
                if not these:
                    continue
                scores = [run["accuracy"] for run in these]
                rows.append(
                    {
                        "network": network,
                        "method": method,
                        "level": level,
                        "accuracy": statistics.mean(scores),
                        "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
                        "sparsity": statistics.mean(run["sparsity"] for run in these),
                        "seconds": statistics.mean(run["seconds"] for run in these),
                        "seeds": sorted(run["seed"] for run in these),
                    }
                )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of weights and one of units per network; accuracies in percent."""
    parts = []
    for network in NETWORKS:
        for what, levels in (("weights", WEIGHTS), ("units", UNITS)):
            these = [row for row in rows if row["network"] == network and _belongs(row["method"], levels)]
            if these:
                dense = [row for row in rows if (row["network"], row["method"]) == (network, "none")]
                parts.append(f"**{network}, {what}**\n\n{_table(what, levels, dense, these)}")
    return "\n\n".join(parts)


def _belongs(method: str, levels: tuple[float, ...]) -> bool:
    return method != "none" and ROWS[method].units == (levels is UNITS)


def _table(what: str, levels: tuple[float, ...], dense: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    header = [f"{what} removed", "0", *(f"{level:.0%}" for level in levels), "seconds per model"]
    lines = [header, ["---"] * len(header)]
    lines += [["none", _cell(row), *("" for _ in levels), f"{row['seconds']:.1f}"] for row in dense]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["level"]: row for row in rows if row["method"] == method}
        seconds = statistics.mean(row["seconds"] for row in found.values())
        cells = [_cell(found[level]) if level in found else "" for level in levels]
        lines.append([method, "", *cells, f"{seconds:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict[str, Any]) -> str:
    spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"
    own = "" if abs(row["sparsity"] - row["level"]) < 0.02 else f" (at {row['sparsity']:.1%})"
    return f"{100 * row['accuracy']:.1f}{spread}{own}"


FLOOR = 75.0
"""Percent; the plot shows what lies above."""


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Accuracy against the share removed, a panel per network and kind."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    networks = [network for network in NETWORKS if any(row["network"] == network for row in rows)]
    figure = Figure(figsize=(15, 5 * len(networks)), dpi=80, layout="constrained")
    panels = figure.subplots(len(networks), 2, squeeze=False)
    for line, network in zip(panels, networks, strict=True):
        for axes, (what, levels) in zip(line, (("weights", WEIGHTS), ("units", UNITS)), strict=True):
            dense = [row["accuracy"] for row in rows if (row["network"], row["method"]) == (network, "none")]
            if dense:
                axes.axhline(100 * dense[0], color="#4d4d4d", linewidth=0.8, linestyle=":")
            names = [name for name, row in ROWS.items() if _belongs(name, levels) and len(row.levels) > 1]
            for index, name in enumerate(names):
                these = [row for row in rows if (row["network"], row["method"]) == (network, name)]
                style = {"color": colormaps["tab20"](index % 20), "marker": "osD^v"[index % 5], "markersize": 4}
                x, y = [100 * row["level"] for row in these], [100 * row["accuracy"] for row in these]
                label = name if not y or min(y) >= FLOOR else f"{name} (down to {min(y):.0f} %)"
                axes.plot(x, y, label=label, linewidth=1.2, **style)
            axes.set(title=f"{network}, {what}", xlabel=f"% of {what} removed", ylabel="accuracy, %")
            axes.set_ylim(bottom=max(axes.get_ylim()[0], FLOOR))  # else one bad method hides what tells others apart
            axes.grid(color="#e0e0e0", linewidth=0.7)
            axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    with staged_file(target) as path:
        figure.savefig(path)
