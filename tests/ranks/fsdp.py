"""Checks that run in two processes under FSDP2, against one process that holds the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard
from torch.utils.checkpoint import checkpoint

import td_plugin as td
from td_plugin.criteria import magnitude
from td_plugin.granularity import NM, WholeTensor
from td_plugin.parametrization import masks_of
from td_plugin.sharded import ShardedMask

RECIPES: dict[str, tuple[td.Recipe, float | None]] = {
    "weight": (td.recipes.targeted_weight(0.5), 0.6),
    "whole tensor": (td.Recipe(magnitude, WholeTensor(), 0.5), 0.6),
    "unit": (td.recipes.targeted_unit(0.5), 0.5),
    "unit, all members": (td.recipes.targeted_unit(0.5, members="all"), 0.5),
    "per weight": (td.recipes.targeted_unit(0.5, draw="weight"), 0.5),
    "2:4": (td.Recipe(magnitude, NM(), 0.5), None),
    "random": (td.recipes.random_weight(0.5), 0.5),
    "dropconnect": (td.recipes.dropconnect(0.3), None),
    "magnitude": (td.recipes.magnitude(), 0.5),
}
STEPS, BATCH = 4, 4
FULL = StateDictOptions(full_state_dict=True)


def _model(seed: int = 0) -> nn.Module:
    """Rows that two processes cannot halve, and shards whose bits do not end with a byte."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 25), nn.ReLU(), nn.Linear(25, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def _config() -> list[dict[str, Any]]:
    return [{"tensor_fqn": f"{index}.weight"} for index in (0, 2, 4)]


def _shard(model: nn.Module, **options: Any) -> nn.Module:
    for layer in (model[2], model[4]):  # type: ignore[index]
        fully_shard(layer, **options)
    fully_shard(model, **options)
    assert all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in model.parameters())
    return model


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2 * BATCH, 12, generator=generator), torch.arange(2 * BATCH) % 3


