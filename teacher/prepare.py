"""The teacher of a run: made from the flags, scored, cached on disk or read from there."""

import argparse
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import models
import utils
from arguments.derived import teachers_of, views_of
from arguments.flags import VALIDATION, with_role
from data.loaders import DeviceLoader
from data.order import EpochBatches
from data.sources import ImageSource, Source, Subset, evenly
from datasets import Data, build_eval_loader, hold_out, teacher_classes
from distillation import TeacherAdapter, TeacherEnsemble, TeacherInfo, load_teacher
from engine import LogitsByPlaces, evaluate
from reporting.timing import Stopwatch
from runtime import distributed, signals
from runtime.device import find_device
from runtime.distributed import log
from teacher.logit_store import LogitFile, LogitStore, StoredTeacher, ValidationLogits
from teacher.manifest import open_teacher_cache, validation_fingerprint
from training.settings import LoopSettings
from utils import UserError, flags_for

CAUSES = (
    "likely causes: a different normalization (--teacher_norm), input size (--teacher_input_size) "
    "or class order (--teacher_classes), the wrong file, or a weak teacher"
)
EMA_CAUSE = "an average (EMA) that had too few steps to follow the weights"
CHANCE_LEVEL = 0.01  # how often a teacher that guesses may go without a warning
# How an image becomes pixels; a teacher that was trained with others may score lower.
PREPARATION = ("input_size", "crop_pct", "crop_mode", "interpolation")
LOST = 2.0  # percentage points below the recorded accuracy from which on a run warns
MOST_ASKED = 1000  # images without a label that the teacher is asked about before training
FOREIGN = 0.2  # by how much less sure the teacher is of images that are not of its kind


@dataclass
class RunTeacher:
    """The teacher of a run, or what is cached of it, and its scores."""

    # What StudentWithDistillation asks: the network, the store in its place, or None.
    model: nn.Module | StoredTeacher | None = None
    scores: dict[str, float] = field(default_factory=dict)  # teacher_acc1, _loss and _ece
    # Logits on the validation images by the places of each batch.
    logits: LogitsByPlaces | None = None

    def flush(self) -> None:
        """Write the logits that the store still holds in memory."""
        if isinstance(self.model, StoredTeacher):
            self.model.store.flush()

    def warn_if_smaller(self, student: nn.Module) -> None:
        """Warn if the teacher has fewer parameters than its student: they may be swapped."""
        networks = self.model.modules() if isinstance(self.model, nn.Module) else ()
        sizes = [n.parameters_before_fusing for n in networks if isinstance(n, TeacherAdapter)]
        student_size = sum(p.numel() for p in student.parameters())
        if sizes and max(sizes) < student_size:
            log(
                f"Warning: the teacher has {max(sizes):,} parameters and the student "
                f"{student_size:,}; are --model and --teacher_arch swapped?"
            )

    def warn_if_below(self, student_scores: Mapping[str, float]) -> None:
        """Warn if the student has become better than its teacher."""
        student, teacher = student_scores.get("test_acc1"), self.scores.get("teacher_acc1")
        if student is not None and teacher is not None and teacher < student:
            log(
                f"Warning: the teacher ({teacher:.2f} %) is below its student ({student:.2f} %); "
                f"{_causes(self.model)}"
            )


