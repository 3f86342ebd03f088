"""A run that is killed twenty times, often in the middle of a save, ends as the run that never was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "loops" / "killed.py"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_twenty_times_ends_as_if_it_had_not_been(tmp_path: Path, seed: int) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(seed)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lives = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kill"')]
    assert [life["signal"] for life in lives] == [signal.SIGKILL] * 20 + [0]
    whole, killed = (load_file(tmp_path / name / "end.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []

    starts = [life["said"][0] for life in lives if life["said"]]
    assert len(starts) >= 17, "the kills by the clock may come before anything is said"
    for start in starts:  # whatever is newer than what is loaded has been named
        resumed = 0 if start["resumed"] is None else number(start["resumed"])
        newer = {name for name in start["present"] if number(name) > resumed}
        assert newer == {re.search(r"checkpoint-\d+", text).group() for text in start["warned"]}  # type: ignore[union-attr]
    reasons = {text.split("will not be loaded: ")[1].split(" ")[0] for start in starts for text in start["warned"]}
    assert len(reasons) >= 2 and "trainer_state.json" in reasons, f"the kills hit too little: {reasons}"
    assert any(start["resumed"] for start in starts)


def number(name: str) -> int:
    return int(name.split("-")[1])
