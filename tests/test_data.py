"""Images: the right label on each, each exactly once, the same whatever the machine does."""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import tracemalloc
from collections import Counter
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import Group, program, script
from helpers import CPU, QUICK, ROOT, evaluation_images, teacher_flags, write_images
from PIL import ExifTags, Image, ImageOps
from timm.data import IterableImageDataset
from timm.data import mixup as timm_mixup
from timm.data.auto_augment import rand_augment_transform
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, Resize

import datasets
import main
from arguments.parsing import parse_args
from data import augment, jpegs, loaders, mixup, pictures, transforms
from data.checks import check_images
from data.mixup import PAIRS_AT_ONCE, MixingSettings, PairMixup
from data.order import EpochBatches, EvalBatches, view_order
from data.readers import digits, image_folder
from data.sources import (
    FileSource,
    Joined,
    StreamSource,
    Subset,
    forget_other_labels,
    stratified,
)
from runtime import distributed
from runtime.randomness import RandomUse, seed_rng, seed_sequence
from utils import UserError


def parsed(*flags: object) -> argparse.Namespace:
    return parse_args(["--num_workers", "0", "--batch_size", "16", *map(str, flags)])


def train_transform(args: argparse.Namespace) -> transforms.ToPixels:
    augmentation = datasets.from_flags(transforms.Augmentation, args)
    return transforms.train_transform(augmentation, datasets.data_config(args))


def make_mixup(args: argparse.Namespace, num_classes: int) -> mixup.Mixing:
    settings = datasets.from_flags(MixingSettings, args)
    batch_size, seed = args.batch_size, args.data_seed
    return mixup.make_mixup(settings, num_classes, batch_size=batch_size, seed=seed)


def test_the_digits_are_1437_and_360_in_the_proportions_of_their_classes():
    train, test = digits(True), digits(False)
    assert (len(train), len(test)) == (1437, 360)
    share = np.bincount(train.targets) / len(train) - np.bincount(test.targets) / len(test)
    assert np.abs(share).max() < 0.005
    image, target = train[0]
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8 and 0 <= target < 10


def test_a_subset_of_a_subset_keeps_every_image_with_its_label():
    source = digits(True)
    first = stratified(source.targets, 100, seed=1)
    second = stratified(source.targets[first], 30, seed=2)
    nested = Subset(Subset(source, first), second)
    for index, position in enumerate(first[second]):
        image, target = nested[index]
        expected, label = source[position]
        assert np.array_equal(image, expected) and target == label


def test_sources_of_every_kind_pickle(imnet):
    """As a loader's workers need it that are not forked."""
    files = image_folder(str(imnet / "train"))
    source = Joined(Subset(files, np.array([20, 3])), digits(True))
    again = pickle.loads(pickle.dumps(forget_other_labels(source, np.array([0]))))
    assert again.identity()["image_names"] == source.identity()["image_names"]
    assert again.targets[:3].tolist() == [2, 3, 3] and source.targets[:2].tolist() == [2, 0]
    for index in (0, 1, 2, 1000):
        assert np.array_equal(again[index][0], source[index][0])
    assert again.path(1) == files.path(3) and again.path(2) == ""


@pytest.mark.parametrize("count", [10, 37, 200, 1437])
def test_stratified_samples_are_distinct_and_proportional(count):
    targets = digits(True).targets
    chosen = stratified(targets, count, seed=5)
    assert len(set(chosen.tolist())) == count
    wanted = np.bincount(targets) * count / len(targets)
    assert np.abs(np.bincount(targets[chosen], minlength=10) - wanted).max() <= 1


