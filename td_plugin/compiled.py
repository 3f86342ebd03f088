"""Loops over weights in CPU memory, compiled by numba when first called: what `td_plugin.masks` does, in one pass.

Weights come as the integers that hold their bits: without the sign bit these have the order of the magnitudes, and
infinity and NaN lie above all numbers. Imported only where numba is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GATHER, _HIGHEST = np.uint64(0x0102040810204080), np.uint64(56)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_BLOCK = 1 << 15  # weights of float32 that fill an eighth of a second-level cache
_BISECT_EVERY = 4  # interpolation alone may creep


_WIDTH = 1 << 12  # flips made at a time


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile when first called, and keep the result on disk."""
    try:
        made: Callable[..., Any] = numba.njit(cache=True)(function)
    except RuntimeError:  # neither the package nor the home directory can be written to
        made = numba.njit(function)
    return made


@compiled
def _at_most(row: Any, bound: Any, magnitude: Any) -> Any:
    """How many of `row` have a magnitude of at most `bound`."""
    found = np.int32(0)
    for i in range(row.shape[0]):
        found += np.int32((row[i] & magnitude) <= bound)
    return found


@compiled
def _largest(row: Any, bound: Any, magnitude: Any) -> Any:
    """The largest magnitude in `row` that is at most `bound`; all in the narrow type, or it would not vectorise."""
    found = row.dtype.type(0)
    for i in range(row.shape[0]):
        value = row.dtype.type(row[i] & magnitude)
        allowed = value if value <= bound else row.dtype.type(0)
        found = allowed if allowed > found else found
    return found


@compiled
def _at_most_and_largest(row: Any, bound: Any, magnitude: Any) -> Any:
    """How many of `row` have a magnitude of at most `bound`, and the largest magnitude of all."""
    found, largest = np.int32(0), row.dtype.type(0)
    for i in range(row.shape[0]):
        value = row.dtype.type(row[i] & magnitude)
        found += np.int32(value <= bound)
        largest = value if value > largest else largest
    return found, largest


@compiled
def _cut_row(row: Any, k: int, guess: Any, magnitude: Any, infinity: Any) -> Any:
    """`masks.cut` of one pool, by counting, from the last threshold on; a row of the usual size stays in the cache.

    Returns:
        the k-th smallest magnitude, k >= 1; the index of the last candidate that has it, -1 if a value is not finite.
    """
    found, largest = _at_most_and_largest(row, guess, magnitude)
    if largest >= infinity:
        return guess, -1
    below, at_below, above, at_above = np.int64(-1), np.int64(0), np.int64(largest), np.int64(row.shape[0])
    bound, found, turn = np.int64(guess), np.int64(found), 0
    while at_above != k and above - below > 1:
        if turn > 0:
            if bound <= below or bound >= above or turn % _BISECT_EVERY == 0:
                bound = below + (above - below) // 2
            found = np.int64(_at_most(row, row.dtype.type(bound), magnitude))
        if found >= k and bound < above:
            above, at_above = bound, found
        elif found < k and bound > below:
            below, at_below = bound, found
        bound = below + np.int64((k - at_below) / (at_above - at_below) * (above - below))
        turn += 1
    kth = _largest(row, row.dtype.type(above), magnitude)
    return kth, row.shape[0] - 1 if at_above == k else _last_tie(row, k, kth, magnitude)


@compiled
def _last_tie(row: Any, k: int, kth: Any, magnitude: Any) -> Any:
    """The index at which the k smallest magnitudes are complete, the ties at `kth` taken in order."""
    room = k - _at_most(row, row.dtype.type(kth - 1), magnitude)
    for i in range(row.shape[0]):
        room -= (row[i] & magnitude) == kth
        if room == 0:
            return i
    return row.shape[0] - 1


@compiled
def cut(rows: Any, k: int, magnitude: Any, infinity: Any, kth: Any, last: Any) -> Any:
    """`masks.cut` of every row, ``[pools, groups]``, into `kth`, which holds a guess before, and `last`.

    Returns:
        how many rows hold an infinity or a NaN.
    """
    wrong = 0
    for p in range(rows.shape[0]):
        if k == 0:
            wrong += _at_most_and_largest(rows[p], kth[p], magnitude)[1] >= infinity
        else:
            kth[p], last[p] = _cut_row(rows[p], k, rows.dtype.type(kth[p] & magnitude), magnitude, infinity)
            wrong += last[p] < 0
    return wrong


@compiled
def _flips(numbers: Any, key: Any, first: Any) -> Any:
    """Numbers ``first`` and on of the stream `key`: `masks.words`."""
    state = key + np.uint64(first) * _GOLDEN
    for i in range(numbers.shape[0]):
        z = state + np.uint64(i) * _GOLDEN
        z = (z ^ (z >> _SHIFT_1)) * _FACTOR_1
        z = (z ^ (z >> _SHIFT_2)) * _FACTOR_2
        numbers[i] = z ^ (z >> _SHIFT_3)


