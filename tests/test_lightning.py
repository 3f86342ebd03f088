"""The Lightning callback; that it resumes bit for bit is shown by `test_loops.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import td_plugin as td
from td_plugin.integrations.lightning import TargetedDropoutCallback
from td_plugin.parametrization import masked_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


class Module(LightningModule):
    """Two layers that are pruned and one that makes the logits; remembers what each validation ran with."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
        self.validated: list[Tensor] = []
        self.draws: list[Tensor] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.draws.append(self.net[0].weight.detach().clone())
        return self.loss(batch)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.validated.append(self.net[0].weight.detach().clone())
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(rows: int = 12) -> DataLoader[Any]:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader([(row, int(row[0] > 0)) for row in x], batch_size=2)  # type: ignore[arg-type]


def fit(module: Module, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "logger": False,
    }
    trainer = Trainer(callbacks=list(callbacks), **{**settings, **options})
    trainer.fit(module, loader(), loader(4), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return trainer


def callback(**options: Any) -> TargetedDropoutCallback:
    return TargetedDropoutCallback(td.recipes.ramping_targeted_unit(0.9), 0.5, **options)


def silent(weight: Tensor) -> int:
    return int((weight == 0).all(1).sum())


def test_validation_and_the_end_are_the_pruned_module() -> None:
    module, mine = Module(), callback(module="net")
    fit(module, mine)
    assert len(module.validated) == 2 * 2 + 2  # and the sanity check, before the first draw
    assert {silent(weight) for weight in module.validated} == {6}
    assert {silent(weight) for weight in module.draws[:2]} == {0}, "the ramp starts at 0"
    assert type(module.net[0]) is nn.Linear and silent(module.net[0].weight) == 6
    assert mine.sparsifier is not None and mine.sparsifier.report().sparsity == 0.5
    assert mine.sparsifier.step_count == 6


@pytest.mark.parametrize(("every", "distinct"), [("micro_batch", 12), ("step", 6)])
def test_one_draw_per_batch_or_per_step(every: Any, distinct: int) -> None:
    module = Module()
    fit(module, TargetedDropoutCallback(td.recipes.targeted_weight(0.5), 0.5, mask_every=every))
    zeros = [tuple((weight == 0).flatten().tolist()) for weight in module.draws]
    assert len(set(zeros)) == distinct
    assert all((zeros[i] == zeros[i + 1]) == (every == "step") for i in range(0, 12, 2))


def test_checkpoints_are_plain(tmp_path: Path) -> None:
    module = Module()
    fit(module, callback(), ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1))
    (first, *_) = sorted(tmp_path.glob("*.ckpt"))
    checkpoint = torch.load(first, weights_only=True)  # noqa: TID251 - Lightning's own file
    assert list(checkpoint["state_dict"]) == list(Module().state_dict())
    ours = checkpoint["callbacks"]["TargetedDropoutCallback"]
    assert json.loads(json.dumps(ours)) == ours
    assert silent(checkpoint["state_dict"]["net.0.weight"]) == 0
    again = Module.load_from_checkpoint(first, weights_only=True)
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), checkpoint["state_dict"].values(), strict=True)
    )


def test_the_best_checkpoint_is_tested_as_it_was_judged(tmp_path: Path) -> None:
    module, best = Module(), ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = fit(module, callback(), best, max_epochs=4)
    (found,) = trainer.test(module, loader(4), ckpt_path="best", verbose=False, weights_only=True)
    assert best.best_model_score is not None
    assert found["val_loss"] == pytest.approx(float(best.best_model_score), abs=1e-6)
    assert type(module.net[0]) is nn.Linear and silent(module.net[0].weight) == 6
    other = Module(seed=9)  # in another process, with another module
    evaluates = Trainer(accelerator="cpu", callbacks=[callback(), best], logger=False, enable_progress_bar=False)
    (again,) = evaluates.test(other, loader(4), ckpt_path=best.best_model_path, verbose=False, weights_only=True)
    assert again == found


