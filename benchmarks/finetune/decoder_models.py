"""The rows of `decoder.py`: how each model is made, on one budget of steps."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from decoder_text import Text, blocks, load, perplexity
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import td_plugin as td
from td_plugin.export import from_scratch, load_pretrained, save_pretrained, shrink
from td_plugin.files import staged_directory
from td_plugin.granularity import Units
from td_plugin.integrations.hf import TargetedDropoutCallback

UNITS = Units(members="producers")
"""Neurons of the feed-forward layers and attention heads, ranked by the weights that make them."""


@dataclass(frozen=True)
class Settings:
    """What all models of a comparison share.

    Attributes:
        vocabulary: tokens, at most.
        width: of the residual stream.
        layers: how many.
        heads: per layer.
        block: tokens to predict per row.
        dropout: of the dense model, everywhere GPT-2 has it.
        batch: rows per step.
        epochs: passes over the training rows.
        rate: peak of the learning rate, after a warm-up of a tenth; linear decay.
        ramp: share of the run after which γ and α stay.
        held_out: training rows that nothing is trained on.
    """

    vocabulary: int = 4000
    width: int = 256
    layers: int = 4
    heads: int = 8
    block: int = 64
    dropout: float = 0.0
    batch: int = 16
    epochs: float = 1.5
    rate: float = 1e-3
    ramp: float = 0.6
    held_out: int = 1000


QUICK = Settings()
FULL = Settings(width=512, layers=8, dropout=0.1, batch=32, epochs=10.0)


@dataclass(frozen=True)
class Job:
    """One model to make, and where everything is.

    Attributes:
        method: name of the row.
        level: γ of units.
        seed: of weights, order and draws.
        settings: the budget.
        train: parquet file.
        test: another, for the final numbers.
        column: which holds the text.
        output: folder of what is kept.
        device: to train on.
    """

    method: str
    level: float
    seed: int
    settings: Settings
    train: str
    test: str
    column: str
    output: Path
    device: str

    def text(self) -> Text:
        """What it reads, as tokens."""
        kept, settings = self.output / "tokenizer.json", self.settings
        return _text(self.train, self.test, self.column, settings.vocabulary, settings.held_out, kept)

    @property
    def folder(self) -> Path:
        """Where the model and its numbers are kept."""
        return self.output / "runs" / f"{self.method}-{self.level:g}-seed{self.seed}"


@lru_cache(maxsize=1)
def _text(train: str, test: str, column: str, vocabulary: int, held_out: int, kept: Path) -> Text:
    return load(train, test, column, vocabulary, held_out, kept)


def dense_model(settings: Settings, vocabulary: int, seed: int) -> GPT2LMHeadModel:
    """Untrained; positions for a block, and for the 72 tokens that are timed."""
    transformers.set_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=max(2 * settings.block, 128),
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def one_shot(model: GPT2LMHeadModel, level: float) -> GPT2LMHeadModel:
    """A smaller copy without the units of the smallest norm."""
    pruned = copy.deepcopy(model)
    sparsifier = td.TargetedDropout(td.recipes.magnitude(UNITS), level)
    sparsifier.prepare(pruned)
    sparsifier.squash_mask()
    return shrink(pruned)


def narrow_model(settings: Settings, vocabulary: int, level: float, seed: int) -> GPT2LMHeadModel:
    """Untrained, with the widths that pruning of units at γ = `level` leaves."""
    return from_scratch(one_shot(dense_model(settings, vocabulary, seed), level), seed)


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    """The model shifts its labels itself."""
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def fit(job: Job, model: GPT2LMHeadModel, callback: TargetedDropoutCallback | None = None) -> int:
    """Train in place; returns the steps made."""
    settings = job.settings
    rows = [piece for piece in blocks(job.text().train, settings.block) if len(piece) == settings.block + 1]
    arguments = TrainingArguments(
        output_dir=str(job.output / "scratch"),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.rate,
        warmup_steps=0.1,
        seed=job.seed,
        bf16=True,
        use_cpu=job.device == "cpu",
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,  # the jobs have a bar
        dataloader_pin_memory=job.device != "cpu",
    )
    callbacks = [] if callback is None else [callback]
    trainer = Trainer(model, arguments, data_collator=_collate, train_dataset=rows, callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # no autocast in what is judged and kept
    return int(trainer.state.global_step)


Made = tuple[GPT2LMHeadModel, dict[str, Any]]
"""The model as it will be used, and what else is to be said of it."""


def _dense(job: Job) -> Made:
    model = dense_model(job.settings, job.text().vocabulary, job.seed)
    return model, {"steps": fit(job, model)}


def _narrow(job: Job) -> Made:
    model = narrow_model(job.settings, job.text().vocabulary, job.level, job.seed)
    return model, {"steps": fit(job, model)}


def _one_shot(job: Job) -> Made:
    folder = Job(**{**vars(job), "method": "dense", "level": 0.0}).folder
    model = load_pretrained(folder)
    if not isinstance(model, GPT2LMHeadModel):
        raise TypeError(f"{folder}: not GPT-2")
    return one_shot(model, job.level), {"steps": 0}


def _masked(recipe: td.Recipe) -> Callable[[Job], Made]:
    def make(job: Job) -> Made:
        model = dense_model(job.settings, job.text().vocabulary, job.seed)
        ramp = job.settings.ramp
        callback = TargetedDropoutCallback(recipe, job.level, seed=job.seed, recipe_steps=ramp, squash=False)
        steps = fit(job, model, callback)
        masked = perplexity(model, job.text().test, job.settings.block)
        return shrink(model.cpu()), {"steps": steps, "test_masked": masked}

    return make


@dataclass(frozen=True)
class Row:
    """One method: its name in tables, and how a model is made."""

    title: str
    make: Callable[[Job], Made]


ROWS: dict[str, Row] = {
    "dense": Row("dense", _dense),
    "targeted": Row("targeted dropout of units, ramping", _masked(td.recipes.ramping_targeted_unit())),
    "gradual": Row("magnitude of units, gradual", _masked(td.recipes.gradual_magnitude(UNITS))),
    "magnitude": Row("magnitude of units, one shot from dense", _one_shot),
    "narrow": Row("narrower dense model, from scratch", _narrow),
}


def make(job: Job) -> None:
    """Train, judge and keep one model."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if job.device == "cpu":
        torch.set_num_threads(1)
    start, text = time.perf_counter(), job.text()
    model, facts = ROWS[job.method].make(job)
    model = model.to("cpu").eval()
    result = {
        "method": job.method,
        "level": job.level,
        "seed": job.seed,
        "test": perplexity(model, text.test, job.settings.block),
        "held_out": perplexity(model, text.held_out, job.settings.block),
        "parameters": model.num_parameters(),
        **facts,
        "minutes": (time.perf_counter() - start) / 60,
        "settings": asdict(job.settings),
    }
    with staged_directory(job.folder) as stage:
        save_pretrained(model, stage)
        (stage / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
