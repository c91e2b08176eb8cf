"""Images in, batches out: data sets, samplers and loaders."""

import argparse
import hashlib
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate
from torchvision.io import decode_jpeg

import transforms
import utils
from transforms import BlockMixup, PairMixup, Patches, ToPixels
from utils import UserError

DIGITS_FILE = Path(__file__).parent / "data" / "digits.npz"
TORCHVISION = {
    "CIFAR": "CIFAR100",
    "CIFAR10": "CIFAR10",
    "MNIST": "MNIST",
    "FashionMNIST": "FashionMNIST",
}
# Native sizes; every other data set is taken for photographs.
NATIVE_SIZE = {"DIGITS": 8, "MNIST": 28, "FashionMNIST": 28, "CIFAR": 32, "CIFAR10": 32}
MIRRORED_CHANGES_MEANING = {"DIGITS", "MNIST"}


# ------------------------------------------------------------------------------------ sources


class ImageSource(Dataset):
    """Images that can be asked for by index, as arrays (H, W, 3) uint8 without any transform.

    Args:
        load: index -> array; a module-level function or a partial of one, so that it pickles.
        targets: (N,) class indices.
        classes: class names, in the order of the indices.
        names: (N,) what tells the images apart, such as their paths; None where nothing does.
    """

    def __init__(
        self,
        load: Callable[[int], np.ndarray],
        targets: Sequence[int],
        classes: Sequence[str],
        names: np.ndarray | None = None,
    ) -> None:
        self.load, self.names = load, names
        # An array, not a list: forked workers would copy a list page by page as they count
        # references to its items, and memory would grow with every worker.
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = [str(name) for name in classes]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.load(index), int(self.targets[index])

    def fingerprint(self) -> dict[str, Any]:
        """What tells two sources apart without reading their images."""
        names = np.arange(len(self)) if self.names is None else self.names
        if names.dtype.kind == "S":  # paths: the same ones may lie in another folder
            outside = len(os.path.commonprefix([names[0], names[-1]]))
            names = names.view("S1").reshape(len(names), -1)[:, outside:]
        return {"images": len(self), "classes": len(self.classes)} | {
            key: hashlib.sha256(content).hexdigest()[:16]
            for key, content in (
                ("class_names", "\0".join(self.classes).encode()),
                ("labels", self.targets.tobytes()),
                ("image_names", names.tobytes()),
            )
        }


def _image_of_array(images: np.ndarray, index: int) -> np.ndarray:
    image = images[index]
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def _image_of_path(paths: np.ndarray, index: int) -> np.ndarray:
    return _decode(path := os.fsdecode(paths[index]), path)


def _image_of_reader(reader: Any, index: int) -> np.ndarray:
    # timm's ImageDataset replaces an image that it can't read by the next one; here it is an error.
    name = reader.filename(index) if hasattr(reader, "filename") else index
    return _decode(reader[index][0], name)


def _decode(file: Any, name: Any) -> np.ndarray:
    """A file, its path or a PIL image -> (H, W, 3) uint8. Raises: UserError that names it."""
    try:
        if isinstance(file, Image.Image):
            return _rgb(file)
        with Image.open(file) as image:  # reads the head alone, and refuses absurd sizes
            if (image.format, image.mode) != ("JPEG", "RGB"):
                return _rgb(image)
            # Pillow's pixels and by the same library, but without its copies: a fifth faster.
            image.fp.seek(0)
            content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
        return decode_jpeg(content).permute(1, 2, 0).numpy()
    except Exception as error:  # the decoders raise a dozen types on damaged files
        raise UserError(
            f"--data_path: can't read the image {name} ({error}); repair it or take it out"
        ) from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        grey = np.asarray(image, dtype=np.float32) * (255 / 65535)
        image = Image.fromarray(np.round(grey.clip(0, 255)).astype(np.uint8))
    return np.array(image.convert("RGB"))


