"""Whether a model still computes what it did, on the inputs it was traced with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from td_plugin.errors import TdError

TOLERANCE = 1e-3
"""Of the largest output in float32 and float64; half precisions get 50 times as much."""


def outputs_of(model: nn.Module, program: ExportedProgram) -> list[Tensor]:
    """The floating-point tensors that `model` returns for the inputs of `program`.

    Raises:
        TdError: the model does not run.
    """
    try:
        return _run(model, program)
    except Exception as error:  # whatever the model's own code raises
        fix = "give example_inputs as the model is called: a dict by the names of its arguments"
        raise _failed("the model does not run with these inputs", model, error, fix) from error


def _run(model: nn.Module, program: ExportedProgram) -> list[Tensor]:
    args, kwargs = program.example_inputs or ((), {})
    leaves = pytree.tree_leaves(model(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _failed(what: str, model: nn.Module, error: Exception, fix: str) -> TdError:
    text = str(error).strip()
    got = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    return TdError(what, where=type(model).__name__, got=got, fix=fix)


def check_same(model: nn.Module, program: ExportedProgram, before: list[Tensor]) -> None:
    """Compare what `model` returns now with `before`.

    Raises:
        TdError: shapes or values differ by more than rounding, or the model does not run.
    """
    try:
        after = _run(model, program)
    except Exception as error:  # whatever the model's own code raises
        fix = "keep at least one unit of every layer: floors={}"
        raise _failed("the model's code does not run with these widths", model, error, fix) from error
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            raise _other(model, f"{list(new.shape)} instead of {list(old.shape)}")
        finite = torch.isfinite(old)
        scale = float(old[finite].abs().max()) if bool(finite.any()) else 0.0
        exact = old.dtype in (torch.float32, torch.float64)
        difference = float((old - new)[finite].abs().max()) if bool(finite.any()) else 0.0
        if not difference <= (TOLERANCE if exact else 50 * TOLERANCE) * max(scale, 1e-3):
            raise _other(model, f"outputs up to {scale:.3g} differ by {difference:.3g}")


def _other(model: nn.Module, got: str) -> TdError:
    fix = "keep the layers it comes from: survey(model, inputs, keep=[...]) shows and takes the groups to hand over"
    return TdError("the smaller model computes something else", where=type(model).__name__, got=got, fix=fix)
