"""A pruned architecture begins anew as a dense one of its widths does."""

from __future__ import annotations

import pytest
import torch
from cases import MODELS, build
from torch import nn
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import td_plugin as td
from td_plugin import TdError
from td_plugin.export import from_scratch, shrink


def pruned(name: str) -> nn.Module:
    model = build(name)
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), 0.5)
    sparsifier.prepare(model)
    sparsifier.squash_mask()
    return shrink(model, round_to=1)


@pytest.mark.parametrize("name", ["mlp", "conv", "bert"])
def test_fresh_weights_of_the_same_shapes_by_seed_alone(name: str) -> None:
    small = pruned(name)
    for module in small.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(3)
    before = {key: tensor.clone() for key, tensor in small.state_dict().items()}
    state = torch.random.get_rng_state()
    one, same, other = from_scratch(small), from_scratch(small, 0), from_scratch(small, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in small.state_dict().items())
    assert type(one) is type(small) and one.training == small.training
    for (key, mine), again, theirs in zip(
        one.state_dict().items(), same.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert mine.shape == before[key].shape and torch.equal(mine, again)
        if mine.ndim > 1 and mine.is_floating_point():
            assert not torch.equal(mine, theirs) and not torch.equal(mine, before[key])
            assert not mine.isnan().any() and bool((mine != 0).any(dim=1)[1:].all())  # 0 may be padding
        if key.endswith("running_mean"):
            assert not mine.any()
    MODELS[name].logits(one, MODELS[name].inputs(2)).sum().backward()


def test_torch_layers_begin_as_torch_builds_them() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        built = nn.Linear(20, 10)
    assert torch.equal(from_scratch(nn.Linear(20, 10), 3).weight, built.weight)
    torch.manual_seed(0)
    attention = from_scratch(nn.MultiheadAttention(16, 4), 0)
    assert not attention.in_proj_bias.any() and attention.in_proj_weight.std() > 0.1


def test_models_of_transformers_begin_as_their_class_says() -> None:
    model = build("bert")
    assert isinstance(model, BertForSequenceClassification)
    for module in model.modules():
        vars(module)["_is_hf_initialized"] = True  # as from_pretrained leaves them
    model.config.initializer_range = 0.5
    fresh = from_scratch(nn.ModuleDict({"inner": model, "head": nn.Linear(3, 2)}))["inner"]
    query = fresh.bert.encoder.layer[0].attention.self.query
    assert not query.bias.any() and 0.4 < float(query.weight.detach().std()) < 0.6
    assert not fresh.bert.embeddings.word_embeddings.weight[0].any()  # the padding


def test_tied_weights_stay_tied_and_constants_stay() -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    fresh = from_scratch(LlamaForCausalLM(config))
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert torch.equal(fresh.model.layers[0].input_layernorm.weight, torch.ones(16))
    module = nn.Linear(3, 2)
    module.register_parameter("constant", nn.Parameter(torch.arange(4.0), requires_grad=False))
    assert torch.equal(from_scratch(module).constant, torch.arange(4.0))


def test_refusals() -> None:
    unknown = nn.Sequential(nn.Linear(3, 3))
    unknown[0].register_parameter("scale", nn.Parameter(torch.ones(3)))
    with pytest.raises(TdError, match="nobody knows how this parameter begins; where: 0.scale; got: a param"):
        from_scratch(unknown)
    masked = build("mlp")
    td.TargetedDropout(td.recipes.targeted_weight(), 0.5).prepare(masked)
    with pytest.raises(TdError, match="the model carries masks; where: 0.weight"):
        from_scratch(masked)
