"""CPU time of the input pipeline on one core, stage by stage, next to that of the ConvNeXt script.

Both read the same JPEG files with the full default augmentation: ours up to normalized images on
the device, theirs as ImageFolder, timm's create_transform and the default collate make them.
"""

import operator
import statistics
import tarfile
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

import datasets
from arguments.parsing import parse_args
from data import loaders, transforms
from data.readers import image_folder
from data.tars import images_in_tars

SIZES = {(500, 375): 64, (4000, 3000): 6}  # of JPEGs, and how many of them
BATCH = 32
CPU = torch.device("cpu")
THEIRS = "all: ImageFolder + timm's transforms + collate"
OURS = "all: this project"
TARS = "all: this project, from tar files"


def write_photographs(folder: Path, size: tuple[int, int], count: int) -> None:
    """Write synthetic JPEGs of this width and height: ImageNet's usual size, or a camera's."""
    rng = np.random.default_rng(0)
    width, height = size
    sides = [side for side in (2**power for power in range(2, 13)) if side < width]
    for index in range(count):
        pixels = np.zeros((height, width, 3))
        for side in sides:  # detail falls off with its frequency
            coarse = rng.integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
            layer = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            pixels += np.asarray(layer) / side**0.5
        pixels += rng.normal(0, 12, pixels.shape)
        pixels = 255 * (pixels - pixels.min()) / (pixels.max() - pixels.min())
        path = folder / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=93 if width < 1000 else 90)


def pack(folder: Path, tars: Path, count: int = 4) -> None:
    """Write the images of a folder into some tar files, image by image in turn."""
    files = sorted(folder.rglob("*.jpg"))
    for number in range(count):
        with tarfile.open(tars / f"{number}.tar", "w") as tar:
            for file in files[number::count]:
                tar.add(file, file.relative_to(folder))


def stages(folder: Path, tars: Path, count: int) -> dict[str, Callable[[int], None]]:
    """What to time: each function works through all images once, given the number of the round."""
    args = parse_args(["--data_path", str(folder), "--num_workers", "0"])
    config = datasets.data_config(args)
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
    source = image_folder(str(folder))
    augmentation = datasets.from_flags(transforms.Augmentation, args)
    transform = transforms.train_transform(augmentation, config)
    our_images = loaders.TransformedImages(source, transform, seed=0)
    in_tars = loaders.TransformedImages(images_in_tars(str(tars)), transform, seed=0)
    to_network = transforms.ToNetwork(config, CPU)
    crop, *color_steps = our_images.transform.steps.transforms
    pillow_crop, *_ = theirs.transforms

    decoded = [source[index][0] for index in range(count)]
    cropped = [crop(image) for image in decoded]
    pictures = [Image.fromarray(image) for image in decoded]
    items = [our_images[0, index] for index in range(count)]

    def each(function: Callable, values: Sequence) -> Callable[[int], None]:
        def run(view: int) -> None:
            for value in values:
                function(value)  # its result is freed at once, as in a training loop

        return run

    def in_batches(values: Sequence) -> list[Sequence]:
        return [values[start : start + BATCH] for start in range(0, count, BATCH)]

    def change_colors(image: Image.Image) -> Image.Image:
        for step in color_steps:
            image = step(image)
        return image

    def load(images: loaders.TransformedImages) -> Callable[[int], None]:
        def run(view: int) -> None:
            for indices in in_batches(range(count)):
                to_network(transforms.collate([images[view, index] for index in indices]))

        return run

    return {
        "decode the whole image": each(lambda index: source[index], range(count)),
        "crop and resize (torch)": each(crop, decoded),
        "crop and resize (Pillow, as in timm)": each(pillow_crop, pictures),
        "decode, crop and resize": each(lambda index: crop(source.load(index)), range(count)),
        "flip and RandAugment": each(change_colors, cropped),
        "pixels, collate, normalize, erase": each(
            lambda batch: to_network(transforms.collate(batch)), in_batches(items)
        ),
        THEIRS: each(
            lambda indices: default_collate([their_images[index] for index in indices]),
            in_batches(range(count)),
        ),
        OURS: load(our_images),
        TARS: load(in_tars),
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    """Per size of photographs: milliseconds per image of each stage, and ratios of pipelines."""
    torch.set_num_threads(1)
    return [measure_size(size, count, rounds) for size, count in SIZES.items()]


def measure_size(size: tuple[int, int], count: int, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, tars = Path(name, "images"), Path(name, "tars")
        folder.mkdir()
        tars.mkdir()
        write_photographs(folder, size, count)
        pack(folder, tars)
        bytes_per_file = statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg"))
        timed = stages(folder, tars, count)
        for round_number in range(-1, rounds):  # one to warm up
            for stage, run in timed.items():
                started = time.process_time()
                run(round_number + 1)  # each round draws anew
                if round_number >= 0:
                    times.setdefault(stage, []).append((time.process_time() - started) / count)
    pairs = zip(times[THEIRS], times[OURS], strict=True)
    return {
        "size": size,
        "kB per file": bytes_per_file / 1000,
        "ms": {stage: 1000 * statistics.median(values) for stage, values in times.items()},
        "ratio": statistics.median(theirs / ours for theirs, ours in pairs),
        "tars": statistics.median(map(operator.truediv, times[OURS], times[TARS])),
    }
