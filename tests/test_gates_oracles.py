"""The formulas of the gates against quadrature, simulation and sequences worked by hand."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

import td_plugin as td
from td_plugin.gates.contract import Gate
from td_plugin.gates.hard_concrete import HIGH, LOW, TEMPERATURE, open_chance, sample, settled
from td_plugin.gates.smallify import Smallify, follow_signs
from td_plugin.gates.variational import Variational, divergence
from td_plugin.granularity import Units

LOG_ALPHAS = [-4.0, -1.5, 0.0, 0.7, 2.94, 5.0]


def concrete_density(log_alpha: float, nodes: int = 400_001) -> tuple[np.ndarray, np.ndarray]:
    """Points s in (0, 1) and weights of an integral over the binary concrete density (Maddison et al., 1611.00712).

    The density is written out in s and integrated in its logit, where it has no spikes at the ends.
    """
    logit = np.linspace(-60.0, 60.0, nodes)
    s = 1.0 / (1.0 + np.exp(-logit))
    rest = 1.0 / (1.0 + np.exp(logit))
    alpha, b = math.exp(log_alpha), TEMPERATURE
    density = b * alpha * s ** (-b - 1) * rest ** (-b - 1) / (alpha * s**-b + rest**-b) ** 2
    return s, density * s * rest * (logit[1] - logit[0])


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_the_expected_l0_norm_and_the_moments_of_the_gate_are_those_of_its_density(log_alpha: float) -> None:
    s, weights = concrete_density(log_alpha)
    assert weights.sum() == pytest.approx(1.0, abs=1e-9)
    z = np.clip(s * (HIGH - LOW) + LOW, 0.0, 1.0)
    chance = open_chance(torch.tensor(log_alpha, dtype=torch.float64)).item()
    assert chance == pytest.approx(weights[z > 0].sum(), abs=1e-4)
    # Uniform numbers at equal distances stand for the draw.
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    drawn = sample(torch.tensor(log_alpha, dtype=torch.float64), uniform)
    for power in (1, 2, 3):
        assert (drawn**power).mean().item() == pytest.approx((weights * z**power).sum(), abs=1e-5)
    assert (drawn > 0).double().mean().item() == pytest.approx(chance, abs=1e-5)
    median = settled(torch.tensor(log_alpha)).item()  # σ is monotone, so the gate of evaluation is the median at β = 1
    assert median == pytest.approx(np.clip(1.2 / (1 + math.exp(-log_alpha)) - 0.1, 0, 1), abs=1e-6)


def test_the_divergence_is_the_published_approximation_and_close_to_the_integral() -> None:
    """KL(q || p) = E log|ε| - ½ log α + constant, ε ~ N(1, α) (1701.05369); 0 as α goes to infinity."""

    def exact(log_alpha: float) -> float:
        deviation = math.exp(log_alpha / 2)
        noise = (np.arange(2_000_000) + 0.5) / 2_000_000 * 20 - 10  # no node where ε = 0 for the deviations below
        weights = np.exp(-(noise**2) / 2) / math.sqrt(2 * math.pi) * 1e-5
        return float((weights * np.log(np.abs(1 + deviation * noise))).sum() - log_alpha / 2)

    limit = exact(30.0)
    for log_alpha in np.linspace(-7.3, 7.1, 25):
        found = divergence(torch.tensor(log_alpha, dtype=torch.float64)).item()
        k1, k2, k3 = 0.63576, 1.87320, 1.48695
        published = k1 / (1 + math.exp(-(k2 + k3 * log_alpha))) - 0.5 * math.log1p(math.exp(-log_alpha)) - k1
        assert found == pytest.approx(-published, abs=1e-12)
        assert found == pytest.approx(exact(log_alpha) - limit, abs=0.01)


def test_a_switch_goes_off_when_its_sign_flickers_and_stays_off() -> None:
    """Worked by hand, decay 0.9: with d = sign - mean, variance <- 0.9(variance + 0.1 d²), mean <- mean + 0.1 d."""
    gate = Smallify()
    phi = torch.ones(3)
    memory = gate.memory(phi)
    signs = torch.tensor([[1.0, -1.0, -1.0], [1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    means = [[1, 0.8, 0.8], [1, 0.82, 0.62], [1, 0.638, None]]
    variances = [[0, 0.36, 0.36], [0, 0.3276, 0.6156], [0, 0.592956, None]]
    off = [[False, False, False], [False, False, True], [False, True, True], [False, True, True]]
    for step, row in enumerate(signs):
        phi.copy_(row * 0.01)
        follow_signs(phi, memory, 0.9, 0.5)
        assert memory["off"].tolist() == off[step]
        assert phi.tolist() == pytest.approx(
            [0.0 if o else 0.01 * s for o, s in zip(off[step], row.tolist(), strict=True)]
        )
        for i in range(3):
            if step < 3 and means[step][i] is not None:
                assert memory["mean"][i].item() == pytest.approx(means[step][i], abs=1e-6)
                assert memory["variance"][i].item() == pytest.approx(variances[step][i], abs=1e-6)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv1d(6, 4, 3, padding=1), nn.Conv2d(3, 4, 2, stride=2)])
@pytest.mark.parametrize("per_unit", [False, True])
def test_drawn_outputs_have_the_moments_of_drawn_weights(layer: nn.Module, per_unit: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(layer), nn.Identity())
    layer = model[0]
    recipe = td.gates.variational(*([Units()] if per_unit else []), log_variance=-3.0)
    sparsifier = td.TargetedDropout(recipe, 0.5)
    with pytest.warns(UserWarning, match="unknown") if per_unit else nullcontext():
        sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    shape = {2: (5, 6), 3: (2, 6, 7), 4: (2, 3, 6, 6)}[layer.weight.dim()]
    x = torch.randn(shape)
    drawn, weights = [], []
    with torch.no_grad():
        for _ in range(1500):
            sparsifier.step()
            drawn.append(model(x))
            weight, bias = layer.weight.as_subclass(torch.Tensor), layer.bias.as_subclass(torch.Tensor)
            weights.append(_product(layer)(x, weight, bias))
    outputs, oracle = torch.stack(drawn), torch.stack(weights)
    spread = oracle.std(0)
    assert ((outputs.mean(0) - oracle.mean(0)).abs() < 0.15 * spread.clamp_min(0.01)).all()
    assert torch.allclose(outputs.std(0), spread, rtol=0.1, atol=1e-3)
    # Of one weight sample for the batch, outputs of two examples are correlated; of drawn outputs they are not.
    examples = torch.stack([outputs[:, 0].flatten(1)[:, 0], outputs[:, 1].flatten(1)[:, 0]])
    assert abs(torch.corrcoef(examples)[0, 1]) < 0.1


def _product(layer: nn.Module):  # type: ignore[no-untyped-def]
    return nn.functional.linear if isinstance(layer, nn.Linear) else layer._conv_forward  # type: ignore[operator]


@pytest.mark.parametrize("gate", [Variational(), td.gates.hard_concrete().gate, Smallify()])
def test_gates_are_values(gate: Gate) -> None:
    assert gate == type(gate)() and hash(gate) == hash(type(gate)())
    phi = gate.initial(torch.Size([3]))
    assert phi.shape == (3,)
    weight = torch.tensor([1.0, -2.0, 0.5])
    value = gate.value(phi)
    assert torch.equal(weight if value is None else weight * value, weight)  # a trained model starts as it is
