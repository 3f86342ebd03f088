"""How much the loss depends on the weights that pruning removes: |ΔE|, with targeted dropout and without.

    python benchmarks/reproduce/dependence.py all --quick --train cifar10_train.parquet --test cifar10_test.parquet
    python benchmarks/reproduce/dependence.py report

Gomez et al., arXiv 1905.13678: one hidden layer of 10 units on CIFAR-10, 75 % of its weights removed, α = 0.5, SGD at
0.001 for 200 epochs: |ΔE| = 0.1207 without targeted dropout, 0.0146 with it. Here that network (`benchmarks/toy.py`)
and the residual network of `resnet.py`, whose models it takes where they are there.

`--quick`: the small network on 20,000 rows, a quarter of them held out and judged, 60 epochs at 0.01; 3 seeds, a few
minutes; and α 0.5, γ 0.75 for the residual network: 3 models besides 4 × 3 of those of `resnet.py`. About 8 minutes on
two cores if those are there. `--full`: 50,000 rows, 200 epochs at 0.001; the residual network of the authors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from resnet_report import spread, table, write
from resnet_rows import JUDGED, ROWS
from resnet_runs import Found, completed, finished, parser, train

from td_plugin.files import staged_file

sys.path.append(str(Path(__file__).parent.parent))  # the small network is an older benchmark
import toy
from methods_tasks import Settings, load

COMPARED = ("none", "dropout", "td-50-75", "td-66-75", "td-75-90")
SHARES = tuple(sorted(JUDGED))
PUBLISHED = {"none": 0.120698, "targeted_weight": 0.0145907}


def small(args: argparse.Namespace) -> None:
    """Train and judge the network of one hidden layer, a file per seed."""
    rows, epochs, rate = (50_000, 200, 0.001) if args.full else (20_000, 60, 0.01)
    rows, epochs = args.rows or rows, args.epochs or epochs
    torch.set_num_threads(1)
    for seed in args.seeds:
        file = args.output / "small" / f"seed{seed}.json"
        if not file.exists():
            found = toy.compare(load(args.train, Settings(rows=rows)), epochs, rate, [seed])
            runs = {name: run for name, (run,) in found.items()}
            document = {"seed": seed, "rows": rows, "epochs": epochs, "rate": rate, "runs": runs}
            with staged_file(file) as path:
                path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def stored(args: argparse.Namespace) -> list[Found]:
    """The results of the network of one hidden layer."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((args.output / "small").glob("*.json"))]


def small_table(found: Sequence[Found]) -> str:
    """Loss and accuracy before and after pruning, and the change of the loss."""
    lines = []
    for name, published in PUBLISHED.items():
        runs = [seed["runs"][name] for seed in found]
        cells = [spread([run[key] for run in runs], 4) for key in ("loss", "pruned_loss", "change", "train_change")]
        cells += [spread([100 * run[key] for run in runs]) for key in ("accuracy", "pruned_accuracy")]
        lines.append(["none" if name == "none" else "TD α 0.5 γ 0.75", *cells, f"{published:.4f}"])
    ratios = [seed["runs"]["none"]["change"] / seed["runs"]["targeted_weight"]["change"] for seed in found]
    header = ["training", "loss", "loss, 75 % removed", "change |ΔE|", "on training rows", "accuracy, %", "pruned, %"]
    text = f"Without targeted dropout the loss changes {spread(ratios)} times as much; published: 8.3 times."
    return table([*header, "published |ΔE|"], lines) + "\n\n" + text


def changes(runs: Sequence[Found], name: str, share: float) -> list[float]:
    """``|E(pruned) - E(dense)|`` on the test rows, of all seeds."""
    found = [run["weights"] for run in runs if run["method"] == name and f"{share:g}" in run.get("weights", {})]
    return [abs(losses[f"{share:g}"]["loss"] - losses["0"]["loss"]) for losses in found]


def residual_table(runs: Sequence[Found]) -> str:
    """The change of the loss by share removed, one column per training."""
    names = [name for name in COMPARED if changes(runs, name, 0.5)]
    lines = [
        [f"{100 * share:g} %", *(spread(changes(runs, name, share), 4) for name in names)] for share in SHARES if share
    ]
    return table(["weights removed", *(ROWS[name].title for name in names)], lines)


def plot(found: Sequence[Found], runs: Sequence[Found], target: Path) -> None:
    """Both networks, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    if found:
        _bars(left, found)
    colours = dict(zip(COMPARED, ("#4d4d4d", "#9467bd", "#9ecae1", "#4292c6", "#08306b"), strict=True))
    for name in (name for name in COMPARED if changes(runs, name, 0.5)):
        shares = [share for share in SHARES if share and changes(runs, name, share)]
        means = [statistics.mean(changes(runs, name, share)) for share in shares]
        x = [100 * share for share in shares]
        right.plot(x, means, color=colours[name], marker="o", markersize=4, label=ROWS[name].title)
    right.set(title="residual network", xlabel="weights removed after training, %", ylabel="|ΔE|, test rows, nats")
    right.set_yscale("log")
    for axes in (left, right):
        axes.grid(color="#e0e0e0", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=8)
    with staged_file(target) as path:
        figure.savefig(path)


def _bars(axes: Any, found: Sequence[Found]) -> None:
    ours = [[seed["runs"][name]["change"] for seed in found] for name in PUBLISHED]
    deviations = [statistics.stdev(numbers) if len(numbers) > 1 else 0.0 for numbers in ours]
    axes.bar([-0.2, 0.8], list(map(statistics.mean, ours)), 0.35, yerr=deviations, color="#4292c6", label="here")
    axes.bar([0.2, 1.2], list(PUBLISHED.values()), 0.35, color="#bdbdbd", label="published")
    axes.set_xticks([0, 1], ["none", "TD α 0.5 γ 0.75"])
    axes.set(title="one hidden layer of 10 units, 75 % removed", ylabel="|ΔE|, nats")


def report(args: argparse.Namespace) -> str:
    """Write JSON, tables and plot; the tables are returned."""
    runs = [r for r in finished(args.output, args.settings, ("weights", "dependence")) if r["method"] in COMPARED]
    return write(runs, args, "dependence", render, {"small": stored(args)})


def render(found: Found, picture: Path) -> str:
    """The tables, and the plot beside them, of the file that `write` leaves."""
    plot(found["small"], found["runs"], picture.with_suffix(".png"))
    parts = ["**One hidden layer of 10 units**", small_table(found["small"])] if found["small"] else []
    return "\n\n".join([*parts, "**The residual network, |ΔE| on the test rows**", residual_table(found["runs"])])


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, then write and print the tables."""
    args = completed(parser(__doc__).parse_args(arguments))
    if args.stage != "report":
        train(args, ("dependence",), tuple(name for name in COMPARED if name != "td-50-75"))
        small(args)
    if args.stage != "train":
        print(report(args))


if __name__ == "__main__":
    main()
