"""Latency: the statistics against numpy, the order of the runs, and one real benchmark of two files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from td_plugin.contract import TdError
from td_plugin.export.benchmark import benchmark, file_size, interleaved
from td_plugin.export.cold_start import ColdStart
from td_plugin.export.latency import (
    Conditions,
    FileLatency,
    LatencyReport,
    Speedup,
    paired_speedup,
)
from td_plugin.export.to_onnx import to_onnx


def _timings(rounds: int, ratio: float, seed: int = 0) -> tuple[list[float], list[float]]:
    generator = np.random.default_rng(seed)
    load = np.exp(generator.normal(0, 0.5, rounds))  # from outside: hits both runs of a round
    noise = generator.normal(1, 0.02, (2, rounds))
    return list(load * noise[0]), list(load * noise[1] / ratio)


def _report(rounds: int = 50) -> LatencyReport:
    dense, pruned = _timings(rounds, ratio=2.0)
    cold = ColdStart(load_seconds=0.2, first_seconds=0.1, peak_memory=None)
    files = (FileLatency("dense", 100, cold, tuple(dense)), FileLatency("pruned", 50, cold, tuple(pruned)))
    return LatencyReport(files, Conditions(1, 8, None, rounds, 0, {"cpu": "some"}))


class TestSpeedup:
    def test_equals_numpy(self):
        dense, pruned = _timings(100, ratio=1.7)
        speedup = paired_speedup(dense, pruned)
        ratios = np.array(dense) / np.array(pruned)
        picks = np.random.default_rng(1).integers(0, 100, (4000, 100))
        low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
        assert speedup.median == pytest.approx(np.median(ratios))
        assert speedup.low == pytest.approx(low, rel=3e-3)  # another generator: equal but for Monte-Carlo error
        assert speedup.high == pytest.approx(high, rel=3e-3)

    def test_pairing_removes_load_that_separate_medians_keep(self):
        errors = []
        for seed in range(20):
            dense, pruned = _timings(50, ratio=2.0, seed=seed)
            shuffled = list(np.random.default_rng(seed).permutation(pruned))
            errors.append([abs(paired_speedup(dense, other).median - 2) for other in (pruned, shuffled)])
        paired, unpaired = np.max(errors, axis=0)
        assert paired < 0.05 < unpaired

    def test_interval_covers_the_truth_about_as_often_as_it_says(self):
        inside = 0
        for seed in range(100):
            speedup = paired_speedup(*_timings(60, ratio=1.5, seed=seed), seed=seed)
            inside += speedup.low <= 1.5 <= speedup.high
        assert inside >= 88

    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [
            (1.2, 1.4, "faster"),
            (0.6, 0.8, "slower"),
            (0.9, 1.4, "no difference"),
            (1.01, 1.02, "no difference"),  # less than two sessions of one file differ by
            (0.98, 0.99, "no difference"),
        ],
    )
    def test_verdict(self, low: float, high: float, verdict: str):
        assert Speedup((low + high) / 2, low, high).verdict == verdict

    @given(st.integers(1, 40), st.floats(0.1, 10), st.integers(0, 100))
    @settings(max_examples=10, deadline=None)
    def test_swapping_inverts(self, rounds: int, ratio: float, seed: int):
        dense, pruned = _timings(2 * rounds - 1, ratio, seed)  # odd: the median is one of the ratios
        there, back = paired_speedup(dense, pruned), paired_speedup(pruned, dense)
        assert there.median == pytest.approx(1 / back.median)
        assert there.low <= there.median <= there.high

    def test_seeded(self):
        timings = _timings(30, 1.3)
        assert paired_speedup(*timings, seed=1) == paired_speedup(*timings, seed=1) != paired_speedup(*timings, seed=2)

    def test_other_rounds(self):
        with pytest.raises(TdError, match="same rounds"):
            paired_speedup([1.0, 2.0], [1.0])


class TestOrder:
    @given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 1000))
    @settings(max_examples=30, deadline=None)
    def test_each_file_takes_each_place_equally_often(self, files: int, blocks: int, seed: int):
        names = [str(i) for i in range(files)]
        orders = interleaved(names, files * blocks, seed)
        assert all(sorted(order) == names for order in orders)
        for place in range(files):
            assert Counter(order[place] for order in orders) == dict.fromkeys(names, blocks)

    def test_random_and_seeded(self):
        names = ["a", "b"]
        orders = interleaved(names, 101, 0)
        assert len(orders) == 101
        assert orders == interleaved(names, 101, 0) != interleaved(names, 101, 1)
        blocks = {tuple(orders[i : i + 2]) for i in range(0, 100, 2)}
        assert len(blocks) == 2  # the pairs come in both directions: no pattern to lock on


class TestReport:
    def test_percentiles_and_throughput_equal_numpy(self):
        report = _report()
        seconds = report.files[0].seconds
        for percent in (50, 90, 99):
            assert report.files[0].percentile(percent) == pytest.approx(np.percentile(seconds, percent))
        assert report.throughput("dense") == pytest.approx(8 / np.median(seconds))

    def test_speedup_by_name(self):
        report = _report()
        assert report.speedup("pruned", over="dense").median == pytest.approx(2, rel=0.02)
        with pytest.raises(TdError, match=r"no such file.*dense"):
            report.speedup("prunde", over="dense")

    def test_p99_of_few_rounds_is_marked(self):
        few, many = _report(50), _report(200)
        assert "~" in str(few) and "~" not in str(many)
        assert not few.to_dict()["files"][0]["p99_reliable"]
        assert many.to_dict()["files"][0]["p99_reliable"]

    def test_json(self):
        values = json.loads(json.dumps(_report().to_dict()))
        assert values["speedups"][0]["verdict"] == "faster"
        assert values["files"][1]["p50_seconds"] > 0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    wide, narrow = (nn.Sequential(nn.Linear(256, n), nn.ReLU(), nn.Linear(n, 10)) for n in (4000, 160))
    example = torch.randn(4, 256)
    return {"dense": to_onnx(wide, folder / "d.onnx", example), "pruned": to_onnx(narrow, folder / "p.onnx", example)}


INPUTS = {"input": torch.randn(16, 256), "labels": torch.zeros(16)}


class TestBenchmark:
    def test_a_model_25_times_smaller_is_faster(self, files: dict[str, Path]):
        report = benchmark(files, INPUTS, rounds=30)
        speedup = report.speedup("pruned", over="dense")
        assert speedup.median > 2 and speedup.verdict == "faster"
        dense, pruned = report.files
        assert len(dense.seconds) == len(pruned.seconds) == 30
        assert dense.bytes == files["dense"].stat().st_size > 20 * pruned.bytes
        assert dense.cold.load_seconds > 0 and dense.cold.first_seconds > 0
        if dense.cold.peak_memory is not None:  # Linux: the weights at least, and nothing like torch's own memory
            assert dense.bytes < dense.cold.peak_memory < 10 * dense.bytes + 50e6
        text = str(report)
        assert all(word in text for word in ("dense", "pruned", "p50", "p99", "faster", "batch 16", "threads 1"))
        json.dumps(report.to_dict())

    def test_arrays_in_place_of_tensors_and_a_bar(self, files: dict[str, Path], capsys: pytest.CaptureFixture[str]):
        inputs = {name: tensor.numpy() for name, tensor in INPUTS.items()}
        benchmark({"only": files["pruned"]}, inputs, rounds=2, progress=True)
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, "needs inputs that were not given: input"),
            ({"input": torch.zeros(1, 256).double()}, "'input' has another dtype.*float64.*tensor\\(float\\)"),
            ({"input": torch.zeros(256)}, "'input' has another shape.*256"),
            ({"input": torch.zeros(1, 255)}, "'input' has another shape.*255"),
        ],
    )
    def test_inputs_that_do_not_fit(self, files: dict[str, Path], inputs: dict[str, torch.Tensor], message: str):
        with pytest.raises(TdError, match=message):
            benchmark(files, inputs)

    def test_missing_file(self, tmp_path: Path):
        with pytest.raises(TdError, match=r"no such ONNX file.*absent\.onnx"):
            benchmark({"a": tmp_path / "absent.onnx"}, INPUTS)

    def test_no_rounds(self, files: dict[str, Path]):
        with pytest.raises(TdError, match="nothing to time"):
            benchmark(files, INPUTS, rounds=0)

    def test_size_counts_weights_kept_outside(self, files: dict[str, Path], tmp_path: Path):
        import onnx

        split = tmp_path / "split.onnx"
        onnx.save(onnx.load(files["dense"]), split, save_as_external_data=True, location="split.data")
        assert split.stat().st_size < 10_000
        assert file_size(split) == split.stat().st_size + (tmp_path / "split.data").stat().st_size