def test_stratified_samples_follow_the_seed_alone():
    targets = digits(True).targets
    same = [stratified(targets, 50, seed=3) for _ in range(2)]
    assert np.array_equal(*same)
    assert not np.array_equal(same[0], stratified(targets, 50, seed=4))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_global_batch_holds_the_same_images_at_any_world_size(world, monkeypatch):
    """More images than are put into order at once."""
    steps = {}
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        batches = EpochBatches(10_000, 240 // world, seed=7)
        batches.set_epoch(3)
        for step, keys in enumerate(batches):
            assert all(view == 3 for view, _ in keys)
            steps.setdefault(step, []).extend(index for _, index in keys)
    order = view_order(7, 3, 10_000)
    assert len(steps) == 41
    for step, indices in steps.items():
        assert sorted(indices) == sorted(order[240 * step : 240 * (step + 1)].tolist())


@pytest.mark.parametrize(("count", "batch_size"), [(90, 50), (99, 50), (7, 4), (64, 16), (65, 33)])
@pytest.mark.parametrize("views", [2, 3, 4, None])
def test_a_few_views_show_every_image(count, batch_size, views):
    """What does not fill a batch is left out of a view, but never of two neighbors."""
    batches = EpochBatches(count, batch_size, seed=3, views=views)
    shown = []
    for epoch in range(4):
        batches.set_epoch(epoch)
        shown.append({index for batch in batches for _, index in batch})
        assert len(shown[-1]) == count - count % batch_size
    assert shown[0] | shown[1] == set(range(count))
    if views in (4, None):
        assert shown[2] | shown[3] == set(range(count))


def test_every_view_is_a_permutation_in_which_each_image_may_be_anywhere():
    places = np.zeros((10, 10), int)  # by image and place
    for seed in range(400):
        order = view_order(seed, 1, 10)
        assert sorted(order) == list(range(10))
        places[order, np.arange(10)] += 1
    assert np.abs(places - 40).max() < 4.5 * (40 * 0.9) ** 0.5


@pytest.mark.parametrize("view", [0, 1])
def test_the_order_of_a_view_is_a_permutation_at_every_size(view):
    for count in [*range(1, 130), 1023, 1024, 1025, 65_536, 100_003]:
        order = view_order(5, view, count)
        assert np.array_equal(np.sort(order), np.arange(count)), count
    some = np.array([99_999, 0, 50_001, 50_000, 50_002])
    assert np.array_equal(view_order(5, view, 100_003, some), order[some])


def test_orders_of_many_seeds_are_as_even_as_shuffles():
    """Chi-squared over whole orders and over neighbors, within 4.5 standard deviations."""
    for count, seeds, places in ((4, 720, 4), (7, 630, 2)):
        found = Counter(tuple(view_order(seed, 0, count)[:places]) for seed in range(seeds))
        cells = math.perm(count, places)
        mean = seeds / cells
        squares = sum((number - mean) ** 2 for number in found.values())
        squares += (cells - len(found)) * mean**2
        freedom = cells - 1
        assert abs(squares / mean - freedom) < 4.5 * (2 * freedom) ** 0.5, (count, found)


def test_neighboring_views_and_seeds_have_unrelated_orders():
    """By chance one of 10,000 images is at its place in both, and one has its follower in both."""
    orders = [view_order(seed, view, 10_000) for seed in (0, 1) for view in (0, 1, 2, 3)]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 8
        followers = [dict(zip(order[:-1], order[1:], strict=True)) for order in (a, b)]
        assert sum(followers[0].get(x) == y for x, y in followers[1].items()) < 8


def test_an_epoch_of_a_billion_images_begins_without_their_list():
    mixup = pair_mixup()
    tracemalloc.start()
    batches = EpochBatches(10**9, 256, seed=0)
    batches.set_epoch(1, first_batch=batches.batches_in_epoch // 2)
    indices = [index for _, index in next(iter(batches))]
    numbers = mixup.draw(1, range(5 * 10**8 - 128, 5 * 10**8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20
    assert len(set(indices)) == 256 and max(indices) < 10**9 and numbers.shape == (7, 128)


@pytest.mark.parametrize("world", [1, 3, 8])
def test_evaluation_batches_hold_every_image_once(world, monkeypatch):
    seen = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        for batch in EvalBatches(101, 16, shared=True):
            seen += [index for _, index in batch]
    assert sorted(seen) == list(range(101))


def test_augmented_images_do_not_depend_on_the_number_of_workers():
    epochs = []
    for workers in (0, 1, 3):
        args = parsed("--train_samples", 64, "--num_workers", workers)
        loader = datasets.build_data(args, CPU).train_loader
        loader.set_epoch(2)
        epochs.append([batch.images for batch in loader])
    for other in epochs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(epochs[0], other, strict=True))
    loader.set_epoch(3)
    assert not torch.equal(epochs[0][0], next(iter(loader)).images)


def test_full_strength_posterize_does_not_end_an_epoch():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    args = parsed()
    train_transform(args)
    augment = rand_augment_transform("rand-m10-n2-inc1", {"translate_const": 3})
    posterize = [op for op in augment.ops if op.name.startswith("Posterize")]
    assert posterize
    for op in posterize:
        op.prob, op.magnitude = 1.0, 10
        assert op(image).size == (8, 8)


@pytest.mark.parametrize("size", [8, 28, 32, 48, 64, 96])
def test_both_transforms_give_the_size_asked_for(size):
    args = parsed("--input_size", size, "--model", "cifar_resnet8")
    config = datasets.data_config(args)
    for shape in ((8, 8), (70, 50)):
        image = Image.new("RGB", shape, (120, 30, 200))
        for transform in (
            train_transform(args),
            transforms.eval_transform(config),
        ):
            for given in (image, np.array(image)):  # a stream's, and any other source's
                pixels, _ = transform(given)
                assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8


def test_small_images_are_evaluated_whole_and_normalized():
    data = datasets.build_data(parsed(), CPU)
    shown, targets, *_ = next(iter(data.val_loader))
    source = digits(False)
    mean, std = (torch.tensor(data.config[key]).view(3, 1, 1) for key in ("mean", "std"))
    for row in (0, 7, 31):
        image, target = source[row]
        pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
        torch.testing.assert_close(shown[row], (pixels - mean) / std)
        assert targets[row] == target


def test_without_augmentation_training_images_are_as_in_an_evaluation():
    data = datasets.build_data(parsed("--no_aug", "true"), CPU)
    data.train_loader.set_epoch(3)
    batch = next(iter(data.train_loader))
    mean, std = (torch.tensor(data.config[key]).view(3, 1, 1) for key in ("mean", "std"))
    shown = ((batch.images * std + mean) * 255).round().byte().permute(0, 2, 3, 1)
    originals = {image.tobytes(): label for image, label in digits(True)}
    labels = [originals.get(image.numpy().tobytes()) for image in shown]
    assert labels == batch.targets.tolist()


class Complete(argparse.Namespace):
    """Arguments that refuse to change, but for the learning rate, which follows the network."""

    def __setattr__(self, name: str, value: object) -> None:
        assert name == "lr" and self.lr is None, f"--{name} changes after the data is open"
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    "flags", ["--holdout 9 --use_amp true --report report", "--disable_eval true", "--kd_alpha 1"]
)
def test_the_arguments_of_a_run_stay_as_they_are_once_the_data_is_open(
    flags, run_main, kd, monkeypatch, tmp_path
):
    build = main.build_data

    def build_data(args: argparse.Namespace, device: torch.device) -> datasets.Data:
        data = build(args, device)
        args.__class__ = Complete
        return data

    monkeypatch.setattr(main, "build_data", build_data)
    monkeypatch.chdir(tmp_path)
    short = ["--train_samples", 32, "--epochs", 1, *flags.split()]
    run = run_main(*kd, *short, output_dir=tmp_path / "out")
    assert run.code == 0 and run.checkpoint(0)["args"]["lr"] > 0, run.err


def test_digits_are_not_mirrored_by_default_and_photographs_are():
    assert parsed().hflip == 0
    assert parsed("--data_set", "CIFAR10").hflip == 0.5


def test_an_image_folder_gives_each_image_its_folders_class(imnet):
    source = image_folder(str(imnet / "train"))
    assert source.classes == ["ant", "bee", "cat"] and len(source) == 24
    for index in (0, 9, 23):
        image, target = source[index]
        assert abs(image.mean() - (60 * target + 31.5)) < 10


def test_a_folder_lists_what_torchvisions_image_folder_lists(tmp_path):
    """In its order, and with the hashes of names and labels that earlier checkpoints hold."""
    for name in (
        "b/1.jpg",
        "b/10.PNG",
        "b/2.jpg",
        "a/z/deep/1.jpg",
        "a/z.jpg",
        "a/é.webp",
        "c/x.bmp",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    expected = ImageFolder(tmp_path)
    names = np.array([os.fsencode(os.path.relpath(p, tmp_path)) for p, _ in expected.samples])
    source = image_folder(str(tmp_path))
    assert source.classes == expected.classes and source.targets.tolist() == expected.targets
    chosen = np.array([1, 4, 6])
    for found, wanted in ((source, names), (Subset(source, chosen), names[chosen])):
        assert np.array_equal(found.names(np.arange(len(found))), wanted)
        assert found.identity()["image_names"] == hashlib.sha256(wanted).hexdigest()[:16]
    with pytest.raises(UserError, match=f"cannot read the image {tmp_path}/b/2.jpg "):
        source[5]


def test_timms_own_readers_give_images_and_classes(imnet):
    args = parsed("--data_set", "folder", "--data_path", imnet)
    source = datasets.open_split(args, is_train=False)
    assert source.classes == ["ant", "bee", "cat"] and len(source) == 9
    assert np.bincount(source.targets).tolist() == [3, 3, 3]
    assert source[8][0].shape == (40, 32, 3)
    (imnet / "val" / "cat" / "2.jpg").unlink()
    with pytest.raises(UserError, match="cannot read the image .*2.jpg .*No such file"):
        source[8]


def test_a_corrupt_image_is_named_even_from_a_worker(imnet):
    broken = imnet / "train" / "bee" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    args = parsed("--data_path", imnet, "--input_size", 32, "--num_workers", 1, "--batch_size", 8)
    loader = datasets.build_data(args, CPU).train_loader
    loader.set_epoch(0)
    with pytest.raises(UserError) as caught:
        list(loader)
    message = str(caught.value)
    assert str(broken) in message and "Traceback" not in message


def test_holdout_images_are_not_trained_on():
    data = datasets.build_data(parsed("--holdout", 100), CPU)
    assert len(data.train) == 1337 and len(data.val) == 100
    train, val = data.train, data.val
    source = digits(True)
    held_out = stratified(source.targets, 100, seed=0)
    assert np.array_equal(val.targets, source.targets[held_out])
    assert len(train) == 1337 and np.array_equal(val[0][0], source[held_out[0]][0])


def test_classes_that_a_subset_leaves_without_an_image_are_named(capsys):
    train = datasets.build_data(parsed("--train_samples", 5), CPU).train
    missing = sorted(set(range(10)) - set(train.targets.tolist()))
    names = ", ".join(map(str, missing))
    told = f"classes without a training image: {len(missing)} of 10 ({names})"
    assert len(missing) >= 5 and told in capsys.readouterr().out
    datasets.build_data(parsed("--train_samples", 100), CPU)
    assert "no training image" not in capsys.readouterr().out


def test_classes_that_differ_between_train_and_val_are_told(tmp_path):
    write_images(tmp_path / "train", ["ant", "bee"])
    write_images(tmp_path / "val", ["ant", "wasp"])
    with pytest.raises(UserError, match="only in training: bee; only in validation: wasp"):
        datasets.build_data(parsed("--data_path", tmp_path), CPU)


def test_every_kind_of_picture_becomes_rgb_and_right(tmp_path):
    gray = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    color = np.stack([gray, gray[::-1], 255 - gray], axis=2)
    cases = {
        "gray.png": (Image.fromarray(gray), gray),
        "16-bit.png": (Image.fromarray(gray.astype(np.uint16) * 257), gray),
        "rgb.png": (Image.fromarray(color), color),
        "alpha.png": (Image.fromarray(np.dstack([color, gray])), on_white(color, gray)),
        "opaque.png": (Image.fromarray(np.dstack([color, gray | 255])), color),
        "palette.png": (Image.fromarray(color).quantize(256), color),
        "cmyk.tif": (Image.fromarray(color).convert("CMYK"), color),
        "one-bit.png": (Image.fromarray(gray > 100), np.uint8(255) * (gray > 100)),
    }
    for name, (picture, expected) in cases.items():
        picture.save(tmp_path / name)
        with Image.open(tmp_path / name) as image, open(tmp_path / name, "rb") as file:
            answers = [pictures.decode(given, name) for given in (tmp_path / name, image, file)]
        assert all(np.array_equal(answer, answers[0]) for answer in answers), name
        shown = answers[0].astype(int)
        expected = expected if expected.ndim == 3 else np.repeat(expected[:, :, None], 3, axis=2)
        assert np.abs(shown - expected).max() <= (12 if "palette" in name else 1), name


def on_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(H, W, 3) and (H, W) uint8 -> (H, W, 3) uint8"""
    share = alpha[:, :, None] / 255
    return np.round(color * share + 255 * (1 - share)).astype(np.uint8)


def transparent_logo(folder: Path) -> tuple[list[Path], np.ndarray]:
    """One picture of two colors in every format with transparency, and how a browser shows it."""
    color = np.zeros((16, 24, 3), np.uint8)  # black below what is transparent
    color[4:12, 4:20] = 200, 30, 60
    alpha = (color[:, :, 0] > 0) * np.uint8(255)
    picture = Image.fromarray(np.dstack([color, alpha]))
    names = ["rgba.png", "rgba.webp", "rgba.tif", "palette.png", "palette.gif", "one-color.png"]
    for name in names:
        palette = Image.fromarray(alpha // 255).convert("P")
        palette.putpalette([0, 0, 0, 200, 30, 60])
        saved, options = {
            "rgba": (picture, {}),
            "palette": (palette, {"transparency": 0}),
            "one-color": (Image.fromarray(color), {"transparency": (0, 0, 0)}),
        }[name.split(".")[0]]
        saved.save(folder / name, **options, **({"lossless": True} if "webp" in name else {}))
    return [folder / name for name in names], on_white(color, alpha)


def test_what_is_transparent_is_white_and_hides_no_color(tmp_path):
    paths, expected = transparent_logo(tmp_path)
    for path in paths:
        np.testing.assert_array_equal(pictures.decode(path, path), expected, str(path))


def photographs_of_a_phone(folder: Path) -> list[tuple[Path, Image.Image]]:
    """Files of every EXIF orientation in several formats, and the upright picture of each."""
    found = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        for ending in ("jpg", "png", "webp", "tif"):
            path = folder / f"{orientation}.{ending}"
            photograph(orientation, (40, 24)).save(path, exif=exif)
            with Image.open(path) as picture:
                found.append((path, ImageOps.exif_transpose(picture)))
    return found


def test_photographs_of_a_phone_are_upright(tmp_path):
    for path, expected in photographs_of_a_phone(tmp_path):
        assert expected.size == ((24, 40) if int(path.stem) > 4 else (40, 24))
        with Image.open(path) as picture, open(path, "rb") as file:
            for given in (path, picture, file):
                shown = pictures.decode(given, path)
                np.testing.assert_array_equal(shown, np.asarray(expected), str(path))


def test_a_damaged_exif_spoils_neither_an_image_nor_its_orientation(tmp_path):
    begin, turned = b"Exif\0\0II*\0\x08\0\0\0", b"\x12\1\3\0\1\0\0\0\6\0\0\0"
    text_for_width = b"\0\1\2\0\4\0\0\0abc\0"
    cases = {
        b"Exif\0\0": (24, 40, 3),
        b"Exif\0\0nonsense": (24, 40, 3),
        begin + b"\2\0" + text_for_width + turned + bytes(4): (40, 24, 3),
    }
    for exif, shape in cases.items():
        for ending in ("jpg", "webp"):
            path = tmp_path / f"odd.{ending}"
            photograph(0, (40, 24)).save(path, exif=exif)
            assert pictures.decode(path, path).shape == shape, exif


def test_odd_images_look_alike_in_training_and_in_evaluation(tmp_path):
    """As their upright and opaque copies do, with every augmentation."""
    for part in ("train", "val"):
        odd, plain = tmp_path / "odd" / part / "a", tmp_path / "plain" / part / "a"
        for folder in (odd, plain):
            folder.mkdir(parents=True)
        for path, upright in photographs_of_a_phone(odd):
            upright.save(plain / f"{path.name}.png")
        logos, expected = transparent_logo(odd)
        for path in logos:
            if path.suffix != ".gif":  # torchvision's ImageFolder leaves GIFs out
                Image.fromarray(expected).save(plain / f"{path.name}.png")
    shown = []
    for name in ("odd", "plain"):
        flags = ["--data_path", tmp_path / name, "--model", "cifar_resnet8", "--input_size", 64]
        for part in ("train", "val"):
            write_images(tmp_path / name / part, ["b"], count=1)
        data = datasets.build_data(parsed(*flags, "--batch_size", 2), CPU)
        assert len(data.train) == len(data.val) == 38
        shown.append(
            [batch.images for one in (data.train_loader, data.val_loader) for batch in one]
        )
    for odd, plain in zip(*shown, strict=True):
        assert torch.equal(odd, plain)


class PhoneReader:
    """Stands in for timm's reader of a stream, which converts to RGB and keeps the EXIF."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self):
        with Image.open(self.path) as picture:
            yield picture.convert("RGB"), 0

    def __len__(self) -> int:
        return 1


def test_a_streams_photographs_are_upright(tmp_path):
    phone = photographs_of_a_phone(tmp_path)
    path, upright = next((path, upright) for path, upright in phone if path.name == "6.jpg")
    stream = IterableImageDataset(None, reader=PhoneReader(path))
    args = parsed("--input_size", 24, "--model", "cifar_resnet8")
    config = datasets.data_config(args)
    source = StreamSource(stream, ["a"])
    loader = datasets.build_eval_loader(args, source, config, CPU)
    shown = next(iter(loader)).images
    assert torch.equal(shown, evaluation_images([np.asarray(upright)], config))
    with pytest.raises(UserError, match="--check_data true: a stream"):
        check_images([source, source], num_workers=0)


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_of_an_animated_image_the_first_frame_is_shown(ending, tmp_path):
    gray = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    color = np.stack([gray, gray[::-1], 255 - gray], axis=2)
    frames = [Image.fromarray(color), Image.fromarray(255 - color)]
    path = tmp_path / f"moving.{ending}"
    options = {"lossless": True} if ending == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 2
    np.testing.assert_array_equal(pictures.decode(path, path), color)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.float32),
        (RAMP / 255).astype(np.float32),
        RAMP.astype(np.uint16) * 257,
        RAMP.astype(">u2") * 257,
        RAMP.astype(np.int32) * 257,
    ],
    ids=["0…255", "0…1", "16-bit", "16-bit, big-endian", "32-bit"],
)
def test_pictures_of_more_than_8_bits_keep_their_greys(values, tmp_path):
    path = tmp_path / "wide.tif"
    Image.fromarray(values).save(path)
    expected = np.repeat(RAMP[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(pictures.decode(path, path), expected)


@pytest.mark.parametrize(
    "value, kind",
    [(np.nan, "float32"), (np.inf, "float32"), (-0.1, "float32"), (256, "float32")]
    + [(70000, "int32"), (-1, "int32")],
)
def test_a_picture_of_an_unknown_range_is_refused_by_name(value, kind, tmp_path):
    values = np.zeros((16, 16), kind)
    values[3, 5] = value
    path = tmp_path / "wide.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(UserError, match=r"wide.tif \(its values lie in .*save it with 8 bits"):
        pictures.decode(path, path)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
@pytest.mark.parametrize("decoder", ["torchvision", "simplejpeg"])
def test_a_jpeg_shows_pillows_pixels(decoder, mode, options, tmp_path, monkeypatch):
    module = pytest.importorskip("simplejpeg") if decoder == "simplejpeg" else None
    monkeypatch.setattr(pictures, "simplejpeg", module)
    path = tmp_path / "p.jpg"
    photograph(3).convert(mode).save(path, quality=90, **options)
    with Image.open(path) as image:
        expected = np.array(image.convert("RGB"))
    assert np.array_equal(pictures.decode(str(path), path), expected)
    shown = pictures.open_image(str(path), path)
    upper = shown.first_rows(70) if isinstance(shown, pictures.Jpeg) else shown
    assert np.array_equal(upper[:70], expected[:70])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about a damaged EXIF
def test_the_header_of_a_plain_jpeg_says_what_pillow_says(monkeypatch):
    """Also if a byte of it is changed, unless it is left to Pillow."""
    rng = np.random.default_rng(0)
    plain, known = [], []
    for orientation, options in itertools.product(
        (None, 1, 6), ({}, {"progressive": True, "comment": "c"}, {"xmp": b"<x/>", "dpi": (9, 9)})
    ):
        file = io.BytesIO()
        exif = turned(orientation)["exif"] if orientation else Image.Exif()
        exif[ExifTags.Base.Make] = "a phone"
        photograph(0, (60, 40)).save(file, "JPEG", exif=exif, **options)
        content = file.getvalue()
        expected = None if orientation == 6 else (60, 40)
        assert jpegs.size_of_plain_jpeg(content) == expected
        plain += [content] if expected else []
        header = content.index(b"\xff\xda")
        for place in rng.integers(2, header, 150):
            changed = bytearray(content)
            changed[place] = rng.integers(256)
            if size := jpegs.size_of_plain_jpeg(bytes(changed)):
                with contextlib.suppress(OSError), Image.open(io.BytesIO(changed)) as image:
                    assert (image.size, image.mode, image.format) == (size, "RGB", "JPEG")
                    assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1
                    known.append(size)
    assert len(known) > 300
    for options in ({"mode": "L"}, {"mode": "CMYK"}, {"xmp": b'tiff:Orientation="6"'}):
        file = io.BytesIO()
        photograph(0).convert(options.pop("mode", "RGB")).save(file, "JPEG", **options)
        assert jpegs.size_of_plain_jpeg(file.getvalue()) is None
    monkeypatch.setattr(Image, "open", None)  # is not called
    assert all(pictures.decode(io.BytesIO(content), "").shape == (40, 60, 3) for content in plain)


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("kind", ["empty", "text", "cut", "bomb"])
def test_a_picture_that_can_not_be_read_is_named(kind, ending, tmp_path, monkeypatch):
    path = tmp_path / f"{kind}.{ending}"
    photograph(0, (64, 64)).save(path)
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    else:
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2]}[kind])
    with pytest.raises(UserError, match=f"cannot read the image .*{kind}.{ending}"):
        pictures.decode(str(path), str(path))


