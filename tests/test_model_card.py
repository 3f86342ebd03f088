"""Complete directories, their model cards, and the way to the Hub; nothing here touches the network."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import form_models
import onnx
import pytest
import torch
import transformers as hf
from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub.constants import HF_HUB_CACHE
from test_report_files import full
from test_serving import TEXTS, tokenizer

import td_plugin as td
from td_plugin.errors import TdError
from td_plugin.export import (
    Origin,
    load_onnx,
    load_pretrained,
    push_to_hub,
    quantize,
    save_onnx,
    save_pretrained,
    write_card,
)
from td_plugin.export.companions import find_parent
from td_plugin.export.origin import origin_of, parent_origin

UNKNOWN = "the licence of the parent model is unknown"
CARD = """---
license: apache-2.0
base_model: some/base
datasets:
- glue
language: en
model-index:
- a
---
# dense
"""
FILES = {"LICENSE", "README.md", "config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with everything: a shrunk BERT, its tokenizer, a licence and a model card."""
    path = tmp_path_factory.mktemp("parent")
    model = form_models.bert()
    model.config.id2label = {0: "bad", 1: "so-so", 2: "good"}
    save_pretrained(model, path)
    tokenizer().save_pretrained(path)
    (path / "LICENSE").write_text("Apache License")
    (path / "README.md").write_text(CARD)
    return path


