"""DropConnect layers: the moments against simulation, conversion there and back, mistakes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import td_plugin as td
from td_plugin.dropconnect import DropConnectLinear, convert, to_linear


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 6), nn.Dropout(0.0), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_the_moments_are_those_of_the_training_forward(rate: float) -> None:
    torch.manual_seed(1)
    layer = DropConnectLinear(9, 4, rate=rate).train()
    x = torch.randn(5, 9)
    with torch.no_grad():
        drawn = torch.stack([layer(x) for _ in range(20_000)]).numpy()
        mean, variance = (moment.numpy() for moment in layer.moments(x))
    w, b, v = layer.weight.detach().numpy(), layer.bias.detach().numpy(), x.numpy()
    assert np.allclose(mean, (1 - rate) * v @ w.T + b, atol=1e-6)  # algorithm 2 of the paper, in numpy
    assert np.allclose(variance, rate * (1 - rate) * (v**2) @ (w**2).T, atol=1e-6)
    assert np.allclose(drawn.mean(0), mean, atol=0.02)
    assert np.allclose(drawn.var(0), variance, rtol=0.06)


def test_sampling_averages_behind_the_activation() -> None:
    """The mean of max(u, 0), u normal, is known: μΦ(μ/σ) + σφ(μ/σ)."""
    torch.manual_seed(2)
    layer = DropConnectLinear(30, 8, activation=nn.ReLU(), samples=4000).eval()
    x = torch.randn(6, 30)
    with torch.no_grad():
        found, again = layer(x), layer(x)
        mean, variance = layer.moments(x)
    normal, sigma = torch.distributions.Normal(0.0, 1.0), variance.sqrt()
    expected = mean * normal.cdf(mean / sigma) + sigma * normal.log_prob(mean / sigma).exp()
    assert torch.equal(found, again)
    assert torch.allclose(found, expected, atol=0.03)
    assert not torch.allclose(torch.relu(mean), expected, atol=0.03)  # the mean weights give something else
    layer.train()
    with torch.no_grad():
        trained = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    assert (found - trained).abs().mean() < (torch.relu(mean) - trained).abs().mean() / 3


def test_conversion_keeps_keys_and_parameters_and_can_be_undone() -> None:
    model, plain = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert convert(model, 0.3) == ["0", "2"]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [id(p) for p in model.parameters()] == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert isinstance(model[0].activation, nn.ReLU) and model[2].activation is None  # a dropout is between
    model.train()(torch.randn(4, 9)).sum().backward()
    optimizer.step()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(4, 9)
    for layer in (model[0], model[2]):
        layer.inference = "mean"
    with torch.no_grad():
        expected = model.eval()(x)
        assert to_linear(model) == ["0", "2"]
        assert [type(m) for m in model] == [type(m) for m in plain]
        assert torch.allclose(model(x), expected, atol=1e-6)
        assert torch.allclose(model[0].weight, 0.7 * plain[0].weight)


def test_a_layer_that_is_dropped_by_chance_can_be_pruned_too() -> None:
    model = net()
    convert(model, 0.3)
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(), 0.5)
    sparsifier.prepare(model)
    sparsifier.step()
    model(torch.randn(4, 9)).sum().backward()
    sparsifier.squash_mask()
    to_linear(model)
    assert (model[0].weight == 0).sum() == 7 * 4


def test_mistakes_are_named() -> None:
    with pytest.raises(td.TdError, match="rate.*1.0"):
        convert(net(), 1.0)
    with pytest.raises(td.TdError, match="not a linear layer.*where: 1"):
        convert(net(), 0.5, ["1"])
    with pytest.raises(td.TdError, match="no linear layer to convert"):
        convert(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(td.TdError, match="samples.*got: 0"):
        DropConnectLinear(3, 2, samples=0)
    with pytest.raises(td.TdError, match="unknown inference"):
        DropConnectLinear(3, 2, inference="median")  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    convert(model, 0.5, ["0"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(td.TdError, match="tied.*0.weight.*untie"):
        to_linear(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
