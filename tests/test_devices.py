"""What devices that are not here are asked for: copies, dtypes and kernels, with stand-ins."""

import argparse
import http.server
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import datasets
from models.checkpoint import local_file, read_checkpoint
from runtime.device import (
    channels_last,
    choose_kernels,
    default_amp_dtype,
    default_device,
    find_device,
    peak_memory,
    send,
)
from runtime.distributed import _refuse_shared_gpu
from runtime.randomness import RandomUse, seed_rng
from utils import UserError

XPU = torch.device("xpu", 0)


class Copied:
    """Stands in for a tensor in host memory; notes how it is copied."""

    device, is_pinned = torch.device("cpu"), False

    def pin_memory(self):
        self.is_pinned = True
        return self

    def to(self, device: torch.device, non_blocking: bool) -> tuple:
        return device.type, non_blocking, self.is_pinned


@pytest.mark.parametrize(
    ("device", "is_beside"), [("cuda", True), ("xpu", True), ("mps", False), ("cpu", False)]
)
def test_copies_run_beside_the_cpu_from_page_locked_memory_on_gpus_with_streams(device, is_beside):
    assert send(Copied(), torch.device(device)) == (device, is_beside, is_beside)


def test_an_xpu_is_seeded_measured_and_chosen(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.xpu, "manual_seed", seeds.append)
    monkeypatch.setattr(torch.xpu, "max_memory_allocated", lambda device: 5 if device == XPU else 0)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu")
    )
    seed_rng(XPU, RandomUse.STEP, 0, 1, 2, 3)
    assert seeds == [torch.initial_seed()]
    assert (peak_memory(XPU), default_amp_dtype(XPU), default_device()) == (5, "bfloat16", "xpu")


@pytest.mark.parametrize(("visible", "index"), [(4, 3), (1, 0)])
def test_each_process_finds_its_gpu_also_if_it_sees_no_other(monkeypatch, visible, index):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    assert find_device("cuda") == torch.device("cuda", index)


def test_processes_that_see_the_same_single_gpu_are_refused(monkeypatch):
    class Properties:
        uuid = "GPU-1"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    store, device = torch.distributed.HashStore(), torch.device("cuda", 0)
    _refuse_shared_gpu(store, device)
    Properties.uuid = "GPU-2"
    _refuse_shared_gpu(store, device)
    with pytest.raises(UserError, match="cuda: several processes would share"):
        _refuse_shared_gpu(store, device)


@pytest.mark.parametrize("is_supported", [True, False])
def test_mixed_precision_is_bfloat16_where_the_gpu_has_it(monkeypatch, is_supported):
    asked = {}

    def support(including_emulation=True):
        asked["emulation"] = including_emulation
        return is_supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", support)
    wanted = "bfloat16" if is_supported else "float16"
    assert default_amp_dtype(torch.device("cuda")) == wanted
    assert asked == {"emulation": False}  # which would be slower than float32
    assert default_amp_dtype(torch.device("cpu")) == "bfloat16"


def test_kernels_without_speed_are_the_same_in_each_run():
    try:
        choose_kernels(False)
        cudnn = torch.backends.cudnn
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (False, True, False)
        assert torch.get_float32_matmul_precision() == "highest"
        choose_kernels(True)
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (True, False, True)
    finally:
        choose_kernels(False)


def test_an_address_is_downloaded_once_per_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "teacher.pth")
    asked = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, form, *args):
            asked.append(args[0])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/teacher.pth"
        with ThreadPoolExecutor(4) as pool:
            files = set(pool.map(local_file, [address] * 4))
        server.shutdown()
    assert len(files) == 1 and asked == ["GET /teacher.pth HTTP/1.1"]
    assert torch.equal(read_checkpoint(files.pop()).content["model"]["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"use_amp": False}, "float32"),
        ({"use_amp": True}, "bfloat16"),
        ({"use_amp": True, "teacher_device": "cpu:0"}, "bfloat16"),
        ({"use_amp": True, "teacher_device": "cuda:1"}, "float32"),  # without autocast there
        ({"use_amp": True, "teacher_dtype": "float16"}, "float16"),
    ],
)
def test_a_teacher_computes_in_mixed_precision_as_the_run_does(flags, dtype):
    unset = {"amp_dtype": None, "teacher_dtype": None, "teacher_device": None, "batch_size": 8}
    args = argparse.Namespace(**unset | flags)
    datasets.complete(args, torch.device("cpu"))
    assert args.teacher_dtype == dtype


def test_weights_of_five_dimensions_keep_their_layout():
    """As in timm's lambda networks, for which Module.to raises."""
    volume, plane = channels_last(
        torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3), torch.nn.Conv2d(3, 2, 3))
    )
    assert volume.weight.is_contiguous() and not plane.weight.is_contiguous()
    assert plane.weight.is_contiguous(memory_format=torch.channels_last)
