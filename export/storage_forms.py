"""The forms of `storage.storage_table`: an ONNX file written or encoded, and what that takes in bytes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from td_plugin.errors import TdError
from td_plugin.export.external_data import check_external, save_graph
from td_plugin.export.gap_coding import decode_bitmask, decode_gaps, encode_bitmask, encode_gaps
from td_plugin.export.session import read_graph, require

_FLOATS = (1, 10, 11)  # onnx.TensorProto: FLOAT, FLOAT16, DOUBLE
_INDEX = 64  # bits; the standard allows no shorter ones in a sparse initializer
_LEAST = 64  # entries; smaller constants are shapes and scales that tools look for


@dataclass(frozen=True)
class StorageRow:
    """One form of the file.

    Attributes:
        form: what it is called.
        bytes: of all of it, the graph and what is not sparse included.
        tensors: how many are stored otherwise than in the file as it is; others would grow.
        lossless: whether every value comes back, bit by bit but for negative zeros.
        read_by: what it takes to use it.
        pays_above: share of zeros below which a tensor of this form is larger than a dense one, without fillers; None
            where there is no such share.
    """

    form: str
    bytes: int
    tensors: int
    lossless: bool
    read_by: str
    pays_above: float | None = None


@dataclass(frozen=True)
class WeightFile:
    """A graph with its weights, and those of them that may be sparse.

    Attributes:
        path: of the graph.
        parts: the files that it and its weights are in.
        graph: `onnx.ModelProto` with all weights.
        weights: `onnx.TensorProto` and values of each float constant of a certain size.
    """

    path: Path
    parts: tuple[Path, ...]
    graph: Any
    weights: tuple[tuple[Any, NDArray[Any]], ...]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(part.stat().st_size for part in self.parts)

    @property
    def bits(self) -> float:
        """Per entry, on average."""
        entries = sum(values.size for _, values in self.weights)
        return 8 * sum(values.nbytes for _, values in self.weights) / max(1, entries)


def read_weights(path: Path) -> WeightFile:
    """Read a file and the weights beside it.

    Raises:
        TdError: it is missing or damaged, its weights are missing or elsewhere, or none of them are floats.
    """
    if not path.is_file():
        raise TdError("there is no such ONNX file", where=str(path), fix="write it with to_onnx(model, path, inputs)")
    beside = check_external(path, read_graph(path))
    graph = require("onnx").load(str(path))
    helper = require("onnx.numpy_helper")
    weights = tuple(
        (tensor, helper.to_array(tensor))
        for tensor in graph.graph.initializer
        if tensor.data_type in _FLOATS and np.prod(tensor.dims, dtype=np.int64) >= _LEAST
    )
    if not weights:
        raise TdError("the file has no float constants", where=str(path), fix="give the fp32 file")
    return WeightFile(path, (path, *sorted(beside)), graph, weights)


def zip_bytes(files: Sequence[Path], folder: Path) -> int:
    """What files take in one zip file (deflate), written to `folder`."""
    target = folder / "file.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.name)
    return target.stat().st_size


def sparse_rows(file: WeightFile, folder: Path) -> list[StorageRow]:
    """With sparse initializers as the standard has them: values, and int64 places in the flattened tensor."""
    sparse, path = _copy(file), folder / file.path.name
    helper = require("onnx").helper
    kept: list[Any] = []
    stored = {tensor.name: values for tensor, values in file.weights}
    for tensor in sparse.graph.initializer:
        values = stored.get(tensor.name)
        places = None if values is None else np.flatnonzero(values)
        if values is None or places is None or places.size * (values.itemsize + _INDEX // 8) >= values.nbytes:
            kept.append(tensor)
            continue
        numbers = require("onnx.numpy_helper").from_array(values.reshape(-1)[places], tensor.name)
        indices = require("onnx.numpy_helper").from_array(places.astype(np.int64), f"{tensor.name}/places")
        sparse.graph.sparse_initializer.append(helper.make_sparse_tensor(numbers, indices, list(values.shape)))
    changed = len(sparse.graph.sparse_initializer)
    _keep(sparse, kept)
    save_graph(sparse, path)
    pays = 1 - file.bits / (file.bits + _INDEX)
    size, zipped = path.stat().st_size, zip_bytes([path], folder)
    return [
        StorageRow("sparse initializers", size, changed, True, "onnxruntime", pays),
        StorageRow("sparse initializers, zip", zipped, changed, True, "unzip, onnxruntime"),
    ]


def half_row(file: WeightFile, folder: Path) -> StorageRow:
    """Its values in fp16; a graph that runs with them needs casts beside, a few hundred bytes more (`forms.derive`)."""
    half, path = _copy(file), folder / file.path.name
    stored = {tensor.name: values for tensor, values in file.weights if values.itemsize > 2}
    for tensor in half.graph.initializer:
        if tensor.name in stored:
            with np.errstate(over="ignore"):
                values = stored[tensor.name].astype(np.float16)
            tensor.CopyFrom(require("onnx.numpy_helper").from_array(values, tensor.name))
    save_graph(half, path)
    return StorageRow("fp16 values, zip", zip_bytes([path], folder), len(stored), not stored, "unzip, forms.derive")


def gap_row(file: WeightFile, bits: int) -> StorageRow:
    """With `gap_coding.encode_gaps`."""

    def encode(values: NDArray[Any]) -> tuple[int, NDArray[Any]]:
        code = encode_gaps(values, bits)
        return code.bytes, decode_gaps(code)

    return _encoded(file, f"{bits}-bit gaps + values", encode, 1 - file.bits / (file.bits + bits))


def bitmask_row(file: WeightFile) -> StorageRow:
    """With `gap_coding.encode_bitmask`."""

    def encode(values: NDArray[Any]) -> tuple[int, NDArray[Any]]:
        mask, kept = encode_bitmask(values)
        return mask.nbytes + kept.nbytes, decode_bitmask(mask, kept, values.shape)

    return _encoded(file, "bitmask + values", encode, 1 / file.bits)


def _encoded(
    file: WeightFile, form: str, encode: Callable[[NDArray[Any]], tuple[int, NDArray[Any]]], pays_above: float
) -> StorageRow:
    saved, tensors = 0, 0
    for tensor, values in file.weights:
        size, decoded = encode(values)
        if size >= values.nbytes:
            continue
        if (values + values.dtype.type(0)).tobytes() != decoded.tobytes():  # the sum makes negative zeros positive
            raise TdError(f"{form}: what was encoded does not come back", where=tensor.name)
        saved, tensors = saved + values.nbytes - size, tensors + 1
    return StorageRow(form, file.bytes - saved, tensors, True, "td_plugin.export.gap_coding", pays_above)


def _copy(file: WeightFile) -> Any:
    copy = require("onnx").ModelProto()
    copy.CopyFrom(file.graph)
    return copy


def _keep(graph: Any, tensors: Sequence[Any]) -> None:
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in tensors]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(copies)
