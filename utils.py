"""Errors and small files, for every other module; imports neither torch nor timm."""

import errno
import functools
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, get_args

T = TypeVar("T")

# ------------------------------------------------------------------------------------- errors


# What the value at fault is, for the code that knows which flag it was read from.
Subject = Literal[
    "", "architecture", "cache", "checkpoint", "classes", "device", "folder", "labels", "log",
    "names", "order", "output", "text", "use_ema",
]  # fmt: skip


class UserError(Exception):
    """A mistake that the user can correct; shown as one or two lines, without a traceback.

    Args:
        message: the value at fault, what is wrong with it, and what to do, in that order.
        subject: what the value is; see `flags_for`.
    """

    def __init__(self, message: str, subject: Subject = "") -> None:
        # torch raises the error of a loader worker again, with a whole traceback for its message.
        super().__init__(message.rsplit("UserError: ", 1)[-1].strip())
        self.subject = subject


@contextmanager
def flags_for(**flags: str) -> Iterator[None]:
    """Put the flag of its subject in front of a UserError that is raised inside.

    Most functions may be called from Python, where nobody typed a flag; so flags are named only by
    the code that read them: `with flags_for(checkpoint="--resume"): read_checkpoint(args.resume)`.
    """
    assert flags.keys() <= set(get_args(Subject)), flags
    try:
        yield
    except UserError as error:
        if error.subject not in flags:
            raise
        raise UserError(f"{flags[error.subject]} {error}") from error


