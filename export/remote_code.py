"""Code for a checkpoint of its own, so that `trust_remote_code=True` loads it where td_plugin is not installed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from td_plugin.errors import TdError
from td_plugin.export import resize

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MODULE = "modeling_td_pruned"

_CLASS = '''

import transformers  # noqa: E402


class {name}(transformers.{name}):
    """{name} with the sizes that its configuration records in `{key}`."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        cut_to_record(self, getattr(config, "{key}", {{"format": FORMAT}}))
'''


def auto_map(cls: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, str]:
    """The Auto classes of transformers that give `cls` for such a configuration -> the class in the written code.

    Raises:
        TdError: there is none.
    """
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    found: dict[str, str] = {}
    for name, auto in vars(modeling_auto).items():
        if isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass):
            mapping: Any = auto._model_mapping
            classes = mapping.get(type(config), ()) if mapping is not None else ()
            if cls in (classes if isinstance(classes, (tuple, list)) else (classes,)):
                found[name] = f"{MODULE}.{cls.__name__}"
    if not found:
        fix = "save without auto_map; load_pretrained loads it"
        raise TdError("no Auto class of transformers gives this class", where=cls.__name__, fix=fix)
    return found


def write_code(cls: type[PreTrainedModel], key: str, stage: Path) -> None:
    """Write the module that cuts `cls` to the record in its configuration's `key` into the folder `stage`."""
    code = inspect.getsource(resize) + _CLASS.format(name=cls.__name__, key=key)
    (stage / f"{MODULE}.py").write_text(code, encoding="utf-8")
