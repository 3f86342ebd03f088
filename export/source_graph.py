"""The fp32 ONNX file that forms are made of: everything that can be wrong with it is said before work begins."""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from td_plugin.errors import TdError
from td_plugin.export.external_data import LIMIT, check_external, data_path, load_graph
from td_plugin.export.graph_nodes import layer_of, name_nodes
from td_plugin.export.parity import precision_of
from td_plugin.export.session import is_quantized, open_session, read_graph, require

FORM_KEY, PRECISION_KEY = "td-plugin.form", "td-plugin.precision"
# What `to_onnx` writes down, and what is unknown without it.
_NOTED = {
    "td-plugin.model_class": "model class",
    "td-plugin.parameters": "parameters",
    "td-plugin.sparsity": "sparsity",
}


@dataclass(frozen=True)
class SourceGraph:
    """A file that can be read and run.

    Attributes:
        path: the file.
        graph: `onnx.ModelProto` without the weights that are outside the file.
        metadata: what the file says about itself.
        bytes: of the file and the weights beside it.
    """

    path: Path
    graph: Any
    metadata: dict[str, str]
    bytes: int

    @property
    def ours(self) -> bool:
        """Whether `to_onnx` wrote it: folded constants, and shapes of all values."""
        return "td-plugin.model_class" in self.metadata

    @property
    def large(self) -> bool:
        """Whether it is more than one protobuf message holds."""
        return self.bytes > LIMIT

    def notes(self) -> tuple[str, ...]:
        """What is not known of it, one line."""
        unknown = [what for key, what in _NOTED.items() if key not in self.metadata]
        return (f"not written by td-plugin: {', '.join(unknown)} unknown",) if unknown else ()

    def load(self) -> Any:
        """The graph with all its weights, its nodes named."""
        graph = load_graph(self.path)
        name_nodes(graph)
        return graph

    def selected(self, patterns: Collection[str]) -> dict[str, str]:
        """Node -> layer, of the nodes whose layer or own name fits one of `patterns`.

        Raises:
            TdError: a pattern fits none.
        """
        named = {node.name: layer_of(node) for node in self.graph.graph.node}
        found: dict[str, str] = {}
        for pattern in patterns:
            fitting = {
                node: layer
                for node, layer in named.items()
                if fnmatch.fnmatchcase(layer, pattern) or fnmatch.fnmatchcase(node, pattern)
            }
            if not fitting:
                near = difflib.get_close_matches(pattern, {*named.values(), *named}, 3, 0.3)
                raise TdError("no layer of this name", where=str(self.path), got=pattern, fix=f"nearest: {near}")
            found |= fitting
        return found


def open_source(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> SourceGraph:
    """Read an fp32 file and try it.

    Args:
        path: the file.
        target: what will be written: another file.

    Raises:
        TdError: it is missing or damaged, its weights are missing, truncated or outside its directory, onnxruntime
            cannot run it, it is not fp32, or it is `target`.
    """
    where = Path(path)
    if where.resolve() == Path(target).resolve():
        raise TdError("source and target are the same file", where=str(target), fix="choose another target")
    if not where.is_file():
        raise TdError("there is no such ONNX file", where=str(path), fix="write it with to_onnx(model, path, inputs)")
    graph = _parsed(where)
    beside = check_external(where, graph)
    open_session(where)
    if is_quantized(graph):
        raise TdError("the ONNX file is already quantized", where=str(path), fix="start from the fp32 file")
    if precision_of(graph) != "fp32":
        raise TdError("forms are made of the fp32 file", where=str(path), got=precision_of(graph), fix="start from it")
    name_nodes(graph)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    return SourceGraph(where, graph, metadata, sum(part.stat().st_size for part in (where, *beside)))


def _parsed(path: Path) -> Any:
    try:
        graph = read_graph(path)
    except TdError:
        open_session(path)  # onnxruntime says more about what is wrong, if it finds it wrong as well
        raise
    if not graph.graph.node:  # nothing is a valid message
        open_session(path)
    return graph


def as_target(target: str | os.PathLike[str], source: str | os.PathLike[str]) -> Path:
    """`target`, or the source's name in it where it is a directory."""
    path = Path(target)
    return path / Path(source).name if path.is_dir() else path


def file_bytes(path: Path) -> int:
    """Of a file that was just written and of the weights beside it."""
    return sum(part.stat().st_size for part in {path, data_path(path), *check_external(path)} if part.is_file())


def finish(graph: Any, metadata: dict[str, str], *, precision: str = "", form: str = "") -> None:
    """Give a derived graph the metadata of its source, and what it is now."""
    added = {PRECISION_KEY: precision, FORM_KEY: form}
    require("onnx").helper.set_model_props(graph, {**metadata, **{key: text for key, text in added.items() if text}})
