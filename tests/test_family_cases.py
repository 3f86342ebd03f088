"""Every family of the table can be called with inputs made up for it, and exported; the graph computes the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from family_cases import BART, BERT, FAMILIES, IDS, IMAGE, LLAMA, T5, family_rows
from family_checks import generate_equal, logits, logits_without
from torch import Tensor, nn

from td_plugin.model_inputs import model_inputs

GENERATING = [name for name, case in FAMILIES.items() if case.generates]
HUGGING = [name for name, case in FAMILIES.items() if case.given is None]


def export(model: nn.Module, inputs: dict[str, Any]) -> torch.export.ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*_flat_weights.*")  # of LSTM and GRU; they are put back
        return torch.export.export(model, (), inputs, strict=False)


@pytest.mark.parametrize("name", family_rows())
def test_the_exported_graph_computes_what_the_model_does(name: str) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    with torch.no_grad():
        expected, found = logits(model(**inputs)), logits(export(model, inputs).module()(**inputs))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
        assert value.std() > 0.05  # a model that computes next to nothing shows nothing


@pytest.mark.parametrize("name", FAMILIES)
def test_a_case_is_the_same_for_the_same_seed_and_reads_every_row(name: str) -> None:
    case = FAMILIES[name]
    model, again, other = case.build(), case.build(), case.build(seed=1)
    inputs = case.inputs(model)
    with torch.no_grad():
        first, second, third = (logits(one(**inputs)) for one in (model, again, other))
    for key, value in first.items():
        assert torch.equal(value, second[key])
        assert not torch.allclose(value, third[key])
        assert not torch.allclose(value[0], value[1])


@pytest.mark.parametrize("name", HUGGING)
def test_inputs_lie_where_the_model_lies(name: str) -> None:
    with torch.device("meta"):
        model = FAMILIES[name].make().eval()
    made, dense = model_inputs(model), FAMILIES[name].inputs(FAMILIES[name].build())
    assert made is not None
    assert {key: _facts(value) for key, value in made.items()} == {key: _facts(value) for key, value in dense.items()}
    assert all(value.is_meta for value in made.values() if isinstance(value, Tensor))


def _facts(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value


def _classifier(**settings: Any) -> nn.Module:
    return hf.GPT2ForSequenceClassification(hf.GPT2Config(**{**IDS, **settings}, n_embd=32, n_layer=1, n_head=4))


def _pair() -> nn.Module:
    image, text = hf.ViTConfig(**IMAGE), hf.BertConfig(**BERT)
    return hf.VisionEncoderDecoderModel(hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text))


def _spectrogram() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 44}
    return hf.ASTForAudioClassification(hf.ASTConfig(**sizes, max_length=32, num_mel_bins=24, num_labels=3))


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "encoder without a head": lambda: hf.BertModel(hf.BertConfig(**BERT)),
    "few positions": lambda: hf.RobertaModel(hf.RobertaConfig(**{**BERT, "max_position_embeddings": 8})),
    "decoder as classifier": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**LLAMA)),
    "decoder as classifier, no padding": lambda: _classifier(pad_token_id=None),
    "decoder of another family's encoder": lambda: hf.BartForCausalLM(hf.BartConfig(**BART)),
    "encoder of an encoder-decoder": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
    "encoder-decoder as classifier": lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART)),
    "one tower": lambda: hf.CLIPVisionModel(FAMILIES["clip"].build().config.vision_config),
    "image that is not square": lambda: hf.ViTModel(hf.ViTConfig(**{**IMAGE, "image_size": (8, 12)})),
    "image encoder, text decoder": _pair,
    "spectrogram encoder": _spectrogram,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_heads_can_be_called(name: str) -> None:
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    inputs = model_inputs(model, batch=3)
    assert inputs is not None
    rows = 1 if "no padding" in name else 3
    assert all(len(value) == rows for value in inputs.values() if isinstance(value, Tensor))
    with torch.no_grad():
        assert logits(model(**inputs))


def test_floats_have_the_dtype_of_the_model() -> None:
    inputs = model_inputs(FAMILIES["clip"].build().to(torch.bfloat16))
    assert inputs is not None
    assert inputs["pixel_values"].dtype is torch.bfloat16
    assert inputs["input_ids"].dtype is torch.long


def test_text_that_is_pooled_at_its_end_has_one() -> None:
    model = FAMILIES["clip"].build()
    inputs = model_inputs(model)
    assert inputs is not None
    assert (inputs["input_ids"][:, -1] == IDS["eos_token_id"]).all()
    assert not torch.isin(inputs["input_ids"][:, :-1], torch.tensor([1, 2, 97])).any()
    other = dict(inputs, input_ids=inputs["input_ids"].roll(1, 1).where(torch.arange(7) < 6, IDS["eos_token_id"]))
    assert not torch.allclose(model(**inputs).text_embeds, model(**other).text_embeds)


def test_models_that_are_none_of_transformers_have_no_inputs() -> None:
    assert model_inputs(nn.Linear(3, 4)) is None


@pytest.mark.parametrize("name", GENERATING)
def test_generation_of_the_same_model_is_equal_and_of_another_is_not(name: str) -> None:
    case = FAMILIES[name]
    model, inputs = case.build(), case.inputs(case.build())
    assert generate_equal(model, case.build(), inputs)
    assert not generate_equal(model, case.build(seed=1), inputs)


def test_features_zeroed_by_hooks_are_those_whose_weights_are_zero() -> None:
    model = FAMILIES["own_vit"].build()
    inputs = FAMILIES["own_vit"].inputs(model)
    found = logits_without(model, inputs, {"blocks.0.fc1": [3, 5], "blocks.1.attn.qkv": range(64, 72)})
    for name, rows in (("blocks.0.fc1", [3, 5]), ("blocks.1.attn.qkv", list(range(64, 72)))):
        layer = model.get_submodule(name)
        layer.weight.data[rows], layer.bias.data[rows] = 0.0, 0.0
    torch.testing.assert_close(logits_without(model, inputs, {}), found)
