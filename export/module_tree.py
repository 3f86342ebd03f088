"""Dotted names as a tree for people: chains of single children are one line, and so are numbered layers alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

About = tuple[str, str]
"""What stands before and after the name in the line of an entry; empty text leaves its place out."""


@dataclass(frozen=True)
class Node:
    """One line of the tree and what hangs below it.

    Attributes:
        name: relative to the node above; empty for an entry of that very module.
        about: text of an entry; None for a module that only holds others.
        below: the nodes that hang from it.
        alike: how many modules this one stands for.
    """

    name: str
    about: About | None = None
    below: tuple[Node, ...] = ()
    alike: int = 1

    def __str__(self) -> str:
        before, after = self.about or ("", "")
        line = " · ".join(part for part in (before, self.name, after) if part)
        return f"{line} ({self.alike} alike)" if self.alike > 1 else line


def grow(entries: Iterable[tuple[str, About]]) -> tuple[Node, ...]:
    """The tree of `entries`, each a fully qualified module name and its text, in the order in which they come.

    Numbered siblings below which everything is the same, texts included, become one node.
    """
    return _grow([(tuple(name.split(".")) if name else (), about) for name, about in entries])


def _grow(entries: Sequence[tuple[tuple[str, ...], About]]) -> tuple[Node, ...]:
    below: dict[str, list[tuple[tuple[str, ...], About]]] = {}
    own = []
    for path, about in entries:
        if path:
            below.setdefault(path[0], []).append((path[1:], about))
        else:
            own.append(Node("", about))
    alike: dict[tuple[str, Node], list[str]] = {}
    for key, found in below.items():
        nodes = _grow(found)
        node = nodes[0] if len(nodes) == 1 else Node("", below=nodes)
        alike.setdefault(("" if key.isdecimal() else key, node), []).append(key)
    named = [
        replace(node, name=f"{_span(keys)}.{node.name}".rstrip("."), alike=node.alike * len(keys))
        for (_, node), keys in alike.items()
    ]
    return (*own, *named)


def _span(keys: Sequence[str]) -> str:
    """``3``, ``0…11``, ``0,2…10`` or ``0,1,5``."""
    if len(keys) < 3:
        return ",".join(keys)
    steps = {int(after) - int(before) for before, after in pairwise(keys)}
    if len(steps) > 1:
        return ",".join(keys)
    return f"{keys[0]}…{keys[-1]}" if steps == {1} else f"{keys[0]},{keys[1]}…{keys[-1]}"


def draw(nodes: Sequence[Node], indent: str = "") -> Iterator[str]:
    """The lines of `nodes` and of all that hangs below them."""
    for node in nodes:
        last = node is nodes[-1]
        yield f"{indent}{'└─ ' if last else '├─ '}{node}"
        yield from draw(node.below, indent + ("   " if last else "│  "))
