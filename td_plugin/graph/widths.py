"""Rules: which attributes of torch's own modules state the width of a dimension of their tensors."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from td_plugin.units import Size, Slice, UnitGroup

_LINEAR = {("weight", 0): "out_features", ("weight", 1): "in_features", ("bias", 0): "out_features"}
_BILINEAR = {("weight", 1): "in1_features", ("weight", 2): "in2_features"}
_EMBEDDING = {("weight", 0): "num_embeddings", ("weight", 1): "embedding_dim"}
_FEATURES = {(name, 0): "num_features" for name in ("weight", "bias", "running_mean", "running_var")}
_CONV1D = {("weight", 0): "nx", ("weight", 1): "nf", ("bias", 0): "nf"}

_RULES: tuple[tuple[type[nn.Module], dict[tuple[str, int], str]], ...] = (
    (nn.Linear, _LINEAR),
    (nn.Bilinear, _LINEAR | _BILINEAR),
    (nn.Embedding, _EMBEDDING),
    (nn.EmbeddingBag, _EMBEDDING),
    (_NormBase, _FEATURES),
    (nn.PReLU, {("weight", 0): "num_parameters"}),
)
_BY_NAME = {"transformers.pytorch_utils.Conv1D": _CONV1D}  # a name, so that nothing is imported

Found = Iterator[tuple[str, int, int | None]]
"""Attribute, what one unit contributes to it, and its index in a tuple."""


def per_unit(group: UnitGroup, part: Slice, size: int) -> int:
    """How many of the `size` entries of `part` a unit of `group` has.

    Raises:
        ValueError: not all have as many; the message says so.
    """
    units = part.units(size)
    counts = units[units >= 0].bincount(minlength=group.units)
    if int(counts.min()) != int(counts.max()):
        raise ValueError(f"its units take between {int(counts.min())} and {int(counts.max())} entries of {part.fqn}")
    return int(counts[0])


def ruled(module: nn.Module) -> bool:
    """Whether the rules know every width that `module` states."""
    stock = (*(known for known, _ in _RULES), _ConvNd, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.RNNBase)
    return isinstance(module, (*stock, nn.RNNCellBase)) or _name(module) in _BY_NAME


def stated(module: nn.Module, name: str, group: UnitGroup, part: Slice) -> list[Size]:
    """What the rules say of the tensor of `part`, held by `module`, which is called `name`.

    Raises:
        ValueError: units take unequal shares of the tensor or of a convolution's groups; the message says which.
    """
    tensor: Tensor = attrgetter(part.tensor)(module)
    return [Size(name, *found) for found in _found(module, group, part, tensor.shape[part.dim])]


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _found(module: nn.Module, group: UnitGroup, part: Slice, size: int) -> Found:
    share, dim = per_unit(group, part, size), part.dim
    rules = next((rule for known, rule in _RULES if isinstance(module, known)), _BY_NAME.get(_name(module), {}))
    if (part.tensor, dim) in rules:
        yield rules[part.tensor, dim], share, None
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        yield "normalized_shape", share, dim
    elif isinstance(module, nn.GroupNorm):
        yield "num_channels", share, None
        yield "num_groups", _whole_blocks(group, part, size, module.num_groups), None
    elif isinstance(module, _ConvNd):
        yield from _convolution(module, group, part, size, share)
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        yield from _recurrent(module, part, share)


def _convolution(module: _ConvNd, group: UnitGroup, part: Slice, size: int, share: int) -> Found:
    sides = ("in_channels", "out_channels") if isinstance(module, _ConvTransposeNd) else ("out_channels", "in_channels")
    if part.tensor == "bias":  # as many as output channels, which the weight speaks for unless only its groups do
        if isinstance(module, _ConvTransposeNd) and module.groups == 1:
            yield "out_channels", share, None
        elif not isinstance(module, _ConvTransposeNd):
            yield from _convolution(module, group, Slice(part.module, "weight", 0, part.span, part.owners), size, share)
    elif part.dim == 1:
        yield sides[1], share * module.groups, None
    elif part.dim == 0:
        yield sides[0], share, None
        removed = _whole_blocks(group, part, size, module.groups) if module.groups > 1 else 0
        if removed:  # groups go with their channels on both sides
            other = module.in_channels if sides[1] == "in_channels" else module.out_channels
            yield "groups", removed, None
            yield sides[1], removed * (other // module.groups), None


def _whole_blocks(group: UnitGroup, part: Slice, size: int, blocks: int) -> int:
    """How many of the `blocks` equal runs of `size` entries a unit consists of; 0 if it takes equally of each.

    Raises:
        ValueError: neither.
    """
    units = part.units(size).view(blocks, -1)
    if bool((units == units[:, :1]).all()):
        return per_unit(group, Slice(part.module, part.tensor, 0, 1, tuple(units[:, 0].tolist())), blocks)
    if bool((units.sort(dim=1).values == units[:1].sort(dim=1).values).all()):
        return 0
    raise ValueError(f"its units are neither whole groups of {part.module} nor equal parts of each")


def _recurrent(module: nn.RNNBase | nn.RNNCellBase, part: Slice, share: int) -> Found:
    hidden = int(module.hidden_size)
    first = "weight_ih_l0" if isinstance(module, nn.RNNBase) else "weight_ih"
    gates = len(attrgetter(first)(module)) // hidden
    projected = isinstance(module, nn.RNNBase) and module.proj_size > 0
    if part.dim == 0 and not part.tensor.startswith("weight_hr"):
        yield "hidden_size", share // gates, None
    elif part.tensor.startswith("weight_hr") and part.dim == 0 and projected:
        yield "proj_size", share, None
    elif part.tensor.startswith(first):
        yield "input_size", share, None
