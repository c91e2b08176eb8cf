"""Any teacher, seen right: every kind of file, its input, its classes, its score."""

import argparse
import copy
import math
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import evaluation_images, teacher_flags, write_images
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from torch.nn.utils import parametrizations

import datasets
import models
from arguments.parsing import parse_args
from data.readers import digits
from distillation import TeacherAdapter, TeacherEnsemble, load_teacher
from models import cost, fusion
from models.fusion import fuse_layers
from teacher.prepare import is_near_chance
from utils import UserError

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(arch: str = "cifar_resnet8", num_classes: int = 10, seed: int = 1, **keywords):
    torch.manual_seed(seed)
    return timm.create_model(arch, num_classes=num_classes, **keywords).eval()


def assert_is(teacher, expected, images=IMAGES) -> None:
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), expected(images), rtol=0, atol=0)


GOOD = network(seed=1).state_dict()


def test_safetensors(tmp_path):
    save_file(GOOD, tmp_path / "t.safetensors")
    assert_is(load_teacher("cifar_resnet8", str(tmp_path / "t.safetensors"), 10, "cpu"), network())


def test_a_released_convnext_with_its_original_names(tmp_path):
    model = network("convnext_atto", conv_mlp=False)
    original = {}
    for name, value in model.state_dict().items():  # the layout of facebookresearch/ConvNeXt
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        name = re.sub(r"^head\.norm\.", "norm.", name).replace("head.fc", "head")
        original[name] = value
    assert original.keys() != model.state_dict().keys()
    torch.save({"model": original}, tmp_path / "t.pth")
    teacher = load_teacher("convnext_atto", str(tmp_path / "t.pth"), 10, "cpu")
    assert_is(teacher, model, torch.randn(2, 3, 64, 64))


def test_a_released_deit(tmp_path):
    model = network("deit_tiny_patch16_224")
    torch.save({"model": model.state_dict()}, tmp_path / "t.pth")
    teacher = load_teacher("deit_tiny_patch16_224", str(tmp_path / "t.pth"), 10, "cpu")
    assert_is(teacher, model, torch.randn(1, 3, 224, 224))
    assert teacher.info.data_config["mean"] == [0.485, 0.456, 0.406]


def test_a_missing_or_unexpected_weight_is_an_error_that_lists_it(tmp_path):
    less = {name: value for name, value in GOOD.items() if name != "bn1.weight"}
    torch.save(less | {"surprise": torch.zeros(1)}, tmp_path / "t.pth")
    with pytest.raises(UserError, match=r"missing \(bn1.weight\).*unexpected \(surprise\)"):
        load_teacher("cifar_resnet8", str(tmp_path / "t.pth"), 10, "cpu")


def test_what_the_teacher_was_trained_on_is_taken_from_the_best_source(tmp_path):
    def config(checkpoint: dict, **keywords) -> tuple:
        torch.save(checkpoint, tmp_path / "t.pth")
        teacher = load_teacher("cifar_resnet8", str(tmp_path / "t.pth"), 10, "cpu", **keywords)
        return teacher.info.data_config["mean"][0], teacher.info.data_config["input_size"]

    data = {"mean": [0.1] * 3, "std": [0.2] * 3, "input_size": 16}
    assert config({"model": GOOD}) == (0.5071, 32)  # the architecture's
    assert config({"model": GOOD, "data": data}) == (0.1, 16)  # this project's
    convnext = argparse.Namespace(imagenet_default_mean_and_std=True, input_size=24)
    assert config({"model": GOOD, "args": convnext}) == (0.485, 24)
    trained = argparse.Namespace(mean=[0.3] * 3, std=[0.2] * 3, img_size=40)
    assert config({"state_dict": GOOD, "args": trained}) == (0.3, 40)  # timm's train.py
    teacher = load_teacher("cifar_resnet8", str(tmp_path / "t.pth"), 10, "cpu")
    assert "input from the checkpoint's arguments" in teacher.info.origin
    torch.save({"model": GOOD, "args": argparse.Namespace(lr=1.0)}, tmp_path / "t.pth")
    teacher = load_teacher("cifar_resnet8", str(tmp_path / "t.pth"), 10, "cpu")
    assert "input from timm's pretrained_cfg" in teacher.info.origin
    by_hand = {"mean": [0.4] * 3, "input_size": 8}
    assert config({"model": GOOD, "data": data}, input_config=by_hand) == (0.4, 8)


