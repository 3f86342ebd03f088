"""Checks that run in two processes under DistributedDataParallel."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import td_plugin as td
from td_plugin.parametrization import masks_of

RECIPES: dict[str, tuple[td.Recipe, float | None]] = {
    "weight": (td.recipes.targeted_weight(0.5), 0.6),
    "unit": (td.recipes.targeted_unit(0.5), 0.5),
    "per weight": (td.recipes.targeted_unit(0.5, draw="weight"), 0.5),
    "dropconnect": (td.recipes.dropconnect(0.3), None),
    "global": (td.recipes.gradual_magnitude(rates=td.rates.Global(0.1)), 0.5),
    "surgery": (td.recipes.network_surgery(0.5), 0.5),
}
STEPS, BATCH = 4, 4


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))


def _batches(micro: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Of both processes together, the first half for the first."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(2 * BATCH, 10, generator=generator) for _ in range(STEPS * micro)]
    return [(x, torch.arange(len(x)) % 3) for x in rows]


def _part(x: Tensor, rank: int, world: int) -> Tensor:
    return x.chunk(world)[rank]


def _gathered(value: Tensor) -> list[Tensor]:
    out = [torch.empty_like(value) for _ in range(distributed.get_world_size())]
    distributed.all_gather(out, value)
    return out


def _assert_same(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        first, second = _gathered(value.contiguous())
        assert torch.equal(first, second), name


def _same_masks(model: nn.Module) -> bool:
    same = True
    for _, _, mask in masks_of(model):
        keep = torch.ones(1) if mask.keep is None else mask.keep.float().contiguous()
        first, second = _gathered(keep)
        same = same and torch.equal(first, second)
    return same


def _train(
    recipe: str, policy: Any, world: int, micro: int = 1, seen: list[bool] | None = None
) -> tuple[nn.Module, td.TargetedDropout]:
    value, level = RECIPES[recipe]
    model = _model()
    sparsifier = td.TargetedDropout(value, level, seed=7, rank_policy=policy)
    sparsifier.prepare(model)
    sparsifier.set_progress(1.0)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    rank = distributed.get_rank() if world > 1 else 0
    for x, y in _batches(micro):
        with sparsifier.training_step(micro) as block:
            if seen is not None:
                seen.append(_same_masks(model))
            with nullcontext() if block.last or world == 1 else wrapped.no_sync():
                loss = nn.functional.cross_entropy(wrapped(_part(x, rank, world)), _part(y, rank, world))
                (loss / micro).backward()
        if block.last:
            optimizer.step()
            optimizer.zero_grad()
    return model, sparsifier


def shared_masks_train_as_one_process(_: Path) -> None:
    for recipe in RECIPES:
        for micro in (1, 2):
            seen: list[bool] = []
            model, sparsifier = _train(recipe, "shared", 2, micro, seen)
            assert all(seen), recipe
            _assert_same(model)
            alone, _ = _train(recipe, "shared", 1, micro)
            for (name, here), there in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
                torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-4, msg=f"{recipe}, {name}")
            sparsifier.squash_mask()
            _assert_same(model)


def independent_masks_differ_and_weights_stay_equal(_: Path) -> None:
    for recipe in ("weight", "unit", "per weight", "dropconnect"):
        for micro in (1, 2):
            seen: list[bool] = []
            model, sparsifier = _train(recipe, "independent", 2, micro, seen)
            assert not any(seen), recipe
            _assert_same(model)
            model.eval()
            assert torch.equal(*_gathered(model(torch.ones(2, 10)).detach())), recipe
            for entry in sparsifier.state.values():
                assert torch.equal(*_gathered(entry["mask"].float())), recipe
            sparsifier.squash_mask()
            _assert_same(model)


def the_first_process_draws_what_one_alone_would(_: Path) -> None:
    keeps = []
    for policy in ("shared", "independent"):
        model = _model()
        sparsifier = td.TargetedDropout(RECIPES["weight"][0], 0.6, seed=7, rank_policy=policy)  # type: ignore[arg-type]
        sparsifier.prepare(model)
        sparsifier.step()
        keeps.append([copy.copy(mask.keep) for _, _, mask in masks_of(model)])
    same = all(torch.equal(a, b) for a, b in zip(*keeps, strict=True))  # type: ignore[arg-type]
    assert same == (distributed.get_rank() == 0)


def _refused(sparsifier: td.TargetedDropout, *words: str) -> None:
    try:
        sparsifier.step()
    except td.TdError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("nothing was said")


def a_process_that_has_come_apart_stops_all(_: Path) -> None:
    for recipe in ("weight", "unit", "global"):
        for policy in ("shared", "independent"):
            model, sparsifier = _train(recipe, policy, 2)
            if distributed.get_rank() == 1:
                with torch.no_grad():
                    weight = dict(model.named_parameters())["2.weight"]
                    weight[: len(weight) // 2] *= 100
                    weight[:, ::2] *= 1e-3
            sparsifier.step()  # not the first, not yet the hundredth
            sparsifier.step_count = 100
            _refused(sparsifier, "come apart", "weight", "[1]")


def the_tensor_that_differs_is_named(_: Path) -> None:
    model, sparsifier = _train("weight", "shared", 2)
    if distributed.get_rank() == 1:
        with torch.no_grad():
            dict(model.named_parameters())["2.weight"][3, 4] = 9.0
            dict(model.named_parameters())["2.weight"][3, 5] = 0.0
    sparsifier.step_count = 100
    _refused(sparsifier, "come apart", "2.weight", "1 of")


def one_process_that_cannot_go_on_stops_all(_: Path) -> None:
    model, sparsifier = _train("weight", "shared", 2)
    failing = distributed.get_rank() == 1
    if failing:
        with torch.no_grad():
            dict(model.named_parameters())["2.weight"][0, 0] = torch.nan
    sparsifier.step_count = 100
    _refused(sparsifier, *(("NaN", "2.weight") if failing else ("another process", "[1]")))


def other_seeds_and_other_targets_stop_all_at_once(_: Path) -> None:
    rank = distributed.get_rank()
    names = ["0.weight", "2.weight"]
    for seed, chosen, words in (
        (rank, names, ("come apart", "0.weight", "[1]")),
        (0, [names[rank]], ("same targets", ".weight")),
        (0, names[: 1 + rank], ("same targets", "[1, 2]")),
    ):
        sparsifier = td.TargetedDropout(RECIPES["weight"][0], 0.6, seed=seed)
        sparsifier.prepare(_model(), [{"tensor_fqn": name} for name in chosen])
        _refused(sparsifier, *words)
    quiet = td.TargetedDropout(RECIPES["weight"][0], 0.6, seed=rank, agree_every=0)
    quiet.prepare(_model())
    quiet.step()
