"""Operators that compute every entry by itself: entries that meet are one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from td_plugin.graph import values
from td_plugin.graph.context import Call, Result
from td_plugin.graph.values import CONSTANT, NOTHING, ONE, Value, resolve

_PRODUCTS = frozenset({"mul", "div", "true_divide"})
_SUMS = frozenset({"add", "sub"})
_CHOICES = frozenset({"where", "masked_fill"})
_ZERO_AT_ZERO = frozenset(
    {
        *(
            "abs",
            "asinh",
            "atan",
            "ceil",
            "celu",
            "clone",
            "copy",
            "elu",
            "erf",
            "expm1",
            "floor",
            "gelu",
            "hardshrink",
        ),
        *("hardswish", "hardtanh", "leaky_relu", "lerp", "log1p", "maximum", "minimum", "mish", "neg", "pow", "relu"),
        *("relu6", "round", "selu", "sign", "silu", "sin", "sinh", "softshrink", "sqrt", "square", "tan", "tanh"),
        "trunc",
    }
)
_DIVIDES = ("aten.div", "aten.true_divide", "aten.floor_divide", "aten.remainder", "aten.fmod")
_INFINITE_AT_ZERO = ("aten.reciprocal", "aten.rsqrt", "aten.log")


def elementwise(call: Call) -> Result:
    """Entries that meet are one; parameters that are added or multiplied belong to the unit."""
    tensors = call.tensors
    if len(tensors) == 1 and tensors[0].shape == call.shape:
        if tensors[0].weight and call.target.startswith(_INFINITE_AT_ZERO):
            _never_zero(call, tensors[0])
        return replace(tensors[0], rest=_rest(call, [tensors[0].rest]))
    activations = [value for value in tensors if not value.weight]
    for value in tensors if activations else ():
        for dim in value.dims if value.weight else ():
            call.labels.role(dim, "carried")
    divisor = call.env.get(call.args[1]) if call.target.startswith(_DIVIDES) else None
    if isinstance(divisor, Value) and divisor.weight:
        _never_zero(call, divisor)
    out = values.broadcast(call.labels, tensors, call.shape)
    if len(activations) > 1 and call.target.startswith("aten.add"):
        _mark_stream(call, activations[0], activations[1])
    return replace(out, rest=_rest(call, values.remainder(tensors, out)))


def _rest(call: Call, rests: list[int]) -> int:
    """What a silenced unit emits here, given what enters."""
    name = call.target.split(".")[1].rstrip("_")
    if name in _PRODUCTS:
        first = rests[:1] if name != "mul" else rests
        return NOTHING if NOTHING in first else max(rests)
    if name in _CHOICES:  # of a condition and what it chooses from
        chosen = [rest for node, rest in zip(call.node.all_input_nodes, rests, strict=False) if _is_number(node)]
        zero = not any(chosen) and (name == "where" or call.argument("value") == 0)
        return NOTHING if zero else max(rests)
    numbers = name in _SUMS and any(isinstance(item, (int, float)) and item for item in call.node.args[1:])
    return max(*rests, NOTHING if name in _ZERO_AT_ZERO | _SUMS and not numbers else CONSTANT)


def _is_number(node: fx.Node) -> bool:
    found = node.meta.get("val")
    return isinstance(found, Tensor) and found.dtype != torch.bool


def _never_zero(call: Call, value: Value) -> None:
    """A divisor is cut with its units, but not zeroed before: zero by zero is no number."""
    for dim in value.dims:
        call.labels.role(dim, "statistics")


def _mark_stream(call: Call, one: Value, other: Value) -> None:
    """A sum of what two layers computed is a residual stream; a sum within one activation function is not."""
    for a, b in zip(one.dims, other.dims, strict=False):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and not torch.equal(a, b):
            call.labels.marks.append((a, "residual"))


def prelu(call: Call) -> Value:
    """A slope for every channel, ``[c]``, which lies along dimension 1."""
    x, slope = resolve(call.labels, call.value(0)), call.value(1)
    if slope.shape[0] > 1:
        call.labels.join(x.dims[1], slope.dims[0])
        call.labels.role(slope.dims[0], "carried")
    return x


def glu(call: Call) -> Value:
    """The first half of a dimension times the sigmoid of the second."""
    x = resolve(call.labels, call.value(0))
    dim = call.args[1] % len(x.shape)
    half = x.shape[dim] // 2
    pieces = [values.cut(call.labels, x, dim, start, start + half) for start in (0, half)]
    return replace(values.broadcast(call.labels, pieces, call.shape), rest=x.rest)


def like(call: Call) -> Value:
    """A constant of the same shape."""
    rest = NOTHING if "zeros" in call.target else CONSTANT
    return replace(call.value(0), weight=False, rest=rest) if call.value(0).shape == call.shape else uniform(call)


def uniform(call: Call) -> Value:
    """A tensor of one number: it has whatever size the code asks for, so it holds nothing back."""
    dims = tuple(call.labels.fresh(size) if size > 1 else ONE for size in call.shape)
    return Value(call.shape, dims, rest=NOTHING if "zeros" in call.target else CONSTANT)
