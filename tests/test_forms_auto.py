"""The choice of a form, by timings that are given: what is taken, why nothing else is, and what is left on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from td_plugin.errors import TdError
from td_plugin.export import auto_form, optimize, to_onnx
from td_plugin.export.auto_form import AUTO_KEY, best_form
from td_plugin.export.auto_report import AutoReport
from td_plugin.export.cold_start import ColdStart
from td_plugin.export.evaluation import Examples, evaluate_onnx
from td_plugin.export.forms import Form
from td_plugin.export.latency import Conditions, FileLatency, LatencyReport
from td_plugin.export.parity import Tolerance

EXAMPLE = {"input": torch.randn(6, 16, generator=torch.Generator().manual_seed(0))}
CANDIDATES: tuple[Form, ...] = ("bf16", "int8", "int8-weight", "int4")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(net(), tmp_path_factory.mktemp("auto") / "model.onnx", EXAMPLE)


class Clock:
    """In place of the measurement: seconds per form, and what was asked to be timed."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = {form.replace("_", "-"): value for form, value in seconds.items()}
        self.asked: list[str] = []

    def __call__(self, files: Mapping[Form, Path], *_: Any) -> LatencyReport:
        self.asked = list(files)
        assert all(file.is_file() for file in files.values())
        noise = np.random.default_rng(0).uniform(0.99, 1.01, (len(files), 60))
        timed = tuple(
            FileLatency(form, 1, ColdStart(0, 0, 0), tuple(self.seconds.get(form, 1.0) * row))
            for form, row in zip(files, noise, strict=True)
        )
        return LatencyReport(timed, Conditions(1, 6, None, 60, 0, {}), notes=("a noisy machine",))


def choose(monkeypatch: pytest.MonkeyPatch, source: Path, target: Path, clock: Clock, **options: Any) -> AutoReport:
    monkeypatch.setattr(auto_form, "measure", clock)
    return best_form(source, target, EXAMPLE, **{"candidates": CANDIDATES, **options})


