"""One target in numbers: a row of the report."""

from __future__ import annotations

from td_plugin.bits import dropped_by
from td_plugin.report import SparsityRow
from td_plugin.target import Target


def row_of(target: Target) -> SparsityRow:
    """What the deterministic mask of `target` drops."""
    granularity = target.recipe.granularity
    pairs = [(member.parameter, mask) for member, mask in zip(target.members, target.masks, strict=True)]
    zeros = sum(
        dropped_by(keep, parameter.numel()) for keep, (parameter, _) in zip(target.shipped(), pairs, strict=True)
    )
    groups, dropped = pairs[0][0].numel(), zeros  # of single weights; a flag for each is not made twice
    if not granularity.single:
        candidates = target.candidates()
        groups, dropped = candidates.numel(), int(candidates.sum())
    return SparsityRow(
        tensor=target.name,
        kind="units" if granularity.kinds else "weights" if granularity.single else "blocks",
        groups=groups,
        dropped=dropped,
        elements=sum(member.owned for member in target.members),
        zeros=zeros,
        sampled=sum(dropped_by(mask.keep, parameter.numel()) for parameter, mask in pairs if mask.keep is not None),
        sparsity_level=target.config["sparsity_level"],
        drop_rate=target.config["drop_rate"],
    )
