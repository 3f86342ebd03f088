"""Rows, table and plot of `benchmarks/refresh.py`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from refresh_tasks import SETTINGS

from td_plugin.files import staged_file

Spread = tuple[float, float | None]
"""Mean and standard deviation over the seeds; one seed has none."""


def spread(values: list[float]) -> Spread:
    """Mean and standard deviation; one value has none."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per task and N, tasks in the order of `SETTINGS`; pairs are (mean, standard deviation) over the seeds."""
    rows = []
    loss = {(run["task"], run["refresh_every"], run["seed"]): run["pruned"]["loss"] for run in runs}
    for task, every in sorted({key[:2] for key in loss}, key=lambda key: (list(SETTINGS).index(key[0]), key[1])):
        these = [run for run in runs if (run["task"], run["refresh_every"]) == (task, every)]
        seeds = [run["seed"] for run in these]
        row: dict[str, Any] = {"task": task, "refresh_every": every, "seeds": seeds}
        for state in ("dense", "pruned"):
            for what in ("loss", "accuracy"):
                row[f"{state}_{what}"] = spread([run[state][what] for run in these])
        pairs = [(loss[task, every, seed], loss[task, 1, seed]) for seed in seeds if (task, 1, seed) in loss]
        row["difference"] = spread([mine - exact for mine, exact in pairs]) if pairs and every != 1 else None
        row["within_noise"] = None
        if row["difference"] and len(pairs) > 1:
            noise = statistics.mean(statistics.variance(arm) for arm in zip(*pairs, strict=True)) ** 0.5
            row["within_noise"] = abs(row["difference"][0]) <= noise
        for what in ("overlap", "candidate_share"):
            row[what] = statistics.mean(value for run in these for value in run[what]) if every else None
        row["cpu_seconds"] = statistics.mean(run["cpu_seconds"] for run in these)
        rows.append(row)
    return rows


def _pair(pair: Spread | None, digits: int, scale: float = 1.0) -> str:
    if pair is None:
        return ""
    mean, deviation = pair
    return f"{scale * mean:.{digits}f}" + ("" if deviation is None else f" ± {scale * deviation:.{digits}f}")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table; accuracies in percent."""
    header = (
        "task",
        "N",
        "dense loss",
        "dense accuracy",
        "pruned loss",
        "pruned accuracy",
        "pruned loss − that of N = 1",
    )
    header += ("within seed noise", "candidates unchanged (Jaccard)", "candidates", "seeds", "CPU s per run")
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [row["task"], str(row["refresh_every"] or "no dropout")]
        for state in ("dense", "pruned"):
            cells += [_pair(row[f"{state}_loss"], 3), _pair(row[f"{state}_accuracy"], 1, 100)]
        cells += [_pair(row["difference"], 3), {None: "", True: "yes", False: "no"}[row["within_noise"]]]
        cells += ["" if row[what] is None else f"{row[what]:.4f}" for what in ("overlap", "candidate_share")]
        lines.append(f"| {' | '.join(cells)} | {len(row['seeds'])} | {row['cpu_seconds']:.0f} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Pruned and dense loss against N, a panel per task; bars are standard deviations over the seeds."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(3.4 * len(tasks), 3.2), dpi=150, layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        these = [row for row in rows if row["task"] == task and row["refresh_every"]]
        for state, colour in (("pruned", "#0072b2"), ("dense", "#4d4d4d")):
            mean, deviation = zip(*(row[f"{state}_loss"] for row in these), strict=True)
            bars = [value or 0.0 for value in deviation]
            every = [row["refresh_every"] for row in these]
            axes.errorbar(every, mean, bars, label=state, color=colour, marker="o", markersize=4, capsize=3)
        axes.set(title=task, xscale="log", xlabel="ranked every N steps", ylabel="held-out loss")
        axes.grid(color="#e0e0e0", linewidth=0.7)
        axes.legend(frameon=False)
    with staged_file(target) as path:
        figure.savefig(path)
