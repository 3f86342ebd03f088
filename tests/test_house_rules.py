"""Budgets as checks: short files, short functions, a light import, only known names at the top level."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("td_plugin", "td_plugin/gates", "td_plugin/graph", "integrations", "export")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
OPTIONAL = (
    "transformers",
    "lightning",
    "accelerate",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "matplotlib",
    "typer",
    "rich",
    "datasets",
    "sklearn",
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            code = node.body[1:] if documented else node.body
            length = code[-1].end_lineno - code[0].lineno + 1 if code and code[-1].end_lineno else 0
            assert length <= 40, f"{path.name}: {node.name} has {length} lines"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_import_loads_no_optional_package_and_no_top_level_stray() -> None:
    names = (*OPTIONAL, "integrations", "export")
    assert python(f"import sys, td_plugin; print([n for n in {names} if n in sys.modules])") == "[]"


def test_the_export_package_loads_onnx_on_demand() -> None:
    code = "import sys; from td_plugin.export import shrink; print([n for n in sys.modules if n.startswith('onnx')])"
    assert python(code) == "[]"
