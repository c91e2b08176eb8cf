"""The teacher's logits on disk: the same training without the teacher, and never a wrong row."""

import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import QUICK, is_same, teacher_flags, write_images
from PIL import Image

import main
from data import readers
from data.order import view_order
from data.readers import DIGITS_FILE, digits
from data.sources import stratified
from teacher import logit_store, prepare
from teacher.logit_store import LogitFile, RowFormat
from utils import UserError


def random_teacher(path: Path, num_classes: int) -> list[str]:
    """The flags that distill from a random teacher, its logits spread out."""
    torch.manual_seed(1)
    teacher = timm.create_model("cifar_resnet8", num_classes=num_classes)
    with torch.no_grad():
        teacher.fc.weight.mul_(10)
    torch.save(teacher.state_dict(), path)
    return teacher_flags(path)


@pytest.fixture(scope="module")
def kd(tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    return ["--teacher_input_size", "8", *random_teacher(file, 10)]


SHORT = ["--train_samples", "72", "--epochs", "2", "--model_ema", "true"]  # 4 batches and a half


@pytest.fixture
def no_teacher(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the teacher was built")

    return lambda: monkeypatch.setattr(prepare, "load_teacher", refuse)


MIXES = [
    ["--mixup_mode", "batch"],
    ["--mixup_mode", "pair"],
    ["--mixup_mode", "elem"],
    ["--mixup", "0", "--cutmix", "0"],
]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix[1])
def test_a_run_from_the_store_is_the_online_run_in_the_same_bits(
    run_main, kd, tmp_path, mix, no_teacher
):
    cache = ["--teacher_cache", tmp_path / "cache", "--teacher_cache_dtype", "float32"]
    filling = run_main(*SHORT, *kd, *mix, *cache, output_dir=tmp_path / "filling")
    assert filling.code == 0, filling.err
    other = ["--kd_alpha", 0.4, "--kd_temperature", 2, "--lr", 0.01, "--opt", "momentum"]
    for name, flags in (("same", []), ("other", other)):
        online = run_main(*SHORT, *kd, *mix, *flags, output_dir=tmp_path / f"{name}-online")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "load_teacher", None)
            cached = run_main(
                *SHORT, *kd, *mix, *flags, *cache, output_dir=tmp_path / f"{name}-cached"
            )
        assert cached.code == 0 and "the teacher is not loaded" in cached.out, cached.err
        assert cached.log == online.log
        for key in ("model", "model_ema"):
            assert is_same(cached.checkpoint(1)[key], online.checkpoint(1)[key])


@pytest.mark.parametrize(
    "flags", [["--teacher_cache_dtype", "float16"], ["--teacher_cache_topk", "3"]]
)
def test_the_run_that_fills_a_rounded_cache_trains_on_what_later_runs_read(
    run_main, kd, tmp_path, flags
):
    flags = [*SHORT, *kd, "--teacher_cache", tmp_path / "cache", *flags]
    filling, reading = (run_main(*flags, output_dir=tmp_path / name) for name in ("a", "b"))
    assert "the teacher is not loaded" in reading.out
    assert filling.log == reading.log
    for part in ("model", "optimizer"):
        assert is_same(filling.checkpoint(1)[part], reading.checkpoint(1)[part])


def test_half_precision_changes_the_losses_by_less_than_a_thousandth(run_main, kd, tmp_path):
    online = run_main(*SHORT, *kd, output_dir=tmp_path / "online")
    cache = ["--teacher_cache", tmp_path / "cache"]
    run_main(*SHORT, *kd, *cache, output_dir=tmp_path / "filling")
    cached = run_main(*SHORT, *kd, *cache, output_dir=tmp_path / "cached")
    for a, b in zip(online.log, cached.log, strict=True):
        for name in ("train_loss", "train_kd", "train_ce"):
            assert a[name] == pytest.approx(b[name], rel=1e-3) and a["epoch"] == b["epoch"]
    assert cached.log[1]["train_kd"] != online.log[1]["train_kd"]  # it is float16, after all


