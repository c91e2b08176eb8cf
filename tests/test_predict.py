"""Predictions: the evaluation's numbers from every kind of model, broken images, odd names."""

import csv
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forked import Group, script
from helpers import CLASSES, CONFIG, ROOT, images_of, network_of, write_checkpoint
from PIL import Image

import export
import predict
from deploy.model import ModelCard
from deploy.writers import write_timm
from models.calibration import write_temperature
from models.checkpoint import read_checkpoint


@pytest.fixture
def run_predict(capsys):
    """Runs predict.py; returns exit code, output and errors."""

    def run(model: object, *words: object) -> tuple[int, str, str]:
        code = predict.main([str(model), *map(str, words), "--device", "cpu"])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture
def student(checkpoint) -> Path:
    return checkpoint("cifar_resnet8")


def as_json(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("kind", ["checkpoint", "timm", "pt2", "onnx", "preprocessed"])
def test_every_model_predicts_what_the_evaluation_sees(
    checkpoint, run_predict, photos, tmp_path, kind
):
    arch = "test_resnet.r160_in1k" if kind == "timm" else "cifar_resnet8"
    path = model = checkpoint(arch)
    if kind != "checkpoint":
        if kind in ("onnx", "preprocessed"):
            pytest.importorskip("onnxruntime")
        name = {"timm": "folder", "pt2": "a.pt2"}.get(kind, "a.onnx")
        flags = ["--format", "onnx" if name == "a.onnx" else kind, "--out", tmp_path / name]
        flags += ["--with_preprocessing"] if kind == "preprocessed" else []
        assert export.main([str(path), *map(str, flags)]) == 0
        model = tmp_path / name
    code, out, err = run_predict(model, photos / "val", "--format", "jsonl", "--batch_size", 4)
    assert code == 0, err
    out = out[out.index('{"image"') :]
    with torch.inference_mode():
        wanted = network_of(path, arch)(images_of(photos)).softmax(dim=1)
    rows = as_json(out)
    assert [row["image"] for row in rows] == sorted(map(str, (photos / "val").rglob("*.png")))
    for row, probabilities in zip(rows, wanted, strict=True):
        found = {guess["name"]: guess["probability"] for guess in row["classes"]}
        expected = dict(zip(CLASSES, probabilities.tolist(), strict=True))
        assert found == pytest.approx(expected, abs=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_the_predictions_are_those_that_main_scores(student, run_predict, run_main, photos):
    run = run_main("--eval", "true", "--resume", student)
    assert run.code == 0, run.err
    code, out, err = run_predict(student, photos / "val", "--format", "jsonl", "--top_k", 1)
    assert code == 0, err
    rows = as_json(out)
    right = sum(Path(row["image"]).parent.name == row["classes"][0]["name"] for row in rows)
    assert f"test_acc1 {100 * right / len(rows):.4f}" in run.out and 0 < right < len(rows)


def test_broken_images_are_named_and_the_others_predicted(student, run_predict, photos):
    folder = photos / "val" / "bee"
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "text.jpg").write_text("no image")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "notes.txt").write_text("left out")
    (folder / "._0.png").write_text("hidden")
    code, out, err = run_predict(student, folder, "--format", "csv", "--batch_size", 2)
    assert code == 1
    named = [Path(row[0]).name for row in csv.reader(io.StringIO(out))]
    assert named == ["image", "0.png", "1.png", "2.png"]
    assert "3 of 6 images could not be read" in err
    assert f"{folder}: left out: " in err and ".txt 1" in err and "hidden file 1" in err
    assert all(f"cannot read the image {folder / name}" in err for name in ("torn.png", "gone.png"))
    code, out, err = run_predict(student, folder / "text.jpg")
    assert code == 1 and not out and "1 of 1 images could not be read" in err


