"""A progress bar for work whose length may grow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from td_plugin.errors import TdError


class Bar:
    """Steps done of steps expected; silent without a display."""

    def __init__(self, display: Any = None, task: Any = None) -> None:
        self._display, self._task = display, task

    def advance(self) -> None:
        """One step is done."""
        if self._display is not None:
            self._display.advance(self._task)

    def expect(self, total: int) -> None:
        """It will be so many steps in all."""
        if self._display is not None:
            self._display.update(self._task, total=total)


@contextmanager
def bar(description: str, total: int, shown: bool) -> Iterator[Bar]:
    """A bar on the terminal while the block runs, if `shown`.

    Raises:
        TdError: rich is not installed.
    """
    if not shown:
        yield Bar()
        return
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise TdError("rich draws the progress bar", got=error, fix="pip install 'td-plugin[onnx]'") from error
    with Progress(transient=True) as display:
        yield Bar(display, display.add_task(description, total=total))
