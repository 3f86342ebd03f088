"""The page that reads two runs: its pictures are those of the histories beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("name", ["good", "bad"])
def test_the_histories_are_of_the_runs_described(name: str) -> None:
    saved = json.loads((RESULTS / f"reading_{name}.json").read_text())
    run, logs = saved["run"], [entry for entry in saved["history"] if "td_dropped" in entry]
    assert [entry["step"] for entry in logs] == list(range(10, 301, 10))
    assert logs[-1]["td_dropped"] == pytest.approx(run["level"], abs=1e-3)  # frozen: all candidates, α = 1
    assert {entry["td_churn"] for entry in logs if entry["step"] > 0.85 * run["steps"] + 10} == {0.0}
    assert (RESULTS / f"reading_{name}.png").stat().st_size < 150_000


@pytest.mark.slow
def test_a_history_can_be_drawn(tmp_path: Path) -> None:
    picture, history = tmp_path / "run.png", RESULTS / "reading_good.json"
    subprocess.run([sys.executable, ROOT / "benchmarks" / "reading.py", "draw", history, picture], check=True)
    assert picture.read_bytes()[:4] == b"\x89PNG"
