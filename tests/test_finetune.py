"""Fine-tuning as a function: columns and labels found out, artefacts that agree, mistakes named before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pixels
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

import td_plugin as td
from td_plugin.export import load_pretrained
from td_plugin.integrations.classifiers import load_classifier
from td_plugin.integrations.config import DataConfig, FinetuneConfig, MethodConfig, TrainConfig
from td_plugin.integrations.data import load_data
from td_plugin.integrations.finetune import check_writable, finetune

TRAIN = TrainConfig(epochs=2, batch_size=8, learning_rate=1e-3)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    pandas.DataFrame(rows).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def run(text_encoder: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("runs") / "new" / "run"
    data = DataConfig(str(reviews), validation=str(reviews))
    method = MethodConfig("ramping_targeted_unit", sparsity_level=0.5)
    return output, finetune(FinetuneConfig(str(text_encoder), data, output, method, TRAIN))


def test_a_head_for_other_classes_is_replaced_and_that_is_said(text_encoder: Path, tmp_path: Path) -> None:
    BertForSequenceClassification.from_pretrained(text_encoder, num_labels=5).save_pretrained(tmp_path / "five")
    AutoTokenizer.from_pretrained(text_encoder).save_pretrained(tmp_path / "five")
    source = written(tmp_path / "rows.parquet", [{"text": "good", "label": i % 2} for i in range(8)])
    with pytest.warns(UserWarning, match="has 5 classes, the data set 2: a new head"):
        classifier = load_classifier(str(tmp_path / "five"), load_data(DataConfig(source)), 16)
    assert classifier.model.classifier.out_features == 2
    kept = BertForSequenceClassification.from_pretrained(tmp_path / "five").bert.state_dict()
    ours = classifier.model.bert.state_dict()
    assert all(torch.equal(kept[name], ours[name]) for name in kept)


class TestText:
    def test_every_artefact_is_there_and_they_agree(self, run: tuple[Path, Any]) -> None:
        output, result = run
        assert sorted(path.name for path in output.iterdir()) == ["masked", "metrics.json", "model.onnx", "shrunk"]
        after = result.accuracy["after_pruning"]
        assert result.accuracy["after_shrink"] == pytest.approx(after)
        assert result.accuracy["onnx"] == pytest.approx(after)
        assert result.parameters["shrunk"] < result.parameters["dense"]
        metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["accuracy"] == result.accuracy and metrics["config"]["train"]["batch_size"] == 8

    def test_the_masked_checkpoint_is_stock_and_pruned(self, run: tuple[Path, Any]) -> None:
        output, _ = run
        model, report = AutoModelForSequenceClassification.from_pretrained(output / "masked", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        rows = model.get_parameter("bert.encoder.layer.0.intermediate.dense.weight")
        assert int((rows == 0).all(dim=1).sum()) == 64  # half of 128 neurons

    def test_the_shrunk_model_computes_what_the_masked_one_does(self, run: tuple[Path, Any]) -> None:
        output, _ = run
        masked = BertForSequenceClassification.from_pretrained(output / "masked").eval()
        small = load_pretrained(output / "shrunk").eval()
        inputs = AutoTokenizer.from_pretrained(output / "shrunk")(
            ["good film", "bad"], padding=True, return_tensors="pt"
        )
        torch.testing.assert_close(small(**inputs).logits, masked(**inputs).logits, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("recipe", "checkpoint"), [("targeted_weight", "masked"), pytest.param("none", "dense", marks=pytest.mark.slow)]
    )
    def test_without_units_there_is_nothing_to_shrink(
        self, recipe: str, checkpoint: str, text_encoder: Path, reviews: Path, tmp_path: Path
    ) -> None:
        data = DataConfig(str(reviews), max_train_samples=16)
        train = TrainConfig(epochs=1, batch_size=8)
        result = finetune(FinetuneConfig(str(text_encoder), data, tmp_path / "run", MethodConfig(recipe), train))
        assert sorted(result.files) == sorted([checkpoint, "metrics", "onnx"])
        assert "nothing to shrink" in str(result)


@pytest.fixture
def dense(text_encoder: Path, reviews: Path, tmp_path: Path) -> Path:
    """A classifier fine-tuned on the reviews."""
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(text_encoder)
    data = load_data(DataConfig(str(reviews)))
    model.config.id2label = dict(enumerate(data.labels))
    model.config.label2id = {label: index for index, label in enumerate(data.labels)}
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(text_encoder).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


class TestTeacher:
    def test_fewer_layers_learn_from_the_dense_model(self, dense: Path, reviews: Path, tmp_path: Path) -> None:
        method = MethodConfig(sparsity_level=0.5, layers=1, teacher=str(dense))
        result = finetune(FinetuneConfig(str(dense), DataConfig(str(reviews)), tmp_path / "run", method, TRAIN))
        parameters = result.parameters
        assert parameters["shrunk"] < parameters["fewer_layers"] < parameters["dense"]
        small = load_pretrained(tmp_path / "run" / "shrunk")
        assert len(small.bert.encoder.layer) == 1 and small.bert.encoder.layer[0].intermediate.dense.out_features == 64
        assert result.accuracy["onnx"] == pytest.approx(result.accuracy["after_shrink"])

    @pytest.mark.parametrize("recipe", ["none", "targeted_weight"])
    def test_the_teacher_is_what_is_learned(self, recipe: str, dense: Path, reviews: Path, tmp_path: Path) -> None:
        """With its head turned round the teacher says the opposite of the labels, and has nine tenths of the loss."""
        teacher = BertForSequenceClassification.from_pretrained(dense)
        with torch.no_grad():
            teacher.classifier.weight.zero_()
            teacher.classifier.bias.copy_(torch.tensor([-20.0, 20.0]))
        teacher.save_pretrained(tmp_path / "stubborn")
        method = MethodConfig(recipe, sparsity_level=0.1, teacher=str(tmp_path / "stubborn"))
        config = FinetuneConfig(str(dense), DataConfig(str(reviews)), tmp_path / "run", method, TRAIN)
        finetune(config)
        model = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "run" / ("dense" if recipe == "none" else "masked")
        ).eval()
        inputs = AutoTokenizer.from_pretrained(dense)(["good film", "bad"], padding=True, return_tensors="pt")
        assert (model(**inputs).logits.argmax(-1) == 1).all()

    def test_a_teacher_that_does_not_fit(self, dense: Path, text_encoder: Path, reviews: Path, tmp_path: Path) -> None:
        def refused(teacher: Path, match: str) -> None:
            method = MethodConfig(teacher=str(teacher))
            with pytest.raises(td.TdError, match=match):
                finetune(FinetuneConfig(str(dense), DataConfig(str(reviews)), tmp_path / "run", method, TRAIN))
            assert not (tmp_path / "run").exists()

        refused(text_encoder, r"teacher is no classifier; where: .*; got: \['BertModel'\]")
        refused(tmp_path / "absent", "no such model directory")
        model = BertForSequenceClassification.from_pretrained(dense)
        turned = dict(enumerate(reversed([model.config.id2label[i] for i in range(2)])))
        model.config.id2label, model.config.label2id = turned, {label: index for index, label in turned.items()}
        model.save_pretrained(tmp_path / "turned")
        refused(tmp_path / "turned", "other labels than the data set")
        other = BertForSequenceClassification.from_pretrained(dense)
        other.resize_token_embeddings(20, mean_resizing=False)
        other.save_pretrained(tmp_path / "words")
        refused(tmp_path / "words", "vocabulary is not the model's, which has 13; .*got: 20")


def test_images(image_encoder: Path, tmp_path: Path) -> None:
    features = Features({"picture": Image(), "kind": ClassLabel(names=["dark", "light"])})
    pictures = [Pixels.new("L", (10, 10), 40 + 180 * (i % 2)) for i in range(24)]
    rows = Dataset.from_dict({"picture": pictures, "kind": [i % 2 for i in range(24)]}, features=features)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    data = DataConfig(str(tmp_path / "rows.parquet"))
    result = finetune(FinetuneConfig(str(image_encoder), data, tmp_path / "run", MethodConfig(), TRAIN))
    assert result.accuracy["onnx"] == pytest.approx(result.accuracy["after_pruning"])
    config = json.loads((tmp_path / "run" / "shrunk" / "config.json").read_text(encoding="utf-8"))
    assert set(config["label2id"]) == {"dark", "light"}


class TestData:
    def test_columns_and_string_labels_are_found(self, tmp_path: Path) -> None:
        rows = [{"id": i, "sentence": f"text {i}", "label": "no" if i % 2 else "yes"} for i in range(20)]
        data = load_data(DataConfig(written(tmp_path / "a.parquet", rows)))
        assert (data.task, data.input_column, data.labels) == ("text", "sentence", ("no", "yes"))
        assert len(data.train) == 18 and len(data.validation) == 2
        for row in data.train:
            assert data.labels[row["label"]] == ("no" if int(row["sentence"].split()[1]) % 2 else "yes")

    def test_integers_need_not_start_at_zero_and_sort_as_numbers(self, tmp_path: Path) -> None:
        rows = [{"text": "x", "label": value} for value in (10, 2, 10, 2)]
        data = load_data(DataConfig(written(tmp_path / "a.parquet", rows)))
        assert data.labels == ("2", "10")

    def test_a_directory_with_splits(self, tmp_path: Path) -> None:
        for split in ("train", "validation"):
            written(tmp_path / f"{split}.parquet", [{"text": split, "label": i} for i in range(2)])
        data = load_data(DataConfig(str(tmp_path)))
        assert {row["text"] for row in data.train} == {"train"}
        assert {row["text"] for row in data.validation} == {"validation"}

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            ([{"text": "a", "labl": 0}] * 2, {"label_column": "label"}, "no column 'label'.*nearest: 'labl'"),
            ([{"text": "a", "kind": 0}] * 2, {}, "no column fits for --label-column.*'kind'"),
            (
                [{"q": "a", "r": "b", "label": i} for i in range(2)],
                {},
                "several columns could be meant for --text-column",
            ),
            ([{"text": "a", "label": i / 2} for i in range(3)], {}, "the labels are no classes.*float64"),
            ([{"text": "a", "label": 1}] * 3, {}, "all training rows have one class"),
            ([{"text": "a", "label": 1}], {}, "too few rows"),
            ([{"text": "a", "label": i} for i in range(9)], {"text_column": "txt"}, "no column 'txt'.*nearest: 'text'"),
        ],
    )
    def test_mistakes_are_named(
        self, rows: list[dict[str, Any]], options: dict[str, str], message: str, tmp_path: Path
    ) -> None:
        source = written(tmp_path / "rows.parquet", rows)
        with pytest.raises(td.TdError, match=message):
            load_data(DataConfig(source, **options))

    def test_labels_that_training_never_saw(self, tmp_path: Path) -> None:
        train = written(tmp_path / "train.parquet", [{"text": "a", "label": i} for i in range(2)])
        other = written(tmp_path / "other.parquet", [{"text": "a", "label": i} for i in range(3)])
        with pytest.raises(td.TdError, match=r"labels that the training rows lack.*\{2\}"):
            load_data(DataConfig(train, other))

    def test_rows_without_a_label(self, tmp_path: Path) -> None:
        features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
        rows = Dataset.from_dict({"text": ["a", "b"], "label": [-1, 1]}, features=features)
        rows.to_parquet(str(tmp_path / "rows.parquet"))
        with pytest.raises(td.TdError, match="rows without a valid label"):
            load_data(DataConfig(str(tmp_path / "rows.parquet")))

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
        (tmp_path / "rows.xls").write_bytes(b"")
        for name, message in (
            ("broken.parquet", "cannot be read"),
            ("absent.csv", "no such data file"),
            ("rows.xls", "unknown file type"),
        ):
            with pytest.raises(td.TdError, match=message):
                load_data(DataConfig(str(tmp_path / name)))


class TestRefusedBeforeTraining:
    @pytest.mark.parametrize(
        "build",
        [
            lambda: MethodConfig("targeted_unt"),
            lambda: MethodConfig(sparsity_level=1.0),
            lambda: MethodConfig(drop_rate=-0.1),
            lambda: MethodConfig(ramp=0.0),
            lambda: MethodConfig(layers=-1),
            lambda: TrainConfig(epochs=0),
            lambda: TrainConfig(batch_size=0),
        ],
    )
    def test_numbers(self, build: Any) -> None:
        with pytest.raises(td.TdError):
            build()

    def test_an_output_under_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for output in (tmp_path / "file", tmp_path / "file" / "run"):
            with pytest.raises(td.TdError, match="output directory cannot be written"):
                check_writable(output)
        check_writable(tmp_path / "a" / "b")
        assert not (tmp_path / "a").exists()

    def test_a_damaged_model(self, text_encoder: Path, reviews: Path, tmp_path: Path) -> None:
        model = tmp_path / "model"
        model.mkdir()
        for file in text_encoder.iterdir():
            content = file.read_bytes()
            (model / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
        with pytest.raises(td.TdError, match="the model cannot be read"):
            finetune(FinetuneConfig(str(model), DataConfig(str(reviews)), tmp_path / "run"))
        assert not (tmp_path / "run").exists()
