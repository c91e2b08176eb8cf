"""Fixtures of several test files: the command line in this process, a teacher, a folder."""

import gc
from pathlib import Path

import forked  # noqa: F401  (forks its server before any test has made threads)
import numpy as np
import pytest
import timm
import torch
from helpers import (
    CLASSES,
    CONFIG,
    QUICK,
    SHORT,
    Run,
    teacher_flags,
    write_checkpoint,
    write_images,
)
from PIL import Image

import main
import models  # noqa: F401
from models import cost
from runtime import signals

gc.freeze()  # else each collection would look at all that torch and timm have made: 0.2 s


@pytest.fixture(autouse=True)
def end_loader_workers():
    """A persistent worker ends with its loader, which a reference cycle or a traceback may keep."""
    yield
    signals.end_workers()


@pytest.fixture
def run_main(capsys):
    """Runs a command line of main.py; later flags replace the quick defaults.

    Costs are measured in one round instead of five: see test_report for the rounds.
    """

    def run(*flags: object, output_dir: Path | None = None) -> Run:
        argv = [*QUICK, *map(str, flags)]
        if output_dir is not None:
            argv += ["--output_dir", str(output_dir)]
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cost, "ROUNDS", 1)
                code = main.main(argv)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Run(code, output_dir, captured.out, captured.err)

    return run


@pytest.fixture
def short() -> list[str]:
    """Two epochs of four steps on 64 digits."""
    return SHORT


@pytest.fixture
def teacher_file(tmp_path) -> Path:
    """A cifar_resnet8 of ten classes with random weights, as a bare state_dict."""
    torch.manual_seed(1)
    path = tmp_path / "teacher.pth"
    torch.save(timm.create_model("cifar_resnet8", num_classes=10).state_dict(), path)
    return path


@pytest.fixture
def kd(teacher_file) -> list[str]:
    """The flags that distill from `teacher_file`, which sees digits at their own size."""
    return ["--teacher_input_size", "8", *teacher_flags(teacher_file)]


@pytest.fixture
def imnet(tmp_path) -> Path:
    """A folder with train/ and val/ of three classes."""
    root = tmp_path / "imnet"
    write_images(root / "train", ["ant", "bee", "cat"])
    write_images(root / "val", ["ant", "bee", "cat"], count=3)
    return root


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with val/ of three classes; photographs of several shapes."""
    root, rng = tmp_path / "photos", np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        for index, shape in enumerate([(40, 50), (64, 33), (32, 32)]):
            pixels = rng.integers(60 * label, 60 * label + 90, (*shape, 3), dtype=np.uint8)
            for part in ("train", "val"):
                (root / part / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture
def checkpoint(tmp_path, photos):
    """Writes a checkpoint of an architecture with random weights; returns its path."""

    def write(arch: str, **more: object) -> Path:
        return write_checkpoint(
            tmp_path / f"{arch}.pth", arch, CLASSES, CONFIG, data_path=str(photos), **more
        )

    return write
