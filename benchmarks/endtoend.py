"""Whole runs, from the start of the process to its end, with one thread each.

`against_timm`: a small distilled run of main.py, and the same job in timm's own pieces
(timm_job.py): start-up, loading, training, evaluation after each epoch and checkpoints.

`sweep`: eight students of one teacher, for two temperatures and four values of alpha, with one
teacher cache, with the teacher online, and without a teacher.
"""

import itertools
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.readers import digits

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = {64: 5, 128: 3, 224: 1}  # by the side of the JPEGs in pixels; the teacher has as many
JPEGS = {"train": 480, "val": 240}
OURS, TIMM = "main.py", "timm's pieces"
CACHED, ONLINE, PLAIN = "one teacher cache", "teacher online", "plain"
ALPHAS, TEMPERATURES = (0.3, 0.5, 0.7, 0.9), (2.0, 4.0)
TEACHER = "--lr 1e-3 --smoothing 0 --mixup 0 --cutmix 0 --aa none --reprob 0"
DIGITS = (
    "--device cpu --data_set DIGITS --train_samples 500 --batch_size 50 --lr 3e-3 --smoothing 0 "
    "--aa '' --color_jitter 0 --reprob 0 --num_workers 0 --save_ckpt_freq 1000"
)
SWEEP_TEACHER = "--model cifar_resnet56 --epochs 20 --cutmix 0"
SWEEP_STUDENT = "--model cifar_resnet8 --epochs 30"


@dataclass
class Job:
    """A distilled run; every field but the classes and the teacher is a flag of main.py."""

    data_path: str
    teacher_path: str
    output_dir: str
    seed: int
    input_size: int
    epochs: int
    model: str = "resnet10t"
    teacher: str = "resnet18"
    classes: int = 10
    alpha: float = 0.7
    temperature: float = 4.0
    batch_size: int = 32
    warmup_epochs: int = 0
    lr: float = 2e-3
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    # Without noise in its strength, which would ask for what Pillow 13 refuses.
    aa: str = "rand-m9-inc1"
    hflip: float = 0.0
    reprob: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    crop_pct: float = 0.875
    num_workers: int = 1

    def flags(self) -> list[str]:
        """The job as a command line of main.py."""
        names = {"teacher": "teacher_arch", "alpha": "kd_alpha", "temperature": "kd_temperature"}
        values = asdict(self) | {"kd": "true", "device": "cpu"}
        del values["classes"]
        pairs = [(f"--{names.get(name, name)}", str(value)) for name, value in values.items()]
        return [word for pair in pairs for word in pair]


@dataclass
class Whole:
    """What a whole process took, with its loader workers, and the accuracy of its last epoch."""

    wall: float  # seconds
    cpu: float  # seconds
    accuracy: float  # percent


def write_digits(folder: Path, side: int) -> None:
    """Write digits as JPEGs of that side, with some noise, as train/CLASS/ and val/CLASS/."""
    rng = np.random.default_rng(0)
    for split, count in JPEGS.items():
        source = digits(is_train=split == "train")
        for index in range(count):
            image, target = source[index]
            large = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
            noisy = np.asarray(large) * 0.8 + rng.normal(25, 10, (side, side, 3))
            path = folder / split / str(target) / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def run(argv: list[str], accuracy: Callable[[str], float]) -> Whole:
    """Run a Python script to its end.

    Args:
        accuracy: of the last epoch, from what the script printed.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"python {shlex.join(argv)} failed\n{done.stdout}{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Whole(wall, cpu, accuracy(done.stdout))


def run_main(flags: list[str], folder: Path) -> Whole:
    """Run main.py into a new folder."""

    def accuracy(printed: str) -> float:
        return json.loads((folder / "log.txt").read_text().splitlines()[-1])["test_acc1"]

    return run(["main.py", *flags, "--output_dir", str(folder)], accuracy)


def run_timm(job: Job) -> Whole:
    """Run timm_job.py."""

    def accuracy(printed: str) -> float:
        return json.loads(printed.splitlines()[-1])["test_acc1"]

    return run(["benchmarks/timm_job.py", json.dumps(asdict(job))], accuracy)


def measure(rounds: int) -> dict[str, Any]:
    """Medians over rounds of both comparisons; each round runs every variant, with its own seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {f"{side} pixels": against_timm(folder / str(side), side, rounds) for side in EPOCHS}
        return runs | {"sweep": sweep(folder, rounds)}


