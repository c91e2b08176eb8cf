"""Whole processes of main.py: seconds to --help and to the first step, and private memory."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STUDENT = """--device cpu --num_workers 0 --model resnet18 --input_size 128 --batch_size 16
--train_samples 96 --epochs 2 --disable_eval true --mixup_mode pair"""
DIGITS = """--data_set DIGITS --model cifar_resnet8 --epochs 1 --train_samples 50 --batch_size 50
--num_workers 0"""


def start(*flags: object) -> subprocess.Popen:
    argv = [sys.executable, "-u", "main.py", *map(str, flags)]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def seconds_to(text: str, *flags: object) -> float:
    """From the start until a line begins with `text`; then the process may end by itself."""
    started = time.perf_counter()
    process = start(*flags)
    seconds = None
    for line in process.stdout:
        if seconds is None and line.startswith(text):
            seconds = time.perf_counter() - started
    if process.wait() or seconds is None:
        sys.exit(f"main.py {' '.join(map(str, flags))} failed or never printed '{text}'")
    return seconds


def private_mib(*flags: object) -> float:
    """Most anonymous memory at any time (Linux): what is the process's own, not cached files."""
    process = start(*flags)
    most = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (OSError, ProcessLookupError):
            break
        for line in status.splitlines():
            if line.startswith("RssAnon"):
                most = max(most, int(line.split()[1]))
        time.sleep(0.005)
    process.communicate()
    if process.returncode:
        sys.exit(f"main.py {' '.join(map(str, flags))} failed")
    return most / 1024


def measure(rounds: int) -> dict[str, Any]:
    """Medians over rounds that go over the variants in turn."""
    help_seconds, first_step = [], []
    for _ in range(rounds):
        help_seconds.append(seconds_to("usage", "--help"))
        first_step.append(seconds_to("Epoch 0 [", *DIGITS.split()))
    result: dict[str, Any] = {
        "seconds to --help": statistics.median(help_seconds),
        "seconds to the first step of the digits demo": statistics.median(first_step),
    }
    if not os.path.exists("/proc/self/status"):
        return result
    with tempfile.TemporaryDirectory() as folder:
        make_teacher = "import timm, torch; torch.save(timm.create_model('resnet50', num_classes="
        path = Path(folder) / "teacher.pth"
        subprocess.run(
            [sys.executable, "-c", f"{make_teacher}10).state_dict(), {str(path)!r})"], check=True
        )
        teacher = f"--kd true --teacher_arch resnet50 --teacher_path {path}".split()
        stored = [*teacher, "--teacher_cache", Path(folder) / "cache"]
        private_mib(*STUDENT.split(), *stored)  # fills the store
        variants = {"plain": [], "online": teacher, "cached": stored}
        memory: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, flags in variants.items():
                memory[name].append(private_mib(*STUDENT.split(), *flags))
    result["private MiB, resnet18 and resnet50 at 128 pixels"] = {
        name: statistics.median(values) for name, values in memory.items()
    }
    return result
