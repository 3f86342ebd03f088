"""The autocast that the Trainer leaves on a forward: tracing, shrinking and exporting see through it."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

import td_plugin as td
from td_plugin.export import shrink, to_onnx, verify
from td_plugin.integrations.hf import TargetedDropoutCallback


@pytest.mark.parametrize("bf16", [False, True])
def test_a_traced_model_is_pruned_and_shrunk_in_mixed_precision(tmp_path: Path, bf16: bool) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **sizes))
    ids = torch.randint(1, 50, (8, 6), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, bf16=bf16, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    callback = TargetedDropoutCallback(td.recipes.ramping_targeted_unit(), 0.5)
    trainer = Trainer(
        model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in ids], callbacks=[callback]
    )
    trainer.train()
    assert ("forward" in vars(model)) == bf16  # what the Trainer did to it is still there, after tracing, too
    small = shrink(model).eval()
    assert small.transformer.h[0].mlp.c_fc.nf == 32 and small.transformer.h[1].attn.c_attn.nf == 24
    assert "forward" not in vars(small)
    with torch.no_grad():
        assert torch.allclose(small(ids).logits, GPT2LMHeadModel.forward(model.eval(), ids).logits, atol=1e-6)


def test_a_model_that_has_been_trained_in_bf16_is_exported_as_its_weights_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    ids = torch.randint(1, 50, (8, 6), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, bf16=True, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=[{"input_ids": x, "labels": 0} for x in ids]).train()
    with torch.no_grad():
        exact = BertForSequenceClassification.forward(model.eval(), ids).logits
        assert not torch.allclose(model(ids).logits, exact, atol=1e-5), "the autocast is on"
    file = to_onnx(model, tmp_path / "model.onnx", {"input_ids": ids})  # verifies, too
    (logits,) = onnxruntime.InferenceSession(file).run(["logits"], {"input_ids": ids.numpy()})
    assert torch.allclose(torch.from_numpy(logits), exact, atol=1e-5)
    assert verify(model, file, [{"input_ids": ids}]).max_abs < 1e-5
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, exact, atol=1e-5), "and still on"
