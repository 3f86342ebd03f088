"""The public behaviour of TargetedDropout. What concerns traps of torch.ao.pruning is in test_torch_ao.py."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import td_plugin as td
from td_plugin.attachment import attached_sparsifier
from td_plugin.bits import flags_of
from td_plugin.parametrization import bake, masked_tensors, masks_of

WEIGHT, UNIT = td.recipes.targeted_weight(0.5), td.recipes.targeted_unit(0.5)
both = pytest.mark.parametrize("recipe", [WEIGHT, UNIT], ids=["weight", "unit"])


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def make(
    recipe: td.Recipe = WEIGHT, level: float = 0.5, config: list[dict[str, Any]] | None = None, **options: Any
) -> tuple[nn.Sequential, td.TargetedDropout]:
    model = mlp()
    sparsifier = td.TargetedDropout(recipe, level, **options)
    sparsifier.prepare(model, config)
    return model, sparsifier


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 8)), generator=torch.Generator().manual_seed(3))


def dense(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def reads(model: nn.Sequential) -> dict[str, Tensor]:
    """Every parameter as the layers read it now, masks applied."""
    return {name: getattr(model[int(name[0])], name[2:]).detach().clone() for name in dense(model)}


def perturb(model: nn.Module, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def pruned(model: nn.Module, recipe: td.Recipe = WEIGHT, level: float = 0.5) -> nn.Module:
    """A plain model with the same dense weights, squashed: the reference for what evaluation must compute."""
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    sparsifier = td.TargetedDropout(recipe, level)
    sparsifier.prepare(plain)
    sparsifier.squash_mask()
    return plain.eval()


# ---- errors of set-up


@pytest.mark.parametrize("level", [1.0, -0.01, 2, float("nan"), float("inf"), "0.5", True])
def test_gamma_outside_its_range(level: Any) -> None:
    with pytest.raises(td.TdError, match=r"sparsity_level \(γ\).*\[0, 1\)"):
        td.TargetedDropout(WEIGHT, level)


@pytest.mark.parametrize("rate", [1.01, -0.01, float("nan"), "0.5", True])
def test_alpha_outside_its_range(rate: Any) -> None:
    with pytest.raises(td.TdError, match=r"drop_rate \(α\).*\[0, 1\]"):
        td.recipes.targeted_weight(rate)


def test_alpha_of_one_prunes_but_what_is_rescaled_cannot_all_go() -> None:
    assert td.recipes.targeted_weight(1.0).drop_rate == 1.0
    with pytest.raises(td.TdError, match=r"drop_rate \(α\).*\[0, 1\).*dropconnect"):
        td.recipes.dropconnect(1.0)
    with pytest.raises(td.TdError, match=r"drop_rate must be a fraction in \[0, 1\).*0\.weight"):
        make(td.recipes.dropconnect(), config=[{"tensor_fqn": "0.weight", "drop_rate": 1.0}])


@pytest.mark.parametrize(("key", "value"), [("sparsity_level", 1.0), ("drop_rate", 1.5)])
def test_an_override_outside_its_range_names_key_and_tensor(key: str, value: float) -> None:
    with pytest.raises(td.TdError, match=rf"{key}.*2\.weight.*{value}"):
        make(config=[{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight", key: value}])


def test_wrong_arguments() -> None:
    with pytest.raises(td.TdError, match="not a recipe"):
        td.TargetedDropout("targeted_weight")  # type: ignore[arg-type]
    with pytest.raises(td.TdError, match="not a recipe"):
        td.TargetedDropout(td.recipes.targeted_weight)  # type: ignore[arg-type]
    with pytest.raises(td.TdError, match="unknown eval_mask"):
        td.TargetedDropout(WEIGHT, eval_mask="prunned")  # type: ignore[arg-type]
    with pytest.raises(td.TdError, match="unknown sampler"):
        td.Recipe(td.criteria.magnitude, td.granularity.OutputRow(), sampler="unit")  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [["0.weight"], {"tensor_fqn": "0.weight"}, "0.weight", [None]])
def test_a_config_that_is_no_list_of_dicts(config: Any) -> None:
    with pytest.raises(td.TdError, match="tensor_fqn"):
        make(config=config)


@both
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"tensor_fqn": "2.wieght"}, r"no such parameter; where: 2\.wieght; fix: nearest: '2\.weight'"),
        ({"tensor_fqn": "0.weight", "sparsity": 0.5}, r"unknown key.*0\.weight.*sparsity.*nearest: 'sparsity_level'"),
        ({"sparsity_level": 0.5}, r"names no tensor.*tensor_fqn"),
        ({"tensor_fqn": "0.bias"}, r"two or more dimensions.*0\.bias.*biases follow their units"),
    ],
)
def test_wrong_config_entries(recipe: td.Recipe, entry: dict[str, Any], message: str) -> None:
    model = mlp()
    sparsifier = td.TargetedDropout(recipe)
    with pytest.raises(td.TdError, match=message):
        sparsifier.prepare(model, [entry])
    assert masked_tensors(model) == [] and sparsifier.groups == []
    sparsifier.prepare(model)  # a failed prepare leaves nothing behind


@both
def test_a_tensor_asked_for_twice(recipe: td.Recipe) -> None:
    with pytest.raises(td.TdError, match=r"asked for twice.*0\.weight"):
        make(recipe, config=[{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}, {"tensor_fqn": "0.weight"}])


@both
def test_tied_tensors_are_refused_by_name(recipe: td.Recipe) -> None:
    model = mlp()
    model.append(nn.Linear(8, 16))
    model[5].weight = model[0].weight
    with pytest.raises(td.TdError, match=r"tied.*0\.weight"):
        td.TargetedDropout(recipe).prepare(model, [{"tensor_fqn": "0.weight"}])


@both
@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(3, 3), nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 2))])
def test_nothing_to_prune(recipe: td.Recipe, model: nn.Module) -> None:
    with pytest.raises(td.TdError, match=rf"nothing to prune in {type(model).__name__}"):
        td.TargetedDropout(recipe).prepare(model)


def test_an_empty_config_prunes_nothing_and_says_so() -> None:
    with pytest.raises(td.TdError, match="nothing to prune"):
        make(config=[])


def test_using_it_before_prepare() -> None:
    sparsifier = td.TargetedDropout(WEIGHT)
    for call in (sparsifier.step, sparsifier.redraw, sparsifier.report):
        with pytest.raises(td.TdError, match=r"prepare\(model\)"):
            call()
    _, sparsifier = make()
    with pytest.raises(td.TdError, match=r"redraw\(\) before the first step\(\)"):
        sparsifier.redraw()


# ---- which tensors


def test_the_default_leaves_out_logits_and_embeddings() -> None:
    model = nn.ModuleDict(
        {"tok_embedding": nn.Linear(8, 8), "patch_embeddings": nn.Conv2d(3, 8, 2), "body": nn.Linear(8, 8)}
        | {"head": nn.Linear(8, 2)}
    )
    sparsifier = td.TargetedDropout(WEIGHT)
    sparsifier.prepare(model)
    assert masked_tensors(model) == ["body.weight"]
    assert sparsifier.report().skipped == {
        "tok_embedding.weight": "embedding",
        "patch_embeddings.weight": "embedding",
        "head.weight": "makes the logits",
    }


def test_what_is_skipped_by_default_can_be_named() -> None:
    model, _ = make(config=[{"tensor_fqn": "4.weight", "sparsity_level": 0.25}])
    assert (model.eval()[4].weight == 0).sum(1).tolist() == [3] * 3


def test_overrides_per_tensor() -> None:
    config = [{"tensor_fqn": "0.weight", "sparsity_level": 0.25}, {"tensor_fqn": "2.weight", "drop_rate": 0.0}]
    model, sparsifier = make(level=0.75, config=config)
    sparsifier.step()
    assert [(g["sparsity_level"], g["drop_rate"]) for g in sparsifier.groups] == [(0.25, 0.5), (0.75, 0.0)]
    assert (model[0].weight == 0).any() and not (model[2].weight == 0).any()
    assert (model.eval()[2].weight == 0).sum(1).tolist() == [12] * 12


def test_a_unit_takes_its_bias_along() -> None:
    model, sparsifier = make(UNIT, level=0.75)
    sparsifier.step()
    for training in (True, False):
        model.train(training)
        silent = (model[0].weight == 0).all(1)
        assert torch.equal(model[0].bias == 0, silent) and (silent.sum() == 12 or training)
        assert torch.equal((model[0](x()) == 0).all(0), silent)


def test_biases_and_norms_go_with_their_unit_but_are_not_ranked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4, 2)
    )
    sparsifier = td.TargetedDropout(UNIT, 0.5)
    sparsifier.prepare(model)
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    norms = dense(model)["0.weight"].flatten(1).norm(dim=1)
    expected = norms > norms.sort().values[3]
    for scale in (0.0, 100.0):
        with torch.no_grad():
            for name in names[1:]:
                dense(model)[name].copy_(scale * torch.arange(8.0))
        assert all(torch.equal(sparsifier.state[n]["mask"].flatten(1).all(1), expected) for n in names[:1])
        assert all(torch.equal(sparsifier.state[n]["mask"], expected) for n in names[1:])
    model.eval()
    assert (model[:3](x(2, 3, 7, 7)).transpose(0, 1).flatten(1)[~expected] == 0).all()


# ---- the report


def test_report() -> None:
    config = [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight", "sparsity_level": 0.25, "drop_rate": 0.1}]
    _, sparsifier = make(level=0.75, config=config)
    sparsifier.step()
    report = sparsifier.report()
    first, second = report.rows
    assert (first.tensor, first.kind, first.groups, first.dropped) == ("0.weight", "weights", 128, 96)
    assert (second.elements, second.zeros, second.sparsity_level, second.drop_rate) == (192, 48, 0.25, 0.1)
    assert (report.recipe, report.step, report.elements, report.zeros) == ("targeted_weight", 1, 320, 144)
    assert report.sparsity == pytest.approx(0.45)
    data = report.to_dict()
    assert json.loads(json.dumps(data))["zeros"] == 144
    assert data["rows"][0]["tensor"] == "0.weight"


@both
def test_report_counts_what_squash_zeroes(recipe: td.Recipe) -> None:
    model, sparsifier = make(recipe, level=0.6)
    report = sparsifier.report()
    sparsifier.squash_mask()
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert report.zeros == zeros and sparsifier.report() == report  # the last one stays available


def test_report_of_units() -> None:
    _, sparsifier = make(UNIT, level=0.75)
    row = sparsifier.report().rows[0]
    assert (row.kind, row.groups, row.dropped, row.elements, row.zeros) == ("units", 16, 12, 16 * 9, 12 * 9)


def test_report_prints_as_a_table() -> None:
    _, sparsifier = make(level=0.75)
    lines = str(sparsifier.report()).splitlines()
    assert lines[0] == "recipe targeted_weight, step 0"
    assert lines[1].split() == ["tensor", "kind", "dropped", "zeros", "sparsity", "γ", "α"]
    assert lines[3].split() == ["0.weight", "weights", "96/128", "96/128", "0.750", "0.750", "0.500"]
    assert lines[5].split() == ["total", "240/320", "0.750"]
    assert lines[6:] == ["left alone:", "  4.weight: makes the logits"]
    assert len({len(line) for line in lines[1:4]}) == 1  # aligned


# ---- training


@both
def test_the_forward_is_that_of_explicitly_masked_weights(recipe: td.Recipe) -> None:
    """Value and gradient against a plain model: no rescaling, zero where dropped, the plain gradient elsewhere."""
    model, sparsifier = make(recipe, level=0.75)
    plain = mlp()
    for _ in range(3):
        sparsifier.step()
        masks = {name: value != 0 for name, value in reads(model).items()}
        assert any(not mask.all() for mask in masks.values())
        leaves = {name: p.detach().clone().requires_grad_() for name, p in plain.named_parameters()}
        expected = functional_call(plain, {name: leaf * masks[name] for name, leaf in leaves.items()}, (x(),))
        expected.square().sum().backward()
        model.zero_grad()
        out = model(x())
        out.square().sum().backward()
        assert torch.equal(out, expected)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and (parameter.grad[~masks[name]] == 0).all()
            assert torch.equal(parameter.grad, leaves[name].grad)


def test_nothing_is_dropped_before_the_first_step() -> None:
    model, _ = make()
    assert torch.equal(model(x()), mlp()(x()))


@both
def test_dropped_entries_come_back(recipe: td.Recipe) -> None:
    model, sparsifier = make(recipe, level=0.75)
    seen = torch.zeros(16, 8, dtype=torch.bool)
    for _ in range(30):
        sparsifier.step()
        seen |= model[0].weight != 0
    assert seen.all()


def test_share_dropped_is_gamma_times_alpha() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 400), nn.Linear(400, 2))
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(0.66), 0.75)
    sparsifier.prepare(model)
    sparsifier.step()
    share = (model[0].weight == 0).float().mean().item()
    assert abs(share - 0.75 * 0.66) < 0.012  # 40,000 weights: five standard deviations


def test_step_ranks_anew_and_redraw_does_not() -> None:
    model, sparsifier = make(td.recipes.targeted_weight(0.5), level=0.5)
    sparsifier.step()
    first = model[0].weight != 0
    sparsifier.redraw()
    second = model[0].weight != 0
    assert not torch.equal(first, second) and (sparsifier.step_count, sparsifier.micro_step) == (1, 1)
    candidates = ~sparsifier.state["0.weight"]["mask"]
    assert not ((~first | ~second) & ~candidates).any()
    sparsifier.step()
    assert (sparsifier.step_count, sparsifier.micro_step) == (2, 0)


def test_draws_depend_on_seed_step_and_micro_step_alone() -> None:
    def samples(seed: int, global_seed: int) -> list[list[Any]]:
        model, sparsifier = make(seed=seed)
        torch.manual_seed(global_seed)
        found = []
        for _ in range(2):
            sparsifier.step()
            found.append((model[0].weight != 0).tolist())
            torch.rand(global_seed)
            model.eval()(x())
            model.train()
            sparsifier.redraw()
            found.append((model[0].weight != 0).tolist())
        return found

    one = samples(0, 1)
    assert one == samples(0, 2) and one != samples(1, 1)
    assert all(one[i] != one[j] for i in range(4) for j in range(i))


@both
def test_two_forwards_with_a_redraw_between_then_one_backward(recipe: td.Recipe) -> None:
    model, sparsifier = make(recipe)
    plain, leaves = mlp(), {name: p.detach().clone().requires_grad_() for name, p in mlp().named_parameters()}
    total, expected = torch.zeros(()), torch.zeros(())
    for micro in range(2):
        sparsifier.redraw() if micro else sparsifier.step()
        batch = x(3 + micro, 8)
        total = total + model(batch).square().sum()
        masks = {name: value != 0 for name, value in reads(model).items()}
        view = {name: leaf * masks[name] for name, leaf in leaves.items()}
        expected = expected + functional_call(plain, view, (batch,)).square().sum()
    total.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, leaves[name].grad)


@both
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(recipe: td.Recipe, reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model, sparsifier = make(recipe)
        for _ in range(2):
            sparsifier.step()
            batch = x().requires_grad_()
            hidden = checkpoint(model[:4], batch, use_reentrant=reentrant) if checkpointed else model[:4](batch)
            model[4](hidden).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_to_another_dtype_between_steps(recipe: td.Recipe, dtype: torch.dtype) -> None:
    model, sparsifier = make(recipe)
    sparsifier.step()
    model.to(dtype)
    for _ in range(2):
        model.train()(x().to(dtype)).sum().backward()
        assert all(p.grad.dtype == dtype for p in model.parameters())
        sparsifier.step()
    assert model.eval()(x().to(dtype)).dtype == dtype


@both
def test_nan_weights_are_an_error(recipe: td.Recipe) -> None:
    for value in (float("nan"), float("inf")):
        model, sparsifier = make(recipe)
        sparsifier.step()
        with torch.no_grad():
            dense(model)["2.weight"][3, 3] = value
        for call in (sparsifier.step, sparsifier.report, sparsifier.squash_mask, model.eval):
            with pytest.raises(td.TdError, match=r"NaN or infinity.*2\.weight"):
                call()
        assert masked_tensors(model) and (dense(model)["0.weight"] != 0).all()  # nothing was baked half-way


# ---- evaluation


@both
def test_evaluation_is_what_squash_leaves(recipe: td.Recipe) -> None:
    model, sparsifier = make(recipe, level=0.75)
    sparsifier.step()
    logits = model.eval()(x())
    assert torch.equal(logits, model(x())) and torch.equal(logits, pruned(model, recipe, 0.75)(x()))
    sparsifier.squash_mask()
    assert torch.equal(model(x()), logits)


@both
@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_evaluation_follows_the_weights(recipe: td.Recipe, grad: type[torch.no_grad]) -> None:
    model, sparsifier = make(recipe)
    sparsifier.step()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def check() -> None:
        with grad():
            assert torch.equal(model(x()), pruned(model, recipe)(x()))

    model.eval()
    check()
    model(x()).square().sum().backward()
    optimizer.step()  # while in eval mode
    check()
    model.load_state_dict(mlp(4).state_dict())
    check()
    model.load_state_dict(mlp(5).state_dict(), assign=True)
    check()
    perturb(model)
    check()
    model.to(torch.float64).to(torch.float32)
    check()


def test_evaluation_follows_data_edits_at_the_next_eval() -> None:
    """Edits through `.data` (weight averaging does that) leave no sign on the tensor; `eval()` must look again."""
    model, _ = make()
    model.eval()
    with torch.no_grad():
        model(x())
        for parameter, other in zip(model.parameters(), mlp(6).parameters(), strict=True):
            parameter.data.copy_(other.data)
        model.eval()
        assert torch.equal(model(x()), pruned(model)(x()))


def test_evaluation_follows_data_edits_made_while_training() -> None:
    model, _ = make()
    model.eval()
    with torch.no_grad():
        model(x())
        model.train()
        for parameter, other in zip(model.parameters(), mlp(6).parameters(), strict=True):
            parameter.data.copy_(other.data)
        model.eval()
        assert torch.equal(model(x()), pruned(model)(x()))


def test_evaluation_follows_data_edits_made_inside_dense() -> None:
    model, sparsifier = make()
    model.eval()
    with torch.no_grad():
        model(x())
        with sparsifier.dense():
            model[0].weight.data.copy_(x(16, 8))
        assert torch.equal(model(x()), pruned(model)(x()))


def test_gradients_flow_in_evaluation_also_after_inference_mode() -> None:
    model, _ = make()
    model.eval()
    perturb(model)
    with torch.inference_mode():
        model(x())  # the first to see the new weights
    model(x()).square().sum().backward()
    gradient = dense(model)["0.weight"].grad
    assert gradient is not None and (gradient[model[0].weight == 0] == 0).all() and (gradient != 0).any()


def test_a_forward_in_evaluation_reuses_the_masked_weight() -> None:
    """`generate` runs hundreds of forwards: none of them may rank or mask anew while the weights stay."""
    calls = 0

    def counted(evidence: td.Evidence) -> Tensor:
        nonlocal calls
        calls += 1
        return td.criteria.magnitude(evidence)

    model, _ = make(td.Recipe(counted, td.granularity.OutputRow(), 0.5, name="counted"))
    model.eval()
    with torch.no_grad():
        model(x())
        first, settled = model[0].weight, calls
        for _ in range(5):
            model(x())
        assert calls == settled and model[0].weight.data_ptr() == first.data_ptr()  # the same tensor, not a new product
        perturb(model)
        model(x())
        assert calls == settled + 2


@both
def test_dense_context(recipe: td.Recipe) -> None:
    model, sparsifier = make(recipe)
    plain = mlp()
    sparsifier.step()
    for training in (True, False):
        model.train(training)
        masked = model(x())
        with sparsifier.dense():
            assert torch.equal(model(x()), plain(x())) and model[0].weight is dense(model)["0.weight"]
            with sparsifier.dense():
                pass
            assert torch.equal(model(x()), plain(x()))  # nests
        assert torch.equal(model(x()), masked) and not torch.equal(masked, plain(x()))
    with pytest.raises(RuntimeError, match="inside"), sparsifier.dense():
        raise RuntimeError("inside")
    assert torch.equal(model(x()), masked)


@both
def test_eval_mask_dense(recipe: td.Recipe) -> None:
    model, sparsifier = make(recipe, eval_mask="dense")
    sparsifier.step()
    assert not torch.equal(model(x()), mlp()(x()))
    assert torch.equal(model.eval()(x()), mlp()(x()))
    reference = pruned(model, recipe)
    sparsifier.squash_mask()
    assert torch.equal(model(x()), reference(x()))


def test_evaluation_at_the_target_of_a_ramp() -> None:
    model, sparsifier = make(td.recipes.ramping_targeted_weight(), level=0.75)
    sparsifier.set_progress(0.25)
    assert sparsifier.report().sparsity < 0.5
    sparsifier.evaluate_at_target()
    assert sparsifier.report().sparsity == 0.75
    assert torch.equal(model.eval()(x()), pruned(model, level=0.75)(x()))
    sparsifier.squash_mask()
    assert (model[0].weight == 0).sum() == 96


def test_set_progress_is_clamped() -> None:
    _, sparsifier = make(td.recipes.ramping_targeted_weight(0.9), level=0.75)
    for progress, level, rate in ((-1, 0, 0), (0.5, 0.7125, 0.45), (1, 0.75, 0.9), (7, 0.75, 0.9)):
        sparsifier.set_progress(progress)
        group = sparsifier.groups[0]
        assert (group["sparsity_level"], group["drop_rate"]) == pytest.approx((level, rate))


# ---- edits


EDITS: dict[str, Callable[[Tensor], object]] = {
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(torch.ones(16, 8)),
    "[0] =": lambda w: w.__setitem__(0, 1.0),
    "of a row": lambda w: w[0].fill_(1.0),
    "of .data": lambda w: w.data.mul_(2.0),
    "of a view": lambda w: w.detach().view(-1).add_(1.0),
    "*=": lambda w: w.__imul__(2.0),
    "+=": lambda w: w.__iadd__(2.0),
    ".data =": lambda w: setattr(w, "data", torch.ones(16, 8)),
    "nn.init": nn.init.normal_,
    "out=": lambda w: torch.mul(w, 2.0, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "foreach with a list": lambda w: torch._foreach_add_([w], [torch.ones(16, 8)]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("training", [True, False])
def test_in_place_edits_of_the_masked_value_are_refused(edit: Callable[[Tensor], object], training: bool) -> None:
    model, sparsifier = make()
    sparsifier.step()
    model.train(training)
    with pytest.raises(td.TdError, match=r"in-place edit.*0\.weight.*sparsifier\.dense"), torch.no_grad():
        edit(model[0].weight)
    assert torch.equal(dense(model)["0.weight"], mlp()[0].weight)


def test_in_place_edits_inside_dense_reach_the_parameter() -> None:
    model, sparsifier = make()
    sparsifier.step()
    with sparsifier.dense(), torch.no_grad():
        nn.init.constant_(model[0].weight, 2.0)
        model[2].weight[0] = 5.0
        model[2].weight.data.mul_(2.0)
    assert (dense(model)["0.weight"] == 2).all() and (dense(model)["2.weight"][0] == 10).all()


def test_reading_the_masked_value_is_like_reading_any_tensor() -> None:
    model, sparsifier = make()
    sparsifier.step()
    weight = model[0].weight
    plain = weight.detach().clone()
    assert type(weight + 1) is Tensor and type(plain) is Tensor
    assert (weight * 2).sum() == (plain * 2).sum() and weight.shape == (16, 8) and weight.dtype == torch.float32
    assert (weight.numpy(force=True) == plain.numpy()).all() and weight.tolist() == plain.tolist()
    plain.mul_(3.0)  # a copy may be edited
    assert "0.0000" in repr(weight)


# ---- keys, identity, copies


@both
def test_state_dict_keys_order_and_identity(recipe: td.Recipe) -> None:
    plain, model = mlp(), mlp()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters)
    sparsifier = td.TargetedDropout(recipe)
    sparsifier.prepare(model)
    sparsifier.step()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert dict(model[0].named_parameters()).keys() == {"weight", "bias"}
    model(x()).sum().backward()
    optimizer.step()  # built before prepare, still valid
    assert not torch.equal(dense(model)["0.weight"], plain[0].weight)
    sparsifier.squash_mask()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@both
def test_strict_loads_both_ways(recipe: td.Recipe) -> None:
    model, sparsifier = make(recipe)
    sparsifier.step()
    plain = mlp(1)
    assert not any(plain.load_state_dict(model.state_dict()))
    assert not any(model.load_state_dict(mlp(2).state_dict()))
    assert torch.equal(dense(model)["0.weight"], mlp(2)[0].weight)


@both
def test_squashing_a_copy_leaves_the_original_and_the_other_way_round(recipe: td.Recipe) -> None:
    model, sparsifier = make(recipe)
    sparsifier.step()
    logits = model.eval()(x())
    twin = copy.deepcopy(model)
    bake(twin)
    assert type(twin[0]) is nn.Linear and masked_tensors(model) and torch.equal(model(x()), logits)
    other = copy.deepcopy(model)
    sparsifier.squash_mask()
    assert type(model[0]) is nn.Linear and masked_tensors(other) and torch.equal(other(x()), logits)
    perturb(other)
    assert torch.equal(other(x()), pruned(other, recipe)(x())) and torch.equal(model(x()), logits)
    assert bake(other) and masked_tensors(other) == []


def test_a_copy_keeps_its_own_dense_switch() -> None:
    model, sparsifier = make()
    sparsifier.step()
    model.eval()
    twin = copy.deepcopy(model)
    with sparsifier.dense():
        assert not torch.equal(twin(x()), model(x()))
    assert torch.equal(twin(x()), model(x()))


def test_the_sparsifier_of_a_model() -> None:
    model, sparsifier = make()
    assert attached_sparsifier(model) is sparsifier and attached_sparsifier(mlp()) is None
    with pytest.raises(td.TdError, match="another model"):
        attached_sparsifier(copy.deepcopy(model))
    del sparsifier
    gc.collect()
    with pytest.raises(td.TdError, match="gone"):
        attached_sparsifier(model)


# ---- compile, export, resume


@both
def test_compiles_whole_and_does_not_recompile_while_ramping(recipe: td.Recipe) -> None:
    torch._dynamo.reset()
    ramping = td.Recipe(
        recipe.criterion, recipe.granularity, 0.9, td.schedules.paper_ramp(), td.schedules.Linear(), name="ramping"
    )
    model, sparsifier = make(ramping, level=0.75)
    graphs = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    gradients = []
    for step in range(10):
        sparsifier.set_progress(step / 8)
        sparsifier.step()
        model.zero_grad()
        out = compiled(x())
        assert torch.equal(out, model(x()))
        out.sum().backward()
        gradients.append(dense(model)["0.weight"].grad.clone())
    assert graphs.frame_count == 1
    assert not torch.equal(gradients[-1], gradients[-2])
    for seed in range(3):
        model.eval()
        with torch.no_grad():
            assert torch.equal(compiled(x()), pruned(model, recipe, 0.75)(x()))
        perturb(model, seed)
        model.train()
        sparsifier.step()
        compiled(x())
    assert graphs.frame_count == 2  # one for training, one for evaluation


@both
def test_exports_what_evaluation_computes(recipe: td.Recipe) -> None:
    model, sparsifier = make(recipe)
    sparsifier.step()
    model.eval()
    program = torch.export.export(model, (x(),))
    assert torch.equal(program.module()(x()), pruned(model, recipe)(x()))
    assert set(program.state_dict) == set(mlp().state_dict())


@both
def test_resume_is_bit_exact(recipe: td.Recipe) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: td.TargetedDropout) -> None:
        model.train()
        for _ in range(3):
            sparsifier.step()
            for micro in range(2):
                if micro:
                    sparsifier.redraw()
                model(x(4 + micro, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, sparsifier = make(recipe, level=0.75, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, sparsifier)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    text = json.dumps(sparsifier.state_dict())
    train(model, optimizer, sparsifier)

    fresh = mlp(9)
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.05)
    resumed = td.TargetedDropout(recipe, 0.5)
    resumed.prepare(fresh)
    fresh.load_state_dict(saved[0])
    fresh_optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(json.loads(text))
    train(fresh, fresh_optimizer, resumed)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    assert resumed.state_dict() == sparsifier.state_dict()


def test_resume_within_an_accumulation() -> None:
    model, sparsifier = make()
    sparsifier.step()
    sparsifier.redraw()
    saved = sparsifier.state_dict()
    expected = [reads(model)["0.weight"]]
    sparsifier.redraw()
    expected.append(reads(model)["0.weight"])
    other, resumed = make(seed=8)
    resumed.load_state_dict(saved)
    found = [reads(other)["0.weight"]]
    resumed.redraw()
    found.append(reads(other)["0.weight"])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)) and resumed.seed == 0


# ---- warnings


def test_a_ramp_that_nothing_drives_warns_once() -> None:
    _, sparsifier = make(td.recipes.ramping_targeted_weight())
    sparsifier.step()
    with pytest.warns(UserWarning, match=r"'ramping_targeted_weight' ramps, but nothing drives it.*set_progress"):
        sparsifier.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.step()


@pytest.mark.parametrize("how", ["set_progress", "scheduler", "torch's scheduler", "constant"])
def test_a_driven_recipe_does_not_warn(how: str) -> None:
    _, sparsifier = make(WEIGHT if how == "constant" else td.recipes.ramping_targeted_weight())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "set_progress":
            sparsifier.set_progress(0.5)
        elif how == "scheduler":
            td.TargetedDropoutScheduler(sparsifier, 10)
        elif how == "torch's scheduler":
            torch.ao.pruning.LambdaSL(sparsifier, lambda t: min(1.0, t / 10))
        for _ in range(3):
            sparsifier.step()


def test_units_that_nothing_can_remove_warn() -> None:
    """A model of unknown structure: its outputs are dropped as units, and that `shrink` will refuse is said at once."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    with pytest.warns(UserWarning, match=r"2 layers \(first: a\.weight\).*in ModuleDict: shrink\(\)"):
        td.TargetedDropout(UNIT).prepare(model)