def large_photograph(path: Path, size=(1701, 1203), mode: str = "RGB", **options) -> Image.Image:
    """Write colors that change every two pixels of a crop; returns the upright picture."""
    coarse = np.random.default_rng(0).integers(0, 256, (30, 42, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
    picture.save(path, quality=95, **options)
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def turned(orientation: int) -> dict[str, Image.Exif]:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return {"exif": exif}


@pytest.mark.parametrize(
    "options",
    [turned(orientation) for orientation in range(1, 9)]
    + [{"mode": "L"}, {"mode": "CMYK"}, {"progressive": True}, {"format": "MPO"}],
    ids=lambda options: str(dict(options.get("exif", options))),
)
def test_a_large_photograph_is_cropped_where_its_full_decode_is(options, tmp_path):
    """With timm's draws, at every scale, and whatever part of the last block the file fills."""
    upright = large_photograph(tmp_path / "p.jpg", **options)
    shown = pictures.open_image(str(tmp_path / "p.jpg"), "p.jpg")
    assert shown.shape == (*upright.size[::-1], 3)
    for size, area in ((64, 1.0), (64, 0.4), (128, 0.3)):  # at 1/8, 1/4 and 1/2
        crops = [
            kind(size, scale=(area, area), interpolation="bicubic")
            for kind in (transforms.FastResizedCrop, transforms.RandomResizedCropAndInterpolation)
        ]
        for seed in range(3):
            ours, theirs, next_draws = [], [], []
            for crop, picture, found in zip(crops, (shown, upright), (ours, theirs), strict=True):
                random.seed(seed)
                found.append(np.asarray(crop(picture)).astype(int))
                next_draws.append(random.random())
            assert next_draws[0] == next_draws[1]
            assert 0 < np.abs(ours[0] - theirs[0]).mean() < 0.75


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
@pytest.mark.parametrize(
    "orientation, size",
    [(1, (1701, 1203)), (3, (1701, 1203)), (6, (1701, 1203)), (1, (1203, 1803)), (1, (1001, 2001))],
)
def test_rows_below_a_crop_are_left_out_and_change_no_pixel(
    orientation, size, interpolation, tmp_path, monkeypatch
):
    large_photograph(tmp_path / "p.jpg", size, **turned(orientation))
    shown = pictures.open_image(str(tmp_path / "p.jpg"), "p.jpg")
    left_out, first_rows = [], jpegs.first_rows

    def crops() -> list[np.ndarray]:
        random.seed(0)
        scales = ((64, (0.4, 1.0)), (64, (0.2, 0.3)), (128, (0.2, 0.3)))
        kinds = [
            transforms.FastResizedCrop(*scale, interpolation=interpolation) for scale in scales
        ]
        return [np.asarray(kind(shown)) for kind in kinds for _ in range(4)]

    def counted(content: bytes, rows: int) -> bytes:
        kept = first_rows(content, rows)
        left_out.append(kept is not content)
        return kept

    monkeypatch.setattr(pictures, "first_rows", counted)
    found = crops()
    is_possible = orientation == 1 and size[1] < 2000
    assert is_possible == (4 < sum(left_out) < 12 == len(left_out))
    monkeypatch.setattr(pictures, "first_rows", lambda content, rows: content)
    assert all(map(np.array_equal, found, crops()))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{"subsampling": kind} for kind in ("4:4:4", "4:2:2", "4:2:0")]
    + [{"restart_marker_blocks": 5}, {"optimize": True, "exif": Image.Exif().tobytes()}],
    ids=str,
)
def test_the_first_rows_of_a_jpeg_are_those_of_the_whole(mode, options):
    file = io.BytesIO()
    photograph(0, (70, 101)).convert(mode).save(file, "JPEG", quality=90, **options)
    content = file.getvalue()
    whole = pixels_of_jpeg(content)
    for rows in range(1, 102):
        kept = pixels_of_jpeg(jpegs.first_rows(content, rows))
        assert rows <= len(kept) <= rows + 16
        assert np.array_equal(kept[:rows], whole[:rows])
    assert jpegs.is_one_whole_scan(content)
    damaged = bytearray(content)
    damaged[-80:-78] = jpegs.END[:1] + b"\x15"
    assert not jpegs.is_one_whole_scan(bytes(damaged))
    assert not jpegs.is_one_whole_scan(content[:-2])
    assert jpegs.first_rows(content[:-2], 1) == content[:-2]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_decoder_that_skips_rows_changes_no_crop(is_damaged, tmp_path, monkeypatch):
    """A damaged marker below the crop is left to the decoder that reports it."""
    photograph(0, (500, 375)).save(tmp_path / "p.jpg", quality=90)
    content = bytearray((tmp_path / "p.jpg").read_bytes())
    if is_damaged:
        content[-80:-78] = jpegs.END[:1] + b"\x15"
        (tmp_path / "p.jpg").write_bytes(content)
    heights = []

    def decode_jpeg(content: bytes, strict: bool = True) -> np.ndarray:
        if strict and is_damaged:
            raise ValueError("a warning of libjpeg")
        heights.append(len(pixels := pixels_of_jpeg(content)))
        return pixels

    def crops() -> list[np.ndarray]:
        random.seed(0)
        crop = transforms.FastResizedCrop(64, scale=(0.1, 0.4), interpolation="bicubic")
        shown = pictures.open_image(str(tmp_path / "p.jpg"), "p.jpg")
        return [crop(shown) for _ in range(8)]

    def outcome() -> list[np.ndarray] | str:
        try:
            return crops()
        except UserError as error:
            return str(error)

    expected = outcome()
    monkeypatch.setattr(pictures, "simplejpeg", SimpleNamespace(decode_jpeg=decode_jpeg))
    assert isinstance(expected, str) == is_damaged
    if is_damaged:
        assert outcome() == expected and not heights
    else:
        assert np.array_equal(outcome(), expected) and sum(h < 375 for h in heights) > 3


