"""What `overhead.py` times: each method as a user would put it on a model, and what it does in every training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import parametrize, prune

import td_plugin as td
from td_plugin import kernels

GAMMA, ALPHA = 0.5, 0.66
LEARNING_RATE = 5e-5
LASSO = 1e-3


class NotHereError(Exception):
    """A row that cannot be measured here, and why."""


def _nothing() -> None:
    pass


@dataclass
class Variant:
    """One copy of the model with one method on it.

    Attributes:
        model: the copy.
        optimizer: its own.
        begin: what the method does before the forward of a step.
        around: a context for the whole step.
        sparsifier: ours; None for all others.
        forward: the model as it is called, compiled or not.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    begin: Callable[[], object] = _nothing
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    sparsifier: td.TargetedDropout | None = None

    def __post_init__(self) -> None:
        self.forward: Callable[..., Any] = self.model

    def compile(self, name: str) -> None:
        """Compile the forward. Dynamo keeps its graphs by code object, so each row calls the model from its own."""
        model = self.model

        def call(**batch: Tensor) -> Any:
            return model(**batch)

        code = call.__code__.replace(co_name=f"call_{name.replace('-', '_')}")
        self.forward = torch.compile(FunctionType(code, call.__globals__, None, None, call.__closure__))

    def step(self, batch: dict[str, Tensor], autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Forward, backward, optimizer, and the method's own work."""
        with self.around():
            self.begin()
            with autocast():
                loss = self.forward(**batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: its first cell.
        what: what is done in a step, for the legend.
        build: puts the method on a model.
        ours: whether it is td_plugin's.
    """

    title: str
    what: str
    build: Callable[[nn.Module], Variant]
    ours: bool = False


def matrices(model: nn.Module) -> list[str]:
    """The weights of attention and FFN in all layers of the encoder, by fully qualified name."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [f"{name}.weight" for name in linear if ".encoder." in name]


def _holders(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(name.removesuffix(".weight")) for name in matrices(model)]


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    # Fused, as the Trainer of transformers: a slower one would make every method look cheaper.
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def _none(model: nn.Module) -> Variant:
    return Variant(model, _adamw(model.parameters()))


def _ours(model: nn.Module, *, units: bool = False, refresh_every: int = 1, plain: bool = False) -> Variant:
    """γ and α of all rows; by name for weights, so that all methods have the same tensors."""
    recipe = td.recipes.targeted_unit(ALPHA) if units else td.recipes.targeted_weight(ALPHA)
    sparsifier = td.TargetedDropout(recipe, GAMMA, refresh_every=refresh_every)
    if plain and not kernels.serves(model.get_parameter(matrices(model)[0])):
        raise NotHereError("no compiled loops for these tensors here: 'weights' is plain torch as well")
    sparsifier.prepare(model, None if units else [{"tensor_fqn": name} for name in matrices(model)])
    around = kernels.disabled if plain else nullcontext
    return Variant(model, _adamw(model.parameters()), sparsifier.step, around, sparsifier)


def _ao_magnitude(model: nn.Module) -> Variant:
    sparsifier = WeightNormSparsifier(sparsity_level=GAMMA, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": name} for name in matrices(model)])
    return Variant(model, _adamw(model.parameters()), sparsifier.step)


class AuthorsRule(nn.Module):
    """What their published code does (for-ai/TD): sort, threshold and uniform numbers, in every forward.

    No gradient runs through the mask there either.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """``[outputs, inputs]`` -> the same, masked."""
        with torch.no_grad():
            norm = weight.abs()
            threshold = norm.sort(dim=1).values[:, int(GAMMA * weight.shape[1])]
            mask = norm < threshold[:, None]
            if self.training:
                mask = mask & (torch.rand_like(weight) < ALPHA)
            mask = mask.to(weight.dtype)
        return (1 - mask) * weight


def _authors(model: nn.Module) -> Variant:
    for module in _holders(model):
        parametrize.register_parametrization(module, "weight", AuthorsRule())
    return Variant(model, _adamw(model.parameters()))


def _nn_prune(model: nn.Module) -> Variant:
    """`l1_unstructured` once; then a fresh mask of it in every step, from the weights before masking.

    Calling `l1_unstructured` again prunes half of what is left, so it cannot be what is done in every step.
    """
    holders, method = _holders(model), prune.L1Unstructured(amount=GAMMA)
    for module in holders:
        prune.l1_unstructured(module, "weight", amount=GAMMA)

    @torch.no_grad()
    def renew() -> None:
        for module in holders:
            weight: Tensor = module.weight_orig  # type: ignore[assignment]
            module.weight_mask = method.compute_mask(weight, torch.ones_like(weight))

    return Variant(model, _adamw(model.parameters()), renew)


def _pat(model: nn.Module) -> Variant:
    try:
        from torchao.prototype.pat.optim import PruneOptimizer
    except ImportError as error:
        raise NotHereError(f"torchao's PAT cannot be imported ({type(error).__name__})") from error
    chosen = [module.weight for module in _holders(model)]
    ids = {id(weight) for weight in chosen}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    groups = [{"params": chosen, "prox_type": "ProxLasso", "group_type": "ElemGrouper"}, {"params": others}]
    return Variant(model, PruneOptimizer(_adamw(groups), reg_lambda=LASSO))


ROWS: dict[str, Row] = {
    "none": Row("none", "the plain model", _none),
    "control": Row("none, again", "a second plain model: what two copies of the same differ by", _none),
    "weights": Row(
        "td_plugin, weights",
        "`recipes.targeted_weight`: candidates ranked and drawn anew in every step (`refresh_every=1`, the default)",
        _ours,
        ours=True,
    ),
    "weights-every-10": Row(
        "td_plugin, weights, refresh_every=10",
        "the same, ranked anew in every tenth step, so the median is that of the other nine: read the mean",
        partial(_ours, refresh_every=10),
        ours=True,
    ),
    "weights-torch": Row(
        "td_plugin, weights, plain torch",
        "the same without the compiled loops (`kernels.disabled()`)",
        partial(_ours, plain=True),
        ours=True,
    ),
    "units": Row(
        "td_plugin, neurons and heads", "`recipes.targeted_unit`, default units", partial(_ours, units=True), ours=True
    ),
    "ao-magnitude": Row(
        "torch.ao magnitude", "`WeightNormSparsifier`, level γ, blocks of 1 × 1, `step()` in every step", _ao_magnitude
    ),
    "authors": Row("the authors' rule", "sort and uniform numbers in every forward, by a parametrization", _authors),
    "nn-prune": Row(
        "torch.nn.utils.prune",
        "`l1_unstructured`, its mask computed anew from the dense weights in every step",
        _nn_prune,
    ),
    "pat": Row("torchao PAT", "`PruneOptimizer` around AdamW, `ProxLasso` on single weights", _pat),
}
