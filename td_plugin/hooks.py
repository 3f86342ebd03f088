"""Hooks on modules that look at training forwards; copies of them, in deep copies and pickles of a model, are deaf."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def _looks(module: nn.Module, x: object) -> bool:
    return module.training and torch.is_grad_enabled() and isinstance(x, Tensor)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """What the module reads: its first argument, however it is passed."""
    return args[0] if args else next(iter(kwargs.values()), None)


class After:
    """Looks at what a module has read and written."""

    def __init__(self, saw: Callable[[Tensor, Tensor], None] | None) -> None:
        self.saw = saw

    def __getstate__(self) -> dict[str, None]:
        return {"saw": None}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        """The forward hook of torch."""
        x = _first(args, kwargs)
        if self.saw is not None and _looks(module, x) and isinstance(x, Tensor) and isinstance(output, Tensor):
            self.saw(x, output)


class Before:
    """Puts in the place of what a module reads what it is given for it."""

    def __init__(self, saw: Callable[[Tensor], Tensor] | None) -> None:
        self.saw = saw

    def __getstate__(self) -> dict[str, None]:
        return {"saw": None}

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The forward pre-hook of torch."""
        x = _first(args, kwargs)
        if self.saw is None or not _looks(module, x) or not isinstance(x, Tensor):
            return None
        value = self.saw(x)
        if args:
            return (value, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): value}


def listen(module: nn.Module, hook: After | Before) -> None:
    """Put `hook` on `module`, and take the deaf ones off."""
    unhook([module], deaf=True)
    if isinstance(hook, After):
        module.register_forward_hook(hook, with_kwargs=True)
    else:
        module.register_forward_pre_hook(hook, with_kwargs=True)


def unhook(modules: Iterable[nn.Module], deaf: bool = False) -> None:
    """Take our hooks off: all of them, or the deaf ones."""
    for module in modules:
        for hooks, flags in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key, hook in list(hooks.items()):
                if isinstance(hook, (After, Before)) and (not deaf or hook.saw is None):
                    del hooks[key]
                    flags.pop(key, None)
