"""Pictures of results, drawn without a display."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from td_plugin.export.latency import LatencyReport
from td_plugin.export.latency_table import workload
from td_plugin.export.svg import COLOURS
from td_plugin.files import staged_file

Curve = Sequence[tuple[float, float]]
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one less than colours: 56 pairs until one comes again


def plot_accuracy(
    curves: Mapping[str, Curve], target: str | os.PathLike[str], *, title: str = "", trained_at: float | None = None
) -> Path:
    """Draw accuracy against sparsity and write a PNG (or what the suffix of `target` asks for).

    Args:
        curves: legend entry -> points (share of units pruned, accuracy), both in [0, 1].
        target: the file to write.
        title: above the plot.
        trained_at: the γ that the training was told; drawn as a vertical line.

    Raises:
        TdError: the file cannot be written.
    """
    figure, axes = _canvas(curves, title)
    if trained_at is not None:
        axes.axvline(trained_at, color="#999999", linewidth=1.0, linestyle="--", zorder=0)
        axes.annotate(
            f"trained for γ = {trained_at:g}",
            (trained_at, 0.02),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            color="#666666",
            fontsize=9,
        )
    axes.set(xlabel="units pruned", ylabel="test accuracy", xlim=(-0.02, None), ylim=(0.0, 1.02))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    return _saved(figure, target)


def plot_tradeoff(
    curves: Mapping[str, Curve], target: str | os.PathLike[str], *, title: str = "", conditions: str = ""
) -> Path:
    """Draw accuracy against measured speed-up and write a PNG (or what the suffix of `target` asks for).

    Args:
        curves: legend entry -> points (times faster than the dense model, accuracy in [0, 1]).
        target: the file to write.
        title: above the plot.
        conditions: what the speed-up was measured under; part of the axis label.

    Raises:
        TdError: the file cannot be written.
    """
    figure, axes = _canvas(curves, title)
    axes.set(xlabel=f"speed-up over dense fp32{f' ({conditions})' if conditions else ''}", ylabel="accuracy")
    axes.xaxis.set_major_formatter("{x:g}×")
    return _saved(figure, target)


def plot_latency(report: LatencyReport, target: str | os.PathLike[str], *, title: str = "") -> Path:
    """Draw the latency of every file as a box (p25 to p75, line at p50) with whiskers from p10 to p90.

    Args:
        report: what `benchmark` returned.
        target: the file to write, a PNG or what its suffix asks for.
        title: above the plot.

    Raises:
        TdError: the file cannot be written.
    """
    first, names = report.files[0].name, [file.name for file in report.files]
    figure = Figure(figsize=(7.0, 1.2 + 0.55 * len(names)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    times = [[second * 1e3 for second in file.seconds] for file in report.files]
    drawn = axes.boxplot(times, orientation="horizontal", whis=(10, 90), showfliers=False, patch_artist=True)
    for index, box in enumerate(drawn["boxes"]):
        box.set(facecolor=COLOURS[index % len(COLOURS)], alpha=0.55)
    labels = [name if name == first else f"{name}\n{report.speedup(name, over=first)}" for name in names]
    plain = [label.replace("$", r"\$") for label in labels]  # no mathematics in names
    axes.set_yticks(range(1, len(names) + 1), plain, fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel=f"ms ({workload(report.conditions)})", xlim=(0, None))
    axes.xaxis.label.set_fontsize(8)
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(axis="x", color="#e0e0e0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, target)


def _canvas(curves: Mapping[str, Curve], title: str) -> tuple[Figure, Axes]:
    crowded = len(curves) > 4
    figure = Figure(figsize=(7.0, 4.2 + 0.14 * len(curves) * crowded), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (name, points), colour, marker in zip(curves.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        axes.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker, markersize=4.5, linewidth=1.8)
    axes.set_title(title, fontsize=11, loc="left")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color="#e0e0e0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if crowded:  # it would lie on the curves
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    else:
        axes.legend(frameon=False, loc="lower left")
    return figure, axes


def _saved(figure: Figure, target: str | os.PathLike[str]) -> Path:
    with staged_file(target) as path:
        figure.savefig(path)
    return Path(target)
