"""Several processes: every check of `ranks` has run in two of them, in one gloo group; what one process can show."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from launch import Outcome, checks_of, launch

import td_plugin as td
from td_plugin.agreement import fingerprint

_OUTCOMES: dict[str, list[Outcome]] = {}
MODULES = ["ddp", "fsdp", "trainer", *(["zero"] if find_spec("deepspeed") else [])]  # DeepSpeed is no dependency
SLOW = [(module, name) for module in MODULES for name in checks_of(module)]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), SLOW, ids=[f"{module}-{name}" for module, name in SLOW])
def test_in_two_processes(module: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if module not in _OUTCOMES:
        directory: Path = tmp_path_factory.mktemp(module)
        _OUTCOMES[module] = launch(module, directory)
    told = [outcome.get(name, "an earlier check has failed") for outcome in _OUTCOMES[module]]
    assert told == ["", ""], "\n".join(told)


def test_an_unknown_rank_policy_is_refused() -> None:
    with pytest.raises(td.TdError, match="rank_policy"):
        td.TargetedDropout(td.recipes.targeted_weight(), rank_policy="own")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1, True, 1.5])
def test_agree_every_is_a_number_of_steps(wrong: int) -> None:
    with pytest.raises(td.TdError, match="agree_every"):
        td.TargetedDropout(td.recipes.targeted_weight(), agree_every=wrong)


def test_a_fingerprint_tells_every_bit_and_every_place_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 256, (37,), generator=generator, dtype=torch.uint8)
    seen = {fingerprint([base]), fingerprint([base, base]), fingerprint([None, base]), fingerprint([base[:36]])}
    for place in range(37):
        for bit in range(8):
            other = base.clone()
            other[place] ^= 1 << bit
            seen.add(fingerprint([other]))
    swapped = 0
    for first in range(36):
        other = base.clone()
        other[[first, first + 1]] = base[[first + 1, first]]
        swapped += not torch.equal(other, base)
        seen.add(fingerprint([other]))
    assert len(seen) == 4 + 37 * 8 + swapped
    assert fingerprint([base]) == fingerprint([base.clone()])
    assert fingerprint([torch.ones(3, 5)]) != fingerprint([-torch.ones(3, 5)])
    assert all(-(1 << 63) <= mark < 1 << 63 for mark in seen)


def test_parameters_of_zero_3_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    model[0].weight.ds_id = 0  # what DeepSpeed leaves on a parameter that it has taken apart
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(), 0.5)
    with pytest.raises(td.TdError, match=r"ZeRO-3.*0\.weight"):
        sparsifier.prepare(model)
    assert type(model[0]) is torch.nn.Linear
    del model[0].weight.ds_id
    sparsifier.prepare(model)


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "distributed.py"
    done = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True, timeout=200, check=True)
    found = json.loads(done.stdout)
    held = found["bytes of masks per process, weights"]
    assert held["FSDP2"] * 2 == held["whole"] == 2 * 5 * 64 * 64 // 8
    ratio = found["DDP step with weights, times one without"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


@pytest.mark.slow
def test_the_benchmark_of_memory_runs() -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "sharded_memory.py"
    command = [sys.executable, script, "--quick", "--steps", "1", "--masks", "weights"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    name, whole, sharded, _ = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert name == "weights" and int(whole) > 0 and int(sharded) > 0
