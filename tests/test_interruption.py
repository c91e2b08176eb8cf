"""Signals, kills and restarts inside an epoch."""

import os
import re
import signal
import stat
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from forked import Group, program, run_group
from helpers import CPU, RECORDS, children_of, is_same, read_log, start, torchrun
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from engine import evaluate
from runtime import distributed, signals
from training import history
from training.checkpoints import INSIDE_EPOCH, lock_folder, save_checkpoint
from training.history import History
from utils import UserError, append_line, flags_for, open_streams, write_whole

LONG = """--device cpu --num_workers 1 --model cifar_resnet8 --train_samples 480 --batch_size 8
--epochs 2 --print_seconds 0"""


def assert_same(alone: Path, other: Path, names: str, parts: str) -> None:
    assert (alone / "log.txt").read_bytes() == (other / "log.txt").read_bytes()
    for name in names.split():
        path = f"checkpoint-{name}.pth"
        a, b = (torch.load(folder / path, weights_only=True) for folder in (alone, other))
        for part in parts.split():
            assert is_same(a[part], b[part]), f"{part} of {path}"


def test_a_signal_stops_after_a_step_and_the_same_command_goes_on(tmp_path):
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    run_group(*LONG.split(), "--output_dir", alone)
    for number, step in ((signal.SIGTERM, 10), (signal.SIGINT, 30)):
        with Group(program, [*LONG.split(), "--output_dir", str(stopped)]) as group:
            group.wait_for(f"Epoch 1 [{step}/60]")
            # As a scheduler or a terminal does it: to the whole group, loader workers included.
            group.signal(number)
            assert group.wait() == [128 + number]
            assert f"Stopped: {number.name} after step" in group.out
            assert "run the same command to resume" in group.out and not group.err
    assert "steps of the next" in run_group(*LONG.split(), "--output_dir", stopped)
    assert_same(alone, stopped, "1", "model optimizer best scores")
    assert not (stopped / INSIDE_EPOCH).exists()


def test_a_signal_ends_an_evaluation_which_the_same_command_begins_again(
    run_main, short, tmp_path, monkeypatch
):
    flags = [*short, "--epochs", 3, "--model_ema", "true", "--model_ema_eval", "true"]
    run_main(*flags, output_dir=tmp_path / "alone")
    looked_at = []

    def stopped(loader, *args):
        """The student is scored by one of twelve batches in epoch 1."""

        def batches():
            for batch in loader:
                looked_at.append(len(batch.targets))
                if len(looked_at) == 25:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return evaluate(batches(), *args)

    monkeypatch.setattr("main.evaluate", stopped)
    run = run_main(*flags, output_dir=tmp_path / "stopped")
    assert run.code == 143 and len(looked_at) == 25, run.err
    assert "SIGTERM after the last step of epoch 1: saved to" in run.out
    monkeypatch.undo()
    assert "4 steps of the next" in run_main(*flags, output_dir=tmp_path / "stopped").out
    parts = "model model_ema optimizer best scores"
    assert_same(tmp_path / "alone", tmp_path / "stopped", "2 best best-ema", parts)


