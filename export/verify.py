"""Is the ONNX file the model? torch against onnxruntime on the same batches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from td_plugin.errors import TdError, first_line
from td_plugin.export.modes import evaluating
from td_plugin.export.parity import TOLERANCES, compare, judge, paired, precision_of
from td_plugin.export.parity import ParityReport as ParityReport
from td_plugin.export.probes import Batch, flags_of
from td_plugin.export.probes import make_probe_batches as make_probe_batches
from td_plugin.export.session import graph_inputs, open_session, read_graph


def verify(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Sequence[Batch],
    *,
    tolerance: float | None = None,
    where: str | None = None,
) -> ParityReport:
    """Compare `model` in evaluation mode with the ONNX file at `path`, on real batches.

    Outputs with one row per token are compared only where ``attention_mask`` is 1: what a model computes at padding
    is undefined and does differ between runtimes. Several models and files at once: `verify_forms`.

    Args:
        model: the torch model; its mode is restored afterwards.
        path: the ONNX file, of any precision.
        batches: dicts of tensors as the model is called; those that the graph lacks (labels) are left out, and what is
            no tensor (``use_cache``) goes to the model alone.
        tolerance: fp32: bound t in ``|onnx - torch| <= t * (1 + |torch|)``, default 1e-4. Lower precisions: bound of
            ``||onnx - torch|| / ||torch||`` per batch, by default that of `parity.TOLERANCES`; judge such a file by its
            top-1 agreement too.
        where: what errors call the file; its path unless given.

    Raises:
        TdError: the file is missing, damaged or takes other inputs, an output is not finite, or a difference exceeds
            the tolerance.
    """
    label = str(path) if where is None else where
    if not batches:
        raise TdError("no batches to compare on", where=label, fix="give at least one dict of tensors")
    session = open_session(path)
    precision = precision_of(read_graph(path))
    bound = TOLERANCES[precision].bound if tolerance is None else tolerance
    rows = []
    with evaluating(model), torch.no_grad():
        for index, batch in enumerate(batches):
            inputs = graph_inputs(session, batch, label)
            ours = model_outputs(model, {**inputs, **flags_of(batch)})
            pairs = paired(ours, graph_outputs(session, inputs, label), inputs, label)
            rows.append(compare(pairs, shape_of(inputs)))
            judge(pairs, rows[-1], (precision, bound), f"batch {index} of shape {rows[-1].shape}", label)
    return ParityReport(tuple(rows), precision, bound)


def model_outputs(model: nn.Module, inputs: Batch) -> dict[str, Tensor]:
    """What a torch model returns, by name, on the CPU; its mode and gradients are the caller's matter.

    Raises:
        TdError: the model fails on these inputs.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    try:
        returned = model(**given)
    except Exception as error:  # the model's own code: a token it does not know, a size it cannot take
        shapes = {name: list(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)}
        got = f"{type(error).__name__}: {first_line(error)}; inputs: {shapes}"
        raise TdError("the model cannot run on these inputs", where=type(model).__name__, got=got) from error
    return {name: value.detach().cpu() for name, value in named_outputs(returned).items()}


def graph_outputs(session: Any, inputs: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """What a graph returns, by name.

    Args:
        session: an open session.
        inputs: what `graph_inputs` fitted to it.
        where: what errors call the file.

    Raises:
        TdError: onnxruntime fails.
    """
    names = [entry.name for entry in session.get_outputs()]
    try:
        values = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    except Exception as error:  # onnxruntime's exceptions share no base class
        got = f"{shape_of(inputs)}: {first_line(error)}"
        raise TdError("onnxruntime cannot run the graph", where=where, got=got) from error
    return {name: torch.as_tensor(value) for name, value in zip(names, values, strict=True)}


def named_outputs(output: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of what a model returned, by name: the keys of a dict, ``logits`` for a lone tensor."""
    if isinstance(output, Tensor):
        return {name or "logits": output}
    if isinstance(output, Mapping):
        items = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        items = [(str(index) if name else f"output_{index}", value) for index, value in enumerate(output)]
    else:
        return {}
    return {k: v for key, value in items for k, v in named_outputs(value, f"{name}.{key}" if name else key).items()}


def shape_of(inputs: Mapping[str, Tensor]) -> str:
    """The sizes of the first input, such as ``"3x16"``."""
    return "x".join(str(size) for size in next(iter(inputs.values())).shape)
