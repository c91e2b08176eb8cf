"""Two processes against one process on the same global batch; how a group begins and ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forked import Group, program, run_group
from helpers import CPU, ROOT, read_log, teacher_flags

import models  # noqa: F401
from data import readers
from data.sources import ArraySource
from runtime import distributed
from training import checkpoints
from utils import UserError

# LayerNorm, since BatchNorm's statistics are those of a process's own images.
FLAGS = """--device cpu --num_workers 1 --model test_convnext --input_size 32 --train_samples 96
--epochs 2 --opt sgd --lr 0.02 --warmup_epochs 0 --mixup 0 --cutmix 0
--model_ema true --model_ema_eval true"""


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory) -> Path:
    """A folder with a teacher."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    teacher = timm.create_model("cifar_resnet8", num_classes=10)
    torch.save({"model": teacher.state_dict()}, folder / "teacher.pth")
    return folder


@pytest.fixture(scope="module")
def runs(runs_folder):
    """The same training as 1 × 16, 2 × 8 and 2 × 4 with accumulation, with a teacher."""
    folder = runs_folder
    kd = teacher_flags(folder / "teacher.pth")
    out = {}
    for name, processes, flags in (
        ("one", 1, ["--batch_size", 16]),
        ("two", 2, ["--batch_size", 8]),
        ("two_accumulated", 2, ["--batch_size", 4, "--update_freq", 2]),
    ):
        argv = [*FLAGS.split(), *kd, *flags, "--output_dir", folder / name]
        run_group(*argv, processes=processes)
        saved = torch.load(folder / name / "checkpoint-1.pth", weights_only=True)
        out[name] = (read_log(folder / name), saved)
    return out


