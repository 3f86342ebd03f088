"""What a run of the Trainer says about its pruning: in every log, and in words at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler

from td_plugin.integrations.run_values import RunValues
from td_plugin.report import SparsityReport
from td_plugin.sparsifier import TargetedDropout


class RunLog:
    """The values of one run.

    Args:
        groups: whether the sparsity of every target is logged, too.

    Attributes:
        values: what is logged.
    """

    def __init__(self, groups: bool) -> None:
        self.values = RunValues(groups)

    def begin(self) -> None:
        """Another run, or another model."""
        self.values.begin()

    def add(self, logs: dict[str, Any], state: TrainerState, sparsifier: TargetedDropout) -> None:
        """Put the values of now into `logs` and into the state's history, which has a copy of them already."""
        values = self.values.of(sparsifier)
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def summary(self, report: SparsityReport, end: int, state: TrainerState) -> str:
        """The end of a run, in words.

        Args:
            report: of the model that ships.
            end: the optimizer step in which the ramp ended.
            state: of the Trainer.
        """
        done, planned = state.global_step, state.max_steps
        reached = f"from step {end} on" if end < done else f"never: the ramp ends at step {end}"
        lines = [
            f"targeted dropout zeroed {report.sparsity:.1%} of {report.elements:,} targeted scalars",
            f"trained {done} of {planned} steps, at the target γ {reached}",
        ]
        if self.values.change is not None:
            lines.append(
                f"last churn {self.values.change.churn:.2%} of the candidates between two logs, "
                f"{self.values.change.survival:.1%} of the first candidates survived"
            )
        return "\n".join([*lines, *trends(state.log_history), str(report)])


def trends(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """How evaluation went, a line for each metric; of the model as `eval_mask` has it.

    Args:
        history: `trainer.state.log_history`.
    """
    timings = ("_runtime", "_per_second", "_compilation_time", "_preparation_time")
    scores: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name.startswith("eval_") and not name.endswith(timings) and isinstance(value, (int, float)):
                scores.setdefault(name, []).append((entry["step"], value))
    return [
        f"{name}: {seen[0][1]:.4f} in step {seen[0][0]}, {seen[-1][1]:.4f} in step {seen[-1][0]}, "
        f"from {min(v for _, v in seen):.4f} to {max(v for _, v in seen):.4f} in {len(seen)} evaluations"
        for name, seen in scores.items()
    ]


def go_before_reporters(callback: TrainerCallback, args: TrainingArguments) -> None:
    """Let `callback` hear of logs before TensorBoard and its like, so that they see what it adds.

    To be called within an event. The Trainer puts its reporters before the callbacks that it is given, and tells no
    callback where they are: the handler is that of the caller's caller.
    """
    handler = sys._getframe(2).f_locals.get("self")
    if not isinstance(handler, CallbackHandler) or callback not in handler.callbacks:
        return
    reporters = tuple(get_reporting_integration_callbacks(args.report_to))  # type: ignore[no-untyped-call]
    places = [i for i, other in enumerate(handler.callbacks) if reporters and isinstance(other, reporters)]
    if places and places[0] < handler.callbacks.index(callback):
        others = [other for other in handler.callbacks if other is not callback]  # a new list: the old one is walked
        handler.callbacks = [*others[: places[0]], callback, *others[places[0] :]]
