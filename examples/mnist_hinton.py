"""Distills MNIST as Hinton et al., 2015, section 3: python examples/mnist_hinton.py MNIST.

MNIST is the folder of torchvision's files, which are downloaded if they are missing. The large
network is trained with dropout on shifted images, the small network without both: alone, with the
soft targets of the large one, and with its soft targets on the images of all digits but 3. The
weight of the distillation loss and the bias of the 3 are chosen on 10,000 held-out training images.

Takes about 70 minutes on one core. Everything is kept in hinton_out, and is not run again.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from data.readers import open_torchvision  # noqa: E402
from data.sources import stratified  # noqa: E402
from deploy.model import open_model  # noqa: E402

OUT = Path("hinton_out")
HELD_OUT = 10_000
RECIPES = ROOT / "recipes"
LARGE = f"@{RECIPES}/hinton_mnist_teacher.args"
SMALL = f"@{RECIPES}/hinton_mnist_student.args"
COMMON = "--num_workers 0 --save_ckpt_freq 1000 --log_dir none"
SEEDS = range(3)


def train(name: str, flags: str) -> Path:
    """Train a network unless that is done; returns its checkpoint."""
    folder = OUT / name
    if not list(folder.glob("checkpoint-*.pth")):
        argv = shlex.split(f"{flags} {COMMON} --output_dir {folder}")
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        command = [sys.executable, str(ROOT / "main.py"), *argv]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    return max(folder.glob("checkpoint-[0-9]*.pth"), key=lambda file: file.stat().st_mtime)


def answers(checkpoint: Path, images: np.ndarray) -> torch.Tensor:
    """The logits (N, 10) of a network for images (N, 28, 28) uint8."""
    model = open_model(str(checkpoint), torch.device("cpu"))
    batches = torch.from_numpy(images)[..., None].expand(-1, -1, -1, 3).split(1000)
    return torch.cat([model.outputs(batch) for batch in batches])


def errors(logits: torch.Tensor, targets: np.ndarray) -> int:
    """Images whose largest logit is not that of their class."""
    return int((logits.argmax(dim=1).numpy() != targets).sum())


def main(mnist: str) -> None:
    data = f"--data_set MNIST --data_path {mnist} --holdout {HELD_OUT}"
    train_set = open_torchvision("MNIST", mnist, is_train=True)
    test = open_torchvision("MNIST", mnist, is_train=False)
    held_out = stratified(train_set.targets, HELD_OUT, seed=0)  # those of --holdout
    of_held_out = train_set.images[held_out], train_set.targets[held_out]

    teacher = train("teacher", f"{LARGE} {data} --seed 0")
    kd = f"--teacher_path {teacher}"
    cached = f"{kd} --teacher_views 1 --teacher_cache {OUT}/cache --data_seed 0"
    found = {}
    for alpha in (0.5, 0.9):
        file = train(f"alpha_{alpha}", f"{SMALL} {data} {cached} --kd_alpha {alpha} --seed 100")
        found[alpha] = errors(answers(file, of_held_out[0]), of_held_out[1])
    alpha = min(found, key=found.get)
    print(f"errors on {HELD_OUT:,} held-out images by alpha: {found}; {alpha} is used")
    print(f"teacher: {errors(answers(teacher, test.images), test.targets)} test errors", flush=True)

    pile = OUT / "without_3"
    if not pile.exists():
        kept = np.setdiff1d(np.arange(len(train_set)), held_out)
        write_images(pile, train_set.images[kept[train_set.targets[kept] != 3]])
    runs = {
        "alone": f"{data} --kd false --data_seed 0",
        "distilled": f"{data} {cached} --kd_alpha {alpha}",
        "without 3s": f"--data_path {pile} {kd} --kd_alpha 1 --input_size 28 --data_seed 0 "
        f"--teacher_views 1 --teacher_cache {OUT}/cache_without_3",
    }
    for name, flags in runs.items():
        files = [
            train(f"{name}_{s}".replace(" ", "_"), f"{SMALL} {flags} --seed {s}") for s in SEEDS
        ]
        logits = [answers(file, test.images) for file in files]
        print_row(name, [errors(one, test.targets) for one in logits])
        if name == "without 3s":
            is_3 = test.targets == 3
            print_row("  3s that are right, %", [right_3s(one, is_3) for one in logits])
            biases = [best_bias(answers(file, of_held_out[0]), of_held_out[1]) for file in files]
            for one, bias in zip(logits, biases, strict=True):
                one[:, 3] += bias
            print_row("  the same, bias of the 3 raised by", biases)
            print_row("  errors", [errors(one, test.targets) for one in logits])
            print_row("  3s that are right, %", [right_3s(one, is_3) for one in logits])


def write_images(folder: Path, images: np.ndarray) -> None:
    """Write images (N, 28, 28) uint8 as files."""
    temporary = folder.with_suffix(".part")
    temporary.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(temporary / f"{index:05}.png")
    temporary.rename(folder)


def right_3s(logits: torch.Tensor, is_3: np.ndarray) -> float:
    """The share of the images of a 3 that are taken for one, in %."""
    return 100 * float((logits.argmax(dim=1).numpy()[is_3] == 3).mean())


def best_bias(logits: torch.Tensor, targets: np.ndarray) -> float:
    """What is best added to the logit of the 3: with the fewest errors on these images."""
    shifted = logits.clone()
    counts = {}
    for bias in np.arange(0, 10, 0.1):
        shifted[:, 3] = logits[:, 3] + bias
        counts[float(bias)] = errors(shifted, targets)
    return min(counts, key=lambda bias: (counts[bias], bias))


def print_row(name: str, values: list[float]) -> None:
    """A name, the mean and the deviation over the seeds, and each value."""
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    print(f"{name:36}{mean:8.1f} ± {deviation:.1f}   {json.dumps(values)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
