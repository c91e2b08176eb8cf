"""Folders that are laid out in other ways: without train and val, uneven, labeled by a file."""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import run_group
from helpers import CPU, QUICK, teacher_flags, tree, write_images

import datasets
import losses
from arguments.parsing import parse_args
from data.readers import labeled_images
from data.sources import ImageSource
from losses import WeightedCrossEntropy
from training.criterion import make_criterion

SMALL = ["--input_size", 32, "--batch_size", 8]


def parsed(*flags: object) -> argparse.Namespace:
    return parse_args(["--num_workers", "0", "--batch_size", "16", *map(str, flags)])


def names_of(source: ImageSource) -> list[str]:
    return [os.fsdecode(name) for name in source.names(np.arange(len(source))).tolist()]


def score(out: str, name: str) -> float:
    return float(next(line.split()[1] for line in out.splitlines() if line.startswith(f"{name} ")))


@pytest.fixture
def classes(tmp_path) -> Path:
    """Class folders without train and val: eight images of each of three classes."""
    write_images(tmp_path / "mine", ["ant", "bee", "cat"])
    return tmp_path / "mine"


# ------------------------------------------------------------------- without train and val


def test_a_fifth_of_class_folders_is_held_out_as_by_holdout(classes, capsys):
    args = parsed("--data_path", classes)
    data = datasets.build_data(args, CPU)
    assert "4 of its 24 images, a fifth of each class, are held out" in capsys.readouterr().out
    assert (args.data_set, args.holdout) == ("image_folder", 4)
    flags = ["--data_set", "image_folder", "--data_path", classes, "--holdout"]
    same, other = (datasets.build_data(parsed(*flags, count), CPU) for count in (4, 9))
    for a, b in ((data.train, same.train), (data.val, same.val)):
        assert names_of(a) == names_of(b) and a.targets.tolist() == b.targets.tolist()
    assert not set(names_of(data.train)) & set(names_of(data.val))
    assert sorted(np.bincount(data.val.targets)) == [1, 1, 2]
    given = datasets.build_data(parsed("--data_path", classes, "--holdout", 9), CPU)
    assert names_of(given.val) == names_of(other.val) and len(given.val) == 9


def test_nothing_is_held_out_where_nothing_is_evaluated_or_there_is_a_folder(classes, tmp_path):
    flags = ["--data_path", classes, "--disable_eval", "true"]
    data = datasets.build_data(parsed(*flags), CPU)
    assert len(data.train) == 24 and data.val is None
    write_images(tmp_path / "other", ["ant", "bee", "cat"], count=2)
    data = datasets.build_data(
        parsed("--data_path", classes, "--eval_data_path", tmp_path / "other"), CPU
    )
    assert (len(data.train), len(data.val)) == (24, 6)


def test_teacher_student_resume_and_evaluation_hold_out_the_same_images(
    run_main, classes, tmp_path
):
    flags = [*SMALL, "--data_path", classes, "--epochs", 1]
    teacher = run_main(*flags, "--check_data", "true", output_dir=tmp_path / "t")
    assert teacher.code == 0 and "All 24 images can be read" in teacher.out, teacher.err
    kd = teacher_flags(tmp_path / "t" / "checkpoint-best.pth")
    student = run_main(*flags, *kd, "--seed", 5, output_dir=tmp_path / "s")
    assert student.code == 0 and "trained on" not in student.out, student.err
    saved = [run.checkpoint("best") for run in (teacher, student)]
    assert saved[0]["images"] == saved[1]["images"] and saved[0]["args"]["holdout"] == 4
    longer = [*SMALL, "--data_path", classes, "--epochs", 2]
    resumed = run_main(*longer, output_dir=tmp_path / "t")
    assert resumed.code == 0 and "Resumed from" in resumed.out, resumed.err
    evaluation = ["--eval", "true", "--resume", tmp_path / "t" / "checkpoint-1.pth"]
    for where in ([], ["--data_path", classes]):  # alone, and as the README has it
        scored = run_main(*evaluation, *where)
        assert scored.code == 0 and ": 4 held-out images" in scored.out, scored.err
        loss = resumed.log[-1]["test_loss"]
        assert score(scored.out, "test_loss") == pytest.approx(loss, abs=1e-4)

    whole = [*SMALL, "--data_path", classes, "--epochs", 1, "--disable_eval", "true"]
    run_main(*whole, output_dir=tmp_path / "whole")
    untold = run_main(*flags, *teacher_flags(tmp_path / "whole" / "checkpoint-0.pth"))
    assert "was trained on 4 of the 4 held-out images" in untold.out
    (classes / "ant" / "7.jpg").unlink()  # a fifth of 23 images are as many
    more = run_main(*flags, *teacher_flags(tmp_path / "t" / "checkpoint-best.pth"))
    assert "with as many, but different images held out" in more.out


