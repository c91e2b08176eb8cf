"""Kill training with SIGKILL at random moments, start it again, and compare with a run left alone.

    python tools/kill_test.py --kills 20                  # one process
    python tools/kill_test.py --kills 20 --processes 4    # torchrun
    python tools/kill_test.py --fill true                 # filling --teacher_cache, not training
    python tools/kill_test.py --distill true              # distill.py as a whole, killed alone
    python tools/kill_test.py --flags "--train_samples 40 --unlabeled rest --holdout 1117"

Weights, EMA, optimizer state and log.txt must be the same bits. EMA, accumulation, mixup and a
teacher are on, and a checkpoint is written at every step, so that many kills fall into a write.
Three of four kills fall into the training, the others at any moment from the start.
A killed distill.py must choose, judge and hand over as one left alone.
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
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from helpers import children_of, is_same, torchrun  # noqa: E402

import models  # noqa: E402, F401
from teacher.logit_store import LogitFile, RowFormat  # noqa: E402
from training.checkpoints import newest_checkpoint  # noqa: E402

FLAGS = """--device cpu --num_workers 1 --model cifar_resnet8 --train_samples 320 --batch_size 8
--update_freq 2 --epochs 8 --save_ckpt_steps 1 --model_ema true --model_ema_eval true
--kd true --teacher_arch cifar_resnet8"""
MORE_FLAGS: list[str] = []  # of --flags


def command(processes: int, output_dir: Path, teacher: Path) -> list[str]:
    argv = torchrun(processes) if processes > 1 else [sys.executable]
    argv += ["main.py", *FLAGS.split(), "--teacher_path", str(teacher), *MORE_FLAGS]
    return [*argv, "--output_dir", str(output_dir)]


def start(argv: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=quiet, stderr=quiet, start_new_session=True
    )


def difference(alone: Path, killed: Path) -> str:
    """What differs between two finished runs; '' if nothing does."""
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


def wait_for_training(process: subprocess.Popen, folder: Path) -> float:
    """Wait until the first step of this process is saved; returns the seconds that this took."""
    began, now = time.perf_counter(), time.time()
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # a checkpoint that has just been replaced
            if any(path.stat().st_mtime > now for path in folder.glob("checkpoint-*.pth")):
                break
        time.sleep(0.005)
    return time.perf_counter() - began


def run_killed(
    argv: list[str], folder: Path, starts: float, trains: float, kills: int, rng: random.Random
) -> np.ndarray:
    """Run to the end through up to `kills` kills.

    Args:
        starts, trains: seconds of a run left alone up to its first step, and from there on.
    Returns: numbers of kills, of those in training, and of those during a write.
    """
    counts = np.zeros(3, int)
    while True:
        process = start(argv)
        if counts[0] < kills:
            is_training = rng.random() < 0.75
            if is_training:
                wait_for_training(process, folder)
            try:
                process.wait(timeout=rng.uniform(0, 0.7 * trains if is_training else starts))
            except subprocess.TimeoutExpired:
                for pid in family(process.pid):
                    kill(pid)
                process.wait()
                counts += 1, is_training, any(folder.glob(".*.tmp"))
                continue
        if process.wait() != 0:
            sys.exit(f"exit code {process.returncode} after {counts[0]} kills: {' '.join(argv)}")
        return counts


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


def kill_while_distilling(folder: Path, args: argparse.Namespace) -> None:
    """Kill distill.py alone, in each part of its time; the commands that it runs must end too."""
    write_images(folder / "others", 1500, "cd", 0)  # of which the teacher knows the pattern
    write_images(folder / "images", 200, "ab", 1)
    labels = [f"{name}/{number}.png,{name}" for number, name in enumerate("ab" * 10)]
    labels += [f"{name}/{number}.png,{name}" for number, name in enumerate("ab" * 80, start=40)]
    for file, lines in (("few.csv", labels[:20]), ("test.csv", labels[20:])):
        (folder / file).write_text("\n".join(lines))
    teach = "main.py --model cifar_resnet20 --input_size 8 --no_aug true --epochs 20 --holdout 100"
    flags = ["--data_path", str(folder / "others"), "--output_dir", str(folder / "teacher")]
    if start([sys.executable, *teach.split(), *flags]).wait() != 0:
        sys.exit("the teacher could not be trained")
    argv = [sys.executable, "distill.py", str(folder / "images"), "--student", "cifar_resnet8"]
    argv += ["--labels", str(folder / "few.csv"), "--eval_labels", str(folder / "test.csv")]
    argv += ["--teacher", f"cifar_resnet20={newest_checkpoint(folder / 'teacher')}"]
    argv += ["--unlabeled", "rest", "--seeds", "2"]
    began = time.perf_counter()
    if start([*argv, "--out", str(folder / "alone")]).wait() != 0:
        sys.exit("the distillation left alone failed")
    seconds, rng = time.perf_counter() - began, random.Random(args.seed)
    argv += ["--out", str(folder / "killed")]
    for number in range(args.kills):
        process = start(argv)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0.3, 1.5) * seconds / args.kills)
            print(f"it had ended before kill {number + 1}")
            break
        below = family(process.pid)[1:]
        kill(process.pid)
        process.wait()
        began = time.perf_counter()
        while any(Path(f"/proc/{pid}/cmdline").exists() for pid in below):
            if time.perf_counter() > began + 60:
                sys.exit(f"after kill {number + 1} its commands go on: {below}")
            time.sleep(0.1)
        record = folder / "killed" / "commands.json"
        finished = json.loads(record.read_text()) if record.exists() else {}
        print(f"kill {number + 1}: {len(finished)} commands were finished", flush=True)
    if start(argv).wait() != 0:
        sys.exit("the distillation does not go on after the kills")
    results = [json.loads((folder / of / "result.json").read_text()) for of in ("alone", "killed")]
    for result in results:
        result["files"] = [Path(file).name for file in result["files"]]
    if results[0] != results[1]:
        sys.exit(f"DIFFERENT: {results}")
    for log in (folder / "alone" / "students").glob("kd=*/log.txt"):
        other = folder / "killed" / "students" / log.parent.name
        newest = [newest_checkpoint(of) for of in (log.parent, other)]
        a, b = (torch.load(file, weights_only=True)["model"] for file in newest)
        if log.read_bytes() != (other / "log.txt").read_bytes() or not is_same(a, b):
            sys.exit(f"DIFFERENT: {log.parent.name}")
    verdict = results[0]["verdict"]["verdict"]
    print(f"{args.kills} kills of distill.py ({verdict}): identical to the one left alone")


def write_images(folder: Path, count: int, classes: str, seed: int) -> None:
    """Two classes of noisy images of 8 pixels; one shows a pattern, and the other its negative."""
    pattern = np.random.default_rng(5).choice([-1, 1], (8, 4, 1))
    pattern = np.concatenate([pattern, pattern[:, ::-1]], axis=1)  # flipped images look the same
    noise = np.random.default_rng(seed)
    for number in range(count):
        kind = number % 2
        (folder / classes[kind]).mkdir(parents=True, exist_ok=True)
        pixels = 128 + 13 * (2 * kind - 1) * pattern + noise.normal(0, 60, (8, 8, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / classes[kind] / f"{number}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--fill", default="false", choices=("true", "false"))
    parser.add_argument("--distill", default="false", choices=("true", "false"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flags", default="")
    args = parser.parse_args()
    MORE_FLAGS.extend(args.flags.split())
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.distill == "true":
            kill_while_distilling(folder, args)
            return
        torch.manual_seed(0)
        teacher = folder / "teacher.pth"
        torch.save(timm.create_model("cifar_resnet8", num_classes=10).state_dict(), teacher)
        if args.fill == "true":
            kill_while_filling(folder, teacher, args)
            return
        process = start(command(args.processes, folder / "alone", teacher))
        starts, began = wait_for_training(process, folder / "alone"), time.perf_counter()
        if process.wait() != 0:
            sys.exit("the run left alone failed")
        trains = time.perf_counter() - began

        counts, runs = np.zeros(3, int), 0
        while counts[0] < args.kills:
            output = folder / f"killed-{runs}"
            argv = command(args.processes, output, teacher)
            counts += run_killed(argv, output, starts, trains, args.kills - counts[0], rng)
            runs += 1
            if wrong := difference(folder / "alone", output):
                sys.exit(f"DIFFERENT after {counts[0]} kills: {wrong}")
    kills, in_training, in_write = counts
    print(
        f"{kills} kills ({in_training} of them in training, {in_write} during a write) in {runs} "
        f"run(s) of {args.processes} process(es): every run identical to the one left alone"
    )


if __name__ == "__main__":
    main()
