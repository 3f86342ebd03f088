"""The command line. Each command gathers its options, calls one function of the library and prints what it returns.

Here and in the modules that define commands only light packages are imported, so that help and wrong options answer at
once; a command imports what it works with.
"""

from __future__ import annotations

from typing import Any

import typer

from td_plugin.commands_benchmark import benchmark
from td_plugin.commands_check import check
from td_plugin.commands_deploy import export, inspect, quantize, shrink, verify
from td_plugin.commands_forms import block_sparse, optimize
from td_plugin.commands_train import demo, finetune
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
    "numpy": "onnx",
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


app = typer.Typer(
    cls=Group,
    name="td-plugin",
    help="Train it prunable, make it smaller, ship it as ONNX, know its latency.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (
    demo, finetune, shrink, export, optimize, quantize, block_sparse, verify, benchmark, inspect, check
):  # fmt: skip
    app.command()(command)
