"""The gate: what holds, what is missed, what cannot be judged; and the files that CI reads. No test times anything."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from graphs import linear_graph, text_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor, nn

from td_plugin.contract import TdError
from td_plugin.export import check_latency
from td_plugin.export.check import check
from td_plugin.export.check_bars import BAR_NAMES, Bars, read_bar_file
from td_plugin.export.check_latency import Timing, latency_results, measure, quantile_interval
from td_plugin.export.check_report import BarResult, CheckReport
from td_plugin.export.cold_start import ColdStart
from td_plugin.export.evaluation import Examples
from td_plugin.export.latency import Conditions, FileLatency, LatencyReport
from td_plugin.export.to_onnx import to_onnx

COLD = ColdStart(load_seconds=0.2, first_seconds=0.1, peak_memory=None)


def timed(model: Any, against: Any = None, *, flops: tuple[float, float] | None = None) -> LatencyReport:
    """What a benchmark would have measured: milliseconds per round."""
    work = flops or (None, None)
    files = [
        FileLatency(name, 100, COLD, tuple((np.asarray(values) / 1e3).tolist()), flops=count)
        for name, values, count in (("model", model, work[0]), ("against", against, work[1]))
        if values is not None
    ]
    return LatencyReport(tuple(files), Conditions(1, 1, 128, len(model), 0, {"cpu": "some"}))


def noisy(middle: float, rounds: int = 200, seed: int = 0) -> np.ndarray:
    return middle * np.exp(np.random.default_rng(seed).normal(0, 0.05, rounds))


class TestIntervals:
    @given(st.integers(1, 400), st.sampled_from([0.5, 0.95, 0.99]))
    @settings(max_examples=60, deadline=None)
    def test_ranks_are_those_of_the_binomial(self, count: int, share: float):
        found = quantile_interval(list(range(count)), share)
        high = int(binom.ppf(0.975, count, share))  # rank high + 1, counted from 1, is the value at high
        if high >= count:
            assert found is None
            return
        low = max(0, int(binom.ppf(0.025, count, share)) - 1)
        assert found is not None and found[1] == high
        assert found[0] == max([k for k in range(count) if binom.cdf(k, count, share) <= 0.025], default=0)
        assert low <= found[0] <= low + 1

    @pytest.mark.parametrize("share", [0.5, 0.95])
    def test_it_covers_the_truth_about_as_often_as_it_says(self, share: float):
        generator = np.random.default_rng(0)
        truth = -math.log(1 - share)  # of an exponential
        draws = generator.exponential(size=(300, 200))
        inside = sum(low <= truth <= high for low, high in (quantile_interval(row, share) for row in draws))
        assert 0.92 <= inside / 300 <= 1


class TestLatencyBars:
    def result(self, name: str, limit: float, *reports: LatencyReport) -> BarResult:
        (found,) = latency_results(Bars(**{name: limit}), reports)
        return found

    @pytest.mark.parametrize("name", ["min_speedup", "min_efficiency", "max_p50_ms", "max_p95_ms", "max_p99_ms"])
    def test_a_bar_at_what_was_measured_holds_and_just_beyond_does_not(self, name: str):
        report = timed(noisy(5, 600), noisy(10, 600, seed=1), flops=(1.0, 1.7))
        found = self.result(name, 1.0, report)
        assert found.compared is not None and found.value is not None
        at = self.result(name, found.compared, report)
        beyond = found.compared * (1 + 1e-6 if name.startswith("min_") else 1 - 1e-6)
        assert at.passed and not self.result(name, beyond, report).passed

    def test_the_end_that_speaks_against_the_file_counts(self):
        report = timed(noisy(5), noisy(10, seed=1))
        speedup = self.result("min_speedup", 1.0, report)
        assert speedup.compared == speedup.low and speedup.low < speedup.value < speedup.high
        p95 = self.result("max_p95_ms", 1.0, report)
        assert p95.compared == p95.high and p95.low <= p95.value <= p95.high
        assert p95.value == pytest.approx(np.percentile(noisy(5), 95))
        unsure = self.result("min_speedup", (speedup.low + speedup.high) / 2, report)
        assert not unsure.passed and "too close to call" in unsure.note
        assert "too close" not in self.result("min_speedup", 3.0, report).note

    def test_noise_does_not_pass(self):
        """A file that is no faster: with the median half of all checks would let it pass as 1.00 times faster."""
        passed = [
            self.result("min_speedup", 1.0, timed(noisy(10, seed=seed), noisy(10, seed=seed + 1000))).passed
            for seed in range(100)
        ]
        assert sum(passed) <= 8

    def test_a_file_better_than_its_bar_by_more_than_the_noise_passes_every_time(self):
        for seed in range(50):
            report = timed(noisy(5, seed=seed), noisy(10, seed=seed + 1000))
            assert all(r.passed for r in latency_results(Bars(min_speedup=1.9, max_p95_ms=6.0), [report]))

    def test_sessions(self):
        calm, loaded = timed(noisy(5), noisy(10, seed=1)), timed(noisy(15, seed=2), noisy(30, seed=3))
        p95 = self.result("max_p95_ms", 6.0, loaded, calm)
        assert p95.passed and p95 == self.result("max_p95_ms", 6.0, calm)  # load only ever adds time
        alone, pooled = self.result("min_speedup", 1.9, calm), self.result("min_speedup", 1.9, loaded, calm)
        assert pooled.high - pooled.low < alone.high - alone.low and "400 rounds" in pooled.note

    def test_efficiency(self):
        report = timed(noisy(5), noisy(10, seed=1), flops=(1.0, 2.0))
        assert self.result("min_efficiency", 0.9, report).value == pytest.approx(1.0, rel=0.02)
        assert "2 times fewer FLOPs" in self.result("min_efficiency", 0.9, report).note

    @pytest.mark.parametrize(
        ("name", "report", "why"),
        [
            ("min_speedup", timed(noisy(5)), "--against"),
            ("min_efficiency", timed(noisy(5), noisy(10)), "FLOPs"),
            ("max_p99_ms", timed(noisy(5, 367)), "p99 needs 368 rounds"),
            ("max_p95_ms", timed(noisy(5, 71)), "p95 needs 72 rounds"),
        ],
    )
    def test_what_cannot_be_judged_is_missed(self, name: str, report: LatencyReport, why: str):
        found = self.result(name, 1e9 if name.startswith("max") else 0.0, report)
        assert not found.judged and not found.passed and found.verdict == "not judged" and why in found.note

    def test_just_enough_rounds(self):
        assert self.result("max_p99_ms", 100, timed(noisy(5, 368))).judged
        assert self.result("max_p95_ms", 100, timed(noisy(5, 72))).judged


class TestMeasure:
    """Which files are timed, how often and when it ends, with a benchmark that answers from a list."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch, graphs: dict[str, Path]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []

        def benchmark(files: dict[str, Path], inputs: dict[str, Tensor], **how: Any) -> LatencyReport:
            made.append({"files": list(files), "inputs": inputs, **how})
            return timed(noisy(10 if len(made) < 3 else 5), noisy(10, seed=1) if "against" in files else None)

        monkeypatch.setattr(check_latency, "benchmark", benchmark)
        return made

    def test_a_miss_is_confirmed_and_a_pass_is_not(self, calls: Any, graphs: dict[str, Path]):
        reports = measure(graphs["small"], graphs["large"], Bars(max_p95_ms=7), Timing(seed=5))
        assert len(reports) == 3 and [call["seed"] for call in calls] == [5, 6, 7]
        assert latency_results(Bars(max_p95_ms=7), reports)[0].passed
        assert all(call["files"] == ["model"] and call["rounds"] == 200 for call in calls)
        calls.clear()
        assert len(measure(graphs["small"], graphs["large"], Bars(max_p50_ms=11, min_speedup=0.9), Timing())) == 1
        assert calls[0]["files"] == ["model", "against"]

    def test_it_gives_up(self, calls: Any, graphs: dict[str, Path]):
        assert len(measure(graphs["small"], None, Bars(max_p50_ms=1), Timing(sessions=2, rounds=300))) == 2
        assert [call["rounds"] for call in calls] == [300, 300]

    def test_rounds_for_a_p99_and_inputs(self, calls: Any, graphs: dict[str, Path]):
        measure(graphs["small"], None, Bars(max_p99_ms=100), Timing(batch=3, sequence=9, threads=2))
        assert calls[0]["rounds"] >= 368 and calls[0]["threads"] == 2
        assert calls[0]["inputs"]["input_ids"].shape == (3, 9)
        mine = {"input_ids": torch.ones(1, 2)}
        measure(graphs["small"], None, Bars(max_p50_ms=100), Timing(inputs=mine))
        assert calls[1]["inputs"] is mine

    def test_nothing_is_timed_without_need(self, calls: Any, graphs: dict[str, Path]):
        assert measure(graphs["small"], None, Bars(max_size_mb=1), Timing()) == ()
        done = timed(noisy(5))
        assert measure(graphs["small"], None, Bars(max_p50_ms=1), Timing(reports=(done,))) == (done,)
        assert calls == []

    def test_refusals(self):
        for name in ("batch", "sequence", "threads", "rounds", "sessions"):
            for value in (0, "8", 1.5, True):
                with pytest.raises(TdError, match=f"at least 1.*{name}"):
                    Timing(**{name: value})
        with pytest.raises(TdError, match="times no file 'model'"):
            Timing(reports=(LatencyReport((), timed([1.0]).conditions),))


