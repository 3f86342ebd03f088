"""Table and plot of `decoder.py`, from what is on disk."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decoder_models import ROWS
from decoder_time import WAYS

from td_plugin.files import staged_file

Run = dict[str, Any]
SHORT = {"torch": "torch, cached", "cached": "onnxruntime, cached", "prefill": "onnxruntime, 64 at once"}
STYLES = {
    "dense": ("#4d4d4d", "*"), "targeted": ("#08306b", "o"), "gradual": ("#ff7f0e", "s"), "magnitude": ("#d62728", "v"),
    "narrow": ("#2ca02c", "D"),
}  # fmt: skip
"""Colour and marker."""


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{deviation}"


def grouped(runs: Sequence[Run]) -> dict[tuple[str, float], list[Run]]:
    """The runs of all seeds, by method and γ."""
    found: dict[tuple[str, float], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run["level"], list(ROWS).index(run["method"]), run["seed"])):
        found.setdefault((run["method"], run["level"]), []).append(run)
    return found


def timed(found: Mapping[str, Any], way: str, method: str, level: float) -> dict[str, Any] | None:
    """How fast a row is in one way; None where it has not been measured."""
    named: dict[str, Any] = found["time"]["ways"].get(way, {})
    return named.get(f"{method}-{level:g}")


def markdown(found: Mapping[str, Any]) -> str:
    """One line per method and γ."""
    header = ["model", "γ", "perplexity, test", "perplexity, held out", "parameters"]
    header += [f"tokens/s, {SHORT[way]} (speed-up [95 %])" for way in WAYS] + ["minutes", "seeds"]
    lines = [header, ["---"] * len(header)]
    for (method, level), runs in grouped(found["runs"]).items():
        speeds = []
        for way in WAYS:
            speed = timed(found, way, method, level)
            faster = "" if speed is None else _faster(speed["speedup"])
            speeds.append("" if speed is None else f"{speed['tokens_per_second']:.0f}{faster if level else ''}")
        lines.append(
            [
                ROWS[method].title,
                f"{level:g}" if level else "",
                spread([run["test"] for run in runs]),
                spread([run["held_out"] for run in runs]),
                f"{runs[0]['parameters'] / 1e6:.2f} M",
                *speeds,
                spread([run["minutes"] for run in runs], 1),
                str(len(runs)),
            ]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join((f"`{found['command']}`", _conditions(found), table))


def _faster(speedup: Mapping[str, float]) -> str:
    return f" ({speedup['median']:.2f} × [{speedup['low']:.2f}, {speedup['high']:.2f}])"


def _conditions(found: Mapping[str, Any]) -> str:
    settings, steps = found["settings"], max(run["steps"] for run in found["runs"])
    model = f"GPT-2, width {settings['width']}, {settings['layers']} layers, {settings['heads']} heads"
    text = f"{found['tokens']['train']:,} tokens to train on, {found['tokens']['test']:,} to judge on"
    budget = f"{steps} steps of {settings['batch']} × {settings['block']} tokens for every row but one shot"
    rate = f"learning rate {settings['rate']:g} for all, not searched"
    ways, rounds = "; ".join(WAYS.values()), found["time"]["asked"]["rounds"]
    return (
        f"{model}, vocabulary {found['tokens']['vocabulary']}, from scratch; {text}; {budget}, {rate}. Perplexity per "
        f"token, teacher forced, of the shrunk model, in blocks of {settings['block']}; mean ± standard deviation over "
        f"seeds. Speed of seed 0, batch 1, one thread: {ways}; median of {rounds} interleaved "
        f"rounds (five times as many without a cache), speed-up over dense from paired ratios."
    )


def plot(found: Mapping[str, Any], target: Path) -> None:
    """Perplexity against tokens per second, one panel per way; what lies far above is an arrow with its value."""
    from matplotlib.figure import Figure

    groups = grouped(found["runs"])
    means = {key: statistics.mean(run["test"] for run in runs) for key, runs in groups.items()}
    trained = [mean for (method, _), mean in means.items() if method != "magnitude"]
    low, high = min(trained), max(trained)
    top = high + 0.6 * (high - low) if high > low else 1.5 * high
    figure = Figure(figsize=(13, 5), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(WAYS), sharey=True)
    for axes, way in zip(panels, WAYS, strict=True):
        for method in ROWS:
            points = [(level, timed(found, way, method, level)) for name, level in groups if name == method]
            speeds = {level: speed["tokens_per_second"] for level, speed in points if speed is not None}
            if speeds:
                _draw(
                    axes,
                    method,
                    speeds,
                    {level: [run["test"] for run in groups[method, level]] for level in speeds},
                    top,
                )
        axes.set_title(WAYS[way].replace("`", ""), fontsize=9, loc="left")
        axes.set(xlabel="tokens per second, batch 1, one thread")
        axes.set_ylim(low - 0.1 * (top - low), top)
        axes.margins(x=0.12)
        axes.grid(color="#e0e0e0", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("perplexity per token, test (lower is better)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ROWS), frameon=False, fontsize=9)
    with staged_file(target) as path:
        figure.savefig(path)


def _draw(
    axes: Any, method: str, speeds: Mapping[float, float], tests: Mapping[float, list[float]], top: float
) -> None:
    """One curve of one panel: a point per γ, with one deviation either side."""
    color, marker = STYLES[method]
    x, means = list(speeds.values()), [statistics.mean(numbers) for numbers in tests.values()]
    error = [statistics.stdev(numbers) if len(numbers) > 1 else 0.0 for numbers in tests.values()]
    style = {"color": color, "marker": marker, "markersize": 6, "linewidth": 1.3, "capsize": 2}
    axes.errorbar(x, means, error, label=ROWS[method].title, **style)
    small = {"textcoords": "offset points", "fontsize": 8, "color": color}
    for speed, level, mean in zip(x, tests, means, strict=True):
        if mean > top:
            axes.plot([speed], [top], marker="^", color=color, clip_on=False)
            axes.annotate(f"{mean:.0f} at γ {level:g}", (speed, top), xytext=(0, -12), ha="center", **small)
        elif method == "targeted":
            axes.annotate(f"γ {level:g}", (speed, mean), xytext=(0, -14), ha="center", **small)


def render(found: Mapping[str, Any], picture: Path) -> str:
    """Draw the plot and return the text of what `write` has put into a file."""
    plot(found, picture.with_suffix(".png"))
    return markdown(found)


def write(name: str, found: Mapping[str, Any], target: Path) -> str:
    """Put JSON, Markdown and PNG in place; the text is returned.

    Args:
        name: of the files.
        found: `command`, `commit`, `settings`, `tokens`, `runs` and `time`.
        target: folder.
    """
    with staged_file(target / f"{name}.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = render(found, target / name)
    with staged_file(target / f"{name}.md") as path:
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return text
