"""The end of training: the deterministic masks are baked into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from td_plugin.notices import warn_of_no_zeros
from td_plugin.parametrization import bake
from td_plugin.report import SparsityReport
from td_plugin.target import Target

if TYPE_CHECKING:
    from td_plugin.sparsifier import TargetedDropout

Kept = list[tuple[nn.Module, dict[str, Any]]]
"""What is left on which modules as `sparse_params`."""


def squash(sparsifier: TargetedDropout, model: nn.Module, targets: Sequence[Target], kept: Kept) -> SparsityReport:
    """What `TargetedDropout.squash_mask` does to the model.

    Returns:
        what has been dropped.

    Raises:
        TdError: weights with NaN; the model is unchanged then.
    """
    for target in targets:
        target.finish()  # in-place edits through `.data` leave no other sign
    report = sparsifier.report()
    bake(model, settled=True)
    for module, values in kept:
        vars(module)["sparse_params"] = values
    if report.zeros == 0 and not sparsifier.recipe.uninformed:
        warn_of_no_zeros()
    return report
