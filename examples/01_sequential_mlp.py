"""A plain training loop: scikit-learn's digits, an MLP, half of its neurons gone for good.

Run: python examples/01_sequential_mlp.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import td_plugin as td
from td_plugin.export import load_pretrained, save_pretrained, shrink

EPOCHS, BATCH = 30, 64


def main() -> None:
    torch.manual_seed(0)
    images, classes = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, classes, test_size=0.25, random_state=0, stratify=classes)
    train_x, test_x = (torch.as_tensor(part, dtype=torch.float32) for part in parts[:2])
    train_y, test_y = (torch.as_tensor(part, dtype=torch.long) for part in parts[2:])

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    sparsifier = td.TargetedDropout(td.recipes.ramping_targeted_unit(), sparsity_level=0.75, seed=0)
    sparsifier.prepare(model)
    steps = EPOCHS * -(-len(train_x) // BATCH)
    scheduler = td.TargetedDropoutScheduler(sparsifier, recipe_steps=steps // 2)

    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train_x)).split(BATCH):
            sparsifier.step()  # rank the neurons and draw this step's masks
            loss = nn.functional.cross_entropy(model(train_x[rows]), train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()  # γ and α grow over the first half of the run

    sparsifier.squash_mask()
    model.eval()
    small = shrink(model)
    save_pretrained(small, "build/example-mlp")
    small = load_pretrained("build/example-mlp", model)

    with torch.no_grad():
        accuracy = (small(test_x).argmax(-1) == test_y).float().mean().item()
        difference = (small(test_x) - model(test_x)).abs().max().item()
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    print(f"{before:,} parameters -> {after:,}; accuracy {accuracy:.3f}; largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
