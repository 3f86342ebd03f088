"""The threads that torch computes with, for compiled loops of our own.

A second pool of threads beside torch's makes everything slower: OpenMP's threads spin for milliseconds after each
operation, and the two pools take the processors from each other. So loops run on torch's own pool, through the entry
that compilers generate calls to (`GOMP_parallel`, of GNU's and of Intel's library). Where torch has another pool
(macOS, Windows) they run on the calling thread.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

THREAD, THREADS = "td_plugin_thread", "td_plugin_threads"
"""The names under which compiled code asks for its number and for how many there are."""


@lru_cache(maxsize=1)
def _library() -> Any:
    """Torch's OpenMP library, or None where it has none that we can call."""
    try:
        library = ctypes.CDLL(None)  # all that is loaded for everyone to see, as torch loads OpenMP
        entry, _ = library.GOMP_parallel, (library.omp_get_thread_num, library.omp_get_num_threads)
    except (AttributeError, OSError, TypeError):
        return None
    entry.argtypes, entry.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return library


def symbols() -> dict[str, int]:
    """`THREAD` and `THREADS` with the addresses of what answers them."""
    library = _library()
    if library is None:
        return {THREAD: _address(_zero), THREADS: _address(_one)}
    return {THREAD: _address(library.omp_get_thread_num), THREADS: _address(library.omp_get_num_threads)}


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_answer = ctypes.CFUNCTYPE(ctypes.c_int)
_zero, _one = _answer(lambda: 0), _answer(lambda: 1)


def callable_at(address: int) -> Any:
    """The compiled function at `address`, which takes an address, as `run` takes it."""
    return _loop(address)


_loop = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def threads() -> int:
    """How many threads `run` uses: as many as torch, or one."""
    return 1 if _library() is None else torch.get_num_threads()


def run(function: Any, argument: int, parts: int) -> None:
    """Call the compiled `function` (one of `callable_at`) with `argument` on `parts` threads, and wait for all."""
    if parts == 1 or _library() is None:
        function(argument)
    else:
        _library().GOMP_parallel(function, argument, parts, 0)
