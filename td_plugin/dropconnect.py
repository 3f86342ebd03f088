"""DropConnect and its inference (Wan, Zeiler, Zhang, LeCun and Fergus, ICML 2013), as modules made from `nn.Linear`.

`td_plugin.recipes.dropconnect` trains any layer so, and evaluates with the mean weights. Here a linear layer can also
evaluate as the paper does: under the random mask M its pre-activation ``u = (M∘W)x + b`` is close to a normal variable,
which is sampled and averaged behind the activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from td_plugin.contract import check_fraction
from td_plugin.errors import TdError

Inference = Literal["gaussian", "mean"]

_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.LeakyReLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardtanh,
)
"""Elementwise, without parameters: the ones that `convert` takes into the layer."""


class DropConnectLinear(nn.Linear):
    """A linear layer, with the activation behind it, that drops single weights in training.

    Training: ``a((M∘W)x + b)``, M Bernoulli with mean ``p = 1 - rate``, one for the batch, from torch's generator.
    Evaluation, ``"gaussian"``: the mean over `samples` of ``a(u)``, ``u ~ N(p·Wx + b, p(1-p)·(W∘W)(x∘x))``, the moments
    of the training's pre-activation (algorithm 2 of the paper); ``"mean"``: ``a(p·Wx + b)``. Keys and parameters are
    those of `nn.Linear`. Sampling is the same in every evaluation.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is one; it is never dropped.
        rate: the chance in [0, 1) that a weight is dropped.
        activation: applied to the output; None for none, where the mean is exact.
        inference: as above.
        samples: how many are averaged; the paper takes 1000.
        seed: of the samples.

    Raises:
        TdError: `rate` outside [0, 1), `samples` below 1, an unknown `inference`.
    """

    def __init__(  # noqa: PLR0913 - three of nn.Linear, and five options by name only
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rate: float = 0.5,
        activation: nn.Module | None = None,
        inference: Inference = "gaussian",
        samples: int = 100,
        seed: int = 0,
    ) -> None:
        if inference not in ("gaussian", "mean"):
            raise TdError("unknown inference", got=inference, fix="'gaussian' or 'mean'")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise TdError("at least one sample is averaged", where="samples", got=samples, fix="for example 100")
        super().__init__(in_features, out_features, bias)
        self.rate = check_fraction(rate, "rate")
        self.activation, self.inference, self.samples, self.seed = activation, inference, samples, seed

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[*, outputs]`` each: mean and variance of the pre-activation in training.

        Args:
            x: ``[*, inputs]``.
        """
        kept = 1.0 - self.rate
        mean = linear(x, self.weight * kept, self.bias)
        return mean, kept * self.rate * linear(x.square(), self.weight.square())

    def forward(self, x: Tensor) -> Tensor:
        """``[*, inputs] -> [*, outputs]``."""
        if self.training:
            keep = torch.rand_like(self.weight) >= self.rate
            return self._activated(linear(x, self.weight * keep, self.bias))
        if self.inference == "mean" or self.activation is None:
            return self._activated(linear(x, self.weight * (1.0 - self.rate), self.bias))
        mean, variance = self.moments(x)
        deviation = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()  # at 0 the root has no gradient
        generator = torch.Generator(x.device).manual_seed(self.seed)
        total = torch.zeros_like(mean)
        for _ in range(self.samples):  # one after the other: a batch of samples would take its multiple in memory
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            total = total + self._activated(mean + deviation * noise)
        return total / self.samples

    def _activated(self, value: Tensor) -> Tensor:
        return value if self.activation is None else self.activation(value)

    def extra_repr(self) -> str:
        """Of nn.Linear, with the rate."""
        return f"{super().extra_repr()}, rate={self.rate}, inference={self.inference}, samples={self.samples}"


def convert(
    model: nn.Module,
    rate: float = 0.5,
    layers: Sequence[str] | None = None,
    *,
    inference: Inference = "gaussian",
    samples: int = 100,
    seed: int = 0,
) -> list[str]:
    """Put a `DropConnectLinear` in the place of linear layers, in place; parameters stay the same objects.

    An activation right behind a layer in an `nn.Sequential` moves into it, and an `nn.Identity` keeps its place, so the
    keys of the model do not change.

    Args:
        model: any module.
        rate: the chance in [0, 1) that a weight is dropped.
        layers: fully qualified names of `nn.Linear` modules; None takes all but the last, which makes the logits.
        inference: ``"gaussian"`` or ``"mean"``, as of `DropConnectLinear`.
        samples: likewise.
        seed: likewise.

    Returns:
        the names of the layers that were converted.

    Raises:
        TdError: a name that is no linear layer, no layer to convert, a wrong option.
    """
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name}
    names = list(found)[:-1] if layers is None else list(layers)
    if strange := next((name for name in names if name not in found), None):
        raise TdError("not a linear layer of the model", where=strange, fix=f"one of {list(found)[:8]}")
    if not names:
        fix = "name the layers; the last one is left out by default"
        raise TdError("no linear layer to convert", where=type(model).__name__, got=list(found), fix=fix)
    for name in names:
        old, (parent, key) = found[name], _place(model, name)
        activation = _take_activation(parent, key)
        new = DropConnectLinear(
            1, 1, old.bias is not None,
            rate=rate, activation=activation, inference=inference, samples=samples, seed=seed,
        )  # fmt: skip
        new.in_features, new.out_features = old.in_features, old.out_features
        new.weight, new.bias = old.weight, old.bias
        parent._modules[key] = new.train(old.training)
    return names


def to_linear(model: nn.Module) -> list[str]:
    """Give plain `nn.Linear` layers back, in place: the mean weights ``p·W``, activations where they were.

    The result evaluates as ``inference="mean"`` does; it can be exported and shrunk.

    Returns:
        the names of the layers.

    Raises:
        TdError: a weight that another module shares, which would be scaled there, too.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, DropConnectLinear)}
    for name, module in found.items():
        holders = [m for m in model.modules() if any(p is module.weight for p in m._parameters.values())]
        if len(holders) > 1:
            fix = "untie it: give one of the layers a copy"
            raise TdError("the weight is tied, and scaling it changes another layer", where=f"{name}.weight", fix=fix)
    for name, module in found.items():
        parent, key = _place(model, name)
        new = nn.Linear(1, 1, module.bias is not None)
        new.in_features, new.out_features = module.in_features, module.out_features
        new.weight, new.bias = module.weight, module.bias
        with torch.no_grad():
            new.weight.mul_(1.0 - module.rate)
        parent._modules[key] = new.train(module.training)
        if module.activation is not None:
            _give_activation(parent, key, module.activation)
    return list(found)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, key = name.rpartition(".")
    return model.get_submodule(parent), key


def _take_activation(parent: nn.Module, key: str) -> nn.Module | None:
    """The activation behind a layer of a Sequential, replaced there by nothing."""
    if type(parent) is not nn.Sequential:
        return None
    keys = list(parent._modules)
    place = keys.index(key) + 1
    behind = parent._modules[keys[place]] if place < len(keys) else None
    if not isinstance(behind, _ACTIVATIONS):
        return None
    parent._modules[keys[place]] = nn.Identity()
    return behind


def _give_activation(parent: nn.Module, key: str, activation: nn.Module) -> None:
    keys = list(parent._modules)
    parent._modules[keys[keys.index(key) + 1]] = activation