def pixels_of_jpeg(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


def test_a_progressive_jpeg_is_left_whole():
    file = io.BytesIO()
    photograph(0).save(file, "JPEG", progressive=True)
    assert jpegs.first_rows(file.getvalue(), 1) == file.getvalue()


@pytest.mark.parametrize("size, shape", [(224, (1999, 1000)), (304, (2000, 1200)), (32, None)])
def test_pixels_are_exact_of_smaller_photographs_small_crops_and_evaluations(size, shape, tmp_path):
    """Below two megapixels, and of crops of less than four times the sides of the result."""
    path = tmp_path / "a" / "p.jpg"
    path.parent.mkdir()
    picture = np.asarray(large_photograph(path, shape or (2000, 1200)))
    args = parsed("--input_size", size, "--model", "cifar_resnet8")
    config = datasets.data_config(args)
    source = image_folder(str(tmp_path))
    assert np.array_equal(source[0][0], picture)
    train, val = train_transform(args), transforms.eval_transform(config)
    images = loaders.TransformedImages(source, train, seed=0)
    for view in range(4):
        seed_rng(CPU, RandomUse.AUGMENTATION, 0, view, 0)
        expected, _ = train(picture)
        assert np.array_equal(images[view, 0][0][0], expected)
    assert np.array_equal(loaders.TransformedImages(source, val, None)[0, 0][0][0], val(picture)[0])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("missing", [2, 1000, 100_000])
def test_a_large_photograph_that_is_cut_off_is_refused_in_one_way(orientation, missing, tmp_path):
    path = tmp_path / "a" / "p.jpg"
    path.parent.mkdir()
    large_photograph(path, **turned(orientation))
    path.write_bytes(path.read_bytes()[:-missing])
    source = image_folder(str(tmp_path))
    args = parsed("--input_size", 64, "--model", "cifar_resnet8")
    shown = loaders.TransformedImages(source, train_transform(args), seed=0)
    messages = []
    for read in (lambda: source[0], lambda: shown[0, 0], lambda: shown[loaders.READ_ONLY, 0]):
        with pytest.raises(UserError, match="p.jpg .*truncated.*; repair it or remove it") as found:
            read()
        messages.append(str(found.value))
    assert len(set(messages)) == 1


def photograph(seed: int, size: tuple[int, int] = (300, 220)) -> Image.Image:
    """Smooth colors with edges and some noise, as resizing meets them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
    pixels[size[1] // 5 : size[1] // 2, size[0] // 5 : size[0] // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(
        (pixels + rng.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8)
    )


def both_pipelines(args: argparse.Namespace, seeds: range) -> tuple[torch.Tensor, torch.Tensor]:
    """The same images with the same draws: ours and, as the ConvNeXt script has it, timm's."""
    config = datasets.data_config(args) | {"classes": ["0"]}
    theirs = transforms.create_transform(
        args.input_size,
        is_training=True,
        hflip=args.hflip,
        auto_augment=args.aa or None,
        color_jitter=args.color_jitter or None,  # at 0 timm's step would draw, and do nothing
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        mean=config["mean"],
        std=config["std"],
    )
    transform = train_transform(args)
    to_network = transforms.ToNetwork(config, CPU)
    ours, expected = [], []
    for seed in seeds:
        image = photograph(seed)
        seed_rng(CPU, RandomUse.AUGMENTATION, seed)
        ours.append((transform(np.array(image)), 0))
        seed_rng(CPU, RandomUse.AUGMENTATION, seed)
        expected.append(theirs(image))
    return to_network(transforms.collate(ours)), torch.stack(expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("remode", ["pixel", "rand", "const"])
def test_training_images_are_timms_to_rounding(interpolation, remode):
    """Without color operations, whose thresholds turn one gray level into many."""
    flags = ["--aa=", "--color_jitter", 0, "--reprob", 0.5, "--remode", remode, "--recount", 2]
    args = parsed("--input_size", 96, *flags, "--train_interpolation", interpolation)
    args.hflip = 0.5
    ours, theirs = both_pipelines(args, range(24))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert (ours - theirs).abs().max() < 2.5 / 255 / 0.224  # levels of 255, over the least std
    assert (ours - theirs).abs().mean() < 0.1 / 255 / 0.224


@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (40, 32), (9, 30)])
@pytest.mark.parametrize("hflip", [0.0, 0.5])
def test_small_images_are_torchvisions_and_timms_bit_for_bit(shape, hflip):
    args = parsed("--input_size", 16, "--aa=", "--color_jitter", 0, "--reprob", 0)
    args.hflip = hflip
    config = datasets.data_config(args)
    train = (
        train_transform(args),
        Compose([Resize(16, 3), RandomCrop(16, padding=2), RandomHorizontalFlip(hflip)]),
    )
    val = (
        transforms.eval_transform(config),
        transforms.create_transform(
            16, is_training=False, use_prefetcher=True, interpolation="bicubic", crop_pct=1.0
        ),
    )
    for seed in range(20):
        array = np.array(photograph(seed).resize(shape[::-1]))
        picture = Image.fromarray(array)
        for ours, theirs in (train, val):
            seed_rng(CPU, RandomUse.AUGMENTATION, seed)
            expected = np.asarray(theirs(picture))
            expected = expected if expected.shape[-1] == 3 else expected.transpose(1, 2, 0)
            for image in (array, picture):
                seed_rng(CPU, RandomUse.AUGMENTATION, seed)
                np.testing.assert_array_equal(ours(image)[0], expected)


