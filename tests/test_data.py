"""Images: the right label on each, each exactly once, the same whatever the machine does."""

import argparse

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

import datasets
import main
from utils import UserError

CPU = torch.device("cpu")


def arguments(*flags: object) -> argparse.Namespace:
    args = main.parse_args(["--num_workers", "0", "--batch_size", "16", *map(str, flags)])
    main.follow_defaults(args, None)
    return args


def test_the_digits_are_1437_and_360_in_the_proportions_of_their_classes():
    train, test = datasets._digits(True), datasets._digits(False)
    assert (len(train), len(test)) == (1437, 360)
    share = np.bincount(train.targets) / len(train) - np.bincount(test.targets) / len(test)
    assert np.abs(share).max() < 0.005
    image, target = train[0]
    assert image.mode == "RGB" and image.size == (8, 8) and 0 <= target < 10


def test_a_subset_of_a_subset_keeps_every_image_with_its_label():
    source = datasets._digits(True)
    first = datasets.stratified(source.targets, 100, seed=1)
    second = datasets.stratified(source.targets[first], 30, seed=2)
    nested = datasets.subset(datasets.subset(source, first), second)
    for index, position in enumerate(first[second]):
        image, target = nested[index]
        expected, label = source[position]
        assert np.array_equal(np.asarray(image), np.asarray(expected)) and target == label


@pytest.mark.parametrize("count", [10, 37, 200, 1437])
def test_stratified_samples_are_distinct_and_proportional(count):
    targets = datasets._digits(True).targets
    chosen = datasets.stratified(targets, count, seed=5)
    assert len(set(chosen.tolist())) == count
    wanted = np.bincount(targets) * count / len(targets)
    assert np.abs(np.bincount(targets[chosen], minlength=10) - wanted).max() <= 1


