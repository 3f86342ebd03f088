"""Jobs for the compiled loops: what a thread of torch's is handed, one pointer, and what it does with it.

`td_plugin.openmp.symbols` must be known to llvmlite before this is imported: `td_plugin.kernels` sees to that.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np

from td_plugin import openmp
from td_plugin.compiled import compiled, cut, keep, sample, select

SELECT, CUT, KEEP, SAMPLE = range(4)
"""The kinds of jobs."""
FIELDS = 14
"""A job is so many int64: its kind, shape, numbers and the addresses of its arrays, in this order."""
_KIND, _POOLS, _GROUPS, _K, _MAGNITUDE, _INFINITY, _KEY, _BELOW = range(8)
_VALUES, _FLAGS, _OUT, _KTH, _LAST, _WRONG = range(8, FIELDS)


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
    """The share of `job` that falls to this thread: some of the pools, or of the values of `SELECT`."""
    pools, groups, thread, threads = job[_POOLS], job[_GROUPS], np.int64(_thread()), np.int64(_threads())
    size = pools * groups
    if job[_KIND] == SELECT:
        a, b = size * thread // threads, size * (thread + 1) // threads
        out = _array(job[_OUT], size, like)
        select(_array(job[_VALUES], size, like)[a:b], _array(job[_FLAGS], size, np.bool_(True))[a:b], out[a:b])
        return
    a, b = pools * thread // threads, pools * (thread + 1) // threads
    rows = _array(job[_VALUES], size, like).reshape((pools, groups))[a:b]
    flags = _array(job[_FLAGS], size, np.bool_(True)).reshape((pools, groups))[a:b]
    kth, last = _array(job[_KTH], pools, like)[a:b], _array(job[_LAST], pools, np.int64(0))[a:b]
    wrong = _array(job[_WRONG], threads, np.int64(0))
    magnitude, infinity = rows.dtype.type(job[_MAGNITUDE]), rows.dtype.type(job[_INFINITY])
    key, below = np.uint64(job[_KEY]), np.int32(job[_BELOW])
    if job[_KIND] == CUT:
        wrong[thread] = cut(rows, job[_K], magnitude, infinity, kth, last)
    elif job[_KIND] == KEEP:
        keep(rows, a, magnitude, kth, last, key, below, flags)
    else:
        wrong[thread] = sample(rows, a, job[_K], magnitude, infinity, kth, last, key, below, flags)


def _work_32(job: Any) -> None:
    _work(numba.carray(job, FIELDS), np.int32(0))


def _work_16(job: Any) -> None:
    _work(numba.carray(job, FIELDS), np.int16(0))


@lru_cache(maxsize=2)
def entry(width: int) -> Any:
    """What does a thread's share of a job on floats of `width` bits, for callers that are not Python.

    Its `.address` takes a pointer to the numbers of the job. The first call in an installation takes some seconds, to
    compile; later processes read the result from disk.
    """
    signature = numba.types.void(numba.types.CPointer(numba.types.int64))
    function = _work_32 if width == 32 else _work_16
    try:
        return numba.cfunc(signature, cache=True)(function)
    except RuntimeError:
        return numba.cfunc(signature)(function)
