"""The code in the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import td_plugin as td

README = Path(__file__).parent.parent / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_trainer_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    ids = torch.randint(1, 50, (16, 8))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in ids]
    args = TrainingArguments("run", max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    names = {
        "Trainer": Trainer,
        "model": BertForSequenceClassification(config),
        "args": args,
        "data": data,
        "example_inputs": {"input_ids": ids[:4], "attention_mask": torch.ones_like(ids[:4])},
    }
    exec(compile(blocks()[0], str(README), "exec"), names)
    small = names["small"]
    assert type(small) is BertForSequenceClassification
    assert small.bert.encoder.layer[0].intermediate.dense.out_features == 12
    assert small.bert.encoder.layer[0].attention.self.query.out_features == 8
    assert (tmp_path / "model.onnx").is_file()
    again = td.export.load_pretrained("small")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small.eval()(ids).logits)


def test_the_plain_loop() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    exec(compile(blocks()[1], str(README), "exec"), {"td": td, "model": model, "loader": range(3)})
    assert type(model[0]) is nn.Linear
    assert float((model[0].weight == 0).float().mean()) == 0.75


def test_the_example_is_short_and_links_lead_somewhere() -> None:
    assert len(blocks()[0].splitlines()) <= 10
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
