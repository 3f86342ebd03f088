"""From the runs on disk to what counts: accuracy on the test rows in torch, ONNX and int8, and measured latency."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pareto_tasks import Task, accuracy
from transformers import PreTrainedModel

from td_plugin.export import benchmark, load_pretrained, quantize, to_onnx, verify
from td_plugin.files import staged_file
from td_plugin.integrations.config import TrainConfig
from td_plugin.integrations.training import make_trainer, onnx_accuracy


def judge(task: Task, directory: Path) -> None:
    """Write ``deployed.json`` and both ONNX files into a run's directory, unless they are there."""
    if (directory / "deployed.json").exists():
        return
    model = load_pretrained(directory)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{directory}: not a transformers model")
    trainer = make_trainer(task.classifier(final=True), TrainConfig(batch_size=32), task.scratch)
    batches = list(trainer.get_eval_dataloader())
    example = {name: value for name, value in batches[0].items() if name != "labels"}
    path = to_onnx(model, directory / "model.onnx", example)
    int8 = quantize(path, directory / "model.int8.onnx")
    found = {
        "test": accuracy(task, model, final=True),
        "test_onnx": onnx_accuracy(path, batches),
        "test_int8": onnx_accuracy(int8, batches),
        "max_abs": verify(model, path, batches).to_dict()["max_abs"],
        "bytes": path.stat().st_size,
        "bytes_int8": int8.stat().st_size,
    }
    with staged_file(directory / "deployed.json") as staged:
        staged.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"run": directory.name, **found}), flush=True)


def latencies(task: Task, directories: Sequence[Path], dense: Path, sequence: int, rounds: int) -> dict[str, Any]:
    """Time every run's two files against the dense fp32 file: batch 1, one thread, all interleaved."""
    files = {"dense": dense / "model.onnx", "dense int8": dense / "model.int8.onnx"}
    for directory in directories:
        files |= {directory.name: directory / "model.onnx", f"{directory.name} int8": directory / "model.int8.onnx"}
    size = task.classifier(final=True).model.config.vocab_size
    ids = torch.randint(size // 30, size, (1, sequence), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    report = benchmark(files, inputs, threads=1, rounds=rounds, progress=True)
    measured = report.to_dict()
    p50 = {file["name"]: file["p50_seconds"] for file in measured["files"]}
    found = {name: {**vars(report.speedup(name, over="dense")), "p50": p50[name]} for name in files if name != "dense"}
    found["dense"] = {"median": 1.0, "low": 1.0, "high": 1.0, "p50": p50["dense"]}
    result = {"sequence": sequence, "rounds": rounds, "speedups": found, "machine": measured.get("machine")}
    with staged_file(task.output / "latency.json") as staged:
        staged.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    return result
