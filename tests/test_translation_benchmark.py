"""The reproduction on translation: its pieces, what its judge removes, going on from a checkpoint, and the whole."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import MarianMTModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "reproduce"))

import translation
import translation_report
from translation import METHODS, QUICK, Job, make, prepared
from translation_report import KEYS, PUBLISHED, TITLES, gains, signed
from translation_task import Pairs, Settings, accuracy, bleu, build, learn_pieces, pruned, tokenizer_of
from translation_training import fit

FOLDER = Path(__file__).parent.parent / "benchmarks" / "reproduce"
TINY = Settings(16, 1, 2, 0.1, 120, 0, 3, 8, 1e-3, 2, bfloat16=False, judged=12)
WORDS = {"a": "ein", "dog": "Hund", "boy": "Junge", "runs": "rennt", "sleeps": "schläft", "here": "hier"}


def some_pairs(rows: int, seed: int = 0) -> Pairs:
    draw = random.Random(seed)
    texts = [draw.choices(list(WORDS), k=draw.randint(2, 6)) for _ in range(rows)]
    sources = [" ".join(text).capitalize() + "." for text in texts]
    return Pairs(sources, [" ".join(WORDS[word] for word in text).capitalize() + "." for text in texts])


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pieces") / "tokenizer.json"
    learn_pieces(some_pairs(64), TINY.pieces, file)
    return file


@pytest.fixture
def tokenizer(pieces: Path) -> PreTrainedTokenizerFast:
    return tokenizer_of(pieces)


def parquet(pairs: Pairs, file: Path) -> str:
    from datasets import Dataset

    Dataset.from_dict({"en": pairs.sources, "de": pairs.targets}).to_parquet(file)
    return str(file)


def test_pieces_give_back_what_they_were_made_of(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = some_pairs(20, seed=1)
    for text in (*pairs.sources, *pairs.targets):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.lower()
    assert tokenizer("dog: runs")["input_ids"].count(tokenizer.unk_token_id) == 1
    assert len(tokenizer) <= TINY.pieces


def test_pruning_removes_the_smallest_of_every_output(tokenizer: PreTrainedTokenizerFast) -> None:
    """Against numpy, with the layers named by hand."""
    model = build(TINY, tokenizer, 3)
    attention = [f"{kind}.{name}_proj" for kind in ("self_attn", "encoder_attn") for name in ("q", "k", "v", "out")]
    encoder = {f"model.encoder.layers.0.{name}.weight" for name in (*attention[:4], "fc1", "fc2")}
    decoder = {f"model.decoder.layers.0.{name}.weight" for name in (*attention, "fc1", "fc2")}
    ours, before = pruned(model, 0.7).state_dict(), model.state_dict()
    assert set(ours) == set(before)
    for name, value in before.items():
        expected = value.clone().numpy()
        if name in encoder | decoder:
            for row in expected:
                row[np.argsort(np.abs(row))[: int(0.7 * len(row))]] = 0
        np.testing.assert_array_equal(ours[name].numpy(), expected, err_msg=name)
    assert all(torch.equal(value, before[name]) for name, value in pruned(model, 0).state_dict().items())


def test_the_judge_counts_as_one_does_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    model, pairs, right, total = build(TINY, tokenizer, 0).eval(), some_pairs(7, seed=2), 0, 0
    for source, target in zip(pairs.sources, pairs.targets, strict=True):
        ids, labels = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (source, target))
        before = torch.cat([torch.tensor([[tokenizer.pad_token_id]]), labels[:, :-1]], 1)
        with torch.no_grad():
            found = model(input_ids=ids, decoder_input_ids=before).logits.argmax(-1)
        right, total = right + int((found == labels).sum()), total + labels.numel()
    assert accuracy(model, tokenizer, pairs, batch=3) == pytest.approx(right / total)


def test_bleu_sees_no_case_and_keeps_rows_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    class Knows(MarianMTModel):
        def generate(self, ids: torch.Tensor, **_: object) -> torch.Tensor:
            sources = tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts = [pairs.targets[known.index(source)] for source in sources]
            return tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]

    pairs = some_pairs(9, seed=3)
    known = [source.lower() for source in pairs.sources]
    model = Knows(build(TINY, tokenizer, 0).config)
    assert bleu(model, tokenizer, pairs, batch=4) == pytest.approx(100)
    assert bleu(model, tokenizer, Pairs(pairs.sources, pairs.targets[1:] + pairs.targets[:1]), batch=4) < 90


def test_published_numbers_and_methods_fit() -> None:
    assert set(TITLES) == set(METHODS) and set(KEYS) == set(PUBLISHED)
    for methods in PUBLISHED.values():
        assert set(methods) < set(METHODS) and all(len(found) == 10 for found in methods.values())
    assert PUBLISHED["bleu"]["td-66-75"][7] - PUBLISHED["bleu"]["none"][7] == pytest.approx(15.18)
    assert QUICK.width % QUICK.heads == 0
    runs = [
        {"method": name, "seed": seed, "bleu": {"0.7": base + seed}}
        for name, base in (("none", 3.0), ("td-66-75", 9.0))
        for seed in (0, 1)
    ]
    assert gains(runs, "td-66-75", "bleu", "0.7") == [6.0, 6.0]
    assert gains(runs[:3], "td-66-75", "bleu", "0.7") == [6.0]  # of seeds that both have
    assert signed([6.0, 5.0]) == "+5.5 ± 0.7" and signed([-6.0]) == "-6.0"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["none", "td-66-75", "dropconnect"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(name: str, pieces: Path, tmp_path: Path) -> None:
    files = [parquet(some_pairs(rows, seed), tmp_path / f"{seed}.parquet") for seed, rows in enumerate((40, 9))]
    ended = []
    for part in ("whole", "parts"):
        output = tmp_path / part
        output.mkdir()
        (output / "tokenizer.json").write_bytes(pieces.read_bytes())
        job = Job(name, 0, TINY, *files, "", output, "cpu")
        if part == "parts":
            assert not fit(prepared(job, 0.0)[0])
            assert [path.name for path in job.unfinished.iterdir()] == ["checkpoint-5"] and not job.folder.exists()
        assert make(job, math.inf) and not job.unfinished.exists()
        ended.append(load_file(job.folder / "model.safetensors"))
        found = json.loads((job.folder / "result.json").read_text(encoding="utf-8"))
        assert found["steps"] == 15 and len(found["epochs"]) == 3
        weight = ended[-1]["model.encoder.layers.0.fc1.weight"]
        assert (weight != 0).all()  # dense: no mask was baked in
    assert all(torch.equal(ended[1][key], value) for key, value in ended[0].items())


@pytest.mark.slow
def test_models_are_made_once_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, results = tmp_path / "runs", tmp_path / "results"
    files = ["--train", parquet(some_pairs(64), tmp_path / "a.parquet")]
    files += ["--validation", parquet(some_pairs(8, 1), tmp_path / "b.parquet")]
    files += ["--test", parquet(some_pairs(12, 2), tmp_path / "c.parquet")]
    options = ["--width", "16", "--layers", "1", "--pieces", "120", "--epochs", "2", "--batch", "16", "--judged", "6"]
    options += ["--seeds", "0", "--jobs", "1", "--device", "cpu", "--output", str(output), "--results", str(results)]
    command = [sys.executable, str(FOLDER / "translation.py"), "all", *files, *options]
    command += ["--methods", "none", "td-66-75"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "+15.18" in done.stdout and "published, WMT: TD α 0.66 γ 0.75" in done.stdout and "8.89" in done.stdout
    found = json.loads((results / "translation_quick.json").read_text(encoding="utf-8"))
    assert {run["method"] for run in found["runs"]} == {"none", "td-66-75"}
    assert found["tested"] == "c.parquet" and found["steps"] == 8 and "sacrebleu" in found["machine"]
    for run in found["runs"]:
        assert len(run["bleu"]) == len(run["accuracy"]) == 10 and len(run["epochs"]) == 2
        assert all(0 <= value <= 1 for value in run["accuracy"].values())
    written = (results / "translation_quick.md").read_text(encoding="utf-8")
    assert translation_report.render(found, tmp_path / "again") + "\n" == written == done.stdout
    assert (results / "translation_quick.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.*")}
    translation.main(command[2:])
    assert capsys.readouterr().out == done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.*")}
    with pytest.raises(SystemExit, match="other settings"):
        translation.main([*command[2:], "--width", "24"])
