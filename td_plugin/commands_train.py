"""The commands that train: ``demo`` and ``finetune``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from td_plugin.commands_shared import Json, show


class RecipeName(str, Enum):
    """The recipes that `finetune` offers."""

    targeted_weight = "targeted_weight"
    targeted_unit = "targeted_unit"
    ramping_targeted_weight = "ramping_targeted_weight"
    ramping_targeted_unit = "ramping_targeted_unit"
    none = "none"


def demo(
    output: Annotated[Path, typer.Option(help="Directory for models, picture and numbers.")] = Path("td-demo"),
    sparsity_level: Annotated[float, typer.Option(help="γ, the share of neurons and heads to remove.")] = 0.75,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data, of both trainings.")] = 30,
    seed: Annotated[int, typer.Option(help="Of initialisation, order and masks.")] = 0,
    as_json: Json = False,
) -> None:
    """The whole way on scikit-learn's digits: no downloads, under three minutes on two cores."""
    from td_plugin.integrations.demo import DemoConfig, run_demo

    show(lambda: run_demo(DemoConfig(output, sparsity_level, epochs, seed)), as_json)


def finetune(
    model: Annotated[str, typer.Option(help="Local directory or hub id of a pretrained encoder or classifier.")],
    dataset: Annotated[str, typer.Option(help="Hub id, directory, or a parquet, csv or json file to train on.")],
    output: Annotated[Path, typer.Option(help="Directory for metrics, checkpoints and the ONNX file.")],
    validation: Annotated[str, typer.Option(help="File to evaluate on; else the data set's split, else a tenth.")] = "",
    text_column: Annotated[str, typer.Option(help="Found by its type unless given.")] = "",
    image_column: Annotated[str, typer.Option(help="Found by its type unless given.")] = "",
    label_column: Annotated[str, typer.Option(help="Found by its type or name unless given.")] = "",
    recipe: Annotated[RecipeName, typer.Option(help="Method; none trains densely.")] = RecipeName.ramping_targeted_unit,
    sparsity_level: Annotated[float, typer.Option(help="γ in [0, 1), the share to prune.")] = 0.5,
    drop_rate: Annotated[float, typer.Option(help="α in [0, 1): 0 trains densely and prunes at the end.")] = 0.99,
    ramp: Annotated[float, typer.Option(help="Share of the run after which a ramping recipe is at γ and α.")] = 0.5,
    layers: Annotated[int, typer.Option(min=0, help="Keep so many evenly chosen layers; 0 = all.")] = 0,
    teacher: Annotated[str, typer.Option(help="A fine-tuned classifier to learn from: directory or hub id.")] = "",
    epochs: Annotated[float, typer.Option(help="Passes over the training rows.")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak of the linear decay.")] = 5e-5,
    max_length: Annotated[int, typer.Option(min=2, help="Texts are cut after so many tokens.")] = 128,
    max_train_samples: Annotated[int, typer.Option(min=0, help="Train on so many random rows; 0 = all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the head, the order, dropout and the masks.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a text or image classifier so that it can be pruned; prune, shrink and export it."""
    from td_plugin.integrations.config import DataConfig, FinetuneConfig, MethodConfig, TrainConfig

    method = MethodConfig(recipe.value, sparsity_level, drop_rate, ramp, layers, teacher)
    train = TrainConfig(epochs, batch_size, learning_rate, seed, bf16)
    data = DataConfig(dataset, validation, text_column, image_column, label_column, max_length, max_train_samples)
    config = FinetuneConfig(model, data, output, method, train)

    from td_plugin.integrations.finetune import finetune as run  # after the options are found to be right: it is slow

    show(lambda: run(config), as_json)
