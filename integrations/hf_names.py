"""Checkpoints of models that transformers saves under other names than they have: the Trainer must find them again.

`save_pretrained` writes the names of the original checkpoints (`vit.encoder.layer.0...` for `vit.layers.0...`), and
`from_pretrained` translates them back; the Trainer of transformers 5.23 does not when it resumes or loads the best
checkpoint, and goes on with the weights that it has, saying so in the log only.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from td_plugin.errors import TdError

_TRANSLATED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def translate_loads(model: nn.Module | None, *, loaded: bool = False) -> None:
    """Have `model.load_state_dict` take the names that `save_pretrained` writes, besides its own.

    Args:
        model: before a checkpoint is loaded into it; None does nothing.
        loaded: whether one has been loaded already.

    Raises:
        TdError: one has been loaded without this, and so was not.
    """
    if not isinstance(model, PreTrainedModel) or model in _TRANSLATED:
        return
    saved = _saved_names(model)
    if saved and loaded:
        raise TdError(
            "the Trainer cannot resume this model: the checkpoint has other names for its weights, so they were not "
            "loaded",
            where=next(iter(saved.values())),
            got=next(iter(saved)),
            fix="give the Trainer the model itself, not model_init",
        )
    if saved:
        model.register_load_state_dict_pre_hook(partial(_translate, saved))  # type: ignore[no-untyped-call]
    _TRANSLATED.add(model)


def _saved_names(model: PreTrainedModel) -> dict[str, str]:
    """Name in a checkpoint -> name here, where a tensor is merely renamed."""
    names = list(model.state_dict())
    numbers = {name: torch.tensor([float(index)]) for index, name in enumerate(names)}
    try:
        written = revert_weight_conversion(model, dict(numbers))
    except (
        RuntimeError,
        ValueError,
        IndexError,
        TypeError,
    ):  # tensors that are cut or joined, not renamed: these have no shape
        return {}
    pairs = ((saved, names[int(tensor)]) for saved, tensor in written.items() if tensor.numel() == 1)
    return {saved: name for saved, name in pairs if saved != name}


def _translate(saved: dict[str, str], module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for old, name in saved.items():
        if prefix + old in state and prefix + name not in state:
            state[prefix + name] = state.pop(prefix + old)