def test_a_teacher_of_other_statistics_and_size_answers_as_in_its_own_pipeline(tmp_path):
    """Both pipelines start from the same images; float32, logits to 1e-4 of their spread."""
    teacher_config = {"mean": [0.3, 0.5, 0.4], "std": [0.2, 0.3, 0.25], "input_size": 16}
    torch.save({"model": GOOD, "data": teacher_config}, tmp_path / "t.pth")
    loaded = load_teacher("cifar_resnet8", str(tmp_path / "t.pth"), 10, "cpu")

    args = parse_args(["--input_size", "16"])
    student_config = datasets.data_config(args)
    source = digits(False)
    statistics = {"mean": teacher_config["mean"], "std": teacher_config["std"]}
    own = create_transform(16, interpolation="bicubic", crop_pct=1.0, **statistics)
    images = [source[index][0] for index in range(8)]
    teacher = TeacherAdapter(loaded, student_config)
    with torch.no_grad():
        expected = loaded(torch.stack([own(Image.fromarray(image)) for image in images]))
        seen = teacher(evaluation_images(images, student_config))
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4 * expected.std().item())

    # Another size: Pillow's antialiased bicubic of the same 32-pixel image, within a gray level.
    args.input_size = 32
    student_config = datasets.data_config(args)
    big = evaluation_images(images, student_config)
    small = TeacherAdapter(loaded, student_config).convert(big)
    mean, std = (torch.tensor(teacher_config[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    pixels = (small * std + mean) * 255
    pictures = [Image.fromarray(image) for image in images]
    enlarged = [picture.resize((32, 32), 3).resize((16, 16), 3) for picture in pictures]
    wanted = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in enlarged])
    assert (pixels - wanted).abs().mean() < 1 and (pixels - wanted).abs().max() < 8


def with_statistics(model):
    """As after training: no BatchNorm leaves its input as it is."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(std=0.1, generator=generator)
    return model


FUSED = [
    *("cifar_resnet8", "resnet18"),
    *("regnety_002", "efficientnet_b0"),  # BatchNorms with activations
    *("repvgg_a0", "mobileone_s0", "fastvit_t8"),  # parallel branches
]


@pytest.mark.parametrize("arch", FUSED)
def test_fused_layers_change_no_answer(arch):
    """In float64, to 1e-9 of the logits' spread."""
    model = with_statistics(network(arch).double())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse_layers(model, 32)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert_near(fused, model, IMAGES.double(), 1e-9)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The CPU does what CUDA would: cuDNN's call, which CUDA alone has, is made of two."""

    def conv_relu(x, weight, bias, *place):
        return torch.relu(torch.nn.functional.conv2d(x, weight, bias, *place))

    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution_relu", conv_relu, "CPU")
    monkeypatch.setattr(fusion, "may_choose_kernels", lambda device: True)
    monkeypatch.setattr(fusion.ConvReLU, "is_one_call", lambda self, x: True)
    yield
    library._destroy()


@pytest.mark.parametrize(
    "arch, relus, products",
    [("resnet18", 9, 0), ("resnet26", 17, 9), ("efficientnet_b0", 0, 64)],
)
def test_no_bias_takes_a_pass_of_its_own_on_cuda(as_on_cuda, arch, relus, products):
    """A ReLU is joined unless a shortcut is added before it; products are counted as before."""
    model = with_statistics(network(arch))
    fused = fuse_layers(model, 32, for_device=True)
    kinds = Counter(type(module) for module in fused.modules())
    assert (kinds[fusion.ConvReLU], kinds[fusion.PointwiseConv]) == (relus, products)
    assert_near(fused, model, IMAGES, 1e-3)
    counts = [cost.cost_of(either, 32, 0).multiply_adds for either in (fused, model)]
    assert counts[0] == counts[1]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("arch", ["resnet18", "regnety_002", "xcit_nano_12_p16_224"])
def test_weights_that_are_rearranged_once_give_the_same_bits(arch):
    model = with_statistics(network(arch)).to(memory_format=torch.channels_last)
    merged, packed = (fuse_layers(model, 32, for_device=how) for how in (False, True))
    assert any(isinstance(module, fusion.PackedConv) for module in packed.modules())
    images = torch.randn(32, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for count in (32, 16, 1):
            assert torch.equal(packed(images[:count]), merged(images[:count]))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(images), merged(images))
        for either in (packed, merged):
            either.bfloat16().float()  # rounds the weights
            next(either.parameters()).mul_(2)
        for other in (packed, copy.deepcopy(packed)):
            assert torch.equal(other(images), merged(images))
        for either in (packed, merged):
            first = next(either.parameters())
            first.data = 2 * first.data  # as load_state_dict(assign=True) does
        assert torch.equal(packed(images), merged(images))
    for either in (packed, merged):
        either.requires_grad_()(images).sum().backward()
    for seen, expected in zip(packed.parameters(), merged.parameters(), strict=True):
        assert torch.equal(seen.grad, expected.grad)
    assert_near(packed.double(), merged.double(), images.double(), 1e-9)
    counts = [cost.cost_of(either.float(), 32, 0).multiply_adds for either in (packed, model)]
    assert counts[0] == counts[1]


def assert_near(fused, model, images, tolerance: float) -> None:
    with torch.no_grad():
        expected, seen = model(images), fused(images)
    torch.testing.assert_close(seen, expected, rtol=0, atol=tolerance * expected.std().item())


def test_parallel_branches_become_one_convolution():
    model = with_statistics(network("repvgg_a0"))
    counts = [
        sum(isinstance(module, torch.nn.Conv2d) for module in either.modules())
        for either in (model, fuse_layers(model, 32))
    ]
    assert counts == [44, 22]


def test_layers_that_timm_makes_in_float32_take_the_dtype_of_the_network():
    model = with_statistics(network("efficientvit_m0").double())
    fused = fuse_layers(model, 224)
    assert fused is not model
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.float64}
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)).double()
    assert_near(fused, model, images, 1e-5)


