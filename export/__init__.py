"""From a trained model to a small, verified, measured file: shrink, save, ONNX, quantize, verify, benchmark.

The functions carry the names of their modules, so they are bound here at once: bound on demand, a name would turn into
the module as soon as anyone imports that. Nothing of transformers, onnx or onnxruntime is loaded before it is used.
"""

from td_plugin.export.benchmark import benchmark
from td_plugin.export.module_checkpoint import load_into
from td_plugin.export.pretrained import load_pretrained, save_pretrained
from td_plugin.export.quantize import quantize
from td_plugin.export.shrink import shrink
from td_plugin.export.to_onnx import to_onnx
from td_plugin.export.verify import verify

__all__ = ["benchmark", "load_into", "load_pretrained", "quantize", "save_pretrained", "shrink", "to_onnx", "verify"]
