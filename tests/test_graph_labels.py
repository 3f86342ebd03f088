"""Labels, their classes, and reshapes of labelled dimensions, against plain loops."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from td_plugin.graph.labels import Labels
from td_plugin.graph.values import INSIDE, Joint, Value, cut, permute, reshape, resolve, select

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def partition(root: Tensor) -> set[frozenset[int]]:
    return {frozenset(torch.nonzero(root == one).flatten().tolist()) for one in torch.unique(root).tolist()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_classes_are_those_of_a_union_find(count: int, pairs: list[tuple[int, int]]) -> None:
    labels = Labels()
    every = labels.fresh(count)
    parents = list(range(count))

    def find(one: int) -> int:
        return one if parents[one] == one else find(parents[one])

    for one, other in ((a % count, b % count) for a, b in pairs):
        labels.join(every[one : one + 1], every[other : other + 1])
        parents[find(one)] = find(other)
    root = labels.classes()
    assert partition(root) == partition(torch.tensor([find(one) for one in range(count)]))
    assert all(root[one] <= one for one in range(count))


def test_a_long_chain_is_one_class() -> None:
    labels = Labels()
    every = labels.fresh(1000)
    labels.join(every[1:], every[:-1])
    assert labels.classes().tolist() == [0] * 1000


def test_joining_with_a_dimension_that_cannot_shrink_pins_with_its_reason() -> None:
    labels = Labels()
    one = labels.own("a.weight", 0, 3)
    assert labels.join(one, "it is odd") == "it is odd"
    ((pinned, reason),) = labels.pins
    assert (pinned.tolist(), reason) == ([0, 1, 2], "it is odd")


def test_every_owner_behind_a_dimension_gets_the_role() -> None:
    labels = Labels()
    both = torch.cat((labels.own("a", 0, 3), labels.own("b", 1, 2), labels.fresh(1)))
    labels.role(both, "ranked")
    assert list(labels.roles) == [("a", 0), ("b", 1)]
    assert labels.owner(both[3:]).tensor == "b"
    assert labels.owner(both[5:]) is None


def labelled(labels: Labels, shape: list[int], dim: int) -> Value:
    dims = tuple(labels.fresh(size) if place == dim else "no" for place, size in enumerate(shape))
    return Value(tuple(shape), dims)


def spread(value: Value) -> Tensor:
    """What `value` says of each of its entries."""
    out = torch.full(value.shape, -1)
    for dim, found in enumerate(value.dims):
        if isinstance(found, Tensor):
            out = found.view([-1 if place == dim else 1 for place in range(len(value.shape))]).expand(value.shape)
    if value.joint:
        order = sorted(range(len(value.joint.dims)), key=lambda i: value.joint.dims[i])
        sizes = [size if place in value.joint.dims else 1 for place, size in enumerate(value.shape)]
        out = value.joint.labels.permute(order).reshape(sizes).expand(value.shape)
    return out


@settings(max_examples=120, deadline=None, derandomize=True)
@given(SIZES, st.data())
def test_reshape_says_of_every_entry_what_it_said_before(shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    total = torch.Size(shape).numel()
    other, left = [], total
    while left > 1:
        size = data.draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]))
        other.append(size)
        left //= size
        if size == 1 and len(other) > 5:
            other.append(left)
            left = 1
    labels = Labels()
    before = labelled(labels, shape, dim)
    after = reshape(labels, before, other)
    root = labels.classes()
    assert after.shape == tuple(other)
    old, new = spread(before).reshape(-1), spread(after).reshape(-1)
    if bool((new >= 0).all()) and bool((old >= 0).all()):
        assert torch.equal(root[old], root[new])
    else:  # nothing varies along it any more, or it did not to begin with
        assert len(torch.unique(old)) == 1


def test_splits_are_told_apart_by_what_happens_next() -> None:
    labels = Labels()
    packed = Value((2, 36), ("batch", labels.own("qkv", 0, 36)))
    split = permute(reshape(labels, packed, (2, 3, 4, 3)), (1, 0, 2, 3))  # (3, heads, size) with three in front
    assert isinstance(split.joint, Joint)
    assert split.joint.dims == (0, 2, 3)
    query = select(labels, split, 0)
    assert query.joint.labels.shape == (4, 3)
    heads = resolve(labels, query)
    assert heads.dims[1].tolist() == [0, 3, 6, 9]
    assert heads.dims[2] == INSIDE
    root = labels.classes()
    assert [torch.unique(root[(torch.arange(36) // 3) % 4 == head]).numel() for head in range(4)] == [1] * 4


def test_a_split_that_is_merged_again_is_as_before() -> None:
    labels = Labels()
    whole = Value((2, 12), ("batch", labels.fresh(12)))
    split = reshape(labels, reshape(labels, whole, (2, 4, 3)), (1, 2, 4, 3))
    back = reshape(labels, split, (2, 12))
    assert back.dims[1].tolist() == list(range(12))
    assert partition(labels.classes()) == {frozenset([i]) for i in range(12)}


def test_pieces_of_a_dimension() -> None:
    labels = Labels()
    value = Value((2, 6), ("batch", labels.fresh(6)))
    assert cut(labels, value, 1, 1, 6, 2).dims[1].tolist() == [1, 3, 5]
    assert select(labels, value, 1).dims == ("batch",)
    assert labels.pins[0][0].tolist() == list(range(6))


def test_an_empty_tensor_says_nothing() -> None:
    labels = Labels()
    assert reshape(labels, Value((0, 4), ("none", labels.fresh(4))), (0,)).dims == ("an empty tensor",)
