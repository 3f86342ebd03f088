"""ResNet-32 on CIFAR-10: accuracy by share of weights or units removed after training, beside the published numbers.

    python benchmarks/reproduce/resnet.py all --quick --train cifar10_train.parquet --test cifar10_test.parquet
    python benchmarks/reproduce/resnet.py train --full --jobs 4 --minutes 9 --train ... --test ...
    python benchmarks/reproduce/resnet.py report --full

Gomez et al., arXiv 1905.13678, the tables of weight and unit pruning, of ramping targeted dropout and of random pruning
before training. A model is trained once per method and seed and judged at every share: pruned by magnitude at once,
every convolution but the stem, nothing trained afterwards. At 0 % the dense model is
judged, without the mask that evaluation has in the authors' code (`ablation.py` compares those masks).

`--quick`: 20 methods × 3 seeds of a network with one unit per stage and 16, 32 and 64 filters behind a stem with
stride 2, 10 epochs of 10,240 rows, judged on 2,000: under 40 minutes on two cores, as two processes of one thread.
L1, L0 and variational dropout run at the library's strengths, which suit short runs. `--full`: the authors' network,
256 epochs, their optimizer and strengths, bfloat16 on a GPU, `--jobs` models at once. It trains on all 50,000 rows, the
authors' code on 40,000. Nothing was tuned; the test rows are read after training.

Each finished model is a file and is not made again. With `--minutes` what is unfinished is saved in time, and the next
call goes on from there, to the bit on a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from resnet_report import markdown, plot
from resnet_runs import Found, completed, finished, parser, train

from td_plugin.files import staged_file

GROUPS = ("weights", "units", "random")


def report(args: argparse.Namespace) -> str:
    """Write JSON, tables and plot; the tables are returned."""
    runs = finished(args.output, args.settings, GROUPS)
    if not runs:
        raise SystemExit(f"no finished runs in {args.output}")
    name = f"resnet_{'full' if args.full else 'quick'}"
    text = markdown(runs)
    write_json(runs, args, name, "resnet.py")
    with staged_file(args.results / f"{name}.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    network = "ResNet-32" if args.full else "small network"
    plot(runs, f"here, {network}, {args.settings.epochs} epochs", args.results / f"{name}.png")
    return text


def write_json(
    runs: Sequence[Found], args: argparse.Namespace, name: str, script: str, more: Found | None = None
) -> None:
    """The numbers, with what they were made by, and `more`."""
    first = runs[0]
    once = {"settings", "machine", "commit", "tested", "device", "steps"}
    size = "full" if args.full else "quick"
    seeds = sorted({run["seed"] for run in runs})
    document = {
        "command": f"python benchmarks/reproduce/{script} all --{size} --seeds {' '.join(map(str, seeds))}",
        **{key: first[key] for key in ("settings", "machine", "tested", "device", "steps")},
        "commits": sorted({run["commit"] for run in runs}),
        "seeds": seeds,
        "runs": [{key: value for key, value in run.items() if key not in once} for run in runs],
        **(more or {}),
    }
    short = json.loads(json.dumps(document), parse_float=lambda text: round(float(text), 6))
    with staged_file(args.results / f"{name}.json") as path:
        path.write_text(json.dumps(short, separators=(",", ":")) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, then write and print tables, numbers and plot."""
    args = completed(parser(__doc__).parse_args(arguments))
    if args.stage != "report":
        train(args, GROUPS)
    if args.stage != "train":
        print(report(args))


if __name__ == "__main__":
    main()
