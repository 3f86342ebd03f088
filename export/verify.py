"""Is the ONNX file the model? torch against onnxruntime on the same batches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from td_plugin.errors import TdError
from td_plugin.export.modes import evaluating
from td_plugin.export.probes import Batch, flags_of
from td_plugin.export.probes import make_probe_batches as make_probe_batches
from td_plugin.export.session import graph_inputs, is_quantized, open_session, read_graph
from td_plugin.report import table

# fp32, elementwise |onnx - torch| <= tolerance * (1 + |torch|). Correct exports of 12-layer models differ by 4e-7 to
# 4e-6 (other summation order); a wrong operator, head count or mask shows as 1e-2 and more. 1e-4 lies between.
_CLOSENESS = 1e-4
# int8 has no elementwise bar that fits every scale of logits: the bar is ||onnx - torch|| / ||torch|| over a batch.
# Dynamic int8 gives 0.005 to 0.05; a broken scale or a layer of zeros gives 0.3 and more.
_RELATIVE = 0.15


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
        tolerance: fp32: of the elementwise difference, absolute and relative; int8: of `relative`.
    """

    rows: tuple[BatchParity, ...]
    precision: Literal["fp32", "int8"]
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


def verify(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Sequence[Batch],
    *,
    tolerance: float | None = None,
    where: str | None = None,
) -> ParityReport:
    """Compare `model` in evaluation mode with the ONNX file at `path`, on real batches.

    Outputs with one row per token are compared only where ``attention_mask`` is 1: what a model computes at padding
    is undefined and does differ between runtimes.

    Args:
        model: the torch model; its mode is restored afterwards.
        path: the ONNX file, fp32 or quantized.
        batches: dicts of tensors as the model is called; those that the graph lacks (labels) are left out, and what is
            no tensor (``use_cache``) goes to the model alone.
        tolerance: fp32: bound t in ``|onnx - torch| <= t * (1 + |torch|)``, default 1e-4. Quantized: bound of
            ``||onnx - torch|| / ||torch||`` per batch, default 0.15; judge such a file by its top-1 agreement too.
        where: what errors call the file; its path unless given.

    Raises:
        TdError: the file is missing, damaged or takes other inputs, an output is not finite, or a difference exceeds
            the tolerance.
    """
    label = str(path) if where is None else where
    if not batches:
        raise TdError("no batches to compare on", where=label, fix="give at least one dict of tensors")
    session = open_session(path)
    precision: Literal["fp32", "int8"] = "int8" if is_quantized(read_graph(path)) else "fp32"
    bar = tolerance if tolerance is not None else (_CLOSENESS if precision == "fp32" else _RELATIVE)
    rows = []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            inputs = graph_inputs(session, batch, label)
            pairs = _outputs(model, session, inputs, flags_of(batch), label)
            rows.append(_compare(pairs, inputs))
            _judge(pairs, rows, precision, bar, label)
    return ParityReport(tuple(rows), precision, bar)


def named_outputs(output: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of what a model returned, by name: the keys of a dict, ``logits`` for a lone tensor."""
    if isinstance(output, Tensor):
        return {name or "logits": output}
    if isinstance(output, Mapping):
        items = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        items = [(str(index) if name else f"output_{index}", value) for index, value in enumerate(output)]
    else:
        return {}
    return {k: v for key, value in items for k, v in named_outputs(value, f"{name}.{key}" if name else key).items()}


def _outputs(
    model: nn.Module, session: Any, inputs: Batch, flags: Batch, where: str
) -> list[tuple[str, Tensor, Tensor]]:
    """Of each graph output its name, the values of torch and those of onnxruntime, where there is no padding."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    expected = named_outputs(model(**{name: value.to(device) for name, value in inputs.items()}, **flags))
    names = [entry.name for entry in session.get_outputs()]
    if not set(names) <= set(expected):  # written by another exporter: the order still tells which is which
        if len(names) != len(expected):
            raise TdError("the graph has other outputs than the model", where=where, got=names, fix=f"{list(expected)}")
        expected = dict(zip(names, expected.values(), strict=True))
    try:
        actual = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise TdError(
            "onnxruntime cannot run the graph", where=where, got=f"{_shape(inputs)}: {str(error).splitlines()[0]}"
        ) from error
    pairs = []
    for name, values in zip(names, actual, strict=True):
        ours, theirs = expected[name].detach().cpu(), torch.as_tensor(values)
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
    return mask != 0


def _compare(pairs: Sequence[tuple[str, Tensor, Tensor]], inputs: Batch) -> BatchParity:
    ours = torch.cat([pair[1].flatten() for pair in pairs])
    theirs = torch.cat([pair[2].flatten() for pair in pairs])
    gap = (theirs - ours).abs()
    _, logits, other = pairs[0]
    same = logits.argmax(-1) == other.argmax(-1) if logits.ndim > 1 and logits.shape[-1] > 1 else torch.empty(0)
    relative = gap.norm() / ours.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return BatchParity(
        _shape(inputs), gap.max().item(), gap.mean().item(), relative.item(), int(same.sum()), same.numel()
    )


def _judge(
    pairs: Sequence[tuple[str, Tensor, Tensor]], rows: Sequence[BatchParity], precision: str, bar: float, where: str
) -> None:
    """Raise for the last of `rows` if its outputs are not finite or too far apart."""
    row, batch = rows[-1], f"batch {len(rows) - 1} of shape {rows[-1].shape}"
    for name, ours, theirs in pairs:
        if not (ours.isfinite().all() and theirs.isfinite().all()):
            source = "the model's" if not ours.isfinite().all() else "the ONNX file's"
            raise TdError(f"{source} output {name!r} is not finite", where=where, got=batch)
        close = torch.allclose(theirs, ours, rtol=bar, atol=bar) if precision == "fp32" else row.relative <= bar
        if not close:
            raise TdError(
                "the ONNX file does not compute what the model computes",
                where=where,
                got=f"max difference {row.max_abs:.3g} (relative {row.relative:.3g}), output {name!r}, {batch}",
                fix=f"the tolerance is {bar:g}: export again, or pass a tolerance that you can justify",
            )


def _shape(inputs: Batch) -> str:
    return "x".join(str(size) for size in next(iter(inputs.values())).shape)