def test_a_squash_that_zeroes_nothing_warns() -> None:
    model, sparsifier = make(level=0.05)
    with pytest.warns(UserWarning, match="zeroed nothing.*raise sparsity_level"):
        sparsifier.squash_mask()
    assert type(model[0]) is nn.Linear and (model[0].weight != 0).all()


# ---- layers that others read


def test_out_proj_read_by_its_parent_is_masked() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain = copy.deepcopy(layer)
    model = nn.ModuleDict({"layer": layer, "head": nn.Linear(8, 2)})
    sparsifier = td.TargetedDropout(WEIGHT, 0.5)
    sparsifier.prepare(model)
    names = ["layer.self_attn.out_proj.weight", "layer.linear1.weight", "layer.linear2.weight"]
    assert masked_tensors(model) == names
    sparsifier.step()
    for training in (True, False):
        model.train(training), plain.train(training)
        with torch.no_grad():
            for part, other in zip(
                (layer.self_attn.out_proj, layer.linear1, layer.linear2),
                (plain.self_attn.out_proj, plain.linear1, plain.linear2),
                strict=True,
            ):
                other.weight.copy_(part.weight)
                assert (other.weight == 0).any()
            torch.testing.assert_close(layer(x(2, 5, 8)), plain(x(2, 5, 8)))  # eval: the fused path as well
        out = layer(x(2, 5, 8))
        torch.testing.assert_close(out, plain(x(2, 5, 8)))
        model.zero_grad()
        out.sum().backward()
        gradient = dense(model)["layer.self_attn.out_proj.weight"].grad
        assert gradient is not None and (gradient[plain.self_attn.out_proj.weight == 0] == 0).all()


