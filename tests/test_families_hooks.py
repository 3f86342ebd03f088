"""Every family against an oracle that knows nothing of graphs: hooks that zero, in the dense model, what units emit.

Which module emits the units of a group, and where, is written down here by hand.
"""

from __future__ import annotations

import copy
import functools
import importlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pytest
import torch
from family_cases import FAMILIES, family_rows
from family_checks import logits, logits_without
from torch import Tensor, nn

from td_plugin.export import shrink
from td_plugin.structure import Structure, UnitGroup, survey


@dataclass(frozen=True)
class At:
    """Unit u is the features ``start + u * size`` and the `size - 1` behind it of the module; ``*`` is any name."""

    module: str
    size: int = 1
    start: int = 0


def beside(value: str, size: int) -> tuple[At, ...]:
    """Heads: without its value a head says nothing, whatever its query and key."""
    return (At(value, size),)


BERT_LAYER = {
    "*.encoder.layer.*.attention.self": beside("*.encoder.layer.*.attention.self.value", 8),
    "*.encoder.layer.*.intermediate.dense": (At("*.encoder.layer.*.intermediate.dense"),),
}
VIT_LAYER = {
    "*.layers.*.attention": beside("*.layers.*.attention.v_proj", 8),
    "*.layers.*.mlp.fc1": (At("*.layers.*.mlp.fc1"),),
}
LLAMA_HEADS = {"model.layers.*.self_attn": beside("model.layers.*.self_attn.v_proj", 6)}
LLAMA_LAYER = {**LLAMA_HEADS, "model.layers.*.mlp.gate_proj": (At("model.layers.*.mlp.up_proj"),)}
WRITERS = (At("model.embed_tokens"), At("model.layers.?.self_attn.o_proj"), At("model.layers.?.mlp.down_proj"))
LLAMA = {**LLAMA_LAYER, "model.embed_tokens": WRITERS}
PAIR = {
    "model.*.layers.*.self_attn": beside("model.*.layers.*.self_attn.v_proj", 8),
    "model.*.layers.*.encoder_attn": beside("model.*.layers.*.encoder_attn.v_proj", 8),
    "model.*.layers.*.fc1": (At("model.*.layers.*.fc1"),),
}
T5_HEADS = {  # all layers of a stack share one position bias, hence their heads
    "encoder.block": (At("encoder.block.?.layer.0.SelfAttention.v", 6),),
    "decoder.block": (At("decoder.block.?.layer.0.SelfAttention.v", 6),),
    "decoder.block#2": (At("decoder.block.?.layer.1.EncDecAttention.v", 6),),
}
NORMED = {f"*.layers.*.layer.{i}.convolution": (At(f"*.layers.*.layer.{i}.normalization"),) for i in (0, 1)}

