"""From sources of images to batches on the device: samplers, order, collation and loaders."""

import argparse
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IterableImageDataset
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import Compose

import datasets
import pictures
import runtime
import transforms
import utils
from arguments import PRETRAINED, fit_to_images, is_augmented, is_mixed, teachers_of
from checkpoints import class_names, read_checkpoint
from datasets import ImageSource, Source, StreamSource
from runtime import log
from transforms import HostBatch, Mixing, Patches, ToNetwork, ToPixels, collate
from utils import ROUNDS, RandomUse, UserError, name_flags, permute, seed_sequence


class Batch(NamedTuple):
    """What a network is trained or scored on, and which images of the data those are."""

    # (B, 3, H, W) float32, channels last, on the device; (B, D) features in a linear probe
    images: torch.Tensor
    targets: torch.Tensor  # (B,) int64, or (B, C) probabilities where images are mixed
    view: int  # number of the augmented epoch that the images are from; 0 in an evaluation
    places: range  # positions of the images in the order of the view

    @property
    def key(self) -> tuple[int, range]:
        """What identifies the images, whoever asks and whenever: (view, places)."""
        return self.view, self.places


class Loader(Protocol):
    """What the training loop takes."""

    @property
    def batches_in_epoch(self) -> int: ...

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None: ...

    def __iter__(self) -> Iterator[Batch]: ...


class BatchOrder(Protocol):
    """Which images each batch of this process holds; a sampler or a stream."""

    view: int
    first_batch: int
    batches_in_epoch: int

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None: ...

    def places(self, batch: int) -> range: ...


# -------------------------------------------------------------------------- images and order

PLACES_AT_ONCE = 4096  # of an order that are computed ahead
READ_ONLY = -1  # the view of images that are decoded, to see whether they can be, and not shown


