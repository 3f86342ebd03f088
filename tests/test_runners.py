"""Providers, other runtimes, throughput and cold starts: on tiny graphs, with stand-ins for what is not installed."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from td_plugin.contract import TdError
from td_plugin.export.benchmark import benchmark
from td_plugin.export.cold_start import cold_start
from td_plugin.export.engines import Engine, onnxruntime_session
from td_plugin.export.operator_profile import profile_operators
from td_plugin.export.repeats import repeat
from td_plugin.export.runners import Form, available_providers, make_runner
from td_plugin.export.session import open_session
from td_plugin.export.throughput import Load, ThroughputReport, ThroughputRow, _serve, _slice, throughput
from td_plugin.export.to_onnx import to_onnx

INPUTS = {"input": torch.randn(4, 64)}

# The part of openvino's interface that is used, computed by onnxruntime.
OPENVINO = """
import json
import os
import threading

import onnxruntime


class Request:
    def __init__(self, session):
        self.session, self.thread = session, threading.get_ident()

    def infer(self, feeds):
        assert self.thread == threading.get_ident(), "a request is not for two threads"
        return dict(enumerate(self.session.run(None, feeds)))


class Compiled:
    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def create_infer_request(self):
        return Request(self.session)


class Core:
    def compile_model(self, path, device, config):
        if "bad" in path:
            raise RuntimeError("Check failed at frontend.cpp:1\\nmore")
        with open(os.environ["FAKE_OPENVINO_LOG"], "a") as log:
            log.write(json.dumps([device, config]) + "\\n")
        return Compiled(path)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    nets = {
        name: nn.Sequential(nn.Linear(64, n), nn.ReLU(), nn.Linear(n, 8)) for name, n in (("dense", 512), ("small", 32))
    }
    return {name: to_onnx(net, folder / f"{name}.onnx", INPUTS["input"]) for name, net in nets.items()}


