"""Checkpoints of families that no table knows, cut by hand: bit-exact after reload, stock where widths are equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from td_plugin.errors import TdError
from td_plugin.export import load_pretrained, save_pretrained

TOKENS = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(1))


def keep(module: nn.Module, name: str, dim: int, index: Sequence[int]) -> None:
    """Keep these entries of one dimension of a tensor."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(old.detach().index_select(dim, torch.tensor(index))))


def rows(layer: nn.Linear, index: Sequence[int]) -> None:
    keep(layer, "weight", 0, index)
    if layer.bias is not None:
        keep(layer, "bias", 0, index)
    layer.out_features = len(index)


def columns(layer: nn.Linear, index: Sequence[int]) -> None:
    keep(layer, "weight", 1, index)
    layer.in_features = len(index)


def spread(units: Sequence[int], span: int) -> list[int]:
    return [unit * span + entry for unit in units for entry in range(span)]


def randomized(model: PreTrainedModel) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def llama(cuts: Sequence[tuple[list[int], list[int], int]]) -> LlamaForCausalLM:
    """Three layers of 4 query heads, 2 key heads and 30 neurons, of which (queries, keys, neurons) stay."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=30, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = randomized(LlamaForCausalLM(config))
    for layer, (queries, keys, neurons) in zip(model.model.layers, cuts, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        rows(attention.q_proj, spread(queries, 6))
        rows(attention.k_proj, spread(keys, 6))
        rows(attention.v_proj, spread(keys, 6))
        columns(attention.o_proj, spread(queries, 6))
        attention.num_key_value_groups = len(queries) // len(keys)
        for projection in (mlp.gate_proj, mlp.up_proj):
            rows(projection, range(neurons))
        columns(mlp.down_proj, range(neurons))
        mlp.intermediate_size = neurons
    return model


def gpt2(heads: Sequence[list[int]], neurons: Sequence[int]) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model = randomized(GPT2LMHeadModel(config))
    for block, kept, width in zip(model.transformer.h, heads, neurons, strict=True):
        packed = [part * 24 + entry for part in range(3) for entry in spread(kept, 6)]
        for layer, outputs in ((block.attn.c_attn, packed), (block.mlp.c_fc, range(width))):
            keep(layer, "weight", 1, outputs)
            keep(layer, "bias", 0, outputs)
            layer.nf = len(outputs)
        keep(block.attn.c_proj, "weight", 0, spread(kept, 6))
        keep(block.mlp.c_proj, "weight", 0, range(width))
        block.attn.c_proj.nx, block.mlp.c_proj.nx = 6 * len(kept), width
        block.attn.num_heads, block.attn.split_size = len(kept), 6 * len(kept)
    return model


def t5(heads: list[int], widths: Sequence[int], decoder_layers: int = 2) -> T5ForConditionalGeneration:
    """Two encoder and two decoder layers of 4 heads, 30 neurons each; heads are shared with the position table."""
    config = T5Config(
        vocab_size=40, d_model=24, d_kv=6, d_ff=30, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = randomized(T5ForConditionalGeneration(config))
    attentions = [module for module in model.modules() if type(module).__name__ == "T5Attention"]
    for attention in attentions:
        for projection in (attention.q, attention.k, attention.v):
            rows(projection, spread(heads, 6))
        columns(attention.o, spread(heads, 6))
        attention.n_heads, attention.inner_dim = len(heads), 6 * len(heads)
        if attention.has_relative_attention_bias:
            keep(attention.relative_attention_bias, "weight", 1, heads)
            attention.relative_attention_bias.embedding_dim = len(heads)
    feeds = [module for module in model.modules() if type(module).__name__ == "T5DenseActDense"]
    for feed, width in zip(feeds, widths, strict=True):
        rows(feed.wi, range(width))
        columns(feed.wo, range(width))
    del model.decoder.block[decoder_layers:]
    return model


def whisper(encoder: int, decoder: int) -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        vocab_size=40, num_mel_bins=4, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=30, decoder_ffn_dim=36, max_source_positions=8,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = randomized(WhisperForConditionalGeneration(config))
    for side, width in ((model.model.encoder, encoder), (model.model.decoder, decoder)):
        for layer in side.layers:
            rows(layer.fc1, range(width))
            columns(layer.fc2, range(width))
    return model


UNEQUAL: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: llama([([0, 1], [0], 30), ([1, 3], [0, 1], 7), ([0, 1, 2, 3], [0, 1], 13)]),
    "gpt2": lambda: gpt2([[0, 2, 3], [1]], [96, 5]),
    "t5": lambda: t5([0, 2], [30, 7, 8, 9]),
    "t5, one decoder layer": lambda: t5([0, 2], [30, 7, 8, 9], decoder_layers=1),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        if model.config.is_encoder_decoder and model.config.model_type == "whisper":
            sounds = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(2)).to(model.dtype)
            return model(input_features=sounds, decoder_input_ids=TOKENS).logits
        if model.config.is_encoder_decoder:
            return model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
        return model(input_ids=TOKENS).logits


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def written(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", UNEQUAL)
def test_round_trip_is_bit_exact(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    small = UNEQUAL[case]()
    for parameter in small.parameters():  # not small.to(): that rounds the rotary frequencies, which are never saved
        parameter.data = parameter.data.to(dtype)
    save_pretrained(small, tmp_path / "one", max_shard_size="20KB" if dtype == torch.float32 else None)
    assert (tmp_path / "one" / "model.safetensors.index.json").exists() == (dtype == torch.float32)
    loaded = load_pretrained(tmp_path / "one")
    assert type(loaded) is type(small)
    assert not loaded.training
    assert same(loaded, small)
    assert torch.equal(logits(loaded), logits(small))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    generated = [model.generate(TOKENS, max_new_tokens=4, do_sample=False) for model in (loaded, small)]
    assert torch.equal(*generated)

    save_pretrained(loaded, tmp_path / "one")  # over the first, which may be sharded
    loaded.save_pretrained(tmp_path / "two")
    for again in ("one", "two"):
        assert same(load_pretrained(tmp_path / again), small)
        assert written(tmp_path / again)["td_pruning"] == written(tmp_path / "one")["td_pruning"]
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_attributes_come_back(tmp_path: Path) -> None:
    save_pretrained(UNEQUAL["llama"](), tmp_path / "llama")
    layers = load_pretrained(tmp_path / "llama").model.layers
    assert [layer.self_attn.num_key_value_groups for layer in layers] == [2, 1, 2]
    assert [layer.mlp.down_proj.in_features for layer in layers] == [30, 7, 13]
    save_pretrained(UNEQUAL["gpt2"](), tmp_path / "gpt2")
    blocks = load_pretrained(tmp_path / "gpt2").transformer.h
    assert [(b.attn.c_attn.nf, b.attn.split_size, b.mlp.c_proj.nx) for b in blocks] == [(54, 18, 96), (18, 6, 5)]


EQUAL: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, int]]] = {
    "llama": (
        lambda: llama([([0, 1], [0], 7), ([2, 3], [1], 7), ([0, 1], [0], 7)]),
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 7},
    ),
    "llama, a head of each group": (
        lambda: llama([([0, 2], [0, 1], 30)] * 3),
        {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 30},
    ),
    "gpt2": (lambda: gpt2([[0, 1, 2, 3]] * 2, [40, 40]), {"n_inner": 40}),
    "t5": (lambda: t5([1, 3], [7] * 4), {"num_heads": 2, "d_ff": 7}),
    "t5, one decoder layer": (
        lambda: t5([0, 1, 2, 3], [30] * 4, decoder_layers=1),
        {"num_decoder_layers": 1, "num_layers": 2},
    ),
    "whisper": (lambda: whisper(7, 9), {"encoder_ffn_dim": 7, "decoder_ffn_dim": 9}),
    "whisper, one side": (lambda: whisper(30, 9), {"encoder_ffn_dim": 30, "decoder_ffn_dim": 9}),
}


@pytest.mark.parametrize("case", EQUAL)
def test_equal_sizes_load_with_stock_transformers(case: str, tmp_path: Path) -> None:
    build, stated = EQUAL[case]
    small = build()
    save_pretrained(small, tmp_path, auto_map=True)
    config = written(tmp_path)
    assert {key: config[key] for key in stated} == stated
    assert not {"td_pruning", "auto_map"} & config.keys()
    assert not list(tmp_path.glob("*.py"))
    stock = type(small).from_pretrained(tmp_path)
    assert same(stock, small)
    assert torch.equal(logits(stock), logits(small))
    assert same(load_pretrained(tmp_path), small)


def test_the_width_of_the_stream_is_recorded(tmp_path: Path) -> None:
    """A configuration could state it, but forwards scale by what the configuration says."""
    model, stream = llama([([0, 1, 2, 3], [0, 1], 30)] * 3), range(20)
    for layer in model.model.layers:
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            columns(layer.get_submodule(name), stream)
        rows(layer.self_attn.o_proj, stream)
        rows(layer.mlp.down_proj, stream)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            keep(module, "weight", 0, stream)
            module.variance_epsilon *= 1.2
    keep(model.model.embed_tokens, "weight", 1, stream)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.embed_tokens.embedding_dim = model.lm_head.in_features = 20
    save_pretrained(model, tmp_path)
    assert written(tmp_path)["hidden_size"] == 24
    loaded = load_pretrained(tmp_path)
    assert loaded.model.norm.variance_epsilon == model.model.norm.variance_epsilon
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


def test_options_of_from_pretrained(tmp_path: Path) -> None:
    small = UNEQUAL["llama"]()
    save_pretrained(small, tmp_path)
    for device_map in ("cpu", {"": "cpu"}):
        loaded = load_pretrained(tmp_path, device_map=device_map)
        assert same(loaded, small)
        assert torch.equal(logits(loaded), logits(small))
    half = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same(half, small.to(torch.bfloat16))


def test_a_model_that_its_class_cannot_be_cut_to_is_not_saved(tmp_path: Path) -> None:
    larger = UNEQUAL["llama"]()
    larger.model.layers[0].mlp.down_proj.weight = nn.Parameter(torch.randn(24, 31))
    with pytest.raises(TdError, match=r"no smaller form of LlamaForCausalLM; where: tensors.*at most \[24, 30\]"):
        save_pretrained(larger, tmp_path / "model")
    other = UNEQUAL["llama"]()
    other.model.layers[1].mlp = nn.Identity()
    with pytest.raises(TdError, match=r"layers.1.mlp; got: Identity where the dense model has LlamaMLP"):
        save_pretrained(other, tmp_path / "model")
    assert not (tmp_path / "model").exists()
