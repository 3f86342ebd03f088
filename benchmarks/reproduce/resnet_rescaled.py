"""Targeted weight dropout as tensor2tensor has it: candidates that stay are divided by 1 - α.

The library does not have it (nor has the authors' code); `ablation.py` asks what it would change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Rescaled:
    """Multiplies the weights by 0, 1 or ``1 / (1 - α)`` around forward and backward, and their gradients as well.

    Args:
        weights: of convolutions, ``[out, in, h, w]``.
        drop_rate: α.
        sparsity_level: γ of every output.
        seed: of the draws.
    """

    def __init__(self, weights: Sequence[nn.Parameter], drop_rate: float, sparsity_level: float, seed: int) -> None:
        self.weights, self.alpha, self.gamma, self.seed = weights, drop_rate, sparsity_level, seed

    def factors(self, step: int) -> list[Tensor]:
        """Of every weight in one step."""
        generator = torch.Generator().manual_seed((self.seed * 100_003 + step) * 2)
        found = []
        for weight in self.weights:
            rows = weight.detach().flatten(1)
            smallest = rows.abs().argsort(1)[:, : int(self.gamma * rows.shape[1])]
            drawn = (torch.rand(smallest.shape, generator=generator) >= self.alpha).to(rows) / (1 - self.alpha)
            found.append(torch.ones_like(rows).scatter_(1, smallest, drawn).view(weight.shape))
        return found

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Forward and backward go inside."""
        factors, dense = self.factors(step), [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            for weight, factor in zip(self.weights, factors, strict=True):
                weight.mul_(factor)
        yield
        with torch.no_grad():
            for weight, factor, before in zip(self.weights, factors, dense, strict=True):
                weight.copy_(before)
                if weight.grad is not None:
                    weight.grad.mul_(factor)
