"""A file, a runtime and the inputs, put together: what `benchmark`, `throughput` and `profile_operators` run."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from td_plugin.errors import TdError, first_line
from td_plugin.export.engines import CPU, OPENVINO, Engine, Execute
from td_plugin.export.external_data import check_external
from td_plugin.export.session import fit_inputs, open_session, read_graph, require, stated_inputs

if TYPE_CHECKING:
    import numpy as np

Inputs = Mapping[str, "Tensor | np.ndarray[Any, Any]"]
"""Inputs by name, as the model is called."""

WARM_UP = 5  # runs; onnxruntime's times are flat from the first ones on
_SHORT = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    OPENVINO: OPENVINO,
}


@dataclass(frozen=True)
class Form:
    """An ONNX file and what runs it.

    Attributes:
        path: the file.
        provider: ``"cpu"``, ``"cuda"``, ``"tensorrt"`` or another execution provider of onnxruntime by its full name;
            ``"openvino"`` is the package of that name.
        options: of the provider, as it calls them: ``{"trt_fp16_enable": "True"}``.
    """

    path: str | os.PathLike[str]
    provider: str = "cpu"
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Form:
        """``"model.onnx"`` or ``"model.onnx@provider"``; a file of the whole name comes first."""
        path, _, provider = text.rpartition("@")
        known = provider.lower() in _SHORT or provider.endswith("ExecutionProvider")
        return cls(path, provider) if path and known and not Path(text).exists() else cls(text)


@dataclass(frozen=True)
class Runner:
    """A file, how it is opened, and what it is fed.

    Attributes:
        engine: the file and the runtime.
        inputs: what the graph takes, one per example.
        feeds: the same as numpy arrays.
    """

    engine: Engine
    inputs: tuple[dict[str, Tensor], ...]
    feeds: tuple[dict[str, Any], ...]

    def open(self) -> Execute:
        """Open the file and warm it up: every example once, for memory is planned per shape, and `WARM_UP` runs.

        Raises:
            TdError: the runtime cannot load the file or cannot run it on one of the examples.
        """
        execute = self._load()
        for turn in range(max(len(self.feeds), WARM_UP)):
            feeds = self.feeds[turn % len(self.feeds)]
            try:
                execute(feeds)
            except Exception as error:  # onnxruntime's exceptions share no base class
                shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
                raise TdError(
                    f"{self._runtime} cannot run the graph",
                    where=self.engine.path,
                    got=f"{first_line(error)}; inputs: {shapes}",
                ) from error
        return execute

    def timed(self) -> Callable[[int], float]:
        """Open the file; the result runs the example of an index and says how many seconds that took."""
        execute, examples = self.open(), self.feeds

        def run(index: int) -> float:
            feeds = examples[index]
            start = time.perf_counter()
            execute(feeds)
            return time.perf_counter() - start

        return run

    @property
    def largest(self) -> dict[str, Any]:
        """The feeds of the example with most elements."""
        return max(self.feeds, key=lambda feeds: sum(value.size for value in feeds.values()))

    @property
    def batch(self) -> int:
        """Rows of the first input of the first example."""
        return int(next(iter(self.inputs[0].values())).shape[0])

    @property
    def _runtime(self) -> str:
        return OPENVINO if self.engine.provider == OPENVINO else "onnxruntime"

    def _load(self) -> Execute:
        engine = self.engine
        if engine.provider != OPENVINO:
            session = open_session(
                engine.path, threads=engine.threads, provider=engine.provider, options=engine.options
            )
            return lambda feeds: session.run(None, feeds)
        try:
            return engine.open()
        except Exception as error:  # another package's exceptions
            raise TdError(f"{OPENVINO} cannot load the ONNX file", where=engine.path, got=first_line(error)) from error


def as_forms(forms: Mapping[str, str | os.PathLike[str] | Form]) -> dict[str, Form]:
    """Name -> `Form`; a path stands for the CPU.

    Raises:
        TdError: there are none.
    """
    if not forms:
        raise TdError("nothing to time", got="no files", fix="give at least one, as name -> path")
    return {name: form if isinstance(form, Form) else Form(form) for name, form in forms.items()}


def as_examples(example_inputs: Inputs | Sequence[Inputs]) -> list[Inputs]:
    """One example, or several, as a list.

    Raises:
        TdError: the list is empty.
    """
    examples = [example_inputs] if isinstance(example_inputs, Mapping) else list(example_inputs)
    if not examples:
        raise TdError("no example inputs", got="an empty list", fix="give at least one dict of tensors")
    return examples


def available_providers() -> tuple[str, ...]:
    """What `Form.provider` may be here: short names, then those that have none."""
    present = list(require("onnxruntime").get_available_providers())
    present += [OPENVINO] if importlib.util.find_spec(OPENVINO) is not None else []
    short = [name for name, provider in _SHORT.items() if provider in present]
    return (*short, *(name for name in present if name not in _SHORT.values()))


def provider_name(provider: str) -> str:
    """What the runtime calls a provider.

    Raises:
        TdError: it is not installed.
    """
    name = _SHORT.get(provider.lower(), provider)
    present = available_providers()
    if name not in present and not any(_SHORT.get(short) == name for short in present):
        raise TdError(
            "this provider is not installed",
            got=provider,
            fix=f"one of {', '.join(present)}; others come with their own build of onnxruntime, or with openvino",
        )
    return name


def make_runner(form: Form, examples: Sequence[Inputs], *, threads: int = 1, workers: int = 1) -> Runner:
    """Fit the inputs to the graph of a file, without opening it in its runtime.

    Raises:
        TdError: the provider is not installed, the file is missing or damaged, its weights are missing or outside its
            directory, or an input does not fit.
    """
    where, provider = os.fspath(form.path), provider_name(form.provider)
    if not Path(where).is_file():
        raise TdError("there is no such ONNX file", where=where, fix="write it with to_onnx(model, path, inputs)")
    graph = read_graph(where)
    check_external(where, graph)  # before any runtime opens what the graph names
    stated = stated_inputs(graph)
    inputs = tuple(
        fit_inputs(stated, example, where if len(examples) == 1 else f"{where}, example {index}")
        for index, example in enumerate(examples)
    )
    feeds = tuple({name: tensor.numpy() for name, tensor in fitted.items()} for fitted in inputs)
    return Runner(Engine(where, threads, provider, dict(form.options), workers), inputs, feeds)
