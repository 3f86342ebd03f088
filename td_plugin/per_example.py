"""Gradients of single examples, from a layer's input and the gradient of its output: no further forward or backward.

The first dimension of what a layer reads is the batch. A loss that is a mean over it has gradients N times smaller
than those of its examples; the callers multiply by N.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from td_plugin.errors import TdError
from td_plugin.units import Slice


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer with a weight ``[inputs, outputs]``."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether the last dimension of what it reads holds its inputs, and of what it gives its outputs."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution, not a transposed one."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def channel_dim(module: nn.Module) -> int:
    """The dimension of a batch that holds the entries a layer reads, and of its output those it writes."""
    return -1 if is_linear(module) else 1


def check_layer(module: nn.Module, where: str, criterion: str) -> None:
    """Refuse a layer whose examples cannot be told apart.

    Raises:
        TdError: neither linear nor a convolution.
    """
    if not is_linear(module) and not is_convolution(module):
        raise TdError(
            f"{criterion} reads what linear and convolutional layers read and write",
            where=where,
            got=type(module).__name__,
            fix="leave the tensor out of the config, or use taylor() or movement(), which need only its gradient",
        )


def squared_gradients(module: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Sum over the examples of the square of the weight's gradient, ``[*w]`` float32; one example at a time.

    Args:
        module: linear or a convolution.
        x: ``[N, *, inputs]`` or ``[N, channels, *]``, what it has read.
        grad: of its output.
    """
    if not is_linear(module):
        return _squares_of_convolution(module, x.float(), grad.float())
    left, right = (x.float(), grad.float()) if is_transposed(module) else (grad.float(), x.float())
    if x.dim() == 2:  # an outer product: its square is that of the squares
        return left.square().t() @ right.square()
    total = left.new_zeros(left.shape[-1], right.shape[-1])
    for one, other in zip(left.flatten(1, -2), right.flatten(1, -2), strict=True):
        total += (one.t() @ other).square_()
    return total


def _squares_of_convolution(module: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    weight: Tensor = module._parameters["weight"].detach().float().requires_grad_()  # type: ignore[union-attr]
    total = torch.zeros_like(weight, requires_grad=False)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        for n in range(len(x)):
            y = module._conv_forward(x[n : n + 1], weight, None)  # type: ignore[operator]
            total += torch.autograd.grad(y, weight, grad[n : n + 1])[0].square_()
    return total


def gate_gradients(value: Tensor, grad: Tensor, dim: int) -> Tensor:
    """``Σ a·g`` over all positions, ``[N, entries]`` float32: of every example, the gradients of gates on the entries.

    Theis et al. 2018, arXiv 1801.05787, equation 8.

    Args:
        value: ``[N, *]``, a.
        grad: of the same shape, g.
        dim: which dimension holds the entries.
    """
    product = (value.float() * grad.float()).movedim(dim, -1)
    return product if product.dim() == 2 else product.flatten(1, -2).sum(1)


def by_unit(entries: Tensor, part: Slice, units: int) -> Tensor:
    """``[*, entries] -> [*, units]``: the sum over the entries of each unit."""
    if not part.owners:
        sums = entries.reshape(*entries.shape[:-1], -1, part.span).sum(-1)
        return pad(sums, (0, units - sums.shape[-1]))
    owners = part.units(len(part.owners)).to(entries.device)
    owned = owners >= 0
    return entries[..., owned] @ one_hot(owners[owned], units).to(entries.dtype)  # no atomic additions
