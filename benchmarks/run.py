"""Measure what this project claims about speed; prints tables and writes JSON.

    python benchmarks/run.py                      # everything, an hour on two cores
    python benchmarks/run.py steps --rounds 5     # one part of those listed by --help

Every figure is a median over rounds, and each round runs all variants. Compare ratios, since
machines differ.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import timm
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from benchmarks import endtoend, host, pipeline, processes, steps  # noqa: E402

PARTS = ("steps", "host", "pipeline", "processes", "endtoend")


def machine() -> str:
    """A line that names processor, GPU and versions."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((x.split(": ")[1] for x in lines if x.startswith("model name")), processor)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    return f"{os.cpu_count()} cores of {processor}, {gpu}, {versions}"


def print_row(*cells: object) -> None:
    """Print a row of a table in Markdown."""
    print(f"| {' | '.join(map(str, cells))} |")


def show_steps(rows: list[dict[str, Any]]) -> None:
    """Print a table with a column per pair of student and teacher."""
    print("\nTraining step, student ← teacher\n")
    print_row("", *(f"{row['student']} ← {row['teacher']}" for row in rows))
    print_row(*["---"] * (1 + len(rows)))
    print_row("input", *(row["input"] for row in rows))
    print_row("pixels, batch size", *(f"{row['pixels']}, {row['batch_size']}" for row in rows))
    print_row("**milliseconds per step**", *[""] * len(rows))
    for variant in steps.VARIANTS:
        print_row(variant, *(f"{row['ms'][variant]:.1f}" for row in rows))
    print_row("**ratios**", *[""] * len(rows))
    for name in rows[0]["ratios"]:
        print_row(name, *(f"{row['ratios'][name]:.3f}" for row in rows))


def show_host(rows: list[dict[str, Any]]) -> None:
    """Print a table with a row per network, and one with a row per function for each."""
    print("\nHost time of a training step, in microseconds of the process\n")
    print_row("network", "bare loop", *rows[0]["beyond"])
    print_row(*["---"] * (2 + len(rows[0]["beyond"])))
    for row in rows:
        print_row(row["network"], *(f"{us:.0f}" for us in (row["bare"], *row["beyond"].values())))
    for row in rows:
        print(f"\nThe functions of the full step, under cProfile: {row['network']}\n")
        print_row("function", "calls per step", "its own microseconds per step")
        print_row("---", "---", "---")
        for name, calls, microseconds in row["functions"]:
            print_row(name, f"{calls:.2f}", f"{microseconds:.1f}")


def show_pipeline(result: dict[str, Any]) -> None:
    """Print a table with a row per stage."""
    size, kilobytes = "{} x {}".format(*result["size"]), result["kB per file"]
    print(f"\nInput pipeline, one core, {size} JPEGs of {kilobytes:.0f} kB, to 224 pixels\n")
    print_row("stage", "ms per image", "images per second")
    print_row("---", "---", "---")
    for stage, ms in result["ms"].items():
        print_row(stage, f"{ms:.2f}", f"{1000 / ms:.0f}")
    print(f"\nRatio of the two whole pipelines, median of rounds: {result['ratio']:.2f}")
    print(f"Images per second from tar files / from folders: {result['tars']:.3f}")


def show_processes(result: dict[str, dict[str, float]]) -> None:
    """Print a table with a row per measurement."""
    print("\nStart-up time and memory\n")
    print_row("whole process of `main.py`", "")
    print_row("---", "---")
    for name, seconds in result["seconds"].items():
        print_row(name, f"{seconds:.2f} s")
    for name, mib in result["MiB"].items():
        print_row(name, f"{mib:.0f} MiB")


def show_endtoend(result: dict[str, Any]) -> None:
    """Print a table per comparison, with a row per variant."""
    sweep = "A sweep of 8 students, cifar_resnet8 ← cifar_resnet56 on digits"
    for name, comparison in result.items():
        title = sweep if name == "sweep" else f"A distilled run, resnet10t ← resnet18, {name}"
        print(f"\n{title}; teacher {comparison['teacher_accuracy']:.1f} %\n")
        print_row("", "wall time, s", "CPU time, s", "ratio of wall, of CPU time", "accuracy in %")
        print_row(*["---"] * 5)
        for variant, row in comparison["rows"].items():
            times = f"{row['wall']:.1f}", f"{row['cpu']:.1f}"
            ratios = f"{row['wall ratio']:.2f}, {row['cpu ratio']:.2f}"
            accuracies = row["accuracies"]
            spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
            print_row(variant, *times, ratios, f"{statistics.mean(accuracies):.1f}{spread}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default="benchmarks.json", help="file to write")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    chosen = args.parts or PARTS
    print(machine(), flush=True)
    result: dict[str, Any] = {"machine": machine(), "rounds": args.rounds}
    if "processes" in chosen:  # first: the others take memory and cores
        result["processes"] = processes.measure(max(3, args.rounds // 3))
        show_processes(result["processes"])
    if "endtoend" in chosen:
        result["endtoend"] = endtoend.measure(max(1, args.rounds // 3))
        show_endtoend(result["endtoend"])
    if "steps" in chosen:
        result["steps"] = steps.measure(args.rounds, torch.device(args.device))
        show_steps(result["steps"])
    if "host" in chosen:
        result["host"] = host.measure(args.rounds)
        show_host(result["host"])
    if "pipeline" in chosen:  # last: it keeps torch to one thread
        result["pipeline"] = pipeline.measure(args.rounds)
        for size in result["pipeline"]:
            show_pipeline(size)
    Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
