"""Which checkpoint an interrupted run goes on from: every file of it cut short, missing or spoiled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_hf import assert_equal, callback, make_model, make_trainer, weights

from td_plugin.integrations.interrupted import last_complete_checkpoint, why_incomplete

FILES = (
    "model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2 and 4."""
    out = tmp_path_factory.mktemp("run")
    make_trainer(out, make_model(), callback(recipe_steps=4), max_steps=4).train()
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    return out


@pytest.fixture
def out(run: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(run, tmp_path / "out"))


def test_the_newest_is_taken_by_number(out: Path) -> None:
    (out / "checkpoint-4").rename(out / "checkpoint-10")
    (out / "checkpoint-x").mkdir()
    (out / "checkpoint-99").write_text("a file")
    assert last_complete_checkpoint(out) == str(out / "checkpoint-10")


def test_nothing_to_resume_is_none(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "not there") is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_makes_it_incomplete(out: Path, name: str, share: float) -> None:
    file = out / "checkpoint-4" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: min(int(share * len(whole)), len(whole) - 2)])
    with pytest.warns(UserWarning, match=rf"checkpoint-4 is incomplete.*{name}"):
        assert last_complete_checkpoint(out) == str(out / "checkpoint-2")


@pytest.mark.parametrize("name", [name for name in FILES if name != "config.json"])
def test_a_missing_file_makes_it_incomplete(out: Path, name: str) -> None:
    (out / "checkpoint-4" / name).unlink()
    with pytest.warns(UserWarning, match=rf"checkpoint-4 is incomplete.*{name} is missing"):
        assert last_complete_checkpoint(out) == str(out / "checkpoint-2")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_byte_that_changed_in_a_state_makes_it_incomplete(out: Path, name: str) -> None:
    file = out / "checkpoint-4" / name
    content = bytearray(file.read_bytes())
    place = content.index(b"data.pkl") + 200
    content[place] ^= 0xFF
    file.write_bytes(bytes(content))
    assert name in str(why_incomplete(file.parent))


def test_every_incomplete_one_is_named_and_none_is_loaded(out: Path) -> None:
    for step in (2, 4):
        (out / f"checkpoint-{step}" / "trainer_state.json").write_text("[]")
    with pytest.warns(UserWarning) as told:
        assert last_complete_checkpoint(out) is None
    assert [Path(str(warning.message).split(" is incomplete")[0]).name for warning in told] == [
        "checkpoint-4",
        "checkpoint-2",
    ]


def shard(checkpoint: Path) -> Path:
    """Write the weights as `save_pretrained` does with several files."""
    model = make_model()
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="10KB")
    return checkpoint / "model.safetensors.index.json"


def test_sharded_weights_are_read_through_their_index(out: Path) -> None:
    index = shard(out / "checkpoint-4")
    assert why_incomplete(index.parent) is None
    saved = json.loads(index.read_text())
    file = sorted(set(saved["weight_map"].values()))[-1]
    content = (index.parent / file).read_bytes()
    (index.parent / file).write_bytes(content[:-1])
    assert file in str(why_incomplete(index.parent))
    (index.parent / file).unlink()
    assert why_incomplete(index.parent) == f"{file} is missing"
    (index.parent / file).write_bytes(content)
    index.write_text(json.dumps({**saved, "weight_map": {**saved["weight_map"], "more.weight": file}}))
    assert why_incomplete(index.parent) == f"{file} lacks more.weight"


def test_every_process_left_its_generator(out: Path) -> None:
    checkpoint = out / "checkpoint-4"
    assert why_incomplete(checkpoint, processes=1) is None
    assert why_incomplete(checkpoint, processes=2) == "rng_state_0.pth is missing"
    for rank in (0, 1):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()
    assert why_incomplete(checkpoint) is None
    assert why_incomplete(checkpoint, processes=2) is None
    assert why_incomplete(checkpoint, processes=3) == "rng_state_2.pth is missing"


def test_a_sharded_directory_is_whole_with_its_metadata(out: Path) -> None:
    checkpoint = out / "checkpoint-4"
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "model.safetensors").unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (checkpoint / name).mkdir()
        assert "metadata is missing" in str(why_incomplete(checkpoint))
        (checkpoint / name / ".metadata").write_bytes(b"x")
    assert why_incomplete(checkpoint) is None


def test_the_run_goes_on_from_there_bit_for_bit(out: Path, tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", make_model(), callback(recipe_steps=4), max_steps=4)
    whole.train()
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    again = make_trainer(out, make_model(seed=9), callback(recipe_steps=4), max_steps=4)
    with pytest.warns(UserWarning, match="checkpoint-4 is incomplete"):
        again.train(resume_from_checkpoint=last_complete_checkpoint(out))
    assert_equal(weights(whole.model), weights(again.model))
    assert last_complete_checkpoint(out) == str(out / "checkpoint-4"), "what was half-written has been written anew"


def test_nothing_is_unpickled(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(torch, "load", refuse)
    assert last_complete_checkpoint(out) is not None
