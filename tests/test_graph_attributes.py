"""Attributes that change with the units are found by trying; what runs then computes what the silenced model does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from td_plugin.cutting import cut, cut_all
from td_plugin.errors import TdError
from td_plugin.graph.attributes import with_sizes
from td_plugin.graph.trial import meta_run, skeleton
from td_plugin.structure import unit_groups
from td_plugin.units import MeanNorm, Size, Slice, UnitGroup

TOKENS = torch.arange(1, 8).repeat(2, 1)
TEXT = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
CAUSAL = {**TEXT, "use_cache": False}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)}
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 30}
WORDS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DISTIL = {"vocab_size": 50, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 30}
T5 = {"d_model": 24, "d_kv": 6, "d_ff": 30, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16}


def heads(
    name: str, units: int, projections: Mapping[str, int], output: str, span: int = 6, more: tuple[Slice, ...] = ()
) -> UnitGroup:
    """A group of heads: entries per unit of each projection, by its name in the attention module `name`."""
    rows = tuple(Slice(f"{name}.{layer}", "weight", 0, size) for layer, size in projections.items())
    columns = (Slice(f"{name}.{output}", "weight", 1, span),)
    return UnitGroup(name, "heads", units, rows, more, columns, (), (), None)


def biases(name: str, projections: Mapping[str, int]) -> tuple[Slice, ...]:
    return tuple(Slice(f"{name}.{layer}", "bias", 0, size) for layer, size in projections.items())


def ancestors(groups: list[UnitGroup]) -> dict[str, frozenset[str]]:
    """Every module that holds a slice, and all around it, as the stack of modules in a trace has them."""

    def around(name: str) -> set[str]:
        parts = name.split(".")
        return {".".join(parts[:i]) for i in range(len(parts) + 1)}

    return {g.name: frozenset().union(*(around(part.module) for part in g.slices)) for g in groups}


def silence(model: nn.Module, group: UnitGroup, keep: Tensor) -> None:
    """Zero everything of the units outside `keep`, so that they add nothing to the output."""
    alive = torch.zeros(group.units + 1, dtype=torch.bool)
    alive[keep] = alive[-1] = True
    with torch.no_grad():
        for part in group.ranked + group.carried + group.consumers:
            tensor = attrgetter(part.fqn)(model)
            gone = ~alive[part.units(tensor.shape[part.dim])]
            tensor.index_fill_(part.dim, gone.nonzero().flatten(), 0)


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["logits" if "logits" in output else "logits_per_image"]


def found(model: nn.Module, groups: list[UnitGroup], inputs: Mapping[str, Any]) -> list[UnitGroup]:
    bare = [replace(group, sizes=()) for group in groups]
    sized = with_sizes(model, bare, ancestors(bare), meta_run(inputs))
    assert all(isinstance(group, UnitGroup) for group in sized), sized
    return [group for group in sized if isinstance(group, UnitGroup)]


def check(model: nn.Module, groups: list[UnitGroup], inputs: Mapping[str, Any]) -> list[UnitGroup]:
    """Cut with the sizes that were found; the outputs equal those of the silenced model."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    sized = found(model, groups, inputs)
    keeps = [torch.randperm(g.units, generator=generator)[: max(1, g.units // 2 - i % 2)] for i, g in enumerate(sized)]
    cuts = [(group, keep.sort().values) for group, keep in zip(sized, keeps, strict=True)]
    for group, keep in cuts:
        silence(model, group, keep)
    small = copy.deepcopy(model)
    cut_all(small, cuts)
    with torch.no_grad():
        torch.testing.assert_close(logits(small(**inputs)), logits(model(**inputs)), rtol=1e-5, atol=1e-5)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert after < before
    return sized


def stated(group: UnitGroup, module: str) -> dict[str, int]:
    return {size.attribute: size.per_unit for size in group.sizes if size.module == module}


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=50)), TEXT),
        (lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL)), TEXT),
        (lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=8, patch_size=4)), IMAGE),
    ],
    ids=["bert", "distilbert", "vit"],
)
def test_it_finds_what_the_table_of_families_says(build: Any, inputs: dict[str, Tensor]) -> None:
    model = build()
    known = unit_groups(model)
    for group, same in zip(check(model, known, inputs), known, strict=True):
        assert set(group.sizes) == set(same.sizes)


