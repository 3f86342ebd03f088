"""The comparison on a fine-tuning task runs from end to end, on a tiny encoder and 48 rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "finetune"))

import pareto
from pareto_memory import Remembering
from pareto_report import joined, table

FOLDER = Path(__file__).parent.parent / "benchmarks" / "finetune"
ALL_STAGES = """
import sys
sys.path.insert(0, sys.argv[1])
import pareto
options = sys.argv[2:]
for stage in ("teach", "search", "train", "deploy", "report"):
    sys.argv = ["pareto.py", stage, *options]
    pareto.main()
"""
METHODS = "magnitude,targeted-kd,shorter-targeted-kd,torch-pruning,student-kd"


def test_a_remembering_teacher_answers_as_the_teacher(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    teacher, asked = BertForSequenceClassification(config).eval(), []
    teacher.register_forward_pre_hook(lambda *now: asked.append(len(now[2]["input_ids"])), with_kwargs=True)
    ids = torch.randint(1, 40, (5, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in (7, 4, 2, 6, 3)])
    first = Remembering(teacher, tmp_path / "answers.safetensors")
    with torch.no_grad():
        expected = teacher(input_ids=ids, attention_mask=mask).logits
        assert torch.allclose(first(input_ids=ids[:3], attention_mask=mask[:3]).logits, expected[:3], atol=1e-6)
        first.save()
        again = Remembering(teacher, tmp_path / "answers.safetensors")
        shorter = again(input_ids=ids[1:, :6], attention_mask=mask[1:, :6]).logits  # padded to another length
    assert torch.allclose(shorter, expected[1:], atol=1e-6)
    assert asked == [5, 3, 2], "the first three rows are known"


def test_runs_with_options_are_no_part_of_the_comparison() -> None:
    run = {"method": "targeted-kd", "level": 0.5, "seed": 0, "epochs": 1.0, "learning_rate": 1e-4}
    assert pareto.ordinary(run)
    assert not pareto.ordinary({**run, "ramp": 0.3}) and not pareto.ordinary({**run, "criterion": "taylor"})


def test_another_seed_is_added_to_a_report() -> None:
    def run(seed: int, test: float, method: str = "targeted-kd") -> dict[str, object]:
        numbers = {"test": test, "test_int8": test, "held_out": test, "parameters": 10**6}
        return {"method": method, "level": 0.5, "seed": seed, "name": f"{method}-s{seed}", **numbers}

    speed = {"median": 2.0, "low": 1.9, "high": 2.1}
    times = {"sequence": 64, "speedups": {"targeted-kd-s0": speed}}
    dense = [{**run(seed, 0.9, "teacher"), "level": 0.0} for seed in (0, 1)]
    first = {"command": "a", "commit": "b", "dense": dense[:1], "runs": [run(0, 0.8)], "latency": times}
    both = joined(first, {"command": "c", "commit": "d", "dense": dense[1:], "runs": [run(0, 0.82), run(1, 0.86)]})
    assert both["earlier"] == [{"command": "a", "commit": "b"}] and both["command"] == "c"
    text = table(both["dense"], both["runs"], both["latency"]["speedups"])
    assert "| 84.0 ± 2.8 | +6.0 | 2.00 [1.90, 2.10] |" in text, "the newer run of seed 0, and the speed measured before"
    with pytest.raises(SystemExit, match="64 tokens before, at 32 now"):
        joined(first, {"dense": [], "runs": [], "latency": {"sequence": 32, "speedups": {}}})


@pytest.mark.slow
def test_every_stage_follows_the_one_before(text_encoder: Path, reviews: Path, tmp_path: Path) -> None:
    output, results = tmp_path / "runs", tmp_path / "results"
    common = ["--model", str(text_encoder), "--train", str(reviews), "--test", str(reviews), "--held-out", "16"]
    common += ["--rows", "32", "--output", str(output), "--teacher-epochs", "1", "--epochs", "1", "--seeds", "0"]
    common += [
        "--methods",
        METHODS,
        "--rounds",
        "10",
        "--sequence",
        "16",
        "--levels",
        "0.5",
        "--results",
        str(results),
        "--name",
        "tiny",
    ]
    common += ["--rates", "1e-3", "--searched", "0.5", "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALL_STAGES, str(FOLDER), *common]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((results / "tiny.json").read_text(encoding="utf-8"))
    by_name = {(run["method"], run["level"]): run for run in found["runs"]}
    assert {method for method, _ in by_name} == set(METHODS.split(","))
    dense = found["dense"][0]
    for (method, level), run in by_name.items():
        assert run["max_abs"] < 1e-4 and 0 <= run["test"] <= 1
        assert run["test_onnx"] == pytest.approx(run["test"])
        if level and method != "student-kd":  # whole layers go
            assert run["parameters"] < dense["parameters"]
    sizes = {by_name[method, 0.5]["parameters"] for method in ("magnitude", "targeted-kd", "torch-pruning")}
    assert len(sizes) == 1  # the same units go, whoever chooses them
    assert (results / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "| Torch-Pruning | 0.5 |" in done.stdout
