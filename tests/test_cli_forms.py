"""The command line, from an ONNX file on: its forms, their comparison, and every file that is no good."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from command_line import document, refused, run
from graphs import linear_graph
from onnx import numpy_helper
from onnx.external_data_helper import set_external_data
from transformers import GPT2Config, GPT2LMHeadModel

from td_plugin import commands_forms
from td_plugin.export import forms
from td_plugin.export.forms import FORMS

QUICK = ("--rounds", 5, "--max-rounds", 5, "--sequence", 8)


@pytest.fixture(scope="module")
def int8(dense_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    found = document(run("optimize", dense_onnx, path, "--form", "int8", "--keep", "classifier", "--json"))
    assert found["left_out"] == {"classifier": "as asked"}
    return path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "initializer_range": 0.3}
    directory = tmp_path_factory.mktemp("decoder")
    GPT2LMHeadModel(GPT2Config(vocab_size=20, bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def cached(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cached") / "model.onnx"
    exported = document(run("export", decoder, path, "--cache", "--json"))
    assert "past_key_values.0.key" in exported["inputs"]
    return path


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


class TestOptimize:
    def test_the_help_names_every_form(self) -> None:
        assert set(FORMS) - {"fp32"} == set(commands_forms.FORMS)

    def test_the_best_of_the_usual_forms(self, masked: Path, dense_onnx: Path, reviews: Path, tmp_path: Path) -> None:
        rows = ("--data", reviews, "--calibration", reviews, "--calibration-rows", 20, "--tokenizer", masked)
        found = document(run("optimize", dense_onnx, tmp_path / "best.onnx", *QUICK, *rows, "--json"))
        assert [one["form"] for one in found["candidates"]] == ["fp32", "fused", "int8", "int8-static"]
        scores = [one["score"] for one in found["candidates"] if not one["rejected"].startswith("parity")]
        assert len(scores) >= 2 and all(0 <= score <= 1 for score in scores)
        assert [file.name for file in tmp_path.iterdir()] == ["best.onnx"]
        assert json.loads(metadata(tmp_path / "best.onnx")["td-plugin.auto"])["form"] == found["form"]
        assert found["latency"]["conditions"]["rounds"] == 5

    def test_the_best_of_some(self, dense_onnx: Path, tmp_path: Path) -> None:
        (tmp_path / "lengths").write_text("3\n9\n")
        options = ("--form", "fused", "--form", "int8-weight", "--lengths", tmp_path / "lengths")
        found = document(run("optimize", dense_onnx, tmp_path / "best.onnx", *options, *QUICK, "--json"))
        assert [one["form"] for one in found["candidates"]] == ["fp32", "fused", "int8-weight"]
        assert sorted(found["latency"]["conditions"]["lengths"]) == [3, 9]

    def test_one_form(self, masked: Path, dense_onnx: Path, reviews: Path, tmp_path: Path) -> None:
        data = ("--calibration", reviews, "--tokenizer", masked, "--calibration-rows", 17)
        found = document(run("optimize", dense_onnx, tmp_path, "--form", "int8-static", *data, "--json"))
        assert found["form"] == "int8-static" and Path(found["path"]) == tmp_path / "dense.onnx"
        assert "scales from 3 batches" in found["notes"]  # 17 rows, 8 at a time
        text = run("optimize", dense_onnx, tmp_path / "fused.onnx", "--form", "fused").stdout
        assert "fused.onnx" in text and "against the source" in text

    def test_beyond_the_tolerance(self, dense_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forms, "beyond", lambda found: "too far off")
        result = run("optimize", dense_onnx, tmp_path / "m.onnx", "--form", "fp16", "--json")
        assert document(result, code=1)["problem"] == "too far off" and (tmp_path / "m.onnx").is_file()

    def test_with_the_export(self, masked: Path, tmp_path: Path) -> None:
        document(run("export", masked, tmp_path / "m.onnx", "--optimize", "int8", "--json"))
        assert metadata(tmp_path / "m.onnx")["td-plugin.precision"] == "int8"

    def test_blocks_of_zeros(self, tmp_path: Path) -> None:
        weight = np.random.default_rng(0).standard_normal((512, 1024))
        weight[64:] = 0  # wide blocks, all in the same rows: faster on any machine
        source = linear_graph(tmp_path / "m.onnx", weight)
        options = ("--block", "64x1024", "--batch", 64, "--min-gain", 1.1)
        found = document(run("block-sparse", source, tmp_path / "blocks.onnx", *options, "--json"))
        (row,) = found["rows"]
        assert row["block"] == [64, 1024] and row["inputs"] == 64 and row["speedup"]["median"] > 1.1
        assert found["rewritten"] == 1 and found["bytes"] < found["source_bytes"] / 4

    def test_zeros_on_disk(self, dense_onnx: Path) -> None:
        found = document(run("inspect", dense_onnx, "--storage", "--json"))
        assert found["rows"][0]["bytes"] == dense_onnx.stat().st_size and found["zeros"] > 0
        assert "sparse initializers" in run("inspect", dense_onnx, "--storage").stdout


class TestVerify:
    def test_models_and_files_with_a_score(
        self, masked: Path, dense_onnx: Path, int8: Path, reviews: Path, tmp_path: Path
    ) -> None:
        document(run("shrink", masked, tmp_path / "small", "--json"))
        others = (f"small={tmp_path / 'small'}", f"onnx={dense_onnx}", f"int8={int8}")
        found = document(run("verify", masked, *others, "--data", reviews, "--max-rows", 20, "--json"))
        assert found["passed"] and found["reference"] == str(masked) and found["score"]["rows"] == 20
        rows = {form["name"]: form for form in found["forms"]}
        assert list(rows) == ["small", "onnx", "int8"]
        assert rows["small"]["max_abs"] < 1e-5 > rows["onnx"]["max_abs"] and rows["int8"]["precision"] == "int8"
        assert all(row["score"]["metric"] == "accuracy" and row["drop"] is not None for row in rows.values())

    def test_one_that_does_not_hold(self, dense_onnx: Path, int8: Path) -> None:
        result = run("verify", dense_onnx, f"same={dense_onnx}", f"int8={int8}", "--tolerance", 1e-7)
        assert result.exit_code == 1, result.output
        assert "int8: the ONNX file does not compute" in result.stdout and result.stdout.count("yes") == 1

    def test_a_score_that_may_not_drop(self, masked: Path, dense_onnx: Path, reviews: Path) -> None:
        result = run("verify", masked, dense_onnx, "--data", reviews, "--max-accuracy-drop", -1, "--json")
        (form,) = document(result, code=1)["forms"]
        assert "worse than" in form["problem"] and "-1 is allowed" in form["problem"]

    def test_a_decoder_token_by_token(self, decoder: Path, cached: Path, tmp_path: Path) -> None:
        found = document(run("verify", decoder, cached, "--new-tokens", 9, "--json"))
        assert found["equal"] == 1 and [row["generated"] for row in found["rows"]] == [9, 9, 9]
        tried = ("--form", "int8-weight", "--form", "fused", *QUICK)
        best = document(run("optimize", cached, tmp_path / "best.onnx", *tried, "--json"))
        assert len(best["candidates"]) == 3 and best["latency"]["conditions"]["batch"] == 1
        assert document(run("verify", decoder, tmp_path / "best.onnx", "--json"))["tolerance"] > 0


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--form", "int2"), ("no such form", "int2", "int8-static")),
            (("--form", "int8-static"), ("need data", "no calibration")),
            (("--form", "fused", "--form", "int8-static"), ("int8-static needs data",)),
            (("--form", "int8", "--data", "rows.csv"), ("--data chooses", "td-plugin verify")),
            (("--form", "int8", "--keep", "clasifier"), ("no layer", "clasifier", "'classifier'")),
            (("--keep", "classifier"), ("--keep", "give one --form")),
            (("--form", "int8", "--calibration", "rows.csv"), ("--calibration is for int8-static",)),
            (("--calibration", "/nowhere/rows.csv"), ("no such data file", "/nowhere/rows.csv")),
            (("--metric", "f1"), ("--metric", "give --data")),
            (("--rounds", 9, "--max-rounds", 5), ("--max-rounds", "5 and 9")),
            (("--lengths", "/nowhere/lengths"), ("/nowhere/lengths", "one whole number")),
            (("--sequence", 99), ("cannot run", "dense.onnx")),  # the model has 32 positions
        ],
    )
    def test_optimize(
        self, options: tuple[object, ...], words: tuple[str, ...], dense_onnx: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "m.onnx"
        target.write_bytes(b"what was there")
        refused(run("optimize", dense_onnx, target, *options), *words)
        assert os.listdir(tmp_path) == ["m.onnx"] and target.read_bytes() == b"what was there"

    def test_places(self, dense_onnx: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for command in ("optimize", "quantize", "block-sparse"):
            refused(run(command, dense_onnx, tmp_path / "file" / "m.onnx"), "file")
            refused(run(command, dense_onnx, dense_onnx), "same file")

    def test_verify(self, masked: Path, dense_onnx: Path, decoder: Path, cached: Path, tmp_path: Path) -> None:
        refused(run("verify", dense_onnx, masked), "checkpoint comes first")
        refused(run("verify", masked, dense_onnx, dense_onnx), "same name")
        refused(run("verify", masked, dense_onnx, "--max-accuracy-drop", 0.1), "--max-accuracy-drop", "--data")
        refused(run("verify", masked, dense_onnx, "--split", "test"), "--split", "--data")
        refused(run("verify", tmp_path / "absent", dense_onnx), "no such directory", "absent")
        for options in ((cached, dense_onnx), (cached, "--data", "rows.csv")):
            refused(run("verify", decoder, *options), "token by token", "one file at a time")
        refused(run("verify", masked, cached), "cannot generate")
        other = linear_graph(tmp_path / "other.onnx", np.ones((8, 4)))
        refused(run("verify", masked, other), "needs inputs that were not given: x")
        refused(run("benchmark", dense_onnx, other, *QUICK), "other.onnx", "needs inputs", "x")

    def test_others(self, masked: Path, dense_onnx: Path, tmp_path: Path) -> None:
        refused(run("inspect", masked, "--storage"), "--storage", "export")
        refused(run("export", masked, tmp_path / "m.onnx", "--cache"), "keys and values")
        refused(run("export", masked, tmp_path / "m.onnx", "--cache", "--optimize", "int8"), "then td-plugin optimize")
        refused(run("export", masked, tmp_path / "m.onnx", "--optimize", "int2"), "no such form", "int2")
        refused(run("block-sparse", dense_onnx, tmp_path / "m.onnx", "--block", "16"), "no block", "16x128")
        refused(run("block-sparse", dense_onnx, tmp_path / "m.onnx", "--sequence", 99), "cannot run", "dense.onnx")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("absent", ("no such ONNX file",)),
            ("truncated", ("bad.onnx",)),
            ("future", ("cannot run the operator set", "99", "opset=20")),
            ("alone", ("weights kept outside the ONNX file are missing", "gone.data")),
            ("outside", ("weights outside its directory", "../secret")),
        ],
    )
    def test_a_file_that_is_no_good(self, kind: str, words: tuple[str, ...], masked: Path, tmp_path: Path) -> None:
        """Every command that reads a file says so, and writes nothing."""
        (tmp_path / "secret").write_bytes(bytes(4 * 8 * 4))
        (tmp_path / "in").mkdir()
        path, target = tmp_path / "in" / "bad.onnx", tmp_path / "m.onnx"
        spoil(path, kind)
        for command in (
            ("optimize", path, target, *QUICK),
            ("optimize", path, target, "--form", "bf16"),
            ("quantize", path, target),
            ("block-sparse", path, target),
            ("verify", masked, path),
            ("verify", path, path.with_name("other.onnx")),
            ("benchmark", path, *QUICK),
            ("inspect", path),
            ("check", path, "--max-size-mb", 1),
        ):
            refused(run(*command), *words)
        assert sorted(os.listdir(tmp_path)) == ["in", "secret"]

    def test_a_full_disk(self, masked: Path, dense_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(onnx_ir, "save", full)
        monkeypatch.setattr(onnx, "save", full)
        for command in (
            ("export", masked, tmp_path / "m.onnx"),
            ("quantize", dense_onnx, tmp_path / "m.onnx"),
            ("optimize", dense_onnx, tmp_path / "m.onnx", "--form", "int4"),
        ):
            refused(run(*command), "cannot be written", "m.onnx", os.strerror(errno.ENOSPC))
        monkeypatch.setattr(Path, "rename", full)
        refused(run("shrink", masked, tmp_path / "small"), "directory cannot be written", os.strerror(errno.ENOSPC))
        assert not list(tmp_path.iterdir())


def spoil(path: Path, kind: str) -> None:
    if kind == "absent":
        return
    linear_graph(path, np.ones((8, 4)))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
        return
    graph = onnx.load(path)
    if kind == "future":
        graph.opset_import[0].version = 99
    else:
        tensor = numpy_helper.from_array(np.ones((8, 4), np.float32), "weight")
        set_external_data(tensor, "gone.data" if kind == "alone" else "../secret", 0, 128)
        tensor.ClearField("raw_data")
        graph.graph.initializer[0].CopyFrom(tensor)
    path.write_bytes(graph.SerializeToString())


def test_two_commands_at_once(dense_onnx: Path, tmp_path: Path) -> None:
    """Into one directory and under one name: a whole file, whoever was last, and nothing else."""
    orders = [["optimize", str(dense_onnx), str(tmp_path / "m.onnx"), "--form", form] for form in ("bf16", "fp16")]
    running = [
        subprocess.Popen([sys.executable, "-m", "td_plugin", *order], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for order in orders
    ]
    for process in running:
        _, told = process.communicate()
        assert process.returncode == 0, told
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert document(run("verify", dense_onnx, tmp_path / "m.onnx", "--json"))["passed"]
