"""Latency: the statistics against numpy, the order of the runs, and one real benchmark of two files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from td_plugin.contract import TdError
from td_plugin.export.benchmark import benchmark, file_size
from td_plugin.export.cold_start import ColdStart
from td_plugin.export.latency import (
    Conditions,
    FileLatency,
    LatencyReport,
    Speedup,
    paired_speedup,
)
from td_plugin.export.lengths import at_lengths
from td_plugin.export.runners import Form
from td_plugin.export.timing import interleaved
from td_plugin.export.to_onnx import to_onnx


def _timings(rounds: int, ratio: float, seed: int = 0) -> tuple[list[float], list[float]]:
    generator = np.random.default_rng(seed)
    load = np.exp(generator.normal(0, 0.5, rounds))  # from outside: hits both runs of a round
    noise = generator.normal(1, 0.02, (2, rounds))
    return list(load * noise[0]), list(load * noise[1] / ratio)


def _report(rounds: int = 50, flops: tuple[float | None, float | None] = (None, None)) -> LatencyReport:
    dense, pruned = _timings(rounds, ratio=2.0)
    cold = ColdStart(load_seconds=0.2, first_seconds=0.1, peak_memory=None)
    files = (
        FileLatency("dense", 100, cold, tuple(dense), flops=flops[0]),
        FileLatency("pruned", 50, cold, tuple(pruned), flops=flops[1]),
    )
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

    @given(st.lists(st.tuples(*[st.floats(1e-6, 1e3)] * 2), min_size=1, max_size=30))
    @settings(max_examples=30, deadline=None)
    def test_no_difference_is_ever_called_one(self, pairs: list[tuple[float, float]]):
        speedup = paired_speedup(*zip(*pairs, strict=True))
        assert speedup.low <= speedup.median <= speedup.high
        if speedup.low <= 1 <= speedup.high:
            assert speedup.verdict == "no difference"
        assert (speedup.verdict == "faster") == (speedup.low > 1.03)

    def test_a_file_against_itself(self):
        verdicts = Counter(paired_speedup(*_timings(60, 1.0, seed), seed=seed).verdict for seed in range(60))
        assert verdicts == {"no difference": 60}

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

    def test_p99_takes_200_rounds(self):
        few, many = _report(199), _report(200)
        assert "no p99" in str(few) and "no p99" not in str(many)
        entry = few.to_dict()["files"][0]
        assert entry["p99_seconds"] is None and not entry["p99_reliable"]
        entry = many.to_dict()["files"][0]
        assert entry["p99_seconds"] == pytest.approx(np.percentile(many.files[0].seconds, 99)) and entry["p99_reliable"]

    def test_efficiency_is_speedup_over_flop_ratio(self):
        report = _report(flops=(3000.0, 1200.0))
        speedup, efficiency = report.speedup("pruned", "dense"), report.efficiency("pruned", over="dense")
        assert efficiency.flop_ratio == 2.5
        for end in ("median", "low", "high"):
            assert getattr(efficiency, end) == getattr(speedup, end) / 2.5
        assert "2.50x fewer FLOPs" in str(report)
        assert report.to_dict()["speedups"][0]["efficiency"]["median"] == efficiency.median
        unknown = _report(flops=(3000.0, None))
        assert "FLOPs" not in str(unknown) and unknown.to_dict()["speedups"][0]["efficiency"] is None
        with pytest.raises(TdError, match=r"FLOPs are not known.*pruned"):
            unknown.efficiency("pruned", over="dense")

    def test_what_the_caller_adds_is_about_files_of_the_report(self):
        report = _report().with_results(accuracy={"dense": 0.9})
        assert report.to_dict()["files"][0]["accuracy"] == 0.9 and report.to_dict()["files"][1]["accuracy"] is None
        assert "0.9000" in str(report)
        with pytest.raises(TdError, match="prunde"):
            report.with_results(accuracy={"prunde": 0.9})

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
        assert [file.flops for file in report.files] == [2 * 16 * n * (256 + 10) for n in (4000, 160)]
        assert report.efficiency("pruned", over="dense").flop_ratio == 25
        assert report.widths == {"pruned": {"0": (4000, 160)}}
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
        report = benchmark({"only": files["pruned"]}, inputs, rounds=2, progress=True)
        assert "only" in str(report) and report.to_dict()["speedups"] == []
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

    @pytest.mark.parametrize("wrong", [{"rounds": 0}, {"rounds": (20, 10)}, {"threads": 0}])
    def test_nothing_to_time(self, files: dict[str, Path], wrong: dict[str, Any]):
        with pytest.raises(TdError, match="nothing to time"):
            benchmark(files, INPUTS, **wrong)
        with pytest.raises(TdError, match="nothing to time"):
            benchmark({}, INPUTS)

    def test_a_truncated_file(self, files: dict[str, Path], tmp_path: Path):
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(files["pruned"].read_bytes()[:5000])
        with pytest.raises(TdError, match=r"broken\.onnx"):
            benchmark({"dense": files["dense"], "broken": broken}, INPUTS, rounds=2)

    def test_weights_kept_outside_are_missing(self, files: dict[str, Path], tmp_path: Path):
        import onnx

        split = tmp_path / "split.onnx"
        onnx.save(onnx.load(files["dense"]), split, save_as_external_data=True, location="split.data")
        (tmp_path / "split.data").unlink()
        for work in (lambda: benchmark({"split": split}, INPUTS, rounds=2), lambda: file_size(split)):
            with pytest.raises(TdError, match=r"outside the ONNX file are missing.*split\.onnx.*split\.data"):
                work()

    def test_several_examples_of_other_sizes(self, files: dict[str, Path]):
        examples = [{"input": torch.randn(rows, 256)} for rows in (1, 2, 6)]
        report = benchmark({name: Form(path) for name, path in files.items()}, examples, rounds=6)
        assert report.files[0].flops == 2 * 3 * 4000 * (256 + 10)  # the mean number of rows is 3
        with pytest.raises(TdError, match=r"another shape.*d\.onnx, example 1"):
            benchmark(files, [examples[0], {"input": torch.randn(1, 3)}])
        with pytest.raises(TdError, match="no example inputs"):
            benchmark(files, [])

    def test_between_the_least_and_the_most_rounds(self, files: dict[str, Path]):
        report = benchmark(files, INPUTS, rounds=(4, 8), seed=3)
        assert 4 <= report.conditions.rounds <= 8
        assert {len(file.seconds) for file in report.files} == {report.conditions.rounds}

    def test_another_provider_is_refused(self, files: dict[str, Path]):
        with pytest.raises(TdError, match=r"provider is not installed.*cuda.*one of cpu"):
            benchmark({"dense": files["dense"], "gpu": Form(files["dense"], "cuda")}, INPUTS)

    def test_size_counts_weights_kept_outside(self, files: dict[str, Path], tmp_path: Path):
        import onnx

        split = tmp_path / "split.onnx"
        onnx.save(onnx.load(files["dense"]), split, save_as_external_data=True, location="split.data")
        assert split.stat().st_size < 10_000
        assert file_size(split) == split.stat().st_size + (tmp_path / "split.data").stat().st_size


EXAMPLE = {"input_ids": torch.arange(1, 13).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


class TestLengths:
    def test_drawn_evenly_from_the_given_ones(self):
        lengths = list(np.random.default_rng(0).integers(1, 60, 1000))
        examples = at_lengths(EXAMPLE, [int(length) for length in lengths], draws=40)
        drawn = sorted(example["input_ids"].shape[1] for example in examples)
        assert all(len(example["input_ids"]) == 1 and set(example) == set(EXAMPLE) for example in examples)
        middles = np.sort(lengths)[12::25]  # of each of 40 parts of 25
        assert np.abs(np.array(drawn) - middles).max() <= 3
        assert [e["input_ids"].shape for e in at_lengths(EXAMPLE, lengths, seed=1)] != [
            e["input_ids"].shape for e in at_lengths(EXAMPLE, lengths, seed=2)
        ]

    def test_a_batch_is_padded_to_its_longest_text(self):
        (example,) = at_lengths(EXAMPLE, [3, 8, 5], batch=3, draws=9)
        assert example["input_ids"].shape == (3, 8)
        assert sorted(example["attention_mask"].sum(1).tolist()) == [3, 5, 8]
        assert bool((example["attention_mask"].diff(dim=1) <= 0).all())  # the padding is on the right
        assert example["input_ids"][0].tolist() == [1, 2, 3, 4, 5, 6, 1, 2]

    def test_what_has_no_length(self):
        with pytest.raises(TdError, match="no input is a text"):
            at_lengths({"pixel_values": torch.zeros(1, 3, 4, 4)}, [4])
        for lengths, batch in (([], 1), ([0, 3], 1), ([3], 0)):
            with pytest.raises(TdError, match="1 at least"):
                at_lengths(EXAMPLE, lengths, batch=batch)
