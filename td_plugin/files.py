"""Files that are either whole or absent: everything is written beside its destination, then moved into place."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
    except Exception as error:
        refused = _refused("file", error, stage, path)
        if refused is None:
            raise
        raise refused from error
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


def _refused(what: str, error: Exception, stage: Path, path: Path) -> TdError | None:
    """What to say if the system refused to write to `stage` or `path`; None if the error is about something else."""
    if isinstance(error, FileNotFoundError):
        return None  # nothing was written, or what the writer reads is missing
    if isinstance(error, OSError) and error.errno is not None:
        told = _within(error.filename, stage, path)
        reason = error.strerror
    else:  # safetensors and tokenizers write in Rust, and raise exceptions of their own with its words
        told = _OF_RUST.search(str(error)) is not None
        reason = str(error)
    fix = "free some space or choose another path"
    return TdError(f"the {what} cannot be written", where=str(path), got=reason or error, fix=fix) if told else None


_OF_RUST = re.compile(r"\(os error (?!2\))\d+\)$")


def _within(name: object, stage: Path, path: Path) -> bool:
    """Whether an error of the system is about what is being written; a full disk comes without a name."""
    if not isinstance(name, (str, os.PathLike)):
        return True
    return Path(name) == path or not {stage, path}.isdisjoint(Path(name).parents) or Path(name) == stage


@contextmanager
def staged_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a fresh folder beside `target`; on a clean exit its files are moved into `target`.

    A new `target` appears in one rename. In an existing one each file is replaced by one rename, other files stay; if
    one cannot be, those before it are put back. On any exception nothing of `target` has changed.

    Raises:
        TdError: the parent cannot be written, `target` is a file, or the system refuses to write: the disk is full,
            the folder read-only.
    """
    path = Path(target)
    if path.exists() and not path.is_dir():
        raise TdError("a directory is to be written but a file is there", where=str(path), fix="choose another path")
    stage = _stage(path)
    try:
        yield stage
        if not _appeared(stage, path):
            _merge(stage, path)
    except TdError:
        raise
    except Exception as error:
        refused = _refused("directory", error, stage, path)
        if refused is None:
            raise
        raise refused from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _appeared(stage: Path, path: Path) -> bool:
    """Make `stage` the new directory `path`, if there is none."""
    if path.exists():
        return False
    stage.chmod(0o755)  # mkdtemp makes it private
    try:
        stage.rename(path)
    except OSError:
        if path.is_dir():  # another process was faster: its files are replaced like any others
            return False
        raise
    return True


def _merge(stage: Path, path: Path) -> None:
    """Move what is in `stage` into the directory `path`: everything, or nothing."""
    if not os.access(path, os.W_OK):
        raise TdError("the output directory cannot be written", where=str(path), fix="choose a writable path")
    places = {item: path / item.relative_to(stage) for item in sorted(stage.rglob("*"))}
    for item, place in places.items():  # all checks before the first move
        if place.exists() and place.is_dir() != item.is_dir():
            raise TdError("a file and a directory are in each other's way", where=str(place), fix="remove it")
    former, moved = Path(tempfile.mkdtemp(dir=stage)), list[tuple[Path, Path | None]]()
    try:
        for index, (item, place) in enumerate(places.items()):
            if item.is_dir():
                if not place.is_dir():
                    place.mkdir(exist_ok=True)
                    moved.append((place, None))
                continue
            old = _copy(place, former / str(index)) if place.exists() else None
            os.replace(item, place)
            moved.append((place, old))
    except BaseException:
        _put_back(moved)
        raise


def _copy(file: Path, to: Path) -> Path:
    """The file under a second name."""
    try:
        os.link(file, to)
    except OSError:  # a file system without links
        shutil.copy2(file, to)
    return to


def _put_back(moved: Sequence[tuple[Path, Path | None]]) -> None:
    for place, old in reversed(moved):
        with suppress(OSError):  # as much as can be
            if old is not None:
                os.replace(old, place)
            elif place.is_dir():
                place.rmdir()
            else:
                place.unlink()
