"""Decoders as ONNX files with a cache: token by token what `generate` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from graphs import linear_graph, text_graph
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import td_plugin as td
from td_plugin.contract import TdError
from td_plugin.export.decoder import to_cached_onnx
from td_plugin.export.decoding import greedy
from td_plugin.export.shrink import shrink
from td_plugin.export.to_onnx import to_onnx
from td_plugin.export.verify_decoding import verify_decoding

SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)  # a wide initialisation: else every token is followed by the same one
    sizes = {"n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 40}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, initializer_range=0.3, **sizes, **SPECIAL))


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=50, num_hidden_layers=2, max_position_embeddings=40, initializer_range=0.3, **sizes, **SPECIAL
    )
    return LlamaForCausalLM(config)


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    config = T5Config(vocab_size=30, decoder_start_token_id=0, initializer_factor=3.0, **sizes)
    return T5ForConditionalGeneration(config)


def prompts(rows: int, length: int, padding: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def model() -> Any:
    return gpt2().train()


@pytest.fixture(scope="module")
def cached(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_cached_onnx(model, tmp_path_factory.mktemp("gpt2") / "model.onnx", metadata={"recipe": "dense"})


def axes(path: Path) -> dict[str, list[str | int]]:
    graph = onnx.load(path).graph
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


class TestGpt2:
    def test_names_and_metadata(self, cached: Path):
        assert [file.name for file in cached.parent.iterdir()] == ["model.onnx"]
        assert axes(cached) == {
            "input_ids": ["batch", "sequence"],
            "attention_mask": ["batch", "past_sequence + sequence"],
            "position_ids": ["batch", "sequence"],
            "past_key_values.0.key": ["batch", 4, "past_sequence", 6],
            "past_key_values.0.value": ["batch", 4, "past_sequence", 6],
            "logits": ["batch", "sequence", 50],
            "present.0.key": ["batch", 4, "past_sequence + sequence", 6],
            "present.0.value": ["batch", 4, "past_sequence + sequence", 6],
        }
        noted = ort.InferenceSession(str(cached)).get_modelmeta().custom_metadata_map
        assert noted["recipe"] == "dense" and noted["td-plugin.model_class"] == "GPT2LMHeadModel"

    @pytest.mark.parametrize(("rows", "length", "padding"), [(1, 1, 0), (1, 9, 0), (3, 8, 5), (2, 2, 1)])
    def test_generate(self, model: Any, cached: Path, rows: int, length: int, padding: int):
        report = verify_decoding(model, cached, prompts(rows, length, padding), new_tokens=20)
        assert model.training
        assert report.equal == 1 and [row.generated for row in report.rows] == [20] * rows
        assert max(row.max_abs for row in report.rows) < 1e-4
        assert report.rows[-1].tokens == length - padding and "20/20" in str(report)
        assert report.to_dict()["equal"] == 1

    def test_a_sampling_model_is_compared_all_the_same(self, model: Any, cached: Path):
        other = gpt2()
        other.load_state_dict(model.state_dict())
        other.generation_config.do_sample = True
        other.generation_config.eos_token_id = list(range(50))  # would end every text at once
        assert verify_decoding(other, cached, prompts(2, 5, 2)).equal == 1
        assert other.generation_config.do_sample

    def test_another_model(self, cached: Path):
        with pytest.raises(TdError, match=r"does not generate what.*model\.onnx.*token 0 of prompt 0"):
            verify_decoding(gpt2(seed=1), cached, prompts(1, 5, 0))

    def test_a_text_ends(self, cached: Path):
        session = ort.InferenceSession(str(cached))
        whole, logits = greedy(session, prompts(1, 5, 0), 12)
        assert torch.equal(logits.argmax(-1), whole)
        end = int(whole[0, 4])
        ended, _ = greedy(session, prompts(1, 5, 0), 12, end=end)
        first = whole[0].tolist().index(end)
        assert ended.tolist() == whole[:, : first + 1].tolist()

    @pytest.mark.slow
    def test_without_a_cache_it_writes_the_same(self, model: Any, cached: Path, tmp_path: Path):
        given = prompts(3, 8, 5)
        path = to_onnx(model, tmp_path / "plain.onnx", given)
        tokens, logits = greedy(ort.InferenceSession(str(path)), given, 6)
        expected, others = greedy(ort.InferenceSession(str(cached)), given, 6)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(logits, others, atol=1e-4, rtol=1e-4)


class TestRefusals:
    def test_no_decoder(self, tmp_path: Path):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        t5 = T5Config(vocab_size=20, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0)
        for model in (
            BertForSequenceClassification(BertConfig(vocab_size=20, **sizes)),
            T5ForConditionalGeneration(t5),
        ):
            with pytest.raises(TdError, match="only decoders whose whole state"):
                to_cached_onnx(model, tmp_path / "model.onnx")
        assert list(tmp_path.iterdir()) == []

    def test_graphs(self, tmp_path: Path):
        linear = ort.InferenceSession(str(linear_graph(tmp_path / "m.onnx", np.ones((2, 2)))))
        with pytest.raises(TdError, match="takes input_ids"):
            greedy(linear, {"x": torch.ones(1, 2)}, 3)
        path = text_graph(tmp_path / "t.onnx", np.eye(3), per_token=True, name="logits")
        model = onnx.load(path)
        model.graph.input.append(onnx.helper.make_tensor_value_info("decoder_input_ids", 7, ["b", "t"]))
        session = ort.InferenceSession(model.SerializeToString())
        with pytest.raises(TdError, match="token to start from"):
            greedy(session, {"input_ids": torch.ones(1, 2, dtype=torch.long)}, 3)
        model.graph.input.append(onnx.helper.make_tensor_value_info("pixels", 1, ["b"]))
        session = ort.InferenceSession(model.SerializeToString())
        with pytest.raises(TdError, match="decoding does not make.*pixels"):
            greedy(session, {"input_ids": torch.ones(1, 2, dtype=torch.long)}, 3, start=0)

    def test_prompts_and_models(self, model: Any, tmp_path: Path):
        with pytest.raises(TdError, match="no such ONNX file"):
            verify_decoding(model, tmp_path / "absent.onnx", prompts(1, 3, 0))


@pytest.mark.slow
def test_a_shrunk_llama_with_other_heads_in_each_layer(tmp_path: Path):
    model = llama()
    with torch.no_grad():  # the second group of heads of the first layer, and half of the neurons, say nothing
        for name in ("k_proj", "v_proj"):
            getattr(model.model.layers[0].self_attn, name).weight[6:] = 0
        model.model.layers[0].self_attn.q_proj.weight[12:] = 0
        model.model.layers[0].self_attn.o_proj.weight[:, 12:] = 0
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), sparsity_level=0.5)
    sparsifier.prepare(model)
    sparsifier.squash_mask()
    small = shrink(model)
    path = to_cached_onnx(small, tmp_path / "small.onnx", limit=0)  # as if it were larger than one file can be
    assert axes(path)["past_key_values.0.key"][1] == 1
    assert {file.name for file in tmp_path.iterdir()} == {"small.onnx", "small.onnx.data"}
    assert path.stat().st_size < (tmp_path / "small.onnx.data").stat().st_size + 200_000
    noted = ort.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    assert json.loads(noted["td-plugin.widths"])["model.layers.0.self_attn.k_proj"] == [12, 6]
    report = verify_decoding(model, path, prompts(3, 7, 4), new_tokens=24)  # masked and shrunk write the same
    assert report.equal == 1


@pytest.mark.slow
def test_an_encoder_decoder_writes_what_generate_writes(tmp_path: Path):
    model = t5().eval()
    ids = torch.randint(2, 30, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    path = to_onnx(model, tmp_path / "t5.onnx", {**given, "decoder_input_ids": ids[:, :5]})
    tokens, _ = greedy(ort.InferenceSession(str(path)), given, 10, start=0, end=1)
    expected = model.generate(**given, max_new_tokens=10, do_sample=False, eos_token_id=1, pad_token_id=1)[:, 1:]
    assert torch.equal(tokens[:, : expected.shape[1]], expected)
