"""Gates and penalties under the Trainer, and over several processes."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from cases import MODELS, build
from safetensors.torch import load_file, save_file
from test_hf import assert_equal, make_model, make_trainer, weights
from torch import nn

import td_plugin as td
from td_plugin.export import shrink
from td_plugin.gates.state import GateState
from td_plugin.granularity import Units
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.parametrization import masked_tensors

METHODS = {
    "hard_concrete": td.gates.hard_concrete(strength=1e-4),
    "variational": td.gates.variational(Units()),
    "smallify": td.gates.smallify(Units(), strength=1e-2),
    "penalty": replace(td.recipes.targeted_unit(), penalty=td.penalties.GroupL1(1e-3), name="group L1"),
}


def gates(callback: TargetedDropoutCallback) -> list[GateState]:
    assert callback.sparsifier is not None
    return [target.gate for target in callback.sparsifier._targets if target.gate is not None]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_bit_for_bit_with_one_argument(tmp_path: Path, method: str) -> None:
    def run(out: Path, resume: bool) -> tuple[TargetedDropoutCallback, nn.Module]:
        mine = TargetedDropoutCallback(METHODS[method], 0.5, squash=False)
        # Two micro-batches and a remainder to a step; the Trainer clips, and its optimizer is a fused one.
        trainer = make_trainer(out, make_model(), mine, save_steps=3, max_steps=6)
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-3") if resume else None)
        return mine, trainer.model

    mine, model = run(tmp_path / "whole", resume=False)
    plain = set(make_model().state_dict())
    assert set(weights(model)) == plain
    states = gates(mine)
    assert all(state.updates == 6 for state in states) and (states or method == "penalty")
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    again, resumed = run(tmp_path / "resumed", resume=True)
    assert_equal(weights(model), weights(resumed))
    for one, other in zip(states, gates(again), strict=True):
        assert one.snapshot() == other.snapshot()


def test_the_best_checkpoint_comes_with_its_gates_and_the_end_bakes_them_in(tmp_path: Path) -> None:
    mine = TargetedDropoutCallback(td.gates.smallify(Units(), strength=1.0, learning_rate=0.1), 0.5)
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 5e-2}
    trainer = make_trainer(tmp_path, make_model(), mine, metric_for_best_model="loss", **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = json.loads((best / "trainer_state.json").read_text(encoding="utf-8"))["stateful_callbacks"]["td_plugin"]
    assert {group["gate"]["updates"] for group in saved["groups"]} == {int(best.name.split("-")[1])}
    assert not masked_tensors(trainer.model) and mine.sparsifier is not None
    assert mine.sparsifier.report().sparsity >= 0.49
    scores = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(scores[int(best.name.split("-")[1])], abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_heads_and_neurons_shrink(family: str, method: str) -> None:
    """Of GPT-2 query, key and value are one tensor, and a unit's entries lie in three places."""
    model = build(family)
    recipe = METHODS[method] if METHODS[method].granularity.kinds else td.gates.hard_concrete(Units())
    sparsifier = td.TargetedDropout(recipe, 0.5)
    sparsifier.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = MODELS[family].inputs(5)
    for _ in range(3):
        sparsifier.step()
        nn.functional.cross_entropy(model(tokens).logits, torch.arange(5) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        small = shrink(model, round_to=1)
        assert torch.allclose(small(tokens).logits, logits, atol=1e-5)
        sparsifier.squash_mask()
        assert torch.equal(model(tokens).logits, logits)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())


X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


def _process(rank: int, world: int, port: int, out: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    sparsifier = td.TargetedDropout(td.gates.hard_concrete(Units(), strength=1e-3), 0.5)
    sparsifier.prepare(model)
    trained = model
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        trained = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rows = slice(rank * 12 // world, (rank + 1) * 12 // world)
    for _ in range(4):
        sparsifier.step()
        scaler.scale(nn.functional.cross_entropy(trained(X[rows]), (torch.arange(12) % 3)[rows])).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    (target,) = sparsifier._targets
    assert target.gate is not None
    save_file({"phi": target.gate.phi.detach(), **model.state_dict()}, f"{out}/{world}-{rank}")
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gates_of_several_processes_learn_from_all_of_them(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _process(0, 1, port, str(tmp_path))
    torch.multiprocessing.spawn(_process, (2, port, str(tmp_path)), nprocs=2)
    alone, *both = (load_file(tmp_path / name) for name in ("1-0", "2-0", "2-1"))
    for found in both:
        for name, tensor in alone.items():
            assert torch.allclose(tensor, found[name], atol=1e-6), name
