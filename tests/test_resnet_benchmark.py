"""The reproduction on ResNet-32: its architecture, its schedule, its judge, resuming, and the whole of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "reproduce"))

import ablation
import resnet
from ablation import DRAW, PAIRS, differences, verdict
from resnet_images import SIZE, Images, batch, standardised
from resnet_judge import pruned
from resnet_network import Shape, build, prunable
from resnet_published import PUBLISHED
from resnet_report import correlation
from resnet_rescaled import Rescaled
from resnet_rows import ROWS, SHARES
from resnet_train import Run, Settings, Stop

FOLDER = Path(__file__).parent.parent / "benchmarks" / "reproduce"
TINY = Shape(stem=4, stem_stride=2, widths=(4, 8), units=1, momentum=0.1)
SHORT = Settings(TINY, epochs=3, batch=16, rate=0.05, cosine=True)


def some_images(rows: int = 64) -> Images:
    generator = torch.Generator().manual_seed(0)
    edged = torch.randint(0, 256, (rows, SIZE + 8, SIZE + 8, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (rows,), generator=generator)
    return Images(edged, labels, edged[:, 4:-4, 4:-4].contiguous(), labels)


def test_the_network_has_the_parameters_of_the_paper() -> None:
    """Counted by hand: 7·7·3·16, then per stage ten 3 × 3 convolutions, one projection and their norms."""
    expected, before = 7 * 7 * 3 * 16, 16
    for width in (32, 64, 128):
        expected += 9 * before * width + 9 * 9 * width * width + before * width  # ten convolutions, the projection
        expected += 2 * before + 9 * 2 * width  # a norm before each of the ten
        before = width
    expected += 2 * 128 + 128 * 10 + 10
    model = build(Shape(), 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert len(prunable(model)) == 3 * 10 + 3 and "stem" not in prunable(model)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_learning_rate_of_the_authors() -> None:
    rates = [Settings().at(step, 100_000) for step in (0, 39_999, 40_000, 60_000, 80_000, 99_999)]
    np.testing.assert_allclose(rates, [0.4, 0.4, 0.04, 0.004, 0.0004, 0.0004])


def test_a_short_run_warms_up_and_ends_at_zero() -> None:
    steps = np.arange(1000)
    expected = np.where(steps < 50, steps / 50, (1 + np.cos(np.pi * (steps - 50) / 950)) / 2) * 0.05
    np.testing.assert_allclose([SHORT.at(int(step), 1000) for step in steps], expected, atol=1e-12)


def test_batches_are_crops_of_their_rows_and_flips() -> None:
    images = some_images(32)
    pixels, labels = batch(images, 5, 8, seed=1)
    assert pixels.shape == (8, 3, SIZE, SIZE) and pixels.is_contiguous(memory_format=torch.channels_last)
    for picture, label in zip(pixels, labels, strict=True):
        corners = [
            (standardised(edged[None, down : down + SIZE, across : across + SIZE]), own)
            for edged, own in zip(images.train, images.train_labels, strict=True)
            for down in range(9)
            for across in range(9)
        ]
        fits = [own for crop, own in corners if torch.equal(crop[0], picture) or _close(crop[0].flip(-1), picture)]
        assert [int(own) for own in fits] == [int(label)]


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5)


def test_an_epoch_has_every_row_once() -> None:
    images = some_images(32)
    images.train[:, :] = torch.arange(32, dtype=torch.uint8)[:, None, None, None]
    numbered = Images(images.train, torch.arange(32), images.test, images.test_labels)
    seen = torch.cat([batch(numbered, step, 8, 0)[1] for step in range(4)])
    assert sorted(seen.tolist()) == list(range(32))


def test_pruning_removes_the_smallest_of_every_filter() -> None:
    """Against numpy."""
    images, model = some_images(16), build(TINY, 3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for what in ("weights", "units"):
        by_hand = {name: value.clone() for name, value in weights.items()}
        for name in prunable(model):
            found = by_hand[f"{name}.weight"].flatten(1).numpy()
            if what == "weights":
                for row in found:
                    row[np.argsort(np.abs(row))[: int(0.5 * len(row))]] = 0
            else:
                found[np.argsort(np.linalg.norm(found, axis=1))[: int(0.5 * len(found))]] = 0
            by_hand[f"{name}.weight"] = torch.from_numpy(found).view_as(weights[f"{name}.weight"])
        (ours,) = pruned(weights, TINY, images, what, (0.5,)).values()
        (expected,) = pruned(by_hand, TINY, images, what, (0.0,)).values()
        assert ours == pytest.approx(expected, rel=1e-5)


def test_rescaled_dropout_keeps_the_mean_and_the_weights() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 5, 3, 3))
    before, rescaled = weight.detach().clone(), Rescaled([weight], 0.5, 0.75, seed=0)
    factors = torch.stack([rescaled.factors(step)[0] for step in range(400)])
    assert set(factors.unique().tolist()) == {0.0, 1.0, 2.0}
    assert torch.allclose(factors.mean(0), torch.ones(()), atol=0.3)
    assert int((factors[0].flatten(1) == 1).sum()) == 4 * (45 - 33)
    with rescaled.step(7):
        (weight.sum()).backward()
        assert torch.equal(weight.detach(), before * factors[7])
    assert torch.equal(weight.detach(), before) and torch.equal(weight.grad, factors[7])


@pytest.mark.filterwarnings("ignore:squash_mask.. zeroed nothing")  # the gates of so short a run are all open
@pytest.mark.parametrize("name", ["none", "ramp-99-90", "unit-90-75-w", "l0", "variational", "l1", "rescaled-66-75"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    images, file = some_images(), tmp_path / "some.safetensors"
    whole = Run(name, SHORT, 1)
    assert whole.fit(images, Stop(), file)
    assert not Run(name, SHORT, 1).fit(images, Stop(step=5), file)
    resumed = Run(name, SHORT, 1)
    resumed.load(file)
    assert resumed.done == 5 and resumed.fit(images, Stop(), file)
    ended, expected = resumed.weights(), whole.weights()
    assert all(torch.equal(ended[key], expected[key]) for key in expected)
    assert not torch.equal(expected["stem.weight"], build(TINY, 1).stem.weight)


def test_a_compiled_model_trains_the_same_weights(tmp_path: Path) -> None:
    run, images = Run("td-50-50", SHORT, 0), some_images()
    before = run.weights()["stem.weight"]
    compiled = torch.compile(run.model, backend="eager")
    assert not run.fit(images, Stop(step=2), tmp_path / "some.safetensors", compiled)
    assert not torch.equal(run.weights()["stem.weight"], before)


def test_published_numbers_and_rows_fit() -> None:
    for what, methods in PUBLISHED.items():
        for name, found in methods.items():
            assert what in ROWS[name].what
            assert {float(share) for share in found} <= set(ROWS[name].shares)
            assert all(5 < accuracy < 95 for accuracy in found.values())
    assert len(SHARES) == 10
    assert correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)


def test_a_difference_matters_if_it_is_more_than_its_noise() -> None:
    pair = PAIRS[0]
    runs = [
        {"method": name, "seed": seed, "units": {"0.5": {"accuracy": base + seed / 100}}}
        for name, base in ((pair.one, 0.7), (pair.other, 0.6))
        for seed in (0, 1, 2)
    ]
    assert differences(runs, pair, "0.5") == pytest.approx([-10, -10, -10])
    assert differences(runs[:5], pair, "0.5") == pytest.approx([-10, -10])  # of seeds that both have
    assert verdict(DRAW, [[0.1, 0.2, 0.3], [-9.0, -10.0, -11.0]])[1:] == ["-10.0 ± 1.0", "yes"]
    assert verdict(DRAW, [[-9.0, 10.0, 9.0]])[2] == "no"
    assert verdict(DRAW, [[0.5, 0.5, 0.5]])[2] == "no"
    assert all(ROWS[one.one].level == ROWS[one.other].level for one in PAIRS)
    for one in PAIRS:
        assert ROWS[one.one].level in ROWS[one.one].shares and ROWS[one.one].level in ROWS[one.other].shares


def call(script: str, *options: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_models_are_made_once_and_reported(pictures: Path, tmp_path: Path) -> None:
    output, results = tmp_path / "runs", tmp_path / "results"
    budget = ["--rows", "64", "--test-rows", "32", "--epochs", "1", "--output", str(output), "--results", str(results)]
    data = ["--train", str(pictures), "--seeds", "0", "1", "--jobs", "1"]
    methods = ["none", "td-50-50", "l0", "ramp-99-99", "unit-50-50", "random-75"]
    text = call("resnet.py", "all", *budget, *data, "--methods", *methods)
    assert "(93.71)" in text and "| 75 % of weights |" in text and "99.4 %" in text
    found = json.loads((results / "resnet_quick.json").read_text(encoding="utf-8"))
    assert {run["method"] for run in found["runs"]} == set(methods) and found["seeds"] == [0, 1]
    (td,) = (run for run in found["runs"] if (run["method"], run["seed"]) == ("td-50-50", 0))
    assert td["masks"]["dense"] == pytest.approx(td["weights"]["0"], abs=1e-5)
    assert td["masks"]["pruned"] == pytest.approx(td["weights"]["0.5"], abs=1e-5)
    assert (results / "resnet_quick.png").read_bytes().startswith(b"\x89PNG")
    written = (results / "resnet_quick.md").read_text(encoding="utf-8")
    assert resnet.render(found, tmp_path / "again") + "\n" == written == text
    kept = load_file(output / "weights" / "random-75-seed0.safetensors")
    weight = kept["units.1.conv2.weight"].flatten(1)
    assert ((weight == 0).sum(1) == int(0.75 * weight.shape[1])).all()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.*")}
    assert call("resnet.py", "all", *budget, *data, "--methods", *methods) == text
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.*")}


@pytest.mark.slow
def test_variants_and_dependence_take_the_same_models(pictures: Path, tmp_path: Path) -> None:
    output, results = tmp_path / "runs", tmp_path / "results"
    common = ["--rows", "64", "--test-rows", "32", "--epochs", "1", "--output", str(output), "--results", str(results)]
    common += ["--train", str(pictures), "--seeds", "0", "--jobs", "1"]
    methods = ["none", "td-50-50", "rescaled-50-50", "unit-50-50", "unit-50-50-w"]
    text = call("ablation.py", "all", *common, "--methods", *methods)
    assert "| survivors rescaled, not left |" in text and "| weights: TD α 0.5 γ 0.5 |" in text
    assert (results / "ablation_quick.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((results / "ablation_quick.json").read_text(encoding="utf-8"))
    assert ablation.render(found, tmp_path / "again") + "\n" == text
    text = call("dependence.py", "all", *common, "--methods", "none", "td-50-50", "td-50-75")
    assert "| weights removed | none | TD α 0.5 γ 0.75 |" in text and "| 0.0146 |" in text
    found = json.loads((results / "dependence_quick.json").read_text(encoding="utf-8"))
    assert {run["method"] for run in found["runs"]} == {"none", "td-50-75"} and len(found["small"]) == 1
    assert (results / "dependence_quick.png").read_bytes().startswith(b"\x89PNG")