@pytest.mark.parametrize("mix", MIXES[1::2], ids=lambda mix: mix[1])
def test_a_store_serves_other_batch_sizes_unless_images_mix_over_the_batch(
    run_main, kd, tmp_path, mix
):
    cache = ["--teacher_cache", tmp_path / "cache", "--teacher_cache_dtype", "float32"]
    fill = run_main(*SHORT, *kd, *mix, *cache, "--teacher_cache_only", "true")
    assert fill.code == 0, fill.err
    for size in (6, 24):
        flags = [*SHORT, *kd, *mix, "--batch_size", size]
        online = run_main(*flags, output_dir=tmp_path / f"online-{size}")
        cached = run_main(*flags, *cache, output_dir=tmp_path / f"cached-{size}")
        assert "the teacher is not loaded" in cached.out
        for a, b in zip(online.log, cached.log, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_views_come_round_again(run_main, kd, tmp_path):
    flags = ["--train_samples", 64, "--epochs", 5, *kd, "--teacher_views", 2]
    online = run_main(*flags, output_dir=tmp_path / "online")
    cache = ["--teacher_cache", tmp_path / "cache", "--teacher_cache_dtype", "float32"]
    cached = run_main(*flags, *cache, output_dir=tmp_path / "cached")
    assert cached.log == online.log
    assert sorted(p.name for p in (tmp_path / "cache").glob("view-*.logits")) == [
        "view-00000.logits",
        "view-00001.logits",
    ]
    every = run_main("--train_samples", 64, "--epochs", 5, *kd, output_dir=tmp_path / "every")
    assert every.log[1]["train_loss"] == online.log[1]["train_loss"]
    assert every.log[2]["train_loss"] != online.log[2]["train_loss"]


def test_a_store_filled_in_parts_without_training_serves_a_run(run_main, kd, tmp_path, no_teacher):
    flags = ["--train_samples", 72, "--epochs", 4, *kd]
    cache = ["--teacher_cache", tmp_path / "cache", "--teacher_cache_dtype", "float32"]
    for part in ("0:1", "1:4"):
        fill = [*flags, *cache, "--teacher_cache_only", "true", "--teacher_cache_range", part]
        assert run_main(*fill).code == 0
    online = run_main(*flags, output_dir=tmp_path / "online")
    no_teacher()
    cached = run_main(*flags, *cache, output_dir=tmp_path / "cached")
    for a, b in zip(online.log, cached.log, strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # the filling had batches of another size


class FetchesAhead:
    """A loader that has always fetched one batch more than it has given."""

    def __init__(self, loader) -> None:
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        batches = iter(self.loader)
        ahead = next(batches, None)
        while ahead is not None:
            batch, ahead = ahead, next(batches, None)
            yield batch


@pytest.mark.parametrize("fill", [True, False], ids=["filled alone", "filled while training"])
def test_a_loader_that_fetches_ahead_writes_and_reads_the_right_rows(
    run_main, kd, tmp_path, monkeypatch, fill
):
    """Views change between epochs, and batches are short of a whole view: 4 batches and a half."""
    flags = [*SHORT, *kd, "--mixup_mode", "pair", "--teacher_cache_dtype", "float32"]
    first = [*flags, "--teacher_cache_only", str(fill)]
    cache, ahead = tmp_path / "cache", tmp_path / "ahead"
    expected = run_main(*flags, "--teacher_cache", cache, output_dir=tmp_path / "expected")
    if fill:
        shutil.rmtree(cache)
        run_main(*first, "--teacher_cache", cache)
    real = main.build_data

    def build_data(*args, **kwargs):
        data = real(*args, **kwargs)
        data.train_loader = FetchesAhead(data.train_loader)
        data.val_loader = FetchesAhead(data.val_loader)
        return data

    monkeypatch.setattr(main, "build_data", build_data)
    ahead.mkdir()
    shutil.copy(cache / "manifest.json", ahead)  # so that the checksums are of one store
    assert run_main(*first, "--teacher_cache", ahead).code == 0
    names = sorted(path.name for path in cache.glob("v*"))
    assert names == sorted(path.name for path in ahead.glob("v*")) and len(names) == 6
    for name in names:
        assert (cache / name).read_bytes() == (ahead / name).read_bytes()
    read = run_main(*flags, "--teacher_cache", ahead, output_dir=tmp_path / "read")
    assert "the teacher is not loaded" in read.out
    for a, b in zip(read.log, expected.log, strict=True):
        # A cache filled alone was computed in batches of another size.
        assert a == (pytest.approx(b, rel=1e-4) if fill else b)


def test_what_is_missing_of_a_view_is_made_again(run_main, kd, tmp_path):
    cache = ["--teacher_cache", tmp_path / "cache", "--teacher_cache_dtype", "float32"]
    first = run_main(*SHORT, *kd, *cache, output_dir=tmp_path / "first")
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    path = tmp_path / "cache" / "view-00001.sums"
    sums = np.fromfile(path, np.uint32)
    sums[[3, 40]] = 0
    sums.tofile(path)
    rows = np.memmap(path.with_suffix(".logits"), np.float32, "r+", shape=(72, 10))
    rows[[3, 40]] = 7  # what a kill may leave behind
    rows.flush()
    second = run_main(*SHORT, *kd, *cache, output_dir=tmp_path / "second")
    assert second.log == first.log and "126 of 128 rows are cached" in second.out
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}


def test_rows_that_vanish_during_a_run_are_an_error_with_its_remedy(run_main, kd, tmp_path):
    cache = ["--teacher_cache", tmp_path / "cache"]
    run_main(*SHORT, *kd, *cache)
    (tmp_path / "cache" / "view-00001.sums").write_bytes(bytes(72 * 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logit_store.LogitStore, "missing", lambda self, views: 0)
        run = run_main(*SHORT, *kd, *cache)
    assert run.code == 2 and "cached logits 0-15 of view 1 disappeared during training" in run.err


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--seed", 3], "seed 0, but this run uses 3"),
        (["--aa", ""], 'aa "rand-m9-mstd0.5-inc1", but this run uses ""'),
        (["--mixup", 0.5], "mixup 0.8, but this run uses 0.5"),
        (["--mixup_mode", "pair"], 'mixup_mode "batch", but this run uses "pair"'),
        (["--mixup", 0, "--cutmix", 0, "--smoothing", 0], "augmented"),
        (["--input_size", 16], "input_size 8, but this run uses 16"),
        (["--teacher_cache_dtype", "float32"], 'teacher_cache_dtype "float16", but this run'),
        (["--teacher_cache_topk", 3], "teacher_cache_topk null, but this run uses 3"),
        (["--train_samples", 80], "images 72, but this run uses 80"),
        (["--batch_size", 8], "batch_size 16, but this run uses 8"),  # images mix over the batch
        (
            ["--use_amp", "true", "--teacher_dtype", "float32"],
            'amp_dtype "None", but this run uses "bfloat16"',
        ),
    ],
)
def test_a_store_of_something_else_is_refused(run_main, kd, tmp_path, stores, flags, field):
    shutil.copytree(stores / "first", tmp_path / "cache")
    cache = ["--teacher_cache", tmp_path / "cache"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    run = run_main(*SHORT, *kd, *cache, *flags)
    assert run.code == 2 and field in run.err and "another folder" in run.err, run.err
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}


