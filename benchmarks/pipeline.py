"""Speed of the input pipeline on one core, stage by stage, next to that of the ConvNeXt script.

Both read the same JPEG files with the full default augmentation: ours up to normalised images on
the device, theirs as ImageFolder, timm's create_transform and the default collate make them.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from timm.data import create_transform
from torch.utils.data import default_collate

import arguments
import datasets
import loaders
import transforms

COUNT, BATCH = 64, 32
CPU = torch.device("cpu")
THEIRS = "all: ImageFolder + timm's transforms + collate"
OURS = "all: this project"


def write_photographs(folder: Path) -> None:
    """Write synthetic JPEGs of ImageNet's usual size, 500 x 375 pixels."""
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        pixels = np.zeros((375, 500, 3))
        for side in (4, 8, 16, 32, 64, 128, 256):  # detail falls off with its frequency
            coarse = rng.integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
            layer = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            pixels += np.asarray(layer) / side**0.5
        pixels += rng.normal(0, 12, pixels.shape)
        pixels = 255 * (pixels - pixels.min()) / (pixels.max() - pixels.min())
        path = folder / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=93)


def stages(folder: Path) -> dict[str, Callable[[int], None]]:
    """What to time: each function works through all images once, given the number of the round."""
    args = arguments.parse_args(["--data_path", str(folder), "--num_workers", "0"])
    config = transforms.data_config(args)
    theirs = create_transform(
        args.input_size,
        is_training=True,
        hflip=args.hflip,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        mean=config["mean"],
        std=config["std"],
    )
    their_images = torchvision.datasets.ImageFolder(str(folder), theirs)
    source = datasets.image_folder(str(folder))
    our_images = loaders.TransformedImages(source, transforms.train_transform(args, config), seed=0)
    to_network = transforms.ToNetwork(config, CPU)
    crop, *colour_steps = our_images.transform.steps.transforms
    pillow_crop, *_ = theirs.transforms

    decoded = [source[index][0] for index in range(COUNT)]
    cropped = [crop(image) for image in decoded]
    pictures = [Image.fromarray(image) for image in decoded]
    items = [our_images[0, index] for index in range(COUNT)]

    def each(function: Callable, values: Sequence) -> Callable[[int], None]:
        def run(view: int) -> None:
            for value in values:
                function(value)  # its result is freed at once, as in a training loop

        return run

    def in_batches(values: Sequence) -> list[Sequence]:
        return [values[start : start + BATCH] for start in range(0, COUNT, BATCH)]

    def change_colours(image: Image.Image) -> Image.Image:
        for step in colour_steps:
            image = step(image)
        return image

    def run_ours(view: int) -> None:
        for indices in in_batches(range(COUNT)):
            to_network(transforms.collate([our_images[view, index] for index in indices]))

    return {
        "decode": each(lambda index: source[index], range(COUNT)),
        "crop and resize (torch)": each(crop, decoded),
        "crop and resize (Pillow, as in timm)": each(pillow_crop, pictures),
        "flip and RandAugment": each(change_colours, cropped),
        "pixels, collate, normalise, erase": each(
            lambda batch: to_network(transforms.collate(batch)), in_batches(items)
        ),
        THEIRS: each(
            lambda indices: default_collate([their_images[index] for index in indices]),
            in_batches(range(COUNT)),
        ),
        OURS: run_ours,
    }


def measure(rounds: int) -> dict[str, Any]:
    """Milliseconds per image of each stage, and the ratio of the two whole pipelines."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder)
        size = statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg"))
        timed = stages(folder)
        for round_number in range(-1, rounds):  # one to warm up
            for stage, run in timed.items():
                started = time.perf_counter()
                run(round_number + 1)  # each round draws anew
                if round_number >= 0:
                    times.setdefault(stage, []).append((time.perf_counter() - started) / COUNT)
    pairs = zip(times[THEIRS], times[OURS], strict=True)
    return {
        "kB per file": size / 1000,
        "ms": {stage: 1000 * statistics.median(values) for stage, values in times.items()},
        "ratio": statistics.median(theirs / ours for theirs, ours in pairs),
    }
