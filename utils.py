"""What the rooms share: errors, processes, randomness, schedules, checkpoints and logs."""

import argparse
import ctypes
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3


class UserError(Exception):
    """Something the user can put right: shown as one or two lines, without a traceback."""

    def __init__(self, message: str) -> None:
        # A data-loader worker hands its error over as a whole traceback; the message is its end.
        super().__init__(message.rsplit("UserError: ", 1)[-1].strip())


# ---------------------------------------------------------------------------------- processes


def init_process(device: str | None, dist_url: str) -> torch.device:
    """Choose this process's device and, under torchrun with more than one process, join the group.

    Args:
        device: a torch device name, or None for CUDA where there is one, then MPS, then CPU.
        dist_url: the `init_method` of torch.distributed.
    Returns: the device to train on.
    Raises: UserError for a device that is not there.
    """
    chosen = find_device(device, "--device", _default_device())
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif chosen.type == "cpu":
        keep_freed_memory()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        is_cuda = chosen.type == "cuda"
        dist.init_process_group(
            backend="nccl" if is_cuda else "gloo",
            init_method=dist_url,
            world_size=int(os.environ["WORLD_SIZE"]),
            rank=int(os.environ["RANK"]),
            timeout=timedelta(minutes=30),
            device_id=chosen if is_cuda else None,
        )
    return chosen


def keep_freed_memory() -> None:
    """Have glibc keep what tensors give back, so that the next step takes it as it is.

    By itself it returns large blocks to the system, which must clear every page of the next ones:
    some ten thousand page faults, and 4 to 15 %, of a training step on the CPU. See mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return  # another C library
    mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped, and so unmapped, by itself
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def find_device(name: str | None, flag: str, default: torch.device) -> torch.device:
    """The device of that name, tried out; plain 'cuda' is this process's own GPU.

    Raises: UserError, naming `flag`, for a device that is not there.
    """
    if not name:
        return default
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{flag} {name}: {reason}; try {flag} cpu") from error
    return device


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    return rank() == 0


def log(*words: object) -> None:
    """Print, on rank 0 only."""
    if is_main_process():
        print(*words, flush=True)


def barrier() -> None:
    """Wait for all processes; with one, nothing."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Reduce `tensor` over the processes in place; with one process, nothing."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=op)


# ------------------------------------------------------------------------------------ signals

_received: list[int] = []  # a handler can do no more than leave a note


class Interrupted(Exception):
    """A signal asked the run to stop, and it did, at a point from which it can go on.

    Args:
        number: the signal's.
        when: what was finished last.
        saved: where everything up to there lies; None where nothing is saved.
    """

    def __init__(self, number: int, when: str, saved: Path | None) -> None:
        how = (
            f"saved in {saved}; type the same command to go on"
            if saved
            else "nothing to save in (--output_dir, --save_ckpt)"
        )
        super().__init__(f"{signal.Signals(number).name} after {when}: {how}")
        self.exit_code = 128 + number  # as a shell reports it


def stop_on_signals() -> None:
    """Let SIGTERM (schedulers, torchrun) and SIGINT (Ctrl-C) end the run after a step.

    A second SIGINT ends it at once.
    """

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and _received:
            raise KeyboardInterrupt
        _received.append(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)


def leave_signals_to_the_trainer(worker_id: int) -> None:
    """In a loader worker: a scheduler or a terminal signals the whole process group at once.

    The trainer still needs batches to finish its step; but a worker that nobody ends must not stay.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))  # whose default ends the process


def received_signal() -> int:
    """The signal that this process received first; 0 for none."""
    return _received[0] if _received else 0


def stop_requested(device: torch.device) -> int:
    """The signal that any process received, agreed on by all; 0 for none. A collective call."""
    number = received_signal()
    if world_size() == 1:
        return number
    flag = torch.tensor([number], device=device)
    all_reduce_(flag, dist.ReduceOp.MAX)
    return int(flag.item())


# --------------------------------------------------------------------------------- randomness


def seed_rng(device: torch.device, *key: int) -> None:
    """Seed Python, NumPy and torch (CPU and `device`) with a function of `key` alone.

    The key is hashed (numpy.random.SeedSequence), so neighbouring keys give unrelated streams.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also queue a seed for every GPU, which costs a stack trace per call
    # where CUDA is not initialised (every data-loader worker).
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


