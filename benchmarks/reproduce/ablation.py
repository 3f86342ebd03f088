"""What paper, authors' code and tensor2tensor disagree about in targeted dropout, and whether it matters.

    python benchmarks/reproduce/ablation.py all --quick --train cifar10_train.parquet --test cifar10_test.parquet
    python benchmarks/reproduce/ablation.py report

Four questions, on the network, the data and the judge of `resnet.py`, whose models it takes where they are there:

* What does evaluation drop: nothing, all candidates (the authors' code, for weights), or the share γ·α that training
  drops on average (tensor2tensor)?
* Is a candidate unit dropped whole (the paper), or each of its weights by itself (both codes)?
* Are candidates that stay divided by 1 - α (tensor2tensor), or left as they are (paper, authors' code)?
* Are γ and α fixed, or ramped up?

`--quick`: 8 methods × 3 seeds besides 7 of those of `resnet.py`: about 15 minutes on two cores if those are there,
half an hour if not. `--full`: as there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_published import PUBLISHED
from resnet_report import spread, table, values, write
from resnet_rows import ROWS, SHARES, What
from resnet_runs import MASKS, Found, completed, finished, parser, train

from td_plugin.files import staged_file

MASKED = ("td-50-50", "td-66-75", "td-75-90", "ramp-99-99", "unit-50-50", "unit-90-75", "unit-ramp-99-90")


@dataclass(frozen=True)
class Pair:
    """Two trainings that differ in one thing.

    Attributes:
        question: which.
        one: name of the row that it is compared with.
        other: name of the variant.
        what: is removed.
    """

    question: str
    one: str
    other: str
    what: What

    @property
    def share(self) -> str:
        """γ, at which they are compared."""
        return f"{ROWS[self.one].level:g}"


DRAW, SCALE, RAMP = "units drawn per weight, not whole", "survivors rescaled, not left", "fixed, not ramped"
PAIRS = (
    Pair(DRAW, "unit-50-50", "unit-50-50-w", "units"),
    Pair(DRAW, "unit-90-75", "unit-90-75-w", "units"),
    Pair(SCALE, "td-50-50", "rescaled-50-50", "weights"),
    Pair(SCALE, "td-66-75", "rescaled-66-75", "weights"),
    Pair(SCALE, "td-75-90", "rescaled-75-90", "weights"),
    Pair(RAMP, "ramp-75-90", "td-75-90", "weights"),
    Pair(RAMP, "ramp-99-99", "fixed-99-99", "weights"),
    Pair(RAMP, "unit-ramp-99-90", "unit-fixed-99-90", "units"),
)


def differences(runs: Sequence[Found], pair: Pair, share: str) -> list[float]:
    """Variant minus base in points, seed by seed."""
    by_seed = {(run["method"], run["seed"]): run.get(pair.what, {}) for run in runs}
    seeds = sorted({seed for _, seed in by_seed if {(pair.one, seed), (pair.other, seed)} <= set(by_seed)})
    found = [(by_seed[pair.one, seed].get(share), by_seed[pair.other, seed].get(share)) for seed in seeds]
    return [100 * (other["accuracy"] - one["accuracy"]) for one, other in found if one and other]


def masks(runs: Sequence[Found]) -> str:
    """Accuracy "at 0 %" under each mask of evaluation, and how far accuracy falls up to γ, with what is published."""
    lines = []
    for name in MASKED:
        row, what = ROWS[name], ROWS[name].what[0]
        these = [run for run in runs if run["method"] == name and "masks" in run]
        if not these:
            continue
        cells = [spread([100 * run["masks"][mask]["accuracy"] for run in these]) for mask in MASKS]
        published = PUBLISHED[what].get(name, {})
        below = [f"{share:g}" for share in SHARES if share <= row.level]
        ours = [statistics.mean(values(these, name, what, share)) for share in below]
        flat = [published[share] for share in below] if set(below) <= set(published) else []
        cells.append(f"{published['0']:.2f}" if "0" in published else "")
        cells += [f"{max(ours) - min(ours):.2f}", f"{max(flat) - min(flat):.2f}" if flat else ""]
        lines.append([f"{what}: {row.title}", *cells])
    header = ["training", "all candidates dropped", "share γ·α dropped", "nothing dropped", "published, 0 %"]
    header += ["range from 0 to γ, nothing dropped", "published range"]
    return table(header, lines)


def variants(runs: Sequence[Found]) -> str:
    """Both sides of every pair with nothing and with γ removed, and their difference at γ."""
    lines = []
    for pair in PAIRS:
        found = differences(runs, pair, pair.share)
        if not found:
            continue
        cells = [
            spread(values(runs, name, pair.what, share))
            for share in ("0", pair.share)
            for name in (pair.one, pair.other)
        ]
        title = ROWS[pair.other].title
        lines.append([pair.question, f"{pair.what}: {title}", *cells, f"{spread(found)}"])
    header = [
        "variant",
        "training",
        "0 %: base",
        "0 %: variant",
        "γ: base",
        "γ: variant",
        "difference at γ",
    ]
    return table(header, lines)


def verdict(question: str, by_pair: Sequence[Sequence[float]]) -> list[str]:
    """The largest mean difference of a question, and whether it is more than a point and twice its standard error."""
    largest = max(by_pair, key=lambda found: abs(statistics.mean(found)))
    mean = statistics.mean(largest)
    matters = "one seed: cannot be told"
    if len(largest) > 1:
        error = statistics.stdev(largest) / len(largest) ** 0.5
        matters = "yes" if abs(mean) > max(1.0, 2 * error) else "no"
    return [question, spread(largest), matters]


def summary(runs: Sequence[Found]) -> str:
    """One line per question."""
    lines = []
    for kind in ("weights", "units"):
        found = []
        for name in (name for name in MASKED if ROWS[name].what[0] == kind):
            these = [run["masks"] for run in runs if run["method"] == name and "masks" in run]
            if these:
                found.append([100 * (m["pruned"]["accuracy"] - m["dense"]["accuracy"]) for m in these])
        if found:
            lines.append(verdict(f"{kind}: evaluation drops all candidates, not nothing", found))
    for question in (DRAW, SCALE, RAMP):
        pairs = [differences(runs, pair, pair.share) for pair in PAIRS if pair.question == question]
        if any(pairs):
            lines.append(verdict(question, [found for found in pairs if found]))
    header = ["disagreement", "largest difference, points", "more than a point and than two standard errors"]
    return table(header, lines)


def report(args: argparse.Namespace) -> str:
    """Write JSON, tables and plot; the tables are returned."""
    names = {*MASKED, *(name for pair in PAIRS for name in (pair.one, pair.other))}
    found = finished(args.output, args.settings, ("weights", "units", "ablation"))
    return write([run for run in found if run["method"] in names], args, "ablation", render)


def render(found: Found, picture: Path) -> str:
    """The tables, and the plot beside them, of the file that `write` leaves."""
    runs = found["runs"]
    plot(runs, picture.with_suffix(".png"))
    parts = ["**Which disagreement matters**", summary(runs), "**What evaluation drops** (accuracy before pruning)"]
    return "\n\n".join([*parts, masks(runs), "**Variants of training**", variants(runs)])


def plot(runs: Sequence[Found], target: Path) -> None:
    """Accuracy under each mask of evaluation, and by share removed of every pair, the variant dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=90, layout="constrained")
    first, *others = figure.subplots(2, 2).flatten()
    _bars(first, runs)
    for axes, question in zip(others, (DRAW, SCALE, RAMP), strict=True):
        pairs = [pair for pair in PAIRS if pair.question == question and differences(runs, pair, pair.share)]
        for pair, color in zip(pairs, ("#08306b", "#d62728", "#2ca02c"), strict=False):
            for name, style in ((pair.one, "-"), (pair.other, "--")):
                shares = [share for share in SHARES if values(runs, name, pair.what, f"{share:g}")]
                means = [statistics.mean(values(runs, name, pair.what, f"{share:g}")) for share in shares]
                label = f"{pair.what}: {ROWS[name].title}"
                axes.plot([100 * share for share in shares], means, style, color=color, label=label, linewidth=1.4)
        axes.set(
            title=f"dashed: {question}", xlabel="removed after training, %", ylabel="test accuracy, %", ylim=(0, 100)
        )
        axes.grid(color="#e0e0e0", linewidth=0.7)
        if pairs:
            axes.legend(frameon=False, fontsize=8, loc="best")
    with staged_file(target) as path:
        figure.savefig(path)


