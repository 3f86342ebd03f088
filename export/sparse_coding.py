"""One tensor as gaps and values, bit by bit, and as compressed sparse rows: what `sparse_file` writes and compares."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from td_plugin.export.gap_coding import GapCode, decode_gaps, encode_gaps

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
    )
}
"""What a file can hold, by name."""

_PATTERNS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
_PATTERNS |= {8: (torch.int64, np.uint64)}

Patterns = NDArray[Any]
"""The bits of every entry as an unsigned integer: 0 is +0.0 alone, so a negative zero or any NaN is a value."""


@dataclass(frozen=True)
class Coded:
    """One tensor of a file.

    Attributes:
        entry: its row in the file's table: shape, dtype, bits per gap (0 for a dense one), checksum.
        parts: what the file holds of it: ``dense``, or ``gaps`` and ``values``.
    """

    entry: dict[str, Any]
    parts: dict[str, Tensor]


def patterns_of(tensor: Tensor) -> Patterns:
    """The bits of a tensor, of the same shape."""
    whole, (same_size, unsigned) = tensor.detach().cpu().contiguous(), _PATTERNS[tensor.element_size()]
    found: Patterns = whole.view(same_size).numpy().view(unsigned)
    return found


def tensor_of_patterns(patterns: Patterns, dtype: torch.dtype) -> Tensor:
    """What `patterns_of` was given."""
    same_size = _PATTERNS[patterns.itemsize][0]
    signed = patterns if same_size is torch.uint8 else patterns.view(f"int{8 * patterns.itemsize}")
    return torch.from_numpy(np.ascontiguousarray(signed)).reshape(patterns.shape).view(dtype)


def code(tensor: Tensor, bits: tuple[int, ...]) -> Coded:
    """The smallest form of `tensor`: dense, or gaps of one of `bits` and the values behind them."""
    patterns = patterns_of(tensor)
    codes = [encode_gaps(patterns, number) for number in bits]
    best = min(codes, key=lambda found: found.bytes)
    entry = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if best.bytes >= patterns.nbytes:
        parts = {"dense": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)}
        return Coded({**entry, "bits": 0, "crc": _checksum(parts)}, parts)
    parts = {"gaps": torch.from_numpy(best.gaps), "values": tensor_of_patterns(best.values, tensor.dtype)}
    return Coded({**entry, "bits": best.bits, "crc": _checksum(parts)}, parts)


def part_names(entry: dict[str, Any]) -> tuple[str, ...]:
    """The parts that a row of the table stands for."""
    return ("gaps", "values") if entry["bits"] else ("dense",)


def decode(coded: Coded) -> Tensor:
    """What `code` was given, bit by bit.

    Raises:
        ValueError, IndexError, KeyError, TypeError: the parts do not fit the row of the table.
    """
    entry, parts = coded.entry, coded.parts
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    if _checksum(parts) != entry["crc"]:
        raise ValueError("its bytes are not those that were written")
    if not entry["bits"]:
        dense = parts["dense"]
        if dense.dtype != dtype or tuple(dense.shape) != shape:
            raise ValueError(f"{dense.dtype} {tuple(dense.shape)} is in the place of {entry['dtype']} {shape}")
        return dense
    values = patterns_of(parts["values"])
    return tensor_of_patterns(decode_gaps(GapCode(shape, entry["bits"], parts["gaps"].numpy(), values)), dtype)


def _checksum(parts: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(parts):
        total = zlib.crc32(patterns_of(parts[name]).tobytes(), total)
    return total


def compressed_rows(tensor: Tensor) -> dict[str, Tensor]:
    """Compressed sparse rows of 32-bit indices, or the dense tensor where that is smaller.

    Returns:
        ``values [n]``, ``columns [n]`` and ``rows [outputs + 1]`` of ``[outputs, the rest]``; else ``dense``.
    """
    dense = {"dense": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)}
    if tensor.ndim < 2 or tensor.numel() == 0:
        return dense
    patterns = patterns_of(tensor).reshape(tensor.shape[0], -1)
    places = patterns.nonzero()
    starts = np.zeros(len(patterns) + 1, np.int32)
    starts[1:] = np.cumsum(np.count_nonzero(patterns, axis=1))
    found = {
        "values": tensor_of_patterns(patterns[places], tensor.dtype),
        "columns": torch.from_numpy(places[1].astype(np.int32)),
        "rows": torch.from_numpy(starts),
    }
    return found if sum(part.nbytes for part in found.values()) < patterns.nbytes else dense