@compiled
def keep(  # noqa: PLR0913 (compiled code takes numbers and arrays)
    rows: Any, first: Any, magnitude: Any, kth: Any, last: Any, key: Any, below: Any, out: Any
) -> None:
    """What this draw keeps of every row: all but the candidates whose flip lies below `below`.

    Args:
        rows: ``[pools, groups]``.
        first: the index of the first of these rows in the whole tensor, which places them in the stream.
        magnitude: all bits but the sign.
        kth: ``[pools]``, from `cut`.
        last: ``[pools]``, from `cut`.
        key: of the stream, uint64.
        below: `masks.threshold` less 32768.
        out: uint8, `bits.pack` of the ``[pools, groups]`` flags, written.
    """
    groups = rows.shape[1]
    numbers = np.empty(min(groups, _WIDTH) // 4 + 2, np.uint64)
    coins = numbers.view(np.int16)
    eights = np.empty(min(groups, _WIDTH) // 8 + 2, np.uint64)
    flags = eights.view(np.uint8)
    waiting, written = 0, 0  # flags that do not fill a byte yet, and bytes
    for p in range(rows.shape[0]):
        for a in range(0, groups, _WIDTH):
            b = min(a + _WIDTH, groups)
            start = (first + p) * groups + a
            _flips(numbers, key, 1 + start // 4)
            part = flags[waiting : waiting + b - a]
            _keep_part(rows[p, a:b], magnitude, kth[p], last[p] - a, coins[start % 4 :], below, part)
            whole, waiting = (waiting + b - a) // 8, (waiting + b - a) % 8
            _pack(eights[:whole], out[written:])
            eights[0], written = eights[whole], written + whole
    if waiting > 0:
        flags[waiting:8] = 0
        _pack(eights[:1], out[written:])


@compiled
def _pack(eights: Any, out: Any) -> None:
    """Eight bytes of 0 or 1 -> one byte: each product's highest byte gathers them."""
    for i in range(eights.shape[0]):
        out[i] = np.uint8((eights[i] * _GATHER) >> _HIGHEST)


@compiled
def _keep_part(  # noqa: PLR0913 (as `keep`)
    row: Any, magnitude: Any, kth: Any, last: Any, coins: Any, below: Any, kept: Any
) -> None:
    if last >= row.shape[0] - 1:
        for i in range(row.shape[0]):
            kept[i] = ((row[i] & magnitude) > kth) | (coins[i] >= below)
    else:
        for i in range(row.shape[0]):
            value = row[i] & magnitude
            kept[i] = (value > kth) | ((value == kth) & (i > last)) | (coins[i] >= below)


@compiled
def sample(  # noqa: PLR0913 (as `keep`)
    rows: Any, first: Any, k: int, magnitude: Any, infinity: Any, kth: Any, last: Any, key: Any, below: Any, out: Any
) -> Any:
    """`cut`, then `keep`, block by block, so that the second finds the weights in the cache."""
    wrong, groups = 0, rows.shape[1]
    together = together_of(groups)
    block = max(_BLOCK // (groups * together), 1) * together
    for a in range(0, rows.shape[0], block):
        b = min(a + block, rows.shape[0])
        wrong += cut(rows[a:b], k, magnitude, infinity, kth[a:b], last[a:b])
        keep(rows[a:b], first + a, magnitude, kth[a:b], last[a:b], key, below, out[a * groups // 8 :])
    return wrong


@compiled
def together_of(groups: Any) -> Any:
    """How many rows of so many flags fill whole bytes, at the least."""
    together = 8
    while together > 1 and groups * (together // 2) % 8 == 0:
        together //= 2
    return together


@compiled
def select(values: Any, bits: Any, out: Any) -> None:
    """`out` = `values` where the flag of `bits` is set, else 0; `values` and `out` ``[n]``, `bits` packed."""
    whole = values.shape[0] // 8
    for i in range(whole):
        eight = np.int32(bits[i])
        for j in range(8):
            out[8 * i + j] = values[8 * i + j] & -((eight >> j) & 1)
    for i in range(8 * whole, values.shape[0]):
        out[i] = values[i] & -((np.int32(bits[whole]) >> (i - 8 * whole)) & 1)


@compiled
def zero(values: Any, bits: Any) -> None:
    """`select` in place. With one array for both, a compiler that cannot rule out overlaps does it one by one."""
    whole = values.shape[0] // 8
    for i in range(whole):
        eight = np.int32(bits[i])
        for j in range(8):
            values[8 * i + j] &= -((eight >> j) & 1)
    for i in range(8 * whole, values.shape[0]):
        values[i] &= -((np.int32(bits[whole]) >> (i - 8 * whole)) & 1)
