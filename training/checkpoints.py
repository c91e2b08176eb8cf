"""The files of a run, from which it resumes exactly."""

import argparse
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

import utils
from arguments.derived import is_mixed, teachers_of
from arguments.flags import DATA_FLAGS, NOT_RECIPE
from arguments.kinds import as_typed
from models.checkpoint import FORMAT, Checkpoint, read_checkpoint
from models.weights import load_network
from reporting.recorder import scores_of
from runtime import distributed
from runtime.distributed import is_main_process, log, world_size
from training.history import Progress
from training.student import ModelEma
from utils import UserError, few, is_url, replacing

INSIDE_EPOCH = "checkpoint-step.pth"


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that `path` is always either the old file or the whole new one.

    Raises: UserError if the file system refuses; every older file is left as it was.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def link_checkpoint(existing: Path, path: Path) -> None:
    """Give a checkpoint a second name, or copy it if the file system has no links.

    A checkpoint is never changed, only replaced, so names that share a file stay apart.
    Raises: UserError if the file system refuses; every older file is left as it was.
    """
    with replacing(path) as temporary:
        try:
            os.link(existing, temporary)
        except OSError:
            shutil.copyfile(existing, temporary)


def files_of_run(folder: Path) -> list[Path]:
    """The checkpoints and the records of a run in a folder."""
    names = ("log.txt", "args.json", "environment.json", "summary.json", "tb")
    paths = [*sorted(folder.glob("checkpoint-*.pth*")), *(folder / name for name in names)]
    return [path for path in paths if path.exists()]


