"""The comparison of small decoders: its perplexity, its widths, and all of it on a tiny text."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import GPT2LMHeadModel

import td_plugin as td

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "finetune"))

import decoder
from decoder_models import QUICK, ROWS, dense_model, narrow_model, one_shot
from decoder_report import markdown
from decoder_text import END, blocks, load, perplexity

from td_plugin.export import load_pretrained, shrink

FOLDER = Path(__file__).parent.parent / "benchmarks" / "finetune"
ALL_STAGES = """
import sys
sys.path.insert(0, sys.argv[1])
import decoder
options = sys.argv[2:]
for stage, more in (("train", ["magnitude", "narrow"]), ("time", []), ("report", ["magnitude", "narrow"])):
    decoder.main([stage, *options, *more])
"""
SMALL = replace(QUICK, width=32, layers=2, heads=4, block=8)
WORDS = ("a", "man", "dog", "red", "ball", "runs", "on", "grass", "two", "with")


def write_texts(path: Path, rows: int) -> Path:
    drawn = np.random.default_rng(rows).integers(len(WORDS), size=(rows, 9))
    texts = [" ".join(WORDS[index] for index in row) for row in drawn]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


def gpt2_parameters(vocabulary: int, width: int, layers: int, size: int, heads: int, neurons: int) -> int:
    """By hand: embeddings and 128 positions; per layer two norms, attention of `heads` heads of `size`, two layers."""
    attention = 3 * heads * size * (width + 1) + heads * size * width + width
    forward = neurons * (width + 1) + neurons * width + width
    return (vocabulary + 128) * width + layers * (4 * width + attention + forward) + 2 * width


def test_perplexity_is_that_of_numpy() -> None:
    model = dense_model(SMALL, 50, 0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far from uniform
    tokens = torch.randint(50, (30,), generator=torch.Generator().manual_seed(0))
    losses = []
    for piece in (tokens[0:9], tokens[8:17], tokens[16:25], tokens[24:30]):  # 8 + 8 + 8 + 5 predictions
        with torch.no_grad():
            logits = model.eval()(input_ids=piece[None, :-1]).logits[0].numpy()
        shifted = logits - logits.max(1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        losses += [-log_probabilities[row, token] for row, token in enumerate(piece[1:].tolist())]
    assert len(losses) == 29
    assert perplexity(model, tokens, 8, batch=2) == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_every_token_but_the_first_is_predicted_once() -> None:
    for length in (16, 17, 18):
        pieces = blocks(torch.arange(length), 8)
        assert torch.cat([piece[1:] for piece in pieces]).tolist() == list(range(1, length))
        assert all(len(piece) > 1 for piece in pieces)


def test_rows_held_out_are_the_last_and_texts_come_back(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.parquet", 12)
    rows = pyarrow.parquet.read_table(path).column("text").to_pylist()
    text = load(str(path), str(path), "text", 300, 4, tmp_path / "tokenizer.json")
    again = load(str(path), str(path), "text", 300, 4, tmp_path / "tokenizer.json")
    assert torch.equal(text.test, again.test) and text.vocabulary <= 300
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    read = [tokenizer.decode(list(stream), skip_special_tokens=False) for stream in (text.train, text.held_out)]
    assert read == [END + END.join(group) + END for group in (rows[:-4], rows[-4:])]


def test_wrong_files_are_named(tmp_path: Path) -> None:
    path = str(write_texts(tmp_path / "a.parquet", 5))
    with pytest.raises(SystemExit, match="no column en; there are text"):
        load(path, path, "en", 300, 2, tmp_path / "tokenizer.json")
    with pytest.raises(SystemExit, match="5 of 5 rows"):
        load(path, path, "text", 300, 5, tmp_path / "tokenizer.json")


@pytest.mark.parametrize(("level", "heads", "neurons"), [(0.5, 4, 512), (0.75, 2, 256)])
def test_the_narrow_model_has_the_widths_of_the_pruned(level: float, heads: int, neurons: int) -> None:
    dense = dense_model(QUICK, 300, 0)
    assert dense.num_parameters() == gpt2_parameters(300, 256, 4, 32, 8, 1024)
    narrow, pruned = narrow_model(QUICK, 300, level, 0), one_shot(dense, level)
    assert narrow.num_parameters() == pruned.num_parameters() == gpt2_parameters(300, 256, 4, 32, heads, neurons)
    first, chosen = narrow.transformer.h[0].mlp.c_fc.weight, pruned.transformer.h[0].mlp.c_fc.weight
    assert first.shape == chosen.shape and not torch.equal(first, chosen)
    assert first.std().item() == pytest.approx(0.02, rel=0.05)  # as GPT-2 begins


def test_the_shrunk_model_computes_what_the_masked_one_did() -> None:
    model = dense_model(SMALL, 50, 0)
    sparsifier = td.TargetedDropout(td.recipes.ramping_targeted_unit(), 0.5)
    sparsifier.prepare(model)
    sparsifier.step()
    ids = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        masked = model.eval()(ids).logits
        small = shrink(model)
        assert torch.allclose(small(ids).logits, masked, atol=1e-6)
    assert small.num_parameters() == gpt2_parameters(50, 32, 2, 8, 2, 64)


@pytest.mark.slow
def test_from_text_to_table(tmp_path: Path) -> None:
    train, test = write_texts(tmp_path / "train.parquet", 60), write_texts(tmp_path / "test.parquet", 9)
    output, results = tmp_path / "runs", tmp_path / "results"
    options = ["--train", str(train), "--test", str(test), "--column", "text", "--held-out", "10", "--width", "32"]
    options += ["--layers", "1", "--vocabulary", "270", "--epochs", "0.3", "--levels", "0.5", "--seeds", "0"]
    options += ["--jobs", "1", "--rounds", "2", "--device", "cpu", "--output", str(output), "--results", str(results)]
    options += ["--name", "tiny", "--methods", "dense", "targeted"]  # only these two are timed
    command = [sys.executable, "-c", ALL_STAGES, str(FOLDER), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((results / "tiny.json").read_text(encoding="utf-8"))
    by_method = {run["method"]: run for run in found["runs"]}
    assert set(by_method) == set(ROWS) - {"gradual"}
    assert len({by_method[name]["parameters"] for name in ("targeted", "magnitude", "narrow")}) == 1
    assert by_method["targeted"]["test"] == pytest.approx(by_method["targeted"]["test_masked"], rel=1e-5)
    assert by_method["dense"]["steps"] == by_method["targeted"]["steps"] == by_method["narrow"]["steps"] > 0
    for way in found["time"]["ways"].values():
        assert way["dense-0"]["speedup"]["median"] == 1 and way["targeted-0.5"]["tokens_per_second"] > 0
    assert (results / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "tiny.md").read_text(encoding="utf-8").strip() == markdown(found).strip()
    args = decoder.parse(["report", *options, "magnitude", "narrow"])
    assert found["command"] == args.command and "--train train.parquet" in args.command
    model = load_pretrained(output / "runs" / "targeted-0.5-seed0")
    assert isinstance(model, GPT2LMHeadModel) and model.num_parameters() == by_method["targeted"]["parameters"]
    kept = decoder.jobs(args)[0].text()
    assert perplexity(model, kept.test, 64) == pytest.approx(by_method["targeted"]["test"], rel=1e-5)
