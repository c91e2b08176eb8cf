"""Signals, kills and restarts inside an epoch."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import CPU, RECORDS, ROOT, children_of, is_same, read_log, start, torchrun

from runtime import distributed, signals
from training.checkpoints import INSIDE_EPOCH
from utils import UserError

LONG = """--device cpu --num_workers 1 --model cifar_resnet8 --train_samples 640 --batch_size 8
--epochs 3 --print_seconds 0"""


def train(folder: Path, processes: int = 1) -> subprocess.Popen:
    python = torchrun(processes) if processes > 1 else [sys.executable, "-u"]
    return start([*python, "main.py", *LONG.split(), "--output_dir", str(folder)])


def wait_for(process: subprocess.Popen, text: str) -> str:
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"'{text}' never came:\n{seen}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    process = train(folder)
    assert process.communicate() and process.returncode == 0
    return folder


def assert_same(alone: Path, other: Path) -> None:
    assert (alone / "log.txt").read_bytes() == (other / "log.txt").read_bytes()
    a, b = (torch.load(folder / "checkpoint-2.pth", weights_only=True) for folder in (alone, other))
    for part in ("model", "optimizer", "best", "scores"):
        assert is_same(a[part], b[part]), part


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_after_a_step_and_the_same_command_goes_on(alone, tmp_path, name):
    process = train(tmp_path)
    wait_for(process, "Epoch 1 [20/80]")
    # As a scheduler or a terminal does it: to the whole group, loader workers included.
    os.killpg(process.pid, getattr(signal, name))
    out = process.stdout.read()
    assert process.wait() == 128 + getattr(signal, name)
    assert f"Stopped: {name} after step" in out and "run the same command to resume" in out
    assert "Traceback" not in out
    again = train(tmp_path)
    out = again.stdout.read()
    assert again.wait() == 0 and "steps of the next" in out
    assert_same(alone, tmp_path)
    assert not (tmp_path / INSIDE_EPOCH).exists()


def test_a_signal_to_one_process_stops_both(tmp_path):
    process = train(tmp_path, processes=2)
    wait_for(process, "Epoch 1 [20/40]")
    os.kill(children_of(process.pid)[-1], signal.SIGTERM)
    out = process.stdout.read()
    process.wait()
    saved = torch.load(tmp_path / INSIDE_EPOCH, weights_only=True)
    assert re.search(r"Stopped: SIGTERM after step (\d+) of epoch 1", out)
    assert saved["epoch"] == 0 and 20 <= saved["progress"]["updates"] < 40


def test_kills_leave_no_trace(tmp_path):
    """The short form of tools/kill_test.py."""
    done = subprocess.run(
        [sys.executable, "tools/kill_test.py", "--kills", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every run identical" in done.stdout


def test_another_global_batch_inside_an_epoch_is_refused(run_main, short, tmp_path, monkeypatch):
    flags = [*short, "--save_ckpt_steps", 2]

    def stop(*args, **kwargs):
        raise UserError("stopped here")

    monkeypatch.setattr("main.evaluate", stop)
    assert "stopped here" in run_main(*flags, output_dir=tmp_path).err
    monkeypatch.undo()
    refused = run_main(*flags, "--batch_size", 8, output_dir=tmp_path)
    assert refused.code == 2 and "16 images per step when it was saved, 8 now" in refused.err
    # The same product of batch and accumulation is the same step.
    accepted = run_main(*flags, "--batch_size", 8, "--update_freq", 2, output_dir=tmp_path)
    assert accepted.code == 0 and "2 steps of the next" in accepted.out, accepted.err


def test_another_number_of_processes_goes_on_with_the_same_steps(tmp_path):
    flags = "--mixup 0 --cutmix 0 --model convnext_atto --input_size 32 --train_samples 64"
    flags = f"{flags} --opt sgd --lr 0.02 --num_workers 0 --device cpu".split()

    def run(processes: int, batch_size: int, epochs: int, folder: Path) -> str:
        argv = [*torchrun(processes), "main.py", *flags, "--epochs", str(epochs)]
        argv += ["--batch_size", str(batch_size), "--output_dir", str(folder)]
        argv += ["--warmup_epochs", "0", "--min_lr", "0.02"]  # a constant rate: epochs may differ
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(2, 8, 2, tmp_path / "two")
    run(2, 8, 1, tmp_path / "changed")
    assert "saved by 2 process(es), now 1" in run(1, 16, 2, tmp_path / "changed")
    last = [read_log(tmp_path / name)[-1]["train_loss"] for name in ("two", "changed")]
    assert last[0] == pytest.approx(last[1], rel=1e-4)


def test_a_checkpoint_costs_no_leftovers(run_main, short, tmp_path):
    run_main(*short, "--save_ckpt_steps", 1, output_dir=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    checkpoints = {f"checkpoint-{name}.pth" for name in (0, 1, "best")}
    assert names == {".lock", *RECORDS} | checkpoints


def test_a_run_waits_no_longer_than_its_step_for_a_signal():
    """The handler itself only leaves a note."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        signals.stop_on_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert distributed.stop_requested(CPU) == signal.SIGTERM
    finally:
        signals._received.clear()
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert distributed.stop_requested(CPU) == 0
