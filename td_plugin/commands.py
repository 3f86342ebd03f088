"""The command line. Each command gathers its options, calls one function of the library and prints what it returns."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from td_plugin.errors import TdError

EXTRAS = {
    "transformers": "hf",
    "datasets": "hf",
    "accelerate": "hf",
    "sklearn": "hf",
    "PIL": "hf",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "safetensors": "onnx",
    "matplotlib": "plots",
}


class Group(typer.core.TyperGroup):
    """The one place where an expected error becomes a line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:  # typer does not export the type of its contexts
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except TdError as error:
            message = str(error)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            message = f"{error.name} is not installed; fix: pip install 'td-plugin[{EXTRAS[error.name]}]'"
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2)


class Printable(Protocol):
    """A result: plain values for machines, `str()` for people."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        ...


class RecipeName(str, Enum):
    """The recipes that `finetune` offers."""

    targeted_weight = "targeted_weight"
    targeted_unit = "targeted_unit"
    ramping_targeted_weight = "ramping_targeted_weight"
    ramping_targeted_unit = "ramping_targeted_unit"
    none = "none"


class SourceName(str, Enum):
    """Where `inspect` reads the units."""

    auto = "auto"
    graph = "graph"
    known = "known"


app = typer.Typer(
    cls=Group,
    name="td-plugin",
    help="Train it prunable, make it smaller, ship it as ONNX, know its latency.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
ModelDir = Annotated[Path, typer.Argument(help="Checkpoint directory, as save_pretrained or td-plugin wrote it.")]
OnnxFile = Annotated[Path, typer.Argument(help="ONNX file.")]
Length = Annotated[int, typer.Option("--sequence", min=1, help="Tokens per row, for text models.")]


def _show(work: Callable[[], Printable], as_json: bool) -> None:
    """Run `work` with everything it prints sent to stderr, then print its result, and nothing else, to stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        result = work()
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for models, picture and numbers.")] = Path("td-demo"),
    sparsity_level: Annotated[float, typer.Option(help="γ, the share of neurons and heads to remove.")] = 0.75,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data, of both trainings.")] = 30,
    seed: Annotated[int, typer.Option(help="Of initialisation, order and masks.")] = 0,
    as_json: Json = False,
) -> None:
    """The whole way on scikit-learn's digits: no downloads, under three minutes on two cores."""
    from td_plugin.integrations.demo import DemoConfig, run_demo

    _show(lambda: run_demo(DemoConfig(output, sparsity_level, epochs, seed)), as_json)


@app.command()
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

    method = MethodConfig(recipe.value, sparsity_level, drop_rate, ramp)
    train = TrainConfig(epochs, batch_size, learning_rate, seed, bf16)
    data = DataConfig(dataset, validation, text_column, image_column, label_column, max_length, max_train_samples)
    config = FinetuneConfig(model, data, output, method, train)

    from td_plugin.integrations.finetune import finetune as run  # after the options are found to be right: it is slow

    _show(lambda: run(config), as_json)


@app.command()
def shrink(
    model: ModelDir,
    output: Annotated[Path, typer.Argument(help="Directory for the smaller model.")],
    as_json: Json = False,
) -> None:
    """Remove the silent units of a pruned checkpoint."""
    from td_plugin.integrations.checkpoints import shrink_checkpoint

    _show(lambda: shrink_checkpoint(model, output), as_json)


@app.command()
def export(
    model: ModelDir,
    output: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    opset: Annotated[int, typer.Option(min=18, help="ONNX operator set.")] = 20,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as ONNX; the file is put in place only if it computes what the model computes."""
    from td_plugin.integrations.checkpoints import export_checkpoint

    _show(lambda: export_checkpoint(model, output, opset), as_json)


@app.command()
def quantize(
    source: OnnxFile, output: Annotated[Path, typer.Argument(help="ONNX file to write.")], as_json: Json = False
) -> None:
    """Write the int8 dynamic form of an ONNX file."""
    from td_plugin.export.inspection import inspect_graph
    from td_plugin.export.quantize import quantize as run

    _show(lambda: inspect_graph(run(source, output)), as_json)


@app.command()
def verify(
    model: ModelDir,
    file: OnnxFile,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference allowed; by precision if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare an ONNX file with the checkpoint that it came from, at several batch sizes and lengths."""
    from td_plugin.integrations.checkpoints import verify_checkpoint

    _show(lambda: verify_checkpoint(model, file, tolerance), as_json)


@app.command()
def benchmark(
    files: Annotated[list[str], typer.Argument(help="NAME=FILE.onnx or FILE.onnx; the first is the baseline.")],
    batch: Annotated[int, typer.Option(min=1, help="Rows per call.")] = 1,
    sequence: Length = 128,
    threads: Annotated[int, typer.Option(min=1, help="Threads inside one operator.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; each runs every file once.")] = 100,
    as_json: Json = False,
) -> None:
    """Time ONNX files against each other, interleaved, with an interval for the speed-up."""
    from td_plugin.export.benchmark import benchmark as run
    from td_plugin.export.example_inputs import inputs_for_graph

    named = _named(files)
    inputs = inputs_for_graph(next(iter(named.values())), batch, sequence)
    _show(lambda: run(named, inputs, threads=threads, rounds=rounds, progress=sys.stderr.isatty()), as_json)


def _named(files: list[str]) -> dict[str, str]:
    pairs = [(name or path, path) for name, _, path in (file.rpartition("=") for file in files)]
    if len({name for name, _ in pairs}) < len(pairs):
        raise TdError("two files have the same name", got=", ".join(files), fix="name them: dense=a.onnx pruned=b.onnx")
    return dict(pairs)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint directory or ONNX file.")],
    sparsity_level: Annotated[float | None, typer.Option(help="γ in [0, 1): show what this would leave.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Of units that γ removes; may be repeated.")] = None,
    source: Annotated[SourceName, typer.Option(help="Trace the model, or read what is known.")] = SourceName.auto,
    as_json: Json = False,
) -> None:
    """Show what can shrink in a checkpoint, what is fixed and why; or what an ONNX file takes and says."""
    from td_plugin.export.inspection import inspect_graph, inspect_model

    if path.suffix == ".onnx":
        if sparsity_level is not None or kind:
            raise TdError("an ONNX file does not name its units", where=str(path), fix="inspect the checkpoint")
        _show(lambda: inspect_graph(path), as_json)
        return

    from td_plugin.granularity import KINDS
    from td_plugin.integrations.checkpoints import load_checkpoint

    kinds = kind or KINDS
    _show(
        lambda: inspect_model(load_checkpoint(path), source=source.value, sparsity_level=sparsity_level, kinds=kinds),
        as_json,
    )
