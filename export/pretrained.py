"""Shrunk checkpoints: every layer may have a width of its own, and loading gives the stock class back, bit for bit.

A transformers model is written by its own `save_pretrained`. Widths that its configuration can express are set there,
so stock `from_pretrained` loads the directory. The others stand in ``config.json`` under ``td_pruning``, in the shape
of transformers' ``per_layer_config``: layer index -> settings that differ from the global ones, named as there::

    "td_pruning": {"0": {"intermediate_size": 768, "num_attention_heads": 6}, "2": {"intermediate_size": 1024}}

Any other module is written as ``model.safetensors`` and ``td_pruning.json``; loading needs the dense module.
"""

from __future__ import annotations

import copy
import os
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import nn

from td_plugin.errors import TdError
from td_plugin.export.module_checkpoint import AGAIN, RECORD, load_module, other_architecture, read_json, save_module
from td_plugin.export.shrink import cut
from td_plugin.files import staged_directory
from td_plugin.parametrization import masked_tensors
from td_plugin.structure import Setting, UnitGroup, refused_groups, unit_groups

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Widths = Mapping[str, Mapping[str, int]]
"""Layer index (a string, as JSON keys are) -> setting -> width."""

_CONFIG, _KEY = "config.json", "td_pruning"


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write `model` so that `load_pretrained` restores it bit for bit; on an error nothing of `directory` changes.

    Args:
        model: shrunk or dense, without masks.
        directory: made if missing; files of the same names are replaced.

    Raises:
        TdError: `model` carries masks, or `directory` cannot be written or holds a checkpoint of the other kind.
    """
    if masked_tensors(model):
        raise TdError("the model carries masks", where=masked_tensors(model)[0], fix="squash the masks, then shrink")
    other = Path(directory) / (RECORD if _is_stock(model) else _CONFIG)
    if other.exists():
        raise TdError("a checkpoint of another kind is there", where=str(other), fix="choose a new directory")
    with staged_directory(directory) as stage:
        if _is_stock(model):
            model.save_pretrained(stage)
            _pruned_config(model).save_pretrained(stage)
        else:
            save_module(model, stage)


def load_pretrained(directory: str | os.PathLike[str], module: nn.Module | None = None) -> nn.Module:
    """The model that `save_pretrained` wrote, of its stock class, in evaluation mode.

    Args:
        directory: a local directory.
        module: the dense module that a checkpoint of an ordinary module was shrunk from; it is left as it was. With a
            transformers checkpoint it is only compared with the architecture in the configuration.

    Raises:
        TdError: no checkpoint there, a file that is damaged, another architecture, or tensors missing or left over.
    """
    path = Path(directory)
    if not path.is_dir():
        raise TdError("there is no such directory", where=str(path), fix="give the directory save_pretrained wrote")
    if (path / RECORD).exists():
        return load_module(path, module)
    if (path / _CONFIG).exists():
        return _load_stock(path, module)
    raise TdError(f"the directory has no {_CONFIG}", where=str(path), fix="give the directory save_pretrained wrote")


def _is_stock(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether `model` is of a class that transformers itself can build. If it is, transformers is loaded already."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    return getattr(transformers, type(model).__name__, None) is type(model)


def _pruned_config(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy of the model's configuration that states the widths the model has."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    config.__dict__.pop(_KEY, None)
    by_key: dict[str, list[tuple[Setting, UnitGroup]]] = defaultdict(list)
    for group in unit_groups(model):
        if group.setting is not None:
            by_key[group.setting.key].append((group.setting, group))
    whole = not refused_groups(model)  # else some layers keep the width that the configuration has now
    layers: dict[str, dict[str, int]] = defaultdict(dict)
    for key, found in by_key.items():
        if whole:
            _state_uniform_width(config, found)
        stated = config.to_dict().get(key)  # none in the configuration of an encoder-decoder pair: state each width
        for setting, group in found:
            if group.units != stated:
                layers[str(setting.layer)][key] = group.units
    if layers:
        setattr(config, _KEY, dict(layers))
    return config


def _state_uniform_width(config: PreTrainedConfig, found: list[tuple[Setting, UnitGroup]]) -> None:
    """Set the global width if all layers share one and the configuration can express it."""
    setting, group = found[0]
    dense = config.to_dict().get(setting.key)
    if dense in (None, group.units) or len({other.units for _, other in found}) > 1:
        return
    if group.kind == "neurons" or setting.size_key:
        setattr(config, setting.key, group.units)
    if setting.size_key:
        setattr(config, setting.size_key, group.ranked[0].span)


def _load_stock(path: Path, module: nn.Module | None) -> nn.Module:
    cls = _architecture(path)
    if module is not None and type(module) is not cls:
        raise other_architecture(path, expected=type(module).__name__, got=cls.__name__)
    model, report = _from_pretrained(cls, path)
    model.__class__ = cls
    lost = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    wrong = {kind: names[:3] for kind, names in lost.items() if names}
    if wrong:
        raise TdError("the tensors are not those of the model", where=str(path), got=wrong, fix=AGAIN)
    return model


def _architecture(path: Path) -> type[PreTrainedModel]:
    """The stock class that ``config.json`` names."""
    try:
        import transformers
    except ImportError as error:
        raise TdError("transformers is not installed", where=str(path), fix="pip install 'td-plugin[hf]'") from error
    names = read_json(path / _CONFIG).get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    cls = getattr(transformers, name, None) if name else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        fix = "architectures must name one class of transformers; code from a checkpoint is never run"
        raise TdError("unknown architecture", where=str(path / _CONFIG), got=names, fix=fix)
    return cls


def _from_pretrained(cls: type[PreTrainedModel], path: Path) -> tuple[nn.Module, dict[str, Any]]:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        return cast(
            tuple[nn.Module, dict[str, Any]],
            _cutting(cls, _widths(config, path), path).from_pretrained(
                path,
                config=config,
                dtype="auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            ),
        )
    except TdError:
        raise
    except (SafetensorError, StrictDataclassError, OSError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        fix = "the file is damaged or of another model: save it again"
        raise TdError("the checkpoint cannot be loaded", where=str(path), got=reason, fix=fix) from error


def _cutting(cls: type[PreTrainedModel], widths: Widths, path: Path) -> type[PreTrainedModel]:
    """A subclass of `cls` for one load: what it builds from the configuration, it cuts to `widths` at once.

    `from_pretrained` builds on the meta device and then assigns tensors, converting old names on the way; a model
    that has its final shapes when it leaves `__init__` needs nothing else from it.
    """

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        _cut_to(self, widths, path)

    return cast("type[PreTrainedModel]", type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__}))


def _widths(config: PreTrainedConfig, path: Path) -> Widths:
    """What ``config.td_pruning`` states, checked for shape only."""
    stated = config.__dict__.get(_KEY, {})
    layers = stated.values() if isinstance(stated, dict) else [None]
    if not all(isinstance(layer, dict) and all(type(w) is int for w in layer.values()) for layer in layers):
        raise TdError("damaged widths", where=f"{path / _CONFIG}: {_KEY}", got=stated, fix=AGAIN)
    return cast(Widths, stated)


def _cut_to(model: nn.Module, widths: Widths, path: Path) -> None:
    groups = {(str(g.setting.layer), g.setting.key): g for g in unit_groups(model) if g.setting is not None}
    for layer, settings in widths.items():
        for key, width in settings.items():
            group = groups.get((layer, key))
            if group is None or not 1 <= width <= group.units:
                room = f"at most {group.units}" if group else "no such layer or setting in the model"
                where = f"{path / _CONFIG}: {_KEY}.{layer}.{key}"
                raise TdError("a width does not fit the configuration", where=where, got=f"{width}; {room}", fix=AGAIN)
            cut(model, group, torch.arange(width))
