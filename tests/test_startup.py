"""What an import and the help of the command line load: counted, and timed in processor seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import td_plugin

HEAVY = ("torch", "numpy", "numba", "transformers", "datasets", "onnx", "onnxruntime", "matplotlib", "scipy", "sklearn")
HELP = ("[]", "['--help']", "['export', '--help']", "['shrink', '--no-such-option']", "['no-such-command']")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def command(arguments: str, then: str) -> str:
    return run(
        "import sys, time\n"
        f"sys.argv = ['td-plugin', *{arguments}]\n"
        "from td_plugin.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print(); print({then})"
    )


@pytest.mark.parametrize("arguments", HELP)
def test_help_and_wrong_usage_load_nothing_heavy(arguments: str) -> None:
    assert command(arguments, f"[name for name in {HEAVY} if name in sys.modules]") == "[]"


def test_help_takes_less_than_half_a_second() -> None:
    assert min(float(command("['--help']", "time.process_time()")) for _ in range(3)) <= 0.5


def test_the_import_costs_little_over_torch() -> None:
    """All public names, not the bare package, which loads nothing."""
    code = (
        "import time, torch; start = time.process_time(); from td_plugin import *; print(time.process_time() - start)"
    )
    assert min(float(run(code)) for _ in range(5)) <= 0.15


def test_the_package_itself_does_not_load_torch() -> None:
    assert run("import sys, td_plugin; print('torch' in sys.modules)") == "False"


def test_all_public_names_are_there() -> None:
    found = json.loads(run("import json; from td_plugin import *; print(json.dumps(sorted(dir())))"))
    assert set(td_plugin.__all__) <= set(found) and set(td_plugin.__all__) <= set(dir(td_plugin))
    for name in td_plugin.__all__:
        assert getattr(td_plugin, name) is getattr(td_plugin, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'TargetDropout'"):
        td_plugin.TargetDropout  # noqa: B018
