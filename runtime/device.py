"""The device that a run computes on: chosen, tuned and measured."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from utils import UserError, first_line

Network = TypeVar("Network", bound=nn.Module)

DEFAULT_THREADS = torch.get_num_threads()  # torch's own choice: one per core
PIXELS_PER_THREAD = 8192  # of a batch; measured, see docs/benchmarks.md


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors, so that the next training step can reuse it.

    By default glibc returns large blocks to the system, which then has to clear every page of the
    next block: ten thousand or more page faults per step, 4 to 15 % of a training step on the CPU.
    See mallopt(3). This changes the whole process, and does nothing with a different C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return  # not glibc
    mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which free() would unmap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def choose_threads(pixels: int) -> int:
    """Give each CPU thread of torch a share of a batch that is worth waking the thread for.

    The number is a function of the command and the machine alone, since the last bits of a result
    depend on it. If OMP_NUM_THREADS or MKL_NUM_THREADS is set, nothing changes.

    Args:
        pixels: images of a batch, times height, times width.
    Returns: the number of threads, at most as many as torch had chosen.
    """
    if not os.environ.keys() & {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}:
        threads = max(1, min(DEFAULT_THREADS, pixels // PIXELS_PER_THREAD))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
    return torch.get_num_threads()


def choose_kernels(is_fast: bool) -> None:
    """Trade the last bits for speed on CUDA in this process, or speed for the last bits.

    Fast: matrix products of float32 use TF32 (10 bits of mantissa) if the GPU has it, and cuDNN
    tries its kernels on the first batch of each shape and keeps the fastest, which may be a
    different one in the next run. Else neither products nor convolutions use TF32, and cuDNN takes
    kernels that give the same bits in each run.
    """
    torch.set_float32_matmul_precision("high" if is_fast else "highest")
    torch.backends.cudnn.benchmark = is_fast
    torch.backends.cudnn.deterministic = not is_fast
    torch.backends.cudnn.allow_tf32 = is_fast


@contextmanager
def untried_kernels() -> Iterator[None]:
    """For passes that come once: cuDNN does not try its kernels, which takes seconds."""
    is_tried = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = is_tried


def may_choose_kernels(device: torch.device) -> bool:
    """Whether cuDNN computes there, and may use TF32 and any of its kernels (`choose_kernels`)."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None  # else ROCm
    return is_nvidia and torch.get_float32_matmul_precision() != "highest"


def has_streams(device: torch.device) -> bool:
    """Whether the device computes and copies beside the CPU, as CUDA, ROCm and XPU do.

    Not MPS, where torch may read the source of a copy after it was freed (pytorch issue 189690).
    """
    return device.type not in ("cpu", "mps")


def default_amp_dtype(device: torch.device) -> str:
    """bfloat16 if the device computes in it, since it needs no loss scaling, else float16."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_bfloat16 else "float16"
    return "float16" if device.type == "mps" else "bfloat16"


def local_rank() -> int:
    """Number of this process among those of its machine, as torchrun sets it; else 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def find_device(name: str) -> torch.device:
    """The device of that name, tried out; 'cuda' or 'xpu' alone is the GPU of this process.

    Raises: UserError for a device that does not exist, or that several processes would share.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        device = torch.device(name)
        if has_streams(device):
            gpus = torch.get_device_module(device).device_count()
            if device.index is not None and processes > 1 and gpus != 1:
                remedy = f"pass {device.type}, which gives each process a GPU of its own"
                what = f"{processes} processes of this machine would share this GPU"
                raise UserError(f"{name}: {what}; {remedy}", "device")
            if 1 < gpus <= local_rank():
                what = f"{processes} processes on this machine, which has {gpus} GPU(s)"
                remedy = f"start torchrun with --nproc_per_node={gpus}"
                raise UserError(f"{name}: {what}; {remedy}", "device")
            if device.index is None:
                # A launcher may show each process one GPU, which is number 0 to all of them.
                device = torch.device(device.type, local_rank() if gpus > 1 else 0)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch lists every backend that it was ever built for; its first sentence is the reason.
        reason = first_line(error).partition(". ")[0].partition(", xpu")[0]
        raise UserError(f"{name}: {reason}; pass {default_device()}", "device") from error
    return device


def default_device() -> str:
    """The accelerator that this torch was built for (cuda, xpu, mps) if there is one, else cpu."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def channels_last(network: Network) -> Network:
    """The network, its weights (D, C, h, w) laid out in memory as (D, h, w, C).

    Never slower, and a quarter faster on convolutional networks. Unlike Module.to, this leaves
    weights of five dimensions as they are, which timm's lambda networks have, and does not fail.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return network


def avoid_faulty_kernel(network: Network) -> Network:
    """The network, kept away from a kernel of the CPU that writes past its memory.

    In channels_last, a convolution of 1 x 1 pixels with a stride and fewer than 16 input channels,
    as in the stems of RepVGG, MobileOne and FastViT, gets wrong gradients or ends the process
    (oneDNN issue 6035). Here its input is subsampled first, which gives the same output.
    """
    for conv in network.modules():
        if not isinstance(conv, nn.Conv2d) or conv.in_channels // conv.groups >= 16:
            continue
        if conv.kernel_size == (1, 1) and conv.padding == (0, 0) and max(conv.stride) > 1:
            conv.register_forward_pre_hook(_subsample(*conv.stride))
            conv.stride = (1, 1)
    return network


def _subsample(down: int, across: int) -> Callable[[nn.Module, Any], torch.Tensor]:
    """A forward pre-hook that keeps every `down`-th row and every `across`-th column."""
    return lambda conv, inputs: inputs[0][..., ::down, ::across]


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; the copy runs beside what the CPU does next if it can."""
    if has_streams(device) and tensor.device.type == "cpu":
        # Else the copy would wait for the device. Of a tensor in page-locked memory, no copy.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=has_streams(device))


def record_event(device: torch.device, is_timed: bool = False) -> torch.Event:
    """An event that happens once the device has computed what it was given so far."""
    event = torch.Event(device, enable_timing=is_timed)
    # By itself an event would be recorded on the current device, which may be a different one.
    event.record(torch.accelerator.current_stream(device))
    return event


def fetch(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to copy a tensor to the host; the returned function waits for that copy alone."""
    if not has_streams(tensor.device):
        return tensor.cpu
    copy = tensor.to("cpu", non_blocking=True)  # into page-locked memory
    end = record_event(tensor.device)

    def wait() -> torch.Tensor:
        end.synchronize()
        return copy

    return wait


def synchronize(device: torch.device) -> None:
    """Wait until a device has computed everything it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes in use at once: of the GPU, else of this process's host memory.

    None on Windows, which does not count the latter.
    """
    if has_streams(device):
        return torch.get_device_module(device).max_memory_allocated(device)
    if os.name != "posix":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
