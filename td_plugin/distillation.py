"""What a student owes its teacher: losses between their outputs, as pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, mse_loss

from td_plugin.errors import TdError


def _chosen(tensor: Tensor, where: Tensor | None) -> Tensor:
    """``[rows, last]``: those of `where`, or all."""
    return tensor.flatten(0, -2) if where is None else tensor[where]


def soft_targets(student: Tensor, teacher: Tensor, temperature: float, where: Tensor | None = None) -> Tensor:
    """``T² KL(softmax(teacher / T) || softmax(student / T))``, the mean over rows; of one output, the squared distance.

    T² keeps the gradient's size when T changes. Hinton et al. 2015, arXiv 1503.02531, section 2.

    Args:
        student: ``[*, classes]``.
        teacher: of the same shape; no gradient goes there.
        temperature: T.
        where: ``[*]`` bool, the rows that count; None: all. Without any the loss is 0.

    Raises:
        TdError: the shapes differ.
    """
    if student.shape != teacher.shape:
        got = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        raise TdError("the outputs of student and teacher do not fit", got=got, fix="a teacher of the same classes")
    student, teacher = _chosen(student.float(), where), _chosen(teacher.detach().float(), where)
    if student.shape[-1] == 1:
        return (student - teacher).square().sum() / max(len(student), 1)
    log_p, log_q = log_softmax(teacher / temperature, -1), log_softmax(student / temperature, -1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / max(len(student), 1)


def hidden_states(student: Sequence[Tensor], teacher: Sequence[Tensor], where: Tensor | None = None) -> Tensor:
    """Mean over layers, rows and features of the squared distance between hidden states.

    Jiao et al. 2020 (TinyBERT), arXiv 1909.10351, equation 8, without the projection: the widths are the same.

    Args:
        student: ``[*, features]`` by layer.
        teacher: likewise; no gradient goes there.
        where: ``[*]`` bool, the rows that count; None: all.

    Raises:
        TdError: other numbers of layers or widths.
    """
    shapes = [[tuple(h.shape) for h in states] for states in (student, teacher)]
    if shapes[0] != shapes[1] or not student:
        got = f"student {shapes[0][-1:]} of {len(shapes[0])}, teacher {shapes[1][-1:]} of {len(shapes[1])}"
        raise TdError("the hidden states of student and teacher do not fit", got=got, fix="hidden=0")
    pairs = (
        (_chosen(s.float(), where), _chosen(t.detach().float(), where)) for s, t in zip(student, teacher, strict=True)
    )
    return torch.stack([mse_loss(s, t) if s.numel() else s.sum() for s, t in pairs]).mean()
