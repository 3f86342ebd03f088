"""The traced forward of a model, and the labels its operators equate."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from td_plugin.errors import TdError
from td_plugin.graph.context import Call, Result
from td_plugin.graph.labels import Labels
from td_plugin.graph.operators import evaluate
from td_plugin.graph.values import Value, fixed, resolve

MOST_NODES = 200_000


def trace(model: nn.Module, example_inputs: Mapping[str, Any]) -> ExportedProgram:
    """The forward of `model` in evaluation mode as a graph of ATen operators, by `torch.export`.

    Args:
        model: any module, on any device, the meta device too.
        example_inputs: as the model is called, by name.

    Raises:
        TdError: the forward cannot be traced; the operator or line is named.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, (), dict(example_inputs), strict=False)
    except Exception as error:
        raise TdError(
            f"{type(model).__name__} cannot be traced: {_first_line(error)}",
            where=_where(error),
            got=type(error).__name__,
            fix="make the forward free of branches on data, or hand the groups over: prepare(model, groups=[...])",
        ) from error
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _where(error: Exception) -> str:
    """The innermost line of the traceback that is not torch's own."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    return f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""


def read_labels(model: nn.Module, program: ExportedProgram) -> Labels:
    """Go through the graph once and note what every operator says.

    Raises:
        TdError: the graph is larger than any model this is meant for.
    """
    nodes = list(program.graph.nodes)
    if len(nodes) > MOST_NODES:
        raise TdError("the traced graph is too large", got=f"{len(nodes)} operators", fix="hand the groups over")
    labels, env = Labels(), _placeholders(model, program)
    _annotate(model, program)
    by_name = dict(env[1])
    values: dict[Any, Result] = {}
    for node in nodes:
        if node.op == "placeholder":
            values[node] = _placeholder(labels, node, by_name.get(node.name), model)
        elif node.op == "call_function":
            values[node] = _named(evaluate(Call(node, labels, values)), node.name)
            _visit(labels, node, values[node])
        elif node.op == "output":
            for source in node.all_input_nodes:
                _pin_output(labels, values[source])
        elif node.op == "get_attr":
            values[node] = fixed((), "a submodule of the graph")
    return labels


def _placeholders(model: nn.Module, program: ExportedProgram) -> tuple[None, dict[str, str]]:
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    specs = program.graph_signature.input_specs
    return None, {spec.arg.name: str(spec.target) for spec in specs if spec.kind in kinds}


def _annotate(model: nn.Module, program: ExportedProgram) -> None:
    """What rules must know of the modules: their plain attributes, and which placeholder is which parameter."""
    meta = program.graph_module.meta
    meta["td_modules"] = {name: vars(module) for name, module in model.named_modules()}
    meta["td_parameters"] = _placeholders(model, program)[1]


def _placeholder(labels: Labels, node: Any, tensor: str | None, model: nn.Module) -> Value:
    found = node.meta.get("val")
    if not isinstance(found, Tensor):
        return Value((), ())
    shape = tuple(int(size) for size in found.shape)
    if tensor is None:
        return replace(fixed(shape, "a dimension of the inputs"), name=node.name)
    if not found.dtype.is_floating_point:
        return replace(fixed(shape, f"a dimension of {tensor}"), weight=True, name=node.name)
    dims = tuple(labels.own(tensor, dim, size) if size > 1 else "a dimension of size one" for dim, size in enumerate(shape))
    return Value(shape, dims, weight=True, name=node.name)


def _named(result: Result, name: str) -> Result:
    return result if isinstance(result, list) else replace(result, name=name)


def _visit(labels: Labels, node: Any, result: Result) -> None:
    """Which modules handle an activation: their attributes may state its width."""
    stack = [str(entry[0]) for entry in node.meta.get("nn_module_stack", {}).values()]
    for value in result if isinstance(result, list) else [result]:
        dims = [dim for dim in value.dims if isinstance(dim, Tensor)]
        dims += [value.joint.labels.reshape(-1)] if value.joint else []
        for dim in dims if not value.weight else ():
            labels.visits.extend((dim, module) for module in stack)


def _pin_output(labels: Labels, result: Result) -> None:
    for value in result if isinstance(result, list) else [result]:
        for dim in resolve(labels, value).dims:
            labels.pin(dim, "it reaches an output of the model")