def test_images_that_training_may_have_seen_are_not_scored_in_silence(run_main, classes, tmp_path):
    run_main(*SMALL, "--data_path", classes, "--epochs", 1, output_dir=tmp_path / "out")
    flags = ["--eval", "true", "--resume", tmp_path / "out" / "checkpoint-0.pth"]
    other = run_main(*flags, "--data_path", classes, "--holdout", 9)
    assert other.code == 0 and "it may have been trained on them" in other.out
    shutil.copy(classes / "ant" / "0.jpg", classes / "ant" / "new.jpg")
    for where in ([], ["--data_path", classes]):
        run = run_main(*flags, *where)
        assert run.code == 2 and "are not the images that the training of" in run.err
    flags += ["--data_set", "image_folder", "--eval_data_path", classes]
    scored = run_main(*flags)
    assert scored.code == 0 and ": 25 images" in scored.out, scored.err
    run = run_main(*flags, "--calibrate", "true")  # on the images that the training held out
    assert run.code == 2 and "the training images are needed too; pass --data_path" in run.err
    run_main(
        *SMALL, "--data_path", classes, "--epochs", 1, "--disable_eval", output_dir=tmp_path / "all"
    )
    run = run_main("--eval", "true", "--resume", tmp_path / "all" / "checkpoint-0.pth")
    assert run.code == 2 and "held out none of its training images" in run.err


def test_a_run_records_its_validation_images_and_does_not_go_on_with_others(
    run_main, imnet, tmp_path
):
    def recorded(name: str) -> str:
        return json.loads((tmp_path / name / "args.json").read_text())["val_images"]

    flags = [*SMALL, "--epochs", 1, "--data_path"]
    assert run_main(*flags, imnet, output_dir=tmp_path / "a").code == 0
    shutil.copytree(imnet, tmp_path / "moved")
    assert run_main(*flags, tmp_path / "moved", "--seed", 1, output_dir=tmp_path / "b").code == 0
    assert recorded("a") == recorded("b")
    (imnet / "val" / "bee" / "1.jpg").unlink()
    longer = run_main(*flags, imnet, "--epochs", 2, output_dir=tmp_path / "a")
    assert longer.code == 2 and "was trained with different validation images" in longer.err
    assert run_main(*flags, imnet, output_dir=tmp_path / "c").code == 0
    assert recorded("c") != recorded("a")
    moved = run_main(*flags, tmp_path / "moved", "--epochs", 2, output_dir=tmp_path / "a")
    assert moved.code == 0 and "Resumed from" in moved.out, moved.err


