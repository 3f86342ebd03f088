"""The vocabulary of structure: units, the slices of tensors that make them, and what else changes with their number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Kind = Literal["neurons", "heads", "channels", "hidden", "layers"]
"""Neurons of a hidden layer, attention heads (with their key/value group), convolution channels, the residual stream's
width, and whole residual layers."""


@dataclass(frozen=True)
class Slice:
    """One dimension of one tensor, divided among the units.

    Attributes:
        module: fully qualified module name.
        tensor: ``"weight"``, ``"bias"``, ``"running_mean"``...
        dim: the dimension that the units occupy.
        span: consecutive entries per unit: head size for heads, spatial size behind a flatten.
        owners: the unit of each entry, -1 for entries of no unit of this group, where the entries are not simply
            `span` for each unit in turn (packed projections, concatenations); empty where they are.
    """

    module: str
    tensor: str
    dim: int
    span: int = 1
    owners: tuple[int, ...] = ()

    @property
    def fqn(self) -> str:
        """The fully qualified tensor name."""
        return f"{self.module}.{self.tensor}" if self.module else self.tensor

    def units(self, size: int) -> Tensor:
        """``[size]`` int64: the unit of each entry along `dim`, -1 where there is none."""
        return torch.tensor(self.owners) if self.owners else torch.arange(size) // self.span


@dataclass(frozen=True)
class Size:
    """A module attribute that states a width: it falls by `per_unit` with every unit that is removed.

    Cutting is relative, ``new = old - per_unit * removed``: an attribute may state the sum of several groups, as the
    ``in_features`` of a layer that reads a concatenation does.

    Attributes:
        module: fully qualified module name.
        attribute: its name in the module.
        per_unit: what one unit contributes.
        index: which entry, where the attribute is a tuple (``normalized_shape``).
    """

    module: str
    attribute: str
    per_unit: int = 1
    index: int | None = None


@dataclass(frozen=True)
class Residue:
    """What a silenced unit still emits: the bias of `module` (zero if silenced too), passed through `through`.

    Attributes:
        module: the layer whose output the consumers read: the ranked layer, the value projection of heads.
        through: elementwise activations and norms behind it, in order.
        unfoldable: why a non-zero constant cannot move into the consumer's bias; empty if it can.
    """

    module: str
    through: tuple[str, ...] = ()
    unfoldable: str = ""


@dataclass(frozen=True)
class Setting:
    """Where a model's configuration states the width: `key` of its `layer`-th layer, and `size_key` for the span."""

    layer: int
    key: str
    size_key: str = ""


@dataclass(frozen=True)
class MeanNorm:
    """A norm that divides by a mean over the units (RMSNorm): fewer units need a larger `epsilon` and larger weights.

    Attributes:
        module: fully qualified module name; its ``weight`` scales the units.
        epsilon: the attribute that is added to the mean square.
    """

    module: str
    epsilon: str


@dataclass(frozen=True)
class Read:
    """Where the traced graph reads the units, for measuring the constant that a silenced unit still emits.

    Attributes:
        consumer: fully qualified name of the weight whose entries read the units.
        value: name of the graph's node that is read.
        dim: its dimension that the units occupy, or the channels of a convolution's input.
        padded: whether the consumer pads its input with zeros, so that a constant does not stay one at the border.
    """

    consumer: str
    value: str
    dim: int
    padded: bool = False


@dataclass(frozen=True)
class Work:
    """One multiplication in the traced forward.

    Attributes:
        where: fully qualified name of the weight, or of the module for a product of two activations.
        flops: 2 x multiply-adds in one forward of the example inputs.
        scales: (fully qualified tensor name, dim) of every tensor dimension it is proportional to.
    """

    where: str
    flops: int
    scales: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class UnitGroup:
    """The units of one layer and every slice that belongs to them.

    Attributes:
        name: fully qualified name of the layer whose units these are.
        kind: what a unit is.
        units: how many there are.
        ranked: weights whose rows make a unit; their norm ranks it.
        carried: parameters silenced with the unit but never ranked: biases, norm scale and shift.
        consumers: weights whose columns read the units.
        statistics: buffers that are cut with the units: running mean and variance.
        sizes: module attributes that state the width.
        residue: the constant that a silenced unit still emits; None where `reads` says how to measure it.
        setting: the width in the model's configuration, for the families of `td_plugin.families`.
        norms: norms whose mean runs over the units.
        reads: where the traced graph reads the units.
    """

    name: str
    kind: Kind
    units: int
    ranked: tuple[Slice, ...]
    carried: tuple[Slice, ...]
    consumers: tuple[Slice, ...]
    statistics: tuple[Slice, ...]
    sizes: tuple[Size, ...]
    residue: Residue | None
    setting: Setting | None = None
    norms: tuple[MeanNorm, ...] = ()
    reads: tuple[Read, ...] = ()

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Every slice that shrinks with the number of units."""
        return self.ranked + self.carried + self.consumers + self.statistics


@dataclass(frozen=True)
class FixedGroup:
    """Dimensions that live and die together but cannot shrink.

    Attributes:
        name: fully qualified name of the layer they begin at.
        tensors: fully qualified names of the tensors they run through.
        size: how many entries there are.
        reason: why they stay, in words.
    """

    name: str
    tensors: tuple[str, ...]
    size: int
    reason: str


@dataclass(frozen=True)
class Structure:
    """What a model's dimensions are made of.

    Attributes:
        groups: those that can shrink, in the order the model computes them.
        fixed: those that cannot, with the reason.
        source: where this was read: the traced graph, the table of families, `nn.Sequential` chains, or the user.
        work: every multiplication of a traced forward; empty without a trace.
        program: the traced forward, where there is one.
    """

    groups: tuple[UnitGroup, ...]
    fixed: tuple[FixedGroup, ...]
    source: Literal["graph", "table", "chains", "given"]
    work: tuple[Work, ...] = ()
    program: ExportedProgram | None = field(default=None, compare=False, repr=False)
