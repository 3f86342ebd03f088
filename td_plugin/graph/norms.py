"""What norms say: which of them a unit can leave, and what must change when it does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from td_plugin.graph.context import Call
from td_plugin.graph.labels import Dim
from td_plugin.graph.values import CONSTANT, NOTHING, Value, resolve
from td_plugin.units import MeanNorm


def batch_norm(call: Call) -> Value:
    """Every channel for itself: ``x [b, c, *]``, weight, bias, running mean and variance ``[c]``."""
    x = resolve(call.labels, call.value(0))
    for position in (1, 2, 3, 4):
        found = call.optional(position)
        if found is not None:
            call.labels.join(x.dims[1], found.dims[0])
            call.labels.role(found.dims[0], "carried" if position < 3 else "statistics")
    if call.optional(3) is None and call.target.startswith("aten.batch_norm"):
        call.labels.pin(x.dims[1], f"BatchNorm without running statistics: {call.location}")
    return replace(x, weight=False, rest=_rest(x, call.optional(1), call.optional(2)))


def layer_norm(call: Call) -> Value:
    """Mean and variance run over the entries: without some of them they would be others."""
    x = resolve(call.labels, call.value(0))
    given = (call.optional(2), call.optional(3))
    reason = f"LayerNorm takes the mean over it, so nothing can leave it exactly: {call.module}"
    for place in range(1, len(call.args[1]) + 1):
        for dim in (x.dims[-place], *(value.dims[-place] for value in given if value)):
            call.labels.pin(dim, reason)
        for value in given:
            if value:
                call.labels.join(x.dims[-place], value.dims[-place])
                call.labels.role(value.dims[-place], "carried")
    return replace(x, weight=False)


def group_norm(call: Call) -> Value:
    """The channels of a group live and die together."""
    x = resolve(call.labels, call.value(0))
    channels, groups = x.dims[1], int(call.args[1])
    if isinstance(channels, Tensor):
        call.labels.merge(channels.view(groups, -1))
    for position in (2, 3):
        found = call.optional(position)
        if found is not None:
            call.labels.join(channels, found.dims[0])
            call.labels.role(found.dims[0], "carried")
    return replace(x, weight=False, rest=x.rest if call.optional(2) is None else NOTHING)


def _rest(x: Value, weight: Value | None, bias: Value | None) -> int:
    """A norm whose scale and shift are silenced emits nothing; one without them, a constant."""
    return NOTHING if weight is not None and bias is not None else max(x.rest, CONSTANT)


def rms_norm(call: Call) -> Value:
    """``torch.nn.functional.rms_norm``."""
    x, weight = resolve(call.labels, call.value(0)), call.optional(2)
    module = _module(call)
    noted = len(call.args[1]) == 1 and weight is not None and call.args[3] is not None and module is not None
    if weight is not None:
        call.labels.join(x.dims[-1], weight.dims[-1])
        call.labels.role(weight.dims[-1], "carried")
    if noted and isinstance(x.dims[-1], Tensor) and "eps" in _floats(module, call.args[3]):
        call.labels.norms.append((x.dims[-1], MeanNorm(call.module, "eps")))
    else:
        for place in range(1, len(call.args[1]) + 1):
            call.labels.pin(x.dims[-place], f"an RMSNorm without weight or epsilon: {call.location}")
    return replace(x, weight=False, rest=NOTHING if noted else x.rest)


def mean_square(call: Call, dim: Dim) -> bool:
    """Whether this mean is that of a hand-written RMSNorm, ``w · x / sqrt(mean(x²) + eps)``; it is noted then."""
    node, module = call.node, _module(call)
    if not call.target.startswith("aten.mean") or module is None or not isinstance(dim, Tensor):
        return False
    square = node.args[0]
    if not isinstance(square, fx.Node) or not _is_square(square):
        return False
    shifted = _only_user(node)
    constant = next((a for a in shifted.args if isinstance(a, float)), None) if shifted is not None else None
    if shifted is None or constant is None or not str(shifted.target).startswith("aten.add"):
        return False
    inverse = _only_user(shifted)
    names = _floats(module, constant)
    if inverse is None or "rsqrt" not in str(inverse.target) or not names or not _plain_factor(call):
        return False
    call.labels.norms.append((dim, MeanNorm(call.module, names[0])))
    return True


def _module(call: Call) -> Any:
    """The attributes of the module that makes the call, noted on the graph by the tracer."""
    return call.node.graph.owning_module.meta.get("td_modules", {}).get(call.module)  # type: ignore[union-attr]


def _floats(attributes: Any, value: float) -> list[str]:
    return [name for name, found in attributes.items() if type(found) is float and found == value]


def _is_square(node: fx.Node) -> bool:
    if str(node.target).startswith("aten.pow"):
        return bool(node.args[1] == 2)
    return str(node.target).startswith("aten.mul") and node.args[0] is node.args[1]


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _plain_factor(call: Call) -> bool:
    """Whether the norm's weight only multiplies: ``1 + w`` could not be rescaled."""
    graph = call.node.graph
    names = graph.owning_module.meta.get("td_parameters", {})  # type: ignore[union-attr]
    name = f"{call.module}.weight" if call.module else "weight"
    weight = next((node for node in graph.nodes if node.op == "placeholder" and names.get(node.name) == name), None)
    return weight is not None and all(_multiplies(user) for user in weight.users)


def _multiplies(node: fx.Node) -> bool:
    if str(node.target).startswith(("aten.to", "aten._to_copy")):
        return all(_multiplies(user) for user in node.users)
    return str(node.target).startswith("aten.mul")
