"""Which tensors of a model take part, and why the others do not."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from td_plugin.adapters import added_by_peft, wrapped_by_peft
from td_plugin.by_name import Layers
from td_plugin.choices import Choice, check_once, in_short, mask_fault, units_of, whole_layer
from td_plugin.contract import Recipe, check_fraction
from td_plugin.errors import TdError
from td_plugin.given import given_structure, nearest
from td_plugin.granularity import KINDS
from td_plugin.packed import packed, packed_layers
from td_plugin.structure import survey
from td_plugin.units import Slice, Structure, UnitGroup

_EMBEDDING = re.compile(r"(^|[._])(embed(ding|dings|s)?|patch_embed(ding|dings)?|wte|wpe)([._]|$)", re.IGNORECASE)
_CONFIG_KEYS = ("tensor_fqn", "sparsity_level", "drop_rate")
_NO_UNITS = "its outputs are not units that can be removed, or not of this kind"

Entries = list[dict[str, Any]]
"""torch.ao's: ``{"tensor_fqn": ..., "sparsity_level": ..., "drop_rate": ...}`` for each target."""
Config = Entries | Layers | Callable[[nn.Module], Entries] | None
"""The entries, patterns, a function that makes the entries of the model, or None for all that the recipe takes."""
Inputs = Mapping[str, Any] | None
"""As the model is called, by name."""
Groups = Sequence[UnitGroup] | None
"""Groups of units given by hand."""


@dataclass(frozen=True)
class Selection:
    """What was chosen, and per skipped tensor the reason."""

    choices: list[Choice]
    skipped: dict[str, str]


def _output_dim(module: nn.Module) -> int | None:
    """The dimension of `module.weight` that holds its outputs; None for a layer we do not prune by default."""
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return 0
    transformers = sys.modules.get("transformers.pytorch_utils")  # never imported here: nobody has a Conv1D without it
    if transformers is not None and isinstance(module, transformers.Conv1D):
        return 1
    return None


def _named_output_dim(name: str, module: nn.Module) -> int:
    """The same for a tensor the user names: transposed convolutions too, and dimension 0 where nothing is known."""
    if not isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return _output_dim(module) or 0
    if module.groups != 1:
        raise TdError(
            "the outputs of a grouped transposed convolution lie in two dimensions", where=name, fix="omit it"
        )
    return 1


def _layers(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """The prunable layers by name, in registration order, with their output dimension."""
    layers = {}
    for name, module in model.named_modules():
        dim = _output_dim(module)
        if dim is not None:
            layers[name] = (module, dim)
    return layers


def _shared(model: nn.Module) -> set[int]:
    """The ids of parameters that more than one module holds (tied weights)."""
    return {i for i, n in Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False)).items() if n > 1}


def _skip_reason(name: str, module: nn.Module, shared: set[int], logits: str | None) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is already parametrized by something else"
    if (weight := module._parameters["weight"]) is not None and (reason := packed(weight)):
        return reason
    if id(module._parameters["weight"]) in shared:
        return "tied: the same parameter serves another module"
    if _EMBEDDING.search(name):
        return "embedding"
    if name == logits:
        return "makes the logits"
    return None


def _defaults(model: nn.Module, recipe: Recipe, structure: Structure | None) -> Selection:
    """Everything the recipe can drop: `config=None`; without a structure, single weights."""
    layers, shared = _layers(model), _shared(model)
    added = added_by_peft(model)
    logits = next((name for name in reversed(layers) if name not in added), None)
    reasons = {
        name: added.get(name) or _skip_reason(name, module, shared, logits) for name, (module, _) in layers.items()
    }
    skipped = {Slice(name, "weight", 0).fqn: reason for name, reason in reasons.items() if reason}
    skipped.update(packed_layers(model))
    free = {name: layer for name, layer in layers.items() if reasons[name] is None}
    if structure is None:
        return Selection([Choice((Slice(name, "weight", dim),)) for name, (_, dim) in free.items()], skipped)
    if not structure.groups and not structure.fixed:
        return Selection([whole_layer(name, *layer) for name, layer in free.items()], skipped)
    choices = []
    others = wrapped_by_peft(model) | {tensor: group.reason for group in structure.fixed for tensor in group.tensors}
    for group in structure.groups:
        fault = mask_fault(model, group)
        if group.kind not in recipe.granularity.kinds:
            fault = f"its units are {group.kind}, which the recipe does not drop"
        if fault:
            others.update({part.fqn: fault for part in group.ranked})
        else:
            choices.append(units_of(model, recipe, group))
    fixed = {group.name: group.reason for group in structure.fixed}
    unknown = fixed.get(type(model).__name__, _NO_UNITS)  # why the model could not be traced
    chosen = {s.fqn for choice in choices for s in choice.ranked}
    for name in free:
        tensor = Slice(name, "weight", 0).fqn
        skipped[tensor] = fixed.get(name) or others.get(tensor, unknown)
    return Selection(choices, {tensor: reason for tensor, reason in skipped.items() if tensor not in chosen})


