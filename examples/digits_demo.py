"""Shows what distillation gains, in minutes on a CPU: `make demo`.

For each of four seeds, a teacher is trained on all 1,437 training digits. Then the same small
student is trained three times with the labels of the same 50 of these digits: alone, with the
teacher, and with the teacher on the other 1,387 digits too, whose labels are not used. Every
training is a command line of main.py that you could type. The accuracy is that of the last epoch on
the 360 test digits; no setting was chosen by them.
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
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from arguments.defaults import usable_cores  # noqa: E402

SEEDS = range(4)

TEACHER = "--model cifar_resnet20 --epochs 60 --batch_size 64 --cutmix 0"
STUDENT = "--model cifar_resnet8 --epochs 300"
# Digits have no colors to jitter and 8 pixels leave little to erase: crops, mixup and cutmix only.
COMMON = (
    "--data_set DIGITS --lr 3e-3 --smoothing 0 --aa '' --color_jitter 0 --reprob 0 "
    "--num_workers 0 --save_ckpt_freq 1000 --auto_resume false"
)


def teacher_command(seed: int) -> str:
    """The flags that train a teacher."""
    return f"{TEACHER} {COMMON} --seed {seed} --output_dir demo_out/teacher_{seed}"


def student_flags(labels: int) -> str:
    """The flags of every student that sees this many labeled digits."""
    return f"{STUDENT} --train_samples {labels} --batch_size {min(50, labels)}"


def alone_command(seed: int, labels: int = 50, folder: str = "demo_out") -> str:
    """The flags that train a student without a teacher."""
    return f"{student_flags(labels)} {COMMON} --seed {seed} --output_dir {folder}/alone_{seed}"


def kd_flags(seed: int, alpha: float) -> str:
    """The flags that distill from the teacher of a seed."""
    return (
        f"--kd true --kd_alpha {alpha} --kd_temperature 4 --teacher_arch cifar_resnet20 "
        f"--teacher_path demo_out/teacher_{seed}/checkpoint-59.pth"
    )


def distilled_command(seed: int, labels: int = 50, folder: str = "demo_out") -> str:
    """The flags that train a student with the teacher of the same seed."""
    flags = f"{student_flags(labels)} {kd_flags(seed, 0.7)} {COMMON}"
    return f"{flags} --seed {seed} --output_dir {folder}/distilled_{seed}"


def unlabeled_command(seed: int, labels: int = 50, folder: str = "demo_out") -> str:
    """The same with all other training digits, whose labels are not used."""
    flags = (
        f"--model cifar_resnet8 --epochs 40 --train_samples {labels} --unlabeled rest "
        f"--batch_size 50 {kd_flags(seed, 0.9)} {COMMON}"
    )
    return f"{flags} --seed {seed} --output_dir {folder}/unlabeled_{seed}"


def run(command: str) -> dict[str, Any]:
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


def pool() -> ThreadPoolExecutor:
    """Runs as many processes side by side as there are cores."""
    return ThreadPoolExecutor(usable_cores())


def main() -> None:
    started = time.perf_counter()
    rows = []
    with pool() as executor:
        for name, command in (
            ("teacher, all 1,437 labels", teacher_command),
            ("student alone, 50 labels", alone_command),
            ("student distilled, same 50 labels", distilled_command),
            ("the same, and 1,387 without label", unlabeled_command),
        ):
            print(f"# {name}; the same with --seed 1 to {SEEDS[-1]}")
            print(f"python main.py {command(0)}\n", flush=True)
            rows.append((name, list(executor.map(run, [command(seed) for seed in SEEDS]))))

    print(f"Accuracy on 360 test digits, last epoch; mean ± deviation of {len(SEEDS)} seeds\n")
    print(f"{'':33}{'accuracy %':>14}{'parameters':>12}{'seconds':>9}   each seed")
    for name, records in rows:
        scores = [record["test_acc1"] for record in records]
        accuracy = f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}"
        seconds = statistics.mean(record["seconds"] for record in records)
        each = " ".join(f"{score:.2f}" for score in scores)
        print(f"{name:33}{accuracy:>14}{records[0]['n_parameters']:>12,}{seconds:>9.0f}   {each}")
    alone, *gains = (statistics.mean(r["test_acc1"] for r in rows[i][1]) for i in (1, 2, 3))
    distilled, unlabeled = (f"{gain - alone:+.2f}" for gain in gains)
    print(
        f"\nGain of distillation: {distilled} points; with the other digits {unlabeled}.", end=" "
    )
    print(f"Total time: {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
