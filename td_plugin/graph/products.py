"""What products of tensors say: matrix products, convolutions, attention, recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor

from td_plugin.graph.context import Call
from td_plugin.graph.labels import Dim
from td_plugin.graph.values import Value, fixed, resolve

HEAD = "entries of a head"


def contract(call: Call, terms: Sequence[str], result: str, values: Sequence[Value]) -> Value:
    """An einsum: one letter a dimension; letters that `result` lacks are summed over."""
    labels = call.labels
    values = [resolve(labels, value) for value in values]
    dims: dict[str, Dim] = {}
    sizes: dict[str, int] = {}
    for term, value in zip(terms, values, strict=True):
        for letter, dim, size in zip(term, value.dims, value.shape, strict=True):
            if sizes.get(letter, 1) == 1:
                dims[letter], sizes[letter] = dim, size
            elif size != 1:
                dims[letter] = labels.join(dims[letter], dim)
    _roles(call, terms, result, values)
    scales = dims | {letter: dim for t, v in zip(terms, values, strict=True) if v.weight for letter, dim in zip(t, v.dims, strict=True)}
    call.product(values, prod(sizes.values()), [scales[letter] for letter in sizes])
    shape = tuple(sizes[letter] for letter in result)
    weight = all(value.weight for value in values)
    return Value(shape, tuple(dims[letter] for letter in result), weight=weight)


def _roles(call: Call, terms: Sequence[str], result: str, values: Sequence[Value]) -> None:
    activations = [(term, value) for term, value in zip(terms, values, strict=True) if not value.weight]
    for term, value in zip(terms, values, strict=True):
        for position, letter in enumerate(term):
            dim = value.dims[position]
            if value.weight and activations:
                call.labels.role(dim, "ranked" if letter in result else "consumer")
                if letter not in result:
                    other, source = activations[0]
                    call.read(dim, source, other.index(letter))
            elif len(activations) > 1 and letter not in result:
                call.labels.pin(dim, "two activations are multiplied and summed over it")
            elif len(activations) > 1 and isinstance(dim, Tensor) and all(letter in t for t, _ in activations):
                call.labels.marks.append((dim, "heads"))


def linear(call: Call) -> Value:
    """``x [.., i], w [o, i], b [o]``."""
    x, weight = call.value(0), call.value(1)
    batch = _letters(len(x.shape) - 1)
    out = contract(call, (batch + "y", "zy"), batch + "z", (x, weight))
    return _add_bias(call, out, call.optional(2), len(out.shape) - 1)


def _add_bias(call: Call, out: Value, bias: Value | None, dim: int) -> Value:
    if bias is not None:
        call.labels.join(out.dims[dim], bias.dims[0])
        call.labels.role(bias.dims[0], "carried")
    return out


def _letters(count: int) -> str:
    return "abcdefghijklmnop"[:count]


def matmul(call: Call) -> Value:
    """``[.., i, k] @ [.., k, j]`` with broadcasting, as mm, bmm and matmul do it."""
    return _matmul(call, call.value(0), call.value(1))


def _matmul(call: Call, one: Value, other: Value) -> Value:
    first = "y" if len(one.shape) == 1 else "xy"
    second = "y" if len(other.shape) == 1 else "yz"
    depth = max(len(one.shape) - len(first), len(other.shape) - len(second))
    batch = _letters(depth)
    terms = [batch[depth - (len(v.shape) - len(core)) :] + core for v, core in ((one, first), (other, second))]
    result = batch + first.replace("y", "") + second.replace("y", "")
    return contract(call, terms, result, (one, other))


def addmm(call: Call) -> Value:
    """``bias + a @ b``; baddbmm likewise."""
    out = _matmul(call, call.value(1), call.value(2))
    bias = call.value(0)
    for position in range(1, len(bias.shape) + 1):
        if bias.shape[-position] == out.shape[-position]:
            call.labels.join(out.dims[-position], bias.dims[-position])
            if bias.weight:
                call.labels.role(bias.dims[-position], "carried")
    return out


def einsum(call: Call) -> Value:
    """An einsum without ellipses."""
    terms, _, result = str(call.args[0]).replace(" ", "").partition("->")
    if "." in terms or not result:
        return call.unknown("an einsum with ellipses or without '->'")
    return contract(call, terms.split(","), result, call.values(1))


def convolution(call: Call) -> Value:
    """``x [b, i, *], w [o, i/groups, *]``; transposed: ``w [i, o/groups, *]``."""
    x, weight = resolve(call.labels, call.value(0)), call.value(1)
    transposed, groups, padded = _convolution_settings(call)
    spatial = len(weight.shape) - 2
    if len(x.shape) != spatial + 2:
        return call.unknown("a convolution without a batch dimension")
    inputs, outputs = x.dims[1], call.shape[1]
    out_dim, in_dim = weight.dims[1 if transposed else 0], weight.dims[0 if transposed else 1]
    labels = call.labels
    for dim in weight.dims[2:]:
        labels.pin(dim, "a kernel size")
    if groups == 1:
        labels.join(inputs, in_dim)
        labels.role(in_dim, "consumer")
        labels.role(out_dim, "ranked")
        call.read(in_dim, x, 1, padded)
    else:
        out_dim = _grouped(call, weight, inputs, groups, transposed, padded, x)
    if isinstance(out_dim, Tensor):
        labels.marks.append((out_dim, "conv"))
    dims = (x.dims[0], out_dim, *("a spatial dimension",) * spatial)
    flops_dims = [out_dim, in_dim if groups == 1 else "in step with the outputs"]
    call.product((x, weight), call.shape[0] * prod(call.shape[2:]) * prod(weight.shape) if not transposed else x.shape[0] * prod(x.shape[2:]) * prod(weight.shape), flops_dims)
    return _add_bias(call, Value((x.shape[0], outputs, *call.shape[2:]), dims), call.optional(2), 1)


def _grouped(call: Call, weight: Value, inputs: Dim, groups: int, transposed: bool, padded: bool, x: Value) -> Dim:
    """Groups of one channel: a channel and its outputs are one unit. Larger ones: the same place in every group."""
    labels, size = call.labels, x.shape[1]
    outer, inner = weight.dims[0], weight.dims[1]
    if isinstance(inputs, str) or isinstance(outer, str):
        for dim in (inputs, outer, inner):
            labels.pin(dim, inputs if isinstance(inputs, str) else str(outer))
        return "a grouped convolution of dimensions that cannot shrink"
    if size == groups:  # depthwise: a channel and all that is made of it
        labels.pin(inner, "outputs of one channel")
        made = labels.merge(outer.view(groups, -1)) if not transposed else outer
        labels.join(inputs, made)
        labels.role(outer, "carried")
        if not transposed:
            return outer
        return made.repeat_interleave(call.shape[1] // groups)
    place = labels.merge(inputs.view(groups, -1).T.contiguous())
    if transposed:
        labels.pin(outer, "a grouped transposed convolution")
        labels.pin(inputs, "a grouped transposed convolution")
        return "a grouped transposed convolution"
    labels.join(place, inner)
    labels.role(inner, "consumer")
    call.read(inner, x, 1, padded)
    labels.merge(outer.view(groups, -1).T.contiguous())
    labels.role(outer, "ranked")
    return outer


def _convolution_settings(call: Call) -> tuple[bool, int, bool]:
    """Transposed, groups, padded with zeros."""
    name = call.target.split(".")[1]
    if name == "convolution":
        return bool(call.args[6]), int(call.args[8]), any(call.args[4])
    transposed = "transpose" in name
    padding = call.argument("padding", 0)
    groups = int(call.argument("groups", 1))
    if isinstance(padding, str):
        return transposed, groups, padding == "same"
    return transposed, groups, any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def attention(call: Call) -> Value:
    """``q [.., h, s, d], k [.., g, t, d], v [.., g, t, e], mask``: a head is its query, key and value together."""
    labels = call.labels
    query, key, value = (resolve(labels, call.value(i)) for i in range(3))
    if len(query.shape) < 4:
        heads: list[Dim] = []
    else:
        shared = query.shape[-3] // key.shape[-3]
        heads = [v.dims[-3] for v in (key, value)]
        if shared > 1:
            heads = [h.repeat_interleave(shared) if isinstance(h, Tensor) else h for h in heads]
        heads.append(query.dims[-3])
        mask = call.optional(3)
        if mask is not None:
            mask = resolve(labels, mask)
            heads += [mask.dims[-3]] if len(mask.shape) > 2 and mask.shape[-3] == query.shape[-3] else []
            for dim in mask.dims[-2:]:
                labels.pin(dim, "a dimension of the attention mask")
    for other in heads[1:]:
        labels.join(heads[0], other)
    for dim in (query.dims[-1], key.dims[-1]):
        labels.pin(dim, HEAD)
    if heads and isinstance(heads[0], Tensor):
        labels.marks.append((heads[0], "heads"))
    flops = prod(query.shape) * key.shape[-2] + prod(query.shape[:-1]) * key.shape[-2] * value.shape[-1]
    call.product((query, key), flops, heads[:1])
    batch = tuple(call.labels.join(q, k) for q, k in zip(query.dims[:-3], key.dims[:-3], strict=True))
    dims = (*batch, *((heads[-1] if not isinstance(heads[0], str) else heads[0],) if heads else ()), query.dims[-2], value.dims[-1])
    return Value(call.shape, dims if len(dims) == len(call.shape) else ("attention",) * len(call.shape))


def recurrent(call: Call) -> list[Value]:
    """LSTM, GRU and tanh RNN: unit j is row j of every gate, in every layer and direction."""
    labels = call.labels
    lstm = ".lstm." in call.target
    x, state = resolve(labels, call.value(0)), call.args[1]
    parameters = call.values(2)
    biases, layers = bool(call.args[3]), int(call.args[4])
    directions, batch_first = 2 if call.args[7] else 1, call.args[8]
    per_layer = len(parameters) // (layers * directions)
    if per_layer != (4 if biases else 2) or not isinstance(batch_first, bool):
        return [call.unknown("a recurrent layer with projections")] * (3 if lstm else 2)
    hidden = parameters[1].shape[1]
    unit: Dim = labels.fresh(hidden)
    layer_input: Dim = x.dims[-1]
    for number in range(layers):
        for direction in range(directions):
            index = (number * directions + direction) * per_layer
            _recurrent_layer(call, parameters[index : index + per_layer], unit, layer_input, x if number == 0 else None)
        layer_input = unit.repeat(directions) if isinstance(unit, Tensor) else unit
    for initial in call.values(1) if isinstance(state, (list, tuple)) else (call.value(1),):
        if not initial.weight or initial.labelled:
            labels.pin(initial.dims[-1], "the initial state")
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
        call.read(incoming.dims[1], x, len(x.shape) - 1)

