"""Checkpoints of transformers models: written by their own `save_pretrained`, with sizes that differ between layers.

Sizes that the configuration can express are set there, so stock `from_pretrained` loads the directory. The others stand
in ``config.json`` under ``td_pruning``: what `td_plugin.export.resize` needs to cut a stock model, and, for the reader,
``layers`` in the shape of transformers' ``per_layer_config``: layer index -> settings that differ from the global ones,
named as there::

    "td_pruning": {"format": 2, "layers": {"0": {"intermediate_size": 768, "num_attention_heads": 6}},
                   "tensors": {...}, "attributes": {...}}
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import nn

from td_plugin.errors import TdError, first_line
from td_plugin.export import remote_code
from td_plugin.export.checkpoint_record import Anatomy, anatomy, difference
from td_plugin.export.module_checkpoint import AGAIN, damaged, other_architecture, read_json
from td_plugin.export.resize import FORMAT, RecordError, cut_to_record
from td_plugin.export.stated_widths import blank_model, stated_config
from td_plugin.structure import survey

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DeviceMap: TypeAlias = "str | int | torch.device | Mapping[str, int | str | torch.device]"
"""What `from_pretrained` of transformers takes as its device_map."""

CONFIG, _KEY = "config.json", "td_pruning"


def stock_class(model: nn.Module) -> type[PreTrainedModel] | None:
    """The class of transformers itself that `model` is of. If it is, transformers is loaded already."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    cls = type(model)
    stock = getattr(transformers, cls.__name__, None)
    ours = cls.__module__.endswith(f".{remote_code.MODULE}") and stock in cls.__mro__  # loaded by auto_map
    return cast("type[PreTrainedModel]", stock) if stock is cls or ours else None


def save_stock(
    cls: type[PreTrainedModel], module: nn.Module, stage: Path, auto_map: bool, max_shard_size: int | str | None
) -> None:
    """Write `module`, which is a `cls`, into the folder `stage`; options as in `save_pretrained`."""
    model = cast("PreTrainedModel", module)
    config = pruned_config(cls, model)
    if auto_map and _KEY in config.__dict__:
        config.auto_map = remote_code.auto_map(cls, config)
    if max_shard_size is None:
        model.save_pretrained(stage)
    else:
        model.save_pretrained(stage, max_shard_size=max_shard_size)
    config.architectures, config.dtype = [cls.__name__], model.config.dtype
    config.save_pretrained(stage)
    (stage / f"{remote_code.MODULE}.py").unlink(missing_ok=True)
    if auto_map and _KEY in config.__dict__:
        remote_code.write_code(cls, _KEY, stage)


def pruned_config(cls: type[PreTrainedModel], model: PreTrainedModel) -> PreTrainedConfig:
    """A copy of the model's configuration that states the sizes the model has, and what it cannot in a record."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    config.__dict__.pop(_KEY, None)
    _without_our_code(config)
    dense, small = anatomy(blank_model(cls, config)), anatomy(model)
    try:
        if not difference(dense, small).keys() & {"lengths", "removed", "tensors"}:
            return config  # attributes of a model that has all its weights are a choice of how to run it
        config, dense = stated_config(cls, config, dense, small)
        record = difference(dense, small)
        if len(record) > 1:
            _check_loads(cls, config, small, record)
    except RecordError as error:
        fix = "save a model that was shrunk from what its configuration describes"
        raise TdError(f"no smaller form of {cls.__name__}", where=error.where, got=error.what, fix=fix) from error
    if len(record) > 1:
        setattr(config, _KEY, {"format": FORMAT, "layers": _layers(model, config)} | record)
    return config


def _without_our_code(config: PreTrainedConfig) -> None:
    """Take out the `auto_map` that an earlier save wrote: its code stays with that checkpoint."""
    stated = config.__dict__.get("auto_map")
    if isinstance(stated, dict) and any(str(name).startswith(remote_code.MODULE) for name in stated.values()):
        del config.auto_map


def _check_loads(
    cls: type[PreTrainedModel], config: PreTrainedConfig, small: Anatomy, record: Mapping[str, Any]
) -> None:
    blank = blank_model(cls, config)
    cut_to_record(blank, record)
    left = difference(anatomy(blank), small)
    for kind in left.keys() - {"format"}:
        raise RecordError("not reached by cutting", f"{kind}: {next(iter(left[kind]))}")


def _layers(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, dict[str, int]]:
    """Widths that differ from what `config` states, of the layers whose setting is known; for the reader only."""
    stated = config.to_dict()  # without the setting for an encoder-decoder pair: then every width is told
    layers: dict[str, dict[str, int]] = defaultdict(dict)
    for group in survey(model, source="known").groups:
        if group.setting is not None and group.units != stated.get(group.setting.key):
            layers[str(group.setting.layer)][group.setting.key] = group.units
    return dict(layers)


def load_stock(path: Path, module: nn.Module | None, options: Mapping[str, Any]) -> nn.Module:
    """The model in `path`; `options` are passed on to the `from_pretrained` of its class."""
    cls = _architecture(path)
    if module is not None and type(module) is not cls:
        raise other_architecture(path, expected=type(module).__name__, got=cls.__name__)
    model, report = _from_pretrained(cls, path, options)
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
    names = read_json(path / CONFIG).get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    cls = getattr(transformers, name, None) if name else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        fix = "architectures must name one class of transformers; code from a checkpoint is never run"
        raise TdError("unknown architecture", where=str(path / CONFIG), got=names, fix=fix)
    return cls


def _from_pretrained(
    cls: type[PreTrainedModel], path: Path, options: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        _without_our_code(config)
        return cast(
            tuple[nn.Module, dict[str, Any]],
            _cutting(cls, config.__dict__.get(_KEY)).from_pretrained(
                path,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            ),
        )
    except TdError:
        raise
    except RecordError as error:
        raise damaged(f"{path / CONFIG}: {_KEY}", error) from error
    except (SafetensorError, StrictDataclassError, OSError, ValueError, TypeError, RuntimeError) as error:
        fix = "the file is damaged or of another model: save it again"
        raise TdError("the checkpoint cannot be loaded", where=str(path), got=first_line(error), fix=fix) from error


def _cutting(cls: type[PreTrainedModel], record: object) -> type[PreTrainedModel]:
    """A subclass of `cls` for one load: what it builds from the configuration, it cuts to `record` at once.

    `from_pretrained` builds on the meta device and then assigns tensors, converting old names on the way; a model
    that has its final shapes when it leaves `__init__` needs nothing else from it.
    """

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        if record is not None:
            cut_to_record(self, record)

    return cast("type[PreTrainedModel]", type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__}))
