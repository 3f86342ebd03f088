"""Several models at once, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm


def in_processes(make: Callable[..., object], calls: Sequence[tuple[Any, ...]], processes: int, label: str) -> None:
    """Call `make` with each of `calls`, so many at once, under a bar; the first error ends what has not begun.

    With one process that is this one.
    """
    if not calls:
        return
    if processes == 1:
        for call in tqdm(calls, desc=label, file=sys.stderr, mininterval=2.0):
            make(*call)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(make, *call) for call in calls]
        for done in tqdm(as_completed(waiting), total=len(waiting), desc=label, file=sys.stderr, mininterval=2.0):
            try:
                done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
