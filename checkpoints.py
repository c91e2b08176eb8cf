"""Weights from any checkpoint file, and the files of a run, from which it resumes exactly."""

import argparse
import hashlib
import math
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from timm.utils import ModelEmaV3
from torch import nn

import runtime
import utils
from arguments import DATA_FLAGS, NOT_RECIPE, as_typed, is_url, missing_file
from logs import Progress, scores_of
from models import classifier_of
from runtime import is_main_process, lock, log, world_size
from utils import UserError, could_not_write, few, fsync_folder

# Of the checkpoints of a run; raised where the same seed begins to show other images. Older files,
# and those from before the number, are read as well.
FORMAT = 2
INSIDE_EPOCH = "checkpoint-step.pth"


# ------------------------------------------------------------------------- reading any file


def local_file(path: str) -> str:
    """The path of a checkpoint file on this machine; an http(s) address is downloaded once.

    Raises: UserError for a file that does not exist or cannot be downloaded.
    """
    if not is_url(path):
        if problem := missing_file(path):
            raise UserError(problem, "checkpoint")
        return path
    # Named by the whole address: files of two releases often have the same last part.
    name = f"{hashlib.sha256(path.encode()).hexdigest()[:12]}-{Path(urlparse(path).path).name}"
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not cached.exists():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{cached}.lock", "wb") as file:
                lock(file)  # one process per machine downloads, the others wait
                if not cached.exists():
                    torch.hub.download_url_to_file(path, str(cached), progress=False)
        except OSError as error:
            raise UserError(
                f"{path}: download failed ({error}); fetch the file and pass its path", "checkpoint"
            ) from error
    return str(cached)


def read_checkpoint(path: str) -> Any:
    """Read a checkpoint file (local or http) to the CPU without running any code in it.

    `torch.load(weights_only=True)` accepts tensors and plain types. One more type is allowed,
    `argparse.Namespace`, which the DeiT and ConvNeXt releases carry beside their weights.

    Args:
        path: a `.safetensors` file or anything that torch.save wrote.
    Raises: UserError for a file that is missing, unreadable or would run code.
    """
    path = local_file(path)
    damaged = f"{path}: not a readable checkpoint, perhaps cut short"
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file  # comes with timm

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, not read: the processes of a machine share the pages, and what is not used,
            # such as a teacher's optimizer state, is never read.
            is_mapped = zipfile.is_zipfile(path)  # torch.save's format since 1.6
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except pickle.UnpicklingError as error:
        if not (refused := _refused_names(path, error)):
            raise UserError(f"{damaged}; fetch or save it again", "checkpoint") from error
        raise UserError(
            f"{path}: refused, since reading it would run code ({refused[0]}); nothing was run. "
            "Save its weights with torch.save(model.state_dict(), FILE) and pass that file",
            "checkpoint",
        ) from error
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        reason = type(error).__name__
        raise UserError(f"{damaged} ({reason}); fetch or save it again", "checkpoint") from error


