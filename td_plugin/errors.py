"""The one error a user can cause."""

from __future__ import annotations


class TdError(ValueError):
    """A mistake the user can mend: what is wrong, where, what was found, and the fix.

    Args:
        what: the problem, one clause.
        where: the fully qualified tensor name or the path it concerns.
        got: the value found there.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", got: object = None, fix: str = "") -> None:
        parts = [what]
        if where:
            parts.append(f"where: {where}")
        if got is not None:
            parts.append(f"got: {got}")
        if fix:
            parts.append(f"fix: {fix}")
        super().__init__("; ".join(parts))


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says anything; its class where there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
