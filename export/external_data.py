"""Weights in one file beside the graph: checked before they are read, and written so that no reader sees half a pair.

An ONNX file names the file its weights are in, so renaming the ONNX file is the one moment at which both change. The
weights are put in place first, under a name that nothing in the directory has; then the ONNX file is renamed over the
old one; then the weights that the old one named are removed. Whoever opens the path finds the old graph and the old
weights or the new graph and the new weights. Whoever has read the old graph but not yet its weights may find these
gone: one error, no mixture. A process that dies in between leaves the old pair whole, and beside it at most a file
of weights that no graph names.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from td_plugin.errors import TdError
from td_plugin.export.session import read_graph, require
from td_plugin.files import staged_file

LIMIT = 2**31 - 2**24
"""Bytes of weights that fit into the ONNX file itself: one protobuf message is below 2 GiB, the graph gets 16 MiB."""

_SMALL = 1024  # bytes; what is smaller stays in the graph, where other tools look for shapes and axes
_EXTERNAL = 1  # onnx.TensorProto.EXTERNAL


@contextmanager
def staged_graph(target: str | os.PathLike[str]) -> Iterator[Path]:
    """`td_plugin.files.staged_file` for what `save_graph` and `save_program` write: one file, or two that are a pair.

    Raises:
        TdError: the disk is full, or the files cannot be written for another reason; `target` is as it was.
    """
    path = Path(target)
    placed, former = None, dict[Path, tuple[int, int]]()
    try:
        with staged_file(path) as staged:
            yield staged
            former = _own_data(path)
            placed = _place_data(staged, path)
    except OSError as error:
        _discard(placed, path)
        raise TdError(
            "the file cannot be written", where=str(path), got=error, fix="free some space or choose another disk"
        ) from error
    except BaseException:
        _discard(placed, path)
        raise
    for old, identity in former.items():
        with suppress(OSError):  # gone already, or by now the weights of another process
            if old != placed and _identity(old) == identity:
                old.unlink()


def save_graph(graph: Any, path: Path, *, limit: int = LIMIT) -> None:
    """Write an `onnx.ModelProto`, its weights beside it where they are more than `limit` bytes. `graph` is used up."""
    onnx, data = require("onnx"), data_path(path)
    data.unlink(missing_ok=True)  # the writer would append
    if weight_bytes(graph) <= limit:
        onnx.save(graph, str(path))
        return
    onnx.save(graph, str(path), save_as_external_data=True, location=data.name, size_threshold=_SMALL)


def save_program(program: Any, path: Path, *, limit: int = LIMIT) -> None:
    """The same for an `onnx_ir.Model`, one tensor at a time in memory."""
    ir = require("onnx_ir")
    size = sum(value.const_value.nbytes for value in program.graph.initializers.values() if value.const_value)
    if size <= limit:
        ir.save(program, str(path))
        return
    ir.save(program, str(path), external_data=data_path(path).name, size_threshold_bytes=_SMALL)


def data_path(path: Path) -> Path:
    """Where the weights of a graph at `path` lie if they are beside it and the name is free."""
    return path.with_name(f"{path.name}.data")


def move_pair(file: Path, place: Path) -> None:
    """Move a graph and its weights to a directory that nobody reads yet, under the same name."""
    if data_path(file).exists():
        os.replace(data_path(file), data_path(place))
    os.replace(file, place)


def weight_bytes(graph: Any) -> int:
    """Bytes of the constants of an `onnx.ModelProto`, whose weights have been read."""
    return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in graph.graph.initializer)


def check_external(path: str | os.PathLike[str], graph: Any = None) -> frozenset[Path]:
    """The files that an ONNX file keeps weights in; none of them is opened.

    Args:
        path: the ONNX file.
        graph: what `read_graph` made of it, if that is at hand.

    Raises:
        TdError: the file cannot be parsed, one named in it is outside its directory, missing, or too short.
    """
    where, needed = Path(path), dict[Path, int]()
    for tensor in _external(read_graph(path) if graph is None else graph):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = _inside(where, entries.get("location", ""))
        end = int(entries.get("offset") or 0) + int(entries.get("length") or 0)
        needed[file] = max(needed.get(file, 0), end)
    for file, size in needed.items():
        if not file.is_file():
            raise TdError(
                "weights kept outside the ONNX file are missing",
                where=str(path),
                got=str(file),
                fix="copy the two files together",
            )
        if file.stat().st_size < size:
            raise TdError(
                "the file of weights beside the ONNX file is truncated",
                where=str(file),
                got=f"{file.stat().st_size} of {size} bytes",
                fix="copy the two files together, or export again",
            )
    return frozenset(needed)


def load_graph(path: str | os.PathLike[str]) -> Any:
    """The `onnx.ModelProto` of a file with all its weights in memory.

    Raises:
        TdError: as `check_external`.
    """
    graph = read_graph(path)
    check_external(path, graph)
    for tensor in _external(graph):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        with _inside(Path(path), entries["location"]).open("rb") as file:
            file.seek(int(entries.get("offset") or 0))
            tensor.raw_data = file.read(int(entries.get("length") or -1))
        tensor.data_location = 0
        del tensor.external_data[:]
    return graph


def _inside(path: Path, location: str) -> Path:
    """`location` beside `path`; where `path` is a link, as in the Hub's cache, also beside what it leads to.

    Raises:
        TdError: it leads elsewhere; what a graph from elsewhere names must not be read.
    """
    parts = (*PurePosixPath(location).parts, *PureWindowsPath(location).parts)
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
    file = path.parent / location
    homes = (path.parent.resolve(), path.resolve().parent)
    if not location or absolute or ".." in parts or not any(map(file.resolve().is_relative_to, homes)):
        raise TdError(
            "the ONNX file keeps weights outside its directory, which is not read",
            where=str(path),
            got=repr(location),
            fix="save it anew with the weights beside it",
        )
    return file


def _external(graph: Any) -> Iterator[Any]:
    """Every tensor of an `onnx.ModelProto` whose values are in another file, those of inner graphs too."""
    yield from (tensor for tensor in _tensors(graph.graph) if tensor.data_location == _EXTERNAL)


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _identity(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


def _own_data(path: Path) -> dict[Path, tuple[int, int]]:
    """The weights of the graph at `path`, if this module named them: others may be shared with another graph."""
    own = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{8})?\.data")
    # Nothing there, damaged, or replaced while it is looked at: then nothing is known to belong to it.
    with suppress(TdError, FileNotFoundError):
        return {file: _identity(file) for file in check_external(path) if own.fullmatch(file.name)}
    return {}


def _place_data(staged: Path, path: Path) -> Path | None:
    """Give the staged weights a place beside `path` that nothing else has, and the staged graph its name."""
    data = data_path(staged)
    if not data.exists():
        return None
    place = data_path(path)
    try:
        _claim(data, place)
    except FileExistsError:  # the old graph's, or another process is about to finish
        place = path.with_name(f"{path.name}.{secrets.token_hex(4)}.data")
        _claim(data, place)
    if place.name != data.name:
        try:
            _rename_in_graph(staged, data.name, place.name)
        except BaseException:
            place.unlink(missing_ok=True)
            raise
    return place


def _claim(data: Path, place: Path) -> None:
    """Move `data` to `place`, unless something is there.

    Raises:
        FileExistsError: something is.
    """
    try:
        os.link(data, place)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without links: two processes may then take one name at the same moment
        if place.exists():
            raise FileExistsError(str(place)) from error
        os.replace(data, place)
    else:
        data.unlink()


def _rename_in_graph(path: Path, old: str, new: str) -> None:
    graph = read_graph(path)
    for tensor in _external(graph):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value == old:
                entry.value = new
    path.write_bytes(graph.SerializeToString())


def _discard(placed: Path | None, path: Path) -> None:
    """Remove weights put in place for a graph that never came."""
    if placed is not None and placed not in _own_data(path):
        placed.unlink(missing_ok=True)
