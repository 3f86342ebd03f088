"""What each operator says of the dimensions of its tensors: one rule an operator, by its name in ATen.

Elementwise operators need no rule of their own: torch tags them. An operator without a rule pins every dimension that
enters it, so that an unknown operator can only make fewer units, never wrong ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from td_plugin.graph import norms, products, values
from td_plugin.graph.context import Call, Result
from td_plugin.graph.labels import Dim
from td_plugin.graph.values import ONE, Value, resolve

Rule = Callable[[Call], Result]


def evaluate(call: Call) -> Result:
    """What comes out of `call`, after noting what it says."""
    if call.node.target is operator.getitem:
        several = call.env[call.node.args[0]]  # type: ignore[index]
        return several[call.node.args[1]] if isinstance(several, list) else call.unknown()  # type: ignore[index]
    if not all(isinstance(item, Tensor) for item in _results(call)):
        return _no_tensor(call)
    if not any(value.labelled for value in call.tensors):
        return _weightless(call)
    name = ".".join(call.target.split(".")[1:2])
    rule = RULES.get(name) or next((rule for prefix, rule in PREFIXES.items() if name.startswith(prefix)), None)
    if rule is not None:
        return rule(call)
    tags = getattr(call.node.target, "tags", ())
    return elementwise(call) if torch.Tag.pointwise in tags else call.unknown()


def _results(call: Call) -> list[object]:
    out = call.node.meta.get("val")
    return list(out) if isinstance(out, (list, tuple)) else [out]


def _no_tensor(call: Call) -> Result:
    if call.target.startswith(("aten._assert", "aten.sym_size", "aten._assert_tensor_metadata")):
        return Value((), ())
    call.unknown() if call.node.meta.get("val") is not None and call.tensors else None
    return Value((), ())


def _weightless(call: Call) -> Result:
    out = call.outputs("a dimension of the inputs")
    if isinstance(out, Value):
        return replace(out, weight=bool(call.tensors) and all(value.weight for value in call.tensors))
    return out


def elementwise(call: Call) -> Value:
    """Entries that meet are one; parameters that are added or multiplied belong to the unit."""
    tensors = call.tensors
    activations = [value for value in tensors if not value.weight]
    for value in tensors if activations else ():
        for dim in value.dims if value.weight else ():
            call.labels.role(dim, "carried")
    out = values.broadcast(call.labels, tensors, call.shape, call.node.name)
    if len(activations) > 1 and call.target.startswith("aten.add"):
        _mark_stream(call, activations[0], activations[1])
    return out


def _mark_stream(call: Call, one: Value, other: Value) -> None:
    """A sum of what two layers computed is a residual stream; a sum within one activation function is not."""
    for a, b in zip(one.dims, other.dims, strict=False):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and not torch.equal(a, b):
            call.labels.marks.append((a, "residual"))


def identity(call: Call) -> Value:
    """The same tensor."""
    return call.value(0)


def like(call: Call) -> Value:
    """A constant of the same shape."""
    return replace(call.value(0), weight=False) if call.value(0).shape == call.shape else _fixed(call)


def _fixed(call: Call) -> Value:
    return values.fixed(call.shape, f"made by {call.location}")


def view(call: Call) -> Value:
    """view, reshape, flatten, unflatten."""
    return values.reshape(call.labels, call.value(0), call.shape)


def transpose(call: Call) -> Value:
    """Two dimensions change places."""
    x = call.value(0)
    order = list(range(len(x.shape)))
    one, other = (0, 1) if call.target.startswith("aten.t.") else (call.args[1], call.args[2])
    if len(order) < 2:
        return x
    order[one], order[other] = order[other], order[one]
    return values.permute(x, order)


def permute(call: Call) -> Value:
    """Dimensions in another order."""
    return values.permute(call.value(0), call.args[1])


def unsqueeze(call: Call) -> Value:
    """A new dimension of size one."""
    x = call.value(0)
    return values.insert(x, call.args[1] % (len(x.shape) + 1))


def expand(call: Call) -> Value:
    """Dimensions of size one are repeated."""
    x = call.value(0)
    for _ in range(len(call.shape) - len(x.shape)):
        x = values.insert(x, 0)
    # A repeated entry is not a unit: all copies stay, in step with whatever they meet.
    dims = tuple("copies of one entry" if a != b else d for d, a, b in zip(x.dims, x.shape, call.shape, strict=True))
    return replace(x, shape=call.shape, dims=dims)


def repeat_interleave(call: Call) -> Value:
    """Each entry of a dimension several times in a row."""
    x, dim = resolve(call.labels, call.value(0)), call.argument("dim")
    times = call.argument("repeats")
    if not isinstance(times, int) or dim is None:
        return call.unknown()
    found = x.dims[dim]
    repeated = found.repeat_interleave(times) if isinstance(found, Tensor) else found
    return replace(x, shape=call.shape, dims=tuple(repeated if i == dim % len(x.dims) else d for i, d in enumerate(x.dims)))


def concatenate(call: Call) -> Value:
    """Entries of one dimension after each other; those of the others are one."""
    tensors = [resolve(call.labels, value) for value in call.values(0) if value_has_entries(value)]
    along = int(call.argument("dim", 0) or 0) % len(call.shape)
    for value in tensors:
        for dim in value.dims if value.weight else ():
            call.labels.role(dim, "carried")
    dims: list[Dim] = list(tensors[0].dims)
    for value in tensors[1:]:
        dims = [d if i == along else call.labels.join(d, value.dims[i]) for i, d in enumerate(dims)]
    if any(isinstance(value.dims[along], Tensor) for value in tensors):
        dims[along] = torch.cat([_labels_of(call, value, along) for value in tensors])
    return Value(call.shape, tuple(dims), weight=all(value.weight for value in tensors))


def value_has_entries(value: Value) -> bool:
    """An empty tensor says nothing."""
    return 0 not in value.shape


def _labels_of(call: Call, value: Value, dim: int) -> Tensor:
    found = value.dims[dim]
    if isinstance(found, Tensor):
        return found
    made = call.labels.fresh(value.shape[dim])
    call.labels.pin(made, found)
    return made


def split(call: Call) -> Result:
    """A dimension in pieces: split, chunk, unbind."""
    x = call.value(0)
    dim = int(call.argument("dim", 0) or 0) % len(x.shape)
    if "unbind" in call.target:
        several = [values.select(call.labels, x, dim) for _ in call.shapes] if not x.joint else _unbind(call, x, dim)
        return several
    pieces, start = [], 0
    for shape in call.shapes:
        pieces.append(values.cut(call.labels, x, dim, start, start + shape[dim]))
        start += shape[dim]
    return pieces


def _unbind(call: Call, x: Value, dim: int) -> list[Value]:
    if x.joint is None or dim not in x.joint.dims:
        return [values.select(call.labels, x, dim) for _ in call.shapes]
    first = values.select(call.labels, x, dim)
    return [first for _ in call.shapes]  # every piece is in step with the first


def select(call: Call) -> Value:
    """One entry of a dimension."""
    x = call.value(0)
    return values.select(call.labels, x, int(call.args[1]) % len(x.shape))


def slice_(call: Call) -> Value:
    """A range of a dimension."""
    x = call.value(0)
    dim = int(call.args[1] or 0) % len(x.shape)
    start, stop, step = slice(call.args[2], call.args[3], call.args[4]).indices(x.shape[dim])
    return values.cut(call.labels, x, dim, start, stop, step)


def squeeze(call: Call) -> Value:
    """Without dimensions of size one."""
    return values.reshape(call.labels, call.value(0), call.shape)


def embedding(call: Call) -> Value:
    """Rows of a table."""
    table, indices = call.value(0), call.value(1)
    call.labels.pin(table.dims[0], "rows of an embedding table")
    call.labels.role(table.dims[1], "ranked")
    return Value(call.shape, (*indices.dims, table.dims[1]))


def index(call: Call) -> Value:
    """``x[i, j, ..]``: the dimensions that are indexed go, the others stay."""
    x = resolve(call.labels, call.value(0))
    indexed = [i for i, item in enumerate(call.args[1]) if item is not None]
    if indexed != list(range(indexed[0], indexed[-1] + 1)):
        return call.unknown("indexing of dimensions that are not neighbours")
    for dim in indexed:
        call.labels.pin(x.dims[dim], f"entries of it are picked: {call.location}")
    made = len(call.shape) - (len(x.shape) - len(indexed))
    before, after = x.dims[: indexed[0]], x.dims[indexed[-1] + 1 :]
    return Value(call.shape, (*before, *("picked entries",) * made, *after), weight=x.weight)


def over(call: Call) -> Value:
    """Operators that mix the entries of one dimension and keep the shape: softmax, cumsum, gather, sort, roll, flip."""
    x = resolve(call.labels, call.value(0))
    dims = call.argument("dim", call.argument("dims", -1))
    for dim in dims if isinstance(dims, (list, tuple)) else (dims,):
        call.labels.pin(x.dims[dim], f"its entries are compared or mixed: {call.location}")
    return replace(x, shape=call.shape)


def windows(call: Call) -> Result:
    """Pooling and resizing of trailing dimensions; leading ones (batch, channels) pass."""
    x = resolve(call.labels, call.value(0))
    name = call.target.split(".")[1]
    trailing = next((int(d) for d in "123" if f"{d}d" in name), 2)
    for dim in x.dims[-trailing:]:
        call.labels.pin(dim, f"it is pooled or resized: {call.location}")
    dims = (*x.dims[:-trailing], *("a spatial dimension",) * trailing)
    out = [replace(x, shape=shape, dims=dims, weight=False) for shape in call.shapes]
    return out if isinstance(call.node.meta.get("val"), (list, tuple)) else out[0]


def pad(call: Call) -> Value:
    """Trailing dimensions grow."""
    x = resolve(call.labels, call.value(0))
    dims = list(x.dims)
    for place in range(len(call.args[1]) // 2):
        if any(call.args[1][2 * place : 2 * place + 2]):
            call.labels.pin(dims[-1 - place], f"it is padded: {call.location}")
            dims[-1 - place] = "a padded dimension"
    return replace(x, shape=call.shape, dims=tuple(dims))


def reduction(call: Call) -> Value:
    """A dimension is summed, averaged or searched."""
    x = resolve(call.labels, call.value(0))
    given = call.argument("dim")
    reduced = range(len(x.shape)) if given is None or given == [] else given if isinstance(given, (list, tuple)) else [given]
    gone = {dim % len(x.shape) for dim in reduced}
    keep = len(call.shape) == len(x.shape)
    for dim in gone:
        if isinstance(x.dims[dim], Tensor) and not norms.mean_square(call, x.dims[dim]):
            call.labels.pin(x.dims[dim], f"it is reduced: {call.location}")
    dims = tuple(ONE if dim in gone else found for dim, found in enumerate(x.dims) if keep or dim not in gone)
    return Value(call.shape, dims)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("linear",), products.linear),
    **dict.fromkeys(("mm", "bmm", "matmul", "mv", "dot"), products.matmul),
    **dict.fromkeys(("addmm", "baddbmm"), products.addmm),
    "einsum": products.einsum,
    "scaled_dot_product_attention": products.attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh"), products.recurrent),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "native_dropout", "contiguous", "clone", "alias"), identity),
    **dict.fromkeys(("detach", "detach_", "to", "_to_copy", "type_as", "lift_fresh_copy", "lift_fresh", "float"), identity),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"), like),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"), _fixed),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"), view),
    **dict.fromkeys(("transpose", "t", "swapaxes", "transpose_"), transpose),
    "permute": permute,
    "movedim": permute,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    "repeat_interleave": repeat_interleave,
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenate),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_chunk"), split),
    "select": select,
    "slice": slice_,
    "embedding": embedding,
    "index": index,
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "cumsum", "roll", "flip", "sort", "gather"), over),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "prod", "var", "std", "norm", "linalg_vector_norm", "logsumexp"), reduction),
    "batch_norm": norms.batch_norm,
    "instance_norm": norms.batch_norm,
    "layer_norm": norms.layer_norm,
    "rms_norm": norms.rms_norm,
    "group_norm": norms.group_norm,
}

PREFIXES: dict[str, Rule] = {
    "conv": products.convolution,
    **dict.fromkeys(("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample"), windows),
    **dict.fromkeys(("_adaptive", "lp_pool", "interpolate"), windows),
}
