"""Named methods that rank by gradients or activations; `td_plugin.evidence` gathers them while the user trains."""

from __future__ import annotations

from td_plugin.contract import Granularity, Recipe
from td_plugin.criteria import ard as by_activity
from td_plugin.criteria import fisher as by_fisher
from td_plugin.criteria import movement as by_movement
from td_plugin.criteria import taylor as by_taylor
from td_plugin.granularity import WholeTensor
from td_plugin.patterns import InputUnits
from td_plugin.rates import Rates
from td_plugin.schedules import Cubic

TENSOR, INPUTS = WholeTensor(), InputUnits()


def fisher(granularity: Granularity = TENSOR, drop_rate: float = 1.0, rates: Rates | None = None) -> Recipe:
    """Fisher pruning: what adds least to the loss goes, by ``½ w² E[g²]``, more and more of it while training goes on.

    Theis et al. 2018, arXiv 1801.05787, section 2.1; with ``Units(members="producers")`` whole feature maps, section
    2.2. Gradients are those of single examples of the user's batches (`td_plugin.evidence`);
    `td_plugin.greedy.cheapest` spreads γ over the groups by loss increase per FLOP or per millisecond, section 2.3.

    Args:
        granularity: what is ranked and dropped together.
        drop_rate: α in [0, 1]; below 1 it is targeted dropout with these candidates.
        rates: `td_plugin.rates.Global` ranks all tensors together, as the paper does; None: every tensor loses γ.

    Raises:
        TdError: `drop_rate` outside [0, 1].
    """
    return Recipe(by_fisher, granularity, drop_rate, Cubic(), rates=rates, name="fisher")


def taylor(granularity: Granularity = TENSOR, drop_rate: float = 1.0, rates: Rates | None = None) -> Recipe:
    """First-order Taylor pruning: what changes the loss least goes, by ``E[(w·g)²]``, while training goes on.

    Molchanov et al. 2019, arXiv 1906.10771, sections 3.1 and 3.2.

    Args:
        granularity: what is ranked and dropped together; ``Units(members="producers")`` for whole units.
        drop_rate: α in [0, 1]; below 1 it is targeted dropout with these candidates.
        rates: `td_plugin.rates.Global` ranks all tensors together, as the paper does; None: every tensor loses γ.

    Raises:
        TdError: `drop_rate` outside [0, 1].
    """
    return Recipe(by_taylor, granularity, drop_rate, Cubic(), rates=rates, name="taylor")


def movement(granularity: Granularity = TENSOR, drop_rate: float = 1.0, rates: Rates | None = None) -> Recipe:
    """Movement pruning: weights that training moves towards 0 go, by ``-Σ w·g`` over all steps; for fine-tuning.

    Sanh et al. 2020, arXiv 2005.07683, section 4, with its cubic schedule. The gradient is that of the masked weight,
    so what is dropped has a score that moves on, and can come back; its value waits meanwhile.

    Args:
        granularity: what is ranked and dropped together; ``Units(members="producers")`` for whole units.
        drop_rate: α in [0, 1]; below 1 it is targeted dropout with these candidates.
        rates: `td_plugin.rates.Global` ranks all tensors together; None: every tensor loses γ.

    Raises:
        TdError: `drop_rate` outside [0, 1].
    """
    return Recipe(by_movement, granularity, drop_rate, Cubic(), rates=rates, name="movement")


def ard(drop_rate: float = 0.66, granularity: Granularity = INPUTS) -> Recipe:
    """Targeted dropout of inputs: those with the least ``‖w_in‖·E|x_in|`` lose each of their weights with chance α.

    The variant "ARD" of the authors' code for arXiv 1905.13678. There x is the batch at hand; here it is a mean that
    forgets (0.9 a step), and evaluation drops the candidates.

    Args:
        drop_rate: α in [0, 1].
        granularity: ``OutputRow()`` ranks the weights of every output by ``|w|·E|x|``.

    Raises:
        TdError: `drop_rate` outside [0, 1].
    """
    return Recipe(by_activity, granularity, drop_rate, sampler="weight", name="ard")
