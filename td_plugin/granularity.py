"""What is ranked together (a pool) and what lives or dies together (a group).

Every granularity maps the importances of a target's tensors to ``[pools, groups]`` and a choice of groups back to a
mask that broadcasts to each tensor. `OutputRow` and `WholeTensor` work on one tensor; `Units` works on all tensors
that make the units of one group (the q, k and v projections of a layer's heads, say). `NM` and `Block` are in
`td_plugin.patterns`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from td_plugin.errors import TdError
from td_plugin.patterns import NM, Block, InputUnits
from td_plugin.units import Kind, Slice

__all__ = ["KINDS", "NM", "Block", "InputUnits", "Members", "OutputRow", "Units", "WholeTensor"]

Members = Literal["all", "producers"]
"""Whose importances make that of a unit: every tensor it runs through, or those that compute it."""

KINDS: tuple[str, ...] = ("neurons", "channels", "heads")
"""The kinds of units that unit recipes drop unless they name others; no tensor is made of two of them."""


@dataclass(frozen=True)
class OutputRow:
    """Single weights, ranked within the weights of one output (a row of a Linear, a filter of a convolution).

    The paper's scheme: every output keeps the same number of inputs. Gomez et al., arXiv 1905.13678, section 3.

    Attributes:
        keeps: how many weights of every output stay when a ramp is done, whatever their number (Xtreme-k); None where γ
            says it.

    Raises:
        TdError: `keeps` below 1.
    """

    keeps: int | None = None

    def __post_init__(self) -> None:
        if self.keeps is not None and (isinstance(self.keeps, bool) or self.keeps < 1):
            raise TdError("an output keeps at least one weight", where="keeps", got=self.keeps, fix="for example 3")

    @property
    def single(self) -> bool:
        """Groups are single weights."""
        return True

    @property
    def kinds(self) -> tuple[str, ...]:
        """No whole units."""
        return ()

    @property
    def members(self) -> Members:
        """The tensor itself."""
        return "producers"

    def to_groups(self, importances: Sequence[Tensor], slices: Sequence[Slice]) -> Tensor:
        """``[*w] -> [outputs, inputs]``."""
        (importance,), (slice_,) = importances, slices
        return (importance.movedim(slice_.dim, 0) if slice_.dim else importance).flatten(1)

    def to_mask(self, groups: Tensor, slice_: Slice, shape: Sequence[int]) -> Tensor:
        """``[outputs, inputs] -> [*w]``."""
        rest = [size for dim, size in enumerate(shape) if dim != slice_.dim]
        return groups.view(shape[slice_.dim], *rest).movedim(0, slice_.dim)


@dataclass(frozen=True)
class WholeTensor:
    """Single weights, ranked within their tensor: outputs may end with different numbers of inputs."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """No whole units."""
        return ()

    @property
    def members(self) -> Members:
        """The tensor itself."""
        return "producers"

    @property
    def single(self) -> bool:
        """Groups are single weights."""
        return True

    @property
    def keeps(self) -> int | None:
        """γ decides."""
        return None

    def to_groups(self, importances: Sequence[Tensor], slices: Sequence[Slice]) -> Tensor:
        """``[*w] -> [1, weights]``."""
        return importances[0].reshape(1, -1)

    def to_mask(self, groups: Tensor, slice_: Slice, shape: Sequence[int]) -> Tensor:
        """``[1, weights] -> [*w]``."""
        return groups.view(*shape)


@dataclass(frozen=True)
class Units:
    """Whole units: neurons, convolution channels, attention heads, the residual stream's width or its layers.

    Units are ranked within their group. A unit's importance is the root of the sum of squares of its weights'
    importances over all tensors given: for magnitude, the L2 norm (Gomez et al., arXiv 1905.13678, section 3).

    Attributes:
        kinds: which kinds of units take part.
        members: ``"all"`` ranks a unit by the weights that compute it and by those that read it (the class of coupled
            dimensions, as in Fang et al., arXiv 2301.12900), ``"producers"`` by the former alone (Gomez et al.).

    Raises:
        TdError: `kinds` is empty or names an unknown kind; unknown `members`.
    """

    kinds: tuple[str, ...] = KINDS
    members: Members = "all"

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(get_args(Kind)):
            raise TdError("unknown kinds of units", got=self.kinds, fix=f"a non-empty choice of {get_args(Kind)}")
        if self.members not in get_args(Members):
            raise TdError("unknown members", got=self.members, fix="'all' or 'producers'")

    @property
    def single(self) -> bool:
        """Groups are units."""
        return False

    @property
    def keeps(self) -> int | None:
        """γ decides."""
        return None

    def to_groups(self, importances: Sequence[Tensor], slices: Sequence[Slice]) -> Tensor:
        """``[*w] each -> [1, units]``; as many units as the slices name, a slice may name a few of them only."""
        squares = [_by_unit(_by_entry(i, s.dim), s) for i, s in zip(importances, slices, strict=True)]
        units = max(map(len, squares))
        device = squares[0].device  # the layers of a residual stream may be spread over several
        return torch.stack([pad(s, (0, units - len(s))).to(device) for s in squares]).sum(0).sqrt().unsqueeze(0)

    def to_mask(self, groups: Tensor, slice_: Slice, shape: Sequence[int]) -> Tensor:
        """``[1, units] -> [1, .., entries, .., 1]``: one entry per index along the dimension, nothing per weight."""
        sizes = [1] * len(shape)
        sizes[slice_.dim] = shape[slice_.dim]
        if not slice_.owners:
            return groups[0].repeat_interleave(slice_.span).view(sizes)
        owners = _owners(slice_).to(groups.device)
        return pad(groups[0], (0, 1))[owners].view(sizes)  # entries of no unit, -1, read the False at the end


def _by_entry(importance: Tensor, dim: int) -> Tensor:
    """``[*w] -> [entries]``: the sum of squares of all that lies at one index along `dim`."""
    rest = [d for d in range(importance.ndim) if d != dim]
    if dim == 0 and rest and importance.dtype == torch.float32:
        norms: Tensor = torch.linalg.vector_norm(importance, dim=rest)  # one pass, no copy
        return norms.square()
    squares = importance.float().square()
    return squares.sum(rest) if rest else squares


def _by_unit(entries: Tensor, slice_: Slice) -> Tensor:
    """``[entries] -> [units]``: the sum over the entries of each unit, in a fixed order on every device."""
    if not slice_.owners:
        return entries.view(-1, slice_.span).sum(1)
    owners = _owners(slice_)
    order = owners.argsort(stable=True)[int((owners < 0).sum()) :]  # of -1 there may be any number: left out
    owned = owners[order]
    counts = owned.bincount()
    first = counts.cumsum(0) - counts
    # A row of entries per unit, filled up with the zero behind the last: no atomic additions, so no jitter in ties.
    table = torch.full((len(counts), int(counts.max()) if len(counts) else 0), len(entries))
    table[owned, torch.arange(len(owned)) - first[owned]] = order
    return pad(entries, (0, 1))[table.to(entries.device)].sum(1)


def _owners(slice_: Slice) -> Tensor:
    """``[entries]`` int64, -1 for no unit; what `Slice.units` says, without reading a long tuple in every step."""
    return torch.frombuffer(_buffer(slice_.owners), dtype=torch.int64)


@lru_cache(maxsize=4096)
def _buffer(owners: tuple[int, ...]) -> array[int]:
    # Numbers, not a tensor: one made under a tracer must not serve others.
    return array("q", owners)
