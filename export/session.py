"""onnxruntime sessions: opening a file, and fitting inputs to its graph."""

from __future__ import annotations

import importlib
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from td_plugin.errors import TdError, first_line
from td_plugin.export.engines import CPU, Engine, onnxruntime_session

if TYPE_CHECKING:
    import numpy as np

DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}

# Any of these marks a quantized graph; DequantizeLinear alone is how int8 embeddings are read.
_INTEGER_OPS = {
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "QLinearConv",
    "QGemm",
    "MatMulNBits",
}


def require(package: str) -> Any:
    """Import an optional package of the ``onnx`` extra.

    Raises:
        TdError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise TdError(
            f"{package.split('.')[0]} is needed here and cannot be imported",
            got=error,
            fix="pip install 'td-plugin[onnx]'",
        ) from error


def open_session(
    path: str | os.PathLike[str],
    *,
    threads: int = 1,
    provider: str = CPU,
    options: Mapping[str, str] | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession`.

    Threads do not spin while they wait: under any other load spinning costs more than a factor of two and distorts
    the ratio between a dense and a pruned model.

    Args:
        path: the ONNX file.
        threads: threads inside one operator.
        provider: an execution provider that onnxruntime has (`onnxruntime.get_available_providers()`).
        options: of the provider, as it calls them.

    Raises:
        TdError: the file is missing, truncated or corrupt, its weights are missing or outside its directory, or it
            needs an operator set or something else that this onnxruntime lacks.
    """
    require("onnxruntime")
    if not Path(path).is_file():
        raise TdError("there is no such ONNX file", where=str(path), fix="write it with to_onnx(model, path, inputs)")
    _check_beside(Path(path))
    try:
        return onnxruntime_session(Engine(str(path), threads, provider, options or {}))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise _not_loaded(path, provider, error) from error


def _check_beside(path: Path) -> None:
    """Nothing, if a graph keeps its weights in itself or in files beside it that are whole.

    Raises:
        TdError: as `external_data.check_external`.
    """
    if path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"location") < 0:  # the key under which a graph names a file: spared the parsing
                return
    from td_plugin.export.external_data import check_external  # it reads graphs by what is below

    try:
        graph = read_graph(path)
    except TdError:
        return  # onnxruntime says more about what is wrong, and opens nothing else of a file that it cannot read
    check_external(path, graph)


def _not_loaded(path: str | os.PathLike[str], provider: str, error: Exception) -> TdError:
    got = first_line(error)
    if "opset" in got.lower():
        stated = {entry.domain or "ai.onnx": entry.version for entry in read_graph(path).opset_import}
        fix = "export it with opset=20, or update onnxruntime"
        return TdError("this onnxruntime cannot run the operator set", where=str(path), got=stated, fix=fix)
    fix = "the file may be truncated or damaged: export it again"
    if provider != CPU:
        fix = f"see whether it loads on the CPU; if so, {provider} lacks a library or its device"
    return TdError("onnxruntime cannot load the ONNX file", where=str(path), got=got, fix=fix)


def read_graph(path: str | os.PathLike[str]) -> Any:
    """The `onnx.ModelProto` of a file, without weights kept outside it.

    Raises:
        TdError: the file is missing or cannot be parsed.
    """
    onnx = require("onnx")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError moved between its versions
        raise TdError(
            "the ONNX file cannot be read", where=str(path), got=error, fix="it may be truncated: export it again"
        ) from error


def is_quantized(graph: Any) -> bool:
    """Whether an `onnx.ModelProto` computes with integer weights."""
    return any(node.op_type in _INTEGER_OPS for node in graph.graph.node)


@dataclass(frozen=True)
class StatedInput:
    """An input as a graph states it, in the words of `InferenceSession.get_inputs`: for what onnxruntime does not open.

    Attributes:
        name: of the input.
        type: such as ``"tensor(int64)"``.
        shape: sizes; names or None where they are open.
    """

    name: str
    type: str
    shape: list[int | str | None]


def stated_inputs(graph: Any) -> list[StatedInput]:
    """The inputs of an `onnx.ModelProto`, without those that are weights."""
    types = require("onnx").TensorProto.DataType
    weights = {tensor.name for tensor in graph.graph.initializer}
    found = []
    for entry in graph.graph.input:
        if entry.name in weights:
            continue
        tensor = entry.type.tensor_type
        kind = types.Name(tensor.elem_type).lower()
        sizes = [size.dim_value if size.HasField("dim_value") else size.dim_param or None for size in tensor.shape.dim]
        found.append(StatedInput(entry.name, f"tensor({kind})", sizes))
    return found


def graph_inputs(session: Any, inputs: Mapping[str, Tensor | np.ndarray[Any, Any]], where: str) -> dict[str, Tensor]:
    """Those of `inputs` that the graph takes; others, such as labels, are left out.

    Args:
        session: an open session.
        inputs: name -> values, as the model is called.
        where: what errors call the file.

    Raises:
        TdError: an input is missing, or its dtype, rank or a fixed dimension does not fit the graph.
    """
    return fit_inputs(session.get_inputs(), inputs, where)


def fit_inputs(
    wanted: Sequence[Any], inputs: Mapping[str, Tensor | np.ndarray[Any, Any]], where: str
) -> dict[str, Tensor]:
    """`graph_inputs`, given what the session or `stated_inputs` says of the graph.

    Raises:
        TdError: as `graph_inputs`.
    """
    given: object = inputs
    if isinstance(given, Tensor):  # to_onnx takes one, so it is tried here, too
        fix = f"a dict with {', '.join(entry.name for entry in wanted)}"
        raise TdError("inputs are given by name", where=where, got=type(inputs).__name__, fix=fix)
    missing = [entry.name for entry in wanted if entry.name not in inputs]
    if missing:
        raise TdError(
            f"the graph needs inputs that were not given: {', '.join(missing)}",
            where=where,
            got=", ".join(inputs) or "no inputs",
            fix=f"give {', '.join(entry.name for entry in wanted)}",
        )
    fitted = {}
    for entry in wanted:
        value = inputs[entry.name]
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(value)
        _check_fit(entry, tensor, where)
        fitted[entry.name] = tensor
    return fitted


def _check_fit(entry: Any, tensor: Tensor, where: str) -> None:
    dtype = DTYPES.get(entry.type)
    if dtype is None or tensor.dtype != dtype:
        raise TdError(
            f"input {entry.name!r} has another dtype than the graph",
            where=where,
            got=tensor.dtype,
            fix=f"the graph takes {entry.type}",
        )
    fixed = [size if isinstance(size, int) else None for size in entry.shape]
    fits = len(fixed) == tensor.ndim and all(
        size is None or size == actual for size, actual in zip(fixed, tensor.shape, strict=True)
    )
    if not fits:
        raise TdError(
            f"input {entry.name!r} has another shape than the graph",
            where=where,
            got=list(tensor.shape),
            fix=f"the graph takes {entry.shape}",
        )