def _refused_names(path: str, error: pickle.UnpicklingError) -> list[str]:
    """The functions and classes that a checkpoint asks for and `weights_only` refuses."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not one of torch's zip files, or damaged
        # Old files have no list of names; torch's message is the only place that tells them.
        return re.findall(r"GLOBAL (\S+)", str(error))


# ------------------------------------------- from a checkpoint's weights to a model's weights


@dataclass
class Weights:
    """A state_dict that was found in a checkpoint.

    Args:
        state: tensors by name, without the prefixes of wrappers.
        key: where in the checkpoint it was; '' for a bare state_dict.
        source: the file, for messages.
    """

    state: dict[str, torch.Tensor]
    key: str
    source: str

    @property
    def description(self) -> str:
        if not self.key:
            return "weights of a bare state_dict"
        return f"weights '{self.key}'{' (EMA)' if 'ema' in self.key else ''}"


def find_weights(checkpoint: Any, source: str, keys: tuple[str, ...], prefix: str = "") -> Weights:
    """Find the weights in a checkpoint and remove the prefixes of wrappers from their names.

    Args:
        checkpoint: from `read_checkpoint`.
        source: the file, for messages.
        keys: where to look, best first; a bare state_dict is found without any.
        prefix: take only the weights with this prefix, and remove it.
    Raises: UserError where there are no weights.
    """
    if not isinstance(checkpoint, dict):
        found = type(checkpoint).__name__
        raise UserError(f"{source}: holds a {found}, not a dict of weights", "checkpoint")
    key = next((key for key in keys if isinstance(checkpoint.get(key), dict)), "")
    state = checkpoint[key] if key else checkpoint
    state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if prefix:
        state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    if not state:
        below = f" with the prefix '{prefix}'" if prefix else ""
        raise UserError(
            f"{source}: holds no weights under {', '.join(keys)}{below} (its keys: "
            f"{few(checkpoint)}); pass a model checkpoint",
            "checkpoint",
        )
    wrappers = ("module.", "_orig_mod.", "model.", "student.")
    while wrapper := next((w for w in wrappers if all(n.startswith(w) for n in state)), ""):
        state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return Weights(state, key, source)


def load_weights(
    model: nn.Module,
    weights: Weights,
    *,
    remedy: str,
    classes_remedy: str = "",
    allow_new_classifier: bool = False,
) -> list[str]:
    """Rename the weights as timm names them, compare them with the model's, and load them.

    Args:
        remedy: what to do where the weights do not fit; ends the error.
        classes_remedy: the same where only the number of classes differs.
        allow_new_classifier: leave a classifier that does not fit as it was initialised.
    Returns: the names of the weights that were left as initialised.
    Raises: UserError where the weights do not fit; the model is then unchanged.
    """
    state, note = _rename_as_timm(model, weights.state)
    wanted = model.state_dict()
    classifier = classifier_name(model)
    fresh = []
    if allow_new_classifier and classifier is not None:
        names = [name for name in wanted if name.startswith(f"{classifier}.")]
        fresh = [n for n in names if n not in state or state[n].shape != wanted[n].shape]
    elif (weight := f"{classifier}.weight") in state and weight in wanted:
        rows, outputs = len(state[weight]), len(wanted[weight])
        if rows != outputs:
            raise UserError(
                f"{weights.source}: the checkpoint's classifier has {rows} outputs, but {outputs} "
                f"classes are expected; {classes_remedy or remedy}",
                "checkpoint",
            )
    state = {name: value for name, value in state.items() if name not in fresh}
    expected = {name: value for name, value in wanted.items() if name not in fresh}
    if difference := describe_mismatch(expected, state):
        message = f"{weights.source}: does not fit the model: {difference}{note}; {remedy}"
        raise UserError(message, "checkpoint")
    model.load_state_dict(state, strict=not fresh)
    return sorted(fresh)


def _rename_as_timm(
    model: nn.Module, state: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """Weights under timm's names and resampled for the model's size, and a note of a failure."""
    # Internal to timm: the function that each family's file has for its original releases, and for
    # position embeddings of another size.
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    wanted, classifier = model.state_dict(), f"{classifier_name(model)}."
    fits = all(
        n in state and (n.startswith(classifier) or state[n].shape == wanted[n].shape)
        for n in wanted
    )
    if rename is None or (fits and len(state) == len(wanted)):
        return state, ""
    try:
        return rename(state, model), ""
    except Exception as error:  # written for one family's files, it fails on others in any way
        return state, f" (timm could not rename the weights: {type(error).__name__})"


def describe_mismatch(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str:
    """How two state_dicts differ, with a few names of each kind; '' where they fit."""
    parts = []
    if missing := wanted.keys() - found.keys():
        parts.append(f"{len(missing)} weights missing ({few(sorted(missing))})")
    if unexpected := found.keys() - wanted.keys():
        parts.append(f"{len(unexpected)} unexpected ({few(sorted(unexpected))})")
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and wanted[name].shape != found[name].shape
    ]
    if shapes:
        parts.append(f"{len(shapes)} of another shape ({few(shapes)})")
    return "; ".join(parts)


def classifier_name(model: nn.Module) -> str | None:
    """The name of a timm model's classifier among its modules; None where it has none."""
    classifier = classifier_of(model)
    return next((name for name, module in model.named_modules() if module is classifier), None)


