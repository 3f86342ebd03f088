"""γ, α, and what takes part, by the names of layers or by regular expressions: in place of a config list."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from td_plugin.choices import Choice
from td_plugin.contract import check_fraction
from td_plugin.errors import TdError
from td_plugin.given import nearest


@dataclass(frozen=True)
class Layers:
    r"""Which of the tensors that a recipe takes by default take part, and with which γ and α.

    A pattern is the name of a tensor (``"encoder.0.weight"``), of a module, for all in it (``"encoder.0"``), or a
    regular expression that is found anywhere in a tensor's name (``r"layer\.[0-3]\..*intermediate"``). A group of units
    has the names of all the tensors that rank it: ``"query"`` names the heads.

    `exclude` wins over `include`. Of several patterns that give a tensor its γ, a name wins over a regular expression,
    the longer name over the shorter, and the first regular expression over the others.

    Attributes:
        sparsity_level: pattern -> γ in [0, 1); where none fits, that of the sparsifier.
        drop_rate: pattern -> α in [0, 1]; where none fits, that of the recipe.
        include: patterns of what takes part; None: all.
        exclude: patterns of what does not.

    Raises:
        TdError: a fraction outside its range, something that is no regular expression, patterns as one string. When the
            model is prepared: a pattern that fits nothing (the nearest name is given), or nothing is left.

    Example:
        >>> layers = Layers({"encoder.0": 0.3, r"encoder\.\d+": 0.8}, exclude=["pooler"])
        >>> # sparsifier.prepare(model, layers), or TargetedDropoutCallback(recipe, 0.5, config=layers)
    """

    sparsity_level: Mapping[str, float] = field(default_factory=dict)
    drop_rate: Mapping[str, float] = field(default_factory=dict)
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("sparsity_level", "drop_rate"):
            given = getattr(self, name)
            if not isinstance(given, Mapping):
                raise TdError(f"{name} by layer is a mapping", got=repr(given), fix='{"encoder.0": 0.5}')
            for pattern, fraction in given.items():
                check_fraction(fraction, name, str(pattern), closed=name == "drop_rate")
        for name in ("include", "exclude"):
            given = getattr(self, name)
            if isinstance(given, str) or not (isinstance(given, Sequence) or (given is None and name == "include")):
                raise TdError(f"{name} is a list of patterns", got=repr(given), fix='["encoder.0", "pooler"]')
        for pattern in self._patterns():
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise TdError("not a regular expression", where=repr(pattern), got=error, fix="escape it") from error

    def _patterns(self) -> list[str]:
        return [*self.sparsity_level, *self.drop_rate, *(self.include or ()), *self.exclude]

    def choose(self, choices: Iterable[Choice], skipped: Mapping[str, str]) -> tuple[list[Choice], dict[str, str]]:
        """What is left of a selection, each choice with its γ and α; and what is skipped, with reasons.

        Args:
            choices: what the recipe takes by default.
            skipped: fully qualified tensor name -> why it does not.

        Raises:
            TdError: a pattern fits nothing.
        """
        choices, skipped = list(choices), dict(skipped)
        names = [_names(choice) for choice in choices]
        everything = [name for one in names for name in one]
        for pattern in self.exclude:
            _require(pattern, "exclude", [*everything, *skipped], {})
        for pattern in self.include or ():
            _require(pattern, "include", everything, skipped)
        chosen = []
        for choice, of_choice in zip(choices, names, strict=True):
            reason = self._left_out(of_choice)
            if reason:
                skipped.update(dict.fromkeys(of_choice, reason))
            else:
                chosen.append(replace(choice, overrides={**choice.overrides, **self._levels(of_choice)}))
        left = [name for choice in chosen for name in _names(choice)]
        for pattern in (*self.sparsity_level, *self.drop_rate):
            _require(pattern, "a level", left, skipped)
        return chosen, skipped

    def _left_out(self, names: Sequence[str]) -> str:
        excluding = next((p for p in self.exclude if _fits(p, names)), None)
        if excluding is not None:
            return f"excluded by {excluding!r}"
        if self.include is None or any(_fits(p, names) for p in self.include):
            return ""
        return "no pattern of include fits it"

    def _levels(self, names: Sequence[str]) -> dict[str, float]:
        found = {"sparsity_level": _first(self.sparsity_level, names), "drop_rate": _first(self.drop_rate, names)}
        return {key: value for key, value in found.items() if value is not None}


def _names(choice: Choice) -> tuple[str, ...]:
    return tuple(part.fqn for part in choice.ranked)


def _named(pattern: str, names: Iterable[str]) -> bool:
    """Whether `pattern` is the name of one of the tensors, or of a module around it."""
    return any(name == pattern or name.startswith(f"{pattern}.") for name in names)


def _fits(pattern: str, names: Iterable[str]) -> bool:
    names = list(names)
    return _named(pattern, names) or any(re.search(pattern, name) for name in names)


def _first(levels: Mapping[str, float], names: Sequence[str]) -> float | None:
    """What the pattern that takes precedence says."""
    fitting = [pattern for pattern in levels if _fits(pattern, names)]
    exact = sorted((pattern for pattern in fitting if _named(pattern, names)), key=len, reverse=True)
    return levels[[*exact, *fitting][0]] if fitting else None


def _require(pattern: str, what: str, names: Sequence[str], skipped: Mapping[str, str]) -> None:
    """Raise if `pattern` fits none of `names`; where it fits what is skipped, say why that is."""
    if _fits(pattern, names):
        return
    lost = {name: reason for name, reason in skipped.items() if _fits(pattern, [name])}
    if lost:
        name, reason = next(iter(lost.items()))
        fix = "leave the pattern out; a tensor that is left alone by default can be named in a config list"
        raise TdError(
            f"the pattern of {what} fits only what is left alone", where=repr(pattern), got=f"{name}: {reason}", fix=fix
        )
    raise TdError(f"the pattern of {what} fits no target", where=repr(pattern), fix=nearest(pattern, names))
