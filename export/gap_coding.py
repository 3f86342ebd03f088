"""Sparse values as pairs of a gap and a value, and as a bitmask: lossless, in plain numpy.

Relative indices with filler zeros are those of Han, Mao & Dally, "Deep Compression", arXiv 1510.00149, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from td_plugin.errors import TdError

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class GapCode:
    """Values without their zeros.

    Attributes:
        shape: of the dense values.
        bits: per gap.
        gaps: ``uint8``, packed: how many zeros come before each value, at most ``2 ** bits - 1``.
        values: ``[n]``: what is not zero, and a filler 0 wherever more zeros than that follow each other.
    """

    shape: tuple[int, ...]
    bits: int
    gaps: Bytes
    values: NDArray[Any]

    @property
    def bytes(self) -> int:
        """Of gaps and values."""
        return self.gaps.nbytes + self.values.nbytes


def encode_gaps(values: NDArray[Any], bits: int) -> GapCode:
    """Drop the zeros; negative zeros count as zeros, and come back as positive ones.

    Where more than ``2 ** bits - 1`` zeros lie before a value, that many are told together with a filler: a value
    that is 0 itself. Zeros after the last value are told by the shape.

    Args:
        values: any shape, any dtype.
        bits: per gap, 1 to 16; 8 and 5 are the paper's, for convolutions and linear layers.

    Raises:
        TdError: `bits` is out of range.
    """
    if not 1 <= bits <= 16:
        raise TdError("a gap takes 1 to 16 bits", where="bits", got=bits)
    flat = values.reshape(-1)
    places = np.flatnonzero(flat)
    zeros = np.diff(places, prepend=-1) - 1
    step = 1 << bits  # of places: the zeros that one gap can tell, and the filler itself
    fillers, rest = np.divmod(zeros, step)
    ends = np.cumsum(fillers + 1)  # where each value lies behind its fillers
    gaps = np.full(int(ends[-1]) if len(ends) else 0, step - 1, dtype=np.uint16)
    coded = np.zeros(len(gaps), dtype=flat.dtype)
    gaps[ends - 1], coded[ends - 1] = rest, flat[places]
    return GapCode(values.shape, bits, _packed(gaps, bits), coded)


def decode_gaps(code: GapCode) -> NDArray[Any]:
    """What `encode_gaps` was given, bit by bit but for negative zeros."""
    size = int(np.prod(code.shape, dtype=np.int64))
    flat = np.zeros(size, dtype=code.values.dtype)
    gaps = _unpacked(code.gaps, code.bits, len(code.values))
    flat[np.cumsum(gaps.astype(np.int64) + 1) - 1] = code.values
    return flat.reshape(code.shape)


def encode_bitmask(values: NDArray[Any]) -> tuple[Bytes, NDArray[Any]]:
    """One bit per entry, packed, and the values that are not zero."""
    flat = values.reshape(-1)
    kept = flat != 0
    return np.packbits(kept), flat[kept]


def decode_bitmask(mask: Bytes, values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """What `encode_bitmask` was given, bit by bit but for negative zeros."""
    size = int(np.prod(shape, dtype=np.int64))
    flat = np.zeros(size, dtype=values.dtype)
    flat[np.unpackbits(mask, count=size).astype(np.bool_)] = values
    return flat.reshape(shape)


def _packed(numbers: NDArray[np.uint16], bits: int) -> Bytes:
    """The lowest `bits` of each number, one after the other, the highest first."""
    if bits == 8:
        return numbers.astype(np.uint8)
    wide = numbers.astype(">u2").view(np.uint8).reshape(-1, 2)
    return np.packbits(np.unpackbits(wide, axis=1)[:, 16 - bits :])


def _unpacked(packed: Bytes, bits: int, count: int) -> NDArray[np.uint16]:
    if bits == 8:
        return packed.astype(np.uint16)
    wide = np.zeros((count, 16), dtype=np.uint8)
    wide[:, 16 - bits :] = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    return np.packbits(wide, axis=1).reshape(-1).view(">u2").astype(np.uint16)
