"""Parameters that FSDP2 has spread over several processes (`torch.distributed.fsdp.fully_shard`).

Between forwards a process holds some rows of every tensor, inside of a layer's forward and backward all of them. What
is ranked is the whole tensor, gathered for that moment: candidates, thresholds and draws are those of one process, to
the bit, whichever way pools lie across processes. What is kept of a mask are the bits of the process's own rows; where
a layer runs, the bits of all are gathered, 1/32 of what FSDP gathers of a float32 weight itself.

Whatever looks at weights or masks (`step`, `eval()` of the model, `report`, `squash_mask`, a log of the sparsity) is
thus for all processes to call together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from td_plugin.bits import pack, size, unpack
from td_plugin.contract import Measured, Recipe
from td_plugin.errors import TdError
from td_plugin.mask import Mask
from td_plugin.masking import zero_

_HOMES = "_td_sharded"
"""Where a module keeps its sharded parameters, by name: inside of a forward it has whole ones in their place."""


def is_sharded(parameter: Tensor | None) -> bool:
    """Whether it is a DTensor; asking must not import what makes them."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(parameter, loaded.DTensor)


def home(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter `name` of `module` as it lies between forwards.

    Raises:
        TdError: it was sharded after the masks were put on, by FSDP2 or by ZeRO-3.
    """
    parameter = module._parameters.get(name)
    if type(parameter) is nn.Parameter and _HOMES not in module.__dict__ and "ds_id" not in parameter.__dict__:
        return parameter  # neither FSDP nor DeepSpeed: asked once per layer and token
    if parameter is not None:
        refuse_zero3(name, parameter)
    homes: dict[str, nn.Parameter] = module.__dict__.get(_HOMES, {})
    if is_sharded(parameter):
        if name not in homes:
            raise TdError(
                "the parameter was sharded after prepare()",
                where=name,
                got=f"a DTensor in {type(module).__name__}",
                fix="fully_shard(model) first, then prepare(model)",
            )
        homes[name] = parameter  # type: ignore[assignment]
    return homes.get(name, parameter)


def settle_in(module: nn.Module, name: str) -> None:
    """Remember the sharded parameter `name` of `module`, which a whole one replaces in forwards."""
    if is_sharded(module._parameters.get(name)):
        module.__dict__.setdefault(_HOMES, {})[name] = module._parameters[name]


def move_out(module: nn.Module) -> None:
    """Forget what `settle_in` has remembered."""
    module.__dict__.pop(_HOMES, None)


def whole(parameter: Any) -> Tensor:
    """All of `parameter`, without gradient: gathered, where it is sharded, from all processes."""
    detached = parameter.detach()
    gathered: Tensor = detached.full_tensor() if is_sharded(parameter) else detached
    return gathered


def local(parameter: Any) -> Tensor:
    """What this process holds of it, in the same memory."""
    held: Tensor = parameter.detach().to_local() if is_sharded(parameter) else parameter
    return held


def version(parameter: Tensor) -> tuple[int, int]:
    """What changes when `parameter` is written to; of a DTensor the count is its own, not that of what it holds."""
    held = parameter if type(parameter) is nn.Parameter else local(parameter)  # asked for every layer and token
    return 0 if parameter.is_inference() else parameter._version, held.data_ptr()


def refuse_zero3(where: str, parameter: Any) -> None:
    """Refuse a parameter that DeepSpeed has taken away.

    Raises:
        TdError: it is empty between forwards.
    """
    if "ds_id" in vars(parameter):
        raise TdError(
            "ZeRO-3 takes parameters away between forwards, so they cannot be ranked",
            where=where,
            got=f"a parameter of DeepSpeed, here {list(parameter.shape)}",
            fix="ZeRO stage 1 or 2, or FSDP2: torch.distributed.fsdp.fully_shard",
        )


def refuse_sharded(recipe: Recipe, fqn: str, parameter: Any, shared: bool) -> None:
    """Refuse what cannot be done, or not within the memory of a shard; before anything is masked.

    Raises:
        TdError: parameters of DeepSpeed's ZeRO-3, or of a mesh with more than one dimension; a recipe that needs more
            than weights between steps; draws of each process's own.
    """
    refuse_zero3(fqn, parameter)
    if not is_sharded(parameter):
        return
    (place, *others), single = parameter.placements, not recipe.granularity.kinds
    reasons = {
        "only rows over a mesh of one dimension": bool(others) or not place.is_shard(0),
        "rank_policy='independent' needs every process's masks whole": not shared,
        "a gate trains on whole weights": recipe.gate is not None,
        "its penalty is a gradient of whole weights": recipe.penalty is not None,
        "its evidence is of whole weights": isinstance(recipe.criterion, Measured),
        "a γ that tensors share needs the importances of all at once": recipe.rates is not None and single,
        "what was dropped is remembered whole": recipe.regrowth < 1 and single,
    }
    for reason, holds in reasons.items():
        if holds:
            raise TdError(
                f"not on sharded parameters: {reason}",
                where=fqn,
                got=f"{recipe.name} on {parameter.placements} of {parameter.device_mesh.size()} processes",
                fix="DistributedDataParallel, or a recipe such as targeted_weight with rank_policy='shared'",
            )


class _Bits:
    """Which part of a mask is this process's own: its rows, for bits of single weights; all of it, for units."""

    def __init__(self, parameter: Any) -> None:
        self.shape = torch.Size(parameter.shape)
        self.group = parameter.device_mesh.get_group()
        self.world, self.rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
        self._rows = -(-self.shape[0] // self.world)  # as torch.chunk divides them

    def own(self, keep: Tensor) -> Tensor:
        """Of all rows' bits those of this process."""
        first = min(self.rank * self._rows, self.shape[0])
        return pack(unpack(keep, self.shape)[first : first + self._rows])

    def of_all(self, own: Tensor) -> Tensor:
        """All rows' bits, from every process's own."""
        flags = self._rows * self.shape[1:].numel()
        padded = own.new_zeros(size(flags))
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in range(self.world)]
        distributed.all_gather(found, padded, group=self.group)
        if flags % 8 == 0:
            return torch.cat(found)[: size(self.shape.numel())].contiguous()
        return pack(torch.cat([unpack(bits, [flags]) for bits in found])[: self.shape.numel()])


class ShardedMask(Mask):
    """The mask of a sharded tensor: it keeps the bits of its own rows, and gathers the others' where a layer runs."""

    def __init__(self, source: Any, fqn: str, parameter: Tensor, through: bool) -> None:
        self._bits = _Bits(parameter)
        self._kept: Tensor | None = None
        super().__init__(source, fqn, through)

    @property
    def keep(self) -> Tensor | None:
        """What this training step keeps, of all rows; for all processes to ask together."""
        return self._joined(self._kept)

    @keep.setter
    def keep(self, keep: Tensor | None) -> None:
        self._kept = self._part(keep)

    def held_bytes(self) -> int:
        """What this process keeps of the masks between forwards."""
        return sum(part.untyped_storage().nbytes() for part in (self._kept, self._eval_keep) if part is not None)

    def _part(self, keep: Tensor | None) -> Tensor | None:
        return self._bits.own(keep) if keep is not None and keep.dtype == torch.uint8 else keep

    def _joined(self, part: Tensor | None) -> Tensor | None:
        return self._bits.of_all(part) if part is not None and part.dtype == torch.uint8 else part

    def apply(self, dense: Tensor, training: bool) -> Tensor:
        """As `Mask.apply`, to a whole tensor; a shard, read between forwards, is given as it is."""
        if is_sharded(dense):
            return dense
        value = super().apply(dense, training)
        self._cached = None  # FSDP frees the weight after the layer, so its masked value must not stay
        return value

    def _settled(self, dense: Tensor) -> Tensor:
        key = (self.source.settle(), dense.device)
        if key != self._cache_key or self._eval_keep is None:
            self._eval_keep, self._cache_key = self._part(self.source.keep_mask(self)), key
        keep = self._joined(self._eval_keep)
        return self.source.keep_mask(self) if keep is None else keep

    def write_(self, dense: Tensor, keep: Tensor) -> None:
        """Zero what is dropped of this process's rows, in place; `keep` is of all rows."""
        rows = local(dense)
        if rows.numel() == 0:
            return
        own = self._part(keep)
        if own is not None and own.dtype != torch.uint8 and own.shape[0] > 1:
            first = self._bits.rank * -(-self._bits.shape[0] // self._bits.world)
            own = own[first : first + len(rows)]
        if own is not None:
            zero_(rows, own)


def reshard(modules: Sequence[nn.Module]) -> None:
    """Throw whole copies of parameters away that a forward has left: the shards have been written to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in modules:
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()
