"""What `overhead.py` found, as Markdown and as a plot, and what it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from td_plugin import kernels

_ALLOCATOR = ("LD_PRELOAD", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def machine(device: str) -> dict[str, str]:
    """What the numbers were taken on, and with which versions."""
    source, processor = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if source.exists():
        names = [line for line in source.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    versions = {name: _version(name) for name in ("torch", "transformers", "numba", "torchao", "triton")}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load": " ".join(f"{value:.1f}" for value in os.getloadavg()) if os.name == "posix" else "",
        "python": platform.python_version(),
        "compiled loops": str(kernels.available()),
        **{name: value for name in _ALLOCATOR if (value := os.environ.get(name))},
        **{name: version for name, version in versions.items() if version},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _percent(row: dict[str, Any]) -> str:
    return f"{100 * row['median']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(found: dict[str, Any]) -> str:
    """Conditions, the tables of training, evaluation and memory, and what the rows do."""
    machine, setting, chosen = found["machine"], found["setting"], found["matrices"]
    conditions = (
        f"`{found['command']}`: {', '.join(f'{key} {value}' for key, value in machine.items())}. {setting['layers']}"
        f" layers of {setting['hidden']}, batch {setting['batch']} × {setting['sequence']}, {setting['dtype']}"
        f"{', compiled' if setting['compiled'] else ''}; {setting['pairs']} rounds in {setting['builds']} builds;"
        f" γ = {setting['gamma']}, α = {setting['alpha']}. All methods but the one for units have the"
        f" {chosen['weights']:,} weights of the {chosen['tensors']} matrices of attention and FFN, of"
        f" {chosen['of']:,} parameters."
    )
    parts = [conditions, _training(found["training"])]
    if found["quick"]:
        parts.insert(0, "Quick run: shows that the script runs; the numbers mean nothing.")
    parts += [f"Left out: {name}: {reason}." for name, reason in found["left_out"].items()]
    parts += ["Evaluation:", _evaluation(found)]
    if found["peak"]:
        libraries = max(row["libraries"] for row in found["peak"].values())
        loaded = f" (numba's own {libraries / 1e6:.0f} MB in all of them)" if libraries else ""
        parts += [f"Memory of a process that trains, MB{loaded}:", _peak(found)]
    parts.append("\n".join(f"* {row['title']}: {row['what']}." for row in found["training"].values()))
    return "\n\n".join(parts) + "\n"


def _training(rows: dict[str, Any]) -> str:
    header = [
        "training step",
        "median ms",
        "over none, %: median [95 %]",
        "of means",
        "of minima",
        "inside td_plugin, ms",
        "page faults",
        "tensors masked",
        "scalars in them",
        "bytes held per scalar",
    ]
    lines = []
    for name, row in rows.items():
        cells = [row["title"], f"{row['median_ms']:.1f}"]
        cells += ["", "", ""] if name == "none" else [_percent(row), *_others(row)]
        cells += [f"{row['own_ms']:.0f}" if "own_ms" in row else "", f"{row['faults']:,.0f}"]
        if "weights" in row:
            cells += [str(row["tensors"]), f"{row['weights']:,}", f"{row['held_bytes_per_weight']:.4f}"]
        lines.append(cells + [""] * (len(header) - len(cells)))
    return _table(header, lines)


def _others(row: dict[str, Any]) -> list[str]:
    return [f"{100 * row[key]:+.1f}" for key in ("of_means", "of_minima")]


def _evaluation(found: dict[str, Any]) -> str:
    header = ["forward, evaluation", "median ms", "over none, %: median [95 %]", "of means", "of minima"]
    lines = [
        [found["training"][name]["title"], f"{row['median_ms']:.1f}"]
        + (["", "", ""] if name == "none" else [_percent(row), *_others(row)])
        for name, row in found["evaluation"].items()
    ]
    return _table(header, lines)


def _peak(found: dict[str, Any]) -> str:
    titles, base = found["training"], found["peak"].get("none", {"between": 0, "peak": 0})
    lines = [
        [titles[name]["title"] if name in titles else name]
        + [f"{row[key] / 1e6:,.0f}" for key in ("between", "peak")]
        + [f"{(row[key] - base[key]) / 1e6:+,.0f}" for key in ("between", "peak")]
        for name, row in found["peak"].items()
    ]
    return _table(["row", "between steps", "peak of a step", "over none, between", "over none, peak"], lines)


def plot(found: dict[str, Any], target: Path, limit: float) -> None:
    """A bar per row: the median overhead with its interval; the line is what the project allows itself."""
    from matplotlib.figure import Figure

    rows = [row for name, row in reversed(found["training"].items()) if name != "none"]
    figure = Figure(figsize=(7.5, 0.45 * len(rows) + 1.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    medians = [100 * row["median"] for row in rows]
    ends = [[100 * (row["median"] - row["low"]) for row in rows], [100 * (row["high"] - row["median"]) for row in rows]]
    colours = ["#0072b2" if row["title"].startswith("td_plugin") else "#999999" for row in rows]
    axes.barh([row["title"] for row in rows], medians, xerr=ends, color=colours, height=0.62, capsize=2.5)
    for place, row in enumerate(rows):
        axes.annotate(
            f"{_percent(row)} %",
            (max(100 * row["high"], 0), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(0, color="#4d4d4d", linewidth=0.8)
    axes.axvline(100 * limit, color="#d55e00", linewidth=1.0, linestyle="--")
    axes.margins(x=0.22)
    setting = found["setting"]
    axes.set_xlabel(
        f"% of a plain training step ({found['machine']['device']}, batch {setting['batch']} × {setting['sequence']},"
        f" {setting['dtype']}{', compiled' if setting['compiled'] else ''}); dashed: {100 * limit:g} %",
        fontsize=8,
    )
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)
