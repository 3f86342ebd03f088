"""Granularities and criteria: what is pooled, what is grouped, and how a choice comes back as a mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import td_plugin as td
from td_plugin.contract import Evidence, Granularity
from td_plugin.criteria import magnitude, random
from td_plugin.granularity import OutputRow, Units, WholeTensor
from td_plugin.structure import Slice

SHAPES = {"linear": (6, 4), "conv1d": (6, 4, 3), "conv2d": (6, 4, 2, 3)}


def numbered(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + np.prod(shape)).view(shape)


def slice_(dim: int = 0, span: int = 1) -> Slice:
    return Slice("layer", "weight", dim, span)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_row_is_everything_that_feeds_one_output(shape: tuple[int, ...], dim: int) -> None:
    weight = numbered(*shape)
    groups = OutputRow().to_groups([weight], [slice_(dim)])
    assert groups.shape == (shape[dim], weight.numel() // shape[dim])
    for output in range(shape[dim]):
        assert torch.equal(groups[output], weight.select(dim, output).flatten())


@pytest.mark.parametrize("granularity", [OutputRow(), WholeTensor()], ids=repr)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_go_to_groups_and_back_unchanged(shape: tuple[int, ...], dim: int, granularity: Granularity) -> None:
    weight = numbered(*shape)
    groups = granularity.to_groups([weight], [slice_(dim)])
    assert torch.equal(granularity.to_mask(groups, slice_(dim), shape), weight)


def test_the_whole_tensor_is_one_pool() -> None:
    assert WholeTensor().to_groups([numbered(6, 4)], [slice_()]).shape == (1, 24)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_unit_is_ranked_by_the_norm_of_its_weights(shape: tuple[int, ...], dim: int) -> None:
    weight = numbered(*shape)
    groups = Units().to_groups([weight], [slice_(dim)])
    rows = np.moveaxis(weight.numpy().astype(np.float64), dim, 0).reshape(shape[dim], -1)
    np.testing.assert_allclose(groups.numpy(), np.linalg.norm(rows, axis=1)[None], rtol=1e-6)


def test_a_head_is_ranked_by_all_its_rows_in_all_its_tensors() -> None:
    query, key, value = (torch.randn(6, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    groups = Units(("heads",)).to_groups([query, key, value], [slice_(0, 3)] * 3)
    assert groups.shape == (1, 2)
    for head in range(2):
        parts = [t[3 * head : 3 * head + 3].numpy().astype(np.float64).ravel() for t in (query, key, value)]
        np.testing.assert_allclose(groups[0, head], np.linalg.norm(np.concatenate(parts)), rtol=1e-6)


def test_a_unit_mask_holds_one_entry_per_unit_and_broadcasts() -> None:
    units = torch.tensor([[True, False, True]])
    assert Units().to_mask(units, slice_(0), (3, 4, 5)).shape == (3, 1, 1)
    column = Units().to_mask(units, slice_(1), (4, 3))
    assert column.shape == (1, 3) and column.flatten().tolist() == [True, False, True]
    rows = Units().to_mask(units, slice_(0, 2), (6, 4))
    assert rows.flatten().tolist() == [True, True, False, False, True, True]
    assert Units().to_mask(units, slice_(0, 2), (6,)).shape == (6,)


def owned(owners: list[int], dim: int = 0) -> Slice:
    return Slice("layer", "weight", dim, owners=tuple(owners))


@pytest.mark.parametrize("dim", [0, 1])
def test_entries_with_owners_are_ranked_and_masked_by_their_unit(dim: int) -> None:
    owners = [2, -1, 0, 2, 0, -1, 2]  # any order, unit 1 elsewhere, some entries of no unit
    weight = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    other = torch.randn(4, generator=torch.Generator().manual_seed(1))
    groups = Units().to_groups([weight, other], [owned(owners, dim), owned([1, 1, 0, -1])])
    rows = np.moveaxis(weight.numpy().astype(np.float64), dim, 0)
    squares = [(rows[np.array(owners) == unit] ** 2).sum() for unit in range(3)]
    squares[1] += float(other[0]) ** 2 + float(other[1]) ** 2
    squares[0] += float(other[2]) ** 2
    np.testing.assert_allclose(groups.numpy(), np.sqrt([squares]), rtol=1e-6)
    dropped = Units().to_mask(torch.tensor([[False, True, True]]), owned(owners, dim), weight.shape)
    assert dropped.shape == ((7, 1) if dim == 0 else (1, 7))
    assert dropped.flatten().tolist() == [True, False, False, True, False, False, True]


def test_owners_say_what_a_span_says_where_both_can() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    by_span, by_owner = slice_(0, 2), owned([0, 0, 1, 1, 2, 2])
    groups = Units().to_groups([weight], [by_span])
    torch.testing.assert_close(Units().to_groups([weight], [by_owner]), groups)
    low = groups < groups.median()
    assert torch.equal(Units().to_mask(low, by_owner, (6, 5)), Units().to_mask(low, by_span, (6, 5)))


def test_a_whole_tensor_may_be_of_one_unit() -> None:
    tensors = [torch.full((4, 3), value) for value in (1.0, 3.0, 2.0)]
    slices = [owned([layer] * 4) for layer in range(3)]
    groups = Units(("layers",)).to_groups(tensors, slices)
    np.testing.assert_allclose(groups.numpy(), [[12**0.5, 108**0.5, 48**0.5]], rtol=1e-6)
    for layer, part in enumerate(slices):
        dropped = Units(("layers",)).to_mask(torch.tensor([[True, False, False]]), part, (4, 3))
        assert dropped.flatten().tolist() == [layer == 0] * 4
    assert Units(("layers",)).to_groups([tensors[0]], [owned([-1] * 4)]).shape == (1, 0)


def test_unknown_members() -> None:
    with pytest.raises(td.TdError, match="unknown members.*consumers"):
        Units(members="consumers")  # type: ignore[arg-type]


@pytest.mark.parametrize("kinds", [(), ("filters",), ("neurons", "filters")])
def test_unknown_kinds_of_units(kinds: tuple[str, ...]) -> None:
    with pytest.raises(td.TdError, match="unknown kinds"):
        Units(kinds)


def test_values_are_compared_by_value() -> None:
    assert OutputRow() == OutputRow() != WholeTensor()
    assert hash(Units(("heads",))) == hash(Units(("heads",))) and Units(("heads",)) != Units(("neurons",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_magnitude_is_float32_and_leaves_the_weight_alone(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-2.0, 0.5], [0.0, -0.25]], dtype=dtype)
    importance = magnitude(Evidence(weight))
    assert importance.dtype == torch.float32
    assert importance.tolist() == [[2.0, 0.5], [0.0, 0.25]] and weight[0, 0] == -2


def test_random_importance_is_fixed_by_seed_and_name_alone() -> None:
    weight = torch.zeros(4, 5)
    first = random(Evidence(weight, "a", 0))
    torch.rand(3)
    assert torch.equal(random(Evidence(weight + 1, "a", 0)), first)
    assert not torch.equal(random(Evidence(weight, "b", 0)), first)
    assert not torch.equal(random(Evidence(weight, "a", 1)), first)
    assert first.shape == weight.shape and ((first >= 0) & (first < 1)).all()


def test_random_candidates_never_move() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    sparsifier = td.TargetedDropout(td.Recipe(random, OutputRow(), name="random"), 0.5)
    sparsifier.prepare(model)
    before = sparsifier.state["0.weight"]["mask"].clone()
    with torch.no_grad(), sparsifier.dense():
        model[0].weight.normal_()
    sparsifier.step()
    assert torch.equal(sparsifier.state["0.weight"]["mask"], before)
