"""The compiled loops against plain torch, bit for bit: thresholds, draws, masked values, gradients, whole steps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import td_plugin as td
from td_plugin import kernels, openmp
from td_plugin.bits import pack, unpack
from td_plugin.masking import select, zero_
from td_plugin.masks import bottom_k, cut, draw
from td_plugin.parametrization import masks_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FRACTIONS = st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.75, 0.99])


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """One thread and two, however small the tensors."""
    before = torch.get_num_threads()
    monkeypatch.setattr(kernels, "_WORTH_A_THREAD", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@st.composite
def weights(draw_: st.DrawFn) -> Tensor:
    """``[pools, groups]`` of any of the types: smooth, few values (ties), constant, mostly zero, huge and tiny."""
    shape = draw_(st.tuples(st.integers(1, 9), st.integers(1, 70)))
    dtype = draw_(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw_(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator)
    kind = draw_(st.sampled_from(["smooth", "ties", "constant", "zeros", "range"]))
    if kind == "ties":
        values = (values * 2).round() / 4
    elif kind == "constant":
        values = torch.full(shape, -0.125)
    elif kind == "zeros":
        values = values.where(values > 1, -0.0)
    elif kind == "range":
        values = values * 10.0 ** torch.randint(-7, 4, shape, generator=generator)
    return values.to(dtype)


@settings(deadline=None, max_examples=150)
@given(weights(), FRACTIONS, st.none() | weights())
def test_the_cut_is_that_of_plain_torch_whatever_the_search_starts_from(
    rows: Tensor, fraction: float, before: Tensor | None
) -> None:
    guess = None if before is None else cut(before.abs().repeat(len(rows), 1)[: len(rows)], 0.5)
    found, exact = kernels.cut(rows, fraction, guess), cut(rows.abs(), fraction)
    assert found is not None
    assert torch.equal(found.kth, exact.kth) and torch.equal(found.last, exact.last)


@settings(deadline=None, max_examples=150)
@given(weights(), FRACTIONS, st.sampled_from([0.0, 0.3, 0.66, 0.999999, 1.0]), st.integers(0, 2**62))
def test_a_draw_is_that_of_plain_torch(rows: Tensor, fraction: float, rate: float, key: int) -> None:
    expected = ~(bottom_k(rows.abs(), fraction) & draw(rows.shape, rate, key, rows.device))
    found = kernels.sample(rows, fraction, None, rate, key)
    assert found is not None and torch.equal(found[1], pack(expected))
    assert torch.equal(kernels.keep(rows, found[0], rate, key), pack(expected))
    masked = torch.where(expected, rows, 0.0)
    assert torch.equal(kernels.select(rows, pack(expected)), masked)
    zero_(rows, pack(expected))
    assert torch.equal(rows, masked)


def test_rows_longer_than_a_block_of_flips() -> None:
    rows = torch.randn(3, 10007)
    found = kernels.sample(rows, 0.6, None, 0.4, 77)
    expected = ~(bottom_k(rows.abs(), 0.6) & draw(rows.shape, 0.4, 77, rows.device))
    assert found is not None and torch.equal(found[1], pack(expected))


def test_ties_across_blocks_of_flips_go_by_index() -> None:
    rows = torch.ones(2, 9001)
    found = kernels.sample(rows, 0.7, None, 1.0, 5)
    assert found is not None and torch.equal(unpack(found[1], rows.shape), torch.arange(9001).expand(2, -1) >= 6300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_weights_that_are_not_finite_are_noticed(dtype: torch.dtype, wrong: float, fraction: float) -> None:
    rows = torch.randn(4, 9, dtype=dtype)
    rows[3, 8] = wrong
    assert kernels.cut(rows, fraction, None) is None and kernels.sample(rows, fraction, None, 0.5, 1) is None


def test_gradients_of_first_and_second_order_are_those_of_where() -> None:
    dense = torch.randn(5, 7, requires_grad=True)
    keep = torch.rand(5, 7) < 0.5
    direction = torch.randn(5, 7)

    def derivatives(masked: Tensor) -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad((masked**3 * direction).sum(), dense, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), dense)[0]

    found = derivatives(select(pack(keep), dense))
    for got, expected in zip(found, derivatives(torch.where(keep, dense, 0.0)), strict=True):
        assert torch.equal(got, expected)


def test_functional_transforms_and_tracing_take_the_way_of_plain_torch() -> None:
    dense, keep = torch.randn(5, 7), torch.rand(5, 7) < 0.5
    expected = torch.where(keep, dense, 0.0)
    grads = torch.func.vmap(torch.func.grad(lambda w: select(pack(keep), w).square().sum()))(dense.expand(3, 5, 7))
    assert torch.allclose(grads, 2 * expected.expand(3, 5, 7))
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda w: select(pack(keep), w))(dense)  # type: ignore[attr-defined]
    assert torch.equal(traced(dense * 2), expected * 2)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(4, 4, dtype=torch.float64),
        torch.ones(4, 4).t()[:2],
        torch.ones(4, 4, device="meta"),
        torch.ones(0, 4),
        torch.ones(4, 4, dtype=torch.complex64).conj().imag,
    ],
    ids=["float64", "strided", "meta", "empty", "negated"],
)
def test_what_the_loops_cannot_read_they_do_not_serve(weight: Tensor) -> None:
    assert not kernels.serves(weight)


def trained(recipe: td.Recipe, plain: bool, dtype: torch.dtype, **options: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and masks after some steps of a small model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 24), nn.Linear(24, 3)).to(
        dtype
    )
    sparsifier = td.TargetedDropout(recipe, 0.6, seed=3, **options)  # type: ignore[arg-type]
    sparsifier.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x = torch.randn(4, 3, 6, 6, dtype=dtype)
    with kernels.disabled() if plain else nullcontext():
        for _ in range(5):
            sparsifier.step()
            for micro in range(2):
                if micro:
                    sparsifier.redraw()
                model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        keeps = [mask.keep for _, _, mask in masks_of(model) if mask.keep is not None]
        model.eval()(x)
        sparsifier.squash_mask()
    return [p.detach() for p in model.parameters()], keeps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("granularity", [td.granularity.OutputRow(), td.granularity.WholeTensor()])
def test_training_with_and_without_them_gives_the_same_bits(
    granularity: td.contract.Granularity, dtype: torch.dtype, every: int
) -> None:
    recipe = td.Recipe(td.criteria.magnitude, granularity, 0.7, name="weights")
    fast, slow = (trained(recipe, plain, dtype, refresh_every=every) for plain in (False, True))
    for one, other in zip(fast, slow, strict=True):
        assert len(one) == len(other) > 0
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_transposed_layout_is_ranked_by_its_outputs() -> None:
    """GPT-2 keeps ``[inputs, outputs]``."""
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(12, 10)
    model = nn.Sequential(layer, nn.Linear(12, 2))
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(0.5), 0.5)
    sparsifier.prepare(model)
    sparsifier.step()
    keep = sparsifier.state["0.weight"]["mask"]
    assert torch.equal(~keep, bottom_k(layer._parameters["weight"].detach().abs().t(), 0.5).t())  # type: ignore[union-attr]
    with kernels.disabled():
        assert torch.equal(sparsifier.state["0.weight"]["mask"], keep)


def test_numba_is_imported_when_a_mask_is_drawn_and_not_before() -> None:
    script = (
        "import sys, torch, td_plugin as td\n"
        "m = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))\n"
        "s = td.TargetedDropout(td.recipes.targeted_weight(), 0.5); s.prepare(m)\n"
        "before = 'numba' in sys.modules; s.step(); print(before, 'numba' in sys.modules)"
    )
    for environment, expected in (({}, "False True"), ({"TD_PLUGIN_KERNELS": "0"}, "False False")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            check=True,
        )
        assert done.stdout.strip() == expected


def test_a_job_uses_the_threads_of_torch(threads: int) -> None:
    assert openmp.threads() in (1, threads)  # 1 where torch has another pool


def test_without_the_threads_of_torch_the_caller_does_the_job() -> None:
    script = (
        "import ctypes; library = ctypes.CDLL\n"
        "def hidden(name, *a, **k):\n"
        "    if name is None: raise OSError('none')\n"
        "    return library(name, *a, **k)\n"
        "ctypes.CDLL = hidden\n"
        "import torch; from td_plugin import kernels, masks, openmp\n"
        "w = torch.randn(300, 300); c = kernels.cut(w, 0.5, None)\n"
        "print(openmp.threads(), torch.equal(c.kth, masks.cut(w.abs(), 0.5).kth))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "True"], done.stderr
