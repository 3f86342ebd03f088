"""Packed flags against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from td_plugin.bits import flags_of, ones, pack, size, unpack


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 2**32))
def test_they_are_the_bits_of_numpy_and_come_back(shape: list[int], seed: int) -> None:
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(flags)
    assert np.array_equal(packed.numpy(), np.packbits(flags.numpy(), bitorder="little"))
    assert packed.numel() == size(flags.numel()) and ones(packed) == int(flags.sum())
    assert torch.equal(unpack(packed, shape), flags)


def test_a_transposed_tensor_is_packed_as_it_reads() -> None:
    flags = (torch.rand(5, 11) < 0.5).t()
    assert torch.equal(unpack(pack(flags), flags.shape), flags)


@pytest.mark.parametrize("keep", [torch.tensor([[True], [False]]), pack(torch.tensor([[True] * 3, [False] * 3]))])
def test_masks_of_both_kinds_read_alike(keep: torch.Tensor) -> None:
    assert torch.equal(flags_of(keep, (2, 3)).expand(2, 3), torch.tensor([[True] * 3, [False] * 3]))
