"""Importance criteria: pure functions ``Evidence -> importance``, same shape as the weight, higher = keep."""

from __future__ import annotations

import torch
from torch import Tensor

from td_plugin.contract import Evidence
from td_plugin.masks import draw_key


def magnitude(evidence: Evidence) -> Tensor:
    """``|w|``, in float32.

    With a unit granularity the importance of a unit is the L2 norm of its incoming weights.
    Gomez et al., arXiv 1905.13678, section 3: weights by ``|W_io|``, units by ``‖w_o‖₂``.

    Args:
        evidence: `weight`, ``[*w]``.

    Returns:
        ``[*w]`` float32.
    """
    return evidence.weight.float().abs()


def standardized(evidence: Evidence) -> Tensor:
    """``|w| / std(w)``: magnitudes in standard deviations of their tensor, which can be compared between tensors.

    A tensor without spread is taken as it is. Han et al. 2015, arXiv 1506.02626, section 3 (the quality parameter).

    Args:
        evidence: `weight`, ``[*w]``.

    Returns:
        ``[*w]`` float32.
    """
    weight = evidence.weight.float()
    deviation = weight.std(correction=0)
    return weight.abs() / torch.where(deviation > 0, deviation, 1.0)


def random(evidence: Evidence) -> Tensor:
    """A fixed random ranking, a function of the seed and the tensor's name: the control of every pruning paper.

    Args:
        evidence: `weight` (its shape and device), `name`, `seed`.

    Returns:
        ``[*w]`` float32 in (0, 1), the same in every step and after a resume.
    """
    generator = torch.Generator().manual_seed(draw_key("random importance", evidence.seed, evidence.name))
    return torch.rand(evidence.weight.shape, generator=generator).to(evidence.weight.device)
