"""What several test files use: the command line in this process, small teachers, small folders."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import datasets
import main
import models  # noqa: F401
import transforms


@pytest.fixture(autouse=True)
def end_loader_workers():
    """A persistent worker ends with its loader, which a reference cycle may keep."""
    yield
    gc.collect()


QUICK = [
    "--device",
    "cpu",
    "--num_workers",
    "0",
    "--batch_size",
    "16",
    "--model",
    "cifar_resnet8",
]


class Run:
    """One finished run of main.py."""

    def __init__(self, code: int, folder: Path | None, out: str, err: str) -> None:
        self.code, self.folder, self.out, self.err = code, folder, out, err

    @property
    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "log.txt").read_text().splitlines()]

    def checkpoint(self, name: object) -> dict:
        return torch.load(self.folder / f"checkpoint-{name}.pth", weights_only=True)


@pytest.fixture
def run_main(capsys):
    """Runs main.py's command line; later flags win over the quick defaults."""

    def run(*flags: object, output_dir: Path | None = None) -> Run:
        argv = [*QUICK, *map(str, flags)]
        if output_dir is not None:
            argv += ["--output_dir", str(output_dir)]
        try:
            code = main.main(main.parse_args(argv))
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Run(code, output_dir, captured.out, captured.err)

    return run


@pytest.fixture
def short() -> list[str]:
    """Two epochs of four steps on 64 digits."""
    return ["--train_samples", "64", "--epochs", "2"]


@pytest.fixture
def teacher_file(tmp_path) -> Path:
    """A cifar_resnet8 of ten classes with random weights, as a bare state_dict."""
    torch.manual_seed(1)
    path = tmp_path / "teacher.pth"
    torch.save(timm.create_model("cifar_resnet8", num_classes=10).state_dict(), path)
    return path


@pytest.fixture
def kd(teacher_file) -> list[str]:
    """The flags that distil from `teacher_file`."""
    return ["--kd", "true", "--teacher_arch", "cifar_resnet8", "--teacher_path", str(teacher_file)]


def evaluation_images(images: list[np.ndarray], config: dict) -> torch.Tensor:
    """Images as a network of this data configuration is shown them in an evaluation."""
    transform = transforms.eval_transform(config)
    batch = datasets.collate([(transform(image), 0) for image in images])
    return datasets.DeviceLoader(None, None, config, torch.device("cpu"))._images(batch)


def write_images(folder: Path, classes: list[str], count: int = 8, size=(40, 32)) -> None:
    """Write `count` noisy JPEGs a class, brighter for each class."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = rng.integers(0, 64, (*size, 3), dtype=np.uint8) + 60 * number
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"{index}.jpg")


@pytest.fixture
def imnet(tmp_path) -> Path:
    """A folder with train/ and val/ of three classes."""
    root = tmp_path / "imnet"
    write_images(root / "train", ["ant", "bee", "cat"])
    write_images(root / "val", ["ant", "bee", "cat"], count=3)
    return root