def test_shears_and_translations_are_pillows_bit_for_bit():
    """For round levels too, with which rounding decides about whole rows."""
    rng = np.random.default_rng(0)
    is_faster = []
    for move, (axis, is_shear) in augment.MOVES.items():
        levels = [*rng.uniform(-0.5, 0.5, 12), 0, 0.3, -0.27, 0.405, -0.45, 0.5, 0.999, -1.5, 3]
        for level in map(float, levels):
            picture = photograph(rng.integers(9), tuple(rng.integers(50, 90, 2).tolist()))
            options = {"fillcolor": (1, 99, 200), "resample": Image.Resampling.BICUBIC}
            expected = np.asarray(move(picture, level, **options))
            for image in (picture, np.asarray(picture)):
                shown = np.asarray(augment._move(move, image, level, **options))
                np.testing.assert_array_equal(shown, expected, f"{move.__name__} {level}")
            offset = 0.0 if is_shear else level * picture.size[axis]
            rows = np.asarray(picture.transpose(Image.Transpose.TRANSPOSE) if axis else picture)
            moved = augment.move_rows(rows, level if is_shear else 0.0, offset, (0, 0, 0))
            is_faster.append(moved is not None)
    assert sum(is_faster) > 0.7 * len(is_faster)


def test_training_images_have_timms_distribution_with_every_augmentation():
    ours, theirs = both_pipelines(parsed("--input_size", 96), range(200))
    difference = (ours - theirs).abs()
    assert difference.median() < 1e-5 and (difference > 2.5 / 255 / 0.224).float().mean() < 0.01
    for moment in (torch.mean, torch.std):
        for a, b in zip(moment(ours, dim=(2, 3)).T, moment(theirs, dim=(2, 3)).T, strict=True):
            torch.testing.assert_close(a.mean(), b.mean(), rtol=0, atol=2e-3)


