"""The candidate sets are those of the authors' rule, read where users see them: in evaluation, on the module."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import td_plugin as td

GAMMAS = st.integers(0, 99).map(lambda percent: percent / 100)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
LAYERS = ("linear", "conv1d", "conv2d", "hf_conv1d")


def make_layer(kind: str, inputs: int, outputs: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(inputs, outputs)
    if kind == "conv1d":
        return nn.Conv1d(inputs, outputs, 3)
    if kind == "conv2d":
        return nn.Conv2d(inputs, outputs, (2, 3))
    return Conv1D(outputs, inputs)


def outputs_first(kind: str, weight: torch.Tensor) -> np.ndarray:
    array = weight.detach().double().numpy()
    return array.T if kind == "hf_conv1d" else array


def fill(layer: nn.Module, seed: int, tied: bool) -> None:
    """Weights without a zero, so that a zero read later is a mask; `tied`: a handful of magnitudes only."""
    rng = np.random.default_rng(seed)
    for parameter in layer.parameters():
        sign = rng.choice([-1.0, 1.0], tuple(parameter.shape))
        size = rng.integers(1, 5, tuple(parameter.shape)) if tied else rng.uniform(0.01, 2.0, tuple(parameter.shape))
        parameter.data.copy_(torch.from_numpy(sign * size))


def prepared(layer: nn.Module, recipe: td.Recipe, gamma: float) -> td.TargetedDropout:
    sparsifier = td.TargetedDropout(recipe, gamma)
    sparsifier.prepare(layer, [{"tensor_fqn": "weight"}])
    layer.eval()
    return sparsifier


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=25, deadline=None)
@given(
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 9),
    gamma=GAMMAS,
    tied=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 2**32 - 1),
)
def test_weight_candidates(
    kind: str, inputs: int, outputs: int, gamma: float, tied: bool, dtype: torch.dtype, seed: int
) -> None:
    layer = make_layer(kind, inputs, outputs)
    fill(layer, seed, tied)
    layer.to(dtype)
    dense = outputs_first(kind, layer.weight)
    sparsifier = prepared(layer, td.recipes.targeted_weight(), gamma)
    expected = reference.targeted_weight(dense, gamma)
    assert np.array_equal(outputs_first(kind, layer.weight) == 0, expected)
    assert np.array_equal(~outputs_first(kind, sparsifier.state["weight"]["mask"]).astype(bool), expected)
    assert (expected.reshape(outputs, -1).sum(1) == reference.share_of(gamma, dense[0].size)).all()
    assert (layer.bias != 0).all()  # biases are not ranked


# A layer on its own: nothing reads its units, which prepare() rightly points out.
@pytest.mark.filterwarnings("ignore:the outputs of 1 layers:UserWarning")
@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=25, deadline=None)
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 24),
    gamma=GAMMAS,
    tied=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 2**32 - 1),
)
def test_unit_candidates(
    kind: str, inputs: int, outputs: int, gamma: float, tied: bool, dtype: torch.dtype, seed: int
) -> None:
    layer = make_layer(kind, inputs, outputs)
    fill(layer, seed, tied)
    layer.to(dtype)
    dense = outputs_first(kind, layer.weight)
    gaps = np.diff(np.sort(reference.unit_norms(dense)))
    assume(((gaps == 0) | (gaps > 1e-5)).all())  # closer norms than float32 tells apart have no agreed order
    sparsifier = prepared(layer, td.recipes.targeted_unit(), gamma)
    expected = reference.targeted_unit(dense, gamma)
    seen = outputs_first(kind, layer.weight).reshape(outputs, -1) == 0
    assert np.array_equal(seen.all(1), expected)
    assert np.array_equal(seen.any(1), expected)  # a unit goes whole or not at all
    assert np.array_equal((layer.bias == 0).numpy(), expected)
    assert np.array_equal(~sparsifier.state["bias"]["mask"].numpy(), expected)
    assert expected.sum() == reference.share_of(gamma, outputs)


def test_the_authors_strict_threshold_takes_fewer_of_equals() -> None:
    row = np.array([1.0, 1.0, 1.0, 2.0])
    assert reference.authors_row(row, 0.5).sum() == 0
    assert reference.exact_row(row, 0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tied", [False, True])
def test_only_candidates_are_dropped_in_training(kind: str, tied: bool) -> None:
    layer = make_layer(kind, 10, 8)
    fill(layer, 0, tied)
    candidates = reference.targeted_weight(outputs_first(kind, layer.weight), 0.7)
    sparsifier = prepared(layer, td.recipes.targeted_weight(drop_rate=0.5), 0.7)
    layer.train()
    seen = []
    for _ in range(20):
        sparsifier.step()
        seen.append(outputs_first(kind, layer.weight) == 0)
    assert not (np.stack(seen) & ~candidates).any()
    assert np.array_equal(np.any(seen, axis=0), candidates)  # each candidate's turn comes: 2^-20 per weight
    assert not np.array_equal(seen[0], candidates)


@pytest.mark.filterwarnings("ignore:the outputs of 1 layers:UserWarning")
@pytest.mark.parametrize("recipe", [td.recipes.ramping_targeted_weight(0.66), td.recipes.ramping_targeted_unit(0.66)])
def test_the_ramp_equals_the_published_formula(recipe: td.Recipe) -> None:
    model = nn.Linear(4, 4)
    sparsifier = td.TargetedDropout(recipe, 0.75)
    sparsifier.prepare(model, [{"tensor_fqn": "weight"}])
    for step in [*range(0, 45000, 250), 19999, 20001, 39999, 40001, 10**6]:
        sparsifier.set_progress(step / 40000)
        assert sparsifier.groups[0]["sparsity_level"] == pytest.approx(reference.ramped_gamma(step, 0.75), abs=1e-12)
        assert sparsifier.groups[0]["drop_rate"] == pytest.approx(reference.ramped_alpha(step, 0.66), abs=1e-12)
