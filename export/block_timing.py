"""Is a product faster in pieces? Measured in onnxruntime, against the one product, on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from td_plugin.errors import TdError
from td_plugin.export.block_graph import alone
from td_plugin.export.block_rewrite import Part, Product
from td_plugin.export.progress import Bar
from td_plugin.export.runners import Form, Runner, make_runner
from td_plugin.export.session import require
from td_plugin.export.speedup import Speedup, paired_speedup
from td_plugin.export.timing import Plan, time_in_turn

_DENSE = "dense"
_GLANCE = 24  # rounds in which the candidates are compared with each other
_ROUNDS = (50, 100)  # and in which the best of them is compared with the dense product
# Sums of other order differ by a few units in the last place, relative to the largest output.
_CLOSE = {"float16": 1e-2, "float32": 1e-5, "float64": 1e-12}


def fastest(
    product: Product, parts: Mapping[str, Part], rows: int, *, threads: int = 1, opset: int = 20
) -> tuple[str, Speedup]:
    """The part that takes least time, and how many times faster it is than the dense product.

    Few rounds choose among the parts; other rounds, in which the chosen one and the dense product take turns, give the
    speed-up, so that it is not the luckiest of several.

    Args:
        product: what all of them compute.
        parts: name -> the product in pieces.
        rows: of the input; its values are random.
        threads: inside one operator.
        opset: of the standard operators.

    Returns:
        name of the part, and the median of the paired ratios with its interval.

    Raises:
        TdError: a part does not compute what the product does, or onnxruntime cannot run one of them.
    """
    with tempfile.TemporaryDirectory(prefix="td_plugin.") as folder:
        runners = {
            name: _runner(alone(product, part, opset), Path(folder) / f"{index}.onnx", product, rows, threads)
            for index, (name, part) in enumerate({_DENSE: None, **parts}.items())
        }
        _check(product, runners)
        others = {name: runner for name, runner in runners.items() if name != _DENSE}
        best = next(iter(others))
        if len(others) > 1:
            seconds = _seconds(runners, (_GLANCE, _GLANCE))
            # Ratios within a round, for these as well: a burst of other load would make a slow way look fast.
            best = max(others, key=lambda name: paired_speedup(seconds[_DENSE], seconds[name]).median)
        seconds = _seconds({name: runners[name] for name in (_DENSE, best)}, _ROUNDS)
    return best, paired_speedup(seconds[_DENSE], seconds[best])


def _runner(graph: Any, path: Path, product: Product, rows: int, threads: int) -> Runner:
    require("onnx").save(graph, str(path))
    shape = (rows, len(product.weight)) if product.flat else (1, rows, len(product.weight))
    values = np.random.default_rng(0).standard_normal(shape).astype(product.weight.dtype)
    return make_runner(Form(path), [{product.input: values}], threads=threads)


def _check(product: Product, runners: Mapping[str, Runner]) -> None:
    answers = {name: runner.open()(runner.feeds[0])[0].astype(np.float64) for name, runner in runners.items()}
    expected = answers[_DENSE]
    bound = _CLOSE[product.weight.dtype.name] * max(1.0, float(np.abs(expected).max(initial=0)))
    for name, answer in answers.items():
        gap = float(np.abs(answer - expected).max(initial=0))
        if not gap <= bound:
            got = f"max difference {gap:.3g}"
            raise TdError(f"{name} does not compute what the product does", where=product.label, got=got)


def _seconds(runners: Mapping[str, Runner], rounds: tuple[int, int]) -> dict[str, tuple[float, ...]]:
    plan = Plan.of(rounds, 1, 0)
    return time_in_turn(
        list(runners), lambda order: {name: runners[name].timed() for name in order}, plan, Bar()
    ).seconds