class _Run:
    def __init__(self, recipe: str, sharded: bool, seed: int = 0, **options: Any) -> None:
        value, level = RECIPES[recipe]
        self.model = _model(seed)
        if sharded:
            _shard(self.model, **options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.sparsifier = td.TargetedDropout(value, level, seed=7)
        self.sparsifier.prepare(self.model, None if "2:4" not in recipe else [{"tensor_fqn": "4.weight"}])
        self.sparsifier.set_progress(1.0)
        self.sharded = sharded

    def train(self, first: int, end: int) -> _Run:
        self.model.train()
        for step in range(first, end):
            x, y = _batch(step)
            if self.sharded:
                x, y = (part.chunk(2)[distributed.get_rank()] for part in (x, y))
            with self.sparsifier.training_step():
                nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def weights(self) -> dict[str, Tensor]:
        return {name: _whole(value) for name, value in self.model.state_dict().items()}


def _whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def _assert_close(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    assert one.keys() == other.keys(), what
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4, msg=f"{what}: {name}")


def a_sharded_run_is_a_whole_run(_: Path) -> None:
    for recipe in RECIPES:
        sharded, alone = _Run(recipe, True), _Run(recipe, False)
        masks = [mask for _, _, mask in masks_of(sharded.model)]
        assert all(isinstance(mask, ShardedMask) for mask in masks), recipe
        sharded.sparsifier.step()
        alone.sparsifier._switches.agreed = True  # it has no partner
        alone.sparsifier.step()
        for mask, (_, _, other) in zip(masks, masks_of(alone.model), strict=True):
            one, two = mask.keep, other.keep
            assert (one is None) == (two is None), recipe
            assert one is None or two is None or torch.equal(one, two), (recipe, mask.fqn)
        for run in (sharded, alone):
            run.sparsifier.step_count = 0
            run.train(0, STEPS).model.eval()
        _assert_close(sharded.weights(), alone.weights(), recipe)
        x, _y = _batch(99)
        torch.testing.assert_close(sharded.model(x), alone.model(x), atol=1e-5, rtol=1e-4, msg=recipe)
        assert sharded.sparsifier.report() == alone.sparsifier.report(), recipe
        for run in (sharded, alone):
            run.sparsifier.squash_mask()
        one, two = sharded.weights(), alone.weights()
        _assert_close(one, two, recipe)
        assert all(torch.equal(one[name] == 0, two[name] == 0) for name in one), recipe
        torch.testing.assert_close(sharded.model(x), alone.model(x), atol=1e-5, rtol=1e-4, msg=recipe)


def a_checkpoint_of_shards_resumes_to_the_bit_with_plain_keys(directory: Path) -> None:
    for recipe in ("weight", "unit", "random"):
        straight = _Run(recipe, True).train(0, STEPS)
        half = _Run(recipe, True).train(0, 2)
        weights, moments = get_state_dict(half.model, half.optimizer)
        assert weights.keys() == _model().state_dict().keys()
        assert all(isinstance(value, DTensor) for value in weights.values())
        place = directory / recipe
        save({"model": weights, "optimizer": moments}, checkpoint_id=str(place))
        ours = json.dumps(half.sparsifier.state_dict())
        again = _Run(recipe, True, seed=9)
        weights, moments = get_state_dict(again.model, again.optimizer)
        saved = {"model": weights, "optimizer": moments}
        load(saved, checkpoint_id=str(place))
        set_state_dict(again.model, again.optimizer, model_state_dict=weights, optim_state_dict=moments)
        again.sparsifier.load_state_dict(json.loads(ours))
        again.train(2, STEPS)
        one, two = straight.weights(), again.weights()
        assert all(torch.equal(one[name], two[name]) for name in one), recipe


def a_full_state_dict_goes_in_and_out_with_plain_keys(directory: Path) -> None:
    run = _Run("weight", True).train(0, 2)
    weights, _ = get_state_dict(run.model, run.optimizer, options=FULL)
    here = run.weights()
    assert here.keys() == weights.keys() == _model().state_dict().keys()
    assert all(type(value) is Tensor and torch.equal(value, here[name]) for name, value in weights.items())
    other = _Run("weight", True, seed=9)
    _, moments = get_state_dict(other.model, other.optimizer, options=FULL)
    set_state_dict(other.model, other.optimizer, model_state_dict=dict(weights), optim_state_dict=moments, options=FULL)
    assert all(torch.equal(value, here[name]) for name, value in other.weights().items())
    alone = _model(9)
    alone.load_state_dict(weights, strict=True)


def evaluation_sees_the_weights_of_now(_: Path) -> None:
    x, _y = _batch(99)
    for recipe in ("weight", "unit"):
        run, alone = _Run(recipe, True).train(0, 2), _Run(recipe, False)
        alone.sparsifier._switches.agreed = True
        alone.train(0, 2)
        for each in (run, alone):
            each.model.eval()
            each.model(x)
        weights = _model(5).state_dict()
        other, _ = get_state_dict(run.model, run.optimizer, options=FULL)
        assert other.keys() == weights.keys()
        _, moments = get_state_dict(run.model, run.optimizer, options=FULL)
        set_state_dict(run.model, run.optimizer, model_state_dict=dict(weights), optim_state_dict=moments, options=FULL)
        run.model.reshard()  # type: ignore[operator]  # else FSDP itself goes on with the copy of its last forward
        alone.model.load_state_dict(weights)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(run.model(x), alone.model(x), atol=1e-5, rtol=1e-4)
        with run.sparsifier.dense(), alone.sparsifier.dense():
            torch.testing.assert_close(run.model(x), alone.model(x), atol=1e-5, rtol=1e-4)
        run.train(2, STEPS)  # after an evaluation that left whole weights behind


def bf16_and_checkpoints_drop_what_float32_does(_: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    bf16, plain = _Run("weight", True, mp_policy=policy), _Run("weight", True)
    for run in (bf16, plain):
        run.sparsifier.step()
    for (_, _, one), (_, _, two) in zip(masks_of(bf16.model), masks_of(plain.model), strict=True):
        assert one.keep is not None and two.keep is not None and torch.equal(one.keep, two.keep)
    before = bf16.weights()
    bf16.train(1, 3)
    assert all(not torch.equal(value, before[name]) for name, value in bf16.weights().items())
    for reentrant in (True, False):
        one, two = _Run("weight", True), _Run("weight", True)
        inner = two.model[2].forward  # type: ignore[index]

        def again(x: Tensor, inner: Any = inner, reentrant: bool = reentrant) -> Tensor:
            return checkpoint(inner, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

        two.model[2].forward = again  # type: ignore[index]
        one.train(0, 2)
        two.train(0, 2)
        first, second = one.weights(), two.weights()
        assert all(torch.equal(first[name], second[name]) for name in first), reentrant


def a_process_keeps_the_bits_of_its_own_rows(_: Path) -> None:
    run = _Run("weight", True).train(0, 1)
    run.model.eval()
    for _, _, mask in masks_of(run.model):
        assert isinstance(mask, ShardedMask) and mask.keep is not None
        rows = -(-mask._bits.shape[0] // 2) if distributed.get_rank() == 0 else mask._bits.shape[0] // 2
        assert mask.held_bytes() == 2 * -(-rows * mask._bits.shape[1] // 8), mask.fqn  # of training, of evaluation


def _raises(action: Any, *words: str) -> None:
    try:
        action()
    except td.TdError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"{words}: nothing was said")


def what_cannot_be_done_is_refused(_: Path) -> None:
    for recipe, words in {
        td.gates.hard_concrete(): "gate",
        td.recipes.fisher(): "evidence",
        td.recipes.gradual_magnitude(rates=td.rates.Global(0.1)): "at once",
        td.recipes.network_surgery(): "remembered",
    }.items():
        model = _shard(_model())
        _raises(lambda m=model, r=recipe: td.TargetedDropout(r, 0.5).prepare(m), "sharded", words, ".weight", "Shard")
        assert masks_of(model) == []
    model = _shard(_model())
    own = td.TargetedDropout(RECIPES["weight"][0], 0.5, rank_policy="independent")
    _raises(lambda: own.prepare(model), "independent", "0.weight")
    late = _model()
    sparsifier = td.TargetedDropout(RECIPES["weight"][0], 0.5)
    sparsifier.prepare(late)
    _shard(late)
    _raises(sparsifier.step, "after prepare", "weight", "fully_shard")


def a_tensor_that_differs_stops_all(_: Path) -> None:
    run = _Run("unit", True)
    run.sparsifier._switches.seed = distributed.get_rank()
    _raises(run.sparsifier.step, "come apart", "weight")


def a_sharded_run_ends_as_a_smaller_file(directory: Path) -> None:
    from td_plugin.export import shrink, to_onnx, verify

    run = _Run("unit", True).train(0, STEPS)
    run.sparsifier.squash_mask()
    weights, _ = get_state_dict(run.model, run.optimizer, options=FULL)
    if distributed.get_rank() == 0:
        model = _model(9)
        model.load_state_dict(weights, strict=True)
        model.eval()
        x, _y = _batch(3)
        small = shrink(model, example_inputs={"input": x})
        torch.testing.assert_close(small(x), model(x), atol=1e-5, rtol=1e-4)
        assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
        path = directory / "small.onnx"
        to_onnx(small, path, {"input": x})
        assert verify(small, path, [{"input": x}]).batches == 1
    distributed.barrier()