# What a folder holds, the flags, and the error.
LAYOUTS = {
    "valid": ("train valid", "", "no folder val, but valid; rename valid to val, or pass "
    "--data_set image_folder --data_path DATA/train --eval_data_path DATA/valid"),
    "test": ("train test", "", "no folder val, but test; rename test to val"),
    "both": ("training validation", "", "no folder train, but training; rename training to train, "
    "or pass --data_set image_folder --data_path DATA/training --eval_data_path DATA/validation"),
    "none": ("train", "", "no folder val; add it, or pass --holdout N"),
    "railway": ("car train", "", "if train and car are classes, pass --data_set image_folder"),
    "capital": ("Train Val", "", "no folder train, but Train; rename Train to train"),
    "explicit": ("train val", "--data_set image_folder", "holds train and val, which look like"),
    "not evaluated": ("train/a val/a", "--data_set image_folder --disable_eval true",
    "holds train and val, which look like splits, not classes; pass --data_set IMNET"),
    "one": ("photos", "", "has a single class (photos), so nothing can be learned"),
    "one of two": ("train/a val/a", "", "has a single class (a), so nothing can be learned"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_that_look_like_splits_are_refused(run_main, tmp_path, layout):
    folders, flags, error = LAYOUTS[layout]
    write_images(tmp_path, folders.split(), count=1)
    run = run_main("--data_path", tmp_path, *flags.split())
    assert run.code == 2 and error.replace("DATA", str(tmp_path)) in run.err, run.err
    assert len(run.err.splitlines()) <= 2


def test_classes_that_differ_only_in_case_are_reported(classes, capsys):
    flags = ["--data_path", classes, "--disable_eval", "true"]
    datasets.build_data(parsed(*flags), CPU)
    assert "upper and lower case" not in capsys.readouterr().out
    write_images(classes, ["Bee"], count=1)
    datasets.build_data(parsed(*flags), CPU)
    assert "differ only in upper and lower case: Bee, bee; if they" in capsys.readouterr().out


def test_validation_images_with_the_bytes_of_training_images_are_reported(classes, capsys):
    """Whatever they are called: in train and val, and on both sides of the hold-out."""
    for path in list(classes.rglob("*.jpg")):
        path.write_bytes(path.read_bytes() + os.fsencode(path))  # all different now
    root = classes.parent / "split"
    shutil.copytree(classes, root / "train")
    for name in ("ant", "bee", "cat"):
        (root / "val" / name).mkdir(parents=True)
        (root / "train" / name / "7.jpg").rename(root / "val" / name / "x.jpg")
    for folder in (root, classes):
        datasets.build_data(parsed("--data_path", folder), CPU)
        assert "validation images too" not in capsys.readouterr().out
    shutil.copy(root / "train" / "bee" / "1.jpg", root / "val" / "bee" / "y.jpg")
    datasets.build_data(parsed("--data_path", root), CPU)
    assert (
        f"Warning: 1 of 21 training images are validation images too ({root}/train/bee/1.jpg), so "
        "the score is not that of unseen images" in capsys.readouterr().out
    )
    for name in ("ant", "bee", "cat"):
        for path in sorted((classes / name).glob("?.jpg")):
            shutil.copy(path, path.with_stem(f"{path.stem}_copy"))
    data = datasets.build_data(parsed("--data_path", classes), CPU)
    original = {name.replace("_copy", "") for name in names_of(data.val)}
    shared = sum(name.replace("_copy", "") in original for name in names_of(data.train))
    assert shared > 5  # each of the nine held-out images, unless its copy is held out too
    told = f"Warning: {shared} of 39 training images are validation images too"
    assert told in capsys.readouterr().out


OUTPUTS = {  # the output folder below the data, and whether the data hold train/ and val/
    "out": False,
    ".": False,
    "ant/tb": False,
    "train/out": True,
    "val": True,
    "./": True,
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_folder_among_the_images_is_refused_before_it_is_made(
    output, run_main, classes, imnet
):
    data = imnet if OUTPUTS[output] else classes
    before = tree(data)
    for flag in ("--output_dir", "--teacher_cache", "--log_dir"):
        run = run_main("--data_path", data, *SMALL, flag, data / output, *teacher_flags(__file__))
        assert run.code == 2 and f"{flag} {data / output}: lies inside the images of" in run.err
        assert len(run.err.splitlines()) == 1 and tree(data) == before
    beside = ["--data_path", imnet, *SMALL, "--epochs", 1]
    assert output != "val" or run_main(*beside, output_dir=imnet / "out").code == 0


def test_classes_of_one_image_have_none_held_out_and_the_run_says_so(tmp_path, capsys):
    write_images(tmp_path, ["ant", "bee", "cat", "dog", "eel"], count=1)
    datasets.build_data(parsed("--data_path", tmp_path), CPU)
    out = capsys.readouterr().out
    assert "1 of its 5 images, a fifth, are held out" in out
    assert "classes without a validation image: 4 of 5" in out
    assert "classes without a training image: 1 of 5" in out


# ------------------------------------------------------------------------- uneven classes


def test_uneven_classes_are_counted_and_even_ones_are_not(tmp_path, capsys):
    for name, count in (("ant", 13), ("bee", 4), ("cat", 6)):
        write_images(tmp_path, [name], count)
    flags = ["--data_set", "image_folder", "--data_path", tmp_path, "--disable_eval"]
    datasets.build_data(parsed(*flags), CPU)
    told = "Class imbalance (images per class, rarest first): bee 4, cat 6, ant 13; --class_weights"
    assert told in capsys.readouterr().out
    datasets.build_data(parsed(*flags, "--class_weights", "balanced"), CPU)
    assert "ant 13; --class_weights" not in capsys.readouterr().out
    (tmp_path / "ant" / "12.jpg").unlink()  # 12 and 4: not more than three times as many
    datasets.build_data(parsed(*flags), CPU)
    datasets.build_data(parsed(), CPU)
    assert "imbalance" not in capsys.readouterr().out


def test_balanced_weights_are_those_of_their_definition():
    targets = np.array([0] * 6 + [1] * 3 + [3])
    weights = losses.balanced_weights(targets, 4)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 0.0, 10 / 3]))
    assert weights[targets].mean() == pytest.approx(1)
    assert losses.balanced_weights(np.arange(5), 5).tolist() == [1.0] * 5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["plain", "mixed", "partly labeled"])
