"""A linear probe: only the classifier is trained, on features of a backbone that never changes."""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from arguments.derived import is_augmented
from data.checks import with_progress
from data.loaders import Batch, DeviceLoader, Loader
from data.order import EpochBatches
from data.sources import ImageSource
from datasets import Data
from models import classifier_of, classifiers_of
from runtime import distributed
from runtime.device import has_streams, send
from runtime.distributed import log
from training.settings import LoopSettings
from utils import UserError

IMAGES_AT_ONCE = 65536  # of whose features processes exchange in one message


def freeze_backbone(network: nn.Module, arch: str, input_size: int) -> None:
    """Let only the classifier of a timm network be trained, which then maps its features.

    Raises: UserError for a network without a classifier, or whose classifier does not map the
        features that timm's `forward_head(…, pre_logits=True)` returns to the network's output.
    """
    classifiers = classifiers_of(network)
    if len(classifiers) != 1:
        has = "several classifiers" if classifiers else "no classifier"
        raise UserError(
            f"{arch}: has {has}, and a linear probe trains a single one; use another architecture",
            "architecture",
        )
    if not _maps_features(network, classifiers[0], input_size):
        raise UserError(
            f"{arch}: the output is not the classifier of the features that timm returns, so a "
            "linear probe cannot train the classifier alone; use another architecture",
            "architecture",
        )
    network.requires_grad_(False)
    classifiers[0].requires_grad_(True)


@torch.no_grad()
def _maps_features(network: nn.Module, classifier: nn.Module, size: int) -> bool:
    """Whether the head of the features is the output of the network, but for rounding."""
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    was_training = network.training
    network.eval()
    try:
        # Some networks start with a classifier of zeros, with which all features would agree.
        for parameter in classifier.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        images = torch.linspace(-2, 2, 2 * 3 * size**2).view(2, 3, size, size)
        images = images.to(next(network.parameters()).device)
        expected = network(images)
        logits = head_of(network)(features_of(network, images))
        if logits.shape != expected.shape:
            return False
        difference = (logits - expected).abs().max()
        return bool(difference <= 0.01 * expected.abs().max())  # TF32 rounds to a thousandth
    except (AttributeError, TypeError, RuntimeError):  # timm's two methods are missing or differ
        return False
    finally:
        classifier.load_state_dict(before)
        network.train(was_training)


def features_of(network: Any, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, D): what the classifier of a timm network takes."""
    return network.forward_head(network.forward_features(images), pre_logits=True)


def head_of(network: nn.Module) -> nn.Module:
    """The classifier of a network as a map from features (B, D) to logits (B, C)."""
    classifier = classifier_of(network)
    if isinstance(classifier, nn.Conv2d):  # timm's use_conv: a convolution of 1 x 1 pixels
        unflatten = nn.Unflatten(1, (classifier.in_channels, 1, 1))
        return nn.Sequential(unflatten, classifier, nn.Flatten())
    return classifier


class TrainedClassifier(nn.Module):
    """The part of a network that a linear probe trains; an engine.TrainedModel.

    The backbone stays in eval mode and runs without gradient: BatchNorm statistics and dropout are
    left as they are in an evaluation.

    Args:
        student: a network after `freeze_backbone`.
        takes_features: whether it is called with features (B, D) instead of images (B, 3, H, W).
    """

    def __init__(self, student: nn.Module, takes_features: bool) -> None:
        super().__init__()
        self.student, self.takes_features = student, takes_features
        head = head_of(student)
        # Only the classifier has gradients to exchange.
        self.head = head
        if distributed.world_size() > 1:
            weight = next(p for p in head.parameters() if p.ndim > 1)  # (…, D, …)
            zeros = weight.new_zeros(2, weight.shape[1])
            self.head = distributed.exchange_gradients(head, zeros)

    def train(self, mode: bool = True) -> "TrainedClassifier":
        """Put the classifier in that mode; the backbone stays in eval mode."""
        super().train(False)
        self.head.train(mode)
        return self

    def forward(
        self, inputs: torch.Tensor, key: tuple[int, range] | None = None
    ) -> tuple[torch.Tensor, None]:
        """Images or features -> (student_logits (B, C), no teacher_logits)"""
        if not self.takes_features:
            with torch.no_grad():
                inputs = features_of(self.student, inputs)
        return self.head(inputs), None

    def no_sync(self) -> AbstractContextManager:
        """DistributedDataParallel's `no_sync` for accumulation steps; nothing on one process."""
        head = self.head
        return head.no_sync() if isinstance(head, DistributedDataParallel) else nullcontext()