def packed(prefix: str) -> UnitGroup:
    owners = tuple(entry // 6 % 4 for entry in range(72))
    rows = Slice(f"{prefix}.c_attn", "weight", 1, owners=owners)
    bias = Slice(f"{prefix}.c_attn", "bias", 0, owners=owners)
    columns = Slice(f"{prefix}.c_proj", "weight", 0, 6)
    return UnitGroup(prefix, "heads", 4, (rows,), (bias,), (columns,), (), (), None)


def test_gpt2_packs_its_projections() -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**WORDS, **GPT2))
    first, _ = check(model, [packed(f"transformer.h.{i}.attn") for i in range(2)], CAUSAL)
    assert stated(first, "transformer.h.0.attn.c_attn") == {"nf": 18}
    assert stated(first, "transformer.h.0.attn.c_proj") == {"nx": 6}
    assert stated(first, "transformer.h.0.attn").items() >= {"num_heads": 1, "split_size": 6}.items()


def test_key_value_groups_take_their_queries_along() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS, **SMALL, num_key_value_heads=2))
    names = [f"model.layers.{i}.self_attn" for i in range(2)]
    groups = [heads(name, 2, {"q_proj": 12, "k_proj": 6, "v_proj": 6}, "o_proj", 12) for name in names]
    for group in check(model, groups, CAUSAL):
        assert not stated(group, group.name)  # two query heads per key stay two


def test_heads_of_t5_share_their_position_bias() -> None:
    model = hf.T5ForConditionalGeneration(hf.T5Config(**{**WORDS, **T5}))
    names = [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)]
    parts = [heads(name, 4, dict.fromkeys("qkv", 6), "o") for name in names]
    bias = Slice(f"{names[0]}.relative_attention_bias", "weight", 1)
    both = tuple(part for group in parts for part in group.ranked), tuple(p for group in parts for p in group.consumers)
    group = UnitGroup("encoder", "heads", 4, both[0], (bias,), both[1], (), (), None)
    (sized,) = check(model, [group], {**CAUSAL, "decoder_input_ids": TOKENS})
    assert stated(sized, names[1]) == {"n_heads": 1, "inner_dim": 6}  # not d_model, not the number of buckets
    assert stated(sized, f"{names[0]}.relative_attention_bias") == {"embedding_dim": 1}


def test_disentangled_attention() -> None:
    config = hf.DebertaV2Config(
        **SMALL, vocab_size=50, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=False,
        position_buckets=4, max_relative_positions=-1,
    )  # fmt: skip
    names = [f"deberta.encoder.layer.{i}.attention.self" for i in range(2)]
    projections = dict.fromkeys(("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj"), 6)
    groups = [heads(name, 4, projections, "query_proj", 6, biases(name, projections)) for name in names]
    outputs = [(Slice(f"{name.removesuffix('self')}output.dense", "weight", 1, 6),) for name in names]
    groups = [replace(group, consumers=output) for group, output in zip(groups, outputs, strict=True)]
    for group in check(hf.DebertaV2ForSequenceClassification(config), groups, TEXT):
        assert stated(group, group.name) == {"num_attention_heads": 1, "all_head_size": 6}


def test_attention_of_opt() -> None:
    config = hf.OPTConfig(
        **WORDS, hidden_size=24, num_hidden_layers=2, ffn_dim=30, num_attention_heads=4, max_position_embeddings=16,
        word_embed_proj_dim=24,
    )  # fmt: skip
    projections = dict.fromkeys(("q_proj", "k_proj", "v_proj"), 6)
    names = [f"model.decoder.layers.{i}.self_attn" for i in range(2)]
    groups = [heads(name, 4, projections, "out_proj", 6, biases(name, projections)) for name in names]
    for group in check(hf.OPTForCausalLM(config), groups, CAUSAL):
        assert stated(group, group.name)["num_heads"] == 1


