"""What the exporters say although nothing is wrong, kept from the user."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

# Logger -> beginnings of messages.
_NOISE = {
    "transformers.exporters.utils": ("OnnxExporter is experimental",),
    "torch.onnx._internal.exporter._registration": ("torchvision is not installed", "Failed to infer the signature"),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop the exporters' progress lines and the messages listed in `_NOISE`; anything else gets through."""

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_NOISE[record.name])

    loggers = [logging.getLogger(name) for name in _NOISE]
    printed = io.StringIO()
    for logger in loggers:
        logger.addFilter(wanted)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            # A recurrent layer keeps its parameters in a list beside their names, and the trace puts stand-ins there.
            warnings.filterwarnings("ignore", r"The tensor attributes? self\..*_flat_weights.* assigned", UserWarning)
            warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)  # torch by itself
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)
        for line in printed.getvalue().splitlines(keepends=True):
            if not line.startswith("[torch.onnx]"):
                sys.stdout.write(line)
