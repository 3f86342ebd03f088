"""A Trainer run that is killed again and again, forked from a process that has imported everything and run nothing.

A kill is SIGKILL, counted in calls of functions, anywhere or within a save, or from outside, by the clock.
Some leave a file cut off, as a full disk or a power failure does: of a checkpoint that is written, or of the last.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

import td_plugin as td
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.integrations.interrupted import last_complete_checkpoint

STEPS = 40


@dataclass(frozen=True)
class Kill:
    """When a process ends.

    Attributes:
        calls: how many calls of functions it lives for; within saves only, if `saving`.
        saving: whether it dies in a save.
        torn: which file of the newest checkpoint is cut off, and where, as shares; None: none is.
        seconds: how long it lives at most.
    """

    calls: int | None = None
    saving: bool = False
    torn: tuple[float, float] | None = None
    seconds: float | None = None


class Executioner:
    """Counts calls, in and outside of saves, and kills its own process when its time has come."""

    def __init__(self, kill: Kill, directory: Path) -> None:
        self.kill, self.directory = kill, directory
        self.calls, self.in_saves, self.saving = 0, 0, 0

    def watch(self, frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_name == "_save_checkpoint" and event in ("call", "return"):
            self.saving += 1 if event == "call" else -1
        if event not in ("call", "c_call"):
            return
        self.calls += 1
        self.in_saves += bool(self.saving)
        done = self.in_saves if self.kill.saving else self.calls
        if self.kill.calls is not None and done >= self.kill.calls and bool(self.saving) >= self.kill.saving:
            sys.setprofile(None)
            self.strike()

    def strike(self) -> None:
        written = [p for p in self.directory.glob("checkpoint-*") if self.saving or (p / "trainer_state.json").exists()]
        newest = max(written, key=lambda path: int(path.name.split("-")[1]), default=None)
        files = sorted(path for path in newest.iterdir() if path.is_file()) if newest else []
        if self.kill.torn is not None and files:
            file = files[int(self.kill.torn[0] * len(files))]
            os.truncate(file, int(self.kill.torn[1] * file.stat().st_size))
        os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(directory: Path, seed: int, steps: int = STEPS) -> Trainer:
    set_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    ids = torch.randint(1, 50, (22, 6), generator=torch.Generator().manual_seed(1))
    callback = TargetedDropoutCallback(td.recipes.network_surgery(0.5), 0.5, recipe_steps=STEPS)
    arguments = TrainingArguments(
        str(directory), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, save_strategy="steps", save_steps=1, save_total_limit=3, report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    data = [{"input_ids": x, "labels": (x[0] > 25).long()} for x in ids]
    return Trainer(model, arguments, train_dataset=data, callbacks=[callback])


def live(directory: Path, kill: Kill, seed: int, say: Callable[[dict[str, Any]], None]) -> None:
    """One process: go on from the last complete checkpoint to the end, or to the kill."""
    executioner = Executioner(kill, directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = last_complete_checkpoint(directory)
    present = sorted(path.name for path in directory.glob("checkpoint-*"))
    resumed = None if found is None else Path(found).name
    say({"resumed": resumed, "present": present, "warned": [str(warning.message) for warning in caught]})
    trainer = make_trainer(directory, seed if found else 0)
    sys.setprofile(executioner.watch)
    trainer.train(resume_from_checkpoint=found)
    sys.setprofile(None)
    state = {name: tensor.contiguous() for name, tensor in trainer.model.state_dict().items()}
    save_file(state, directory / "end.safetensors")
    say({"calls": executioner.calls, "in_saves": executioner.in_saves, "step": trainer.state.global_step})


def fork(directory: Path, kill: Kill, seed: int) -> tuple[int, list[dict[str, Any]]]:
    """`live` in a child: the signal that ended it, or 0, and what it said."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "said.jsonl"
    log.write_text("", encoding="utf-8")
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(KeyboardInterrupt), (directory / "log.txt").open("a") as errors:
            os.dup2(errors.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            with log.open("a", encoding="utf-8") as out:
                live(directory, kill, seed, lambda said: print(json.dumps(said), file=out, flush=True))
            code = 0
        os._exit(code)
    if kill.seconds is not None:
        time.sleep(kill.seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    said = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit((directory / "log.txt").read_text()[-3000:])
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), said


def kills(generator: random.Random, calls: int, in_saves: int, seconds: float) -> list[Kill]:
    """Eight in saves, four of which tear a file, eight anywhere, which do, four by the clock; soon after a start."""
    few, saves = calls * 4 // STEPS, in_saves * 3 // STEPS
    found = [Kill(seconds=generator.uniform(0.05, max(0.1, 8 * seconds / STEPS))) for _ in range(4)]
    for index in range(16):
        saving = index < 8
        torn = None if saving and index % 2 else (generator.random(), generator.random())
        found.append(Kill(generator.randrange(1, saves if saving else few), saving, torn))
    generator.shuffle(found)
    return found


def main(directory: Path, seed: int) -> None:
    """Prints one line per process: how it ended, from where it had started, what lay there."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread
    make_trainer(directory / "warm", 0, steps=2).train()  # what is imported late is imported now
    assert threading.active_count() == 1, "threads do not survive a fork"
    start = time.monotonic()
    code, (_, whole) = fork(directory / "whole", Kill(), 0)
    generator, seconds = random.Random(seed), time.monotonic() - start
    for index, kill in enumerate(kills(generator, whole["calls"], whole["in_saves"], seconds)):
        code, said = fork(directory / "killed", kill, seed=100 + index)
        print(json.dumps({"kill": str(kill), "signal": code, "said": said}), flush=True)
    code, said = fork(directory / "killed", Kill(), seed=99)
    print(json.dumps({"kill": "none", "signal": code, "said": said}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
