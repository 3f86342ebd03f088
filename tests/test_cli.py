"""The command line: each command on tiny checkpoints, and every mistake as one line with exit code 2."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import document, refused, run
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import td_plugin as td
from td_plugin.export import available_providers, benchmark_job, load_onnx

COMMANDS = ("demo", "finetune", "shrink", "export", "optimize", "quantize", "block-sparse")
COMMANDS += ("verify", "benchmark", "inspect", "check")

QUICK = ("--rounds", 5, "--max-rounds", 5)


class TestCommands:
    def test_help_names_every_command(self) -> None:
        result = run("--help")
        assert result.exit_code == 0
        assert all(command in result.output for command in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_of_each_command(self, command: str) -> None:
        result = run(command, "--help")
        assert result.exit_code == 0 and "--json" in result.output and command in result.output

    def test_shrink_export_verify_benchmark(self, masked: Path, dense_onnx: Path, tmp_path: Path) -> None:
        small, file = tmp_path / "small", tmp_path / "small.onnx"
        shrunk = document(run("shrink", masked, small, "--json"))
        assert shrunk["after"] < shrunk["before"]
        assert (small / "tokenizer.json").is_file() and (small / "README.md").is_file()
        exported = document(run("export", small, file, "--json"))
        assert list(exported["inputs"]) == ["input_ids", "attention_mask", "token_type_ids"]
        assert document(run("verify", small, file, "--json"))["max_abs"] < 1e-4
        assert document(run("verify", masked, file, "--json"))["max_abs"] < 1e-4  # masked and shrunk are one function
        timed = document(run("benchmark", f"dense={dense_onnx}", f"pruned={file}", *QUICK, "--sequence", 16, "--json"))
        assert [entry["name"] for entry in timed["files"]] == ["dense", "pruned"]
        assert timed["conditions"]["rounds"] == 5
        assert timed["speedups"][0]["over"] == "dense"

    def test_export_to_a_directory_is_ready_to_serve(self, masked: Path, tmp_path: Path) -> None:
        served, there = tmp_path / "served", tmp_path / "there"
        saved = document(run("export", masked, served, "--json"))
        assert saved["task"] == "text-classification" and {"model.onnx", "README.md"} < set(saved["files"])
        answer = load_onnx(served)("a b")
        assert 0 < answer[0]["score"] <= 1 and answer[0]["label"].startswith("LABEL_")
        refused(run("export", masked, served, "--opset", 18), "--opset 18")
        there.write_text("mine")
        refused(run("export", masked, there), "a file of this name")
        assert there.read_text() == "mine"

    def test_benchmark_with_all_its_parts_and_files(self, dense_onnx: Path, tmp_path: Path) -> None:
        (tmp_path / "lengths.txt").write_text("4\n9\n\n17\n")
        outputs = {suffix: tmp_path / f"report.{suffix}" for suffix in ("csv", "html", "png")}
        written = [part for suffix, path in outputs.items() for part in (f"--{suffix}", path)]
        parts = ("--workers", 2, "--profile", "--lengths", tmp_path / "lengths.txt", "--accuracy", "b=0.75")
        files = (f"a={dense_onnx}", f"b={dense_onnx}@cpu")
        report = document(run("benchmark", *files, *QUICK, *parts, *written, "--json"))
        assert sorted(report["conditions"]["lengths"]) == [4, 9, 17]
        assert report["load"]["load"]["workers"] == 2 and len(report["load"]["files"]) == 2
        assert [entry["accuracy"] for entry in report["files"]] == [None, 0.75]
        assert report["operators"]
        rows = list(csv.DictReader(outputs["csv"].read_text().splitlines()))
        assert [row["accuracy"] for row in rows] == ["", "0.75"] and float(
            rows[1]["requests_per_second_under_load"]
        ) > 0
        page = outputs["html"].read_text()
        assert "Where the time goes" in page and "concurrent" in page and "<script" not in page
        assert outputs["png"].read_bytes().startswith(b"\x89PNG")
        assert len(list(tmp_path.iterdir())) == 4

    def test_benchmark_again(self, dense_onnx: Path, tmp_path: Path) -> None:
        options = (f"a={dense_onnx}", f"b={dense_onnx}", *QUICK, "--sequence", 4, "--repeat", 2)
        page = tmp_path / "page.html"
        found = document(run("benchmark", *options, "--accuracy", "a=0.5", "--html", page, "--json"))
        assert len(found["speedups"]["b"]) == 2 and found["agree"] == (found["disagreement"]["b"] <= 0.03)
        assert [entry["files"][0]["accuracy"] for entry in found["reports"]] == [0.5, None]
        assert [entry["conditions"]["seed"] for entry in found["reports"]] == [0, 1]
        assert "0.5000" in page.read_text()
        text = run("benchmark", *options).stdout
        assert "p50 ms" in text and "run 2" in text and "within 3%" in text

    @pytest.mark.parametrize("family", ["gpt2", "t5"])
    def test_shrink_a_family_that_is_traced(self, family: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        sizes = {"d_model": 24, "d_ff": 36, "num_layers": 2, "num_heads": 4, "d_kv": 6}
        model: PreTrainedModel = T5ForConditionalGeneration(T5Config(vocab_size=20, **sizes))
        if family == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=20, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
            )
        sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), sparsity_level=0.5)
        sparsifier.prepare(model)
        sparsifier.squash_mask()
        model.save_pretrained(tmp_path / "masked")
        for name in ("tokenizer.json", "spiece.model"):
            (tmp_path / "masked" / name).write_text("its words")
        expected = document(run("inspect", tmp_path / "masked", "--sparsity-level", "0.5", "--json"))["remainder"]
        shrunk = document(run("shrink", tmp_path / "masked", tmp_path / "small", "--json"))
        assert shrunk["before"] == model.num_parameters() and shrunk["after"] == expected["parameters"]
        assert all((tmp_path / "small" / name).is_file() for name in ("tokenizer.json", "spiece.model"))
        refused(run("shrink", tmp_path / "small", tmp_path / "smaller"), "no unit is zero")

    def test_quantize(self, masked: Path, dense_onnx: Path, tmp_path: Path) -> None:
        result = document(run("quantize", dense_onnx, tmp_path / "int8.onnx", "--json"))
        assert Path(result["file"]).stat().st_size == result["bytes"]
        assert document(run("verify", masked, tmp_path / "int8.onnx", "--json"))["precision"] == "int8"

    def test_inspect_a_checkpoint(self, masked: Path) -> None:
        found = document(run("inspect", masked, "--json"))
        units = {row["layer"]: (row["kind"], row["units"], row["silent"]) for row in found["rows"]}
        assert units["bert.encoder.layer.0.intermediate.dense"] == ("neurons", 128, 64)
        assert ("heads", 4, 2) in units.values()
        assert found["zeros"] > 0
        assert "neurons" in run("inspect", masked).stdout

    def test_inspect_what_would_remain(self, masked: Path) -> None:
        options = ("inspect", masked, "--sparsity-level", "0.75")
        found = document(run(*options, "--kind", "heads", "--json"))
        assert {row["left"] for row in found["rows"] if row["kind"] == "heads"} == {1}
        assert found["remainder"]["flops"] < found["flops"] and found["remainder"]["kinds"] == ["heads"]
        known = run(*options, "--source", "known").stdout
        assert "heads 4 → 1 (2 silent)" in known and "γ = 0.75" in known and "FLOPs" not in known

    def test_inspect_a_graph(self, dense_onnx: Path) -> None:
        found = document(run("inspect", dense_onnx, "--json"))
        assert found["bytes"] == dense_onnx.stat().st_size
        assert "int64" in found["inputs"]["input_ids"] and found["metadata"]

    def test_finetune(self, text_encoder: Path, reviews: Path, tmp_path: Path) -> None:
        options = ("--epochs", 1, "--batch-size", 16, "--sparsity-level", 0.5, "--max-length", 16)
        source = ("--model", text_encoder, "--dataset", reviews, "--output", tmp_path / "run")
        result = document(run("finetune", *source, *options, "--json"))
        assert result["accuracy"]["onnx"] == pytest.approx(result["accuracy"]["after_shrink"])
        assert all(Path(path).exists() for path in result["files"].values())


class TestMistakes:
    def test_no_such_checkpoint(self, tmp_path: Path) -> None:
        for command in (("shrink", tmp_path / "x", tmp_path / "y"), ("export", tmp_path / "x", tmp_path / "y.onnx")):
            refused(run(*command), "directory")
        assert list(tmp_path.iterdir()) == []

    def test_nothing_to_shrink(self, text_encoder: Path, tmp_path: Path) -> None:
        refused(run("shrink", text_encoder, tmp_path / "small"), "no unit is zero")
        assert list(tmp_path.iterdir()) == []

    def test_truncated_safetensors(self, masked: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        broken.mkdir()
        for file in masked.iterdir():
            content = file.read_bytes()
            (broken / file.name).write_bytes(content[:1000] if file.suffix == ".safetensors" else content)
        refused(run("export", broken, tmp_path / "model.onnx"))
        assert not (tmp_path / "model.onnx").exists()

    def test_inspect(self, masked: Path, dense_onnx: Path) -> None:
        refused(run("inspect", masked, "--sparsity-level", "1"), "γ", "1.0")
        refused(run("inspect", masked, "--sparsity-level", "0.5", "--kind", "neuron"), "unknown kinds", "neurons")
        refused(run("inspect", dense_onnx, "--sparsity-level", "0.5"), str(dense_onnx), "inspect the checkpoint")
        assert run("inspect", masked, "--source", "guess").exit_code == 2

    def test_truncated_onnx(self, masked: Path, dense_onnx: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(dense_onnx.read_bytes()[:2000])
        refused(run("verify", masked, broken), "broken.onnx")
        refused(run("inspect", broken), "broken.onnx")
        refused(run("quantize", broken, tmp_path / "int8.onnx"), "broken.onnx")
        refused(run("benchmark", broken), "broken.onnx")
        assert list(tmp_path.iterdir()) == [broken]

    def test_an_onnx_file_of_another_model(self, text_encoder: Path, dense_onnx: Path, tmp_path: Path) -> None:
        torch.manual_seed(7)
        BertForSequenceClassification.from_pretrained(text_encoder).save_pretrained(tmp_path / "other")
        refused(run("verify", tmp_path / "other", dense_onnx), "does not compute what the model computes")

    def test_an_output_that_cannot_be_written(self, masked: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        refused(run("shrink", masked, tmp_path / "file" / "small"), "file")
        refused(run("export", masked, tmp_path / "file" / "small.onnx"), "file")

    def test_two_files_of_one_name(self, dense_onnx: Path) -> None:
        refused(run("benchmark", f"a={dense_onnx}", f"a={dense_onnx}"), "same name")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--rounds", 5, "--max-rounds", 4), ("--max-rounds", "4 and 5")),
            (("--accuracy", "a:0.9"), ("no accuracy", "a:0.9", "NAME=VALUE")),
            (("--accuracy", "c=0.9"), ("not timed", "c", "'a'")),
            (("--accuracy", "a=91"), ("[0, 1]", "91", "0.91")),
            (("--accuracy", "a=nan"), ("[0, 1]", "nan")),
            (("--html", "."), ("a directory is there",)),
            (("--csv", "/dev/null/x.csv"), ("/dev/null",)),
            (("--lengths", "/nowhere/lengths"), ("/nowhere/lengths", "one whole number")),
        ],
    )
    def test_benchmark(
        self, options: tuple[object, ...], words: tuple[str, ...], dense_onnx: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each is said before anything is timed."""
        monkeypatch.setattr(benchmark_job, "benchmark", lambda *_, **__: pytest.fail("timed"))
        refused(run("benchmark", f"a={dense_onnx}", *options), *words)

    @pytest.mark.parametrize("text", ["", "[]", "0", "12\n-3", "1.5", "[1.5]", "[true]", "[1", '["7"]', "seven"])
    def test_lengths(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "lengths").write_text(text)
        with pytest.raises(td.TdError, match=r"lengths.*one whole number above 0 per line"):
            benchmark_job.read_lengths(tmp_path / "lengths")

    def test_a_provider_that_is_not_installed(self, dense_onnx: Path) -> None:
        provider = next(name for name in ("cuda", "tensorrt", "openvino") if name not in available_providers())
        refused(run("benchmark", f"a={dense_onnx}@{provider}", *QUICK), provider, "cpu")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--sparsity-level", "1.0"), ("sparsity_level", "1.0")),
            (("--drop-rate", "-0.5"), ("drop_rate", "-0.5")),
            (("--epochs", "0"), ("epochs",)),
            (("--label-column", "labl"), ("labl", "'label'")),
            (("--dataset", "/nowhere/rows.csv"), ("no such data file", "/nowhere/rows.csv")),
            (("--model", "/nowhere/model"), ("no such model", "/nowhere/model")),
        ],
    )
    def test_finetune(
        self, options: tuple[str, str], words: tuple[str, ...], text_encoder: Path, reviews: Path, tmp_path: Path
    ) -> None:
        source = ("--model", text_encoder, "--dataset", reviews, "--output", tmp_path / "run")
        refused(run("finetune", *source, *options), *words)
        assert list(tmp_path.iterdir()) == []

    def test_finetune_into_a_file(self, text_encoder: Path, reviews: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("kept")
        refused(run("finetune", "--model", text_encoder, "--dataset", reviews, "--output", tmp_path / "file"), "file")
        assert (tmp_path / "file").read_text() == "kept"

    def test_an_unknown_recipe_or_option(self) -> None:
        for options in (("finetune", "--recipe", "targeted_unt"), ("shrink", "--no-such-option"), ("no-such-command",)):
            assert run(*options).exit_code == 2


def test_without_typer_one_line_names_the_extra() -> None:
    code = "import sys; sys.modules['typer'] = None; from td_plugin.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: typer is not installed; fix: pip install 'td-plugin[hf,onnx]'"
