"""Images in tar files: the same training as with folders, and what is wrong with a tar file."""

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forked import run_group
from helpers import QUICK, is_same, teacher_flags, write_images

import datasets
from arguments.parsing import parse_args
from data import tars
from data.readers import image_folder, images_without_label
from data.sources import ImageSource
from utils import UserError

SMALL = ["--input_size", 32, "--batch_size", 8, "--epochs", 2]


def pack(path: Path, files: dict[str, bytes], **keywords: object) -> Path:
    """Write a tar file with these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **keywords) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """The images below a folder, in an order that is not that of their names."""
    paths = sorted(folder.rglob("*.jpg"), key=lambda path: path.read_bytes())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def pack_folder(folder: Path, shards: Path, count: int = 3, with_cls: bool = False) -> None:
    """The images of a folder in several tar files, each with its class folder or a file .cls."""
    files = list(contents(folder).items())
    for number in range(count):
        members = {}
        for name, content in files[number::count]:
            members[f"./{name}"] = content
            if with_cls:
                members[f"./{name[:-4]}.{'CLS' if number else 'cls'}"] = (
                    name.split("/")[0].encode() + b"\n"
                )
        pack(shards / f"{number:02}.tar", members)


def is_equal(a: ImageSource, b: ImageSource) -> bool:
    """Whether two sources hold the same images, names and labels in the same order."""
    same = a.classes == b.classes and a.identity() == b.identity() and len(a) == len(b)
    return same and all(
        np.array_equal(a[index][0], b[index][0]) and a[index][1] == b[index][1]
        for index in range(len(a))
    )


# ---------------------------------------------------------------------------- as with folders


@pytest.mark.parametrize("with_cls", [False, True])
def test_tar_files_hold_what_folders_hold(tmp_path, with_cls):
    """Names that sort differently as a whole and as folder and file, or are not UTF-8."""
    odd = "10" if with_cls else os.fsdecode(b"caf\xe9")
    write_images(tmp_path / "mine", ["a", "a/z", "a.b", odd], 3)
    pack_folder(tmp_path / "mine", tmp_path / "shards", with_cls=with_cls)
    folder = image_folder(str(tmp_path / "mine"))
    source = tars.images_in_tars(f"{tmp_path}/shards/*.tar")
    assert is_equal(source, folder)
    assert is_equal(pickle.loads(pickle.dumps(source)), folder)
    pile = tars.tars_without_label(str(tmp_path / "shards"), ["x"])
    assert is_equal(pile, images_without_label(str(tmp_path / "mine"), ["x"]))
    assert [pile.open(i).read() for i in (0, 5)] == [
        Path(tmp_path / "mine", os.fsdecode(pile.names(np.array([i]))[0])).read_bytes()
        for i in (0, 5)
    ]


def test_a_run_that_goes_on_with_tar_files_ends_in_the_bits_of_one_on_folders(imnet, tmp_path):
    """Two processes, unlabeled images; a cache of the one run would be read by the other."""
    write_images(tmp_path / "pile", ["x/y", "z"], count=4)
    for part in ("train", "val"):
        pack_folder(imnet / part, tmp_path / "shards" / part, with_cls=part == "val")
    pack_folder(tmp_path / "pile", tmp_path / "more")
    teacher = tmp_path / "teacher.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("cifar_resnet8", num_classes=3).state_dict(), teacher)

    def run(name: str, *flags: object) -> dict:
        out = tmp_path / name
        flags = *SMALL, *teacher_flags(teacher), "--teacher_classes", names, *flags
        run_group(*QUICK, *flags, "--output_dir", out, processes=2)
        return torch.load(out / "checkpoint-1.pth", weights_only=True)

    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    cached = ["--mixup_mode", "pair", "--teacher_cache"]
    folders = ["--data_path", imnet, "--unlabeled", tmp_path / "pile"]
    shards = ["--data_set", "tars", "--data_path", tmp_path / "shards", "--num_workers", 1]
    shards += ["--unlabeled", tmp_path / "more" / "*.tar"]
    expected = run("a", *folders, *cached, tmp_path / "cache-a")
    begun = ["--resume", tmp_path / "a" / "checkpoint-0.pth"]
    found = run("b", *shards, *begun, *cached, tmp_path / "cache-b")
    assert is_same(found["model"], expected["model"])
    assert found["images"] == expected["images"] and found["scores"] == expected["scores"]
    manifests = [
        json.loads((tmp_path / f"cache-{name}" / "manifest.json").read_text()) for name in "ab"
    ]
    assert [manifest.pop("id") for manifest in manifests] and manifests[0] == manifests[1]


def test_labels_in_a_file_name_images_within_tar_files(tmp_path):
    write_images(tmp_path / "mine", ["x", "y"], count=3)
    pack_folder(tmp_path / "mine", tmp_path / "shards")
    (tmp_path / "labels.csv").write_text("y/0.jpg,2\nx/2.jpg,10\nx/0.jpg,2\n")
    flags = ["--labels", str(tmp_path / "labels.csv"), "--disable_eval", "true", "--data_path"]
    found, expected = (
        datasets.open_splits(parse_args([*flags, str(path)])).train
        for path in (f"{tmp_path}/shards/00.tar,{tmp_path}/shards/0[12].tar", tmp_path / "mine")
    )
    assert is_equal(found, expected) and found.classes == ["2", "10"]
    (tmp_path / "labels.csv").write_text("x/0.jpg,2\nx/9.jpg,10\n")
    with pytest.raises(UserError, match="labels.csv line 2: .*x/9.jpg is not a file"):
        datasets.open_splits(parse_args([*flags, f"{tmp_path}/shards/*.tar"]))


def test_tar_files_without_classes_train_on_the_teacher_alone(tmp_path):
    (tmp_path / "names.txt").write_text("x\ny\n")
    pack(tmp_path / "0.tar", {"1.jpg": b"1", "0.jpg": b"2"})
    flags = [*teacher_flags(__file__), "--teacher_classes", tmp_path / "names.txt"]
    args = parse_args([*map(str, flags), "--data_path", f"{tmp_path}/0.tar", "--kd_alpha", "1"])
    train, val, _ = datasets.open_splits(args)
    assert val is None and train.classes == ["x", "y"] and train.targets.tolist() == [2, 2]
    assert train.open(0).read() == b"2"


# ------------------------------------------------------------------------------- the index


def test_an_index_is_made_once_and_again_for_tar_files_that_changed(tmp_path, monkeypatch, capsys):
    """Beside them, or in the user's cache if nothing can be written there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    scanned = []
    scan = tars._scan
    monkeypatch.setattr(tars, "_scan", lambda shard: [scan(shard), scanned.append(shard.path)][0])
    first = {"a/1.jpg": b"one", "b/2.jpg": b"two", "notes.txt": b""}
    shards = [
        str(pack(tmp_path / "s" / f"{n}.tar", f)) for n, f in enumerate([first, {"b/3.jpg": b"3"}])
    ]

    def read() -> list[bytes]:
        scanned.clear()
        source = tars.images_in_tars(str(tmp_path / "s"))
        return [source.open(index).read() for index in range(len(source))]

    assert read() == [b"one", b"two", b"3"] and sorted(scanned) == shards
    assert read() == [b"one", b"two", b"3"] and not scanned
    assert len(tars.find_shards(str(tmp_path / "s" / "*"))) == 2  # without the index
    assert capsys.readouterr().out.count("left out (.txt 1)") == 2
    (index,) = (tmp_path / "s").glob("index-*.npz")
    index.write_bytes(index.read_bytes()[:-100])
    assert read() == [b"one", b"two", b"3"] and sorted(scanned) == shards
    before = os.stat(shards[1])
    pack(Path(shards[1]), {"b/3.jpg": b"4"})  # of the same size
    os.utime(shards[1], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert read() == [b"one", b"two", b"4"] and scanned
    index.unlink()
    index.mkdir()
    for count in (2, 0):
        assert read() == [b"one", b"two", b"4"] and len(scanned) == count
    assert "kept in " + str(tmp_path / "home") in capsys.readouterr().out
    (tmp_path / "home").rename(tmp_path / "moved")
    (tmp_path / "home").write_bytes(b"")  # no folder
    assert read() == [b"one", b"two", b"4"] and "each run makes it" in capsys.readouterr().out


def test_a_tar_file_that_changes_during_a_run_is_not_read(tmp_path):
    """Also if it is open by then."""
    path = pack(tmp_path / "s.tar", {"a/1.jpg": b"1", "b/2.jpg": b"2"})
    source = tars.images_in_tars(str(path))
    with pytest.raises(UserError, match=r"s.tar/b/2.jpg \(cannot identify image file\);"):
        source.load(1)
    pack(path, {"a/0.jpg": b"0", "a/1.jpg": b"1", "b/2.jpg": b"2"})
    with pytest.raises(UserError, match="s.tar/b/2.jpg .*s.tar was changed while the run read it"):
        source.load(1)


def test_more_tar_files_than_may_be_open_are_read(tmp_path, monkeypatch):
    paths = [pack(tmp_path / f"{n:03}.tar", {f"{n % 2}/{n}.jpg": b"%d" % n}) for n in range(40)]
    source = tars.images_in_tars(",".join(map(str, paths)))
    monkeypatch.setattr(tars, "_opened", lru_cache(8)(tars._opened.__wrapped__))
    free = len(os.listdir("/proc/self/fd"))
    for index in np.random.default_rng(0).integers(40, size=100).tolist():
        assert source.open(index).read() == source.names(np.array([index]))[0][2:-4]
    assert len(os.listdir("/proc/self/fd")) <= free + 8


# ------------------------------------------------------------------------------- bad input


def link(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a/1.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "../b/1.jpg"
        tar.addfile(member)


def compress(path: Path) -> None:
    pack(path, {"a/1.jpg": b"1"})
    path.write_bytes(gzip.compress(path.read_bytes()))


def cut(path: Path, keep: int) -> None:
    pack(path, {"a/1.jpg": b"1" * 700, "b/2.jpg": b"2" * 700})
    path.write_bytes(path.read_bytes()[:keep])


def join(path: Path) -> None:
    content = pack(path, {"a/1.jpg": b"1"}).read_bytes()
    path.write_bytes(content + pack(path, {"b/2.jpg": b"1"}).read_bytes())


def packed(*files: dict[str, bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        for number, members in enumerate(files):
            pack(path.with_name(f"{number}{path.name}"), members)

    return write


BAD = {
    "no tar file; pass a folder of tar files, a glob in quotes": lambda path: None,
    "0.tar: is compressed (gzip), so no image can be read without": compress,
    "0.tar: a/1.jpg is a link, or stored in parts; write the file": link,
    "0.tar: is not one whole tar file (unexpected end of data); co": lambda path: cut(path, 900),
    "it ends before or goes on after byte 1536": lambda path: cut(path, 1700),
    "it ends before or goes on after byte 3072": lambda path: cut(path, 3072),
    "it ends before or goes on after byte 1024": join,
    "0.tar: is not one whole tar file (empty file)": lambda path: path.write_bytes(b""),
    "(truncated header)": lambda path: path.write_bytes(b"no tar"),
    "no image in them (left out: .txt 1); images end in": packed({"a.txt": b""}),
    "a/1.jpg is in {0}/00.tar and again in {0}/10.tar; names": packed(
        {"a/1.jpg": b"1"}, {"a/1.jpg": b"2"}
    ),
    "2 of 3 images have no class (b/2.jpg); each needs a file .cls": packed(
        {"a/1.jpg": b"", "a/1.cls": b"0"}, {"b/2.jpg": b"", "b/3.jpg": b""}
    ),
    "1 of 2 images have no class (1.jpg); each needs a file .cls": packed(
        {"1.jpg": b"", "b/2.jpg": b""}
    ),
    "00.tar: 1.cls is not a class: a number or a name, as text": packed(
        {"1.jpg": b"", "1.cls": b"\x80\x04K\x01."}
    ),
    "2 of 2 images have no class (a/1.x.jpg); each needs a file .cls": packed(
        {"a/1.x.jpg": b"", "a/1.cls": b"0", "b/2.x.jpg": b"", "b/2.cls": b"1"}
    ),
    "00.tar: 1.jpg and 1.png share 1.cls; write it again with one": packed(
        {"1.jpg": b"", "1.png": b"", "1.cls": b"0"}
    ),
    "first folders within the tar files, Train, val, look like splits": packed(
        {"Train/a/1.jpg": b"1", "val/a/2.jpg": b"1"}
    ),
    "0.tar: cannot be read (No such file or directory); copy it": lambda path: path.symlink_to(
        "no"
    ),
    "has a single class (a), so nothing can be learned": packed({"a/1.jpg": b"1"}),
}


@pytest.mark.parametrize("message", BAD)
def test_a_tar_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, run_main, message):
    BAD[message](tmp_path / "0.tar")
    run = run_main("--data_path", tmp_path / "*.tar")
    assert run.code == 2 and len(run.err.splitlines()) == 1
    assert run.err.startswith(f"main.py: error: --data_path {tmp_path}/")
    assert message.format(tmp_path) in run.err


def test_a_folder_of_training_and_validation_tars_is_not_trained_on_as_a_whole(tmp_path, run_main):
    for number, name in enumerate(("set-train-0.tar", "set-validation-0.tar")):
        pack(tmp_path / name, {f"{label}/{number}.jpg": b"" for label in "ab"})
    run = run_main("--data_set", "tars", "--data_path", tmp_path)
    assert run.code == 2 and "say both training and validation; pass each" in run.err
    assert len(tars.images_in_tars(f"{tmp_path}/*-train-*.tar")) == 2
    (tmp_path / "set-validation-0.tar").unlink()
    compress(tmp_path / "set-train-1.tgz")  # beside others it is not left out
    run = run_main("--data_set", "tars", "--data_path", tmp_path)
    assert run.code == 2 and "set-train-1.tgz: is compressed (gzip)" in run.err


def test_classes_of_validation_that_training_does_not_know_are_refused(tmp_path, run_main):
    pack(tmp_path / "train" / "0.tar", {"1.jpg": b"", "1.cls": b"9", "2.jpg": b"", "2.cls": b"10"})
    pack(tmp_path / "val" / "0.tar", {"1.jpg": b"", "1.cls": b"11"})
    run = run_main("--data_set", "tars", "--data_path", tmp_path)
    assert run.code == 2 and "val: 11, the class of 1.jpg, is not one of the classes" in run.err
    assert "which are 9, 10" in run.err
