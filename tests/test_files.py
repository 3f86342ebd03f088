"""Files are whole or absent. Permission bits do not bind root: a parent that is a file stands for one not writable."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from td_plugin.errors import TdError
from td_plugin.files import check_file, staged_directory, staged_file


class Crash(Exception):
    """Any failure of a writer."""


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_file_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "model.onnx"
    with staged_file(target) as path:
        assert path.name == "model.onnx" and path.parent.parent == target.parent  # same disk: the move is a rename
        path.write_text("whole")
        assert not target.exists()
    assert tree(tmp_path) == {"deep/er/model.onnx": "whole"}
    assert os.listdir(target.parent) == ["model.onnx"]


def test_a_string_names_a_file_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged_file("model.onnx") as path:
        path.write_text("whole")
    with staged_directory("folder") as path:
        (path / "a").write_text("1")
    assert tree(tmp_path) == {"model.onnx": "whole", "folder/a": "1"}


@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt, OSError])
def test_a_file_is_untouched_when_the_writer_fails(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(error), staged_file(target) as path:
        path.write_text("hal")
        raise error
    assert os.listdir(tmp_path) == ["model.onnx"] and target.read_text() == "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("step", ["write", "move"])
def test_what_the_system_refuses_names_the_file_and_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, step: str
) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    write = Path.write_text

    def refuse(path: Path, *_: object) -> None:
        if step == "write":  # like a write, which names no file
            write(path, "hal")
            raise OSError(code, os.strerror(code))
        raise OSError(code, os.strerror(code), str(path), None, str(target))  # like a move, which names both

    with monkeypatch.context() as patched:
        patched.setattr(*((Path, "write_text") if step == "write" else (os, "replace")), refuse)
        with pytest.raises(TdError, match=f"model.onnx.*{os.strerror(code)}"), staged_file(target) as path:
            path.write_text("new")
    assert os.listdir(tmp_path) == ["model.onnx"] and target.read_text() == "old"


def test_a_file_that_the_writer_cannot_read_is_not_taken_for_the_one_it_writes(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), staged_file(tmp_path / "model.onnx"):
        tmp_path.read_text()
    assert os.listdir(tmp_path) == []


def test_a_file_that_could_not_be_written_is_known_beforehand(tmp_path: Path) -> None:
    check_file(tmp_path / "deep" / "er" / "page.html")
    assert os.listdir(tmp_path) == []
    (tmp_path / "blocked").write_text("a file")
    for wrong, words in ((tmp_path, "a directory is there"), (tmp_path / "blocked" / "deep" / "x", "blocked")):
        with pytest.raises(TdError, match=words):
            check_file(wrong)
    assert tree(tmp_path) == {"blocked": "a file"}


def test_no_file_appears_when_the_writer_fails(tmp_path: Path) -> None:
    with pytest.raises(Crash), staged_file(tmp_path / "model.onnx") as path:
        path.write_text("hal")
        raise Crash
    assert os.listdir(tmp_path) == []


def test_a_file_is_replaced_in_one_move(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    with target.open() as reader:
        with staged_file(target) as path:
            path.write_text("new")
        assert reader.read() == "old"  # who had it open still reads the old one, whole
    assert target.read_text() == "new"


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with staged_file(tmp_path / "staged") as path:
        path.write_text("")
    assert (tmp_path / "staged").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_new_directory_appears_at_once(tmp_path: Path) -> None:
    target = tmp_path / "out" / "checkpoint"
    with staged_directory(target) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("w")
        assert not target.exists()
    assert tree(target) == {"config.json": "{}", "sub/weights": "w"}
    assert os.listdir(target.parent) == ["checkpoint"]
    (tmp_path / "plain").mkdir()
    readable = stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH
    assert target.stat().st_mode & readable == (tmp_path / "plain").stat().st_mode & readable


def test_an_existing_directory_keeps_its_other_files(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    (target / "sub").mkdir(parents=True)
    for name in ("config.json", "notes.txt", "sub/weights"):
        (target / name).write_text("old")
    with staged_directory(target) as folder:
        (folder / "config.json").write_text("new")
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("new")
        (folder / "more").mkdir()
        (folder / "more" / "file").write_text("new")
    assert tree(target) == {"config.json": "new", "notes.txt": "old", "sub/weights": "new", "more/file": "new"}
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("existed", [True, False])
def test_a_directory_is_untouched_when_the_writer_fails(tmp_path: Path, existed: bool) -> None:
    target = tmp_path / "checkpoint"
    if existed:
        target.mkdir()
        (target / "config.json").write_text("old")
    with pytest.raises(Crash), staged_directory(target) as folder:
        (folder / "config.json").write_text("hal")
        raise Crash
    assert tree(tmp_path) == ({"checkpoint/config.json": "old"} if existed else {})
    assert os.listdir(tmp_path) == (["checkpoint"] if existed else [])


@pytest.mark.parametrize("stage", [staged_file, staged_directory])
@pytest.mark.parametrize("inside", ["blocked/out", "blocked/deep/er/out"])
def test_a_parent_that_cannot_be_written(tmp_path: Path, stage: type[staged_file], inside: str) -> None:
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(TdError, match=r"cannot be created.*blocked.*choose a writable path"), stage(tmp_path / inside):
        pytest.fail("the body must not run")
    assert tree(tmp_path) == {"blocked": "a file"}


def test_a_directory_where_a_file_is_to_go(tmp_path: Path) -> None:
    with pytest.raises(TdError, match="a directory is there"), staged_file(tmp_path):
        pytest.fail("the body must not run")


def test_a_file_where_a_directory_is_to_go(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(TdError, match="a file is there"), staged_directory(tmp_path / "taken"):
        pytest.fail("the body must not run")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_writer_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), staged_file(target):
        pass
    assert os.listdir(tmp_path) == ["model.onnx"] and target.read_text() == "old"


def test_a_file_in_the_way_of_a_sub_directory_fails_without_half_a_result(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "b").write_text("old")
    with pytest.raises(TdError, match="b"), staged_directory(target) as folder:
        (folder / "a").write_text("new")
        (folder / "b").mkdir()
        (folder / "b" / "weights").write_text("new")
    assert tree(target) == {"b": "old"}


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("step", ["write", "move", "rust"])
def test_a_full_disk_leaves_a_directory_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, existed: bool
) -> None:
    target, full = tmp_path / "checkpoint", os.strerror(errno.ENOSPC)
    if existed:
        target.mkdir()
        for name in ("config.json", "weights"):
            (target / name).write_text("old")
    replace, moves = os.replace, []

    def refuse(source: Path, place: Path) -> None:
        moves.append(place)
        if len(moves) == 3:  # by then one file is new in its place, and one stands where there was none
            raise OSError(errno.ENOSPC, full, str(source), None, str(place))
        replace(source, place)

    def rename(stage: Path, place: Path) -> None:
        raise OSError(errno.ENOSPC, full, str(stage), None, str(place))

    if step == "move":
        monkeypatch.setattr(os, "replace", refuse)
        monkeypatch.setattr(Path, "rename", rename)
    refused = pytest.raises(TdError, match=f"directory cannot be written.*checkpoint.*{full}")
    with refused, staged_directory(target) as folder:
        for name in ("config.json", "new", "weights"):
            (folder / name).write_text("new")
        if step == "write":  # like a write, which names no file
            raise OSError(errno.ENOSPC, full)
        if step == "rust":
            raise Exception(f"Error while serializing: I/O error: {full} (os error 28)")
    monkeypatch.undo()
    assert tree(tmp_path) == ({"checkpoint/config.json": "old", "checkpoint/weights": "old"} if existed else {})
    assert os.listdir(tmp_path) == (["checkpoint"] if existed else [])


def test_what_a_directory_s_writer_cannot_read_is_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(IsADirectoryError), staged_directory(tmp_path / "checkpoint"):
        (tmp_path / "other").read_text()
    with pytest.raises(FileNotFoundError), staged_directory(tmp_path / "checkpoint"):
        (tmp_path / "absent").read_text()
    assert os.listdir(tmp_path) == ["other"]


def test_two_writers_of_one_new_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one finds nothing there, and by the time it moves its files the first has moved its own."""
    target, rename = tmp_path / "checkpoint", Path.rename

    def late(stage: Path, place: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        with staged_directory(target) as first:
            (first / "config.json").write_text("first")
            (first / "tokenizer.json").write_text("first")
        return rename(stage, place)

    monkeypatch.setattr(Path, "rename", late)
    with staged_directory(target) as second:
        (second / "config.json").write_text("second")
    assert tree(tmp_path) == {"checkpoint/config.json": "second", "checkpoint/tokenizer.json": "first"}


def test_a_checkpoint_larger_than_the_system_allows(tmp_path: Path) -> None:
    """Not simulated: a process that may write no more than 2000 bytes to a file."""
    code = (
        "import resource, sys, torch; from td_plugin.export import save_pretrained\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try:\n    save_pretrained(torch.nn.Linear(100, 100), sys.argv[1])\n"
        "except ValueError as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert "TdError" in done.stdout and "out" in done.stdout and os.strerror(errno.EFBIG) in done.stdout
    assert os.listdir(tmp_path) == []
