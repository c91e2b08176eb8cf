"""What a classifier's answers show beyond its accuracy: calibration, classes, confusions."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from runtime import distributed

BINS = 15  # of the confidences; as in Guo et al., 'On calibration of modern neural networks', 2017
MOST_IN_MATRIX = 12  # classes of a confusion matrix in the terminal
WORST_CLASSES = 10  # that are listed in the terminal if there are too many for a matrix
MOST_CONFUSED = 5  # pairs of classes that are listed in the terminal
HOTTEST = 100.0  # temperatures are searched between 1 / HOTTEST and HOTTEST


class Answers(NamedTuple):
    """What a classifier answered for each of N images, and what was right."""

    places: torch.Tensor  # (N,) int64, positions of the images in the validation data
    targets: torch.Tensor  # (N,) int64
    predictions: torch.Tensor  # (N,) int64
    confidences: torch.Tensor  # (N,) float32, probabilities of the predictions
    losses: torch.Tensor  # (N,) float32, cross-entropies


def answers_of(logits: torch.Tensor, targets: torch.Tensor, places: range) -> Answers:
    """The answers for one batch of logits (B, C) float32 and targets (B,) int64."""
    predictions = logits.argmax(dim=1)
    confidences = logits.softmax(dim=1).amax(dim=1)
    losses = F.cross_entropy(logits, targets, reduction="none")
    positions = torch.arange(places.start, places.stop, places.step, device=logits.device)
    return Answers(positions, targets, predictions, confidences, losses)


def join(batches: Sequence[Answers], shared: bool) -> Answers:
    """The answers for all images, in the order of the data, on the CPU. Collective.

    Args:
        shared: whether each process holds a part of the images; else each holds all of them.
    """
    columns = [torch.cat(column).cpu() for column in zip(*batches, strict=True)] if batches else []
    if shared:
        parts = [part for part in distributed.gather(columns) if part]
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    order = columns[0].argsort()
    return Answers(*(column[order] for column in columns))


def ranks_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How many classes come before the right one: 0 exactly if argmax takes the right one.

    Of equal logits the first class comes first, as in argmax; topk takes any of them, and bfloat16
    gives equal logits for about one image in a hundred.

    (B, C), (B,) int64 -> (B,) int64
    """
    of_target = logits.gather(1, targets[:, None])  # (B, 1)
    is_before = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]  # (B, C)
    return ((logits > of_target) | ((logits == of_target) & is_before)).sum(dim=1)


def bins_of(confidences: torch.Tensor) -> torch.Tensor:
    """Which of the intervals (0, 1/BINS], …, (1 - 1/BINS, 1] each confidence lies in, int64."""
    return ((confidences * BINS).ceil().long() - 1).clamp(0, BINS - 1)


