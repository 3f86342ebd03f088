"""A shallower start: a model with some of another's layers, which training has to put together again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from td_plugin.errors import TdError
from td_plugin.layer_cutting import keep_places
from td_plugin.own_forward import unwrap
from td_plugin.parametrization import refuse_masked

Model = TypeVar("Model", bound=nn.Module)


def fewer_layers(model: Model, keep: int | Sequence[int], *, container: str | None = None) -> Model:
    """A copy of `model` with some of its layers. It computes something else: train it, best with `model` as teacher.

    Unlike `shrink`, which removes what is zero. Where much is to go, less depth and less width together can cost less
    than less width alone: `td_plugin.layerwise.depth_and_width` says how much of each. Source: DistilBERT starts from
    every other layer of its teacher (Sanh et al. 2019, arXiv 1910.01108).

    Args:
        model: with its layers in one `nn.ModuleList` or `nn.Sequential`, as in transformers; it stays as it is.
        keep: how many layers, evenly chosen, the last one among them; or the places of those that stay, from 0.
        container: its name, such as ``"bert.encoder.layer"``. None: the longest one whose layers are of one class.

    Returns:
        a model of the same class, its configuration counting the layers that are left.

    Raises:
        TdError: no container, or several of one length; places out of range or given twice; `model` carries masks.
    """
    refuse_masked(model)
    small = copy.deepcopy(model)
    unwrap(small)
    path = _longest(small) if container is None else container
    try:
        found = small.get_submodule(path)
    except AttributeError as error:
        raise TdError("no such module", where=path, fix="the name of the list of layers") from error
    keep_places(small, path, _places(keep, len(list(found.children())), path))
    return small


def _places(keep: int | Sequence[int], count: int, path: str) -> list[int]:
    if isinstance(keep, int):
        if isinstance(keep, bool) or not 1 <= keep <= count:
            raise TdError("so many layers cannot be kept", where=path, got=keep, fix=f"1 to {count}")
        return [round((index + 1) * count / keep) - 1 for index in range(keep)]
    places = list(keep)
    if not places or sorted(set(places)) != places or not (places[0] >= 0 and places[-1] < count):
        raise TdError("places of layers rise, each is given once", where=path, got=places, fix=f"of 0 to {count - 1}")
    return places


def _longest(model: nn.Module) -> str:
    stacks: dict[str, int] = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(layer) for layer in module}) == 1
    }
    most = max(stacks.values(), default=0)
    longest = [name for name, count in stacks.items() if count == most]
    if most < 2 or len(longest) > 1:
        raise TdError(
            "which layers are to leave is not clear",
            where=type(model).__name__,
            got=", ".join(longest) or "no list of several layers of one class",
            fix='name it: container="bert.encoder.layer"',
        )
    return longest[0]
