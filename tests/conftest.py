"""What several test files need: no network, no shared cache, and tiny checkpoints and data sets on disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before anything imports the Hugging Face libraries, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="td-plugin-tests-")
# torch.compile in this process: its pool of compiling processes gains nothing on two cores, and can hang.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import pytest
import torch

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "a", "film", "very", "plot", "the", "is")


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder without a head, with its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizer

    directory = tmp_path_factory.mktemp("text_encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def image_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT encoder without a head, with its image processor."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    directory = tmp_path_factory.mktemp("image_encoder")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    ViTModel(config).save_pretrained(directory)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 texts whose class is whether "good" occurs, as csv with a text and a label column."""
    import pandas

    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(48):
        label = index % 2
        filler = [WORDS[i] for i in torch.randint(7, len(WORDS), (3,), generator=generator)]
        rows.append({"text": " ".join(["good" if label else "bad", *filler]), "label": label})
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    pandas.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def masked(text_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with half of its neurons and heads silent."""
    from transformers import BertForSequenceClassification

    import td_plugin as td

    directory = tmp_path_factory.mktemp("masked")
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(text_encoder)
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), sparsity_level=0.5)
    sparsifier.prepare(model)
    sparsifier.squash_mask()
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((text_encoder / name).read_bytes())
    return directory


@pytest.fixture(scope="session")
def dense_onnx(masked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That classifier as a file."""
    from td_plugin.integrations.checkpoints import export_checkpoint

    path = tmp_path_factory.mktemp("onnx") / "dense.onnx"
    export_checkpoint(masked, path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """96 pictures of noise in ten classes, as a file."""
    import numpy as np
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Pillow

    colours = np.random.default_rng(0).integers(0, 255, (96, 32, 32, 3), dtype=np.uint8)
    data = Dataset.from_dict(
        {"image": [Pillow.fromarray(colour) for colour in colours], "label": [index % 10 for index in range(96)]},
        features=Features({"image": Image(), "label": Value("int64")}),
    )
    data.to_parquet(tmp_path / "some.parquet")
    return tmp_path / "some.parquet"
