"""Channels of a residual network on CIFAR-10 removed: accuracy against measured onnxruntime latency, beside peers.

    python benchmarks/finetune/convnet.py all --train cifar10_train.parquet --test cifar10_test.parquet
    python benchmarks/finetune/convnet.py report

One dense network per seed is trained first. Every method starts from it and has the same further steps, or, where the
network is narrower from the start, the steps of both trainings together. The learning rate of each is chosen on rows
held out of the training data, at one γ, with seed 0. All channels take part, those of the residual streams too. All
methods end with the same widths: what γ leaves, rounded up to the blocks that onnxruntime computes in.

`--quick` (the default): a network of one unit per stage behind a stem with stride 2, 12 and 6 epochs of 20,480 rows:
about 40 minutes on two cores, as two processes of one thread. `--full`: the network of `reproduce/resnet.py --full`,
150 and 75 epochs. Stages: `train` skips what is on disk, so it can be stopped at any moment; `deploy` times (let
nothing else run); `report` needs only what is stored.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from convnet_runs import FULL, METHODS, QUICK, Found, Job, make
from pareto_report import faster, spread
from processes import in_processes
from provenance import command, commit

from td_plugin.export import benchmark
from td_plugin.export.plots import plot_tradeoff
from td_plugin.files import staged_file

LEVELS = (0.5, 0.7)
RATES = (0.02, 0.1)


def job(args: argparse.Namespace, method: str, level: float, seed: int, rate: float) -> Job:
    """One run of these options."""
    return Job(method, level, seed, rate, args.budget, args.train, args.test, args.output, args.device)


def run_all(jobs: Sequence[Job], processes: int, what: str) -> None:
    """Make the runs that are not on disk."""
    in_processes(make, [(job,) for job in jobs if not job.done], processes, what)


def read(job: Job) -> Found:
    """The result of a run."""
    return json.loads((job.folder / "result.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def levels_of(method: str, levels: Sequence[float]) -> Sequence[float]:
    """γ to try: one for what does not depend on it."""
    return (0.0,) if method == "trained-on" else levels


def searches(args: argparse.Namespace, method: str) -> list[Job]:
    """The runs that a learning rate is chosen from."""
    (level, *_) = levels_of(method, [args.levels[-1]])
    return [job(args, method, level, args.seeds[0], rate) for rate in args.rates]


def chosen(args: argparse.Namespace, method: str) -> Iterator[Job]:
    """The runs of all levels and seeds with the best learning rate."""
    rate = 0.0
    if METHODS[method].searched:
        rate = max(searches(args, method), key=lambda job: read(job)["held_out"]).rate
    for level in levels_of(method, args.levels):
        for seed in args.seeds:
            yield job(args, method, level, seed, rate)


def train(args: argparse.Namespace) -> None:
    """The dense networks, the search, then everything else."""
    (args.output / "settings.json").parent.mkdir(parents=True, exist_ok=True)
    run_all([job(args, "dense", 0.0, seed, 0.0) for seed in args.seeds], args.jobs, "dense")
    searched = [method for method in args.methods if METHODS[method].searched]
    run_all([job for method in searched for job in searches(args, method)], args.jobs, "learning rates")
    run_all([job for method in args.methods for job in chosen(args, method)], args.jobs, "runs")


def results(args: argparse.Namespace) -> dict[str, list[Found]]:
    """What is on disk of the comparison: `dense` and `runs`, with the names of their folders."""
    dense = [job(args, "dense", 0.0, seed, 0.0) for seed in args.seeds]
    runs = [job for method in args.methods for job in chosen(args, method)]
    named = {"dense": dense, "runs": runs}
    return {key: [{**read(job), "name": job.folder.name} for job in jobs] for key, jobs in named.items()}


def deploy(args: argparse.Namespace) -> None:
    """Time the files of the first seed against the dense one: batch 1, one thread, all interleaved."""
    found = results(args)
    base = found["dense"][0]["name"]
    names = [base, *(run["name"] for run in found["runs"] if run["seed"] == args.seeds[0])]
    files = {name: args.output / name / "model.onnx" for name in names}
    report = benchmark(files, {"x": torch.randn(1, 3, 32, 32)}, threads=1, rounds=args.rounds, progress=True)
    speedups = {name: vars(report.speedup(name, over=base)) for name in names[1:]}
    measured = report.to_dict()
    microseconds = {file["name"]: 1e6 * file["p50_seconds"] for file in measured["files"]}
    latency = {"rounds": args.rounds, "speedups": speedups, "microseconds": microseconds}
    with staged_file(args.output / "latency.json") as path:
        path.write_text(json.dumps({**latency, "machine": measured.get("machine")}, indent=1), encoding="utf-8")


def reference(found: Found) -> float:
    """Mean test accuracy of the dense network after the steps that all methods have."""
    same_steps = [run["test"] for run in found["runs"] if run["method"] == "trained-on"]
    return statistics.mean(same_steps or [run["test"] for run in found["dense"]])


def markdown(found: Found) -> str:
    """One line per method and γ."""
    header = ["method", "γ", "test accuracy, %", "points below dense, trained on", "speed-up [95 %]", "parameters"]
    lines = [f"| {' | '.join([*header, 'learning rate', 'held out, %', 'seeds'])} |", f"|{'---|' * 9}"]
    base = reference(found)
    for (method, level), runs in {("dense", 0.0): found["dense"], **_grouped(found["runs"])}.items():
        below = 100 * (base - statistics.mean(run["test"] for run in runs))
        cells = [
            METHODS[method].title if method != "dense" else "**dense**",
            f"{level:g}" if level else "",
            spread([run["test"] for run in runs]),
            f"{below:+.1f}" if method != "trained-on" else "",
            faster(found["latency"]["speedups"].get(runs[0]["name"])) if method != "dense" else "1",
            f"{runs[0]['parameters'] / 1e3:.0f} k",
            f"{runs[0]['rate']:g}" if runs[0]["rate"] else "",
            spread([run["held_out"] for run in runs]),
            str(len(runs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _grouped(runs: Sequence[Found]) -> dict[tuple[str, float], list[Found]]:
    found: dict[tuple[str, float], list[Found]] = {}
    for run in runs:
        found.setdefault((run["method"], run["level"]), []).append(run)
    return found


def curves(found: Found) -> Mapping[str, list[tuple[float, float]]]:
    """By method, (speed-up, mean accuracy) from the dense network on; untrained ones, far below, only in the table."""
    made: dict[str, list[tuple[float, float]]] = {}
    origin = (1.0, reference(found))
    for (method, level), runs in _grouped(found["runs"]).items():
        if level and method != "magnitude":
            speedup = found["latency"]["speedups"][runs[0]["name"]]["median"]
            point = (speedup, statistics.mean(run["test"] for run in runs))
            made.setdefault(METHODS[method].title, [origin]).append(point)
    return made


def render(found: Found, picture: Path) -> str:
    """The table, and the plot beside it, of the file that `report` leaves."""
    conditions = "onnxruntime, batch 1, 1 thread"
    plot_tradeoff(curves(found), picture.with_suffix(".png"), title=found["title"], conditions=conditions)
    return markdown(found)


def report(args: argparse.Namespace) -> str:
    """Write JSON, table and plot; the table is returned."""
    latency = json.loads((args.output / "latency.json").read_text(encoding="utf-8"))
    budget = {key: value for key, value in asdict(args.budget).items() if key != "strengths"}
    about = {"title": f"CIFAR-10, residual network, {'full' if args.full else 'quick'}", "torch": torch.__version__}
    made_by = {"command": command("benchmarks/finetune/convnet.py", args.words), "commit": commit()}
    found = {**about, **made_by, "budget": budget, **results(args), "latency": latency}
    args.results.mkdir(parents=True, exist_ok=True)
    with staged_file(args.results / f"{args.name}.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = render(found, args.results / args.name)
    with staged_file(args.results / f"{args.name}.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "deploy", "report", "all"])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the small network (the default)")
    size.add_argument("--full", action="store_true")
    parser.add_argument("--train", default="", help="parquet file with columns image and label")
    parser.add_argument("--test", default="", help="another, for the final numbers")
    parser.add_argument("--rows", type=int, help="to train on")
    parser.add_argument("--epochs", type=int, nargs=2, metavar=("DENSE", "FURTHER"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS), help="γ; the last is searched at")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates to try")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=300, help="of the stage deploy")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="default: build/convnet-quick or -full")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", help="of the report's files; default: convnet_quick or _full")
    args = parser.parse_args(arguments)
    args.words = sys.argv[1:] if arguments is None else arguments
    if args.stage in ("train", "all") and not (args.train and args.test):
        parser.error("--train and --test are needed")
    size = "full" if args.full else "quick"
    args.output, args.name = args.output or Path(f"build/convnet-{size}"), args.name or f"convnet_{size}"
    args.budget = FULL if args.full else QUICK
    if args.rows or args.epochs:
        settings = args.budget.settings
        (dense, further) = args.epochs or (settings.epochs, args.budget.epochs)
        settings = replace(settings, rows=args.rows or settings.rows, epochs=dense)
        args.budget = replace(args.budget, settings=settings, epochs=further)
    for name in [name for name in args.methods if METHODS[name].needs]:
        if importlib.util.find_spec(METHODS[name].needs) is None:
            args.methods.remove(name)
            print(f"left out: {name}: {METHODS[name].needs} is not installed", file=sys.stderr)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages asked for."""
    args = parse(arguments)
    torch.set_num_threads(1)
    if args.stage in ("train", "all"):
        train(args)
    if args.stage in ("deploy", "all"):
        deploy(args)
    if args.stage in ("report", "all"):
        print(report(args))


if __name__ == "__main__":
    main()
