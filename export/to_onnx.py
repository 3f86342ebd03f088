"""From a torch model to one verified ONNX file."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from td_plugin.errors import TdError
from td_plugin.export.external_data import LIMIT, save_program, staged_graph
from td_plugin.export.optimize import check_optimize, optimize_staged
from td_plugin.export.probes import Batch, flags_of, make_probe_batches, sequence_axes, tensors_of, traced_example
from td_plugin.export.provenance import check_exportable, provenance
from td_plugin.export.quiet import quiet
from td_plugin.export.session import require
from td_plugin.export.verify import named_outputs, verify
from td_plugin.own_forward import unwrap
from td_plugin.parametrization import bake


def to_onnx(  # noqa: PLR0913 - all but the first three are options, by name only
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Batch | Tensor | Sequence[Tensor],
    *,
    opset: int = 20,
    tolerance: float | None = None,
    metadata: Mapping[str, str] | None = None,
    optimize: str = "none",
    limit: int = LIMIT,
) -> Path:
    """Write `model`, as it computes in evaluation mode, to one ONNX file with a dynamic batch and sequence.

    transformers' models go through its `OnnxExporter`, others through `torch.onnx.export`. The model itself stays as
    it is: masks of td_plugin are baked into a copy (left in the graph they would double the file). The file is
    compared with torch on `make_probe_batches(example_inputs)` and moved into place only if it agrees.

    Args:
        model: float32 or float64.
        path: the file to write.
        example_inputs: dict as the model is called (labels are left out); for other modules than transformers' also a
            tensor or a tuple of tensors. The first dimension is the batch; the second one of integer inputs of rank 2
            and of ``encoder_hidden_states`` and the like is the length of a text, the decoder's its own. What is no
            tensor becomes a constant of the graph; a model with a cache is exported without (``use_cache=False``).
        opset: of the ONNX standard operators. From 23 on attention becomes one operator that other tools may not know.
        tolerance: see `verify`.
        metadata: written into the file's ``metadata_props`` next to versions, class, parameters, sparsity
            and, of a shrunk model of transformers, layer widths before and after.
        optimize: ``"auto"``: the fastest form on this machine (`best_form`); or one of `forms.FORMS` (`derive`).
        limit: bytes of weights beyond which they are put in a file beside the graph, ``<name>.data``.

    Returns:
        `path`.

    Raises:
        TdError: the inputs do not fit, the model cannot be exported, or the file differs from the model; `path` is
            left as it was.
    """
    require("onnxscript")
    check_optimize(optimize)
    example = _named_inputs(model, example_inputs)
    ready = copy.deepcopy(model).cpu()
    unwrap(ready)
    baked = bake(ready)
    ready.eval().requires_grad_(False)  # the trace of a recurrent layer's loop asks for gradients otherwise
    ready.forward = functools.partial(ready.forward, **flags_of(example))  # a graph has no flags among its inputs
    check_exportable(ready)
    properties = provenance(ready, metadata or {})
    with staged_graph(path) as staged:
        graph = _export(ready, example, opset)
        _tidy(graph, example)
        graph.metadata_props.update(properties)
        save_program(graph, staged, limit=limit)
        # Without masks the caller's own model is the reference, whatever the exporter did to the copy.
        reference = ready if baked else model
        verify(reference, staged, make_probe_batches(example), tolerance=tolerance, where=str(path))
        optimize_staged(staged, optimize, tensors_of(example), limit)
    return Path(path)


def _named_inputs(model: nn.Module, example_inputs: Batch | Tensor | Sequence[Tensor]) -> dict[str, Any]:
    """Inputs by the names of `forward`'s parameters, on the CPU, without labels, and the flags they come with."""
    parameters = inspect.signature(model.forward).parameters
    if isinstance(example_inputs, Mapping):
        named = {name: value for name, value in example_inputs.items() if name not in _labels(model)}
    else:
        values = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
        names = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(values) > len(names):
            raise TdError(f"forward names {len(names)} inputs", got=len(values), fix="give a dict of tensors")
        named = dict(zip(names, values, strict=False))
    tensors, flags = tensors_of(named), flags_of(named)
    for name, value in named.items():
        if name not in flags and (name not in tensors or value.ndim == 0):
            raise TdError("an example input is not a batch of tensors", where=name, got=type(value).__name__)
    if len({value.shape[0] for value in tensors.values()}) != 1:
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        raise TdError("the example inputs do not share one batch size", got=shapes, fix="first dimension: the batch")
    if flags.get("use_cache"):
        raise TdError("a graph with a cache cannot be written", where="use_cache", got=True, fix="leave it out")
    if _is_pretrained(model) and ("use_cache" in parameters or {"past_key_values", "kwargs"} <= parameters.keys()):
        flags["use_cache"] = False
    return {**{name: value.detach().cpu() for name, value in tensors.items()}, **flags}


