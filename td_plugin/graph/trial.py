"""A forward without weights: does a model still run after a cut, and does it still compute with the same numbers?"""

from __future__ import annotations

import copy
import inspect
import linecache
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

Model = TypeVar("Model", bound=nn.Module)
Run = Callable[[nn.Module], Any]


def skeleton(model: Model) -> Model:
    """A copy of `model` whose parameters and buffers are empty tensors on the meta device; tied ones stay tied.

    Weights are never copied. A model of a billion parameters takes about as long as its modules take to copy.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors_of(module):
            memo[id(tensor)] = _empty(tensor)
    return copy.deepcopy(model, memo)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    plain = (value for value in vars(module).values() if isinstance(value, Tensor))
    yield from (tensor for tensor in plain if tensor.ndim or tensor.requires_grad)


def _empty(tensor: Tensor) -> Tensor:
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def meta_run(example_inputs: Mapping[str, Any]) -> Run:
    """A forward of `example_inputs` that computes shapes only.

    The meta device is the fastest. Where a forward makes its own CPU tensors, all pretend to be on the CPU; where it
    looks at data, `torch.export` guesses. torch's flags for exporting are set, as in the trace: checks on data are
    skipped.

    Args:
        example_inputs: as the model is called, by name. No size among them should be a multiple of a number of heads:
            a wrong ``view(batch, -1, heads, size)`` could go unnoticed.

    Returns:
        a function from a model on the meta device to its output; it raises what the forward raises.
    """
    inputs = dict(example_inputs)

    def run(model: nn.Module) -> Any:
        with torch.no_grad(), _exporting():
            try:
                return model(**tree_map_only(Tensor, _on_meta, inputs))
            except Exception as error:
                if "meta" not in str(error):  # its shapes do not fit
                    raise
            try:
                return _fake(model, inputs)
            except Exception as error:
                if "DataDependent" not in type(error).__name__:
                    raise
        return _exported(model, inputs)

    return run


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _fake(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # it reports shapes that do not fit as its own errors
    silent, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            named = chain(model.named_parameters(), model.named_buffers())
            state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in named}
            pretended = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), dict(inputs))
            return torch.func.functional_call(model, state, (), pretended)
    finally:
        logger.disabled = silent


def _exported(model: nn.Module, inputs: Mapping[str, Any]) -> list[Any]:
    program = torch.export.export(model, (), tree_map_only(Tensor, _on_meta, dict(inputs)), strict=False)
    return [node.meta["val"] for node in program.graph.output_node().all_input_nodes]


@contextmanager
def _exporting() -> Iterator[None]:
    """Torch has no public name for this."""
    flags = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = flags


@dataclass(frozen=True)
class Numbers:
    """The numbers that the arguments of one call of torch's API have beside shapes, and who made the call."""

    function: str
    values: tuple[float, ...]
    where: str


@dataclass(frozen=True)
class Observed:
    """One forward: the shapes of its outputs, the numbers it computed with, the error that ended it.

    Attributes:
        shapes: of all tensors in the output, caches left out.
        numbers: per call.
        error: empty if it came to its end.
    """

    shapes: tuple[tuple[int, ...], ...] = ()
    numbers: tuple[Numbers, ...] = field(default=(), repr=False)
    error: str = ""


def observe(run: Run, model: nn.Module) -> Observed:
    """Run `model` in evaluation mode once and watch; the modes are left changed."""
    log: list[Numbers] = []
    with warnings.catch_warnings(), _Watch(log):
        warnings.simplefilter("ignore")
        try:
            output = run(model.eval())
        except Exception as error:
            return Observed(error=_told(error))
    return Observed(tuple(tuple(tensor.shape) for tensor in _tensors(output)), tuple(log))


def difference(dense: Observed, small: Observed) -> str:
    """Why a smaller model does not compute what the dense one does, as far as shapes tell; empty if it may."""
    if small.error:
        return small.error
    if dense.shapes != small.shapes:
        return f"its output changes from {_list(dense.shapes)} to {_list(small.shapes)}"
    for one, other in zip_longest(dense.numbers, small.numbers):
        if one is None or other is None or one.function != other.function:
            return "its forward takes another path"
        if repr(one.values) != repr(other.values):  # nan equals itself
            return f"{other.where} computes with the width: {other.values} instead of {one.values}"
    return ""


def _list(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


def _tensors(output: Any) -> Iterator[Tensor]:
    """Caches are objects of classes of their own: their shapes change with the heads, and nobody minds."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from chain.from_iterable(_tensors(value) for value in output.values())
    elif isinstance(output, (list, tuple)):
        yield from chain.from_iterable(map(_tensors, output))


def _told(error: Exception) -> str:
    """The module whose forward failed, its line and the error's first line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    places = []
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner, file = frame.f_locals.get("self"), frame.f_code.co_filename
        if isinstance(owner, nn.Module) and not file.startswith(str(Path(torch.__file__).parent)):
            places.append(f"{type(owner).__name__} at `{linecache.getline(file, number).strip()}`: ")
    place = places[-1] if places else ""
    return f"{place}{type(error).__name__}: {text}"


_ARITHMETIC = re.compile(
    "[ri]?(add|sub|mul|div|truediv|floordiv|pow|mod)|true_divide|floor_divide|remainder|fmod|lt|le|gt|ge|eq|ne"
    "|clamp(_min|_max)?|maximum|minimum|where|full|full_like|new_full|masked_fill|fill|tensor|as_tensor"
)  # functions whose plain integers are values; elsewhere they are sizes and positions


class _Watch(TorchFunctionMode):
    """Notes the numbers in every call of torch's API: all floats, and integers that are computed with."""

    def __init__(self, log: list[Numbers]) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        name = str(getattr(func, "__name__", func)).strip("_")
        values = tuple(
            _numbers((*args, *named.values()), _ARITHMETIC.fullmatch(name) is not None, name in ("tensor", "as_tensor"))
        )
        if values:
            self._log.append(Numbers(name, values, f"{name}() in {_caller()}"))
        return func(*args, **named)


def _caller() -> str:
    """The class of the innermost module whose code is running."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return type(owner).__name__
        frame = frame.f_back
    return "the forward"


def _numbers(arguments: Sequence[Any], integers: bool, nested: bool) -> Iterator[float]:
    for argument in arguments:
        if isinstance(argument, float) or (integers and isinstance(argument, int) and not isinstance(argument, bool)):
            yield argument
        elif nested and isinstance(argument, (list, tuple)):
            yield from _numbers(argument, integers, nested)