@pytest.fixture(scope="module")
def pair_alone(tmp_path_factory) -> Path:
    """The folder of a run of two processes that nobody interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    run_group(*LONG.split(), "--output_dir", folder, processes=2)
    return folder


def test_a_signal_to_one_process_of_torchrun_stops_both_and_forked_ones_go_on(pair_alone, tmp_path):
    """So what the other tests find in forked processes holds under torchrun."""
    argv = [*LONG.split(), "--output_dir", str(tmp_path)]
    process = start([*torchrun(2), "main.py", *argv])
    out = []
    for line in process.stdout:
        out.append(line)
        if "Epoch 0 [10/30]" in line:
            os.kill(children_of(process.pid)[-1], signal.SIGTERM)
    out = "".join(out)
    process.wait()
    assert out.count("2 process(es)") == 1 and out.count("Model cifar_resnet8") == 1  # rank 0 alone
    assert re.search("Stopped: SIGTERM after .*epoch [01]: saved to", out), out
    assert not (tmp_path / "checkpoint-1.pth").exists()
    run_group(*argv, processes=2)
    assert_same(pair_alone, tmp_path, "1", "model optimizer best scores")


def torchrun_that_forks(argv: list[str]) -> None:
    """What torchrun does that may start its two processes again once."""
    rendezvous = {"run_id": "test", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, 2, max_restarts=1, start_method="fork", **rendezvous)
    elastic_launch(config, program_that_exits)(argv)


def program_that_exits(argv: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a new interpreter
    sys.exit(program(argv))


def test_a_killed_process_ends_the_other_within_seconds_and_both_start_again(pair_alone, tmp_path):
    argv = [*LONG.split(), "--output_dir", str(tmp_path)]
    with Group(torchrun_that_forks, argv) as group:
        group.wait_for("Epoch 1 [10/30]")
        launcher = group.processes[0].pid
        first, second = children_of(launcher)
        os.kill(second, signal.SIGKILL)
        began = time.monotonic()
        while first in children_of(launcher):
            assert time.monotonic() - began < 30
            time.sleep(0.01)
        assert group.wait() == [0], group.err
        assert group.out.count("Resumed from") == 1
    assert_same(pair_alone, tmp_path, "1", "model optimizer best scores")


EVERYTHING = """--device cpu --num_workers 1 --model cifar_resnet8 --train_samples 96 --batch_size 8
--update_freq 2 --epochs 3 --save_ckpt_steps 1 --model_ema true --model_ema_eval true
--print_seconds 0"""


def test_a_kill_leaves_no_trace(kd, tmp_path):
    """Inside an epoch; tools/kill_test.py kills at any moment, and more often."""
    flags = [*EVERYTHING.split(), *kd, "--output_dir"]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    run_group(*flags, alone)
    with Group(program, list(map(str, [*flags, killed]))) as group:
        group.wait_for("Epoch 1 [3/6]")
        group.signal(signal.SIGKILL)
        assert group.wait() == [-signal.SIGKILL]
    assert "epoch 0 is done and" in run_group(*flags, killed)
    assert_same(alone, killed, "2 best best-ema", "model model_ema optimizer epoch best scores")


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
    flags = "--mixup 0 --cutmix 0 --model test_convnext --input_size 32 --train_samples 64"
    flags = f"{flags} --opt sgd --lr 0.02 --num_workers 0 --device cpu".split()

    def run(processes: int, batch_size: int, epochs: int, folder: Path) -> str:
        argv = [*flags, "--epochs", epochs, "--batch_size", batch_size, "--output_dir", folder]
        argv += ["--warmup_epochs", 0, "--min_lr", 0.02]  # a constant rate: epochs may differ
        return run_group(*argv, processes=processes)

    run(2, 8, 2, tmp_path / "two")
    run(2, 8, 1, tmp_path / "changed")
    changed = run(1, 16, 2, tmp_path / "changed")
    assert "saved by 2 process(es), now 1; only rounding will differ from here on" in changed
    last = [read_log(tmp_path / name)[-1]["train_loss"] for name in ("two", "changed")]
    assert last[0] == pytest.approx(last[1], rel=1e-4)


def test_a_checkpoint_costs_no_leftovers(run_main, short, tmp_path):
    run_main(*short, "--save_ckpt_steps", 1, output_dir=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    checkpoints = {f"checkpoint-{name}.pth" for name in (0, 1, "best")}
    assert names == {".lock", *RECORDS} | checkpoints


def note_a_signal() -> None:
    with signals.stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        print("requested", distributed.stop_requested(CPU))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


def test_a_signal_is_noted_and_the_step_goes_on_but_outside_of_training_it_ends_the_run():
    with Group(note_a_signal) as group:
        assert group.wait() == [-signal.SIGTERM]
        assert group.out == f"requested {int(signal.SIGTERM)}\n"


@pytest.mark.parametrize("write", [write_whole, append_line])
def test_records_are_on_the_disk_before_they_count(tmp_path, monkeypatch, write):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (done.append(n), r(*a))[1])
    write(tmp_path / "log.txt", "{}")
    assert done == (["fsync", "replace", "fsync"] if write is write_whole else ["fsync"])


def test_a_folder_whose_fsync_is_refused_can_be_saved_to(tmp_path, monkeypatch):
    """As on some FUSE and SMB mounts."""
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    save_checkpoint({"epoch": 0}, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True) == {"epoch": 0}


def test_a_share_that_refuses_locks_is_not_a_run_that_holds_one(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fcntl.lockf", refuse)
    assert lock_folder(tmp_path) is None
    assert f"{tmp_path} cannot be locked" in capsys.readouterr().out


def test_an_error_of_a_worker_is_shown_without_its_traceback():
    try:
        raise UserError("a.jpg: cannot be read", "folder")
    except UserError:
        text = traceback.format_exc()
    assert str(UserError(text)) == "a.jpg: cannot be read"  # as torch raises it again


def test_a_misspelt_subject_is_an_error_of_the_program():
    """Else the error of a user would silently lose the name of its flag."""
    with pytest.raises(AssertionError), flags_for(chekpoint="--resume"):
        pass


THREE = """--device cpu --num_workers 0 --model cifar_resnet8 --train_samples 336 --batch_size 8
--epochs 2 --model_ema true"""


def stop_on_the_way(argv: list[str]) -> int:
    """Rank 1 gets a signal in the second epoch, and all look for it at each step."""
    history.SECONDS_BETWEEN_LOOKS = 0
    end_update = History.end_update

    def end_update_and_signal(self: History, update: int, grad_norm: torch.Tensor) -> None:
        if (self.epoch, update, os.environ["RANK"]) == (1, 4, "1"):
            os.kill(os.getpid(), signal.SIGTERM)
        end_update(self, update, grad_norm)

    History.end_update = end_update_and_signal
    return program(argv)


def test_three_processes_that_were_interrupted_end_in_the_bits_of_a_run_left_alone(tmp_path):
    """From three on, the order in which ranks are added decides how a sum is rounded."""
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    run_group(*THREE.split(), "--output_dir", alone, processes=3)
    argv = [*THREE.split(), "--output_dir", str(stopped)]
    with Group(stop_on_the_way, argv, processes=3) as group:
        assert group.wait() == [128 + signal.SIGTERM] * 3, group.err
        assert "SIGTERM after step 5 of epoch 1" in group.out
    assert "5 steps of the next" in run_group(*argv, processes=3)
    assert (alone / "log.txt").read_bytes() == (stopped / "log.txt").read_bytes()
    a, b = (
        torch.load(folder / "checkpoint-1.pth", weights_only=True) for folder in (alone, stopped)
    )
    for part in ("model", "model_ema", "optimizer", "scores"):
        assert is_same(a[part], b[part]), part


def test_the_start_of_a_group_leaves_the_network_and_random_numbers_as_they_were():
    with Group(start_of_a_group, processes=2) as group:
        assert group.wait() == [0, 0], group.err


def start_of_a_group() -> None:
    distributed.init_process(CPU, "env://")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(), torch.nn.Flatten()
    )
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    numbers = torch.get_rng_state()
    wrapped = distributed.exchange_gradients(network, torch.zeros(2, 3, 4, 4))
    assert is_same(dict(network.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [module.training for module in network] == [True, False, True, True]
    assert wrapped.training and all(p.grad is None for p in wrapped.parameters())


def into_a_full_disk(argv: list[str]) -> int:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    return program(argv)


def into_a_closed_pipe(argv: list[str]) -> int:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    return program(argv)


@pytest.mark.parametrize("output", [into_a_full_disk, into_a_closed_pipe])
def test_a_run_goes_on_without_its_output_but_scores_do_not_get_lost(tmp_path, output):
    """As with `main.py … | head`, whose reader ends long before the run."""
    short = "--device cpu --num_workers 0 --model cifar_resnet8 --train_samples 32 --epochs 1"
    argv = [*short.split(), "--output_dir", str(tmp_path)]
    with Group(output, argv) as group:
        assert group.wait() == [0]
        assert group.err.startswith("Warning: standard output cannot be written")
        assert len(group.err.splitlines()) == 1
    best = tmp_path / "checkpoint-best.pth"
    assert len(read_log(tmp_path)) == 1 and best.exists()
    with Group(output, ["--eval", "true", "--resume", str(best)]) as group:
        assert group.wait() == [2]
        assert "error: the scores could not be printed" in group.err


def without_streams(path: Path) -> None:
    for number in range(3):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None
    open_streams()
    with open(path, "w") as file:
        print("not for the file", flush=True)
        os.write(2, b"nor this")
        file.write("for the file")


def test_closed_streams_do_not_end_in_the_files_of_a_run(tmp_path):
    """As with `main.py >&- 2>&-`."""
    with Group(without_streams, tmp_path / "log.txt") as group:
        assert group.wait() == [0]
    assert (tmp_path / "log.txt").read_text() == "for the file"
