"""English to German for `translation.py`: rows and pieces, the model, its judge."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import datasets
import sacrebleu
import torch
from resnet_rows import ROW
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import DataCollatorForSeq2Seq, MarianConfig, MarianMTModel, PreTrainedTokenizerFast

import td_plugin as td
from td_plugin.files import staged_file

PAD, UNKNOWN, END = "<pad>", "<unk>", "</s>"

Pieces = dict[str, list[int]]


@dataclass(frozen=True)
class Settings:
    """A budget.

    Attributes:
        width: of the residual stream; the feed-forward layers have four times as many neurons.
        layers: of the encoder, and of the decoder.
        heads: of every attention.
        dropout: of every sublayer's output, in all methods.
        pieces: of the vocabulary that both languages share.
        rows: to train on; 0: all.
        epochs: over them.
        batch: rows of a step.
        rate: highest learning rate, reached after `warmup` steps; it falls to 0 along half a cosine.
        warmup: steps.
        bfloat16: whether matrix products of training are.
        judged: rows that BLEU is computed on; 0: all.
    """

    width: int
    layers: int
    heads: int
    dropout: float
    pieces: int
    rows: int
    epochs: int
    batch: int
    rate: float
    warmup: int
    bfloat16: bool
    judged: int


@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations."""

    sources: list[str]
    targets: list[str]

    def first(self, count: int) -> Pairs:
        """So many of them; 0: all."""
        return Pairs(self.sources[: count or None], self.targets[: count or None])


def read(path: str, count: int = 0) -> Pairs:
    """The first rows of a parquet file with the columns ``en`` and ``de``; 0: all."""
    datasets.disable_progress_bars()
    found = datasets.load_dataset("parquet", data_files={"rows": path})["rows"]
    return Pairs(list(found["en"]), list(found["de"])).first(count)


def learn_pieces(pairs: Pairs, count: int, file: Path) -> None:
    """Write a tokenizer for both languages: lower case, byte-pair encoding, an end after every text."""
    made = Tokenizer(models.BPE(unk_token=UNKNOWN))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=count, special_tokens=[PAD, UNKNOWN, END], show_progress=False)
    made.train_from_iterator([*pairs.sources, *pairs.targets], trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, made.token_to_id(END))]
    )
    with staged_file(file) as path:
        made.save(str(path))


def tokenizer_of(file: Path) -> PreTrainedTokenizerFast:
    """What `learn_pieces` wrote."""
    return PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token=PAD, unk_token=UNKNOWN, eos_token=END)


def encoded(pairs: Pairs, tokenizer: PreTrainedTokenizerFast) -> list[Pieces]:
    """As the collator takes them."""
    sources, targets = (tokenizer(texts)["input_ids"] for texts in (pairs.sources, pairs.targets))
    return [{"input_ids": source, "labels": target} for source, target in zip(sources, targets, strict=True)]


def build(settings: Settings, tokenizer: PreTrainedTokenizerFast, seed: int) -> MarianMTModel:
    """With random weights; embeddings and the layer that makes the logits are one matrix."""
    torch.manual_seed(seed)
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=settings.width,
        encoder_layers=settings.layers,
        decoder_layers=settings.layers,
        encoder_ffn_dim=4 * settings.width,
        decoder_ffn_dim=4 * settings.width,
        encoder_attention_heads=settings.heads,
        decoder_attention_heads=settings.heads,
        dropout=settings.dropout,
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        forced_eos_token_id=None,
    )
    return MarianMTModel(config)


def pruned(model: MarianMTModel, share: float) -> MarianMTModel:
    """A copy without ``int(share·n)`` weights of every output: attention and feed-forward layers, not the embeddings.

    Gomez et al., arXiv 1905.13678, section 3: the smallest |w| of a column of the matrix, which is a row here.
    """
    copy = deepcopy(model)
    if share:
        sparsifier = td.TargetedDropout(td.recipes.magnitude(ROW), share)
        sparsifier.prepare(copy)
        sparsifier.squash_mask()
    return copy.eval()


@torch.no_grad()
def accuracy(model: MarianMTModel, tokenizer: PreTrainedTokenizerFast, pairs: Pairs, batch: int = 100) -> float:
    """The share of pieces, ends included, that come first where all pieces before them are given."""
    collator, rows = DataCollatorForSeq2Seq(tokenizer, model), encoded(pairs, tokenizer)
    rows.sort(key=lambda row: len(row["labels"]))
    right, total = 0, 0
    for start in range(0, len(rows), batch):
        inputs = collator(rows[start : start + batch]).to(model.device)
        counted = inputs["labels"] != -100
        right += int((model(**inputs).logits.argmax(-1) == inputs["labels"])[counted].sum())
        total += int(counted.sum())
    return right / total


@torch.no_grad()
def bleu(model: MarianMTModel, tokenizer: PreTrainedTokenizerFast, pairs: Pairs, batch: int = 100) -> float:
    """Uncased corpus BLEU of greedy translations of at most 40 pieces, in [0, 100], as sacrebleu computes it."""
    order = sorted(range(len(pairs.sources)), key=lambda index: len(pairs.sources[index]))
    found: dict[int, str] = {}
    for start in range(0, len(order), batch):
        now = order[start : start + batch]
        inputs = tokenizer([pairs.sources[index] for index in now], padding=True, return_tensors="pt")
        ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
        made = model.generate(ids, attention_mask=mask, max_new_tokens=40, num_beams=1, do_sample=False)
        found.update(zip(now, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True))
    hypotheses = [found[index] for index in range(len(order))]
    return float(sacrebleu.corpus_bleu(hypotheses, [pairs.targets], lowercase=True).score)
