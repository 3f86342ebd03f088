"""What products of tensors say: matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from td_plugin.graph.context import Call, Result
from td_plugin.graph.labels import Dim
from td_plugin.graph.values import NOTHING, VARYING, Value, remove, resolve


def contract(call: Call, terms: Sequence[str], result: str, values: Sequence[Value]) -> Value:
    """An einsum: one letter a dimension; letters that `result` lacks are summed over."""
    values = [resolve(call.labels, value) for value in values]
    dims: dict[str, Dim] = {}
    sizes: dict[str, int] = {}
    entries = [entry for t, v in zip(terms, values, strict=True) for entry in zip(t, v.dims, v.shape, strict=True)]
    for letter, dim, size in entries:
        if sizes.get(letter, 1) == 1:
            dims[letter], sizes[letter] = dim, size
        elif size != 1:
            dims[letter] = call.labels.join(dims[letter], dim)
    _roles(call, terms, result, values)
    weights = {
        letter: dim
        for t, v in zip(terms, values, strict=True)
        if v.weight
        for letter, dim in zip(t, v.dims, strict=True)
    }
    call.product(values, prod(sizes.values()), [weights.get(letter, dim) for letter, dim in dims.items()])
    shape, out = zip(*((sizes[letter], dims[letter]) for letter in result), strict=True) if result else ((), ())
    value = Value(shape, out, weight=all(value.weight for value in values))
    return replace(value, rest=_rest(terms, result, values, dims))


def _rest(terms: Sequence[str], result: str, values: Sequence[Value], dims: Mapping[str, Dim]) -> int:
    """What silenced units leave: of a unit that a weight makes, nothing; of one that passes, what enters."""
    rests = []
    for letter in result:
        having = [v for t, v in zip(terms, values, strict=True) if letter in t and v.shape[t.index(letter)] > 1]
        if isinstance(dims[letter], Tensor) and not any(v.weight or v.rest == NOTHING for v in having):
            rests.append(max(v.rest for v in having) if len(having) == len(values) else VARYING)
    return max(rests, default=NOTHING)


def _roles(call: Call, terms: Sequence[str], result: str, values: Sequence[Value]) -> None:
    activations = [(term, value) for term, value in zip(terms, values, strict=True) if not value.weight]
    for term, value in zip(terms, values, strict=True):
        for letter, dim in zip(term, value.dims, strict=True):
            meets = [(other, source) for other, source in activations if letter in other]
            if value.weight and activations:
                _weight_role(call, letter, dim, result, meets)
            elif value.weight:
                continue
            elif letter not in result and (len(activations) > 1 or all(letter not in t or t is term for t in terms)):
                call.labels.pin(dim, f"activations are summed over it: {call.location}")
            elif len(activations) > 1 and isinstance(dim, Tensor) and len(meets) == len(activations):
                call.labels.marks.append((dim, "heads"))


def _weight_role(call: Call, letter: str, dim: Dim, result: str, meets: Sequence[tuple[str, Value]]) -> None:
    """A dimension of a weight makes units, scales those that are there, or reads them."""
    if letter in result:
        call.labels.role(dim, "carried" if meets else "ranked")
    elif meets:
        call.labels.role(dim, "consumer")
        term, source = meets[0]
        call.consume(dim, source)
        call.read(dim, source, term.index(letter))
    else:
        call.labels.pin(dim, f"a weight is summed over it: {call.location}")


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
        for place, passing in enumerate(out.dims):
            if place != dim % len(out.dims):
                call.labels.pin(passing, f"a bias of another dimension is added to its units: {call.location}")
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


def grouped_product(call: Call) -> Result:
    """``x [n, i], w [experts, i, o]``: consecutive rows of x meet the weight of one expert."""
    x, weight = call.value(0), resolve(call.labels, call.value(1))
    if (len(x.shape), len(weight.shape)) != (2, 3):
        return call.unknown("a product of groups that are not rows")
    call.labels.pin(weight.dims[0], "experts")
    return contract(call, ("ny", "yz"), "nz", (x, remove(weight, 0)))


def einsum(call: Call) -> Result:
    """An einsum without ellipses."""
    terms, _, result = str(call.args[0]).replace(" ", "").partition("->")
    if "." in terms or not result:
        return call.unknown("an einsum with ellipses or without '->'")
    return contract(call, terms.split(","), result, call.values(1))


def convolution(call: Call) -> Result:
    """``x [b, i, *], w [o, i/groups, *]``; transposed: ``w [i, o/groups, *]``."""
    x, weight = resolve(call.labels, call.value(0)), resolve(call.labels, call.value(1))
    transposed, groups, padded = _convolution_settings(call)
    spatial = len(weight.shape) - 2
    if len(x.shape) != spatial + 2:
        return call.unknown("a convolution without a batch dimension")
    out_dim, in_dim = weight.dims[int(transposed)], weight.dims[1 - int(transposed)]
    labels, positions = call.labels, prod((x.shape if transposed else call.shape)[2:])
    for dim in (*x.dims[2:], *weight.dims[2:]):
        labels.pin(dim, f"a convolution slides over it: {call.location}")
    if groups == 1:
        labels.join(x.dims[1], in_dim)
        labels.role(in_dim, "consumer")
        labels.role(out_dim, "ranked")
        call.consume(x.dims[1], x)
        call.read(in_dim, x, 1, padded)
    else:
        out_dim = _grouped(call, x, weight, groups, transposed, padded)
    if isinstance(out_dim, Tensor):
        labels.marks.append((out_dim, "conv"))
    scales = [out_dim, *([in_dim] if groups == 1 else [])]
    call.product((x, weight), x.shape[0] * positions * prod(weight.shape), scales)
    out = Value(call.shape, (x.dims[0], out_dim, *("a spatial dimension",) * spatial))
    return _add_bias(call, out, call.optional(2), 1)


def _grouped(call: Call, x: Value, weight: Value, groups: int, transposed: bool, padded: bool) -> Dim:
    """Groups of one channel: a channel and its outputs are one unit. Larger ones: the same place in every group."""
    labels, inputs, (outer, inner) = call.labels, x.dims[1], weight.dims[:2]
    depthwise = x.shape[1] == groups
    missing = next((dim for dim in (inputs, outer) if isinstance(dim, str)), "")
    if missing or (transposed and not depthwise):
        reason = missing or f"a grouped transposed convolution: {call.location}"
        for dim in (inputs, outer, inner):
            labels.pin(dim, reason)
        return reason
    if depthwise:
        return _depthwise(call, torch.as_tensor(inputs), torch.as_tensor(outer), inner, transposed)
    labels.join(labels.merge(torch.as_tensor(inputs).view(groups, -1).T.contiguous()), inner)
    labels.role(inner, "consumer")
    call.consume(inputs, x)
    call.read(inner, x, 1, padded)
    labels.merge(torch.as_tensor(outer).view(groups, -1).T.contiguous())
    labels.role(outer, "ranked")
    return outer


def _depthwise(call: Call, inputs: Tensor, outer: Tensor, inner: Dim, transposed: bool) -> Dim:
    call.labels.pin(inner, f"outputs of one channel: {call.location}")
    call.labels.role(outer, "carried")
    made = outer if transposed else call.labels.merge(outer.view(len(inputs), -1))
    call.labels.join(inputs, made)
    return made.repeat_interleave(call.shape[1] // len(inputs)) if transposed else outer


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
