"""The command line of `pareto.py`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from pareto_methods import OPTIONS, ROWS

LEVELS = (0.5, 0.75, 0.875)
RATES = (1e-4, 2e-4, 4e-4)
SEARCHED = 0.75
DENSE_RATES = (5e-5, 1e-4, 2e-4)


def present(methods: list[str]) -> list[str]:
    """The methods whose packages are installed; the others are named."""
    found = [name for name in methods if not ROWS[name].needs or importlib.util.find_spec(ROWS[name].needs)]
    for name in sorted(set(methods) - set(found)):
        print(f"left out: {name}: {ROWS[name].needs} is not installed", file=sys.stderr)
    return found


def _value(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, float(value)
    except ValueError:
        return key, value


def parse(description: str | None) -> argparse.Namespace:
    """The options; methods whose packages are not installed are left out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["teach", "search", "train", "run", "deploy", "report"])
    parser.add_argument("--model", help="directory of the pretrained encoder")
    parser.add_argument("--train", help="file with text and label: training and held-out rows")
    parser.add_argument("--test", help="file with text and label: the final numbers")
    parser.add_argument("--output", type=Path, default=Path("build/finetune"))
    parser.add_argument("--rows", type=int, default=20_000, help="training rows; 0: all")
    parser.add_argument("--held-out", type=int, default=2_000, help="further training rows, for choices")
    parser.add_argument("--teacher-epochs", type=float, default=3.0)
    parser.add_argument("--teacher-rates", type=float, nargs="+", default=list(DENSE_RATES), help="to try")
    parser.add_argument("--epochs", type=float, default=3.0, help="of every method, after the dense fine-tune")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS), help="γ")
    parser.add_argument("--searched", type=float, default=SEARCHED, help="γ at which learning rates are tried")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="to try")
    parser.add_argument("--options", type=_value, nargs="*", default=[], help="key=value, of the stage 'run'")
    parser.add_argument("--sequence", type=int, default=64, help="tokens when timed; batch 1")
    parser.add_argument("--rounds", type=int, default=200, help="of the stage 'deploy'")
    parser.add_argument("--name", default="finetune_sst2", help="of the report's files, without suffix")
    parser.add_argument("--title", default="SST-2, MiniLM", help="of the report's plot")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="where the report goes")
    parser.add_argument("--add", action="store_true", help="to the runs of other seeds that the report holds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each in a process")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    args = parser.parse_args()
    args.options = dict(args.options)
    if args.stage != "report" and not (args.model and args.train and args.test):
        parser.error("--model, --train and --test are needed")
    if unknown := sorted(set(args.methods) - set(ROWS)):
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(ROWS)}")
    args.methods = present(args.methods)
    if unknown := sorted(set(args.options) - set(OPTIONS)):
        parser.error(f"unknown options {', '.join(unknown)}; there are {', '.join(OPTIONS)}")
    if args.options and args.stage != "run":
        parser.error("--options are of the stage 'run'")
    return args
