"""How much of the removed work shows as time: BERT's shape from config, half of the heads and of the FFN removed.

    python benchmarks/efficiency.py [--layers 12] [--sequence 128] [--threads 1] [--rounds 50 100] [--repeat 2]
                                    [--files DIR] [--html PAGE.html]

Prints the speed-ups with their intervals, the efficiency (speed-up over FLOP ratio), where the rest of the time goes by
operator, and whether the runs of the comparison agree. Needs no data and no download: latency depends on shapes only.
With --files the ONNX files are kept there, and a second call measures without making them again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from latency import pruned
from transformers import BertConfig, BertForSequenceClassification

from td_plugin.export import benchmark, quantize, to_onnx
from td_plugin.export.latency import LatencyReport
from td_plugin.export.operator_profile import profile_operators
from td_plugin.export.repeats import repeat

LEVEL = 0.5  # of heads and of FFN neurons
NAMES = ("dense", "pruned", "dense int8", "pruned int8")


def make(folder: Path, layers: int) -> dict[str, Path]:
    """The four files; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name.replace(' ', '.')}.{layers}.onnx" for name in NAMES}
    if not all(path.exists() for path in files.values()):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers)).eval()
        ids = torch.randint(1, 1000, (2, 16))
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, candidate in (("dense", model), ("pruned", pruned(model, LEVEL))):
            to_onnx(candidate, files[name], example)
            quantize(files[name], files[f"{name} int8"])
    return files


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, nargs=2, default=(50, 100), metavar=("LEAST", "MOST"))
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--html", type=Path)
    return parser.parse_args()


def measure(files: dict[str, Path], args: argparse.Namespace) -> None:
    """Time, profile and print."""
    ids = torch.randint(1, 1000, (args.batch, args.sequence), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    least, most = args.rounds

    def compare(seed: int) -> LatencyReport:
        return benchmark(files, inputs, threads=args.threads, rounds=(least, most), seed=seed, progress=True)

    again = repeat(compare, args.repeat)
    shown = {name: files[name] for name in ("dense", "pruned", "pruned int8")}
    operators = profile_operators(shown, inputs, threads=args.threads, runs=10)
    report = again.reports[0].with_results(operators=operators)
    print(report, again, sep="\n\n")
    if args.html:
        report.to_html(args.html, title="BERT's shape, half of the heads and of the FFN removed")


def main() -> None:
    """Make the files, or take those of --files, and measure."""
    args = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(make(args.files or Path(folder), args.layers), args)


if __name__ == "__main__":
    main()
