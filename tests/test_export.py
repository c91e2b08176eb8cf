"""Exports: what each format computes, what is refused, and that nothing wrong is left behind."""

import importlib
import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from helpers import CLASSES, CONFIG, images_of, is_same, network_of, tree, write_checkpoint
from PIL import Image
from safetensors.torch import load_file
from timm.data import IterableImageDataset
from torch import nn

import export
import models
from data.sources import StreamSource
from deploy import comparison, writers
from deploy.model import ModelCard
from deploy.writers import Preprocessed, sidecar


def needs_onnx() -> None:
    """Skip where the optional packages are missing; requirements-dev.txt has them."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


@pytest.fixture
def run_export(capsys, tmp_path):
    """Runs export.py; returns exit code, output, errors and the path of the export."""

    def run(checkpoint: Path, kind: str, *flags: object, name: str = "") -> tuple:
        out = tmp_path / "exports" / (name or f"student{export.ENDING.get(kind, '')}")
        argv = [str(checkpoint), "--format", kind, "--out", str(out), *map(str, flags)]
        code = export.main(argv)
        told = capsys.readouterr()
        return code, told.out, told.err, out

    return run


def run_file(path: Path, images: torch.Tensor) -> torch.Tensor:
    """What an export computes, by its own runtime and without any code of this project."""
    if path.is_dir():
        network = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    elif path.suffix == ".pt2":
        network = torch.export.load(path).module()
    else:
        ort = importlib.import_module("onnxruntime")
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])
    with torch.inference_mode():
        return network(images)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("test_resnet", "timm"),  # as a program, cifar_resnet8 has the same kinds of layers
        *itertools.product(["test_convnext", "test_vit", "cifar_resnet8"], ["timm", "pt2", "onnx"]),
    ],
)
def test_every_family_computes_the_same_in_every_format(checkpoint, run_export, photos, arch, kind):
    if kind == "onnx":
        needs_onnx()
    path = checkpoint(arch)
    flags = ["--opset", 20] if (arch, kind) == ("test_convnext", "onnx") else []
    code, out, err, exported = run_export(path, kind, *flags)
    if (arch, kind) == ("cifar_resnet8", "timm"):
        assert code == 2 and not exported.exists()
        assert "timm alone cannot build; pass --format onnx or pt2" in err
        return
    assert code == 0, err
    assert "all 9 validation images" in out
    images = images_of(photos)
    with torch.inference_mode():
        wanted = network_of(path, arch)(images)
    assert wanted.std(dim=0).min() > 1e-3  # else the images would not matter
    for part in (slice(0, 1), slice(0, 7)):  # any batch size
        assert_close(run_file(exported, images[part]), wanted[part], 1e-4)
    card = exported / "config.json" if kind == "timm" else sidecar(exported)
    told = json.loads(card.read_text(encoding="utf-8"))
    if kind == "timm":
        assert told["label_names"] == CLASSES and told["num_classes"] == len(CLASSES)
        told = told["pretrained_cfg"] | {"input_size": told["pretrained_cfg"]["input_size"][-1]}
    else:
        assert told["classes"] == CLASSES and told["with_preprocessing"] is False
    assert {name: told[name] for name in CONFIG} == CONFIG
    assert tree(exported.parent) == tree(exported.parent, hidden=False)
    if kind == "onnx":
        opsets = importlib.import_module("onnx").load(exported).opset_import
        assert [entry.version for entry in opsets if not entry.domain] == (flags[1:] or [18])
        assert "Compared in onnxruntime" in out


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("half", ["false", "true"])
def test_with_preprocessing_takes_pixels_and_returns_probabilities(
    checkpoint, run_export, photos, kind, half
):
    if kind == "onnx":
        needs_onnx()
    path = checkpoint("cifar_resnet8")
    code, _, err, exported = run_export(path, kind, "--with_preprocessing", "--half", half)
    assert code == 0, err
    images = images_of(photos)
    mean, std = (torch.tensor(CONFIG[name])[:, None, None] for name in ("mean", "std"))
    pixels = ((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    with torch.inference_mode():
        wanted = network_of(path, "cifar_resnet8")(images).softmax(dim=1)
    found = run_file(exported, pixels.contiguous())
    assert_close(found, wanted, 1e-4 if half == "false" else 2e-2)
    assert (found != wanted).any() or half == "false"


def test_transformers_loads_a_folder_of_timm(checkpoint, run_export, photos):
    """By what its TimmWrapper reads (5.24): transformers itself would be the largest dependency."""
    path = checkpoint("test_resnet")
    code, _, err, exported = run_export(path, "timm")
    assert code == 0, err
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert config["label_names"] == CLASSES
    network = timm.create_model(
        config["architecture"],
        pretrained=False,
        num_classes=config["num_classes"],
        **config.get("model_args") or {},
    )
    network.load_state_dict(load_file(exported / "model.safetensors"))
    data = timm.data.resolve_data_config(config["pretrained_cfg"], model=None)
    transform = timm.data.create_transform(**data, is_training=False)
    files = sorted((photos / "val").rglob("*.png"))
    images = torch.stack([transform(Image.open(file)) for file in files])
    torch.testing.assert_close(images, images_of(photos))
    with torch.inference_mode():
        assert_close(network.eval()(images), network_of(path, "test_resnet")(images), 1e-6)


def test_an_onnx_version_that_torch_cannot_write_is_refused(checkpoint, run_export):
    needs_onnx()
    code, _, err, exported = run_export(checkpoint("cifar_resnet8"), "onnx", "--opset", 99)
    assert code == 2 and "--opset 99: torch cannot convert" in err and not exported.exists()


def test_half_stores_half_the_bytes(checkpoint, run_export, photos):
    path = checkpoint("test_resnet")
    sizes, outputs = [], []
    for half in ("false", "true"):
        code, _, err, exported = run_export(path, "timm", "--half", half, name=half)
        assert code == 0, err
        sizes.append((exported / "model.safetensors").stat().st_size)
        outputs.append(run_file(exported, images_of(photos)))
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)
    assert 0 < (outputs[0] - outputs[1]).abs().max() <= 2e-2 * outputs[0].abs().max()


@pytest.mark.parametrize(
    ("raw", "ema", "use_ema", "key"),
    [
        (91.0, 90.0, "auto", "model"),
        (91.0, 90.0, "true", "model_ema"),
    ],
)
def test_the_better_weights_are_exported_unless_a_flag_says_which(
    checkpoint, run_export, raw, ema, use_ema, key
):
    scores = {"test_acc1": raw, "test_acc1_ema": ema}
    path = checkpoint("test_resnet", scores=scores, with_ema=True)
    code, out, err, exported = run_export(path, "timm", "--use_ema", use_ema)
    assert code == 0, err
    assert ("EMA weights" if key == "model_ema" else "raw weights") in out
    found = timm.create_model(f"local-dir:{exported}", pretrained=True).state_dict()
    assert is_same(dict(found), torch.load(path, weights_only=True)[key])


@pytest.mark.parametrize("classes", [CLASSES, CLASSES[1:]], ids=["all", "some"])
def test_the_accuracy_in_the_table_is_that_of_the_evaluation(
    checkpoint, run_export, run_main, photos, classes
):
    path = checkpoint("cifar_resnet8")
    for name in {*CLASSES} - {*classes}:
        shutil.rmtree(photos / "val" / name)
    code, out, err, exported = run_export(path, "pt2")
    assert code == 0, err
    run = run_main("--eval", "true", "--resume", path, "--model", "cifar_resnet8")
    scored = float(run.out.split("test_acc1 ")[1].split()[0])
    rows = [line.split() for line in out.splitlines() if line.startswith(("checkpoint,", "stud"))]
    assert [float(row[-4]) for row in rows[1:]] == [100.0]  # the same class
    accuracies = [float(rows[0][2]), float(rows[1][1])]
    assert accuracies == pytest.approx([scored, scored], abs=0.005) and 0 < scored < 100


class TestInt8:
    """Quantization by onnxruntime."""

    def test_weights_take_a_quarter_and_classes_stay(self, checkpoint, run_export, photos):
        needs_onnx()
        path = checkpoint("resnet18")
        code, out, err, exported = run_export(path, "onnx", "--int8", "true")
        assert code == 0, err
        assert out.count("student.onnx ") >= 1 and "float32 .onnx" in out
        assert exported.stat().st_size < 0.35 * path.stat().st_size
        images = images_of(photos)
        with torch.inference_mode():
            wanted = network_of(path, "resnet18")(images)
        found = run_file(exported, images)
        assert 0 < (found - wanted).abs().max() < 0.2 * wanted.abs().max()
        assert json.loads(sidecar(exported).read_text())["dtype"] == "int8"

    def test_too_many_changed_classes_leave_no_file(self, checkpoint, run_export, monkeypatch):
        needs_onnx()
        monkeypatch.setattr(comparison, "LEAST_AGREEMENT", 100.5)
        code, _, err, exported = run_export(checkpoint("cifar_resnet8"), "onnx", "--int8")
        assert code == 2 and "nothing was written" in err
        assert tree(exported.parent) == []


def wrong_weights(network: nn.Module, size: int) -> nn.Module:
    """A network in which one weight of the classifier has changed a little."""
    with torch.no_grad():
        models.classifier_of(network).bias[0] += 0.05
    return network


def wrong_order(network: nn.Module, card: ModelCard) -> nn.Module:
    """A network that takes BGR for RGB."""
    order = {"mean": card.mean[::-1], "std": card.std[::-1]}
    return WELL_PREPROCESSED(network, replace(card, **order))


WELL_PREPROCESSED = Preprocessed


@pytest.mark.parametrize(("kind", "wrong"), [("pt2", wrong_weights), ("onnx", wrong_order)])
def test_an_export_that_differs_is_an_error_and_leaves_no_file(
    checkpoint, run_export, monkeypatch, kind, wrong
):
    if kind == "onnx":
        needs_onnx()
    name = "fuse_layers" if wrong is wrong_weights else "Preprocessed"
    monkeypatch.setattr(writers, name, wrong)
    code, _, err, exported = run_export(checkpoint("cifar_resnet8"), kind, "--with_preprocessing")
    assert code == 2
    assert "the export differs from the checkpoint by" in err and "nothing was written" in err
    assert tree(exported.parent) == []


def test_held_out_training_images_are_not_called_validation_images(checkpoint, run_export, photos):
    path = checkpoint("cifar_resnet8")
    saved = torch.load(path, weights_only=True)
    saved["args"] |= {"data_path": str(photos / "train"), "holdout": 3}
    torch.save(saved, path)
    code, out, err, _ = run_export(path, "pt2")
    assert code == 0 and "Compared on all 3 held-out training images" in out, err


def test_without_images_the_comparison_is_on_noise(checkpoint, run_export, photos):
    path = checkpoint("cifar_resnet8")
    photos.rename(photos.with_name("elsewhere"))
    code, out, err, exported = run_export(path, "pt2")
    assert code == 0, err
    assert "No validation images (" in out and "32 images of noise" in out
    given = ["--data_path", photos.with_name("elsewhere")]
    code, out, err, _ = run_export(path, "pt2", *given, name="other.pt2")
    assert code == 0 and "all 9 validation images" in out, err
    code, out, err, _ = run_export(path, "pt2", "--data_path", photos, name="third.pt2")
    assert code == 2 and f"--data_path {photos}" in err  # a flag that cannot work is an error


def test_a_full_disk_is_one_line_and_leaves_no_file(checkpoint, run_export, monkeypatch):
    def fill(*args: object, **keywords: object) -> None:
        raise RuntimeError("I/O error: No space left on device\nand pages more")

    monkeypatch.setattr(writers, "save_for_hf", fill)
    code, _, err, exported = run_export(checkpoint("test_resnet"), "timm")
    assert code == 2 and err.count("\n") == 1 and "No space left" in err
    assert tree(exported.parent) == []


def test_a_name_that_is_too_long_is_one_line_and_leaves_no_file(checkpoint, run_export):
    code, _, err, exported = run_export(checkpoint("cifar_resnet8"), "pt2", name=f"{'x' * 252}.pt2")
    assert code == 2 and err.count("\n") == 1 and "File name too long" in err
    assert tree(exported.parent) == []


def test_an_export_that_exists_is_left_as_it_is(checkpoint, run_export):
    path = checkpoint("cifar_resnet8")
    assert run_export(path, "pt2")[0] == 0
    before = tree(path.parent / "exports")
    code, _, err, exported = run_export(path, "pt2")
    assert code == 2 and f"{exported} exists" in err
    assert tree(exported.parent) == before
    exported.unlink()
    code, _, err, _ = run_export(path, "pt2")  # its card is there
    assert code == 2 and "student.pt2.json exists" in err


@pytest.mark.parametrize(
    ("kind", "flags", "name", "message"),
    [
        ("onnx", [], "student", "--out * must end in .onnx"),
        ("timm", ["--with_preprocessing"], "", "--with_preprocessing true: --format timm"),
        ("timm", ["--int8"], "", "--int8 true: --format timm holds only the network"),
        ("pt2", ["--int8"], "", "--int8 true: onnxruntime quantizes"),
        ("onnx", ["--int8", "--half"], "", "--int8 true --half true: pass one of them"),
        ("onnx", ["--opset", "17"], "", "--opset 17: torch writes versions from 18 on"),
        ("pt2", ["--opset", "20"], "", "--opset 20: --format pt2 has no ONNX operators"),
        ("pt2", ["--compare_images", "0"], "", "--compare_images 0: must be at least 1"),
    ],
)
def test_flags_that_cannot_work_are_one_line(checkpoint, run_export, kind, flags, name, message):
    code, _, err, exported = run_export(checkpoint("cifar_resnet8"), kind, *flags, name=name)
    assert code == 2 and not exported.exists() and err.count("\n") == 1
    first, _, rest = message.partition("*")
    assert first in err and rest in err


def test_an_ema_that_is_not_there_is_refused(checkpoint, run_export):
    code, _, err, _ = run_export(checkpoint("cifar_resnet8"), "pt2", "--use_ema", "true")
    assert code == 2 and err.count("\n") == 1
    assert "error: --use_ema true: " in err and "holds no EMA weights; pass auto or false" in err


def test_the_first_images_of_a_stream_are_compared(photos):
    files = sorted((photos / "val").rglob("*.png"))
    pairs = [(Image.open(file), label % 3) for label, file in enumerate(files)]
    stream = IterableImageDataset(None, reader=pairs)
    card = ModelCard("cifar_resnet8", CLASSES, **CONFIG)
    pixels, targets = export.load_pixels(StreamSource(stream, CLASSES), 4, card)
    assert targets.tolist() == [0, 1, 2, 0] and pixels.shape == (4, 32, 32, 3)
    mean, std = (torch.tensor(CONFIG[name]) for name in ("mean", "std"))
    wanted = images_of(photos)[:4].permute(0, 2, 3, 1) * std + mean
    assert (pixels - 255 * wanted).abs().max() < 0.01


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named_with_the_pip_command(
    checkpoint, run_export, monkeypatch, missing
):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    code, _, err, _ = run_export(checkpoint("cifar_resnet8"), "onnx")
    assert code == 2 and missing in err and "pip install onnx onnxscript onnxruntime" in err


class Unusual(nn.Module):
    """A network with an operator that ONNX lacks, or with a branch that depends on the images."""

    def __init__(self, num_classes: int, branches: bool) -> None:
        super().__init__()
        self.fc, self.branches = nn.Linear(3, num_classes), branches

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, C)"""
        means = images.mean((2, 3))
        if not self.branches:
            means = torch.special.bessel_j0(means)
        elif means.sum() > 0:
            means = 2 * means
        return self.fc(means)


def with_bessel(num_classes: int) -> nn.Module:
    return Unusual(num_classes, branches=False)


def with_branch(num_classes: int) -> nn.Module:
    return Unusual(num_classes, branches=True)


@pytest.mark.parametrize(
    ("factory", "kind", "messages"),
    [
        (with_bessel, "onnx", ["operator prims.bessel_j0", "pass --format pt2"]),
        (with_branch, "onnx", ["test_export.py, line", "let no branch of its forward"]),
        (with_branch, "pt2", ["test_export.py, line", "let no branch of its forward"]),
        (with_branch, "timm", ["a network of your own", "pass --format onnx or pt2"]),
    ],
)
def test_a_network_that_an_exporter_cannot_take_is_explained(
    tmp_path, photos, run_export, factory, kind, messages
):
    if kind == "onnx":
        needs_onnx()
    network, arch = factory(len(CLASSES)), f"test_export:{factory.__name__}"
    path = write_checkpoint(
        tmp_path / "own.pth", arch, CLASSES, CONFIG, data_path=str(photos), network=network
    )
    code, _, err, exported = run_export(path, kind)
    assert code == 2 and err.count("\n") == 1
    assert all(message in err for message in messages), err
    assert kind == "timm" or tree(exported.parent) == []
