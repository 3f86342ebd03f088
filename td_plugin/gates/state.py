"""What a gate has learned of one target: φ, the moments of its optimizer, and what else it remembers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from td_plugin.errors import TdError
from td_plugin.gates.contract import Gate
from td_plugin.gates.spreading import unit_sums
from td_plugin.masks import draw_key
from td_plugin.members import Member
from td_plugin.tensor_text import from_text, to_text

_RATES, _EPSILON = (0.9, 0.999), 1e-8
"""Adam's β1, β2 and ε (Kingma and Ba, arXiv 1412.6980, algorithm 1)."""
_PATIENCE = 20
_NOT_STEPPED = (
    "gradients have reached the gates {patience} times, and no torch.optim.Optimizer that holds {fqn!r} has stepped: "
    "the gates do not learn"
)


def refuse_tied(members: Sequence[Sequence[Member]]) -> None:
    """Raise for a weight that serves another module, too.

    Raises:
        TdError: there is one.
    """
    if tied := next((member for of_target in members for member in of_target if member.tied), None):
        fix = "untie it, or leave it out: prepare(config=...)"
        raise TdError("a gate on a tied weight would scale another layer too", where=tied.fqn, fix=fix)


class GateState:
    """φ of one target and all that changes with it.

    The user's own backward brings φ its gradient. `learn` adds the penalty's and takes a step of Adam, when the user's
    optimizer takes its own.

    Attributes:
        phi: ``[*w]`` of the one tensor, or ``[units]``; float32, a leaf.
        per_unit: whether it is one number per unit.
        updates: how often φ has been trained.
        key: of this step's noise; None before the first draw.
    """

    def __init__(self, gate: Gate, members: Sequence[Member], per_unit: bool) -> None:
        self.gate, self.per_unit = gate, per_unit
        self._members = [m for m in members if m.ranked and m.masked]
        weights = [m.parameter.detach() for m in self._members]
        ones = [torch.ones_like(weight, dtype=torch.float32) for weight in weights]
        self._counts = unit_sums(ones, [m.slice for m in self._members]) if per_unit else ones[0]
        initial = gate.initial(self._counts.shape).to(weights[0].device)
        self.memory = gate.memory(initial)
        self._moments = [torch.zeros_like(initial), torch.zeros_like(initial)]
        self.updates = self._unstepped = 0
        self.key: int | None = None
        self._noise: Tensor | None = None
        self._size: Tensor | None = None
        self._arrived: Tensor | None = None
        self._set(initial)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "phi": self.phi.detach(), "_arrived": None}  # the leaf's hook is tied to this object

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set(self.phi)

    def _set(self, phi: Tensor) -> None:
        """Make `phi` the leaf, and have the weights' gradients measured at the end of each backward that reaches it."""
        self.phi = phi.detach().clone().requires_grad_()
        here = weakref.ref(self)

        def measure() -> None:
            if (state := here()) is not None:
                state._arrived = state._gradient_norm()

        def reached(_: Tensor) -> None:
            # What is queued in a queued call runs last: DistributedDataParallel averages the gradients in one.
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(measure))

        self.phi.register_post_accumulate_grad_hook(reached)  # type: ignore[no-untyped-call]

    def _gradient_norm(self) -> Tensor | None:
        grads = [m.parameter.grad for m in self._members if m.parameter.grad is not None]
        wide = [torch.promote_types(grad.dtype, torch.float32) for grad in grads]
        norms = [torch.linalg.vector_norm(grad, dtype=dtype) for grad, dtype in zip(grads, wide, strict=True)]
        return torch.linalg.vector_norm(torch.stack([n.to(self.phi.device).float() for n in norms])) if norms else None

    def _squares(self, weights: Sequence[Tensor]) -> Tensor:
        """The mean square of the weights of each group, differentiable."""
        squares = [weight.float().square() for weight in weights]
        if not self.per_unit:
            return squares[0]
        return unit_sums(squares, [m.slice for m in self._members]) / self._counts

    def draw(self, key: int) -> None:
        """New noise from here on; a function of `key` alone, on the same kind of device."""
        self.key, self._noise, self._size = key, None, None
        device = self._members[0].parameter.device
        if self.phi.device != device:  # the model was moved
            self._counts, self._moments = self._counts.to(device), [moment.to(device) for moment in self._moments]
            self.memory = {name: value.to(device) for name, value in self.memory.items()}
            self._set(self.phi.to(device))
        if self.phi.grad is not None and all(m.parameter.grad is None for m in self._members):
            self.phi.grad = None  # the user has thrown the step away, as a gradient scaler does
            self._unstepped += 1
            if self._unstepped == _PATIENCE and self.updates == 0:
                fqn = self._members[0].fqn
                warnings.warn(_NOT_STEPPED.format(patience=_PATIENCE, fqn=fqn), stacklevel=2)
        if self.gate.noise == "uniform":  # now, since a compiled forward cannot
            self.noise()

    def noise(self) -> Tensor | None:
        """What this step's training forwards share, of the shape of φ; None for gates without."""
        if self._noise is None and self.key is not None and self.gate.noise:
            generator = torch.Generator(self.phi.device).manual_seed(self.key)
            if self.gate.noise == "normal":
                self._noise = torch.randn(self.phi.shape, generator=generator, device=self.phi.device)
            else:
                uniform = torch.rand(self.phi.shape, generator=generator, device=self.phi.device)
                self._noise = uniform.clamp(2.0**-24, 1 - 2.0**-24)
        return self._noise

    def normal(self, shape: torch.Size, name: str) -> Tensor:
        """Normal numbers for the outputs of the layer `name`: the same within a step, as recomputed forwards need."""
        generator = torch.Generator(self.phi.device).manual_seed(draw_key(self.key, name))
        return torch.randn(shape, generator=generator, device=self.phi.device)

    def size(self) -> Tensor:
        """``[units]``: the root mean square of the weights of each unit."""
        if self._size is None:
            with torch.no_grad():
                self._size = self._squares([m.parameter.detach() for m in self._members]).sqrt()
        return self._size

    def importance(self, magnitude: Tensor) -> Tensor:
        """Of the shape of φ, or ``[1, units]``; `magnitude` likewise."""
        phi = self.phi.detach().to(magnitude.device)
        return self.gate.importance(magnitude, phi if magnitude.shape == phi.shape else phi.unsqueeze(0))

    def learn(self, scale: Tensor | float) -> None:
        """Add the penalty's gradients, to φ and where it has one to the weights, and train φ by one step of Adam.

        What has become of the weights' gradients since they arrived (a gradient scaler divides by its scale, clipping
        by the norm scales them down) becomes of the gradient of φ. With several processes it is averaged over them.

        Args:
            scale: what the optimizer will divide the gradients by itself.
        """
        found, self.phi.grad = self.phi.grad, None
        penalty = self._penalty(scale)
        grad = torch.zeros_like(self.phi) if found is None else found * (self._rescaling() / scale)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(grad)
            grad /= torch.distributed.get_world_size()
        grad += penalty
        if torch.isfinite(grad).all():  # else the loss has overflowed
            self._step(grad)

    def _rescaling(self) -> Tensor | float:
        now, then, self._arrived = self._gradient_norm(), self._arrived, None
        if now is None or then is None:
            return 1.0
        return torch.where(then > 0, now / then, 1.0).to(self.phi.device)

    def _penalty(self, scale: Tensor | float) -> Tensor:
        pulls = [m.parameter for m in self._members] if self.gate.pulls_weights else []
        with torch.enable_grad():
            phi = self.phi.detach().requires_grad_()
            weights = [m.parameter.detach().requires_grad_(bool(pulls)) for m in self._members]
            strength = self.gate.strength * self.gate.warmth(self.updates)
            penalty = strength * self.gate.penalty(phi, self._squares(weights), self._counts)
            of_phi, *of_weights = torch.autograd.grad(penalty, [phi, *(weights if pulls else ())])
        for parameter, grad in zip(pulls, of_weights, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(grad * scale)
        return of_phi

    def _step(self, grad: Tensor) -> None:
        self.updates += 1
        corrected = []
        with torch.no_grad():
            for moment, rate, value in zip(self._moments, _RATES, (grad, grad.square()), strict=True):
                moment.lerp_(value, 1 - rate)
                corrected.append(moment / (1 - rate**self.updates))
            self.phi.sub_(self.gate.learning_rate * corrected[0] / (corrected[1].sqrt() + _EPSILON))
            self.gate.settle(self.phi, self.memory)

    def _tensors(self) -> dict[str, Tensor]:
        first, second = self._moments
        return {"phi": self.phi.detach(), "first moment": first, "second moment": second, **self.memory}

    def snapshot(self) -> dict[str, Any]:
        """JSON-able; every bit of it. Between micro-batches the gradient of φ is part of it."""
        tensors, grad = self._tensors(), self.phi.grad
        if grad is not None and any(m.parameter.grad is not None for m in self._members):
            tensors["gradient"] = grad
        return {"updates": self.updates, **{name: to_text(value) for name, value in tensors.items()}}

    def restore(self, saved: dict[str, Any], where: str) -> None:
        """Go on from what `snapshot` gave.

        Raises:
            TdError: something is missing, damaged or of another size.
        """
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(from_text(saved.get(name), tensor, f"{where}, {name} of the gate"))
        self.updates, self.phi.grad = int(saved["updates"]), None
        if "gradient" in saved:  # the next draw forgets it where the gradients of the weights have not come along
            grad = from_text(saved["gradient"], self.phi, f"{where}, gradient of the gate")
            self.phi.grad = grad.clone().to(self.phi.device)