class TransformedImages(Dataset):
    """Images after their transform, whose randomness is a function of (seed, view, index) alone.

    So an image depends neither on the number of workers nor on what was loaded before. Items are
    asked for by the pair (view, index).

    Args:
        seed: None for a transform without randomness, as in evaluation.
    """

    def __init__(self, source: ImageSource, transform: ToPixels, seed: int | None) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[np.ndarray, Patches], int]:
        view, index = key
        if view == READ_ONLY:
            image, target = self.source[index]
            return (image[:1, :1], Patches(1, 1)), target
        if self.seed is not None:
            utils.seed_rng(torch.device("cpu"), RandomUse.AUGMENTATION, self.seed, view, index)
        return self.transform(self.source.load(index)), int(self.source.targets[index])


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """The shuffled batches of one rank in an epoch, as lists of (view, index).

    A view is one augmentation and one order of all training images; epoch e shows view e mod
    `views`. Batch b of rank r is block b * world + r of the order of the view, so an optimizer step
    sees the same images however a global batch is divided among processes and accumulation. The
    last incomplete global batch is left out, as in the ConvNeXt script; other images are last in
    the next view (see `view_order`).

    Args:
        views: number of views; None for a new view every epoch.
        unit: show all images except an incomplete unit of this many, instead of whole global
            batches; the number of batches may then differ by one between processes.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        views: int | None = None,
        unit: int | None = None,
    ) -> None:
        self.count, self.batch_size, self.seed, self.views = count, batch_size, seed, views
        self.rank, self.world = runtime.rank(), runtime.world_size()
        self.view, self.first_batch = 0, 0
        self.end = count - count % (unit or batch_size * self.world)  # the first place not shown
        blocks = math.ceil(self.end / batch_size)
        self.batches_in_epoch = len(range(self.rank, blocks, self.world))

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch to begin with where part of the epoch is done."""
        self.view = epoch % self.views if self.views else epoch
        self.first_batch = first_batch

    def places(self, batch: int) -> range:
        """Positions of the images of one batch of this rank in the order of the view."""
        start = (batch * self.world + self.rank) * self.batch_size
        return range(start, min(start + self.batch_size, self.end))

    def __len__(self) -> int:
        return self.batches_in_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Some batches at once, since a call of view_order costs as much as hundreds of places.
        step = max(1, PLACES_AT_ONCE // self.batch_size)
        for first in range(self.first_batch, self.batches_in_epoch, step):
            numbers = range(first, min(first + step, self.batches_in_epoch))
            batches = [np.asarray(self.places(number)) for number in numbers]
            order = view_order(self.seed, self.view, self.count, np.concatenate(batches))
            indices = iter(order.tolist())
            for batch in batches:
                yield [(self.view, index) for index in itertools.islice(indices, len(batch))]


def view_order(
    seed: int, view: int, count: int, places: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """The images that a view shows at some places of its order; computed, not stored.

    Views 2k and 2k + 1 are both random, but what one shows in its last half, the other shows in its
    first. The images that do not fill a global batch, always fewer than half, are the last ones: so
    two views show every image, whatever the batch size.

    Args:
        count: number of images.
        places: (P,) integers below `count`; None for all.
    Returns: (P,) int64 indices of images.
    """
    places = np.arange(count) if places is None else np.asarray(places)
    if view % 2:
        # Shuffle both halves and exchange them; the result are places in the order of the view
        # before.
        keys = seed_sequence(RandomUse.ORDER, seed, view).generate_state(2 * ROUNDS, np.uint64)
        half = count // 2
        is_first = places < count - half
        found = np.empty(len(places), np.int64)
        found[is_first] = half + permute(places[is_first], count - half, keys[:ROUNDS])
        found[~is_first] = permute(places[~is_first] - (count - half), half, keys[ROUNDS:])
        places, view = found, view - 1
    keys = seed_sequence(RandomUse.ORDER, seed, view).generate_state(ROUNDS, np.uint64)
    return permute(places, count, keys)


class EvalBatches(Sampler[list[tuple[int, int]]]):
    """The evaluation batches of one rank; over all ranks every image once, without padding."""

    def __init__(self, count: int, batch_size: int, shared: bool) -> None:
        self.batch_size, self.view, self.first_batch = batch_size, 0, 0
        self.images = range(runtime.rank(), count, runtime.world_size()) if shared else range(count)
        self.batches_in_epoch = math.ceil(len(self.images) / batch_size)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Every evaluation shows the same images in the same order."""

    def places(self, batch: int) -> range:
        """The images of one batch of this rank."""
        return self.images[batch * self.batch_size : (batch + 1) * self.batch_size]

    def __len__(self) -> int:
        return self.batches_in_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.first_batch, self.batches_in_epoch):
            yield [(self.view, index) for index in self.places(batch)]


class Stream:
    """One of timm's streams (wds/…, tfds/…, hfids/…), which shuffle and divide images themselves.

    Their order, and so the result, depends on the number of workers.
    """

    def __init__(
        self, stream: IterableImageDataset, loader_keywords: dict[str, Any], is_train: bool
    ) -> None:
        stream.set_loader_cfg(num_workers=loader_keywords["num_workers"])
        self.stream, self.is_train = stream, is_train
        self.batch_size = loader_keywords["batch_size"]
        self.loader = DataLoader(stream, drop_last=is_train, **loader_keywords)
        self.batches_in_epoch = len(self.loader)
        self.view, self.first_batch = 0, 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch; a stream has to be read up to the first batch."""
        self.stream.set_epoch(epoch)
        self.view, self.first_batch = epoch, first_batch

    def places(self, batch: int) -> range:
        """A number for each image of one batch of this rank, none twice in an epoch."""
        start = (batch * runtime.world_size() + runtime.rank()) * self.batch_size
        return range(start, start + self.batch_size)

    def __iter__(self) -> Iterator[HostBatch]:
        # A shard may hold more images than the stream's length says; the schedule has no steps for
        # them.
        stop = self.batches_in_epoch if self.is_train else None
        return itertools.islice(self.loader, self.first_batch, stop)


# --------------------------------------------------------------------------------- the loader


class DeviceLoader:
    """Batches as networks take them: on the device, normalised, erased and mixed.

    Every batch carries its own key, so a caller may fetch batches ahead of their use.

    Args:
        order: tells the places of each batch (EpochBatches, EvalBatches, Stream).
        host_batches: yields the HostBatches in that order.
        to_network: pixels -> network input, on the device.
        mixup: mixes images and targets, see transforms.make_mixup; None for no mixing.
    """

    def __init__(
        self,
        order: BatchOrder,
        host_batches: "DataLoader | Stream",
        to_network: ToNetwork,
        mixup: Mixing | None = None,
    ) -> None:
        self.order, self.host_batches = order, host_batches
        self.to_network, self.mixup = to_network, mixup
        self.is_read = False  # whether all images of an epoch were read, without an error

    @property
    def batches_in_epoch(self) -> int:
        """Batches of this process in a whole epoch."""
        return self.order.batches_in_epoch

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch to begin with where part of the epoch is done."""
        self.order.set_epoch(epoch, first_batch)

    def start_workers(self) -> None:
        """Fork the loader workers now, while this process has few threads.

        Collectives leave threads behind that enter Python for a moment, to release a tensor. A fork
        at that moment can leave the new worker waiting for a lock of the interpreter for ever
        (CPython up to 3.11), and every process of the run with it.
        """
        if isinstance(self.host_batches, DataLoader) and self.host_batches.num_workers:
            self.order.first_batch = self.order.batches_in_epoch  # an epoch without batches
            for _ in self.host_batches:
                pass
            self.order.first_batch = 0

    def __len__(self) -> int:
        return self.order.batches_in_epoch - self.order.first_batch

    def __iter__(self) -> Iterator[Batch]:
        view, first_batch = self.order.view, self.order.first_batch
        device = self.to_network.device
        for number, host in enumerate(self.host(), start=first_batch):
            images = self.to_network(host)
            targets = runtime.send(host.targets, device)
            places = self.order.places(number)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets, view, places.start)
            yield Batch(images, targets, view, places)

    def host(self) -> Iterator[HostBatch]:
        """The batches as the workers return them.

        Raises: UserError for an image that cannot be read.
        """
        try:
            yield from self.host_batches
        except UserError as error:
            # A worker hands its error over as a whole traceback, whose last line is the message.
            message = str(error).rsplit("UserError: ", 1)[-1].strip()
            is_stream = isinstance(self.host_batches, Stream)
            hint = "" if is_stream else "; --check_data true lists all such images"
            raise UserError(message + hint) from error
        self.is_read = True


@dataclass
class Data:
    """The loaders of a run, and what its checkpoints record of the data."""

    train_loader: DeviceLoader
    val_loader: DeviceLoader | None  # None where neither student nor teacher is evaluated
    # All training images once, as in an evaluation: for a linear probe that keeps their features.
    feature_loader: DeviceLoader | None
    train: Source
    val: Source | None
    classes: list[str]
    config: dict[str, Any]
    images: dict[str, Any]  # what tells the training images from others; {} for a stream
    labelled_share: float = 1.0  # the part of the training images that has a label


def build_data(
    args: argparse.Namespace, device: torch.device, views: int | None = None, fill: bool = False
) -> Data:
    """Open both splits, check that they belong together, and make the loaders.

    Args:
        args: batch_size is lowered where there are fewer images.
        views: number of views of the training images; None for a new view every epoch.
        fill: let the training loader show every image that a later run may show, whatever the batch
            size and the number of processes of that run: to fill a teacher cache.
    Raises: UserError for data that is missing, empty, mismatched or too small.
    """
    train, val = datasets.open_splits(args, partial(_classes_of_teacher, args))
    images = _same_images(train, "training")
    if val is not None and runtime.world_size() > 1:
        _same_images(val, "validation")
    if val is not None and args.holdout:
        images["held_out"] = datasets.held_out_identity(val)
    _fit_batches(args, len(train))
    config = transforms.data_config(args) | {"classes": train.classes}
    to_network = ToNetwork(config, device)
    loader_keywords = _loader_keywords(args, device)
    train_loader = _train_loader(train, args, config, to_network, loader_keywords, views, fill)
    val_loader = feature_loader = None
    if val is not None:
        val_loader = build_eval_loader(args, val, config, device)
    if not is_augmented(args) and isinstance(train, ImageSource):
        feature_loader = build_eval_loader(args, train, config, device, shared=True)
    else:
        train_loader.start_workers()
    share = 1.0
    if isinstance(train, ImageSource):
        share -= len(train.without_label()) / len(train)
    loaders = train_loader, val_loader, feature_loader
    return Data(*loaders, train, val, train.classes, config, images, share)


def _classes_of_teacher(args: argparse.Namespace) -> list[str]:
    """The names of the teacher's classes, for images that have no labels."""
    if args.teacher_classes:
        with name_flags(text="--teacher_classes"):
            return utils.read_lines(args.teacher_classes)
    path = teachers_of(args)[0].path
    with name_flags(checkpoint="--teacher_path"):
        names = None if path == PRETRAINED else class_names(read_checkpoint(path))
    if names is None:
        raise UserError(
            f"--data_path {args.data_path}: the images have no labels, and the teacher {path} does "
            "not name its classes; name each of its outputs with --teacher_classes FILE"
        )
    return names


def _same_images(source: Source, name: str) -> dict[str, Any]:
    """What tells the images of a source from others (ImageSource.identity); {} for a stream.

    All processes compare the number of images, and one per machine also names and labels, which the
    processes of a machine share. Collective; the run ends where they differ.
    """
    values: dict[str, Any] = {"images": len(source)}
    if isinstance(source, ImageSource) and runtime.local_rank() == 0:
        values |= source.identity()
    same = runtime.require_same(values, f"{name} ")
    return same if isinstance(source, ImageSource) else {}


def _loader_keywords(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    _check_shared_memory(args)
    return {
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and device.type == "cuda",
        "persistent_workers": args.num_workers > 0,
        "worker_init_fn": runtime.leave_signals_to_the_trainer,
        "collate_fn": collate,
    }


def _fit_batches(args: argparse.Namespace, images: int) -> None:
    for line in fit_to_images(args, images):
        log(line)
    if not args.batch_size:
        raise UserError(
            f"{images} training image(s) are too few for {runtime.world_size()} process(es), each "
            f"of which needs {2 if is_mixed(args) else 1}; add images, use fewer processes, or "
            "pass --mixup 0 --cutmix 0"
        )


def build_eval_loader(
    args: argparse.Namespace,
    val: Source,
    config: dict[str, Any],
    device: torch.device,
    shared: bool | None = None,
) -> DeviceLoader:
    """Batches of the images of an evaluation, as a model of this data configuration expects them.

    Args:
        shared: whether every image comes once over all processes, or else on each process; None for
            what --dist_eval says.
    """
    batch_size = 2 * args.batch_size  # no activations are kept for a backward pass
    transform, to_network = transforms.eval_transform(config), ToNetwork(config, device)
    loader_keywords = _loader_keywords(args, device)
    if isinstance(val, StreamSource):
        val.stream.transform = Compose([pictures.decode_of_stream, transform])
        stream = Stream(val.stream, loader_keywords | {"batch_size": batch_size}, is_train=False)
        return DeviceLoader(stream, stream, to_network)
    order = EvalBatches(len(val), batch_size, args.dist_eval if shared is None else shared)
    images = TransformedImages(val, transform, seed=None)
    loader = DeviceLoader(
        order, DataLoader(images, batch_sampler=order, **loader_keywords), to_network
    )
    loader.start_workers()
    return loader


def _train_loader(
    train: Source,
    args: argparse.Namespace,
    config: dict[str, Any],
    to_network: ToNetwork,
    loader_keywords: dict[str, Any],
    views: int | None,
    fill: bool,
) -> DeviceLoader:
    if is_augmented(args):
        transform = transforms.train_transform(args, config)
    else:
        transform = transforms.eval_transform(config)
    partial_labels = isinstance(train, ImageSource) and len(train.without_label()) > 0
    mixup = transforms.make_mixup(args, len(train.classes), partial_labels)
    if isinstance(train, StreamSource):
        if views:
            raise UserError(
                f"--teacher_views {views}: needs images in a fixed order, which the stream "
                f"{args.data_set} does not have; use a folder, or leave the flag out"
            )
        train.stream.transform = Compose([pictures.decode_of_stream, transform])
        stream = Stream(
            train.stream, loader_keywords | {"batch_size": args.batch_size}, is_train=True
        )
        return DeviceLoader(stream, stream, to_network, mixup)
    count, batch_size, unit = len(train), args.batch_size, None
    if fill:
        # Cover every image that a later run may show, whatever its batch size; no activations are
        # kept for a backward pass, so twice the batch fits.
        batch_size, unit = 2 * batch_size, mixup.unit if mixup else 1
    order = EpochBatches(count, batch_size, args.data_seed, views, unit)
    images = TransformedImages(train, transform, args.data_seed)
    host_batches = DataLoader(images, batch_sampler=order, **loader_keywords)
    return DeviceLoader(order, host_batches, to_network, mixup)


def image_sample(loader: DeviceLoader, most: int = 16) -> list[float]:
    """A few numbers that tell how the first images of view 0 look: the means of their quarters.

    Two set-ups with the same flags may still differ in their pixels, or in the version of a library
    that augments them.

    Args:
        loader: training batches of an ImageSource.
        most: number of images.
    """
    order, host_batches = loader.order, loader.host_batches
    assert isinstance(order, EpochBatches) and isinstance(host_batches, DataLoader)
    count = min(max(most, loader.mixup.unit if loader.mixup else 1), order.end)
    indices = view_order(order.seed, 0, order.count, range(count)).tolist()
    batch = collate([host_batches.dataset[0, index] for index in indices])
    shown = loader.to_network(batch)
    if loader.mixup is not None:
        shown, _ = loader.mixup(shown, batch.targets.to(shown.device), 0, 0)
    means = F.adaptive_avg_pool2d(shown[:most].float(), 2).flatten()
    return [round(value, 3) for value in means.tolist()]


def _check_shared_memory(args: argparse.Namespace) -> None:
    """Workers pass batches through /dev/shm; a small one (Docker: 64 MB) ends in 'Bus error'."""
    if not args.num_workers or not os.path.isdir("/dev/shm"):
        return
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    batch = 3 * args.input_size**2 * 2 * args.batch_size  # 8-bit pixels of an evaluation batch
    needed = 2 * args.num_workers * batch * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > free:
        raise UserError(
            f"--num_workers {args.num_workers}: their batches may take {needed / 2**20:.0f} MiB of "
            f"/dev/shm, which has {free / 2**20:.0f}; pass --num_workers 0, or docker "
            "--shm-size=8g"
        )
