"""A teacher that answers a text once: every run of a seed learns from the same dense model on the same rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from td_plugin.files import staged_file


class Remembering(nn.Module):
    """`teacher`, whose logits are computed when a row is seen first, and kept in a file.

    In evaluation mode and without dropout they depend on nothing but the row (and, to rounding, on its batch).

    Args:
        teacher: a dense classifier.
        file: where they are kept, by a hash of the row's tokens.
    """

    def __init__(self, teacher: nn.Module, file: Path) -> None:
        super().__init__()
        self.teacher, self.file = teacher, file
        self._known: dict[int, Tensor] = {}
        if file.exists():
            found = load_file(file)
            self._known = dict(zip(found["rows"].tolist(), found["logits"], strict=True))
        self._new = 0

    def forward(self, **batch: Any) -> Any:
        """What the teacher gives; logits alone, unless more is asked for."""
        if "labels" in batch or batch.get("output_hidden_states"):
            return self.teacher(**batch)
        keys = [_key(ids[mask.bool()]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        missing = [index for index, key in enumerate(keys) if key not in self._known]
        if missing:
            rows = {name: value[missing] for name, value in batch.items() if isinstance(value, Tensor)}
            for index, logits in zip(missing, self.teacher(**rows).logits.float(), strict=True):
                self._known[keys[index]] = logits.clone()
            self._new += len(missing)
        return SequenceClassifierOutput(logits=torch.stack([self._known[key] for key in keys]))

    def save(self) -> None:
        """Write what has been learned anew."""
        if self._new:
            with staged_file(self.file) as path:
                rows = torch.tensor(list(self._known))
                save_file({"rows": rows, "logits": torch.stack(list(self._known.values()))}, path)


def _key(ids: Tensor) -> int:
    return int.from_bytes(hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).digest(), "little", signed=True)
