"""Distillation from the dense teacher under the Trainer: one more argument of `TargetedDropoutCallback`.

The loss is reached without a subclass of the Trainer: a hook adds to the loss that the model returns, before the
Trainer divides it by the accumulation steps, a scaler multiplies it and the backward runs. In evaluation the hook does
nothing. Where the Trainer computes the loss itself (label smoothing, `compute_loss_func`), there is none to add to, and
training stops with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import ModelOutput

from td_plugin.contract import check_fraction
from td_plugin.distillation import hidden_states, soft_targets
from td_plugin.errors import TdError
from td_plugin.parametrization import detach, masks_of

_OURS = ("labels", "num_items_in_batch", "shift_labels", "output_hidden_states", "return_dict")


@dataclass(frozen=True)
class Distillation:
    """``(1 - λ)·loss + λ·T²·KL(teacher || student) + μ·MSE(hidden states)``.

    Hinton et al. 2015, arXiv 1503.02531; hidden states as Jiao et al. 2020, arXiv 1909.10351.

    Attributes:
        teacher: None: a frozen copy of the model as the Trainer was given it, dense. It is held by the callback, in
            evaluation mode, with the memory of its weights; it is not part of the model and not saved. A run that is
            resumed must be given the same model to start from, or a teacher.
        temperature: T, above 0.
        logits: λ in [0, 1].
        hidden: μ, 0 or more; the teacher must be as wide and deep as the model.

    Raises:
        TdError: a number outside its range, or nothing to learn.
    """

    teacher: nn.Module | None = None
    temperature: float = 2.0
    logits: float = 0.5
    hidden: float = 0.0

    def __post_init__(self) -> None:
        check_fraction(self.logits, "logits (λ)", "Distillation", closed=True)
        for name, value, least in (("temperature", self.temperature, 1e-6), ("hidden", self.hidden, 0.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
                raise TdError(f"{name} is out of range", where="Distillation", got=value, fix="temperature 2, hidden 1")
        if self.logits == 0 and self.hidden == 0:
            raise TdError("there is nothing to learn from the teacher", where="Distillation", fix="logits=0.5")


def dense_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` without masks, with its dense weights."""
    twin = copy.deepcopy(model)
    for module in {id(module): module for module, _, _ in masks_of(twin)}.values():
        detach(module)
    return twin


