"""A model of your own, with residual streams: trained with targeted dropout, shrunk twice while training goes on.

Run: python examples/03_any_model.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import td_plugin as td
from td_plugin.export import load_into, save_pretrained, shrink
from td_plugin.structure import survey


class Block(nn.Module):
    """Two convolutions beside the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    """A small residual network."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.head(self.blocks(torch.relu(self.norm(self.stem(images)))).mean((2, 3)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images, labels, epochs: int, sparsifier=None) -> None:
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            if sparsifier is not None:
                sparsifier.set_progress(epoch / (epochs - 1))
                sparsifier.step()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()


def accuracy(model: nn.Module, images, labels) -> float:
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    test, model, example = (images[1400:], labels[1400:]), Net(), {"images": images[:2]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    print([(group.name, group.units) for group in survey(model, example).groups])  # the stream, and inside each block

    sparsifier = td.TargetedDropout(td.recipes.ramping_targeted_unit(), sparsity_level=0.5)
    sparsifier.prepare(model, example_inputs=example)
    train(model, optimizer, images[:1400], labels[:1400], 8, sparsifier)
    print(f"accuracy, pruned: {accuracy(model, *test):.3f}")

    small = shrink(model, example_inputs=example, optimizer=optimizer)  # the optimizer goes on with `small`
    train(small, optimizer, images[:1400], labels[:1400], 4)
    count = [sum(tensor.numel() for tensor in each.parameters()) for each in (model, small)]
    print(f"{count[0]:,} -> {count[1]:,} parameters; accuracy, trained on: {accuracy(small, *test):.3f}")
    save_pretrained(small, "build/example-any/small")
    print(f"reloaded: {accuracy(load_into('build/example-any/small', Net), *test):.3f}")


if __name__ == "__main__":
    main()
