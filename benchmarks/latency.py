"""What removing units is worth in onnxruntime, before any training: an encoder of random weights, dense against shrunk.

    python benchmarks/latency.py [--layers 4] [--hidden 384] [--rounds 100] [--threads 1]

Needs no data and no download. Latency depends on shapes only, so this is what a trained model of these shapes gains.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import td_plugin as td
from td_plugin.export import benchmark, quantize, shrink, to_onnx


def encoder(layers: int, hidden: int) -> BertForSequenceClassification:
    """BERT's shape with heads of 32 rows, as in MiniLM."""
    config = BertConfig(
        vocab_size=1000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        intermediate_size=4 * hidden,
    )
    return BertForSequenceClassification(config).eval()


def pruned(model: BertForSequenceClassification, level: float) -> BertForSequenceClassification:
    """A shrunk copy without the `level` of neurons and heads of smallest norm."""
    masked = copy.deepcopy(model)
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), level)
    sparsifier.prepare(masked)
    return shrink(masked)


def main() -> None:
    """Print one table per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = encoder(args.layers, args.hidden)
    ids = torch.randint(1, 1000, (2, 16))
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, candidate in (("dense", model), *((f"γ = {level}", pruned(model, level)) for level in (0.5, 0.75))):
            example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            files[name] = to_onnx(candidate, Path(folder) / f"{len(files)}.onnx", example)
            files[f"{name} int8"] = quantize(files[name], Path(folder) / f"{len(files)}.int8.onnx")
        for batch, sequence in ((1, 32), (1, 128), (8, 128)):
            ids = torch.randint(1, 1000, (batch, sequence))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            print(f"\nbatch {batch}, sequence {sequence}")
            print(benchmark(files, inputs, threads=args.threads, rounds=args.rounds, progress=True))


if __name__ == "__main__":
    main()
