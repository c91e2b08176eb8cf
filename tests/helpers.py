"""What several test files and tools share: comparisons, torchrun, folders of images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import models
from data import transforms

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
# The flags that every quick run shares; flags given later replace them.
QUICK = "--device cpu --num_workers 0 --batch_size 16 --model cifar_resnet8 --log_dir none".split()
BOARD = ["--log_dir", ""]  # writes TensorBoard's files to OUTPUT_DIR/tb, which slows quick runs
SHORT = "--train_samples 64 --epochs 2".split()  # four steps per epoch

# What a finished run leaves besides checkpoints.
RECORDS = ["args.json", "environment.json", "log.txt", "summary.json"]
CLASSES = ['ant, "red"', "bee", "Käfer 猫"]
# Not what main.py would choose, so that a value that is not handed on shows.
CONFIG = {
    "input_size": 32,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
    "crop_pct": 0.8,
    "crop_mode": "center",
    "interpolation": "bilinear",
}


class Run:
    """One finished run of main.py."""

    def __init__(self, code: int, folder: Path | None, out: str, err: str) -> None:
        self.code, self.folder, self.out, self.err = code, folder, out, err

    @property
    def log(self) -> list[dict]:
        return read_log(self.folder)

    def checkpoint(self, name: object) -> dict:
        return torch.load(self.folder / f"checkpoint-{name}.pth", weights_only=True)


def read_log(folder: Path) -> list[dict]:
    """The records of log.txt, one per epoch."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def teacher_flags(path: object, arch: str = "cifar_resnet8") -> list[str]:
    """The flags that distill from a file."""
    return ["--kd", "true", "--teacher_arch", arch, "--teacher_path", str(path)]


def is_same(a: object, b: object) -> bool:
    """Whether two checkpoints, or parts of them, are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b


def torchrun(processes: int) -> list[str]:
    """The beginning of a command line that runs a script in several processes."""
    argv = [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone"]
    return [*argv, f"--nproc_per_node={processes}"]


def start(argv: list[str], stderr: int = subprocess.STDOUT) -> subprocess.Popen:
    """Start a command in the project's folder, with one thread and a process group of its own."""
    return subprocess.Popen(
        argv,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def children_of(pid: int) -> list[int]:
    """The processes that a process has started (Linux)."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def evaluation_images(images: list[np.ndarray], config: dict) -> torch.Tensor:
    """Images as a network with this data configuration sees them in an evaluation."""
    transform = transforms.eval_transform(config)
    batch = transforms.collate([(transform(image), 0) for image in images])
    return transforms.ToNetwork(config, CPU)(batch)


def write_images(folder: Path, classes: list[str], count: int = 8, size=(40, 32)) -> None:
    """Write `count` noisy JPEGs per class, brighter from class to class."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = rng.integers(0, 64, (*size, 3), dtype=np.uint8) + 60 * number
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"{index}.jpg")


def tree(folder: Path, hidden: bool = True) -> list[str]:
    """The paths of everything below a folder, sorted; with or without hidden files."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(path for path in found if hidden or not path.startswith("."))


def write_checkpoint(
    path: Path,
    arch: str,
    classes: list[str],
    config: dict,
    *,
    data_path: str,
    with_ema: bool = False,
    scores: dict | None = None,
    network: torch.nn.Module | None = None,
) -> Path:
    """A checkpoint as main.py writes it, of a network with random weights."""
    size = config["input_size"]
    torch.manual_seed(0)
    made = network or models.create_model(arch, len(classes), size)
    states = []
    for _ in range(1 + with_ema):
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:  # else some would begin with 0 or 1e-6 and do nothing
                    parameter.add_(0.1 * torch.randn_like(parameter))
            if classifier := getattr(made, "get_classifier", None):
                classifier().weight.mul_(5)
            made.train()
            for _ in range(5):  # so that BatchNorm has statistics
                made(torch.randn(8, 3, size, size))
        states.append({name: value.clone() for name, value in made.state_dict().items()})
    args = {"model": arch, "input_size": size, "batch_size": 4, "kd": False}
    checkpoint = {
        "format": 2,
        "model": states[0],
        "model_ema": states[1] if with_ema else None,
        "epoch": 0,
        "args": args | {"data_set": "IMNET", "data_path": data_path, "given": []},
        "data": config | {"classes": classes},
        "images": {},
        "scores": scores or {},
    }
    torch.save(checkpoint, path)
    return path


def images_of(photos: Path) -> torch.Tensor:
    """The validation images as timm shows them with CONFIG: (9, 3, 32, 32)."""
    transform = timm.data.create_transform(
        32,
        is_training=False,
        interpolation=CONFIG["interpolation"],
        crop_pct=CONFIG["crop_pct"],
        mean=CONFIG["mean"],
        std=CONFIG["std"],
    )
    files = sorted((photos / "val").rglob("*.png"))
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])


def network_of(path: Path, arch: str, key: str = "model") -> torch.nn.Module:
    """The network of a checkpoint, built by timm."""
    sizes = {"img_size": 32} if "vit" in arch else {}
    network = timm.create_model(arch, num_classes=len(CLASSES), **sizes)
    network.load_state_dict(torch.load(path, weights_only=True)[key])
    return network.eval()