@pytest.mark.parametrize("name", ["two", "two_accumulated"])
def test_two_processes_learn_what_one_learns(runs, name):
    """float32; a relative tolerance of 1e-4, since sums are taken in another order."""
    expected, one = runs["one"]
    log, two = runs[name]
    assert len(log) == len(expected) == 2
    for ours, theirs in zip(log, expected, strict=True):
        for key in ("train_loss", "train_ce", "train_kd", "test_loss", "test_loss_ema"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    for part in ("model", "model_ema"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-3, atol=1e-4)


def test_evaluation_counts_each_of_the_360_images_once(runs):
    for log, _ in runs.values():
        for line in log:
            assert line["test_acc1"] * 3.6 == pytest.approx(
                round(line["test_acc1"] * 3.6), abs=1e-6
            )


def test_two_processes_compute_and_learn_the_features_that_one_does(runs_folder):
    """With 97 images, of which the processes compute 49 and 48."""
    flags = "--device cpu --num_workers 1 --model cifar_resnet8 --train_samples 97 --epochs 2"
    flags += f" --lr 0.02 --linear_probe true --finetune {runs_folder / 'teacher.pth'}"
    logs = []
    for processes, batch_size in ((1, 16), (2, 8)):
        folder = runs_folder / f"probe-{processes}"
        size = ["--batch_size", batch_size]
        out = run_group(*flags.split(), *size, "--output_dir", folder, processes=processes)
        assert out.count("Features of 97 training and ") == 1
        logs.append(read_log(folder))
    for one, two in zip(*logs, strict=True):
        for key in ("train_loss", "test_loss", "test_acc1"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key


def share(folder: Path, empty: Path) -> None:
    """What the processes below call, and what they print."""
    distributed.init_process(CPU, "env://")
    made = []

    def make() -> list[np.ndarray]:
        made.append(1)
        return [np.full(3, distributed.rank()), np.array([0.5])]

    for _ in range(2):
        numbers, half = distributed.once_per_machine(make)
    source = readers.image_folder(str(folder))
    print(len(made), numbers.tolist(), half[0], numbers.flags.writeable, len(source), source[23][1])
    try:
        readers.image_folder(str(empty))
    except UserError as error:
        print("refused", error)
    except SystemExit as stop:
        print("exit", stop.code)


def test_one_process_per_machine_lists_a_folder_and_makes_what_all_share(imnet, tmp_path):
    """Two processes on one machine and one on another, by what torchrun would tell them."""
    temporary, empty = tmp_path / "tmp", tmp_path / "empty"
    temporary.mkdir()
    (empty / "ant").mkdir(parents=True)
    killed, new = (temporary / f"{distributed.SHARED}{name}.npy" for name in ("killed", "new"))
    for path in (killed, new):
        path.write_bytes(b"left by another run")
    os.utime(killed, (0, 0))
    env = tuple(
        {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_world, "TMPDIR": temporary}
        for local_rank, local_world in ((0, 2), (1, 2), (0, 1))
    )
    with Group(share, imnet / "train", empty, processes=3, env=env) as group:
        assert group.wait() == [0, 0, 0], group.err
        printed = [group.printed("out", rank).splitlines() for rank in range(3)]
    # torch 2.9 prints a line about its connections.
    lines = [[line for line in out if not line.startswith("[Gloo]")] for out in printed]
    assert lines[0][0] == "2 [0, 0, 0] 0.5 False 24 2"
    assert lines[1] == ["0 [0, 0, 0] 0.5 False 24 2", "exit 2"]
    assert lines[2][0] == "2 [2, 2, 2] 0.5 True 24 2"  # alone, and therefore without files
    for first in (0, 2):
        assert lines[first][1].startswith(f"refused {empty}: holds no images")
    assert list(temporary.iterdir()) == [new]


def test_files_of_running_processes_survive_a_clock_that_is_hours_ahead(tmp_path, monkeypatch):
    """The folder may be on a file server, whose clock stamps the files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ahead = time.time() + 7200
    monkeypatch.setattr("time.time", lambda: ahead)
    path = tmp_path / f"{distributed.SHARED}new.npy"
    path.touch()
    distributed._delete_old_files()
    assert path.exists()


STORE = """--device cpu --num_workers 1 --model cifar_resnet8 --train_samples 70 --epochs 2
--mixup_mode pair"""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.startswith("view")}


def test_two_processes_and_two_runs_at_once_fill_one_store(runs_folder):
    """As one run, then as two of the same command side by side; then a run reads it."""
    kd = [*teacher_flags(runs_folder / "teacher.pth"), "--teacher_cache_dtype", "float32"]
    common = [*STORE.split(), "--batch_size", 8, *kd, "--teacher_cache"]
    fill = ["--teacher_cache_only", "true"]
    one, two, both = (runs_folder / f"cache-{name}" for name in ("one", "two", "both"))
    run_group(*common, one, *fill)
    run_group(*common, two, *fill, processes=2)
    argv = list(map(str, [*common, both, *fill]))
    with Group(program, argv) as first, Group(program, argv) as second:
        assert first.wait() == second.wait() == [0], first.err + second.err
    expected = contents(one)
    assert len(expected) == 4
    assert contents(two).keys() == contents(both).keys() == expected.keys()
    for other in (contents(two), contents(both)):
        for name, content in expected.items():
            if name.endswith(".sums"):  # of other stores; a checksum of 0 would be a missing row
                assert np.frombuffer(content, np.uint32).all()
                assert np.frombuffer(other[name], np.uint32).all()
                continue
            a, b = (np.frombuffer(found, np.float32) for found in (content, other[name]))
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    done = run_group(*common, one, "--output_dir", runs_folder / "cached", processes=2)
    assert "the teacher is not loaded" in done
    without_cache = [*common[: common.index("--teacher_cache_dtype")], "--output_dir"]
    run_group(*without_cache, runs_folder / "online", processes=2)
    cached, online = (read_log(runs_folder / name) for name in ("cached", "online"))
    for a, b in zip(cached, online, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


ENDLESS = "--device cpu --num_workers 0 --model cifar_resnet8 --batch_size 8 --epochs 1000".split()


def run_that_cannot_save(argv: list[str]) -> int:
    def save(*args: object) -> None:
        raise KeyError("cause")

    checkpoints.save_checkpoint = save  # on rank 0 alone; the other ranks train on
    return program(argv)


def run_with_other_images(argv: list[str]) -> int:
    def fewer(digits: ArraySource) -> ArraySource:
        count = 40 + int(os.environ["RANK"])
        return ArraySource(digits.images, digits.targets[:count], digits.classes)

    whole = readers.digits
    readers.digits = lambda is_train: fewer(whole(True)) if is_train else whole(False)
    return program(argv)


def test_an_error_of_one_process_ends_both_within_seconds_and_is_reported_once(tmp_path):
    argv = [*ENDLESS, "--train_samples", "32", "--output_dir", str(tmp_path)]
    with Group(run_that_cannot_save, argv, processes=2) as group:
        assert group.wait(30) == [1, 1]
        assert group.err.count("KeyError: 'cause'") == 1, group.err
        assert group.err.count("Traceback") == 1, group.err


def test_processes_with_other_images_do_not_begin(tmp_path):
    argv = [*ENDLESS, "--output_dir", str(tmp_path / "out")]
    with Group(run_with_other_images, argv, processes=2) as group:
        assert group.wait(30) == [2, 2], group.err
        assert "process 0 has training images 40, but process 1 has 41" in group.err
        assert "Model" not in group.out


def test_a_process_without_its_group_says_what_it_waits_for_and_ends_at_once(monkeypatch):
    """As with RANK and WORLD_SIZE left over from elsewhere, or if rank 1 dies at the start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with Group(program, ENDLESS, env=(env,)) as group:
        group.wait_for("Waiting as process 0 of 2 (RANK=0, WORLD_SIZE=2) for the others at 127.0")
        group.signal(signal.SIGTERM)
        assert group.wait(5) == [-signal.SIGTERM]


@pytest.mark.parametrize("rank", [None, "0", "one"])
def test_a_group_that_the_environment_does_not_describe_is_one_line(run_main, monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    if rank:
        monkeypatch.setenv("RANK", rank)
    run = run_main()
    assert run.code == 2 and len(run.err.splitlines()) == 1
    assert f"RANK={rank}, WORLD_SIZE=2" in run.err and "unset both variables" in run.err


LEAVES = """
import atexit, threading
import torch.distributed as dist
from runtime import distributed
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))  # the last one
distributed._stores.append(dist.HashStore())
distributed._start_following()
"""


def test_no_thread_is_in_the_store_when_the_interpreter_ends():
    """One that is aborts the process: a run that was finished then ended with SIGABRT."""
    argv = [sys.executable, "-c", LEAVES]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "['MainThread']\n"), done.stderr


def test_restarts_on_several_machines_are_refused_where_processes_would_look_for_dead_ones(
    monkeypatch,
):
    torchrun = "WORLD_SIZE 2 GROUP_WORLD_SIZE 2 TORCHELASTIC_MAX_RESTARTS 3".split()
    for name, value in zip(torchrun[::2], torchrun[1::2], strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"):
        distributed.init_process(torch.device("cpu"), "env://")