def test_odd_class_names_survive_csv_and_json_lines(student, run_predict, photos):
    images = photos / "val" / CLASSES[0] / "*.png"
    code, out, err = run_predict(student, images, "--format", "csv", "--top_k", 9)
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 3
    found_csv = [[row[f"class_{k}"] for k in (1, 2, 3)] for row in rows]
    assert all(sorted(names) == sorted(CLASSES) for names in found_csv)
    code, out, err = run_predict(student, images, "--format", "jsonl")
    found_json = [[guess["name"] for guess in row["classes"]] for row in as_json(out)]
    assert found_json == found_csv
    sums = [sum(float(row[f"probability_{k}"]) for k in (1, 2, 3)) for row in rows]
    assert sums == pytest.approx([1, 1, 1], abs=1e-6)


def test_odd_file_names_are_one_line_of_the_table_and_no_formula_of_a_spreadsheet(
    student, run_predict, photos, monkeypatch
):
    monkeypatch.chdir(photos / "val" / "bee")
    names = ["=1+1.png", "@2.png", "two\nlines.png", "\x1b[2J.png"]
    for name in names:
        Path(name).write_bytes(Path("0.png").read_bytes())
    code, out, err = run_predict(student, "0.png", *names, "--top_k", 1)
    assert code == 0 and len(out.splitlines()) == 5 and "\x1b" not in out, err
    assert r"two\nlines.png" in out and len({len(line) for line in out.splitlines()}) == 1
    code, out, err = run_predict(student, *names, "--format", "csv", "--top_k", 1)
    cells = [row[0] for row in csv.reader(io.StringIO(out))][1:]
    assert code == 0 and cells == ["'=1+1.png", "'@2.png", *names[2:]], err
    code, out, err = run_predict(student, *names, "--format", "jsonl", "--top_k", 1)
    assert [row["image"] for row in as_json(out)] == names


@pytest.mark.parametrize(("kind", "expected"), [("full disk", 2), ("closed pipe", 141)])
def test_output_that_cannot_be_written_is_not_taken_for_images_that_cannot_be_read(
    student, photos, monkeypatch, capfd, kind, expected
):
    photo = str(photos / "val" / "bee" / "0.png")
    if kind == "full disk":
        output = open("/dev/full", "w")  # noqa: SIM115
    else:
        reader, writer = os.pipe()
        os.close(reader)
        output = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", output)
    code = predict.main([str(student), photo, "--device", "cpu"])
    output.close()  # what is left goes nowhere
    err = capfd.readouterr().err
    assert code == expected and "Traceback" not in err
    full = "predict.py: error: cannot write the output (No space left on device)\n"
    assert err == (full if expected == 2 else "")


def test_files_folders_and_globs_name_each_image_once_in_order(student, run_predict, photos):
    first, folder = photos / "val" / "bee" / "2.png", photos / "val" / "bee"
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "deep" / "deeper" / "x.png").write_bytes(first.read_bytes())
    flags = ["--format", "csv", "--top_k", 1]
    code, out, err = run_predict(student, first, folder, photos / "val" / "**" / "*.png", *flags)
    assert code == 0, err
    files = [row[0] for row in csv.reader(io.StringIO(out))][1:]
    near = ["2.png", "0.png", "1.png", "deep/deeper/x.png"]
    assert files[:4] == [str(folder / name) for name in near]
    assert len(files) == len(set(files)) == 10
    (folder / "deep" / "loop").symlink_to(folder)
    code, out, err = run_predict(student, folder, *flags)
    assert code == 0 and out.count(".png") == 4


