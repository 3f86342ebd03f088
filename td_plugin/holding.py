"""A mask that is held: which groups stay dropped, whatever becomes of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from td_plugin.bits import pack, unpack
from td_plugin.contract import Granularity
from td_plugin.errors import TdError
from td_plugin.members import Member
from td_plugin.memory import from_text, to_text


def zero_groups(members: Sequence[Member], granularity: Granularity) -> Tensor:
    """``[pools, groups]`` bool: every entry of the group is exactly zero, in all masked tensors of a target."""
    present = [(member.parameter.detach() != 0).float() for member in members]
    return granularity.to_groups(present, [member.slice for member in members]) == 0


@dataclass(frozen=True, eq=False)
class Held:
    """The dropped groups of one target, a bit each.

    Attributes:
        bits: `bits.pack` of ``[pools, groups]``, True = dropped.
        shape: pools and groups.
    """

    bits: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, dropped: Tensor) -> Held:
        """Hold ``[pools, groups]`` bool."""
        pools, groups = dropped.shape
        return cls(pack(dropped), (pools, groups))

    def dropped(self, device: torch.device) -> Tensor:
        """``[pools, groups]`` bool on `device`."""
        return unpack(self.bits.to(device), self.shape)

    def snapshot(self) -> dict[str, Any]:
        """JSON-able."""
        return {"shape": list(self.shape), "dropped": to_text(self.bits)}

    @classmethod
    def restored(cls, saved: dict[str, Any], shape: tuple[int, int], where: str) -> Held:
        """What `snapshot` was taken of, for a target of `shape` now.

        Raises:
            TdError: it is damaged, or was taken of a tensor of another shape.
        """
        if list(saved.get("shape", ())) != list(shape):
            raise TdError(
                "the held mask is of another shape",
                where=where,
                got=f"{saved.get('shape')}, here {list(shape)}",
                fix="load the state of this model and recipe",
            )
        return cls(from_text(saved.get("dropped"), shape[0] * shape[1], where), shape)
