"""What the name of an integer attribute says about it: a number of units, the size of a unit, or something else."""

from __future__ import annotations

import re

from td_plugin.units import Kind

_WIDTH = re.compile(
    "n?heads?|dims?|width|hidden|inner|embed|embd|embedding|features?|channels?|intermediate|units?|neurons?|ffn?|size"
    "|shape|split|h|d|model|planes|groups|filters"
)
_OTHER = re.compile(
    "idx|index|id|layers?|positions?|pos|length|len|window|kernel|stride|pad|padding|dilation|buckets?|distance|vocab"
    "|tokens?|patch|patches|image|seq|max|min|blocks?|steps?|chunk|labels?|experts|top|depth|rank|version|offset|frames"
    "|axis|ndim|threshold"
)
_UNIT_SIZE = re.compile(
    r"(?<!all_)head_(dim|size)s?$|dim_(per_)?head|per_head|^d_(kv|head|k|v)$|(key_value|kv)_proj_dim$"
)
_STREAM = re.compile("d_model|model_dim|hidden_size|n_embd")


def is_unit_size(name: str) -> bool:
    """Whether `name` is what models call the size of one head, which never changes with their number."""
    return _UNIT_SIZE.search(name) is not None


def is_likely(name: str, kind: Kind, equal: bool) -> bool:
    """Whether `name` is one that models give to widths and numbers of heads.

    Args:
        name: of an attribute.
        kind: of the units; some names speak of the residual stream, which may be as wide as all heads together.
        equal: whether every tensor has the same number of entries per unit. Where queries have more heads than keys, a
            number of "groups" is the ratio of the two, which stays.
    """
    words = name.lower().strip("_").split("_")
    if ("groups" in words and not equal) or (kind != "hidden" and _STREAM.fullmatch(name)):
        return False
    return any(map(_WIDTH.fullmatch, words)) and not any(map(_OTHER.fullmatch, words))
