"""The benchmark of a training step runs from end to end, and its rows and numbers are what they are called."""

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

from overhead_measure import Setting, compared, held_bytes
from overhead_rows import ALPHA, GAMMA, ROWS, AuthorsRule, Variant, matrices

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "overhead.py"
TINY = ["--quick", "--hidden", "64", "--layers", "1"]
SETTING = Setting("cpu", "float32", False, layers=1, hidden=64, vocabulary=50, batch=2, sequence=8)
WEIGHTS = 4 * 64 * 64 + 2 * 64 * 256


def output_of(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), *TINY, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("overhead")
    output_of("--pairs", "3", "--builds", "2", "--no-peak", "--output", str(target))
    return target


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "overhead_cpu.json").read_text(encoding="utf-8"))


def test_every_row_is_measured_or_left_out_with_a_reason(found: dict[str, Any]) -> None:
    assert {*found["training"], *found["left_out"]} == set(ROWS)
    assert set(found["left_out"]) <= {"pat", "weights-torch"}  # torchao and numba are optional
    assert all(found["left_out"].values())
    assert set(found["evaluation"]) == {"none", "control", "weights", "units"}


def test_the_numbers_follow_from_the_single_times(found: dict[str, Any]) -> None:
    base = found["training"]["none"]["seconds"]
    for row in found["training"].values():
        seconds = row["seconds"]
        assert len(seconds) == 3 and min(seconds) > 0 and len(row["by_build"]) == 2
        ratios = [mine / none - 1 for mine, none in zip(seconds, base, strict=True)]
        assert row["median"] == pytest.approx(statistics.median(ratios))
        assert row["median_ms"] == pytest.approx(1e3 * statistics.median(seconds))
        assert row["of_minima"] == pytest.approx(min(seconds) / min(base) - 1)
        assert row["low"] <= row["median"] <= row["high"]


def test_memory_and_what_is_targeted_are_stated(found: dict[str, Any]) -> None:
    assert found["matrices"] | {"of": 0} == {"tensors": 6, "weights": WEIGHTS, "of": 0}
    weights, units = found["training"]["weights"], found["training"]["units"]
    assert (weights["tensors"], weights["weights"]) == (6, WEIGHTS)
    assert WEIGHTS / 8 <= weights["held_bytes"] <= WEIGHTS / 2  # a bit each, and thresholds for short rows
    assert units["held_bytes_per_weight"] < 0.1


def test_the_files_name_versions_and_no_folder(folder: Path, found: dict[str, Any]) -> None:
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == "1" and found["command"].startswith("python benchmarks/overhead.py --quick")
    for suffix in ("json", "md"):
        assert str(folder) not in (folder / f"overhead_cpu.{suffix}").read_text(encoding="utf-8")
    table = (folder / "overhead_cpu.md").read_text(encoding="utf-8")
    assert all(ROWS[name].title in table for name in found["training"])
    assert (folder / "overhead_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_peak_of_one_row_is_read_in_a_process_of_its_own() -> None:
    memory = json.loads(output_of("--peak", "weights").splitlines()[-1])
    assert set(memory) == {"between", "peak", "libraries"}
    if Path("/proc/self/status").exists():
        assert memory["peak"] >= memory["between"] > 50e6


def test_a_slow_round_moves_means_but_not_medians() -> None:
    base = [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0]
    steady = compared([1.1 * t for t in base], base)
    assert steady["median"] == steady["low"] == pytest.approx(0.1) and steady["high"] == pytest.approx(0.1)
    spoiled = compared([1.1 * t for t in base[:-1]] + [50.0], base)
    assert spoiled["median"] == pytest.approx(0.1) and spoiled["of_means"] > 1
    assert spoiled["high"] >= spoiled["median"] >= spoiled["low"]


def test_held_bytes_counts_what_the_masks_keep_and_not_the_model() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(), 0.5)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    assert held_bytes(model, sparsifier) == 0
    sparsifier.step()
    held = held_bytes(model, sparsifier)
    assert 32 * 8 // 8 <= held <= 32 * 8 // 8 + 8 * 16
    kept = torch.zeros(1000)
    sparsifier.defaults["extra"] = [{"tensor": kept[:10]}, kept, model[0].bias, np.zeros(5)]  # type: ignore[index]
    assert held_bytes(model, sparsifier) == held + 4000 + 40


def test_the_authors_rule_is_that_of_the_reference() -> None:
    torch.manual_seed(0)
    rule, weight = AuthorsRule(), torch.randn(40, 60, requires_grad=True)
    candidates = torch.from_numpy(targeted_weight(weight.detach().double().numpy(), GAMMA))
    assert torch.equal(rule.eval()(weight) == 0, candidates)
    value = rule.train()(weight)
    dropped = value == 0
    assert not (dropped & ~candidates).any()
    assert dropped.sum() / candidates.sum() == pytest.approx(ALPHA, abs=0.06)  # four standard deviations
    value.sum().backward()
    assert torch.equal(weight.grad, (~dropped).float())


def built(name: str, steps: int) -> Variant:
    variant = SETTING.build(name, SETTING.model())
    for batch in SETTING.batches()[:steps]:
        variant.step(batch, SETTING.autocast)
    return variant


@pytest.mark.parametrize("name", ["ao-magnitude", "nn-prune"])
def test_magnitude_rows_drop_half_of_every_matrix_in_every_step(name: str) -> None:
    variant = built(name, 3)
    variant.begin()
    for fqn in matrices(SETTING.model()):
        module = variant.model.get_submodule(fqn.removesuffix(".weight"))
        mask = module.weight_mask if name == "nn-prune" else module.parametrizations.weight[0].mask
        assert (mask == 0).float().mean() == pytest.approx(0.5)


def test_our_rows_mask_the_same_matrices_and_draw_in_every_step() -> None:
    variant = built("weights", 1)
    tensor = variant.model.get_submodule(matrices(variant.model)[0].removesuffix(".weight"))
    zeros = []
    for _ in range(2):
        variant.begin()
        zeros.append(tensor.weight == 0)
    assert not torch.equal(*zeros)
    assert zeros[0].float().mean() == pytest.approx(GAMMA * ALPHA, abs=0.04)
    assert variant.sparsifier is not None and variant.sparsifier.step_count == 3
    assert len(variant.sparsifier.groups) == len(matrices(variant.model)) == 6
