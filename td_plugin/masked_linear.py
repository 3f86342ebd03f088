"""A linear layer under a mask of single weights, as one function: what most models consist of, at the lowest price.

The backward makes the masked weight again, as `td_plugin.remaking` does for all layers, and masks the gradient in the
memory it has just been computed into. Only here is it known that nobody else holds that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from td_plugin import kernels
from td_plugin.masking import select


def serves(x: Tensor, weight: Tensor, keep: Tensor | None) -> bool:
    """Whether `masked_linear` may take the place of reading the masked weight and multiplying with it."""
    return (
        keep is not None
        and keep.dtype == torch.uint8
        and torch.is_grad_enabled()
        and weight.requires_grad
        and type(x) in (Tensor, nn.Parameter)
        and x.dim() > 1
        and x.dtype == weight.dtype
        and x.numel() > 0
        and x.is_contiguous()  # else torch takes other products, and the last bit differs
        and not torch.is_autocast_enabled("cpu")  # the product would be taken in another type
        and kernels.serves(weight)
    )


def masked_linear(x: Tensor, weight: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(x, select(keep, weight), bias)``.

    Args:
        x: ``[*, inputs]``.
        weight: ``[outputs, inputs]``, dense.
        keep: `td_plugin.bits.pack` of its flags.
        bias: ``[outputs]``.
    """
    return _MaskedLinear.apply(x, weight, keep, bias)  # type: ignore[no-any-return, no-untyped-call]


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, keep)
        return linear(x, kernels.select(weight, keep), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, Tensor | None]:
        x, weight, keep = ctx.saved_tensors
        grad = grads[0]
        # As rows, since the products of torch's own backward are of these.
        row_grad, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        of_x = (row_grad @ select(keep, weight)).view(x.shape) if ctx.needs_input_grad[0] else None
        of_weight = row_grad.t() @ rows
        if not torch.is_grad_enabled() and kernels.serves(of_weight):
            kernels.zero_(of_weight, keep)
        else:
            of_weight = select(keep, of_weight)
        return of_x, of_weight, None, row_grad.sum(0) if ctx.needs_input_grad[3] else None
