"""Training for `resnet.py`: one model, in pieces that go on to the bit where the one before was stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from resnet_images import Images, batch
from resnet_network import ResNet, Shape, build, filters, prunable
from resnet_rescaled import Rescaled
from resnet_rows import ROWS, Row, Strengths
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import td_plugin as td
from td_plugin.files import staged_file

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """One budget for every method. The defaults are the authors' (their code; the cosine is ours, for short runs).

    Attributes:
        shape: of the network.
        epochs: over the training rows.
        batch: rows per step.
        rate: peak learning rate of SGD with momentum 0.9.
        cosine: a cosine to 0 behind a warm-up of 5 %, in place of × 0.1 after 40, 60 and 80 % of the run.
        decay: weight decay, on every parameter.
        clip: global norm of the gradient.
        ramp: share of the run over which recipes that ramp do so.
        rows: to train on; 0: all.
        test_rows: to judge on; 0: all.
        strengths: of the penalties.
    """

    shape: Shape = field(default_factory=Shape)
    epochs: int = 256
    batch: int = 128
    rate: float = 0.4
    cosine: bool = False
    decay: float = 2e-4
    clip: float = 1.0
    ramp: float = 0.4
    rows: int = 0
    test_rows: int = 0
    strengths: Strengths = field(default_factory=Strengths)

    def at(self, step: int, steps: int) -> float:
        """The learning rate of one step."""
        share = step / steps
        if not self.cosine:
            return self.rate * 0.1 ** sum(share >= begin for begin in (0.4, 0.6, 0.8))
        warm = 0.05
        return self.rate * (share / warm if share < warm else (1 + math.cos(math.pi * (share - warm) / (1 - warm))) / 2)


@dataclass(frozen=True)
class Stop:
    """When a piece of training ends, and how often it is saved.

    Attributes:
        at: `time.monotonic()` at which to save and stop; infinite: never.
        every: steps between checkpoints; 0: none.
        step: to save and stop before; for tests.
    """

    at: float = math.inf
    every: int = 0
    step: int | None = None


class Run:
    """One model in training: what a checkpoint holds, and the step.

    Args:
        name: of the row.
        settings: the budget.
        seed: of weights, order, crops and draws.
        device: ``"cpu"`` or ``"cuda"``, where it is computed in bfloat16.
    """

    def __init__(self, name: str, settings: Settings, seed: int, device: str = "cpu") -> None:
        self.row, self.settings, self.seed, self.device = ROWS[name], settings, seed, device
        self.model: ResNet = build(settings.shape, seed).to(device)
        self.sparsifier = _prepared(self.row, settings, self.model, seed)
        self.rescaled: Rescaled | None = None
        if self.row.rescaled:
            weights = [self.model.get_submodule(layer).weight for layer in prunable(self.model)]
            self.rescaled = Rescaled(weights, self.row.rescaled, self.row.level, seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), settings.rate, 0.9, weight_decay=settings.decay)
        self.done = 0

    @contextmanager
    def masked(self, step: int, steps: int) -> Iterator[None]:
        """What the method does around forward and backward."""
        if self.sparsifier is not None:
            self.sparsifier.follow(td.Ramp(end=self.settings.ramp).at(step, steps))
            self.sparsifier.step()
        if self.rescaled is None:
            yield
        else:
            with self.rescaled.step(step):
                yield

    def fit(self, images: Images, stop: Stop, file: Path, forward: nn.Module | None = None) -> bool:
        """Train on from `done`; whether the end was reached. Otherwise `file` holds where to go on."""
        steps = self.settings.epochs * (len(images.train) // self.settings.batch)
        self.model.train()
        while self.done < steps:
            if self.done == stop.step or time.monotonic() > stop.at:
                self.save(file)
                return False
            self._step(images, steps, self.model if forward is None else forward)
            self.done += 1
            if stop.every and self.done % stop.every == 0:
                self.save(file)
        return True

    def _step(self, images: Images, steps: int, forward: Callable[[Tensor], Tensor]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.at(self.done, steps)
        pixels, labels = batch(images, self.done, self.settings.batch, self.seed)
        self.optimizer.zero_grad()
        with self.masked(self.done, steps):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                scores = forward(pixels)
            cross_entropy(scores.float(), labels).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()

    def save(self, file: Path) -> None:
        """Model and optimizer as tensors; position and sparsifier in the file's metadata."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors[f"momentum.{index}"] = entry["momentum_buffer"]
        position = {"done": self.done, "sparsifier": self.sparsifier and self.sparsifier.state_dict()}
        with staged_file(file) as path:
            save_file(plain(tensors), path, metadata={"position": json.dumps(position)})

    def load(self, file: Path) -> None:
        """Go on where `save` was called."""
        with safe_open(file, "pt", device=self.device) as saved:
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 - not a mapping
            position = json.loads(saved.metadata()["position"])
        self.model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        momenta = {
            int(n.removeprefix("momentum.")): {"momentum_buffer": t} for n, t in tensors.items() if n[:3] == "mom"
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": momenta})
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(position["sparsifier"])
        self.done = position["done"]

    def weights(self) -> Tensors:
        """The trained model, dense; under a gate that scales, and where candidates were fixed, what evaluation runs."""
        if self.sparsifier is not None and (self.row.gate or not self.row.shares):
            self.sparsifier.squash_mask()
        return plain(self.model.state_dict())


def _prepared(row: Row, settings: Settings, model: nn.Module, seed: int) -> td.TargetedDropout | None:
    """The sparsifier of a row, on the model."""
    if row.recipe is None:
        return None
    recipe = row.recipe(settings.strengths)
    sparsifier = td.TargetedDropout(recipe, row.level, seed=seed)
    prepare(sparsifier, model)
    return sparsifier


def prepare(sparsifier: td.TargetedDropout, model: nn.Module) -> None:
    """Put masks on the paper's weights or units."""
    if sparsifier.recipe.granularity.kinds:
        sparsifier.prepare(model, groups=filters(model))
    else:
        sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in prunable(model)])


def plain(tensors: Tensors) -> Tensors:
    """Copies on the CPU in the usual order of memory, as a file holds them."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