def test_a_class_weight_belongs_to_the_image_and_not_to_the_terms_of_its_label(kind, smoothing):
    flags = ["--smoothing", smoothing, *(["--mixup", 0, "--cutmix", 0] if kind == "plain" else [])]
    args, rng = parsed(*flags), np.random.default_rng(3)
    w, images, classes = np.array([0.5, 1.0, 0.0, 4.0]), 7, 4
    logits = rng.normal(size=(images, classes))
    first, second = rng.choice([0, 1, 3], (2, images))
    kept = {"plain": np.ones(images), "mixed": rng.random(images)}.get(kind, np.arange(images) / 6)
    ce, weight = np.zeros(images), np.zeros(images)
    soft = np.zeros((images, classes))
    for i, row in enumerate(logits):
        minus_log_p = np.log(np.exp(row).sum()) - row
        parts = {"plain": [(1, first)], "mixed": [(kept[i], first), (1 - kept[i], second)]}
        for share, labels in parts.get(kind, [(kept[i], first)]):
            smooth = (1 - smoothing) * minus_log_p[labels[i]] + smoothing * minus_log_p.mean()
            ce[i] += share * smooth
            weight[i] += share * w[labels[i]]
            soft[i] += share * ((1 - smoothing) * np.eye(classes)[labels[i]] + smoothing / classes)
    expected = (weight * ce).sum() / weight.sum()
    targets = torch.from_numpy(first if kind == "plain" else soft)
    if kind == "partly labeled":  # an image counts by its labeled part, and a batch by its images
        expected = (w[first] * ce).sum() / images
        loss = WeightedCrossEntropy(torch.from_numpy(w), smoothing, per_image=True)
    else:
        loss = make_criterion(args, torch.from_numpy(w))
    assert loss(torch.from_numpy(logits), targets).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("partly", [False, True])
def test_balanced_classes_do_not_cost_the_common_class_its_accuracy(partly):
    """The optimum for 30 images of one class and 1 of another, which can be told apart."""
    targets = torch.tensor([0] * 30 + [1])
    criterion = WeightedCrossEntropy(losses.balanced_weights(targets.numpy(), 2), 0.1, partly)
    if partly:
        targets = 0.9 * F.one_hot(targets) + 0.05
    logits = torch.zeros(2, 2, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=50)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = criterion(logits[[0] * 30 + [1]], targets)
        loss.backward()
        return loss

    optimizer.step(step)
    found = logits.detach().softmax(dim=1)
    torch.testing.assert_close(found, torch.tensor([[0.95, 0.05], [0.05, 0.95]]), atol=1e-3, rtol=0)


