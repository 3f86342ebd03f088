"""How long it takes to find the units of a model, from its traced graph; weights are never read.

    python benchmarks/structure.py [--threads 1]

Rows: BERT-base, ViT-base, T5-base, and a Llama of 1.2 billion parameters on the meta device. Times are wall-clock
seconds of one call of `survey(model, source="graph")` each, the first of the process included.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter
from collections.abc import Callable

import torch
import transformers as hf
from torch import nn

from td_plugin.report import table
from td_plugin.structure import survey

LLAMA = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True,
}  # fmt: skip

MODELS: dict[str, Callable[[], nn.Module]] = {
    "BERT-base": lambda: hf.BertForSequenceClassification(hf.BertConfig()),
    "ViT-base": lambda: hf.ViTForImageClassification(hf.ViTConfig()),
    "T5-base": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
    ),
    "Llama 1.2 B": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
}


def row(name: str) -> tuple[str, ...]:
    """One model: built on the meta device, its units found once."""
    with torch.device("meta"):
        model = MODELS[name]()
    start = time.perf_counter()
    found = survey(model, source="graph")
    seconds = time.perf_counter() - start
    kinds = Counter(group.kind for group in found.groups)
    parameters = sum(tensor.numel() for tensor in model.parameters())
    groups = ", ".join(f"{count} × {kind}" for kind, count in sorted(kinds.items()))
    return name, f"{parameters / 1e6:,.0f} M", groups, str(len(found.fixed)), f"{seconds:.1f}"


def main() -> None:
    """Print the table with machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    hf.logging.set_verbosity_error()
    versions = f"torch {torch.__version__}, transformers {hf.__version__}, Python {platform.python_version()}"
    print(f"{platform.machine()}, {versions}")
    print(table(("model", "parameters", "groups", "fixed", "seconds"), [row(name) for name in MODELS]))


if __name__ == "__main__":
    main()
