"""A latency report on disk: what is written can be read back, and the page stands alone and takes any name."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from td_plugin.contract import TdError
from td_plugin.export.cold_start import ColdStart
from td_plugin.export.latency import Conditions, FileLatency, LatencyReport
from td_plugin.export.operators import FormProfile, OperatorReport, OperatorTime
from td_plugin.export.report_files import COLUMNS
from td_plugin.export.svg import distributions, paired_bars
from td_plugin.export.throughput import Load, ThroughputReport, ThroughputRow

DENSE, PRUNED, LAYER = "dense & <b>large</b>", '"pruned" $x_1$ <script>alert(1)</script>', "encoder.<i>0</i>"
VOID = {"meta", "rect", "line", "path"}


def report(rounds: int = 200, dense: str = DENSE, pruned: str = PRUNED) -> LatencyReport:
    generator = np.random.default_rng(0)
    load, noise = np.exp(generator.normal(0, 0.2, rounds)), generator.normal(1, 0.01, rounds)
    cold = ColdStart(0.2, 0.1, 50_000_000)
    files = (
        FileLatency(dense, 4_000_000, cold, tuple(0.02 * load * noise), flops=2e9),
        FileLatency(pruned, 1_000_000, cold, tuple(0.01 * load), provider="openvino"),
    )
    facts = {"cpu": "Some CPU <tm>", "onnxruntime": "1.32.0"}
    return LatencyReport(files, Conditions(1, 8, 128, rounds, 3, facts, sessions=4), notes=("noisy <machine>",))


def full(**names: str) -> LatencyReport:
    bare = report(**names)
    dense, pruned = (file.name for file in bare.files)
    rows = (ThroughputRow(dense, (10.0, 11.0), (0.1, 0.2)), ThroughputRow(pruned, (20.0, 22.0), (0.05, 0.1)))
    times = OperatorTime("MatMul <op>", 0.01, 0.5, 3), OperatorTime("Add", 0.01, 0.5, 3)
    forms = tuple(FormProfile(name, 0.02, times, flops) for name, flops in ((dense, 2000), (pruned, 1000)))
    return bare.with_results(
        load=ThroughputReport(rows, Load(), batch=8),
        operators=OperatorReport(forms, threads=1, runs=5),
        accuracy={dense: 0.91, pruned: 0.885},
        widths={pruned: {LAYER: (3072, 1536), "plain": (768, 16)}},
    )


class Page(HTMLParser):
    """Tags, attributes and text; every tag has to be closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


class TestHtml:
    def test_it_stands_alone_and_says_everything(self, tmp_path: Path) -> None:
        target = full().to_html(tmp_path / "page.html", title="Comparison <1>")
        source = target.read_text(encoding="utf-8")
        page = Page(source)
        assert page.open == []
        assert not set(page.tags) & {"script", "link", "img", "iframe", "object", "embed", "a", "b", "i"}
        assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
        assert "http" not in source and "url(" not in source and "@import" not in source
        for words in (DENSE, PRUNED, LAYER, "Comparison <1>", "noisy <machine>", "Some CPU <tm>", "MatMul <op>"):
            assert words in page.text
        for words in (
            "faster",
            "2.00×",
            "p99 ms",
            "0.9100",
            "3,072 → 1,536",
            "1.32.0",
            "openvino",
            "requests/s",
            "seed 3",
        ):
            assert words in page.text
        assert page.tags.count("svg") == 2
        assert list(tmp_path.iterdir()) == [target]

    def test_what_is_not_there_is_left_out(self, tmp_path: Path) -> None:
        bare = report(rounds=50)
        page = Page(LatencyReport(bare.files[:1], bare.conditions).to_html(tmp_path / "p.html").read_text("utf-8"))
        assert "Nothing to compare" in page.text and "it takes 200 rounds" in page.text
        for words in ("accuracy", "concurrent", "Where the time goes", "Widths"):
            assert words not in page.text

    def test_a_failed_write_leaves_the_old_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = report().to_html(tmp_path / "p.html")
        before = target.read_bytes()

        def full_disk(self: Path, *_: Any, **__: Any) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full_disk)
        for write in (report().to_html, report().to_json):
            with pytest.raises((OSError, TdError), match="No space"):
                write(target)
        assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]

    def test_a_folder_in_the_way(self, tmp_path: Path) -> None:
        for write in (report().to_html, report().to_json, report().to_csv, report().to_png):
            with pytest.raises(TdError, match="a directory is there"):
                write(tmp_path)


class TestPictures:
    def test_a_hill_per_file_with_its_percentiles(self) -> None:
        seconds = {"a": [0.010, 0.011, 0.012], "b": [0.1] * 5}
        page = Page(distributions(seconds))
        assert page.tags.count("path") == 2
        assert "p50 11.00 ms" in page.text and "p90 11.80 ms" in page.text and "p50 100.00 ms" in page.text
        assert Page(distributions({"one": [1e-6]})).tags.count("path") == 1

    def test_bars_are_in_proportion(self) -> None:
        page = Page(paired_bars({"a": (100, 25), "b": (50, 50)}))
        widths = [float(value or 0) for name, value in page.attributes if name == "width"][1:]
        assert widths[1] == pytest.approx(widths[0] / 4, abs=0.1)
        assert widths[2] == widths[3] == pytest.approx(widths[0] / 2, abs=0.1)

    def test_long_names_are_cut_at_the_front_and_kept_whole_in_the_tooltip(self) -> None:
        name = "transformer.encoder.layers.11.attention.output.dense"
        page = Page(paired_bars({name: (4, 2)}))
        assert name in page.text and "…" in page.text

    def test_png(self, tmp_path: Path) -> None:
        with Image.open(full().to_png(tmp_path / "p.png")) as picture:
            assert picture.format == "PNG" and picture.width > 800


class TestData:
    def test_json_is_the_dictionary(self, tmp_path: Path) -> None:
        whole = full()
        values = json.loads(whole.to_json(tmp_path / "r.json").read_text("utf-8"))
        assert values == json.loads(json.dumps(whole.to_dict()))
        assert values["files"][0]["seconds"] == list(whole.files[0].seconds)
        assert values["speedups"][0]["median"] == whole.speedup(PRUNED, DENSE).median
        assert values["notes"] == ["noisy <machine>"] and "note: noisy <machine>" in str(whole)
        assert values["widths"][PRUNED][LAYER] == [3072, 1536]

    def test_csv_holds_one_line_per_file(self, tmp_path: Path) -> None:
        whole = full()
        with whole.to_csv(tmp_path / "r.csv").open(encoding="utf-8", newline="") as stream:
            dense, pruned = csv.DictReader(stream)
        assert tuple(dense) == COLUMNS
        assert dense["name"] == DENSE and pruned["name"] == PRUNED
        speedup = whole.speedup(PRUNED, over=DENSE)
        assert [float(pruned[f"speedup{end}"]) for end in ("", "_low", "_high")] == [
            speedup.median, speedup.low, speedup.high,
        ]  # fmt: skip
        assert pruned["verdict"] == "faster" and dense["speedup"] == dense["verdict"] == ""
        assert float(dense["p95_seconds"]) == pytest.approx(np.percentile(whole.files[0].seconds, 95))
        assert (dense["flops"], pruned["flops"], pruned["efficiency"]) == ("2000000000.0", "", "")
        assert (pruned["accuracy"], pruned["requests_per_second_under_load"]) == ("0.885", "21.0")
