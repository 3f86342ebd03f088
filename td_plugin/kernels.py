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
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from td_plugin import openmp
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


@dataclass(frozen=True)
class _Job:
    """What a compiled loop is told besides `values` ``[pools, groups]``; see `td_plugin.compiled_jobs.FIELDS`."""

    flags: Tensor | None = None
    out: Tensor | None = None
    kth: Tensor | None = None
    last: Tensor | None = None
    k: int = 0
    key: int = 0
    below: int = 0

    def run(self, kind: Literal["SELECT", "CUT", "KEEP", "SAMPLE"], values: Tensor) -> bool:
        """Do it on torch's threads; False if a value that was ranked is not finite."""
        loops, (width, infinity) = _loops(), _BITS[values.dtype]
        parts = min(openmp.threads(), max(values.numel() // _WORTH_A_THREAD, 1))
        wrong = torch.zeros(parts, dtype=torch.int64)
        arrays = (values, self.flags, self.out, self.kth, self.last, wrong)
        fields = (ctypes.c_int64 * loops.FIELDS)(
            getattr(loops, kind),
            len(values),
            values.numel() // len(values),
            self.k,
            (1 << (width - 1)) - 1,  # all bits but the sign
            infinity,
            self.key,
            self.below,
            *(0 if array is None else array.data_ptr() for array in arrays),
        )
        openmp.run(loops.entry(width).address, ctypes.addressof(fields), parts)
        return not wrong.any()


def _start(rows: Tensor, k: int, guess: Cut | None) -> tuple[Tensor, Tensor]:
    """`Cut.kth`, in the type of `rows`, and `Cut.last`, as the search for the k-th finds them."""
    kth = torch.full((len(rows), 1), 0.0 if k else -torch.inf, dtype=rows.dtype)
    if k and guess is not None and guess.kth.shape == kth.shape:
        kth.copy_(guess.kth.clamp(min=0))
    return kth, torch.full((len(rows), 1), -1)


def cut(rows: Tensor, fraction: float, guess: Cut | None) -> Cut | None:
    """`td_plugin.masks.cut` of the magnitudes of `rows`; None if one of them is not finite.

    Args:
        rows: ``[pools, groups]``, one that `serves`.
        fraction: γ in [0, 1].
        guess: an earlier cut of these pools, from which the search starts.
    """
    k = count(fraction, rows.shape[1])
    kth, last = _start(rows, k, guess)
    return Cut(kth.float(), last) if _Job(kth=kth, last=last, k=k).run("CUT", rows) else None


def keep(rows: Tensor, where: Cut, rate: float, key: int) -> Tensor:
    """What a draw keeps of `rows`: ``~(where.candidates(|rows|) & draw(rows.shape, rate, key))``.

    Args:
        rows: ``[pools, groups]``, one that `serves`.
        where: a cut of it.
        rate: α in [0, 1].
        key: of the draw.

    Returns:
        ``[pools, groups]`` bool.
    """
    flags, below = torch.empty(rows.shape, dtype=torch.bool), threshold(rate, key) - SPAN // 2
    _Job(flags, kth=where.kth.to(rows.dtype), last=where.last, key=key, below=below).run("KEEP", rows)
    return flags


def sample(rows: Tensor, fraction: float, guess: Cut | None, rate: float, key: int) -> tuple[Cut, Tensor] | None:
    """`cut`, then `keep`, reading the weights from memory once; None if one of them is not finite."""
    k, flags = count(fraction, rows.shape[1]), torch.empty(rows.shape, dtype=torch.bool)
    kth, last = _start(rows, k, guess)
    job = _Job(flags, kth=kth, last=last, k=k, key=key, below=threshold(rate, key) - SPAN // 2)
    return (Cut(kth.float(), last), flags) if job.run("SAMPLE", rows) else None


def select(values: Tensor, kept: Tensor) -> Tensor:
    """`values` where `kept`, else 0: ``torch.where(kept, values, 0)`` in one pass.

    Args:
        values: one that `serves`.
        kept: bool, contiguous, of the same shape.
    """
    out = torch.empty_like(values)
    _Job(kept, out).run("SELECT", values)
    return out