def test_answers_below_the_threshold_are_unknown_and_images_are_sorted_once(
    student, run_predict, photos, tmp_path
):
    flags = [photos / "val", "--format", "csv", "--top_k", 2]
    plain = list(csv.reader(io.StringIO(run_predict(student, *flags)[1])))
    limit = sorted(float(row[2]) for row in plain[1:])[4]  # 4 of 9 images are below
    flags += ["--threshold", limit - 1e-6, "--sort_into", tmp_path / "sorted"]
    code, out, err = run_predict(student, *flags)
    assert code == 0, err
    expected = {}
    for row, (path, first, probability, *others) in zip(
        csv.reader(io.StringIO(out)), plain, strict=True
    ):
        is_low = path != "image" and float(probability) < limit - 1e-6
        first = "unknown" if is_low else first
        assert row == [path, first, probability, *others]
        if path != "image":
            expected.setdefault(first, []).append(Path(path).read_bytes())
    assert len(expected["unknown"]) == 4
    copies = sorted((tmp_path / "sorted").rglob("*"))
    found = {}
    for path in copies:
        if path.is_file():
            found.setdefault(path.parent.name, []).append(path.read_bytes())
    assert {k: sorted(v) for k, v in found.items()} == {k: sorted(v) for k, v in expected.items()}
    assert {"0.png", "0-2.png"} <= {path.name for path in copies}  # of different folders
    assert "unknown 4" in err and "there already" not in err

    (tmp_path / "sorted" / "unknown" / copies[-1].name).write_bytes(b"a file of the user")
    code, out, err = run_predict(student, *flags)  # again: one copy is missing, the others are not
    assert code == 0 and ": unknown 1, 8 there already" in err
    assert len(sorted((tmp_path / "sorted").rglob("*"))) == len(copies) + 1
    assert (tmp_path / "sorted" / "unknown" / copies[-1].name).read_bytes() == b"a file of the user"


@pytest.mark.parametrize(
    ("images", "folder", "message"),
    [
        (["val"], "val/sorted", "lies among the images"),
        (["val"], ".", None),  # none of its class folders is in val
        (["**/*.png"], "new", "lies among the images"),
        (["val/bee/*.png"], "val", "lies among the images"),
        (["val/bee/*.png"], "val/bee", None),
        (["val"], "file.txt", "--sort_into file.txt: cannot write there"),
        (["val"], "taken", "could not be copied"),
    ],
)
def test_images_are_sorted_where_no_command_reads_them_again(
    student, run_predict, photos, monkeypatch, images, folder, message
):
    monkeypatch.chdir(photos)
    Path("file.txt").write_text("of the user")
    Path("taken").mkdir()
    for name in CLASSES:
        (Path("taken") / name).write_text("of the user")
    before = sorted(Path().rglob("*"))
    code, out, err = run_predict(student, *images, "--sort_into", folder)
    assert code == (2 if message else 0), err
    if message:
        assert message in err and "--sort_into" in err and "Traceback" not in err
        assert sorted(Path().rglob("*")) == before


def test_a_full_disk_leaves_no_half_copy_and_a_class_cannot_lead_elsewhere(
    checkpoint, run_predict, photos, tmp_path, monkeypatch
):
    def half(source, target):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("predict.shutil.copyfileobj", half)
    flags = [photos / "val" / "bee", "--sort_into", tmp_path / "sorted"]
    code, out, err = run_predict(checkpoint("cifar_resnet8"), *flags)
    assert code == 2 and "No space left on device" in err and "Traceback" not in err
    assert not [path for path in (tmp_path / "sorted").rglob("*") if path.is_file()]
    for name in ("../elsewhere", "..", "/tmp", ""):
        with pytest.raises(predict.UserError, match="cannot name a folder"):
            predict.check_sorting(str(tmp_path / "new"), ["bee", name], [], [])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.png"], "missing.png: no such file or folder"),
        (["nothing*.png"], "nothing*.png: no file matches"),
        (["EMPTY"], "holds no image"),
        (["PHOTO", "--top_k", "0"], "--top_k 0: must be at least 1"),
        (["PHOTO"], "/0.png: is an image; pass the model first"),
        (["PHOTO", "--threshold", "40"], "--threshold 40: must lie in 0…1; pass 0.4 for 40 %"),
        (["PHOTO", "--threshold", "nan"], "--threshold nan: must lie in 0…1"),
        (["PHOTO", "--batch_size", "0"], "--batch_size 0: must be at least 1"),
    ],
)
def test_commands_that_cannot_work_are_one_line(
    student, run_predict, photos, tmp_path, words, message
):
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": tmp_path / "empty", "PHOTO": photos / "val" / "bee" / "0.png"}
    words = [names.get(word, word) for word in words]
    model, *words = [*words, student] if "model first" in message else [student, *words]
    code, out, err = run_predict(model, *words)
    assert code == 2 and not out and err.count("\n") == 1 and message in err


