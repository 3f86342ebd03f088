"""What is compared: every method turns the dense fine-tuned model into a smaller one on the same budget of steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pareto_tasks import Task, Training
from torch import nn
from transformers import PreTrainedModel

import td_plugin as td
from td_plugin.export import fewer_layers, shrink
from td_plugin.granularity import Units
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.rates import Global

UNITS = Units(members="producers")
Options = dict[str, Any]
Method = Callable[[Task, PreTrainedModel, float, Training, Options], PreTrainedModel]
"""``(task, dense model, γ, training, options) -> smaller model``; the dense model is left as it is."""


OPTIONS = ("criterion", "drop_rate", "floor", "hidden", "logits", "members", "ramp", "temperature")
"""What `--options` may change in a run; it is no part of the comparison then."""


def varied(recipe: td.Recipe, options: Options) -> td.Recipe:
    """`recipe` with what the options of a run change."""
    criteria = {"taylor": td.criteria.taylor, "magnitude": td.criteria.magnitude}
    units = Units(members=options.get("members", "producers"))
    return replace(
        recipe,
        drop_rate=options.get("drop_rate", recipe.drop_rate),
        criterion=criteria[options["criterion"]] if "criterion" in options else recipe.criterion,
        rates=Global(options["floor"]) if "floor" in options else recipe.rates,
        granularity=units if "members" in options else recipe.granularity,
    )


def masked(recipe: td.Recipe) -> Method:
    """Training under the callback with `recipe`, then `shrink`."""

    def run(task: Task, dense: PreTrainedModel, level: float, training: Training, options: Options) -> PreTrainedModel:
        model, ramp = copy.deepcopy(dense), float(options.get("ramp", 0.6))
        callback = TargetedDropoutCallback(varied(recipe, options), level, seed=training.seed, recipe_steps=ramp)
        training.fit(task, model, callback)
        return shrink(model)

    return run


def shorter(recipe: td.Recipe) -> Method:
    """`masked`, on some of the dense model's layers, with the γ that leaves as much as `level` of all layers."""

    def run(task: Task, dense: PreTrainedModel, level: float, training: Training, options: Options) -> PreTrainedModel:
        kept, width = td.layerwise.depth_and_width(len(dense.bert.encoder.layer), level)
        model = fewer_layers(dense, kept)
        if width:
            return masked(recipe)(task, model, width, training, options)
        training.fit(task, model)
        return model

    return run


def magnitude(
    task: Task, dense: PreTrainedModel, level: float, training: Training, options: Options
) -> PreTrainedModel:
    """One shot, nothing trained afterwards: the units of the smallest norm."""
    model = copy.deepcopy(dense)
    sparsifier = td.TargetedDropout(td.recipes.magnitude(UNITS), level)
    sparsifier.prepare(model)
    sparsifier.squash_mask()
    return shrink(model)


def unpruned(task: Task, dense: PreTrainedModel, level: float, training: Training, options: Options) -> PreTrainedModel:
    """The dense model, trained for the same further steps: what the budget itself gives."""
    model = copy.deepcopy(dense)
    training.fit(task, model)
    return model


def torch_pruning(
    task: Task, dense: PreTrainedModel, level: float, training: Training, options: Options
) -> PreTrainedModel:
    """Torch-Pruning (Fang et al., arXiv 2301.12900), one shot: neurons and whole heads, then the same fine-tune.

    What makes the residual stream is left out, so that the same kinds of units go as elsewhere.
    """
    import torch_pruning as tp

    model = copy.deepcopy(dense).eval()
    layers = model.bert.encoder.layer
    heads = {}
    ignored: list[nn.Module] = [model.bert.embeddings, model.bert.pooler, model.classifier]
    for layer in layers:
        attention = layer.attention.self
        heads |= dict.fromkeys((attention.query, attention.key, attention.value), model.config.num_attention_heads)
        ignored += [layer.attention.output.dense, layer.output.dense]
    inputs = {name: torch.ones(1, 8, dtype=torch.long) for name in ("input_ids", "attention_mask", "token_type_ids")}
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=level,
        ignored_layers=ignored,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=level,
        output_transform=lambda output: output.logits,
    )
    pruner.step()
    training.fit(task, model)
    return model