RAW_KEYS = ("model", "state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")


def weight_keys(checkpoint: Any, use_ema: str = "auto") -> tuple[tuple[str, ...], str]:
    """Where to look for a network's weights, best first, and why where there was a choice.

    Args:
        use_ema: 'true' for the EMA, 'false' for the raw weights, 'auto' for those with the better
            recorded accuracy: where only the raw weights have one, the raw weights, else the EMA.
    """
    if use_ema != "auto":
        return (EMA_KEYS if use_ema == "true" else RAW_KEYS), ""
    saved: dict[str, Any] = checkpoint if isinstance(checkpoint, dict) else {}
    has_both = any(isinstance(saved.get(key), dict) for key in EMA_KEYS) and any(
        isinstance(saved.get(key), dict) for key in RAW_KEYS
    )
    scores = saved.get("scores") or {}
    raw, ema = scores.get("test_acc1"), scores.get("test_acc1_ema")
    if not has_both:
        return EMA_KEYS + RAW_KEYS, ""
    if raw is None and ema is None:
        return EMA_KEYS, ", chosen without recorded accuracies"
    other = "that of the {} {:.2f} %".format
    if ema is None or (raw is not None and raw > ema):
        rest = "none of the EMA" if ema is None else other("EMA", ema)
        return RAW_KEYS, f", recorded accuracy {raw:.2f} %, {rest}"
    rest = "none of the raw weights" if raw is None else other("raw weights", raw)
    return EMA_KEYS, f", recorded accuracy {ema:.2f} %, {rest}"


def class_names(checkpoint: Any) -> list[str] | None:
    """The class names in a checkpoint of this project; None for any other file."""
    saved = checkpoint.get("data") if isinstance(checkpoint, dict) else None
    return saved.get("classes") if isinstance(saved, dict) else None


def load_finetune(
    model: nn.Module, path: str, keys: str, prefix: str, classes: Sequence[str]
) -> str:
    """Load pre-trained weights into `model`; a classifier of other classes stays as initialised.

    Where the file names its classes, the classifier is taken by these names: whole, or not at all.

    Args:
        keys: keys to look under, separated by '|'; EMA weights are taken only if named.
        prefix: load only the weights with this prefix.
        classes: the model's classes in order.
    Returns: a line that says what was loaded.
    Raises: UserError where no weight, or only part of the network, fits.
    """
    checkpoint = read_checkpoint(path)
    weights = find_weights(checkpoint, path, (*keys.split("|"), "state_dict"), prefix)
    names = class_names(checkpoint)
    if names:
        _order_classifier(model, weights.state, names, classes)
    remedy = "pass the architecture that the file was trained as"
    fresh = load_weights(model, weights, remedy=remedy, allow_new_classifier=True)
    if fresh:
        of_classes = f" (other classes: {few(names)})" if names else ""
        note = f"newly initialised: {', '.join(fresh)}{of_classes}"
    else:
        note = "classifier " + ("matched by class name" if names else "in the file's order")
    return f"Fine-tuning from {path}: {weights.description}; {note}"