def test_no_two_uses_of_random_numbers_share_a_stream():
    """Equal numbers, padded with zeros or not: weights, augmentation, steps, mixup and order."""
    seen = set()
    for use in RandomUse:
        for first in (0, 3):
            for length in range(4):
                seed_rng(CPU, use, first, *[0] * length)
                draws = torch.rand(1).item(), np.random.rand(), random.random()
                generator = np.random.default_rng(seed_sequence(use, first, *[0] * length))
                seen.update([*draws, generator.random()])
    # A key and the key padded with zeros are the same one, as all keys of a use have one length.
    assert len(seen) == len(RandomUse) * 2 * 4


def test_each_use_of_random_numbers_draws_from_its_own_stream(run_main, monkeypatch):
    uses = []
    real = seed_sequence
    for module in ("data.order", "data.mixup", "runtime.randomness"):
        monkeypatch.setattr(
            f"{module}.seed_sequence",
            lambda use, *key: uses.append((use, len(key))) or real(use, *key),
        )
    for mode in ("batch", "pair"):
        flags = ["--train_samples", 16, "--epochs", 1, "--disable_eval", "true"]
        assert run_main(*flags, "--mixup_mode", mode).code == 0
    assert {use for use, _ in uses} == set(RandomUse)
    assert len(set(uses)) == len(RandomUse)  # one length of key per use


def test_the_benchmark_of_scale_runs_by_its_path_from_anywhere(tmp_path):
    path = ROOT / "benchmarks" / "scale.py"
    with Group(script, path, tmp_path, "--as_rank", "--images", 1000) as group:
        assert group.wait() == [0], group.err
        assert len(json.loads(group.out.splitlines()[-1])) == 2


# ------------------------------------------------------------- images that cannot be read


def spoil(folder: Path, *names: str) -> list[Path]:
    """Cut some images of a folder short."""
    paths = [folder / name for name in names]
    for path in paths:
        path.write_bytes(path.read_bytes()[:100])
    return paths


SMALL_RUN = ["--input_size", 32, "--epochs", 1, "--batch_size", 8]


@pytest.mark.parametrize("workers", [0, 2])
def test_check_data_lists_every_bad_image_with_its_reason(workers, run_main, imnet, tmp_path):
    bad = spoil(imnet, "train/ant/1.jpg", "train/cat/7.jpg", "val/bee/0.jpg")
    bad[1].write_bytes(b"")
    bad[2].unlink()
    bad[2].symlink_to("nowhere.jpg")
    flags = ["--data_path", imnet, *SMALL_RUN, "--num_workers", workers, "--check_data", "true"]
    run = run_main(*flags, output_dir=tmp_path / "out")
    assert run.code == 2 and "Model" not in run.out
    first, *lines = run.err.splitlines()
    assert "--check_data true: 3 of 33 images cannot be read; repair or remove them" in first
    assert [line.split(" (")[0].strip() for line in lines] == list(map(str, bad))
    assert (
        "cannot identify image file" in lines[1]
        and "No such file" in lines[2]
        and all(line.endswith(")") for line in lines)
    )


def test_check_data_names_20_images_and_counts_the_others(run_main, imnet):
    bad = spoil(
        imnet, *(f"train/{name}/{i}.jpg" for name in ("ant", "bee", "cat") for i in range(8))
    )
    err = run_main("--data_path", imnet, *SMALL_RUN, "--check_data", "true").err
    assert sum(str(path) in err for path in bad) == 20
    assert "24 of 33 images" in err and err.endswith("and 4 more\n")


