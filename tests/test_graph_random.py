"""Random models of the supported operators, random units: the cut model computes what the masked one does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from graph_models import Rms, eager, floats, heads, merged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_graph_oracle import masked, output, shrunk
from torch import Tensor, nn

from td_plugin.structure import UnitGroup, survey

CHANNELS = ("conv", "grouped", "depthwise", "norm", "act", "pool", "residual", "concat", "excite", "shuffle")
ROWS = ("linear", "norm", "act", "residual", "concat", "gate", "packed", "attention", "split", "lstm", "scale")


@dataclass(frozen=True)
class Step:
    """One operator of a program: what it does, and two numbers that choose widths and kinds."""

    what: str
    width: int
    kind: int


class Block(nn.Module):
    """One operator on ``[b, c, h, w]`` or ``[b, s, c]``."""

    def __init__(self, step: Step, inputs: int, rows: bool) -> None:
        super().__init__()
        self.step, self.rows = step, rows
        made = _rows(step, inputs) if rows else _channels(step, inputs)
        self.layers = nn.ModuleList(made[1])
        self.outputs = made[0]

    def forward(self, x: Tensor) -> Tensor:
        act = (F.relu, F.silu, F.gelu, torch.tanh)[self.step.kind % 4]
        layers, along = list(self.layers), -1 if self.rows else 1
        if self.step.what == "act":
            return act(x)
        if self.step.what == "pool":
            return (F.avg_pool2d, F.max_pool2d)[self.step.kind % 2](x, 3, 1, 1)
        if self.step.what == "residual":
            return x + layers[1](act(layers[0](x)))
        if self.step.what == "concat":
            return torch.cat((x, layers[0](x)), along)
        if self.step.what == "excite":
            return x * layers[1](layers[0](x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        if self.step.what == "shuffle":
            return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return _row_forward(self.step.what, layers, x, act)


def _row_forward(what: str, layers: list[nn.Module], x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    if what == "gate":
        return act(layers[0](x)) * layers[1](x)
    if what == "packed":
        one, other = layers[0](x).chunk(2, -1)
        return act(one) * other
    if what == "split":
        one, other = layers[0](x).chunk(2, -1)
        return layers[1](act(one)) + layers[2](other)
    if what == "attention":
        return x + layers[3](merged(eager(*(heads(layer(x), 2) for layer in layers[:3]))))
    if what == "lstm":
        return layers[0](x)[0]
    if what == "scale":
        return x * layers[0].weight
    return layers[0](x)


def _channels(step: Step, n: int) -> tuple[int, list[nn.Module]]:
    width = 2 * step.width
    norm = (nn.BatchNorm2d(n), nn.GroupNorm(n // 2, n), nn.InstanceNorm2d(n, affine=True))[step.kind % 3]
    return {
        "conv": (width, [nn.Conv2d(n, width, 3, padding=1)]),
        "grouped": (width, [nn.Conv2d(n, width, 3, padding=1, groups=2)]),
        "depthwise": (n * (1 + step.kind % 2), [nn.Conv2d(n, n * (1 + step.kind % 2), 3, padding=1, groups=n)]),
        "norm": (n, [norm]),
        "residual": (n, [nn.Conv2d(n, width, 3, padding=1), nn.Conv2d(width, n, 1)]),
        "concat": (n + width, [nn.Conv2d(n, width, 1)]),
        "excite": (n, [nn.Conv2d(n, width, 1), nn.Conv2d(width, n, 1)]),
    }.get(step.what, (n, []))


def _rows(step: Step, n: int) -> tuple[int, list[nn.Module]]:
    width = 2 * step.width
    norm = (nn.RMSNorm(n, eps=0.01), Rms(n), nn.RMSNorm(n, eps=0.1))[step.kind % 3]
    return {
        "linear": (width, [nn.Linear(n, width, bias=bool(step.kind % 2))]),
        "norm": (n, [norm]),
        "residual": (n, [nn.Linear(n, width), nn.Linear(width, n)]),
        "concat": (n + width, [nn.Linear(n, width)]),
        "gate": (width, [nn.Linear(n, width), nn.Linear(n, width)]),
        "packed": (width, [nn.Linear(n, 2 * width)]),
        "split": (n, [nn.Linear(n, 2 * width), nn.Linear(width, n), nn.Linear(width, n)]),
        "attention": (n, [*(nn.Linear(n, width) for _ in range(3)), nn.Linear(width, n)]),
        "lstm": (width, [nn.LSTM(n, width, batch_first=True)]),
        "scale": (n, [nn.Embedding(1, n)]),
    }.get(step.what, (n, []))


class Program(nn.Module):
    """A first layer, the steps, and a last layer that fixes the outputs."""

    def __init__(self, steps: list[Step], rows: bool, flat: bool) -> None:
        super().__init__()
        self.rows, self.flat = rows, flat
        self.first = nn.Linear(3, 8) if rows else nn.Conv2d(3, 8, 3, padding=1)
        width, blocks = 8, []
        for step in steps:
            blocks.append(Block(step, width, rows))
            width = blocks[-1].outputs
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(width * 25 if flat and not rows else width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        if not self.rows:
            x = x.flatten(1) if self.flat else x.mean((2, 3))
        return self.last(x)


def steps(names: tuple[str, ...]) -> st.SearchStrategy[list[Step]]:
    return st.lists(st.builds(Step, st.sampled_from(names), st.integers(1, 4), st.integers(0, 11)), max_size=6)


def program(operators: list[Step], rows: bool, flat: bool) -> nn.Module:
    torch.manual_seed(0)
    model = Program(operators, rows, flat).double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.3)
    return model


def draw_units(data: st.DataObject, groups: list[UnitGroup]) -> list[tuple[UnitGroup, list[int]]]:
    """For some groups some units, never all."""
    drawn = []
    for group in groups:
        kept = data.draw(st.sets(st.integers(0, group.units - 1), min_size=1))
        drawn.append((group, [unit for unit in range(group.units) if unit not in kept]))
    return drawn


def check(model: nn.Module, x: Tensor, data: st.DataObject) -> None:
    structure = survey(model, {"x": x}, source="graph")
    groups = [group for group in structure.groups if group.kind != "layers"]
    gone = draw_units(data, groups)
    expected, small = output(masked(model, gone), {"x": x}), shrunk(model, gone)
    assert (output(small, {"x": x}) - expected).abs().max() < 1e-9 * max(1, float(expected.abs().max()))
    named = dict(model.named_parameters())
    left = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in named.items()}
    for group, units in gone:
        for part in group.slices:
            if part.fqn in left:
                rows = left[part.fqn].movedim(part.dim, 0)
                rows[torch.isin(part.units(len(rows)), torch.tensor(units, dtype=torch.long))] = False
    assert sum(p.numel() for p in small.parameters()) == sum(int(entries.sum()) for entries in left.values())


FEW = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@FEW
@given(steps(CHANNELS), st.booleans(), st.data())
def test_random_convolutional_models(operators: list[Step], flat: bool, data: st.DataObject) -> None:
    check(program(operators, False, flat), floats(2, 3, 5, 5), data)


@FEW
@given(steps(ROWS), st.data())
def test_random_models_of_rows(operators: list[Step], data: st.DataObject) -> None:
    check(program(operators, True, False), floats(2, 4, 3), data)
