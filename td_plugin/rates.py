"""How γ is spread over the tensors whenever they are ranked, by the importances of all: values of `Recipe.rates`.

`td_plugin.layerwise` spreads it once, by the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from td_plugin import kernels
from td_plugin.contract import check_fraction
from td_plugin.errors import TdError
from td_plugin.masks import count, share


class Rates(Protocol):
    """γ of every target, from what is asked of it and from the importances of all."""

    def levels(self, asked: Sequence[float], importances: Sequence[Tensor]) -> list[float]:
        """γ by target.

        Args:
            asked: γ of each target's config, as its schedule has it now.
            importances: ``[pools, groups]`` of each; -inf for what must not come back.

        Raises:
            TdError: what is asked for cannot be had.
        """
        ...


@dataclass(frozen=True)
class Global:
    """The least important groups of all tensors together, whatever tensor they are in; each keeps at least a floor.

    As many go as the tensors' own γ add up to: ``Σ int(γ·n)``. Without a floor a tensor of small weights may lose all
    (layer collapse); Tanaka et al., arXiv 2006.05467. Ties are taken by the tensors' order, then by index.

    Attributes:
        floor: the share of its groups, in [0, 1), that every tensor keeps; one group at least.

    Raises:
        TdError: `floor` outside [0, 1); `levels`: the floors keep more than γ leaves.
    """

    floor: float = 0.05

    def __post_init__(self) -> None:
        check_fraction(self.floor, "floor")

    def levels(self, asked: Sequence[float], importances: Sequence[Tensor]) -> list[float]:
        """γ by target: the share of its groups among the lowest of all."""
        sizes = [importance.numel() for importance in importances]
        most = [size - max(int(self.floor * size + 1 - 1e-9), 1) for size in sizes]
        wanted = sum(count(level, size) for level, size in zip(asked, sizes, strict=True))
        if wanted > sum(most):
            raise TdError(
                "the floors of the tensors keep more than γ leaves",
                got=f"γ {wanted / sum(sizes):.4g}, floor {self.floor:g}",
                fix=f"at most γ = {sum(most) / sum(sizes):.4g}, or a lower floor",
            )
        return [share(n, size) for n, size in zip(_lowest(importances, most, wanted), sizes, strict=True)]


def _lowest(importances: Sequence[Tensor], most: Sequence[int], wanted: int) -> list[int]:
    """How many of the `wanted` lowest importances are in each tensor, if tensor i gives at most ``most[i]``."""
    flat = [importance.flatten().to(importances[0].device) for importance in importances]
    counts, free = [0] * len(flat), list(range(len(flat)))
    while wanted:
        pooled = torch.cat([flat[i] for i in free]).view(1, -1)
        found = kernels.cut_importances(pooled, share(wanted, pooled.numel()), None)
        last = pooled.kthvalue(wanted).values if found is None else found.kth[0, 0]
        counts = [int((flat[i] < last).sum()) if i in free else counts[i] for i in range(len(flat))]
        room = wanted - sum(counts[i] for i in free)
        for i in free:
            tied = min(int((flat[i] == last).sum()), room) if room else 0
            counts[i], room = counts[i] + tied, room - tied
        over = [i for i in free if counts[i] > most[i]]
        if not over:
            break
        for i in over:  # they stay at their floor: what the others have to give more only raises the threshold
            counts[i], wanted = most[i], wanted - most[i]
            free.remove(i)
    return counts


@dataclass(frozen=True)
class Below:
    """What lies below a threshold that all tensors share; with `criteria.standardized` Han's quality parameter.

    γ is the most that any tensor loses, and 0 as long as the schedule asks for none.
    Han et al. 2015, arXiv 1506.02626, section 3.

    Attributes:
        threshold: groups whose importance is below it go.

    Raises:
        TdError: `threshold` is not a positive number.
    """

    threshold: float

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)) or not self.threshold > 0:
            raise TdError("the threshold must be positive", got=repr(self.threshold), fix="for example 1.0")

    def levels(self, asked: Sequence[float], importances: Sequence[Tensor]) -> list[float]:
        """γ by target: the share of its importances below the threshold, at most what is asked."""
        found = []
        for level, importance in zip(asked, importances, strict=True):
            below = int((importance < self.threshold).sum())
            found.append(min(level, share(below, importance.numel())))
        return found
