"""What each operator says of the dimensions of its tensors: one rule an operator, by its name in ATen.

Elementwise operators need no rule of their own: torch tags them. An operator without a rule pins every dimension that
enters it, so that an unknown operator can only make fewer units, never wrong ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from td_plugin.graph import attention, elementwise, mixing, moves, norms, products, recurrent
from td_plugin.graph.context import Call, Result
from td_plugin.graph.values import Value

Rule = Callable[[Call], Result]


def evaluate(call: Call) -> Result:
    """What comes out of `call`, after noting what it says."""
    if call.node.target is operator.getitem:
        several = call.env[call.node.args[0]]  # type: ignore[index]
        return several[call.node.args[1]] if isinstance(several, list) else call.unknown()  # type: ignore[index]
    if not all(isinstance(item, Tensor) for item in _results(call)):
        return _no_tensor(call)
    name = ".".join(call.target.split(".")[1:2])
    if name in UNIFORM:
        return elementwise.uniform(call)
    if name in COPIES:
        return moves.expand(call)
    if not any(value.labelled for value in call.tensors):
        return _weightless(call)
    rule = RULES.get(name) or next((rule for prefix, rule in PREFIXES.items() if name.startswith(prefix)), None)
    if rule is not None:
        return rule(call)
    tags = getattr(call.node.target, "tags", ())
    return elementwise.elementwise(call) if torch.Tag.pointwise in tags else call.unknown()


def _results(call: Call) -> list[object]:
    out = call.node.meta.get("val")
    return list(out) if isinstance(out, (list, tuple)) else [out]


def _no_tensor(call: Call) -> Result:
    """A check or a size; numbers read from a tensor hold its dimensions fast."""
    if not call.target.startswith(("aten._assert", "aten.sym_size")) and call.node.meta.get("val") is not None:
        call.unknown()
    return Value((), ())


def _weightless(call: Call) -> Result:
    out = call.outputs("a dimension of the inputs")
    if isinstance(out, Value):
        return replace(out, weight=bool(call.tensors) and all(value.weight for value in call.tensors))
    return out


def _rules(*entries: tuple[Rule, str]) -> Iterable[tuple[str, Rule]]:
    return ((name, rule) for rule, names in entries for name in names.split())


UNIFORM = frozenset({"zeros", "ones", "full", "new_zeros", "new_ones", "new_full"})
COPIES = frozenset({"expand", "expand_as", "broadcast_to"})

RULES: dict[str, Rule] = dict(
    _rules(
        (products.linear, "linear"),
        (products.matmul, "mm bmm matmul mv dot"),
        (products.addmm, "addmm baddbmm"),
        (products.einsum, "einsum"),
        (products.grouped_product, "_grouped_mm grouped_mm_fallback"),
        (attention.attention, "scaled_dot_product_attention"),
        (recurrent.recurrent, "lstm gru rnn_tanh rnn_relu"),
        (elementwise.elementwise, "where masked_fill masked_fill_"),
        (elementwise.prelu, "prelu"),
        (elementwise.glu, "glu"),
        (elementwise.like, "zeros_like ones_like empty_like full_like rand_like randn_like"),
        (moves.identity, "dropout feature_dropout alpha_dropout native_dropout contiguous clone alias"),
        (moves.identity, "detach detach_ to _to_copy type_as lift_fresh_copy lift_fresh float"),
        (moves.view, "view reshape _unsafe_view flatten unflatten view_as reshape_as squeeze"),
        (moves.transpose, "transpose transpose_ t mT numpy_T swapaxes swapdims"),
        (moves.permute, "permute"),
        (moves.movedim, "movedim moveaxis"),
        (moves.unsqueeze, "unsqueeze"),
        (moves.repeat_interleave, "repeat_interleave"),
        (moves.repeat, "repeat tile"),
        (moves.concatenate, "cat concat concatenate"),
        (moves.stack, "stack"),
        (moves.split, "split split_with_sizes chunk tensor_split unsafe_chunk"),
        (moves.unbind, "unbind"),
        (moves.select, "select"),
        (moves.slice_, "slice"),
        (moves.narrow, "narrow"),
        (mixing.embedding, "embedding"),
        (mixing.index, "index"),
        (mixing.gather, "gather"),
        (mixing.index_select, "index_select"),
        (mixing.index_add, "index_add index_add_"),
        (mixing.over, "softmax _softmax log_softmax cumsum roll flip sort topk"),
        (mixing.pad, "pad constant_pad_nd"),
        (mixing.reduction, "mean sum amax amin prod var std norm linalg_vector_norm logsumexp argmax argmin"),
        (mixing.extremum, "max min"),
        (norms.batch_norm, "batch_norm instance_norm"),
        (norms.layer_norm, "layer_norm"),
        (norms.rms_norm, "rms_norm"),
        (norms.group_norm, "group_norm"),
    )
)

PREFIXES: dict[str, Rule] = dict(
    _rules(
        (products.convolution, "conv"),
        (mixing.windows, "avg_pool max_pool adaptive_avg_pool adaptive_max_pool upsample _adaptive lp_pool"),
    )
)
