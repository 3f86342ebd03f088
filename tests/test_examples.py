"""The examples run as they stand, offline, and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ROOT = str(EXAMPLES.parent)


def output_of(name: str, directory: Path) -> str:
    command = [
        sys.executable,
        "-c",
        f"import sys, runpy; sys.path.insert(0, {ROOT!r}); runpy.run_path({name!r}, run_name='__main__')",
    ]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout


def test_the_mlp(tmp_path: Path) -> None:
    text = output_of(str(EXAMPLES / "01_sequential_mlp.py"), tmp_path)
    found = re.search(r"([\d,]+) parameters -> ([\d,]+); accuracy ([\d.]+); largest difference ([\de.-]+)", text)
    assert found is not None, text
    before, after = (int(count.replace(",", "")) for count in found.groups()[:2])
    assert after < before / 2
    assert float(found[3]) > 0.93 and float(found[4]) < 1e-4


def test_the_trainer(tmp_path: Path) -> None:
    text = output_of(str(EXAMPLES / "02_trainer_callback.py"), tmp_path)
    found = re.search(r"accuracy, pruned: ([\d.]+)", text)
    assert found is not None and float(found[1]) > 0.9, text
    assert "pruned over dense" in text


@pytest.mark.slow
def test_a_model_of_ones_own(tmp_path: Path) -> None:
    text = output_of(str(EXAMPLES / "03_any_model.py"), tmp_path)
    found = re.search(r"([\d,]+) -> ([\d,]+) parameters; accuracy, trained on: ([\d.]+)\nreloaded: ([\d.]+)", text)
    assert found is not None, text
    before, after = (int(count.replace(",", "")) for count in found.groups()[:2])
    assert after < before / 2
    assert float(found[3]) > 0.93 and found[4] == found[3]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_they_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