@pytest.fixture(scope="module")
def made(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_onnx` makes of it; a model that was loaded knows its parent."""
    path = tmp_path_factory.mktemp("made") / "small"
    metadata = {"recipe": "targeted_unit", "sparsity_level": "0.5"}
    saved = save_onnx(load_pretrained(parent), path, metadata=metadata)  # type: ignore[arg-type]
    assert (saved.task, set(saved.files)) == ("text-classification", FILES)
    assert saved.parity.to_dict()["max_abs"] < 1e-5
    assert json.loads(json.dumps(saved.to_dict()))["directory"] == str(path)
    assert "model.onnx" in str(saved)
    return path


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "small"
    shutil.copytree(made, copy)
    return copy


def test_a_saved_directory_holds_all_that_the_parent_had(parent: Path, made: Path) -> None:
    assert {file.name for file in made.iterdir()} == FILES
    assert (made / "LICENSE").read_text() == "Apache License"
    assert (made / "tokenizer.json").read_bytes() == (parent / "tokenizer.json").read_bytes()
    config, dense = (json.loads((path / "config.json").read_text()) for path in (made, parent))
    assert config["id2label"] == {"0": "bad", "1": "so-so", "2": "good"}
    assert config["td_pruning"] == dense["td_pruning"]
    assert load_onnx(made)(TEXTS[0])[0]["label"] in config["id2label"].values()


def test_the_card_follows_the_hubs_conventions(made: Path) -> None:
    card = ModelCard.load(made / "README.md")
    assert card.data.to_dict() == {
        "base_model": "some/base",
        "datasets": ["glue"],
        "language": ["en"],
        "library_name": "onnx",
        "license": "apache-2.0",
        "pipeline_tag": "text-classification",
        "tags": ["td-plugin", "pruned", "onnx", "onnxruntime"],
    }
    for line in (
        "- recipe: targeted_unit",
        "- γ: 0.5",
        "| `bert.encoder.layer.1.intermediate.dense` | 64 | 17 |",
        "apache-2.0, as the parent model; the text: `LICENSE`.",
        "## Latency\n\nNot measured.",
        "## Results\n\nNot measured.",
        "elementwise difference within 0.0001: yes",
        "[some/base](https://huggingface.co/some/base)",
    ):
        assert line in card.text


def test_what_was_measured_is_in_the_card_and_an_owners_text_stays(directory: Path) -> None:
    file = directory / "README.md"
    file.write_text(file.read_text() + "\n## Caveats\n\nWritten by hand.\n")
    latency = full(dense="dense", pruned="small")
    result = EvalResult(
        task_type="text-classification", dataset_type="glue", dataset_name="SST-2", dataset_split="validation",
        metric_type="accuracy", metric_value=0.9123,
    )  # fmt: skip
    for _ in range(2):  # writing again replaces our part only
        write_card(directory, latency=latency, results=[result], parity="a table")
    card = ModelCard.load(file)
    assert card.text.count("Written by hand.") == card.text.count("## Latency") == 1
    (found,) = card.data.eval_results
    assert (found.metric_value, found.dataset_type, card.data.model_name) == (0.9123, "glue", "small")
    assert card.data.metrics == ["accuracy"]
    p50 = latency.file("small").percentile(50) * 1e3
    row = f"| small | {p50:.2f} |"
    assert row in card.text
    assert str(latency.speedup("small", over="dense")) in card.text
    for text in ("| SST-2 (validation) | accuracy | 0.9123 |", "Some CPU <tm>", "onnxruntime 1.32.0", "batch 8",
                 "noisy <machine>", "| 0.8850 |", "```text\na table\n```"):  # fmt: skip
        assert text in card.text
    assert card.data.license == "apache-2.0"

    write_card(directory)
    card = ModelCard.load(file)
    assert card.text.count("Not measured.") == 3
    assert card.data.eval_results is None
    assert card.data.metrics is None
    assert "Written by hand." in card.text


def test_an_unknown_licence_is_said_and_a_told_one_is_taken(directory: Path) -> None:
    for name in ("README.md", "LICENSE"):
        (directory / name).unlink()
    with pytest.warns(UserWarning, match=UNKNOWN):
        write_card(directory)
    text = (directory / "README.md").read_text()
    assert "license" not in text.partition("\n---\n")[0]
    assert "Unknown: the parent model's licence was not found." in text
    write_card(directory, origin=Origin(base_model="some/base", license="mit", datasets=("a", "b")))
    data = ModelCard.load(directory / "README.md").data
    assert (data.base_model, data.license, data.datasets) == ("some/base", "mit", ["a", "b"])
    write_card(directory, origin=Origin(license="other", license_name="gemma", license_link="https://example.org"))
    data = ModelCard.load(directory / "README.md").data
    assert (data.base_model, data.license_name, data.license_link) == ("some/base", "gemma", "https://example.org")
    assert "\ngemma, as the parent model." in (directory / "README.md").read_text()


def test_where_a_licence_is_looked_for(tmp_path: Path) -> None:
    assert origin_of(tmp_path) == Origin()
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert origin_of(tmp_path).license == "mit"
    (tmp_path / "config.json").unlink()
    (tmp_path / "LICENSE.txt").write_text("own terms")
    assert origin_of(tmp_path) == Origin(license="other", license_name="license.txt", license_link="LICENSE.txt")
    (tmp_path / "README.md").write_text("no metadata at all")
    assert origin_of(tmp_path).license == "other"
    (tmp_path / "README.md").write_text("---\nlicense: [bsd-3-clause]\nbase_model: [a/b, c/d]\n---\n")
    assert origin_of(tmp_path) == Origin(license="bsd-3-clause", base_model="a/b")
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(TdError, match=r"metadata at the top of the model card.*mend the block"):
        origin_of(tmp_path)


def test_a_parent_of_the_hub_is_found_in_its_cache(parent: Path, tmp_path: Path) -> None:
    repository = Path(HF_HUB_CACHE) / "models--some--dense"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(parent, repository / "snapshots" / "abc")
    model = form_models.bert()
    for name, found in (("some/dense", repository / "snapshots" / "abc"), (str(parent), parent), ("a/b", None)):
        model.config.name_or_path = name
        assert find_parent(model) == found
    home = find_parent(load_pretrained(parent))  # type: ignore[arg-type]
    assert parent_origin(home, str(parent)).base_model == "some/base"
    told = parent_origin(repository / "snapshots" / "abc", "some/dense")
    assert (told.base_model, told.license) == ("some/dense", "apache-2.0")
    assert parent_origin(None, "gone/away") == Origin()


def test_a_checkpoint_is_completed_too(parent: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    save_pretrained(load_pretrained(parent), path, parent=parent)
    assert {"LICENSE", "README.md", "tokenizer.json", "model.safetensors"} <= {file.name for file in path.iterdir()}
    card = ModelCard.load(path / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert "| `layer 1, intermediate_size` | 64 | 17 |" in card.text
    assert "load_pretrained" in card.text
    with pytest.warns(UserWarning, match=UNKNOWN):
        save_pretrained(form_models.bert(), tmp_path / "other", processor=tokenizer())
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "other")(TEXTS[0]) == tokenizer()(TEXTS[0])
    for model, options, message in (
        (form_models.bert(), {"processor": "bert-base"}, "no tokenizer or processor.*got: str"),
        (form_models.bert(), {"parent": tmp_path / "nowhere"}, "no such directory.*nowhere"),
        (torch.nn.Linear(2, 2), {"parent": parent}, "option of transformers checkpoints"),
    ):
        with pytest.raises(TdError, match=message):
            save_pretrained(model, tmp_path / "third", **options)
    assert not (tmp_path / "third").exists()


def test_an_existing_file_is_taken_only_if_it_is_the_models(parent: Path, made: Path, tmp_path: Path) -> None:
    model: Any = load_pretrained(parent)
    saved = save_onnx(model, tmp_path / "int8", file=quantize(made / "model.onnx", tmp_path / "any.onnx"))
    assert saved.parity.to_dict()["precision"] == "int8"
    assert load_onnx(tmp_path / "int8").about.precision == "int8"
    with torch.no_grad():
        model.classifier.weight.neg_()
    before = {file.name: file.read_bytes() for file in made.iterdir()}
    with pytest.raises(TdError, match="differ"):
        save_onnx(model, made, file=made / "model.onnx")
    assert {file.name: file.read_bytes() for file in made.iterdir()} == before


def test_masks_are_written_as_they_evaluate(parent: Path, tmp_path: Path) -> None:
    model: Any = hf.BertForSequenceClassification(hf.AutoConfig.from_pretrained(parent, num_hidden_layers=1))
    del model.config.td_pruning
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(drop_rate=0.5), sparsity_level=0.6, seed=0)
    sparsifier.prepare(model)
    sparsifier.step()
    save_onnx(model, tmp_path / "masked", parent=parent, limit=0)
    served = load_onnx(tmp_path / "masked")
    make: Any = hf.pipeline
    theirs = make("text-classification", model=model.eval(), tokenizer=tokenizer(), device="cpu")
    for ours, other in zip(served(TEXTS), theirs(TEXTS), strict=True):
        assert ours["label"] == other["label"]
        assert ours["score"] == pytest.approx(other["score"], abs=1e-5)
    (weights,) = (tmp_path / "masked").glob("*.data")
    assert weights.stat().st_size > 10_000


def test_two_saves_at_once_leave_the_files_of_one(parent: Path, made: Path, tmp_path: Path) -> None:
    """Each model has labels, weights and a licence of its own; the weights lie beside the graph."""
    gate, path = threading.Barrier(2), tmp_path / "shared"
    sources = []
    for index, factor in enumerate((1.0, -1.0)):
        model: Any = load_pretrained(parent)
        graph = onnx.load(made / "model.onnx")
        with torch.no_grad():
            model.classifier.bias.mul_(0).add_(factor * torch.tensor([9.0, 0.0, -9.0]))
        (bias,) = (tensor for tensor in graph.graph.initializer if tensor.name == "classifier.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(model.classifier.bias.detach().numpy(), bias.name))
        file = tmp_path / f"{index}.onnx"
        onnx.save(graph, str(file))
        model.config.id2label = {0: f"first of {index}", 1: "middle", 2: f"last of {index}"}
        sources.append((model, file))

    def save(source: tuple[Any, Path]) -> None:
        gate.wait()
        save_onnx(source[0], path, file=source[1], limit=0)

    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(save, sources))
        assert load_onnx(path)(TEXTS[0])[0]["label"] in ("first of 0", "last of 1")
        assert len(list(path.glob("*.data"))) == 1
        assert not list(tmp_path.glob(".*"))
    config = hf.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    tied = hf.BertForMaskedLM(config)  # which transformers suspends, for the whole process, while we build a model
    assert tied.cls.predictions.decoder.weight is tied.bert.embeddings.word_embeddings.weight


def test_bad_arguments_are_one_clear_error(parent: Path, tmp_path: Path) -> None:
    model, path = form_models.bert(), tmp_path / "new"
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (torch.nn.Linear(2, 2), {"processor": tokenizer()}, "models of transformers.*Linear.*to_onnx"),
        (model, {}, "no tokenizer or image processor.*processor="),
        (model, {"processor": 3}, "no tokenizer or processor of transformers.*int"),
        (model, {"parent": tmp_path / "nowhere"}, "no such directory"),
        (model, {"parent": parent, "file": tmp_path / "no.onnx"}, "cannot be read.*no.onnx"),
        (model, {"parent": parent, "file": "a", "optimize": "fp16"}, "taken as it is"),
        (form_models.llama(), {"parent": parent, "optimize": "fp16"}, "written in fp32"),
    ]
    for given, options, message in cases:
        with pytest.raises(TdError, match=message):
            save_onnx(given, path, **options)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(TdError, match="has no config.json"):
        write_card(tmp_path)


class Hub:
    """What `HfApi` is asked for."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self.fails = fails

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls["create"] = {"repo_id": repo_id, **options}
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, **options: Any) -> Any:
        if self.fails is not None:
            raise self.fails
        self.calls["upload"] = options
        return SimpleNamespace(pr_url=None, commit_url="https://huggingface.co/me/small/commit/1")


def patched(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setattr(HfApi, "create_repo", hub.create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", hub.upload_folder)
    return hub


def test_a_complete_directory_goes_to_the_hub(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = patched(monkeypatch, Hub())
    assert (
        push_to_hub(made, "small", private=True, commit_message="first") == "https://huggingface.co/me/small/commit/1"
    )
    assert hub.calls["create"] == {"repo_id": "small", "private": True, "exist_ok": True}
    upload = hub.calls["upload"]
    assert (upload["repo_id"], upload["folder_path"], upload["commit_message"]) == ("me/small", made, "first")


def test_an_incomplete_directory_does_not(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = patched(monkeypatch, Hub())
    onnx.save(onnx.load(directory / "model.onnx"), str(directory / "b.onnx"), save_as_external_data=True, location="w")
    (directory / "w").unlink()
    with pytest.raises(TdError, match="weights kept outside the ONNX file are missing"):
        push_to_hub(directory, "small")
    for name in ("b.onnx", "model.onnx", "README.md", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    missing = "no README.md, no model.onnx or model.safetensors, no tokenizer or image processor"
    with pytest.raises(TdError, match=f"not complete.*{missing}.*save_onnx"):
        push_to_hub(directory, "small")
    with pytest.raises(TdError, match="no such directory"):
        push_to_hub(directory / "nowhere", "small")
    assert hub.calls == {}


def test_what_the_hub_refuses_is_one_clear_error(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TdError, match=r"the Hub does not take the directory; where: small.*Offline.*hf auth login"):
        push_to_hub(made, "small")  # the tests are offline
    with pytest.raises(TdError, match="HFValidationError"):
        push_to_hub(made, "not/a/name")
    patched(monkeypatch, Hub(ConnectionError("no route\nto the Hub")))
    with pytest.raises(TdError, match="ConnectionError: no route;"):
        push_to_hub(made, "small")
