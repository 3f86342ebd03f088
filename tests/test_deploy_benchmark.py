"""The benchmark of all forms runs from end to end, goes on where it stopped, and says what its numbers are."""

from __future__ import annotations

import json
import statistics
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from td_plugin.export import evaluate_onnx
from td_plugin.export.evaluation import Examples

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from deploy import main, shown
from deploy_measure import AGAIN, BASE, Plan, ratios
from deploy_models import STORED, TIMED, TORCH, answers, asking_file, judged, key, random_inputs
from deploy_plot import TITLES, pareto

pytestmark = pytest.mark.slow
LEVELS = (0.0, 0.5)
TIMED_ROWS = {key(level, form) for level in LEVELS for form in (*TORCH, *TIMED)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("deploy")
    threads = torch.get_num_threads()
    main(["--quick", "--output", str(target)])
    torch.set_num_threads(threads)
    return target


@pytest.fixture(scope="module")
def model(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "deploy.json").read_text(encoding="utf-8"))["models"]["tiny"]


def parts_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("parts/*-run*.json"))]


def test_every_form_is_made_judged_and_timed(folder: Path, model: dict[str, Any]) -> None:
    assert set(model["forms"]) == TIMED_ROWS | {key(level, form) for level in LEVELS for form in STORED}
    (setting,) = model["settings"]
    assert set(setting["rows"]) == TIMED_ROWS | {AGAIN}
    sizes = {name: row["bytes"] for name, row in model["forms"].items()}
    assert sizes["0.5/fp32"] < sizes["0/fp32"] and sizes["0/int8"] < 0.6 * sizes["0/fp32"]
    assert sizes["0/fp32"] == (folder / "files" / "tiny" / "0.fp32.onnx").stat().st_size


def test_what_is_shrunk_and_fused_answers_as_the_model_with_zeros(model: dict[str, Any]) -> None:
    for level in LEVELS:
        for form in ("eager", "compile", "fp32", "fused"):
            row = model["forms"][key(level, form)]
            assert row["agreement"] == 1 and row["max_abs"] < 1e-5, (level, form)
        assert model["forms"][key(level, "int8")]["relative"] < 0.1
    assert model["forms"]["0/fused"]["written"] == model["forms"]["0.5/fused"]["written"] == "fused"


def test_the_ratios_are_medians_of_pairs_within_a_round(folder: Path, model: dict[str, Any]) -> None:
    near = partial(pytest.approx, rel=1e-3)  # four digits are written
    parts, (setting,) = parts_of(folder), model["settings"]
    assert [part["run"] for part in parts] == [0, 1]
    assert all(len(values) == part["rounds"] == 4 for part in parts for values in part["seconds"].values())
    for name, row in setting["rows"].items():
        pairs = [
            [base / mine for base, mine in zip(part["seconds"][BASE], part["seconds"][name], strict=True)]
            for part in parts
        ]
        assert row["speedup"]["median"] == near(statistics.median(chain(*pairs)))
        medians = [statistics.median(values) for values in pairs]
        assert [run["median"] for run in row["runs"]] == near(medians)
        assert row["apart"] == near(max(medians) / min(medians) - 1)
    half = setting["rows"]["0.5/fp32"]
    dense, small = (level["flops"]["2x16"] for level in model["levels"])
    assert half["efficiency"]["flop_ratio"] == near(dense / small)
    assert half["efficiency"]["median"] == near(half["speedup"]["median"] * small / dense)


def test_what_is_done_is_not_done_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted(folder.glob("parts/*.json"), key=lambda path: (path.stem.endswith("run1"), path.stem))
    before = {path: path.stat().st_mtime_ns for path in paths}
    paths[-1].unlink()
    main(["--quick", "--output", str(folder), "--minutes", "0"])  # no time: nothing is begun
    assert not paths[-1].exists()
    main(["--quick", "--output", str(folder)])
    changed = [path for path in paths if path.stat().st_mtime_ns != before[path]]
    assert changed == [paths[-1]] and "run1" in paths[-1].name
    assert TITLES["int8-static"] in capsys.readouterr().out


def test_the_files_name_versions_and_no_folder(folder: Path, model: dict[str, Any]) -> None:
    facts = model["settings"][0]["measured"][0]["machine"]
    assert facts["torch"] == torch.__version__ and facts["onnxruntime"]
    for suffix in ("json", "md"):
        text = (folder / f"deploy.{suffix}").read_text(encoding="utf-8")
        assert str(folder) not in text and "benchmarks/deploy.py --quick" in text
    assert (folder / "deploy_tiny.png").read_bytes().startswith(b"\x89PNG")
    words = ["--runs", "/a", "--output", "/b", "--seconds", "9", "--report", "--lock", "/c"]
    assert shown(words) == "python benchmarks/deploy.py --runs build/sst2 --seconds 9"


def test_the_accuracy_is_that_of_evaluate_onnx(folder: Path) -> None:
    path = folder / "files" / "tiny" / "0.fp32.onnx"
    batches = [{**random_inputs(8, 9, 200, seed), "labels": torch.arange(8) % 2} for seed in range(3)]
    logits = answers(asking_file(path), batches)
    row = judged(logits, logits, batches)
    assert row["accuracy"] == pytest.approx(evaluate_onnx(path, Examples(batches)).value)
    assert row["agreement"] == 1 and row["max_abs"] == 0
    assert judged(logits.flip(1), logits, batches)["agreement"] == 0


def test_a_sitting_ends_when_its_time_is_over() -> None:
    plan = Plan(least=12, most=60, seconds=30, sittings=3)

    def rounds(one: float) -> int:
        return next(count for count in range(100) if not plan.goes_on(count, count * one))

    assert [rounds(one) for one in (0.1, 1.0, 10.0)] == [20, 10, 4]


def test_a_slow_round_moves_no_ratio() -> None:
    steady = {BASE: [1.0, 2.0, 4.0, 2.0, 1.0], "x": [0.5, 1.0, 2.0, 1.0, 50.0]}
    (found,) = [row for name, row in ratios([{"seconds": steady}]).items() if name == "x"]
    assert found["speedup"]["median"] == 2 and found["apart"] == 0 and found["p50_ms"] == 1000


def test_what_is_slower_and_no_better_is_off_the_front() -> None:
    points = {"slow": (4.0, 0.9), "fast": (1.0, 0.8), "worse": (2.0, 0.7), "same": (5.0, 0.9)}
    assert pareto(points) == ["fast", "slow"]