def _digits(is_train: bool) -> ImageSource:
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        chosen = file["is_test"] != is_train
        grey = np.round(file["images"][chosen] * (255 / 16)).astype(np.uint8)
        return ImageSource(
            partial(_image_of_array, grey), file["labels"][chosen], [str(d) for d in range(10)]
        )


def _torchvision(name: str, folder: str, is_train: bool) -> ImageSource:
    data_set = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        # One process of each machine downloads, the others wait and find the files.
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            data_set(folder, train=is_train, download=True)
        utils.barrier()
        data = data_set(folder, train=is_train)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--data_set {name}: not in --data_path {folder}, and the download failed "
            f"({str(error).splitlines()[0]}); put torchvision's {TORCHVISION[name]} files there"
        ) from error
    return ImageSource(partial(_image_of_array, np.asarray(data.data)), data.targets, data.classes)


def _folder(folder: str, flag: str) -> ImageSource:
    if not os.path.isdir(folder):
        raise UserError(
            f"{flag}: {folder} is not a folder; it must hold a folder of images for each class"
        )
    try:
        found = torchvision.datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise UserError(
            f"{flag}: {folder} holds no images, or a class folder in it is empty "
            f"({str(error).splitlines()[0]}); it must hold one folder of images a class"
        ) from error
    paths = np.array([os.fsencode(path) for path, _ in found.samples])  # bytes: see ImageSource
    return ImageSource(partial(_image_of_path, paths), found.targets, found.classes, paths)


def _timm(name: str, args: argparse.Namespace, is_train: bool) -> Dataset:
    """Any data set of timm's `create_dataset`: a folder or tar, hfds/…, hfids/…, tfds/…, wds/…"""
    if name.lower().startswith(("hfds/", "hfids/")):
        _let_timm_import_hugging_face_datasets()
    try:
        data = create_dataset(
            name,
            root=args.data_path,
            split="train" if is_train else "validation",
            is_training=is_train,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    except Exception as error:  # each reader has its own optional package and its own errors
        raise UserError(
            f"--data_set {name}: timm could not open it ({type(error).__name__}: {error}); "
            f"it knows DIGITS, IMNET, image_folder, {', '.join(TORCHVISION)} and timm's readers "
            "hfds/…, hfids/…, tfds/…, wds/… (each with its own package installed)"
        ) from error
    if isinstance(data, IterableDataset):
        if not args.nb_classes:
            raise UserError(
                f"--data_set {name} is a stream, which can't be counted; give --nb_classes"
            )
        data.classes = [str(label) for label in range(args.nb_classes)]
        return data
    reader = data.reader
    if hasattr(reader, "samples"):
        targets = [target for _, target in reader.samples]
    else:  # a table of Hugging Face datasets
        targets = reader.dataset[reader.label_key]
    if class_to_idx := getattr(reader, "class_to_idx", None):
        classes = sorted(class_to_idx, key=class_to_idx.get)
    else:
        classes = [str(label) for label in range(max(targets) + 1)]
    return ImageSource(partial(_image_of_reader, reader), targets, classes)


def _let_timm_import_hugging_face_datasets() -> None:
    """timm's hfds reader says `import datasets` and means Hugging Face's package of that name.

    So that package takes the name in sys.modules over; who imported this file keeps it.
    """
    ours = sys.modules["datasets"]
    if not hasattr(ours, "open_split"):
        return  # it already has
    here, path = Path(__file__).resolve().parent, sys.path[:]
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != here]
    del sys.modules["datasets"]
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        sys.modules["datasets"] = ours
        raise UserError(
            "--data_set hfds/… needs Hugging Face's package: pip install datasets"
        ) from error
    finally:
        sys.path[:] = path


