"""The comparison on a convolutional network: its methods end with the same shapes, and it runs from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "finetune"))

import convnet
from convnet_runs import METHODS, QUICK, Budget, Job, Shape, build
from resnet_images import Images

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "finetune" / "convnet.py"
TINY = Shape(stem=4, stem_stride=2, widths=(16, 48), units=2, momentum=0.1)
KEPT = {0.5: [2, 8, 32], 0.7: [2, 5, 16]}  # of 48 channels, whole blocks of 16: 24 and 15 would be left


def some_images() -> Images:
    edged = torch.randint(0, 256, (16, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 10
    return Images(edged, labels, edged[:, 4:-4, 4:-4].contiguous(), labels)


@pytest.mark.parametrize("level", [0.5, 0.7])
def test_all_methods_end_as_wide_as_the_narrow_network(level: float, tmp_path: Path) -> None:
    settings = replace(QUICK.settings, shape=TINY, epochs=1, batch=2)
    kept = KEPT[level]
    for method in ("targeted", "gradual", "torch-pruning", "magnitude", "narrower"):
        job = Job(method, level, 0, 0.01, Budget(settings, 1), "", "", tmp_path)
        small = METHODS[method].run(job, build(TINY, 0), some_images())
        assert small.stem.out_channels == kept[0], method
        assert [unit.conv2.out_channels for unit in small.units] == [kept[1]] * 2 + [kept[2]] * 2, method
        assert [unit.conv1.out_channels for unit in small.units] == [kept[1]] * 2 + [kept[2]] * 2, method


@pytest.mark.slow
def test_runs_are_made_once_and_reported(pictures: Path, tmp_path: Path) -> None:
    output, results = tmp_path / "runs", tmp_path / "results"
    options = ["--train", str(pictures), "--test", str(pictures), "--rows", "64", "--epochs", "1", "4", "--jobs", "1"]
    options += ["--seeds", "0", "--rates", "0.01", "0.02", "--levels", "0.5", "--rounds", "10", "--output", str(output)]
    options += ["--results", str(results), "--methods", "targeted", "torch-pruning", "magnitude", "narrower"]
    command = [sys.executable, str(SCRIPT), "all", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((results / "convnet_quick.json").read_text(encoding="utf-8"))
    assert [run["method"] for run in found["runs"]] == ["targeted", "torch-pruning", "magnitude", "narrower"]
    assert all(run["max_abs"] < 1e-4 and run["parameters"] < found["dense"][0]["parameters"] for run in found["runs"])
    assert convnet.render(found, tmp_path / "again") == done.stdout.strip()
    assert (results / "convnet_quick.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/*")}
    command[2] = "train"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0 and before == {path: path.stat().st_mtime_ns for path in output.glob("*/*")}