@pytest.fixture
def openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package openvino, for this process and those that it starts; the result is the log of what it was asked."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "openvino.py").write_text(OPENVINO)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_OPENVINO_LOG", str(tmp_path / "log"))
    importlib.invalidate_caches()
    yield tmp_path / "log"
    sys.modules.pop("openvino", None)


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["AzureExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr("td_plugin.export.runners.importlib.util.find_spec", lambda name: None)


class TestProviders:
    @pytest.mark.usefixtures("cpu_only")
    @pytest.mark.parametrize("name", ["cuda", "TensorRT", "openvino", "CUDAExecutionProvider", "npu"])
    def test_those_absent_are_refused_with_those_present(self, files: dict[str, Path], name: str) -> None:
        assert available_providers() == ("cpu", "AzureExecutionProvider")
        with pytest.raises(TdError, match=rf"not installed.*got: {name}.*one of cpu, Azure"):
            make_runner(Form(files["dense"], name), [INPUTS])

    def test_full_names_and_capitals(self, files: dict[str, Path]) -> None:
        for name in ("CPU", "CPUExecutionProvider"):
            assert make_runner(Form(files["dense"], name), [INPUTS]).engine.provider == "CPUExecutionProvider"

    def test_one_that_is_there_but_does_not_start(
        self, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """onnxruntime goes on with the CPU when CUDA's libraries are missing; a timing of that would be a lie."""
        asked: list[Any] = []
        real = ort.InferenceSession

        def fallen_back(path: str, options: Any, providers: Any) -> Any:
            asked.append(providers)
            return real(path, options, providers=["CPUExecutionProvider"])

        monkeypatch.setattr(ort, "InferenceSession", fallen_back)
        gpu = ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
        monkeypatch.setattr(ort, "get_available_providers", lambda: gpu)
        engine = Engine(str(files["dense"]), provider=gpu[0], options={"trt_fp16_enable": "1"})
        with pytest.raises(RuntimeError, match="could not be started"):
            onnxruntime_session(engine)
        assert asked == [[(gpu[0], {"trt_fp16_enable": "1"}), (gpu[1], {})]]
        with pytest.raises(TdError, match=r"cannot load.*CUDAExecutionProvider lacks a library"):
            open_session(files["dense"], provider="CUDAExecutionProvider")

    def test_a_form_in_one_word(self, tmp_path: Path) -> None:
        assert Form.parse("a/b.onnx") == Form("a/b.onnx")
        assert Form.parse("a@b/c.onnx@openvino") == Form("a@b/c.onnx", "openvino")
        assert Form.parse("c.onnx@CPUExecutionProvider") == Form("c.onnx", "CPUExecutionProvider")
        assert Form.parse("a@b.onnx") == Form("a@b.onnx")
        (tmp_path / "m@cpu").write_text("")
        assert Form.parse(str(tmp_path / "m@cpu")) == Form(str(tmp_path / "m@cpu"))


class TestOpenVino:
    def test_a_row_beside_onnxruntime(self, files: dict[str, Path], openvino: Path) -> None:
        assert "openvino" in available_providers()
        forms = {"onnxruntime": files["dense"], "openvino": Form(files["dense"], "openvino", {"NUM_STREAMS": "1"})}
        report = benchmark(forms, INPUTS, rounds=3)
        assert [file.provider for file in report.files] == ["CPUExecutionProvider", "openvino"]
        assert report.files[1].flops == report.files[0].flops
        assert "openvino (openvino)" in str(report)
        device, config = json.loads(openvino.read_text().splitlines()[0])
        assert device == "CPU" and config["INFERENCE_PRECISION_HINT"] == "f32" and config["INFERENCE_NUM_THREADS"] == 1
        load = throughput(forms, INPUTS, Load(workers=3, slices=2, slice_seconds=0.02))
        assert [row.name for row in load.rows] == list(forms)
        assert [form.name for form in profile_operators(forms, INPUTS, runs=1).forms] == ["onnxruntime"]
        with pytest.raises(TdError, match="no file here runs in onnxruntime"):
            profile_operators({"openvino": forms["openvino"]}, INPUTS)

    def test_its_errors(self, files: dict[str, Path], openvino: Path, tmp_path: Path) -> None:
        bad = tmp_path / "bad.onnx"
        bad.write_bytes(files["dense"].read_bytes())
        with pytest.raises(TdError, match=r"openvino cannot load.*bad\.onnx.*Check failed at frontend"):
            benchmark({"bad": Form(bad, "openvino")}, INPUTS)
        with pytest.raises(TdError, match="'input' has another shape"):
            benchmark({"wrong": Form(files["dense"], "openvino")}, {"input": torch.zeros(1, 3)})


class TestColdStart:
    def test_any_name_of_an_input(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def forward(self, file: torch.Tensor) -> torch.Tensor:  # a parameter of numpy.savez is called so
                return file * 2

        path = to_onnx(Net(), tmp_path / "m.onnx", torch.randn(2, 3))
        cold = cold_start(Engine(str(path)), {"file": np.zeros((1, 3), np.float32)})
        assert cold.load_seconds > 0 and cold.first_seconds > 0
        assert cold.peak_memory is None or 0 <= cold.peak_memory < 100e6

    def test_a_process_that_fails(self, files: dict[str, Path]) -> None:
        with pytest.raises(TdError, match=r"process of its own.*dense\.onnx.*exit code 1"):
            cold_start(Engine(str(files["dense"])), {"input": np.zeros((1, 3), np.float32)})


class TestThroughput:
    def test_two_files_on_two_examples(self, files: dict[str, Path]) -> None:
        load = Load(workers=2, slices=4, slice_seconds=0.03)
        examples = [INPUTS, {"input": torch.randn(2, 64)}]
        report = throughput(files, examples, load, progress=True)
        assert report.batch == 4
        for row in report.rows:
            assert len(row.rates) == 4 and min(row.rates) > 0
            assert len(row.seconds) >= 8 and min(row.seconds) > 0
        assert "requests/s" in str(report) and "2 workers" in str(report)
        json.dumps(report.to_dict())

    def test_a_worker_sends_one_request_after_the_other_until_the_slice_is_over(self) -> None:
        now, answered = [5.0], []

        def execute(feeds: Any) -> None:
            answered.append(feeds["x"])
            now[0] += 0.02

        load = Load(workers=1, slice_seconds=0.05)
        taken = _serve(execute, ({"x": 0}, {"x": 1}), threading.Barrier(1), load, lambda: now[0])
        assert taken == pytest.approx([0.02] * 3) and answered == [0, 1, 0]
        with ThreadPoolExecutor(3) as pool:
            rate, seconds = _slice(pool, lambda feeds: time.sleep(0.01), ({},), Load(workers=3, slice_seconds=0.05))
        assert 0 < rate <= 300 and min(seconds) >= 0.01 and len(seconds) >= 3  # three at a time, each 10 ms at least

    def test_statistics_equal_numpy(self) -> None:
        generator = np.random.default_rng(0)
        dense, small = generator.uniform(90, 110, 30), generator.uniform(180, 220, 30)
        seconds = tuple(generator.uniform(0.01, 0.02, 500))
        rows = (ThroughputRow("dense", tuple(dense), seconds), ThroughputRow("small", tuple(small), seconds))
        report = ThroughputReport(rows, Load(), batch=8)
        assert rows[0].rate == pytest.approx(np.median(dense))
        assert rows[0].percentile(90) == pytest.approx(np.percentile(seconds, 90))
        gain = report.gain("small", over="dense")
        assert gain.median == pytest.approx(np.median(small / dense)) and gain.verdict == "faster"
        values = report.to_dict()["files"]
        assert values[1]["items_per_second"] == pytest.approx(8 * np.median(small))
        assert values[0]["gain"] is None and values[1]["gain"]["median"] == gain.median
        with pytest.raises(TdError, match="no such file"):
            report.gain("smal", over="dense")

    @pytest.mark.parametrize("wrong", [{"workers": 0}, {"threads": 0}, {"slices": 0}, {"slice_seconds": 0.0}])
    def test_no_load(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(TdError, match="no load"):
            Load(**wrong)

    def test_a_graph_that_cannot_run(self, files: dict[str, Path]) -> None:
        with pytest.raises(TdError, match="another shape"):
            throughput(files, {"input": torch.zeros(1, 3)}, Load(slices=1))


def test_repeats_name_what_disagrees(files: dict[str, Path]) -> None:
    again = repeat(lambda seed: benchmark(files, INPUTS, rounds=5, seed=seed), times=2)
    assert [report.conditions.seed for report in again.reports] == [0, 1]
    one, two = again.speedups["small"]
    assert again.disagreement["small"] == pytest.approx(max(one, two) / min(one, two) - 1)
    assert again.agree == (again.disagreement["small"] <= 0.03)
    assert f"within 3%: {'yes' if again.agree else 'no'}" in str(again) and "run 2" in str(again)
    assert len(json.loads(json.dumps(again.to_dict()))["reports"]) == 2