def against_timm(folder: Path, side: int, rounds: int) -> dict[str, Any]:
    """The distilled run of both, one after the other, on images of that side in pixels."""
    write_digits(folder / "jpegs", side)
    weights, epochs = str(folder / "teacher/checkpoint-best.pth"), EPOCHS[side]
    job = Job(str(folder / "jpegs"), weights, "", 0, side, epochs)
    teacher = ["--model", job.teacher, "--input_size", str(side), "--epochs", str(epochs)]
    data = ["--data_path", job.data_path, "--hflip", "0", "--num_workers", "1", "--device", "cpu"]
    scored = run_main([*teacher, *data, *shlex.split(TEACHER)], folder / "teacher")
    results: dict[str, list[Whole]] = {OURS: [], TIMM: []}
    for seed in range(rounds):
        for name in (OURS, TIMM) if seed % 2 else (TIMM, OURS):
            job.seed, job.output_dir = seed, str(folder / f"{name}-{seed}")
            whole = run_timm(job) if name == TIMM else run_main(job.flags(), Path(job.output_dir))
            results[name].append(whole)
    return {"teacher_accuracy": scored.accuracy, "rows": _rows(results, TIMM)}


def sweep(folder: Path, rounds: int) -> dict[str, Any]:
    """Eight students, one process after another; the first with the cache fills the cache."""
    digits = shlex.split(DIGITS)
    scored = run_main([*shlex.split(SWEEP_TEACHER), *digits], folder / "sweep_teacher")
    teacher = ["--kd", "true", "--teacher_arch", "cifar_resnet56", "--teacher_path"]
    teacher.append(str(folder / "sweep_teacher/checkpoint-best.pth"))
    results: dict[str, list[Whole]] = {CACHED: [], ONLINE: [], PLAIN: []}
    for seed in range(rounds):
        students: dict[str, list[Whole]] = {name: [] for name in results}
        cache = ["--teacher_cache", str(folder / f"cache-{seed}")]
        for alpha, temperature in itertools.product(ALPHAS, TEMPERATURES):
            loss = ["--kd_alpha", str(alpha), "--kd_temperature", str(temperature)]
            for name, given in (
                (CACHED, [*teacher, *cache, *loss]),
                (ONLINE, [*teacher, *loss]),
                (PLAIN, []),
            ):
                flags = [*shlex.split(SWEEP_STUDENT), *digits, *given, "--seed", str(seed)]
                output = folder / f"{name}-{seed}-{alpha}-{temperature}"
                students[name].append(run_main(flags, output))
        for name, wholes in students.items():
            accuracy = statistics.mean(whole.accuracy for whole in wholes)
            total = Whole(sum(x.wall for x in wholes), sum(x.cpu for x in wholes), accuracy)
            results[name].append(total)
    return {"teacher_accuracy": scored.accuracy, "rows": _rows(results, PLAIN)}


def _rows(results: dict[str, list[Whole]], reference: str) -> dict[str, Any]:
    """Per variant the median times, their ratios to the reference's, and each accuracy."""
    rows = {}
    for name, wholes in results.items():
        pairs = list(zip(wholes, results[reference], strict=True))
        rows[name] = {
            "wall": statistics.median(whole.wall for whole in wholes),
            "cpu": statistics.median(whole.cpu for whole in wholes),
            "wall ratio": statistics.median(a.wall / b.wall for a, b in pairs),
            "cpu ratio": statistics.median(a.cpu / b.cpu for a, b in pairs),
            "accuracies": [whole.accuracy for whole in wholes],
        }
    return rows
