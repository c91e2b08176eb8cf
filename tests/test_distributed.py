"""Real torchrun, two processes, against one process on the same global batch."""

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
from helpers import ROOT, children_of, read_log, start, teacher_flags, torchrun

import models  # noqa: F401
from runtime import distributed
from utils import UserError

# LayerNorm, since BatchNorm's statistics are those of a process's own images.
FLAGS = """--device cpu --num_workers 1 --model convnext_atto --input_size 32 --train_samples 96
--epochs 2 --opt sgd --lr 0.02 --warmup_epochs 0 --mixup 0 --cutmix 0
--model_ema true --model_ema_eval true"""


def begin(processes: int, *argv: object, restarts: int = 0) -> subprocess.Popen:
    """Start a script under torchrun."""
    return start([*torchrun(processes, restarts), *map(str, argv)], stderr=subprocess.PIPE)


def launch(processes: int, *argv: object) -> str:
    """Run a script under torchrun to its end; returns what it printed."""
    process = begin(processes, *argv)
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    return out


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
        stdout = launch(
            processes, "main.py", *FLAGS.split(), *kd, *flags, "--output_dir", folder / name
        )
        saved = torch.load(folder / name / "checkpoint-1.pth", weights_only=True)
        out[name] = (stdout, read_log(folder / name), saved)
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
    assert stdout.count("Model convnext_atto") == 1
    assert stdout.count("Teacher cifar_resnet8") == 1 and "2 process(es)" in stdout


