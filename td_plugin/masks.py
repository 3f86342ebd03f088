"""Which groups are candidates, and which candidates are dropped now: pure functions and the key of the draw.

Everything here is plain torch, works on any device, and is what `td_plugin.compiled` must reproduce bit for bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

SPAN = 1 << 16
"""The draw compares 16 random bits with α·65536."""

# SplitMix64, as signed numbers, which is what torch has.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_LAST_SHIFT = 31


def count(fraction: float, n: int) -> int:
    """``int(γ·n)``, the only rounding rule. The slack keeps ``int(0.29 * 100)`` at 29, where floats give 28."""
    return min(int(fraction * n + 1e-9), max(n - 1, 0) if fraction < 1 else n)


def share(number: int, n: int) -> float:
    """A γ below 1 of which `count` makes `number`, however large `n` is: half a group above it."""
    return 0.0 if number == 0 else min((number + 0.5) / n, 1.0 - 0.5 / n)


@dataclass(frozen=True)
class Cut:
    """Where every pool is cut: below it lie the candidates. A few bytes per pool stand for a flag per weight.

    Attributes:
        kth: ``[pools, 1]``, the importance of the last candidate; -inf where a pool has none.
        last: ``[pools, 1]`` int64, the index of the last candidate of that importance; the later ones are kept.
    """

    kth: Tensor
    last: Tensor

    def candidates(self, importance: Tensor) -> Tensor:
        """``[pools, groups]`` bool, True = candidate.

        Exactly ``int(γ·n)`` per pool for the importances the cut was made from; near that for later ones.
        """
        index = torch.arange(importance.shape[1], device=importance.device)
        return (importance < self.kth) | ((importance == self.kth) & (index <= self.last))


def cut(importance: Tensor, fraction: float) -> Cut:
    """Find where the ``int(γ·n)`` least important groups of every pool end; ties are taken by index.

    A threshold alone takes too many of them (all of a constant row), which bfloat16 weights make common.

    Args:
        importance: ``[pools, groups]``, any float dtype; compared in float32.
        fraction: γ in [0, 1].
    """
    importance = importance.float()
    pools, groups = importance.shape
    k = count(fraction, groups)
    if k == 0 or importance.numel() == 0:
        return Cut(importance.new_full((pools, 1), -torch.inf), torch.full((pools, 1), -1, device=importance.device))
    if importance.is_cuda:
        kth = importance.sort(dim=1).values[:, k - 1 : k]  # CUDA's kthvalue is not deterministic
    else:
        kth = importance.kthvalue(k, dim=1, keepdim=True).values
    room = k - (importance < kth).sum(dim=1, keepdim=True)
    tied = importance == kth
    last = torch.full_like(room, groups - 1)
    if not torch.equal(tied_groups := tied.sum(dim=1, keepdim=True), room):
        # The running count first reaches the room at the last one that is taken.
        reached = (tied.cumsum(dim=1) >= room).int().argmax(dim=1, keepdim=True)
        last = torch.where(tied_groups == room, last, reached)
    return Cut(kth, last)


def bottom_k(importance: Tensor, fraction: float) -> Tensor:
    """Mark the ``int(γ·n)`` least important groups of every pool, exactly as many; ties by index.

    Args:
        importance: ``[pools, groups]``, any float dtype.
        fraction: γ in [0, 1].

    Returns:
        ``[pools, groups]`` bool, True = candidate. Every row holds the same number of them.
    """
    return cut(importance, fraction).candidates(importance.float())


def draw_key(*parts: object) -> int:
    """A 63-bit key for `draw`, a function of `parts` alone (seed, step, micro-step, tensor name)."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def words(key: int, n: int, device: torch.device) -> Tensor:
    """The first `n` numbers of the stream `key`, ``[n]`` int64, all 64 bits of each uniform.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): number i is a hash of ``key + i·φ``, so any of them can be had
    without the others, on any device, in any order.
    """
    return mixed(torch.arange(n, device=device).mul_(_GOLDEN).add_(key))


def mixed(z: Tensor) -> Tensor:
    """`z`, int64, hashed entry by entry, in place: every bit of the result depends on all bits of the entry."""
    for shift, factor in _ROUNDS:
        z = z.bitwise_xor_(_shifted(z, shift)).mul_(factor)
    return z.bitwise_xor_(_shifted(z, _LAST_SHIFT))


def _shifted(z: Tensor, by: int) -> Tensor:
    # torch's shift of a signed number copies the sign
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def threshold(rate: float, key: int) -> int:
    """What 16 uniform bits must lie below for a drop: α·65536, rounded up or down by chance, so that α is met exactly.

    The coin is number 0 of the stream, which no draw uses.
    """
    z = key  # `words`, without the price of a dozen small tensors
    for shift, factor in _ROUNDS:
        z = ((z ^ (z >> shift)) * factor) & ((1 << 64) - 1)
    coin = (z ^ (z >> _LAST_SHIFT)) >> 11
    return int(rate * SPAN + coin * 2.0**-53)


def draw(shape: torch.Size, rate: float, key: int, device: torch.device) -> Tensor:
    """Independent coin flips from a counter, not from the global generator.

    The same key gives the same flips on every device, whatever else has consumed random numbers: evaluation, ordinary
    dropout or a resumed process do not shift them.

    Args:
        shape: of the result.
        rate: α in [0, 1], the chance of True; met exactly in expectation over keys, to 1/65536 for one key.
        key: from `draw_key`.
        device: where the flips are made.

    Returns:
        bool tensor of `shape`, True = drop. Flip i is made of the 16 bits i mod 4 of number 1 + i/4 of the stream.
    """
    numbers = words(key, 1 + (shape.numel() + 3) // 4, device)[1:]
    bits = numbers.view(torch.int16)[: shape.numel()].view(shape)
    below = threshold(rate, key) - SPAN // 2  # the bits as signed numbers
    # a rate of 1 needs a threshold one above the largest int16
    return bits < below if below < SPAN // 2 else torch.ones_like(bits, dtype=torch.bool)
