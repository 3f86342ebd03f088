"""The dense and the pruned model in one evaluation of the Trainer."""

from __future__ import annotations

import time
from typing import Any

import torch

from td_plugin.attachment import attached_sparsifier
from td_plugin.errors import TdError

try:
    from transformers import Trainer
    from transformers.trainer_utils import EvalLoopOutput
except ImportError as error:
    raise TdError("transformers is not installed", got=error, fix="pip install 'td-plugin[hf]'") from error


class SideBySide(Trainer):
    """A Trainer whose evaluations report the dense model beside the pruned one.

    `eval_loss` and every `eval_*` stay what they are without it: of the model that ships. The same numbers of the model
    without masks come as `eval_dense_*` (`eval_<set>_dense_*` with several evaluation sets), in the same log and the
    same `on_evaluate`, so callbacks count one evaluation and `metric_for_best_model` may name either. What is trained
    does not change by a bit.

    Every evaluation runs twice and takes twice as long: `eval_runtime` and what follows from it is of both passes,
    `eval_dense_runtime` the share of the second in seconds. `predict` runs once, as do evaluations of a model without
    masks: before training, and after the masks have been baked in. Before other Trainers it is a mixin:
    `class Mine(SideBySide, Seq2SeqTrainer)`.

    Example:
        >>> trainer = SideBySide(..., callbacks=[TargetedDropoutCallback(recipes.ramping_targeted_unit(), 0.75)])
        >>> trainer.train()  # logs eval_loss and eval_dense_loss
    """

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the Trainer's loop, and once more without masks if there are any."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sparsifier = attached_sparsifier(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        if sparsifier is None or description != "Evaluation":
            return output
        prefix, start = f"{metric_key_prefix}_dense", time.perf_counter()
        with sparsifier.dense(), torch.random.fork_rng(devices=[]):  # reading the data takes from torch's generator
            dense = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, prefix)
        found = {**(output.metrics or {}), **(dense.metrics or {})}
        found.pop(f"{prefix}_model_preparation_time", None)
        return output._replace(metrics={**found, f"{prefix}_runtime": round(time.perf_counter() - start, 4)})
