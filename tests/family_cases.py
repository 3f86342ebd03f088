"""The one table of model families: a tiny model each, and what it is called with; a new family is one row.

Sizes that could be taken for one another differ: four heads (eight queries of four keys where heads are shared) of
another size than four, feed-forward blocks of another width than the stream, two rows of seven tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import family_nets as nets
import pytest
import torch
import transformers as hf
from torch import nn

from td_plugin.model_inputs import model_inputs

IDS = {"vocab_size": 99, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 97}
BERT = {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44}
BERT |= {"max_position_embeddings": 40, "type_vocab_size": 2, "num_labels": 3}
IMAGE = {"image_size": 12, "patch_size": 4, "num_channels": 3, "hidden_size": 32, "num_hidden_layers": 2}
IMAGE |= {"num_attention_heads": 4, "intermediate_size": 44, "num_labels": 5}
LLAMA = {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
LLAMA |= {"head_dim": 6, "intermediate_size": 44, "max_position_embeddings": 40}
QWEN2 = {**LLAMA, "hidden_size": 48, "tie_word_embeddings": False}  # it has heads of 48 / 8 = 6, and no head_dim
QWEN2.pop("head_dim")
T5 = {**IDS, "d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 6, "d_ff": 44, "decoder_start_token_id": 1}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
PAIR = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
PAIR |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 44, "decoder_ffn_dim": 40, "decoder_start_token_id": 2}
BART = {**IDS, **PAIR, "max_position_embeddings": 40, "forced_eos_token_id": None}


@dataclass(frozen=True)
class FamilyCase:
    """A tiny model of a family.

    Attributes:
        make: the model, its weights drawn from torch's generator.
        generates: whether it has `generate`.
        given: inputs of a model that is none of transformers: name -> shape of noise, or (shape, ids below this).
    """

    make: Callable[[], nn.Module]
    generates: bool = False
    given: dict[str, tuple[tuple[int, ...], int]] | None = None

    def build(self, seed: int = 0) -> nn.Module:
        """In evaluation mode; the same weights for the same seed, biases and norms that do something."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = self.make().eval()
            _stir(model)
        return model

    def inputs(self, model: nn.Module, seed: int = 0) -> dict[str, Any]:
        """What `model` is called with, by name, on its device."""
        if self.given is None:
            found = model_inputs(model, seed=seed)
            assert found is not None
            return found
        generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
        noise = {name: (torch.randn(shape, generator=generator), most) for name, (shape, most) in self.given.items()}
        return {
            name: (value.abs().mul(7).long() % most if most else value).to(device)
            for name, (value, most) in noise.items()
        }


def _stir(model: nn.Module) -> None:
    """Fresh models are so near to nothing that a wrong one passes: zero biases, norms of one, weights of 0.02."""
    for name, tensor in model.named_parameters():
        if tensor.ndim == 1:
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
        elif tensor.ndim > 1 and tensor.std() < 0.1 and "parametrizations" not in name:
            tensor.normal_(0.0, 0.15)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    for name, tensor in model.named_buffers():
        if name.endswith("running_mean"):
            tensor.normal_(0.0, 0.2)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)


def _bert_decoder() -> nn.Module:
    return hf.BertLMHeadModel(hf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True))


def _distilbert() -> nn.Module:
    sizes = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 44, "max_position_embeddings": 40}
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**sizes, num_labels=3))


def _deberta() -> nn.Module:
    sizes = {**BERT, "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    sizes |= {"position_buckets": 6, "max_relative_positions": 10, "position_biased_input": False}
    sizes |= {"norm_rel_ebd": "layer_norm", "share_att_key": True}
    return hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**sizes))


def _modernbert() -> nn.Module:
    sizes = {key: value for key, value in BERT.items() if key != "type_vocab_size"}
    sizes |= {"num_hidden_layers": 3, "cls_token_id": 2, "sep_token_id": 97, "local_attention": 4}
    return hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**sizes, attention_bias=True, mlp_bias=True))


def _electra() -> nn.Module:
    return hf.ElectraForSequenceClassification(hf.ElectraConfig(**BERT, embedding_size=20))


def _swin() -> nn.Module:
    sizes = {"image_size": 24, "patch_size": 2, "embed_dim": 32, "depths": (2, 2), "num_heads": (4, 4)}
    return hf.SwinForImageClassification(hf.SwinConfig(**sizes, window_size=3, mlp_ratio=1.5, num_labels=5))


