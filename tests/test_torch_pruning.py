"""Torch-Pruning's dependency graph as an oracle: what goes with a channel, where it supports the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from graph_models import Net, conv, dense_block, excite, lin, net, residual
from torch import Tensor, nn

from td_plugin.structure import survey

Entries = set[tuple[str, int, frozenset[int]]]
"""(tensor, dim, entries) that are removed together."""

_NORM = (nn.BatchNorm2d, nn.PReLU)


def batch(channels: int) -> Callable[[], nn.Module]:
    return lambda: nn.BatchNorm2d(channels)


def mobile(m: Net, x: Tensor) -> Tensor:
    """An inverted residual of MobileNet."""
    y = m.n0(m.stem(x)).relu()
    z = F.relu6(m.n2(m.deep(F.relu6(m.n1(m.wide(y))))))
    return m.head((y + m.n3(m.thin(z))).mean((2, 3)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers of neurons": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 12), nn.GELU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
    ),
    "convolutions, then flat": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.PReLU(6),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 2),
        nn.Flatten(),
        nn.Linear(16, 3),
    ),
    "residual": net(
        residual,
        stem=conv(3, 6),
        a1=conv(6, 4),
        n1=batch(4),
        b1=conv(4, 6),
        m1=batch(6),
        a2=conv(6, 5),
        n2=batch(5),
        b2=conv(5, 6),
        m2=batch(6),
        head=lin(6, 2),
    ),
    "dense": net(dense_block, a=conv(3, 4), b=conv(4, 5), c=conv(9, 6), d=conv(15, 2)),
    "depthwise": net(
        mobile,
        stem=conv(3, 6),
        n0=batch(6),
        wide=conv(6, 12, 1),
        n1=batch(12),
        deep=conv(12, 12, groups=12),
        n2=batch(12),
        thin=conv(12, 6, 1),
        n3=batch(6),
        head=lin(6, 2),
    ),
    "squeeze and excite": net(excite, a=conv(3, 6), down=conv(6, 4, 1), up=conv(4, 6, 1), c=conv(6, 2)),
}


def theirs(model: nn.Module, graph: torch_pruning.DependencyGraph, layer: nn.Module, channel: int) -> Entries:
    names = {module: name for name, module in model.named_modules()}
    pruner = graph.get_pruner_of_module(layer)
    found: Entries = set()
    for dependency, entries in graph.get_pruning_group(layer, pruner.prune_out_channels, idxs=[channel]):
        module = dependency.target.module
        if module not in names:
            continue  # an operator without tensors
        reads = "in_channels" in dependency.handler.__name__ and not isinstance(module, _NORM)
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        for tensor, value in tensors.items():
            if value.ndim and not (reads and (tensor == "bias" or getattr(module, "groups", 1) > 1)):
                found.add((f"{names[module]}.{tensor}", int(reads), frozenset(entries)))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_same_entries_go_with_every_channel(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().eval(), torch.randn(2, 3, 8, 8)
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    argument = "input" if isinstance(model, nn.Sequential) else "x"
    groups = survey(model, {argument: x}, source="graph").groups
    assert groups
    sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for group in groups:
        layer = model.get_submodule(group.ranked[0].module)
        assert group.units == group.ranked[0].units(sizes[group.ranked[0].fqn][0]).unique().numel()
        for unit in range(group.units):
            ours: Entries = set()
            for part in group.slices:
                entries = torch.nonzero(part.units(sizes[part.fqn][part.dim]) == unit).flatten().tolist()
                ours.add((part.fqn, part.dim, frozenset(entries)))
            assert ours == theirs(model, graph, layer, unit)