def test_class_weights_change_training_and_are_part_of_the_recipe(run_main, tmp_path):
    for name, count in (("ant", 8), ("bee", 2)):
        write_images(tmp_path, [name], count)
    flags = [*SMALL, "--data_path", tmp_path, "--holdout", 2, "--epochs", 1, "--mixup", 0]
    flags += ["--cutmix", 0]
    runs = [
        run_main(
            *flags, "--class_weights", kind, output_dir=tmp_path.parent / f"{tmp_path.name}-{kind}"
        )
        for kind in ("none", "balanced")
    ]
    assert all(run.code == 0 for run in runs), runs[1].err
    assert runs[0].log[-1]["train_loss"] != pytest.approx(runs[1].log[-1]["train_loss"])
    longer = [*flags, "--epochs", 2, "--class_weights", "none"]
    resumed = run_main(*longer, output_dir=runs[1].folder)
    assert "--class_weights balanced → none" in resumed.out


# --------------------------------------------------------------------- labels in a file


@pytest.fixture
def flat(tmp_path) -> Path:
    """A folder of images in no class folders: a0.jpg … a7.jpg, b0.jpg …, deep/c0.jpg …"""
    write_images(tmp_path / "sorted", ["ant", "bee", "cat"])
    root = tmp_path / "flat"
    (root / "deep").mkdir(parents=True)
    for place, name in (("a", "ant"), ("b", "bee"), ("deep/c", "cat")):
        for index in range(8):
            shutil.copy(tmp_path / "sorted" / name / f"{index}.jpg", root / f"{place}{index}.jpg")
    return root


PLACES = {"a": "ant", "b": "bee, the", "deep/c": "cat"}


def lines(indices: range, separator: str = ",") -> list[str]:
    rows = [(f"{place}{index}.jpg", name) for place, name in PLACES.items() for index in indices]
    return [separator.join(f'"{cell}"' if "," in cell else cell for cell in row) for row in rows]


