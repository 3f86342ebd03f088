"""Finding the units of a large model ends, and soon; weights are never read, so the meta device will do."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from td_plugin.structure import survey


def seconds_of(model: torch.nn.Module) -> float:
    """Processor seconds, which other work on the machine does not lengthen."""
    start = time.process_time()
    survey(model, source="graph")
    return time.process_time() - start


def test_bert_base_takes_seconds() -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    assert seconds_of(model) < 5 * torch.get_num_threads()


@pytest.mark.slow
def test_a_llama_of_a_billion_parameters_takes_less_than_a_minute() -> None:
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert seconds_of(model) < 60
