"""Named methods that prune by magnitude: at the end, gradually, in rounds, with splicing, in patterns."""

from __future__ import annotations

from td_plugin.contract import Granularity, Recipe, check_fraction
from td_plugin.criteria import magnitude as by_magnitude
from td_plugin.criteria import standardized
from td_plugin.granularity import NM, Block, WholeTensor
from td_plugin.rates import Below, Rates
from td_plugin.schedules import Cubic, Stairs

TENSOR = WholeTensor()


def magnitude(granularity: Granularity = TENSOR) -> Recipe:
    """Magnitude pruning, one shot: training is dense; evaluation and `squash_mask` drop the smallest weights.

    The baseline "none" of Gomez et al., arXiv 1905.13678, section 5; Han et al., arXiv 1506.02626, without retraining.

    Args:
        granularity: ``Units(members="producers")`` for whole units, ``OutputRow()`` for the paper's columns.
    """
    return Recipe(by_magnitude, granularity, 0.0, name="magnitude")


def gradual_magnitude(granularity: Granularity = TENSOR, rates: Rates | None = None) -> Recipe:
    """Gradual magnitude pruning: γ grows by a cubic curve, and what lies below is dropped for certain (α = 1).

    Zhu and Gupta, arXiv 1710.01878, section 3. A weight keeps its value while it is dropped and returns if the others
    fall below it.

    Args:
        granularity: what is ranked and dropped together.
        rates: `td_plugin.rates.Global` ranks all tensors together; None: every tensor loses γ.
    """
    return Recipe(by_magnitude, granularity, 1.0, Cubic(), rates=rates, name="gradual_magnitude")


def iterative_magnitude(
    rounds: int = 5, begin: float = 0.25, end: float = 0.75, quality: float | None = None
) -> Recipe:
    """Train, prune, retrain, in rounds; what is pruned never returns, what is kept goes on from its value.

    Han et al. 2015, arXiv 1506.02626, section 3. `td_plugin.retraining` has the rest of that section: dropout that
    shrinks with the layers, convolutions and linear layers in turn, neurons that nothing enters or leaves.

    Args:
        rounds: how often is pruned; each time γ grows by ``1 / rounds`` of its target.
        begin: share of the run before the first pruning.
        end: share of the run after which the last is done.
        quality: in place of equal steps: each round prunes what is below `quality` standard deviations of its tensor,
            and γ is the most that a tensor may lose by then.

    Raises:
        TdError: `rounds` below 1, `begin` not before `end`, `quality` not positive.
    """
    stairs = Stairs(begin, end, rounds)
    if quality is None:
        return Recipe(by_magnitude, TENSOR, 1.0, stairs, regrowth=0.0, name="iterative_magnitude")
    below = Below(quality)
    return Recipe(standardized, TENSOR, 1.0, stairs, regrowth=0.0, rates=below, name="iterative_magnitude")


def network_surgery(margin: float = 0.1) -> Recipe:
    """Dynamic network surgery: weights fall below one threshold and return above a higher one, and all go on learning.

    Guo et al. 2016, arXiv 1608.04493, equations 2 and 3: a kept weight is pruned when ``|w| < a``, a pruned one is
    spliced in again when ``|w| >= b``, between them each stays what it is. Here ``a = (1 - margin)·t``,
    ``b = (1 + margin)·t``, with t such that exactly ``int(γ·n)`` weights of the tensor are dropped. Dropped weights are
    updated with the gradient of the masked tensor.

    Args:
        margin: half the width of the band, in [0, 1].

    Raises:
        TdError: `margin` outside [0, 1].
    """
    band = (1.0 - check_fraction(margin, "margin", "network_surgery", closed=True)) / (1.0 + margin)
    return Recipe(by_magnitude, TENSOR, 1.0, regrowth=band, gradient="all", name="network_surgery")


def n_m(n: int = 2, m: int = 4, drop_rate: float = 1.0) -> Recipe:
    """N:M sparsity: of every `m` consecutive inputs of an output the `n` largest weights stay.

    Mishra et al., arXiv 2104.08378: prune a trained model, then train it again. γ is ``1 - n/m`` whatever
    the sparsifier is given.

    Args:
        n: weights that stay.
        m: of how many; the inputs of every tensor must be a multiple of it.
        drop_rate: α in [0, 1]; below 1 it is targeted dropout with N:M candidates.

    Raises:
        TdError: not ``1 <= n < m``, `drop_rate` outside [0, 1]; in `prepare`, a tensor that cannot be divided.
    """
    return Recipe(by_magnitude, NM(n, m), drop_rate, name="n_m")


def block(rows: int = 4, columns: int = 4, drop_rate: float = 1.0) -> Recipe:
    """Block sparsity: whole blocks of a weight matrix go, those with the smallest norm, more and more of them.

    Narang et al., arXiv 1711.02782 (blocks), with the curve of Zhu and Gupta, arXiv 1710.01878. Shapes that the block
    does not divide have smaller blocks at their edges.

    Args:
        rows: outputs per block.
        columns: inputs per block.
        drop_rate: α in [0, 1]; below 1 it is targeted dropout of blocks.

    Raises:
        TdError: `rows` or `columns` below 1, `drop_rate` outside [0, 1].
    """
    return Recipe(by_magnitude, Block(rows, columns), drop_rate, Cubic(), name="block")