def exit_code(program: str, command: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Run a command, print what went wrong in one line on stderr, and return the exit code.

    The code is that of the command, 2 for an error that the user can correct or an output that
    cannot be written, 130 after Ctrl-C, and 141 if the reader of a pipe (`| head`) has ended.
    """
    open_streams()
    freeze_imports()
    try:
        code = command()
        print(end="", flush=True)  # here at the latest a full disk is noticed
        return code or 0
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: {stopped}", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        if error.filename is not None:  # the output has no name
            raise
        discard_output()
        if isinstance(error, BrokenPipeError):
            return 141  # 128 + SIGPIPE
        print(f"{program}: error: cannot write the output ({error.strerror})", file=sys.stderr)
        return 2


@functools.cache  # once per process
def freeze_imports() -> None:
    """Exempt what was imported from garbage collection, which begins now if it was off.

    Else Python walks through torch and timm again as the process ends, for more than a second.
    """
    gc.freeze()
    gc.enable()


def let_threads_sleep() -> None:
    """Let threads of torch that wait for work spin for 10,000 turns and then sleep.

    By default they spin 30 times longer, which made a small network 60 times slower on cores that
    other processes used too; threads that sleep at once made it 3 times slower on quiet cores.
    Measured in docs/benchmarks.md. Has an effect before torch is imported, and in child processes.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def open_streams() -> None:
    """Open standard streams that the shell has closed (`>&-`); what is printed there is discarded.

    Else the next file that is opened would take their number, and would receive what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Takes the lowest number that is free.
            descriptor = os.open(os.devnull, os.O_WRONLY if number else os.O_RDONLY)
            setattr(sys, name, os.fdopen(descriptor, "w" if number else "r", closefd=False))


def discard_output() -> None:
    """Discard what is printed from here on, and what is still in the buffer of standard output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values that differ between two sets of plain values: name -> (old, new).

    Names that only one set holds are left out, since an older or newer version wrote them.
    """
    return {name: (was[name], now[name]) for name in now if name in was and was[name] != now[name]}


def first_line(error: BaseException) -> str:
    """The first line of an error's text, since libraries often append pages of advice."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def few(names: Iterable[object], most: int = 3) -> str:
    """The first few names, for an error message."""
    names = list(names)
    return ", ".join(map(str, names[:most])) + (" …" if len(names) > most else "")


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """A text as lines that are broken between words only, the later ones indented."""
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


# -------------------------------------------------------------------------------- small files


def is_hidden(name: str) -> bool:
    """Whether a program made this for itself: .ipynb_checkpoints, ._photo.jpg, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def read_lines(path: str) -> list[str]:
    """The lines of a text file that are not empty, without surrounding blanks.

    Raises: UserError for a file that cannot be read as text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # an editor may write a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot read this file ({error}); pass a text file", "text"
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def make_folder(folder: str | Path) -> None:
    """Create a folder and prove that files can be written to it.

    Raises: UserError if they cannot.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"a full disk takes no byte")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{folder}: cannot write there ({reason}); {remedy_of(error)}", "folder"
        ) from error


def remedy_of(error: Exception) -> str:
    """What helps if the file system refuses to write."""
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "choose a folder that you may write to"
    return "free some space or choose another folder"


def could_not_write(path: Path, error: Exception, subject: Subject = "output") -> UserError:
    """The error for a file of the run that the file system refuses."""
    if not path.parent.is_dir():
        return UserError(
            f"{path}: could not be written, because its folder was removed, or is not on this "
            "machine; run the same command again, which starts from the beginning",
            subject,
        )
    free = shutil.disk_usage(path.parent).free / 2**20
    return UserError(
        f"{path}: could not be written ({first_line(error)}; {free:.1f} MiB free); "
        f"{remedy_of(error)}, then run the same command: what was written before is complete",
        subject,
    )


def read_map(path: Path, convert: Callable[[Any], T], problem: str, remedy: str) -> dict[str, T]:
    """The JSON object in a file, its values converted; {} without the file.

    Raises: UserError for a damaged file, with `problem`, the reason and `remedy`.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {name: convert(value) for name, value in values.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{problem} ({first_line(error)}); {remedy}") from error


def read_commands(path: Path) -> dict[str, list[str]]:
    """The finished commands by name that a file in --out keeps. Raises: UserError for no JSON."""
    problem = f"--out {path.parent}: {path.name} there cannot be read"
    remedy = "remove that file: main.py notices which runs are finished"
    return read_map(path, list, problem, remedy)


@contextmanager
def replacing(path: Path, subject: Subject = "output") -> Iterator[Path]:
    """A temporary path for the new content of a file; `path` is always the old or the new file.

    The content is on the disk before it gets its name, so that also a power cut leaves one of both.

    Raises: UserError if the file system refuses; the old file is then left as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # A kill may have left one, and it may be a second name of another checkpoint.
        temporary.unlink(missing_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                # Some FUSE and SMB mounts refuse this for folders; the file is whole all the same.
                with suppress(OSError):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as the latter
        with suppress(OSError):
            temporary.unlink()
        raise could_not_write(path, error, subject) from error


def write_whole(path: Path, text: str, subject: Subject = "output") -> None:
    """Write a text file; see `replacing`."""
    with replacing(path, subject) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Append a line and flush it to the disk. Raises: UserError if the file system refuses."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise could_not_write(path, error) from error


def lock(file: IO[bytes]) -> None:
    """Wait until no other process holds the lock of this file; hold it until the file is closed.

    A process that is killed holds it no longer. On Windows and on some network file systems, which
    have no such locks, this does nothing.
    """
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


def is_url(path: str) -> bool:
    """Whether a checkpoint is named by its http address."""
    return path.startswith(("http://", "https://"))


FOLDER_WEIGHTS = "model.safetensors"  # in a folder of export.py --format timm, or of timm's hub


def missing_file(path: str) -> str:
    """What is wrong with the path of a checkpoint file, or of a folder with one; '' if nothing."""
    if os.path.isfile(path) or os.path.isfile(os.path.join(path, FOLDER_WEIGHTS)):
        return ""
    problem = "is a folder" if os.path.isdir(path) else "no such file"
    if os.path.isfile(os.path.join(path, ".metadata")):
        return (
            f"{path}: is a folder of torch.distributed.checkpoint; convert it with python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE"
        )
    return f"{path}: {problem}; pass the path of a checkpoint file"
