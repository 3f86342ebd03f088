"""What targeted dropout adds to a step of one and the same copy of a model, its masks taken off and put on in turn.

    python benchmarks/overhead_one_copy.py [--device cpu|cuda] [--pairs 30] [--threads 2] [--rows weights,units]
                                           [--layers 12] [--output build/overhead] [--quick]

`overhead.py` gives each row a copy of its own, and where a copy lies in memory moves its step by several percent. Here
both sides of a pair share parameters, gradients, optimizer and memory: one step with the masks, one without, in random
order on the same batch. Without means without: the modules have their own classes, nothing ranks or draws. Methods that
keep more than masks from step to step cannot be taken off like this, so only our rows are here.

With fewer layers more pairs fit into the time. The vocabulary is then 1,000 words, for the optimizer's step over an
embedding of 30,522 would hide what the layers cost.

"Off, again" pairs two steps without masks in the same way: what this comparison shows where nothing differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from overhead_measure import Setting, compared, in_turn
from overhead_report import machine
from overhead_rows import ALPHA, GAMMA, ROWS, Variant
from torch import nn

from td_plugin.files import staged_file
from td_plugin.parametrization import masks_of

WARMUP = 3
MASKS = "_td_masks"


@contextmanager
def masks_off(model: nn.Module) -> Iterator[None]:
    """The plain model inside the block: its modules' own classes, no masks."""
    masked = list(dict.fromkeys(module for module, _, _ in masks_of(model)))
    states = [(module, type(module), module.__dict__.pop(MASKS)) for module in masked]
    for module, _, state in states:
        module.__class__ = state.base
    try:
        yield
    finally:
        for module, cls, state in states:
            module.__dict__[MASKS] = state
            module.__class__ = cls


def sides(setting: Setting, variant: Variant, *, training: bool) -> dict[str, Callable[[dict[str, Any]], object]]:
    """What is timed: the step with masks, the one without, and that again. Taking masks off takes 0.1 ms."""

    def step(batch: dict[str, Any]) -> None:
        if training:
            variant.step(batch, setting.autocast)
            return
        with torch.no_grad(), setting.autocast():
            variant.forward(**batch)

    def off(batch: dict[str, Any]) -> None:
        with masks_off(variant.model), patch.object(variant, "begin", lambda: None):
            step(batch)

    return {"on": step, "off": off, "off, again": off}


def paired(setting: Setting, variant: Variant, args: argparse.Namespace, label: str, *, training: bool) -> Any:
    """Both sides of every pair, for the masks and for the control, against the steps without masks."""
    variant.model.train(training)
    steps = sides(setting, variant, training=training)
    in_turn(setting, steps, WARMUP, 0, f"{label}, warm-up")
    seconds, _ = in_turn(setting, steps, args.pairs, 1, label)
    base = seconds.pop("off")
    return {name: {**compared(taken, base), "seconds": taken, "base": base} for name, taken in seconds.items()}


def measure(args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """All rows, one after the other, each on a copy made for it."""
    rows: dict[str, Any] = {}
    for name in args.rows:
        variant = setting.build(name, setting.model())
        for training in (True, False):
            kind = "training" if training else "evaluation"
            rows[f"{name}, {kind}"] = paired(setting, variant, args, f"{name}, {kind}", training=training)
    return rows


def text(found: dict[str, Any]) -> str:
    """Conditions and the table."""
    setting = found["setting"]
    conditions = (
        f"`{found['command']}`: {', '.join(f'{key} {value}' for key, value in found['machine'].items())}."
        f" {setting['layers']} layers of {setting['hidden']}, batch {setting['batch']} × {setting['sequence']},"
        f" {setting['dtype']}; {setting['pairs']} pairs; γ = {GAMMA}, α = {ALPHA}."
    )
    lines = [
        "| one copy, masks on and off | median ms | over off, %: median [95 %] | of means | of minima |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in found["rows"].items():
        for side, numbers in row.items():
            percent = [f"{100 * numbers[key]:+.1f}" for key in ("median", "low", "high", "of_means", "of_minima")]
            title = name if side == "on" else f"{name}, {side}"
            lines.append(
                f"| {title} | {numbers['median_ms']:.1f} | {percent[0]} [{percent[1]}, {percent[2]}] |"
                f" {percent[3]} | {percent[4]} |"
            )
    return f"{conditions}\n\n" + "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ours = [name for name, row in ROWS.items() if row.ours]
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=lambda words: words.split(","), default=["weights", "units"])
    parser.add_argument("--layers", type=int, default=12, help="of BERT-base; fewer: more pairs in the same time")
    parser.add_argument("--output", type=Path, default=Path("build/overhead"))
    parser.add_argument("--quick", action="store_true", help="2 layers, batch 2 x 32, 3 pairs: shows that it runs")
    args = parser.parse_args()
    if unknown := sorted(set(args.rows) - set(ours)):
        parser.error(f"unknown rows {', '.join(unknown)}; there are {', '.join(ours)}")
    if args.quick:
        args.pairs = min(args.pairs, 3)
    if args.pairs < 1:
        parser.error("at least one pair")
    return args


def main() -> None:
    """Measure, write JSON and Markdown, print the table."""
    args = parse()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    cuda = args.device == "cuda"
    dtype, batch = ("bfloat16", 32) if cuda else ("float32", 8)
    vocabulary = 30522 if args.layers == 12 else 1000
    setting = Setting(args.device, dtype, False, args.layers, 768, vocabulary, batch, 128)
    if args.quick:
        setting = Setting(args.device, dtype, False, 2, 64, 1000, 2, 32)
    words = [word for word in sys.argv[1:] if word != "--output" and word != str(args.output)]
    found = {
        "command": " ".join(["python benchmarks/overhead_one_copy.py", *words]),
        "machine": machine(args.device),
        "setting": {**vars(setting), "pairs": args.pairs},
        "rows": measure(args, setting),
    }
    for suffix, content in (("json", json.dumps(found, indent=1) + "\n"), ("md", text(found))):
        with staged_file(args.output / f"overhead_one_copy_{args.device}.{suffix}") as path:
            path.write_text(content, encoding="utf-8")
    print(text(found))


if __name__ == "__main__":
    main()