def test_stratified_samples_follow_the_seed_alone():
    targets = datasets._digits(True).targets
    same = [datasets.stratified(targets, 50, seed=3) for _ in range(2)]
    assert np.array_equal(*same)
    assert not np.array_equal(same[0], datasets.stratified(targets, 50, seed=4))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_global_batch_holds_the_same_images_at_any_world_size(world, monkeypatch):
    steps = {}
    for rank in range(world):
        monkeypatch.setattr(datasets.utils, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(datasets.utils, "world_size", lambda: world)
        batches = datasets.EpochBatches(100, 24 // world, seed=7)
        batches.set_epoch(3)
        for step, keys in enumerate(batches):
            assert all(view == 3 for view, _ in keys)
            steps.setdefault(step, []).extend(index for _, index in keys)
    order = np.random.default_rng([7, 3]).permutation(100)
    assert len(steps) == 4
    for step, indices in steps.items():
        assert sorted(indices) == sorted(order[24 * step : 24 * (step + 1)].tolist())


@pytest.mark.parametrize("world", [1, 3, 8])
def test_evaluation_batches_hold_every_image_once(world, monkeypatch):
    seen = []
    for rank in range(world):
        monkeypatch.setattr(datasets.utils, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(datasets.utils, "world_size", lambda: world)
        for batch in datasets._eval_batches(101, 16, shared=True):
            seen += [index for _, index in batch]
    assert sorted(seen) == list(range(101))


def test_augmented_images_do_not_depend_on_the_number_of_workers():
    epochs = []
    for workers in (0, 1, 3):
        args = arguments("--train_samples", 64, "--num_workers", workers)
        loader = datasets.build_data(args, CPU).train_loader
        loader.set_epoch(2)
        epochs.append([images for images, _ in loader])
    for other in epochs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(epochs[0], other, strict=True))
    loader.set_epoch(3)
    assert not torch.equal(epochs[0][0], next(iter(loader))[0])


def test_full_strength_posterize_does_not_end_an_epoch():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    augment = rand_augment_transform("rand-m10-n2-inc1", {"translate_const": 3})
    posterize = [op for op in augment.ops if op.name.startswith("Posterize")]
    assert posterize
    for op in posterize:
        op.prob, op.magnitude = 1.0, 10
        assert op(image).size == (8, 8)


@pytest.mark.parametrize("size", [8, 28, 32, 48, 64, 96])
def test_both_transforms_give_the_size_asked_for(size):
    args = arguments("--input_size", size, "--model", "cifar_resnet8")
    config = datasets.data_config(args)
    for shape in ((8, 8), (70, 50)):
        image = Image.new("RGB", shape, (120, 30, 200))
        for transform in (datasets.train_transform(args, config), datasets.eval_transform(config)):
            assert transform(image).shape == (3, size, size)


def test_small_images_are_evaluated_whole_and_normalised():
    config = datasets.data_config(arguments())
    image, _ = datasets._digits(False)[0]
    shown = datasets.eval_transform(config)(image)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(shown, (pixels - mean) / std)


def test_digits_are_not_mirrored_by_default_and_photographs_are():
    assert arguments().hflip == 0
    assert arguments("--data_set", "CIFAR10").hflip == 0.5


def test_an_image_folder_gives_each_image_its_folders_class(imnet):
    source = datasets._folder(str(imnet / "train"), "--data_path")
    assert source.classes == ["ant", "bee", "cat"] and len(source) == 24
    for index in (0, 9, 23):
        image, target = source[index]
        assert abs(np.asarray(image).mean() - (60 * target + 31.5)) < 10


def test_timms_own_readers_give_images_and_classes(imnet):
    args = arguments("--data_set", "", "--data_path", imnet)
    args.data_set = "folder"
    source = datasets.open_split(args, is_train=False)
    assert source.classes == ["ant", "bee", "cat"] and len(source) == 9
    assert np.bincount(source.targets).tolist() == [3, 3, 3]
    assert source[8][0].size == (32, 40)


def test_a_corrupt_image_is_named_even_from_a_worker(imnet):
    broken = imnet / "train" / "bee" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    args = arguments("--data_path", imnet, "--input_size", 32, "--num_workers", 1)
    loader = datasets.build_data(args, CPU).train_loader
    loader.set_epoch(0)
    with pytest.raises(UserError) as caught:
        for _ in range(3):
            list(loader)
    message = str(caught.value)
    assert str(broken) in message and "Traceback" not in message


def test_holdout_images_are_not_trained_on():
    data = datasets.build_data(arguments("--holdout", 100), CPU)
    assert data.train_count == 1337 and len(data.val_loader.dataset) == 100
    train, val = data.train_loader.dataset.source, data.val_loader.dataset.source
    source = datasets._digits(True)
    held_out = datasets.stratified(source.targets, 100, seed=0)
    assert np.array_equal(val.targets, source.targets[held_out])
    assert len(train) == 1337 and np.array_equal(
        np.asarray(val[0][0]), np.asarray(source[held_out[0]][0])
    )


def test_classes_that_differ_between_train_and_val_are_told(tmp_path):
    write_images(tmp_path / "train", ["ant", "bee"])
    write_images(tmp_path / "val", ["ant", "wasp"])
    with pytest.raises(UserError, match="only in training: bee; only in validation: wasp"):
        datasets.build_data(arguments("--data_path", tmp_path), CPU)


def test_every_kind_of_picture_becomes_rgb_and_right(tmp_path):
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    color = np.stack([grey, grey[::-1], 255 - grey], axis=2)
    pictures = {
        "grey.png": (Image.fromarray(grey), grey),
        "16-bit.png": (Image.fromarray(grey.astype(np.uint16) * 257), grey),
        "rgb.png": (Image.fromarray(color), color),
        "alpha.png": (Image.fromarray(np.dstack([color, grey])), color),
        "palette.png": (Image.fromarray(color).quantize(256), color),
        "cmyk.tif": (Image.fromarray(color).convert("CMYK"), color),
        "one-bit.png": (Image.fromarray(grey > 100), np.uint8(255) * (grey > 100)),
    }
    for name, (picture, expected) in pictures.items():
        picture.save(tmp_path / name)
        with Image.open(tmp_path / name) as file:
            shown = np.asarray(datasets._open(file, name)).astype(int)
        expected = expected if expected.ndim == 3 else np.repeat(expected[:, :, None], 3, axis=2)
        assert np.abs(shown - expected).max() <= (12 if "palette" in name else 1), name
    frames = [Image.fromarray(color), Image.fromarray(255 - color)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    shown = datasets._open(str(tmp_path / "moving.png"), "moving.png")
    assert np.array_equal(np.asarray(shown), color)


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "bomb"])
def test_a_picture_that_can_not_be_read_is_named(kind, tmp_path, monkeypatch):
    path = tmp_path / f"{kind}.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "cut": path.read_bytes()[:60]}[kind])
    with pytest.raises(UserError, match=f"can't read the image .*{kind}.png"):
        datasets._open(str(path), str(path))
