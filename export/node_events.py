"""What onnxruntime's profiler records: of every node its operator, its time and the shapes it ran on."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from td_plugin.export.engines import Engine, onnxruntime_session, session_options

# Their time is that of the nodes inside, which are recorded themselves.
_CONTROL_FLOW = ("If", "Loop", "Scan")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NodeEvent:
    """One node, one time.

    Attributes:
        operator: such as MatMul.
        node: its name in the graph that ran.
        seconds: in its kernel.
        inputs: shapes, without those of weights that were packed ahead.
        outputs: shapes.
    """

    operator: str
    node: str
    seconds: float
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]


@dataclass(frozen=True)
class RunEvents:
    """One run of a graph.

    Attributes:
        seconds: from its start to its end.
        nodes: in the order in which they ran.
    """

    seconds: float
    nodes: tuple[NodeEvent, ...]


class Recorder:
    """A session that records every run; leave the block before reading `runs`."""

    def __init__(self, engine: Engine, adjust: Callable[[Any], None] = lambda options: None) -> None:
        self._engine, self._adjust = engine, adjust
        self._session: Any = None
        self.runs: tuple[RunEvents, ...] = ()

    def __enter__(self) -> Recorder:
        self._folder = tempfile.TemporaryDirectory(prefix="td_plugin.")
        options = session_options(self._engine.threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        self._adjust(options)
        try:
            self._session = onnxruntime_session(self._engine, options)
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def run(self, feeds: Mapping[str, Any]) -> None:
        """Run and record."""
        self._session.run(None, feeds)

    def __exit__(self, *_: object) -> None:
        try:
            written = Path(self._session.end_profiling())
            self.runs = parse(json.loads(written.read_text(encoding="utf-8")))
        finally:
            self._session = None
            self._folder.cleanup()


def parse(events: Sequence[Mapping[str, Any]]) -> tuple[RunEvents, ...]:
    """The runs in a profile of onnxruntime (a list of Chrome trace events, times in microseconds)."""
    runs = sorted((event for event in events if event.get("name") == "model_run"), key=lambda event: event["ts"])
    starts = [event["ts"] for event in runs]
    nodes: list[list[NodeEvent]] = [[] for _ in runs]
    for event in sorted((e for e in events if e.get("cat") == "Node"), key=lambda event: event["ts"]):
        at = bisect_right(starts, event["ts"]) - 1
        told = event.get("args", {})
        if at >= 0 and event["name"].endswith("_kernel_time") and told.get("op_name") not in _CONTROL_FLOW:
            name = event["name"].removesuffix("_kernel_time")
            inputs, outputs = (_shapes(told.get(f"{side}_type_shape", ())) for side in ("input", "output"))
            nodes[at].append(NodeEvent(told["op_name"], name, event["dur"] / 1e6, inputs, outputs))
    return tuple(RunEvents(run["dur"] / 1e6, tuple(found)) for run, found in zip(runs, nodes, strict=True))


def _shapes(typed: Sequence[Mapping[str, Sequence[int]]]) -> tuple[Shape, ...]:
    """From ``[{"float": [1, 128]}, ...]``; an input left out has no entry of its own, sequences have no shape."""
    return tuple(tuple(shape) for entry in typed for shape in entry.values())
