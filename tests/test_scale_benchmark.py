"""The benchmark of size runs from end to end, its numbers follow from its times, and the work is linear in tensors."""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import td_plugin as td

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from scale import CALLS, CASES, QUICK, Case, change
from scale_report import fits

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("scale")
    command = [sys.executable, str(SCRIPT), "--quick", "--dtype", "bfloat16", "--max-weights", "60000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--output", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scale_bfloat16.json").read_text(encoding="utf-8"))


def test_the_cases_up_to_the_limit_are_measured_smallest_first(found: dict[str, Any]) -> None:
    cases = sorted((case for case in QUICK if case.weights <= 60_000), key=lambda case: case.weights)
    assert [(row["tensors"], row["width"]) for row in found["rows"]] == [(case.tensors, case.width) for case in cases]
    assert 0 < len(cases) < len(QUICK)
    assert {1_000_000_000, 100_000_000} <= {round(case.weights, -8) for case in CASES}


def test_ratios_and_parts_follow_from_the_seconds(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        calls, finding = row["calls"], row["selection"]
        assert set(calls) == set(CALLS) and min(call["seconds"] for call in calls.values()) > 0
        assert row["held_bytes_per_weight"] == 1 / 8
        later = max(calls["step"]["seconds"] - calls["redraw"]["seconds"], 0)
        assert finding["step"] == pytest.approx(later / row["weights"])
        for copy in ("copy", "copy_at_hand"):
            assert calls["prepare"][f"times_{copy}"] == pytest.approx(calls["prepare"]["seconds"] / row[copy])
            left = (calls["step"]["seconds"] - later) / row[copy]
            assert calls["step"][f"times_{copy}_without_selection"] == pytest.approx(left)


def test_the_files_name_versions_and_no_folder(folder: Path, found: dict[str, Any]) -> None:
    assert found["machine"]["threads"] == "1" and found["machine"]["torch"]
    table = (folder / "scale_bfloat16.md").read_text(encoding="utf-8")
    assert str(folder) not in table and "squash_mask" in table and "200 × 16²" in table
    assert (folder / "scale_bfloat16.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_is_found_again() -> None:
    def row(tensors: int, width: int) -> dict[str, Any]:
        weights = tensors * width**2
        seconds = 1e-3 + 2e-5 * tensors + 3e-9 * weights
        return {"tensors": tensors, "weights": weights, "calls": {"step": {"seconds": seconds}}, "copy": 2e-9 * weights}

    rows = [row(case.tensors, case.width) for case in CASES]
    step, copy = fits(rows, "step"), fits(rows, "copy")
    named = {"seconds": 1e-3, "us_per_tensor": 20, "ns_per_weight": 3}
    assert {key: step[key] for key in named} == pytest.approx(named) and step["off_by"] < 1e-6
    assert copy["ns_per_weight"] == pytest.approx(2) and copy["us_per_tensor"] == pytest.approx(0, abs=1e-3)


def test_a_change_moves_every_weight_a_little() -> None:
    model = Case(1, 9).model(torch.float32)
    weight = model[0].weight.detach().uniform_(1, 2)
    before = weight.clone()
    change([weight])
    moved = (weight - before).abs().view(-1)
    assert (moved[:80] > 0).all() and moved.max() < 0.01


def calls_of(tensors: int) -> dict[str, int]:
    """Function calls, of Python and of C, that each call of a sparsifier on so many small layers makes."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(tensors)), nn.Linear(8, 1))
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(), 0.5)

    def count(call: Callable[[], object]) -> int:
        profile = cProfile.Profile()
        profile.runcall(call)
        return pstats.Stats(profile).total_calls

    found = {"prepare": count(lambda: sparsifier.prepare(model))}
    for name in ("step", "step", "state_dict", "report", "squash_mask"):
        found[name] = count(getattr(sparsifier, name))
    return found


def test_the_work_per_tensor_does_not_grow_with_their_number() -> None:
    calls_of(2)  # what happens once, happens here
    few, some, many = (calls_of(tensors) for tensors in (20, 40, 80))
    for name in few:
        assert many[name] - some[name] <= 1.02 * 2 * (some[name] - few[name]), name  # fewer is no growth
