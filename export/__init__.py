"""From a trained model to a small, verified, measured file: shrink, save, ONNX, quantize, verify, benchmark.

The functions carry the names of their modules, so they are bound here at once: bound on demand, a name would turn into
the module as soon as anyone imports that. Nothing of transformers, onnx or onnxruntime is loaded before it is used.
"""

from td_plugin.export.auto_form import best_form
from td_plugin.export.benchmark import benchmark
from td_plugin.export.channel_prune import channel_prune, reconstruct_channels
from td_plugin.export.check import check
from td_plugin.export.check_bars import Bars
from td_plugin.export.check_latency import Timing
from td_plugin.export.decoder import to_cached_onnx
from td_plugin.export.evaluation import Examples, Generation, evaluate_onnx
from td_plugin.export.fewer_layers import fewer_layers
from td_plugin.export.forms import derive
from td_plugin.export.from_scratch import from_scratch
from td_plugin.export.hub import push_to_hub
from td_plugin.export.lengths import at_lengths
from td_plugin.export.model_card import write_card
from td_plugin.export.module_checkpoint import load_into
from td_plugin.export.operator_profile import profile_operators
from td_plugin.export.origin import Origin
from td_plugin.export.parity import Tolerance
from td_plugin.export.pretrained import load_pretrained, save_pretrained
from td_plugin.export.probes import make_parity_batches
from td_plugin.export.quantize import quantize
from td_plugin.export.repeats import repeat
from td_plugin.export.runners import Form, available_providers
from td_plugin.export.save_onnx import save_onnx
from td_plugin.export.serving import OnnxPipeline, load_onnx
from td_plugin.export.shrink import shrink
from td_plugin.export.throughput import Load, throughput
from td_plugin.export.to_onnx import to_onnx
from td_plugin.export.verify import verify
from td_plugin.export.verify_decoding import verify_decoding
from td_plugin.export.verify_forms import verify_forms

try:
    from td_plugin.export.block_sparse import block_sparse
    from td_plugin.export.sparse_file import load_sparse, save_sparse
    from td_plugin.export.storage import storage_table
except ModuleNotFoundError as error:  # of the extra onnx; shrinking and checkpoints do without
    if error.name != "numpy":
        raise

__all__ = [
    "Bars",
    "Examples",
    "Form",
    "Generation",
    "Load",
    "OnnxPipeline",
    "Origin",
    "Timing",
    "Tolerance",
    "at_lengths",
    "available_providers",
    "benchmark",
    "best_form",
    "block_sparse",
    "channel_prune",
    "check",
    "derive",
    "evaluate_onnx",
    "fewer_layers",
    "from_scratch",
    "load_into",
    "load_onnx",
    "load_pretrained",
    "load_sparse",
    "make_parity_batches",
    "profile_operators",
    "push_to_hub",
    "quantize",
    "reconstruct_channels",
    "repeat",
    "save_onnx",
    "save_pretrained",
    "save_sparse",
    "shrink",
    "storage_table",
    "throughput",
    "to_cached_onnx",
    "to_onnx",
    "verify",
    "verify_decoding",
    "verify_forms",
    "write_card",
]
