"""Making the targets of a model: one for each choice, with the levels it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from td_plugin.choices import Choice, parameter_of
from td_plugin.contract import Recipe
from td_plugin.gates.state import refuse_tied
from td_plugin.members import holders_of, members_of
from td_plugin.observers import observer_of, refuse_unseen
from td_plugin.pool import Together
from td_plugin.sharded import refuse_sharded, settle_in
from td_plugin.switches import Switches
from td_plugin.target import Target
from td_plugin.units import Slice


def make_targets(
    model: nn.Module, recipe: Recipe, choices: Sequence[Choice], defaults: dict[str, Any], switches: Switches
) -> list[Target]:
    """Put masks on the tensors of `choices`; each config holds torch.ao's keys, the levels now and their targets.

    Args:
        model: the whole model.
        recipe: how to rank and draw.
        choices: from `td_plugin.selection.select`.
        defaults: γ and α where a choice has none of its own.
        switches: shared by all targets of a sparsifier.

    Raises:
        TdError: a tensor that the granularity cannot divide, a gate on a tied weight, a layer that the criterion cannot
            look into; the model is unchanged then.
    """
    holders = holders_of(model)
    switches.sight.begin()
    members = [members_of(model, choice, holders) for choice in choices]
    for member in (member for of_choice in members for member in of_choice):
        parameter = member.module._parameters[member.slice.tensor]
        refuse_sharded(recipe, member.fqn, parameter, switches.rank_policy == "shared")
    for member in (member for of_choice in members for member in of_choice):
        settle_in(member.module, member.slice.tensor)
    if recipe.gate is not None:
        refuse_tied(members)
    for of_choice in members:
        refuse_unseen(recipe, of_choice)
    # All levels first: a tensor that the pattern does not fit must leave the others without masks.
    fixed = [_fixed_level(model, recipe, choice) for choice in choices]
    targets = []
    for choice, of_choice, levels in zip(choices, members, fixed, strict=True):
        config = _config(model, choice.ranked[0], {**defaults, **levels, **choice.overrides})
        target = Target(recipe, config, of_choice, switches)
        readers = [(model.get_submodule(part.module), part) for part in choice.readers]
        target.watch(observer_of(recipe, target.members, target.masks, readers, switches.sight))
        targets.append(target)
        targets[-1].place = len(targets) - 1
    if recipe.rates is not None:
        together = Together(recipe.rates, targets)
        for target in targets:
            target.together = together
    return targets


def _fixed_level(model: nn.Module, recipe: Recipe, choice: Choice) -> dict[str, float]:
    """γ where the granularity says how many groups of a pool stay, as 2:4 does."""
    keeps, (first, *_) = recipe.granularity.keeps, choice.ranked
    parameter = parameter_of(model, first)
    if keeps is None or parameter is None:
        return {}
    groups = recipe.granularity.to_groups([parameter.detach()], [first]).shape[1]
    return {"sparsity_level": max(1.0 - keeps / groups, 0.0)}


def _config(model: nn.Module, first: Slice, levels: dict[str, Any]) -> dict[str, Any]:
    return {
        "module": model.get_submodule(first.module),
        "module_fqn": first.module,
        "tensor_name": first.tensor,
        "tensor_fqn": first.fqn,
        "sparsity_level": levels["sparsity_level"],
        "drop_rate": levels["drop_rate"],
        "target_sparsity_level": levels["sparsity_level"],
        "target_drop_rate": levels["drop_rate"],
        "eval_sparsity_level": None,
    }
