"""The constants that silenced units leave behind, measured on the traced forward and moved into the next bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from td_plugin.errors import TdError
from td_plugin.units import Read, Slice, UnitGroup

Gone = Mapping[str, Mapping[int, Tensor]]
"""Fully qualified tensor name -> dimension -> ``[size]`` bool: the entries that go."""


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, program: ExportedProgram, names: Iterable[str]) -> None:
        super().__init__(program.graph_module)
        self.wanted = frozenset(names)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As always, but the values asked for are kept."""
        value = super().run_node(n)
        if n.name in self.wanted:
            self.seen[n.name] = value
        return value


def measure(model: nn.Module, program: ExportedProgram, names: Iterable[str]) -> dict[str, Tensor]:
    """The values of the nodes `names` in a forward of `model` with the weights it has now.

    Args:
        model: the one that was traced.
        program: its traced forward; it holds the inputs it was traced with.
        names: of nodes.
    """
    recorder = _Recorder(program, names)
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    given = iter(pytree.tree_leaves(program.example_inputs))
    arguments: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            arguments.append(tensors[str(spec.target)])
        elif spec.kind is InputKind.USER_INPUT:
            arguments.append(next(given))
        else:
            arguments.append(program.constants[str(spec.target)])
    with torch.no_grad():
        recorder.run(*arguments)
    return recorder.seen


def fold(model: nn.Module, group: UnitGroup, gone: Gone, seen: Mapping[str, Tensor]) -> None:
    """Move what the units that go still emit into the biases of the layers that read them, in place.

    Args:
        model: before anything is cut.
        group: of a traced model.
        gone: the entries of every tensor that go.
        seen: values of the nodes that `group.reads` names.

    Raises:
        TdError: what is left is not constant, or the layer that reads it has no place for a bias.
    """
    for part in group.consumers:
        reads = [read for read in group.reads if read.consumer == part.fqn]
        mask = gone.get(part.fqn, {}).get(part.dim)
        if mask is None or not reads:
            continue
        mask = mask & (part.units(len(mask)) >= 0)  # behind a concatenation the others are of other groups
        if not bool(mask.any()):
            continue
        emitted = _agreed(group, part, [_constants(group, read, seen[read.value], mask) for read in reads])
        if bool(emitted.any()):
            if any(read.padded for read in reads):
                raise unfoldable(group, f"{part.fqn} pads with zeros, so its input is no constant at the border")
            _add(model, group, part, mask, emitted)


def _agreed(group: UnitGroup, part: Slice, constants: Sequence[Tensor]) -> Tensor:
    """The one constant of a layer's reads: a layer that is used several times adds its bias every time."""
    first = constants[0]
    if any(not torch.allclose(first, other, rtol=1e-5, atol=1e-8) for other in constants[1:]):
        raise unfoldable(group, f"{part.fqn} reads different constants where it is used several times")
    return first


def _constants(group: UnitGroup, read: Read, value: Tensor, mask: Tensor) -> Tensor:
    """``[gone entries]``: what they emit, the same for every sample and position."""
    entries = value.movedim(read.dim, 0)
    if entries.shape[0] != len(mask):
        if bool(entries.any()):
            raise unfoldable(group, f"{read.consumer} reads it in groups")
        return torch.zeros(int(mask.sum()), dtype=torch.float64, device=value.device)
    rows = entries[mask.to(entries.device)].reshape(int(mask.sum()), -1).to(torch.float64)
    middle = rows.mean(1)
    exact = value.dtype in (torch.float32, torch.float64)
    allowed = (1e-5 if exact else 2e-2) * (rows.abs().amax(1) + 1e-6)
    if bool(((rows - middle[:, None]).abs().amax(1) > allowed).any()):
        raise unfoldable(group, f"what {read.consumer} reads of it differs from sample to sample or place to place")
    return middle


def unfoldable(group: UnitGroup, why: str) -> TdError:
    """The error for a constant that has nowhere to go."""
    return TdError(
        "a unit without weights still emits a constant that cannot be moved into the next bias",
        where=group.name,
        got=why,
        fix="silence its bias and its norm's scale and shift too, and use an activation with act(0) = 0",
    )


def _add(model: nn.Module, group: UnitGroup, part: Slice, mask: Tensor, emitted: Tensor) -> None:
    module, weight = model.get_submodule(part.module), attrgetter(part.fqn)(model)
    name = part.tensor.replace("weight", "bias")
    columns = weight.detach().movedim(part.dim, 0)[mask.to(weight.device)].to(torch.float64)
    if weight.ndim > 2 and not isinstance(module, _CONVOLUTIONS):
        raise unfoldable(group, f"{part.fqn} has no bias of its own")
    if isinstance(module, _CONVOLUTIONS) and (module.groups > 1 or module.transposed):
        raise unfoldable(group, f"{part.fqn} is a grouped or transposed convolution")
    added = torch.einsum("e,eo->o", emitted.to(columns.device), columns.reshape(*columns.shape[:2], -1).sum(-1))
    old = module._parameters.get(name)
    own = old is not None and name != part.tensor and old.shape == added.shape
    if not own and (old is not None or not isinstance(module, (nn.Linear, *_CONVOLUTIONS))):
        raise unfoldable(group, f"{part.fqn} has no bias")
    with torch.no_grad():
        if old is not None:
            old.copy_(old.to(torch.float64) + added)
            return
    module.register_parameter(name, nn.Parameter(added.to(weight.dtype), requires_grad=weight.requires_grad))


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
