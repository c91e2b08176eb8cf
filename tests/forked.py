"""Runs in processes of their own, forked from one that has imported main.py already.

torchrun and each of its workers import torch and timm anew, which takes longer than a small run.
A forked process starts in milliseconds and computes the same (test_distributed.py compares them).
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from helpers import ROOT

import main


@cache
def server() -> ForkServerContext:
    """Starts processes; one thread each, since a process with several threads is not forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main", "pytest"])
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=paths):
        context.Process(target=int).start()
    return context


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
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # follows TMPDIR
    multiprocessing.set_start_method(None, force=True)  # for loader workers
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
            process = server().Process(target=child, args=(outputs, names, call, args))
            process.start()
            self.processes.append(process)

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
        return "".join((Path(self._folder.name) / f"{kind}{rank}").read_text() for rank in ranks)

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
            is_over = time.monotonic() > end or not any(p.is_alive() for p in self.processes)
            out = self.out
            if text in out[out.find(after) :]:
                return
            assert not is_over, f"'{text}' never came:\n{out}{self.err}"
            time.sleep(0.01)

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes, once all processes have ended; -N after signal N."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
            assert process.exitcode is not None, f"still running:\n{self.out}{self.err}"
        return [process.exitcode for process in self.processes]

    def signal(self, number: int) -> None:
        """Send a signal to the processes and their loader workers, as a terminal does."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def program(argv: list[str]) -> int:
    """What `python main.py` does."""
    return main.main(argv)


def run_group(*argv: object, processes: int = 1) -> str:
    """Run main.py to its end; returns what it printed to its standard output."""
    with Group(program, list(map(str, argv)), processes=processes) as group:
        assert set(group.wait()) == {0}, group.out + group.err
        return group.out