def test_a_store_of_another_teacher_or_other_pixels_is_refused(run_main, kd, tmp_path, monkeypatch):
    cache = ["--teacher_cache", tmp_path / "cache"]
    assert run_main(*SHORT, *kd, *cache).code == 0
    other = torch.load(kd[-1], weights_only=True)
    other["fc.bias"][0] += 1
    torch.save(other, tmp_path / "other.pth")
    run = run_main(*SHORT, *kd, "--teacher_path", tmp_path / "other.pth", *cache)
    assert run.code == 2 and 'created with teacher_path ["sha256 ' in run.err
    real = digits
    monkeypatch.setattr(readers, "digits", lambda is_train: invert(real(is_train)))
    run = run_main(*SHORT, *kd, *cache)
    assert run.code == 2 and "the augmented images differ: different pixels" in run.err


def test_a_store_of_the_other_weights_of_a_file_is_refused(run_main, kd, tmp_path):
    raw = torch.load(kd[-1], weights_only=True)
    ema = raw | {"fc.bias": raw["fc.bias"] + torch.arange(10)}
    torch.save({"model": raw, "model_ema": ema}, tmp_path / "both.pth")
    flags = [*SHORT, *kd, "--teacher_path", tmp_path / "both.pth"]
    flags += ["--teacher_cache", tmp_path / "cache"]
    assert run_main(*flags, "--use_ema", "true").code == 0
    run = run_main(*flags)  # auto chooses the EMA, too
    assert run.code == 0 and "the teacher is not loaded" in run.out
    run = run_main(*flags, "--use_ema", "false")
    assert run.code == 2 and 'this run uses ["--use_ema false, sha256' in run.err


def invert(source):
    load = source.load
    source.load = lambda index: 255 - load(index)
    return source


# ---------------------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def stores(kd, tmp_path_factory) -> Path:
    """Two full caches, 'first' and 'other', of seeds 0 and 1: 2 views of 72 rows, 64 in use."""
    folder = tmp_path_factory.mktemp("stores")
    for seed, name in enumerate(("first", "other")):
        argv = [*QUICK, *SHORT, *kd, "--seed", str(seed), "--teacher_cache", str(folder / name)]
        assert main.main(argv) == 0
    return folder


def change_rows(path: Path, change) -> None:
    rows = np.memmap(path, np.uint8, "r+", shape=(72, 20))
    change(rows)
    rows.flush()


def zero(rows) -> None:
    rows[[5, 9]] = 0


def flip_a_bit(rows) -> None:
    rows[20, 7] ^= 16


def shift(rows) -> None:
    rows[:] = np.roll(rows, 1, axis=0)