EMITS: dict[str, Mapping[str, tuple[At, ...]]] = {
    "bert": {**BERT_LAYER, "bert.pooler.dense": (At("bert.pooler.dense"),)},
    "bert_decoder": {
        **BERT_LAYER,
        "*.encoder.layer.*.crossattention.self": beside("*.encoder.layer.*.crossattention.self.value", 8),
    },
    "roberta": {**BERT_LAYER, "classifier.dense": (At("classifier.dense"),)},
    "distilbert": {
        "distilbert.transformer.layer.*.attention": beside("distilbert.transformer.layer.*.attention.v_lin", 8),
        "distilbert.transformer.layer.*.ffn.lin1": (At("distilbert.transformer.layer.*.ffn.lin1"),),
        "pre_classifier": (At("pre_classifier"),),
    },
    "deberta_v2": {
        **BERT_LAYER,
        "*.encoder.layer.*.attention.self": beside("*.encoder.layer.*.attention.self.value_proj", 8),
        "pooler.dense": (At("pooler.dense"),),
    },
    "modernbert": {  # query, key and value of 32 each; the gate comes last
        "model.layers.*.attn.Wqkv": (At("model.layers.*.attn.Wqkv", 8, 64),),
        "model.layers.*.mlp.Wi": (At("model.layers.*.mlp.Wi"),),
    },
    "electra": {**BERT_LAYER, "classifier.dense": (At("classifier.dense"),)},
    "vit": VIT_LAYER,
    "deit": VIT_LAYER,
    "swin": {
        "*.layers.0.blocks.*.attention": beside("*.layers.0.blocks.*.attention.v_proj", 8),
        "*.layers.1.blocks.*.attention": beside("*.layers.1.blocks.*.attention.v_proj", 16),
        "*.layers.*.blocks.*.mlp.fc1": (At("*.layers.*.blocks.*.mlp.fc1"),),
    },
    "convnext": {"*.stages.*.layers.*.pwconv1": (At("*.stages.*.layers.*.pwconv1"),)},
    "resnet": {
        **NORMED,
        "resnet.embedder.embedder.convolution": (At("resnet.embedder.embedder.normalization"),),
        "*.stages.*.layers.0.layer.2.convolution": (  # the stream of a stage
            At("*.stages.*.layers.0.shortcut.normalization"),
            At("*.stages.*.layers.0.layer.2.normalization"),
            At("*.stages.*.layers.1.layer.2.normalization"),
        ),
    },
    "gpt2": {
        "transformer.h.*.attn.c_attn": (At("transformer.h.*.attn.c_attn", 8, 64),),
        "transformer.h.*.mlp.c_fc": (At("transformer.h.*.mlp.c_fc"),),
    },
    "opt": PAIR,
    "llama": {**LLAMA_LAYER, "lm_head": WRITERS},  # tied to the embedding
    "llama_mha": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mixtral": {**LLAMA_HEADS, "model.embed_tokens": (*WRITERS[:2], At("model.layers.?.mlp"))},
    "t5": {**T5_HEADS, "*.DenseReluDense.wi": (At("*.DenseReluDense.wi"),)},
    "mt5": {**T5_HEADS, "*.DenseReluDense.wi_0": (At("*.DenseReluDense.wi_1"),)},
    "bart": PAIR,
    "marian": PAIR,
    "whisper": {**PAIR, "model.encoder.conv1": (At("model.encoder.conv1"),)},
    "clip": {
        "vision_model.*.self_attn": beside("vision_model.*.self_attn.v_proj", 10),
        "text_model.*.self_attn": beside("text_model.*.self_attn.v_proj", 8),
        "*.mlp.fc1": (At("*.mlp.fc1"),),
    },
    "wav2vec2": {
        "*.conv_layers.0.conv": (At("*.conv_layers.0.layer_norm"),),
        "*.conv_layers.1.conv": (At("*.conv_layers.1.conv"),),
        "*.layers.*.attention": beside("*.layers.*.attention.v_proj", 8),
        "*.layers.*.feed_forward.intermediate_dense": (At("*.layers.*.feed_forward.intermediate_dense"),),
    },
    "own_resnet": {
        "conv1": (At("bn1"), At("layer1.0.bn2"), At("layer1.1.bn2")),
        "layer2.0.conv2": (At("layer2.0.downsample.1"), At("layer2.0.bn2"), At("layer2.1.bn2")),
        "*.*.conv1": (At("*.*.bn1"),),
    },
    "own_mobilenet": {
        "features.0": (At("features.1"),),
        "features.*.conv.0": (At("features.*.conv.4"),),  # behind the depthwise convolution
        "features.3.conv.6": (At("features.3.conv.7"), At("features.4.conv.7")),
        "features.5.conv.6": (At("features.5.conv.7"),),
    },
    "own_densenet": {  # every reader has a norm of its own
        "stem": (At("block1.0.norm1"), At("block1.1.norm1"), At("norm")),
        "block1.0.conv2": (At("block1.1.norm1", start=9), At("norm", start=9)),
        "block1.1.conv2": (At("norm", start=14),),
        "conv": (At("block2.0.norm1"), At("block2.1.norm1"), At("last")),
        "block2.0.conv2": (At("block2.1.norm1", start=11), At("last", start=11)),
        "block2.1.conv2": (At("last", start=17),),
        "*.*.conv1": (At("*.*.norm2"),),
    },
    "own_vit": {
        "blocks.*.attn.qkv": (At("blocks.*.attn.qkv", 8, 64),),
        "blocks.*.fc1": (At("blocks.*.fc1"),),
    },
    "own_lstm": {"embedding": (At("embedding"),)},
    "own_gru": {"embedding": (At("embedding"),)},
}
UNSEEN = {"mixtral": r".*\.experts", "own_lstm": "rnn", "own_gru": "rnn"}
"""Groups that no hook can reach: fused experts keep what their neurons emit to themselves; cells have a test below."""

