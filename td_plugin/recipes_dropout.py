"""Named methods that drop without asking what matters: dropout, DropConnect, and random candidates as controls."""

from __future__ import annotations

from td_plugin.contract import Recipe
from td_plugin.criteria import magnitude, random
from td_plugin.errors import TdError
from td_plugin.granularity import KINDS, Members, OutputRow, Units, WholeTensor
from td_plugin.schedules import Constant, Linear, paper_ramp


def dropconnect(drop_rate: float = 0.5) -> Recipe:
    """DropConnect: every weight is dropped with probability p, and the others are divided by 1 - p.

    Wan et al., ICML 2013, "Regularization of neural networks using DropConnect". So the mean of the masked
    weights is the dense tensor, and evaluation runs that: "mean weights". γ plays no part in training; one that is
    asked for is what evaluation and `squash_mask` prune, the smallest weights of each tensor, as the papers that
    compare with DropConnect do. Biases are neither dropped nor rescaled.

    Args:
        drop_rate: p in [0, 1).

    Raises:
        TdError: `drop_rate` outside [0, 1).
    """
    return Recipe(magnitude, WholeTensor(), drop_rate, sampler="uninformed", name="dropconnect")


def unit_dropout(drop_rate: float = 0.5, kinds: tuple[str, ...] = ("neurons", "channels")) -> Recipe:
    """Unit dropout by weights: every unit is silent with probability p, and what the others emit is divided by 1 - p.

    Srivastava et al., JMLR 15 (2014), in the form that targeted dropout is compared with (Gomez et al., arXiv
    1905.13678, section 5: one draw per weight matrix, not per example). A unit's weights, bias, and the scale and
    shift of a norm behind it are dropped; of those the last layer's are rescaled, once. γ plays no part in training;
    one that is asked for is what evaluation and `squash_mask` prune, the units with the smallest incoming weights.

    Args:
        drop_rate: p in [0, 1).
        kinds: ``"neurons"``, ``"channels"``. The output of heads, of the residual stream and of its layers is no
            multiple of their weights, so these cannot be rescaled.

    Raises:
        TdError: `drop_rate` outside [0, 1), other kinds.
    """
    if wrong := sorted(set(kinds) - {"neurons", "channels"}):
        raise TdError("unit dropout cannot rescale these units", got=wrong, fix='kinds=("neurons", "channels")')
    return Recipe(magnitude, Units(kinds, "producers"), drop_rate, sampler="uninformed", name="unit_dropout")


def random_weight(drop_rate: float = 0.66, ramping: bool = False) -> Recipe:
    """Targeted weight dropout with random candidates: the control for what the ranking does.

    Gomez et al., arXiv 1905.13678 (random pruning, before training). The ranking is a function of the seed and the
    tensor's name, so the same weights are candidates in every step. The authors' code takes each weight for a candidate
    with chance γ; here exactly ``int(γ·n)`` of every output row are.

    Args:
        drop_rate: α in [0, 1]; 1 is random pruning before training.
        ramping: γ and α grow as in `ramping_targeted_weight`.

    Raises:
        TdError: `drop_rate` outside [0, 1].
    """
    gamma, alpha = (paper_ramp(), Linear()) if ramping else (Constant(), Constant())
    return Recipe(random, OutputRow(), drop_rate, gamma, alpha, name="random_weight")


def random_unit(
    drop_rate: float = 0.66, kinds: tuple[str, ...] = KINDS, members: Members = "producers", ramping: bool = False
) -> Recipe:
    """Targeted unit dropout with random candidates: the control for what the ranking does.

    As `random_weight`. Unlike their `targeted_unit`, the authors' function of this name draws whole units.

    Args:
        drop_rate: α in [0, 1]; 1 is random pruning before training.
        kinds: as for `targeted_unit`.
        members: as for `targeted_unit`.
        ramping: γ and α grow as in `ramping_targeted_unit`.

    Raises:
        TdError: `drop_rate` outside [0, 1], an unknown kind or unknown `members`.
    """
    gamma, alpha = (paper_ramp(), Linear()) if ramping else (Constant(), Constant())
    return Recipe(random, Units(kinds, members), drop_rate, gamma, alpha, name="random_unit")
