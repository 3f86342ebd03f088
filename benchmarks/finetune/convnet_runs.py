"""The methods of `convnet.py`: each takes the same trained network and the same further steps."""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

import td_plugin as td
from td_plugin import budget
from td_plugin.export import shrink, to_onnx, verify
from td_plugin.files import staged_directory
from td_plugin.granularity import Units
from td_plugin.structure import survey
from td_plugin.widths import runtime_width

sys.path.append(str(Path(__file__).parent.parent / "reproduce"))  # its network, pictures and judge

from resnet_images import Images, batch, load, standardised
from resnet_judge import judge
from resnet_network import Shape, build
from resnet_train import Settings, plain

Found = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """The same for every method.

    Attributes:
        settings: of the network and its training from scratch.
        epochs: of every method, after that.
        ramp: share of them in which γ and α rise.
        held_out: last rows of the training file, which learning rates are chosen by.
    """

    settings: Settings
    epochs: int
    ramp: float = 0.6
    held_out: int = 2_000


SMALL = Shape(stem=16, stem_stride=2, widths=(32, 64, 128), units=1, momentum=0.1)
QUICK = Budget(Settings(SMALL, epochs=12, batch=64, rate=0.1, cosine=True, decay=5e-4, rows=20_480), 6)
FULL = Budget(Settings(Shape(momentum=0.1), epochs=150, rate=0.2, cosine=True, decay=5e-4, rows=48_000), 75)


@dataclass(frozen=True)
class Job:
    """One run, and where everything is.

    Attributes:
        method: of `METHODS`.
        level: γ.
        seed: of weights, order, crops and draws.
        rate: peak learning rate; 0: that of the dense network.
        budget: of all runs.
        train: parquet file.
        test: parquet file.
        output: folder of all runs.
        device: to train on.
    """

    method: str
    level: float
    seed: int
    rate: float
    budget: Budget
    train: str
    test: str
    output: Path
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        rate = f"-lr{self.rate:g}" if self.rate else ""
        return self.output / f"{self.method}-{self.level:g}{rate}-s{self.seed}"

    @property
    def done(self) -> bool:
        """Whether it is there."""
        return (self.folder / "result.json").exists()


CHANNELS = Units(("channels",))
Method = Callable[[Job, nn.Module, Images], nn.Module]
"""``(job, trained network, pictures) -> smaller network``."""


@lru_cache(maxsize=1)
def pictures(train: str, test: str, budget: Budget, device: str) -> tuple[Images, Images]:
    """With the held-out rows to judge on, and with those of the test file."""
    held = load(train, "", budget.settings.rows, budget.held_out).to(device)
    tested = load(train, test, 1, budget.settings.test_rows).to(device)
    return held, tested


