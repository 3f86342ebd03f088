"""The benchmark of `refresh_every` runs from end to end, repeats nothing, and its numbers are what they are called."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import targeted_weight
from torch import nn

import td_plugin as td

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import refresh
from refresh_report import markdown, summary

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "refresh.py"
TASKS, INTERVALS = ("sst2", "characters", "digits"), (0, 1, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text_encoder: Path, reviews: Path) -> Path:
    target = tmp_path_factory.mktemp("refresh")
    options = ["--quick", "--model", text_encoder, "--data", f"sst2={reviews}", "--output", target]
    command = [sys.executable, SCRIPT, *options, "--intervals", *INTERVALS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "refresh.json").read_text(encoding="utf-8"))


def test_every_task_is_run_once_per_interval(found: dict[str, Any]) -> None:
    made = {(run["task"], run["refresh_every"], run["seed"]) for run in found["runs"]}
    assert made == {(task, every, 0) for task in TASKS for every in INTERVALS}
    assert len(found["runs"]) == len(made) == len(found["rows"])
    for one in found["runs"]:
        assert one["pruned"]["loss"] > 0 and 0 <= one["pruned"]["accuracy"] <= 1
        assert one["sparsity"] == pytest.approx(0.75, abs=0.02)
        if one["refresh_every"] == 1:
            assert one["overlap"] == [1.0] * 3 and one["candidate_share"] == pytest.approx([0.75] * 3, abs=0.02)
        elif one["refresh_every"] == 5:
            assert len(one["overlap"]) == 2 and all(0.5 < value < 1 for value in one["overlap"])
        else:
            assert one["overlap"] == []


def test_table_and_plot_name_no_folder(folder: Path, found: dict[str, Any]) -> None:
    table = (folder / "refresh.md").read_text(encoding="utf-8")
    assert table.count("\n") == len(found["rows"]) + 2
    assert (folder / "refresh.png").read_bytes().startswith(b"\x89PNG")
    assert found["torch"] == torch.__version__
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text(encoding="utf-8")


def test_a_second_run_repeats_nothing_and_other_settings_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--quick", "--tasks", "characters", "digits", "--output", str(folder), "--intervals", "1"]
    monkeypatch.setattr(refresh, "train", lambda task, every, seed: {"cpu_seconds": 0, "pruned": {"loss": 0}})
    refresh.run_all(refresh.parse([*asked, "5", "0"]))
    assert capsys.readouterr().err == ""
    refresh.run_all(refresh.parse([*asked, "6"]))  # only what is missing
    assert capsys.readouterr().err.count("seed 0:") == 2
    for name in ("characters", "digits"):
        (folder / "runs" / f"{name}-every6-seed0.json").unlink()
    assert len(refresh.finished(refresh.parse(asked))) == len(TASKS) * len(INTERVALS)
    with pytest.raises(SystemExit, match="other settings"):
        refresh.finished(refresh.parse(["--tasks", "digits", "--output", str(folder)]))


def test_a_task_without_its_data_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        refresh.parse(["--tasks", "trec", "digits"])
    assert "trec: give --data trec=FILE and --model" in capsys.readouterr().err


@pytest.mark.parametrize("every", [1, 4])
def test_staleness_is_that_of_what_training_drops(every: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2))
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(1 - 1e-9), 0.75, refresh_every=every)
    sparsifier.prepare(model)
    staleness, expected = refresh.Staleness(model, sparsifier, every, 12), []
    dense = dict(model.named_parameters())["0.weight"]
    for step in range(12):
        sparsifier.step()
        staleness.observe(step)
        if step % every == every - 1:
            dropped = (model[0].weight == 0).detach().numpy()  # α is 1 here, so all candidates
            exact = targeted_weight(dense.detach().double().numpy(), 0.75)
            expected.append((dropped & exact).sum() / (dropped | exact).sum())
        with torch.no_grad():
            dense.add_(0.01 * torch.randn_like(dense))
    assert staleness.overlap == pytest.approx(expected[:: len(expected) // 3][-3:] if every == 4 else [1.0] * 3)
    assert np.mean(expected) == 1 if every == 1 else 0.8 < np.mean(expected) < 0.99


def made(every: int, seed: int, loss: float) -> dict[str, Any]:
    return {
        "task": "digits",
        "refresh_every": every,
        "seed": seed,
        "dense": {"loss": 0.1, "accuracy": 0.9},
        "pruned": {"loss": loss, "accuracy": 0.8},
        "overlap": [0.9, 1.0],
        "candidate_share": [0.75],
        "cpu_seconds": 1.0,
    }


def test_differences_are_paired_by_seed_and_judged_by_the_spread_over_seeds() -> None:
    losses = {1: (1.0, 2.0, 3.0), 10: (1.5, 2.4, 3.6), 100: (3.0, 3.5, 4.0)}
    runs = [made(every, seed, loss) for every, some in losses.items() for seed, loss in enumerate(some)]
    exact, near, far = summary(runs)
    assert exact["difference"] is None and exact["pruned_loss"] == pytest.approx((2.0, 1.0))
    assert near["difference"] == pytest.approx((0.5, statistics.stdev((0.5, 0.4, 0.6))))
    assert near["within_noise"] is True and near["overlap"] == pytest.approx(0.95)
    assert far["difference"] == pytest.approx((1.5, 0.5)) and far["within_noise"] is False
    lucky = [made(1, 0, 1.0), made(1, 1, 1.0), made(10, 0, 0.9), made(10, 1, 1.2)]
    assert summary(lucky)[1]["within_noise"] is True  # exact runs that happen to agree are no proof
    alone = summary([made(1, 0, 1.0), made(10, 0, 2.0)])[1]
    assert alone["within_noise"] is None and alone["pruned_loss"] == (2.0, None)
    assert "0.500 ± 0.100 | yes" in markdown([near])
