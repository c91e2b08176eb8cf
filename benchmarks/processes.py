"""Whole processes of main.py: seconds to --help and to the first step, and private memory."""

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIGITS = shlex.split(
    "--data_set DIGITS --model cifar_resnet8 --epochs 1 --train_samples 50 --batch_size 50 "
    "--num_workers 0 --print_seconds 0"
)
STUDENT = shlex.split(
    "--device cpu --num_workers 0 --model resnet18 --input_size 128 --batch_size 16 "
    "--train_samples 96 --epochs 2 --disable_eval true --mixup_mode pair"
)
SAVE_TEACHER = """
import sys, timm, torch
torch.save(timm.create_model("resnet50", num_classes=10).state_dict(), sys.argv[1])
"""


def start(flags: list[str]) -> subprocess.Popen:
    """Start main.py in a process of its own."""
    argv = [sys.executable, "-u", "main.py", *flags]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def seconds_to(beginning: str, flags: list[str]) -> float:
    """Seconds from the start until a line with this beginning; waits for the end of the process."""
    started = time.perf_counter()
    process = start(flags)
    assert process.stdout is not None
    seconds = None
    for line in process.stdout:
        if seconds is None and line.startswith(beginning):
            seconds = time.perf_counter() - started
    if process.wait() or seconds is None:
        sys.exit(f"main.py {shlex.join(flags)} failed or never printed '{beginning}'")
    return seconds


def private_mib(flags: list[str]) -> float:
    """The peak of a process's anonymous memory (Linux), which excludes cached files, in MiB."""
    process = start(flags)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (OSError, ProcessLookupError):
            break
        for line in status.splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]))
        time.sleep(0.005)
    process.communicate()
    if process.returncode:
        sys.exit(f"main.py {shlex.join(flags)} failed")
    return peak / 1024


def memory(rounds: int) -> dict[str, float]:
    """Peak private memory in MiB of a student alone, with its teacher, and with cached logits."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/teacher.pth"
        subprocess.run([sys.executable, "-c", SAVE_TEACHER, path], check=True)
        teacher = ["--kd", "true", "--teacher_arch", "resnet50", "--teacher_path", path]
        cached = [*STUDENT, *teacher, "--teacher_cache", f"{folder}/cache"]
        variants = {
            "peak private memory, resnet18 at 128 pixels, plain": STUDENT,
            "the same with resnet50 as teacher": [*STUDENT, *teacher],
            "the same with the teacher's cached logits": cached,
        }
        private_mib(cached)  # fills the cache
        readings: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, flags in variants.items():
                readings[name].append(private_mib(flags))
    return {name: statistics.median(values) for name, values in readings.items()}


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds, by their unit; each round runs every variant once."""
    help_seconds, first_step = [], []
    for _ in range(rounds):
        help_seconds.append(seconds_to("usage", ["--help"]))
        first_step.append(seconds_to("Epoch 0 [", DIGITS))
    seconds = {
        "--help": statistics.median(help_seconds),
        "start to first step, student of the demo": statistics.median(first_step),
    }
    is_linux = os.path.exists("/proc/self/status")
    return {"seconds": seconds, "MiB": memory(rounds) if is_linux else {}}