def test_the_last_checkpoint_of_a_run_holds_dense_weights(tmp_path: Path) -> None:
    fit(Module(), callback(), ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", save_last=True))
    for path in tmp_path.glob("*.ckpt"):
        state = torch.load(path, weights_only=True)  # noqa: TID251 - Lightning's own file
        assert silent(state["state_dict"]["net.0.weight"]) == 0
        assert state["callbacks"]["TargetedDropoutCallback"]["sparsifier"]["groups"]


def test_a_plain_checkpoint_goes_on_with_the_callback_added(tmp_path: Path) -> None:
    fit(Module(), ModelCheckpoint(tmp_path, filename="plain"), max_epochs=1)
    module, mine = Module(seed=5), callback(recipe_steps=4)
    fit(module, mine, ModelCheckpoint(tmp_path), ckpt_path=tmp_path / "plain.ckpt", max_epochs=2)
    assert mine.sparsifier is not None and mine.sparsifier.step_count == 6
    assert silent(module.net[0].weight) == 6


class Stops(Callback):
    """After the first epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


class Manual(Module):
    """Optimizes by itself, in every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimization_gives_what_accumulation_gives() -> None:
    class Halves(Manual):
        def loss(self, batch: list[Tensor]) -> Tensor:
            return super().loss(batch) / 2

    automatic, manual = Module(), Halves()
    fit(automatic, callback(recipe_steps=4))
    fit(manual, callback(recipe_steps=4), accumulate_grad_batches=1)
    assert all(torch.equal(a, b) for a, b in zip(automatic.parameters(), manual.parameters(), strict=True))
    with pytest.raises(td.TdError, match="the length of the run is not known"):
        fit(Manual(), callback(), accumulate_grad_batches=1)


def test_logs(tmp_path: Path) -> None:
    fit(Module(), callback(recipe_steps=4), logger=CSVLogger(tmp_path, version=0), log_every_n_steps=2)
    header, *lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    names = header.split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines]
    logged = [row for row in rows if row["td_drop_rate"]]
    assert [int(row["step"]) for row in logged] == [1, 3, 5]
    schedule = td.recipes.ramping_targeted_unit(0.9)
    for row, steps in zip(logged, (1, 3, 5), strict=True):
        done = min(steps / 4, 1.0)
        assert float(row["td_sparsity_level"]) == pytest.approx(0.5 * schedule.sparsity_schedule(done))
        assert float(row["td_drop_rate"]) == pytest.approx(0.9 * done)
        assert float(row["td_sparsity"]) == pytest.approx(0.5)
        assert 0 <= float(row["td_dropped"]) <= float(row["td_sparsity_level"]) + 1e-6


def test_a_prepared_module_is_adopted_and_can_stay_masked() -> None:
    module = Module()
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(0.5), 0.25, seed=7)
    sparsifier.prepare(module)
    mine = callback(squash=False)
    fit(module, mine)
    assert mine.sparsifier is sparsifier and masked_tensors(module)
    assert sparsifier.report().sparsity == pytest.approx(0.25, abs=0.01)


def test_a_second_fit_prepares_again() -> None:
    module, mine = Module(), callback()
    fit(module, mine)
    first = mine.sparsifier
    fit(module, mine)
    assert mine.sparsifier is not first and not masked_tensors(module)


def test_a_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    fit(Module(), callback(), ModelCheckpoint(tmp_path, filename="half"), max_epochs=1)
    other = TargetedDropoutCallback(td.recipes.targeted_weight(0.5), 0.5)
    with pytest.raises(td.TdError, match="another set-up"):
        fit(Module(), other, ModelCheckpoint(tmp_path), ckpt_path=tmp_path / "half.ckpt")


def test_resuming_with_another_level_is_said_and_holds(tmp_path: Path) -> None:
    fit(Module(), callback(), ModelCheckpoint(tmp_path, filename="half"), Stops())
    module, other = Module(), TargetedDropoutCallback(td.recipes.ramping_targeted_unit(0.9), 0.75, seed=3)
    with pytest.warns(UserWarning, match="sparsity_level 0.5 -> 0.75; seed 0 -> 3"):
        fit(module, other, ModelCheckpoint(tmp_path), ckpt_path=tmp_path / "half.ckpt")
    assert silent(module.net[0].weight) == 9


def test_a_frozen_mask_is_held_over_a_resume(tmp_path: Path) -> None:
    def mine() -> TargetedDropoutCallback:
        return TargetedDropoutCallback(td.recipes.targeted_weight(0.5), 0.5, ramp=td.Ramp(1, 2, 3, unit="steps"))

    whole = Module()
    fit(whole, mine())
    zeros = [weight == 0 for weight in whole.draws]
    assert not zeros[0].any() and not zeros[1].any(), "nothing goes before the ramp"
    assert all(torch.equal(zeros[6], later) for later in zeros[6:]), "two batches a step, frozen at the third"
    fit(Module(), mine(), ModelCheckpoint(tmp_path, filename="half"), Stops())
    resumed = Module(seed=9)
    fit(resumed, mine(), ModelCheckpoint(tmp_path), ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_two_callbacks_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit(Module(), callback(), callback())


def test_wrong_options_are_said() -> None:
    for options, what in (
        ({"recipe_steps": 0}, "recipe_steps"),
        ({"recipe_steps": 1.5}, "recipe_steps"),
        ({"mask_every": "epoch"}, "mask_every"),
        ({"eval_mask": "both"}, "eval_mask"),
    ):
        with pytest.raises(td.TdError, match=what):
            callback(**options)
    with pytest.raises(td.TdError, match=r"no such part.*encoder.*net"):
        fit(Module(), callback(module="encoder"))
    endless: dict[str, Any] = {"max_epochs": -1}
    with pytest.raises(td.TdError, match="the length of the run is not known"):
        fit(Module(), callback(), **endless)
