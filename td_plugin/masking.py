"""A tensor under a mask, differentiable: the gradient of what is dropped is zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from td_plugin import kernels


class _Select(torch.autograd.Function):
    """``torch.where(keep, dense, 0)`` by the compiled loop, in one pass forward and one backward."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(keep)
        return kernels.select(dense, keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return select(keep, grads[0]), None


def select(keep: Tensor, dense: Tensor) -> Tensor:
    """`dense` where `keep`, else 0.

    Args:
        keep: bool, of the shape of `dense` or broadcastable to it (one flag per unit).
        dense: ``[*w]``.
    """
    keep = keep.to(dense.device)
    if torch.compiler.is_compiling():
        return torch.where(keep, dense, dense.new_zeros(()))
    if keep.shape == dense.shape and keep.is_contiguous() and kernels.serves(dense):
        # Through the Function in the backward too, so that gradients have gradients.
        return _Select.apply(dense, keep)  # type: ignore[no-any-return, no-untyped-call]
    if keep.numel() < dense.numel():
        return dense * keep.to(dense.dtype)  # per unit: half the price of a broadcast condition
    return torch.where(keep, dense, dense.new_zeros(()))


def zero_(dense: Tensor, keep: Tensor) -> None:
    """Write 0 into `dense` where not `keep`, in place; both as for `select`."""
    keep = keep.to(dense.device)
    if keep.shape == dense.shape and keep.is_contiguous() and kernels.serves(dense):
        dense.copy_(kernels.select(dense, keep))  # a tenth of what masked_fill_ takes
    else:
        dense.masked_fill_(~keep, 0)