def pat(task: Task, dense: PreTrainedModel, level: float, training: Training, options: Options) -> PreTrainedModel:
    """Torchao's PAT: `PruneOptimizer` with a hard minimum sparsity of rows and heads, its cubic ramp and its healing.

    It zeroes rows of weights and leaves their biases: those are zeroed before shrinking.
    """
    from torchao.prototype.pat.optim import PruneOptimizer

    model = copy.deepcopy(dense)
    rows = [layer.intermediate.dense.weight for layer in model.bert.encoder.layer]
    heads = [
        projection.weight
        for layer in model.bert.encoder.layer
        for projection in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)
    ]
    hard = {"prox_type": "MinSparsityConstraint", "min_sparsity": level, "min_sparsity_schedule": True}
    chosen = {id(weight) for weight in (*rows, *heads)}
    groups = [
        {"params": rows, "group_type": "Dim0Grouper", **hard},
        {
            "params": heads,
            "group_type": "AttentionHeadGrouperDim0",
            "num_heads": model.config.num_attention_heads,
            **hard,
        },
        {"params": [p for p in model.parameters() if id(p) not in chosen]},
    ]
    steps = training.steps(task)
    optimizer = PruneOptimizer(
        torch.optim.AdamW(groups, lr=training.learning_rate, weight_decay=0.0),
        warmup_steps=int(0.1 * steps),
        healing_start_step=int(float(options.get("ramp", 0.6)) * steps),
    )
    training.fit(task, model, optimizer=optimizer)
    return shrink(_silenced(model))


@torch.no_grad()
def _silenced(model: PreTrainedModel) -> PreTrainedModel:
    """Biases of zero rows set to 0, and a head silenced whole where one of its projections is."""
    for layer in model.bert.encoder.layer:
        dense = layer.intermediate.dense
        dense.bias[dense.weight.abs().sum(1) == 0] = 0
        attention = layer.attention.self
        size = attention.attention_head_size
        projections = (attention.query, attention.key, attention.value)
        norms = torch.stack([p.weight.view(-1, size * p.in_features).abs().sum(1) for p in projections])
        for head in (norms[2] == 0).nonzero().flatten().tolist():
            for projection in projections:
                projection.weight[head * size : (head + 1) * size] = 0
                projection.bias[head * size : (head + 1) * size] = 0
    return model


def shallower(
    task: Task, dense: PreTrainedModel, level: float, training: Training, options: Options
) -> PreTrainedModel:
    """A student of evenly chosen layers of the dense model (as DistilBERT, Sanh et al., arXiv 1910.01108)."""
    model = fewer_layers(dense, max(round((1 - level) * len(dense.bert.encoder.layer)), 1))
    training.fit(task, model)
    return model


@dataclass(frozen=True)
class Row:
    """One method of the comparison.

    Attributes:
        title: in tables and legends.
        run: the method.
        distilled: whether it learns from the dense model, too.
        trained: whether it trains at all.
        needs: a package that the project does without.
        options: of the method.
    """

    title: str
    run: Method
    distilled: bool = False
    trained: bool = True
    needs: str = ""
    options: tuple[tuple[str, Any], ...] = ()


TARGETED = td.recipes.ramping_targeted_unit()
GRADUAL = td.recipes.gradual_magnitude(UNITS)

ROWS: dict[str, Row] = {
    "dense": Row("dense, trained on", unpruned),
    "dense-kd": Row("dense, trained on, distilled", unpruned, distilled=True),
    "magnitude": Row("magnitude, one shot", magnitude, trained=False),
    "gradual": Row("magnitude, gradual", masked(GRADUAL)),
    "gradual-kd": Row("magnitude, gradual, distilled", masked(GRADUAL), distilled=True),
    "targeted": Row("targeted dropout", masked(TARGETED)),
    "targeted-kd": Row("targeted dropout, distilled", masked(TARGETED), distilled=True),
    "shorter-targeted-kd": Row("fewer layers, targeted dropout, distilled", shorter(TARGETED), distilled=True),
    "shorter-gradual-kd": Row("fewer layers, magnitude, gradual, distilled", shorter(GRADUAL), distilled=True),
    "torch-pruning": Row("Torch-Pruning", torch_pruning, needs="torch_pruning"),
    "torch-pruning-kd": Row("Torch-Pruning, distilled", torch_pruning, distilled=True, needs="torch_pruning"),
    "pat": Row("torchao PAT", pat, needs="torchao"),
    "pat-kd": Row("torchao PAT, distilled", pat, distilled=True, needs="torchao"),
    "student-kd": Row("shallower student, distilled", shallower, distilled=True),
}