# ---------------------------------------------------------------------------------- schedules


def cosine_schedule(base: float, final: float, steps: int, warmup_steps: int = 0) -> np.ndarray:
    """Linear warm-up from 0 to `base`, then half a cosine from `base` towards `final`.

    Loshchilov and Hutter, SGDR, 2017, eq. 5, without restarts.
    Returns: (steps,) float64, one value an optimizer step.
    """
    warmup = np.linspace(0.0, base, warmup_steps, endpoint=False)
    phase = np.arange(steps - warmup_steps) / max(1, steps - warmup_steps)
    return np.concatenate([warmup, final + 0.5 * (base - final) * (1 + np.cos(math.pi * phase))])


# -------------------------------------------------------------------------------- checkpoints


_DAMAGED = "not a readable checkpoint, perhaps cut short; fetch or save it again"


def local_file(path: str, flag: str) -> str:
    """The path of a file that is here; `http(s)://` is downloaded once.

    Raises: UserError where there is none.
    """
    if path.startswith(("http://", "https://")):
        from timm.models._hub import download_cached_file

        try:
            path = str(download_cached_file(path))
        except OSError as error:
            raise UserError(
                f"{flag} {path}: download failed ({error}); fetch the file and give its path"
            ) from error
    if not os.path.isfile(path):
        found = "is a folder" if os.path.isdir(path) else "no such file"
        raise UserError(f"{flag} {path}: {found}; give the path of a checkpoint file")
    return path


def read_checkpoint(path: str, flag: str) -> Any:
    """Read a checkpoint file (local or http) to the CPU without running any code in it.

    `torch.load(weights_only=True)` accepts tensors and plain types; one more type is allowed,
    `argparse.Namespace`, which the DeiT and ConvNeXt releases carry beside their weights.

    Args:
        path: a `.safetensors` file or anything torch.save wrote; `http(s)://` is downloaded once.
        flag: the command-line flag to name in errors.
    Raises: UserError for a file that is missing, unreadable or would run code.
    """
    path = local_file(path, flag)
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file  # comes with timm

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = re.findall(r"GLOBAL (\S+)", str(error))  # what the file wanted to call
        if not names:
            raise UserError(f"{flag} {path}: {_DAMAGED}") from error
        raise UserError(
            f"{flag} {path}: refused, since reading it would run code ({names[0]}); nothing was "
            "run. Save its weights with torch.save(model.state_dict(), FILE) and give that file"
        ) from error
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise UserError(f"{flag} {path}: {_DAMAGED} ({type(error).__name__})") from error


_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "student.")


def find_state_dict(
    checkpoint: Any, keys: tuple[str, ...], prefix: str = ""
) -> tuple[dict[str, torch.Tensor], str]:
    """Find the weights in a checkpoint and take the wrappers' prefixes off their names.

    Args:
        checkpoint: what `read_checkpoint` returned.
        keys: places to look at, best first; a bare state_dict is found without any.
        prefix: take only the weights below this prefix, and take it off.
    Returns: the state_dict and the key it was found under, '' for a bare one.
    Raises: ValueError where there are no weights.
    """
    if not isinstance(checkpoint, dict):
        raise ValueError(f"holds a {type(checkpoint).__name__}, not a dict of weights")
    found = next((key for key in keys if isinstance(checkpoint.get(key), dict)), "")
    state = checkpoint[found] if found else checkpoint
    state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if prefix:
        state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    if not state:
        raise ValueError(f"holds no weights under {', '.join(keys)} (keys: {_few(checkpoint)})")
    while wrapper := next(
        (p for p in _WRAPPER_PREFIXES if all(n.startswith(p) for n in state)), ""
    ):
        state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state, found


def _few(names: Any, most: int = 3) -> str:
    names = list(names)
    return ", ".join(map(str, names[:most])) + (" …" if len(names) > most else "")


