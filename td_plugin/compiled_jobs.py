"""Jobs for the compiled loops: what a thread of torch's is handed, one pointer, and what it does with it.

`td_plugin.openmp.symbols` must be known to llvmlite before this is imported: `td_plugin.kernels` sees to that.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np

from td_plugin import openmp
from td_plugin.compiled import compiled, cut, keep, sample, select, together_of, zero

SELECT, ZERO, CUT, KEEP, SAMPLE = range(5)
"""The kinds of jobs."""
FIELDS = 14
"""A job is so many int64: its kind, shape, numbers and the addresses of its arrays, in this order."""
_KIND, _POOLS, _GROUPS, _K, _MAGNITUDE, _INFINITY, _KEY, _BELOW = range(8)
_VALUES, _BITS, _OUT, _KTH, _LAST, _WRONG = range(8, FIELDS)


@numba.extending.intrinsic  # type: ignore[untyped-decorator]
def _pointer(_context: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to numbers of the type of `like`."""
    pointer = numba.types.CPointer(like)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(numba.types.int64, like), generate


@compiled
def _array(address: Any, size: Any, like: Any) -> Any:
    return numba.carray(_pointer(address, like), size)


_thread = numba.types.ExternalFunction(openmp.THREAD, numba.types.int32())
_threads = numba.types.ExternalFunction(openmp.THREADS, numba.types.int32())


@compiled
def _work(job: Any, like: Any) -> None:
    """The share of `job` that falls to this thread: some of the pools; of `SELECT` and `ZERO`, of the values."""
    pools, groups, thread, threads = job[_POOLS], job[_GROUPS], np.int64(_thread()), np.int64(_threads())
    size = pools * groups
    bits = _array(job[_BITS], (size + 7) // 8, np.uint8(0))
    if job[_KIND] <= ZERO:
        a, b = size // 8 * thread // threads * 8, size // 8 * (thread + 1) // threads * 8
        b = size if thread == threads - 1 else b
        values = _array(job[_VALUES], size, like)[a:b]
        if job[_KIND] == SELECT:
            select(values, bits[a // 8 :], _array(job[_OUT], size, like)[a:b])
        else:
            zero(values, bits[a // 8 :])
        return
    together = together_of(groups)  # no byte of flags belongs to two threads
    a, b = pools // together * thread // threads * together, pools // together * (thread + 1) // threads * together
    b = pools if thread == threads - 1 else b
    rows = _array(job[_VALUES], size, like).reshape((pools, groups))[a:b]
    kth, last = _array(job[_KTH], pools, like)[a:b], _array(job[_LAST], pools, np.int64(0))[a:b]
    wrong = _array(job[_WRONG], threads, np.int64(0))
    magnitude, infinity = rows.dtype.type(job[_MAGNITUDE]), rows.dtype.type(job[_INFINITY])
    key, below = np.uint64(job[_KEY]), np.int32(job[_BELOW])
    if job[_KIND] == CUT:
        wrong[thread] = cut(rows, job[_K], magnitude, infinity, kth, last)
    elif job[_KIND] == KEEP:
        keep(rows, a, magnitude, kth, last, key, below, bits[a * groups // 8 :])
    else:
        wrong[thread] = sample(rows, a, job[_K], magnitude, infinity, kth, last, key, below, bits[a * groups // 8 :])


def _work_32(job: Any) -> None:
    _work(numba.carray(job, FIELDS), np.int32(0))


def _work_16(job: Any) -> None:
    _work(numba.carray(job, FIELDS), np.int16(0))


@lru_cache(maxsize=2)
def entry(width: int) -> Any:
    """What does a thread's share of a job on floats of `width` bits, for callers that are not Python.

    It takes the address of the numbers of the job. The first call in an installation takes some seconds, to
    compile; later processes read the result from disk.
    """
    signature = numba.types.void(numba.types.CPointer(numba.types.int64))
    function = _work_32 if width == 32 else _work_16
    try:
        made = numba.cfunc(signature, cache=True)(function)
    except RuntimeError:
        made = numba.cfunc(signature)(function)
    _alive.append(made)
    return openmp.callable_at(made.address)


_alive: list[Any] = []  # the code goes with the object
