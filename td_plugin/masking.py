"""A tensor under a mask, differentiable: the gradient of what is dropped is zero."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from td_plugin import kernels
from td_plugin.bits import flags_of


class _Select(torch.autograd.Function):
    """``torch.where(keep, dense, 0)`` by the compiled loop, in one pass forward and one backward."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(keep)
        return kernels.select(dense, keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        if not torch.is_grad_enabled() and kernels.serves(grads[0]):
            return kernels.select(grads[0], keep), None
        return select(keep, grads[0]), None  # through the Function, so that gradients have gradients


def select(keep: Tensor, dense: Tensor) -> Tensor:
    """`dense` where `keep`, else 0.

    Args:
        keep: of one flag per weight, `td_plugin.bits.pack` of them; else bool, broadcastable to `dense` (one per unit).
        dense: ``[*w]``.
    """
    keep = keep.to(dense.device)
    if keep.dtype == torch.uint8 and not torch.compiler.is_compiling() and kernels.serves(dense):
        return _Select.apply(dense, keep)  # type: ignore[no-any-return, no-untyped-call]
    keep = flags_of(keep, dense.shape)
    if keep.numel() < dense.numel() and not torch.compiler.is_compiling():
        return dense * keep.to(dense.dtype)  # per unit: half the price of a broadcast condition
    return torch.where(keep, dense, dense.new_zeros(()))


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.rooms: dict[torch.dtype, Tensor] = {}


_SCRATCH = _Scratch()
_SCRATCH_BYTES = 1 << 26
"""Larger values get new memory: what is kept for the next call stays small beside the models that have them."""


@torch.no_grad()
def select_briefly(keep: Tensor, dense: Tensor) -> Tensor:
    """`select`, without a gradient, into memory that the next call of this thread takes again: for use on the spot.

    New memory has to be paged in, for every layer and step, and a product then reads it from beyond the caches.
    """
    if keep.dtype != torch.uint8 or not kernels.serves(dense) or dense.nbytes > _SCRATCH_BYTES:
        return select(keep, dense)
    room = _SCRATCH.rooms.get(dense.dtype)
    if room is None or room.numel() < dense.numel():
        room = _SCRATCH.rooms[dense.dtype] = torch.empty(dense.numel(), dtype=dense.dtype)
    return kernels.select(dense, keep, room[: dense.numel()].view_as(dense))


def masked(keep: Tensor, dense: Tensor, scale: float, through: bool) -> Tensor:
    """`select`, times `scale`, or with another gradient.

    Args:
        keep: as for `select`.
        dense: ``[*w]``.
        scale: of what stays.
        through: whether the gradient passes to what is dropped as well (a straight-through estimate): it is the one
            with respect to the result, times `scale`.
    """
    value = select(keep, dense.detach()) + (dense - dense.detach()) if through else select(keep, dense)
    return value if scale == 1.0 else value * scale


def zero_(dense: Tensor, keep: Tensor) -> None:
    """Write 0 into `dense` where not `keep`, in place; both as for `select`."""
    keep = keep.to(dense.device)
    if keep.dtype == torch.uint8 and kernels.serves(dense):
        kernels.zero_(dense, keep)
        torch.autograd.graph.increment_version(dense)
    else:
        dense.masked_fill_(~flags_of(keep, dense.shape), 0)
