"""What a fine-tuning run is told: frozen values that check themselves, cheap to build and to print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from td_plugin.contract import Recipe, check_fraction
from td_plugin.errors import TdError

RECIPES = ("targeted_weight", "targeted_unit", "ramping_targeted_weight", "ramping_targeted_unit")


@dataclass(frozen=True)
class DataConfig:
    """Where the data are and which columns matter; whatever is left empty is found out.

    Attributes:
        dataset: hub id, directory, or one parquet, csv or json file with the training rows.
        validation: file with the evaluation rows; empty: the data set's own split, else a tenth of the training rows.
        text_column: the column with the text.
        image_column: the column with the image.
        label_column: the column with the class.
        max_length: texts are cut after so many tokens.
        max_train_samples: train on so many rows, drawn at random; 0 = all.
    """

    dataset: str
    validation: str = ""
    text_column: str = ""
    image_column: str = ""
    label_column: str = ""
    max_length: int = 128
    max_train_samples: int = 0


@dataclass(frozen=True)
class MethodConfig:
    """Which targeted dropout.

    Attributes:
        recipe: a name from `RECIPES`, or ``"none"`` for dense training.
        sparsity_level: γ in [0, 1), the share to prune.
        drop_rate: α in [0, 1), the chance that a candidate is dropped in a training step. 0 trains densely and prunes
            by magnitude at the end: the baseline.
        ramp: share of the run, in (0, 1], after which a ramping recipe is at γ and α; the rest trains what stays.
        layers: train a copy with so many of the model's layers, evenly chosen; 0: all.
        teacher: local directory or hub id of a fine-tuned classifier to learn from, too; empty: none.
    """

    recipe: str = "ramping_targeted_unit"
    sparsity_level: float = 0.5
    drop_rate: float = 0.99
    ramp: float = 0.5
    layers: int = 0
    teacher: str = ""

    def __post_init__(self) -> None:
        if self.recipe not in (*RECIPES, "none"):
            raise TdError("no such recipe", got=self.recipe, fix=f"choose one of {', '.join(RECIPES)} or none")
        check_fraction(self.sparsity_level, "sparsity_level (γ)")
        check_fraction(self.drop_rate, "drop_rate (α)")
        if not 0.0 < self.ramp <= 1.0:
            raise TdError("the ramp is outside (0, 1]", got=self.ramp)
        if self.layers < 0:
            raise TdError("a number of layers is not negative", where="layers", got=self.layers, fix="0 keeps all")

    def build(self) -> Recipe | None:
        """The recipe, or None for dense training."""
        if self.recipe == "none":
            return None

        from td_plugin import recipes  # brings torch, which the checks above do without

        make: Callable[..., Recipe] = getattr(recipes, self.recipe)
        return make(drop_rate=self.drop_rate)


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows per step.
        learning_rate: peak of the linear decay.
        seed: of the head's initialisation, the order of the rows, dropout and the masks.
        bf16: autocast to bfloat16.
    """

    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 5e-5
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch size", self.batch_size), ("rate", self.learning_rate)):
            if value <= 0:
                raise TdError(f"{name} must be positive", got=value)


@dataclass(frozen=True)
class FinetuneConfig:
    """A whole run.

    Attributes:
        model: local directory or hub id of a pretrained encoder or classifier.
        data: rows and columns.
        output: directory for the results.
        method: the targeted dropout.
        train: the optimisation.
    """

    model: str
    data: DataConfig
    output: Path
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
