"""Tiny transformers whose layers have different numbers of heads and neurons, as shrinking leaves them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

HEADS = (3, 1)  # of the two layers; of Llama's queries twice as many
SIZE = 8  # of a head
NEURONS = (48, 17)
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def cut(linear: nn.Linear, rows: int | None = None, columns: int | None = None) -> nn.Linear:
    small = nn.Linear(columns or linear.in_features, rows or linear.out_features, bias=linear.bias is not None)
    small.weight.data = linear.weight.data[:rows, :columns].clone()
    if linear.bias is not None:
        small.bias.data = linear.bias.data[:rows].clone()
    return small


def narrow(module: nn.Module, rows: int | None, columns: int | None, *names: str) -> None:
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, leaf, cut(getattr(owner, leaf), rows, columns))


def stirred(model: Any) -> Any:
    """Biases that do something, each another thing: the exporter stores equal constants once."""
    for tensor in model.parameters():
        if tensor.ndim == 1:
            tensor.data += 0.1 * torch.randn_like(tensor)
    return model


def bert() -> Any:
    torch.manual_seed(0)
    # A wide initialisation: with the usual one all logits are so small that any error would be within the tolerance.
    config = hf.BertConfig(vocab_size=99, max_position_embeddings=32, initializer_range=0.15, num_labels=3, **_SIZES)
    model = hf.BertForSequenceClassification(config).eval()
    for layer, heads, neurons in zip(model.bert.encoder.layer, HEADS, NEURONS, strict=True):
        width = heads * SIZE
        narrow(layer.attention.self, width, None, "query", "key", "value")
        layer.attention.self.num_attention_heads, layer.attention.self.all_head_size = heads, width
        narrow(layer, None, width, "attention.output.dense")
        narrow(layer, neurons, None, "intermediate.dense")
        narrow(layer, None, neurons, "output.dense")
    return stirred(model)


def vit() -> Any:
    torch.manual_seed(0)
    config = hf.ViTConfig(image_size=12, patch_size=4, initializer_range=0.15, num_labels=5, **_SIZES)
    model = hf.ViTForImageClassification(config).eval()
    for layer, heads, neurons in zip(model.vit.layers, HEADS, NEURONS, strict=True):
        narrow(layer.attention, heads * SIZE, None, "q_proj", "k_proj", "v_proj")
        narrow(layer.attention, None, heads * SIZE, "o_proj")
        layer.attention.num_attention_heads = heads
        narrow(layer.mlp, neurons, None, "fc1")
        narrow(layer.mlp, None, neurons, "fc2")
    return stirred(model)


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {**_SIZES, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": SIZE}
    config = hf.LlamaConfig(
        vocab_size=99, max_position_embeddings=8192, initializer_range=0.2, tie_word_embeddings=True, **sizes
    )
    model = hf.LlamaForCausalLM(config).eval()
    for layer, heads, neurons in zip(model.model.layers, HEADS, NEURONS, strict=True):
        narrow(layer.self_attn, 2 * heads * SIZE, None, "q_proj")
        narrow(layer.self_attn, heads * SIZE, None, "k_proj", "v_proj")
        narrow(layer.self_attn, None, 2 * heads * SIZE, "o_proj")
        narrow(layer.mlp, neurons, None, "gate_proj", "up_proj")
        narrow(layer.mlp, None, neurons, "down_proj")
    return stirred(model)


MODELS = {"bert": bert, "vit": vit, "llama": llama}


def inputs(name: str, rows: int = 4, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """With padding on the left of the first row of a text and on the right of the second."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 12, 12, generator=generator)}
    ids = torch.randint(1, 99, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[:1, : length // 3] = 0
    mask[1:2, length - length // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}
