"""What blocks of zeros gain in stock onnxruntime, by the width of the groups of columns that share their rows.

    python benchmarks/block_sparse.py [--shape 768 3072] [--height 16] [--inputs 128] [--threads 1] [--rounds 60 120]
                                      [--widths 32 64 128 256] [--densities 0.5 0.25 0.1] [--seeds 0 1] [--encoder]
                                      [--quick] [--json FILE]

One matrix of random values; in every group of columns another random choice of blocks of rows is kept, equally many in
each. `block_sparse` rewrites it, `benchmark` times the two files in turn. With --encoder the same on BERT's shape with
4 layers (blocks of 16 inputs x 128 outputs in all its linear layers), in fp32 and int8. Needs no data and no download.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import BertConfig, BertForSequenceClassification

from td_plugin.export import benchmark, quantize, to_onnx
from td_plugin.export.block_sparse import block_sparse
from td_plugin.export.machine import machine
from td_plugin.report import table

WIDTHS, DENSITIES = (32, 64, 128, 256), (0.5, 0.25, 0.1)
TARGETS = {0.25: 2.0, 0.1: 4.0}
"""Density -> speed-up that is asked for, on 768 inputs and 3072 outputs, one thread."""


def block_mask(shape: Sequence[int], block: Sequence[int], density: float, seed: int) -> np.ndarray:
    """Ones in `density` of the row blocks of each column group, chosen at random, rounded to whole blocks."""
    generator = np.random.default_rng(seed)
    rows, groups = shape[0] // block[0], shape[1] // block[1]
    kept = np.zeros((rows, groups), np.float32)
    for group in range(groups):
        kept[generator.permutation(rows)[: max(1, round(rows * density))], group] = 1
    return np.kron(kept, np.ones(block, np.float32))


def save_matrix(path: Path, weight: np.ndarray) -> Path:
    """``x [batch, sequence, inputs] @ weight`` as an ONNX file."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", size])
        for name, size in zip("xy", weight.shape, strict=True)
    ]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="matrix")
    graph = helper.make_graph([node], "matrix", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def cell(folder: Path, width: int, density: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One matrix: rewritten, then timed against itself as it was."""
    generator = np.random.default_rng(seed)
    mask = block_mask(args.shape, (args.height, width), density, seed)
    weight = generator.standard_normal(args.shape).astype(np.float32) * mask
    example = {"x": generator.standard_normal((1, args.inputs, args.shape[0])).astype(np.float32)}
    dense = save_matrix(folder / "dense.onnx", weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where nothing wins, the table says so
        report = block_sparse(dense, folder / "blocks.onnx", example_inputs=example, threads=args.threads)
    files = {"dense": dense, "blocks": report.path}
    times = benchmark(files, example, threads=args.threads, rounds=tuple(args.rounds), seed=seed)
    speedup = times.speedup("blocks", "dense")
    return {
        "width": width, "density": density, "kept": float(mask.mean()), "seed": seed, "choice": report.rows[0].choice,
        "block": report.rows[0].block, **speedup.to_dict(), "dense_ms": times.file("dense").percentile(50) * 1e3,
        "bytes": report.bytes, "dense_bytes": report.source_bytes, "notes": list(times.notes),
    }  # fmt: skip


def matrix_rows(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All widths, densities and seeds."""
    found = []
    for width in args.widths:
        for density in args.densities:
            for seed in args.seeds:
                found.append(cell(folder, width, density, seed, args))
                print(".", end="", flush=True)
    print()
    return found


def matrix_table(rows: list[dict[str, Any]]) -> str:
    """A line per width and density, the seeds side by side; then whether the targets are met."""
    lines, met = [], []
    for width, density in dict.fromkeys((row["width"], row["density"]) for row in rows):
        seeds = [row for row in rows if (row["width"], row["density"]) == (width, density)]
        median = statistics.median(row["median"] for row in seeds)
        each = "  ".join(f"{row['median']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]" for row in seeds)
        ways = "/".join(dict.fromkeys(row["choice"] for row in seeds))
        size = f"{seeds[0]['dense_bytes'] / 1e6:.1f} -> {seeds[0]['bytes'] / 1e6:.1f}"
        lines.append([str(width), f"{density:.0%}", f"{seeds[0]['kept']:.3f}", ways, f"{median:.2f}x", each, size])
        if density in TARGETS:
            met.append(f"{width} at {density:.0%}: {'yes' if median >= TARGETS[density] else 'no'}")
    header = ["width", "density", "kept", "way", "speed-up", "each seed", "MB"]
    return f"{table(header, lines)}\n>= 2x at 25 %, >= 4x at 10 %: {', '.join(met)}"


def encoder(density: float) -> BertForSequenceClassification:
    """BERT's shape with 4 layers, blocks of 16 inputs x 128 outputs zeroed in all linear layers of the encoder."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=1000, num_hidden_layers=4)).eval()
    for seed, module in enumerate(model.bert.encoder.modules()):
        if isinstance(module, torch.nn.Linear):
            mask = block_mask(module.weight.T.shape, (16, 128), density, seed)
            module.weight.data *= torch.from_numpy(mask.T.copy())
    return model


def encoder_report(folder: Path, density: float, args: argparse.Namespace) -> dict[str, Any]:
    """The encoder dense, in blocks, and both in int8."""
    ids = torch.randint(1, 1000, (1, args.inputs), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dense = to_onnx(encoder(density), folder / "encoder.onnx", example)
    report = block_sparse(dense, folder / "encoder.blocks.onnx", example_inputs=example, threads=args.threads)
    files = {"dense": dense, "blocks": report.path}
    files |= {f"{name} int8": quantize(path, folder / f"{path.stem}.int8.onnx") for name, path in files.items()}
    times = benchmark(files, example, threads=args.threads, rounds=tuple(args.rounds))
    print(f"\nencoder, {density:.0%} of the blocks\n{report}\n\n{times}")
    return {"density": density, "blocks": report.to_dict(), "latency": times.to_dict()}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(768, 3072), metavar=("INPUTS", "OUTPUTS"))
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="columns that share their rows")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--height", type=int, default=16, help="rows of a block")
    parser.add_argument("--inputs", type=int, default=128, help="rows of the input: tokens of a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, nargs=2, default=(60, 120), metavar=("LEAST", "MOST"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--encoder", action="store_true", help="BERT's shape with 4 layers instead of one matrix")
    parser.add_argument("--quick", action="store_true", help="one cell, one seed, few rounds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.widths, args.densities, args.seeds, args.rounds = (128,), (0.25,), args.seeds[:1], (20, 20)
    return args


def main() -> None:
    """Measure and print."""
    args = parse()
    torch.set_num_threads(1)
    facts = machine(["CPUExecutionProvider"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.encoder:
            results = [encoder_report(folder, d, args) for d in args.densities]
        else:
            results = matrix_rows(folder, args)
            shape = "x".join(map(str, args.shape))
            print(f"{shape}, blocks of {args.height} rows, {args.inputs} rows of input, threads {args.threads}")
            print(matrix_table(results))
    print("; ".join(f"{key} {fact}" for key, fact in facts.items()))
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
