"""The processes of a run: how they start, what they share, and how they end together."""

import atexit
import inspect
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from runtime.device import fetch, has_streams, local_rank, send
from runtime.signals import received_signal
from utils import UserError, changes, discard_output, first_line, wrapped

T = TypeVar("T")


def init_process(device: torch.device, dist_url: str) -> None:
    """Join the group of the processes that torchrun started, if they are several.

    Args:
        device: of this process, which computes the collectives of the group.
        dist_url: the `init_method` of torch.distributed.
    Raises: UserError if a scheduler started several processes without torchrun, if the environment
        describes no group, and if processes would share a GPU.
    """
    _refuse_tasks_without_group()
    if has_streams(device):
        torch.accelerator.set_device_index(device)
    size, number = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK")
    if size == "1":
        return
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    where = f"at {place}" if dist_url == "env://" else f"at --dist_url {dist_url}"
    who = f"process {number} of {size} (RANK={number}, WORLD_SIZE={size})"
    attempt = _attempt()
    with _print_if_slow(f"Waiting as {who} for the others {where}; {UNSET}"):
        try:
            rank, world = int(number or ""), int(size)
            store, _, _ = next(rendezvous(dist_url, rank, world))
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"{who} cannot meet the others {where}: {first_line(error)}; {UNSET}"
            ) from error
        store = dist.PrefixStore(attempt, store)
        if has_streams(device):
            _refuse_shared_gpu(store, device)
        dist.init_process_group(
            backend=dist.get_default_backend_for_device(device),
            store=dist.PrefixStore("group", store),
            world_size=world,
            rank=rank,
            timeout=timedelta(minutes=30),
            device_id=device if has_streams(device) else None,
        )
    _stores.append(store)
    _start_following()


UNSET = "start all with torchrun, or unset both variables to run one process"
SECONDS_OF_SILENCE = 5.0  # of a process that waits for others which may never come


@contextmanager
def _print_if_slow(line: str) -> Iterator[None]:
    """Print a line if what happens inside takes longer than SECONDS_OF_SILENCE."""
    timer = threading.Timer(SECONDS_OF_SILENCE, print, [line], {"flush": True})
    timer.daemon = True  # does not keep a process alive that ends for another reason
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _attempt() -> str:
    """A name that the processes share, and that changes when torchrun starts them again.

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


def _refuse_shared_gpu(store: dist.Store, device: torch.device) -> None:
    """Raise UserError if two processes that see a single GPU each see the same one."""
    gpu = torch.get_device_module(device)
    if gpu.device_count() == 1:
        uuid = getattr(gpu.get_device_properties(device), "uuid", None)
        if uuid is not None and store.add(f"GPU {uuid}", 1) > 1:
            raise UserError(
                f"{device.type}: several processes would share the only GPU that they see; start "
                "torchrun with --nproc_per_node=1",
                "device",
            )


def _refuse_tasks_without_group() -> None:
    """Raise UserError if a scheduler started several processes that know nothing of each other.

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


def world_size() -> int:
    """Number of processes in the group; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the group; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is rank 0, which prints and writes files."""
    return rank() == 0


def log(*words: object) -> None:
    """Print, on rank 0 only; above a line that is kept up to date (see terminal.Terminal).

    In a terminal, a message is broken between words; a text of several lines has its own layout.
    A run whose output cannot be written (a closed pipe, a full disk) warns once and goes on.
    """
    if is_main_process():
        text = " ".join(map(str, words))
        if sys.stdout.isatty() and "\n" not in text:
            text = "\n".join(wrapped(text, shutil.get_terminal_size().columns, "  "))
        try:
            # A file name need not be UTF-8; Python keeps its other bytes as code points of their
            # own, which a terminal refuses.
            with tqdm.external_write_mode(file=sys.stdout):
                print(text.encode(errors="backslashreplace").decode(), flush=True)
        except OSError as error:
            _lost.append(error)
            discard_output()
            what = f"Warning: standard output cannot be written ({error.strerror})"
            with suppress(OSError):
                print(f"{what}; the run goes on without it", file=sys.stderr, flush=True)


_lost: list[OSError] = []  # the reason why output is discarded, if it is


def require_output(what: str) -> None:
    """Raise UserError if `what` was to be printed and could not be."""
    if _lost:
        raise UserError(
            f"{what} could not be printed ({_lost[0].strerror}); let the output go to a disk with "
            "space, or to a program that reads it"
        )


def barrier() -> None:
    """Wait for all processes; with a single process, do nothing."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_(tensor: torch.Tensor) -> None:
    """Add up `tensor` over the processes, in place; with a single process, do nothing."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def largest(numbers: list[int], device: torch.device) -> list[int]:
    """The largest of each number over the processes. Collective."""
    return begin_largest(numbers, device)()


