"""Two short runs of one encoder on SST-2, one that goes well and one that does not: the pictures of "Reading your run".

    python benchmarks/reading.py train --model DIR --train sst2_train.parquet --validation sst2_dev.parquet \
        --name good --output history
    python benchmarks/reading.py train ... --name bad --learning-rate 2e-3 --output history
    python benchmarks/reading.py draw history/good.json docs/results/reading_good.png

`train` keeps the Trainer's `log_history`; `draw` makes a picture of one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

import td_plugin as td
from td_plugin.export.svg import COLOURS
from td_plugin.files import staged_file
from td_plugin.integrations.classifiers import load_classifier
from td_plugin.integrations.config import DataConfig, TrainConfig
from td_plugin.integrations.data import load_data
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.integrations.training import make_trainer

BATCH, LOG, EVALUATE = 16, 10, 30


def train(args: argparse.Namespace) -> None:
    """One run; its history goes to ``<output>/<name>.json``."""
    torch.set_num_threads(1)
    set_seed(0)
    data = load_data(DataConfig(args.train, args.validation, max_train_samples=args.samples), seed=0)
    classifier = load_classifier(args.model, data, 64)
    ramp = td.Ramp(end=args.ramp, freeze=0.85)
    callback = TargetedDropoutCallback(td.recipes.ramping_targeted_unit(0.9), args.level, ramp=ramp)
    config = TrainConfig(2, BATCH, args.learning_rate, 0, bf16=False)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(classifier, config, scratch, [callback])
        trainer.args.max_steps, trainer.args.logging_steps = args.steps, LOG
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, EVALUATE
        trainer.train()
    run = {"learning_rate": args.learning_rate, "ramp": args.ramp, "level": args.level, "steps": args.steps}
    with staged_file(args.output / f"{args.name}.json") as path:
        path.write_text(json.dumps({"run": run, "history": trainer.state.log_history}, indent=1) + "\n")


def draw(args: argparse.Namespace) -> None:
    """A picture of one history: loss and accuracy above, what is dropped below."""
    saved = json.loads(args.history.read_text())
    run, history = saved["run"], saved["history"]
    figure = Figure(figsize=(8.0, 7.0), dpi=110, layout="constrained")
    panels: list[Axes] = list(figure.subplots(4, 1, sharex=True))
    lines: list[list[tuple[str, str]]] = [
        [("training loss", "loss"), ("accuracy, pruned\nto the target γ", "eval_accuracy")],
        [("γ now", "td_sparsity_level"), ("α now", "td_drop_rate"), ("dropped in\nthis step", "td_dropped")],
        [("survival", "td_survival")],
        [("churn since\nthe last log", "td_churn")],
    ]
    for axes, wanted in zip(panels, lines, strict=True):
        for (label, key), colour in zip(wanted, COLOURS, strict=False):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker="o", markersize=2.5, linewidth=1.5)
        _style(axes)
    panels[0].set_ylim(0, None)
    panels[1].set_ylim(-0.03, 1.05)
    panels[2].set_ylim(-0.03, 1.05)
    panels[3].set_ylim(0, None)
    for axes in panels[1:]:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].set_title(f"learning rate {run['learning_rate']:g}, ramp over {run['ramp']:.0%} of the run", loc="left")
    panels[-1].set_xlabel("optimizer step")
    with staged_file(args.picture) as path:
        figure.savefig(path)


def _style(axes: Any) -> None:
    axes.grid(color="#e0e0e0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train")
    for name in ("model", "train", "validation", "name"):
        one.add_argument(f"--{name}", required=True)
    one.add_argument("--output", type=Path, required=True)
    one.add_argument("--learning-rate", type=float, default=1e-4)
    one.add_argument("--ramp", type=float, default=0.6)
    one.add_argument("--level", type=float, default=0.5)
    one.add_argument("--steps", type=int, default=300)
    one.add_argument("--samples", type=int, default=3000)
    two = commands.add_parser("draw")
    two.add_argument("history", type=Path)
    two.add_argument("picture", type=Path)
    args = parser.parse_args()
    {"train": train, "draw": draw}[args.command](args)


if __name__ == "__main__":
    main()