@flags_for(cache="--teacher_cache", folder="--teacher_cache")
def prepare_teacher(args: argparse.Namespace, settings: LoopSettings, data: Data) -> RunTeacher:
    """Make, score and cache the teacher, as far as this run needs it. Collective.

    The network is made only if there is no cache, or if the cache lacks a row.

    Raises: UserError for a teacher that cannot be loaded, that does not fit the data, or that
        scores below --teacher_min_acc1; and for a cache of something else.
    """
    if not teachers_of(args):
        if args.kd:
            log("--kd_alpha 0: the teacher is neither loaded nor used")
        return RunTeacher()
    loader = data.val_loader if args.teacher_eval else None
    is_indexable = isinstance(data.val, ImageSource)
    if args.teacher_min_acc1 and (loader is None or (args.teacher_cache and not is_indexable)):
        raise UserError(
            f"--teacher_min_acc1 {args.teacher_min_acc1}: the teacher is not scored in this run; "
            "add validation images or --holdout N, or remove the flag"
        )
    if not args.teacher_cache:
        network = make_teacher(args, settings.device, data)
        if loader is None:
            _report_confidence(args, settings, data, network)
            return RunTeacher(network)
        scores, logits = _score(args, settings, data, loader, network)
        _report_confidence(args, settings, data, network, logits)
        # The order of a stream is not promised, so its logits cannot be found again.
        return RunTeacher(network, scores, logits if is_indexable else None)

    with _asking_for_order(args, data.classes):
        store = open_teacher_cache(args, data, settings.amp_dtype)
    missing = distributed.from_main(lambda: _check_space(store, views_of(args)))
    cached = None
    if loader is not None and isinstance(data.val, ImageSource):
        prints = distributed.from_main(partial(validation_fingerprint, store.folder, data.val))
        cached = store.validation_file([prints, data.config], len(data.val))
    # One decision for all processes.
    counts = [missing, cached.missing() if cached else 0]
    missing, unscored = distributed.largest(counts, settings.device)
    source: nn.Module | None = None
    if missing or unscored:
        source = make_teacher(args, settings.device, data)
    else:
        log("All teacher logits are cached; the teacher is not loaded")
    teacher = RunTeacher(StoredTeacher(store, source if missing else None))
    known: dict[range, torch.Tensor] = {}
    if cached is not None and loader is not None:
        if source is not None and unscored:
            teacher.scores, known = _score(args, settings, data, loader, source)
            cached.write([(places, cached.format.shorten(known[places])) for places in known])
        else:
            teacher.scores, _ = _score(args, settings, data, loader, cached)
        teacher.logits = ValidationLogits(cached)
    if source is not None:
        _report_confidence(args, settings, data, source, known)
    return teacher


def _check_space(store: LogitStore, views: range) -> int:
    """Print how much these views take on disk and how much of that is cached.

    Returns: how many of their rows are missing.
    Raises: UserError if they cannot be written, and if a file has a different length.
    """
    missing, total = store.missing(views), len(views) * store.needed
    size, free = store.format.dtype.itemsize, shutil.disk_usage(store.folder).free
    log(
        f"Teacher cache {store.folder}: {len(views)} view(s) of {store.needed:,} images, "
        f"{size:,} bytes per image, {_in_words(total * size)} in all; {total - missing:,} of "
        f"{total:,} rows are cached"
    )
    if missing * size > free:
        raise UserError(
            f"{store.folder}: needs {_in_words(missing * size)} more, but only {_in_words(free)} "
            "are free; pass fewer --teacher_views, a small --teacher_cache_topk, or another folder",
            "cache",
        )
    if missing:
        utils.make_folder(store.folder)
    return missing


