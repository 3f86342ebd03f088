"""The paper's toy experiment: what pruning does to the loss of a tiny network, with targeted dropout and without.

    python benchmarks/toy.py [--epochs 20 --rate 0.3]
    python benchmarks/toy.py --data cifar10_train.parquet --rows 20000 --epochs 60 --rate 0.01

One hidden layer of 10 ReLU units; γ = 0.75, α = 0.5 on the weights that make the units; plain SGD. After training 75 %
of these weights are removed. Gomez et al., arXiv 1905.13678: |ΔE| = 0.1207 without targeted dropout and 0.0146
with it, on CIFAR-10, after 200 epochs at a learning rate of 0.001.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from methods_tasks import Images, Settings, load
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import td_plugin as td
from td_plugin.files import staged_file

HIDDEN, GAMMA, ALPHA = 10, 0.75, 0.5


def train(
    images: Images, drop_rate: float, epochs: int, rate: float, seed: int
) -> tuple[nn.Module, td.TargetedDropout]:
    """The network, trained with targeted weight dropout at α = `drop_rate`; 0 is training without."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(images.train[0].numel(), HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(drop_rate), GAMMA, seed=seed)
    sparsifier.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    settings = Settings(steps=epochs * -(-len(images.train) // 64))
    for pixels, labels in images.batches(settings, seed):
        sparsifier.step()
        optimizer.zero_grad()
        cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    return model, sparsifier


@torch.no_grad()
def judge(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss and accuracy over some rows."""
    model.train(False)
    scores = model(pixels)
    return float(cross_entropy(scores, labels)), float((scores.argmax(-1) == labels).float().mean())


def measure(images: Images, drop_rate: float, epochs: int, rate: float, seed: int) -> dict[str, float]:
    """Loss and accuracy on the test rows before and after pruning, and the change of the loss on the training rows."""
    model, sparsifier = train(images, drop_rate, epochs, rate, seed)
    test, own = (images.test, images.test_labels), (images.train, images.train_labels)
    with sparsifier.dense():
        (loss, accuracy), (train_loss, _) = judge(model, *test), judge(model, *own)
    (pruned_loss, pruned_accuracy), (pruned_train_loss, _) = judge(model, *test), judge(model, *own)
    return {
        "loss": loss, "accuracy": accuracy, "pruned_loss": pruned_loss, "pruned_accuracy": pruned_accuracy,
        "change": abs(pruned_loss - loss), "train_change": abs(pruned_train_loss - train_loss),
    }  # fmt: skip


def compare(images: Images, epochs: int, rate: float, seeds: Sequence[int], progress: bool = True) -> dict[str, list]:
    """Both trainings for every seed."""
    found: dict[str, list[dict[str, float]]] = {"none": [], "targeted_weight": []}
    for seed in tqdm(seeds, desc="seeds", file=sys.stderr, disable=not progress):
        found["none"].append(measure(images, 0.0, epochs, rate, seed))
        found["targeted_weight"].append(measure(images, ALPHA, epochs, rate, seed))
    return found


def markdown(found: dict[str, list[dict[str, float]]]) -> str:
    """The table, means over the seeds, and the ratio of the changes."""
    keys = ("loss", "pruned_loss", "change", "train_change", "accuracy", "pruned_accuracy")
    lines = ["| training | loss | pruned | change | on training rows | accuracy | pruned |", "|---|" + "---|" * 6]
    for name, runs in found.items():
        lines.append(
            f"| {name} | " + " | ".join(f"{statistics.mean(run[key] for run in runs):.4f}" for key in keys) + " |"
        )
    changes = [statistics.mean(run["change"] for run in runs) for runs in found.values()]
    return "\n".join(
        [*lines, "", f"Without targeted dropout the loss changes {changes[0] / changes[1]:.1f} times as much."]
    )


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="parquet file with columns image and label; default: the digits")
    parser.add_argument("--rows", type=int, default=5000, help="of that file")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0.001, help="learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("build/toy"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = compare(load(args.data, Settings(rows=args.rows)), args.epochs, args.rate, args.seeds)
    document = {"rows": args.rows, "epochs": args.epochs, "rate": args.rate, "seeds": args.seeds, "runs": found}
    with staged_file(args.output / "toy.json") as path:
        path.write_text(json.dumps(document, indent=1) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
