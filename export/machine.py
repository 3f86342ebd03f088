"""What the machine is, and how busy: it belongs beside every latency."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from td_plugin.export.engines import OPENVINO

_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")
_PACKAGES = ("td-plugin", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy", "torch")
_NVIDIA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


def machine(providers: Iterable[str]) -> dict[str, str]:
    """Processor, instruction sets, cores, memory, load, system and the exact versions of what was measured with.

    Args:
        providers: what ran the files, as the runtimes call it.
    """
    used = list(dict.fromkeys(providers))
    model, flags = _processor()
    load = load_average()
    facts = {
        "cpu": model,
        "flags": " ".join(flag for flag in _CPU_FLAGS if flag in flags),
        "cores": str(cores()),
        "memory": _memory(),
        "gpu": _gpu() if any(name in _NVIDIA for name in used) else "",
        "load": "" if load is None else f"{load:.1f}",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in (*_PACKAGES, *([OPENVINO] if OPENVINO in used else []))},
        "provider": " ".join(used),
    }
    return {name: fact for name, fact in facts.items() if fact}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that wanted to run, over the last minute; None on Windows."""
    return os.getloadavg()[0] if os.name == "posix" else None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> tuple[str, set[str]]:
    """Model name and instruction sets; the latter only where /proc tells them."""
    source = Path("/proc/cpuinfo")
    if not source.exists():
        return platform.processor() or platform.machine(), set()
    pairs = [line.partition(":") for line in source.read_text(encoding="utf-8").splitlines()]
    facts = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
    flags = facts.get("flags") or facts.get("Features") or ""
    return facts.get("model name") or platform.machine(), set(flags.split())


def _memory() -> str:
    source = Path("/proc/meminfo")
    if not source.exists():
        return ""
    total = source.read_text(encoding="utf-8").split()[1]
    return f"{int(total) * 1024 / 2**30:.1f} GiB"


def _gpu() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    asked = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, check=False, capture_output=True, text=True)
    return done.stdout.strip().replace("\n", "; ") if done.returncode == 0 else ""
