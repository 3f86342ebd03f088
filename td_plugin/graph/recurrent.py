"""What recurrent layers say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from td_plugin.graph.context import Call, Result
from td_plugin.graph.labels import Dim
from td_plugin.graph.values import Value, fixed, resolve


def recurrent(call: Call) -> Result:
    """LSTM, GRU and tanh RNN: unit j is row j of every gate, in every layer and direction."""
    if not call.target.endswith(".input"):
        return call.unknown("a recurrent layer over packed sequences")
    labels, x, parameters = call.labels, resolve(call.labels, call.value(0)), call.values(2)
    layers, directions = int(call.args[4]), 2 if call.args[7] else 1
    per_layer = len(parameters) // (layers * directions)
    if per_layer != (4 if call.args[3] else 2):
        return call.unknown("a recurrent layer with projections")
    unit: Dim = labels.fresh(parameters[1].shape[1])
    for initial in call.values(1) if isinstance(call.args[1], (list, tuple)) else (call.value(1),):
        unit = labels.join(unit, resolve(labels, initial).dims[-1])
    layer_input: Dim = x.dims[-1]
    for number in range(layers):
        for direction in range(directions):
            index = (number * directions + direction) * per_layer
            _recurrent_layer(call, parameters[index : index + per_layer], unit, layer_input, x if number == 0 else None)
        layer_input = unit.repeat(directions) if isinstance(unit, Tensor) else unit
    out = Value(call.shapes[0], (*x.dims[:-1], layer_input))
    last = [fixed(shape, "the final state") for shape in call.shapes[1:]]
    final = [replace(value, dims=(*value.dims[:-1], unit)) for value in last]
    return [out, *final]


def _recurrent_layer(call: Call, parameters: Sequence[Value], unit: Dim, layer_input: Dim, x: Value | None) -> None:
    labels = call.labels
    incoming, hidden = parameters[:2]
    for value in parameters:
        rows = value.dims[0]
        if isinstance(rows, Tensor) and isinstance(unit, Tensor):
            labels.join(rows, unit.repeat(len(rows) // len(unit)))
            labels.role(rows, "ranked" if len(value.shape) == 2 else "carried")
    labels.join(hidden.dims[1], unit)
    labels.role(hidden.dims[1], "consumer")
    labels.join(incoming.dims[1], layer_input)
    labels.role(incoming.dims[1], "consumer")
    if x is not None:
        call.consume(incoming.dims[1], x)
        call.read(incoming.dims[1], x, len(x.shape) - 1)
