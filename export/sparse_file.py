"""`save_sparse` and `load_sparse`: weights without their zeros in a file, and bit by bit back.

The file is one of safetensors: dense tensors under their own names, others as ``NAME//gaps`` (packed, uint8) and
``NAME//values``. Its metadata hold ``table``, a JSON object of every tensor's shape, dtype, bits per gap and checksum,
and ``crc``, the checksum of that. Nothing in it is code.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from td_plugin.errors import TdError, first_line
from td_plugin.export.progress import Bar, bar
from td_plugin.export.sparse_coding import DTYPES, Coded, code, compressed_rows, decode, part_names, patterns_of
from td_plugin.export.storage import GAPS, StorageReport
from td_plugin.export.storage_forms import StorageRow, zip_bytes
from td_plugin.files import staged_file
from td_plugin.parametrization import bake, masked_tensors

FORMAT = "td_plugin.sparse.1"
_MARK = "//"
_FORMS = 5  # files that are written to compare


def save_sparse(
    tensors: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    bits: int | None = None,
    compare: bool = True,
    progress: bool = False,
) -> StorageReport:
    """Write weights without their zeros, as gaps and values, and measure what that takes beside other forms.

    A zero is an entry whose bits are all 0: negative zeros and NaN of any kind are values and come back as they were.
    A tensor that would grow stays dense; tensors that share memory are written once and share it again when loaded.

    Args:
        tensors: a model, whose masks are baked in a copy, or its `state_dict()`.
        path: the file; written aside and moved into place.
        bits: per gap, 1 to 16; None tries 8 and 5 for each tensor, the paper's for convolutions and linear layers.
        compare: measure the dense file, its zip and compressed sparse rows; they are really written, to a temporary
            directory.
        progress: show a bar on the terminal.

    Returns:
        a table of forms; the file's own is ``"gaps + values"``.

    Raises:
        TdError: something in it is no tensor or of a dtype that safetensors does not hold, a name contains ``//``,
            `bits` is out of range, or the file cannot be written.

    Source: Han, Mao & Dally, "Deep Compression", arXiv 1510.00149, section 2. Its quantisation and Huffman coding are
        not applied: every value comes back.
    """
    given, target = _given(tensors), Path(path)
    firsts, same = _shared(given)
    table: dict[str, dict[str, Any]] = {}
    parts: dict[str, Tensor] = {}
    with bar("sparse file", len(firsts) + _FORMS * compare, progress) as steps:
        for name, tensor in firsts.items():
            coded = code(tensor, GAPS if bits is None else (bits,))
            table[name] = coded.entry
            parts |= {_place(name, part): value for part, value in coded.parts.items()}
            steps.advance()
        table |= {name: {"same_as": first} for name, first in same.items()}
        text = json.dumps({name: table[name] for name in given})
        metadata = {"format": FORMAT, "table": text, "crc": str(zlib.crc32(text.encode()))}
        with staged_file(target) as stage:
            _safetensors().save_file(parts, str(stage), metadata)
        changed = sum(bool(entry.get("bits")) for entry in table.values())
        row = StorageRow("gaps + values", target.stat().st_size, changed, True, "td_plugin.export.load_sparse")
        rows = _compared(firsts, row, target, steps) if compare else (row,)
    zeros = sum(tensor.numel() - int(np.count_nonzero(patterns_of(tensor))) for tensor in firsts.values())
    entries = sum(tensor.numel() for tensor in firsts.values())
    return StorageReport(target, rows, zeros, entries, len(firsts), _notes(firsts))


def load_sparse(path: str | os.PathLike[str], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read what `save_sparse` wrote, bit by bit.

    Args:
        path: the file.
        model: of the same names and shapes; the tensors are copied into it.

    Returns:
        fully qualified name -> dense tensor on the CPU, in the order they were given: a `state_dict`.

    Raises:
        TdError: there is no such file, it is cut off, damaged or of another kind, or it does not fit `model`, which
            then stays as it was.
    """
    target = Path(path)
    if not target.is_file():
        raise TdError("there is no such file", where=str(target), fix="write it with save_sparse(model, path)")
    tensors = _read(target)
    if model is not None:
        _check_fit(model, tensors, target)
        model.load_state_dict(tensors)
    return tensors


