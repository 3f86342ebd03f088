"""Any tensor of any family may be cut: what the record says comes back, through packed experts and renamed keys too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import IMAGE, TEXT
from transformers import (
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from td_plugin.export import load_pretrained, save_pretrained
from td_plugin.export.resize import FORMAT, cut_to_record

DECODER = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
SWIN: dict[str, Any] = {"image_size": 16, "patch_size": 2, "num_channels": 1, "embed_dim": 8, "window_size": 2}
SPEECH: dict[str, Any] = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3)}
SPEECH |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}

FAMILIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "clip": (CLIPModel, CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=12)),
    "deberta": (DebertaV2ForSequenceClassification, DebertaV2Config(**TEXT, relative_attention=True)),
    "gemma": (Gemma3ForCausalLM, Gemma3TextConfig(**DECODER, head_dim=6)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**DECODER, num_local_experts=4)),
    "mobilenet": (MobileNetV2ForImageClassification, MobileNetV2Config(num_channels=1, depth_multiplier=0.35)),
    "swin": (SwinForImageClassification, SwinConfig(**SWIN, depths=[1, 2], num_heads=[2, 4])),
    "wav2vec2": (Wav2Vec2ForCTC, Wav2Vec2Config(**TEXT, **SPEECH)),
}


def same(one: PreTrainedModel, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def third_of_tensors_cut(model: PreTrainedModel) -> dict[str, list[int]]:
    """Every third tensor without its last row; names of one tensor together."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim and parameter.shape[0] > 2:
            names.setdefault(id(parameter), []).append(name)
    chosen = [name for tied in list(names.values())[::3] for name in tied]
    return {name: [model.get_parameter(name).shape[0] - 1, *model.get_parameter(name).shape[1:]] for name in chosen}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_comes_back(family: str, tmp_path: Path) -> None:
    cls, config = FAMILIES[family]
    model = cls(config)
    save_pretrained(model, tmp_path / "dense")
    assert "td_pruning" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert same(model, load_pretrained(tmp_path / "dense"))

    tensors = third_of_tensors_cut(model)
    cut_to_record(model, {"format": FORMAT, "tensors": tensors})
    save_pretrained(model, tmp_path / "cut")
    recorded = json.loads((tmp_path / "cut" / "config.json").read_text())["td_pruning"]["tensors"]
    assert recorded == tensors
    assert same(model, load_pretrained(tmp_path / "cut"))