def test_units_of_an_unnamed_sampler_are_drawn_per_weight() -> None:
    per_weight = td.Recipe(td.criteria.magnitude, td.granularity.Units(), 0.5, sampler="weight", name="per weight")
    model, sparsifier = make(per_weight)
    sparsifier.step()
    zero = model[0].weight == 0
    assert ((zero.sum(1) > 0) & (zero.sum(1) < 8)).any()  # the authors' code: a unit may go in part
    assert (zero.any(1)).sum() <= 8
    assert (model.eval()[0].weight == 0).all(1).sum() == (model[0].weight == 0).any(1).sum() == 8


def test_repr_names_recipe_and_targets() -> None:
    _, sparsifier = make()
    assert "targeted_weight" in repr(sparsifier) and "2 targets" in repr(sparsifier)
    assert "not prepared" in repr(td.TargetedDropout(WEIGHT))


def test_a_replica_of_data_parallel_says_what_to_use_instead() -> None:
    model, _ = make()
    replica = model[0]._replicate_for_data_parallel()
    with pytest.raises(td.TdError, match=r"0\.weight.*one process each"):
        replica.weight = torch.zeros(16, 8)
    model[0].weight = nn.Parameter(torch.zeros(16, 8))
    assert type(dense(model)["0.weight"]) is nn.Parameter and not dense(model)["0.weight"].any()


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "2"])
def test_a_wrong_refresh_interval_is_refused(every: Any) -> None:
    with pytest.raises(td.TdError, match="refresh_every"):
        td.TargetedDropout(td.recipes.targeted_weight(), refresh_every=every)


