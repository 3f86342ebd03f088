"""Judging a trained network: its weights or units are removed by magnitude, all at once, and nothing is trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from resnet_images import Images, standardised
from resnet_network import Shape, build
from resnet_rows import ROW, UNIT, What
from resnet_train import Tensors, prepare
from torch import nn
from torch.nn.functional import cross_entropy

import td_plugin as td

Verdict = dict[str, float]


@torch.no_grad()
def judge(model: nn.Module, images: Images) -> Verdict:
    """Accuracy and mean cross-entropy over the test rows, in float32."""
    model.train(False)
    right, loss = 0.0, 0.0
    for pixels, labels in zip(images.test.split(500), images.test_labels.split(500), strict=True):
        scores = model(standardised(pixels))
        right += float((scores.argmax(1) == labels).sum())
        loss += float(cross_entropy(scores, labels, reduction="sum"))
    return {"accuracy": right / len(images.test), "loss": loss / len(images.test)}


def dense(weights: Tensors, shape: Shape, images: Images) -> Verdict:
    """Of the weights as they are."""
    return judge(_loaded(weights, shape, images), images)


def pruned(weights: Tensors, shape: Shape, images: Images, what: What, shares: Iterable[float]) -> dict[str, Verdict]:
    """By share removed: ``int(share·n)`` of every output's weights, or of every convolution's filters.

    Importance is |w| and the L2 norm (Gomez et al., arXiv 1905.13678, section 3). The stem, the classifier, biases and
    norms stay.
    """
    model = _loaded(weights, shape, images)
    sparsifier = td.TargetedDropout(td.recipes.magnitude(ROW if what == "weights" else UNIT), 0.0)
    prepare(sparsifier, model)
    found = {}
    for share in shares:
        for group in sparsifier.groups:
            group["sparsity_level"] = share
        found[f"{share:g}"] = judge(model, images)
    return found


def _loaded(weights: Tensors, shape: Shape, images: Images) -> nn.Module:
    model = build(shape, 0)
    model.load_state_dict(weights)
    return model.to(images.test.device)