def _bars(axes: Any, runs: Sequence[Found]) -> None:
    names = [name for name in MASKED if any(run["method"] == name for run in runs)]
    labels = {"pruned": "all candidates dropped", "expected": "share γ·α dropped", "dense": "nothing dropped"}
    for index, (mask, color) in enumerate(zip(MASKS, ("#08306b", "#4292c6", "#bdbdbd"), strict=True)):
        found = [[100 * run["masks"][mask]["accuracy"] for run in runs if run["method"] == name] for name in names]
        means, deviations = map(statistics.mean, found), [statistics.stdev(f) if len(f) > 1 else 0.0 for f in found]
        places = [place + 0.27 * (index - 1) for place in range(len(names))]
        axes.bar(
            places, list(means), 0.25, yerr=deviations, color=color, label=labels[mask], error_kw={"linewidth": 0.8}
        )
    ticks = [f"{ROWS[name].what[0]}\n{ROWS[name].title.replace(' α', chr(10) + 'α')}" for name in names]
    axes.set_xticks(range(len(names)), ticks, fontsize=7)
    axes.set(title="what evaluation drops, before pruning", ylabel="test accuracy, %", ylim=(0, 100))
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, then write and print the tables."""
    args = completed(parser(__doc__).parse_args(arguments))
    if args.stage != "report":
        train(args, ("ablation",), MASKED)
    if args.stage != "train":
        print(report(args))


if __name__ == "__main__":
    main()
