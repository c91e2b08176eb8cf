"""What distillation buys, in minutes on a CPU: `make demo`.

A teacher is trained on all 1,437 training digits. Then the same small student is trained twice on
the same 50 of them: alone, and with the teacher. All by calling main.py as you would; the accuracy
is the last epoch's on the 360 test digits, which nothing was chosen by.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(4)

TEACHER = "--model cifar_resnet20 --epochs 60 --cutmix 0"
STUDENT = "--model cifar_resnet8 --epochs 300 --train_samples 50 --batch_size 50"
# Digits have no colours to jitter and 8 pixels leave little to erase: crops, mixup and cutmix only.
COMMON = (
    "--data_set DIGITS --lr 3e-3 --smoothing 0 --aa '' --color_jitter 0 --reprob 0 "
    "--num_workers 0 --save_ckpt_freq 1000 --auto_resume false"
)


def teacher_command(seed: int) -> str:
    return f"{TEACHER} {COMMON} --seed {seed} --output_dir demo_out/teacher_{seed}"


def alone_command(seed: int) -> str:
    return f"{STUDENT} {COMMON} --seed {seed} --output_dir demo_out/alone_{seed}"


def distilled_command(seed: int) -> str:
    kd = (
        "--kd true --kd_alpha 0.7 --kd_temperature 4 --teacher_arch cifar_resnet20 "
        f"--teacher_path demo_out/teacher_{seed}/checkpoint-59.pth"
    )
    return f"{STUDENT} {kd} {COMMON} --seed {seed} --output_dir demo_out/distilled_{seed}"


def run(command: str) -> dict:
    """Run main.py; returns the last line of its log, with the seconds it took."""
    started = time.perf_counter()
    # Two small networks side by side use two cores better than one network on both.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "main.py", *shlex.split(command)]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"python main.py {command}\n{done.stdout}{done.stderr}")
    folder = ROOT / command.rsplit(" ", 1)[1]
    record = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    return record | {"seconds": time.perf_counter() - started}


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    started = time.perf_counter()
    rows = []
    with ThreadPoolExecutor(max(1, min(cores, len(SEEDS)))) as pool:
        for name, command in (
            ("teacher, all 1,437 labels", teacher_command),
            ("student alone, 50 labels", alone_command),
            ("student distilled, same 50", distilled_command),
        ):
            print(f"# {name}; the same with --seed 1 to {SEEDS[-1]}")
            print(f"python main.py {command(0)}\n", flush=True)
            rows.append((name, list(pool.map(run, [command(seed) for seed in SEEDS]))))

    print(f"Accuracy on 360 test digits, last epoch; mean ± deviation of {len(SEEDS)} seeds\n")
    print(f"{'':29}{'accuracy %':>14}{'parameters':>12}{'seconds':>9}   each seed")
    for name, records in rows:
        scores = [record["test_acc1"] for record in records]
        accuracy = f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}"
        seconds = statistics.mean(record["seconds"] for record in records)
        each = " ".join(f"{score:.2f}" for score in scores)
        print(f"{name:29}{accuracy:>14}{records[0]['n_parameters']:>12,}{seconds:>9.0f}   {each}")
    alone, distilled = (statistics.mean(r["test_acc1"] for r in rows[i][1]) for i in (1, 2))
    print(f"\nDistillation bought {distilled - alone:+.2f} points.", end=" ")
    print(f"All of it took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
