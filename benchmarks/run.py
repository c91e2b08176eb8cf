"""Measure what this project claims about speed; prints tables and writes JSON.

    python benchmarks/run.py                      # everything, some minutes
    python benchmarks/run.py steps --rounds 5     # one part: steps, pipeline or processes

Every figure is a median over rounds that take all variants in turn; compare ratios, since machines
differ.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import timm
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from benchmarks import pipeline, processes, steps  # noqa: E402


def machine() -> str:
    """A line that names processor, GPU and versions."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((x.split(": ")[1] for x in lines if x.startswith("model name")), processor)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    return f"{os.cpu_count()} cores of {processor}, {gpu}, {versions}"


def show_steps(rows: list[dict[str, Any]]) -> None:
    ratios = [name for name in rows[0] if "/" in name]
    print("\nTraining step, milliseconds; then ratios\n")
    print("| student ← teacher | " + " | ".join([*steps.VARIANTS, *ratios]) + " |")
    print("| --- |" + " --- |" * (len(steps.VARIANTS) + len(ratios)))
    for row in rows:
        name = f"{row['student']} ← {row['teacher']}, {row['pixels']} px, batch {row['batch_size']}"
        name += "" if row["input"] == "in memory" else f", {row['input']}"
        cells = [f"{row['ms'][variant]:.1f}" for variant in steps.VARIANTS]
        cells += [f"{row[ratio]:.3f}" for ratio in ratios]
        print(f"| {name} | " + " | ".join(cells) + " |")


def show_pipeline(result: dict[str, Any]) -> None:
    print(f"\nInput, one core, 500 x 375 JPEGs of {result['kB a file']:.0f} kB to 224 pixels\n")
    print("| stage | ms an image | images/s |\n| --- | --- | --- |")
    for stage, ms in result["ms"].items():
        print(f"| {stage} | {ms:.2f} | {1000 / ms:.0f} |")
    print(f"\nRatio of the two pipelines, median of rounds: {result['ratio']:.2f}")


def show_processes(result: dict[str, Any]) -> None:
    print("\nWhole processes\n\n| what | |\n| --- | --- |")
    for name, value in result.items():
        if isinstance(value, dict):
            for variant, mib in value.items():
                print(f"| {name}: {variant} | {mib:.0f} |")
        else:
            print(f"| {name} | {value:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("steps", "pipeline", "processes")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default="benchmarks.json", help="file to write")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    chosen = args.parts or parts
    print(machine(), flush=True)
    result: dict[str, Any] = {"machine": machine(), "rounds": args.rounds}
    if "processes" in chosen:  # first: the others take memory and cores
        result["processes"] = processes.measure(max(3, args.rounds // 3))
        show_processes(result["processes"])
    if "steps" in chosen:
        result["steps"] = steps.measure(args.rounds, torch.device(args.device))
        show_steps(result["steps"])
    if "pipeline" in chosen:  # last: it keeps torch to one thread
        result["pipeline"] = pipeline.measure(args.rounds)
        show_pipeline(result["pipeline"])
    Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
