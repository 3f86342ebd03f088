"""Importance criteria: pure functions ``Evidence -> importance``, same shape as the weight, higher = keep."""

from __future__ import annotations

import torch
from torch import Tensor

from td_plugin.contract import Evidence, Measured
from td_plugin.errors import TdError
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


def _given(found: Tensor | None, evidence: Evidence, criterion: str, needs: str) -> Tensor:
    if found is None:
        raise TdError(
            f"{criterion} needs {needs}, and has none",
            where=evidence.name,
            fix="run training steps first: sparsifier.step(), forward, loss.backward()",
        )
    return found


def fisher_information(evidence: Evidence) -> Tensor:
    """``½ w² E[g²]``: what removing a weight adds to the loss, to second order, near a minimum.

    The Hessian's diagonal is taken as the empirical Fisher information: g is the gradient of one example's loss, E the
    mean over examples. Of a unit: ``½ E[(Σ a·g)²]``, the sum over the positions of its feature map, which is the same
    formula for the unit's gate. Theis et al. 2018, arXiv 1801.05787, equations 6 and 9.

    Args:
        evidence: `weight` and `squared_gradient`, ``[*w]``.

    Returns:
        ``[*w]`` float32; in units of the loss.

    Raises:
        TdError: there are no gradients yet.
    """
    squared = _given(evidence.squared_gradient, evidence, "Fisher", "gradients of examples")
    return 0.5 * evidence.weight.float().square() * squared


def taylor_expansion(evidence: Evidence) -> Tensor:
    """``E[(w·g)²]``: the square of what removing a weight changes the loss by, to first order.

    g is the gradient of a step, E the mean over steps; of a unit the gradient with respect to its gate, the sum of
    ``w·g`` over the unit. Molchanov et al. 2019, arXiv 1906.10771, equations 6 and 8.

    Args:
        evidence: `squared_product`, ``[*w]``.

    Returns:
        ``[*w]`` float32.

    Raises:
        TdError: there are no gradients yet.
    """
    return _given(evidence.squared_product, evidence, "Taylor", "gradients")


def accumulated_movement(evidence: Evidence) -> Tensor:
    """``-Σ w·g`` over the steps: positive where training has moved the weight away from 0.

    Sanh et al. 2020, arXiv 2005.07683, section 4 (the learning rate of the scores does not change their order). Signed:
    a large weight that shrinks goes before a small one that grows.

    Args:
        evidence: `movement`, ``[*w]``.

    Returns:
        ``[*w]`` float32, of either sign.

    Raises:
        TdError: there are no gradients yet.
    """
    return _given(evidence.movement, evidence, "movement", "gradients")


def activity(evidence: Evidence) -> Tensor:
    """``|w|·E|x|``, x the input that the weight multiplies; over an input's weights: their norm times its activity.

    The criterion "ARD" of the code of Gomez et al., arXiv 1905.13678. With weights ranked by row it is that of Sun et
    al. 2023, arXiv 2306.11695.

    Args:
        evidence: `weight`, ``[*w]``, and `activation`, broadcastable to it.

    Returns:
        ``[*w]`` float32.

    Raises:
        TdError: there are no activations yet.
    """
    return evidence.weight.float().abs() * _given(evidence.activation, evidence, "ARD", "activations")


fisher = Measured(fisher_information, "squared_gradient", decay=0.99)
taylor = Measured(taylor_expansion, "squared_product", decay=0.99)
movement = Measured(accumulated_movement, "movement")
ard = Measured(activity, "activation", decay=0.9)