def test_both_towers_of_clip() -> None:
    text = {**SMALL, **WORDS, "max_position_embeddings": 16, "eos_token_id": 7}
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    projections = dict.fromkeys(("q_proj", "k_proj", "v_proj"), 6)
    names = [f"{tower}_model.encoder.layers.{i}.self_attn" for tower in ("text", "vision") for i in range(2)]
    groups = [heads(name, 4, projections, "out_proj", 6, biases(name, projections)) for name in names]
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    assert len(check(model, groups, {**TEXT, **IMAGE})) == 4


class Attention(nn.Module):
    """One layer whose head size is derived from the stream in the forward, as older code does."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, length, -1))


def one(model: nn.Module, group: UnitGroup, inputs: Mapping[str, Any]) -> UnitGroup | str:
    return with_sizes(model, [group], ancestors([group]), meta_run(inputs))[0]


def test_a_reason_names_the_module_and_its_line() -> None:
    owners = tuple(entry // 6 % 4 for entry in range(72))
    rows, columns = Slice("0.qkv", "weight", 0, owners=owners), Slice("0.proj", "weight", 1, 6)
    bias = Slice("0.qkv", "bias", 0, owners=owners)
    group = UnitGroup("0", "heads", 4, (rows,), (bias,), (columns,), (), (), None)
    reason = one(nn.Sequential(Attention()), group, {"input": torch.randn(2, 7, 24)})
    assert isinstance(reason, str) and "Attention" in reason and "reshape(batch, length, 3" in reason


class Scaled(nn.Module):
    """An MLP that computes with its width, or states it without using it."""

    def __init__(self, by_attribute: bool, by_shape: bool) -> None:
        super().__init__()
        self.hidden, self.by_attribute, self.by_shape = 10, by_attribute, by_shape
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        y = y / self.hidden if self.by_attribute else y
        return self.down(y * y.shape[-1] ** -0.5 if self.by_shape else y)


def neurons(up: str = "0.up", down: str = "0.down", units: int = 10) -> UnitGroup:
    rows, bias, columns = Slice(up, "weight", 0), Slice(up, "bias", 0), Slice(down, "weight", 1)
    return UnitGroup(up, "neurons", units, (rows,), (bias,), (columns,), (), (), None)


def test_numbers_that_a_model_computes_with_stay() -> None:
    inputs = {"input": torch.linspace(-1, 1, 18).view(3, 6)}
    (plain,) = check(nn.Sequential(Scaled(False, False)), [neurons()], inputs)
    assert stated(plain, "0") == {"hidden": 1}
    (divides,) = check(nn.Sequential(Scaled(True, False)), [neurons()], inputs)
    assert stated(divides, "0") == {}
    reason = one(nn.Sequential(Scaled(False, True)), neurons(), inputs)
    assert isinstance(reason, str) and "computes with the width" in reason and "Scaled" in reason


def test_depthwise_convolutions_and_norms_of_channels() -> None:
    layers = (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.GroupNorm(8, 16), nn.Conv2d(16, 4, 1))
    rows = tuple(Slice(name, "weight", 0, span) for name, span in (("0", 1), ("1", 2)))
    carried = tuple(Slice(n, t, 0, s) for n, t, s in (("0", "bias", 1), ("1", "bias", 2), ("2", "weight", 2)))
    shift, columns = Slice("2", "bias", 0, 2), Slice("3", "weight", 1, 2)
    group = UnitGroup("0", "channels", 8, rows, (*carried, shift), (columns,), (), (), None)
    (sized,) = check(nn.Sequential(*layers), [group], {"input": torch.linspace(-1, 1, 96).view(2, 3, 4, 4)})
    assert stated(sized, "1") == {"out_channels": 2, "in_channels": 1, "groups": 1}
    assert stated(sized, "2") == {"num_channels": 2, "num_groups": 1}


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = cell(5, 6, num_layers=2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)], ids=["lstm", "gru", "rnn"])
def test_hidden_units_of_recurrent_layers(cell: type[nn.RNNBase], gates: int) -> None:
    # All layers of one module have one width: unit i of the group is unit i of both.
    owners = tuple(entry % 6 for entry in range(6 * gates))
    names = [f"{kind}_{layer}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for layer in ("l0", "l1")]
    rows = tuple(Slice("rnn", name, 0, owners=owners) for name in names)
    columns = tuple(Slice("rnn", name, 1) for name in ("weight_hh_l0", "weight_ih_l1", "weight_hh_l1"))
    group = UnitGroup("rnn", "neurons", 6, rows, (), (*columns, Slice("head", "weight", 1)), (), (), None)
    (sized,) = check(Recurrent(cell), [group], {"x": torch.linspace(-1, 1, 30).view(2, 3, 5)})
    assert stated(sized, "rnn") == {"hidden_size": 1}


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat((self.a(x), self.b(x)), dim=-1))


def test_two_groups_share_the_columns_behind_a_concatenation() -> None:
    first = Slice("out", "weight", 1, owners=(0, 1, 2, 3, 4, 5, -1, -1, -1, -1, -1))
    second = Slice("out", "weight", 1, owners=(-1, -1, -1, -1, -1, -1, 0, 1, 2, 3, 4))
    groups = [replace(neurons("a", "out", 6), consumers=(first,)), replace(neurons("b", "out", 5), consumers=(second,))]
    model = Joined()
    sized = check(model, groups, {"x": torch.linspace(-1, 1, 12).view(3, 4)})
    cut_all(model, [(sized[0], torch.tensor([1, 3])), (sized[1], torch.tensor([4]))])
    assert model.out.in_features == 3 and model.out.weight.shape == (3, 3)
    with pytest.raises(TdError, match="a.weight; got: 2; .*cut_all"):
        cut(model, sized[0], torch.tensor([0]))


@pytest.mark.parametrize("epsilon", [0.5, None])
def test_a_mean_over_fewer_units_is_made_up_for(epsilon: float | None) -> None:
    model = nn.Sequential(nn.Linear(4, 9, bias=False), nn.RMSNorm(9, eps=epsilon), nn.Linear(9, 3))
    group = replace(
        neurons("0", "2", 9), carried=(Slice("1", "weight", 0),), norms=(MeanNorm("1", "eps"),), kind="hidden"
    )
    (sized,) = check(model, [group], {"input": torch.linspace(-1, 1, 12).view(3, 4)})
    assert Size("1", "normalized_shape", 1, 0) in sized.sizes
    cut(model, sized, torch.tensor([0, 5]))
    assert model[1].normalized_shape == (2,)
    assert model[1].eps == pytest.approx((torch.finfo(torch.float32).eps if epsilon is None else epsilon) * 4.5)


def test_a_skeleton_has_no_weights_and_keeps_ties() -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**WORDS, **GPT2))
    bare = skeleton(model)
    assert all(tensor.is_meta for tensor in (*bare.parameters(), *bare.buffers()))
    assert bare.lm_head.weight is bare.transformer.wte.weight
    assert not any(tensor.is_meta for tensor in model.parameters())
    assert [name for name, _ in bare.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_tied_weights_are_cut_once() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False))
    twin = nn.ModuleList([nn.Linear(4, 6, bias=False), model])
    twin[0].weight = model[0].weight
    twin[0].weight.requires_grad_(False)
    group = UnitGroup("1.0", "neurons", 6, (Slice("1.0", "weight", 0),), (), (Slice("1.2", "weight", 1),), (), (), None)
    cut(twin, group, torch.tensor([1, 2]))
    assert twin[0].weight is model[0].weight and model[0].weight.shape == (2, 4)
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad


def test_a_model_that_does_not_run_has_no_sizes() -> None:
    reason = one(nn.Sequential(Scaled(False, False)), neurons(), {"input": torch.randn(3, 7)})
    assert isinstance(reason, str) and "does not run" in reason and "Scaled" in reason
