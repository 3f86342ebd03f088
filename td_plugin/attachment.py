"""Finding the sparsifier whose masks a model carries."""

from __future__ import annotations

from torch import nn

from td_plugin.errors import TdError
from td_plugin.parametrization import masks_of
from td_plugin.sparsifier import TargetedDropout
from td_plugin.target import Target


def attached_sparsifier(model: nn.Module) -> TargetedDropout | None:
    """The sparsifier whose masks `model` carries; None if it carries none.

    Raises:
        TdError: it carries masks whose sparsifier is gone, or belongs to another model.
    """
    found = masks_of(model)
    if not found:
        return None
    source = found[0][2].source
    owner = source.owner() if isinstance(source, Target) and source.owner is not None else None
    if not isinstance(owner, TargetedDropout) or owner.model is not model:
        raise TdError(
            "the model carries masks of a sparsifier that is gone or belongs to another model",
            where=found[0][2].fqn,
            fix="keep the sparsifier alive, or bake the masks with td_plugin.parametrization.bake(model)",
        )
    return owner
