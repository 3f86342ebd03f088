"""Tables and the plot of `translation.py`, and the published numbers beside them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_report import TENTHS, spread, table
from resnet_rows import SHARES

from td_plugin.files import staged_file

Found = dict[str, Any]

TITLES: Mapping[str, str] = {
    "none": "none",
    "td-66-75": "TD α 0.66 γ 0.75",
    "td-66-90": "TD α 0.66 γ 0.90",
    "dropconnect": "DropConnect 0.495",
}
KEYS: Mapping[str, str] = {"bleu": "BLEU", "accuracy": "token accuracy, %"}
PUBLISHED: Mapping[str, Mapping[str, Sequence[float]]] = {
    "bleu": {
        "none": (26.01, 26.05, 25.90, 25.91, 25.81, 25.08, 23.31, 8.89, 0.24, 0.01),
        "td-66-75": (26.52, 26.44, 26.48, 26.30, 26.20, 26.03, 25.62, 24.07, 12.39, 0.07),
        "td-66-90": (25.32, 25.32, 25.19, 25.27, 24.97, 24.93, 24.27, 22.41, 10.57, 0.64),
    },
    "accuracy": {
        "none": (62.29, 62.54, 62.21, 62.33, 61.81, 60.82, 58.13, 48.40, 25.80, 6.90),
        "td-66-75": (58.31, 59.00, 59.39, 58.66, 59.39, 57.71, 58.42, 55.39, 47.09, 21.64),
        "td-66-90": (57.41, 58.10, 58.52, 57.86, 58.67, 57.08, 57.96, 54.85, 46.63, 27.02),
    },
}
"""Transformer, WMT newstest2014 EN-DE, 0 to 90 % of weights removed: Gomez et al., arXiv 1905.13678, its table."""


def values(runs: Sequence[Found], name: str, key: str, share: str) -> list[float]:
    """Of all seeds; accuracy in percent."""
    return [(100 if key == "accuracy" else 1) * run[key][share] for run in runs if run["method"] == name]


def gains(runs: Sequence[Found], name: str, key: str, share: str) -> list[float]:
    """Over the runs of the same seeds without targeted dropout."""
    by_seed = {(run["method"], run["seed"]): values([run], run["method"], key, share)[0] for run in runs}
    seeds = sorted({seed for _, seed in by_seed if {(name, seed), ("none", seed)} <= set(by_seed)})
    return [by_seed[name, seed] - by_seed["none", seed] for seed in seeds]


def methods_of(runs: Sequence[Found]) -> list[str]:
    """Those that have runs, in the order of `TITLES`."""
    return [name for name in TITLES if any(run["method"] == name for run in runs)]


def columns(runs: Sequence[Found], key: str) -> str:
    """One line per share: ours, mean ± deviation over seeds, then the published."""
    names = methods_of(runs)
    cited = [name for name in names if name in PUBLISHED[key]]
    lines = [
        [
            f"{100 * float(share):g} %",
            *(spread(values(runs, name, key, share)) for name in names),
            *(f"{PUBLISHED[key][name][index]:.2f}" for name in cited),
        ]
        for index, share in enumerate(TENTHS)
    ]
    header = ["weights removed", *(f"here: {TITLES[name]}" for name in names)]
    return table([*header, *(f"published, WMT: {TITLES[name]}" for name in cited)], lines)


def gained(runs: Sequence[Found], key: str) -> str:
    """Targeted dropout minus none, of equal seeds, and the published difference."""
    names = [name for name in methods_of(runs) if name != "none" and gains(runs, name, key, "0")]
    cited, lines = PUBLISHED[key], []
    for index, share in enumerate(TENTHS):
        cells = [f"{100 * float(share):g} %"]
        for name in names:
            cells.append(signed(gains(runs, name, key, share)))
            cells.append(f"{cited[name][index] - cited['none'][index]:+.2f}" if name in cited else "")
        lines.append(cells)
    header = [cell for name in names for cell in (f"here: {TITLES[name]}", "published, WMT")]
    return table(["weights removed", *header], lines) if names else ""


def signed(numbers: Sequence[float]) -> str:
    """Mean ± deviation, the mean with its sign."""
    return f"{'+' if statistics.mean(numbers) >= 0 else ''}{spread(numbers)}"


def markdown(runs: Sequence[Found], tested: str) -> str:
    """All tables."""
    parts = []
    for key, title in KEYS.items():
        parts += [f"**{title}** (here: {tested}; published: WMT newstest2014)", columns(runs, key)]
        parts += [f"**{title}: targeted dropout minus none**", gained(runs, key)]
    return "\n\n".join(part for part in parts if part)


STYLES: Mapping[str, tuple[str, str]] = {
    "none": ("#4d4d4d", "o"),
    "td-66-75": ("#4292c6", "D"),
    "td-66-90": ("#08306b", "s"),
    "dropconnect": ("#9467bd", "^"),
}
"""Colour and marker."""


def plot(runs: Sequence[Found], title: str, target: Path) -> None:
    """BLEU and token accuracy by share removed: ours left, with one deviation either side, the published right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=90, layout="constrained")
    panels, x = figure.subplots(2, 2, sharex=True), [100 * share for share in SHARES]
    for (ours, theirs), (key, label) in zip(panels, KEYS.items(), strict=True):
        for name in methods_of(runs):
            color, marker = STYLES[name]
            style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.4, "label": TITLES[name]}
            found = [values(runs, name, key, share) for share in TENTHS]
            deviations = [statistics.stdev(numbers) if len(numbers) > 1 else 0.0 for numbers in found]
            ours.errorbar(x, [statistics.mean(numbers) for numbers in found], deviations, capsize=2, **style)
            if name in PUBLISHED[key]:
                theirs.plot(x, PUBLISHED[key][name], **style)
        for axes, where in ((ours, title), (theirs, "published: Transformer, WMT EN-DE")):
            axes.set(title=where, xlabel="weights removed after training, %", ylabel=label)
            axes.set_ylim(bottom=0)
            axes.grid(color="#e0e0e0", linewidth=0.7)
            axes.legend(frameon=False, fontsize=9, loc="lower left")
    with staged_file(target) as path:
        figure.savefig(path)


def render(found: Found, picture: Path) -> str:
    """The tables, and the plot beside them, of the file that `translation.py` leaves."""
    settings = found["settings"]
    size = f"{settings['layers']} + {settings['layers']} layers of {settings['width']}"
    plot(found["runs"], f"here: {size}, {settings['epochs']} epochs", picture.with_suffix(".png"))
    return markdown(found["runs"], found["tested"])
