"""Reading `nn.Sequential`: which layers follow each other so closely that units between them can be removed.

Nested containers are read as one list. Two neighbouring Linear or convolution layers are a `Link` if everything
between them treats each unit for itself; otherwise there is a reason, in words, why not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d)
_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d)

# Exact classes: a subclass may compute something else.
_ELEMENTWISE: frozenset[type[nn.Module]] = frozenset(
    {
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
        *(nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
        *(nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Threshold),
    }
)
_TRANSPARENT: frozenset[type[nn.Module]] = frozenset(
    {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout}
)
_POOLS: frozenset[type[nn.Module]] = frozenset(
    {
        *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    }
)

Named = tuple[str, nn.Module]
"""A module with its fully qualified name."""


@dataclass(frozen=True)
class Link:
    """Layers that compute units and the one layer that reads them; nothing else does.

    Attributes:
        producers: fully qualified names of the layers whose rows are the units; the consumer reads the last one.
        consumer: fully qualified name of the layer that reads the units.
        norms: BatchNorms between them.
        through: all modules between them that change a constant, in order; includes the norms.
        rows: consecutive rows of a producer per unit.
        span: consecutive inputs of the consumer per unit.
        unfoldable: why a constant unit cannot move into the consumer's bias; empty if it can.
    """

    producers: tuple[str, ...]
    consumer: str
    norms: tuple[str, ...] = ()
    through: tuple[str, ...] = ()
    rows: int = 1
    span: int = 1
    unfoldable: str = ""


def links(model: nn.Module) -> Iterator[tuple[str, Link | str]]:
    """Each layer of a chain that is followed by another one: its name with its link, or with the reason against one."""
    nested: set[str] = set()
    for name, module in model.named_modules():
        if not _is_stock(module, nn.Sequential):
            continue
        nested.update(_join(name, child) for child, _ in _children(module))
        if name not in nested:
            yield from _read(_flatten(name, module))


def layer_fault(module: nn.Module) -> str:
    """Why the rows of `module` cannot be taken for its units; empty if they can."""
    stock = next((known for known in _LAYERS if isinstance(module, known)), None)
    if stock is None:
        return f"{type(module).__name__} is not a Linear or convolution layer"
    if not _is_stock(module, stock):
        return f"{type(module).__name__} has a forward of its own"
    if is_parametrized(module) or "weight" not in dict(module.named_parameters(recurse=False)):
        return "its weight is computed from other tensors (a parametrization)"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups != 1:
        return "its convolution is grouped"
    return ""


def _is_stock(module: nn.Module, stock: type[nn.Module]) -> bool:
    """Whether `module` runs the forward of `stock`, masked or not (a mask wraps the forward)."""
    return isinstance(module, stock) and inspect.unwrap(type(module).forward) is stock.forward


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _children(module: nn.Module) -> list[Named]:
    """Direct children in order; unlike `named_children`, a module that is used twice comes twice."""
    return [(n, child) for n, child in module.named_modules(remove_duplicate=False) if n and "." not in n]


def _flatten(name: str, module: nn.Module) -> list[Named]:
    if not _is_stock(module, nn.Sequential):
        return [(name, module)]
    return [leaf for child, inner in _children(module) for leaf in _flatten(_join(name, child), inner)]


def _read(chain: Sequence[Named]) -> Iterator[tuple[str, Link | str]]:
    producer: Named | None = None
    between: list[Named] = []
    for step in chain:
        if not isinstance(step[1], _LAYERS):
            between.append(step)
            continue
        if producer is not None:
            yield producer[0], _link(producer, between, step)
        producer, between = step, []


def _link(producer: Named, between: Sequence[Named], consumer: Named) -> Link | str:
    fault = layer_fault(producer[1])
    if fault:
        return fault
    fault = layer_fault(consumer[1])
    if fault:
        return f"{consumer[0]} reads it: {fault}"
    flat = False
    for name, module in between:
        fault = _fault_between(module, producer[1], flat)
        if fault:
            return f"{name} is behind it: {fault}"
        flat = flat or isinstance(module, nn.Flatten)
    span = _span(producer[1], consumer[1], flat)
    if isinstance(span, str):
        return f"{consumer[0]} reads it: {span}"
    return Link(
        producers=(producer[0],),
        consumer=consumer[0],
        norms=tuple(name for name, module in between if isinstance(module, _NORMS)),
        through=tuple(name for name, module in between if isinstance(module, (*_NORMS, *_ELEMENTWISE, nn.PReLU))),
        span=span,
        unfoldable="the layer that reads it pads with zeros" if _pads_with_zeros(consumer[1]) else "",
    )


def _fault_between(module: nn.Module, producer: nn.Module, flat: bool) -> str:
    """Why a unit does not pass `module` for itself, or a constant unit does not stay constant; empty if it does."""
    kind = type(module)
    if kind in _ELEMENTWISE or kind in _TRANSPARENT:
        return ""
    if kind is nn.PReLU:
        return "" if module.num_parameters == 1 else "PReLU has a slope per channel"
    if isinstance(module, _NORMS):
        return _norm_fault(module, producer, flat)
    if isinstance(module, nn.Flatten):
        return "" if (module.start_dim, module.end_dim) == (1, -1) else "it keeps other dimensions than the first"
    if kind in _POOLS:
        return _pool_fault(module, producer, flat)
    return f"{kind.__name__} is neither elementwise nor BatchNorm nor pooling"


def _norm_fault(module: nn.Module, producer: nn.Module, flat: bool) -> str:
    stock = next(known for known in _NORMS if isinstance(module, known))
    if not _is_stock(module, stock):
        return f"{type(module).__name__} has a forward of its own"
    if not module.track_running_stats:
        return "BatchNorm without running statistics"
    if flat or module.num_features != _width(producer):
        return "BatchNorm does not normalise the units"
    return ""


def _pool_fault(module: nn.Module, producer: nn.Module, flat: bool) -> str:
    if flat or isinstance(producer, nn.Linear):
        return "it pools over units"
    if isinstance(module, (nn.AvgPool1d, nn.AvgPool2d)):
        padding = module.padding if isinstance(module.padding, tuple) else (module.padding,)
        if module.count_include_pad and any(padding):
            return "it averages its zero padding in"
        if isinstance(module, nn.AvgPool2d) and module.divisor_override is not None:
            return "its divisor is overridden"
    return ""


def _width(layer: nn.Module) -> int:
    return len(dict(layer.named_parameters(recurse=False))["weight"])


def _span(producer: nn.Module, consumer: nn.Module, flat: bool) -> int | str:
    units = _width(producer)
    if isinstance(producer, nn.Linear) and isinstance(consumer, nn.Linear):
        return 1 if consumer.in_features == units else "a flatten between them mixes units"
    if isinstance(producer, nn.Linear):
        return "a convolution behind a Linear layer"
    if not isinstance(consumer, nn.Linear):
        return "a flatten between two convolutions" if flat else 1
    if not flat or consumer.in_features % units:
        return "no flatten brings the channels into its last dimension"
    return consumer.in_features // units


def _pads_with_zeros(consumer: nn.Module) -> bool:
    if not isinstance(consumer, (nn.Conv1d, nn.Conv2d)) or consumer.padding_mode != "zeros":
        return False
    if isinstance(consumer.padding, str):
        return consumer.padding == "same" and any(size > 1 for size in consumer.kernel_size)
    return any(consumer.padding)
