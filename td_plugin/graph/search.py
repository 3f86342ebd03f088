"""Which set of attributes must change: a bounded search, the most complete set first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

_FEW = 4


@dataclass(frozen=True)
class Key:
    """An attribute of a class of modules that may state a width."""

    cls: str
    attribute: str
    index: int | None
    per_unit: int


def search(
    likely: Sequence[Key], others: Sequence[Key], fault: Callable[[frozenset[Key]], str], allowance: int
) -> frozenset[Key] | str:
    """A set of attributes with which the model works: every likely one that can be in it, no other that need not.

    Args:
        likely: they state the width by their names.
        others: they change only if nothing works without.
        fault: why the model does not work if exactly these change; empty if it works.
        allowance: calls of `fault` at most, to find a set, and again to settle what else belongs in it.

    Returns:
        the set, or the first reason.
    """
    left = iter(range(allowance))
    first = ""
    tried: set[frozenset[Key]] = set()
    for keys in _sets(likely, others):
        if keys in tried:
            continue
        if next(left, None) is None:
            break
        tried.add(keys)
        reason = fault(keys)
        if not reason:
            return _settled(keys, likely, others, fault, iter(range(allowance)))
        first = first or reason
    return first


def _sets(likely: Sequence[Key], others: Sequence[Key]) -> Iterator[frozenset[Key]]:
    everything = frozenset(likely)
    yield everything
    yield frozenset(key for key in likely if "head" in key.attribute)
    if len(likely) <= _FEW:
        yield from (everything - {key} for key in likely)
    yield frozenset()
    yield everything | frozenset(others[:_FEW])
    yield from (frozenset([key]) for key in likely)
    yield from (everything - {key} for key in likely)
    yield from (everything | {key} for key in others)


def _settled(
    keys: frozenset[Key],
    likely: Sequence[Key],
    others: Sequence[Key],
    fault: Callable[[frozenset[Key]], str],
    left: Iterator[int],
) -> frozenset[Key]:
    """`keys` without those that need not change, and with the likely ones that may."""
    for key in others:
        if key in keys and next(left, None) is not None and not fault(keys - {key}):
            keys = keys - {key}
    for key in likely:
        if key not in keys and next(left, None) is not None and not fault(keys | {key}):
            keys = keys | {key}
    return keys
