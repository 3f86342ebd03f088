"""Metrics against scikit-learn and numpy, scores of ONNX files against both, and the interval of a drop."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from graphs import linear_graph, text_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn

from td_plugin.contract import TdError
from td_plugin.export import metrics
from td_plugin.export.evaluation import Examples, Generation, evaluate_model, evaluate_onnx
from td_plugin.export.scores import Score, drop

classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


class TestMetrics:
    @given(classes)
    @settings(max_examples=60, deadline=None)
    def test_equal_scikit_learn(self, pairs: list[tuple[int, int]]):
        predicted, expected = map(list, zip(*pairs, strict=True))
        ours = torch.tensor(predicted), torch.tensor(expected)
        assert metrics.accuracy(*ours) == pytest.approx(accuracy_score(expected, predicted))
        assert metrics.f1(*ours) == pytest.approx(f1_score(expected, predicted, average="macro", zero_division=0))
        binary = [[int(value == 1) for value in side] for side in (expected, predicted)]
        assert metrics.f1(*ours, average="binary") == pytest.approx(f1_score(*binary, zero_division=0))

    def test_what_does_not_count(self):
        predicted, expected = torch.tensor([[1, 2, 0], [0, 1, 1]]), torch.tensor([[1, -100, 0], [-100, 0, -100]])
        assert metrics.accuracy(predicted, expected) == pytest.approx(2 / 3)
        assert metrics.f1(predicted, expected) == pytest.approx(f1_score([1, 0, 0], [1, 0, 1], average="macro"))

    def test_perplexity_equals_numpy(self):
        generator = np.random.default_rng(0)
        logits, labels = generator.normal(size=(2, 5, 7)), generator.integers(0, 7, (2, 5))
        labels[0, 3:] = -100
        likelihoods = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
        picked = [likelihoods[i, j, labels[i, j]] for i in range(2) for j in range(5) if labels[i, j] >= 0]
        found = metrics.perplexity(torch.tensor(logits), torch.tensor(labels))
        assert found == pytest.approx(math.exp(-np.mean(picked)))

    def test_the_logits_of_a_decoder_are_of_the_next_token(self):
        ids = torch.tensor([[3, 1, 4]])
        logits = nn.functional.one_hot(torch.tensor([[1, 4, 0]]), 5) * 100.0
        assert metrics.perplexity(*metrics.next_tokens(logits, ids)) == pytest.approx(1)
        assert metrics.perplexity(logits, ids) > 1e9

    def test_refusals(self):
        one = torch.tensor([1])
        for work in (
            lambda: metrics.accuracy(one, torch.tensor([1, 2])),
            lambda: metrics.perplexity(torch.zeros(2, 3), one),
            lambda: metrics.bleu(["a"], []),
        ):
            with pytest.raises(TdError, match="other shapes"):
                work()
        for work in (
            lambda: metrics.f1(one, torch.tensor([-100])),
            lambda: metrics.perplexity(torch.zeros(1, 3), torch.tensor([-100])),
            lambda: metrics.bleu([], []),
        ):
            with pytest.raises(TdError, match="no reference"):
                work()

    def test_bleu_is_what_sacrebleu_says(self, monkeypatch: pytest.MonkeyPatch):
        seen: list[Any] = []

        def corpus_bleu(hypotheses: list[str], references: list[list[str]]) -> SimpleNamespace:
            seen.append((hypotheses, references))
            return SimpleNamespace(score=42.0)

        monkeypatch.setitem(sys.modules, "sacrebleu", SimpleNamespace(corpus_bleu=corpus_bleu))
        assert metrics.bleu(("a b", "c"), ("a", "d")) == 0.42
        assert seen == [(["a b", "c"], [["a", "d"]])]
        monkeypatch.setitem(sys.modules, "sacrebleu", None)
        with pytest.raises(TdError, match=r"sacrebleu.*pip install 'td-plugin\[bleu\]'"):
            metrics.bleu(["a"], ["a"])


VOCABULARY, CLASSES = 11, 3


def texts(rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(VOCABULARY, CLASSES)).astype(np.float32)


@pytest.fixture(scope="module")
def classifier(table: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_graph(tmp_path_factory.mktemp("graphs") / "classifier.onnx", table, per_token=False)


@pytest.fixture(scope="module")
def tagger(table: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_graph(tmp_path_factory.mktemp("graphs") / "tagger.onnx", table, per_token=True)


def labelled(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(seed))


class TestEvaluate:
    def test_a_classifier_from_elsewhere(self, classifier: Path, table: np.ndarray):
        batches = [{**texts(rows, rows), "labels": labelled((rows,), rows)} for rows in (4, 3, 5)]
        kept = [batch["attention_mask"][..., None].numpy() * table[batch["input_ids"]] for batch in batches]
        predicted = np.concatenate([part.sum(1).argmax(1) for part in kept])
        expected = torch.cat([batch["labels"] for batch in batches]).numpy()
        score = evaluate_onnx(classifier, Examples(batches))
        assert score.value == pytest.approx(accuracy_score(expected, predicted))
        assert (score.rows, str(score)) == (12, f"accuracy {score.value:.4g} on 12 rows")
        macro = evaluate_onnx(classifier, Examples(batches, "f1")).value
        assert macro == pytest.approx(f1_score(expected, predicted, average="macro", zero_division=0))

    def test_tokens_that_count(self, tagger: Path, table: np.ndarray):
        batch = texts(4)
        labels = labelled((4, 6), 0).masked_fill(batch["attention_mask"] == 0, -100)
        counted = labels != -100
        predicted = table[batch["input_ids"]].argmax(-1)[counted]
        score = evaluate_onnx(tagger, Examples([{**batch, "labels": labels}]))
        assert score.value == pytest.approx(accuracy_score(labels[counted], predicted))

    @pytest.mark.parametrize("metric", ["perplexity", "masked_perplexity"])
    def test_perplexity(self, metric: Any, tmp_path: Path):
        scores = np.random.default_rng(2).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
        path = text_graph(tmp_path / "model.onnx", scores, per_token=True)
        batches = [texts(2, seed) for seed in range(2)]
        marked = [{**b, "labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in batches]
        shift = int(metric == "perplexity")
        losses = []
        for batch in marked:
            logits = torch.tensor(scores)[batch["input_ids"]][:, : 6 - shift]
            labels = batch["labels"][:, shift:]
            losses.append(
                nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), labels.flatten(), reduction="sum")
            )
        counted = sum(int((batch["labels"][:, shift:] != -100).sum()) for batch in marked)
        found = evaluate_onnx(path, Examples(marked, metric))
        assert found.value == pytest.approx(math.exp(sum(losses) / counted), rel=1e-5)
        other = evaluate_onnx(path, Examples([marked[0]], metric))  # rows weigh by their tokens, not batches alike
        assert found.value != pytest.approx(other.value)

    def test_a_torch_model_scores_the_same(self, classifier: Path, table: np.ndarray):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Parameter(torch.tensor(table))

            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
                return (self.table[input_ids] * attention_mask[..., None]).sum(1)

        examples = Examples([{**texts(9), "labels": labelled((9,), 3)}])
        assert evaluate_model(Net(), examples) == evaluate_onnx(classifier, examples)

    def test_refusals(self, classifier: Path, tagger: Path, tmp_path: Path):
        given = texts(3)
        right = torch.zeros(3, dtype=torch.long)
        for batches, match in (
            ([], "no labelled row"),
            ([given], "need labels.*NoneType"),
            ([{**given, "labels": right.float()}], r"need labels.*float32 \[3\]"),
            ([{**given, "labels": right[:2]}], r"do not fit.*labels \[2\], outputs \[3, 3\]"),
            ([{**given, "labels": right + 3}], "no class of the model.*3 of 3 classes"),
            ([{**given, "labels": right - 100}], "no labelled row"),
            ([{"input_ids": given["input_ids"], "labels": right}], "attention_mask"),
        ):
            with pytest.raises(TdError, match=match):
                evaluate_onnx(classifier, Examples(batches))
        with pytest.raises(TdError, match="no such ONNX file"):
            evaluate_onnx(tmp_path / "absent.onnx", Examples([given]))
        with pytest.raises(TdError, match="no such metric.*accurcy"):
            Examples([], "accurcy")  # type: ignore[arg-type]
        with pytest.raises(TdError, match="compares generated texts"):
            Examples([], "bleu")

    def test_a_number_is_no_class(self, tmp_path: Path):
        path = linear_graph(tmp_path / "m.onnx", np.ones((2, 1)))
        with pytest.raises(TdError, match="do not fit what the model predicts"):
            evaluate_onnx(path, Examples([{"x": torch.ones(2, 2), "labels": torch.tensor([0, 1])}]))
        broken = linear_graph(tmp_path / "n.onnx", np.full((2, 2), np.nan))
        with pytest.raises(TdError, match="not finite"):
            evaluate_onnx(broken, Examples([{"x": torch.ones(2, 2), "labels": torch.tensor([0, 1])}]))

    def test_generated_texts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        successor = np.eye(5)[[1, 2, 3, 4, 0]]  # after token i comes i + 1; 4 is the end, and then it stays
        path = text_graph(tmp_path / "m.onnx", successor, per_token=True, name="logits")
        batch = {"input_ids": torch.tensor([[0, 1], [0, 0]]), "attention_mask": torch.tensor([[1, 1], [0, 1]])}
        said: list[str] = []

        def corpus_bleu(hypotheses: list[str], references: list[list[str]]) -> SimpleNamespace:
            said.extend(hypotheses)
            return SimpleNamespace(score=50.0)

        monkeypatch.setitem(sys.modules, "sacrebleu", SimpleNamespace(corpus_bleu=corpus_bleu))
        decode = lambda tokens: ["".join(map(str, row)) for row in tokens.tolist()]  # noqa: E731
        score = evaluate_onnx(path, Examples([batch], "bleu", Generation(decode, ("234", "1234"), end=4)))
        assert said == ["2344", "1234"] and score == Score("bleu", 0.5, 2)


class TestDrop:
    def score(self, hits: list[int], metric: Any = "accuracy") -> Score:
        evidence = torch.tensor([[hit, 1] for hit in hits]).double()
        return Score(metric, sum(hits) / len(hits), len(hits), evidence)

    def test_the_interval_is_of_pairs(self):
        generator = np.random.default_rng(0)
        dense = generator.integers(0, 2, 400)
        pruned = np.where(generator.random(400) < 0.05, 1 - dense, dense)
        found = drop(self.score(list(dense)), self.score(list(pruned)))
        assert found.value == pytest.approx((dense - pruned).mean())
        error = (dense - pruned).std() / np.sqrt(400)  # of a mean of paired differences
        assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
        assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)

    def test_the_same_answers_have_no_drop(self):
        one = self.score([1, 0, 1])
        assert (drop(one, one).value, drop(one, one).low, drop(one, one).high) == (0, 0, 0)

    def test_of_a_perplexity_it_is_relative(self):
        better, worse = (Score("perplexity", value, 4) for value in (10.0, 11.0))
        assert drop(better, worse).value == pytest.approx(0.1)
        assert drop(worse, better).value < 0 and drop(worse, better).low is None

    def test_scores_of_other_data(self):
        with pytest.raises(TdError, match="one data set"):
            drop(self.score([1, 0]), self.score([1]))
