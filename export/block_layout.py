"""Where a matrix has blocks of zeros: which rows each group of its columns needs.

A matrix here is ``[inputs, outputs]``, as MatMul takes it: the transpose of a torch Linear's weight. A mask that drops
blocks of 128 outputs x 16 inputs in torch leaves blocks of 16 rows x 128 columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

_WIDTHS = (16, 32, 64, 128, 256, 512)  # of column groups that are tried
_HEIGHTS = (64, 32, 16, 8, 4, 2, 1)  # of row blocks
_SLACK = 1.02  # of the area, for blocks that are higher than the zeros strictly allow
_TRIED = 3  # layouts that are worth measuring

# What a rough forecast needs, from onnxruntime 1.32 on a Zen 4 core at 128 rows of input: to gather a row takes about
# as long as to multiply it with so many columns, and a group of columns costs some operators more.
_GATHERING = 40
_SECONDS_PER_GROUP = 6e-6
_FLOPS_PER_SECOND = 1e11
_HOPELESS = 1.4  # of the dense time: a forecast above this is not measured
_ENOUGH = 0.95  # of the matrix: what keeps more is not measured either


@dataclass(frozen=True)
class Group:
    """Neighbouring columns that need the same rows.

    Attributes:
        start: first column.
        stop: the one after the last.
        rows: ``int64 [kept]``, ascending; never empty.
    """

    start: int
    stop: int
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """A matrix as groups of columns; what is in none of their rows is zero.

    Attributes:
        shape: rows and columns of the matrix.
        height: rows of a block; blocks start at its multiples.
        width: columns that share their rows at least; 0 where the groups have several widths.
        groups: from the first column to the last.
    """

    shape: tuple[int, int]
    height: int
    width: int
    groups: tuple[Group, ...]

    @property
    def kept_rows(self) -> int:
        """Rows that have to be gathered, over all groups."""
        return sum(len(group.rows) for group in self.groups)

    @property
    def density(self) -> float:
        """Share of the matrix that is still multiplied, in [0, 1]."""
        area = sum(len(group.rows) * (group.stop - group.start) for group in self.groups)
        return area / (self.shape[0] * self.shape[1])

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The longest runs of rows, as start and stop, of which every group needs all or none."""
        needed = np.zeros((self.shape[0], len(self.groups)), dtype=np.bool_)
        for index, group in enumerate(self.groups):
            needed[group.rows, index] = True
        starts = _changes(needed, axis=0)
        return list(zip(starts, [*starts[1:], self.shape[0]], strict=True))

    def forecast(self, inputs: int) -> float:
        """Time of a rewritten product over that of the dense one, roughly, at so many rows of input."""
        rows, columns = self.shape
        gathered = self.kept_rows * _GATHERING / (rows * columns)
        dense = 2 * max(inputs, 1) * rows * columns / _FLOPS_PER_SECOND
        return self.density + gathered + len(self.groups) * _SECONDS_PER_GROUP / dense


def find_layouts(weight: NDArray[Any], block: tuple[int, int] | None, inputs: int) -> list[Layout]:
    """The layouts that may be worth measuring, the most promising first; empty where there are no blocks of zeros.

    Args:
        weight: ``[rows, columns]``.
        block: rows and columns of a block, or None: groups of columns of several widths are tried, and as they lie.
        inputs: rows of the other factor.
    """
    kept = weight != 0
    rows, columns = kept.shape
    if kept.all() or not kept.size:
        return []
    if block is not None:
        layout = _layout(kept, np.arange(0, columns, block[1]), block[1], min(block[0], rows))
        return [layout] if layout.density < 1 else []
    found: dict[tuple[int, ...], Layout] = {}
    for width, starts in _column_cuts(kept):
        layout = _layout(kept, starts, width)
        # Wide groups come first, and of the same groups the name of the widest is the one to tell.
        found.setdefault(tuple(group.start for group in layout.groups), layout)
    costs = {cuts: layout.forecast(inputs) for cuts, layout in found.items()}
    worth = [cuts for cuts in found if found[cuts].density <= _ENOUGH and costs[cuts] < _HOPELESS]
    best = sorted(worth, key=lambda cuts: costs[cuts])
    return [found[cuts] for cuts in best[:_TRIED]]


def _column_cuts(kept: Mask) -> list[tuple[int, NDArray[np.int64]]]:
    """Width and first columns of the groups: all columns, equal widths, and wherever the zeros change."""
    columns = kept.shape[1]
    cuts = [(width, np.arange(0, columns, width)) for width in (columns, *reversed(_WIDTHS)) if width <= columns]
    changes = np.array(_changes(kept, axis=1))
    return [*cuts, (0, changes)] if len(changes) <= max(1, columns // min(_WIDTHS)) else cuts


def _layout(kept: Mask, starts: NDArray[np.int64], width: int, height: int | None = None) -> Layout:
    rows, columns = kept.shape
    needed = np.logical_or.reduceat(kept, starts, axis=1)
    chosen = _height(needed) if height is None else height
    blocks = _blocks(needed, chosen)
    blocks[0, ~blocks.any(axis=0)] = True  # a group of zeros: its product has to be there, but may be of one block
    needed = np.repeat(blocks, chosen, axis=0)[:rows]
    first = _changes(needed, axis=1)
    begins = [int(starts[index]) for index in first]
    groups = tuple(
        Group(begin, end, np.flatnonzero(needed[:, index]).astype(np.int64))
        for index, begin, end in zip(first, begins, [*begins[1:], columns], strict=True)
    )
    return Layout((rows, columns), chosen, width, groups)


def _height(needed: Mask) -> int:
    """The highest blocks that keep hardly more than single rows would."""
    exact = int(needed.sum())
    for height in _HEIGHTS:
        if height <= max(1, len(needed)) and _area(needed, height) <= _SLACK * exact:
            return height
    return 1


def _area(needed: Mask, height: int) -> int:
    return int(np.repeat(_blocks(needed, height), height, axis=0)[: len(needed)].sum())


def _blocks(needed: Mask, height: int) -> Mask:
    """``[rows, groups] -> [blocks, groups]``: whether any row of a block is needed."""
    found: Mask = np.logical_or.reduceat(needed, np.arange(0, len(needed), height), axis=0)
    return found


def _changes(values: Mask, axis: int) -> list[int]:
    """0 and every index along `axis` at which the values differ from those before."""
    along = np.moveaxis(values, axis, 0)
    return [0, *(int(index) + 1 for index in np.flatnonzero((along[1:] != along[:-1]).any(axis=1)))]
