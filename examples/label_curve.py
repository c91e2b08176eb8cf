"""Draws what distillation buys over the number of labels: `python examples/label_curve.py`.

The recipe is that of digits_demo.py: a teacher per seed, trained on all 1,437 training digits, and
per number of labels three students: alone, with the teacher, and with the teacher on the other
training digits too, whose labels are not used. The accuracy is the last epoch's on the 360 test
digits, which nothing was chosen by. The table is printed row by row; the drawing goes to
docs/label_curve.png.
"""

import statistics
import sys
import time
from itertools import islice

import digits_demo
from digits_demo import ROOT, SEEDS

try:
    from matplotlib.figure import Figure
except ImportError as error:  # found now, not after twenty minutes of training
    sys.exit(f"label_curve.py draws with matplotlib ({error}): pip install matplotlib")

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


COMMANDS = {
    "alone": digits_demo.alone_command,
    "distilled": digits_demo.distilled_command,
    "distilled, with the other digits unlabeled": digits_demo.unlabeled_command,
}


def names_of(labels: int) -> list[str]:
    """The students of a number of labels; with all of them no digit is left over."""
    return list(COMMANDS)[: 2 if labels == LABELS[-1] else 3]


def student_commands() -> list[str]:
    """The commands of all students, by number of labels, kind of student and seed."""
    return [
        COMMANDS[name](seed, labels, f"demo_out/labels_{labels}")
        for labels in LABELS
        for name in names_of(labels)
        for seed in SEEDS
    ]


def draw(curves: dict[str, list[Spread]], teacher: float) -> None:
    """Save the picture; `curves` holds one spread per number of labels, from the fewest on."""
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
    curves = {name: [] for name in STYLES}
    with digits_demo.pool() as executor:
        teachers = [digits_demo.teacher_command(seed) for seed in SEEDS]
        teacher = spread(list(executor.map(digits_demo.run, teachers)))
        print(f"Accuracy % on 360 test digits, last epoch; mean ± deviation of {len(SEEDS)} seeds")
        print(f"Teacher, trained on all 1,437 digits: {teacher[0]:.2f} ± {teacher[1]:.2f}\n")
        print(f"{'labels':>6}{'alone':>16}{'distilled':>16}{'with the others':>17}", flush=True)
        records = executor.map(digits_demo.run, student_commands())
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
