"""Runs the commands of a distillation once each, and shows how far the whole is."""

import importlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

from arguments.defaults import usable_cores
from utils import UserError, let_threads_sleep, make_folder, read_commands, write_whole

ROOT = Path(__file__).resolve().parent.parent
RECORD = "commands.json"  # the finished commands, by their names
HAND_OVER = "export and report"  # the stage that is cheap, and made anew for another student
QUIET = 60  # seconds between two lines if nobody watches
# Linux forks each command from a process that has imported the scripts already, since importing
# takes longer than a short training. Outside the folder of the project, Python 3.11 imports anew.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
CONTEXT.set_forkserver_preload(["main", "compare", "export", "predict"])


class Command(NamedTuple):
    """A script of this project with its flags.

    Attributes:
        name: its folder below --out, and the name of the file that keeps what it prints.
    """

    name: str
    script: str
    flags: Sequence[str]


class Commands:
    """Runs commands, each with a record of its own, several at once on the cores of a CPU.

    Args:
        out: the folder of the distillation.
        seconds: about how long each stage takes, in the order of the stages.
        jobs: commands that run at the same time.
    """

    def __init__(self, out: Path, seconds: Mapping[str, float], jobs: int = 1) -> None:
        self.out, self.seconds, self.jobs = out, seconds, jobs
        self.path = out / RECORD
        self.finished = read_commands(self.path)
        self.began = self.shown = time.monotonic()
        self.is_watched = sys.stdout.isatty()
        let_threads_sleep()  # those of the commands
        self.threads = max(1, usable_cores() // jobs) if jobs > 1 else None

    def log_of(self, name: str) -> Path:
        """The file that keeps what a command prints."""
        return self.out / "logs" / f"{name.replace('/', '-')}.txt"

    def run(self, stage: str, name: str, script: str, flags: Sequence[str]) -> Path:
        """Run one command, see `run_all`; returns the file that keeps what it prints."""
        self.run_all(stage, [Command(name, script, flags)])
        return self.log_of(name)

    def run_again(self, stage: str, name: str, script: str, flags: Sequence[str]) -> Path:
        """Run a command whatever is finished; see `run`."""
        self.finished.pop(name, None)
        return self.run(stage, name, script, flags)

    def run_all(self, stage: str, commands: Sequence[Command]) -> None:
        """Run those of some commands that are not finished yet.

        After a signal or an error, the other running commands save their state and end.

        Raises: UserError if a command ends with an error, with the end of what it printed; and if a
            finished training of that name was a different one.
        """
        waiting = [command for command in commands if not self._is_finished(command, stage)]
        running: list[tuple[Command, BaseProcess]] = []
        stopped: list[int] = []

        def stop(number: int, frame: object = None) -> None:
            stopped.append(number)
            for _, process in running:
                process.terminate()

        previous = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        failed: Command | None = None
        try:
            while running or (waiting and not stopped):
                while waiting and len(running) < self.jobs and not stopped:
                    command = waiting.pop(0)
                    running.append((command, self._start(command, stage)))
                time.sleep(0.2)
                for command, process in [one for one in running if one[1].exitcode is not None]:
                    running.remove((command, process))
                    if process.exitcode == 0:
                        self.finished[command.name] = [command.script, *command.flags]
                        write_whole(self.path, json.dumps(self.finished, indent=1))
                    elif not stopped:
                        failed = command
                        stop(signal.SIGTERM)
                self._watch(stage, [command for command, _ in running], len(waiting))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if failed:
            log = self.log_of(failed.name)
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
            raise UserError(f"{failed.name} ended with an error ({log}):\n" + "\n".join(last))
        if stopped:
            raise KeyboardInterrupt

    def _is_finished(self, command: Command, stage: str) -> bool:
        known = self.finished.get(command.name)
        if known in (None, [command.script, *command.flags]):
            return known is not None
        if stage == HAND_OVER:  # of a different student than before
            return False
        raise UserError(
            f"--out {self.out}: {command.name} was made by another command; pass another --out"
        )

    def _start(self, command: Command, stage: str) -> BaseProcess:
        self._print(self._line(stage, command.name))
        self._print(f"  python {command.script} {shlex.join(command.flags)}")
        log = self.log_of(command.name)
        make_folder(log.parent)
        log.write_bytes(b"")
        process: BaseProcess = CONTEXT.Process(  # type: ignore[attr-defined]
            target=run_script, args=(command, log, self.threads)
        )
        process.start()
        return process

    def _watch(self, stage: str, running: Sequence[Command], waiting: int) -> None:
        """How far the whole is: always in a terminal, else from time to time."""
        every = 1 if self.is_watched else QUIET
        if not running or time.monotonic() < self.shown + every:
            return
        self.shown = time.monotonic()
        details = [f"{c.name}: {_last_line(self.log_of(c.name))}" for c in running]
        more = f" · {waiting} more" if waiting else ""
        line = self._line(stage, " | ".join(details) + more)
        if self.is_watched:
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            print(line, flush=True)

    def _print(self, line: str) -> None:
        print(f"\r\033[K{line}" if self.is_watched else line, flush=True)

    def _line(self, stage: str, detail: str) -> str:
        stages = list(self.seconds)
        after = sum(self.seconds[later] for later in stages[stages.index(stage) + 1 :])
        spent = _minutes(time.monotonic() - self.began)
        place = f"[{stages.index(stage) + 1}/{len(stages)}] {stage}"
        return f"{place}, {spent} so far, about {_minutes(after)} after it: {detail}"


def run_script(command: Command, log: Path, threads: int | None) -> None:
    """What `python SCRIPT FLAGS > LOG 2>&1` does, in this process.

    Args:
        threads: of the CPU; those that torch chooses if None.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C comes once, from the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    multiprocessing.set_start_method(None, force=True)  # of loader workers: else that of CONTEXT
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    sys.argv = [str(ROOT / command.script), *command.flags]
    sys.exit(importlib.import_module(Path(command.script).stem).main(sys.argv[1:]))


def _end_with_parent() -> None:
    """Get SIGTERM, at which a run saves its state, if the parent has been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 300))
        lines = file.read().decode(errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1] if lines else ""


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