def _order_classifier(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    names: Sequence[str],
    classes: Sequence[str],
) -> None:
    """Put the classifier's rows into the order of other classes; remove it where one is unknown.

    Args:
        state: weights under the model's names; changed.
        names: the classes of the rows.
    """
    position = {name: row for row, name in enumerate(names)}
    rows = [position[name] for name in classes if name in position]
    for name in [name for name in state if name.startswith(f"{classifier_name(model)}.")]:
        if len(rows) < len(classes):
            del state[name]
        else:
            state[name] = state[name][rows]


def load_network(
    checkpoint: Any,
    path: str,
    network: nn.Module,
    keys: tuple[str, ...] = RAW_KEYS,
    other: str = "",
) -> None:
    """Load the weights of a run's checkpoint into a network of the same architecture.

    Args:
        other: what else to do about a checkpoint of another model, such as ', or …'.
    Raises: UserError for a checkpoint of another model or from a newer version of this project.
    """
    weights = find_weights(checkpoint, path, keys)
    if checkpoint.get("format", 0) > FORMAT:
        raise UserError(
            f"{path}: written by a newer version (format {checkpoint['format']}; this version "
            f"reads up to {FORMAT}); update this code",
            "checkpoint",
        )
    remedy = f"the checkpoint is of another model: pass its --model{other}"
    load_weights(network, weights, remedy=remedy)


# ---------------------------------------------------------------------- the files of a run


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path for the new content of a file; `path` is always the old or the new file.

    Raises: UserError where the file system refuses; every older file is left as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # A kill may have left one, and it may be a second name of another checkpoint.
        temporary.unlink(missing_ok=True)
        yield temporary
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as the latter
        temporary.unlink(missing_ok=True)
        raise could_not_write(path, error) from error


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that `path` is always either the old file or the whole new one.

    Raises: UserError where the file system refuses; every older file is left as it was.
    """
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def link_checkpoint(existing: Path, path: Path) -> None:
    """Give a checkpoint a second name, or copy it where the file system has no links.

    A checkpoint is never changed, only replaced, so names that share a file stay apart.
    Raises: UserError where the file system refuses; every older file is left as it was.
    """
    with _replacing(path) as temporary:
        try:
            os.link(existing, temporary)
        except OSError:
            shutil.copyfile(existing, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())


def files_of_run(folder: Path) -> list[Path]:
    """The checkpoints and the records of a run in a folder."""
    names = ("log.txt", "args.json", "environment.json", "summary.json", "tb")
    found = [*sorted(folder.glob("checkpoint-*.pth")), *(folder / name for name in names)]
    return [path for path in found if path.exists()]


def move_aside(folder: Path) -> None:
    """Move the files of an earlier run, where there are any, into a new folder `earlier-<n>`."""
    files = files_of_run(folder)
    if not files:
        return
    number = 1
    while (aside := folder / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for path in files:
        os.replace(path, aside / path.name)
    log(f"Moved the {len(files)} files of an earlier run to {aside}")


def epoch_checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-<epoch>.pth` files of a folder, newest epoch first."""
    found = [p for p in folder.glob("checkpoint-*.pth") if re.fullmatch(r"checkpoint-\d+", p.stem)]
    return sorted(found, key=_epoch_of, reverse=True)


def _epoch_of(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))


def newest_checkpoint(folder: Path) -> str:
    """The path of the newest complete checkpoint of a folder; '' without any."""
    newest, its_epoch = "", -math.inf
    candidates = [p for p in (folder / INSIDE_EPOCH,) if p.exists()] + epoch_checkpoints(folder)
    for path in candidates:
        try:
            checkpoint = read_checkpoint(str(path))
        except UserError as error:
            log(f"Warning: {error}; trying the checkpoint before it")
            continue
        if checkpoint["epoch"] > its_epoch:
            newest, its_epoch = str(path), checkpoint["epoch"]
        if path.name != INSIDE_EPOCH:
            break  # the others are older
    return newest


def saved_args(checkpoint: Any) -> dict[str, Any]:
    """The arguments in a checkpoint of this project; none for any other file."""
    is_ours = isinstance(checkpoint, dict) and isinstance(checkpoint.get("data"), dict)
    args = checkpoint.get("args") if is_ours else None
    return args if isinstance(args, dict) else {}


