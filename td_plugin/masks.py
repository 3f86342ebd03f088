"""Which groups are candidates, and which candidates are dropped now: two pure functions and the key of the draw."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_RESOLUTION = 1 << 16  # the draw compares 16 random bits with α, so α is met to 1/131072


def count(fraction: float, n: int) -> int:
    """``int(γ·n)``, the only rounding rule. The slack keeps ``int(0.29 * 100)`` at 29, where floats give 28."""
    return min(int(fraction * n + 1e-9), max(n - 1, 0) if fraction < 1 else n)


def bottom_k(importance: Tensor, fraction: float) -> Tensor:
    """Mark the ``int(γ·n)`` least important groups of every pool, exactly as many.

    Ties are broken by index: a threshold alone takes too many of them (all of a constant row), which bfloat16 weights
    make common.

    Args:
        importance: ``[pools, groups]``, any float dtype.
        fraction: γ in [0, 1].

    Returns:
        ``[pools, groups]`` bool, True = candidate. Every row holds the same number of them.
    """
    k = count(fraction, importance.shape[1])
    if k == 0 or importance.numel() == 0:
        return torch.zeros_like(importance, dtype=torch.bool)
    importance = importance.float()
    if importance.is_cuda:
        kth = importance.sort(dim=1).values[:, k - 1 : k]  # CUDA's kthvalue is not deterministic
    else:
        kth = importance.kthvalue(k, dim=1, keepdim=True).values
    below, tied = importance < kth, importance == kth
    room = k - below.sum(dim=1, keepdim=True)
    if torch.equal(tied.sum(dim=1, keepdim=True), room):
        return below | tied
    return below | (tied & (tied.cumsum(dim=1) <= room))


def draw_key(*parts: object) -> int:
    """A 63-bit key for `draw`, a function of `parts` alone (seed, step, micro-step, tensor name)."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def draw(shape: torch.Size, rate: float, key: int, device: torch.device) -> Tensor:
    """Independent coin flips from a counter, not from the global generator.

    The same key gives the same flips on the same kind of device, whatever else has consumed random numbers: evaluation,
    ordinary dropout or a resumed process do not shift them.

    Args:
        shape: of the result.
        rate: α in [0, 1], the chance of True; kept to 1/131072.
        key: from `draw_key`.
        device: where the flips are made.

    Returns:
        bool tensor of `shape`, True = drop.
    """
    source = device if device.type in ("cpu", "cuda") else torch.device("cpu")
    generator = torch.Generator(source).manual_seed(key)
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64, device=source)
    words.random_(-(1 << 63), None, generator=generator)  # all 64 bits: eight times cheaper than floats
    bits = words.view(torch.int16)[: shape.numel()].view(shape)
    # rate 1 would need a threshold one above the largest int16
    threshold = round(rate * _RESOLUTION) - _RESOLUTION // 2
    drop = bits < threshold if threshold < _RESOLUTION // 2 else torch.ones_like(bits, dtype=torch.bool)
    return drop.to(device)
