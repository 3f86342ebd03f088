"""Fine-tune, prune, shrink, export: a data set and a pretrained encoder in, the artefacts and their accuracy out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer, set_seed

from td_plugin import TargetedDropout
from td_plugin.errors import TdError
from td_plugin.export import fewer_layers, save_pretrained, shrink, to_onnx
from td_plugin.files import staged_directory, staged_file
from td_plugin.integrations.classifiers import Classifier, load_classifier, load_teacher
from td_plugin.integrations.config import FinetuneConfig
from td_plugin.integrations.data import load_data
from td_plugin.integrations.distillation import Distillation, Teaching
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.integrations.hf_settings import autocast
from td_plugin.integrations.training import make_trainer, model_accuracy, onnx_accuracy

EXAMPLE_ROWS = 4  # rows that the exporter traces and the verifier compares
LOGITS, TEMPERATURE = 0.9, 2.0  # of the teacher's part in the loss, as in docs/results.md


@dataclass
class FinetuneResult:
    """What a run gave; filled stage by stage.

    Attributes:
        accuracy: share of the evaluation rows, by stage: before_pruning, after_pruning, after_shrink, onnx.
        parameters: number of parameters, by stage: dense, fewer_layers, shrunk.
        files: the artefacts, by stage.
        notes: what was left out, and why.
        sparsity: the sparsifier's report; empty for dense training.
    """

    accuracy: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sparsity: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """One line per number and file."""
        lines = [f"accuracy {stage:<16} {value:.4f}" for stage, value in self.accuracy.items()]
        lines += [f"parameters {stage:<14} {count:,}" for stage, count in self.parameters.items()]
        lines += [f"{stage:<25} {path}" for stage, path in self.files.items()]
        return "\n".join([*lines, *self.notes])


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Run the whole way and write ``masked/``, ``shrunk/``, ``model.onnx`` and ``metrics.json`` into `config.output`.

    Output directory, data and model are checked before training starts. Each artefact is put in place as soon as it is
    whole, so a failure late in the run does not cost the trained checkpoint. Recipes that prune single weights leave
    nothing to shrink: the ONNX file is then the masked model's. Without a recipe ``masked/`` is called ``dense/``.

    Raises:
        TdError: the output directory, the data, the model or the method's numbers do not fit.
    """
    check_writable(config.output)
    data = load_data(config.data, config.train.seed)
    set_seed(config.train.seed)  # the new head's weights
    classifier = load_classifier(config.model, data, config.data.max_length)
    result = FinetuneResult(parameters={"dense": count_parameters(classifier.model)})
    distillation = None
    if config.method.teacher:
        distillation = Distillation(load_teacher(config.method.teacher, data, classifier.model), TEMPERATURE, LOGITS)
    if config.method.layers:
        classifier = replace(classifier, model=fewer_layers(classifier.model, config.method.layers))
        result.parameters["fewer_layers"] = count_parameters(classifier.model)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _train_and_prune(config, classifier, distillation, scratch, result)
        _save_checkpoint(config, classifier, result)
        small = _shrunk(config, trainer, classifier, result)
        _export(config, trainer, classifier, small, result)
    result.files["metrics"] = str(config.output / "metrics.json")
    with staged_file(config.output / "metrics.json") as path:
        document = {"config": asdict(config), **result.to_dict()}
        path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    return result


def check_writable(output: Path) -> None:
    """Refuse, before hours of training, an output directory that could not be written. Leaves nothing behind.

    Raises:
        TdError: it is a file, lies under one, or its nearest existing parent takes no new file.
    """
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".td-plugin.", dir=existing):  # permission bits do not tell it all
            pass
    except OSError as error:
        fix = "choose a writable path"
        raise TdError("the output directory cannot be written", where=str(output), got=error, fix=fix) from error


def started(callback: TargetedDropoutCallback) -> TargetedDropout:
    """The sparsifier of a callback whose training has run.

    Raises:
        TdError: it has not.
    """
    if callback.sparsifier is None:
        raise TdError("training has not begun", fix="call trainer.train() first")
    return callback.sparsifier


def count_parameters(model: nn.Module) -> int:
    """Number of entries of all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _taught(trainer: Trainer, model: nn.Module, distillation: Distillation | None) -> Iterator[None]:
    """What the callback does for training with a recipe, for one without."""
    if distillation is None:
        yield
        return
    teaching = Teaching(distillation)
    teaching.begin(model, resumed=False, autocast=autocast(trainer.args))
    try:
        yield
    finally:
        teaching.end()


def _train_and_prune(
    config: FinetuneConfig,
    classifier: Classifier,
    distillation: Distillation | None,
    scratch: str,
    result: FinetuneResult,
) -> Trainer:
    """Train, measure the dense and the pruned model, and bake the masks in."""
    recipe = config.method.build()
    if recipe is None:
        trainer = make_trainer(classifier, config.train, scratch)
        with _taught(trainer, classifier.model, distillation):
            trainer.train()
        result.accuracy["before_pruning"] = model_accuracy(trainer, classifier.model)
        return trainer
    callback = TargetedDropoutCallback(
        recipe,
        config.method.sparsity_level,
        seed=config.train.seed,
        recipe_steps=config.method.ramp,
        squash=False,
        distillation=distillation,
    )
    trainer = make_trainer(classifier, config.train, scratch, [callback])
    trainer.train()
    sparsifier = started(callback)
    with sparsifier.dense():
        result.accuracy["before_pruning"] = model_accuracy(trainer, classifier.model)
    result.sparsity = sparsifier.report().to_dict()
    sparsifier.squash_mask()
    result.accuracy["after_pruning"] = model_accuracy(trainer, classifier.model)
    return trainer


def _save_checkpoint(config: FinetuneConfig, classifier: Classifier, result: FinetuneResult) -> None:
    name = "dense" if config.method.recipe == "none" else "masked"
    classifier.model.cpu()
    with staged_directory(config.output / name) as stage:
        classifier.model.save_pretrained(stage)
        classifier.processor.save_pretrained(stage)
    result.files[name] = str(config.output / name)


def _shrunk(
    config: FinetuneConfig, trainer: Trainer, classifier: Classifier, result: FinetuneResult
) -> PreTrainedModel:
    recipe = config.method.build()
    if recipe is None or not recipe.granularity.kinds:
        result.notes.append(f"nothing to shrink: {config.method.recipe} removes no whole units; the ONNX file is dense")
        return classifier.model
    small = shrink(classifier.model)
    result.parameters["shrunk"] = count_parameters(small)
    with staged_directory(config.output / "shrunk") as stage:
        save_pretrained(small, stage)
        classifier.processor.save_pretrained(stage)
    result.files["shrunk"] = str(config.output / "shrunk")
    result.accuracy["after_shrink"] = model_accuracy(trainer, small)
    return small


def _export(
    config: FinetuneConfig, trainer: Trainer, classifier: Classifier, model: PreTrainedModel, result: FinetuneResult
) -> None:
    model.cpu()
    rows = [classifier.validation[index] for index in range(min(EXAMPLE_ROWS, len(classifier.validation)))]
    inputs = {name: value for name, value in classifier.collate(rows).items() if name != "labels"}
    metadata = {"recipe": config.method.recipe, "sparsity_level": str(config.method.sparsity_level)}
    path = to_onnx(model, config.output / "model.onnx", inputs, metadata=metadata)
    result.files["onnx"] = str(path)
    result.accuracy["onnx"] = onnx_accuracy(path, trainer.get_eval_dataloader())
