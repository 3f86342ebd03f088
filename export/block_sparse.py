"""Blocks of zeros made to pay in stock onnxruntime: matrices rewritten into products with what is not zero."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from td_plugin.errors import TdError, first_line
from td_plugin.export.block_graph import OPSET, Site, find_sites, input_rows, opset_of, replace
from td_plugin.export.block_layout import Layout, find_layouts
from td_plugin.export.block_report import NO_BLOCKS, BlockRow
from td_plugin.export.block_report import BlockSparseReport as BlockSparseReport
from td_plugin.export.block_rewrite import Part, sparse_part, ways
from td_plugin.export.block_timing import fastest
from td_plugin.export.external_data import save_graph, staged_graph
from td_plugin.export.form_checks import compare_files, comparison_batches
from td_plugin.export.parity import ParityReport
from td_plugin.export.probes import Batch
from td_plugin.export.progress import bar
from td_plugin.export.session import fit_inputs, open_session
from td_plugin.export.source_graph import SourceGraph, file_bytes, finish, open_source
from td_plugin.export.verify import shape_of

KEY = "td-plugin.block_sparse"
"""Metadata entry: JSON of weight -> how it was rewritten."""

DEFAULT_ROWS = 128
"""Rows of input at which a matrix is measured where no example says how many it gets."""

_NO_GAIN = (
    "no matrix is faster in blocks here (the best: {best}; asked for: {least:g}x): {path} is written as its source was"
)

Blocks = tuple[int, int]
_Parts = dict[str, tuple[Site, Part]]


def block_sparse(  # noqa: PLR0913 - all but the first two are options, by name only
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    block: Blocks | None = None,
    min_gain: float = 1.05,
    example_inputs: Batch | Sequence[Batch] | None = None,
    threads: int = 1,
    progress: bool = False,
) -> BlockSparseReport:
    """Multiply only with the blocks that are not zero, wherever this is measured to be faster.

    onnxruntime multiplies zeros like any number. Each MatMul or Gemm with a constant matrix that has blocks of zeros
    becomes one smaller product per group of columns, over the inputs that the group needs, in standard operators
    (`block_rewrite.Way`). What comes out fastest of several ways is timed against the dense product in turn, and kept
    if it wins. Wide groups gain most: blocks of 16 inputs x 128 outputs and more. Single zeros gain nothing, nor does
    2:4, and the zeros of a dense file can be had smaller on disk only (`storage.storage_table`).

    Args:
        source: an fp32 ONNX file of opset 14 or later. Quantized ones are refused.
        target: the file to write.
        block: inputs and outputs of a block; unless given, several are tried on every matrix. A mask of blocks of
            ``(o, i)`` on a torch Linear's weight ``[outputs, inputs]`` has blocks of ``(i, o)`` here.
        min_gain: least median of the paired ratios dense / rewritten; its interval must lie above 1.03, too.
        example_inputs: as for `forms.derive`: what source and target are compared on; unless given, made up. The rows
            that reach each matrix in the first example are those it is measured at; without one, `DEFAULT_ROWS`.
        threads: inside one operator, while measuring.
        progress: show a bar on the terminal.

    Returns:
        per matrix what was found, measured and chosen. Where nothing won, the target is the source as it was, and a
        warning says so.

    Raises:
        TdError: as `forms.derive` for source, target and inputs; no matrix has blocks of zeros, or the opset is too
            old; the result does not compute what the source does. `target` is left as it was then.
    """
    _check_arguments(block, min_gain, threads)
    origin = open_source(source, target)
    graph = origin.load()
    inputs = _rows_of_inputs(origin, example_inputs)
    matrices = _matrices(graph, origin, block, inputs)
    if not any(matrix.layouts for matrix in matrices):
        got = f"{len(matrices)} matrices" + (f", blocks of {block[0]}x{block[1]}" if block else "")
        fix = "single zeros gain nothing here: drop whole blocks, or units, which shrink() removes"
        raise TdError(f"{NO_BLOCKS}, or too small ones", where=str(source), got=got, fix=fix)
    rows: list[BlockRow] = []
    parts: _Parts = {}
    with bar("matrices", len(matrices), progress) as steps:
        for matrix in matrices:
            row, made = _choose(matrix, min_gain, threads, opset_of(graph))
            rows.append(row)
            parts |= made
            steps.advance()
    if not parts:
        best = max((row.speedup for row in rows if row.speedup), key=lambda speedup: speedup.median)
        warnings.warn(_NO_GAIN.format(best=best, least=min_gain, path=target), stacklevel=2)
    parity, notes = _write(origin, graph, parts, rows, Path(target), example_inputs)
    size = file_bytes(Path(target))
    return BlockSparseReport(
        Path(target), tuple(rows), size, origin.bytes, min_gain, threads, parity, (*notes, *origin.notes())
    )


@dataclass(frozen=True)
class _Matrix:
    """A constant, the nodes that multiply with it, and the layouts worth measuring."""

    sites: tuple[Site, ...]
    inputs: int
    layouts: list[Layout]


def _check_arguments(block: Blocks | None, min_gain: float, threads: int) -> None:
    if block is not None and (len(block) != 2 or min(block) < 1):
        raise TdError("a block has rows and columns", where="block", got=block, fix="(16, 128), for example")
    if not min_gain >= 1:
        raise TdError("a gain below 1 is a loss", where="min_gain", got=min_gain, fix="1.05")
    if threads < 1:
        raise TdError("nothing to time", got=f"threads={threads}", fix="give one thread at least")


def _rows_of_inputs(origin: SourceGraph, example_inputs: Batch | Sequence[Batch] | None) -> dict[str, int]:
    """Node -> rows that reach it in the first example."""
    if example_inputs is None:
        return {}
    first = example_inputs[0] if isinstance(example_inputs, Sequence) else example_inputs
    fitted = fit_inputs(open_session(origin.path).get_inputs(), first, str(origin.path))
    with tempfile.TemporaryDirectory(prefix="td_plugin.") as folder:
        named = Path(folder) / "named.onnx"  # the nodes of another exporter's file may have no names to go by
        save_graph(origin.load(), named)
        try:
            return input_rows(named, {name: value.numpy() for name, value in fitted.items()})
        except Exception as error:  # onnxruntime's exceptions share no base class
            got = f"{shape_of(fitted)}: {first_line(error)}"
            raise TdError("onnxruntime cannot run the graph", where=str(origin.path), got=got) from error


def _matrices(graph: Any, origin: SourceGraph, block: Blocks | None, inputs: Mapping[str, int]) -> list[_Matrix]:
    if opset_of(graph) < OPSET:
        raise TdError(
            f"the rewritten products take opset {OPSET}", where=str(origin.path), got=opset_of(graph), fix="opset=20"
        )
    by_label: dict[str, list[Site]] = {}
    for site in find_sites(graph):
        by_label.setdefault(site.product.label, []).append(site)
    found = []
    for sites in by_label.values():
        rows = max(max(1, inputs.get(site.node, DEFAULT_ROWS)) for site in sites)
        found.append(_Matrix(tuple(sites), rows, find_layouts(sites[0].product.weight, block, rows)))
    return found


def _choose(matrix: _Matrix, min_gain: float, threads: int, opset: int) -> tuple[BlockRow, _Parts]:
    """Measure, and make what takes the place of the nodes if that wins."""
    product = matrix.sites[0].product
    layers = tuple(site.layer for site in matrix.sites)
    zeros = 1 - float(np.count_nonzero(product.weight)) / product.weight.size
    shape = (product.weight.shape[0], product.weight.shape[1])
    candidates = {
        f"{index} {way}": (layout, way) for index, layout in enumerate(matrix.layouts) for way in ways(layout)
    }
    if not candidates:
        return BlockRow(layers, matrix.sites[0].weight, shape, zeros, matrix.inputs), {}
    parts = {name: sparse_part(product, *candidate) for name, candidate in candidates.items()}
    best, speedup = fastest(product, parts, matrix.inputs, threads=threads, opset=opset)
    layout, way = candidates[best]
    wins = speedup.median >= min_gain and speedup.verdict == "faster"
    row = BlockRow(
        layers,
        matrix.sites[0].weight,
        shape,
        zeros,
        matrix.inputs,
        (layout.height, layout.width),
        layout.density,
        way if wins else "dense",
        speedup,
    )
    return row, {site.node: (site, sparse_part(site.product, layout, way)) for site in matrix.sites} if wins else {}


def _write(
    origin: SourceGraph,
    graph: Any,
    parts: _Parts,
    rows: Sequence[BlockRow],
    target: Path,
    example_inputs: Batch | Sequence[Batch] | None,
) -> tuple[ParityReport | None, tuple[str, ...]]:
    """Write the graph with its parts, prove that it computes the same, and move it into place."""
    replace(graph, parts)
    chosen = {
        row.weight: [row.choice, *(row.block or ()), round(row.density, 4)] for row in rows if row.choice != "dense"
    }
    finish(graph, {**origin.metadata, **({KEY: json.dumps(chosen)} if chosen else {})})
    with staged_graph(target) as staged:
        save_graph(graph, staged)
        open_session(staged)
        try:
            batches = comparison_batches(origin.path, example_inputs)
        except TdError as error:
            if example_inputs is not None:
                raise
            return None, (f"not compared as a whole, example_inputs would help: {error}",)
        found = compare_files(origin.path, staged, batches)
        if found.problem:
            raise TdError("the rewritten graph computes something else", where=str(origin.path), got=found.problem)
    return found.parity, ()