def move_aside(folder: Path) -> None:
    """Move the files of an earlier run, if there are any, into a new folder `earlier-<n>`."""
    if not (files := files_of_run(folder)):
        return
    number = 1
    while (aside := folder / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for path in files:
        os.replace(path, aside / path.name)
    log(f"Moved the {len(files)} files of an earlier run to {aside}")


def claim_output_dir(args: argparse.Namespace) -> FileIO | None:
    """Prepare --output_dir for this run alone; returns the lock, or None without one."""
    if not args.output_dir:
        if args.resume and not is_url(args.resume):
            folder = Path(args.resume).parent
            log(
                "No --output_dir: this run will not be saved, nor continued in the folder of "
                f"--resume; pass --output_dir {folder} for that"
            )
        elif not args.teacher_cache_only:
            log("No --output_dir: checkpoints and log.txt will not be saved")
        return None
    folder = Path(args.output_dir)
    if args.resume and folder.resolve() != Path(args.resume).resolve().parent:
        log(f"Saved in --output_dir {folder}; the folder of --resume stays as it is")
    utils.make_folder(folder)
    files = [("teacher_path", teacher.path) for teacher in teachers_of(args)]
    for flag, path in [*files, ("finetune", args.finetune)]:
        if path and Path(path).resolve() in [f.resolve() for f in files_of_run(folder)]:
            raise UserError(
                f"--{flag} {path}: lies in --output_dir {folder}, where this run would overwrite "
                "it; pass another --output_dir"
            )
    lock = lock_folder(folder) if is_main_process() else None
    if not args.auto_resume and not args.resume and is_main_process():
        move_aside(folder)
    distributed.barrier()
    return lock


def epoch_checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-<epoch>.pth` files of a folder, newest epoch first."""
    paths = [p for p in folder.glob("checkpoint-*.pth") if re.fullmatch(r"checkpoint-\d+", p.stem)]
    return sorted(paths, key=_epoch_of, reverse=True)


def _epoch_of(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))


def newest_checkpoint(folder: Path) -> str:
    """The path of the newest complete checkpoint of a folder; '' without any."""
    newest, its_epoch = "", 0
    candidates = [p for p in (folder / INSIDE_EPOCH,) if p.exists()] + epoch_checkpoints(folder)
    for path in candidates:
        try:
            epoch = read_checkpoint(str(path)).epoch or 0
        except UserError as error:
            log(f"Warning: {error}; trying the checkpoint before it")
            continue
        if not newest or epoch > its_epoch:
            newest, its_epoch = str(path), epoch
        if path.name != INSIDE_EPOCH:
            break  # the others are older
    return newest


def check_resumable(checkpoint: Checkpoint) -> int:
    """The last finished epoch of a checkpoint; UserError if no run of this project wrote it."""
    if not checkpoint.is_ours or checkpoint.epoch is None:
        raise UserError(
            f"{checkpoint.path}: not a checkpoint of a run of this project, so there is nothing to "
            "resume; to start from its weights, pass it as --finetune",
            "checkpoint",
        )
    return checkpoint.epoch


def list_changes(changes: "Changes") -> str:
    """'--lr 0.001 → 0.002, --seed 0 → 1'"""
    return ", ".join(
        f"--{name} {as_typed(old)} → {as_typed(new)}" for name, (old, new) in changes.items()
    )


Changes = Mapping[str, tuple[Any, Any]]  # name -> (old, new), see utils.changes


def _differences(data: Changes, args: Changes, images: Changes, recipe: Changes) -> Iterator[str]:
    """How runs differ so that neither can go on from the other; each continues 'was trained'.

    Args:
        data: what the network is fed.
        args: all flags, and the validation images.
        recipe: those of the flags that say what a run computes.
    """
    if "classes" in data:
        old, new = data["classes"]
        yield f"on different classes ({few(sorted(set(old) ^ set(new)) or new)})"
    typed = {name: args[name] for name in ("model", "kd", "opt", "linear_probe") if name in args}
    changed = {f"--{name}": (as_typed(old), as_typed(new)) for name, (old, new) in typed.items()}
    for name, (old, new) in {**data, **changed}.items():
        yield f"with {name} {old}, but this run uses {new}"
    if images:
        old, new = images.get("images", ("", ""))
        how = f"{old} images, now {new}" if old != new else "equally many"
        if images.keys() <= {"image_sizes", "pixels"}:
            how = "the same names and labels, but different contents"
        elif images.keys() == {"held_out"}:
            how = "different images were held out"
        flags = f"; these flags differ: {list_changes(recipe)}" if recipe else ""
        yield f"on different images ({how}){flags}"
    if None not in args.get("val_images", (None,)):
        yield "with different validation images, to which its best accuracy belongs"


class RunState:
    """Everything that a restart needs: collected into checkpoints, and restored from them.

    Args:
        args: the arguments of the run, plain values only, so that `weights_only=True` reads them.
        data_config: what the student is shown (see datasets.data_config), and the class names.
        images: what identifies the training images (ImageSource.identity).
    """

    def __init__(
        self,
        student: nn.Module,
        ema: ModelEma | None,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        args: dict[str, Any],
        data_config: dict[str, Any],
        images: dict[str, Any] | None = None,
    ) -> None:
        self.student, self.ema, self.optimizer, self.scaler = student, ema, optimizer, scaler
        self.args = {**args, "changes": []}  # of the recipe on the way, in words
        self.data_config, self.images = data_config, images or {}
        self.changes: dict[str, tuple[Any, Any]] = {}  # of the recipe since the resumed checkpoint
        self.epoch = -1  # the last finished epoch
        self.best: dict[str, float] = {}  # checkpoint name -> accuracy it was saved with
        self.scores: dict[str, float] = {}  # of the last evaluated epoch
        self.progress: Progress | None = None  # of the epoch after it, if that has begun
        saves = args.get("output_dir") and args.get("save_ckpt", True)
        self.folder = Path(args["output_dir"]) if saves else None  # None: nothing is saved
        self.global_batch = args.get("batch_size", 0) * args.get("update_freq", 1) * world_size()

    def resume(self, path: str, start_epoch: int) -> int:
        """Restore from a checkpoint; for '' nothing is restored.

        Sets `progress` if that checkpoint was written inside an epoch.
        Returns: the epoch to start with.
        """
        if path and not is_url(path) and not os.path.exists(path):
            raise UserError(
                f"{path}: process 0 resumes from this file, but process {distributed.rank()} "
                "cannot find it; use a folder on a file system that all machines share",
                "checkpoint",
            )
        if path:
            start_epoch = self._restore(read_checkpoint(path))
        updates = self.progress.updates if self.progress else 0
        distributed.require_same({"first_epoch": start_epoch, "steps_done_in_it": updates})
        return start_epoch

    def _restore(self, checkpoint: Checkpoint) -> int:
        epoch = check_resumable(checkpoint)
        self._compare(checkpoint, epoch)
        path, saved = checkpoint.path, checkpoint.content
        load_network(self.student, checkpoint, other=", or another --output_dir")
        if self.ema is not None:
            load_network(self.ema.module, checkpoint, "true" if checkpoint.has_ema else "false")
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
        except ValueError as error:
            raise UserError(
                f"{path}: its optimizer state does not fit ({error}); pass the --opt, "
                "--weight_decay and --layer_decay it was saved with, or --finetune it",
                "checkpoint",
            ) from error
        if saved.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        self.epoch = epoch
        self.best = dict(saved.get("best", {}))
        self.scores = dict(checkpoint.scores)
        self.progress = Progress.from_saved(saved.get("progress"))
        self.args["changes"] = list(checkpoint.args.get("changes", ()))
        if self.changes:
            self._note(list_changes(self.changes))
        if checkpoint.format < FORMAT:
            log(
                f"Warning: {path}: written by an earlier version, which showed images in a "
                "different order; the resumed run will not match an uninterrupted one"
            )
        self._check_global_batch(saved.get("global_batch"), path)
        if saved.get("world_size", world_size()) != world_size():
            log(
                f"{path}: saved by {saved['world_size']} process(es), now {world_size()}; "
                f"{self._depends_on_processes()} will differ from here on"
            )
        inside = f" and {self.progress.updates} steps of the next" if self.progress else ""
        scores = ", ".join(f"{name} {score:.2f} %" for name, score in self.best.items()) or "none"
        log(f"Resumed from {path}: epoch {self.epoch} is done{inside}; best so far: {scores}")
        return self.epoch + 1

    def _compare(self, checkpoint: Checkpoint, epoch: int) -> None:
        """Refuse a checkpoint of different data or another model; report another recipe once.

        A finished run is refused under another recipe, since its scores belong to the old recipe.
        """
        path, args = checkpoint.path, utils.changes(checkpoint.args, self.args)
        skipped = NOT_RECIPE | DATA_FLAGS | {"val_images", "teacher_hashes", "changes"}
        self.changes = {name: change for name, change in args.items() if name not in skipped}
        if all(args.get("teacher_hashes", [None])) and "teacher_path" not in args:
            same = self.args["teacher_path"]
            self.changes["teacher_path"] = (same, f"{same} (a different file)")
        data = utils.changes(checkpoint.data, self.data_config)
        images = utils.changes(checkpoint.images, self.images)
        if difference := next(_differences(data, args, images, self.changes), ""):
            raise UserError(
                f"{path}: was trained {difference}; pass the same as before, or another "
                "--output_dir to start from the beginning",
                "checkpoint",
            )
        self._compare_length(path, epoch + 1, checkpoint.args.get("epochs", 0))

    def _compare_length(self, path: str, done: int, planned: int) -> None:
        """See whether anything is left to train of a run with `done` of its `planned` epochs."""
        asked = self.args["epochs"]
        if asked <= done < planned:
            raise UserError(
                f"{path}: {done} of {planned} epochs are done, so there is nothing left to train "
                f"with --epochs {asked}; pass a larger --epochs, or another --output_dir to start "
                "from the beginning",
                "checkpoint",
            )
        if done < asked:
            if self.changes:
                is_longer = "epochs" in self.changes and "epochs" in self.args["given"]
                how = "Resumed" if is_longer else "Warning: resumed"
                log(f"{how} with another recipe, noted in args.json: {list_changes(self.changes)}")
            return
        if self.changes:
            raise UserError(
                f"{path}: this run is finished ({done} epochs) and was trained with another "
                f"recipe ({list_changes(self.changes)}); pass another --output_dir, or the same "
                "recipe",
                "checkpoint",
            )
        log(
            f"This run was finished already ({done} epochs). To train again, pass another "
            "--output_dir; to train longer, pass a larger --epochs"
        )

    def _check_global_batch(self, saved: int | None, path: str) -> None:
        if saved in (None, self.global_batch):
            return
        difference = f"{saved} images per step when it was saved, {self.global_batch} now"
        if self.progress:
            raise UserError(
                f"{path}: written inside an epoch, with {difference}; choose --batch_size and "
                "--update_freq so that their product with the number of processes is the same",
                "checkpoint",
            )
        log(f"Warning: {path}: {difference}; the resumed run will not match an uninterrupted one")
        if not self.changes.keys() & {"batch_size", "update_freq"}:  # else noted already
            self._note(difference)

    def _depends_on_processes(self) -> str:
        """What another number of processes changes in this run, in words."""
        modules, args = list(self.student.modules()), argparse.Namespace(**self.args)
        is_dropped = any(
            (isinstance(m, nn.modules.dropout._DropoutNd) and m.p) or getattr(m, "drop_prob", 0)
            for m in modules
        )
        parts = {
            "dropout": is_dropped,
            "mixup": is_mixed(args) and args.mixup_mode != "pair",
            "BatchNorm statistics": any(
                isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in modules
            ),
        }
        return " and ".join(name for name, differs in parts.items() if differs) or "only rounding"

    def _note(self, change: str) -> None:
        """Add to what args.json and each checkpoint say of changes on the way."""
        steps = f", step {self.progress.updates} of the next" if self.progress else ""
        self.args["changes"].append(f"{change} after epoch {self.epoch}{steps}")

    def finish_epoch(self, epoch: int, record: dict[str, float]) -> list[str]:
        """Note the scores of an epoch; returns which of 'best' and 'best-ema' it improved."""
        self.epoch, self.progress = epoch, None
        if "test_acc1" in record or "test_acc1" not in self.scores:
            self.scores = scores_of(record)
        improved = []
        for name, score in (("best", "test_acc1"), ("best-ema", "test_acc1_ema")):
            if score in record and record[score] > self.best.get(name, -1.0):
                self.best[name] = record[score]
                improved.append(name)
        return improved

    def save(self, improved: list[str], is_due: bool, keep: int) -> None:
        """Write the checkpoints of an epoch on rank 0; then remove the oldest ones above `keep`.

        Args:
            improved: which of 'best' and 'best-ema' the epoch improved.
            is_due: whether checkpoint-<epoch>.pth is written too.
            keep: number of these.
        """
        if self.folder is None or not is_main_process() or not (improved or is_due):
            return
        names = [f"checkpoint-{name}.pth" for name in improved]
        if is_due:
            names.append(f"checkpoint-{self.epoch}.pth")
        first, *others = [self.folder / name for name in names]
        save_checkpoint(self._state(), first)
        for path in others:
            link_checkpoint(first, path)
        if is_due:
            # Only epochs up to this one count: an earlier, longer run must not push it out.
            written = [p for p in epoch_checkpoints(self.folder) if _epoch_of(p) <= self.epoch]
            for old in written[keep:]:
                old.unlink(missing_ok=True)
            (self.folder / INSIDE_EPOCH).unlink(missing_ok=True)  # now older than this one

    def save_inside_epoch(self, progress: Progress) -> Path | None:
        """Write checkpoint-step.pth, from which a run resumes inside an epoch. Rank 0 writes."""
        if self.folder is None:
            return None
        path = self.folder / INSIDE_EPOCH
        if is_main_process():
            save_checkpoint(self._state() | {"progress": asdict(progress)}, path)
        distributed.barrier()  # a process that ends now would make torchrun end rank 0 as it writes
        return path

    def _state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.student.state_dict(),
            "model_ema": None if self.ema is None else self.ema.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "progress": None,
            "global_batch": self.global_batch,
            "world_size": world_size(),
            "args": self.args,
            "data": self.data_config,
            "images": self.images,
            "best": self.best,
            "scores": self.scores,
        }

    def summary(self) -> str:
        """Best and last accuracy in one line."""
        parts = [f"{name} {accuracy:.2f} %" for name, accuracy in self.best.items()]
        if "test_acc1" in self.scores:
            parts.append(f"last epoch {self.scores['test_acc1']:.2f} %")
        return "Accuracy: " + (", ".join(parts) or "not evaluated")


def lock_folder(folder: Path) -> FileIO | None:
    """Take a folder for this run, until the returned file is closed or the process ends.

    The lock is the kernel's (fcntl): it ends with its process, however that ends, and holds on a
    network file system with a lock service too. The file names its holder for others to report.

    Returns: the open file, to be kept; None if there are no such locks.
    Raises: UserError if another run holds the folder.
    """
    if os.name != "posix":
        return None
    import fcntl

    file = open(folder / ".lock", "a+b", buffering=0)  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:  # not EACCES, which means that there are no locks (NFS, SMB)
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
