"""The transformers Trainer with one more callback: a tiny BERT from scratch, pruned, shrunk, exported and timed.

Run: python examples/02_trainer_callback.py
"""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

import td_plugin as td
from td_plugin.export import benchmark, shrink, to_onnx
from td_plugin.integrations.hf import TargetedDropoutCallback

WORDS, LENGTH = 40, 12


def sentences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Random words; the class says whether word 7 occurs before the middle."""
    ids = torch.randint(8, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % 2
    ids[torch.arange(count), torch.arange(count) * 5 % (LENGTH // 2) + (1 - labels) * LENGTH // 2] = 7
    mask = torch.ones(LENGTH, dtype=torch.long)
    return [{"input_ids": row, "attention_mask": mask, "labels": label} for row, label in zip(ids, labels, strict=True)]


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    set_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
    )
    callback = TargetedDropoutCallback(td.recipes.ramping_targeted_unit(), sparsity_level=0.75, recipe_steps=0.5)
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=TrainingArguments(
            "build/example-trainer",
            num_train_epochs=5,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=sentences(1024, seed=0),
        eval_dataset=sentences(256, seed=1),
        compute_metrics=accuracy,
        callbacks=[callback],
    )
    dense = BertForSequenceClassification(config)
    trainer.train()  # at its end the masks are baked in
    print(f"accuracy, pruned: {trainer.evaluate()['eval_accuracy']:.3f}")

    small = shrink(trainer.model)
    rows = sentences(8, seed=2)
    inputs = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    files = {
        "dense": to_onnx(dense, "build/example-trainer/dense.onnx", inputs),
        "pruned": to_onnx(small, "build/example-trainer/pruned.onnx", inputs),
    }
    print(benchmark(files, inputs, rounds=50))


if __name__ == "__main__":
    main()