def _can_resume(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint holds a run, and not only weights as releases do."""
    # The ConvNeXt script's best checkpoint has the word 'best' for its epoch.
    return "optimizer" in checkpoint and isinstance(checkpoint.get("epoch"), int)


def list_changes(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """'--lr 0.001 → 0.002, --seed 0 → 1'"""
    told = ((name, as_typed(old), as_typed(new)) for name, (old, new) in changes.items())
    return ", ".join(f"--{name} {old} → {new}" for name, old, new in told)


class RunState:
    """Everything that a restart needs: collected into checkpoints, and restored from them.

    Args:
        args: the arguments of the run, plain values only, so that `weights_only=True` reads them.
        data_config: what the student is shown (see transforms.data_config), and the class names.
        images: what tells the training images from others (ImageSource.identity).
    """

    def __init__(
        self,
        student: nn.Module,
        ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        args: dict[str, Any],
        data_config: dict[str, Any],
        images: dict[str, Any] | None = None,
    ) -> None:
        self.student, self.ema, self.optimizer, self.scaler = student, ema, optimizer, scaler
        self.args, self.data_config, self.images = dict(args), data_config, images or {}
        self.changes: dict[str, tuple[Any, Any]] = {}  # of the recipe since the resumed checkpoint
        self.epoch = -1  # the last finished epoch
        self.best: dict[str, float] = {}  # checkpoint name -> accuracy it was saved with
        self.scores: dict[str, float] = {}  # of the last evaluated epoch
        self.progress: Progress | None = None  # of the epoch after it, where that has begun
        saves = args.get("output_dir") and args.get("save_ckpt", True)
        self.folder = Path(args["output_dir"]) if saves else None  # None: nothing is saved
        self.global_batch = args.get("batch_size", 0) * args.get("update_freq", 1) * world_size()

    def resume(self, path: str, start_epoch: int) -> int:
        """Restore from a checkpoint; for '' nothing is restored.

        Sets `progress` where that checkpoint was written inside an epoch.
        Returns: the epoch to start with.
        """
        if path and not is_url(path) and not os.path.exists(path):
            raise UserError(
                f"{path}: process 0 resumes from this file, but process {runtime.rank()} "
                "cannot find it; use a folder on a file system that all machines share",
                "checkpoint",
            )
        if path:
            start_epoch = self._restore(read_checkpoint(path), path, start_epoch)
        updates = self.progress.updates if self.progress else 0
        runtime.require_same({"first_epoch": start_epoch, "steps_done_in_it": updates})
        return start_epoch

    def _restore(self, checkpoint: Any, path: str, start_epoch: int) -> int:
        self._compare(checkpoint, path)
        load_network(checkpoint, path, self.student, other=", or another --output_dir")
        if self.ema is not None:
            saved = checkpoint.get("model_ema") or self.student.state_dict()
            self.ema.module.load_state_dict(saved)
        if not _can_resume(checkpoint):
            log(
                f"Weights of {path}: no optimizer state or epoch in the file; the schedule starts "
                "from the beginning"
            )
            return start_epoch
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError as error:
            raise UserError(
                f"{path}: its optimizer state does not fit ({error}); pass the --opt, "
                "--weight_decay and --layer_decay it was saved with, or --finetune it",
                "checkpoint",
            ) from error
        if checkpoint.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint["epoch"]
        self.best = dict(checkpoint.get("best", {}))
        self.scores = dict(checkpoint.get("scores", {}))
        self.progress = Progress.from_saved(checkpoint.get("progress"))
        if checkpoint.get("format", 0) < FORMAT:
            log(
                f"Warning: {path}: written by an earlier version, which showed images in another "
                "order; the resumed run will not match an uninterrupted one"
            )
        self._check_global_batch(checkpoint.get("global_batch"), path)
        if checkpoint.get("world_size", world_size()) != world_size():
            log(
                f"{path}: saved by {checkpoint['world_size']} process(es), now {world_size()}; "
                "dropout, mixup and BatchNorm statistics will differ from here on"
            )
        inside = f" and {self.progress.updates} steps of the next" if self.progress else ""
        scores = ", ".join(f"{name} {score:.2f} %" for name, score in self.best.items()) or "none"
        log(f"Resumed from {path}: epoch {self.epoch} is done{inside}; best so far: {scores}")
        return self.epoch + 1

    def _compare(self, checkpoint: Any, path: str) -> None:
        """Refuse a checkpoint of other data or another model; report another recipe once.

        A finished run is refused under another recipe, since its scores belong to the old recipe.
        """
        was = saved_args(checkpoint)
        if not was:
            return  # a release, or a file of another project
        remedy = "pass the same as before, or another --output_dir to start from the beginning"
        data = utils.changes(checkpoint["data"], self.data_config)
        if "classes" in data:
            old, new = data["classes"]
            other = sorted(set(old) ^ set(new)) or new
            what = f"was trained on other classes ({few(other)})"
            raise UserError(f"{path}: {what}; {remedy}", "checkpoint")
        for name, (old, new) in data.items():
            what = f"was trained with {name} {old}, but this run uses {new}"
            raise UserError(f"{path}: {what}; {remedy}", "checkpoint")
        recipe = utils.changes(was, self.args)
        for name in ("model", "kd", "opt", "linear_probe"):
            if name in recipe:
                old, new = recipe[name]
                what = f"was trained with --{name} {as_typed(old)}, but this run uses "
                what += as_typed(new)
                raise UserError(f"{path}: {what}; {remedy}", "checkpoint")
        skipped = NOT_RECIPE | set(DATA_FLAGS)
        self.changes = {name: change for name, change in recipe.items() if name not in skipped}
        if images := utils.changes(checkpoint.get("images", {}), self.images):
            old, new = images.get("images", ("", ""))
            how = f"{old} images, now {new}" if old != new else "as many, but not the same"
            if images.keys() <= {"image_sizes", "pixels"}:
                how = "the same names and labels, but other contents"
            elif images.keys() == {"held_out"}:
                how = "other images were held out"
            what = f"was trained on other images ({how})"
            if self.changes:
                what += f"; these flags differ: {list_changes(self.changes)}"
            raise UserError(f"{path}: {what}; {remedy}", "checkpoint")
        if not _can_resume(checkpoint):
            return
        epochs, asked, planned = checkpoint["epoch"] + 1, self.args["epochs"], was.get("epochs", 0)
        if asked <= epochs < planned:
            raise UserError(
                f"{path}: {epochs} of {planned} epochs are done, so --epochs {asked} leaves "
                "nothing to train; pass a larger --epochs, or another --output_dir to start from "
                "the beginning",
                "checkpoint",
            )
        is_finished = epochs >= asked
        if is_finished and self.changes:
            raise UserError(
                f"{path}: this run is finished ({epochs} epochs) and was trained with another "
                f"recipe ({list_changes(self.changes)}); pass another --output_dir, or the same "
                "recipe",
                "checkpoint",
            )
        if is_finished:
            log(
                f"This run was finished already ({epochs} epochs). To train again, pass another "
                "--output_dir; to train longer, pass a larger --epochs"
            )
        elif self.changes:
            log(f"Warning: resumed with another recipe: {list_changes(self.changes)}")

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
        """Write checkpoint-best[-ema].pth where improved and checkpoint-<epoch>.pth where due; then
        remove the oldest epoch checkpoints above `keep`. Rank 0 writes.
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
        runtime.barrier()  # a process that ends now would make torchrun end rank 0 as it writes
        return path

    def _state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.student.state_dict(),
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
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
