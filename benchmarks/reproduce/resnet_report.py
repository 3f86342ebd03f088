"""Tables and the plot of `resnet.py`, from what is on disk."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from resnet_published import BEFORE_TRAINING, PUBLISHED
from resnet_rows import HIGH, ROWS, SHARES, What
from resnet_runs import Found

from td_plugin.files import staged_file

TENTHS = tuple(f"{share:g}" for share in SHARES)
RAMP = ("0.9", *(f"{share:g}" for share in HIGH))


def values(runs: Sequence[Found], name: str, what: What, share: str, key: str = "accuracy") -> list[float]:
    """Of all seeds; empty where there is no such run."""
    found = [run[what][share][key] for run in runs if run["method"] == name and share in run.get(what, {})]
    return [100 * value for value in found] if key == "accuracy" else found


def spread(numbers: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation; empty for nothing."""
    if not numbers:
        return ""
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{deviation}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def columns(runs: Sequence[Found], what: What, shares: Sequence[str], names: Sequence[str]) -> str:
    """One line per share, one column per method: mean ± deviation, and the published accuracy in brackets."""
    lines = []
    for share in shares:
        cells = []
        for name in names:
            published = PUBLISHED[what].get(name, {}).get(share)
            ours = spread(values(runs, name, what, share))
            cells.append(ours + (f" ({published:.2f})" if published is not None else ""))
        lines.append([f"{100 * float(share):g} %", *cells])
    return table([f"{what} removed", *(ROWS[name].title for name in names)], lines)


def of(runs: Sequence[Found], what: What) -> list[str]:
    """The rows that are compared at all shares and have runs."""
    group = [name for name, row in ROWS.items() if what in row.what and row.group in ("weights", "units")]
    return [name for name in group if values(runs, name, what, "0")]


def before_training(runs: Sequence[Found]) -> str:
    """Random pruning before training against ramping targeted dropout, at the share each was trained for."""
    lines = []
    for what, methods in BEFORE_TRAINING.items():
        shares = sorted({share for found in methods.values() for share in found}, key=float)
        for share in shares:
            percent, unit = f"{100 * float(share):g}", "unit-" if what == "units" else ""
            cells = [f"{percent} % of {what}"]
            for method in ("random", "ramping"):
                name = f"random-{unit}{percent}" if method == "random" else f"{unit}ramp-99-{percent}"
                ours = spread(values(runs, name, "units" if unit else "weights", share))
                cells.append(f"{ours} ({methods[method][share]:.2f})" if ours else "")
            if any(cells[1:]):
                lines.append(cells)
    return table(["removed", "random, before training", "ramping TD, α 0.99"], lines)