def test_a_class_of_the_name_of_no_answer_is_refused(student, run_predict, photos, monkeypatch):
    monkeypatch.setattr(predict, "UNKNOWN", "bee")
    code, out, err = run_predict(student, photos / "val", "--threshold", 0.5)
    assert code == 2 and not out and "'bee', which is a class of this model" in err


def test_a_number_that_is_none_is_named_with_its_flag(capsys):
    with pytest.raises(SystemExit, match="2"):
        predict.main(["model.pth", "photo.png", "--top_k", "2.5"])
    assert "--top_k: '2.5' is not a whole number\n" in capsys.readouterr().err


def test_models_that_are_none_are_one_line(run_predict, photos, tmp_path):
    photo = photos / "val" / "bee" / "0.png"
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.pt2").write_bytes(b"nonsense")
    torch.save({"fc.weight": torch.ones(3)}, tmp_path / "bare.pth")
    torch.export.save(
        torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), tmp_path / "foreign.pt2"
    )
    for name, message in [
        ("folder", "holds no config.json"),
        ("a.pt2", "torch.export cannot load this file"),
        ("foreign.pt2", "does not say which classes"),
        ("bare.pth", "does not say which classes"),
        ("missing.pth", "no such file"),
        ("missing.onnx", "no such file"),
    ]:
        code, out, err = run_predict(tmp_path / name, photo)
        assert code == 2 and not out and message in err, (name, err)


def test_onnx_files_without_onnxruntime_ask_for_it(run_predict, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "a.onnx").write_bytes(b"")
    code, _, err = run_predict(tmp_path / "a.onnx", photos / "val" / "bee" / "0.png")
    assert code == 2 and "pip install onnxruntime" in err


def test_logits_that_are_not_finite_are_no_prediction(tmp_path, run_predict, photos):
    path = write_checkpoint(
        tmp_path / "nan.pth", "cifar_resnet8", CLASSES, CONFIG, data_path=str(photos)
    )
    saved = torch.load(path, weights_only=True)
    saved["model"]["fc.bias"][1] = torch.nan
    torch.save(saved, path)
    code, _, err = run_predict(path, photos / "val" / "bee" / "0.png")
    assert code == 2 and "not finite" in err
    assert export.main([str(path), "--format", "pt2", "--out", str(tmp_path / "a.pt2")]) == 2


# ------------------------------------------------------------------------ a kept temperature


@pytest.mark.parametrize("kind", ["checkpoint", "timm", "pt2", "onnx"])
def test_a_kept_temperature_divides_the_logits_of_every_model_made_from_the_checkpoint(
    checkpoint, run_predict, photos, tmp_path, capsys, kind
):
    arch, temperature = "test_resnet", 2.5
    path = model = checkpoint(arch, with_ema=True)
    write_temperature(read_checkpoint(str(path)).weights("false"), temperature)
    before = path.read_bytes()
    raw = ["--use_ema", "false"]
    if kind != "checkpoint":
        if kind == "onnx":
            pytest.importorskip("onnxruntime")
        model = tmp_path / f"student{export.ENDING.get(kind, '')}"
        assert export.main([str(path), "--format", kind, "--out", str(model), *raw]) == 0
        printed = capsys.readouterr().out
        assert "Logits are divided by the temperature 2.5000" in printed
        card = model / "config.json" if kind == "timm" else model.with_name(f"{model.name}.json")
        assert json.loads(card.read_text(encoding="utf-8"))["temperature"] == temperature
    code, out, err = run_predict(model, photos / "val", "--format", "jsonl", *raw)
    assert code == 0 and "Calibrated: temperature 2.5000" in err
    with torch.inference_mode():
        logits = network_of(path, arch)(images_of(photos))
    for row, wanted in zip(as_json(out), (logits / temperature).softmax(dim=1), strict=True):
        probabilities = {guess["name"]: guess["probability"] for guess in row["classes"]}
        expected = dict(zip(CLASSES, wanted.tolist(), strict=True))
        assert probabilities == pytest.approx(expected, abs=1e-5)
    assert path.read_bytes() == before

    code, out, err = run_predict(path, photos / "val" / "bee" / "0.png", "--use_ema", "true")
    assert code == 0 and "holds no temperature for these weights" in err  # those of the EMA
    assert "Calibrated" not in err


