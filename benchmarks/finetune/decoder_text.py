"""The text of `decoder.py` as blocks of tokens, and the perplexity of a model on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from td_plugin.files import staged_file

END = "<|endoftext|>"
"""Before the first text, between two, and after the last."""


@dataclass(frozen=True)
class Text:
    """Tokens of the training rows, of those held out, and of the test file.

    Attributes:
        train: stream of tokens, the end token between texts.
        held_out: of the last training rows, which nothing is trained on.
        test: of the test file.
        vocabulary: how many tokens there are.
    """

    train: Tensor
    held_out: Tensor
    test: Tensor
    vocabulary: int


def load(train: str, test: str, column: str, vocabulary: int, held_out: int, kept: Path) -> Text:
    """Read both files and cut them into tokens.

    Args:
        train: parquet file.
        test: another.
        column: which holds the text.
        vocabulary: size of the byte-level BPE vocabulary, which is learned on the rows trained on.
        held_out: how many of the last training rows are not trained on.
        kept: the file that keeps the vocabulary, so that every process has the same.
    """
    rows, judged = texts(train, column), texts(test, column)
    if not 0 < held_out < len(rows):
        raise SystemExit(f"--held-out: {held_out} of {len(rows)} rows leave nothing to train or to judge on")
    seen, unseen = rows[:-held_out], rows[-held_out:]
    if not kept.exists():
        learned = ByteLevelBPETokenizer()
        learned.train_from_iterator(seen, vocabulary, min_frequency=2, special_tokens=[END], show_progress=False)
        with staged_file(kept) as path:
            learned.save(str(path))
    tokenizer = Tokenizer.from_file(str(kept))
    streams = (stream(tokenizer, group) for group in (seen, unseen, judged))
    return Text(*streams, tokenizer.get_vocab_size())


def texts(path: str, column: str) -> list[str]:
    """The rows that hold any text, without the white space around it."""
    table = pyarrow.parquet.read_table(path)
    if column not in table.column_names:
        raise SystemExit(f"{path}: no column {column}; there are {', '.join(table.column_names)}")
    return [text.strip() for text in table.column(column).to_pylist() if text and text.strip()]


def stream(tokenizer: Tokenizer, rows: Sequence[str]) -> Tensor:
    """All rows behind each other, the end token around each."""
    end = tokenizer.token_to_id(END)
    found = [end]
    for encoding in tokenizer.encode_batch(list(rows)):
        found += [*encoding.ids, end]
    return torch.tensor(found)


def blocks(tokens: Tensor, length: int) -> list[Tensor]:
    """Pieces of `length` tokens to predict, with one token before them: every token but the first is in just one.

    The last piece is shorter where `length` does not divide the stream.
    """
    return [tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length)]


def perplexity(model: PreTrainedModel, tokens: Tensor, length: int, batch: int = 64) -> float:
    """The exponential of the mean cross entropy per token, teacher forced, in fp32.

    Args:
        model: a causal language model; it is left in evaluation mode.
        tokens: a stream; its first token is not judged.
        length: tokens per block; a block sees nothing of those before it but one token.
        batch: blocks at once.
    """
    model.eval()
    pieces = blocks(tokens, length)
    whole = [piece for piece in pieces if len(piece) == length + 1]
    groups = [torch.stack(whole[start : start + batch]) for start in range(0, len(whole), batch)]
    groups += [piece[None] for piece in pieces[len(whole) :]]
    total = 0.0
    with torch.no_grad():
        for group in groups:
            ids = group.to(model.device)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            )
    return math.exp(total / (len(tokens) - 1))
