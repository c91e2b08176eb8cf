"""Where a run computes: its device, its processes and what they share, signals, locks."""

import atexit
import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from utils import UserError, changes, first_line

T = TypeVar("T")
DEFAULT_THREADS = torch.get_num_threads()  # torch's own choice: one per core
PIXELS_PER_THREAD = 8192  # of a batch; measured, see docs/benchmarks.md

# ---------------------------------------------------------------------------------- processes


def init_process(device: str | None, dist_url: str) -> torch.device:
    """Choose this process's device and, under torchrun with more than one process, join the group.

    Args:
        device: a torch device name, or None for CUDA where there is one, then MPS, then CPU.
        dist_url: the `init_method` of torch.distributed.
    Returns: the device to train on.
    Raises: UserError for a device that does not exist.
    """
    _refuse_tasks_without_group()
    chosen = find_device(device or default_device())
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        is_cuda = chosen.type == "cuda"
        attempt = _attempt()
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store, _, _ = next(rendezvous(dist_url, rank, world))
        store = dist.PrefixStore(attempt, store)
        dist.init_process_group(
            backend="nccl" if is_cuda else "gloo",
            store=dist.PrefixStore("group", store),
            world_size=world,
            rank=rank,
            timeout=timedelta(minutes=30),
            device_id=chosen if is_cuda else None,
        )
        _stores.append(store)
        _start_following()
    return chosen


def _attempt() -> str:
    """A name that the processes share, and that differs where torchrun has started them again.

    torchrun keeps its store, in which restarted processes would find the addresses of those that
    have died, and wait for them (pytorch issue 135712).
    Raises: UserError on several machines, each of which counts its restarts alone.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not restarts:
        return "first"
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise UserError(
            f"torchrun --max_restarts {restarts} on several machines: processes that are started "
            "again would not find each other; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for "
            "torchrun on every machine, or leave --max_restarts out"
        )
    return f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"


def _refuse_tasks_without_group() -> None:
    """Raise UserError where a scheduler started several processes that know nothing of each other.

    Each of them would train the whole run, in the same folder.
    """
    if "WORLD_SIZE" in os.environ:
        return
    for name, launcher in (("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")):
        if (tasks := int(os.environ.get(name) or 1)) > 1:
            raise UserError(
                f"{launcher} started {tasks} processes ({name}={tasks}), each of which would train "
                f"alone in the same folder; let {launcher} start one torchrun per machine, which "
                "starts the processes: see docs/distributed.md"
            )


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors, so that the next training step can reuse it.

    By default glibc returns large blocks to the system, which then has to clear every page of the
    next block: ten thousand or more page faults per step, 4 to 15 % of a training step on the CPU.
    See mallopt(3). This changes the whole process; with another C library it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return  # not glibc
    mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which free() would unmap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def choose_threads(pixels: int) -> int:
    """Give each CPU thread of torch a share of a batch that is worth waking the thread for.

    A function of the command and the machine alone, since the last bits of a result depend on the
    number of threads. Where OMP_NUM_THREADS or MKL_NUM_THREADS is set, nothing changes.

    Args:
        pixels: images of a batch, times height, times width.
    Returns: the number of threads, at most as many as torch had chosen.
    """
    if not os.environ.keys() & {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}:
        threads = max(1, min(DEFAULT_THREADS, pixels // PIXELS_PER_THREAD))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
    return torch.get_num_threads()


def allow_fast_kernels() -> None:
    """Trade the last bits for speed on CUDA, in this process.

    Matrix products of float32 use TF32 (10 bits of mantissa) where the GPU has it, and cuDNN tries
    its kernels on the first batch of each shape and keeps the fastest, which may be another one in
    the next run.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def default_amp_dtype(device: torch.device) -> str:
    """bfloat16 where the device computes in it, since it needs no loss scaling, else float16."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_bfloat16 else "float16"
    return "bfloat16" if device.type == "cpu" else "float16"


def find_device(name: str) -> torch.device:
    """The device of that name, tried out; plain 'cuda' is the GPU of this process.

    Raises: UserError for a device that does not exist, and for one that several processes would
        share.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None and processes > 1:
            remedy = "pass cuda, which gives each process a GPU of its own"
            what = f"{processes} processes of this machine would share this GPU"
            raise UserError(f"{name}: {what}; {remedy}", "device")
        if device.type == "cuda" and device.index is None:
            gpus = torch.cuda.device_count()
            if 0 < gpus <= local_rank():
                what = f"{processes} processes on this machine, which has {gpus} GPU(s)"
                remedy = f"start torchrun with --nproc_per_node={gpus}"
                raise UserError(f"{name}: {what}; {remedy}", "device")
            device = torch.device("cuda", local_rank())
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch lists every backend that it was ever built for; its first sentence is the reason.
        reason = first_line(error).partition(". ")[0].partition(", xpu")[0]
        raise UserError(
            f"{name}: {reason}; pass cpu, or cuda or mps where there is one", "device"
        ) from error
    return device


