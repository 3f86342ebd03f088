"""How well an ONNX file does its task: labelled batches in, one score out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from td_plugin.errors import TdError
from td_plugin.export import metrics
from td_plugin.export.decoding import greedy
from td_plugin.export.modes import evaluating
from td_plugin.export.probes import Batch
from td_plugin.export.progress import bar
from td_plugin.export.scores import LOWER_IS_BETTER, Metric, Score, check_metric, quotient
from td_plugin.export.session import graph_inputs, open_session
from td_plugin.export.verify import graph_outputs, model_outputs


@dataclass(frozen=True)
class Generation:
    """How texts are generated, for BLEU.

    Attributes:
        decode: token ids ``[rows, tokens]`` -> texts.
        references: the text wanted for each row, in order.
        start: the token that begins the output of an encoder-decoder.
        end: the token that ends a text.
        max_new_tokens: longest output.
    """

    decode: Callable[[Tensor], list[str]]
    references: tuple[str, ...]
    start: int | None = None
    end: int | None = None
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Examples:
    """Labelled batches, and the metric that judges the answers.

    Attributes:
        batches: dicts of tensors as the model is called, with ``labels``: class indices ``[rows]`` or ``[rows,
            tokens]``; for perplexity the token ids. Labels of -100 do not count. BLEU takes `generation` instead.
            Read several times, so no generator.
        metric: ``accuracy``; ``f1``: the mean over the classes; ``binary_f1``: of class 1; ``perplexity``: of the next
            token; ``masked_perplexity``: of the labelled tokens themselves; ``bleu``, in [0, 1].
        generation: for BLEU.
        source: what errors call the data.
    """

    batches: Iterable[Batch]
    metric: Metric = "accuracy"
    generation: Generation | None = None
    source: str = "data"

    def __post_init__(self) -> None:
        check_metric(self.metric)
        if self.metric == "bleu" and self.generation is None:
            raise TdError("BLEU compares generated texts", where=self.source, fix="give generation=Generation(...)")


def evaluate_onnx(
    path: str | os.PathLike[str], examples: Examples, *, threads: int = 1, progress: bool = False
) -> Score:
    """Run an ONNX file on labelled data.

    Args:
        path: the ONNX file; one of another exporter will do.
        examples: batches and metric.
        threads: threads inside one operator.
        progress: show a bar on the terminal.

    Raises:
        TdError: the file is missing or damaged, the inputs do not fit its graph, there are no rows, labels are no
            classes of the model, or an output is not finite.
    """
    session, where = open_session(path, threads=threads), str(path)
    written_as = session.get_modelmeta().custom_metadata_map.get("td-plugin.model_class", "")
    if examples.metric == "perplexity" and written_as.endswith("MaskedLM"):
        raise TdError("this model fills gaps", where=where, got=written_as, fix="metric masked_perplexity")

    def answer(batch: Batch) -> Tensor:
        return _logits(graph_outputs(session, graph_inputs(session, batch, where), where))

    shown = _tracked(examples.batches, progress)
    if examples.generation is None:
        return _score(answer, shown, examples, where)
    texts: list[str] = []
    for batch in shown:
        tokens, _ = greedy(session, batch, examples.generation.max_new_tokens, *_ends(examples.generation), where=where)
        texts += examples.generation.decode(tokens)
    return Score("bleu", metrics.bleu(texts, examples.generation.references), len(texts))


def evaluate_model(model: nn.Module, examples: Examples) -> Score:
    """The same score of a torch model in evaluation mode; not BLEU.

    Raises:
        TdError: there are no rows, or labels are no classes of the model.
    """
    where = type(model).__name__
    if examples.generation is not None:
        raise TdError("BLEU is computed of ONNX files", where=where, fix="call model.generate and metrics.bleu")

    def answer(batch: Batch) -> Tensor:
        return _logits(model_outputs(model, {name: value for name, value in batch.items() if name != "labels"}))

    with evaluating(model), torch.no_grad():
        return _score(answer, examples.batches, examples, where)


def _ends(generation: Generation) -> tuple[int | None, int | None]:
    return generation.start, generation.end


def _logits(outputs: dict[str, Tensor]) -> Tensor:
    return outputs.get("logits", next(iter(outputs.values())))


def _score(answer: Callable[[Batch], Tensor], batches: Iterable[Batch], examples: Examples, where: str) -> Score:
    parts = []
    for batch in batches:
        labels = _labels(batch, examples.source)
        logits = answer(batch)
        if examples.metric == "perplexity" and logits.ndim == 3:
            logits, labels = metrics.next_tokens(logits, labels)
        _check_classes(logits, labels, examples.source, where)
        parts.append(_judged(logits, labels, examples.metric))
    predictions, references, evidence = map(torch.cat, zip(*parts, strict=True)) if parts else (torch.zeros(0),) * 3
    if not len(references):
        raise TdError("the data hold no labelled row", where=examples.source)
    if examples.metric in ("f1", "binary_f1"):
        average: Literal["macro", "binary"] = "macro" if examples.metric == "f1" else "binary"
        return Score(examples.metric, metrics.f1(predictions, references, average=average), len(evidence))
    return Score(examples.metric, quotient(examples.metric, evidence.sum(0)).item(), len(evidence), evidence)


def _judged(logits: Tensor, labels: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions and references that count, and each row's share in the score."""
    predicted, counted = logits.argmax(-1), labels != metrics.IGNORED
    if metric in LOWER_IS_BETTER:
        share = metrics.likelihood(logits, labels)
    else:
        hits = (predicted == labels).reshape(len(labels), -1).sum(1)
        share = hits, counted.reshape(len(labels), -1).sum(1)
    return predicted[counted], labels[counted], torch.stack(share, 1).double()


def _labels(batch: Batch, source: str) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim == 0:
        got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TdError("the batches need labels: class indices", where=source, got=got)
    return labels.cpu()


def _check_classes(logits: Tensor, labels: Tensor, source: str, where: str) -> None:
    if logits.shape[:-1] != labels.shape or logits.shape[-1] < 2:
        raise TdError(
            "the labels do not fit what the model predicts",
            where=source,
            got=f"labels {list(labels.shape)}, outputs {list(logits.shape)} of {where}",
        )
    wrong = labels[(labels != metrics.IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))]
    if len(wrong):
        raise TdError("a label is no class of the model", where=source, got=f"{wrong[0]} of {logits.shape[-1]} classes")
    if not logits.isfinite().all():
        raise TdError("an output is not finite", where=where)


def _tracked(batches: Iterable[Batch], shown: bool) -> Iterator[Batch]:
    with bar("batches", len(batches) if isinstance(batches, Sized) else 0, shown) as steps:
        for batch in batches:
            yield batch
            steps.advance()
