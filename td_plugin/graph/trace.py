"""The traced forward of a model, and the labels its operators equate."""

from __future__ import annotations

import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from td_plugin.errors import TdError, first_line
from td_plugin.graph.context import Call, Result
from td_plugin.graph.labels import Labels
from td_plugin.graph.operators import evaluate
from td_plugin.graph.values import ONE, Value, fixed, resolve
from td_plugin.own_forward import own_forward

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
    inputs = _beside(model, example_inputs)
    model.eval()
    try:
        with torch.no_grad(), own_forward(model), _without_cache(model), quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return torch.export.export(model, (), inputs, strict=False)
            except Exception as error:
                raise _untraced(model, inputs, error) from error
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]


def _untraced(model: nn.Module, inputs: Mapping[str, Any], error: Exception) -> TdError:
    """Whose fault it is: the inputs', if the model does not run with them either."""
    what, fix = "cannot be traced", "make the forward free of branches on data, or hand the groups over: groups=[...]"
    try:
        model(**inputs)
    except Exception as own:  # whatever the model's own code raises
        error, what = own, "does not run with these inputs"
        fix = "give example_inputs as the model is called: a dict by the names of its arguments"
    where, got = _where(error), type(error).__name__
    return TdError(f"{type(model).__name__} {what}: {first_line(error)}", where=where, got=got, fix=fix)


def _beside(model: nn.Module, example_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs without data for a model without weights."""
    inputs = dict(example_inputs)
    if not any(tensor.is_meta for tensor in model.parameters()):
        return inputs
    placed: dict[str, Any] = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs)
    return placed


@contextmanager
def quiet() -> Iterator[None]:
    """Torch logs and prints half a graph when it fails; what matters of it is in the exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Decoders of transformers return a cache of keys and values, which is no tensor, unless told otherwise."""
    configs = [vars(module)["config"] for module in model.modules() if "config" in vars(module)]
    cached = [config for config in configs if getattr(config, "use_cache", False) is True]
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True


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
    labels, by_name = Labels(), _parameters(program)
    meta = program.graph_module.meta  # rules look there for modules' plain attributes and the parameters' names
    meta["td_modules"] = {name: vars(module) for name, module in model.named_modules()}
    meta["td_parameters"] = by_name
    values: dict[Any, Result] = {}
    for node in nodes:
        if node.op == "placeholder":
            values[node] = _placeholder(labels, node, by_name.get(node.name))
        elif node.op == "call_function":
            values[node] = _named(evaluate(Call(node, labels, values)), node.name)
            _visit(labels, node, values[node])
        elif node.op == "output":
            for source in node.all_input_nodes:
                _pin_output(labels, values[source])
        elif node.op == "get_attr":
            values[node] = fixed((), "a submodule of the graph")
    return labels


def _parameters(program: ExportedProgram) -> dict[str, str]:
    """Placeholder -> fully qualified name of the parameter or buffer it stands for."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    specs = program.graph_signature.input_specs
    return {spec.arg.name: str(spec.target) for spec in specs if spec.kind in kinds}


def _placeholder(labels: Labels, node: Any, tensor: str | None) -> Value:
    found = node.meta.get("val")
    if not isinstance(found, Tensor):
        return Value((), ())
    shape = tuple(int(size) for size in found.shape)
    if tensor is None:
        return replace(fixed(shape, "a dimension of the inputs"), name=node.name)
    if not found.dtype.is_floating_point:
        return replace(fixed(shape, f"a dimension of {tensor}"), weight=True, name=node.name)
    dims = tuple(labels.own(tensor, dim, size) if size > 1 else ONE for dim, size in enumerate(shape))
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
