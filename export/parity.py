"""How far the outputs of two models are apart, and how far they may be: values, without models or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from td_plugin.errors import TdError
from td_plugin.export.probes import Batch
from td_plugin.export.session import is_quantized
from td_plugin.report import table

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]


@dataclass(frozen=True)
class Tolerance:
    """What counts as equal.

    Attributes:
        bound: fp32: t in ``|other - reference| <= t * (1 + |reference|)``, elementwise; any lower precision: bound of
            ``||other - reference|| / ||reference||`` over a batch, since no elementwise bar fits every scale of logits.
        drop: how much worse the score on a data set may be: absolute, of a perplexity relative.
    """

    bound: float
    drop: float


# fp32: correct exports of 12-layer models differ by 4e-7 to 4e-6 (other summation order); a wrong operator, head count
# or mask shows as 1e-2 and more. 1e-4 lies between. Lower precisions of a BERT-base-wide encoder with 4 layers measured
# 2e-4 (fp16), 0.01 (int8), 0.02 (4-bit weights); a broken scale or a layer of zeros gives 0.3 and more.
# A score may drop by what ties and one changed answer in a few hundred cost, and by what these formats are known to.
TOLERANCES: Mapping[Precision, Tolerance] = MappingProxyType(
    {
        "fp32": Tolerance(1e-4, 0.002),
        "fp16": Tolerance(0.01, 0.005),
        "bf16": Tolerance(0.05, 0.01),
        "int8": Tolerance(0.15, 0.02),
        "int4": Tolerance(0.25, 0.03),
    }
)
"""Default per precision of the file; `verify` and `verify_forms` take others."""


@dataclass(frozen=True)
class BatchParity:
    """One batch.

    Attributes:
        shape: of its first input, such as ``"3x16"``.
        max_abs: largest absolute difference of any output element.
        mean_abs: mean absolute difference.
        relative: ``||onnx - torch|| / ||torch||``, Frobenius norms.
        agreeing: predictions (argmax over the last dimension of the first output) that are the same.
        predictions: predictions compared; 0 where the first output has no classes.
    """

    shape: str
    max_abs: float
    mean_abs: float
    relative: float
    agreeing: int
    predictions: int


@dataclass(frozen=True)
class ParityReport:
    """How far an ONNX file is from the model; `str()` is a table.

    Attributes:
        rows: one per batch.
        precision: of the file; it decides what `tolerance` bounds.
        tolerance: see `Tolerance.bound`.
    """

    rows: tuple[BatchParity, ...]
    precision: Precision
    tolerance: float

    @property
    def batches(self) -> int:
        """Batches compared."""
        return len(self.rows)

    @property
    def max_abs(self) -> float:
        """Largest absolute difference over all batches."""
        return max(row.max_abs for row in self.rows)

    @property
    def mean_abs(self) -> float:
        """Mean over the batches of the mean absolute difference."""
        return sum(row.mean_abs for row in self.rows) / len(self.rows)

    @property
    def relative(self) -> float:
        """Largest relative difference of a batch."""
        return max(row.relative for row in self.rows)

    @property
    def top1(self) -> float | None:
        """Share of equal predictions; None where nothing is predicted."""
        predictions = sum(row.predictions for row in self.rows)
        return sum(row.agreeing for row in self.rows) / predictions if predictions else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-able values."""
        totals = {"max_abs": self.max_abs, "mean_abs": self.mean_abs, "top1": self.top1, "batches": self.batches}
        return {**totals, **asdict(self)}

    def __str__(self) -> str:
        rows = [
            [row.shape, f"{row.max_abs:.1e}", f"{row.mean_abs:.1e}", f"{row.relative:.1e}", _agreement(row)]
            for row in self.rows
        ]
        bar = "elementwise difference" if self.precision == "fp32" else "relative difference"
        return f"{table(['batch', 'max', 'mean', 'relative', 'top-1'], rows)}\n{bar} within {self.tolerance:g}: yes"


def _agreement(row: BatchParity) -> str:
    return f"{row.agreeing}/{row.predictions}" if row.predictions else "-"


Pair = tuple[str, Tensor, Tensor]
"""Name of an output, its values of the reference and of the other, float64 and without padding."""