FORMATS = {
    "comma": ["path,label", *lines(range(8))],
    "tab": ["", *lines(range(8), "\t"), ""],
    "blanks": ["image id class ", *(line + " " for line in lines(range(8), "   "))],
    "marked": ["\ufeffpath,label", *lines(range(8))],
    "dots": ["./" + line for line in reversed(lines(range(8)))],
    "semicolon": ["Image ID;Class", *lines(range(8), ";")],
    "index": [",filepaths,labels", *(f"{i},{line}" for i, line in enumerate(lines(range(8))))],
    "index alone": [f"{i}\t{line}" for i, line in enumerate(lines(range(8), "\t"))],
    "turned round": [
        "label,path",
        *(",".join(line.split(".jpg,")[::-1]) for line in lines(range(8))),
    ],
    "without endings": ["id_code,diagnosis", *(x.replace(".jpg", "") for x in lines(range(8)))],
    "backslashes": [line.replace("/", "\\") for line in lines(range(8))],
    "repeated": [*lines(range(8)), "deep/../a0.jpg,ant"],
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_of_labels_gives_each_image_its_class(form, end, flat, tmp_path, capsys):
    file = tmp_path / "labels.txt"
    file.write_bytes(end.join(FORMATS[form]).encode())
    source = labeled_images(str(file), str(flat))
    assert source.classes == ["ant", "bee, the", "cat"] and len(source) == 24
    assert names_of(source) == sorted(names_of(source))
    for index, name in enumerate(names_of(source)):
        image, target = source[index]
        assert source.classes[target] == PLACES[name[:-5]]
        assert abs(image.mean() - (60 * target + 31.5)) < 10
    out = capsys.readouterr().out
    assert ("1 line(s) repeat" in out) == (form == "repeated")
    odd = "first line is left out as headings (id_code, diagnosis)"
    assert (odd in out) == (form == "without endings")


def test_a_class_with_the_name_of_a_file_is_no_path(flat, tmp_path):
    """Nor is the column that counts the lines, if 0.jpg exists; an empty column says nothing."""
    shutil.copy(flat / "a0.jpg", flat / "0.jpg")
    for text in (
        "b0,a0.jpg\nb1,a1.jpg\n",
        "0,a0.jpg,b0\n1,a1.jpg,b1\n",
        "a0.jpg,b0,\na1.jpg,b1,\n",
    ):
        (tmp_path / "labels.csv").write_text(text)
        source = labeled_images(str(tmp_path / "labels.csv"), str(flat))
        assert (names_of(source), source.classes) == (["a0.jpg", "a1.jpg"], ["b0", "b1"])


def test_labels_choose_the_images_of_a_teacher_alone(flat, tmp_path):
    (tmp_path / "train.csv").write_text("a0.jpg,ant\nb0.jpg,bee\n")
    (tmp_path / "val.csv").write_text("a1.jpg,ant\n")
    flags = ["--kd_alpha", 1, "--data_path", flat, "--labels", tmp_path / "train.csv"]
    args = parsed(*teacher_flags(__file__), *flags, "--eval_labels", tmp_path / "val.csv")
    train, val, _ = datasets.open_splits(args)
    assert (names_of(train), names_of(val)) == (["a0.jpg", "b0.jpg"], ["a1.jpg"])


def test_numbers_are_sorted_as_numbers(flat, tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("a0.jpg 10\na1.jpg 2\na2.jpg 0\n")
    assert labeled_images(str(file), str(flat)).classes == ["0", "2", "10"]


WRONG = {
    "a0.jpg,ant\nnowhere.jpg,ant\nno.jpg,ant": "line 2: DATA/nowhere.jpg is not a file (nor are "
    "those of 1 other lines)",
    "a0.jpg,ant\n\na1.jpg,": "line 3: has no class",
    "a0.jpg,ant\n,ant": "line 2: has no path",
    "a0.jpg,ant\na1.jpg": "line 2: has 1 column(s), not a path and a class",
    "a0.jpg,ant\na1.jpg,bee, the": "line 2: has 3 column(s), not a path and a class; leave other "
    "columns out, and put a name",
    "path,a,b\na0.jpg,ant,bee": "line 2: has 3 column(s)",
    "path,label,split\na0.jpg,ant,test": "line 2: has 3 column(s)",
    "a0.jpg,1,train\na1.jpg,2,test": "line 1: has 3 column(s)",  # 1 and 2 may be the classes
    "4,a0.jpg,train\n4,a1.jpg,test": "line 1: has 3 column(s)",
    '0 a0.jpg ant\n"" ""': "line 2: has 0 column(s)",
    "none.jpg,ant\na1.jpg,bee": "line 1: DATA/none.jpg is not a file",
    "none,ant\na1.jpg,bee\na2,bee": "line 3: DATA/a2 is not a file",
    "a0.jpg ant\nb 0.jpg ant": "line 2: has 3 column(s)",
    "a0.jpg,ant\na1.jpg,bee\n./a0.jpg,bee": "line 3: a0.jpg is of class bee, but of class ant in "
    "line 1",
    'a0.jpg,ant\na1.jpg,"bee': "line 2: cannot be read (unexpected end of data)",
    "path,label\n": "names no image",
    "a0.jpg,ant\na1.jpg,b\0e": "line 2: is not text: it holds a zero",
    "a0.jpg,ant\ndeep,ant": "line 2: DATA/deep is not a file",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_line_of_labels_is_named(text, run_main, flat, tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text(text)
    run = run_main("--data_path", flat, "--labels", file)
    wanted = WRONG[text].replace("DATA", str(flat))
    assert run.code == 2 and f"--labels {file}" in run.err and wanted in run.err, run.err
    assert len(run.err.splitlines()) == 1


def test_files_and_flags_of_labels_that_cannot_work_are_refused(run_main, flat, tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text("a0.jpg,ant\nb0.jpg,bee\n")

    def error(*flags: object) -> str:
        run = run_main(*flags)
        assert run.code == 2 and len(run.err.splitlines()) <= 2, run.out + run.err
        return run.err

    (tmp_path / "latin").write_bytes("a0.jpg,fourmi géante\n".encode("latin-1"))
    (tmp_path / "wide").write_text("a0.jpg,ant\n", encoding="utf-16")
    for name in ("latin", "wide"):
        told = error("--data_path", flat, "--labels", tmp_path / name)
        assert f"--labels {tmp_path / name}: is not text in UTF-8" in told
    assert "--labels none: no such file" in error("--data_path", flat, "--labels", "none")
    assert "needs a folder" in error("--labels", file)
    assert "is not a folder" in error("--data_path", flat / "none", "--labels", file)
    assert "without --data_set image_folder" in error("--data_set", "CIFAR", "--labels", file)
    both = ["--data_path", flat, "--labels", file, "--eval_labels"]
    assert "2 of 2 validation images are training images too (a0.jpg, b0.jpg)" in error(*both, file)
    (tmp_path / "val.csv").write_text("a1.jpg,ant\nb1.jpg,wasp\n")
    told = "val.csv line 2: wasp is not one of the classes, which are ant, bee"
    assert told in error(*both, tmp_path / "val.csv")
    assert "beside --holdout" in error(*both, file, "--holdout", 1)


def test_labels_train_resume_and_evaluate_as_they_were_trained(run_main, flat, tmp_path):
    train, val = tmp_path / "train.csv", tmp_path / "val.csv"
    train.write_text("\n".join(lines(range(6))))
    val.write_text("\n".join(lines(range(6, 8))[:4]))  # no cat
    flags = [*SMALL, "--data_path", flat, "--labels", train, "--eval_labels", val]
    cache = ["--teacher_cache", tmp_path / "cache", "--epochs", 2]
    teacher = run_main(*flags, "--epochs", 1, output_dir=tmp_path / "t")
    assert teacher.code == 0 and "18 images, 3 classes" in teacher.out, teacher.err
    kd = teacher_flags(tmp_path / "t" / "checkpoint-best.pth")
    run = run_main(*flags, *kd, *cache, output_dir=tmp_path / "s")
    assert run.code == 0, run.err
    train.write_text("\n".join(reversed(lines(range(6)))))  # the order of lines says nothing
    run = run_main(*flags, *kd, *cache, "--epochs", 3, output_dir=tmp_path / "s")
    assert run.code == 0 and "Resumed" in run.out, run.err
    last = ["--eval", "true", "--resume", tmp_path / "s" / "checkpoint-2.pth"]
    moved = ["--data_path", flat, "--eval_labels", val]
    for where in ([], moved, moved[2:]):
        scored = run_main(*last, *where)
        assert scored.code == 0 and ": 4 images, 3 classes" in scored.out, scored.err
        loss = run.log[-1]["test_loss"]
        assert score(scored.out, "test_loss") == pytest.approx(loss, abs=1e-4)
    val.write_text("a7.jpg,ant\nb7.jpg,wasp\n")
    scored = run_main(*last)
    assert scored.code == 2 and "line 2: wasp is not one of the classes" in scored.err
    train.write_text("\n".join(lines(range(6))).replace("a0.jpg,ant", "a0.jpg,cat"))
    val.write_text("a7.jpg,ant\n")
    told = "was trained on different images (equally many)"
    other = run_main(*flags, "--epochs", 2, output_dir=tmp_path / "t")
    assert other.code == 2 and told in other.err
    other = run_main(*flags, *kd, *cache)
    assert other.code == 2 and "cache: created with labels" in other.err


def test_a_fifth_of_labeled_images_is_held_out(run_main, flat, tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(lines(range(8))))
    flags = [*QUICK, *SMALL, "--data_path", flat, "--labels", file, "--batch_size", 4]
    flags += ["--epochs", 1, "--output_dir", tmp_path / "out"]
    assert run_group(*flags, processes=2).count("4 of its 24 images") == 1
    scored = run_main("--eval", "true", "--resume", tmp_path / "out" / "checkpoint-0.pth")
    assert scored.code == 0 and ": 4 held-out images, 3 classes" in scored.out, scored.err
