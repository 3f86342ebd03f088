"""Plots of what `deploy.py` found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy_measure import BASE
from deploy_models import LEVELS, TIMED, TORCH, key
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from td_plugin.export.svg import COLOURS

TITLES = {
    "eager": "torch eager",
    "compile": "torch.compile",
    "fp32": "onnxruntime fp32",
    "fused": "onnxruntime fused",
    "int8": "onnxruntime int8 dynamic",
    "int8-static": "onnxruntime int8 static",
    "bf16": "stored in bf16",
    "fp16": "fp16",
    "int8-weight": "weights in 8 bits",
    "int4": "weights in 4 bits",
}
MARKERS = ("o", "s", "^")


def plot(model: dict[str, Any], target: Path) -> None:
    """At one thread, one row of the longest sequence: accuracy against time if there is one, else speed-ups."""
    settings = model["settings"]
    setting = max(settings, key=lambda s: (-s["threads"], -s["batch"], s["sequence"]))
    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    where = f"batch {setting['batch']} × {setting['sequence']} tokens, threads {setting['threads']}"
    if model["forms"][BASE]["accuracy"] is None:
        _bars(axes, model, setting)
        axes.set_ylabel(f"speed-up over dense fp32 ({where})", fontsize=8)
    else:
        _tradeoff(axes, model, setting)
        axes.set_xlabel(f"p50 in ms, {where}", fontsize=8)
    axes.set_title(model["title"], fontsize=10, loc="left")
    axes.grid(color="#e0e0e0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)


def _bars(axes: Any, model: dict[str, Any], setting: dict[str, Any]) -> None:
    """Speed-ups, a group per form, a bar per γ."""
    forms, levels = (*TORCH, *TIMED), [level["level"] for level in model["levels"]]
    for place, level in enumerate(levels):
        found = [setting["rows"][key(level, form)]["speedup"] for form in forms]
        ends = [[s["median"] - s["low"] for s in found], [s["high"] - s["median"] for s in found]]
        at = [index + 0.27 * (place - (len(levels) - 1) / 2) for index in range(len(forms))]
        label = f"γ = {level:g}" if level else "dense"
        drawn = axes.bar(
            at, [s["median"] for s in found], 0.25, yerr=ends, color=COLOURS[place], label=label, capsize=2
        )
        axes.bar_label(drawn, fmt="%.1f", fontsize=7, padding=2)
    axes.set_xticks(range(len(forms)), [TITLES[form].replace("onnxruntime ", "ort\n") for form in forms])
    axes.axhline(1, color="#4d4d4d", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8)


def _tradeoff(axes: Any, model: dict[str, Any], setting: dict[str, Any]) -> None:
    """Accuracy against time, a colour per form, a marker per γ; a line through what nothing beats in both."""
    timed = (name for name in setting["rows"] if name in model["forms"])
    points = {name: (setting["rows"][name]["p50_ms"], model["forms"][name]["accuracy"]) for name in timed}
    for place, form in enumerate((*TORCH, *TIMED)):
        for level, marker in zip(LEVELS, MARKERS, strict=True):
            if key(level, form) in points:
                label = TITLES[form] if not level else None
                axes.plot(*points[key(level, form)], marker, color=COLOURS[place], label=label, markersize=6)
    best = pareto(points)
    axes.step(*zip(*(points[name] for name in best), strict=True), where="post", color="#4d4d4d", lw=0.9, zorder=0)
    for marker, text in zip(MARKERS, ("dense", "γ = 0.5", "γ = 0.75"), strict=True):
        axes.plot([], [], marker, color="#999999", label=text)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    ticks = [value for value in (1, 2, 5, 10, 20, 50, 100, 200, 500) if _inside(value, [p[0] for p in points.values()])]
    axes.set_xticks(ticks)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("accuracy", fontsize=8)
    axes.legend(frameon=False, fontsize=7, loc="lower right")


def _inside(value: float, times: list[float]) -> bool:
    return min(times) / 1.5 <= value <= max(times) * 1.5


def pareto(points: dict[str, tuple[float, float]]) -> list[str]:
    """Those that no other is both faster and at least as accurate as, the fastest first."""
    best: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not best or points[name][1] > points[best[-1]][1]:
            best.append(name)
    return best