def agreement(runs: Sequence[Found], what: What) -> str:
    """Spearman's rank correlation, over the methods, of our mean accuracies with the published ones."""
    lines = []
    names = [name for name in of(runs, what) if set(TENTHS) <= set(PUBLISHED[what].get(name, {}))]
    for share in TENTHS:
        ours = [statistics.mean(values(runs, name, what, share)) for name in names]
        theirs = [PUBLISHED[what][name][share] for name in names]
        best = ROWS[names[max(range(len(names)), key=ours.__getitem__)]].title
        cited = ROWS[names[max(range(len(names)), key=theirs.__getitem__)]].title
        lines.append([f"{100 * float(share):g} %", f"{correlation(ours, theirs):+.2f}", best, cited])
    return table([f"{what} removed", f"rank correlation of {len(names)} methods", "best here", "best published"], lines)


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; 0 where all values of one are equal."""
    first, second = _ranks(one), _ranks(other)
    return statistics.correlation(first, second) if len(set(first)) > 1 and len(set(second)) > 1 else 0.0


def _ranks(numbers: Sequence[float]) -> list[float]:
    """Equal numbers share the mean of their ranks."""
    return [sum(a < b for a in numbers) + (sum(a == b for a in numbers) - 1) / 2 for b in numbers]


BELOW = (
    "The published columns of targeted dropout of weights are flat up to γ: as they are if evaluation drops all "
    "candidates, which the authors' code does. Here nothing is dropped besides what the line says; under that mask a "
    "column would have its accuracy at γ from 0 % up to there."
)


def markdown(runs: Sequence[Found]) -> str:
    """All tables."""
    parts = []
    for what in ("weights", "units"):
        names = [name for name in of(runs, what) if name != "ramp-99-99"]
        if len(names) > 1:
            parts += [f"**{what}**", columns(runs, what, TENTHS, names)]
            parts += [BELOW] if what == "weights" else []
            parts.append(agreement(runs, what))
    if values(runs, "ramp-99-99", "weights", "0"):
        title = "**ramping targeted dropout, weights** (0 to 80 %: no published numbers)"
        parts += [title, columns(runs, "weights", (*TENTHS[:-1], *RAMP), ["ramp-99-99"])]
    if any(ROWS[run["method"]].group == "random" for run in runs):
        parts += ["**random pruning before training**", before_training(runs)]
    return "\n\n".join(parts)


STYLES: Mapping[str, tuple[str, str]] = {
    "none": ("#4d4d4d", "o"), "dropout": ("#9467bd", "s"), "td-50-50": ("#9ecae1", "D"), "td-66-75": ("#4292c6", "D"),
    "td-75-90": ("#08306b", "D"), "variational": ("#2ca02c", "^"), "l1": ("#ff7f0e", "v"), "l0": ("#d62728", "v"),
    "ramp-99-99": ("#17becf", "P"), "unit-50-50": ("#9ecae1", "D"), "unit-90-75": ("#08306b", "D"),
    "unit-ramp-99-90": ("#17becf", "P"),
}  # fmt: skip
"""Colour and marker."""


def plot(runs: Sequence[Found], title: str, target: Path) -> None:
    """Accuracy by share removed: ours above, with one deviation either side, the published below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=90, layout="constrained")
    panels = figure.subplots(2, 2, sharex="row")
    for column, what in enumerate(("weights", "units")):
        for name in of(runs, what):
            color, marker = STYLES[name]
            style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.4, "label": ROWS[name].title}
            found = [values(runs, name, what, share) for share in TENTHS]
            deviations = [statistics.stdev(numbers) if len(numbers) > 1 else 0.0 for numbers in found]
            x, means = [100 * share for share in SHARES], [statistics.mean(numbers) for numbers in found]
            panels[0][column].errorbar(x, means, deviations, capsize=2, **style)
            cited = {100 * float(s): a for s, a in PUBLISHED[what].get(name, {}).items() if s in TENTHS}
            panels[1][column].plot(list(cited), list(cited.values()), **style)
        for axes, where in zip(panels[:, column], (title, "published, ResNet-32, 256 epochs, one run"), strict=True):
            axes.set(
                title=f"{what}: {where}",
                xlabel=f"{what} removed after training, %",
                ylabel="test accuracy, %",
                ylim=(0, 100),
            )
            axes.grid(color="#e0e0e0", linewidth=0.7)
            axes.legend(frameon=False, fontsize=8, loc="best", ncols=2)
    with staged_file(target) as path:
        figure.savefig(path)


_SHARED = ("settings", "machine", "tested", "device", "steps")


def write(
    runs: Sequence[Found],
    args: argparse.Namespace,
    script: str,
    render: Callable[[Found, Path], str],
    more: Found | None = None,
) -> str:
    """Put JSON (the runs and `more`), tables and plot in place; the tables are returned."""
    if not runs:
        raise SystemExit(f"no finished runs in {args.output}")
    size, seeds = "full" if args.full else "quick", sorted({run["seed"] for run in runs})
    document = {
        "command": f"python benchmarks/reproduce/{script}.py all --{size} --seeds {' '.join(map(str, seeds))}",
        **{key: runs[0][key] for key in _SHARED},
        "commits": sorted({run["commit"] for run in runs}),
        "seeds": seeds,
        "runs": [{key: value for key, value in run.items() if key not in (*_SHARED, "commit")} for run in runs],
        **(more or {}),
    }
    found = json.loads(json.dumps(document), parse_float=lambda text: round(float(text), 5))
    target = args.results / f"{script}_{size}"
    with staged_file(target.with_suffix(".json")) as path:
        path.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    text = render(found, target)
    with staged_file(target.with_suffix(".md")) as path:
        path.write_text(text + "\n", encoding="utf-8")
    return text
