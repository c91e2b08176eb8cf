"""Kill training with SIGKILL at random moments, start it again, and compare with a run left alone.

    python tools/kill_test.py --kills 20                  # one process
    python tools/kill_test.py --kills 20 --processes 2    # torchrun
    python tools/kill_test.py --elastic true              # torchrun restarts a killed worker itself
    python tools/kill_test.py --fill true                 # filling --teacher_cache, not training
    python tools/kill_test.py --flags "--train_samples 40 --unlabeled rest --holdout 1117"

Weights, EMA, optimizer state and log.txt must be the same bits. EMA, accumulation, mixup and a
teacher are on, and a checkpoint is written at every step, so that many kills fall into a write.
While a store is filled, every row that has a checksum must be the right one after every kill.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from helpers import children_of, is_same, torchrun  # noqa: E402

import models  # noqa: E402, F401
from teacher.logit_store import LogitFile, RowFormat  # noqa: E402

FLAGS = """--device cpu --num_workers 1 --model cifar_resnet8 --train_samples 320 --batch_size 8
--update_freq 2 --epochs 8 --save_ckpt_steps 1 --model_ema true --model_ema_eval true
--kd true --teacher_arch cifar_resnet8"""
MORE_FLAGS: list[str] = []  # of --flags


def command(processes: int, output_dir: Path, teacher: Path, restarts: int = 0) -> list[str]:
    argv = torchrun(processes, restarts) if processes > 1 else [sys.executable]
    argv += ["main.py", *FLAGS.split(), "--teacher_path", str(teacher), *MORE_FLAGS]
    return [*argv, "--output_dir", str(output_dir)]


def start(argv: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=quiet, stderr=quiet, start_new_session=True
    )


def difference(alone: Path, killed: Path) -> str:
    """What differs between two finished runs; '' where nothing does."""
    if (alone / "log.txt").read_bytes() != (killed / "log.txt").read_bytes():
        return "log.txt"
    for name in ("checkpoint-7.pth", "checkpoint-best.pth", "checkpoint-best-ema.pth"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (alone, killed))
        for part in ("model", "model_ema", "optimizer", "epoch", "best", "scores"):
            if not is_same(a[part], b[part]):
                return f"{part} of {name}"
    return ""


def family(pid: int) -> list[int]:
    """A process and all below it, torchrun's workers and their loader workers too (Linux)."""
    try:
        children = children_of(pid)
    except OSError:
        return [pid]
    return [pid] + [below for child in children for below in family(child)]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # gone with its parent
        os.kill(pid, signal.SIGKILL)