def open_split(args: argparse.Namespace, is_train: bool) -> Dataset:
    """Open the training or the test images that --data_set and --data_path name."""
    if args.data_set == "DIGITS":
        return _digits(is_train)
    if args.data_set in TORCHVISION:
        return _torchvision(args.data_set, args.data_path or "data_cache", is_train)
    if args.data_set == "IMNET":
        return _folder(os.path.join(args.data_path, "train" if is_train else "val"), "--data_path")
    if args.data_set == "image_folder":
        if is_train:
            return _folder(args.data_path, "--data_path")
        return _folder(args.eval_data_path, "--eval_data_path")
    return _timm(args.data_set, args, is_train)


# ----------------------------------------------------------------------------------- subsets


def stratified(targets: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` positions at random with every class in its proportion.

    Returns: (count,) positions, ascending.
    """
    rng = np.random.default_rng([seed, count])
    shuffled = rng.permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    # Every class lies in one run, so evenly spaced picks take each class in proportion.
    picks = (np.arange(count) + rng.random()) * len(targets) / count
    return np.sort(by_class[picks.astype(np.int64)])


def subset(source: ImageSource, positions: np.ndarray) -> ImageSource:
    """Some images of a source; of a subset too."""
    load = partial(_image_of_subset, source, positions)
    names = positions if source.names is None else source.names[positions]
    return ImageSource(load, source.targets[positions], source.classes, names)


def _image_of_subset(source: ImageSource, positions: np.ndarray, index: int) -> np.ndarray:
    return source.load(positions[index])


# -------------------------------------------------------------------------- samplers, loaders


class TransformedImages(Dataset):
    """Images after their transform, whose randomness is a function of (seed, view, index) alone.

    So neither the number of workers nor what was loaded before changes an image. The key of an item
    is the pair (view, index).

    Args:
        seed: None for a transform that draws nothing, as in evaluation.
    """

    def __init__(self, source: ImageSource, transform: ToPixels, seed: int | None) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[np.ndarray, Patches], int]:
        view, index = key
        if self.seed is not None:
            utils.seed_rng(torch.device("cpu"), self.seed, view, index)
        image, target = self.source[index]
        return self.transform(image), target


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """One rank's share of an epoch's shuffled batches, as lists of (view, index).

    Epoch e shows view e mod `views` of the images: so augmented, in this order. Batch b of rank r
    is block b * world + r of the view's permutation, so the images of an optimizer step are the
    same for any split of one global batch over processes and accumulation. The last incomplete
    global batch is left out, as in the family's scripts; each view others.

    Args:
        views: None for a new view every epoch.
        unit: instead of whole global batches, all images but an incomplete unit of so many; the
            processes' numbers of batches then may differ by one.
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
        self.rank, self.world = utils.rank(), utils.world_size()
        self.view, self.first_batch = 0, 0
        self.end = count - count % (unit or batch_size * self.world)  # places that are shown
        blocks = -(-self.end // batch_size)
        self.batches_in_epoch = len(range(self.rank, blocks, self.world))

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch to begin with where a part of it is done."""
        self.view = epoch % self.views if self.views else epoch
        self.first_batch = first_batch

    def places(self, batch: int) -> range:
        """Where this rank's batch stands in the view's order."""
        start = (batch * self.world + self.rank) * self.batch_size
        return range(start, min(start + self.batch_size, self.end))

    def __len__(self) -> int:
        return self.batches_in_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = view_order(self.seed, self.view, self.count).tolist()
        for batch in range(self.first_batch, self.batches_in_epoch):
            yield [(self.view, order[place]) for place in self.places(batch)]


def view_order(seed: int, view: int, count: int) -> np.ndarray:
    """The order in which a view shows the images; (count,) indices."""
    return np.random.default_rng([seed, view]).permutation(count)


class EvalBatches(Sampler[list[tuple[int, int]]]):
    """This rank's batches of an evaluation; over all ranks every image once, without padding."""

    def __init__(self, count: int, batch_size: int, shared: bool) -> None:
        self.count, self.batch_size, self.view = count, batch_size, 0
        self.first, self.step = (utils.rank(), utils.world_size()) if shared else (0, 1)
        self.first_batch, self.batches_in_epoch = (
            0,
            -(-len(range(self.first, count, self.step)) // batch_size),
        )

    def places(self, batch: int) -> range:
        """The images of this rank's batch."""
        mine = range(self.first, self.count, self.step)
        return mine[batch * self.batch_size : (batch + 1) * self.batch_size]

    def __len__(self) -> int:
        return self.batches_in_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(len(self)):
            yield [(0, index) for index in self.places(batch)]


class Stream:
    """One of timm's streams (wds/…, tfds/…, hfids/…), which shuffle and share out themselves. Their
    order, and so the result, depends on the number of workers."""

    def __init__(self, stream: IterableDataset, settings: dict[str, Any], is_train: bool) -> None:
        stream.set_loader_cfg(num_workers=settings["num_workers"])
        self.stream, self.is_train, self.batch_size = stream, is_train, settings["batch_size"]
        self.loader = DataLoader(stream, drop_last=is_train, **settings)
        self.batches_in_epoch = len(self.loader)
        self.view, self.first_batch = 0, 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch; a stream has to be read up to the batch to begin with."""
        self.stream.set_epoch(epoch)
        self.view, self.first_batch = epoch, first_batch

    def places(self, batch: int) -> range:
        """A number for each image of this rank's batch, none twice in an epoch."""
        start = (batch * utils.world_size() + utils.rank()) * self.batch_size
        return range(start, start + self.batch_size)

    def __iter__(self) -> Iterator["HostBatch"]:
        # A shard may hold more than the stream's length says; the schedule has no steps for that.
        stop = self.batches_in_epoch if self.is_train else None
        return itertools.islice(self.loader, self.first_batch, stop)


class HostBatch(NamedTuple):
    """What the workers hand over: pixels, labels, and rectangles to erase once it is normalised."""

    pixels: torch.Tensor  # (B, H, W, 3) uint8
    targets: torch.Tensor  # (B,) int64
    boxes: torch.Tensor  # (E, 5) int64: image, top, left, height, width
    erased: torch.Tensor  # their pixels one after another, float32


def collate(items: list[tuple[tuple[np.ndarray, Patches], int]]) -> HostBatch:
    images, targets = zip(*items, strict=True)
    pixels = default_collate([torch.from_numpy(array) for array, _ in images])  # in shared memory
    patches = [(row, *patch) for row, (_, found) in enumerate(images) for patch in found]
    boxes = torch.tensor([patch[:5] for patch in patches], dtype=torch.int64).view(-1, 5)
    erased = torch.cat([torch.empty(0)] + [patch[5].flatten() for patch in patches])
    return HostBatch(pixels, torch.tensor(targets), boxes, erased)


class DeviceLoader:
    """Batches as networks take them: on the device, normalised, erased and mixed.

    Iterating gives images (B, 3, H, W) float32, channels last, and targets (B,) int64, or (B, C)
    where they are mixed. Meanwhile `view` and `places` tell which images the last batch holds.

    Args:
        batches: tells the places of each batch (EpochBatches, EvalBatches, Stream).
        loader: gives their HostBatches.
        config: the data configuration with mean and std of RGB in 0…1.
    """

    def __init__(
        self,
        batches: Any,
        loader: Any,
        config: dict[str, Any],
        device: torch.device,
        mixup: BlockMixup | PairMixup | None = None,
    ) -> None:
        self.batches, self.loader, self.device, self.mixup = batches, loader, device, mixup
        mean, std = (torch.tensor(config[name], device=device) for name in ("mean", "std"))
        rows = (v.repeat(config["input_size"]) for v in (1 / (255 * std), -mean / std))
        self.scale, self.shift = rows  # (W * 3,) each
        self.places = range(0)

    @property
    def batches_in_epoch(self) -> int:
        return self.batches.batches_in_epoch

    @property
    def view(self) -> int:
        return self.batches.view

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch to begin with where a part of it is done."""
        self.batches.set_epoch(epoch, first_batch)

    def __len__(self) -> int:
        return len(self.loader)

    def sample(self, most: int = 16) -> list[float]:
        """A few numbers that tell how view 0's first images come out: means of their quarters."""
        batches, images = self.batches, self.loader.dataset
        count = min(max(most, self.mixup.unit if self.mixup else 1), batches.end)
        order = view_order(batches.seed, 0, batches.count)[:count].tolist()
        batch = collate([images[0, index] for index in order])
        shown = self._images(batch)
        if self.mixup is not None:
            shown, _ = self.mixup(shown, batch.targets.to(self.device), 0, 0)
        means = F.adaptive_avg_pool2d(shown[:most].float(), 2).flatten()
        return [round(value, 3) for value in means.tolist()]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number, batch in enumerate(self.loader, start=self.batches.first_batch):
            images = self._images(batch)
            targets = batch.targets.to(self.device, non_blocking=True)
            self.places = self.batches.places(number)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets, self.view, self.places.start)
            yield images, targets

    def _images(self, batch: HostBatch) -> torch.Tensor:
        pixels = batch.pixels.to(self.device, non_blocking=True)  # (B, H, W, 3) uint8
        # Whole rows at once: along three channels the loops would be too short. And in place:
        # fetching fresh memory for a second copy costs ten times the arithmetic.
        rows = pixels.flatten(2).float()  # (B, H, W * 3)
        torch.addcmul(self.shift, rows, self.scale, out=rows)
        images = rows.view(pixels.shape).permute(0, 3, 1, 2)  # channels last
        if len(batch.boxes):
            areas = batch.boxes[:, 3:].prod(dim=1)
            is_plain = batch.erased.numel() == 3 * len(areas)  # a colour for each rectangle
            lengths = [3] * len(areas) if is_plain else (3 * areas).tolist()
            erased = batch.erased.to(self.device, non_blocking=True).split(lengths)
            for (row, top, left, height, width), values in zip(
                batch.boxes.tolist(), erased, strict=True
            ):
                shape = (3, 1, 1) if is_plain else (3, height, width)
                images[row, :, top : top + height, left : left + width] = values.view(shape)
        return images


@dataclass
class Data:
    """The loaders of a run and what its checkpoints remember of the data."""

    train_loader: DeviceLoader
    val_loader: DeviceLoader | None  # None where nothing is evaluated
    train: Dataset
    val: Dataset | None
    classes: list[str]
    config: dict[str, Any]


def build_data(args: argparse.Namespace, device: torch.device) -> Data:
    """Open both splits, check that they belong together, and make the loaders.

    Raises: UserError for what is missing, empty, mismatched or too small.
    """
    train, val = _open_splits(args)
    config = transforms.data_config(args) | {"classes": train.classes}
    settings = {
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and device.type == "cuda",
        "persistent_workers": args.num_workers > 0,
        "worker_init_fn": utils.leave_signals_to_the_trainer,
        "collate_fn": collate,
    }
    _check_shared_memory(args, settings["num_workers"])
    train_loader = _train_loader(train, args, config, device, settings)
    val_loader = None
    if val is not None:
        transform = transforms.eval_transform(config)
        batch_size = 2 * args.batch_size  # nothing is kept for a backward pass
        if isinstance(val, IterableDataset):
            val.transform = transform
            batches = loader = Stream(val, settings | {"batch_size": batch_size}, is_train=False)
        else:
            batches = EvalBatches(len(val), batch_size, args.dist_eval)
            images = TransformedImages(val, transform, seed=None)
            loader = DataLoader(images, batch_sampler=batches, **settings)
        val_loader = DeviceLoader(batches, loader, config, device)
    return Data(train_loader, val_loader, train, val, train.classes, config)


def _open_splits(args: argparse.Namespace) -> tuple[Dataset, Dataset | None]:
    train = open_split(args, is_train=True)
    val = None
    if isinstance(train, ImageSource):
        if args.holdout:
            _check_at_most("--holdout", args.holdout, len(train) - 1)
            # Of no seed: a teacher and its students must hold out the same images.
            held_out = stratified(train.targets, args.holdout, seed=0)
            val = subset(train, held_out)
            train = subset(train, np.setdiff1d(np.arange(len(train)), held_out))
        if args.train_samples:
            _check_at_most("--train_samples", args.train_samples, len(train))
            train = subset(train, stratified(train.targets, args.train_samples, args.seed))
    elif args.holdout or args.train_samples:
        raise UserError(f"--holdout and --train_samples can't divide the stream {args.data_set}")
    if val is None and (args.eval or not args.disable_eval):
        val = open_split(args, is_train=False)
        _check_same_classes(train.classes, val.classes)
    if args.nb_classes and args.nb_classes != len(train.classes):
        raise UserError(
            f"--nb_classes {args.nb_classes}: the data has {len(train.classes)} classes; "
            "leave the flag out, they are counted"
        )
    return train, val


def _train_loader(
    train: Dataset,
    args: argparse.Namespace,
    config: dict[str, Any],
    device: torch.device,
    settings: dict[str, Any],
) -> DeviceLoader:
    transform = transforms.train_transform(args, config)
    mixup = transforms.make_mixup(args, len(train.classes), len(train))
    if isinstance(train, IterableDataset):
        if args.teacher_cache or args.teacher_views:
            raise UserError(
                f"--teacher_cache and --teacher_views need images with a fixed order, which the "
                f"stream {args.data_set} has not; give a folder, or leave them out"
            )
        train.transform = transform
        stream = Stream(train, settings | {"batch_size": args.batch_size}, is_train=True)
        return DeviceLoader(stream, stream, config, device, mixup)
    count, batch_size, unit = len(train), args.batch_size, None
    if args.teacher_cache_only:  # whatever a later run of other batches and processes may show
        batch_size, unit = 2 * batch_size, mixup.unit if mixup else 1
    elif batch_size * utils.world_size() > count and not args.eval:
        raise UserError(
            f"--batch_size {batch_size} on {utils.world_size()} process(es) is more than the "
            f"{count} training images; give at most {count // utils.world_size()}"
        )
    batches = EpochBatches(count, batch_size, args.seed, args.teacher_views, unit)
    images = TransformedImages(train, transform, args.seed)
    loader = DataLoader(images, batch_sampler=batches, **settings)
    return DeviceLoader(batches, loader, config, device, mixup)


def _check_at_most(flag: str, value: int, most: int) -> None:
    if value > most:
        raise UserError(f"{flag} {value}: only {most} training images can be given; lower it")


def _check_same_classes(train: list[str], val: list[str]) -> None:
    if train == val:
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    raise UserError(
        "--data_path: training and validation data have different classes "
        f"(only in training: {', '.join(only_train[:3]) or 'none'}; "
        f"only in validation: {', '.join(only_val[:3]) or 'none'}); give both the same folders"
    )


def _check_shared_memory(args: argparse.Namespace, workers: int) -> None:
    """Workers hand batches over in /dev/shm; a small one (Docker: 64 MB) ends in 'Bus error'."""
    if not workers or not os.path.isdir("/dev/shm"):
        return
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    batch = 3 * args.input_size**2 * 2 * args.batch_size  # 8-bit pixels; an evaluation's
    needed = 2 * workers * batch * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > free:
        raise UserError(
            f"--num_workers {workers}: their batches may take {needed / 2**20:.0f} MiB of "
            f"/dev/shm, which has {free / 2**20:.0f}; give --num_workers 0, or docker --shm-size=8g"
        )
