"""What a training step costs, counted instead of timed: passes over the weights, operators, bytes that are kept."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import td_plugin as td
from td_plugin import kernels
from td_plugin.parametrization import masks_of

SELECTION = ("sort", "topk", "kthvalue", "rand", "bernoulli", "random_", "cumsum", "argsort")


class Passes:
    """Counts, by kind of job, how many weights the compiled loops went over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: Counter[str] = Counter()
        run = kernels.run

        def counted(kind: str, values: Tensor, job: kernels.Job) -> bool:
            self.weights[kind] += values.numel()
            return run(kind, values, job)  # type: ignore[arg-type]

        monkeypatch.setattr(kernels, "run", counted)

    def take(self) -> dict[str, int]:
        found = dict(self.weights)
        self.weights.clear()
        return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


def prepared(recipe: td.Recipe, **options: int) -> tuple[nn.Module, td.TargetedDropout, int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 8))
    sparsifier = td.TargetedDropout(recipe, 0.5, **options)  # type: ignore[arg-type]
    sparsifier.prepare(model)
    return model, sparsifier, sum(p.numel() for n, p in model.named_parameters() if n in ("0.weight", "2.weight"))


def masked_bytes(model: nn.Module) -> int:
    return sum(mask.keep.numel() * mask.keep.element_size() for _, _, mask in masks_of(model) if mask.keep is not None)


def operators(work: object) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()  # type: ignore[operator]
    return Counter({event.key: event.count for event in found.key_averages() if event.key.startswith("aten::")})


def test_a_step_ranks_and_draws_in_one_pass_and_masks_in_one_forward_and_two_backward(passes: Passes) -> None:
    model, sparsifier, weights = prepared(td.recipes.targeted_weight(0.66))
    again = dict(model.named_parameters())["2.weight"].numel()  # for the gradient of its input; the first has none
    for _ in range(3):
        sparsifier.step()
        assert passes.take() == {"SAMPLE": weights}
        loss = model(torch.randn(4, 256)).sum()
        assert passes.take() == {"SELECT": weights}
        loss.backward()
        assert passes.take() == {"SELECT": again, "ZERO": weights}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))


def test_a_further_micro_batch_draws_and_does_not_rank(passes: Passes) -> None:
    _, sparsifier, weights = prepared(td.recipes.targeted_weight(0.66))
    sparsifier.step()
    passes.take()
    sparsifier.redraw()
    assert passes.take() == {"KEEP": weights}


def test_a_rarer_refresh_ranks_less(passes: Passes) -> None:
    _, sparsifier, weights = prepared(td.recipes.targeted_weight(0.66), refresh_every=3)
    for expected in ("SAMPLE", "KEEP", "KEEP", "SAMPLE", "KEEP"):
        sparsifier.step()
        assert passes.take() == {expected: weights}


def test_evaluation_masks_once_and_then_does_nothing(passes: Passes) -> None:
    model, sparsifier, weights = prepared(td.recipes.targeted_weight(0.66))
    sparsifier.step()
    passes.take()
    model.eval()
    with torch.no_grad():
        model(torch.randn(4, 256))
        first = passes.take()
        assert first == {"CUT": weights, "KEEP": weights, "SELECT": weights}
        again = operators(lambda: model(torch.randn(4, 256)))
    assert passes.take() == {}
    assert not any(name.endswith(("where", "mul", "bitwise_not")) for name in again) and again


@pytest.mark.parametrize(
    "recipe", [td.recipes.targeted_weight(0.66), td.recipes.targeted_unit(0.66)], ids=lambda r: r.name
)
def test_nothing_is_sorted_and_nothing_random_is_called_for_weights(recipe: td.Recipe) -> None:
    model, sparsifier, _ = prepared(recipe)
    sparsifier.step()

    def step() -> None:
        sparsifier.step()
        model(torch.ones(4, 256)).sum().backward()

    found = operators(step)
    units = bool(recipe.granularity.kinds)
    wrong = {name for name in found if any(word in name for word in SELECTION)}
    assert wrong <= ({"aten::kthvalue", "aten::cumsum"} if units else set()), wrong
    assert not any(name in found for name in ("aten::rand", "aten::bernoulli", "aten::sort"))


def test_operators_grow_with_the_tensors_and_not_with_the_weights() -> None:
    counts = []
    for width in (64, 512):
        model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4))
        sparsifier = td.TargetedDropout(td.recipes.targeted_weight(0.5), 0.5)
        sparsifier.prepare(model)
        sparsifier.step()
        counts.append(sum(operators(sparsifier.step).values()))
    assert abs(counts[1] - counts[0]) <= 2 * 2  # one number is filled by other operators than two
    assert max(counts) <= 2 * 32


def test_a_step_keeps_one_bit_per_weight_and_a_few_bytes_per_row() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(0.66), 0.5)
    sparsifier.prepare(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        sparsifier.step()
    held = sum(event.self_cpu_memory_usage for event in found.events())
    targeted, rows = 2 * 256 * 256, 2 * 256
    assert targeted // 8 <= held <= targeted // 8 + 16 * rows + 1024
    assert masked_bytes(model) == targeted // 8


def test_a_step_of_units_keeps_a_flag_per_unit() -> None:
    model, sparsifier, _ = prepared(td.recipes.targeted_unit(0.66))
    sparsifier.step()
    assert 0 < masked_bytes(model) <= 2 * (512 + 256)