def begin_largest(numbers: list[int], device: torch.device) -> Callable[[], list[int]]:
    """Begin to find the largest of each number; the returned function waits. Collective."""
    if world_size() == 1:
        return lambda: numbers
    tensor = send(torch.tensor(numbers), device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    read = fetch(tensor)
    return lambda: read().tolist()


def from_main(compute: Callable[[], Any]) -> Any:
    """What rank 0 computes, on every process; must pickle. Collective."""
    result = [compute() if is_main_process() else None]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


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
        and UserError if the files cannot be written or are not seen.
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
        if (answer := store.get(key)) == b"failed":
            raise SystemExit(2)
        arrays = [_map(path) for path in json.loads(answer)]
        store.set(f"{key}/{number}", "mapped")
        if number == 0:
            _wait(store, [f"{key}/{process}" for process in range(processes)])
    finally:
        for path in paths:
            os.unlink(path)
    return arrays


def _wait(store: dist.Store, keys: list[str]) -> None:
    """Wait for keys as long as it takes; torchrun ends this process if one of the others died."""
    while not store.check(keys):
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
    with suppress(OSError):  # on a full disk, which `_save` reports
        with tempfile.TemporaryFile() as file:
            file.write(b"now")
            file.flush()
            now = os.fstat(file.fileno()).st_mtime  # by the clock of a file server, if it is on one
        for path in Path(tempfile.gettempdir()).glob(f"{SHARED}*.npy"):
            with suppress(OSError):  # of another user, or deleted by now
                if now - path.stat().st_mtime > 3600:
                    path.unlink()


def exchange_gradients(network: nn.Module, inputs: torch.Tensor) -> DistributedDataParallel:
    """A network with gradients averaged over the processes after each backward pass. Collective.

    Buffers are not sent with each forward pass: rank 0 computes with its own, as it would with
    them sent, and the evaluation and the checkpoints hand these to all ranks.

    DDP moves the gradients into new buckets after the first backward pass of a process. From three
    ranks on, the place in a bucket decides in which order the ranks are added, so the first step
    after a restart would be rounded differently than without one. A backward pass of zeros comes
    before the first step for that reason; in eval mode, so that statistics of BatchNorm stay as
    they are and dropout draws nothing.

    Args:
        inputs: a batch of zeros such as the network takes, on its device.
    """
    keywords: dict[str, Any] = {"gradient_as_bucket_view": True}
    if has_streams(inputs.device):
        keywords["device_ids"] = [inputs.device]
    # Newer than the oldest torch that we support.
    known = inspect.signature(DistributedDataParallel).parameters
    newer = {"forward_sync_buffers": False, "batched_grad_copy": True}
    keywords |= {name: value for name, value in newer.items() if name in known}
    wrapped = DistributedDataParallel(network, **keywords)
    modes = [(module, module.training) for module in wrapped.modules()]
    (0 * wrapped.eval()(inputs)).sum().backward()
    wrapped.zero_grad(set_to_none=True)
    for module, mode in modes:
        module.training = mode
    return wrapped


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside a DistributedDataParallel, or the network itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


_stores: list[dist.Store] = []  # of the group, if there is one; outlives errors of the backend
_FAILED = "failed"  # the key that a process sets when an error ends it
SECONDS_TO_LEAVE = 5  # for what other processes are doing when one fails, such as a checkpoint


def _start_following() -> None:
    """Start a thread that ends this process some seconds after one of the others failed.

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
    """Whether an error has ended one of the other processes, which then printed why."""
    try:
        return any(store.check([_FAILED]) for store in _stores)
    except RuntimeError:  # the process that holds the store has ended
        return False


def leave_group(code: int) -> None:
    """Leave the group at the end of a run; does nothing without a group.

    After an error (a code that is not 0) the others wait in a collective that this process will
    never join, and NCCL's destroy would wait for them in turn. So this process ends here, after it
    has informed the others, which then end too.
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


def gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """(…) of every process -> (processes, …), in the order of the ranks. Collective."""
    parts = [tensor]
    if world_size() > 1:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor)
    return torch.stack(parts)


def require_same(values: dict[str, Any], of: str = "") -> dict[str, Any]:
    """End the run if the processes hold different plain values; the error names the first of them.

    Such processes would train different networks, or wait for each other for ever. Collective.

    Args:
        values: by their names; a process may leave some out.
        of: what the error puts in front of a name, with a space.
    Returns: the values of rank 0.
    """
    of_ranks = gather(values)
    for number, others in enumerate(of_ranks):
        for name, (ours, theirs) in changes(of_ranks[0], others).items():
            stop_all(
                f"process 0 has {of}{name.replace('_', ' ')} {ours}, but process {number} has "
                f"{theirs}; all machines need the same files: use a shared file system, or copy "
                "the files to each machine again"
            )
    return of_ranks[0]


def stop_requested(device: torch.device) -> int:
    """Number of a signal that any process received, the same on all; 0 for none. Collective."""
    return largest([received_signal()], device)[0]