def stored(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


class TestChoice:
    def test_the_fastest_is_taken(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(fp32=1.0, bf16=1.0, int8_weight=0.8, int8=0.5, int4=0.7)
        report = choose(monkeypatch, source, tmp_path / "m.onnx", clock)
        assert report.form == "int8" and report.path == tmp_path / "m.onnx"
        assert clock.asked == ["fp32", "bf16", "int8-weight", "int8", "int4"]  # the most exact first
        assert "MatMulInteger" in stored(report.path)
        assert report.rejected.keys() == {"fp32", "bf16", "int8-weight", "int4"}
        assert report.rejected["fp32"] == "int8 is 2.00x as fast"
        assert report.rejected["int4"] == "int8 is 1.40x as fast"

    @pytest.mark.parametrize(("seconds", "form"), [(0.98, "fp32"), (1.0, "fp32"), (1.2, "fp32"), (0.9, "int8")])
    def test_a_difference_inside_the_interval_is_no_gain(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, form: Form
    ) -> None:
        report = choose(monkeypatch, source, tmp_path / "m.onnx", Clock(int8=seconds), candidates=["int8"])
        assert report.form == form
        if form == "fp32":
            expected = "no gain over fp32" if seconds <= 1 else "fp32 is 1.20x as fast"
            assert report.rejected == {"int8": expected}
            assert "MatMulInteger" not in stored(report.path)

    def test_of_two_alike_the_more_exact_one_stays(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(int8_weight=0.5, int8=0.495, int4=0.49)
        report = choose(monkeypatch, source, tmp_path / "m.onnx", clock)
        assert report.form == "int8-weight"
        assert report.rejected["int8"] == report.rejected["int4"] == "no gain over int8-weight"

    def test_parity_comes_before_speed(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(int8=0.1, int4=0.1, bf16=0.9)
        strict = {"int8": Tolerance(1e-7, 0), "int4": Tolerance(1e-7, 0)}
        report = choose(monkeypatch, source, tmp_path / "m.onnx", clock, tolerances=strict)
        assert report.form == "bf16" and clock.asked == ["fp32", "bf16"]
        for form in ("int8", "int8-weight", "int4"):
            assert report.rejected[form].startswith("parity: relative difference 0.")
            assert "1e-07 is allowed" in report.rejected[form]

    def test_accuracy_comes_before_speed(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(int8=0.1, int4=0.2, bf16=0.9)
        scores = {"fp32": 0.9, "bf16": 0.905, "int8-weight": float("nan"), "int8": 0.88, "int4": 0.895}
        judged: list[Path] = []

        def accuracy(path: Path) -> float:
            judged.append(path)
            return scores[path.parent.name]

        report = choose(monkeypatch, source, tmp_path / "m.onnx", clock, accuracy=accuracy)
        assert report.form == "int4" and clock.asked == ["fp32", "bf16", "int4"]
        assert report.rejected["int8"] == "accuracy: 0.88 is 0.02 below fp32, 0.01 is allowed"
        assert report.rejected["int8-weight"].startswith("accuracy: nan")
        assert {one.form: one.score for one in report.candidates}["int4"] == 0.895
        assert len(judged) == 5
        report = choose(monkeypatch, source, tmp_path / "m.onnx", clock, accuracy=accuracy, max_drop=0.03)
        assert report.form == "int8"

    def test_a_score_of_a_data_set(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with torch.no_grad():
            labels = net()(EXAMPLE["input"]).argmax(-1)
        data = Examples([{**EXAMPLE, "labels": labels}])
        report = choose(
            monkeypatch, source, tmp_path / "m.onnx", Clock(), accuracy=lambda path: evaluate_onnx(path, data)
        )
        assert {one.form: one.score for one in report.candidates}["fp32"] == 1
        assert report.rejected["int4"].startswith("accuracy: 0.8333 is 0.1667 below fp32")

    def test_what_cannot_be_made_says_why(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        report = choose(monkeypatch, source, tmp_path / "m.onnx", Clock(), candidates=["fused"])
        assert report.form == "fp32" and report.latency is None
        assert report.rejected == {"fused": "written unfused: there is nothing to fuse in this graph"}

    def test_defaults(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock()
        report = choose(monkeypatch, source, tmp_path / "m.onnx", clock, candidates=None)
        assert [one.form for one in report.candidates] == ["fp32", "fused", "int8"]
        report = choose(monkeypatch, source, tmp_path / "m.onnx", clock, candidates=None, calibration=[EXAMPLE])
        assert [one.form for one in report.candidates] == ["fp32", "fused", "int8", "int8-static"]


class TestReport:
    def test_table_and_json(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        report = choose(monkeypatch, source, tmp_path / "m.onnx", Clock(int8=0.5), accuracy=lambda _: 0.75)
        text = str(report)
        for line in ("taken: int8", "not fp32: int8 is 2.00x as fast", "note: a noisy machine"):
            assert line in text.splitlines()
        assert re.search(r"^int8 .* 5\d\d\.\d\d .* 0\.75$", text, re.MULTILINE)
        told = json.loads(json.dumps(report.to_dict()))
        assert told["form"] == "int8" and len(told["candidates"]) == 5

    def test_the_file_says_why_it_is_what_it_is(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for limit in (10**9, 0):
            report = choose(monkeypatch, source, tmp_path / "m.onnx", Clock(int8=0.5), limit=limit)
            noted = ort.InferenceSession(str(report.path)).get_modelmeta().custom_metadata_map
            assert json.loads(noted[AUTO_KEY]) == {"form": "int8", "rejected": report.rejected}
            assert noted["td-plugin.model_class"] == "Sequential" and noted["td-plugin.precision"] == "int8"
            beside = ["m.onnx"] if limit else ["m.onnx", "m.onnx.data"]
            assert sorted(file.name for file in tmp_path.iterdir()) == beside


class TestRefusals:
    def test_nothing_changes(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = tmp_path / "m.onnx"
        target.write_bytes(b"what was there")

        def fail(*_: Any) -> LatencyReport:
            raise TdError("out of time")

        for options, match in [
            ({"candidates": ["int3"]}, "no such form; got: int3"),
            ({"candidates": ["int8-static"]}, "int8-static needs data"),
            ({}, "out of time"),
        ]:
            with pytest.raises(TdError, match=match):
                choose(monkeypatch, source, target, fail, **options)  # type: ignore[arg-type]
        with pytest.raises(TdError, match="another shape"):
            best_form(source, target, {"input": torch.randn(2, 3)})
        with pytest.raises(TdError, match="same file"):
            best_form(source, source, EXAMPLE)
        assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"] and target.read_bytes() == b"what was there"

    def test_a_directory_as_target(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        report = choose(monkeypatch, source, tmp_path, Clock(), candidates=["bf16"])
        assert report.path == tmp_path / "model.onnx" and report.path.is_file()


class TestExport:
    def test_auto(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(int8=0.5)
        monkeypatch.setattr(auto_form, "measure", clock)
        for limit in (10**9, 0):
            path = to_onnx(net(), tmp_path / "m.onnx", EXAMPLE, optimize="auto", limit=limit)
            assert clock.asked == ["fp32", "int8"]  # there is nothing to fuse
            assert "MatMulInteger" in stored(path)
            assert len(list(tmp_path.iterdir())) == (1 if limit else 2)

    def test_a_form(self, tmp_path: Path) -> None:
        path = to_onnx(net(), tmp_path / "m.onnx", EXAMPLE, optimize="int8")
        assert "MatMulInteger" in stored(path) and [file.name for file in tmp_path.iterdir()] == ["m.onnx"]

    def test_a_form_that_is_not_to_be_had(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="written unfused: there is nothing to fuse"):
            path = to_onnx(net(), tmp_path / "m.onnx", EXAMPLE, optimize="fused")
        assert stored(path) == {"Gemm", "Relu"}

    @pytest.mark.parametrize(("form", "match"), [("int3", "no such form; where: opt"), ("int8-static", "needs cal")])
    def test_refused_before_the_export(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, match: str
    ) -> None:
        monkeypatch.setattr(optimize, "derive", None)
        with pytest.raises(TdError, match=match):
            to_onnx(net(), tmp_path / "m.onnx", {"wrong": torch.ones(1)}, optimize=form)
        assert not list(tmp_path.iterdir())
