"""Opening an ONNX file in a runtime; run as a script, what that costs in a process of its own.

As a script it must not load td_plugin, whose torch would drown the figures; so this file imports nothing of it.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CPU = "CPUExecutionProvider"
OPENVINO = "openvino"  # its own package; onnxruntime's build for it is called OpenVINOExecutionProvider
# What a provider leaves to others, in this order.
_BEHIND = {"TensorrtExecutionProvider": ("CUDAExecutionProvider",)}

Feeds = Mapping[str, Any]
Execute = Callable[[Feeds], Any]


@dataclass(frozen=True)
class Engine:
    """All that a timing depends on besides the inputs.

    Attributes:
        path: the ONNX file.
        threads: threads inside one operator.
        provider: an execution provider of onnxruntime, or ``"openvino"``.
        options: of the provider, as it names them.
        workers: runs at a time.
    """

    path: str
    threads: int = 1
    provider: str = CPU
    options: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1

    def open(self) -> Execute:
        """Load the file. The result may be called by several threads at a time."""
        if self.provider == OPENVINO:
            return _openvino(self)
        session = onnxruntime_session(self)
        return lambda feeds: session.run(None, feeds)


def session_options(threads: int) -> Any:
    """Sequential operators; threads do not spin while they wait, which under other load costs a factor of two."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only: they are raised as well
    return options


def onnxruntime_session(engine: Engine, options: Any = None) -> Any:
    """An `onnxruntime.InferenceSession`.

    Args:
        engine: what to open.
        options: other `session_options` than those of `engine`.

    Raises:
        RuntimeError: the provider is installed but cannot be used; onnxruntime itself would go on with the CPU.
    """
    import onnxruntime as ort

    asked = [(engine.provider, dict(engine.options))]
    asked += [(name, {}) for name in _BEHIND.get(engine.provider, ()) if name in ort.get_available_providers()]
    chosen = options if options is not None else session_options(engine.threads)
    session = ort.InferenceSession(engine.path, chosen, providers=asked)
    if session.get_providers()[0] != engine.provider:
        raise RuntimeError(f"{engine.provider} could not be started; are its libraries and its device there?")
    return session


def _openvino(engine: Engine) -> Execute:
    openvino = importlib.import_module(OPENVINO)
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bf16 where the processor has it, which is another model
        "INFERENCE_NUM_THREADS": engine.threads * engine.workers,
        "NUM_STREAMS": engine.workers,
        **engine.options,
    }
    compiled = openvino.Core().compile_model(engine.path, "CPU", config)
    own = threading.local()  # a request is not for two threads

    def execute(feeds: Feeds) -> Any:
        request = vars(own).get("request")
        if request is None:
            request = own.request = compiled.create_infer_request()
        return request.infer(dict(feeds))

    return execute


def _resident(entry: str) -> int | None:
    # Not getrusage: the peak it reports is inherited from the parent process.
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(entry))) * 1024


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew at what is resident
    except OSError:  # not Linux, or not allowed: the peak of the imports counts, which is about as low
        return


def _measure(engine: Engine, feeds: Feeds) -> dict[str, float | None]:
    _forget_peak()
    before = _resident("VmRSS:")
    start = time.perf_counter()
    execute = engine.open()
    loaded = time.perf_counter()
    execute(feeds)
    ran = time.perf_counter()
    for _ in range(2):
        execute(feeds)
    peak = _resident("VmHWM:")
    return {
        "load_seconds": loaded - start,
        "first_seconds": ran - loaded,
        "peak_memory": None if before is None or peak is None else max(peak - before, 0),
    }


def _main(request: str) -> None:
    import numpy as np

    asked = json.loads(request)
    engine = Engine(**asked["engine"])
    importlib.import_module(OPENVINO if engine.provider == OPENVINO else "onnxruntime")
    with np.load(asked["values"], allow_pickle=False) as values:
        feeds = {name: values[f"arr_{index}"] for index, name in enumerate(asked["names"])}
    sys.stdout.write(json.dumps(_measure(engine, feeds)))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its file names are not meant for import
    _main(sys.argv[1])
