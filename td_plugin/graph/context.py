"""One call of an operator in the traced graph, as the rules for operators see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from td_plugin.graph.labels import UNKNOWN, Dim, Labels, Product
from td_plugin.graph.values import VARYING, Value, fixed
from td_plugin.units import Read

Result = Value | list[Value]


@dataclass(frozen=True)
class Call:
    """A node with the values of its arguments.

    Attributes:
        node: of the graph.
        labels: where rules write what they find.
        env: every earlier node's value; a list for operators with several results.
    """

    node: fx.Node
    labels: Labels
    env: dict[fx.Node, Result]

    @property
    def target(self) -> str:
        """The operator's name, such as ``aten.linear.default``."""
        return str(self.node.target)

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments; those of the schema that were left out or passed by name are filled in."""
        arguments = self._arguments
        return tuple(map(self.argument, arguments)) if arguments else self.node.args

    @property
    def _arguments(self) -> dict[str, Any]:
        """Names in the operator's schema -> defaults."""
        schema = getattr(self.node.target, "_schema", None)
        return {argument.name: argument.default_value for argument in schema.arguments} if schema is not None else {}

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema; `default` where it has none of its own."""
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        arguments = self._arguments
        position = list(arguments).index(name) if name in arguments else len(self.node.args)
        if position < len(self.node.args):
            return self.node.args[position]
        own = arguments.get(name)
        return default if own is None else own

    def value(self, position: int) -> Value:
        """The tensor at `position`."""
        found = self.env[self.args[position]]
        if isinstance(found, list):
            raise TypeError(f"{self.node.name}: argument {position} is a list of tensors")
        return found

    def optional(self, position: int) -> Value | None:
        """The tensor at `position`, if one is given."""
        return self.value(position) if position < len(self.args) and isinstance(self.args[position], fx.Node) else None

    def values(self, position: int) -> list[Value]:
        """The tensors of the list at `position`."""
        found = [self.env[item] for item in self.args[position] if isinstance(item, fx.Node)]
        return [item for item in found if isinstance(item, Value)]

    @property
    def tensors(self) -> list[Value]:
        """Every tensor argument, lists included."""
        found = [self.env[node] for node in self.node.all_input_nodes if node in self.env]
        return [value for item in found for value in (item if isinstance(item, list) else [item])]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The sizes of every tensor that comes out."""
        out = self.node.meta.get("val")
        several = out if isinstance(out, (list, tuple)) else [out]
        return [tuple(map(_number, item.shape)) if isinstance(item, Tensor) else () for item in several]

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the only tensor that comes out."""
        return self.shapes[0]

    @property
    def module(self) -> str:
        """Fully qualified name of the innermost module that makes this call."""
        stack = list(self.node.meta.get("nn_module_stack", {}).values())
        return str(stack[-1][0]) if stack else ""

    @property
    def location(self) -> str:
        """The operator, the module and the line of the user's code."""
        trace = str(self.node.meta.get("stack_trace") or "").strip().splitlines()
        lines = [line.strip() for line in trace if line.strip().startswith("File ")]
        return f"{self.target} in {self.module or 'the model'}" + (f" ({lines[-1]})" if lines else "")

    def outputs(self, reason: str) -> Result:
        """What comes out, fixed."""
        out = [fixed(shape, reason) for shape in self.shapes]
        return out if isinstance(self.node.meta.get("val"), (list, tuple)) else out[0]

    def unknown(self, what: str = UNKNOWN) -> Result:
        """Pin every dimension that goes in; what comes out cannot shrink either."""
        reason = f"{what}: {self.location}"
        for value in self.tensors:
            for dim in (*value.dims, *([value.joint.labels.reshape(-1)] if value.joint else [])):
                self.labels.pin(dim, reason)
        return self.outputs(reason)

    def consume(self, dim: Dim, source: Value) -> None:
        """A weight reads `source` along `dim`: what silenced units leave there must not depend on the inputs."""
        if source.rest == VARYING:
            self.labels.pin(dim, f"a unit without weights would still pass on what others compute: {self.location}")

    def read(self, dim: Dim, source: Value, position: int, padded: bool = False) -> None:
        """Note that the tensor behind `dim` reads dimension `position` of `source`."""
        if isinstance(dim, Tensor) and (owner := self.labels.owner(dim)) is not None:
            self.labels.reads.append((dim, Read(owner.tensor, source.name, position, padded)))

    def product(self, values: Sequence[Value], multiplications: int, dims: Sequence[Dim]) -> None:
        """Count the work of a product."""
        weights = [dim for value in values if value.weight for dim in value.dims if isinstance(dim, Tensor)]
        where = next((owner.tensor for owner in map(self.labels.owner, weights) if owner), self.module)
        known = tuple(dim for dim in dims if isinstance(dim, Tensor))
        self.labels.products.append(Product(where, 2 * multiplications, known))


def _number(size: Any) -> int:
    """A size; one that depends on data is taken for a large prime, so that products of it stay told apart."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 10007)))