DEPTH = (
    "vit", "deit", "modernbert", "swin", "convnext", "gpt2", "opt", "llama", "llama_mha", "qwen2", "qwen3", "whisper",
    "clip", "own_vit",
)  # fmt: skip


def some(group: UnitGroup) -> list[int]:
    """Some units, never all."""
    draw = random.Random(group.name)
    return sorted(draw.sample(range(group.units), draw.randint(1, group.units - 1)))


def silenced(model: nn.Module, gone: Mapping[UnitGroup, list[int]]) -> nn.Module:
    """A copy without the units' weights and biases."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for group, units in gone.items():
            for part in group.ranked + group.carried:
                tensor = attrgetter(part.fqn)(model).movedim(part.dim, 0)
                tensor[torch.isin(part.units(len(tensor)), torch.tensor(units))] = 0
    return model


def features(model: nn.Module, family: str, name: str, units: list[int]) -> dict[str, list[int]]:
    """Module -> the output features that are the units of the group `name`; {} where no rule is written for it."""
    rules = [(pattern, at) for pattern, at in EMITS[family].items() if _pattern(pattern).fullmatch(name)]
    found: dict[str, list[int]] = {}
    for pattern, places in rules[:1] if len(rules) < 2 else [min(rules, key=lambda rule: rule[0].count("*"))]:
        stars = _stars(pattern, name)
        for at in places:
            where = _pattern(_filled(at.module, stars))
            entries = [at.start + unit * at.size + i for unit in units for i in range(at.size)]
            found.update({module: entries for module, _ in model.named_modules() if where.fullmatch(module)})
    return found


def _stars(pattern: str, name: str) -> tuple[str, ...]:
    match = _pattern(pattern).fullmatch(name)
    assert match
    return match.groups()


def _pattern(pattern: str) -> re.Pattern[str]:
    """``*`` stands for names, ``?`` for one of any layer."""
    return re.compile(re.escape(pattern).replace(r"\*", "(.+)").replace(r"\?", r"\d+"))


def _filled(pattern: str, stars: tuple[str, ...]) -> str:
    for star in stars:
        pattern = pattern.replace("*", star, 1)
    return pattern


@functools.cache
def surveyed(family: str) -> tuple[nn.Module, dict[str, Any], Structure]:
    """The model, its inputs and its structure; nobody changes them."""
    model = FAMILIES[family].build()
    inputs = FAMILIES[family].inputs(model)
    return model, inputs, survey(model, inputs, source="graph")


def shrunk(family: str, model: nn.Module, patch: pytest.MonkeyPatch) -> nn.Module:
    """Without another trace, and with the groups that the table of families leaves out."""
    _, inputs, structure = surveyed(family)
    patch.setattr(importlib.import_module("td_plugin.export.shrink"), "survey", lambda *_: structure)
    return shrink(model, round_to=1, example_inputs=inputs)


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one and one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def largest(one: Mapping[str, Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in one.values())


def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        return logits(model(**inputs))


@pytest.mark.parametrize("family", family_rows())
def test_shrunk_is_the_dense_model_whose_units_are_zeroed_by_hooks(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, structure = surveyed(family)
    gone: dict[UnitGroup, list[int]] = {}
    hooked: dict[str, list[int]] = {}
    for group in structure.groups:
        if group.kind == "layers" or re.fullmatch(UNSEEN.get(family, ""), group.name):
            continue
        gone[group] = some(group)
        for module, entries in features(model, family, group.name, gone[group]).items():
            hooked.setdefault(module, []).extend(entries)
        assert features(model, family, group.name, [0]), f"no rule for {group.name}"
    expected = logits_without(model, inputs, hooked)
    small = shrunk(family, silenced(model, gone), monkeypatch)
    assert difference(expected, outputs(model, inputs)) > 1e-3
    assert difference(expected, outputs(small, inputs)) < 1e-5 * max(1, largest(expected))
    counts = [sum(tensor.numel() for tensor in one.parameters()) for one in (model, small)]
    assert counts[1] < counts[0]


class Cells(nn.Module):
    """A recurrent layer step by step, without some of its hidden units."""

    def __init__(self, stock: nn.LSTM | nn.GRU, gone: list[int]) -> None:
        super().__init__()
        self.gone, self.size, self.layers = gone, stock.hidden_size, stock.num_layers
        cell = nn.LSTMCell if isinstance(stock, nn.LSTM) else nn.GRUCell
        self.cells = nn.ModuleList(cell(12 if i == 0 else self.size, self.size) for i in range(self.layers))
        for i, made in enumerate(self.cells):
            made.load_state_dict({name: attrgetter(f"{name}_l{i}")(stock) for name in made.state_dict()})

    def forward(self, steps: Tensor) -> tuple[Tensor, None]:
        for cell in self.cells:
            states = []
            hidden: Any = torch.zeros(len(steps), self.size)
            memory = torch.zeros(len(steps), self.size)
            for step in steps.unbind(1):
                if isinstance(cell, nn.LSTMCell):
                    hidden, memory = cell(step, (hidden, memory))
                else:
                    hidden = cell(step, hidden)
                hidden = hidden.index_fill(1, torch.tensor(self.gone), 0.0)
                states.append(hidden)
            steps = torch.stack(states, 1)
        return steps, None


@pytest.mark.parametrize("family", ["own_lstm", "own_gru"])
def test_hidden_units_of_recurrent_layers(family: str) -> None:
    model, inputs, structure = surveyed(family)
    (group,) = (group for group in structure.groups if group.name == "rnn")
    by_hand = copy.deepcopy(model)
    by_hand.rnn = Cells(attrgetter("rnn")(model), some(group))
    small = shrink(silenced(model, {group: some(group)}), round_to=1, example_inputs=inputs)
    assert difference(outputs(by_hand, inputs), outputs(model, inputs)) > 1e-3
    assert difference(outputs(by_hand, inputs), outputs(small, inputs)) < 1e-5


def same_as_given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A hook that makes a layer hand on what it is given."""
    given = args[0] if args else kwargs["hidden_states"]
    return given if isinstance(output, Tensor) else (given, *output[1:])


@pytest.mark.parametrize("family", DEPTH)
def test_shrunk_is_the_dense_model_that_skips_layers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, structure = surveyed(family)
    groups = [group for group in structure.groups if group.kind == "layers"]
    gone = {group: [index % group.units] for index, group in enumerate(groups)}
    small = shrunk(family, silenced(model, gone), monkeypatch)
    skipping = copy.deepcopy(model)
    for group, (unit,) in gone.items():
        layers = attrgetter(group.name)(skipping)
        assert len(layers) == group.units == len(attrgetter(group.name)(small)) + 1
        layers[unit].register_forward_hook(same_as_given, with_kwargs=True)
    expected = outputs(skipping, inputs)
    assert groups and difference(expected, outputs(model, inputs)) > 1e-3
    assert difference(expected, outputs(small, inputs)) < 1e-5 * max(1, largest(expected))