class OutputUsedTwice(torch.nn.Module):
    """A convolution whose output goes past its BatchNorm too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)

    def forward(self, images):
        output = self.conv(images)
        return (output + self.norm(output)).mean(dim=(2, 3))


def test_layers_that_cannot_be_fused_are_left():
    model = with_statistics(OutputUsedTwice()).eval()
    assert_left(model)
    conv, norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
    assert_left(torch.nn.Sequential(parametrizations.weight_norm(conv), norm).eval())
    norm = torch.nn.BatchNorm2d(8, track_running_stats=False)  # those of each batch
    assert_left(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norm).eval())
    model = network("vit_tiny_patch16_224", img_size=32)
    assert fuse_layers(model, 32) is model


def assert_left(model: torch.nn.Module) -> None:
    left = fuse_layers(model, 32)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in left.modules())
    assert torch.equal(left(IMAGES), model(IMAGES))


def test_classes_in_another_order_are_matched_by_name(tmp_path):
    names = ["cat", "ant", "bee"]
    model = network(num_classes=3)
    config = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": 32, "classes": names}
    torch.save({"model": model.state_dict(), "data": config}, tmp_path / "t.pth")
    loaded = load_teacher(
        "cifar_resnet8", str(tmp_path / "t.pth"), 3, "cpu", classes=["ant", "bee", "cat"]
    )
    assert "3 matched by name" in loaded.info.origin
    with torch.no_grad():
        torch.testing.assert_close(
            TeacherAdapter(loaded, config)(IMAGES), model(IMAGES)[:, [1, 2, 0]]
        )


def test_a_teacher_of_more_classes_is_mapped_by_a_file_of_names(run_main, imnet, tmp_path):
    names = ["cat", "dog", "wasp", "ant", "bee"]
    torch.save(network(num_classes=5).state_dict(), tmp_path / "t.pth")
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n", "utf-8-sig")
    flags = ["--data_path", imnet, "--input_size", 32, "--epochs", 1, "--batch_size", 8]
    flags += teacher_flags(tmp_path / "t.pth")
    assert "classifier has 5 outputs, but 3 classes are expected" in run_main(*flags).err
    run = run_main(*flags, "--teacher_classes", tmp_path / "names.txt")
    assert run.code == 0 and "3 matched by name" in run.out, run.err
    (tmp_path / "names.txt").write_text("dog\ncat\nwasp\nANT\nbee\n")
    run = run_main(*flags, "--teacher_classes", tmp_path / "names.txt")
    assert run.code == 2 and "does not know 1 of the data's classes (ant)" in run.err
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    assert (
        "name each of its outputs"
        in run_main(*flags, "--teacher_classes", tmp_path / "names.txt").err
    )
    assert "cannot read this file" in run_main(*flags, "--teacher_classes", tmp_path / "none").err


def test_a_class_name_that_repeats_is_refused_where_the_data_has_the_class(
    run_main, imnet, tmp_path
):
    names = tmp_path / "names.txt"
    torch.save(network(num_classes=5).state_dict(), tmp_path / "t.pth")
    flags = ["--data_path", imnet, "--input_size", 32, "--epochs", 1, "--batch_size", 8]
    flags += [*teacher_flags(tmp_path / "t.pth"), "--teacher_classes", names]
    names.write_text("cat\nbee\nant\ncrane\ncat\n")
    run = run_main(*flags)
    assert run.code == 2 and f"--teacher_classes {names}: cat: several outputs" in run.err
    names.write_text("cat\nbee\nant\ncrane\ncrane\n")  # none of the data's
    assert run_main(*flags).code == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["fc.weight", "bn1.running_var"])
def test_weights_that_are_not_finite_blame_the_teacher(run_main, short, tmp_path, name, value):
    state = {name: weight.clone() for name, weight in GOOD.items()}
    state[name].view(-1)[3] = value
    torch.save(state, tmp_path / "t.pth")
    run = run_main(*short, *teacher_flags(tmp_path / "t.pth"))
    assert run.code == 2 and "Epoch" not in run.out
    told = f"--teacher_path {tmp_path / 't.pth'}: NaN or infinity in 1 of the teacher's weights"
    assert f"{told} ({name})" in run.err


def test_a_teacher_that_has_seen_the_held_out_images_is_warned_of(run_main, short, tmp_path):
    seen = "has learned images that now score it"
    for holdout in (None, 50, 100):
        flags = ["--holdout", holdout] if holdout else []
        run_main(*short, *flags, output_dir=tmp_path / f"{holdout}")
        kd = teacher_flags(tmp_path / f"{holdout}" / "checkpoint-1.pth")
        run = run_main(*short, *kd, "--holdout", 100)
        assert run.code == 0 and (seen in run.out) == (holdout != 100)
    told = "was trained on DIGITS with --holdout 50"
    kd = teacher_flags(tmp_path / "50" / "checkpoint-1.pth")
    assert told in run_main(*short, *kd, "--holdout", 100).out
    assert seen not in run_main(*short, *kd).out  # the test digits score it


def test_held_out_images_that_a_teacher_has_seen_are_counted_in_any_layout(
    run_main, imnet, tmp_path
):
    """By the names, labels and sizes of its images, which its checkpoint holds."""

    def trained(name: str, *flags: object) -> list[str]:
        flags = ["--input_size", 32, "--batch_size", 8, "--epochs", 1, *flags]
        assert run_main(*flags, output_dir=tmp_path / name).code == 0
        return teacher_flags(tmp_path / name / "checkpoint-best.pth")

    whole = trained("whole", "--data_path", imnet)
    some = trained("some", "--data_path", imnet, "--holdout", 12)
    student = ["--data_path", imnet / "train", "--input_size", 32, "--batch_size", 8]
    student += ["--epochs", 1]
    held_out = tmp_path / "some" / "checkpoint-best.pth"
    for holdout in (4, 12):
        out = run_main(*student, "--holdout", holdout, *whole).out
        assert f"was trained on {holdout} of the {holdout} held-out images that score it" in out
    assert "held-out images that score it" not in run_main(*student, "--holdout", 12, *some).out
    kept = set(datasets.stratified(np.repeat(range(3), 8), 12, seed=0))
    seen = len(set(datasets.stratified(np.repeat(range(3), 8), 6, seed=0)) - kept)
    out = run_main(*student, "--holdout", 6, *some).out
    assert 0 < seen < 6 and f"{held_out} was trained on {seen} of the 6 held-out images" in out
    (imnet / "train" / "bee" / "3.jpg").unlink()  # no longer its images
    assert "held-out images that score it" not in run_main(*student, "--holdout", 4, *whole).out


def test_the_teachers_score_is_printed_logged_and_kept(run_main, short, kd, tmp_path):
    run = run_main(*short, *kd, output_dir=tmp_path)
    printed = float(re.search(r"Teacher on the 360 validation images: acc1 ([\d.]+)", run.out)[1])
    assert run.log[0]["teacher_acc1"] == pytest.approx(printed, abs=0.01)
    assert run.checkpoint(1)["scores"]["teacher_acc1"] == run.log[1]["teacher_acc1"]
    assert "Warning: the teacher is near chance" in run.out  # its weights are random
    assert "would score 10.28 % of the 360 images" in run.out and "EMA" not in run.out
    quiet = run_main(*short, *kd, "--teacher_eval", "false", output_dir=tmp_path / "quiet")
    assert "Teacher on" not in quiet.out and "test_kl" not in quiet.log[0]


@pytest.mark.parametrize(
    ("correct", "images", "chance", "is_near"),
    [
        (39, 40, 0.5, False),  # 97.5 % of two classes
        (20, 40, 0.5, True),
        (26, 40, 0.5, True),  # by luck once in 25 times
        (10, 40, 0.1, False),
        (8, 40, 0.1, True),
        (900, 1000, 0.9, True),  # the largest class is 90 % of the images
        (150, 1000, 0.1, False),
        (101, 1000, 0.1, True),
        (1, 1000, 0.1, True),
        (12, 12, 1.0, False),  # a single class: there is nothing to tell apart
    ],
)
def test_near_chance_is_what_guessing_reaches_by_luck_too(correct, images, chance, is_near):
    assert is_near_chance(correct, images, chance) == is_near
    if chance < 1:  # P(X >= correct) of a binomial X, in integers
        right, wrong = round(10 * chance), round(10 - 10 * chance)
        ways = sum(
            math.comb(images, k) * right**k * wrong ** (images - k)
            for k in range(correct, images + 1)
        )
        assert (100 * ways > 10**images) == is_near


def test_a_good_teacher_of_two_classes_is_not_called_near_chance(run_main, tmp_path):
    """97.5 %: it tells dark from bright images, and one of the 40 is in the wrong folder."""
    for split, count in (("train", 16), ("val", 20)):
        write_images(tmp_path / split, ["ant", "zebra"], count)
    wrong = tmp_path / "val" / "zebra" / "0.jpg"
    wrong.write_bytes((tmp_path / "val" / "ant" / "0.jpg").read_bytes())
    flags = ["--data_path", tmp_path, "--input_size", 16, "--batch_size", 8, "--mixup", 0]
    flags += ["--cutmix", 0, "--aa=", "--lr", "5e-3", "--reprob", 0]
    run_main(*flags, "--epochs", 6, output_dir=tmp_path / "t")
    kd = teacher_flags(tmp_path / "t" / "checkpoint-best.pth")
    run = run_main(*flags, *kd, "--epochs", 1)
    assert run.code == 0 and "acc1 97.50" in run.out
    assert "near chance" not in run.out


def test_an_average_that_knows_nothing_is_named_as_a_cause(run_main, short, tmp_path):
    average = network(seed=1).state_dict()
    torch.save({"model": average, "model_ema": average}, tmp_path / "t.pth")
    run = run_main(*short, *teacher_flags(tmp_path / "t.pth"))
    assert re.search(r"near chance: .*an average \(EMA\) that had too few steps", run.out)


@pytest.mark.parametrize("more", [[], ["--disable_eval", "true"]])
def test_a_teacher_below_the_floor_stops_the_run(run_main, short, kd, more):
    run = run_main(*short, *kd, "--teacher_min_acc1", 90, *more)
    assert run.code == 2 and "--teacher_min_acc1 90.0: the teacher scores" in run.err
    assert "--teacher_norm" in run.err and "Epoch" not in run.out


def test_a_run_without_evaluation_still_scores_its_teacher(run_main, short, kd, imnet, tmp_path):
    run = run_main(*short, *kd, "--disable_eval", "true", output_dir=tmp_path)
    record = run.log[-1]
    assert record["teacher_acc1"] > 0 and not any(name.startswith("test_") for name in record)
    shutil.rmtree(imnet / "val")
    flags = ["--data_path", imnet, "--input_size", 32, *kd, "--disable_eval", "true"]
    refused = run_main(*flags, "--teacher_min_acc1", 5)
    assert refused.code == 2 and "--teacher_min_acc1 5.0: the teacher is not scored" in refused.err


def test_a_teacher_below_its_student_is_told_in_the_end(run_main, kd):
    run = run_main("--train_samples", 320, "--epochs", 6, "--lr", "5e-3", "--kd_alpha", 0.01, *kd)
    assert "is below its student" in run.out


def test_fidelity_is_logged_and_right(run_main, short, kd, teacher_file, tmp_path):
    run = run_main(*short, *kd, output_dir=tmp_path / "out")
    student = models.create_model("cifar_resnet8", 10, 8).eval()
    student.load_state_dict(run.checkpoint(1)["model"])
    size = {"input_size": 8}
    loaded = load_teacher("cifar_resnet8", str(teacher_file), 10, "cpu", input_config=size)
    args = parse_args(["--input_size", "8"])
    config = datasets.data_config(args)
    teacher = TeacherAdapter(loaded, config)
    source = digits(False)
    images = evaluation_images([source[index][0] for index in range(360)], config)
    with torch.no_grad():
        s, t = student(images).double().softmax(1), teacher(images).double().softmax(1)
    last = run.log[-1]
    assert last["test_kl"] == pytest.approx((t * (t / s).log()).sum(1).mean().item(), rel=1e-4)
    agreement = (s.argmax(1) == t.argmax(1)).double().mean().item()
    assert last["test_agreement"] == pytest.approx(100 * agreement, abs=0.3)
    assert 0 <= last["train_teacher_acc1"] <= 100


def test_several_teachers_average_their_tempered_probabilities():
    teachers = [network(seed=seed) for seed in (1, 2)]
    ensemble = TeacherEnsemble(teachers, weights=[3.0, 1.0], temperature=4.0)
    with torch.no_grad():
        a, b = (teacher(IMAGES).double() for teacher in teachers)
        seen = (ensemble(IMAGES).double() / 4).softmax(1)
    expected = 0.75 * (a / 4).softmax(1) + 0.25 * (b / 4).softmax(1)
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-7)
    assert not any(module.training for module in ensemble.train().modules())


def test_several_teachers_on_the_command_line(run_main, short, teacher_file, tmp_path):
    other = tmp_path / "other.pth"
    torch.save(network("cifar_resnet20").state_dict(), other)
    flags = ["--kd", "true", "--teacher_arch", "cifar_resnet8,cifar_resnet20"]
    both = f"{teacher_file},{other}"
    run = run_main(*short, *flags, "--teacher_path", both, "--teacher_weights", "2,1")
    assert run.code == 0 and run.out.count("Teacher cifar_resnet") == 2
    assert "names 2 and --teacher_path 1" in run_main(*flags, "--teacher_path", other).err
    run = run_main(*flags, "--teacher_path", both, "--teacher_weights", "1,2,3")
    assert "--teacher_weights 1,2,3: pass 2 number(s)" in run.err


@pytest.mark.parametrize(
    "flags",
    [
        "--teacher_dtype bfloat16 --teacher_device cpu",
        "--teacher_norm student",
        "--teacher_norm arch --teacher_input_size 16",
        "--use_amp true",
    ],
)
def test_the_teachers_flags_run(run_main, short, kd, flags):
    run = run_main(*short, *kd, *flags.split())
    assert run.code == 0, run.err
    if "norm arch" in flags:
        assert "16 px, mean 0.507/0.487/0.441" in run.out
    if "norm student" in flags:
        assert "mean 0.485/0.456/0.406" in run.out


def test_the_norm_of_a_network_that_says_none_is_the_students(run_main, short, tmp_path):
    torch.save(torchvision.models.squeezenet1_1(num_classes=10).state_dict(), tmp_path / "t.pth")
    flags = ["--teacher_path", tmp_path / "t.pth", "--teacher_norm", "arch"]
    flags += ["--teacher_arch", "torchvision.models:squeezenet1_1", "--teacher_input_size", 32]
    run = run_main(*short, "--kd", "true", *flags)
    assert run.code == 0 and "32 px" in run.out, run.err


def test_a_smaller_dtype_changes_the_answer_by_its_rounding_only(teacher_file):
    config = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": 32}
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_teacher("cifar_resnet8", str(teacher_file), 10, "cpu")
        with torch.no_grad():
            answers.append(TeacherAdapter(loaded, config, dtype)(IMAGES).float())
    assert not torch.equal(*answers)
    torch.testing.assert_close(*answers, rtol=0.05, atol=0.05 * answers[0].abs().max().item())


def test_a_distilled_student_is_the_next_teacher(run_main, short, kd, tmp_path):
    run_main(*short, *kd, "--model_ema", "true", output_dir=tmp_path / "first")
    flags = teacher_flags(tmp_path / "first" / "checkpoint-best.pth")
    run = run_main(*short, *flags)
    assert run.code == 0 and "(input from the checkpoint)" in run.out, run.err
    assert "weights 'model', recorded accuracy" in run.out  # the EMA was not scored


def test_class_names_travel_in_the_checkpoint(run_main, imnet, tmp_path):
    flags = ["--input_size", 32, "--epochs", 1, "--batch_size", 8]
    run_main("--data_path", imnet, *flags, output_dir=tmp_path / "t")
    write_images(tmp_path / "two" / "train", ["cat", "ant"])
    write_images(tmp_path / "two" / "val", ["cat", "ant"])
    kd = teacher_flags(tmp_path / "t" / "checkpoint-0.pth")
    run = run_main("--data_path", tmp_path / "two", *flags, *kd)
    assert run.code == 0 and "2 matched by name" in run.out, run.err


def test_a_caller_from_python_is_not_told_about_flags(tmp_path):
    torch.save(GOOD, tmp_path / "good.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    for arch, name, classes in (
        ("cifar_resnet8", "none.pth", 10),
        ("cifar_resnet8", "empty.pth", 10),
        ("cifar_resnet", "good.pth", 10),
        ("cifar_resnet20", "good.pth", 10),
        ("cifar_resnet8", "good.pth", 7),
    ):
        with pytest.raises(UserError) as caught:
            load_teacher(arch, str(tmp_path / name), classes, "cpu")
        assert "--" not in str(caught.value) and str(caught.value).startswith((arch, str(tmp_path)))


def test_a_teacher_that_was_shown_the_images_in_another_crop_is_told_of(run_main, tmp_path):
    flags = ["--train_samples", 400, "--epochs", 8, "--lr", "3e-3", "--mixup", 0, "--cutmix", 0]
    made = run_main(*flags, output_dir=tmp_path)
    kd = teacher_flags(tmp_path / "checkpoint-7.pth")
    told = f"records {made.log[-1]['test_acc1']:.2f} % on these images"
    few = ["--train_samples", 16, "--epochs", 1]
    student = run_main(*few, *kd, "--crop_pct", 0.6)
    assert student.code == 0 and told in student.out and "--crop_pct 0.6" in student.out
    assert "records" not in run_main(*few, *kd).out
    assert "records" not in run_main(*few, *kd, "--crop_pct", 0.6, "--holdout", 50).out  # others
