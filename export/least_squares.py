"""Which units a layer's input can do without, by LASSO, and the weights that make the best of the others.

He, Zhang & Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv 1707.06168, equations 1 to 3, on
the Gram matrices of the samples: no array is as long as rows × units × outputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from td_plugin.errors import TdError

_RIDGE = 1e-6  # of the mean squared input; keeps the solution near the weights there are where rows are few
_HALVINGS = 24  # of the logarithmic range in which the penalty is searched
_LEAST = 1e-6  # penalty tried, of the one that drops everything


@dataclass(frozen=True)
class Samples:
    """One layer that reads the units.

    Attributes:
        x: ``[rows, in · kernel]`` float64, read in the model as it is now.
        y: ``[rows, out]`` float64, computed there in the dense model.
        weight: ``[out, in · kernel]`` float64.
        bias: ``[out]`` float64; None where the layer has none, and none is fitted.
        owners: ``[in · kernel]`` the unit of each entry, -1 for entries of no unit of the group.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    bias: Tensor | None
    owners: Tensor

    @property
    def scale(self) -> float:
        """Sum of squares of what is to be computed; errors are given as shares of it."""
        return max(float(self.y.square().sum()), torch.finfo(torch.float64).tiny)

    def kept(self, keep: Tensor) -> Tensor:
        """``[in · kernel]`` bool: entries of the units `keep`, and those of no unit."""
        return (self.owners < 0) | torch.isin(self.owners, keep)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """``‖y - x wᵀ - b‖² / ‖y‖²`` over all rows and outputs."""
        computed = self.x @ weight.T + (0 if bias is None else bias)
        return float((self.y - computed).square().sum()) / self.scale


def rank_by_lasso(readers: Sequence[Samples], order: Tensor, keep: int) -> Tensor:
    """``[units]`` indices, the most useful first, of which the LASSO of `keep` or fewer units takes the first ones.

    Minimises ``‖Y - Σᵢ βᵢ Xᵢ Wᵢᵀ‖² / 2 + λ‖β‖₁`` with every ``‖Wᵢ‖ = 1`` over β, for the smallest λ found that leaves
    at most `keep` units (equation 2); equally useless ones follow in the order of a slightly smaller λ.

    Args:
        readers: the layers that read the units; their errors count as shares of what they compute.
        order: ``[units]`` indices, the largest unit first: decides where the samples do not.
        keep: how many may stay.

    Raises:
        TdError: scikit-learn is not installed.
    """
    units = len(order)
    gram, target = torch.zeros(units, units, dtype=torch.float64), torch.zeros(units, dtype=torch.float64)
    for reader in readers:
        part, wanted = _normal_equations(reader, units)
        gram, target = gram + part / reader.scale, target + wanted / reader.scale
    # The same minimum with a square design: DᵀD is the Gram matrix and Dᵀt the target.
    values, vectors = torch.linalg.eigh(gram)
    roots = values.clamp(min=0).sqrt()
    useful = roots > roots.amax() * 1e-9
    design = (vectors * roots).T[useful]
    wanted = (vectors.T @ target)[useful] / roots[useful]
    few, more = _search(design, wanted, keep)
    told = gram.diagonal().tolist()
    return torch.tensor(sorted(order.tolist(), key=lambda unit: (-abs(few[unit]), -abs(more[unit]), -told[unit])))


def _normal_equations(reader: Samples, units: int) -> tuple[Tensor, Tensor]:
    """``[units, units]`` products of what the units add to the output at unit weight, and ``[units]`` with y."""
    owned = reader.owners >= 0
    x, weight = reader.x[:, owned], reader.weight[:, owned]
    y = reader.y - reader.x[:, ~owned] @ reader.weight[:, ~owned].T
    if reader.bias is not None:  # fitted with the others, so only what varies is told apart
        x, y = x - x.mean(0), y - y.mean(0)
    member = torch.nn.functional.one_hot(reader.owners[owned], units).double()
    norms = (weight.square().sum(0) @ member).sqrt()
    weight = weight / norms.clamp(min=torch.finfo(torch.float64).tiny)[reader.owners[owned]]
    gram = member.T @ ((x.T @ x) * (weight.T @ weight)) @ member
    return gram, ((x.T @ y) * weight.T).sum(1) @ member


def _search(design: Tensor, wanted: Tensor, keep: int) -> tuple[list[float], list[float]]:
    """β at the smallest penalty found with at most `keep` units, and at the largest found with more."""
    linear_model = _solver()
    rows, units = design.shape
    x, y = design.numpy(), wanted.numpy()
    high = float((design.T @ wanted).abs().amax()) / max(rows, 1) if rows else 0.0
    few = more = [0.0] * units
    if high == 0.0:  # nothing is of any use
        return few, more
    low = high * _LEAST
    lasso: Any = linear_model.Lasso(fit_intercept=False, precompute=True, warm_start=True, max_iter=2000, tol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which units are used is clear long before their share is
        for _ in range(_HALVINGS):
            lasso.set_params(alpha=math.sqrt(low * high))
            beta = lasso.fit(x, y).coef_.tolist()
            used = sum(value != 0 for value in beta)
            if used > keep:
                low, more = lasso.alpha, beta
            else:
                high, few = lasso.alpha, beta
            if used == keep:
                break
    return few, more


def _solver() -> Any:
    try:
        from sklearn import linear_model
    except ImportError as error:
        fix = "pip install 'td-plugin[lasso]'"
        raise TdError("scikit-learn solves the LASSO and is not installed", got=error, fix=fix) from error
    return linear_model


def plain(reader: Samples, keep: Tensor) -> Tensor:
    """``[out, in · kernel]``: the weight without the units that go, nothing else changed."""
    return reader.weight * reader.kept(keep)


def reconstruct(reader: Samples, keep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weight and bias on the units `keep` that come closest to y on the samples (equation 3).

    Solved for the change of the weights there are, with a ridge of 1e-6 of the mean squared input: where rows are fewer
    than entries, what they do not tell stays as it is. Never worse on the samples than `plain`.

    Args:
        reader: the layer.
        keep: indices of the units that stay.
        dtype: of the model; the error is that after rounding to it.

    Returns:
        ``[out, in · kernel]`` with zeros for the units that go, and ``[out]`` or None.
    """
    mask, weight = reader.kept(keep), plain(reader, keep)
    x = reader.x[:, mask]
    left = reader.y - x @ weight[:, mask].T - (0 if reader.bias is None else reader.bias)
    shift, mean = torch.zeros(()), torch.zeros(())
    if reader.bias is not None:
        mean, shift = x.mean(0), left.mean(0)
    centred = x - mean
    gram = centred.T @ centred
    ridge = _RIDGE * float(gram.diagonal().mean()) + torch.finfo(torch.float64).tiny
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    if int(failed):
        return weight, reader.bias
    change = torch.cholesky_solve(centred.T @ (left - shift), factor)
    solved = weight.clone()
    solved[:, mask] += change.T
    bias = None if reader.bias is None else reader.bias + shift - change.T @ mean
    solved, bias = _rounded(solved, dtype), None if bias is None else _rounded(bias, dtype)
    better = reader.error(solved, bias) <= reader.error(weight, reader.bias)
    return (solved, bias) if better else (weight, reader.bias)


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).double()
