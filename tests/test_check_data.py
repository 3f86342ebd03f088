"""Rows of a file to a verdict: columns, labels, tokenizers, and `td-plugin check` on them. No test times anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas
import pytest
import torch
import yaml
from conftest import WORDS
from datasets import ClassLabel, Dataset, Features, Image, Value
from graphs import text_graph
from PIL import Image as Pixels
from typer.testing import CliRunner, Result

from td_plugin.commands import app
from td_plugin.contract import TdError
from td_plugin.export.evaluation import evaluate_onnx
from td_plugin.integrations.evaluation_data import EvaluationConfig, load_examples
from td_plugin.integrations.gate import KEYS, read_gate
from td_plugin.integrations.input_data import load_inputs

EXAMPLES = Path(__file__).parent.parent / "examples" / "github_actions"


@pytest.fixture(scope="module")
def model(text_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer, a configuration that names the classes, and two files: one is right, one often."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text_encoder / name, folder / name)
    config = json.loads((text_encoder / "config.json").read_text())
    names = {"negative": 0, "positive": 1}
    config |= {"label2id": names, "id2label": {index: name for name, index in names.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    table = np.zeros((len(WORDS), 2))
    table[WORDS.index("bad"), 0] = table[WORDS.index("good"), 1] = 1
    text_graph(folder / "dense.onnx", table, per_token=False)
    table[WORDS.index("film"), 0] = 3  # overrules "good"
    text_graph(folder / "pruned.onnx", table, per_token=False)
    text_graph(folder / "tagger.onnx", table, per_token=True)
    return folder


def config(data: Path, model: Path, **how: Any) -> EvaluationConfig:
    return EvaluationConfig(str(data), model, **how)


def accuracy(data: Path, model: Path, **how: Any) -> float:
    return evaluate_onnx(model / "dense.onnx", load_examples(config(data, model, **how))).value


ROWS = [("a good film", "positive"), ("bad", "negative"), ("the plot is good good", "positive")] * 4


class TestText:
    def test_a_file_as_it_comes(self, model: Path, reviews: Path):
        examples = load_examples(config(reviews, model, batch_size=7))
        assert [len(batch["labels"]) for batch in examples.batches] == [7] * 6 + [6]
        assert evaluate_onnx(model / "dense.onnx", examples).value == 1
        assert evaluate_onnx(model / "pruned.onnx", examples).value < 1

    @pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
    def test_labels_by_their_names(self, kind: str, model: Path, tmp_path: Path):
        frame, file = pandas.DataFrame(ROWS, columns=["sentence", "label"]), tmp_path / f"rows.{kind}"
        write = {"parquet": frame.to_parquet, "csv": frame.to_csv, "json": frame.to_json}[kind]
        write(file, **({"orient": "records"} if kind == "json" else {"index": False}))
        assert accuracy(file, model) == 1

    def test_data_that_count_the_classes_in_another_order(self, model: Path, tmp_path: Path):
        features = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
        rows = {"sentence": [text for text, _ in ROWS], "label": [int(name == "negative") for _, name in ROWS]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
        assert accuracy(tmp_path / "rows.parquet", model) == 1

    def test_pairs_columns_and_a_part_of_the_rows(self, model: Path, tmp_path: Path):
        frame = pandas.DataFrame({"first": ["the film is", "a"] * 9, "second": ["good", "bad"] * 9, "kind": [1, 0] * 9})
        frame.to_csv(tmp_path / "rows.csv", index=False)
        columns = {"text_column": "first", "label_column": "kind"}
        assert accuracy(tmp_path / "rows.csv", model, pair_column="second", **columns) == 1
        assert accuracy(tmp_path / "rows.csv", model, **columns) < 1
        examples = load_examples(config(tmp_path / "rows.csv", model, max_rows=5, **columns))
        assert sum(len(batch["labels"]) for batch in examples.batches) == 5

    def test_the_evaluation_split_of_a_directory(self, model: Path, tmp_path: Path):
        folder = tmp_path / "set"
        folder.mkdir()
        for split, rows in (("train", ROWS), ("validation", ROWS[:3])):
            pandas.DataFrame(rows, columns=["text", "label"]).to_csv(folder / f"{split}.csv", index=False)
        assert sum(len(b["labels"]) for b in load_examples(config(folder, model)).batches) == 3
        assert sum(len(b["labels"]) for b in load_examples(config(folder, model, split="train")).batches) == 12
        with pytest.raises(TdError, match="no such split.*test"):
            load_examples(config(folder, model, split="test"))

    def test_words_and_their_labels(self, model: Path, tmp_path: Path):
        rows = [{"tokens": ["a", "good", "film"], "tags": [-100, 1, 0]}, {"tokens": ["bad-good"], "tags": [0]}]
        Dataset.from_list(rows * 3).to_parquet(tmp_path / "rows.parquet")
        columns = {"text_column": "tokens", "label_column": "tags"}
        examples = load_examples(config(tmp_path / "rows.parquet", model, **columns))
        labels = next(iter(examples.batches))["labels"]
        assert labels[0].tolist() == [-100, -100, 1, 0, -100]  # [CLS] a good film [SEP]
        assert labels[1].tolist() == [-100, 0, -100, -100, -100]  # one word of three pieces
        assert evaluate_onnx(model / "tagger.onnx", examples).value == 1

    def test_perplexity_needs_no_labels(self, model: Path, tmp_path: Path):
        pandas.DataFrame({"text": ["a good film", "bad", "the plot is very very good"]}).to_csv(tmp_path / "rows.csv")
        (batch,) = load_examples(config(tmp_path / "rows.csv", model, metric="perplexity")).batches
        assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
        masked = config(tmp_path / "rows.csv", model, metric="masked_perplexity")
        (batch,), (again,) = load_examples(masked).batches, load_examples(masked).batches
        hidden = batch["labels"] != -100
        assert torch.equal(batch["input_ids"], again["input_ids"]) and hidden.any(1).all()
        assert (batch["input_ids"][hidden] == WORDS.index("[MASK]")).all()
        assert (batch["labels"][hidden] >= 5).all()  # no special token is asked for
        uniform = text_graph(tmp_path / "m.onnx", np.zeros((len(WORDS), len(WORDS))), per_token=True)
        assert evaluate_onnx(uniform, load_examples(masked)).value == pytest.approx(len(WORDS))

    def test_texts_to_generate(self, model: Path, tmp_path: Path):
        pandas.DataFrame({"text": ["a good", "bad"], "label": ["film", "plot"]}).to_csv(tmp_path / "rows.csv")
        examples = load_examples(config(tmp_path / "rows.csv", model, metric="bleu", max_length=9))
        assert examples.generation is not None and examples.generation.references == ("film", "plot")
        assert examples.generation.decode(torch.tensor([[WORDS.index("very"), 0]])) == ["very"]
        (batch,) = examples.batches
        assert batch["attention_mask"][1].tolist() == [0, 1, 1, 1]  # a decoder goes on at the right


def test_images(image_encoder: Path, tmp_path: Path):
    images = [Pixels.new("L", (8, 8), color) for color in (0, 255)] * 3
    rows = {"image": images, "label": [0, 1] * 3}
    Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(tmp_path / "rows.parquet")
    examples = load_examples(config(tmp_path / "rows.parquet", image_encoder, batch_size=4))
    for _ in range(2):  # read anew each time
        shapes = [batch["pixel_values"].shape for batch in examples.batches]
        assert shapes == [(4, 3, 8, 8), (2, 3, 8, 8)]
    assert [batch["labels"].tolist() for batch in examples.batches] == [[0, 1, 0, 1], [0, 1]]


class TestInputs:
    """What static quantization is calibrated on: no labels."""

    def test_texts(self, model: Path, tmp_path: Path):
        for split, rows in (("train", ROWS), ("validation", ROWS[:3])):
            pandas.DataFrame(rows, columns=["text", "note"]).to_csv(tmp_path / f"{split}.csv", index=False)
        how = config(tmp_path, model, text_column="text", batch_size=5)
        batches = list(load_inputs(how))
        assert [len(batch["input_ids"]) for batch in batches] == [5, 5, 2]  # the rows of the training split
        assert all(batch.keys() == {"input_ids", "token_type_ids", "attention_mask"} for batch in batches)
        assert sum(len(batch["input_ids"]) for batch in load_inputs(replace(how, max_rows=4))) == 4
        assert sum(len(batch["input_ids"]) for batch in load_inputs(replace(how, split="validation"))) == 3
        pandas.DataFrame({"a": ["good"], "b": ["bad"]}).to_csv(tmp_path / "two.csv", index=False)
        with pytest.raises(TdError, match="several columns could be meant for --text-column"):
            load_inputs(config(tmp_path / "two.csv", model))

    def test_images(self, image_encoder: Path, tmp_path: Path):
        rows = Dataset.from_dict({"image": [Pixels.new("L", (8, 8), 9)] * 3}).cast_column("image", Image())
        rows.to_parquet(tmp_path / "rows.parquet")
        (batch,) = load_inputs(config(tmp_path / "rows.parquet", image_encoder))
        assert {name: list(value.shape) for name, value in batch.items()} == {"pixel_values": [3, 3, 8, 8]}


class TestRefusals:
    @pytest.mark.parametrize(
        ("columns", "how", "match"),
        [
            ({"text": ["a"], "label": [0]}, {"text_column": "txt"}, "no column 'txt'.*nearest: 'text'.*--text-column"),
            ({"text": ["a"], "label": [0]}, {"label_column": "labl"}, "no column 'labl'.*nearest: 'label'"),
            ({"text": ["a"], "label": [0]}, {"pair_column": "b"}, "no column 'b'.*--pair-column"),
            ({"text": ["a"], "note": ["b"]}, {}, "no column fits for --label-column"),
            ({"text": [], "label": []}, {}, "data are empty|cannot be read"),
            ({"text": ["a", None], "label": [0, 1]}, {}, "no text.*row 1: None"),
            ({"text": ["a"], "label": ["positiv"]}, {}, "no class of the model.*'positiv'.*nearest: 'positive'"),
            ({"text": ["a"], "label": [-1]}, {}, "no class of the model.*-1"),
            ({"text": ["a"], "label": [0.5]}, {}, "no class of the model.*0.5"),
            ({"text": ["a"], "label": [0]}, {"metric": "accurcy"}, "no such metric.*accurcy"),
            ({"text": ["a"], "label": [0]}, {"max_length": 1}, "at least 2.*max_length"),
            ({"text": [["a"]], "label": [[0, 1]]}, {"text_column": "text"}, "words and labels do not go together"),
            ({"text": [["a"]], "label": ["b"]}, {"text_column": "text", "metric": "bleu"}, "list of words is no text"),
        ],
    )
    def test_rows(self, columns: Any, how: Any, match: str, model: Path, tmp_path: Path):
        pandas.DataFrame(columns).to_parquet(tmp_path / "rows.parquet")
        with pytest.raises(TdError, match=match):
            load_examples(config(tmp_path / "rows.parquet", model, **how))

    def test_files(self, model: Path, tmp_path: Path, reviews: Path):
        (tmp_path / "rows.txt").write_text("a")
        (tmp_path / "broken.parquet").write_bytes(b"PAR1")
        for data, match in (
            ("rows.txt", "unknown file type"),
            ("absent.csv", "no such data file"),
            ("broken.parquet", "cannot be read"),
        ):
            with pytest.raises(TdError, match=match):
                load_examples(config(tmp_path / data, model))
        with pytest.raises(TdError, match="tokenizer cannot be read.*fix: --tokenizer"):
            load_examples(config(reviews, tmp_path))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


class TestCommand:
    def test_all_bars_hold(self, model: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        junit, markdown, summary = tmp_path / "out" / "junit.xml", tmp_path / "summary.md", tmp_path / "github.md"
        summary.write_text("before\n")
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
        files = ("--junit", junit, "--markdown", markdown, "--job-summary", "--json")
        data = ("--against", model / "dense.onnx", "--data", reviews)
        bars = ("--max-size-mb", 1, "--max-accuracy-drop", 0, "--min-accuracy", 1)
        result = run(model / "dense.onnx", *data, *bars, *files)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["passed"] and [bar["name"] for bar in found["bars"]] == [
            "max_size_mb",
            "max_accuracy_drop",
            "min_accuracy",
        ]
        root = ElementTree.parse(junit).getroot()
        assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("3", "0", "0")
        text = markdown.read_text()
        assert text.startswith("### td-plugin check: passed") and summary.read_text() == f"before\n{text}\n"

    def test_a_missed_bar(self, model: Path, reviews: Path, tmp_path: Path):
        junit = tmp_path / "junit.xml"
        options = ("--against", model / "dense.onnx", "--data", reviews, "--max-accuracy-drop", 0.01, "--junit", junit)
        result = run(model / "pruned.onnx", *options)
        assert result.exit_code == 1 and "missed: max_accuracy_drop" in result.stdout
        assert ElementTree.parse(junit).getroot().get("failures") == "1"
        unjudged = run(model / "pruned.onnx", "--max-accuracy-drop", 0.01)
        assert unjudged.exit_code == 1 and "not judged: needs data, --data" in unjudged.stdout

    def test_a_bar_file(self, model: Path, tmp_path: Path):
        shutil.copytree(model, tmp_path / "model")
        bars = tmp_path / "bars.json"
        pandas.DataFrame(ROWS, columns=["text", "label"]).to_csv(tmp_path / "rows.csv", index=False)
        wanted = {"min-accuracy": 0.9, "max_accuracy_drop": 0.5, "data": "rows.csv", "against": "model/dense.onnx"}
        bars.write_text(json.dumps({**wanted, "tokenizer": "model"}))
        file = tmp_path / "model" / "pruned.onnx"
        missed = run(file, "--bars", bars)  # paths are seen from the file's place
        assert missed.exit_code == 1 and "missed: min_accuracy" in missed.stdout, missed.output
        assert run(file, "--bars", bars, "--min-accuracy", 0.3).exit_code == 0  # an option counts more

    def test_every_option_can_stand_in_the_file(self):
        import inspect

        from td_plugin.commands_check import check

        others = {"file", "bars", "junit", "markdown", "job_summary", "as_json"}
        assert set(inspect.signature(check).parameters) == {*KEYS, *others}

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("absent.onnx", "--max-size-mb", 1), ("no such ONNX file", "absent.onnx")),
            (("{model}/broken.onnx", "--max-size-mb", 1), ("cannot load", "broken.onnx")),
            (("{model}/dense.onnx",), ("no bar",)),
            (("{model}/dense.onnx", "--max-size-mb", -1), ("max_size_mb", "-1")),
            (("{model}/dense.onnx", "--max-size-mb", 1, "--bars", "absent.toml"), ("cannot be read", "absent.toml")),
            (("{model}/dense.onnx", "--max-size-mb", 1, "--against", "absent.onnx"), ("no such ONNX", "absent.onnx")),
            (("{model}/dense.onnx", "--min-accuracy", 1, "--data", "absent.csv"), ("no such data file",)),
            (("{model}/dense.onnx", "--min-accuracy", 1, "--data", "{reviews}", "--text-column", "x"), ("column 'x'",)),
            (("{model}/dense.onnx", "--min-accuracy", 1, "--data", "{reviews}", "--metric", "x"), ("no such metric",)),
            (("{model}/dense.onnx", "--max-difference", 1, "--equal-to", "{model}"), ("{model}",)),
            (("{model}/dense.onnx", "--max-size-mb", 1, "--job-summary"), ("GITHUB_STEP_SUMMARY",)),
            (("{model}/dense.onnx", "--max-p50-ms", 1, "--rounds", 0), ("at least 1", "rounds")),
            (("{model}/dense.onnx", "--max-size-mb", 1, "--junit", "{reviews}/x.xml"), ("x",)),
        ],
    )
    def test_mistakes(
        self, options: tuple[Any, ...], words: tuple[str, ...], model: Path, reviews: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):  # fmt: skip
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        (model / "broken.onnx").write_bytes((model / "dense.onnx").read_bytes()[:90])
        result = run(*(str(option).format(model=model, reviews=reviews) for option in options))
        assert result.exit_code == 2 and result.stdout == "", result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert all(word.format(model=model) in line for word in words), line
        assert "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []

    def test_its_help_loads_nothing_heavy(self):
        code = (
            "import sys; sys.argv = ['td-plugin', 'check', '--help']\nfrom td_plugin.cli import main\n"
            "try: main()\nfinally: print([m for m in ('torch', 'numpy', 'transformers', 'onnx') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]" and "--max-accuracy-drop" in done.stdout

    def test_a_key_that_is_none(self, model: Path, tmp_path: Path):
        (tmp_path / "bars.json").write_text('{"max_p59_ms": 3}')
        result = run(model / "dense.onnx", "--bars", tmp_path / "bars.json")
        assert result.exit_code == 2 and "no such key" in result.stderr and "fix: max_p" in result.stderr

    def test_a_value_of_another_type(self, model: Path, tmp_path: Path):
        (tmp_path / "bars.json").write_text('{"against": 3}')
        with pytest.raises(TdError, match=r"text is needed.*bars\.json: against.*3"):
            read_gate(model / "dense.onnx", {}, tmp_path / "bars.json")
        (tmp_path / "bars.json").write_text('{"max_size_mb": "1"}')
        with pytest.raises(TdError, match="number of at least 0.*max_size_mb"):
            read_gate(model / "dense.onnx", {}, tmp_path / "bars.json")


def test_the_example_for_github(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    """The command of the workflow as it stands, on a repository laid out as its bars say."""
    pytest.importorskip("tomllib")
    workflow = yaml.safe_load((EXAMPLES / "latency-gate.yml").read_text())
    steps = workflow["jobs"]["check"]["steps"]
    (command,) = [step["run"].split() for step in steps if "td-plugin check" in step.get("run", "")]
    assert command[:2] == ["td-plugin", "check"]
    shutil.copytree(model, tmp_path / "models")
    shutil.copy(model / "dense.onnx", tmp_path / "models" / "model.onnx")
    shutil.copy(EXAMPLES / "td-bars.toml", tmp_path)
    (tmp_path / "data").mkdir()
    pandas.DataFrame(ROWS, columns=["sentence", "label"]).to_parquet(tmp_path / "data" / "validation.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    # One file against itself, in a single short session: its times say nothing here, and its bar is left out.
    result = run(*command[2:], "--min-speedup", 0, "--rounds", 2, "--sessions", 1, "--sequence", 8)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} >= {"td-check.xml", "td-check.md", "summary.md"}
    assert len(ElementTree.parse("td-check.xml").getroot().findall("testsuite/testcase")) == 3
    (upload,) = [step["with"]["path"].split() for step in steps if "upload-artifact" in step.get("uses", "")]
    assert upload == ["td-check.xml", "td-check.md"]
