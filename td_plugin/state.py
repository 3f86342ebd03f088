"""γ and α of the groups: set by schedules, saved, restored, handed on to torch.ao's tools."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from td_plugin.contract import Recipe
from td_plugin.errors import TdError
from td_plugin.evidence import Observer
from td_plugin.gates.state import GateState
from td_plugin.holding import Held
from td_plugin.memory import Memory
from td_plugin.target import Target

if TYPE_CHECKING:
    from td_plugin.sparsifier import TargetedDropout

_KEYS = {"version", "recipe", "seed", "step_count", "micro_step", "enable_mask_update", "groups"}
LEVELS = ("sparsity_level", "drop_rate", "target_sparsity_level", "target_drop_rate", "eval_sparsity_level")


def set_levels(groups: list[dict[str, Any]], recipe: Recipe, time: float) -> None:
    """Set γ and α of every group to its targets times what the recipe's schedules say at `time`."""
    for group in groups:
        group["sparsity_level"] = group["target_sparsity_level"] * recipe.sparsity_schedule(time)
        group["drop_rate"] = group["target_drop_rate"] * recipe.drop_schedule(time)


def clear_levels(groups: list[dict[str, Any]]) -> None:
    """Nothing is dropped in training: γ and α of every group are 0."""
    for group in groups:
        group["sparsity_level"] = group["drop_rate"] = 0.0


def snapshot(sparsifier: TargetedDropout, targets: Iterable[Target]) -> dict[str, Any]:
    """What `TargetedDropout.state_dict` gives: of every target name, γ, α and what its ranking remembers, copied."""
    groups = [{**{key: t.config[key] for key in ("tensor_fqn", *LEVELS)}, **_remembered(t)} for t in targets]
    return {
        "version": 1,
        "recipe": sparsifier.recipe.name,
        "seed": sparsifier.seed,
        "step_count": sparsifier.step_count,
        "micro_step": sparsifier.micro_step,
        "enable_mask_update": sparsifier.enable_mask_update,
        "groups": groups,
    }


def restore(targets: Iterable[Target], recipe: str, state: dict[str, Any], strict: bool) -> None:
    """Write the saved levels and memories into `targets`; `state` is left unchanged.

    Args:
        targets: live ones.
        recipe: name of the recipe here.
        state: from `TargetedDropout.state_dict`.
        strict: whether other targets or another recipe are an error or a warning.

    Raises:
        TdError: no state of ours, a damaged one, or (strict) one of another set-up.
    """
    if not isinstance(state, dict) or not set(state) >= _KEYS:
        raise TdError("not a state of TargetedDropout", got=repr(state)[:80], fix="pass what state_dict() returned")
    saved = {group["tensor_fqn"]: group for group in state["groups"]}
    here = {target.config["tensor_fqn"]: target for target in targets}
    if state["recipe"] != recipe or set(saved) != set(here):
        problem = TdError(
            "the state belongs to another set-up",
            where=", ".join(sorted(set(saved) ^ set(here))[:4]),
            got=f"recipe {state['recipe']!r}, here {recipe!r}",
            fix="prepare with the same recipe and config, or load with strict=False",
        )
        if strict:
            raise problem
        warnings.warn(str(problem), stacklevel=3)
    for name in set(saved) & set(here):
        here[name].config.update({key: saved[name][key] for key in LEVELS})
        _recall(here[name], saved[name])


def _parts(target: Target) -> dict[str, Memory | GateState | Observer | Held]:
    """What of `target` lies in neither weights nor step, by its name in the state; empty for most recipes."""
    parts = {"memory": target.memory, "gate": target.gate, "evidence": target.observer, "held": target.held}
    return {name: part for name, part in parts.items() if part is not None}


def remembers(target: Target) -> bool:
    """Whether weights and step do not say all of `target`."""
    return bool(_parts(target))


def _remembered(target: Target) -> dict[str, Any]:
    return {name: part.snapshot() for name, part in _parts(target).items()}


def _recall(target: Target, saved: dict[str, Any]) -> None:
    """Go on from what `_remembered` gave.

    Raises:
        TdError: a damaged memory, damaged evidence, or a held mask of another shape.
    """
    if target.memory is not None:
        target.memory.restore(saved.get("memory", {}), target.name)
    if target.gate is not None:
        target.gate.restore(saved.get("gate", {}), target.name)
    if target.observer is not None:
        target.observer.restore(saved.get("evidence", {}))
    target.held = None
    if "held" in saved:
        pools, groups = target.ranking(False).importance(target.switches.seed).shape
        target.hold(Held.restored(saved["held"], (pools, groups), target.name))


def kept_params(
    groups: list[dict[str, Any]], everywhere: tuple[str, ...] | None, per_layer: dict[str, tuple[str, ...]] | None
) -> list[tuple[nn.Module, dict[str, Any]]]:
    """What torch.ao's `squash_mask` is asked to leave on each module: key -> value, by tensor where there are several.

    Raises:
        TdError: a key the group does not have.
    """
    kept: dict[nn.Module, dict[str, dict[str, Any]]] = {}
    for group in groups:
        keys = (*(everywhere or ()), *(per_layer or {}).get(group["module_fqn"], ()))
        if unknown := [key for key in keys if key not in group]:
            fix = f"one of {sorted(group)}"
            raise TdError("no such key in the group", where=group["tensor_fqn"], got=unknown, fix=fix)
        if keys:
            kept.setdefault(group["module"], {})[group["tensor_name"]] = {key: group[key] for key in keys}
    return [(module, next(iter(by.values())) if len(by) == 1 else by) for module, by in kept.items()]


def merged_masks(targets: Iterable[Target]) -> dict[str, dict[str, Tensor]]:
    """Fully qualified tensor name -> ``{"mask": ...}``; what several targets mask keeps what all keep.

    Under a gate that scales what it keeps there is ``"gate"`` too, what the tensor is multiplied with.
    """
    merged: dict[str, dict[str, Tensor]] = {}
    for target in targets:
        for name, mask in target.keep_masks().items():
            before = merged.setdefault(name, {"mask": mask})
            before["mask"] = before["mask"] & mask
        for member, mask_ in zip(target.members, target.masks, strict=True):
            if (value := mask_.value(member.parameter)) is not None:
                before = merged[member.fqn]
                before["gate"] = before["gate"] * value if "gate" in before else value.expand(member.parameter.shape)
    return merged
