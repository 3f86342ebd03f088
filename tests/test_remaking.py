"""Masked weights that are made again for the backward: the same gradients, and no copy of the model in the graph."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import td_plugin as td
from td_plugin import kernels, mask, masking, remaking
from td_plugin import masked_linear as masked_linear_module
from td_plugin.bits import flags_of, pack
from td_plugin.masked_linear import masked_linear, silenced_linear, silences, spares, sparing_linear
from td_plugin.parametrization import masks_of

RECIPES = [td.recipes.targeted_weight(0.66), td.recipes.targeted_unit(0.66)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 5))


def prepared(recipe: td.Recipe) -> tuple[nn.Module, td.TargetedDropout]:
    model, sparsifier = net(), td.TargetedDropout(recipe, 0.5)
    sparsifier.prepare(model)
    sparsifier.step()
    return model, sparsifier


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """Every masked weight that a forward or a backward has made."""
    found: list[weakref.ref[Tensor]] = []
    select = masking.select

    def watched(keep: Tensor, dense: Tensor) -> Tensor:
        value = select(keep, dense)
        found.append(weakref.ref(value))
        return value

    for module in (mask, remaking):
        monkeypatch.setattr(module, "select", watched)
    return found


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("plain", [False, True], ids=["compiled loops", "plain torch"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_gradients_are_those_of_a_model_whose_weights_were_multiplied(recipe: td.Recipe, plain: bool) -> None:
    with kernels.disabled() if plain else nullcontext():
        model, _ = prepared(recipe)
        masks = {found.fqn: found.keep for _, _, found in masks_of(model)}
        x = torch.randn(4, 3, 4, 4)
        found = gradients(model, model(x).square().sum())
    twin = net()

    def masked(name: str, parameter: Tensor) -> Tensor:
        keep = masks.get(name)
        return parameter if keep is None else parameter * flags_of(keep, parameter.shape)

    weights = {name: masked(name, parameter) for name, parameter in twin.named_parameters()}
    expected = gradients(twin, torch.func.functional_call(twin, weights, (x,)).square().sum())
    assert masks and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_the_graph_holds_no_masked_weight(recipe: td.Recipe, made: list[weakref.ref[Tensor]]) -> None:
    model, _ = prepared(recipe)
    loss = model(torch.randn(4, 3, 4, 4)).sum()
    gc.collect()
    assert made and not any(value() is not None for value in made)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_graph_may_be_used_twice_and_differentiated_again() -> None:
    model, _ = prepared(RECIPES[0])
    x = torch.randn(4, 3, 4, 4)
    loss = model(x).square().sum()
    first = gradients_of_gradients(model, loss)
    with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):  # others decide: copies are saved
        expected = gradients_of_gradients(model, model(x).square().sum())
    assert all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))


def gradients_of_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    torch.autograd.grad(loss, parameters, retain_graph=True)
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    total = torch.stack([g.square().sum() for g in first]).sum()
    return [g for g in torch.autograd.grad(total, parameters, allow_unused=True) if g is not None]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("0.weight", td.TdError, r"(?s)changed between.*0\.weight.*after backward"),
        ("3.weight", RuntimeError, "modified by an inplace operation"),
    ],
)
def test_a_weight_changed_before_the_backward_is_an_error_as_it_is_without_masks(
    name: str, error: type[Exception], message: str
) -> None:
    model, _ = prepared(RECIPES[0])
    loss = model(torch.randn(4, 3, 4, 4, requires_grad=True)).sum()
    with torch.no_grad():
        dict(model.named_parameters())[name].mul_(2)
    with pytest.raises(error, match=message):
        loss.backward()


@pytest.mark.parametrize("shape", [(3, 32), (2, 5, 32), (1, 2, 3, 32)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("wanted", [True, False], ids=["input with gradient", "input without"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unit", [False, True], ids=["weights", "units"])
def test_a_linear_layer_gives_the_bits_of_its_parts(
    shape: tuple[int, ...], bias: bool, wanted: bool, dtype: torch.dtype, unit: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, bias, dtype=dtype)
    keep = torch.rand(16, 1) < 0.5 if unit else pack(torch.rand(16, 32) < 0.5)
    x = torch.randn(shape, dtype=dtype, requires_grad=wanted)

    def results(y: Tensor) -> list[Tensor]:
        inputs = [*layer.parameters(), *([x] if wanted else [])]
        return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y).cumsum(-1))]

    found = results(masked_linear(x, layer.weight, keep, layer.bias))
    expected = results(nn.functional.linear(x, masking.select(keep, layer.weight), layer.bias))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_linear_layer_whose_bias_others_make_is_taken_apart() -> None:
    model, _ = prepared(RECIPES[0])
    layer = model[3]  # type: ignore[index]
    x = torch.randn(4, 32)
    expected = layer(x)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    assert torch.equal(layer(x), expected)


def test_an_input_changed_before_the_backward_is_an_error_as_it_is_without_masks() -> None:
    model, _ = prepared(RECIPES[0])
    hidden = torch.randn(4, 32).requires_grad_() * 1
    loss = model[3](hidden).sum()  # type: ignore[index]
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def saving(model: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: checkpoint(model, x, use_reentrant=False),
        lambda model, x: checkpoint(model, x.requires_grad_(), use_reentrant=True),
        saving,
    ],
    ids=["checkpoint", "reentrant checkpoint", "offload"],
)
def test_who_decides_how_tensors_are_saved_keeps_that(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, _ = prepared(RECIPES[0])
    x = torch.randn(4, 3, 4, 4)
    run(model, x.clone()).square().sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    expected = gradients(model, model(x).square().sum())
    assert all(a is not None and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_peak_of_a_step_holds_one_masked_weight_at_a_time() -> None:
    def peak(sparsifier: td.TargetedDropout | None, model: nn.Module) -> int:
        if sparsifier is not None:
            sparsifier.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
            model(torch.randn(2, 256)).sum().backward()
        held, highest = 0, 0
        for event in sorted(found.events(), key=lambda e: e.time_range.start):
            held += event.self_cpu_memory_usage
            highest = max(highest, held)
        return highest

    layers, width = 12, 256
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    plain = peak(None, model)
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(0.66), 0.5)
    sparsifier.prepare(model)
    copies = (peak(sparsifier, model) - plain) / (4 * width * width)
    assert copies <= 3  # of the layer at work; all of them would be eleven


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_shapes_can_be_inferred_without_memory_and_under_autocast(recipe: td.Recipe) -> None:
    model, _ = prepared(recipe)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(4, 3, 4, 4)).dtype == torch.bfloat16
    assert model.to("meta")(torch.randn(4, 3, 4, 4, device="meta")).shape == (4, 5)


class TestSilencedLinear:
    """Layers whose whole outputs are dropped compute as if the weights were masked, and make no masked weight."""

    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_the_masked_weight_bit_for_bit(self, bias: bool) -> None:
        torch.manual_seed(0)
        layer, keep = nn.Linear(24, 10, bias=bias), torch.rand(10, 1) < 0.6
        x, out = torch.randn(3, 7, 24, requires_grad=True), torch.randn(3, 7, 10)
        tensors = [x, *layer.parameters()]
        value = silenced_linear(x, layer.weight, keep, layer.bias)
        found = torch.autograd.grad(value, tensors, out)
        masked = linear(x, layer.weight * keep, layer.bias * keep.flatten() if bias else None)
        expected = torch.autograd.grad(masked, tensors, out)
        assert torch.equal(value, masked)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    def test_second_derivatives(self) -> None:
        torch.manual_seed(0)
        weight, bias, keep = torch.randn(4, 5).double(), torch.randn(4).double(), torch.tensor([[True], [False]] * 2)
        inputs = [value.requires_grad_() for value in (torch.randn(3, 5).double(), weight, bias)]
        assert torch.autograd.gradgradcheck(lambda x, w, b: silenced_linear(x, w, keep, b).tanh(), inputs)

    def test_units_take_it_and_other_masks_do_not(self) -> None:
        keep = torch.tensor([True, False, True])
        weight = torch.zeros(3, 2)
        assert silences(weight, keep.view(3, 1), keep)
        assert not silences(weight, keep.view(3, 1), keep.clone())  # of another target
        assert not silences(weight, keep.view(3, 1), None)  # the bias is not masked
        assert not silences(weight, torch.tensor([[True, False]]), keep)  # inputs are dropped, not outputs
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).train()
        sparsifier = td.TargetedDropout(td.recipes.targeted_unit(0.9), 0.5)
        sparsifier.prepare(model)
        sparsifier.step()
        layer = model[0]
        masks = {name: mask.keep for module, name, mask in masks_of(model) if module is layer}
        weight_keep, bias_keep = masks["weight"], masks["bias"]
        assert weight_keep is not None and silences(layer.weight, weight_keep, bias_keep)


class TestSparingLinear:
    """Large layers on CPU leave out the outputs that are dropped."""

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("transposed", [True, False])
    def test_equals_the_masked_weight(self, bias: bool, transposed: bool) -> None:
        torch.manual_seed(0)
        layer, keep = nn.Linear(24, 10, bias=bias).double(), torch.rand(10, 1) < 0.6
        x = torch.randn(7, 3, 24, dtype=torch.double, requires_grad=True)
        given, out = x.transpose(0, 1) if transposed else x, torch.randn(7, 3, 10, dtype=torch.double)
        out = out.transpose(0, 1) if transposed else out
        tensors = [x, *layer.parameters()]
        value = sparing_linear(given, layer.weight, keep, layer.bias)
        found = torch.autograd.grad(value, tensors, out)
        masked = linear(given, layer.weight * keep, layer.bias * keep.flatten() if bias else None)
        expected = torch.autograd.grad(masked, tensors, out)
        assert torch.allclose(value, masked, atol=1e-13)
        assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(found, expected, strict=True))
        assert (value[..., ~keep.flatten()] == 0).all() and (found[1][~keep.flatten()] == 0).all()

    def test_second_derivatives(self) -> None:
        torch.manual_seed(0)
        weight, bias, keep = torch.randn(4, 5).double(), torch.randn(4).double(), torch.tensor([[True], [False]] * 2)
        inputs = [value.requires_grad_() for value in (torch.randn(3, 5).double(), weight, bias)]
        assert torch.autograd.gradgradcheck(lambda x, w, b: sparing_linear(x, w, keep, b).tanh(), inputs)

    def test_autocast_is_heeded(self) -> None:
        torch.manual_seed(0)
        layer, keep, x = nn.Linear(64, 48), torch.rand(48, 1) < 0.5, torch.randn(40, 64, requires_grad=True)
        tensors = [x, *layer.parameters()]
        with torch.autocast("cpu", torch.bfloat16):
            value = sparing_linear(x, layer.weight, keep, layer.bias)
            masked = linear(x, layer.weight * keep, layer.bias * keep.flatten())
        assert value.dtype == masked.dtype == torch.bfloat16
        assert torch.allclose(value, masked, rtol=0.02, atol=0.02)
        out = torch.randn(40, 48).bfloat16()
        found, expected = (torch.autograd.grad(each, tensors, out) for each in (value, masked))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype == torch.float32
            assert torch.allclose(one, other, rtol=0.05, atol=0.1)

    def test_it_is_taken_where_it_costs_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        few, many, x = torch.rand(256, 1) < 0.9, torch.rand(256, 1) < 0.5, torch.randn(64, 256)
        assert spares(x, torch.empty(256, 256), many)
        assert not spares(x, torch.empty(256, 256), few)
        assert not spares(x, torch.empty(256, 256), torch.zeros(256, 1, dtype=torch.bool)), "nothing would be left"
        assert not spares(x[:8], torch.empty(256, 256), many), "few rows"
        assert not spares(torch.randn(64, 32), torch.empty(256, 32), many), "a small layer"
        assert not spares(x.to("meta"), torch.empty(256, 256, device="meta"), many)

        def losses(large: int) -> list[float]:
            monkeypatch.setattr(masked_linear_module, "LARGE", large)
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 2)).double()
            sparsifier = td.TargetedDropout(td.recipes.targeted_unit(0.9), 0.75)
            sparsifier.prepare(model)
            optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
            for _ in range(8):
                sparsifier.step()
                loss = model(torch.randn(64, 12, dtype=torch.double)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(float(loss.detach()))
            return found

        plain, calls = losses(1 << 40), []
        taken = masked_linear_module.sparing_linear
        monkeypatch.setattr(masked_linear_module, "sparing_linear", lambda *args: calls.append(1) or taken(*args))
        assert losses(1) == pytest.approx(plain, rel=1e-10)
        assert len(calls) == 16  # two layers lose more than half of their outputs in every step
