"""Several processes: what must be the same on all of them is compared, so that a run that has come apart stops.

A target's candidates follow from its weights, which DistributedDataParallel keeps equal. A process that has loaded
another checkpoint, was prepared otherwise, or whose parameter left the averaging would go on in silence, with masks and
soon weights of its own, and what rank 0 saves would be nobody's model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from td_plugin.errors import TdError
from td_plugin.masks import draw_key, mixed, words
from td_plugin.running import processes

if TYPE_CHECKING:
    from td_plugin.target import Target


def fingerprint(tensors: Iterable[Tensor | None]) -> int:
    """64 bits, as a signed number, of the bytes of `tensors`, in their order; the same on every device.

    Every 8 bytes, as a number, are mixed with the place they have and added up, so that no two of them can be changed
    for one another unseen.
    """
    total = 0
    for place, tensor in enumerate(tensors):
        if tensor is None:
            continue
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        numbers = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
        total += int(mixed(numbers ^ words(draw_key(place), len(numbers), data.device)).sum()) + len(data)
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def agree(targets: Sequence[Target], problem: TdError | None = None) -> None:
    """Compare candidates, and with shared draws the masks, over all processes, which must all call this.

    Cost: the bits of the masks are read once, and a number per target is gathered.

    Args:
        targets: of the sparsifier, drawn for this step.
        problem: what has kept this process from drawing.

    Raises:
        TdError: on all processes, if they differ, or if one has a problem; names the first tensor.
    """
    if processes() == 1:
        if problem is not None:
            raise problem
        return
    device = torch.device("cpu") if distributed.get_backend() == "gloo" else targets[0].members[0].parameter.device
    names = draw_key(*(t.name for t in targets), targets[0].recipe.name)
    found = _gathered(torch.tensor([len(targets), names, problem is not None], device=device))
    if problem is not None:
        raise problem
    if bool(found[:, 2].any()):
        failed = found[:, 2].nonzero().flatten().tolist()
        got = f"ranks {failed} raised an error, which names the tensor"
        raise TdError("another process cannot go on", where=targets[0].name, got=got, fix="see what it says")
    if bool((found != found[0]).any()):
        raise TdError(
            "the processes do not train the same targets",
            where=targets[0].name,
            got=f"{found[:, 0].tolist()} targets by rank, or others of the same number, or another recipe",
            fix="prepare with the same recipe, config and model in every process",
        )
    marks = _gathered(torch.tensor([_mark(target) for target in targets], device=device))
    differ = (marks != marks[0]).any(0).nonzero().flatten().tolist()
    if differ:
        odd = [rank for rank in range(len(marks)) if int(marks[rank, differ[0]]) != int(marks[0, differ[0]])]
        raise TdError(
            "the processes have come apart: they do not drop the same weights",
            where=targets[differ[0]].name,
            got=f"ranks {odd} differ from rank 0 in {len(differ)} of {len(targets)} targets",
            fix="start all from one checkpoint, seed and config; let DistributedDataParallel average every gradient",
        )


def _mark(target: Target) -> int:
    """Of what all processes must have in common: the candidates and, where they share it, the draw."""
    shared = target.switches.rank_policy == "shared" or target.held is not None
    return fingerprint([*target.ranking(True).mark(), *((mask.keep for mask in target.masks) if shared else ())])


def _gathered(value: Tensor) -> Tensor:
    """``[n] -> [processes, n]``."""
    out = [torch.empty_like(value) for _ in range(processes())]
    distributed.all_gather(out, value)
    return torch.stack(out).cpu()
