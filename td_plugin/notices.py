"""What a sparsifier says when a call is legal but probably not what was meant."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from td_plugin.adapters import added_by_peft

NOT_DRIVEN = (
    "recipe {recipe!r} ramps, but nothing drives it: γ and α stay at their targets; "
    "use TargetedDropoutScheduler, TargetedDropoutCallback or set_progress()"
)
NOT_REMOVABLE = (
    "the outputs of {count} layers (first: {first}) are dropped as units, but what reads them is unknown in {model}: "
    "shrink() will not be able to remove them; prepare(model, example_inputs={{...}}) finds out by tracing"
)
FROZEN = (
    "{count} of {all} targets are frozen (requires_grad=False; first: {first}): they are dropped, but do not learn to "
    "do without; leave them out of the config, or unfreeze them"
)
ADAPTED = (
    "{count} of {all} targets are frozen (requires_grad=False; first: {first}): they are dropped, and what is trained "
    "around them has to make up for it; keep the masks on (squash=False) and merge with td_plugin.integrations.peft."
    "merge(model): PEFT's own merge fills squashed zeros again"
)
NOTHING_ZEROED = "squash_mask() zeroed nothing: int(γ·n) is 0 in every pool; raise sparsity_level"


def warn_if_not_driven(recipe: str, attributes: Mapping[str, object]) -> None:
    """Say that a ramp stands still; `attributes` are the sparsifier's."""
    if "_step_count" not in attributes:  # a torch.ao scheduler leaves its counter on the sparsifier it drives
        warnings.warn(NOT_DRIVEN.format(recipe=recipe), stacklevel=3)


def warn_of_no_zeros() -> None:
    """Say that a squash left everything as it was."""
    warnings.warn(NOTHING_ZEROED, stacklevel=4)


def warn_of_frozen(targets: list[tuple[str, bool]], model: nn.Module) -> None:
    """Say which targets cannot learn while others do; `targets` has their names and whether they require gradients.

    A model that is frozen altogether is pruned, not trained: nothing is said of it.
    """
    frozen = [name for name, learns in targets if not learns]
    if frozen and any(p.requires_grad for p in model.parameters()):
        text = ADAPTED if added_by_peft(model) else FROZEN
        warnings.warn(text.format(count=len(frozen), all=len(targets), first=frozen[0]), stacklevel=3)


def warn_of_stuck_units(first_tensors: list[str], model: nn.Module) -> None:
    """Say which units are dropped while nothing can remove them; `first_tensors` names one tensor of each group."""
    if first_tensors:
        text = NOT_REMOVABLE.format(count=len(first_tensors), first=first_tensors[0], model=type(model).__name__)
        warnings.warn(text, stacklevel=3)