def _is_pretrained(model: nn.Module) -> bool:
    if "transformers" not in sys.modules:  # nobody can have built such a model
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _labels(model: nn.Module) -> list[str]:
    if not _is_pretrained(model):
        return []
    from transformers.utils.generic import find_labels

    return list(find_labels(type(model)))  # type: ignore[no-untyped-call]


def _export(model: nn.Module, example: Batch, opset: int) -> Any:
    """The `onnx_ir.Model` of `model`."""
    example = tensors_of(traced_example(example))
    dynamic = torch.export.Dim.DYNAMIC  # a named Dim would have to state the model's own maximum length
    axes = {name: {0: dynamic, 1: dynamic} if name in sequence_axes(example) else {0: dynamic} for name in example}
    try:
        with torch.no_grad():
            outputs = list(named_outputs(model(**example)))
        with quiet(), _recurrent_loops():
            if _is_pretrained(model):
                return _export_pretrained(model, example, axes, opset)
            return torch.onnx.export(
                model,
                kwargs=dict(example),
                input_names=list(example),
                output_names=outputs,
                dynamic_shapes=axes,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            ).model  # type: ignore[union-attr]
    except Exception as error:  # the model's own forward and two compilers are in there
        raise TdError(
            "the model cannot be exported to ONNX with these example inputs",
            where=type(model).__name__,
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            fix="check that model(**example_inputs) runs with other batch sizes and lengths",
        ) from error


@contextlib.contextmanager
def _recurrent_loops() -> Iterator[None]:
    """Let torch.onnx trace LSTM and GRU as loops over any length, in every export of a process.

    It swaps the operators' kernels, but they remember one of an earlier trace (torch 2.13, `torch.export._patches`).
    """
    remembered = [op._dispatch_cache for op in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)]
    for kernels in remembered:
        kernels.clear()
    try:
        yield
    finally:
        for kernels in remembered:
            kernels.clear()


def _export_pretrained(model: Any, example: Batch, axes: dict[str, dict[int, Any]], opset: int) -> Any:
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    config = OnnxConfig(dynamic=True, dynamic_shapes=axes, opset_version=opset)
    exporter = OnnxExporter()  # type: ignore[no-untyped-call]
    return exporter.export(model, dict(example), config).program


def _tidy(graph: Any, example: Batch) -> None:
    """Name the dynamic dimensions, and drop the traces of the export: they hold paths of this machine."""
    names: dict[str, str] = {}
    texts = sequence_axes(example)
    for value in graph.graph.inputs:
        axes = ("batch", texts.get(value.name.removeprefix("input.")))
        names.update({str(size): axis for size, axis in zip(value.shape, axes, strict=False) if axis})
    for value in graph.graph.inputs:
        _name_axes(value, names)
    for node in graph.graph.all_nodes():
        for key in set(node.metadata_props) - {"namespace"}:  # viewers group nodes by it
            del node.metadata_props[key]
        for value in node.outputs:
            _name_axes(value, names)


def _name_axes(value: Any, names: Mapping[str, str]) -> None:
    """Call dimensions batch and sequence in place of symbols such as s41, also within expressions."""
    if value.shape is None:
        return
    ir = require("onnx_ir")
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    value.shape = ir.Shape(
        [
            size
            if isinstance(size, int) or size.value is None
            else ir.SymbolicDim(symbol.sub(lambda match: names[match[0]], str(size)))
            for size in value.shape
        ]
    )