def calibration_gaps(confidences: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """Sum of (correct - confidence) over the images of each bin: (B,), (B,) bool -> (BINS,)

    These sums may be added up over batches; `calibration_error` needs nothing else.
    """
    is_in = bins_of(confidences)[:, None] == torch.arange(BINS, device=confidences.device)
    return ((correct.to(confidences.dtype) - confidences)[:, None] * is_in).sum(dim=0)


def calibration_error(gaps: Sequence[float], images: float) -> float:
    """The expected calibration error (ECE) in percent: Guo et al. 2017, eq. 3.

    The mean over the images of |accuracy - mean confidence| of the bin that an image is in.
    """
    return 100 * sum(map(abs, gaps)) / images


def fit_temperature(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, str]:
    """The temperature T with which softmax(logits / T) has the smallest cross-entropy.

    Guo et al. 2017, section 4.2. The cross-entropy is convex in b = 1/T, and its slope is the mean
    of sum_c p_c(b) z_c - z_y; bisection finds the zero of the slope, in float64. If every image is
    right, the slope has no zero: the cross-entropy falls to 0 with T, whatever the network is worth
    on different images.

    Args:
        logits: (N, C).
        targets: (N,) int64.
    Returns: T between 1/HOTTEST and HOTTEST, and ''; or 1, and why no temperature can be fitted.
    """
    right = int((logits.argmax(dim=1) == targets).sum())
    if right in (0, len(targets)):
        return 1.0, f"all {len(targets)} held-out images are {'right' if right else 'wrong'}"
    logits = logits.double()
    of_targets = logits.gather(1, targets[:, None])[:, 0]

    def slope(inverse: float) -> float:
        expected = ((logits * inverse).softmax(dim=1) * logits).sum(dim=1)
        return (expected - of_targets).mean().item()

    low, high = 1 / HOTTEST, HOTTEST
    if not slope(low) < 0 < slope(high):
        return 1.0, f"the best one is not between {1 / high:g} and {1 / low:g}"
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / low, ""


def report(answers: Answers, classes: Sequence[str]) -> dict[str, Any]:
    """What --report writes of one network, in plain values.

    Returns: images, acc1 (%), nll (mean cross-entropy), ece (%), bins (of images with similar
        confidence: their number, mean confidence and accuracy in %), per_class (images and accuracy
        in %, in the order of the classes; None for a class without images) and confusions (how
        often a class was taken for another, the most frequent first).
    """
    right = answers.predictions == answers.targets
    number = torch.bincount(answers.targets, minlength=len(classes)).tolist()
    correct = torch.bincount(answers.targets[right], minlength=len(classes)).tolist()
    per_class = [
        {"class": name, "images": n, "acc1": 100 * k / n if n else None}
        for name, n, k in zip(classes, number, correct, strict=True)
    ]
    pairs = torch.stack([answers.targets, answers.predictions], dim=1)[~right].tolist()
    confused = sorted(Counter(map(tuple, pairs)).items(), key=lambda item: (-item[1], item[0]))
    confidences, images = answers.confidences.double(), len(right)
    gaps = calibration_gaps(confidences, right)
    bins, bin_of_image = [], bins_of(confidences)
    for index in range(BINS):
        is_in = bin_of_image == index
        if n := int(is_in.sum()):
            means = confidences[is_in].mean().item(), right[is_in].double().mean().item()
            bins.append({"images": n, "confidence": 100 * means[0], "acc1": 100 * means[1]})
    return {
        "images": images,
        "acc1": 100 * right.double().mean().item(),
        "nll": answers.losses.double().mean().item(),
        "ece": calibration_error(gaps.tolist(), images),
        "bins": bins,
        "per_class": per_class,
        "confusions": [
            {"class": classes[target], "predicted": classes[taken], "images": n}
            for (target, taken), n in confused
        ],
    }


def report_lines(report: dict[str, Any], width: int) -> list[str]:
    """What the terminal shows of a report: of few classes the confusion matrix, else the worst.

    Args:
        width: of the terminal.
    """
    if matrix := matrix_lines(report, width):
        return matrix
    rows = [row for row in report["per_class"] if row["images"]]
    total = {row["class"]: row["images"] for row in rows}
    worst = [
        f"  {row['acc1']:6.2f} % of {row['images']:,} images: {row['class']}"
        for row in sorted(rows, key=lambda row: row["acc1"])[:WORST_CLASSES]
    ]
    pairs = [
        f"  {c['class']} taken for {c['predicted']} ({c['images']} of {total[c['class']]:,})"
        for c in report["confusions"][:MOST_CONFUSED]
    ]
    title = f"Lowest accuracy of {len(rows)} classes:"
    return [title, *worst, *(["Most confused:", *pairs] if pairs else ())]


def matrix_lines(report: dict[str, Any], width: int) -> list[str]:
    """The confusion matrix of a report; empty if there are too many classes for it.

    Columns are as wide as the terminal permits, and class names are cut to fit them.
    """
    wrong = {(c["class"], c["predicted"]): c["images"] for c in report["confusions"]}
    predicted = {taken for _, taken in wrong}
    rows = [row for row in report["per_class"] if row["images"]]
    names = [r["class"] for r in report["per_class"] if r["images"] or r["class"] in predicted]
    counts = wrong | {
        (row["class"], row["class"]): round(row["images"] * row["acc1"] / 100) for row in rows
    }
    longest = max(map(len, names))
    label = min(longest, max(2, width // 5))
    cell = min(max(longest, 3) + 1, (width - label - len("  100.00 %")) // len(names))
    if len(names) > MOST_IN_MATRIX or cell < 1 + len(str(max(counts.values()))):
        return []
    lines = ["Answers (columns) for each true class (rows):"]
    lines.append(" " * label + "".join(f"{name[: cell - 1]:>{cell}}" for name in names))
    for row in rows:
        cells = [str(counts.get((row["class"], name)) or ".") for name in names]
        texts = "".join(f"{text:>{cell}}" for text in cells)
        lines.append(f"{row['class'][:label]:{label}}{texts}  {row['acc1']:6.2f} %")
    return lines
