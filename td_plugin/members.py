"""The tensors of a target, each with the module that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from td_plugin.bits import pack
from td_plugin.choices import Choice
from td_plugin.contract import Granularity
from td_plugin.errors import TdError
from td_plugin.sharded import home
from td_plugin.units import Slice

Holder = tuple[nn.Module, str]
"""A module and the name it has for a parameter."""


@dataclass(frozen=True)
class Member:
    """One tensor of a target.

    Attributes:
        module: the module that holds it.
        slice: its name and the dimension its groups occupy.
        ranked: whether it takes part in the ranking; biases and norms do not.
        masked: whether it is dropped with its groups; what only reads them is evidence and stays as it is.
        tied: other modules that hold the same parameter, with the name it has there.
    """

    module: nn.Module
    slice: Slice
    ranked: bool
    masked: bool = True
    tied: tuple[Holder, ...] = ()

    @property
    def fqn(self) -> str:
        """Fully qualified tensor name."""
        return self.slice.fqn

    @property
    def parameter(self) -> nn.Parameter:
        """The dense tensor; where it is sharded, as it lies between forwards."""
        parameter = home(self.module, self.slice.tensor)
        if parameter is None:
            problem = f"a {'masked' if self.masked else 'ranked'} parameter has been removed from its module"
            raise TdError(problem, where=self.fqn, fix="squash first")
        return parameter

    @property
    def owned(self) -> int:
        """How many scalars of the tensor belong to the groups: all, but for concatenations and packed projections."""
        owners, numel = self.slice.owners, self.parameter.numel()
        return numel * sum(owner >= 0 for owner in owners) // len(owners) if owners else numel


def holders_of(model: nn.Module) -> dict[int, list[Holder]]:
    """Who holds each parameter, by its id: one module, or several where it is tied."""
    holders: dict[int, list[Holder]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name))
    return holders


def members_of(model: nn.Module, choice: Choice, holders: dict[int, list[Holder]]) -> list[Member]:
    """The members of one target: ranked ones, then those silenced with them, then mere evidence."""
    roles = ((choice.ranked, True, True), (choice.carried, False, True), (choice.evidence, True, False))
    members = []
    for slices, ranked, masked in roles:
        for part in slices:
            module = model.get_submodule(part.module)
            same = holders[id(module._parameters[part.tensor])] if masked else []
            tied = tuple(holder for holder in same if holder != (module, part.tensor))
            members.append(Member(module, part, ranked, masked, tied))
    return members


def keeps_of(members: Sequence[Member], granularity: Granularity, dropped: Tensor) -> list[Tensor]:
    """Every member's keep-mask, as `masking.select` takes it, when ``[pools, groups]`` `dropped` are dropped."""
    keeps = [~granularity.to_mask(dropped, m.slice, m.parameter.shape) for m in members]
    if not granularity.kinds:
        return [pack(keep) for keep in keeps]
    # Those of equal entries, a layer's weight and bias, lie in one place.
    made: dict[tuple[int, int], Tensor] = {}
    return [
        keep if m.slice.owners else made.setdefault((m.slice.span, keep.numel()), keep).view(keep.shape)
        for m, keep in zip(members, keeps, strict=True)
    ]
