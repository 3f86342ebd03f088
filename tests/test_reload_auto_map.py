"""A checkpoint with its own code loads through the Auto classes where td_plugin cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_reload_families import TOKENS, UNEQUAL, logits, same
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaPreTrainedModel

import td_plugin.export.remote_code as remote_code
from td_plugin.errors import TdError
from td_plugin.export import load_pretrained, save_pretrained

AUTO = {"llama": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}

STRANGER = """
import sys
sys.modules["td_plugin"] = None  # importing it fails
import torch, transformers
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
tokens, results = load_file(folder + "/tokens.safetensors")["tokens"], {}
for pair in sys.argv[2:]:
    case, auto = pair.split("=")
    cls = getattr(transformers, auto)
    model = cls.from_pretrained(f"{folder}/{case}", trust_remote_code=True)
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        results[case] = model(input_ids=tokens, **decoder).logits
    model.save_pretrained(f"{folder}/{case}-again")
    new = cls.from_config(model.config, trust_remote_code=True)
    for a, b in zip(model.parameters(), new.parameters(), strict=True):
        assert a.shape == b.shape and torch.isfinite(b).all()
    assert new.get_output_embeddings().weight is new.get_input_embeddings().weight
save_file(results, folder + "/logits.safetensors")
assert not [name for name in sys.modules if name.startswith("td_plugin.")]
"""


def config(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def test_loads_without_td_plugin(tmp_path: Path) -> None:
    small = {case: UNEQUAL[case]() for case in AUTO}
    for case, model in small.items():
        save_pretrained(model, tmp_path / case, auto_map=True)
        assert config(tmp_path / case)["auto_map"][AUTO[case]] == f"modeling_td_pruned.{type(model).__name__}"
        code = (tmp_path / case / "modeling_td_pruned.py").read_text()
        assert "import td_plugin" not in code
        assert "from td_plugin" not in code
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    pairs = [f"{case}={auto}" for case, auto in AUTO.items()]
    command = [sys.executable, "-c", STRANGER, str(tmp_path), *pairs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = load_file(tmp_path / "logits.safetensors")
    for case, model in small.items():
        assert torch.equal(results[case], logits(model))
        assert (tmp_path / f"{case}-again" / "modeling_td_pruned.py").exists()
        for name in (case, f"{case}-again"):  # what the stranger saved loads here too, as the stock class
            loaded = load_pretrained(tmp_path / name)
            assert type(loaded) is type(model)
            assert same(loaded, model)


def test_code_that_was_not_asked_for_is_not_promised(tmp_path: Path) -> None:
    small = UNEQUAL["gpt2"]()
    save_pretrained(small, tmp_path / "code", auto_map=True)
    loaded = load_pretrained(tmp_path / "code")
    save_pretrained(loaded, tmp_path / "plain")
    loaded.save_pretrained(tmp_path / "stock")
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "code", trust_remote_code=True)
    assert type(remote) is not type(small)
    save_pretrained(remote, tmp_path / "remote")
    for name in ("plain", "stock", "remote"):
        assert "auto_map" not in config(tmp_path / name)
        assert not list((tmp_path / name).glob("*.py"))
        assert same(load_pretrained(tmp_path / name), small)


def test_a_class_without_an_auto_class() -> None:
    class Headless(LlamaPreTrainedModel):
        pass

    with pytest.raises(TdError, match="no Auto class"):
        remote_code.auto_map(Headless, LlamaConfig())
