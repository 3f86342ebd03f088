"""The network of `resnet.py`, and which of its weights and units can be pruned."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from td_plugin.units import Slice, UnitGroup

CLASSES = 10


@dataclass(frozen=True)
class Shape:
    """Widths and depths; the defaults are those of Gomez et al., arXiv 1905.13678, in the authors' code.

    Theirs is called ResNet-32 and is twice as wide as that of He et al., arXiv 1512.03385.

    Attributes:
        stem: filters of the first convolution, 7 × 7.
        stem_stride: its stride.
        widths: filters of each stage; every stage but the first halves the picture.
        units: residual units of two convolutions in every stage.
        momentum: share that a batch has in the running statistics; 0.003 is TensorFlow's 0.997.
    """

    stem: int = 16
    stem_stride: int = 1
    widths: tuple[int, ...] = (32, 64, 128)
    units: int = 5
    momentum: float = 0.003


class Unit(nn.Module):
    """Norm and ReLU before each of two convolutions; a 1 × 1 projection where a stage begins."""

    def __init__(self, inputs: int, outputs: int, stride: int, first: bool, momentum: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs, eps=1e-3, momentum=momentum)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs, eps=1e-3, momentum=momentum)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if first else None

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w] -> [n, outputs, h / stride, w / stride]``."""
        active = relu(self.norm1(x))
        shortcut = x if self.projection is None else self.projection(active)
        return shortcut + self.conv2(relu(self.norm2(self.conv1(active))))


class ResNet(nn.Module):
    """Pre-activation residual network for pictures of 32 × 32 pixels (He et al., arXiv 1603.05027)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, shape.stem, 7, shape.stem_stride, 3, bias=False)
        units = []
        for stage, (before, width) in enumerate(pairwise((shape.stem, *shape.widths))):
            for index in range(shape.units):
                first = index == 0
                stride = 2 if first and stage else 1
                units.append(Unit(before if first else width, width, stride, first, shape.momentum))
        self.units = nn.Sequential(*units)
        self.norm = nn.BatchNorm2d(shape.widths[-1], eps=1e-3, momentum=shape.momentum)
        self.classifier = nn.Linear(shape.widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 3, h, w] -> [n, classes]``."""
        return self.classifier(relu(self.norm(self.units(self.stem(x)))).mean((2, 3)))


def build(shape: Shape, seed: int) -> ResNet:
    """The network with Glorot's normal weights, as in the authors' code."""
    torch.manual_seed(seed)
    model = ResNet(shape)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_normal_(module.weight)
    nn.init.zeros_(model.classifier.bias)
    return model.to(memory_format=torch.channels_last)


def prunable(model: nn.Module) -> list[str]:
    """Names of the convolutions that are pruned: all but the stem; the classifier is not (the authors' code)."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and name != "stem"]


def filters(model: nn.Module) -> list[UnitGroup]:
    """The paper's units: the filters of each convolution by themselves, without the norm behind them."""
    groups = []
    for name in prunable(model):
        count = int(model.get_submodule(name).weight.shape[0])
        groups.append(UnitGroup(name, "channels", count, (Slice(name, "weight", 0),), (), (), (), (), None))
    return groups
