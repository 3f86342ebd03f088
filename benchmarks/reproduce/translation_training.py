"""How a model of `translation.py` is trained: by transformers' `Seq2SeqTrainer`, in epochs that can be gone on from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from translation_task import Pieces, Settings, build

from td_plugin.integrations.interrupted import last_complete_checkpoint


class Epochs(TrainerCallback):
    """A bar of epochs, which ends training where the next one would end too late.

    Args:
        title: of the bar.
        until: a moment of `time.time`, or infinity.

    Attributes:
        longest: seconds of the slowest epoch.
    """

    def __init__(self, title: str, until: float) -> None:
        self._title, self._until = title, until
        self.longest, self._begun, self._bar = 0.0, 0.0, tqdm(disable=True)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The bar starts where an interrupted run ended."""
        total, done = int(args.num_train_epochs), round(state.epoch or 0)
        self._bar = tqdm(total=total, initial=done, desc=self._title, unit="epoch", mininterval=2.0)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at the clock."""
        self._begun = time.time()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Another one is done."""
        self.longest = max(self.longest, time.time() - self._begun)
        self._bar.update()
        control.should_training_stop |= time.time() + self.longest > self._until

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def trainer_of(  # noqa: PLR0913 - what differs from run to run
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    rows: tuple[list[Pieces], list[Pieces]],
    folder: Path,
    seed: int,
    device: str,
    callbacks: Sequence[TrainerCallback],
) -> Seq2SeqTrainer:
    """Rows are those to train on and those whose loss is logged; a checkpoint is left after every epoch."""
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        learning_rate=settings.rate,
        warmup_steps=settings.warmup,
        lr_scheduler_type="cosine",
        adam_beta2=0.98,
        label_smoothing_factor=0.1,
        train_sampling_strategy="group_by_length",
        bf16=settings.bfloat16,
        use_cpu=device == "cpu",
        seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        prediction_loss_only=True,
        report_to="none",
    )
    model = build(settings, tokenizer, seed)
    collator, (train, validation) = DataCollatorForSeq2Seq(tokenizer, model), rows
    trainer = Seq2SeqTrainer(
        model, arguments, collator, train, validation, processing_class=tokenizer, callbacks=list(callbacks)
    )
    trainer.remove_callback(ProgressCallback)  # it writes to stdout
    trainer.remove_callback(PrinterCallback)
    return trainer


def fit(trainer: Seq2SeqTrainer) -> bool:
    """Train, from the last whole checkpoint if there is one; False: ended before the last epoch."""
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
    return trainer.state.global_step >= trainer.state.max_steps


def epochs_of(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean training loss of every epoch and the loss on validation rows after it, both with smoothed labels."""
    losses = {round(entry["epoch"]): entry["loss"] for entry in history if "loss" in entry}
    validation = {round(entry["epoch"]): entry["eval_loss"] for entry in history if "eval_loss" in entry}
    return [{"loss": losses[epoch], "validation": validation[epoch]} for epoch in sorted(losses)]