def fit(
    job: Job, model: nn.Module, images: Images, epochs: int, sparsifier: td.TargetedDropout | None = None
) -> nn.Module:
    """Train `model` in place: SGD with momentum, warm-up and cosine."""
    settings = replace(job.budget.settings, **({"rate": job.rate} if job.rate else {}))
    steps, ramp = epochs * (len(images.train) // settings.batch), td.Ramp(end=job.budget.ramp)
    optimizer = torch.optim.SGD(model.parameters(), settings.rate, 0.9, weight_decay=settings.decay, nesterov=True)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.at(step, steps)
        pixels, labels = batch(images, step, settings.batch, job.seed)
        if sparsifier is not None:
            sparsifier.follow(ramp.at(step, steps))
            sparsifier.step()
        optimizer.zero_grad()
        with torch.autocast(job.device, torch.bfloat16, enabled=job.device == "cuda"):
            scores = model(pixels)
        cross_entropy(scores.float(), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
    return model.eval()


def example(images: Images) -> dict[str, torch.Tensor]:
    """Two pictures, as the network is called."""
    return {"x": standardised(images.test[:2])}


def kept(width: int, level: float) -> int:
    """The channels that stay of `width`: whole blocks of onnxruntime's, so that none of them is there for nothing."""
    return runtime_width("channels", width - int(level * width), width)


def masked(recipe: td.Recipe, *, trained: bool = True) -> Method:
    """Training under a sparsifier, or its mask at once, then `shrink`."""

    def run(job: Job, dense: nn.Module, images: Images) -> nn.Module:
        inputs = example(images)
        structure, wanted = survey(dense, example_inputs=inputs), budget.Budget(job.level)
        found = budget.widths(dense, structure, wanted, granularity=CHANNELS)
        sparsifier = td.TargetedDropout(recipe, job.level, seed=job.seed)
        sparsifier.prepare(dense, found.config(), example_inputs=inputs)
        if trained:
            fit(job, dense, images, job.budget.epochs, sparsifier)
        sparsifier.squash_mask()
        return shrink(dense.eval(), example_inputs=inputs)

    return run


def unpruned(job: Job, dense: nn.Module, images: Images) -> nn.Module:
    """What the further steps give by themselves."""
    return fit(job, dense, images, job.budget.epochs)


def narrower(job: Job, dense: nn.Module, images: Images) -> nn.Module:
    """A network as wide as the pruned ones, from random weights, for the steps of both trainings together."""
    shape = job.budget.settings.shape
    stem, *others = [kept(width, job.level) for width in (shape.stem, *shape.widths)]
    model = build(replace(shape, stem=stem, widths=tuple(others)), job.seed).to(job.device)
    return fit(job, model, images, job.budget.settings.epochs + job.budget.epochs)


def torch_pruning(job: Job, dense: nn.Module, images: Images) -> nn.Module:
    """Torch-Pruning (Fang et al., arXiv 2301.12900), one shot by group norm, then the same steps."""
    import torch_pruning as tp

    sizes = {module: module.out_channels for module in dense.modules() if isinstance(module, nn.Conv2d)}
    removed = {module: size - kept(size, job.level) for module, size in sizes.items()}
    pruner = tp.pruner.BasePruner(
        dense,
        example(images)["x"],
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio_dict={key: max(removed[key] - 0.5, 0) / size for key, size in sizes.items()},  # it rounds up
        ignored_layers=[dense.classifier],
    )
    pruner.step()
    return fit(job, dense, images, job.budget.epochs)


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        title: in tables and legends.
        run: the method.
        searched: whether its learning rate is chosen.
        needs: a package that the project does without.
    """

    title: str
    run: Method
    searched: bool = True
    needs: str = ""


METHODS = {
    "trained-on": Row("dense, trained on", unpruned),
    "targeted": Row("targeted dropout", masked(td.recipes.ramping_targeted_unit(kinds=("channels",)))),
    "gradual": Row("magnitude, gradual", masked(td.recipes.gradual_magnitude(CHANNELS))),
    "torch-pruning": Row("Torch-Pruning", torch_pruning, needs="torch_pruning"),
    "magnitude": Row("magnitude, one shot", masked(td.recipes.magnitude(CHANNELS), trained=False), searched=False),
    "narrower": Row("narrower, from scratch", narrower, searched=False),
}


def make(job: Job) -> None:
    """Train, judge and export one run, and put its folder in place."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what the exporter says of itself
    held, tested = pictures(job.train, job.test, job.budget, job.device)
    settings, start = job.budget.settings, time.perf_counter()
    model: nn.Module = build(settings.shape, job.seed).to(job.device)
    if job.method == "dense":
        fit(job, model, held, settings.epochs)
    else:
        trained = replace(job, method="dense", level=0.0, rate=0.0).folder / "model.safetensors"
        model.load_state_dict(load_file(trained))
        model = METHODS[job.method].run(job, model, held)
    minutes = (time.perf_counter() - start) / 60
    found: Found = {"method": job.method, "level": job.level, "seed": job.seed, "rate": job.rate, "minutes": minutes}
    found |= {"held_out": judge(model, held)["accuracy"], "test": judge(model, tested)["accuracy"]}
    found["parameters"] = sum(tensor.numel() for tensor in model.parameters())
    with staged_directory(job.folder) as stage:
        small = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
        pixels = standardised(tested.test[:256].cpu()).contiguous()
        to_onnx(small, stage / "model.onnx", pixels[:2])
        found["max_abs"] = verify(small, stage / "model.onnx", [{"x": pixels}]).to_dict()["max_abs"]
        save_file(plain(model.state_dict()), stage / "model.safetensors")
        (stage / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
