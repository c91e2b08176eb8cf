"""Images per second of the input pipeline on one core, stage by stage, and the ConvNeXt script's.

Both read the same JPEG files with the full default augmentation: ours up to normalised images on
the device, theirs as ImageFolder, timm's create_transform and the default collate make them.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from timm.data import create_transform
from torch.utils.data import default_collate

import datasets
import main
import transforms

COUNT, BATCH = 64, 32
CPU = torch.device("cpu")


def photographs(folder: Path) -> None:
    """Write JPEGs of ImageNet's usual size, 500 x 375 pixels and some 110 kB."""
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
    """What to time; each works through all images once, in the round that it is given."""
    args = main.parse_args(["--data_path", str(folder), "--num_workers", "0"])
    main.follow_defaults(args, None)
    config = transforms.data_config(args) | {"classes": ["0", "1"]}
    theirs = create_transform(
        *(args.input_size, True),
        hflip=args.hflip,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        mean=config["mean"],
        std=config["std"],
    )
    image_folder = torchvision.datasets.ImageFolder(str(folder), theirs)
    source = datasets._folder(str(folder), "--data_path")
    ours = datasets.TransformedImages(source, transforms.train_transform(args, config), 0)
    finish = datasets.DeviceLoader(None, None, config, CPU)._images
    crop, *rest = ours.transform.steps.transforms

    decoded = [source[index][0] for index in range(COUNT)]
    cropped = [crop(image) for image in decoded]
    pillow_crop, *_ = theirs.transforms
    pictures = [Image.fromarray(image) for image in decoded]
    items = [ours[0, index] for index in range(COUNT)]

    def each(function: Callable, values: Any) -> Callable[[int], None]:
        def run(view: int) -> None:
            for value in values:
                function(value)  # its result is let go, as a training loop does

        return run

    def batches(values: Any) -> list:
        return [values[start : start + BATCH] for start in range(0, COUNT, BATCH)]

    def colours(image: Image.Image) -> Image.Image:
        for step in rest:
            image = step(image)
        return image

    def whole(view: int) -> None:
        for batch in batches(range(COUNT)):
            finish(datasets.collate([ours[view, index] for index in batch]))

    return {
        "decode": each(lambda index: source[index], range(COUNT)),
        "crop and resize (torch)": each(crop, decoded),
        "crop and resize (Pillow, timm's)": each(pillow_crop, pictures),
        "flip and RandAugment": each(colours, cropped),
        "pixels, collate, normalise, erase": each(
            lambda batch: finish(datasets.collate(batch)), batches(items)
        ),
        "ImageFolder + timm + collate": each(
            lambda batch: default_collate([image_folder[index] for index in batch]),
            batches(range(COUNT)),
        ),
        "this project": whole,
    }


def measure(rounds: int) -> dict[str, Any]:
    """Milliseconds an image of each stage, and the ratio of the two whole pipelines."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs(folder)
        size = statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg"))
        timed = stages(folder)
        for round_number in range(-1, rounds):  # one to warm up
            for stage, run in timed.items():
                started = time.perf_counter()
                run(round_number + 1)  # each round draws anew
                if round_number >= 0:
                    times.setdefault(stage, []).append((time.perf_counter() - started) / COUNT)
    pairs = zip(times["ImageFolder + timm + collate"], times["this project"], strict=True)
    return {
        "kB a file": size / 1000,
        "ms": {stage: 1000 * statistics.median(values) for stage, values in times.items()},
        "ratio": statistics.median(theirs / ours for theirs, ours in pairs),
    }
