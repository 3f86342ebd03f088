"""A model in evaluation mode for as long as it is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from td_plugin.own_forward import own_forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, without a Trainer's autocast; both are put back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with own_forward(model):
            yield
    finally:
        for module, training in modes:  # parents come first, so a child that differed is set last
            if module.training != training:
                module.train(training)
