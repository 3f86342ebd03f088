"""What a ranking remembers: which groups it dropped last, for recipes that make it harder for them to come back."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import torch
from torch import Tensor

from td_plugin.bits import ones, pack, size, unpack
from td_plugin.errors import TdError
from td_plugin.masks import share


class Memory:
    """The groups of one target that training dropped when it last ranked them; it lies in the sparsifier's state.

    It is the one thing that does not follow from the weights and the step, so it is saved: a bit per group, compressed.

    Attributes:
        dropped: `bits.pack` of ``[pools, groups]``; None as long as nothing has been ranked.
        groups: how many groups there are.
        asked: the γ they were ranked for.
        version: counts how often it has changed.
    """

    def __init__(self) -> None:
        self.dropped: Tensor | None = None
        self.groups, self.asked, self.version = 0, 0.0, 0

    def set(self, dropped: Tensor) -> None:
        """Remember ``[pools, groups]`` bool."""
        self.dropped, self.groups = pack(dropped), dropped.numel()
        self.version += 1

    @property
    def share(self) -> float:
        """The share of the groups that is remembered, as a γ."""
        return 0.0 if self.dropped is None else share(ones(self.dropped), self.groups)

    def handicapped(self, importance: Tensor, regrowth: float) -> Tensor:
        """``[pools, groups]``: the importances, those of what is remembered times `regrowth`; -inf where that is 0.

        A group that is dropped returns if its importance exceeds b, one that is kept falls if its own is below a, and
        ``a = regrowth · b``: the two thresholds of dynamic network surgery (Guo et al. 2016, arXiv 1608.04493,
        equation 3), placed so that exactly ``int(γ·n)`` groups are dropped.
        """
        if self.dropped is None:
            return importance
        dropped = unpack(self.dropped.to(importance.device), importance.shape)
        if regrowth == 0:
            return importance.masked_fill(dropped, -torch.inf)
        # A negative importance, as scores of movement are, must not rise.
        less = torch.where(importance > 0, importance * regrowth, importance / regrowth)
        return torch.where(dropped, less, importance)

    def snapshot(self) -> dict[str, Any]:
        """JSON-able; empty as long as nothing has been ranked."""
        if self.dropped is None:
            return {}
        return {"groups": self.groups, "asked": self.asked, "dropped": to_text(self.dropped)}

    def restore(self, saved: dict[str, Any], where: str) -> None:
        """Go on from `saved`.

        Raises:
            TdError: not what `snapshot` gave.
        """
        self.version += 1
        self.dropped = None
        if not saved:
            return
        try:
            self.groups, self.asked = int(saved["groups"]), float(saved["asked"])
        except (KeyError, ValueError, TypeError) as error:
            raise _damaged(where, repr(error)) from error
        self.dropped = from_text(saved.get("dropped"), self.groups, where)


def to_text(bits: Tensor) -> str:
    """Packed bits, compressed, as text for JSON."""
    return base64.b64encode(zlib.compress(bits.cpu().numpy().tobytes())).decode()


def from_text(text: Any, flags: int, where: str) -> Tensor:
    """What `to_text` was given, for so many flags.

    Raises:
        TdError: it is damaged.
    """
    try:
        raw = bytearray(zlib.decompress(base64.b64decode(text, validate=True)))
    except (ValueError, TypeError, zlib.error) as error:
        raise _damaged(where, repr(error)) from error
    if len(raw) != size(flags):
        raise _damaged(where, f"{len(raw)} bytes")
    return torch.frombuffer(raw, dtype=torch.uint8).clone()


def _damaged(where: str, got: str) -> TdError:
    return TdError("the saved memory of the ranking is damaged", where=where, got=got, fix="load another checkpoint")
