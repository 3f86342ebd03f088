"""How many threads one served model should compute with."""

from __future__ import annotations

import math
from pathlib import Path

import torch

_CGROUP, _SELF = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def serving_threads(asked: int | None = None) -> int:
    """`asked`, or as many as torch would take, at most the processors that the container has paid for.

    torch takes one thread per physical core of those that the process may use, and does what ``OMP_NUM_THREADS`` and
    `torch.set_num_threads` say. The quota of a container (Linux control groups) it does not know: with more threads
    than that the whole process is stopped for part of every tenth of a second.
    """
    if asked is not None:
        return asked
    quota = cpu_quota()
    threads = torch.get_num_threads()
    return threads if quota is None else max(1, min(threads, math.ceil(quota)))


def cpu_quota(root: Path = _CGROUP, own: Path = _SELF) -> float | None:
    """Processors that the control group of this process may use at a time; None without a limit, or elsewhere.

    Args:
        root: where control groups are mounted.
        own: the file that names those of this process.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    found = []
    for _, controllers, place in (line for line in lines if len(line) == 3):
        if not controllers:  # version 2: one tree for all
            found += [_second_version(folder) for folder in _upwards(root, place)]
        elif "cpu" in controllers.split(","):
            mounts = [root / name for name in (controllers, "cpu")]
            found += [_first_version(folder) for mount in mounts for folder in _upwards(mount, place)]
    return min((limit for limit in found if limit is not None), default=None)


def _upwards(mount: Path, place: str) -> list[Path]:
    """The group's folder and those around it, whose limits hold as well; in a container only the mount is there."""
    inner = mount / place.lstrip("/")
    return [folder for folder in (inner, *inner.parents) if folder == mount or mount in folder.parents]


def _second_version(folder: Path) -> float | None:
    limit, _, period = _read(folder / "cpu.max").partition(" ")
    return int(limit) / int(period) if limit.isdecimal() and period.isdecimal() else None


def _first_version(folder: Path) -> float | None:
    limit, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(limit) / int(period) if limit.isdecimal() and period.isdecimal() else None  # -1: none


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