def test_check_data_passes_sound_images_and_an_evaluation_checks_its_own(run_main, imnet, tmp_path):
    check = ["--data_path", imnet, *SMALL_RUN, "--check_data", "true"]
    run = run_main(*check, output_dir=tmp_path)
    assert run.code == 0 and "All 33 images can be read" in run.out and len(run.log) == 1
    evaluate = [*check, "--eval", "true", "--resume", tmp_path / "checkpoint-best.pth"]
    spoil(imnet, "train/ant/1.jpg")
    run = run_main(*evaluate)
    assert run.code == 0 and "All 9 images can be read" in run.out
    (bad,) = spoil(imnet, "val/bee/0.jpg")
    run = run_main(*evaluate)
    assert run.code == 2 and "1 of 9 images" in run.err and str(bad) in run.err


def test_two_processes_check_the_data_of_each_image_once_and_report_once(imnet):
    bad = spoil(imnet, "train/ant/1.jpg", "train/ant/2.jpg", "train/cat/7.jpg", "val/bee/0.jpg")
    flags = ["--data_path", imnet, *SMALL_RUN, "--num_workers", 1, "--check_data", "true"]
    with Group(program, [*QUICK, *map(str, flags)], processes=2) as group:
        assert group.wait() == [2, 2] and "Model" not in group.out
        assert group.err.count("main.py: error") == 1
        assert "4 of 33 images cannot be read" in group.err
        assert all(group.err.count(f"{path} (") == 1 for path in bad)


def test_a_bad_validation_image_is_found_before_the_first_epoch(run_main, imnet):
    (bad,) = spoil(imnet, "val/bee/0.jpg")
    for workers in (0, 1):
        run = run_main("--data_path", imnet, *SMALL_RUN, "--num_workers", workers)
        assert run.code == 2 and "Epoch 0" not in run.out
        assert f"cannot read the image {bad} (" in run.err
        assert "--check_data true lists all such images" in run.err


def test_validation_images_are_not_read_twice_before_training(
    run_main, imnet, kd, tmp_path, monkeypatch
):
    """Nor by a run that resumes; with --check_data true, only by the check."""
    read = []
    load = FileSource.load

    def counted(source: FileSource, index: int) -> pictures.Picture:
        read.append(source.path(index))
        return load(source, index)

    monkeypatch.setattr(FileSource, "load", counted)

    def passes(*flags: object, output_dir: Path | None = None) -> float:
        read.clear()
        run = run_main("--data_path", imnet, *SMALL_RUN, *flags, output_dir=output_dir)
        assert run.code == 0, run.err
        return sum("/val/" in path for path in read) / 9

    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(["ant", "bee", "cat", *"defghij"]))
    teacher = [*kd, "--teacher_classes", classes]
    assert passes(output_dir=tmp_path / "out") == 2  # before the first epoch, and after it
    assert passes("--epochs", 2, output_dir=tmp_path / "out") == 1  # resumed
    assert passes("--check_data", "true") == 2
    assert passes("--disable_eval", "true") == 0
    assert passes(*teacher) == 2  # the teacher's scoring is the first
    cached = [*teacher, "--teacher_cache", tmp_path / "cache"]
    assert passes(*cached) == 2
    assert passes(*cached) == 2  # here the scoring reads nothing


def test_files_that_are_left_out_are_counted_by_their_ending(run_main, imnet):
    for name in ("a.heic", "b.HEIC", "c.heic", "notes.txt", "README"):
        (imnet / "train" / "bee" / name).write_bytes(b"")
    out = run_main("--data_path", imnet, *SMALL_RUN, "--disable_eval", "true").out
    assert (
        f"{imnet}/train: 5 file(s) or folder(s) left out (.heic 3, without ending 1, .txt 1)" in out
    )
    assert "24 images" in out
    for path in (imnet / "train" / "bee").glob("*.jpg"):
        path.unlink()
    run = run_main("--data_path", imnet)
    assert run.code == 2 and "left out: .heic 3" in run.err and ".jpeg .png" in run.err


def test_hidden_names_and_links_to_a_parent_are_left_out_and_counted(imnet, tmp_path, capsys):
    """What Jupyter and macOS leave behind, and a link that shows a folder to itself."""
    train = imnet / "train"
    names = [os.fsencode(os.path.relpath(path, train)) for path, _ in ImageFolder(train).samples]
    for folder in (train / ".ipynb_checkpoints", train / "bee" / "__MACOSX"):
        folder.mkdir()
        shutil.copy(train / "ant" / "0.jpg", folder)
    (train / "cat" / "._0.jpg").write_bytes(b"Mac OS X")
    shutil.copy(train / "ant" / "0.jpg", train)
    (train / "ant" / "loop").symlink_to("..")
    (tmp_path / "more").mkdir()
    shutil.copy(train / "ant" / "0.jpg", tmp_path / "more" / "1.jpg")
    (tmp_path / "more" / "again").symlink_to(tmp_path / "more")
    (train / "bee" / "more").symlink_to(tmp_path / "more")
    source = image_folder(str(train))
    assert source.classes == ["ant", "bee", "cat"]
    listed = source.names(np.arange(len(source))).tolist()
    assert listed == sorted([*names, b"bee/more/1.jpg"])
    out = capsys.readouterr().out
    for kind in (
        "hidden folder 2", "hidden file 1", "link to a folder that holds it 2",
        "image in no class folder 1",
    ):  # fmt: skip
        assert kind in out, out
    assert f"{train}: 6 file(s) or folder(s) left out (" in out
    (train / "cat" / "self").symlink_to("self")
    with pytest.raises(UserError, match="cat/self: cannot be listed .*; repair it or remove it"):
        image_folder(str(train))


def test_16_bit_images_that_hold_12_bits_are_reported(tmp_path, capsys):
    for name, factor in (("dark", 1), ("light", 16)):
        for number, label in enumerate("ab"):
            (tmp_path / name / label).mkdir(parents=True)
            values = np.full((9, 9), (4000 - number) * factor, np.uint16)
            Image.fromarray(values).save(tmp_path / name / label / "1.png")
        flags = ["--data_path", tmp_path / name, "--disable_eval", "true", "--batch_size", 2]
        datasets.build_data(parsed(*flags), CPU)
        out = capsys.readouterr().out
        told = "Warning: 2 images with 16 bits per pixel were looked at, and none has a value above"
        assert (f"{told} 4,000 of 65,535" in out) == (name == "dark")
        assert ("if they hold 12 bits, multiply their values by 16" in out) == (name == "dark")


def test_a_class_whose_name_is_not_utf_8_trains_with_a_teacher_cache(run_main, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    for part in ("train", "val"):
        write_images(tmp_path / part, ["bee", name])
        (tmp_path / part / name / f"x.{name}").write_bytes(b"")  # printed as left out
    flags = ["--data_path", tmp_path, *SMALL_RUN]
    assert run_main(*flags, output_dir=tmp_path / "teacher").code == 0
    kd = teacher_flags(tmp_path / "teacher" / "checkpoint-best.pth")
    for _ in range(2):  # filled, then read
        run = run_main(*flags, *kd, "--teacher_cache", tmp_path / "cache")
        assert run.code == 0 and "left out (.caf" in run.out, run.err
    assert "All teacher logits are cached" in run.out


def test_a_cache_from_before_photographs_were_upright_is_refused(run_main, kd, short, tmp_path):
    flags = [*short, *kd, "--teacher_cache", tmp_path]
    assert run_main(*flags).code == 0
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(f'"decoder": {pictures.DECODER},', ""))
    run = run_main(*flags)
    assert run.code == 2 and "--teacher_cache" in run.err and "decoder" in run.err


