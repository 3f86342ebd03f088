"""A linear layer under a mask, as one function: what most models consist of, at the lowest price.

Single weights: the backward makes the masked weight again, as `td_plugin.remaking` does for all layers, and masks the
gradient in the memory it has just been computed into. Only here is it known that nobody else holds that.

Whole outputs: what they put out is zeroed, as ordinary dropout does, and no masked weight is made at all. The products
are those of the plain layer, so the outputs that are kept have the same bits. On CPU a large layer that drops many of
its outputs computes the kept ones alone: a step then costs less than one without masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from td_plugin.masking import select, select_briefly, zero_

SPARED = 0.3
"""The share of outputs from which on leaving them out costs less than computing and zeroing them (measured at
512 × 384 × 384 and larger); copying the rest together is what it costs."""

LARGE = 1 << 16
"""Weights from which on it does."""


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether a function of this module may take the place of multiplying with the masked weight."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and type(weight) in (Tensor, nn.Parameter)
        and type(x) in (Tensor, nn.Parameter)
        and x.dim() > 1
        and x.device == weight.device
        and x.numel() > 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def exact(x: Tensor, weight: Tensor) -> bool:
    """Whether `masked_linear` and `silenced_linear` give what the plain layer gives, to the bit."""
    return (
        x.dtype == weight.dtype
        and x.is_contiguous()  # else torch takes other products, and the last bit differs
        and not _autocast(x.device.type)  # the product would be taken in another type
    )


def spares(x: Tensor, weight: Tensor, keep: Tensor) -> bool:
    """Whether `sparing_linear` costs less than `silenced_linear`. Asking is free on CPU only: a GPU would be awaited.

    Args:
        x: ``[*, inputs]``.
        weight: ``[outputs, inputs]``.
        keep: ``[outputs, 1]`` bool.
    """
    if x.device.type != "cpu" or weight.numel() < LARGE or x.numel() < 32 * x.shape[-1]:
        return False
    kept = int(keep.count_nonzero())
    return 0 < kept <= (1 - SPARED) * keep.numel()


def _autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def masked_linear(x: Tensor, weight: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(x, select(keep, weight), bias)``.

    Args:
        x: ``[*, inputs]``.
        weight: ``[outputs, inputs]``, dense.
        keep: as `masking.select` takes it.
        bias: ``[outputs]``.
    """
    return _MaskedLinear.apply(x, weight, keep, bias)  # type: ignore[no-any-return, no-untyped-call]


def silences(weight: Tensor, keep: Tensor, keep_bias: Tensor | None) -> bool:
    """Whether the masks of weight and bias are one, of whole outputs, as `Target` makes them for units.

    Told by where they lie: comparing them would make the host wait for a GPU in every layer.

    Args:
        weight: ``[outputs, inputs]``.
        keep: of the weight, as `masking.select` takes it.
        keep_bias: of the bias; None if it has no mask.
    """
    if keep.dtype != torch.bool or keep.shape != (weight.shape[0], 1) or keep_bias is None:
        return False
    return keep_bias.shape == (weight.shape[0],) and keep_bias.data_ptr() == keep.data_ptr() != 0


def silenced_linear(x: Tensor, weight: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(x, weight, bias)``, zero at the outputs that are not kept; their gradients are zero, too.

    Args:
        x: ``[*, inputs]``.
        weight: ``[outputs, inputs]``, dense.
        keep: ``[outputs, 1]`` bool.
        bias: ``[outputs]``, dense.
    """
    return _SilencedLinear.apply(x, weight, keep.flatten().to(x), bias)  # type: ignore[no-any-return, no-untyped-call]


def sparing_linear(x: Tensor, weight: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
    """`silenced_linear` that computes nothing of what is not kept; the rest to rounding. Autocast is heeded.

    Args:
        x: ``[*, inputs]``.
        weight: ``[outputs, inputs]``, dense.
        keep: ``[outputs, 1]`` bool, on CPU.
        bias: ``[outputs]``, dense.
    """
    dtype = torch.get_autocast_dtype("cpu") if _autocast("cpu") else torch.promote_types(x.dtype, weight.dtype)
    return _SparingLinear.apply(x, weight, keep.flatten().nonzero().flatten(), bias, dtype)  # type: ignore[no-any-return, no-untyped-call]


class _SparingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, kept)
        ctx.dtype = dtype
        with torch.autocast("cpu", enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            part = None if bias is None else bias.index_select(0, kept).to(dtype)
            of_kept = linear(rows, weight.index_select(0, kept).to(dtype), part)
            value = rows.new_zeros(rows.shape[0], weight.shape[0]).index_copy_(1, kept, of_kept)
        return value.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, Tensor | None, None]:
        x, weight, kept = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        grad = grads[0].reshape(-1, weight.shape[0]).index_select(1, kept)
        of_x, of_bias = None, None
        if ctx.needs_input_grad[0]:
            # The rows are copied together a second time: kept since the forward they would take memory all the while.
            of_x = (grad @ weight.index_select(0, kept).to(ctx.dtype)).view(x.shape).to(x.dtype)
        of_weight = torch.zeros_like(weight).index_copy_(0, kept, (grad.t() @ rows).to(weight.dtype))
        if ctx.needs_input_grad[3]:
            of_bias = weight.new_zeros(weight.shape[0]).index_copy_(0, kept, grad.sum(0).to(weight.dtype))
        return of_x, of_weight, None, of_bias, None


class _SilencedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, keep)
        return linear(x, weight, bias).mul_(keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, Tensor | None]:
        x, weight, keep = ctx.saved_tensors
        row_grad, rows = (grads[0] * keep).reshape(-1, keep.shape[0]), x.reshape(-1, x.shape[-1])
        of_x = (row_grad @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return of_x, row_grad.t() @ rows, None, row_grad.sum(0) if ctx.needs_input_grad[3] else None


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, keep)
        return linear(x, select_briefly(keep, weight), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, Tensor | None]:
        x, weight, keep = ctx.saved_tensors
        grad = grads[0]
        # As rows, since the products of torch's own backward are of these.
        row_grad, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        of_x = None
        if ctx.needs_input_grad[0]:
            again = torch.is_grad_enabled()  # a gradient of gradients is taken
            of_x = (row_grad @ (select if again else select_briefly)(keep, weight)).view(x.shape)
        of_weight = row_grad.t() @ rows
        if torch.is_grad_enabled():
            of_weight = select(keep, of_weight)
        elif keep.dtype == torch.uint8:
            zero_(of_weight, keep)
        else:
            of_weight.mul_(keep)
        return of_x, of_weight, None, row_grad.sum(0) if ctx.needs_input_grad[3] else None
