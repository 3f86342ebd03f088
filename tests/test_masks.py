"""Exact-count selection and the counter-based draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from td_plugin.masks import bottom_k, count, cut, draw, draw_key, threshold, words

CPU = torch.device("cpu")
FRACTIONS = st.floats(0, 1, exclude_max=True)


@st.composite
def importances(draw_: st.DrawFn, tied: bool | None = None) -> Tensor:
    """``[pools, groups]``, positive; tied: from five values only."""
    shape = draw_(st.tuples(st.integers(1, 6), st.integers(1, 40)))
    generator = torch.Generator().manual_seed(draw_(st.integers(0, 2**32)))
    if draw_(st.booleans()) if tied is None else tied:
        return torch.randint(1, 6, shape, generator=generator).float()
    return torch.randperm(shape[0] * shape[1], generator=generator).float().view(shape) + 1


@pytest.mark.parametrize(
    ("fraction", "n", "expected"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.58, 100, 58), (0.1, 10, 1), (0.7, 10, 7), (0.5, 3, 1), (0.99, 10, 9)]
    + [(0.0, 7, 0), (1.0, 7, 7), (0.999999, 4, 3), (0.3, 0, 0), (1 / 3, 3, 1)],
)
def test_count_is_the_whole_part_of_the_product(fraction: float, n: int, expected: int) -> None:
    assert count(fraction, n) == expected


@given(st.integers(0, 100), st.integers(0, 5000))
def test_count_of_a_percentage_is_exact(percent: int, n: int) -> None:
    assert count(percent / 100, n) == percent * n // 100


@given(importances(), FRACTIONS, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_every_pool_gives_exactly_its_share(importance: Tensor, fraction: float, dtype: torch.dtype) -> None:
    chosen = bottom_k(importance.to(dtype), fraction)
    assert chosen.dtype == torch.bool and chosen.shape == importance.shape
    assert (chosen.sum(1) == count(fraction, importance.shape[1])).all()


@given(importances(), FRACTIONS)
def test_no_candidate_is_more_important_than_what_is_kept(importance: Tensor, fraction: float) -> None:
    for row, chosen in zip(importance, bottom_k(importance, fraction), strict=True):
        if chosen.any() and not chosen.all():  # a share within rounding of 1 takes all
            assert row[chosen].max() <= row[~chosen].min()


@given(importances(tied=True), FRACTIONS)
def test_ties_go_by_index(importance: Tensor, fraction: float) -> None:
    order = importance.argsort(dim=1, stable=True)[:, : count(fraction, importance.shape[1])]
    assert torch.equal(bottom_k(importance, fraction), torch.zeros_like(importance).scatter(1, order, 1).bool())


@given(importances(tied=False), FRACTIONS, st.randoms(use_true_random=False))
def test_permuting_the_groups_permutes_the_choice(importance: Tensor, fraction: float, random: object) -> None:
    order = list(range(importance.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert torch.equal(bottom_k(importance[:, order], fraction), bottom_k(importance, fraction)[:, order])


@given(importances(), FRACTIONS, FRACTIONS)
def test_a_higher_share_contains_the_lower(importance: Tensor, a: float, b: float) -> None:
    small, large = bottom_k(importance, min(a, b)), bottom_k(importance, max(a, b))
    assert not (small & ~large).any()


@given(importances(), FRACTIONS, st.integers(-8, 8))
def test_scaling_the_importance_changes_nothing(importance: Tensor, fraction: float, power: int) -> None:
    assert torch.equal(bottom_k(importance * 2.0**power, fraction), bottom_k(importance, fraction))


@given(importances(), FRACTIONS)
def test_pools_do_not_see_each_other(importance: Tensor, fraction: float) -> None:
    rows = [bottom_k(row[None], fraction) for row in importance]
    assert torch.equal(bottom_k(importance, fraction), torch.cat(rows))


@given(importances(), FRACTIONS)
def test_a_cut_stands_for_the_candidates(importance: Tensor, fraction: float) -> None:
    """The least of the kept and the last of the candidates are where it says."""
    where, k = cut(importance, fraction), count(fraction, importance.shape[1])
    order = importance.argsort(dim=1, stable=True)
    for row, sequence, kth, last in zip(importance, order, where.kth, where.last, strict=True):
        if k == 0:
            assert kth == -math.inf and last == -1
            continue
        tied = (row == row[sequence[k - 1]]).nonzero().flatten()
        taken = len([i for i in sequence[:k] if row[i] == row[sequence[k - 1]]])
        assert kth == row[sequence[k - 1]]
        assert last == (importance.shape[1] - 1 if taken == len(tied) else tied[taken - 1])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_pools(shape: tuple[int, int]) -> None:
    assert bottom_k(torch.ones(shape), 0.5).shape == shape


def test_constant_bfloat16_rows_are_not_overselected() -> None:
    assert bottom_k(torch.full((2, 1000), 0.125, dtype=torch.bfloat16), 0.25).sum(1).tolist() == [250, 250]


def flips(rate: float, *parts: object, n: int = 1000) -> Tensor:
    return draw(torch.Size([n]), rate, draw_key(*parts), CPU)


def test_a_draw_is_a_function_of_its_key() -> None:
    assert torch.equal(flips(0.5, 0, 7, 1, "a.weight"), flips(0.5, 0, 7, 1, "a.weight"))


@pytest.mark.parametrize(
    "other", [(1, 7, 1, "a.weight"), (0, 8, 1, "a.weight"), (0, 7, 2, "a.weight"), (0, 7, 1, "b.weight")]
)
def test_another_seed_step_micro_step_or_name_gives_an_independent_draw(other: tuple[object, ...]) -> None:
    agree = (flips(0.5, 0, 7, 1, "a.weight", n=20000) == flips(0.5, *other, n=20000)).float().mean().item()
    assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(20000)


def test_keys_do_not_run_their_parts_together() -> None:
    assert len({draw_key(1, 23, "w"), draw_key(12, 3, "w"), draw_key(1, 2, "3w"), draw_key("1", 23, "w", "")}) == 4


def test_keys_are_the_same_in_every_process_and_fit_a_generator() -> None:
    assert draw_key(0, 1, 2, "encoder.weight") == 8947709940564448469
    assert all(0 <= draw_key(i) < 2**63 for i in range(200))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.66, 0.99])
def test_the_rate_is_met(rate: float) -> None:
    n = 400_000
    hits = int(draw(torch.Size([n]), rate, draw_key("rate", rate), CPU).sum())
    assert abs(hits - n * rate) < 5 * math.sqrt(n * rate * (1 - rate)) + n / 131072


def numbers_of_splitmix(seed: int, n: int) -> list[int]:
    """Steele, Lea and Flood (2014), in Python's own whole numbers."""
    mask, found = (1 << 64) - 1, []
    for i in range(n):
        z = (seed + i * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


@given(st.integers(0, 2**63 - 1), st.integers(1, 30))
def test_the_stream_is_splitmix64(key: int, n: int) -> None:
    assert [number & ((1 << 64) - 1) for number in words(key, n, CPU).tolist()] == numbers_of_splitmix(key, n)


def test_the_stream_gives_the_published_first_number() -> None:
    """Of seed 0; that generator steps before it hashes."""
    assert words(0, 2, CPU)[1].item() & ((1 << 64) - 1) == 0xE220A8397B1DCDAF


@given(st.integers(0, 2**63 - 1), FRACTIONS, st.integers(1, 41))
def test_a_flip_is_16_bits_of_the_stream_below_the_threshold(key: int, rate: float, n: int) -> None:
    packed = np.array(numbers_of_splitmix(key, 1 + (n + 3) // 4)[1:], np.uint64).view(np.int16)[:n].astype(np.int64)
    assert draw(torch.Size([n]), rate, key, CPU).tolist() == (packed + 32768 < threshold(rate, key)).tolist()


@pytest.mark.parametrize("rate", [0.1, 1 / 3, 0.66, 0.999995])
def test_the_rate_is_met_exactly_over_keys(rate: float) -> None:
    """16 bits alone would be off by up to 1/65536; the threshold is rounded by chance."""
    found = np.array([threshold(rate, draw_key("mean", i)) for i in range(4000)]) / 65536
    assert set(found * 65536) <= {math.floor(rate * 65536), math.ceil(rate * 65536)}
    assert abs(found.mean() - rate) < 5 * 0.5 / 65536 / math.sqrt(4000)


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.66])
def test_counts_of_drops_follow_the_binomial(rate: float) -> None:
    """Chi-square: how often a weight is dropped over 40 steps, and how many of 40 neighbours are in one step."""
    flips_ = torch.stack([flips(rate, 0, step, "chi", n=2000) for step in range(40)])
    expected = scipy.stats.binom.pmf(np.arange(41), 40, rate)
    for counts in (flips_.sum(0), flips_.view(-1, 40).sum(1)):
        seen = np.bincount(counts.numpy(), minlength=41)
        common = expected * len(counts) >= 5
        cells = (
            [*seen[common], seen[~common].sum()],
            [*expected[common] * len(counts), expected[~common].sum() * len(counts)],
        )
        assert scipy.stats.chisquare(*cells).pvalue > 1e-4


@pytest.mark.parametrize("n", [1, 3, 4, 5, 1001])
def test_rates_0_and_1_are_certain(n: int) -> None:
    assert not draw(torch.Size([n]), 0.0, 5, CPU).any()
    assert draw(torch.Size([n]), 1.0, 5, CPU).all()
    assert draw(torch.Size([n]), 1 - 1e-9, 5, CPU).all()


def test_every_place_of_a_packed_word_is_fair() -> None:
    """Four flips share one random word: each of its places, and each pair of them, must be a fair coin."""
    places = torch.stack([draw(torch.Size([4096]), 0.5, draw_key("place", i), CPU) for i in range(25)]).view(-1, 4)
    n = len(places)
    for pattern in range(16):  # chi-square with 15 degrees of freedom, one cell at a time
        hits = int((places.long() @ torch.tensor([1, 2, 4, 8]) == pattern).sum())
        assert abs(hits - n / 16) < 5 * math.sqrt(n / 16)


def test_neighbours_along_a_key_sequence_are_uncorrelated() -> None:
    rows = torch.stack([flips(0.5, 0, step, 0, "w", n=512) for step in range(512)]).float() - 0.5
    assert abs((rows[1:] * rows[:-1]).mean().item()) < 5 * 0.25 / math.sqrt(511 * 512)


@settings(max_examples=20)
@given(FRACTIONS, st.lists(st.integers(0, 7), min_size=1, max_size=3))
def test_the_global_generator_is_neither_used_nor_moved(rate: float, shape: list[int]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(torch.Size(shape), rate, 11, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(draw(torch.Size(shape), rate, 11, CPU), first)
    assert first.shape == torch.Size(shape) and first.dtype == torch.bool


@given(FRACTIONS, FRACTIONS)
def test_with_one_key_a_higher_rate_drops_a_superset(a: float, b: float) -> None:
    """So that ramping α changes as few flips as it can."""
    low, high = flips(min(a, b), "same"), flips(max(a, b), "same")
    assert not (low & ~high).any()