def test_two_processes_compute_and_learn_the_features_that_one_does(runs_folder):
    """With 97 images, of which the processes compute 49 and 48."""
    flags = "--device cpu --num_workers 1 --model cifar_resnet8 --train_samples 97 --epochs 2"
    flags += f" --lr 0.02 --linear_probe true --finetune {runs_folder / 'teacher.pth'}"
    logs = []
    for processes, batch_size in ((1, 16), (2, 8)):
        folder = runs_folder / f"probe-{processes}"
        size = ["--batch_size", batch_size]
        out = launch(processes, "main.py", *flags.split(), *size, "--output_dir", folder)
        assert out.count("Features of 97 training and ") == 1
        logs.append(read_log(folder))
    for one, two in zip(*logs, strict=True):
        for key in ("train_loss", "test_loss", "test_acc1"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key


ONCE_PER_MACHINE = """
import os, sys
import numpy as np
import torch
from data import readers
from runtime import distributed
from utils import UserError
distributed.init_process(torch.device("cpu"), "env://")
made = []
def make():
    made.append(1)
    return [np.full(3, distributed.rank()), np.array([0.5])]
for _ in range(2):
    numbers, half = distributed.once_per_machine(make)
source = readers.image_folder(sys.argv[1])
print(len(made), numbers.tolist(), half[0], numbers.flags.writeable, len(source), source[23][1])
try:
    readers.image_folder(sys.argv[2])
except UserError as error:
    print("refused", error)
except SystemExit as stop:
    print("exit", stop.code)
"""


def test_one_process_per_machine_lists_a_folder_and_makes_what_all_share(imnet, tmp_path):
    """Two processes on one machine and one on another, by what torchrun would tell them."""
    temporary, empty = tmp_path / "tmp", tmp_path / "empty"
    temporary.mkdir()
    (empty / "ant").mkdir(parents=True)
    killed, new = (temporary / f"{distributed.SHARED}{name}.npy" for name in ("killed", "new"))
    for path in (killed, new):
        path.write_bytes(b"left by another run")
    os.utime(killed, (0, 0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    common |= {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = []
    for rank, local_rank, local_world in ((0, 0, 2), (1, 1, 2), (2, 0, 1)):
        names = {"RANK": rank, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_world}
        env = os.environ | common | {name: str(value) for name, value in names.items()}
        argv = [sys.executable, "-c", ONCE_PER_MACHINE, imnet / "train", empty]
        processes.append(subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate()[0].splitlines() for process in processes]
    # torch 2.9 prints a line about its connections.
    lines = [[line for line in found if not line.startswith("[Gloo]")] for found in printed]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert lines[0][0] == "2 [0, 0, 0] 0.5 False 24 2"
    assert lines[1] == ["0 [0, 0, 0] 0.5 False 24 2", "exit 2"]
    assert lines[2][0] == "2 [2, 2, 2] 0.5 True 24 2"  # alone, and therefore without files
    for first in (0, 2):
        assert lines[first][1].startswith(f"refused {empty}: holds no images")
    assert list(temporary.iterdir()) == [new]


STORE = """--device cpu --num_workers 1 --model cifar_resnet8 --train_samples 70 --epochs 2
--mixup_mode pair"""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.startswith("view")}


def test_two_processes_and_two_runs_at_once_fill_one_store(runs_folder):
    """Under torchrun, then as two runs of the same command side by side; then a run reads it."""
    kd = [*teacher_flags(runs_folder / "teacher.pth"), "--teacher_cache_dtype", "float32"]
    common = ["main.py", *STORE.split(), "--batch_size", 8, *kd, "--teacher_cache"]
    fill = ["--teacher_cache_only", "true"]
    one, two, both = (runs_folder / f"cache-{name}" for name in ("one", "two", "both"))
    launch(1, *common, one, *fill)
    launch(2, *common, two, *fill)
    side_by_side = [begin(1, *common, both, *fill) for _ in range(2)]
    for process in side_by_side:
        _, err = process.communicate()
        assert process.returncode == 0, err
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

    done = launch(2, *common, one, "--output_dir", runs_folder / "cached")
    assert "the teacher is not loaded" in done
    without_cache = [*common[: common.index("--teacher_cache_dtype")], "--output_dir"]
    launch(2, *without_cache, runs_folder / "online")
    cached, online = (read_log(runs_folder / name) for name in ("cached", "online"))
    for a, b in zip(cached, online, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


SOLO = """
import sys
import datasets, main, utils
from data.sources import ImageSource
from runtime import signals
from training import checkpoints

{patch}
signals.stop_on_signals()
sys.exit(main.main())
"""
ENDLESS = "--device cpu --num_workers 0 --model cifar_resnet8 --batch_size 8 --epochs 1000".split()
RAISES = """
def save(*args):
    raise KeyError('cause')
checkpoints.save_checkpoint = save  # on rank 0 alone; the other ranks train on
"""
OTHER_DATA = """
import os
digits = datasets.digits
def fewer(is_train):
    found = digits(is_train)
    count = 40 + int(os.environ["RANK"])
    return ImageSource(found.load, found.targets[:count], found.classes)
datasets.digits = fewer
"""


def end_of_group(tmp_path: Path, patch: str, *argv: object) -> tuple[str, str]:
    """Run two processes of a patched main.py that end with an error; returns what they print."""
    script = tmp_path / "patched.py"
    script.write_text(SOLO.format(patch=patch))
    process = begin(2, script, *ENDLESS, "--output_dir", tmp_path / "out", *argv)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    return out, err


def test_an_error_of_one_process_ends_both_and_is_told_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    _, err = end_of_group(tmp_path, RAISES, "--train_samples", 32)
    ours, _, _ = err.partition("failed (exitcode")
    assert ours.count("KeyError: 'cause'") == 1 and ours.count("Traceback") == 1, err


def test_processes_with_other_images_do_not_begin(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out, err = end_of_group(tmp_path, OTHER_DATA)
    assert "process 0 has training images 40, but process 1 has 41" in err and "Model" not in out


def test_a_killed_process_ends_the_other_within_seconds(tmp_path):
    """Here torchrun may start both again once."""
    process = begin(2, "main.py", *ENDLESS, "--output_dir", tmp_path, restarts=1)
    for awaited in ("Epoch   1 ", "Resumed from"):
        assert any(awaited in line for line in process.stdout)
        began = time.monotonic()
        os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - began < 10
    assert "Signal 9 (SIGKILL)" in err


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
