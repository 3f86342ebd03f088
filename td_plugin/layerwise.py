"""What the tensors' shapes say, as a list for `prepare(config=...)`: γ for each, and which of them a pattern fits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from td_plugin.by_name import Layers
from td_plugin.contract import Recipe, check_fraction
from td_plugin.criteria import magnitude
from td_plugin.errors import TdError
from td_plugin.granularity import WholeTensor
from td_plugin.selection import Config, Inputs, select


def uniform(
    model: nn.Module, level: float, config: Config = None, *, first_dense: bool = False
) -> list[dict[str, Any]]:
    """The same γ for every tensor, as a config for `prepare`.

    Args:
        model: not prepared yet.
        level: γ in [0, 1).
        config: the tensors, as for `prepare`; None takes all that a weight recipe takes.
        first_dense: leave the first tensor dense, as Evci et al. do (arXiv 1911.11134, section 3).

    Raises:
        TdError: γ outside [0, 1), a wrong config.
    """
    check_fraction(level, "sparsity_level (γ)")
    names = _shapes(model, config)
    return [
        {"tensor_fqn": name, "sparsity_level": 0.0 if first_dense and i == 0 else level} for i, name in enumerate(names)
    ]


def erk(model: nn.Module, level: float, config: Config = None, *, power: float = 1.0) -> list[dict[str, Any]]:
    """γ by the Erdős-Rényi-Kernel rule, as a config for `prepare`: small tensors stay denser than large ones.

    The density of a tensor ``[n1, n2, ...]`` is ``ε·((n1 + n2 + ...) / (n1·n2·...))^power``, at most 1, with ε such
    that the share `level` of all weights goes. Evci et al. 2020, arXiv 1911.11134, section 3(1).

    Args:
        model: not prepared yet.
        level: γ in [0, 1), of all tensors together.
        config: the tensors, as for `prepare`; None takes all that a weight recipe takes.
        power: 0 is `uniform`.

    Raises:
        TdError: γ outside [0, 1), a wrong config.
    """
    check_fraction(level, "sparsity_level (γ)")
    shapes = _shapes(model, config)
    raw = {name: (sum(shape) / shape.numel()) ** power for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        sparse = [name for name in shapes if name not in dense]
        kept = (1.0 - level) * sum(s.numel() for s in shapes.values()) - sum(shapes[n].numel() for n in dense)
        scale = kept / sum(raw[name] * shapes[name].numel() for name in sparse) if sparse else 0.0
        full = {name for name in sparse if scale * raw[name] > 1.0}
        if not full:
            break
        dense |= full
    return [
        {"tensor_fqn": name, "sparsity_level": 0.0 if name in dense else 1.0 - scale * raw[name]} for name in shapes
    ]


def matching(model: nn.Module, recipe: Recipe, layers: Layers, example_inputs: Inputs = None) -> list[dict[str, Any]]:
    """What `Layers` says of the model, as a config for `prepare`, which takes `layers` themselves, too.

    Args:
        model: not prepared yet.
        recipe: of weights or units.
        layers: patterns.
        example_inputs: as of `prepare`.

    Raises:
        TdError: a pattern that fits nothing, nothing to prune.
    """
    chosen = select(model, recipe, layers, example_inputs).choices
    return [{"tensor_fqn": choice.ranked[0].fqn, **choice.overrides} for choice in chosen]


def fitting(model: nn.Module, recipe: Recipe, config: Config = None) -> list[dict[str, Any]]:
    """The tensors that the recipe's pattern fits, as a config for `prepare`: for 2:4 those of a multiple of 4 inputs.

    Args:
        model: not prepared yet.
        recipe: of single weights or blocks, as `recipes.n_m`.
        config: the tensors to choose from, as for `prepare`; None takes all that a weight recipe takes.

    Raises:
        TdError: a wrong config, or none fits; why the last one does not is named.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    found, problem = [], None
    for choice in select(model, recipe, config).choices:
        (first, *_) = choice.ranked
        try:
            recipe.granularity.to_groups([named[first.fqn].detach()], [first])
        except TdError as error:
            problem = error
        else:
            found.append({"tensor_fqn": first.fqn, **choice.overrides})
    if problem is not None and not found:
        raise problem
    return found


def _shapes(model: nn.Module, config: Config) -> dict[str, torch.Size]:
    """The tensors that a recipe of single weights would target, by name."""
    chosen = select(model, Recipe(magnitude, WholeTensor()), config).choices
    named = dict(model.named_parameters(remove_duplicate=False))
    return {choice.ranked[0].fqn: named[choice.ranked[0].fqn].shape for choice in chosen}


def depth_and_width(layers: int, sparsity_level: float) -> tuple[int, float]:
    """How `sparsity_level` of a stack is removed if depth and width shrink by one factor.

    Args:
        layers: of the model.
        sparsity_level: γ in [0, 1), the share of the stack's weights that goes.

    Returns:
        the layers to keep for `td_plugin.export.fewer_layers`, at least one, and the γ of the units of each.

    Raises:
        TdError: γ outside [0, 1), or no layers.
    """
    check_fraction(sparsity_level, "sparsity_level (γ)", "depth_and_width")
    if layers < 1:
        raise TdError("there are no layers", where="depth_and_width", got=layers)
    kept = max(round(layers * (1 - sparsity_level) ** 0.5), 1)
    return kept, max(1 - (1 - sparsity_level) * layers / kept, 0.0)
