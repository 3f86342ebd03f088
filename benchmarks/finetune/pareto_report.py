"""Tables and the plot of `pareto.py`, from what is on disk."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pareto_methods import ROWS

from td_plugin.export.plots import plot_tradeoff
from td_plugin.files import staged_file

Run = dict[str, Any]

OURS = ("targeted-kd", "shorter-targeted-kd")
"""Methods whose quantized files are drawn, too."""


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, in percent; of one value the value."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def grouped(runs: Sequence[Run]) -> dict[tuple[str, float], list[Run]]:
    """The runs of all seeds, by method and γ."""
    found: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        found.setdefault((run["method"], run["level"]), []).append(run)
    return dict(sorted(found.items(), key=lambda item: (list(ROWS).index(item[0][0]), item[0][1])))


def table(dense: Sequence[Run], runs: Sequence[Run], speedups: Mapping[str, Any]) -> str:
    """One line per method and γ: accuracy in fp32 and int8, parameters, speed-up of both files."""
    header = ["method", "γ", "test accuracy, fp32", "points below dense", "speed-up, fp32", "test accuracy, int8"]
    header += ["speed-up, int8", "parameters", "learning rate", "held out", "seeds"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    base = statistics.mean(run["test"] for run in dense)
    for (method, level), found in {("", 0.0): list(dense), **grouped(runs)}.items():
        name = "dense" if not method else next((run["name"] for run in found if run["seed"] == 0), found[0]["name"])
        cells = [
            ROWS[method].title if method else "**dense**",
            f"{level:g}" if level else "",
            spread([run["test"] for run in found]),
            f"{100 * (base - statistics.mean(run['test'] for run in found)):+.1f}" if method else "",
            faster(speedups.get(name)) if method else "1",
            spread([run["test_int8"] for run in found]),
            faster(speedups.get(f"{name} int8")),
            f"{found[0]['parameters'] / 1e6:.1f} M",
            f"{found[0]['learning_rate']:g}" if found[0].get("learning_rate") else "",
            spread([run["held_out"] for run in found]),
            str(len(found)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def faster(speedup: Mapping[str, float] | None) -> str:
    """Median and interval of a speed-up."""
    return f"{speedup['median']:.2f} [{speedup['low']:.2f}, {speedup['high']:.2f}]" if speedup else ""


def curves(dense: Sequence[Run], runs: Sequence[Run], speedups: Mapping[str, Any]) -> dict[str, list[Any]]:
    """By method, (speed-up, mean accuracy) of every γ, from the dense model on; ours in int8 as well."""
    origin = (1.0, statistics.mean(run["test"] for run in dense))
    found: dict[str, list[Any]] = {}
    for (method, _), group in grouped(runs).items():
        if method.startswith("dense"):
            continue
        name = next((run["name"] for run in group if run["seed"] == 0), group[0]["name"])
        if name in speedups:
            points = found.setdefault(ROWS[method].title, [origin])
            points.append((speedups[name]["median"], statistics.mean(run["test"] for run in group)))
        if method in OURS and f"{name} int8" in speedups:
            start = (speedups["dense int8"]["median"], statistics.mean(run["test_int8"] for run in dense))
            points = found.setdefault(f"{ROWS[method].title}, int8", [start])
            points.append((speedups[f"{name} int8"]["median"], statistics.mean(run["test_int8"] for run in group)))
    return found


def render(found: Mapping[str, Any], picture: Path) -> str:
    """Draw the plot and return the table of what `write` has put into a file."""
    dense, runs, latency = found["dense"], found["runs"], found["latency"]
    conditions = f"onnxruntime, batch 1 × {latency['sequence']} tokens, 1 thread"
    plot_tradeoff(curves(dense, runs, latency["speedups"]), picture, title=found["title"], conditions=conditions)
    return table(dense, runs, latency["speedups"])


def joined(earlier: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """One report of two: where both have a run, or a speed-up, `found` has the say."""
    runs = {}
    for key in ("dense", "runs"):
        named = {(run["method"], run["level"], run["seed"]): run for run in (*earlier[key], *found[key])}
        runs[key] = list(named.values())
    latency = {**earlier["latency"], **found.get("latency", {})}
    if latency["sequence"] != earlier["latency"]["sequence"]:
        raise SystemExit(f"timed at {earlier['latency']['sequence']} tokens before, at {latency['sequence']} now")
    latency["speedups"] = earlier["latency"]["speedups"] | latency["speedups"]
    made = [*earlier.get("earlier", []), {key: earlier.get(key, "") for key in ("command", "commit")}]
    return {**earlier, **found, **runs, "latency": latency, "earlier": made}


def write(name: str, found: Mapping[str, Any], target: Path, *, add: bool = False) -> str:
    """Put JSON, Markdown and PNG in place; the table is returned.

    Args:
        name: of the files.
        found: `title`, `command`, `commit`, `dense` and `runs` (results with their test accuracies), `latency`.
        target: folder.
        add: to what is there.
    """
    if add:
        found = joined(json.loads((target / f"{name}.json").read_text(encoding="utf-8")), found)
    elif "latency" not in found:
        raise SystemExit("no speed has been measured: run the stage 'deploy' with seed 0 first")
    with staged_file(target / f"{name}.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = render(found, target / f"{name}.png")
    with staged_file(target / f"{name}.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    return text
