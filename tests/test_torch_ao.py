"""The traps of torch.ao.pruning 2.13, one test each: what its sparsifiers and schedulers get wrong or leave out.

Named as in our survey of torch.ao.pruning: c = BaseSparsifier, s = schedulers, u = structured sparsifier, x = other.

| trap | in torch.ao.pruning | here |
|---|---|---|
| c01 | the keys of groups and state | the same keys; masks are bool and derived, not stored |
| c02 | order of the automatic groups | registration order |
| c03 | finds exact nn.Linear only | subclasses, Conv1d/2d, HF Conv1D, attention's out_proj; a root layer by name |
| c04 | a typo is an AttributeError | TdError with the nearest name |
| c05 | a second prepare stacks masks | TdError, from a second sparsifier too |
| c06 | load empties the caller's dict | left as it was |
| c07 | saving after loading loses the masks | save, load, save gives the same |
| c08 | state_dict is live | a JSON-able snapshot |
| c09 | loading into a fresh sparsifier fails | TdError: prepare first, or what differs |
| c10 | strict=False fails on unknown names | loads what is common, warns of the rest |
| c11 | loading fewer groups orphans masks | groups stay; squash leaves nothing |
| c12 | masks of any shape and dtype load | there are no masks in the state |
| c13 | a copied sparsifier cannot step | it steps, on its own copy of the model |
| c14 | a copied model is cut off from its mask | the copy evaluates, trains and bakes by itself; no pickles |
| c15 | keys of the model change | plain keys, strict loads both ways |
| c16 | squash leaves groups behind | empty afterwards, idempotent, prepare works again |
| c17 | squash removes foreign parametrizations | such layers are skipped and named; a later one is a TdError |
| c18 | sparse_params overwritten, half squashed | every tensor's values kept; a wrong key changes nothing |
| c19 | masks stale after .to() | derived from the weight as it is |
| c20 | float32 masks break bf16 | any dtype |
| c21 | scores the masked weight, nothing returns | scores the dense weight |
| c22 | no difference between train and eval | samples in training, the shipped mask in evaluation |
| c23 | gradient of dropped entries is zero (fact) | the same, exactly |
| c24 | structured prepare replaces biases | every Parameter stays itself |
| c25 | tied heads are pruned and cannot be saved | skipped with the reason; save, load, tie_weights work |
| c26 | one tensor in two modules gets two masks | skipped, or refused by name |
| c27 | the enable_mask_update flag | honoured; update_mask once per group |
| c28 | no global ranking | not offered either: a pool ends at its row, tensor or layer (no test) |
| c29 | each read of the weight draws | drawn in step(), read as often as you like |
| c30 | checkpointing recomputes with another mask | gradients equal |
| s01 | CubicSL ignores delta_t | torch's own; it drives us by its formula, ours has no delta_t |
| s02 | CubicSL cannot go down | TargetedDropoutScheduler can |
| s03 | resume order resets the level | either order |
| s04 | LambdaSL's state holds the lambda | two whole numbers |
| s05 | KeyError, AttributeError on wrong arguments | TdError |
| s06 | patches sparsifier.step; a copy shares it | a copy steps itself |
| s07 | levels above 1 fail in kthvalue | TdError naming the tensor, from γ and α |
| s08 | too few levels are cut off | one level per group, each to its own target |
| u01 | biases get no gradient | they do |
| u02 | bias broadcast over the sequence | the mask is on the bias itself |
| u03 | forward zeroes the bias for good | the dense bias is never touched |
| u04 | squash leaves _bias and hooks | the original keys, no hooks |
| u05 | units are always dim 0 | dim 1 for HF Conv1D and transposed convolutions |
| u06-u10, u14 | prune(): residuals, padding, norms, act(0) | `shrink` has its own tests (no test here) |
| u11, u12 | masks are one-way | lowering γ brings units back |
| u13 | negative or full levels | γ in [0, 1): no unit is dropped at 0, one remains at 0.99 |
| x01 | FakeSparsity breaks compile(fullgraph) | compile, export, fx tracing and assignment work |
| x02 | prepare is quadratic in the modules | linear |
| x03 | a float mask doubles the weight | bool; one entry per unit for units |
| x04 | type(module) changes | to a subclass of the same interface; back after squash |
| x05 | attention and LSTM weights | masked in their forward |
| x06 | frozen weights stay frozen (fact) | the same, also under autocast |
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning import CubicSL, LambdaSL
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM
from transformers.pytorch_utils import Conv1D

import td_plugin as td
from td_plugin.parametrization import bake, masked_tensors

WEIGHT, UNIT = td.recipes.targeted_weight(0.5), td.recipes.targeted_unit(0.5)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def prepared(
    model: nn.Module, recipe: td.Recipe = WEIGHT, level: float = 0.5, config: list[dict[str, Any]] | None = None
) -> td.TargetedDropout:
    sparsifier = td.TargetedDropout(recipe, level)
    sparsifier.prepare(model, config)
    return sparsifier


def shipped(sparsifier: td.TargetedDropout) -> dict[str, Tensor]:
    return {name: entry["mask"].clone() for name, entry in sparsifier.state.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 8)), generator=torch.Generator().manual_seed(3))


def test_c01_config_keys() -> None:
    model = mlp()
    sparsifier = prepared(model)
    group = sparsifier.groups[0]
    assert {"module", "module_fqn", "sparsity_level", "tensor_fqn", "tensor_name"} <= set(group)
    assert group["module"] is model[0] and group["tensor_fqn"] == "0.weight" and group["sparsity_level"] == 0.5
    assert set(sparsifier.state) == {"0.weight", "2.weight"}
    mask = sparsifier.state["0.weight"]["mask"]
    assert mask.dtype == torch.bool and mask.shape == (16, 8)
    assert mask.sum() == 64


def test_c02_group_order() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.Linear(4, 4),
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        nn.Linear(4, 4),
        nn.Linear(4, 2),
    )
    names = [group["tensor_fqn"] for group in prepared(model).groups]
    assert names == ["0.weight", "1.weight", "2.0.weight", "2.1.weight", "3.weight"]


def test_c03_exact_type_only() -> None:
    class OwnLinear(nn.Linear):
        pass

    layers = [OwnLinear(8, 8), nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), Conv1D(4, 4), nn.MultiheadAttention(8, 2)]
    model = nn.ModuleList([*layers, nn.Linear(8, 2)])
    names = [group["tensor_fqn"] for group in prepared(model).groups]
    assert names == ["0.weight", "1.weight", "2.weight", "3.weight", "4.out_proj.weight"]
    root = nn.Linear(8, 4)
    prepared(root, config=[{"tensor_fqn": "weight"}])
    assert (root.eval().weight == 0).sum(1).tolist() == [4] * 4


@pytest.mark.parametrize(("name", "nearest"), [("0.wieght", "0.weight"), ("22.weight", "2.weight"), ("", "weight")])
def test_c04_bad_fqn(name: str, nearest: str) -> None:
    model = mlp()
    with pytest.raises(td.TdError, match=rf"no such parameter.*nearest: '.*{nearest}'"):
        prepared(model, config=[{"tensor_fqn": name}])
    assert masked_tensors(model) == []


def test_c05_prepare_twice() -> None:
    model = mlp()
    sparsifier = prepared(model)
    with pytest.raises(td.TdError, match="called before"):
        sparsifier.prepare(model)
    with pytest.raises(td.TdError, match="carries masks already"):
        prepared(model)
    assert len(sparsifier.groups) == 2 and masked_tensors(model) == ["0.weight", "2.weight"]
    sparsifier.squash_mask()
    assert (model[0].weight == 0).sum() == 64


def test_c06_load_pops_mask() -> None:
    model = mlp()
    sparsifier = prepared(model)
    sparsifier.step()
    saved = sparsifier.state_dict()
    before, masks = copy.deepcopy(saved), shipped(sparsifier)
    for _ in range(2):
        other = prepared(mlp())
        other.load_state_dict(saved)
        assert saved == before and same(shipped(other), masks)
    assert same(shipped(sparsifier), masks)


def test_c07_save_load_save() -> None:
    first = prepared(mlp())
    first.step()
    first.redraw()
    second = prepared(mlp())
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert torch.equal(second.model[0].weight, first.model[0].weight)  # the same sample, too


def test_c08_state_dict_live() -> None:
    sparsifier = prepared(mlp())
    saved = sparsifier.state_dict()
    text = json.dumps(saved)
    sparsifier.step()
    sparsifier.groups[0]["sparsity_level"] = 0.25
    assert json.dumps(saved) == text != json.dumps(sparsifier.state_dict())
    assert json.loads(text) == saved


def test_c09_load_fresh() -> None:
    saved = prepared(mlp()).state_dict()
    fresh = td.TargetedDropout(WEIGHT)
    with pytest.raises(td.TdError, match=r"no model.*prepare\(model\)"):
        fresh.load_state_dict(saved)
    fewer = prepared(mlp(), config=[{"tensor_fqn": "0.weight"}])
    with pytest.raises(td.TdError, match=r"another set-up.*2\.weight"):
        fewer.load_state_dict(saved)
    with pytest.raises(td.TdError, match="another set-up.*targeted_weight"):
        prepared(mlp(), UNIT).load_state_dict(saved)
    with pytest.raises(td.TdError, match="not a state"):
        fewer.load_state_dict({"state": {}, "groups": []})


def test_c10_load_strict_false() -> None:
    sparsifier = prepared(mlp())
    saved = sparsifier.state_dict()
    saved["groups"][0]["sparsity_level"] = 0.25
    saved["groups"][1]["tensor_fqn"] = "9.weight"
    with pytest.raises(td.TdError, match=r"9\.weight"):
        sparsifier.load_state_dict(saved)
    assert [group["sparsity_level"] for group in sparsifier.groups] == [0.5, 0.5]
    with pytest.warns(UserWarning, match=r"2\.weight, 9\.weight"):
        sparsifier.load_state_dict(saved, strict=False)
    assert [group["sparsity_level"] for group in sparsifier.groups] == [0.25, 0.5]


def test_c11_load_drops_groups() -> None:
    model = mlp()
    sparsifier = prepared(model)
    smaller = prepared(mlp(), config=[{"tensor_fqn": "0.weight"}]).state_dict()
    with pytest.warns(UserWarning, match=r"2\.weight"):
        sparsifier.load_state_dict(smaller, strict=False)
    assert len(sparsifier.groups) == 2
    sparsifier.squash_mask()
    assert masked_tensors(model) == [] and [type(m) for m in model] == [type(m) for m in mlp()]


def test_c12_load_shape_device_dtype() -> None:
    sparsifier = prepared(mlp())
    sparsifier.step()
    json.dumps(sparsifier.state_dict())  # numbers and strings: no tensor that could have another shape
    with pytest.raises(td.TdError, match="cannot be assigned"):
        sparsifier.state = {"0.weight": {"mask": torch.ones(3, 3)}}
    assert sparsifier.state["0.weight"]["mask"].shape == (16, 8)


def test_c13_getstate() -> None:
    model = mlp()
    sparsifier = prepared(model)
    sparsifier.step()
    twin = copy.deepcopy(sparsifier)
    assert twin.enable_mask_update and twin.model is not model
    assert all(group["module"] is twin.model.get_submodule(group["module_fqn"]) for group in twin.groups)
    before = model[0].weight.clone()
    twin.step()
    assert (twin.step_count, sparsifier.step_count) == (2, 1)
    assert torch.equal(model[0].weight, before) and not torch.equal(twin.model[0].weight, before)
    twin.squash_mask()
    assert masked_tensors(model) and not masked_tensors(twin.model)


@pytest.mark.parametrize("recipe", [WEIGHT, UNIT], ids=["weight", "unit"])
def test_c14_deepcopy_model(recipe: td.Recipe) -> None:
    model = mlp()
    sparsifier = prepared(model, recipe)
    sparsifier.step()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x()), model(x()))  # the sample comes along
    model.eval(), twin.eval()
    logits = model(x())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.normal_()
    assert not torch.equal(twin(x()), logits)
    assert bake(twin) == len(masked_tensors(model)) and masked_tensors(twin) == []
    assert torch.equal(model(x()), logits)
    sparsifier.squash_mask()
    assert torch.equal(model(x()), logits)


@pytest.mark.parametrize("recipe", [WEIGHT, UNIT], ids=["weight", "unit"])
def test_c15_model_state_dict(recipe: td.Recipe) -> None:
    plain, model = mlp(), mlp()
    sparsifier = prepared(model, recipe)
    sparsifier.step()
    saved = model.state_dict()
    assert list(saved) == list(plain.state_dict())
    assert all(torch.equal(saved[key], value) for key, value in plain.state_dict().items())  # dense values
    model.load_state_dict(saved)
    mlp(1).load_state_dict(saved)
    other = mlp(2)
    prepared(other, recipe)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other.eval()(x()), model.eval()(x()))


def test_c16_squash_leaves_groups() -> None:
    model = mlp()
    sparsifier = prepared(model)
    saved = sparsifier.state_dict()
    sparsifier.squash_mask()
    assert sparsifier.groups == [] and sparsifier.state == {}
    zeroed = model[0].weight.clone()
    sparsifier.squash_mask()
    assert torch.equal(model[0].weight, zeroed)
    for call in (sparsifier.step, sparsifier.redraw, lambda: sparsifier.load_state_dict(saved)):
        with pytest.raises(td.TdError, match=r"prepare\(model\)"):
            call()
    sparsifier.prepare(model)
    assert len(sparsifier.groups) == 2


def test_c17_squash_removes_foreign() -> None:
    model = mlp()
    weight_norm(model[0])
    before = model(x())
    sparsifier = prepared(model)
    assert [group["tensor_fqn"] for group in sparsifier.groups] == ["2.weight"]
    assert "already parametrized" in sparsifier.report().skipped["0.weight"]
    with sparsifier.dense():
        assert torch.equal(model(x()), before)
    sparsifier.squash_mask()
    assert nn.utils.parametrize.is_parametrized(model[0], "weight") and type(model[2]) is nn.Linear
    with pytest.raises(td.TdError, match="no such parameter"):
        prepared(model, config=[{"tensor_fqn": "0.weight"}])


def test_c17_foreign_parametrization_after_prepare() -> None:
    model = mlp()
    sparsifier = prepared(model)
    weight_norm(model[0])
    with pytest.raises(td.TdError, match=r"0\.weight"):
        sparsifier.step()
    with pytest.raises(td.TdError, match=r"0\.weight"):
        sparsifier.squash_mask()
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    sparsifier.squash_mask()
    assert type(model[0]) is nn.Linear and (model[0].weight == 0).sum() == 64


class TwoWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))


def test_c18_params_to_keep() -> None:
    model = mlp()
    sparsifier = prepared(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(td.TdError, match=r"no such key.*2\.weight.*nope"):
        sparsifier.squash_mask(params_to_keep=("sparsity_level",), params_to_keep_per_layer={"2": ("nope",)})
    assert same(dict(model.state_dict()), before) and masked_tensors(model) == ["0.weight", "2.weight"]
    sparsifier.squash_mask(params_to_keep=("sparsity_level",), params_to_keep_per_layer={"2": ("drop_rate",)})
    assert model[0].sparse_params == {"sparsity_level": 0.5}
    assert model[2].sparse_params == {"sparsity_level": 0.5, "drop_rate": 0.5}


def test_c18_two_tensors_on_one_module() -> None:
    model = nn.Sequential(TwoWeights())
    config = [{"tensor_fqn": "0.a", "sparsity_level": 0.25}, {"tensor_fqn": "0.b", "sparsity_level": 0.75}]
    sparsifier = prepared(model, config=config)
    sparsifier.squash_mask(params_to_keep=("sparsity_level",))
    assert ((model[0].a == 0).sum(), (model[0].b == 0).sum()) == (4, 12)
    kept = str(model[0].sparse_params)
    assert "0.25" in kept and "0.75" in kept  # the second tensor's values do not overwrite the first's


def test_c19_stale_alias_after_to() -> None:
    model = mlp()
    sparsifier = prepared(model)
    before = shipped(sparsifier)
    model.double()
    assert same(shipped(sparsifier), before) and sparsifier.report().zeros == 64 + 96
    with torch.no_grad():
        model.state_dict(keep_vars=True)["0.weight"].copy_(x(16, 8))
    assert not torch.equal(sparsifier.state["0.weight"]["mask"], before["0.weight"])
    assert sparsifier.report().zeros == 64 + 96


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_c20_bf16(dtype: torch.dtype) -> None:
    for recipe in (WEIGHT, UNIT):
        model = mlp().to(dtype)
        sparsifier = prepared(model, recipe)
        sparsifier.step()
        assert model[0].weight.dtype == dtype
        model(x().to(dtype)).sum().backward()
        assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
        assert model.eval()(x().to(dtype)).dtype == dtype


@pytest.mark.parametrize("recipe", [WEIGHT, UNIT], ids=["weight", "unit"])
def test_c21_sticky(recipe: td.Recipe) -> None:
    model = mlp()
    sparsifier = prepared(model, recipe)
    sparsifier.step()
    dropped = ~sparsifier.state["0.weight"]["mask"]
    with torch.no_grad():
        dict(model.named_parameters())["0.weight"][dropped] = 100.0
    sparsifier.step()
    assert (model.eval()[0].weight[dropped] == 100.0).all()  # all of them are back


def test_c22_train_eval() -> None:
    model = mlp()
    sparsifier = prepared(model)
    sparsifier.step()
    sample = model.train()[0].weight == 0
    whole = model.eval()[0].weight == 0
    assert whole.sum() == 64 and 0 < sample.sum() < 64 and not (sample & ~whole).any()


def test_c23_grad() -> None:
    model = mlp()
    prepared(model).step()
    dropped = model[0].weight == 0
    model(x()).square().sum().backward()
    gradient = dict(model.named_parameters())["0.weight"].grad
    assert gradient is not None and (gradient[dropped] == 0).all() and (gradient[~dropped] != 0).any()


@pytest.mark.parametrize("recipe", [WEIGHT, UNIT], ids=["weight", "unit"])
def test_c24_optimizer_identity(recipe: td.Recipe) -> None:
    model = mlp()
    before = dict(model.named_parameters())
    sparsifier = prepared(model, recipe)
    for _ in range(2):
        now = dict(model.named_parameters())
        assert list(now) == list(before) and all(now[name] is before[name] for name in before)
        sparsifier.squash_mask()


def tiny_masked_lm() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=8,
        )
    )  # fmt: skip


@pytest.mark.parametrize("recipe", [WEIGHT, UNIT], ids=["weight", "unit"])
def test_c25_tied(recipe: td.Recipe, tmp_path: Path) -> None:
    model = tiny_masked_lm()
    sparsifier = prepared(model, recipe)
    assert "tied" in sparsifier.report().skipped["cls.predictions.decoder.weight"]
    with pytest.raises(td.TdError, match="tied"):
        prepared(tiny_masked_lm(), config=[{"tensor_fqn": "cls.predictions.decoder.weight"}])
    sparsifier.step()
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded, info = BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tied = model.bert.embeddings.word_embeddings.weight
    before = tied.clone()
    sparsifier.squash_mask()
    assert model.cls.predictions.decoder.weight is tied and torch.equal(tied, before)
    other = prepared(loaded, recipe)
    other.squash_mask()
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_c26_tied_both() -> None:
    model = mlp()
    model.append(nn.Linear(8, 16))
    model[5].weight = model[0].weight
    model.append(nn.Linear(16, 2))
    sparsifier = prepared(model)
    assert [group["tensor_fqn"] for group in sparsifier.groups] == ["2.weight", "4.weight"]
    assert "tied" in sparsifier.report().skipped["0.weight"] and "tied" in sparsifier.report().skipped["5.weight"]
    sparsifier.squash_mask()
    for name in ("0.weight", "5.weight"):
        with pytest.raises(td.TdError, match="tied"):
            prepared(model, config=[{"tensor_fqn": name}])


def test_c27_step_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    update = td.TargetedDropout.update_mask

    def counted(self: td.TargetedDropout, **config: Any) -> None:
        calls.append(config["tensor_fqn"])
        update(self, **config)

    monkeypatch.setattr(td.TargetedDropout, "update_mask", counted)
    model = mlp()
    sparsifier = prepared(model)
    sparsifier.step()
    sparsifier.step(use_path=False)
    assert calls == ["0.weight", "2.weight"] * 2
    before = model[0].weight.clone()
    sparsifier.enable_mask_update = False
    sparsifier.step()
    sparsifier.redraw()
    assert len(calls) == 4 and sparsifier.step_count == 2 and torch.equal(model[0].weight, before)


def test_c29_multi_access() -> None:
    model = mlp()
    sparsifier = prepared(model)
    sparsifier.step()
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    reads = [model[0].weight for _ in range(3)]
    first, second = model(x()), model(x())
    assert torch.equal(reads[0], reads[1]) and torch.equal(reads[1], reads[2]) and torch.equal(first, second)
    sparsifier.step()
    sparsifier.redraw()
    assert torch.equal(torch.get_rng_state(), generator)  # nor does a draw touch the global generator
    assert not torch.equal(model[0].weight, reads[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", [WEIGHT, UNIT], ids=["weight", "unit"])
def test_c30_checkpointing(recipe: td.Recipe, reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = mlp()
        prepared(model, recipe).step()
        batch = x().requires_grad_()
        out = checkpoint(model, batch, use_reentrant=reentrant) if checkpointed else model(batch)
        out.square().sum().backward()
        gradients.append([batch.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_s01_cubic_drives_us() -> None:
    model = mlp()
    sparsifier = prepared(model, level=0.8)
    scheduler = CubicSL(sparsifier, init_sl=0.0, delta_t=1, total_t=5)
    for t in range(8):
        expected = 0.8 * (1 - (1 - min(t, 5) / 5) ** 3)
        assert [group["sparsity_level"] for group in sparsifier.groups] == pytest.approx([expected] * 2)
        sparsifier.step()
        assert (model.eval()[0].weight == 0).sum(1).tolist() == [int(expected * 8 + 1e-9)] * 16
        model.train()
        scheduler.step()


def test_s02_cubic_desc() -> None:
    down = td.schedules.Piecewise(((0.0, 1.0), (1.0, 0.25)))
    recipe = td.Recipe(td.criteria.magnitude, td.granularity.WholeTensor(), 0.5, sparsity_schedule=down)
    model = mlp()
    sparsifier = prepared(model, recipe, level=0.8)
    scheduler = td.TargetedDropoutScheduler(sparsifier, recipe_steps=4)
    zeros = []
    for _ in range(5):
        sparsifier.step()
        zeros.append(int((model.eval()[0].weight == 0).sum()))
        model.train()
        scheduler.step()
    assert zeros == [int(0.8 * f * 128 + 1e-9) for f in (1, 0.8125, 0.625, 0.4375, 0.25)]


@pytest.mark.parametrize("order", ["build first", "restore first"])
def test_s03_sched_resume(order: str) -> None:
    recipe = td.recipes.ramping_targeted_weight(0.9)

    def run(steps: int, sparsifier: td.TargetedDropout, scheduler: td.TargetedDropoutScheduler) -> list[list[Any]]:
        seen = []
        for _ in range(steps):
            sparsifier.step()
            group, model = sparsifier.groups[0], sparsifier.model
            seen.append([group["sparsity_level"], group["drop_rate"], (model[0].weight != 0).tolist()])
            scheduler.step()
        return seen

    whole = prepared(mlp(), recipe)
    expected = run(8, whole, td.TargetedDropoutScheduler(whole, 6))
    first = prepared(mlp(), recipe)
    scheduler = td.TargetedDropoutScheduler(first, 6)
    run(3, first, scheduler)
    states = json.loads(json.dumps([first.state_dict(), scheduler.state_dict()]))
    second = prepared(mlp(), recipe)
    if order == "restore first":
        second.load_state_dict(states[0])
        scheduler = td.TargetedDropoutScheduler(second, 6)
        scheduler.load_state_dict(states[1])
    else:
        scheduler = td.TargetedDropoutScheduler(second, 6)
        scheduler.load_state_dict(states[1])
        second.load_state_dict(states[0])
    assert second.groups[0]["target_sparsity_level"] == 0.5
    assert run(5, second, scheduler) == expected[3:]


def test_s04_lambda_state() -> None:
    sparsifier = prepared(mlp(), td.recipes.ramping_targeted_unit())
    scheduler = td.TargetedDropoutScheduler(sparsifier, 10)
    assert scheduler.state_dict() == {"last_epoch": 0, "recipe_steps": 10}
    with pytest.raises(td.TdError, match="not a state"):
        scheduler.load_state_dict({"last_epoch": 3})


def test_s05_needs_sparsity_level() -> None:
    for wrong in (object(), td.TargetedDropout(WEIGHT)):
        with pytest.raises(td.TdError, match="prepared TargetedDropout"):
            td.TargetedDropoutScheduler(wrong, 10)  # type: ignore[arg-type]
    for steps in (0, -3, 2.5, True):
        with pytest.raises(td.TdError, match="recipe_steps"):
            td.TargetedDropoutScheduler(prepared(mlp()), steps)  # type: ignore[arg-type]


def test_s06_sched_wraps_step() -> None:
    sparsifier = prepared(mlp())
    scheduler = LambdaSL(sparsifier, lambda t: 0.5)
    twin = copy.deepcopy(sparsifier)
    twin.step()
    assert (twin.step_count, sparsifier.step_count) == (1, 0)
    sparsifier.step()
    scheduler.step()
    assert (twin.step_count, sparsifier.step_count) == (1, 1)
    assert twin.groups[0]["sparsity_level"] == sparsifier.groups[0]["sparsity_level"] == 0.25


@pytest.mark.parametrize("factor", [10.0, 2.0, -0.1, float("nan")])
def test_s07_lambda_over1(factor: float) -> None:
    model = mlp()
    sparsifier = prepared(model)
    LambdaSL(sparsifier, lambda t: factor)
    with pytest.raises(td.TdError, match=r"sparsity_level.*\[0, 1\).*0\.weight"):
        sparsifier.step()
    sparsifier.groups[0].update(sparsity_level=0.5, drop_rate=1.5)
    with pytest.raises(td.TdError, match=r"drop_rate.*0\.weight"):
        sparsifier.step()


def test_s08_zip_trunc() -> None:
    config = [{"tensor_fqn": "0.weight", "sparsity_level": 0.25}, {"tensor_fqn": "2.weight", "drop_rate": 0.9}]
    sparsifier = prepared(mlp(), td.recipes.ramping_targeted_weight(0.5), level=0.75, config=config)
    scheduler = td.TargetedDropoutScheduler(sparsifier, 2)
    assert len(scheduler.get_last_sl()) == len(sparsifier.groups) == 2
    for level in (0.0, 0.95, 1.0, 1.0):
        assert scheduler.get_last_sl() == pytest.approx([0.25 * level, 0.75 * level])
        sparsifier.step()
        scheduler.step()
    assert [group["drop_rate"] for group in sparsifier.groups] == [0.5, 0.9]


def test_u01_bias_no_grad() -> None:
    model = mlp()
    prepared(model, UNIT).step()
    silent = model[0].bias == 0
    assert 0 < silent.sum() < 8
    model(x(64, 8)).square().sum().backward()
    gradient = dict(model.named_parameters())["0.bias"].grad
    assert gradient is not None and (gradient[silent] == 0).all() and (gradient[~silent] != 0).all()


@pytest.mark.parametrize("length", [16, 5])
def test_u02_bias_axis(length: int) -> None:
    model = mlp()
    sparsifier = prepared(model, UNIT)
    sparsifier.step()
    model.eval()
    keep = sparsifier.state["0.bias"]["mask"]
    batch = x(2, length, 8)
    dense = nn.functional.linear(batch, *(p.detach() for p in model[0]._parameters.values()))
    torch.testing.assert_close(model[0](batch), dense * keep)


def test_u03_bias_destroyed() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    sparsifier = prepared(model, UNIT)
    for _ in range(3):
        sparsifier.step()
        model.train()(x())
        model.eval()(x())
    assert same(dict(model.state_dict()), dict(before))


def test_u04_squash() -> None:
    plain, model = mlp(), mlp()
    sparsifier = prepared(model, UNIT)
    sparsifier.step()
    model.eval()
    logits = model(x())
    sparsifier.squash_mask()
    assert list(model.state_dict()) == list(plain.state_dict()) and torch.equal(model(x()), logits)
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in plain.modules()]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(x()), plain.eval()(x()))


# A layer on its own: nothing reads its units, which prepare() rightly points out.
@pytest.mark.filterwarnings("ignore:the outputs of 1 layers:UserWarning")
@pytest.mark.parametrize(
    ("layer", "dim", "shape"),
    [
        (nn.Linear(4, 6), 0, (2, 4)),
        (Conv1D(6, 4), 1, (2, 4)),
        (nn.Conv2d(4, 6, 3), 0, (2, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3), 1, (2, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3), 1, (2, 4, 5, 5)),
    ],
    ids=["Linear", "Conv1D", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"],
)
@pytest.mark.parametrize("recipe", [WEIGHT, UNIT], ids=["weight", "unit"])
def test_u05_axis_conv1d(recipe: td.Recipe, layer: nn.Module, dim: int, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(copy.deepcopy(layer))
    nn.init.normal_(model[0].bias)
    prepared(model, recipe, config=[{"tensor_fqn": "0.weight"}]).step()
    zero = (model.eval()[0].weight == 0).movedim(dim, 0).flatten(1)
    out = model(x(*shape)).movedim(-1 if isinstance(layer, (nn.Linear, Conv1D)) else 1, 0).flatten(1)
    if recipe is UNIT:
        assert zero.all(1).sum() == zero.any(1).sum() == 3
        assert torch.equal((out == 0).all(1), zero.all(1))  # the unit's output is silent, bias included
    else:
        assert zero.sum(1).tolist() == [zero.shape[1] // 2] * 6


@pytest.mark.parametrize("recipe", [WEIGHT, UNIT], ids=["weight", "unit"])
def test_u11_u12_masks_are_not_one_way(recipe: td.Recipe) -> None:
    model = mlp()
    sparsifier = prepared(model, recipe, level=0.75)
    sparsifier.step()
    assert (model.eval()[0].weight == 0).sum() == 96
    sparsifier.groups[0]["sparsity_level"] = 0.25
    model.train()
    sparsifier.step()
    low = model.eval()[0].weight == 0
    assert low.sum() == 32
    with torch.no_grad():
        dict(model.named_parameters())["0.weight"].copy_(x(16, 8))
    assert (model[0].weight == 0).sum() == 32 and not torch.equal(model[0].weight == 0, low)


def test_u13_edge_levels() -> None:
    for level, units in ((0.0, 0), (0.06, 0), (0.0625, 1), (0.3, 4), (0.99, 15)):
        model = mlp()
        prepared(model, UNIT, level=level).step()
        assert (model.eval()[0].weight == 0).all(1).sum() == units
        assert model(x()).shape == (4, 3)
    for level in (-0.1, 1.0, 1.5, float("nan"), True, "0.5"):
        with pytest.raises(td.TdError, match=r"sparsity_level.*\[0, 1\)"):
            td.TargetedDropout(UNIT, level)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", [WEIGHT, UNIT], ids=["weight", "unit"])
def test_x01_export_and_trace(recipe: td.Recipe) -> None:
    model = mlp()
    sparsifier = prepared(model, recipe)
    sparsifier.step()
    model.eval()
    logits = model(x())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x()), logits)
    assert torch.equal(torch.export.export(model, (x(),)).module()(x()), logits)
    assert torch.equal(torch.fx.symbolic_trace(model)(x()), logits)


def test_x01_assign() -> None:
    model = mlp()
    sparsifier = prepared(model)
    model[0].weight = nn.Parameter(x(16, 8))
    assert sparsifier.report().zeros == 160 and (model.eval()[0].weight == 0).sum(1).tolist() == [4] * 16
    with pytest.raises(TypeError, match="cannot assign"):  # as on a plain module
        model[0].weight = x(16, 8)


def test_x02_prepare_is_linear_in_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = 0
    walk = nn.Module.named_modules

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal visits
        visits += 1
        return walk(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    counts = []
    for layers in (50, 100, 200):
        visits = 0
        prepared(nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers))))
        counts.append(visits)
    assert counts[2] - counts[1] <= 2.2 * (counts[1] - counts[0])


def test_x03_memory() -> None:
    for recipe, held in ((WEIGHT, 16 * 8 // 8), (UNIT, 16)):  # a bit per weight, a byte per unit
        model = mlp()
        sparsifier = prepared(model, recipe)
        sparsifier.step()
        keep = sparsifier._targets[0].masks[0].keep
        assert keep is not None and keep.untyped_storage().nbytes() == held


def test_x04_isinstance() -> None:
    model = mlp()
    sparsifier = prepared(model)
    assert isinstance(model[0], nn.Linear) and "Linear" in type(model[0]).__name__
    assert str(model[0]).endswith("Linear(in_features=8, out_features=16, bias=True)")
    assert type(model[4]) is nn.Linear  # not masked, not touched
    sparsifier.squash_mask()
    assert all(type(m) is nn.Linear for m in model[::2])
    assert len(prepared(model).groups) == 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["out_proj.weight", "in_proj_weight"])
def test_x05_attention(name: str, training: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    plain = copy.deepcopy(attention)
    model = nn.ModuleDict({"attention": attention})
    sparsifier = prepared(model, config=[{"tensor_fqn": f"attention.{name}"}])
    sparsifier.step()
    model.train(training), plain.train(training)
    tensor = attention.get_submodule(name.rpartition(".")[0]).__getattribute__(name.rpartition(".")[2])
    with torch.no_grad():
        plain.get_parameter(name).copy_(tensor)
        assert (plain.get_parameter(name) == 0).any()
        masked, expected = (m(x(2, 3, 8), x(2, 3, 8), x(2, 3, 8))[0] for m in (attention, plain))
    torch.testing.assert_close(masked, expected)
    masked, expected = (m(x(2, 3, 8), x(2, 3, 8), x(2, 3, 8))[0] for m in (attention, plain))
    torch.testing.assert_close(masked, expected)


@pytest.mark.parametrize("training", [True, False])
def test_x05_lstm(training: bool) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 8)
    plain = copy.deepcopy(lstm)
    model = nn.ModuleDict({"lstm": lstm})
    sparsifier = prepared(model, config=[{"tensor_fqn": "lstm.weight_ih_l0"}, {"tensor_fqn": "lstm.weight_hh_l0"}])
    for _ in range(2):
        sparsifier.step()
        model.train(training)
        with torch.no_grad():
            plain.weight_ih_l0.copy_(lstm.weight_ih_l0)
            plain.weight_hh_l0.copy_(lstm.weight_hh_l0)
        assert (plain.weight_ih_l0 == 0).any()
        torch.testing.assert_close(lstm(x(3, 2, 4))[0], plain(x(3, 2, 4))[0])


@pytest.mark.parametrize("recipe", [WEIGHT, UNIT], ids=["weight", "unit"])
def test_x06_autocast_requires_grad(recipe: td.Recipe) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="targets are frozen"):
        sparsifier = prepared(model, recipe)
    sparsifier.step()
    assert not model[0].weight.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert names == {"2.weight", "2.bias", "4.weight", "4.bias"}
    sparsifier.squash_mask()
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