class Lesson:
    """The hooks on one model; copies of them, in deep copies of the model, do nothing.

    Args:
        distillation: the weights of the terms.
        teacher: frozen here.
        model: the student.
        autocast: what the student computes in, and the teacher with it; None: the type of its weights. The hooks run
            outside of the autocast that the Trainer puts around the student.
    """

    def __init__(
        self, distillation: Distillation, teacher: nn.Module, model: nn.Module, autocast: torch.dtype | None = None
    ) -> None:
        self._autocast = autocast
        self._of, self._divides = distillation, dict[str, bool]()
        self._teacher: nn.Module | None = teacher.requires_grad_(False).eval()
        self._handles = [
            model.register_forward_pre_hook(_Ask(self), with_kwargs=True),
            model.register_forward_hook(_Learn(self), with_kwargs=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"_of": self._of, "_divides": {}, "_teacher": None, "_handles": [], "_autocast": self._autocast}

    def end(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def runs(self, model: nn.Module) -> bool:
        """Whether this forward is one of training."""
        return self._teacher is not None and model.training and torch.is_grad_enabled()

    def asks(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the student is called with: its hidden states are needed, too."""
        return {**kwargs, "output_hidden_states": True} if self._of.hidden else kwargs

    @torch.no_grad()
    def _taught(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        teacher = self._teacher
        if teacher is None:
            raise TdError("the lesson is over", where="Distillation")
        device = next((v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if device is not None:
            teacher.to(device)
        if device is None or self._autocast is None:
            return teacher(*args, **kwargs)
        with torch.autocast(device.type, self._autocast):
            return teacher(*args, **kwargs)

    def adds(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """`output` with the teacher's part in its loss.

        Raises:
            TdError: the model has returned no loss, or no logits.
        """
        if not isinstance(output, ModelOutput) or output.get("loss") is None or output.get("logits") is None:
            raise TdError(
                "distillation adds to the loss that the model returns, and it has returned none, or no logits",
                where=type(model).__name__,
                got=sorted(output) if isinstance(output, ModelOutput) else type(output).__name__,
                fix="leave out label_smoothing_factor and compute_loss_func, and pass labels to the model",
            )
        clean = {name: value for name, value in kwargs.items() if name not in _OURS}
        taught = self._taught(args, self.asks(clean))
        where = _positions(model, kwargs.get("labels"), output["logits"])
        loss = (1 - self._of.logits) * output["loss"]
        scale = self._scale(args, clean, kwargs, where)
        if self._of.logits:
            loss = loss + scale * self._of.logits * soft_targets(
                output["logits"], taught["logits"], self._of.temperature, where
            )
        if self._of.hidden:
            loss = loss + scale * self._of.hidden * self._hidden(model, output, taught, kwargs.get("attention_mask"))
        output["loss"] = loss
        return output

    def _hidden(self, model: nn.Module, output: Any, taught: Any, attended: Tensor | None) -> Tensor:
        if output.get("hidden_states") is None or taught.get("hidden_states") is None:
            raise TdError("the model returns no hidden states", where=type(model).__name__, fix="hidden=0")
        states = output["hidden_states"]
        fits = attended is not None and attended.shape == states[0].shape[:-1]
        where = attended.bool() if fits and attended is not None else None
        return hidden_states(states, taught["hidden_states"], where)

    def _scale(
        self, args: tuple[Any, ...], clean: dict[str, Any], kwargs: dict[str, Any], where: Tensor | None
    ) -> Tensor | float:
        """What a mean over this micro-batch is multiplied by to be on a par with the model's own loss.

        With accumulation the Trainer may pass the number of labels of all micro-batches of a step. Some models divide
        their sum by it, others ignore it; the teacher is asked once which of the two it is.
        """
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        if items is None or labels is None:
            return 1.0
        if "answer" not in self._divides:
            plain = self._taught(args, {**clean, "labels": labels})
            told = self._taught(args, {**clean, "labels": labels, "num_items_in_batch": items * 0 + 1e6})
            self._divides["answer"] = bool(plain["loss"] != told["loss"])
        here = labels.ne(-100) if where is None else where
        return here.sum() / items if self._divides["answer"] else 1.0


def _positions(model: nn.Module, labels: Tensor | None, logits: Tensor) -> Tensor | None:
    """``[*]`` bool: where a label says that the output counts; None where labels are not of that shape."""
    if labels is None or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        return None
    counts = labels.ne(-100)
    if labels.dim() > 1 and type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        counts = torch.cat([counts[..., 1:], torch.zeros_like(counts[..., :1])], -1)  # each predicts the next
    return counts


@dataclass(frozen=True)
class _Ask:
    lesson: Lesson

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return (args, self.lesson.asks(kwargs)) if self.lesson.runs(module) else None


@dataclass(frozen=True)
class _Learn:
    lesson: Lesson

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.lesson.adds(module, args, kwargs, output) if self.lesson.runs(module) else output


class Teaching:
    """The lessons that one callback gives: to the model of the Trainer, from the start of training to its end."""

    def __init__(self, distillation: Distillation) -> None:
        self._of, self._teacher = distillation, distillation.teacher
        self._lesson: Lesson | None = None

    def meet(self, model: nn.Module | None) -> None:
        """Copy the teacher from the model that the Trainer has been given, before a checkpoint is loaded."""
        if self._teacher is None and model is not None:
            self._teacher = dense_copy(model)

    def begin(self, model: nn.Module, resumed: bool, autocast: torch.dtype | None = None) -> None:
        """Teach `model`, which computes in `autocast`.

        Raises:
            TdError: a resumed run whose teacher is not known.
        """
        if self._teacher is None and resumed:
            raise TdError(
                "the teacher of a resumed run is not in the checkpoint",
                where="Distillation",
                fix="pass the callback to Trainer(callbacks=[...]), or Distillation(teacher=model)",
            )
        self.end()
        self.meet(model)
        if self._teacher is not None:
            self._lesson = Lesson(self._of, self._teacher, model, autocast)

    def end(self) -> None:
        """The model is on its own."""
        if self._lesson is not None:
            self._lesson.end()
            self._lesson = None