def test_between_refreshes_the_thresholds_stay_and_the_draws_do_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2))
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(0.5), 0.5, refresh_every=3)
    sparsifier.prepare(model)
    weight = dict(model.named_parameters())["0.weight"]
    mask = masks_of(model)[0][2]
    bounds, draws = [], []
    for _ in range(7):
        sparsifier.step()
        assert mask.keep is not None
        dropped = ~flags_of(mask.keep, weight.shape)
        magnitudes = weight.detach().abs()
        bounds.append(sparsifier._targets[0]._sampled._cut)
        assert bounds[-1] is not None and bool(
            (magnitudes[dropped] <= bounds[-1].kth.expand_as(magnitudes)[dropped]).all()
        )
        draws.append(dropped)
        with torch.no_grad():
            weight.mul_(1.01 + 0.1 * torch.rand_like(weight))
    kept = [torch.equal(a.kth, b.kth) for a, b in itertools.pairwise(bounds) if a and b]
    assert kept == [True, True, False, True, True, False]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(draws))


def test_an_evaluation_in_between_does_not_move_the_thresholds_of_training() -> None:
    def run(evaluate: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2))
        sparsifier = td.TargetedDropout(td.recipes.targeted_weight(0.5), 0.5, refresh_every=4)
        sparsifier.prepare(model)
        keeps = []
        for _ in range(6):
            sparsifier.step()
            keeps.append(masks_of(model)[0][2].keep)
            with torch.no_grad():
                dict(model.named_parameters())["0.weight"].mul_(1.0 + 0.1 * torch.rand(30, 40))
            if evaluate:
                model.eval()(torch.zeros(1, 40))
                model.train()
        return [keep for keep in keeps if keep is not None]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_squash_reports_weights_that_were_edited_unseen() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(), 0.5)
    sparsifier.prepare(model)
    weight = dict(model.named_parameters())["0.weight"]
    sparsifier.report()
    weight.data.copy_(torch.arange(32.0).view(4, 8) + 1)  # no version counter sees this
    sparsifier.squash_mask()
    assert sparsifier.report().zeros == 16
    assert torch.equal(model[0].weight == 0, (torch.arange(8) < 4).expand(4, 8))
