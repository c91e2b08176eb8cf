"""Draws what distillation buys over the number of labels: `python examples/label_curve.py`.

For each of four seeds, a teacher is trained on all 1,437 training digits, and per number of labels
three students: alone, with the teacher, and with the teacher on the other training digits too,
whose labels are not used. The accuracy is that of the last epoch on the 360 test digits; no setting
was chosen by them. The table is printed row by row; the drawing goes to docs/label_curve.png.
"""

import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from arguments.defaults import usable_cores  # noqa: E402

LABELS = (10, 20, 50, 100, 200, 400, 1437)
PICTURE = ROOT / "docs" / "label_curve.png"
# Told apart by the color-blind, and in gray by their markers.
STYLES = {
    "distilled, with the other digits unlabeled": {"color": "#009E73", "marker": "^"},
    "distilled": {"color": "#0072B2", "marker": "o"},
    "alone": {"color": "#D55E00", "marker": "s"},
}
GREY = "#555555"

Spread = tuple[float, float]  # mean and standard deviation over the seeds, in %


def spread(records: list[dict]) -> Spread:
    scores = [record["test_acc1"] for record in records]
    return statistics.mean(scores), statistics.stdev(scores)


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
    return f"{TEACHER} {COMMON} --seed {seed} --output_dir curve_out/teacher_{seed}"


def student_flags(labels: int) -> str:
    """The flags of every student that sees this many labeled digits."""
    return f"{STUDENT} --train_samples {labels} --batch_size {min(50, labels)}"


def alone_command(seed: int, labels: int, folder: str) -> str:
    """The flags that train a student without a teacher."""
    return f"{student_flags(labels)} {COMMON} --seed {seed} --output_dir {folder}/alone_{seed}"


def kd_flags(seed: int, alpha: float) -> str:
    """The flags that distill from the teacher of a seed."""
    return (
        f"--kd true --kd_alpha {alpha} --kd_temperature 4 --teacher_arch cifar_resnet20 "
        f"--teacher_path curve_out/teacher_{seed}/checkpoint-59.pth"
    )


def distilled_command(seed: int, labels: int, folder: str) -> str:
    """The flags that train a student with the teacher of the same seed."""
    flags = f"{student_flags(labels)} {kd_flags(seed, 0.7)} {COMMON}"
    return f"{flags} --seed {seed} --output_dir {folder}/distilled_{seed}"


def unlabeled_command(seed: int, labels: int, folder: str) -> str:
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


COMMANDS = {
    "alone": alone_command,
    "distilled": distilled_command,
    "distilled, with the other digits unlabeled": unlabeled_command,
}


def names_of(labels: int) -> list[str]:
    """The students of a number of labels; with all of them no digit is left over."""
    return list(COMMANDS)[: 2 if labels == LABELS[-1] else 3]


def student_commands() -> list[str]:
    """The commands of all students, by number of labels, kind of student and seed."""
    return [
        COMMANDS[name](seed, labels, f"curve_out/labels_{labels}")
        for labels in LABELS
        for name in names_of(labels)
        for seed in SEEDS
    ]


def draw(curves: dict[str, list[Spread]], teacher: float) -> None:
    """Save the picture; `curves` holds one spread per number of labels, from the fewest on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.74), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    label = f"teacher, all {LABELS[-1]:,} labels"
    axes.axhline(teacher, color=GREY, linewidth=1, linestyle="--", label=label)
    for name, style in STYLES.items():
        means, deviations = zip(*curves[name], strict=True)
        labels = LABELS[: len(means)]
        axes.errorbar(labels, means, deviations, label=name, capsize=3, markersize=5, **style)
    axes.set_xscale("log")
    axes.set_xticks(LABELS, [f"{labels:,}" for labels in LABELS])
    axes.minorticks_off()
    axes.set_xlabel("labeled training digits")
    axes.set_ylabel(f"accuracy %, mean ± deviation of {len(SEEDS)} seeds")
    axes.set_title("Accuracy on 360 test digits, 78k-parameter student", fontsize=11)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(PICTURE)


def main() -> None:
    started = time.perf_counter()
    PICTURE.parent.mkdir(exist_ok=True)
    if importlib.util.find_spec("matplotlib") is None:  # now, not after twenty minutes of training
        sys.exit("label_curve.py draws with matplotlib: pip install matplotlib")
    curves = {name: [] for name in STYLES}
    with pool() as executor:
        teachers = [teacher_command(seed) for seed in SEEDS]
        teacher = spread(list(executor.map(run, teachers)))
        print(f"Accuracy % on 360 test digits, last epoch; mean ± deviation of {len(SEEDS)} seeds")
        print(f"Teacher, trained on all 1,437 digits: {teacher[0]:.2f} ± {teacher[1]:.2f}\n")
        print(f"{'labels':>6}{'alone':>16}{'distilled':>16}{'with the others':>17}", flush=True)
        records = executor.map(run, student_commands())
        for labels in LABELS:
            cells = []
            for name in names_of(labels):
                curves[name].append(spread(list(islice(records, len(SEEDS)))))
                mean, deviation = curves[name][-1]
                cells.append(f"{f'{mean:.2f} ± {deviation:.2f}':>16}")
            print(f"{labels:>6,}" + "".join(cells), flush=True)
    draw(curves, teacher[0])
    seconds = time.perf_counter() - started
    print(f"\nAll of it took {seconds:.0f} s; the drawing is {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