def run_killed(
    argv: list[str], folder: Path, seconds: float, kills: int, rng: random.Random
) -> tuple:
    """Run to the end through up to `kills` kills; returns how many there were, and in a write."""
    done = in_write = 0
    while True:
        process = start(argv)
        if done < kills:
            try:
                process.wait(timeout=rng.uniform(0.3, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                for pid in family(process.pid):
                    kill(pid)
                process.wait()
                done += 1
                in_write += any(folder.glob(".*.tmp"))
                continue
        if process.wait() != 0:
            sys.exit(f"exit code {process.returncode} after {done} kills: {' '.join(argv)}")
        return done, in_write


def kill_a_worker(argv: list[str], seconds: float) -> None:
    """Kill one worker of torchrun's group half-way; the group must restart and finish."""
    process = start(argv)
    time.sleep(0.7 * seconds)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    if process.wait() != 0:
        sys.exit(f"torchrun ended with {process.returncode} after one worker was killed")


def fill_command(processes: int, cache: Path, teacher: Path) -> list[str]:
    """Many small views, so that much of the time goes into writing."""
    flags = "--train_samples 64 --epochs 600 --mixup_mode pair --teacher_cache_only true"
    argv = command(processes, cache.with_name("unused"), teacher)
    return [*argv, *flags.split(), "--teacher_cache", str(cache)]


def false_rows(reference: Path, cache: Path) -> tuple[int, int, int]:
    """Rows that are complete and wrong, rows that are complete, rows without their checksum.

    Raises: UserError for a complete row that does not match its checksum.
    """
    wrong = complete = incomplete = 0
    row_format = RowFormat(10, "float16")
    store_id = json.loads((cache / "manifest.json").read_text())["id"]
    for path in cache.glob("view-*.sums"):
        file = LogitFile.open(path.with_suffix(""), 64, row_format, store_id)
        is_complete = file.sums != 0
        for place in np.flatnonzero(is_complete).tolist():
            file.read(range(place, place + 1))
        right = np.fromfile(reference / f"{path.stem}.logits", np.float16).reshape(64, 10)
        wrong += int((file.rows != right).any(axis=1)[is_complete].sum())
        complete += int(is_complete.sum())
        incomplete += int((file.rows.any(axis=1) & ~is_complete).sum())
    return wrong, complete, incomplete


def kill_while_filling(folder: Path, teacher: Path, args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)
    reference = folder / "reference"
    if start(fill_command(1, reference, teacher)).wait() != 0:
        sys.exit("the filling left alone failed")
    kills = in_write = runs = 0
    while kills < args.kills:
        cache = folder / f"cache-{runs}"
        process = start(fill_command(args.processes, cache, teacher))
        views = len(list(cache.glob("view-*.sums")))
        while process.poll() is None and len(list(cache.glob("view-*.sums"))) == views:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        is_done = process.poll() is not None
        for pid in [] if is_done else family(process.pid):
            kill(pid)
        if process.wait() not in (0, -signal.SIGKILL):
            sys.exit(f"exit code {process.returncode} after {kills} kills")
        wrong, complete, incomplete = false_rows(reference, cache)
        if wrong or (is_done and complete != 600 * 64):
            sys.exit(f"after {kills} kills: {wrong} of {complete} complete rows are false")
        kills, in_write, runs = kills + (not is_done), in_write + (incomplete > 0), runs + is_done
    print(
        f"{kills} kills ({in_write} of them between a row and its checksum) of {args.processes} "
        f"process(es) that fill a store: no false row; {complete:,} complete rows at the last"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--elastic", default="false", choices=("true", "false"))
    parser.add_argument("--fill", default="false", choices=("true", "false"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flags", default="")
    args = parser.parse_args()
    MORE_FLAGS.extend(args.flags.split())
    rng = random.Random(args.seed)
    processes = 2 if args.elastic == "true" else args.processes
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.manual_seed(0)
        teacher = folder / "teacher.pth"
        torch.save(timm.create_model("cifar_resnet8", num_classes=10).state_dict(), teacher)
        if args.fill == "true":
            kill_while_filling(folder, teacher, args)
            return
        began = time.perf_counter()
        if start(command(processes, folder / "alone", teacher)).wait() != 0:
            sys.exit("the run left alone failed")
        seconds = time.perf_counter() - began

        if args.elastic == "true":
            kill_a_worker(command(2, folder / "elastic", teacher, restarts=3), seconds)
            wrong = difference(folder / "alone", folder / "elastic")
            print(f"one worker killed, group restarted: {wrong or 'identical'}")
            sys.exit(bool(wrong))
        kills = in_write = runs = 0
        while kills < args.kills:
            output = folder / f"killed-{runs}"
            argv = command(processes, output, teacher)
            done, writing = run_killed(argv, output, seconds, args.kills - kills, rng)
            kills, in_write, runs = kills + done, in_write + writing, runs + 1
            if wrong := difference(folder / "alone", output):
                sys.exit(f"DIFFERENT after {kills} kills: {wrong}")
    print(
        f"{kills} kills ({in_write} of them during a write) in {runs} run(s) of {processes} "
        "process(es): every run identical to the one left alone"
    )


if __name__ == "__main__":
    main()