def _in_words(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def make_teacher(args: argparse.Namespace, device: torch.device, data: Data) -> nn.Module:
    """The frozen teacher, or the average of several, for the student's input and classes."""
    with flags_for(device="--teacher_device"):
        teacher_device = find_device(args.teacher_device) if args.teacher_device else device
    names = teacher_classes(args)
    networks: list[nn.Module] = []
    weights = []
    for arch, path, weight in teachers_of(args):
        config = {"input_size": args.teacher_input_size} if args.teacher_input_size else {}
        if args.teacher_norm == "student":
            config |= {name: data.config[name] for name in ("mean", "std")}
        elif args.teacher_norm == "arch":
            known = models.input_config(arch)
            config |= {name: known[name] for name in ("mean", "std") if name in known}
        classes_from = f"--teacher_classes {args.teacher_classes}:" if names else f"{path}:"
        with (
            _asking_for_order(args, data.classes),
            flags_for(
                architecture="--teacher_arch", checkpoint="--teacher_path", names=classes_from
            ),
        ):
            network: Any = load_teacher(
                arch,
                path,
                len(data.classes),
                teacher_device,
                classes=data.classes,
                teacher_classes=names,
                input_config=config,
                default_config=data.config,
                use_ema=args.use_ema,
            )
        log(network.info.origin)
        _warn_of_guessed_size(network.info, path, data.config["input_size"])
        _warn_if_trained_on_holdout(args, data, network.info, path)
        dtype = getattr(torch, args.teacher_dtype)
        adapter = TeacherAdapter(network, data.config, dtype)
        networks.append(adapter)
        weights.append(weight)
    teacher = networks[0]
    if len(networks) > 1:
        teacher = TeacherEnsemble(networks, weights, args.kd_temperature)
    if args.compile:
        teacher.compile()
    return teacher


@contextmanager
def _asking_for_order(args: argparse.Namespace, classes: Sequence[str]) -> Iterator[None]:
    """For a teacher whose classes may be in either of two orders: write a file to be put in order.

    Raises: UserError that names the file.
    """
    try:
        yield
    except UserError as error:
        if error.subject != "order":
            raise
        path = Path(args.output_dir or ".") / "teacher_classes.txt"
        if distributed.is_main_process():
            utils.write_whole(path, "".join(f"{name}\n" for name in classes))
        raise UserError(
            f"--teacher_path {error}; {path} was written with the classes in the data's order: put "
            f"them into the teacher's, if it is different, and pass --teacher_classes {path}"
        ) from error


def _warn_if_trained_on_holdout(
    args: argparse.Namespace, data: Data, info: TeacherInfo, path: str
) -> None:
    """Warn if the teacher's file says that it was trained on images that are held out now.

    Its record of its images proves it, whatever the folder and --data_set were, unless it was
    trained on a part of them; then its flags have to do. Collective.
    """
    trained, now_held_out = info.args, data.images.get("held_out")
    if not args.holdout or "holdout" not in trained:
        return
    count, held_out = trained["holdout"], info.images.get("held_out", now_held_out)
    now = f"--holdout {args.holdout}"
    now += "" if "holdout" in args.given else " (the default)"
    if (seen := _held_out_images_in(data.val, info, count)) is not None:
        if seen:
            log(
                f"Warning: {now}: the teacher {path} was trained on {seen} of the "
                f"{len(data.val or ())} held-out images that score it; train it with the same "
                "--holdout"
            )
        return
    if trained.get("data_set") != args.data_set:
        return
    if count == args.holdout and held_out == now_held_out:
        return
    how = f"--holdout {count}" if count else "no image held out"
    if count == args.holdout:
        how = "as many, but different images held out"
    log(
        f"Warning: {now}: the teacher {path} was trained on {args.data_set} with {how}; on the "
        "same data, it has learned images that now score it. Train it with the same --holdout"
    )


def _held_out_images_in(val: Source | None, info: TeacherInfo, holdout: int | None) -> int | None:
    """How many held-out images a teacher was trained on; None if its images are not these.

    Args:
        val: the held-out images.
        holdout: how many images the teacher's training held out, see datasets.hold_out.
    """
    if not isinstance(val, Subset):
        return None
    every = val.source
    if len(every) - (holdout or 0) != info.images.get("images"):
        return None
    others = hold_out(every, holdout)[0] if holdout else None
    identity = (others or every).identity()
    if any(info.images.get(name) != value for name, value in identity.items()):
        return None
    return int(np.isin(val.positions, others.positions).sum()) if others else len(val)


def _warn_of_guessed_size(info: TeacherInfo, path: str, student_size: int) -> None:
    """Warn if nobody says the size of the teacher's images, and the student's is far from it."""
    size = info.data_config["input_size"]
    if info.is_size_guessed and max(size, student_size) >= 2 * min(size, student_size):
        log(
            f"Warning: {path} does not say the size of its images; {size} pixels is timm's for the "
            f"architecture, the student's is {student_size}; pass --teacher_input_size if the "
            "teacher was trained at a different size"
        )


def _warn_if_below_record(
    args: argparse.Namespace, config: Mapping[str, Any], info: TeacherInfo, acc1: float
) -> None:
    """Warn if the teacher scores below what its file records, of these images or of its own.

    Args:
        config: how the validation images are prepared, see datasets.data_config.
    """
    if info.recorded_acc1 is None or acc1 >= info.recorded_acc1 - LOST:
        return
    records = f"Warning: the file of the teacher records {info.recorded_acc1:.2f} %"
    if not info.data:
        log(f"{records} on its own validation images; {_causes(info)}")
    elif all(info.args.get(name) == getattr(args, name) for name in with_role(VALIDATION)):
        prepared = {name: info.data[name] for name in PREPARATION if name in info.data}
        if utils.changes(prepared, config):
            log(
                f"{records} on these images, which were prepared differently: this run uses "
                f"{config['input_size']} pixels with --crop_pct {config['crop_pct']:g}; train the "
                "teacher with the same --crop_pct, or the student with a larger --input_size"
            )
        elif args.teacher_classes:
            log(
                f"{records} on these images; --teacher_classes {args.teacher_classes}: probably "
                "not the order of its outputs; leave the flag out if the file names its classes"
            )
        else:
            log(f"{records} on these images; {_causes(info)}")


def _score(
    args: argparse.Namespace,
    settings: LoopSettings,
    data: Data,
    loader: DeviceLoader,
    source: nn.Module | LogitFile,
) -> tuple[dict[str, float], dict[range, torch.Tensor]]:
    """Score the teacher on the validation images, through the student's own pipeline.

    Args:
        source: the network, or its cached logits.
    Returns: teacher_acc1, teacher_loss and teacher_ece, and the network's logits by the places of
        each batch.
    Raises: UserError below --teacher_min_acc1.
    """
    if isinstance(source, LogitFile):
        assert isinstance(data.val, ImageSource)  # only their logits are cached
        batches = ValidationLogits(source).batches(loader.order, data.val.targets, settings.device)
        scored = evaluate(batches, nn.Identity(), settings, args.dist_eval)
    else:
        scored = evaluate(loader, source, settings, args.dist_eval, keep_logits=True)
    acc1, loss, causes = scored.scores["acc1"], scored.scores["loss"], _causes(source)
    assert data.val is not None  # it was just scored
    images = len(data.val)
    log(f"Teacher on the {images:,} validation images: acc1 {acc1:.2f}, loss {loss:.4f}")
    if isinstance(source, TeacherAdapter):
        _warn_if_below_record(args, data.config, source.info, acc1)
    if acc1 < args.teacher_min_acc1:
        raise UserError(
            f"--teacher_min_acc1 {args.teacher_min_acc1}: the teacher scores {acc1:.2f}; {causes}"
        )
    chance = _chance(data.val)
    if is_near_chance(round(acc1 / 100 * images), images, chance):
        log(
            "Warning: the teacher is near chance: always predicting the most frequent class would "
            f"score {100 * chance:.2f} % of the {images:,} images; {causes}"
        )
    scores = {f"teacher_{name}": scored.scores[name] for name in ("acc1", "loss", "ece")}
    return scores, scored.logits


def _report_confidence(
    args: argparse.Namespace,
    settings: LoopSettings,
    data: Data,
    network: nn.Module,
    known: Mapping[range, torch.Tensor] | None = None,
) -> None:
    """Report how sure the teacher is of the images without a label, of which it is not scored.

    Warns if it is far less sure than of the validation images. Collective.

    Args:
        known: the network's logits on validation images, as far as this process has them.
    """
    if not isinstance(data.train, ImageSource) or data.labeled_share == 1:
        return
    positions = data.train.without_label()
    chosen = positions[evenly(len(positions), MOST_ASKED)]
    images = Subset(data.train, chosen)
    loader = build_eval_loader(args, images, data.config, settings.device, shared=False)
    if not distributed.is_main_process():
        return
    with torch.compiler.set_stance("force_eager"), torch.inference_mode(), settings.autocast():
        logits = torch.cat([network(batch.images).float().cpu() for batch in loader])  # (N, C)
    probabilities = logits.softmax(dim=1)
    largest = probabilities.amax(dim=1)
    deciles = largest.quantile(torch.linspace(0.1, 0.9, 9)).tolist()
    entropy = torch.special.entr(probabilities).sum(dim=1).mean().item()
    log(
        f"Teacher on {len(logits):,} unlabeled images: top probability "
        f"{' '.join(f'{decile:.2f}' for decile in deciles)} (deciles), mean {largest.mean():.2f}; "
        f"mean entropy {entropy:.2f} of at most {math.log(logits.shape[1]):.2f}"
    )
    if not known:
        return
    usual = torch.cat(list(known.values())).softmax(dim=1).amax(dim=1).mean().item()
    if largest.mean().item() < usual - FOREIGN:
        log(
            "Warning: the teacher is unsure of the unlabeled images: its mean top probability is "
            f"{largest.mean():.2f}, against {usual:.2f} on the validation images; pass images of "
            "the same kind and classes"
        )


def _chance(val: Source) -> float:
    """The accuracy, in 0…1, of naming the most frequent class for every image."""
    if isinstance(val, ImageSource):
        return float(np.bincount(val.targets).max() / len(val))
    return 1 / len(val.classes)  # a stream does not list its labels


def is_near_chance(correct: int, images: int, chance: float) -> bool:
    """Whether guessing, right with probability `chance`, gets so many images right by luck.

    One-sided binomial test at CHANCE_LEVEL. With a single class there is nothing to distinguish.
    """
    if chance >= 1:
        return False
    guessing = torch.distributions.Binomial(images, torch.tensor(chance, dtype=torch.float64))
    as_many = torch.arange(correct, images + 1, dtype=torch.float64)
    return guessing.log_prob(as_many).exp().sum().item() > CHANCE_LEVEL


def _causes(source: object) -> str:
    """What may be wrong with a teacher that scores badly."""
    networks = source.modules() if isinstance(source, nn.Module) else ()
    infos = [n.info for n in networks if isinstance(n, TeacherAdapter)]
    is_ema = any(info.is_ema for info in [source, *infos] if isinstance(info, TeacherInfo))
    return f"{CAUSES}; or {EMA_CAUSE}" if is_ema else CAUSES


@signals.stop_on_signals()
def fill_store(teacher: RunTeacher, data: Data, settings: LoopSettings, views: range) -> None:
    """Compute the teacher's logits for every image of the views that the cache lacks.

    Args:
        teacher: from `prepare_teacher`, with a cache.
    Raises: runtime.signals.Interrupted if a signal asks to stop; what was computed is stored.
    """
    loader, order, stored = data.train_loader, data.train_loader.order, teacher.model
    assert isinstance(order, EpochBatches) and isinstance(stored, StoredTeacher)
    store = stored.store
    stopwatch, images_since = Stopwatch(), 0
    for view in views:
        first = store.file_of(view).first_missing(store.needed)
        # Rows before `first` are cached. Ranks take batches in turn, hence the division by world
        # size.
        loader.set_epoch(view, first // (order.batch_size * distributed.world_size()))
        for number, batch in enumerate(loader, start=1):
            with torch.inference_mode(), settings.autocast():
                stored(batch.images, batch.key)
            images_since += len(batch.images) * distributed.world_size()
            if number % 50 == 0 or number == len(loader):
                done = f"{batch.places.stop:,}/{store.needed:,}"
                log(f"View {view} [{done}]  {stopwatch.rate(images_since):.0f} images/s")
                images_since = 0
            if signals.received_signal():
                break
        store.flush()
        # Also keeps the processes together: no machine is views ahead of another.
        if signal_number := distributed.stop_requested(settings.device):
            raise signals.Interrupted(signal_number, f"a batch of view {view}", store.folder)
