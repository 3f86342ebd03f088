"""What reading a masked tensor from outside its layer gives: a value that refuses to be edited in place.

The masked value is computed on reading, so ``module.weight.data.clamp_(...)`` would change a temporary and be lost
without a word. Torch's own parametrizations lose it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from td_plugin.errors import TdError


class MaskedView(Tensor):
    """A masked value read from outside its layer's forward. Editing it in place is an error: the edit would be lost."""

    td_fqn: str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse in-place operations on a view; everything else gives what a plain tensor gives."""
        kwargs = kwargs or {}
        name = func.__name__
        edits = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")
        first = args[0] if args else next(iter(kwargs.values()), None)  # `nn.init` passes its tensor by name
        target = kwargs.get("out", first if edits else None)
        lists = target if isinstance(target, (list, tuple)) else [target]  # the `_foreach` functions
        edited = next((t for t in lists if isinstance(t, cls)), None)
        if edited is not None:
            raise TdError(
                "an in-place edit of the masked value would be lost",
                where=edited.td_fqn,
                got=name,
                fix="edit inside `with sparsifier.dense():`, or edit the parameter from `named_parameters()`",
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        source = next((a for a in args if isinstance(a, cls)), None)
        if type(result) is cls or (source is not None and _shares_storage(result, source)):
            return masked_view(result.as_subclass(Tensor), "" if source is None else source.td_fqn)
        return result


def _shares_storage(result: object, source: Tensor) -> bool:
    if not isinstance(result, Tensor) or result.is_sparse or result.is_meta or source.is_meta:
        return False
    return result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


def masked_view(value: Tensor, fqn: str) -> MaskedView:
    """`value` as a view that refuses in-place edits and names `fqn` when it does."""
    with torch._C.DisableTorchFunctionSubclass():
        view = value.as_subclass(MaskedView)
    view.td_fqn = fqn
    return view
