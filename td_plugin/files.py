"""Files that are either whole or absent: everything is written beside its destination, then moved into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from td_plugin.errors import TdError


def _parent(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TdError(
            "the output directory cannot be created", where=str(target.parent), got=error, fix="choose a writable path"
        ) from error
    return target.parent


def _stage(target: Path) -> Path:
    parent = _parent(target)
    try:
        return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=parent))
    except OSError as error:
        raise TdError(
            "the output directory cannot be written", where=str(parent), got=error, fix="choose a writable path"
        ) from error


@contextmanager
def staged_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path in a fresh folder beside `target`; on a clean exit the file is moved over `target`.

    The yielded path has the target's name, so writers that record their own file name stay right. On any exception
    the staging folder is removed and `target` is left exactly as it was.

    Raises:
        TdError: the folder cannot be created, `target` is a directory, or the system refuses to write: the disk is
            full, the folder read-only. A writer that leaves no file behind is a FileNotFoundError.
    """
    path = Path(target)
    _no_directory(path)
    stage = _stage(path)
    try:
        yield stage / path.name
        os.replace(stage / path.name, path)
    except FileNotFoundError:
        raise  # nothing was written, or what the writer reads is missing
    except OSError as error:
        if error.errno is None or not _within(error.filename, stage, path):
            raise  # not of the system, or about a file that the writer reads
        raise TdError(
            "the file cannot be written",
            where=str(path),
            got=error.strerror or error,
            fix="free some space or choose another path",
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_file(target: str | os.PathLike[str]) -> None:
    """Refuse, before long work, a file that could not be written. Leaves nothing behind.

    Raises:
        TdError: `target` is a directory, lies under a file, or its nearest existing parent takes no new file.
    """
    path = Path(target)
    _no_directory(path)
    shutil.rmtree(_stage(next(folder for folder in path.absolute().parents if folder.exists()) / path.name))


def _no_directory(path: Path) -> None:
    if path.is_dir():
        raise TdError("a file is to be written but a directory is there", where=str(path), fix="name a file in it")


def _within(name: object, stage: Path, path: Path) -> bool:
    """Whether an error of the system is about what is being written; a full disk comes without a name."""
    return not isinstance(name, (str, os.PathLike)) or Path(name) == path or stage in Path(name).parents


@contextmanager
def staged_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a fresh folder beside `target`; on a clean exit its files are moved into `target`.

    A new `target` appears in one rename. In an existing one each file is replaced by one rename, other files stay.
    On any exception nothing of `target` has changed.

    Raises:
        TdError: the parent cannot be written, or `target` is a file.
    """
    path = Path(target)
    if path.exists() and not path.is_dir():
        raise TdError("a directory is to be written but a file is there", where=str(path), fix="choose another path")
    stage = _stage(path)
    try:
        yield stage
        if not path.exists():
            stage.chmod(0o755)  # mkdtemp makes it private
            stage.rename(path)
            return
        if not os.access(path, os.W_OK):
            raise TdError("the output directory cannot be written", where=str(path), fix="choose a writable path")
        places = {item: path / item.relative_to(stage) for item in sorted(stage.rglob("*"))}
        for item, place in places.items():  # all checks before the first move
            if place.exists() and place.is_dir() != item.is_dir():
                raise TdError("a file and a directory are in each other's way", where=str(place), fix="remove it")
        for item, place in places.items():
            if item.is_dir():
                place.mkdir(exist_ok=True)
            else:
                os.replace(item, place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
