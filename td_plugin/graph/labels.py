"""Labels: a number for every entry of every tensor dimension, and the equations between them.

A parameter's dimension of size n owns n consecutive labels. Operators equate labels (an elementwise sum equates entry i
of both operands), pin them (what reaches an output cannot shrink) and say which role a tensor plays. Entries whose
labels end up equal live and die together.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from td_plugin.units import MeanNorm, Read

Role = Literal["ranked", "carried", "consumer", "statistics"]
"""Rows that compute a unit; biases and scales of it; columns that read it; buffers of it."""

UNKNOWN = "an operator whose rule is not known"
"""How the reason of such a pin begins."""

Dim = Tensor | str
"""The labels of a dimension, ``[size]`` int64, or the reason why it cannot shrink."""


@dataclass(frozen=True)
class Owner:
    """The tensor dimension that a run of labels belongs to."""

    tensor: str
    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class Product:
    """A multiplication: its cost, and the labels of each dimension it is proportional to."""

    where: str
    flops: int
    dims: tuple[Tensor, ...]


class Labels:
    """Everything the operators of one graph say.

    Attributes:
        owners: of the labels, in ascending order of `start`.
        roles: (tensor, dim) -> the roles it plays, in the order they were found.
        norms: RMS norms over labelled dimensions.
        reads: (labels read, where).
        marks: (labels, "heads" or "residual" or "conv"), which decide what the units are called.
        visits: (labels, module): activations that a module's forward handles.
        products: for counting FLOPs.
    """

    def __init__(self) -> None:
        self.count = 0
        self.owners: list[Owner] = []
        self.roles: dict[tuple[str, int], dict[Role, None]] = defaultdict(dict)
        self.norms: list[tuple[Tensor, MeanNorm]] = []
        self.reads: list[tuple[Tensor, Read]] = []
        self.marks: list[tuple[Tensor, str]] = []
        self.visits: list[tuple[Tensor, str]] = []
        self.products: list[Product] = []
        self.pins: list[tuple[Tensor, str]] = []
        self._edges: list[Tensor] = []

    def fresh(self, size: int) -> Tensor:
        """``[size]`` labels that nothing is known of."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def own(self, tensor: str, dim: int, size: int) -> Tensor:
        """``[size]`` labels of a dimension of a parameter or buffer."""
        self.owners.append(Owner(tensor, dim, self.count, size))
        return self.fresh(size)

    def owner(self, labels: Tensor) -> Owner | None:
        """Whose label the first one is; None for a label that belongs to no tensor."""
        label = int(labels[0])
        found = (
            self.owners[bisect_right(self.owners, label, key=lambda owner: owner.start) - 1] if self.owners else None
        )
        return found if found and found.start <= label < found.start + found.size else None

    def join(self, one: Dim, other: Dim) -> Dim:
        """Equate two dimensions of one size, entry by entry; the result stands for both."""
        if isinstance(one, str) or isinstance(other, str):
            self.pin(one, other if isinstance(other, str) else "")
            self.pin(other, one if isinstance(one, str) else "")
            return one if isinstance(one, str) else other
        if one is not other and not torch.equal(one, other):
            self._edges.append(torch.stack((one, other)))
        return one

    def merge(self, labels: Tensor) -> Tensor:
        """Equate all columns of ``[n, m]`` labels; the first one, ``[n]``."""
        first = labels[:, :1]
        if labels.shape[1] > 1:
            self._edges.append(torch.stack((first.expand_as(labels).reshape(-1), labels.reshape(-1))))
        return first[:, 0].contiguous()

    def pin(self, dim: Dim, reason: str) -> None:
        """No entry of `dim` can be removed."""
        if isinstance(dim, Tensor):
            self.pins.append((dim, reason))

    def role(self, dim: Dim, role: Role) -> None:
        """Note that the tensors behind `dim` play `role` for its entries."""
        while isinstance(dim, Tensor) and len(dim):
            owner = self.owner(dim)
            if owner is None:
                return
            self.roles[owner.tensor, owner.dim].setdefault(role)
            dim = dim[(dim < owner.start) | (dim >= owner.start + owner.size)]

    def classes(self) -> Tensor:
        """``[labels]`` int64: the smallest label of each label's class."""
        root = torch.arange(self.count)
        if not self._edges:
            return root
        one, other = torch.cat(self._edges, dim=1)
        while True:  # a label takes the smallest neighbour's root, then every root jumps to its own: log steps
            least = torch.minimum(root[one], root[other])
            new = root.clone()
            for ends in (one, other, root[one], root[other]):
                new.scatter_reduce_(0, ends, least, "amin")
            new = new[new]
            if torch.equal(new, root):
                return root
            root = new