class TestBars:
    @pytest.mark.parametrize("value", [-1, math.nan, math.inf, "2", True])
    @pytest.mark.parametrize("name", BAR_NAMES)
    def test_numbers(self, name: str, value: Any):
        with pytest.raises(TdError, match=f"number of at least 0; where: {name}"):
            Bars(**{name: value})

    def test_shares(self):
        with pytest.raises(TdError, match="share of 1.*max_accuracy_drop.*one percent"):
            Bars(max_accuracy_drop=2)

    def test_a_file(self, tmp_path: Path):
        toml, as_json = tmp_path / "bars.toml", tmp_path / "bars.json"
        toml.write_text("# bars\nmin-speedup = 1.5\nmax_size_mb = 40\n")
        as_json.write_text('{"min_speedup": 1.5, "max_size_mb": 40}')
        pytest.importorskip("tomllib")
        assert read_bar_file(toml) == read_bar_file(as_json) == {"min_speedup": 1.5, "max_size_mb": 40}

    @pytest.mark.parametrize(
        ("name", "text", "match"),
        [
            ("bars.toml", "min_speedup = ", "no TOML.*bars.toml"),
            ("bars.json", "{", "no JSON.*bars.json"),
            ("bars.json", "[1]", "holds no keys"),
            ("bars.json", '{"min_speedpu": 2}', "no such key.*bars.json.*min_speedpu.*fix: min_speedup"),
            ("bars.toml", "[latency]\np95 = 3", "no such key.*latency"),
        ],
    )
    def test_refusals(self, name: str, text: str, match: str, tmp_path: Path):
        (tmp_path / name).write_text(text)
        with pytest.raises(TdError, match=match):
            read_bar_file(tmp_path / name)

    def test_no_file(self, tmp_path: Path):
        with pytest.raises(TdError, match="cannot be read.*absent"):
            read_bar_file(tmp_path / "absent.toml")

    def test_python_without_toml(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        import sys

        (tmp_path / "bars.toml").write_text("min_speedup = 2")
        monkeypatch.setitem(sys.modules, "tomllib", None)
        monkeypatch.setitem(sys.modules, "tomli", None)
        with pytest.raises(TdError, match=r"does not read TOML.*tomli.*\.json"):
            read_bar_file(tmp_path / "bars.toml")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two classifiers that disagree on one token in ten, from another exporter."""
    folder = tmp_path_factory.mktemp("graphs")
    table = np.random.default_rng(0).normal(size=(10, 3))
    other = table.copy()
    other[9] = -other[9]
    pair = {"large": table, "small": other}
    return {name: text_graph(folder / f"{name}.onnx", values, per_token=False) for name, values in pair.items()}


def rows(graph: Path, count: int = 40) -> Examples:
    """One token per text; the labels are the answers of `graph`."""
    import onnxruntime

    ids = (torch.arange(count) % 10)[:, None]
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    session = onnxruntime.InferenceSession(str(graph))
    logits = session.run(None, {name: value.numpy() for name, value in feeds.items()})[0]
    return Examples([{**feeds, "labels": torch.tensor(logits.argmax(-1))}])


GOOD = Timing(reports=(timed(noisy(5, 600), noisy(10, 600, seed=1), flops=(1.0, 2.0)),))


class TestCheck:
    def test_all_bars(self, graphs: dict[str, Path]):
        bars = Bars(
            min_speedup=1.8, min_efficiency=0.9, max_p50_ms=6, max_p95_ms=6, max_p99_ms=7, max_size_mb=1,
            max_accuracy_drop=0.1, min_accuracy=0.9, max_difference=1e-6,
        )  # fmt: skip
        small, large = graphs["small"], graphs["large"]
        report = check(small, bars, against=large, data=rows(large), equal_to=small, timing=GOOD)
        assert report.passed and report.missed == () and report.summary == "9 of 9 bars hold"
        found = {result.name: result for result in report.results}
        assert list(found) == [field.name for field in fields(Bars) if field.name in bars.given]
        assert found["max_accuracy_drop"].value == pytest.approx(0.1)  # 0.1 as a difference of binary fractions
        assert found["min_accuracy"].value == pytest.approx(0.9)
        assert found["max_size_mb"].value == graphs["small"].stat().st_size / 1e6
        assert found["max_difference"].value == 0 and "2x16" in found["max_difference"].note
        assert {name: score.value for name, score in report.scores.items()} == {
            "model": pytest.approx(0.9),
            "against": 1,
        }

    @given(st.sampled_from(["max_size_mb", "max_accuracy_drop", "min_accuracy", "max_difference"]))
    @settings(max_examples=8, deadline=None)
    def test_just_beyond_does_not_hold(self, graphs: dict[str, Path], name: str):
        def result(limit: float) -> BarResult:
            (found,) = check(
                graphs["small"],
                Bars(**{name: limit}),
                against=graphs["large"],
                data=rows(graphs["large"]),
                equal_to=graphs["large"],
            ).results
            return found

        value = result(0.5).value
        assert value is not None and value > 0 and result(value).passed
        assert not result(value * (1 + 1e-6 if name == "min_accuracy" else 1 - 1e-6)).passed

    @pytest.mark.parametrize(
        ("bars", "why"),
        [
            (Bars(min_speedup=1), "--against"),
            (Bars(max_accuracy_drop=1), "--data"),
            (Bars(min_accuracy=0), "--data"),
            (Bars(max_perplexity=9), "--data"),
            (Bars(max_difference=9), "--equal-to"),
        ],
    )
    def test_without_what_a_bar_needs_it_is_missed(self, bars: Bars, why: str, graphs: dict[str, Path]):
        report = check(graphs["small"], bars, timing=Timing(reports=(timed(noisy(5)),)))
        assert not report.passed and why in report.results[0].note and "not judged" in str(report)

    def test_bars_of_another_metric(self, graphs: dict[str, Path]):
        data = rows(graphs["small"])
        results = check(graphs["small"], Bars(max_perplexity=9, max_accuracy_drop=0), data=data).results
        assert [result.judged for result in results] == [False, False]
        assert "accuracy" in results[1].note or "accuracy" in results[0].note

    def test_a_difference_of_decimal_fractions(self):
        assert 0.9 - 0.89 > 0.01
        assert BarResult("max_accuracy_drop", 0.01, 0.9 - 0.89, 0.9 - 0.89).passed
        assert not BarResult("max_difference", 0.0, 1e-12, 1e-12).passed

    def test_too_few_rows_to_tell(self, graphs: dict[str, Path]):
        report = check(
            graphs["small"], Bars(max_accuracy_drop=0.1), against=graphs["large"], data=rows(graphs["large"], 20)
        )
        assert report.passed and "20 rows know the drop to ±" in report.results[0].note

    def test_a_file_of_another_exporter_says_what_is_unknown(self, graphs: dict[str, Path]):
        report = check(graphs["small"], Bars(max_size_mb=1))
        assert report.unknown == ("model class", "parameters", "sparsity")
        assert report.facts["precision"] == "fp32" and report.facts["opset"] == "20"
        assert "unknown: model class, parameters, sparsity" in str(report)

    def test_a_file_of_ours_against_its_model(self, tmp_path: Path):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        path = to_onnx(model, tmp_path / "m.onnx", torch.randn(2, 8))
        timing = Timing(inputs={"input": torch.randn(4, 8)})
        report = check(path, Bars(max_difference=1e-5), equal_to=model, timing=timing)
        assert report.passed and report.unknown == () and report.facts["td-plugin.model_class"] == "Sequential"
        model[2].bias.data += 1
        assert check(path, Bars(max_difference=1e-5), equal_to=model, timing=timing).results[0].value == pytest.approx(
            1
        )
        with pytest.raises(TdError, match="no inputs can be made up"):
            check(path, Bars(max_difference=1e-5), equal_to=model)

    def test_sizes_that_an_exporter_fixed(self, tmp_path: Path):
        path = linear_graph(tmp_path / "m.onnx", np.ones((4, 2)), batch=3)
        report = check(path, Bars(max_difference=0), equal_to=path)
        assert report.passed and report.results[0].note == "batches of 3x4"
        free = linear_graph(tmp_path / "n.onnx", np.ones((4, 2)))
        assert check(path, Bars(max_difference=0), equal_to=free).results[0].note == "batches of 3x4"

    def test_the_size_counts_weights_kept_outside(self, tmp_path: Path):
        path = linear_graph(tmp_path / "m.onnx", np.ones((400, 200)))
        split = tmp_path / "split.onnx"
        onnx.save(onnx.load(path), split, save_as_external_data=True, location="split.data")
        assert check(split, Bars(max_size_mb=1)).results[0].value > 0.32
        (tmp_path / "split.data").unlink()
        with pytest.raises(TdError, match=r"split"):
            check(split, Bars(max_size_mb=1))

    def test_refusals(self, graphs: dict[str, Path], tmp_path: Path):
        small = graphs["small"]
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(small.read_bytes()[:100])
        other = linear_graph(tmp_path / "other.onnx", np.ones((4, 2)))
        for work, match in (
            (lambda: check(small, Bars()), "no bar"),
            (lambda: check(tmp_path / "absent.onnx", Bars(max_size_mb=1)), r"no such ONNX file.*absent"),
            (lambda: check(broken, Bars(max_size_mb=1)), r"cannot load.*broken\.onnx"),
            (lambda: check(small, Bars(max_size_mb=1), against=broken), r"cannot load.*broken\.onnx"),
            (lambda: check(small, Bars(max_difference=1), equal_to=broken), r"cannot load.*broken\.onnx"),
            (
                lambda: check(small, Bars(max_difference=1), equal_to=other),
                "needs inputs that were not given: input_ids",
            ),
            (lambda: check(small, Bars(min_accuracy=1), data=Examples([])), "no labelled row"),
            (
                lambda: check(small, Bars(max_p50_ms=1), timing=Timing(inputs={"x": torch.ones(1, 2)})),
                "needs inputs.*got: x",
            ),
        ):
            with pytest.raises(TdError, match=match):
                work()


@pytest.fixture
def mixed(graphs: dict[str, Path]) -> CheckReport:
    """One bar that holds, one that is missed, one that cannot be judged."""
    bars = Bars(min_speedup=1.5, max_p95_ms=1, max_difference=0)
    return check(graphs["small"], bars, against=graphs["large"], data=rows(graphs["large"]), timing=GOOD)


class TestOutcome:
    def test_text(self, mixed: CheckReport):
        text = str(mixed)
        assert "1 of 3 bars hold; missed: max_p95_ms, max_difference" in text
        assert "not judged" in text and "NO" in text and "[" in text and "the end that speaks against" in text
        assert "accuracy 1 on 40 rows" in text and "batch 1, sequence 128" in text

    def test_json(self, mixed: CheckReport):
        found = json.loads(json.dumps(mixed.to_dict()))
        assert [(bar["name"], bar["passed"], bar["judged"]) for bar in found["bars"]] == [
            ("min_speedup", True, True),
            ("max_p95_ms", False, True),
            ("max_difference", False, False),
        ]
        assert found["passed"] is False and found["scores"]["model"]["rows"] == 40

    def test_junit(self, mixed: CheckReport):
        root = ElementTree.fromstring(mixed.junit())
        (suite,) = root.findall("testsuite")
        for element in (root, suite):
            assert [element.get(name) for name in ("tests", "failures", "errors")] == ["3", "1", "1"]
            assert float(element.get("time", "")) > 0
        cases = suite.findall("testcase")
        assert [case.get("name") for case in cases] == ["min_speedup", "max_p95_ms", "max_difference"]
        assert [len(case.findall("failure")) for case in cases] == [0, 1, 0]
        assert [len(case.findall("error")) for case in cases] == [0, 0, 1]
        assert "max_p95_ms 1:" in cases[1].find("failure").get("message")
        assert suite.find("properties/property[@name='precision']").get("value") == "fp32"
        assert suite.get("timestamp") and suite.get("name") == mixed.file

    def test_junit_of_any_text(self):
        result = BarResult("min_accuracy", 0.5, note="not judged: \x00\x1b[31m<&>\ud800 \"'\nß")
        report = CheckReport("a\x01<b>.onnx", (result,), facts={"no\x02te": "\x03"})
        (case,) = ElementTree.fromstring(report.junit().encode()).iter("testcase")
        assert "<&>" in case.find("error").get("message")

    def test_markdown(self, mixed: CheckReport):
        text = mixed.markdown()
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) == 5 and {line.count("|") for line in lines} == {6}
        assert text.startswith("### td-plugin check: **missed**") and text.endswith("\n")
        note = BarResult("min_accuracy", 0.5, note="a | b")
        assert "a \\| b" in CheckReport("m.onnx", (note,)).markdown()
