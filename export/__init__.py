"""From a trained model to a small, verified, measured file: shrink, save, ONNX, quantize, verify, benchmark.

The functions carry the names of their modules, so they are bound here at once: bound on demand, a name would turn into
the module as soon as anyone imports that. Nothing of transformers, onnx or onnxruntime is loaded before it is used.
"""

from td_plugin.export.auto_form import best_form
from td_plugin.export.benchmark import benchmark
from td_plugin.export.check import check
from td_plugin.export.decoder import to_cached_onnx
from td_plugin.export.evaluation import evaluate_onnx
from td_plugin.export.forms import derive
from td_plugin.export.lengths import at_lengths
from td_plugin.export.module_checkpoint import load_into
from td_plugin.export.operator_profile import profile_operators
from td_plugin.export.pretrained import load_pretrained, save_pretrained
from td_plugin.export.quantize import quantize
from td_plugin.export.repeats import repeat
from td_plugin.export.runners import Form, available_providers
from td_plugin.export.shrink import shrink
from td_plugin.export.throughput import Load, throughput
from td_plugin.export.to_onnx import to_onnx
from td_plugin.export.verify import verify
from td_plugin.export.verify_decoding import verify_decoding
from td_plugin.export.verify_forms import verify_forms

__all__ = [
    "Form",
    "Load",
    "at_lengths",
    "available_providers",
    "benchmark",
    "best_form",
    "check",
    "derive",
    "evaluate_onnx",
    "load_into",
    "load_pretrained",
    "profile_operators",
    "quantize",
    "repeat",
    "save_pretrained",
    "shrink",
    "throughput",
    "to_cached_onnx",
    "to_onnx",
    "verify",
    "verify_decoding",
    "verify_forms",
]