# -------------------------------------------------------------------------- mixup in pairs


def pair_mixup(*flags: object) -> PairMixup:
    return make_mixup(parsed("--mixup_mode", "pair", *flags), 10)


IMAGES = torch.randn(64, 3, 12, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 10


@pytest.mark.parametrize(
    "flags",
    [[], ["--mixup_prob", 0.5], ["--cutmix_minmax", 0.2, 0.8], ["--mixup", 0], ["--cutmix", 0]],
    ids=str,
)
def test_partners_are_mixed_by_their_lambda_or_box(flags):
    """Every pixel is the image's, its partner's or one blend; labels in proportion."""
    mixed, soft = pair_mixup("--smoothing", 0, *flags)(IMAGES.clone(), LABELS, 5, 0)
    kinds = set()
    for i in range(64):
        j = i ^ 1
        own, other, seen = IMAGES[i].double(), IMAGES[j].double(), mixed[i].double()
        share = ((seen - other) / (own - other)).clamp(-1e-3, 1 + 1e-3)  # of itself, per pixel
        kept = soft[i, LABELS[i]].item()
        assert soft[i].sum().item() == pytest.approx(1) and kept >= 0
        assert soft[i, LABELS[j]].item() == pytest.approx(1 - kept, abs=1e-6)
        assert kept == pytest.approx(soft[j, LABELS[j]].item())  # partners share it
        assert share.mean().item() == pytest.approx(kept, abs=2e-3)
        is_whole = ((share - share.round()).abs() < 2e-3).all()
        is_even = share.std() < 2e-3
        assert is_whole or is_even
        kinds.add("none" if kept == 1 else "mixup" if is_even else "cutmix")
        if kinds and is_whole and 0 < kept < 1:
            from_partner = share[0] < 0.5
            rows, columns = from_partner.any(1), from_partner.any(0)
            assert torch.equal(from_partner, rows[:, None] & columns[None])  # a rectangle
    if "--mixup" in flags:
        assert "mixup" not in kinds
    if "--cutmix" in flags:
        assert "cutmix" not in kinds


def test_a_pairs_mix_does_not_depend_on_its_batch_and_a_views_does_on_the_view():
    first = 2 * PAIRS_AT_ONCE - 20  # so that the 64 images are of two blocks
    whole, labels = pair_mixup()(IMAGES.clone(), LABELS, 3, first)
    for size in (2, 6, 32):
        mixup = pair_mixup()
        parts = []
        for offset in range(0, 64, size):
            some = slice(offset, offset + size)
            parts.append(mixup(IMAGES[some].clone(), LABELS[some], 3, first + offset))
        assert torch.equal(torch.cat([images for images, _ in parts]), whole)
        assert torch.equal(torch.cat([soft for _, soft in parts]), labels)
    other, _ = pair_mixup()(IMAGES.clone(), LABELS, 4, first)
    assert not torch.equal(other, whole)


@pytest.mark.parametrize(
    "flags", [[], ["--cutmix_minmax", 0.2, 0.8], ["--mixup", 0, "--mixup_prob", 0.7]], ids=str
)
def test_pairs_are_mixed_as_timm_does_on_average(flags):
    """Share of an image's own label: quantiles over 4,000 pairs within 0.03 of timm's pair mode."""
    args = parsed("--mixup_mode", "pair", "--smoothing", 0, *flags)
    images, labels = torch.zeros(8000, 1, 32, 32), torch.arange(8000) % 2
    _, ours = make_mixup(args, 2)(images, labels, 0, 0)
    args.batch_size, args.mixup_mode = 8000, "elem"
    whole = make_mixup(args, 2).mixup
    whole.mode = "pair"
    np.random.seed(0)
    _, theirs = whole(images, labels)
    quantiles = torch.linspace(0.02, 0.98, 25)  # the least and the largest of all are noise
    a, b = (soft[torch.arange(8000), labels].quantile(quantiles) for soft in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=0.03)


def boxes_of_timm(side: int, minmax: tuple[float, float] | None, count: int) -> np.ndarray:
    """Top, bottom, left, right of timm's boxes for uniform lambdas: (4, count).

    timm draws many boxes at once for one lambda, which it uses only through the length of the box.
    """
    np.random.seed(1)
    if minmax:
        return np.stack(timm_mixup.rand_bbox_minmax((side, side), minmax, count))
    lam = np.random.rand(count)
    lengths = (side * np.sqrt(1 - lam)).astype(int)
    same = [lam[lengths == length] for length in range(side + 1)]
    boxes = [timm_mixup.rand_bbox((side, side), s[0], count=len(s)) for s in same if len(s)]
    return np.concatenate([np.stack(box) for box in boxes], axis=1)


@pytest.mark.parametrize("minmax", [None, (0.2, 0.7)], ids=str)
@pytest.mark.parametrize("side", [8, 28, 32])
def test_the_boxes_of_pairs_have_the_areas_and_positions_of_timms(side, minmax):
    """200,000 pairs; distributions closer than chance allows in one of 1,000 comparisons."""
    count = 200_000
    flags = ["--mixup", 0, *(["--cutmix_minmax", *minmax] if minmax else [])]
    mixup = pair_mixup(*flags)
    numbers = mixup.draw(1, range(count))
    ours = np.concatenate([np.stack(e) for e in mixup.boxes(numbers, (side, side))])
    theirs = boxes_of_timm(side, minmax, count)
    for name, measure in {
        "area": lambda box: (box[1] - box[0]) * (box[3] - box[2]),
        **{edge: itemgetter(i) for i, edge in enumerate(("top", "bottom", "left", "right"))},
    }.items():
        most = side**2 + 1
        a, b = (np.bincount(measure(boxes), minlength=most) for boxes in (ours, theirs))
        distance = np.abs(np.cumsum(a - b)).max() / count
        assert distance < 1.95 * (2 / count) ** 0.5, name


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("minmax", [None, (0.2, 0.8)])
def test_a_blocks_mix_is_timms_and_does_not_depend_on_what_came_before(mode, minmax):
    flags = ["--cutmix_minmax", *minmax] if minmax else []
    args = parsed("--mixup_mode", mode, "--batch_size", 16, "--mixup_prob", 0.8, *flags)
    mixup = make_mixup(args, 10)
    whole, labels = mixup(IMAGES.clone(), LABELS, 3, 0)
    third, soft = mixup(IMAGES[32:48].clone(), LABELS[32:48], 3, 32)
    assert torch.equal(whole[32:48], third) and torch.equal(labels[32:48], soft)
    seed_rng(CPU, RandomUse.BLOCK_MIXUP, 0, 3, 2)
    of_timm = timm_mixup.Mixup(0.8, 1.0, minmax, 0.8, mode=mode, num_classes=10)
    expected, wanted = of_timm(IMAGES[32:48].clone(), LABELS[32:48])
    assert torch.equal(expected, third) and torch.equal(wanted, soft)
