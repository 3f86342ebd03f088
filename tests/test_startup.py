"""What an import and the help of the command line load: counted, and timed in processor seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import td_plugin

HEAVY = ("torch", "numpy", "numba", "transformers", "datasets", "onnx", "onnxruntime", "matplotlib", "scipy", "sklearn")
OPTIONAL = (*HEAVY[2:], "onnxscript", "typer", "rich")
SHOWN = ("demo", "finetune", "export", "optimize", "block-sparse", "verify", "benchmark", "inspect")
HELP = ("", "--help", *(f"{command} --help" for command in SHOWN))
WRONG = (
    "no-such-command",
    "shrink --no-such-option",
    "benchmark a.onnx --batch 0",
    "benchmark a=b.onnx a=c.onnx",
    "inspect a.onnx --sparsity-level 0.5",
    "optimize a.onnx b.onnx --metric f1",
    "block-sparse a.onnx b.onnx --block 16",
    "verify a b.onnx --max-accuracy-drop 0.1",
    "finetune --model a --dataset b --output c --sparsity-level 1.0",
    "finetune --model a --dataset b --output c --epochs 0",
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def command(arguments: str, then: str) -> str:
    return run(
        "import sys, time\n"
        f"sys.argv = ['td-plugin', *{arguments.split()}]\n"
        "from td_plugin.cli import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n    code = error.code\n"
        f"print(); print({then})"
    )


@pytest.mark.parametrize("arguments", [*HELP, *WRONG])
def test_help_and_wrong_options_load_nothing_heavy(arguments: str) -> None:
    expected = 0 if arguments in HELP[1:] else 2
    assert command(arguments, f"(code, [name for name in {HEAVY} if name in sys.modules])") == f"({expected}, [])"


def test_help_takes_less_than_half_a_second() -> None:
    assert min(float(command("--help", "time.process_time()")) for _ in range(3)) <= 0.5


def test_the_import_costs_little_over_torch() -> None:
    """All public names, not the bare package, which loads nothing."""
    code = (
        "import time, torch; start = time.process_time(); from td_plugin import *; print(time.process_time() - start)"
    )
    assert min(float(run(code)) for _ in range(3)) <= 0.15


def test_the_package_itself_does_not_load_torch() -> None:
    assert run("import sys, td_plugin; print('torch' in sys.modules)") == "False"


def test_all_public_names_are_there_without_an_optional_package() -> None:
    code = "import json, sys; from td_plugin import *; print(json.dumps([sorted(dir()), sorted(sys.modules)]))"
    found, modules = json.loads(run(code))
    assert not {*OPTIONAL} & {*modules}
    assert set(td_plugin.__all__) <= set(found) and set(td_plugin.__all__) <= set(dir(td_plugin))
    for name in td_plugin.__all__:
        assert getattr(td_plugin, name) is getattr(td_plugin, name)


def test_modules_of_the_package_are_attributes() -> None:
    code = (
        "import td_plugin as td\n"
        "def loaded(*names): return [name for name in names if name in vars(td)]\n"
        "before = loaded('contract', 'errors', 'export'); td.contract.Recipe\n"
        "before += loaded('recipes', 'structure', 'export'); td.recipes.targeted_unit()\n"
        "before += loaded('structure', 'export'); td.structure.survey\n"
        "before += loaded('export'); td.export.shrink\n"
        "print(before, td.Recipe is td.contract.Recipe)"
    )
    assert run(code) == "[] True"


@pytest.mark.parametrize("name", ["TargetDropout", "__main__"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(td_plugin, name)


def test_a_missing_package_is_named() -> None:
    """Not taken for an unknown name: the module is there, what it needs is not."""
    code = (
        "import sys, td_plugin\nsys.modules['torch'] = None\n"
        "try:\n    td_plugin.TargetedDropout\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    )
    assert run(code) == "torch"