def _check_entry(entry: dict[str, Any], known: dict[str, nn.Parameter], shared: set[int]) -> str:
    """The tensor name of one entry of the user's config, checked against the `known` and the tied parameters."""
    if not isinstance(entry, dict):
        raise TdError("a config entry is not a dict", got=repr(entry), fix='{"tensor_fqn": "encoder.0.weight"}')
    unknown = sorted(set(entry) - set(_CONFIG_KEYS))
    if unknown:
        where, fix = str(entry.get("tensor_fqn", "")), nearest(unknown[0], _CONFIG_KEYS)
        raise TdError("unknown key in the config", where=where, got=unknown, fix=fix)
    if "tensor_fqn" not in entry:
        raise TdError("a config entry names no tensor", got=entry, fix="add 'tensor_fqn': 'encoder.0.weight'")
    name = str(entry["tensor_fqn"])
    if name not in known:
        raise TdError("the model has no such parameter", where=name, fix=nearest(name, known))
    if id(known[name]) in shared:
        problem = "the tensor is tied: the same parameter serves another module"
        raise TdError(problem, where=name, fix="leave it out, or untie it first")
    if reason := packed(known[name]):
        raise TdError("its numbers cannot be ranked", where=name, got=reason, fix="prune first, quantize afterwards")
    if known[name].dim() < 2 or not known[name].is_floating_point():
        raise TdError(
            "only floating-point weights of two or more dimensions are ranked",
            where=name,
            got=f"{known[name].dtype} {tuple(known[name].shape)}",
            fix="name a weight matrix; biases follow their units",
        )
    return name


def _named_by(model: nn.Module, recipe: Recipe, config: list[dict[str, Any]], structure: Structure | None) -> Selection:
    """The targets that the user's config asks for; what is looked up of the whole model is looked up once."""
    known, shared = dict(model.named_parameters(remove_duplicate=False)), _shared(model)
    names = [_check_entry(entry, known, shared) for entry in config]
    groups: dict[str, UnitGroup] = {}
    for kinds in (KINDS, recipe.granularity.kinds):  # the recipe's own kinds come first, so are written last
        for group in structure.groups if structure else ():
            if group.kind in kinds:
                groups.update({part.fqn: group for part in group.ranked})
    choices = [_named(model, recipe, name, entry, groups) for name, entry in zip(names, config, strict=True)]
    return Selection(choices, {})


def _named(model: nn.Module, recipe: Recipe, name: str, entry: dict[str, Any], groups: dict[str, UnitGroup]) -> Choice:
    """The target that one entry asks for; `groups` by the names of their ranked tensors."""
    closed = {"sparsity_level": False, "drop_rate": not recipe.uninformed}
    overrides = {key: check_fraction(entry[key], key, name, closed[key]) for key in closed if key in entry}
    module_name, _, tensor = name.rpartition(".")
    module = model.get_submodule(module_name)
    weight = Slice(module_name, tensor, _named_output_dim(name, module))
    if not recipe.granularity.kinds:
        return Choice((weight,), (), overrides)
    if name in groups:
        if fault := mask_fault(model, groups[name]):
            raise TdError("these units cannot be masked", where=name, got=fault, fix="leave the tensor out")
        return units_of(model, recipe, groups[name], overrides)
    if tensor != "weight":
        fix = "use a weight recipe, or name a tensor called 'weight'"
        raise TdError("which bias belongs to these units is unknown", where=name, got=type(module).__name__, fix=fix)
    return replace(whole_layer(module_name, module, weight.dim), overrides=overrides)


def _structure(model: nn.Module, recipe: Recipe, inputs: Inputs, groups: Groups) -> Structure | None:
    """What units there are, looked up once; None for a recipe of single weights."""
    if recipe.granularity.kinds and groups is None:
        # The table of families and chains know the default kinds alone.
        known = set(recipe.granularity.kinds) <= set(KINDS)
        return survey(model, inputs, source="auto" if known else "graph")
    if recipe.granularity.kinds:
        return given_structure(model, groups or ())
    if groups is not None:
        problem = "groups of units for a recipe that drops single weights"
        raise TdError(problem, where=f"recipe {recipe.name!r}", fix="leave groups out, or use a unit recipe")
    return None


def select(
    model: nn.Module, recipe: Recipe, config: Config = None, example_inputs: Inputs = None, groups: Groups = None
) -> Selection:
    """Choose the targets.

    With `config=None`: for a weight recipe every Linear, Conv1d, Conv2d and HF Conv1D weight (subclasses too) but for
    embeddings, tied weights and the last layer, which makes the logits. For a unit recipe the units `survey` finds;
    where it knows nothing of the model, the outputs of those same layers.

    Args:
        model: not prepared yet.
        recipe: decides between weights and units.
        config: torch.ao's list of ``{"tensor_fqn": ..., "sparsity_level": ..., "drop_rate": ...}``, `Layers`, a
            function ``model -> list``, or None. With a unit recipe any weight of a unit names the whole of it
            (`query.weight` the heads).
        example_inputs: for `survey`, where it traces the model.
        groups: the units, in place of those `survey` finds.

    Returns:
        the choices in the model's order and the tensors skipped, with reasons.

    Raises:
        TdError: a wrong name (the nearest is named), key, tensor or fraction; a tensor named twice; wrong groups;
            nothing to prune.
    """
    config = config(model) if callable(config) else config
    if config is not None and not isinstance(config, (list, Layers)):
        raise TdError("the config is not a list", got=repr(config), fix='[{"tensor_fqn": "encoder.0.weight"}]')
    structure = _structure(model, recipe, example_inputs, groups)
    if isinstance(config, list):
        selection = _named_by(model, recipe, config, structure)
    else:
        selection = _defaults(model, recipe, structure)
    if isinstance(config, Layers):
        selection = Selection(*config.choose(selection.choices, selection.skipped))
    if not selection.choices:
        raise TdError(
            f"nothing to prune in {type(model).__name__}",
            got=in_short(selection.skipped) or "no Linear, Conv1d, Conv2d or Conv1D layer",
            fix='name a tensor: config=[{"tensor_fqn": "..."}]',
        )
    check_once(model, selection.choices)
    return selection
