"""What zeros are worth on disk: one matrix with zeros at random, as an ONNX file in every form.

    python benchmarks/storage.py [--shape 768 3072] [--sparsities 0.5 0.9] [--seed 0] [--json FILE]

Counts bytes, so that every machine gives the same numbers. Needs no data and no download.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from block_sparse import save_matrix

from td_plugin.export.storage import storage_table
from td_plugin.report import table


def main(argv: Sequence[str] | None = None) -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[768, 3072])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.9])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found: dict[str, dict[str, int]] = {}
    for share in args.sparsities:
        generator = np.random.default_rng(args.seed)
        weight = generator.standard_normal(args.shape).astype(np.float32)
        weight[generator.random(args.shape) < share] = 0
        with tempfile.TemporaryDirectory() as folder:
            report = storage_table(save_matrix(Path(folder) / "matrix.onnx", weight))
        found[f"{share:.0%}"] = {row.form: row.bytes for row in report.rows}
    forms = list(next(iter(found.values())))
    print(table(["zeros", *forms], [[name, *(f"{row[f] / 1e6:.2f} MB" for f in forms)] for name, row in found.items()]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
