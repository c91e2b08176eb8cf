"""Real torchrun, two processes, against one process on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main

ROOT = Path(main.__file__).parent
# LayerNorm, since BatchNorm's statistics are those of a process's own images.
FLAGS = """--device cpu --num_workers 1 --model convnext_atto --input_size 32 --train_samples 96
--epochs 2 --opt sgd --lr 0.02 --warmup_epochs 0 --mixup 0 --cutmix 0
--model_ema true --model_ema_eval true"""


def torchrun(processes: int, *flags: object) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv += [f"--nproc_per_node={processes}", "main.py", *FLAGS.split(), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training as 1 × 16, 2 × 8 and 2 × 4 with accumulation, with a teacher."""
    folder = tmp_path_factory.mktemp("runs")
    import timm

    torch.manual_seed(0)
    teacher = timm.create_model("cifar_resnet8", num_classes=10)
    torch.save({"model": teacher.state_dict()}, folder / "teacher.pth")
    kd = [
        "--kd",
        "true",
        "--teacher_arch",
        "cifar_resnet8",
        "--teacher_path",
        folder / "teacher.pth",
    ]
    out = {}
    for name, processes, flags in (
        ("one", 1, ["--batch_size", 16]),
        ("two", 2, ["--batch_size", 8]),
        ("two_accumulated", 2, ["--batch_size", 4, "--update_freq", 2]),
    ):
        done = torchrun(processes, *kd, *flags, "--output_dir", folder / name)
        lines = (folder / name / "log.txt").read_text().splitlines()
        saved = torch.load(folder / name / "checkpoint-1.pth", weights_only=True)
        out[name] = (done.stdout, [json.loads(line) for line in lines], saved)
    return out


@pytest.mark.parametrize("name", ["two", "two_accumulated"])
def test_two_processes_learn_what_one_learns(runs, name):
    """float32; a relative tolerance of 1e-4, since sums are taken in another order."""
    _, expected, one = runs["one"]
    _, log, two = runs[name]
    assert len(log) == len(expected) == 2
    for ours, theirs in zip(log, expected, strict=True):
        for key in ("train_loss", "train_ce", "train_kd", "test_loss", "test_loss_ema"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    for part in ("model", "model_ema"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-3, atol=1e-4)


def test_evaluation_counts_each_of_the_360_images_once(runs):
    for _, log, _ in runs.values():
        for line in log:
            assert line["test_acc1"] * 3.6 == pytest.approx(
                round(line["test_acc1"] * 3.6), abs=1e-6
            )


def test_only_rank_0_prints(runs):
    stdout = runs["two"][0]
    assert stdout.count("Student convnext_atto") == 1
    assert stdout.count("Teacher cifar_resnet8") == 1 and "2 process(es)" in stdout