def precision_of(graph: Any) -> Precision:
    """What the weights of an `onnx.ModelProto` are stored in; the lowest where they are mixed."""
    bits = {a.i for node in graph.graph.node for a in node.attribute if a.name == "bits" and node.op_type in _PACKED}
    # The numbers of onnx.TensorProto: UINT4 and INT4, FLOAT16, BFLOAT16.
    types = {entry.data_type for entry in graph.graph.initializer if len(entry.dims) > 1}
    if 4 in bits or types & {21, 22}:
        return "int4"
    if bits or is_quantized(graph):
        return "int8"
    return "bf16" if 16 in types else "fp16" if 10 in types else "fp32"


_PACKED = ("MatMulNBits", "GatherBlockQuantized")  # onnxruntime's operators over weights of fewer bits


def paired(reference: Mapping[str, Tensor], other: Mapping[str, Tensor], inputs: Batch, where: str) -> list[Pair]:
    """The outputs of two models side by side.

    Outputs with one row per token are compared only where ``attention_mask`` is 1: what a model computes at padding is
    undefined and does differ between runtimes.

    Raises:
        TdError: they have other outputs, or of other shapes.
    """
    if not set(other) <= set(reference):  # written by another exporter: the order still tells which is which
        if len(other) != len(reference):
            raise TdError(
                "the graph has other outputs than the model", where=where, got=list(other), fix=f"{list(reference)}"
            )
        reference = dict(zip(other, reference.values(), strict=True))
    pairs = []
    for name, theirs in other.items():
        ours = reference[name]
        if ours.shape != theirs.shape:
            raise TdError(
                f"output {name!r} has another shape than the model's {list(ours.shape)}",
                where=where,
                got=list(theirs.shape),
            )
        tokens = _real_tokens(name, ours, inputs)
        pairs.append((name, ours[tokens].double(), theirs[tokens].double()))
    return pairs


def _real_tokens(name: str, output: Tensor, inputs: Batch) -> Tensor:
    """An index of `output`: its tokens that are no padding, or everything."""
    decodes = any(given.startswith("decoder_") for given in inputs) and not name.startswith("encoder_")
    mask: Tensor | None = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    if mask is None or output.ndim < 3 or output.shape[:2] != mask.shape:
        return torch.ones((), dtype=torch.bool)
    return mask.cpu() != 0


def compare(pairs: Sequence[Pair], shape: str) -> BatchParity:
    """The differences within one batch, of which `shape` is what the report calls it."""
    ours = torch.cat([pair[1].flatten() for pair in pairs])
    theirs = torch.cat([pair[2].flatten() for pair in pairs])
    if not ours.numel():  # nothing but padding, or no rows
        return BatchParity(shape, 0.0, 0.0, 0.0, 0, 0)
    gap = (theirs - ours).abs()
    _, logits, other = pairs[0]
    same = logits.argmax(-1) == other.argmax(-1) if logits.ndim > 1 and logits.shape[-1] > 1 else torch.empty(0)
    relative = gap.norm() / ours.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return BatchParity(shape, gap.max().item(), gap.mean().item(), relative.item(), int(same.sum()), same.numel())


def judge(pairs: Sequence[Pair], row: BatchParity, tolerance: tuple[Precision, float], batch: str, where: str) -> None:
    """Nothing, if the outputs are finite and close; `batch` is what errors call the batch.

    Raises:
        TdError: they are not.
    """
    precision, bound = tolerance
    for name, ours, theirs in pairs:
        if not (ours.isfinite().all() and theirs.isfinite().all()):
            source = "the model's" if not ours.isfinite().all() else "the ONNX file's"
            raise TdError(f"{source} output {name!r} is not finite", where=where, got=batch)
        close = torch.allclose(theirs, ours, rtol=bound, atol=bound) if precision == "fp32" else row.relative <= bound
        if not close:
            raise TdError(
                "the ONNX file does not compute what the model computes",
                where=where,
                got=f"max difference {row.max_abs:.3g} (relative {row.relative:.3g}), output {name!r}, {batch}",
                fix=f"the tolerance is {bound:g}: export again, or pass a tolerance that you can justify",
            )