def default_device() -> str:
    """CUDA where there is one, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; on CUDA the copy runs beside what the CPU does next.

    Not on MPS, where torch may read the source after it was freed (pytorch issue 189690).
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def synchronize(device: torch.device) -> None:
    """Wait until a device has computed what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that were in use at once: of the GPU, else of this process's host memory.

    None on Windows, which does not tell the latter.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name != "posix":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def world_size() -> int:
    """Number of processes in the group; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the group; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Number of this process among those of its machine, as torchrun tells it; else 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main_process() -> bool:
    """Whether this is rank 0, which prints and writes files."""
    return rank() == 0


def log(*words: object) -> None:
    """Print, on rank 0 only; above a line that is kept up to date (see terminal.Terminal)."""
    if is_main_process():
        text = " ".join(map(str, words))
        # A file name need not be UTF-8; Python keeps its other bytes as code points of their own,
        # which a terminal refuses.
        with tqdm.external_write_mode(file=sys.stdout):
            print(text.encode(errors="backslashreplace").decode(), flush=True)


def barrier() -> None:
    """Wait for all processes; with a single process, do nothing."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Reduce `tensor` over the processes in place; with a single process, do nothing."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=op)


def largest(numbers: list[int], device: torch.device) -> list[int]:
    """The largest of each number over the processes. Collective."""
    if world_size() == 1:
        return numbers
    tensor = torch.tensor(numbers, device=device)
    all_reduce_(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def from_main(compute: Callable[[], Any]) -> Any:
    """What rank 0 computes, on every process; must pickle. Collective."""
    found = [compute() if is_main_process() else None]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    return found[0]


SHARED = "distill-shared-"  # the beginning of the names of files of `once_per_machine`


def once_per_machine(make: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
    """Large arrays that the first process of each machine makes, and all of its processes share.

    They travel through files in the folder for temporary files (TMPDIR), which all processes map
    into memory, read-only, and whose names are deleted as soon as they are mapped. A later run
    deletes what a killed run left. A process that is alone on its machine keeps the arrays.

    Processes wait through the store of the group: it has no time limit of half an hour, and leaves
    no thread behind, so that loader workers can still be forked. Collective.

    Args:
        make: called on the first process of each machine; its arrays must not be empty.
    Raises: whatever `make` raises, on the process that called it (the others of the machine exit),
        and UserError where the files cannot be written or are not seen.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world_size() == 1 or processes == 1:
        return make()
    store, number = _stores[0], local_rank()
    first = rank() - number  # torchrun numbers the processes of a machine in one run
    call = store.add(f"shared/calls/{rank()}", 1)
    key = f"shared/{call}/{first}"
    paths: list[str] = []
    try:
        if number == 0:
            try:
                _delete_old_files()
                for array in make():
                    paths.append(_save(array))
            except BaseException:
                store.set(key, "failed")
                raise
            store.set(key, json.dumps(paths))
        _wait(store, [key])
        if (found := store.get(key)) == b"failed":
            raise SystemExit(2)
        arrays = [_map(path) for path in json.loads(found)]
        store.set(f"{key}/{number}", "mapped")
        if number == 0:
            _wait(store, [f"{key}/{process}" for process in range(processes)])
    finally:
        for path in paths:
            os.unlink(path)
    return arrays


def _wait(store: dist.Store, keys: list[str]) -> None:
    """Wait for keys as long as it takes; torchrun sends a signal where another process has ended.

    Raises: Interrupted.
    """
    while not store.check(keys):
        if number := received_signal():
            raise Interrupted(number, "the start of the run", None)
        time.sleep(0.01)


def _map(path: str) -> np.ndarray:
    """Map the array in a file of `_save`, read-only. Raises: UserError."""
    try:
        # A plain array, since slicing an np.memmap takes several times as long.
        return np.asarray(np.load(path, mmap_mode="r"))
    except OSError as error:
        raise UserError(
            f"{path}: written by the first process of this machine, but rank {rank()} cannot read "
            f"it ({first_line(error)}); set TMPDIR to a folder that all processes of the machine "
            "share"
        ) from error


def _save(array: np.ndarray) -> str:
    """Write an array to a new temporary file; returns its path. Raises: UserError."""
    descriptor, path = tempfile.mkstemp(".npy", SHARED)
    try:
        with open(descriptor, "wb") as file:
            np.save(file, array)
    except OSError as error:
        os.unlink(path)
        free = shutil.disk_usage(tempfile.gettempdir()).free / 2**20
        raise UserError(
            f"{tempfile.gettempdir()}: cannot write {array.nbytes / 2**20:.0f} MiB there, which "
            f"the processes of this machine would share ({first_line(error)}; {free:.0f} MiB "
            "free); set TMPDIR to a folder with more space"
        ) from error
    return path


def _delete_old_files() -> None:
    """Delete files of `_save` that a killed run left: those not written to for an hour."""
    for path in Path(tempfile.gettempdir()).glob(f"{SHARED}*.npy"):
        with suppress(OSError):  # of another user, or deleted by now
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside a DistributedDataParallel, or the network itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


# -------------------------------------------------------------------------- the end of a group

_stores: list[dist.Store] = []  # of the group, where there is one; outlives errors of the backend
_FAILED = "failed"  # the key that a process sets when an error ends it
SECONDS_TO_LEAVE = 5  # for what other processes are doing when one fails, such as a checkpoint


def _start_following() -> None:
    """Start a thread that ends this process some seconds after another one failed.

    The main thread may wait in a collective that the failed process will never join. The thread
    ends before the interpreter does, which would abort the process (SIGABRT) if the thread were
    within a call to the store at that moment.
    """
    is_over = threading.Event()

    def follow() -> None:
        while not is_over.wait(1):
            if has_failed() and not is_over.wait(SECONDS_TO_LEAVE):
                os._exit(1)

    def end() -> None:
        is_over.set()
        thread.join(SECONDS_TO_LEAVE)

    thread = threading.Thread(target=follow, daemon=True, name="follow failures")
    thread.start()
    atexit.register(end)


def has_failed() -> bool:
    """Whether an error has ended another process of the group, which then said why."""
    try:
        return any(store.check([_FAILED]) for store in _stores)
    except RuntimeError:  # the process that holds the store has ended
        return False


def leave_group(code: int) -> None:
    """Leave the group at the end of a run; does nothing where there is no group.

    After an error (a code that is not 0) the others wait in a collective that this process will
    never join, and NCCL's destroy would wait for them in turn. So this process ends here, after it
    has told the others, which then end too.
    """
    if not dist.is_initialized():
        return
    if not code:
        dist.destroy_process_group()
        return
    with suppress(RuntimeError):  # the store's process may be gone already
        _stores[0].set(_FAILED, "1")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stop_all(message: str) -> NoReturn:
    """End every process of the run, with code 2; only rank 0 says why. Collective."""
    if is_main_process():
        raise UserError(message)
    raise SystemExit(2)


def gather(value: T) -> list[T]:
    """This value of every process, in the order of the ranks; must pickle. Collective."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def require_same(values: dict[str, Any], of: str = "") -> dict[str, Any]:
    """End the run where the processes hold different plain values; the first one is named.

    Such processes would train different networks, or wait for each other for ever. Collective.

    Args:
        values: by their names; a process may leave some out.
        of: what the error puts in front of a name, with a space.
    Returns: the values of rank 0.
    """
    found = gather(values)
    for number, other in enumerate(found):
        for name, (ours, theirs) in changes(found[0], other).items():
            stop_all(
                f"process 0 has {of}{name.replace('_', ' ')} {ours}, but process {number} has "
                f"{theirs}; all machines need the same files: use a shared file system, or copy "
                "the files to each machine again"
            )
    return found[0]


# ------------------------------------------------------------------------------------ signals

_received: list[int] = []  # a signal handler can do little more than note the number


class Interrupted(Exception):
    """A signal asked the run to stop, and the run stopped where it can be resumed.

    Args:
        number: number of the signal.
        when: what was finished last.
        saved: the file or folder that holds everything up to there; None where nothing is saved.
    """

    def __init__(self, number: int, when: str, saved: Path | None) -> None:
        how = (
            f"saved to {saved}; run the same command to resume"
            if saved
            else "nothing was saved (no --output_dir, or no checkpoint so far)"
        )
        super().__init__(f"{signal.Signals(number).name} after {when}: {how}")
        self.exit_code = 128 + number  # as a shell reports it


def stop_on_signals() -> None:
    """Let SIGTERM (schedulers, torchrun) and SIGINT (Ctrl-C) end the run after a training step.

    A second SIGINT ends the run at once.
    """

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and _received:
            raise KeyboardInterrupt
        _received.append(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)


def leave_signals_to_the_trainer(worker_id: int) -> None:
    """Ignore signals in a loader worker, since schedulers and terminals signal a whole group.

    The trainer still needs batches to finish its step. A worker that is left over ends by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))  # SIGALRM ends the worker


def end_workers() -> None:
    """Kill the loader workers that are left at the end of a run.

    After an error its traceback still refers to the loaders, so their workers go on, and Python's
    exit would wait a minute for them: they ignore the signal that asks them to end (see above).
    """
    has_handler = hasattr(signal, "SIGCHLD")  # not on Windows
    # torch's handler would take the end of a worker for a crash.
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if has_handler else None
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    if has_handler:
        signal.signal(signal.SIGCHLD, previous)


def received_signal() -> int:
    """Number of the first signal that this process received; 0 for none."""
    return _received[0] if _received else 0


def stop_requested(device: torch.device) -> int:
    """Number of a signal that any process received, the same on all; 0 for none. Collective."""
    return largest([received_signal()], device)[0]


# -------------------------------------------------------------------------------------- locks


def lock_folder(folder: Path) -> FileIO | None:
    """Take a folder for this run, until the returned file is closed or the process ends.

    The lock is the kernel's (fcntl): it ends with its process, however that ends, and holds on a
    network file system with a lock service too. The file names its holder for others to report.

    Returns: the open file, to be kept; None where there are no such locks.
    Raises: UserError where another run holds the folder.
    """
    if os.name != "posix":
        return None
    import fcntl

    file = open(folder / ".lock", "a+b", buffering=0)  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().decode(errors="replace") or "another process"
        raise UserError(
            f"{folder}: another run is using this folder ({holder}); wait until it ends, or pass "
            "another folder",
            "folder",
        ) from error
    except OSError as error:
        log(f"Warning: {folder} cannot be locked ({error}); do not start two runs in this folder")
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def lock(file: IO[bytes]) -> None:
    """Wait until no other process holds the lock of this file; hold it until the file is closed.

    A process that is killed holds it no longer. Where there are no locks, on Windows and on some
    network file systems, this does nothing.
    """
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
