"""Weights beside the graph: readers see whole pairs only, nothing is lost, and nothing outside is read."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from torch import nn

from td_plugin.errors import TdError
from td_plugin.export import benchmark, check, external_data, quantize, to_onnx
from td_plugin.export.benchmark import file_size
from td_plugin.export.check_bars import Bars
from td_plugin.export.external_data import check_external, save_graph, staged_graph
from td_plugin.export.forms import Form, derive
from td_plugin.export.session import open_session

SIZE = 32


def graph(value: float) -> Any:
    """``x @ weight``, all of whose weights are `value`."""
    weight = numpy_helper.from_array(np.full((SIZE, SIZE), value, dtype=np.float32), "weight")
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", SIZE])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", SIZE])
    node = helper.make_node("MatMul", ["x", "weight"], ["logits"], name="product")
    body = helper.make_graph([node], "by hand", [given], [output], [weight])
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write(path: Path, value: float, limit: int = 0) -> None:
    with staged_graph(path) as staged:
        save_graph(graph(value), staged, limit=limit)


def read(path: Path) -> float:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return float(session.run(None, {"x": np.eye(1, SIZE, dtype=np.float32)})[0][0, 0])


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Died(BaseException):
    """The end of a process."""


def die(*_: Any) -> None:
    raise Died


class TestPair:
    def test_one_file_up_to_the_limit_two_beyond(self, tmp_path: Path) -> None:
        write(tmp_path / "one" / "m.onnx", 1.0, limit=4 * SIZE * SIZE)
        write(tmp_path / "two" / "m.onnx", 2.0, limit=4 * SIZE * SIZE - 1)
        assert names(tmp_path / "one") == ["m.onnx"] and names(tmp_path / "two") == ["m.onnx", "m.onnx.data"]
        assert (tmp_path / "two" / "m.onnx.data").stat().st_size >= 4 * SIZE * SIZE
        assert (tmp_path / "two" / "m.onnx").stat().st_size < 1000
        assert (read(tmp_path / "one" / "m.onnx"), read(tmp_path / "two" / "m.onnx")) == (1.0, 2.0)
        assert check_external(tmp_path / "one" / "m.onnx") == frozenset()
        assert check_external(tmp_path / "two" / "m.onnx") == {tmp_path / "two" / "m.onnx.data"}

    def test_each_write_leaves_one_pair(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        for value in (1.0, 2.0, 3.0, 4.0):
            write(path, value)
            assert read(path) == value
            assert len(names(tmp_path)) == 2 and names(tmp_path)[0] == "m.onnx"
        write(path, 5.0, limit=10**6)
        assert read(path) == 5.0 and names(tmp_path) == ["m.onnx"]

    def test_weights_that_others_read_stay(self, tmp_path: Path) -> None:
        shared = graph(1.0)
        onnx.save(shared, tmp_path / "m.onnx", save_as_external_data=True, location="shared.data", size_threshold=0)
        write(tmp_path / "m.onnx", 2.0)
        assert names(tmp_path) == ["m.onnx", "m.onnx.data", "shared.data"]

    def test_another_file_of_that_name_is_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "m.onnx.data").write_bytes(b"somebody else's")
        write(tmp_path / "m.onnx", 2.0)
        assert read(tmp_path / "m.onnx") == 2.0 and (tmp_path / "m.onnx.data").read_bytes() == b"somebody else's"

    def test_what_a_reader_sees_at_every_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "m.onnx"
        write(path, 1.0)
        seen: list[float] = []

        def spied(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                seen.append(read(path))
                result = function(*args, **kwargs)
                seen.append(read(path))
                return result

            return run

        for name in ("link", "replace", "unlink"):
            monkeypatch.setattr(os, name, spied(getattr(os, name)))
        monkeypatch.setattr(Path, "unlink", spied(Path.unlink))
        write(path, 2.0)
        assert len(seen) >= 6 and seen == sorted(seen) and set(seen) == {1.0, 2.0}

    @pytest.mark.parametrize("step", ["link", "replace"])
    def test_a_process_that_is_killed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        path = tmp_path / "m.onnx"
        write(path, 1.0)
        with monkeypatch.context() as patch:  # nobody cleans up after it
            patch.setattr(os, step, die)
            patch.setattr(external_data, "_discard", lambda *_: None)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(Died):
                write(path, 2.0)
        assert read(path) == 1.0
        write(path, 3.0)
        assert read(path) == 3.0

    @pytest.mark.parametrize("step", ["link", "replace"])
    def test_a_process_that_dies_in_between(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        path = tmp_path / "m.onnx"
        write(path, 1.0)
        before = names(tmp_path)
        monkeypatch.setattr(os, step, die)
        with pytest.raises(Died):
            write(path, 2.0)
        assert read(path) == 1.0 and names(tmp_path) == before

    def test_a_file_system_without_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
        for value in (1.0, 2.0, 3.0):
            write(tmp_path / "m.onnx", value)
            assert read(tmp_path / "m.onnx") == value and len(names(tmp_path)) == 2

    def test_another_writer_removes_the_old_weights_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "m.onnx"
        write(path, 1.0)
        look = external_data._identity

        def lose(file: Path) -> tuple[int, int]:
            file.unlink(missing_ok=True)
            return look(file)

        monkeypatch.setattr(external_data, "_identity", lose)
        write(path, 2.0)
        monkeypatch.undo()
        assert read(path) == 2.0

    def test_two_writers_at_once(self, tmp_path: Path) -> None:
        path, failures = tmp_path / "m.onnx", []

        def work(value: float) -> None:
            try:
                for _ in range(10):
                    write(path, value)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(float(value),)) for value in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures and read(path) in (1.0, 2.0, 3.0)
        assert not [name for name in names(tmp_path) if name.endswith(".partial")]


class TestForms:
    @pytest.mark.parametrize("form", ["fp32", "bf16", "fp16", "int8", "int8-static", "int8-weight", "int4"])
    def test_from_a_pair_to_a_pair_and_to_one_file(self, tmp_path: Path, form: Form) -> None:
        source = tmp_path / "a" / "m.onnx"
        write(source, 0.5)
        data = [{"x": torch.randn(4, SIZE)}]
        chained = graph(0.5)
        second = chained.graph.node.add()
        second.CopyFrom(helper.make_node("MatMul", ["hidden", "weight"], ["logits"], name="second"))
        chained.graph.node[0].output[0] = "hidden"
        with staged_graph(source) as staged:
            save_graph(chained, staged, limit=0)
        pair = derive(source, tmp_path / "b" / "m.onnx", form, calibration=data, limit=0)
        single = derive(source, tmp_path / "c" / "m.onnx", form, calibration=data)
        assert names(tmp_path / "b") == ["m.onnx", "m.onnx.data"] and names(tmp_path / "c") == ["m.onnx"]
        assert pair.bytes == file_size(pair.path) and single.bytes == single.path.stat().st_size
        assert read(pair.path) == read(single.path)

    def test_export(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        for _ in range(2):
            path = to_onnx(net, tmp_path / "m.onnx", torch.randn(2, 8), limit=1000)
            assert len(names(tmp_path)) == 2
        x = torch.randn(3, 8)
        logits = ort.InferenceSession(str(path)).run(None, {"input": x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(logits), net(x).detach(), rtol=1e-5, atol=1e-5)


class TestFullDisk:
    def test_export(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save = onnx_ir.save

        def half(model: Any, path: str, **options: Any) -> None:
            save(model, path, **options)
            with open(path, "r+b") as file:
                file.truncate(100)
            full()

        monkeypatch.setattr(onnx_ir, "save", half)
        for limit in (0, 10**9):
            self.refused(
                tmp_path, lambda path, limit=limit: to_onnx(nn.Linear(64, 64), path, torch.randn(2, 64), limit=limit)
            )

    @pytest.mark.parametrize("form", ["fp32", "int8", "fp16", "int4"])
    def test_forms(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
        source = tmp_path / "source.onnx"
        write(source, 0.5)
        monkeypatch.setattr(onnx, "save", full)
        self.refused(tmp_path / "out", lambda path: derive(source, path, form))
        if form == "int8":
            self.refused(tmp_path / "out", lambda path: quantize(source, path))

    def test_the_last_moment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(external_data, "_rename_in_graph", full)
        (tmp_path / "model.onnx.data").write_bytes(b"taken")
        self.refused(tmp_path, lambda path: write(path, 1.0))

    def refused(self, folder: Path, work: Callable[[Path], object]) -> None:
        folder.mkdir(exist_ok=True)
        target = folder / "model.onnx"
        target.write_bytes(b"what was there")
        before = names(folder)
        with pytest.raises(TdError, match=r"cannot be written; where: .*model\.onnx; got: .*No space left"):
            work(target)
        assert names(folder) == before and target.read_bytes() == b"what was there"


class TestOutside:
    """What a graph from elsewhere names is not opened, wherever in it that is."""

    @pytest.mark.parametrize(
        "location", ["../secret", "a/../../secret", "/etc/hostname", "C:\\secret", "..\\secret", "\\\\host\\secret", ""]
    )
    def test_paths_that_leave_the_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
    ) -> None:
        (tmp_path / "secret").write_bytes(bytes(4 * SIZE * SIZE))
        source = self.referring(tmp_path / "in" / "m.onnx", location)
        opened = []
        monkeypatch.setattr(ort, "InferenceSession", lambda *args, **kwargs: opened.append(args))
        for work in (
            lambda: derive(source, tmp_path / "out.onnx", "int8"),
            lambda: quantize(source, tmp_path / "out.onnx"),
            lambda: check_external(source),
            lambda: open_session(source),
            lambda: benchmark({"m": source}, {"x": torch.zeros(1, SIZE)}),
            lambda: check(source, Bars(max_size_mb=1)),
        ):
            with pytest.raises(TdError, match=r"weights outside its directory, which is not read; where: .*m\.onnx"):
                work()
        assert not opened and names(tmp_path) == ["in", "secret"]

    def test_a_link_that_leaves_it(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(bytes(4 * SIZE * SIZE))
        source = self.referring(tmp_path / "in" / "m.onnx", "link.data")
        (tmp_path / "in" / "link.data").symlink_to(tmp_path / "secret")
        with pytest.raises(TdError, match="outside its directory"):
            derive(source, tmp_path / "out.onnx", "int8")

    def test_links_of_the_cache_of_the_hub(self, tmp_path: Path) -> None:
        write(tmp_path / "m.onnx", 2.0)
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
        blobs.mkdir()
        snapshot.mkdir(parents=True)
        for name in ("m.onnx", "m.onnx.data"):
            (tmp_path / name).rename(blobs / f"hash of {name}")
            (snapshot / name).symlink_to(f"../../blobs/hash of {name}")
        assert read(derive(snapshot / "m.onnx", tmp_path / "out.onnx", "bf16").path) == 2.0

    def test_inner_graphs_and_attributes(self, tmp_path: Path) -> None:
        outer = graph(1.0)
        tensor = self.elsewhere("/etc/hostname")
        constant = helper.make_node("Constant", [], ["c"], value=tensor)
        inner = helper.make_graph([constant], "inner", [], [helper.make_tensor_value_info("c", 1, None)])
        outer.graph.node.append(helper.make_node("If", ["yes"], ["unused"], then_branch=inner, else_branch=inner))
        (tmp_path / "m.onnx").write_bytes(outer.SerializeToString())
        with pytest.raises(TdError, match="outside its directory"):
            check_external(tmp_path / "m.onnx")

    @pytest.mark.parametrize("form", ["fp32", "fused", "int8", "bf16"])
    def test_missing_and_truncated(self, tmp_path: Path, form: Form) -> None:
        source = tmp_path / "m.onnx"
        write(source, 1.0)
        data = tmp_path / "m.onnx.data"
        data.write_bytes(data.read_bytes()[:-1])
        for work in (lambda: derive(source, tmp_path / "out.onnx", form), lambda: open_session(source)):
            with pytest.raises(TdError, match=rf"the ONNX file is truncated; where: .*data; got: {4 * SIZE**2 - 1} of"):
                work()
        data.unlink()
        for work in (lambda: derive(source, tmp_path / "out.onnx", form), lambda: open_session(source)):
            with pytest.raises(TdError, match=r"outside the ONNX file are missing; where: .*m\.onnx; got: .*data"):
                work()
        assert names(tmp_path) == ["m.onnx"]

    def elsewhere(self, location: str) -> TensorProto:
        tensor = numpy_helper.from_array(np.ones((SIZE, SIZE), dtype=np.float32), "weight")
        set_external_data(tensor, location, 0, 4 * SIZE * SIZE)
        tensor.ClearField("raw_data")
        return tensor

    def referring(self, path: Path, location: str) -> Path:
        referring = graph(1.0)
        referring.graph.initializer[0].CopyFrom(self.elsewhere(location))
        path.parent.mkdir()
        path.write_bytes(referring.SerializeToString())
        return path
