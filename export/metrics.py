"""How good predictions are: pure functions, predictions and references in, one number out."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from td_plugin.errors import TdError

IGNORED = -100
"""The label of what is not predicted: padding, the later pieces of a word. The convention of torch and transformers."""


def accuracy(predictions: Tensor, references: Tensor) -> float:
    """Share of predictions that are right, in [0, 1].

    Args:
        predictions: class indices, any shape.
        references: the same shape; entries of -100 do not count.

    Raises:
        TdError: the shapes differ, or nothing counts.
    """
    predicted, expected = _counted(predictions, references)
    return (predicted == expected).double().mean().item()


def f1(predictions: Tensor, references: Tensor, *, average: Literal["macro", "binary"] = "macro") -> float:
    """The F1 score, in [0, 1]: ``2 TP / (2 TP + FP + FN)``, 0 where that is 0 / 0.

    Args:
        predictions: class indices, any shape.
        references: the same shape; entries of -100 do not count.
        average: ``"macro"``: the mean over all classes that occur; ``"binary"``: that of class 1.

    Raises:
        TdError: the shapes differ, or nothing counts.
    """
    predicted, expected = _counted(predictions, references)
    classes = {*predicted.tolist(), *expected.tolist()} if average == "macro" else {1}
    scores = []
    for index in sorted(classes):
        hits = ((predicted == index) & (expected == index)).sum().item()
        total = (predicted == index).sum().item() + (expected == index).sum().item()
        scores.append(2 * hits / total if total else 0.0)
    return sum(scores) / len(scores)


def perplexity(logits: Tensor, references: Tensor) -> float:
    """``exp`` of the mean negative log-likelihood of the references; 1 is perfect.

    Each row of logits is of the class at the same place: a decoder's are shifted by the caller (`next_tokens`).

    Args:
        logits: ``[..., classes]``.
        references: class indices ``[...]``; entries of -100 do not count.

    Raises:
        TdError: the shapes differ, or nothing counts.
    """
    if logits.shape[:-1] != references.shape:
        raise _unequal(list(logits.shape[:-1]), list(references.shape))
    total, count = likelihood(logits, references)
    if not count.any():
        raise _nothing()
    return (total.sum() / count.sum()).exp().item()


def likelihood(logits: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Per row its sum of negative log-likelihoods, in nats, and how many references that is.

    Args:
        logits: ``[rows, ..., classes]``.
        references: ``[rows, ...]``; entries of -100 do not count.
    """
    classes = logits.shape[-1]
    flat = torch.nn.functional.cross_entropy(
        logits.reshape(-1, classes).double(), references.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    rows = references.shape[0]
    return flat.reshape(rows, -1).sum(1), (references != IGNORED).reshape(rows, -1).sum(1)


def next_tokens(logits: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """A decoder's logits beside what they predict: those at token i are of token i + 1.

    Args:
        logits: ``[rows, tokens, vocabulary]``.
        references: ``[rows, tokens]``.
    """
    return logits[:, :-1], references[:, 1:]


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU as sacrebleu computes it by default (13a tokens, exponential smoothing), but in [0, 1].

    Source: Post, A Call for Clarity in Reporting BLEU Scores, 2018, 1804.08771.

    Args:
        hypotheses: what was generated.
        references: one text for each.

    Raises:
        TdError: the counts differ, there are none, or sacrebleu is not installed.
    """
    if len(hypotheses) != len(references):
        raise _unequal(len(hypotheses), len(references))
    if not references:
        raise _nothing()
    try:
        sacrebleu = importlib.import_module("sacrebleu")
    except ImportError as error:
        raise TdError("BLEU is computed by sacrebleu", got=error, fix="pip install 'td-plugin[bleu]'") from error
    return float(sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score) / 100


def _counted(predictions: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    if predictions.shape != references.shape:
        raise _unequal(list(predictions.shape), list(references.shape))
    counted = references != IGNORED
    if not counted.any():
        raise _nothing()
    return predictions[counted], references[counted]


def _unequal(predictions: object, references: object) -> TdError:
    return TdError("predictions and references have other shapes", got=f"{predictions} and {references}")


def _nothing() -> TdError:
    return TdError("there is no reference to compare with", fix="labels of -100 do not count")