def describe_mismatch(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str:
    """Say how two state_dicts differ, a few names of each kind; '' where they fit."""
    parts = []
    if missing := wanted.keys() - found.keys():
        parts.append(f"{len(missing)} weights missing ({_few(sorted(missing))})")
    if unexpected := found.keys() - wanted.keys():
        parts.append(f"{len(unexpected)} unexpected ({_few(sorted(unexpected))})")
    shapes = [
        f"{name} {tuple(found[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and wanted[name].shape != found[name].shape
    ]
    if shapes:
        parts.append(f"{len(shapes)} of another shape ({_few(shapes)})")
    return "; ".join(parts)


def convert_state_dict(
    model: torch.nn.Module, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename an original release's weights as timm does, where they don't fit by name already."""
    module = sys.modules[type(model).__module__]
    rename = getattr(module, "checkpoint_filter_fn", None)
    if rename is None or state.keys() == model.state_dict().keys():
        return state
    try:
        return rename(state, model)
    except Exception:  # meant for one family's files, it fails on others in any way
        return state


def classifier_name(model: torch.nn.Module) -> str | None:
    """The name of a timm model's classifier among its modules; None where it has none."""
    classifier = model.get_classifier()
    return next((name for name, module in model.named_modules() if module is classifier), None)


def load_finetune(model: torch.nn.Module, path: str, keys: str, prefix: str) -> str:
    """Load pre-trained weights into `model`; a classifier of other classes is left as initialised.

    Args:
        keys: keys to look under, separated by '|'; EMA weights are taken only if named.
        prefix: load only the weights below this prefix.
    Returns: a line that says what was loaded.
    Raises: UserError where no weight, or only part of the network, fits.
    """
    try:
        state, key = find_state_dict(
            read_checkpoint(path, "--finetune"), (*keys.split("|"), "state_dict"), prefix
        )
    except ValueError as error:
        raise UserError(f"--finetune {path}: {error}; see --model_key, --model_prefix") from error
    state = convert_state_dict(model, state)
    wanted = model.state_dict()
    head = classifier_name(model)
    fresh = {
        name
        for name in wanted
        if head
        and name.startswith(f"{head}.")
        and (name not in state or state[name].shape != wanted[name].shape)
    }
    state = {name: value for name, value in state.items() if name not in fresh}
    expected = {name: value for name, value in wanted.items() if name not in fresh}
    if difference := describe_mismatch(expected, state):
        raise UserError(f"--finetune {path} does not fit the model: {difference}; give its --model")
    model.load_state_dict(state, strict=False)
    anew = f"; {', '.join(sorted(fresh))} start anew" if fresh else ""
    return f"Fine-tuning from {path}: {len(state)} weights of '{key or 'bare state_dict'}'{anew}"


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that `path` is at every moment either the old file or the whole new one.

    Raises: UserError where the file system refuses; every older file is left as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as the latter
        temporary.unlink(missing_ok=True)
        raise _could_not_write(path, error) from error


def _could_not_write(path: Path, error: Exception) -> UserError:
    free = shutil.disk_usage(path.parent).free / 2**20
    reason = str(error).splitlines()[0]
    return UserError(
        f"--output_dir: could not write {path} ({reason}; {free:.1f} MiB free); free some space or "
        "give another folder, then type the same command: older checkpoints are whole"
    )


def _fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable (POSIX; elsewhere a folder can't be opened)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_lines(path: str | None, flag: str) -> list[str] | None:
    """A text file's lines that hold something; None for no file."""
    if not path:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: can't read it ({error}); give a text file") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def make_folder(folder: str, flag: str) -> None:
    """Create a folder and prove that it can be written to.

    Raises: UserError that names the flag.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: can't write there ({error}); give another folder"
        ) from error


def epoch_checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-<epoch>.pth` files of a folder, newest epoch first."""
    found = [p for p in folder.glob("checkpoint-*.pth") if re.fullmatch(r"checkpoint-\d+", p.stem)]
    return sorted(found, key=_epoch_of, reverse=True)


def _epoch_of(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))


def load_weights(
    checkpoint: Any, path: str, student: torch.nn.Module, ema: ModelEmaV3 | None
) -> None:
    """Load a checkpoint's student and, where there is one, its moving average.

    Raises: UserError for a checkpoint of another model.
    """
    try:
        state, _ = find_state_dict(checkpoint, ("model", "state_dict"))
    except ValueError as error:
        raise UserError(f"--resume {path}: {error}; give a checkpoint of this project") from error
    state = convert_state_dict(student, state)
    if difference := describe_mismatch(student.state_dict(), state):
        raise UserError(
            f"--resume {path} is of another model: {difference}; give its --model, or another "
            "--output_dir to start anew"
        )
    student.load_state_dict(state)
    if ema is not None:
        ema.module.load_state_dict(checkpoint.get("model_ema") or state)


INSIDE_EPOCH = "checkpoint-step.pth"


class RunState:
    """Everything that a restart needs: collected into checkpoints, and restored from them.

    Args:
        settings: the arguments, plain values only, so that `weights_only=True` reads them back.
        data_config: what the student is shown (see datasets.data_config).
    """

    def __init__(
        self,
        student: torch.nn.Module,
        ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        settings: dict[str, Any],
        data_config: dict[str, Any],
    ) -> None:
        self.student, self.ema, self.optimizer, self.scaler = student, ema, optimizer, scaler
        self.settings, self.data_config = dict(settings), data_config
        self.epoch = -1  # the last that is finished
        self.best: dict[str, float] = {}  # checkpoint name -> accuracy it was saved with
        self.scores: dict[str, float] = {}  # of the last epoch
        self.progress: dict[str, Any] | None = None  # of the epoch after it, where it has begun
        self.global_batch = (
            settings.get("batch_size", 0) * settings.get("update_freq", 1) * world_size()
        )

    def resume(self, output_dir: str, path: str, auto_resume: bool, start_epoch: int) -> int:
        """Restore from `path`, else from the newest whole checkpoint in `output_dir`.

        Sets `progress` where that checkpoint was taken inside an epoch.
        Returns: the epoch to start with.
        """
        checkpoint = None
        if path:
            checkpoint = read_checkpoint(path, "--resume")
        elif output_dir and auto_resume:
            checkpoint, path = self._newest(Path(output_dir))
        if checkpoint is None:
            return start_epoch
        load_weights(checkpoint, path, self.student, self.ema)
        # Weights alone, as released; the ConvNeXt script's best has the word 'best' for its epoch.
        if "optimizer" not in checkpoint or not isinstance(checkpoint.get("epoch"), int):
            log(f"Weights of {path}; it holds no optimizer and epoch, so the schedule starts anew")
            return start_epoch
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError as error:
            raise UserError(
                f"--resume {path}: its optimizer does not fit ({error}); give the --opt, "
                "--weight_decay and --layer_decay it was saved with, or --finetune it"
            ) from error
        if checkpoint.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint["epoch"]
        self.best = dict(checkpoint.get("best", {}))
        self.progress = checkpoint.get("progress")
        self._check_global_batch(checkpoint.get("global_batch"), path)
        if checkpoint.get("world_size", world_size()) != world_size():
            log(
                f"{path}: saved by {checkpoint['world_size']} process(es), now {world_size()}; "
                "dropout, mixup and BatchNorm's batches are another draw from here on"
            )
        inside = f", {self.progress['updates']} steps of the next" if self.progress else ""
        log(
            f"Resumed {path}: epoch {self.epoch} is done{inside}; best so far {self.best or 'none'}"
        )
        return self.epoch + 1

    def _newest(self, folder: Path) -> tuple[Any, str]:
        """The newest whole checkpoint of a folder and its path; (None, '') where there is none."""
        best: tuple[Any, str] = (None, "")
        candidates = [p for p in (folder / INSIDE_EPOCH,) if p.exists()] + epoch_checkpoints(folder)
        for path in candidates:
            try:
                checkpoint = read_checkpoint(str(path), "--auto_resume")
            except UserError as error:
                log(f"Warning: {error}; trying the one before it")
                continue
            if best[0] is None or checkpoint["epoch"] > best[0]["epoch"]:
                best = checkpoint, str(path)
            if path.name != INSIDE_EPOCH:
                break  # the others are older
        return best

    def _check_global_batch(self, saved: int | None, path: str) -> None:
        if saved in (None, self.global_batch):
            return
        difference = f"{saved} images a step when it was saved, {self.global_batch} now"
        if self.progress:
            raise UserError(
                f"--resume {path}: taken inside an epoch, with {difference}; choose --batch_size "
                "and --update_freq so that their product with the processes is the same"
            )
        log(f"Warning: {path}: {difference}; the rest of the run is not what it would have been")

    def finish_epoch(self, epoch: int, record: dict[str, float]) -> list[str]:
        """Note an epoch's scores; returns which of 'best' and 'best-ema' it improved."""
        self.epoch = epoch
        self.scores = scores_of(record)
        improved = []
        for name, score in (("best", "test_acc1"), ("best-ema", "test_acc1_ema")):
            if score in record and record[score] > self.best.get(name, -1.0):
                self.best[name] = record[score]
                improved.append(name)
        return improved

    def save(self, improved: list[str], is_due: bool, keep: int) -> None:
        """Write checkpoint-best[-ema].pth where improved and checkpoint-<epoch>.pth where due; then
        remove the oldest above `keep`. Rank 0 writes.
        """
        if not is_main_process() or not (improved or is_due):
            return
        folder = Path(self.settings["output_dir"])
        state = self._state()
        for name in improved:
            save_checkpoint(state, folder / f"checkpoint-{name}.pth")
        if is_due:
            save_checkpoint(state, folder / f"checkpoint-{self.epoch}.pth")
            # Only of epochs up to this one: an earlier, longer run's files must not push it out.
            written = [p for p in epoch_checkpoints(folder) if _epoch_of(p) <= self.epoch]
            for old in written[keep:]:
                old.unlink(missing_ok=True)
            (folder / INSIDE_EPOCH).unlink(missing_ok=True)  # older now

    def save_inside_epoch(self, progress: dict[str, Any]) -> Path | None:
        """Write checkpoint-step.pth, from which a run goes on inside an epoch. Rank 0 writes."""
        if not (self.settings["output_dir"] and self.settings["save_ckpt"]):
            return None
        path = Path(self.settings["output_dir"]) / INSIDE_EPOCH
        if is_main_process():
            save_checkpoint(self._state() | {"progress": progress}, path)
        return path

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.student.state_dict(),
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "progress": None,
            "global_batch": self.global_batch,
            "world_size": world_size(),
            "args": self.settings,
            "data": self.data_config,
            "best": self.best,
            "scores": self.scores,
        }

    def summary(self) -> str:
        """Best and last accuracy, in a line."""
        parts = [f"{name} {accuracy:.2f} %" for name, accuracy in self.best.items()]
        if "test_acc1" in self.scores:
            parts.append(f"last epoch {self.scores['test_acc1']:.2f} %")
        return "Accuracy: " + (", ".join(parts) or "not evaluated")


# --------------------------------------------------------------------------------------- logs


def scores_of(record: dict[str, float]) -> dict[str, float]:
    """What of an epoch's record was measured on the validation images."""
    return {n: value for n, value in record.items() if n.startswith(("test_", "teacher_"))}


class Recorder:
    """What a run leaves for people: a printed line, `log.txt` and TensorBoard; rank 0 only.

    `log.txt` holds one JSON object an epoch, the same whether or not the run was interrupted: lines
    of epochs that will be run again are dropped.

    Args:
        output_dir: folder of log.txt, '' for none.
        log_dir: folder of TensorBoard's files, None for none.
        start_epoch: first epoch that will be recorded.
        first_step: first optimizer step that will be.
    """

    def __init__(
        self, output_dir: str, log_dir: str | None, start_epoch: int, first_step: int
    ) -> None:
        self.writer = self.path = None
        if not is_main_process():
            return
        if output_dir:
            self.path = Path(output_dir) / "log.txt"
            self._drop_lines_from(start_epoch)
        if log_dir:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            make_folder(log_dir, "--log_dir")
            self.writer = SummaryWriter(log_dir, purge_step=first_step)

    def _drop_lines_from(self, epoch: int) -> None:
        kept = []
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in text.splitlines():
            try:
                is_kept = json.loads(line)["epoch"] < epoch
            except json.JSONDecodeError:
                is_kept = False  # cut short by a kill: its epoch will be run again
            if is_kept:
                kept.append(line + "\n")
        temporary = self.path.with_name(".log.txt.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, record: dict[str, Any]) -> None:
        """Print an epoch's scores and keep the record."""
        scores = scores_of(record)
        if any(name.startswith("test_") for name in scores):
            log(f"Epoch {record['epoch']}  " + "  ".join(f"{n} {v:.4f}" for n, v in scores.items()))
        if self.path is not None:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise _could_not_write(self.path, error) from error
        if self.writer is not None:
            for name, value in scores.items():
                self.writer.add_scalar(name.replace("_", "/", 1), value, record["epoch"])
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Stopwatch:
    """Images per second since the last reading."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def rate(self, images: int) -> float:
        now = time.perf_counter()
        rate, self.started = images / (now - self.started), now
        return rate