def test_a_card_says_in_words_how_images_are_prepared():
    card = ModelCard("cifar_resnet8", CLASSES, **CONFIG)
    assert "shorter side has 40 pixels (bilinear" in json.loads(card.to_json())["preprocessing"]
    assert ModelCard.from_json(card.to_json(), "a.onnx") == card


def test_names_of_classes_need_not_be_utf_8(tmp_path):
    card = ModelCard("cifar_resnet8", ["a", os.fsdecode(b"l\xf6")], **CONFIG)
    assert ModelCard.from_json(card.to_json().encode().decode(), "a.onnx") == card
    write_timm(timm.create_model("cifar_resnet8", num_classes=2), card, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["label_names"] == card.classes
    assert "l\\udcf6" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------- the whole way

ALONE = """
import importlib.util, sys
for name in ("main", "export", "deploy"):
    assert importlib.util.find_spec(name) is None, name
"""


def run_alone(code: str, folder: Path, *words: object) -> str:
    """What a program prints that runs in a folder without this repository on its path."""
    (folder / "alone.py").write_text(ALONE + code)
    with Group(script, folder / "alone.py", folder, *words) as group:
        assert group.wait() == [0], group.err
        return group.out


def odd_images(folder: Path, photo: Path) -> list[Path]:
    """A photograph of 50 x 40 pixels: plain, on its side, partly transparent, and in 16 bits."""
    image, rng = Image.open(photo), np.random.default_rng(1)
    paths = [folder / name for name in ("plain.png", "rotated.jpg", "clear.png", "deep.png")]
    image.save(paths[0])
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    ramp = np.linspace(0, 255, 2000).reshape(40, 50).astype(np.uint8)
    Image.fromarray(ramp).convert("RGB").save(paths[1], exif=exif, quality=95)
    image.putalpha(Image.fromarray(rng.integers(0, 2, (40, 50), dtype=np.uint8) * 255))
    image.save(paths[2])
    Image.fromarray((ramp * 200.0).astype(np.uint16)).save(paths[3])
    return paths


def test_from_a_folder_of_images_to_predictions_without_this_repository(
    run_main, run_predict, photos, tmp_path, monkeypatch
):
    """The programs that run alone are those of docs/export.md."""
    monkeypatch.chdir(tmp_path)
    student = tmp_path / "student"
    flags = ["--data_path", photos, "--input_size", 64, "--epochs", 1, "--batch_size", 4]
    run = run_main(*flags, "--model", "test_resnet", output_dir=student)
    assert run.code == 0, run.err
    best = student / "checkpoint-best.pth"

    images = odd_images(tmp_path, photos / "val" / "bee" / "0.png")
    code, out, err = run_predict(best, *images, "--format", "jsonl", "--top_k", 1)
    assert code == 0, err
    wanted = [row["classes"][0] for row in as_json(out)]
    pixels, with_timm, with_onnx = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL
    )
    (tmp_path / "pixels.py").write_text(pixels)
    programs = [("timm", [], "student", with_timm)]
    try:
        import onnxruntime  # noqa: F401

        flags = ["--with_preprocessing", "true"]
        assert "torch" not in pixels + with_onnx
        programs.append(("onnx", flags, "student.onnx", with_onnx))
    except ImportError:
        pass  # requirements-dev.txt has it
    for kind, flags, name, program in programs:
        out = tmp_path / "exports" / name
        assert export.main([str(best), "--format", kind, "--out", str(out), *flags]) == 0
        lines = run_alone(program, tmp_path, *images).splitlines()
        for line, guess in zip(lines, wanted, strict=True):
            name, _, probability = line.rpartition(" ")
            assert name == guess["name"]
            assert float(probability) == pytest.approx(guess["probability"], abs=1e-5)
