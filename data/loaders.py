"""From sources of images to batches on the device: workers, collation and loaders."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IterableImageDataset
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from data.mixup import Mixing, PartialLabels
from data.order import BatchOrder, EpochBatches, view_order
from data.pictures import decode_of_stream
from data.sources import ImageSource
from data.transforms import HostBatch, Patches, ToNetwork, ToPixels, collate
from runtime import distributed
from runtime.device import has_streams, send
from runtime.randomness import RandomUse, seed_rng
from utils import UserError


class Batch(NamedTuple):
    """What a network is trained or scored on, and which images of the data those are."""

    # (B, 3, H, W) float32, channels last, on the device; (B, D) features in a linear probe
    images: torch.Tensor
    targets: torch.Tensor  # (B,) int64, or (B, C) probabilities if images are mixed
    view: int  # number of the augmented epoch that the images are from; 0 in an evaluation
    places: range  # positions of the images in the order of the view
    is_labeled: bool = True  # False if some training images have no label

    @property
    def key(self) -> tuple[int, range]:
        """What identifies the images, whoever asks and whenever: (view, places)."""
        return self.view, self.places


class Loader:
    """What the training loop takes: batches in the order of `order`."""

    order: BatchOrder

    @property
    def batches_in_epoch(self) -> int:
        """Batches of this process in a whole epoch."""
        return self.order.batches_in_epoch

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch to begin with if part of the epoch is done."""
        self.order.set_epoch(epoch, first_batch)

    def __iter__(self) -> Iterator[Batch]:
        raise NotImplementedError


READ_ONLY = -1  # the view of images that are only decoded, to see whether they can be


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
            seed_rng(torch.device("cpu"), RandomUse.AUGMENTATION, self.seed, view, index)
        return self.transform(self.source.load(index)), int(self.source.targets[index])


class Stream:
    """One of timm's streams (wds/…, tfds/…, hfids/…), which shuffle and divide images themselves.

    Their order, and so the result, depends on the number of workers.
    """

    def __init__(
        self,
        stream: IterableImageDataset,
        transform: ToPixels,
        batch_size: int,
        keywords: dict[str, Any],
        is_train: bool,
    ) -> None:
        stream.set_loader_cfg(num_workers=keywords["num_workers"])
        stream.transform = Compose([decode_of_stream, transform])
        self.stream, self.batch_size, self.is_train = stream, batch_size, is_train
        self.loader = DataLoader(stream, batch_size, drop_last=is_train, **keywords)
        self.batches_in_epoch = len(self.loader)
        self.view, self.first_batch = 0, 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch; a stream has to be read up to the first batch."""
        self.stream.set_epoch(epoch)
        self.view, self.first_batch = epoch, first_batch

    def places(self, batch: int) -> range:
        """A number for each image of one batch of this rank, none twice in an epoch."""
        start = (batch * distributed.world_size() + distributed.rank()) * self.batch_size
        return range(start, start + self.batch_size)

    def __iter__(self) -> Iterator[HostBatch]:
        # A shard may hold more images than the stream's length says; the schedule has no steps for
        # them.
        stop = self.batches_in_epoch if self.is_train else None
        return itertools.islice(self.loader, self.first_batch, stop)


def one_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, each copied and converted while the device computes on the one before.

    That happens on a stream of its own, so the batch waits for no step and no step for the batch.
    """
    gpu = torch.get_device_module(device)
    stream = gpu.Stream(device)
    stream.wait_stream(gpu.current_stream(device))  # for what the conversion itself needs

    def prepare() -> tuple[Batch, torch.Event] | None:
        with gpu.stream(stream):
            batch = next(batches, None)
            return None if batch is None else (batch, stream.record_event())

    ahead = prepare()
    while ahead is not None:
        batch, converted = ahead
        ahead = prepare()
        current = gpu.current_stream(device)
        current.wait_event(converted)
        for tensor in (batch.images, batch.targets):
            tensor.record_stream(current)  # its memory is not given away before the step is done
        yield batch


class DeviceLoader(Loader):
    """Batches as networks take them: on the device, normalized, erased and mixed.

    Every batch carries its own key, so a caller may fetch batches ahead of their use.

    Args:
        order: gives the places of each batch (EpochBatches, EvalBatches, Stream).
        host_batches: yields the HostBatches in that order.
        to_network: pixels -> network input, on the device.
        mixup: mixes images and targets, see data.mixup.make_mixup; None for no mixing.
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
        device = self.to_network.device
        return one_ahead(self._batches(), device) if has_streams(device) else self._batches()

    def _batches(self) -> Iterator[Batch]:
        view, is_labeled = self.order.view, not isinstance(self.mixup, PartialLabels)
        for number, host in enumerate(self.host(), start=self.order.first_batch):
            images, targets = self.to_network(host), send(host.targets, self.to_network.device)
            places = self.order.places(number)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets, view, places.start)
            yield Batch(images, targets, view, places, is_labeled)

    def host(self) -> Iterator[HostBatch]:
        """The batches as the workers return them.

        Raises: UserError for an image that cannot be read.
        """
        try:
            yield from self.host_batches
        except UserError as error:
            is_stream = isinstance(self.host_batches, Stream)
            hint = "" if is_stream else "; --check_data true lists all such images"
            raise UserError(f"{error}{hint}") from error
        self.is_read = True


def image_sample(loader: DeviceLoader, most: int = 16) -> list[float]:
    """A few numbers that show how the first images of view 0 look: the means of their quarters.

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
