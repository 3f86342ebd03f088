"""What is ranked together (a pool) and what lives or dies together (a group).

Every granularity maps the importances of a target's tensors to ``[pools, groups]`` and a choice of groups back to a
mask that broadcasts to each tensor. `OutputRow` and `WholeTensor` work on one tensor; `Units` works on all tensors
that make the units of one layer (the q, k and v projections of its heads, say).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from td_plugin.errors import TdError
from td_plugin.structure import Slice

_KINDS = ("neurons", "channels", "heads")


@dataclass(frozen=True)
class OutputRow:
    """Single weights, ranked within the weights of one output (a row of a Linear, a filter of a convolution).

    The paper's scheme: every output keeps the same number of inputs. Gomez et al., arXiv 1905.13678, section 3.
    """

    @property
    def kinds(self) -> tuple[str, ...]:
        """No whole units."""
        return ()

    def to_groups(self, importances: Sequence[Tensor], slices: Sequence[Slice]) -> Tensor:
        """``[*w] -> [outputs, inputs]``."""
        return importances[0].movedim(slices[0].dim, 0).flatten(1)

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

    def to_groups(self, importances: Sequence[Tensor], slices: Sequence[Slice]) -> Tensor:
        """``[*w] -> [1, weights]``."""
        return importances[0].reshape(1, -1)

    def to_mask(self, groups: Tensor, slice_: Slice, shape: Sequence[int]) -> Tensor:
        """``[1, weights] -> [*w]``."""
        return groups.view(*shape)


@dataclass(frozen=True)
class Units:
    """Whole units of one layer: neurons, convolution channels or attention heads, ranked within the layer.

    A unit's importance is the root of the sum of squares of its weights' importances, over all ranked tensors: for
    magnitude, the L2 norm (Gomez et al., arXiv 1905.13678, section 3).

    Attributes:
        kinds: which kinds of units take part.

    Raises:
        TdError: `kinds` is empty or names an unknown kind.
    """

    kinds: tuple[str, ...] = _KINDS

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(_KINDS):
            raise TdError("unknown kinds of units", got=self.kinds, fix=f"a non-empty choice of {_KINDS}")

    def to_groups(self, importances: Sequence[Tensor], slices: Sequence[Slice]) -> Tensor:
        """``[*w] each -> [1, units]``."""
        squares = [
            importance.movedim(s.dim, 0).reshape(importance.shape[s.dim] // s.span, -1).square().sum(1)
            for importance, s in zip(importances, slices, strict=True)
        ]
        return torch.stack(squares).sum(0).sqrt().unsqueeze(0)

    def to_mask(self, groups: Tensor, slice_: Slice, shape: Sequence[int]) -> Tensor:
        """``[1, units] -> [1, .., units·span, .., 1]``: one entry per unit, nothing per weight."""
        sizes = [1] * len(shape)
        sizes[slice_.dim] = shape[slice_.dim]
        return groups[0].repeat_interleave(slice_.span).view(sizes)
