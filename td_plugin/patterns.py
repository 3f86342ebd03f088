"""Patterns that hardware can use: N of M consecutive weights, and blocks of a weight matrix.

A weight is taken as the matrix ``[outputs, inputs]`` in which `OutputRow` finds its rows. Of a convolution the inputs
of N:M are its input channels, at every place of the kernel, which is what sparse tensor cores multiply; the columns
of blocks are channels and places alike, as in the matrix that the convolution multiplies with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import pad

from td_plugin.errors import TdError
from td_plugin.units import Slice


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _outputs_first(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0) if dim else tensor


@dataclass(frozen=True)
class NM:
    """Single weights, ranked within every `m` consecutive inputs of an output, of which `n` stay: 2:4, 4:8, 1:4.

    Mishra et al., arXiv 2104.08378 (2:4); Zhou et al., arXiv 2102.04010 (N:M).

    Attributes:
        n: weights that stay when a ramp is done, whatever γ is.
        m: consecutive inputs that are ranked together.

    Raises:
        TdError: not ``1 <= n < m``; `to_groups`: the inputs of a tensor cannot be divided by `m`.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not (_whole(self.n, 1) and _whole(self.m, 2) and self.n < self.m):
            raise TdError("N:M keeps n of m weights", got=f"{self.n}:{self.m}", fix="1 <= n < m, for example 2:4")

    @property
    def kinds(self) -> tuple[str, ...]:
        """No whole units."""
        return ()

    @property
    def members(self) -> Literal["all", "producers"]:
        """The tensor itself."""
        return "producers"

    @property
    def single(self) -> bool:
        """Groups are single weights."""
        return True

    @property
    def keeps(self) -> int | None:
        """`n`."""
        return self.n

    def to_groups(self, importances: Sequence[Tensor], slices: Sequence[Slice]) -> Tensor:
        """``[*w] -> [outputs·places·inputs / m, m]``."""
        (importance,), (slice_,) = importances, slices
        rows = _outputs_first(importance, slice_.dim).movedim(1, -1)
        if rows.shape[-1] % self.m:
            raise TdError(
                f"the inputs of the tensor cannot be divided into groups of {self.m}",
                where=slice_.fqn,
                got=f"{rows.shape[-1]} inputs, shape {tuple(importance.shape)}",
                fix="leave the tensor out: prepare(model, config=td.layerwise.fitting(model, recipe)); or another m",
            )
        return rows.reshape(-1, self.m)

    def to_mask(self, groups: Tensor, slice_: Slice, shape: Sequence[int]) -> Tensor:
        """``[outputs·places·inputs / m, m] -> [*w]``."""
        rest = [size for dim, size in enumerate(shape) if dim != slice_.dim]
        rows = groups.view(shape[slice_.dim], *rest[1:], rest[0])
        return rows.movedim(-1, 1).movedim(0, slice_.dim)


@dataclass(frozen=True)
class Block:
    """Blocks of ``rows x columns`` weights, ranked within their tensor by the root mean square of their importances.

    For magnitude the order is that of the L2 norm. Blocks at an edge that the shape does not divide are smaller: they
    are ranked by their mean as well, so that their size is nothing against them. Narang et al., arXiv 1711.02782,
    rank by the largest magnitude; Gray et al. 2017 ("GPU kernels for block-sparse weights") by the norm.

    Attributes:
        rows: consecutive outputs.
        columns: consecutive inputs; of a convolution, entries of the flattened filter.

    Raises:
        TdError: `rows` or `columns` below 1.
    """

    rows: int = 4
    columns: int = 4

    def __post_init__(self) -> None:
        if not (_whole(self.rows, 1) and _whole(self.columns, 1)):
            raise TdError("a block has rows and columns", got=f"{self.rows}x{self.columns}", fix="for example 4x4")

    @property
    def kinds(self) -> tuple[str, ...]:
        """No whole units."""
        return ()

    @property
    def members(self) -> Literal["all", "producers"]:
        """The tensor itself."""
        return "producers"

    @property
    def single(self) -> bool:
        """Groups are blocks."""
        return False

    @property
    def keeps(self) -> int | None:
        """γ decides."""
        return None

    def to_groups(self, importances: Sequence[Tensor], slices: Sequence[Slice]) -> Tensor:
        """``[*w] -> [1, blocks]``, row by row."""
        (importance,), (slice_,) = importances, slices
        squares = _outputs_first(importance, slice_.dim).flatten(1).float().square()
        sizes = self._sums(squares.new_ones(()).expand(squares.shape))
        return (self._sums(squares) / sizes).sqrt().reshape(1, -1)

    def _sums(self, matrix: Tensor) -> Tensor:
        """``[outputs, inputs] -> [blocks down, blocks across]``."""
        down, across = -(-matrix.shape[0] // self.rows), -(-matrix.shape[1] // self.columns)
        edges = (0, across * self.columns - matrix.shape[1], 0, down * self.rows - matrix.shape[0])
        return pad(matrix, edges).view(down, self.rows, across, self.columns).sum((1, 3))

    def to_mask(self, groups: Tensor, slice_: Slice, shape: Sequence[int]) -> Tensor:
        """``[1, blocks] -> [*w]``."""
        rest = [size for dim, size in enumerate(shape) if dim != slice_.dim]
        outputs, inputs = shape[slice_.dim], math.prod(rest)
        blocks = groups.view(-(-outputs // self.rows), -(-inputs // self.columns))
        rows = blocks.repeat_interleave(self.rows, 0)[:outputs]
        matrix = rows.repeat_interleave(self.columns, 1)[:, :inputs]
        return matrix.reshape(outputs, *rest).movedim(0, slice_.dim)


@dataclass(frozen=True)
class InputUnits:
    """The weights of one layer that read the same input, ranked within their tensor by the norm of their importances.

    They are zeroed in this layer only: others may read the same input. `granularity.Units` drops what computes it.
    """

    @property
    def kinds(self) -> tuple[str, ...]:
        """No whole units: nothing can be removed."""
        return ()

    @property
    def members(self) -> Literal["all", "producers"]:
        """The tensor itself."""
        return "producers"

    @property
    def single(self) -> bool:
        """Groups are columns."""
        return False

    @property
    def keeps(self) -> int | None:
        """γ decides."""
        return None

    def to_groups(self, importances: Sequence[Tensor], slices: Sequence[Slice]) -> Tensor:
        """``[*w] -> [1, inputs]``."""
        (importance,), (slice_,) = importances, slices
        columns = _outputs_first(importance, slice_.dim).movedim(1, 0).flatten(1)
        return columns.float().square().sum(1).sqrt().unsqueeze(0)

    def to_mask(self, groups: Tensor, slice_: Slice, shape: Sequence[int]) -> Tensor:
        """``[1, inputs] -> [*w]``."""
        sizes = [1] * len(shape)
        sizes[0 if slice_.dim else 1] = -1
        return groups.view(sizes).expand(*shape)
