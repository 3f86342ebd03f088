"""Door to the compiled loops of `td_plugin.compiled`: which tensors they serve, and how they are called.

Nothing here is needed: without numba (the extra ``fast``), on other devices and for other types the same values come
from `td_plugin.masks` and `torch.where`, at a higher price (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from td_plugin import bits, openmp
from td_plugin.masks import SPAN, Cut, count, threshold

# By type: the integer of its width and the bits of infinity.
_BITS = {torch.float32: (32, 0x7F800000), torch.bfloat16: (16, 0x7F80), torch.float16: (16, 0x7C00)}
_WORTH_A_THREAD = 1 << 15  # weights; below this a hand-over costs more than it saves

_enabled = os.environ.get("TD_PLUGIN_KERNELS", "1") != "0"


def available() -> bool:
    """Whether the compiled loops are used: numba is there, and neither `disabled` nor TD_PLUGIN_KERNELS=0 says no."""
    return _enabled and _installed()


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


@contextmanager
def disabled() -> Iterator[None]:
    """Plain torch inside the block; the values are the same."""
    global _enabled  # noqa: PLW0603 (a switch of the process, as torch's own backends have)
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def serves(weight: Tensor) -> bool:
    """Whether the loops can read `weight`: a plain contiguous float tensor in CPU memory, outside of any tracing."""
    return (
        available()
        and type(weight) in (Tensor, torch.nn.Parameter)
        and weight.device.type == "cpu"
        and weight.dtype in _BITS
        and weight.is_contiguous()
        and weight.numel() > 0
        and not weight.is_neg()
        and not is_in_torch_dispatch_mode()
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
    )


@lru_cache(maxsize=1)
def _loops() -> Any:
    import llvmlite.binding  # it and numba take a second to import

    for name, address in openmp.symbols().items():
        llvmlite.binding.add_symbol(name, address)
    from td_plugin import compiled_jobs

    return compiled_jobs


class Job(NamedTuple):
    """What a compiled loop is told besides `values` ``[pools, groups]``; see `td_plugin.compiled_jobs.FIELDS`."""

    packed: Tensor | None = None
    out: Tensor | None = None
    kth: Tensor | None = None
    last: Tensor | None = None
    k: int = 0
    key: int = 0
    below: int = 0


def run(kind: Literal["SELECT", "ZERO", "CUT", "KEEP", "SAMPLE"], values: Tensor, job: Job) -> bool:
    """Do it on torch's threads; False if a value that was ranked is not finite.

    It runs several times per tensor and step, so what it costs beside the loop (10 µs) is kept small.
    """
    loops, (width, infinity), size, pools = _loops(), _BITS[values.dtype], values.numel(), values.shape[0]
    parts = min(openmp.threads(), max(size // _WORTH_A_THREAD, 1))
    wrong = (ctypes.c_int64 * parts)()
    fields = (ctypes.c_int64 * loops.FIELDS)(
        getattr(loops, kind),
        pools,
        size // pools,
        job.k,
        (1 << (width - 1)) - 1,  # all bits but the sign
        infinity,
        job.key,
        job.below,
        values.data_ptr(),
        0 if job.packed is None else job.packed.data_ptr(),
        0 if job.out is None else job.out.data_ptr(),
        0 if job.kth is None else job.kth.data_ptr(),
        0 if job.last is None else job.last.data_ptr(),
        ctypes.addressof(wrong),
    )
    openmp.run(loops.entry(width), ctypes.addressof(fields), parts)
    return not any(wrong)


def _start(rows: Tensor, k: int, guess: Cut | None) -> tuple[Tensor, Tensor]:
    """Room for `Cut.kth`, in the type of `rows`, and `Cut.last`; the search for the k-th starts from the former."""
    shape = (rows.shape[0], 1)
    if k == 0:
        return torch.full(shape, -torch.inf, dtype=rows.dtype), torch.full(shape, -1)
    if guess is None or guess.kth.shape != shape:
        return torch.zeros(shape, dtype=rows.dtype), torch.empty(shape, dtype=torch.int64)
    return guess.kth.to(rows.dtype, copy=True), torch.empty(shape, dtype=torch.int64)


def cut(rows: Tensor, fraction: float, guess: Cut | None) -> Cut | None:
    """`td_plugin.masks.cut` of the magnitudes of `rows`; None if one of them is not finite.

    Args:
        rows: ``[pools, groups]``, one that `serves`.
        fraction: γ in [0, 1].
        guess: an earlier cut of these pools, from which the search starts.
    """
    k = count(fraction, rows.shape[1])
    kth, last = _start(rows, k, guess)
    return Cut(kth.float(), last) if run("CUT", rows, Job(kth=kth, last=last, k=k)) else None


def cut_importances(importance: Tensor, fraction: float, guess: Cut | None) -> Cut | None:
    """`cut` of importances of any criterion; None where the loops, which see no signs, do not serve.

    Args:
        importance: ``[pools, groups]`` float32.
        fraction: γ in [0, 1].
        guess: as for `cut`.
    """
    if not serves(importance) or not bool((importance >= 0).all()):
        return None
    return cut(importance, fraction, guess)


def keep(rows: Tensor, where: Cut, rate: float, key: int) -> Tensor:
    """What a draw keeps of `rows`: ``~(where.candidates(|rows|) & draw(rows.shape, rate, key))``.

    Args:
        rows: ``[pools, groups]``, one that `serves`.
        where: a cut of it.
        rate: α in [0, 1].
        key: of the draw.

    Returns:
        `bits.pack` of ``[pools, groups]``.
    """
    packed, below = _room(rows), threshold(rate, key) - SPAN // 2
    run("KEEP", rows, Job(packed, kth=where.kth.to(rows.dtype), last=where.last, key=key, below=below))
    return packed


def sample(rows: Tensor, fraction: float, guess: Cut | None, rate: float, key: int) -> tuple[Cut, Tensor] | None:
    """`cut`, then `keep`, reading the weights from memory once; None if one of them is not finite."""
    k, packed = count(fraction, rows.shape[1]), _room(rows)
    kth, last = _start(rows, k, guess)
    job = Job(packed, kth=kth, last=last, k=k, key=key, below=threshold(rate, key) - SPAN // 2)
    return (Cut(kth.float(), last), packed) if run("SAMPLE", rows, job) else None


def _room(rows: Tensor) -> Tensor:
    return torch.empty(bits.size(rows.numel()), dtype=torch.uint8)


def select(values: Tensor, kept: Tensor, out: Tensor | None = None) -> Tensor:
    """`values` where `kept`, else 0: ``torch.where(kept, values, 0)`` in one pass.

    Args:
        values: one that `serves`.
        kept: `bits.pack` of as many flags.
        out: of the shape and type of `values`, contiguous, to be written to; None: new memory.
    """
    out = torch.empty_like(values) if out is None else out
    run("SELECT", values, Job(kept, out))
    return out


def zero_(values: Tensor, kept: Tensor) -> None:
    """`select` in place."""
    run("ZERO", values, Job(kept))
