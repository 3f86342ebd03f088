"""Adapters of PEFT (LoRA and its kin) on a model that is trained with targeted dropout."""

from __future__ import annotations

from torch import nn

from td_plugin.adapters import FACTOR, added_by_peft
from td_plugin.attachment import attached_sparsifier
from td_plugin.errors import TdError
from td_plugin.parametrization import masked_tensors

try:
    from peft import PeftModel
except ImportError as error:
    raise TdError("peft is not installed", got=error, fix="pip install 'td-plugin[peft]'") from error


def merge(model: nn.Module) -> nn.Module:
    """Merge the active adapters into the layers they wrap, and leave the merged model pruned, without masks.

    Masks on the model's own weights: the dense weights take the adapters' delta, are ranked anew with it, and what is
    then least important is zeroed. While adapters are trained, only the base weights are masked, so the merged model is
    another one than was evaluated: evaluate it. Masks on adapters' factors: they are zeroed before the merge, which
    changes no answer.

    PEFT's own `merge_and_unload` raises where there are masks, and behind `squash_mask` it fills the zeros again.

    Args:
        model: a `PeftModel` that carries masks; for the Trainer, of a callback with ``squash=False``.

    Returns:
        the plain model, as of `merge_and_unload`.

    Raises:
        TdError: no `PeftModel`; no masks on it; masks on both kinds of tensors; weights with NaN.
    """
    if not isinstance(model, PeftModel):
        raise TdError("not a PEFT model", got=type(model).__name__, fix="pass what get_peft_model() returned")
    sparsifier = attached_sparsifier(model)
    if sparsifier is None:
        fix = "train with squash=False; a squashed model merges by merge_and_unload(), which fills its zeros"
        raise TdError("the model carries no masks", where=type(model).__name__, fix=fix)
    factors = {name for name, why in added_by_peft(model).items() if why == FACTOR}
    masked = masked_tensors(model)
    theirs = [name for name in masked if name.rpartition(".")[0] in factors]
    if theirs and len(theirs) < len(masked):
        raise TdError(
            "masks on adapters and on the layers they wrap: after the merge there is one weight and no single ranking",
            got=f"{len(theirs)} of {len(masked)} masked tensors are adapters', such as {theirs[0]}",
            fix="name only the one kind in the config",
        )
    if theirs:
        sparsifier.squash_mask()
        return _merged(model)
    with sparsifier.dense():
        merged = _merged(model)
    sparsifier.squash_mask()
    return merged


def _merged(model: PeftModel) -> nn.Module:
    merged = model.merge_and_unload(safe_merge=True)  # refuses a delta that is not finite
    if not isinstance(merged, nn.Module):
        raise TdError("PEFT gave no model", got=type(merged).__name__, fix="these adapters cannot be merged")
    return merged
