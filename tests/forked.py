"""Runs in processes of their own, forked from one that has imported main.py already.

torchrun and each of its workers import torch and timm anew, which takes longer than a small run.
A forked process starts in milliseconds and computes the same (test_interruption.py compares them).
"""

import io
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import ROOT

import main


def serve(requests: Connection) -> None:
    """Start a process, or wait for one, per request, until nobody is left to ask."""
    processes: dict[int | None, multiprocessing.process.BaseProcess] = {}
    with suppress(EOFError):
        while True:
            match requests.recv():
                case ("start", *args):
                    process = multiprocessing.get_context("fork").Process(target=child, args=args)
                    process.start()
                    processes[process.pid] = process
                    requests.send(process.pid)
                case ("wait", pid, seconds):
                    processes[pid].join(seconds)
                    requests.send(processes[pid].exitcode)


def start_server() -> Connection:
    """Fork a process that starts the others: early, since it must have no threads of torch."""
    ours, theirs = multiprocessing.Pipe()
    if os.fork():
        theirs.close()
        return ours
    ours.close()
    try:
        serve(theirs)
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def ask(*request: object) -> int | None:
    """What the server answers."""
    REQUESTS.send(request)
    return REQUESTS.recv()


class Process:
    """A process that the server started."""

    def __init__(self, *args: object) -> None:
        self.pid = ask("start", *args)

    def join(self, seconds: float | None = None) -> int | None:
        """Wait for its end; returns its exit code, None if it still runs, or -N after signal N."""
        return ask("wait", self.pid, seconds)


def end_with_parent() -> None:
    """Kill this process and its loader workers once the process that runs the tests has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def child(outputs: tuple[Path, Path], env: dict[str, str], call: Callable, args: tuple) -> None:
    """What a process does: its output goes to files, its exit code is what `call` returns."""
    os.setsid()
    threading.Thread(target=end_with_parent, daemon=True).start()
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, "utf-8", closefd=False) for n in (1, 2))
    sys.stdin = io.StringIO()  # pytest's refuses to be read
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)  # OMP_NUM_THREADS was read before
    tempfile.tempdir = None  # follows TMPDIR
    sys.exit(call(*args))


class Group:
    """Processes that all call one function, in the environment that torchrun would give them.

    All of them, and their loader workers, end with the `with` block.

    Args:
        call: a function of a module, such as main.main; returns an exit code, or None for 0.
        args: what it is called with.
        processes: their number; one process gets no group.
        env: more variables of the environment, for each process.
    """

    def __init__(
        self,
        call: Callable,
        *args: object,
        processes: int = 1,
        env: tuple[dict[str, object], ...] = (),
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.processes = []
        common: dict[str, object] = {"OMP_NUM_THREADS": 1}
        if processes > 1:  # this process holds the store, as torchrun does
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            common |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port}
            common |= {"TORCHELASTIC_USE_AGENT_STORE": True}
        for rank in range(processes):
            own = {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            own |= env[rank] if env else {}
            names = os.environ | {name: str(value) for name, value in (common | own).items()}
            outputs = tuple(Path(self._folder.name) / f"{kind}{rank}" for kind in ("out", "err"))
            for path in outputs:
                path.touch()
            self.processes.append(Process(outputs, names, call, args))

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *error: object) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        self._folder.cleanup()

    def printed(self, kind: str, rank: int | None = None) -> str:
        """What a process has printed so far to 'out' or 'err'; all of them without a rank."""
        ranks = range(len(self.processes)) if rank is None else [rank]
        paths = (Path(self._folder.name) / f"{kind}{rank}" for rank in ranks)
        return "".join(path.read_text("utf-8") for path in paths)

    @property
    def out(self) -> str:
        return self.printed("out")

    @property
    def err(self) -> str:
        return self.printed("err")

    def wait_for(self, text: str, after: str = "", seconds: float = 120) -> None:
        """Wait until a process has printed this text, after another one, to its output."""
        end = time.monotonic() + seconds
        while True:
            is_over = time.monotonic() > end or all(p.join(0) is not None for p in self.processes)
            out = self.out
            if text in out[out.find(after) :]:
                return
            assert not is_over, f"'{text}' never came:\n{out}{self.err}"
            time.sleep(0.01)

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes, once all processes have ended; -N after signal N."""
        end = time.monotonic() + seconds
        codes = [process.join(max(0, end - time.monotonic())) for process in self.processes]
        assert None not in codes, f"still running:\n{self.out}{self.err}"
        return codes

    def signal(self, number: int) -> None:
        """Send a signal to the processes and their loader workers, as a terminal does."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def program(argv: list[str]) -> int:
    """What `python main.py` does."""
    return main.main(argv)


def script(path: Path, folder: Path, *words: object) -> None:
    """What `python path words` does in a folder: this project is neither imported nor on its path.

    Installed packages, however, are imported already.
    """

    def is_ours(file: str | None) -> bool:
        found = Path(file or "").resolve()
        return found.is_relative_to(ROOT) and "site-packages" not in found.parts

    os.chdir(folder)
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) and is_ours(module.__file__):
            del sys.modules[name]
    sys.path[:] = [str(path.parent), *(entry for entry in sys.path if not is_ours(entry))]
    sys.argv = [str(path), *map(str, words)]
    runpy.run_path(str(path), run_name="__main__")


def run_group(*argv: object, processes: int = 1) -> str:
    """Run main.py to its end; returns what it printed to its standard output."""
    with Group(program, list(map(str, argv)), processes=processes) as group:
        assert set(group.wait()) == {0}, group.out + group.err
        return group.out


REQUESTS = start_server()