class FeatureLoader(Loader):
    """Batches of features in the order in which `order` would show the images.

    Args:
        features: (N, D) of all training images, on the device.
        targets: (N,) int64, on the device.
    """

    def __init__(self, order: EpochBatches, features: torch.Tensor, targets: torch.Tensor) -> None:
        self.order: EpochBatches = order
        self.features, self.targets = features, targets

    def __iter__(self) -> Iterator[Batch]:
        view, device = self.order.view, self.features.device
        for number, batch in enumerate(self.order, start=self.order.first_batch):
            index = send(torch.tensor([image for _, image in batch]), device)
            yield Batch(self.features[index], self.targets[index], view, self.order.places(number))


@dataclass
class Features:
    """The features of a run's images, which take the place of its loaders."""

    train: FeatureLoader
    val: list[Batch] | None  # of this process; None without validation images


def compute_features(
    args: argparse.Namespace, settings: LoopSettings, data: Data, student: nn.Module
) -> Features | None:
    """Run the backbone once on every image; the processes share the work. Collective.

    With --use_amp the backbone computes in mixed precision, as in every evaluation; features are
    kept in float32.

    Returns: None if the images change from epoch to epoch, or if they come from a stream; the
        backbone then runs in each step.
    Raises: UserError if the features would not fit into memory.
    """
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    line = f"Linear probe: {trained:,} parameters are trained, those of the classifier"
    if data.feature_loader is None:
        why = "images are augmented" if is_augmented(args) else "a stream has no fixed order"
        log(f"{line}; {why}, so the backbone runs in every step")
        return None
    assert isinstance(data.train, ImageSource)
    assert isinstance(data.train_loader.order, EpochBatches)
    started = time.monotonic()
    device, loader = settings.device, data.feature_loader
    features = torch.empty(0)
    for batch in with_progress(
        _features(loader, student, settings), len(loader), "the training images"
    ):
        if not len(features):
            width = batch.images.shape[1]
            val_images = 0 if data.val is None else len(data.val)
            _check_memory(len(data.train), val_images, width, device)
            features = torch.zeros(len(data.train), width, device=device)  # (N, D)
        places = batch.places
        features[places.start : places.stop : places.step] = batch.images
    # Each process has computed the rows of its own images; the others are zeros.
    for part in features.split(IMAGES_AT_ONCE):
        distributed.all_reduce_(part)
    data.feature_loader = None  # its workers end
    val = None
    if data.val_loader is not None and not args.disable_eval:
        batches = _features(data.val_loader, student, settings)
        val = list(with_progress(batches, len(data.val_loader), "the validation images"))
    if not all(part.isfinite().all() for part in [features, *(b.images for b in val or ())]):
        raise UserError(
            "--linear_probe true: the backbone's features hold NaN or infinity; start from "
            "different weights, or without --use_amp true"
        )
    targets = torch.as_tensor(data.train.targets, dtype=torch.int64, device=device)
    shown = f"{len(features)} training" + (f" and {len(data.val or ())} validation" if val else "")
    log(
        f"{line}. Features of {shown} images: {features.shape[1]} numbers per image, "
        f"{features.nbytes / 2**20:.1f} MiB for training, {time.monotonic() - started:.1f} s"
    )
    return Features(FeatureLoader(data.train_loader.order, features, targets), val)


@torch.inference_mode()
def _features(loader: DeviceLoader, student: nn.Module, settings: LoopSettings) -> Iterator[Batch]:
    """The batches of a loader with features (B, D) float32 instead of images."""
    student.eval()
    for batch in loader:
        with settings.autocast():
            features = features_of(student, batch.images)
        yield batch._replace(images=features.float())


def _check_memory(images: int, val_images: int, width: int, device: torch.device) -> None:
    """Raise UserError if the features of the processes of this machine do not fit."""
    if has_streams(device):
        free: int | None = torch.get_device_module(device).mem_get_info(device)[0]
        processes = 1
    else:
        free, processes = free_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = (images * processes + val_images) * width * 4
    if free is not None and needed > 0.9 * free:
        raise UserError(
            f"--linear_probe true: the features of {images:,} images, {width} numbers per image on "
            f"each of {processes} process(es), take {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB of {device.type} memory are free; pass --train_samples N, or "
            "an augmentation flag such as --hflip 0.5, with which no features are kept"
        )


def free_memory() -> int | None:
    """Bytes of host memory that this process can still take; None if it cannot be known.

    What Linux calls available, or what the limit of the control group (of a container) leaves.
    """
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup")
        if (limit := (group / "memory.max").read_text().strip()) != "max":
            limits.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        pass  # not Linux, or no control group of version 2
    return min(limits, default=None)
