"""The named methods against numpy, torch.ao and sequences worked by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import MATRIX, MODELS, RECIPES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier

import td_plugin as td
from td_plugin import kernels
from td_plugin.criteria import magnitude
from td_plugin.export import shrink
from td_plugin.granularity import NM, Block, OutputRow, Units, WholeTensor
from td_plugin.masks import bottom_k, count, share
from td_plugin.memory import Memory
from td_plugin.ranking import Ranking
from td_plugin.rates import Below, Global
from td_plugin.schedules import After, Stairs
from td_plugin.units import Slice

NAMES = (
    "targeted_weight", "targeted_unit", "ramping_targeted_weight", "ramping_targeted_unit", "delayed_targeted_weight",
    "delayed_targeted_unit", "random_weight", "random_unit", "xtreme", "dropconnect", "unit_dropout", "magnitude",
    "gradual_magnitude", "iterative_magnitude", "network_surgery", "n_m", "block",
)  # fmt: skip


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def prepared(
    recipe: td.Recipe, *weights: Tensor, level: float | None = 0.5, **options: Any
) -> tuple[nn.Sequential, td.TargetedDropout]:
    """Linear layers of these weights, all of them targets, though they need not fit together."""
    model = nn.Sequential(*map(linear, weights))
    sparsifier = td.TargetedDropout(recipe, level, **options)
    sparsifier.prepare(model, [{"tensor_fqn": f"{i}.weight"} for i in range(len(weights))])
    return model, sparsifier


def kept(sparsifier: td.TargetedDropout, name: str = "0.weight") -> Tensor:
    """What the deterministic mask keeps."""
    mask: Tensor = sparsifier.state[name]["mask"]
    return mask


def sampled(model: nn.Module, name: str = "0") -> Tensor:
    """What training computes with."""
    value: Tensor = model.train().get_submodule(name).weight
    return value.detach().as_subclass(Tensor)


def set_(model: nn.Module, weight: list[float] | Tensor, name: str = "0.weight") -> None:
    with torch.no_grad():
        parameter = dict(model.named_parameters())[name]
        parameter.copy_(torch.as_tensor(weight).view(parameter.shape))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signed(evidence: td.Evidence) -> Tensor:
    """A score below zero for half of the weights, as movement has."""
    return evidence.weight.float()


# ---- names


@pytest.mark.parametrize("name", NAMES)
def test_every_method_needs_no_argument_and_says_its_name(name: str) -> None:
    recipe = getattr(td.recipes, name)()
    assert recipe.name == name and hash(recipe) == hash(getattr(td.recipes, name)())
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    sparsifier = td.TargetedDropout(recipe)
    sparsifier.prepare(model)
    sparsifier.set_progress(1.0)
    sparsifier.step()
    model(torch.randn(3, 8)).sum().backward()
    sparsifier.squash_mask()
    assert (sparsifier.report().zeros > 0) == (not recipe.uninformed)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_two_methods_on_one_tensor_are_refused(rate: float) -> None:
    model, _ = prepared(td.recipes.magnitude(), randn(4, 4))
    other = td.TargetedDropout(td.recipes.dropconnect(rate))
    with pytest.raises(td.TdError, match=r"carries masks already.*0\.weight.*squash"):
        other.prepare(model)
    twice = [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "0.weight", "drop_rate": 0.1}]
    with pytest.raises(td.TdError, match=r"asked for twice.*0\.weight"):
        other.prepare(nn.Sequential(nn.Linear(4, 4)), twice)


# ---- N:M and blocks


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_m_is_that_of_torch_ao(n: int, m: int) -> None:
    weight = randn(24, 32, seed=n + m)
    _, ours = prepared(td.recipes.n_m(n, m), weight, level=0.9)  # γ is the recipe's own
    theirs = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, m), zeros_per_block=m - n)
    # torch.ao takes the tensor mask for all blocks at level 1; the block mask alone is N:M.
    reference = theirs._make_block_mask(weight.square(), (1, m), m - n).bool()
    assert torch.equal(kept(ours), reference)
    assert ours.groups[0]["sparsity_level"] == 1 - n / m and ours.report().sparsity == 1 - n / m


@pytest.mark.parametrize("shape", [(4, 1), (4, 4), (16, 16), (32, 1), (1, 4)])
@pytest.mark.parametrize("level", [0.5, 0.75])
def test_blocks_are_those_of_torch_ao(shape: tuple[int, int], level: float) -> None:
    weight = randn(64, 64, seed=sum(shape))
    _, ours = prepared(td.recipes.block(*shape), weight, level=level)
    theirs = WeightNormSparsifier(sparsity_level=level, sparse_block_shape=shape)
    reference = theirs._make_tensor_mask(weight.square(), weight.shape, level, shape).bool()
    assert torch.equal(kept(ours), reference)
    (row,) = ours.report().rows
    assert (row.kind, row.groups) == ("blocks", 64 * 64 // math.prod(shape)) and row.dropped == int(level * row.groups)


@given(
    outputs=st.integers(1, 9), inputs=st.integers(1, 9), side=st.integers(1, 3), dim=st.sampled_from([0, 1]),
    rows=st.integers(1, 5), columns=st.integers(1, 5), level=st.floats(0, 0.99), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_blocks_at_edges_live_or_die_as_one_and_are_ranked_by_their_mean(
    outputs: int, inputs: int, side: int, dim: int, rows: int, columns: int, level: float, seed: int
) -> None:
    shape = (outputs, inputs, side) if dim == 0 else (inputs, outputs, side)
    weight, part, granularity = randn(*shape, seed=seed), Slice("", "weight", dim), Block(rows, columns)
    groups = granularity.to_groups([weight.abs()], [part])
    dropped = bottom_k(groups, level)
    mask = granularity.to_mask(dropped, part, shape)
    assert mask.shape == weight.shape
    matrix = weight.movedim(dim, 0).reshape(outputs, -1).numpy()
    flags = mask.movedim(dim, 0).reshape(outputs, -1).numpy()
    means, gone = [], []
    for a in range(0, outputs, rows):
        for b in range(0, matrix.shape[1], columns):
            means.append(np.sqrt((matrix[a : a + rows, b : b + columns].astype(np.float64) ** 2).mean()))
            inside = flags[a : a + rows, b : b + columns]
            assert inside.all() or not inside.any()
            gone.append(bool(inside.all()))
    np.testing.assert_allclose(groups[0], means, rtol=1e-5)
    assert gone == dropped[0].tolist() and sum(gone) == count(level, len(means))


@given(
    outputs=st.integers(1, 5), times=st.integers(1, 4), side=st.integers(1, 3), dim=st.sampled_from([0, 1]),
    m=st.integers(2, 6), data=st.data(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_n_of_every_m_inputs_stay(outputs: int, times: int, side: int, dim: int, m: int, data: st.DataObject) -> None:
    n, inputs = data.draw(st.integers(1, m - 1)), times * m
    shape = (outputs, inputs, side) if dim == 0 else (inputs, outputs, side)
    weight = randn(*shape, seed=data.draw(st.integers(0, 99)))
    part, granularity = Slice("", "weight", dim), NM(n, m)
    groups = granularity.to_groups([weight.abs()], [part])
    assert torch.equal(granularity.to_mask(groups, part, shape), weight.abs())
    keep = ~granularity.to_mask(bottom_k(groups, 1 - n / m), part, shape)
    by_input = keep.movedim(dim, 0).movedim(1, -1).reshape(outputs, side, times, m)
    assert (by_input.sum(-1) == n).all()
    lost = weight.abs().movedim(dim, 0).movedim(1, -1).reshape(outputs, side, times, m)
    assert torch.where(by_input, lost, torch.inf).amin(-1).ge(torch.where(by_input, 0, lost).amax(-1)).all()


def test_a_width_that_m_does_not_divide_is_named_with_the_fix() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(td.TdError, match=r"groups of 4; where: 2\.weight; got: 6 inputs.*config="):
        td.TargetedDropout(td.recipes.n_m(2, 4)).prepare(model)
    config = td.layerwise.fitting(model, td.recipes.n_m(2, 4))
    assert config == [{"tensor_fqn": "0.weight"}]
    td.TargetedDropout(td.recipes.n_m(2, 4)).prepare(model, config)
    with pytest.raises(td.TdError, match=r"groups of 5; where: 0\.weight"):
        td.layerwise.fitting(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)), td.recipes.n_m(2, 5))


@pytest.mark.parametrize(
    "make",
    [lambda: NM(4, 4), lambda: NM(0, 4), lambda: NM(1, True), lambda: NM(1.0, 4), lambda: Block(0, 4),
     lambda: Block(4, 2.0), lambda: OutputRow(0), lambda: Stairs(0, 1, 0), lambda: Stairs(1, 1), lambda: Below(0),
     lambda: Global(1.0), lambda: td.recipes.network_surgery(1.5), lambda: td.recipes.targeted_unit(draw="units"),
     lambda: td.recipes.unit_dropout(kinds=("heads",)), lambda: td.recipes.iterative_magnitude(quality=-1.0),
     lambda: td.Recipe(magnitude, OutputRow(), regrowth=1.5),
     lambda: td.Recipe(magnitude, OutputRow(), gradient="some")],
)  # fmt: skip
def test_wrong_arguments(make: Callable[[], Any]) -> None:
    with pytest.raises(td.TdError, match="fix: "):
        make()


# ---- how many stay


@pytest.mark.parametrize("keeps", [1, 3, 8, 20])
def test_xtreme_leaves_k_weights_of_every_filter(keeps: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(8, 4))
    sparsifier = td.TargetedDropout(td.recipes.xtreme(keeps))
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.set_progress(1.0)
    for name, size in (("0.weight", 27), ("2.weight", 8)):
        mask = kept(sparsifier, name).flatten(1)
        assert (mask.sum(1) == min(keeps, size)).all()
    sparsifier.set_progress(0.5)  # 95 % of the way
    assert (kept(sparsifier).flatten(1).sum(1) == 27 - int(0.95 * (27 - min(keeps, 27)) + 1e-9)).all()


def test_schedules_of_rounds_and_delays() -> None:
    assert [After(0.5)(t) for t in (0, 0.4999, 0.5, 1)] == [0, 0, 1, 1]
    times = (0.0, 0.1999, 0.2, 0.4999, 0.5, 0.7999, 0.8, 1.0)
    assert [Stairs(0.2, 0.8, 3)(t) for t in times] == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert [Stairs(0.2, 0.8, 1)(t) for t in (0.1, 0.2, 0.9)] == [0, 1, 1]
    assert [Stairs(0, 10, 11)(t) for t in range(11)] == pytest.approx([(i + 1) / 11 for i in range(11)])


def test_delayed_pruning_is_dense_and_then_prunes_for_certain() -> None:
    model, sparsifier = prepared(td.recipes.delayed_targeted_weight(0.5), randn(6, 8))
    for time, zeros in ((0.0, 0), (0.49, 0), (0.5, 4), (1.0, 4)):
        sparsifier.set_progress(time)
        sparsifier.step()
        assert ((sampled(model) == 0).sum(1) == zeros).all()


def test_one_shot_magnitude_trains_the_dense_model_and_prunes_the_smallest_of_the_tensor() -> None:
    weight = randn(6, 10)
    model, sparsifier = prepared(td.recipes.magnitude(), weight, level=0.7)
    sparsifier.step()
    assert model.train()[0].weight is dict(model.named_parameters())["0.weight"]
    expected = np.sort(np.abs(weight.numpy()).ravel())[42]
    assert np.array_equal(kept(sparsifier).numpy(), np.abs(weight.numpy()) >= expected)


def test_gradual_magnitude_follows_the_cubic_and_forgets() -> None:
    weight = randn(20, 10)
    model, sparsifier = prepared(td.recipes.gradual_magnitude(), weight, level=0.9)
    for i in range(6):
        sparsifier.set_progress(i / 5)
        sparsifier.step()
        expected = int(200 * 0.9 * (1 - (1 - i / 5) ** 3) + 1e-9)
        assert int((sampled(model) == 0).sum()) == expected
    revived = weight.clone()
    revived[kept(sparsifier).logical_not()] += 10
    set_(model, revived)
    sparsifier.step()
    assert (kept(sparsifier) == kept(sparsifier)).all() and int((sampled(model) != 0).sum()) == 20
    assert (sampled(model).abs() > 5).sum() == 20


@pytest.mark.parametrize("recipe", [td.recipes.random_weight(0.5), td.recipes.random_unit(0.5)], ids=lambda r: r.name)
def test_random_candidates_stay_the_same_whatever_the_weights_do(recipe: td.Recipe) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))
    masks = []
    for seed in (0, 0, 1):
        sparsifier = td.TargetedDropout(recipe, 0.5, seed=seed)
        twin = copy.deepcopy(model)
        sparsifier.prepare(twin)
        masks.append(kept(sparsifier).clone())
        for step in range(4):
            sparsifier.step()
            set_(twin, randn(12, 8, seed=step))
            assert torch.equal(kept(sparsifier), masks[-1])
            assert (sampled(twin) != 0)[masks[-1]].all()
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_units_may_be_drawn_per_weight_as_the_authors_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 2))
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(0.5, draw="weight"), 0.5)
    sparsifier.prepare(model)
    sparsifier.step()
    zeros = (sampled(model) == 0).float().mean(1)
    candidates = ~kept(sparsifier).all(1)
    assert candidates.sum() == 20 and (zeros[~candidates] == 0).all()
    assert ((zeros[candidates] > 0.2) & (zeros[candidates] < 0.8)).all()


def test_evaluation_may_drop_the_share_that_training_does_on_average() -> None:
    weight = randn(8, 20)
    model, sparsifier = prepared(td.recipes.targeted_weight(0.5), weight, level=0.8, eval_mask="expected")
    sparsifier.step()
    assert ((model.eval()[0].weight == 0).sum(1) == 8).all()
    sparsifier.evaluate_at_target()
    assert ((model.eval()[0].weight == 0).sum(1) == 8).all()
    sparsifier.squash_mask()
    assert ((model[0].weight == 0).sum(1) == 8).all()


# ---- dropout without a target


def test_dropconnect_keeps_the_mean_and_evaluates_the_dense_weights() -> None:
    weight = randn(30, 40)
    model, sparsifier = prepared(td.recipes.dropconnect(0.3), weight, level=None)
    total, x = torch.zeros_like(weight), randn(5, 40, seed=1)
    for _ in range(200):
        sparsifier.step()
        value = sampled(model)
        dropped = value == 0
        assert torch.allclose(value[~dropped], weight[~dropped] / 0.7)
        total += value
    # Each entry has the variance w² · p / (1 - p) of one draw.
    z = (total / 200 - weight) / (weight.abs() * math.sqrt(0.3 / 0.7 / 200))
    assert abs(float(z.mean())) < 4 / math.sqrt(z.numel()) and abs(float(z.square().mean()) - 1) < 0.15
    assert 0.25 < dropped.float().mean() < 0.35 and sparsifier.report().dropped_share == pytest.approx(
        float(dropped.float().mean())
    )
    assert torch.equal(model.eval()(x), nn.functional.linear(x, weight))
    sparsifier.squash_mask()  # nothing, and no warning
    assert torch.equal(dict(model.named_parameters())["0.weight"], weight)


def test_the_gradient_of_a_rescaled_weight_is_rescaled() -> None:
    weight, x = randn(6, 8), randn(4, 8, seed=1)
    model, sparsifier = prepared(td.recipes.dropconnect(0.5), weight)
    sparsifier.step()
    mask = (sampled(model) != 0).float()
    model(x).square().sum().backward()
    plain = (weight * mask * 2).requires_grad_()
    nn.functional.linear(x, plain).square().sum().backward()
    assert plain.grad is not None
    torch.testing.assert_close(dict(model.named_parameters())["0.weight"].grad, plain.grad * mask * 2)


def test_dropconnect_prunes_the_smallest_weights_where_it_is_asked_to() -> None:
    weight = randn(6, 10)
    _, sparsifier = prepared(td.recipes.dropconnect(), weight, level=0.7)
    assert np.array_equal(
        kept(sparsifier).numpy(), np.abs(weight.numpy()) >= np.sort(np.abs(weight.numpy()).ravel())[42]
    )


def test_unit_dropout_is_dropout_of_the_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 3))
    plain, x = copy.deepcopy(model), randn(7, 6, seed=1)
    sparsifier = td.TargetedDropout(td.recipes.unit_dropout(0.4))
    sparsifier.prepare(model)
    sparsifier.step()
    hidden, dense = model[:2](x), plain[:2](x)
    alive = (model[0].bias != 0).as_subclass(Tensor)
    assert 5 < alive.sum() < 45
    torch.testing.assert_close(hidden.as_subclass(Tensor), dense * alive / 0.6)
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_unit_dropout_rescales_behind_a_norm_and_not_before_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 30, 1), nn.BatchNorm2d(30), nn.ReLU(), nn.Flatten(), nn.Linear(30 * 4, 3)
    )  # fmt: skip
    plain, x = copy.deepcopy(model), randn(9, 2, 2, 2, seed=1)
    sparsifier = td.TargetedDropout(td.recipes.unit_dropout(0.5))
    sparsifier.prepare(model)
    sparsifier.step()
    hidden, dense = model[:3](x), plain[:3](x)
    alive = (model[1].weight != 0).as_subclass(Tensor)
    assert 3 < alive.sum() < 27
    torch.testing.assert_close(hidden.as_subclass(Tensor), dense * alive.view(1, -1, 1, 1) * 2)


# ---- memory, and gradients of what is dropped


def test_surgery_by_hand() -> None:
    """Ten weights, half of them dropped, margin 0.1: a = 0.9 t, b = 1.1 t."""
    model, sparsifier = prepared(td.recipes.network_surgery(0.1), torch.arange(1.0, 11).view(1, 10), level=0.5)

    def step(*weights: float) -> list[int]:
        if weights:
            set_(model, list(weights))
        sparsifier.step()
        return sampled(model).flatten().nonzero().flatten().tolist()

    assert step() == [5, 6, 7, 8, 9]
    # Weight 4 grows past weight 5, but not past 1.1/0.9 of it: with t between 6.1/0.9·... it stays where it was.
    assert step(1, 2, 3, 4, 7, 6, 7.5, 8, 9, 10) == [5, 6, 7, 8, 9]
    # 7.4 / 1.1 = 6.73 exceeds 6 / 0.9 = 6.67: weight 4 is spliced in, weight 5 pruned.
    assert step(1, 2, 3, 4, 7.4, 6, 7.5, 8, 9, 10) == [4, 6, 7, 8, 9]
    # Now weight 5 has to pass the wider gap in its turn.
    assert step(1, 2, 3, 4, 7.4, 8, 7.5, 8, 9, 10) == [4, 6, 7, 8, 9]
    assert step(1, 2, 3, 4, 7.4, 9.1, 7.5, 8, 9, 10) == [5, 6, 7, 8, 9]
    # Evaluation judges by the same thresholds and moves nothing.
    set_(model, [1, 2, 3, 4, 12, 5.5, 7.5, 8, 9, 10])
    assert kept(sparsifier).flatten().nonzero().flatten().tolist() == [4, 6, 7, 8, 9]
    assert step(1, 2, 3, 4, 7.4, 9.1, 7.5, 8, 9, 10) == [5, 6, 7, 8, 9]


@given(st.integers(0, 10_000), st.floats(0.05, 0.9), st.floats(0.0, 0.5))
@settings(max_examples=40, deadline=None)
def test_surgery_obeys_two_thresholds_with_an_exact_count(seed: int, level: float, margin: float) -> None:
    memory, regrowth = Memory(), (1 - margin) / (1 + margin)
    dropped = torch.zeros(3, 17, dtype=torch.bool)
    for step in range(4):
        importance, before = randn(3, 17, seed=seed + step).abs(), dropped
        dropped = bottom_k(memory.handicapped(importance, regrowth), level)
        memory.set(dropped)
        assert (dropped.sum(1) == count(level, 17)).all()
        # There is a t with a = (1 - margin)·t and b = (1 + margin)·t that says the same.
        scaled = torch.where(before, importance / (1 + margin), importance / (1 - margin)).double()
        highest = torch.where(dropped, scaled, 0).amax(1)
        lowest = torch.where(dropped, torch.inf, scaled).amin(1)
        assert (highest <= lowest * (1 + 1e-6)).all()


def test_dropped_weights_of_surgery_learn_from_the_masked_gradient() -> None:
    weight, x = randn(6, 8), randn(4, 8, seed=1)
    model, sparsifier = prepared(td.recipes.network_surgery(), weight)
    sparsifier.step()
    mask = (sampled(model) != 0).float()
    assert torch.equal(sampled(model), weight * mask) and mask.sum() == 24
    loss = model(x).square().sum()
    loss.backward()
    masked = (weight * mask).requires_grad_()
    nn.functional.linear(x, masked).square().sum().backward()
    assert masked.grad is not None and (masked.grad[mask == 0] != 0).all()
    torch.testing.assert_close(dict(model.named_parameters())["0.weight"].grad, masked.grad)
    kept_only, other = prepared(td.recipes.gradual_magnitude(), weight)
    other.step()
    kept_only(x).square().sum().backward()
    torch.testing.assert_close(dict(kept_only.named_parameters())["0.weight"].grad, masked.grad * mask)


@pytest.mark.parametrize("rescaled", [False, True])
def test_the_other_gradients_hold_under_compile(rescaled: bool) -> None:
    weight, x = randn(6, 8), randn(4, 8, seed=1)
    recipe = td.recipes.dropconnect(0.5) if rescaled else td.recipes.network_surgery()
    model, sparsifier = prepared(recipe, weight)
    sparsifier.step()
    grads = []
    for run in (model, torch.compile(model, backend="eager")):
        run(x).square().sum().backward()
        parameter = dict(model.named_parameters())["0.weight"]
        assert parameter.grad is not None
        grads.append(parameter.grad.clone())
        parameter.grad = None
    torch.testing.assert_close(grads[0], grads[1])


def test_what_iterative_pruning_takes_never_returns_and_what_it_keeps_keeps_its_value() -> None:
    weight = randn(10, 20)
    model, sparsifier = prepared(td.recipes.iterative_magnitude(4, 0.2, 0.8), weight, level=0.8)
    gone, counts = torch.zeros(10, 20, dtype=torch.bool), []
    for i in range(11):
        sparsifier.set_progress(i / 10)
        sparsifier.step()
        dropped = sampled(model) == 0
        assert (dropped | ~gone).all()  # what was gone is
        parameter = dict(model.named_parameters())["0.weight"]
        assert torch.equal(sampled(model)[~dropped], parameter.detach()[~dropped])
        gone = dropped
        counts.append(int(dropped.sum()))
        set_(model, parameter.detach() + torch.where(gone, 9.0, 0.3) * randn(10, 20, seed=i))
    assert counts == [0, 0, 40, 40, 80, 80, 120, 120, 160, 160, 160]
    assert torch.equal(~kept(sparsifier), gone)


def test_the_quality_parameter_sets_the_threshold_once_a_round() -> None:
    first, second = randn(10, 20), 5 * randn(8, 10, seed=1)
    model, sparsifier = prepared(td.recipes.iterative_magnitude(2, 0.0, 1.0, quality=0.4), first, second, level=0.9)
    sparsifier.set_progress(0.0)
    sparsifier.step()
    masks = []
    for name, weight in (("0", first), ("1", second)):
        dropped = np.abs(weight.numpy()) < 0.4 * weight.numpy().std()
        assert np.array_equal((sampled(model, name) == 0).numpy(), dropped)
        masks.append(torch.from_numpy(dropped))
    set_(model, first * 0.3, "0.weight")
    set_(model, torch.where(masks[1], 100.0, second), "1.weight")
    for progress in (0.3, 0.9):  # within the round nothing moves
        sparsifier.set_progress(progress)
        sparsifier.step()
        assert torch.equal(sampled(model, "1") == 0, masks[1]) and torch.equal(sampled(model, "0") == 0, masks[0])
    set_(model, torch.where(randn(10, 20, seed=3) > 0, first, 0.01), "0.weight")
    sparsifier.set_progress(1.0)
    sparsifier.step()
    now = sampled(model, "0") == 0
    assert (now | ~masks[0]).all() and now.sum() > masks[0].sum()


def test_between_rounds_of_iterative_pruning_nothing_is_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sparsifier = prepared(td.recipes.iterative_magnitude(2, 0.0, 1.0), randn(10, 20), level=0.8)
    ranked: list[int] = []
    importance = Ranking.importance

    def spied(self: Ranking, seed: int) -> Tensor:
        ranked.append(seed)
        return importance(self, seed)

    monkeypatch.setattr(Ranking, "importance", spied)
    for progress, expected in ((0.0, 1), (0.2, 0), (0.4, 0), (1.0, 1), (1.0, 0)):
        sparsifier.set_progress(progress)
        sparsifier.step()
        assert len(ranked) == expected
        ranked.clear()
    assert (sampled(model) == 0).sum() == 160


def test_the_quality_parameter_stays_within_gamma() -> None:
    _, sparsifier = prepared(td.recipes.iterative_magnitude(1, 0.0, 0.5, quality=3.0), randn(10, 20), level=0.4)
    sparsifier.set_progress(1.0)
    assert int((~kept(sparsifier)).sum()) == 80


def test_a_memory_goes_through_json_and_a_damaged_one_is_named() -> None:
    memory, other = Memory(), Memory()
    memory.set(torch.rand(5, 13) < 0.5)
    memory.asked = 0.1 + 0.2
    other.restore(memory.snapshot(), "0.weight")
    assert memory.dropped is not None and other.dropped is not None
    assert torch.equal(other.dropped, memory.dropped) and (other.asked, other.groups) == (0.1 + 0.2, 65)
    for wrong in ({"dropped": "?"}, {**memory.snapshot(), "groups": 99}, {**memory.snapshot(), "dropped": "AAAA"}):
        with pytest.raises(td.TdError, match=r"damaged; where: 0\.weight"):
            other.restore(wrong, "0.weight")
    other.restore({}, "0.weight")
    assert other.dropped is None


def test_negative_importances_of_what_is_dropped_do_not_rise() -> None:
    memory = Memory()
    memory.set(torch.tensor([[True, True, False, False]]))
    found = memory.handicapped(torch.tensor([[-1.0, 2.0, -1.0, 2.0]]), 0.5)
    assert found.tolist() == [[-2.0, 1.0, -1.0, 2.0]]


# ---- what ships


@pytest.mark.parametrize(("recipe", "shape"), [row for row in MATRIX if RECIPES[row[0]].granularity.kinds])
def test_what_shrinks_computes_what_was_masked(recipe: str, shape: str) -> None:
    case, model = MODELS[shape], build(shape)
    sparsifier = td.TargetedDropout(RECIPES[recipe], 0.6)
    sparsifier.prepare(model)
    sparsifier.set_progress(1.0)
    sparsifier.step()
    case.logits(model, case.inputs(4)).square().sum().backward()  # what some recipes rank by
    model.eval()
    with torch.no_grad():
        masked = case.logits(model, case.inputs(6))
        small = shrink(model, round_to=1)
        torch.testing.assert_close(case.logits(small, case.inputs(6)), masked, atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "recipe",
    [td.recipes.network_surgery(), td.recipes.gradual_magnitude(rates=Global()), td.recipes.block(3, 3),
     td.recipes.n_m(1, 4), td.recipes.random_weight(0.5), td.recipes.dropconnect(), td.recipes.xtreme(),
     td.Recipe(signed, WholeTensor(), 0.5, regrowth=0.5, name="signed")],
    ids=lambda recipe: recipe.name,
)  # fmt: skip
def test_the_compiled_loops_change_nothing(recipe: td.Recipe) -> None:
    def run() -> list[Tensor]:
        model, sparsifier = prepared(recipe, randn(12, 8).bfloat16().float(), randn(9, 16, seed=1), level=0.6)
        sparsifier.set_progress(1.0)
        seen = []
        for step in range(3):
            sparsifier.step()
            seen += [sampled(model, "0"), sampled(model, "1"), kept(sparsifier), kept(sparsifier, "1.weight")]
            set_(model, randn(12, 8, seed=step).bfloat16().float())
        return seen

    compiled = run()
    with kernels.disabled():
        plain = run()
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


# ---- γ among tensors


def expected_global(weights: list[Tensor], wanted: int, floor: float) -> list[int]:
    """By going through all weights of all tensors in order."""
    left = [w.numel() - max(math.ceil(floor * w.numel() - 1e-9), 1) for w in weights]
    order = sorted((float(v), i) for i, w in enumerate(weights) for v in w.abs().flatten())
    counts = [0] * len(weights)
    for _, i in order:
        if wanted and counts[i] < left[i]:
            counts[i], wanted = counts[i] + 1, wanted - 1
    assert wanted == 0
    return counts


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), level=st.floats(0, 0.8), floor=st.floats(0, 0.15),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_global_pool_takes_the_smallest_of_all_above_the_floors(
    sizes: list[int], level: float, floor: float, seed: int
) -> None:
    weights = [randn(4, size, seed=seed + i) * (10.0 ** (i % 3)) for i, size in enumerate(sizes)]
    rates = Global(floor).levels([level] * len(weights), [w.abs().view(1, -1) for w in weights])
    wanted = sum(count(level, w.numel()) for w in weights)
    found = [count(rate, w.numel()) for rate, w in zip(rates, weights, strict=True)]
    assert found == expected_global(weights, wanted, floor)


def test_global_pruning_of_a_model_is_exact_in_training_evaluation_and_squash() -> None:
    weights = [randn(6, 10), 3 * randn(5, 6, seed=1), 0.01 * randn(4, 5, seed=2)]
    recipe = td.recipes.gradual_magnitude(rates=Global(0.2))
    model, sparsifier = prepared(recipe, *weights, level=0.7)
    sparsifier.set_progress(1.0)
    sparsifier.step()
    wanted = sum(count(0.7, w.numel()) for w in weights)
    counts = expected_global(weights, wanted, 0.2)
    assert counts[2] == 16 and [int((sampled(model, str(i)) == 0).sum()) for i in range(3)] == counts
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        parameters["1.weight"].data.mul_(0.01)  # no version counter says so
    sparsifier.step()
    after = expected_global([weights[0], weights[1] * 0.01, weights[2]], wanted, 0.2)
    assert [int((sampled(model, str(i)) == 0).sum()) for i in range(3)] == after != counts
    model.eval()
    assert [int((model[i].weight == 0).sum()) for i in range(3)] == after
    sparsifier.squash_mask()
    assert [int((model[i].weight == 0).sum()) for i in range(3)] == after
    assert sparsifier.report().zeros == wanted


def test_floors_that_cannot_be_kept_are_named() -> None:
    _, sparsifier = prepared(td.recipes.gradual_magnitude(rates=Global(0.5)), randn(4, 4), randn(4, 4), level=0.7)
    with pytest.raises(td.TdError, match=r"floors.*at most γ = 0\.5"):
        sparsifier.step()


def test_shares_of_large_tensors_give_the_count_they_were_made_from() -> None:
    for n in (3, 1000, 10**7 + 3, 123_456_789):
        for number in (0, 1, n // 3, n - 1):
            assert count(share(number, n), n) == number


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_erk_spreads_by_the_sum_of_the_dimensions(level: float) -> None:
    model = lenet()
    config = td.layerwise.erk(model, level)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    kept_weights = {c["tensor_fqn"]: (1 - c["sparsity_level"]) * shapes[c["tensor_fqn"]].numel() for c in config}
    total = sum(shapes[name].numel() for name in kept_weights)
    assert sum(kept_weights.values()) == pytest.approx((1 - level) * total)
    # Where a tensor is not dense, n1·n2·density / (n1 + n2 + ..) is the same ε.
    scale = {n: k / sum(shapes[n]) for n, k in kept_weights.items() if k < shapes[n].numel() * (1 - 1e-9)}
    assert max(scale.values()) == pytest.approx(min(scale.values()))
    dense = [n for n in kept_weights if n not in scale]
    assert all(shapes[n].numel() / sum(shapes[n]) <= next(iter(scale.values())) * (1 + 1e-9) for n in dense)
    assert (level < 0.9) == bool(dense)
    sparsifier = td.TargetedDropout(td.recipes.magnitude(), 0.1)
    sparsifier.prepare(model, config)
    assert sparsifier.report().sparsity == pytest.approx(level, abs=0.01)


def test_uniform_rates_may_leave_the_first_tensor_dense() -> None:
    config = td.layerwise.uniform(lenet(), 0.9, first_dense=True)
    assert [c["sparsity_level"] for c in config] == [0.0, 0.9, 0.9, 0.9]
    powerless = td.layerwise.erk(lenet(), 0.9, power=0.0)
    assert [c["sparsity_level"] for c in powerless] == pytest.approx([0.9] * 4)


def test_joint_rates_go_with_units_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    sparsifier = td.TargetedDropout(td.Recipe(magnitude, Units(members="producers"), 1.0, rates=Global(0.1)), 0.5)
    sparsifier.prepare(model)
    norms = [model[i].weight.detach().norm(dim=1) for i in (0, 2)]
    counts = expected_global(norms, 11, 0.1)
    assert [row.dropped for row in sparsifier.report().rows] == counts


def test_an_old_granularity_needs_no_rates() -> None:
    assert td.Recipe(magnitude, WholeTensor()).rates is None
