"""The benchmark of all methods: every name of the package has a row, results are kept; the toy experiment."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

from td_plugin import gates, recipes

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import methods
import toy
from methods_report import markdown, plot, summary
from methods_rows import ROWS, run
from methods_tasks import UNITS, WEIGHTS, Settings, load

SHORT = Settings(steps=4, batch=16)


def test_every_method_of_the_package_has_a_row() -> None:
    made = {name.partition(",")[0].partition(" ")[0] for name in ROWS}
    units_alone = {"delayed_targeted_unit"}  # its weights have a row
    assert {*recipes.__all__, *gates.__all__} - made - units_alone == set()


@pytest.mark.parametrize("name", ["none", "targeted_weight", "n_m 2:4", "random units before training"])
def test_a_model_is_trained_pruned_and_judged(name: str) -> None:
    level = ROWS[name].levels[0]
    result = run(name, "LeNet-300-100", load("", SHORT), SHORT, level, 0)
    assert 0 <= result["accuracy"] <= 1 and result["sparsity"] == pytest.approx(level, abs=0.02)


@pytest.mark.parametrize("name", ["channel_prune", "from scratch"])
def test_controls_without_a_recipe(name: str) -> None:
    assert 0 <= run(name, "LeNet-5", load("", SHORT), SHORT, 0.5, 0)["accuracy"] <= 1


def test_results_are_kept_and_reported(tmp_path: Path) -> None:
    asked = ["--quick", "--methods", "none", "magnitude", "n_m 2:4", "channel_prune", "--output", str(tmp_path)]
    args = methods.parse([*asked, "--networks", "LeNet-300-100", "--seeds", "0", "1"])
    wanted = methods.jobs(args)
    assert len(wanted) == 2 * (1 + len(WEIGHTS) + 1 + len(UNITS))
    for job in wanted:
        result = {"accuracy": 0.9 + 0.02 * job.seed, "sparsity": job.level, "seconds": 1.0, "data": False}
        job.file(tmp_path).parent.mkdir(exist_ok=True)
        settings = {"settings": vars(args.settings)}
        job.file(tmp_path).write_text(json.dumps({**vars(job), **result, **settings}))
    methods.run_all(args)  # nothing is left to do
    rows = summary(methods.finished(args))
    assert len(rows) == len(wanted) // 2
    assert rows[0]["accuracy"] == pytest.approx(0.91) and rows[0]["deviation"] == pytest.approx(
        statistics.stdev((0.9, 0.92))
    )
    text = markdown(rows)
    assert text.count("91.0 ± 1.4") == len(rows) + 1  # the dense row stands in both tables
    assert text.index("magnitude") < text.index("units removed") < text.index("channel_prune")
    plot(rows, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="other settings"):
        methods.finished(methods.parse(["--steps", "7", "--output", str(tmp_path)]))


def test_images_of_a_file(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Pillow

    images = [Pillow.new("RGB", (32, 32), (index, 255, 0)) for index in range(40)]
    data = Dataset.from_dict(
        {"image": images, "label": [index % 2 for index in range(40)]},
        features=Features({"image": Image(), "label": Value("int64")}),
    )
    data.to_parquet(tmp_path / "some.parquet")
    found = load(str(tmp_path / "some.parquet"), Settings(rows=20))
    assert found.train.shape == (15, 3, 32, 32) and found.test_labels.shape == (5,)
    assert float(found.train[:, 1].min()) == 1 and float(found.train[:, 2].max()) == -1


def test_targeted_dropout_makes_pruning_five_times_cheaper_in_loss() -> None:
    """The paper's toy experiment (10 hidden units, γ .75, α .5; there 8.3 times, on CIFAR-10), here on the digits."""
    torch.set_num_threads(1)
    found = toy.compare(load("", Settings()), epochs=20, rate=0.3, seeds=[0, 1, 2], progress=False)
    changes = {name: statistics.mean(result["change"] for result in results) for name, results in found.items()}
    assert changes["none"] > 5 * changes["targeted_weight"]
    for name, results in found.items():
        assert statistics.mean(result["accuracy"] for result in results) > 0.93, name
    assert "times as much" in toy.markdown(found)