def _convnext() -> nn.Module:
    sizes = {"num_stages": 2, "hidden_sizes": (12, 20), "depths": (2, 2), "image_size": 32}
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(**sizes, num_labels=5))


def _resnet() -> nn.Module:
    sizes = {"embedding_size": 10, "hidden_sizes": (24, 56), "depths": (2, 2), "layer_type": "bottleneck"}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes, num_labels=5))


def _gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 44, "n_positions": 40}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**IDS, **sizes))


def _opt() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 44}
    return hf.OPTForCausalLM(hf.OPTConfig(**IDS, **sizes, word_embed_proj_dim=32, max_position_embeddings=40))


def _mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA, num_local_experts=5, num_experts_per_tok=2))


def _whisper() -> nn.Module:
    sizes = {**IDS, **PAIR, "num_mel_bins": 10, "max_source_positions": 9, "max_target_positions": 40}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes))


def _clip() -> nn.Module:
    text = {key: value for key, value in BERT.items() if key not in ("type_vocab_size", "num_labels")}
    vision = {key: value for key, value in IMAGE.items() if key != "num_labels"} | {"hidden_size": 40}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=28))


def _wav2vec2() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44}
    sizes |= {"conv_dim": (12, 14, 18), "conv_stride": (3, 2, 2), "conv_kernel": (5, 3, 2), "vocab_size": 30}
    sizes |= {"num_conv_pos_embeddings": 6, "num_conv_pos_embedding_groups": 2}
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**sizes))


def _images(size: int) -> dict[str, tuple[tuple[int, ...], int]]:
    return {"images": ((2, 3, size, size), 0)}


_WORDS = {"ids": ((2, 7), 50)}

FAMILIES: dict[str, FamilyCase] = {
    "bert": FamilyCase(lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT))),
    "bert_decoder": FamilyCase(
        _bert_decoder
    ),  # transformers 5.23 gives it a cache without room for the encoder's states
    "roberta": FamilyCase(lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**BERT))),
    "distilbert": FamilyCase(_distilbert),
    "deberta_v2": FamilyCase(_deberta),
    "modernbert": FamilyCase(_modernbert),
    "electra": FamilyCase(_electra),
    "vit": FamilyCase(lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE))),
    "deit": FamilyCase(lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**IMAGE))),
    "swin": FamilyCase(_swin),
    "convnext": FamilyCase(_convnext),
    "resnet": FamilyCase(_resnet),
    "gpt2": FamilyCase(_gpt2, True),
    "opt": FamilyCase(_opt, True),
    "llama": FamilyCase(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)), True),
    "llama_mha": FamilyCase(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA, "num_key_value_heads": 8})), True),
    "qwen2": FamilyCase(lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**QWEN2)), True),
    "qwen3": FamilyCase(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA)), True),
    "mixtral": FamilyCase(_mixtral, True),
    "t5": FamilyCase(lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), True),
    "mt5": FamilyCase(lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)), True),
    "bart": FamilyCase(lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), True),
    "marian": FamilyCase(lambda: hf.MarianMTModel(hf.MarianConfig(**BART)), True),
    "whisper": FamilyCase(_whisper, True),
    "clip": FamilyCase(_clip),
    "wav2vec2": FamilyCase(_wav2vec2),
    "own_resnet": FamilyCase(nets.ResNet, given=_images(32)),
    "own_mobilenet": FamilyCase(nets.MobileNet, given=_images(16)),
    "own_densenet": FamilyCase(nets.DenseNet, given=_images(8)),
    "own_vit": FamilyCase(nets.PackedViT, given=_images(12)),
    "own_lstm": FamilyCase(lambda: nets.Recurrent(nn.LSTM, 2), given=_WORDS),
    "own_gru": FamilyCase(lambda: nets.Recurrent(nn.GRU, 1), given=_WORDS),
}

TWINS = ("roberta", "electra", "deit", "llama_mha", "qwen2", "mt5", "marian", "whisper", "opt")
"""Another row has their layers, under other names or put together differently; the slow suite runs them."""


def family_rows(names: Iterable[str] = FAMILIES) -> list[Any]:
    """`names` as rows of a parametrized test."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in TWINS else name for name in names]