def _given(tensors: nn.Module | Mapping[str, Tensor]) -> dict[str, Any]:
    model = tensors if isinstance(tensors, nn.Module) else None
    if model is not None and masked_tensors(model):
        model = copy.deepcopy(model)
        bake(model)
    given: dict[str, Any] = dict(tensors if isinstance(tensors, Mapping) else model.state_dict() if model else {})
    if not given:
        raise TdError("there is nothing to write", got=type(tensors).__name__, fix="a model or its state_dict()")
    for name, tensor in given.items():
        if not isinstance(name, str) or _MARK in name:
            raise TdError(f"names that contain {_MARK!r} are the file's own", where=str(name), fix="rename it")
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            raise TdError("only dense tensors that hold values can be written", where=name, got=type(tensor).__name__)
        if tensor.dtype not in DTYPES.values():
            raise TdError("a dtype that the file cannot hold", where=name, got=tensor.dtype, fix=", ".join(DTYPES))
    return given


def _notes(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    floats = [patterns_of(tensor) for tensor in tensors.values() if tensor.is_floating_point()]
    negative = sum(int(np.count_nonzero(values == 1 << (8 * values.itemsize - 1))) for values in floats)
    told = f"{negative:,} zeros are negative, as a product with a mask leaves them, and are stored as values"
    return (told,) if negative else ()


def _shared(given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, and of each further name for the same memory the first one."""
    firsts: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in given.items():
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        first = seen.setdefault(key, name) if tensor.numel() else name  # empty ones all lie at 0
        if first == name:
            firsts[name] = tensor
        else:
            same[name] = first
    return firsts, same


def _place(name: str, part: str) -> str:
    return name if part == "dense" else f"{name}{_MARK}{part}"


def _compared(tensors: Mapping[str, Tensor], own: StorageRow, target: Path, steps: Bar) -> tuple[StorageRow, ...]:
    """Every form, really written: dense first."""
    sizes: list[int] = []
    with tempfile.TemporaryDirectory(prefix="td_plugin.") as folder:

        def noted(size: int) -> None:
            sizes.append(size)
            steps.advance()

        dense, rows = Path(folder) / "dense.safetensors", Path(folder) / "rows.safetensors"
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        _safetensors().save_file(copies, str(dense))
        noted(dense.stat().st_size)
        noted(zip_bytes([dense], Path(folder)))
        del copies
        compressed = {name: compressed_rows(tensor) for name, tensor in tensors.items()}
        parts = {_place(name, part): value for name, found in compressed.items() for part, value in found.items()}
        _safetensors().save_file(parts, str(rows))
        noted(rows.stat().st_size)
        noted(zip_bytes([rows], Path(folder)))
        noted(zip_bytes([target], Path(folder)))
    changed = sum("rows" in found for found in compressed.values())
    return (
        StorageRow("dense", sizes[0], 0, True, "safetensors"),
        StorageRow("dense, zip", sizes[1], 0, True, "unzip, safetensors"),
        StorageRow("CSR, 32-bit indices", sizes[2], changed, True, "a reader of your own"),
        StorageRow("CSR, 32-bit indices, zip", sizes[3], changed, True, "unzip, a reader of your own"),
        own,
        StorageRow("gaps + values, zip", sizes[4], own.tensors, True, "unzip, td_plugin.export.load_sparse"),
    )


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    name = ""
    try:
        with safe_open(str(path), framework="pt") as file:
            table = _table(file.metadata() or {})
            tensors: dict[str, Tensor] = {}
            for name, entry in table.items():
                if "same_as" in entry:
                    tensors[name] = tensors[entry["same_as"]]
                    continue
                parts = {part: file.get_tensor(_place(name, part)) for part in part_names(entry)}
                tensors[name] = decode(Coded(entry, parts))
    except (SafetensorError, OSError, ValueError, IndexError, KeyError, TypeError, MemoryError) as error:
        got = f"{name}: {first_line(error)}" if name else first_line(error)
        raise TdError(
            "the sparse file is damaged or cut off", where=str(path), got=got, fix="write it again"
        ) from error
    return tensors


def _table(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"not a file of save_sparse: format {metadata.get('format')!r} instead of {FORMAT!r}")
    text = metadata["table"]
    if str(zlib.crc32(text.encode())) != metadata["crc"]:
        raise ValueError("its table is not the one that was written")
    table: dict[str, dict[str, Any]] = json.loads(text)
    return table


def _check_fit(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if odd:
        got = f"{odd[0]}: {found.get(odd[0])} in the file, {wanted.get(odd[0])} in the model ({len(odd)} differ)"
        fix = "shrink the model as it was when it was written, or load without a model"
        raise TdError("the file does not fit the model", where=str(path), got=got, fix=fix)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise TdError("safetensors is not installed", fix="pip install 'td-plugin[onnx]'") from error
    return safetensors.torch