def take_from(stores: Path, cache: Path, source: str, suffixes: list[str]) -> None:
    for suffix in suffixes:
        shutil.copy((stores / source).with_suffix(suffix), cache / f"view-00001{suffix}")


BOTH = [".logits", ".sums"]
DAMAGES = {
    "cut off": lambda cache, stores: os.truncate(cache / "view-00001.logits", 1000),
    "deleted": lambda cache, stores: (cache / "view-00001.logits").unlink(),
    "too long": lambda cache, stores: os.truncate(cache / "view-00001.logits", 2000),
    "zeroed": lambda cache, stores: change_rows(cache / "view-00001.logits", zero),
    "one bit": lambda cache, stores: change_rows(cache / "view-00001.logits", flip_a_bit),
    "shifted": lambda cache, stores: change_rows(cache / "view-00001.logits", shift),
    "another view": lambda cache, stores: take_from(stores, cache, "first/view-00000", BOTH[:1]),
    "another view, whole": lambda cache, stores: take_from(stores, cache, "first/view-00000", BOTH),
    "another cache": lambda cache, stores: take_from(stores, cache, "other/view-00001", BOTH[:1]),
    "another cache, whole": lambda cache, stores: take_from(
        stores, cache, "other/view-00001", BOTH
    ),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_view_is_refused_and_left_as_it_is(run_main, kd, tmp_path, stores, damage):
    cache = tmp_path / "cache"
    shutil.copytree(stores / "first", cache)
    DAMAGES[damage](cache, stores)
    before = contents(cache)
    flags = [*SHORT, *kd, "--teacher_cache", cache]
    run = run_main(*flags)
    remedy = "delete view-00001.logits and view-00001.sums in that folder, then run the same"
    assert run.code == 2 and run.err.startswith("main.py: error: --teacher_cache"), run.err
    assert f"{cache}/view-00001.logits: " in run.err and remedy in run.err
    if damage in ("cut off", "deleted", "too long"):  # told before the first epoch
        causes = {name: f"was {name}" for name in DAMAGES} | {"too long": "is of another cache"}
        told = f"but must have 1,440 bytes: it {causes[damage]}"
        assert told in run.err and "Epoch" not in run.out
    if damage in ("zeroed", "one bit"):
        found = "2 of the rows 0 to 15" if damage == "zeroed" else "1 of the rows 16 to 31"
        where = "(5, 9)" if damage == "zeroed" else "(20)"
        assert f"{found} do not match their checksums {where}" in run.err
    assert contents(cache) == before


@pytest.mark.parametrize("damage", ["cut off", "zeroed"])
def test_damaged_logits_of_validation_images_are_refused(run_main, kd, tmp_path, stores, damage):
    cache = tmp_path / "cache"
    shutil.copytree(stores / "first", cache)
    (path,) = cache.glob("val-*.logits")
    content = path.read_bytes()
    path.write_bytes(content[:1000] if damage == "cut off" else content[:-80] + bytes(80))
    run = run_main(*SHORT, *kd, "--teacher_cache", cache)
    assert run.code == 2 and f"delete {path.name} and {path.stem}.sums" in run.err
    assert "acc1" not in run.out  # nothing was scored


def test_rows_without_the_manifest_of_their_cache_are_refused(run_main, kd, tmp_path, stores):
    cache = tmp_path / "cache"
    shutil.copytree(stores / "first", cache)
    (cache / "manifest.json").unlink()
    run = run_main(*SHORT, *kd, "--seed", 1, "--teacher_cache", cache)
    assert run.code == 2 and "holds logits but no manifest.json" in run.err


def test_a_view_that_is_deleted_or_whose_creation_was_interrupted_is_computed_again(
    run_main, kd, tmp_path, stores
):
    """In the latter case its files are empty, or have their full length but no checksum."""
    for logits, sums in ((None, None), (0, None), (1440, None), (1440, 0), (1440, 288)):
        cache = tmp_path / f"cache-{logits}-{sums}"
        shutil.copytree(stores / "first", cache)
        for suffix, size in ((".logits", logits), (".sums", sums)):
            path = cache / f"view-00001{suffix}"
            path.unlink() if size is None else path.write_bytes(bytes(size))
        run = run_main(*SHORT, *kd, "--teacher_cache", cache)
        assert run.code == 0 and "64 of 128 rows are cached" in run.out, run.err
        assert contents(cache) == contents(stores / "first")


def test_a_cache_of_the_first_format_is_refused(run_main, kd, tmp_path, stores):
    shutil.copytree(stores / "first", tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("id", None)
    path.write_text(json.dumps(manifest | {"format": 1}))
    run = run_main(*SHORT, *kd, "--teacher_cache", tmp_path / "cache")
    assert run.code == 2 and run.err.count("\n") == 1
    assert "holds a cache of format 1, but this version reads and writes format 3" in run.err
    assert "pass another folder" in run.err


# ---------------------------------------------------------------------------- changed images


@pytest.fixture
def photos(tmp_path) -> Path:
    """48 training and 9 validation images in files whose size does not depend on their pixels."""
    for split, count in (("train", 16), ("val", 3)):
        write_images(tmp_path / "photos" / split, ["ant", "bee", "cat"], count)
    for path in (tmp_path / "photos").rglob("*.jpg"):
        Image.open(path).save(path.with_suffix(".png"), compress_level=0)
        path.unlink()
    return tmp_path / "photos"


@pytest.fixture
def photo_flags(tmp_path) -> list[object]:
    """All flags but --data_path."""
    kd = random_teacher(tmp_path / "teacher-3.pth", 3)
    flags = ["--input_size", 32, "--epochs", 1, "--mixup", 0, "--cutmix", 0]
    return [*kd, *flags, "--teacher_cache", tmp_path / "cache", "--teacher_cache_dtype", "float32"]


def replace(path: Path) -> None:
    """Put the negative in the place of an image."""
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path, compress_level=0)


def shown_late(photos: Path) -> Path:
    """A training image that is not among the first 16 of view 0, whose pixels are compared."""
    paths = sorted((photos / "train").rglob("*.png"), key=str)
    return paths[view_order(0, 0, 48)[40]]


@pytest.mark.parametrize("data_set", ["IMNET", "folder"])
def test_one_replaced_training_image_is_noticed_by_its_stamps(
    run_main, photos, photo_flags, data_set
):
    flags = [*photo_flags, "--data_path", photos, "--data_set", data_set]
    assert run_main(*flags, "--teacher_cache_identity", "stamps").code == 0
    assert "the teacher is not loaded" in run_main(*flags).out  # though content is the default
    replace(shown_late(photos))
    run = run_main(*flags)
    assert run.code == 2 and "the images changed since their logits were cached" in run.err
    assert "the same paths and sizes, but different times of modification" in run.err
    assert "cp -p" in run.err and "another folder" in run.err
    Image.new("RGB", (10, 10)).save(shown_late(photos))
    run = run_main(*flags)
    assert run.code == 2 and "cached: their files have different sizes in bytes; use" in run.err


def test_copied_images_are_the_same_if_their_bytes_are(run_main, photos, photo_flags, tmp_path):
    assert run_main(*photo_flags, "--data_path", photos).code == 0
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere")
    copy, moved = tmp_path / "copy", ["--teacher_cache", tmp_path / "elsewhere"]
    shutil.copytree(photos, copy, copy_function=shutil.copyfile)  # with other time stamps
    flags = [*photo_flags, "--data_path", copy, *moved]
    for has_read in (True, False):  # once, also the validation images
        run = run_main(*flags)
        assert run.code == 0 and "the teacher is not loaded" in run.out
        assert ("reading the image files" in run.out) == has_read
    path = shown_late(copy)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for _ in range(2):  # the index keeps what the cache was filled with
        run = run_main(*flags)
        assert run.code == 2 and f"cached: 1 of them have different bytes ({path});" in run.err
    for index in (tmp_path / "elsewhere").glob("images-*.npy"):  # deleted or cut: costs time only
        index.unlink() if index.stat().st_size < 1000 else os.truncate(index, 500)
    run = run_main(*flags)
    assert run.code == 2 and "cached: the bytes of their files differ; use" in run.err
    content[-1] ^= 1
    path.write_bytes(content)
    assert "the teacher is not loaded" in run_main(*flags).out


def test_a_renamed_training_image_is_noticed(run_main, photos, photo_flags):
    assert run_main(*photo_flags, "--data_path", photos).code == 0
    path = photos / "train" / "cat" / "9.png"
    path.rename(path.with_name("99.png"))
    run = run_main(*photo_flags, "--data_path", photos)
    assert run.code == 2 and "they have different paths in the data folder" in run.err


def test_one_replaced_validation_image_is_asked_of_the_teacher_again(
    run_main, photos, photo_flags, tmp_path
):
    flags = [*photo_flags, "--data_path", photos]
    assert run_main(*flags, output_dir=tmp_path / "before").code == 0
    replace(photos / "val" / "bee" / "1.png")
    cached = run_main(*flags, output_dir=tmp_path / "cached")
    words = iter(flags)
    pairs = [(word, next(words)) for word in words]
    plain = [w for pair in pairs if not pair[0].startswith("--teacher_cache") for w in pair]
    online = run_main(*plain, output_dir=tmp_path / "online")
    assert cached.log == online.log
    scores = [
        [line for line in run.out.splitlines() if " validation images: acc1 " in line]
        for run in (cached, online)
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 1
    again = run_main(*flags, output_dir=tmp_path / "again")
    assert "the teacher is not loaded" in again.out and again.log == online.log


def test_one_changed_image_of_an_array_is_noticed(run_main, kd, tmp_path, monkeypatch):
    flags = [*SHORT, *kd, "--teacher_cache", tmp_path / "cache"]
    assert run_main(*flags).code == 0
    chosen = stratified(digits(is_train=True).targets, 72, seed=0)
    late = chosen[view_order(0, 0, 72)[40]]  # not among the 16 images that are looked at
    with np.load(DIGITS_FILE) as file:
        arrays = dict(file)
    arrays["images"][np.flatnonzero(~arrays["is_test"].astype(bool))[late], 3, 3] += 1
    np.savez(tmp_path / "digits.npz", **arrays)
    monkeypatch.setattr(readers, "DIGITS_FILE", tmp_path / "digits.npz")
    run = run_main(*flags)
    assert run.code == 2 and "were cached: they have different pixels; use the same" in run.err


def test_a_class_folder_whose_name_is_not_text_can_be_cached(run_main, photos, photo_flags):
    for split in ("train", "val"):
        folder = os.fsencode(photos / split)
        os.rename(os.path.join(folder, b"bee"), os.path.join(folder, b"b\xe9e"))
    run = run_main(*photo_flags, "--data_path", photos)
    assert run.code == 0, run.err


def test_a_damaged_manifest_is_refused(run_main, kd, tmp_path):
    for content in (b'{"seed": ', b"[]", b"\xff", b'{"format": 3}'):
        (tmp_path / "manifest.json").write_bytes(content)
        run = run_main(*SHORT, *kd, "--teacher_cache", tmp_path)
        assert run.code == 2 and "manifest.json: is incomplete" in run.err


def test_a_disk_too_small_is_told_before_anything_is_computed(run_main, kd, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    run = run_main(*SHORT, *kd, "--teacher_cache", tmp_path / "cache")
    assert run.code == 2 and "needs 2.56 kB more, but only 2 kB are free" in run.err
    assert "Teacher cifar_resnet8" not in run.out


def test_an_incomplete_cache_on_a_read_only_disk_ends_before_training(
    run_main, kd, tmp_path, monkeypatch
):
    cache = ["--teacher_cache", tmp_path / "cache", "--teacher_views"]
    assert run_main(*SHORT, *kd, *cache, 1).code == 0

    def refuse(**keywords):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert run_main(*SHORT, *kd, *cache, 1).code == 0
    run = run_main(*SHORT, *kd, *cache, 2)
    assert run.code == 2 and f"--teacher_cache {tmp_path / 'cache'}: cannot write there" in run.err
    assert "Teacher cifar_resnet8" not in run.out


def test_a_disk_full_in_the_middle_keeps_what_is_whole(run_main, kd, tmp_path, monkeypatch):
    cache = ["--teacher_cache", tmp_path / "cache", "--teacher_cache_dtype", "float32"]
    real = LogitFile._write_at

    def full(self, file, position, content):
        if self.stem.name == "view-00001":
            raise OSError(28, "No space left on device")
        real(self, file, position, content)

    monkeypatch.setattr(LogitFile, "_write_at", full)
    run = run_main(*SHORT, *kd, *cache)
    assert run.code == 2 and "No space left" in run.err and "is complete" in run.err
    monkeypatch.setattr(LogitFile, "_write_at", real)
    run = run_main(*SHORT, *kd, *cache, output_dir=tmp_path / "after")
    assert "64 of 128 rows are cached" in run.out
    assert run.log == run_main(*SHORT, *kd, output_dir=tmp_path / "online").log


def test_a_file_system_that_maps_no_files_is_one_line(run_main, kd, tmp_path, monkeypatch):
    def refuse(*args, **keywords):
        raise OSError(19, "No such device")

    monkeypatch.setattr("teacher.logit_store.mmap.mmap", refuse)
    run = run_main(*SHORT, *kd, "--teacher_cache", tmp_path)
    assert run.code == 2 and len(run.err.splitlines()) == 1
    assert f"--teacher_cache {tmp_path}" in run.err and "does not map files into memory" in run.err


@pytest.mark.parametrize("flags", ["--teacher_cache x", "--teacher_cache_only true"])
def test_a_store_without_a_teacher_is_refused(run_main, flags):
    assert run_main(*flags.split()).code == 2


@pytest.mark.parametrize("part", ["1", "0:3", "1:1", "2:1", "a:b", "-1:1"])
def test_a_range_that_is_none_is_refused(run_main, kd, tmp_path, part):
    flags = [*SHORT, *kd, "--teacher_cache", tmp_path, "--teacher_cache_only", "true"]
    run = run_main(*flags, f"--teacher_cache_range={part}")
    assert run.code == 2 and f"--teacher_cache_range {part}: needs" in run.err


# ------------------------------------------------------------------------------------- rows


LOGITS = torch.randn(50, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def round_trip(row_format: RowFormat) -> torch.Tensor:
    rows = row_format.encode(*row_format.shorten(LOGITS))
    assert rows.nbytes == 50 * row_format.dtype.itemsize
    return row_format.decode(rows)


def test_full_rows_come_back_rounded_only():
    for topk in (None, 30):  # as many as there are classes
        assert torch.equal(round_trip(RowFormat(30, "float32", topk)), LOGITS.float())
    assert torch.equal(round_trip(RowFormat(30, "float16")), LOGITS.half().float())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_largest_come_back_and_the_others_share_their_probability(temperature):
    seen = round_trip(RowFormat(30, "float32", 5, temperature)).double()
    largest = LOGITS.topk(5).indices
    wanted = (LOGITS / temperature).softmax(1)
    found = (seen / temperature).softmax(1)
    torch.testing.assert_close(found.gather(1, largest), wanted.gather(1, largest))
    torch.testing.assert_close(seen.gather(1, largest), LOGITS.gather(1, largest).float().double())
    others = torch.ones_like(seen, dtype=torch.bool).scatter(1, largest, False)
    rest = found[others].view(50, 25)
    even = (wanted[others].view(50, 25).sum(1, keepdim=True) / 25).expand(-1, 25)
    torch.testing.assert_close(rest, even)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 7e4])
def test_logits_that_do_not_fit_are_refused(bad):
    logits = LOGITS.clone()
    logits[3, 2] = bad
    rest = torch.full((1, 30), -float("inf")).index_fill(1, torch.arange(4), 0.0)
    for topk, refused in ((None, logits), (4, logits), (4, rest)):
        with pytest.raises(UserError, match="not finite, or too large.*float16"):
            row_format = RowFormat(30, "float16", topk)
            row_format.encode(*row_format.shorten(refused))


def row_of(places: range) -> torch.Tensor:
    """A different row for each place, none of it zero."""
    return torch.tensor([[place * 7.0 + column + 1 for column in range(10)] for place in places])


def fill_until_killed(stem: Path, order: list[range], device: int) -> None:
    """Write rows that differ a little from device to device, as real ones do."""
    file = LogitFile.open(stem, 4000, RowFormat(10, "float32"), "store")
    for places in order:
        file.write([(places, (row_of(places) + device / 4,))])


def assert_no_false_row(stem: Path) -> int:
    file = LogitFile.open(stem, 4000, RowFormat(10, "float32"), "store")
    complete = np.flatnonzero(file.sums)
    for place in complete.tolist():
        row = file.read(range(place, place + 1))
        right = row_of(range(place, place + 1))
        assert torch.equal(row, right) or torch.equal(row, right + 1 / 4)
    return len(complete)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_while_two_fill_one_view_leave_no_false_row(tmp_path):
    rng = random.Random(0)
    order = [range(first, first + 8) for first in range(0, 4000, 8)]
    kills = in_the_middle = 0
    view = 0
    while kills < 20:
        stem = tmp_path / f"view-{view}"
        children = []
        for device in range(2):
            rng.shuffle(order)
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    torch.set_num_threads(1)
                    fill_until_killed(stem, order, device)
                    code = 0
                finally:
                    os._exit(code)
            children.append(pid)
        time.sleep(rng.uniform(0.01, 0.1))
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] in (0, signal.SIGKILL)
        kills += 1
        count = assert_no_false_row(stem) if stem.with_suffix(".sums").exists() else 0
        in_the_middle += 0 < count < 4000
        view += count == 4000
    assert in_the_middle >= 5


def test_rows_with_gaps_between_them_are_kept_where_they_belong(tmp_path):
    file = LogitFile.open(tmp_path / "v", 100, RowFormat(10, "float32"), "store")
    file.write([(places, (row_of(places),)) for places in (range(1, 40, 3), range(60, 70))])
    assert torch.equal(file.read(range(4, 30, 3)), row_of(range(4, 30, 3)))
    assert file.read(range(4, 30)) is None and file.first_missing(100) == 0
    file.write([(range(60, 72), (-row_of(range(60, 72)),))])  # what is there stays
    assert torch.equal(file.read(range(60, 70)), row_of(range(60, 70)))
    assert torch.equal(file.read(range(70, 72)), -row_of(range(70, 72)))
    assert file.missing() == 100 - 13 - 12


def test_no_step_waits_for_the_disk_and_rows_are_there_before_their_marks(tmp_path, monkeypatch):
    store = logit_store.LogitStore(tmp_path, 64, 64, RowFormat(10, "float32"), "store")
    threads, may_go, fsync = [], threading.Event(), os.fsync

    def slow_fsync(descriptor: int) -> None:
        threads.append(threading.get_ident())
        assert may_go.wait(10)
        fsync(descriptor)

    monkeypatch.setattr(logit_store, "PENDING_BYTES", 1)
    monkeypatch.setattr(logit_store.os, "fsync", slow_fsync)
    for first in (0, 8):
        places = range(first, first + 8)
        assert torch.equal(store.put(0, places, row_of(places)), row_of(places))
    assert not np.fromfile(tmp_path / "view-00000.sums", np.uint32).any()
    may_go.set()
    store.flush()
    assert torch.equal(store.file_of(0).read(range(16)), row_of(range(16)))
    assert len(threads) == 2 and threading.get_ident() not in threads
    monkeypatch.setattr(LogitFile, "_write_at", lambda *_: (_ for _ in ()).throw(OSError(28, "x")))
    with pytest.raises(UserError, match="what was written before is complete"):
        for first in range(16, 64, 8):  # at a later step, at the end at the latest
            store.put(0, range(first, first + 8), row_of(range(8)))
        store.flush()


def test_the_next_batch_is_asked_for_and_rows_are_sent_as_they_are_stored(
    run_main, kd, stores, monkeypatch
):
    asked, read, sent = [], [], []
    real_read, real_send = LogitFile.read, logit_store.send
    monkeypatch.setattr(LogitFile, "will_need", lambda self, places: asked.append(places))

    def note_read(self, places, device):
        read.append(places)
        return real_read(self, places, device)

    def note_send(part, device):
        sent.append(part.nbytes)
        return real_send(part, device)

    monkeypatch.setattr(LogitFile, "read", note_read)
    monkeypatch.setattr(logit_store, "send", note_send)
    flags = [*SHORT, *kd, "--teacher_cache", stores / "first", "--disable_eval", "true"]
    assert run_main(*flags, "--teacher_eval", "false").code == 0
    batches = [range(first, first + 16) for first in (0, 16, 32, 48)]
    assert read == batches * 2 and [a for a in asked if a] == batches[1:] * 2
    assert sent == [16 * 10 * 2] * 8  # float16


def test_of_two_that_compute_a_row_at_once_the_first_is_kept(tmp_path, monkeypatch):
    """Their rows may differ in the last bits, and a row must fit its checksum."""
    first, second = (
        LogitFile.open(tmp_path / "v", 100, RowFormat(10, "float32"), "store") for _ in range(2)
    )
    written, fsync = threading.Event(), os.fsync

    def slow_fsync(descriptor: int) -> None:
        if not written.is_set():  # the first is between its rows and their checksums
            written.set()
            time.sleep(0.3)
        fsync(descriptor)

    monkeypatch.setattr(logit_store.os, "fsync", slow_fsync)
    thread = threading.Thread(target=first.write, args=([(range(8), (row_of(range(8)),))],))
    thread.start()
    assert written.wait(10)
    second.write([(range(10), (-row_of(range(10)),))])
    thread.join()
    assert torch.equal(second.read(range(8)), row_of(range(8)))
    assert torch.equal(first.read(range(8, 10)), -row_of(range(8, 10)))


@pytest.mark.parametrize(
    ("num_classes", "dtype", "topk"),
    [
        (5, "float16", None),
        (10, "float16", None),
        (5, "float32", None),
        (30, "float16", 3),
        (30, "float32", 3),
        (70_000, "float16", 3),
    ],
)
def test_a_change_of_any_byte_of_any_row_format_is_found(tmp_path, num_classes, dtype, topk):
    row_format = RowFormat(num_classes, dtype, topk)
    file = LogitFile.open(tmp_path / "v", 4, row_format, "store")
    logits = torch.randn(4, num_classes, generator=torch.Generator().manual_seed(0))
    file.write([(range(4), row_format.shorten(logits))])
    file.read(range(4))
    size = row_format.dtype.itemsize
    content = (tmp_path / "v.logits").read_bytes()
    assert len(content) == 4 * size
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (tmp_path / "v.logits").write_bytes(changed)
        with pytest.raises(UserError, match=rf"1 of the rows 0 to 3 .*\({position // size}\)"):
            file.read(range(4))


def test_the_manifest_tells_what_the_store_was_made_with(run_main, kd, tmp_path):
    run_main(*SHORT, *kd, "--teacher_cache", tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["teacher_arch"] == "cifar_resnet8" and manifest["batch_size"] == 16
    assert manifest["images"] == 72 and manifest["note"]["timm"] == timm.__version__
