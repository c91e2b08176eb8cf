"""Images without a label: their loss, their mixed labels, their folders, and whole runs."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import is_same, teacher_flags, write_images
from PIL import Image
from timm.loss import SoftTargetCrossEntropy

import datasets
from arguments.parsing import parse_args
from data.mixup import MixingSettings, PartialLabels, make_mixup
from distillation import DistillationLoss, PartlyLabeledLoss
from teacher import prepare

generator = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (3 * torch.randn(32, 5, generator=generator) for _ in range(2))
LABELS = torch.arange(32) % 6  # 5 stands for no label
REST = ["--train_samples", 48, "--unlabeled", "rest", "--holdout", 1341, "--epochs", 2]

# ------------------------------------------------------------------------------------ the loss


def loss_of(alpha: float, share: float, images_per_step: int = 32) -> PartlyLabeledLoss:
    return PartlyLabeledLoss(SoftTargetCrossEntropy(), alpha, 3.0, share, images_per_step)


def test_the_loss_is_that_of_the_formula_in_float64():
    share = (LABELS < 5).double().mean().item()
    targets = F.one_hot(LABELS, 6)[:, :-1].float()
    loss, parts = loss_of(0.3, share)(STUDENT, TEACHER, targets)
    log_p = F.log_softmax(STUDENT.double(), 1)
    ce = -(targets.double() * log_p).sum(1)[LABELS < 5].mean()
    p, q = (F.softmax(logits.double() / 3, 1) for logits in (TEACHER, STUDENT))
    kd = 9 * (p * (p / q).log()).sum(1)
    expected = {"ce": ce, "kd": kd.mean(), "labeled": share}
    expected |= {"kd_labeled": kd[LABELS < 5].mean(), "kd_unlabeled": kd[LABELS == 5].mean()}
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(float(value), rel=1e-5), name
    assert loss.item() == pytest.approx((0.7 * ce + 0.3 * kd.mean()).item(), rel=1e-5)
    rare = loss_of(0.3, share / 100, 48)(STUDENT, TEACHER, targets)[0]  # 0.4 labels per step
    w = 48 * share / 100
    assert rare.item() == pytest.approx((0.7 * w * 100 * ce + 0.3 * kd.mean()).item(), rel=1e-5)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_however_labels_are_spread():
    """So processes and accumulation give one loss; here one part has no label at all."""
    order = LABELS.argsort(descending=True)  # those without a label first
    targets = F.one_hot(LABELS, 6)[:, :-1].float()
    whole = loss_of(0.5, 0.8)(STUDENT, TEACHER, targets)
    parts = [
        loss_of(0.5, 0.8)(STUDENT[some], TEACHER[some], targets[some]) for some in order.split(4)
    ]
    assert torch.stack([loss for loss, _ in parts]).mean().item() == pytest.approx(whole[0].item())
    for name, value in whole[1].items():
        mean = torch.stack([found[name] for _, found in parts]).mean().item()
        assert mean == pytest.approx(value.item(), rel=1e-5), name


def test_an_image_without_a_label_is_taught_by_the_teacher_alone():
    student = STUDENT.clone().requires_grad_()
    targets = F.one_hot(LABELS, 6)[:, :-1].float()
    loss_of(0.3, 0.8)(student, TEACHER, targets)[0].backward()
    again = STUDENT.clone().requires_grad_()
    plain = DistillationLoss(SoftTargetCrossEntropy(), 1.0, 3.0)
    (0.3 * plain(again, TEACHER, targets)[0]).backward()
    no_label = LABELS == 5
    torch.testing.assert_close(student.grad[no_label], again.grad[no_label])
    assert not torch.allclose(student.grad[~no_label], again.grad[~no_label])


def test_without_any_label_only_the_teacher_is_left():
    loss, parts = loss_of(1.0, 0.0)(STUDENT, TEACHER, torch.zeros(32, 5))
    assert loss.isfinite() and parts.keys() == {"kd", "kd_unlabeled", "labeled"}
    with pytest.raises(ValueError, match="have no label"):
        loss_of(0.5, 0.0)


# -------------------------------------------------------------------------------- mixed labels


@pytest.mark.parametrize("mode", ["batch", "pair", "elem", "none"])
def test_a_mixed_label_has_the_mass_of_its_labeled_part(mode):
    """Where all have a label, images and labels are those of the plain mixup, smoothing too."""
    flags = ["--mixup", "0", "--cutmix", "0"] if mode == "none" else ["--mixup_mode", mode]
    args = parse_args(["--batch_size", "32", "--smoothing", "0.1", *flags])
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    settings = datasets.from_flags(MixingSettings, args)
    partial = make_mixup(settings, 5, batch_size=32, seed=0, partial_labels=True)
    assert isinstance(partial, PartialLabels)
    seen, soft = partial(images.clone(), LABELS % 5, 0, 0)
    if mode == "none":
        plain = images, F.one_hot(LABELS % 5, 5) * 0.9 + 0.02
    else:
        plain = make_mixup(settings, 5, batch_size=32, seed=0)(images.clone(), LABELS % 5, 0, 0)
    assert torch.equal(seen, plain[0])
    torch.testing.assert_close(soft, plain[1].float())

    seen, partly = partial(images.clone(), LABELS, 0, 0)
    assert torch.equal(seen, plain[0])
    mass = partly.sum(dim=1)
    assert mass.min() >= 0 and mass.max() <= 1 + 1e-6
    if mode in ("none", "pair"):  # partners share what they have; other modes exchange with others
        assert mass.sum().item() == pytest.approx((LABELS < 5).sum().item(), rel=1e-5)
    if mode != "none":
        assert ((mass > 0.01) & (mass < 0.99)).any()


# ------------------------------------------------------------------------------------- folders


def test_a_folder_of_any_depth_joins_and_is_told_apart(tmp_path, imnet):
    write_images(tmp_path / "pile", ["2019/may", "2020"], count=2)
    Image.new("RGB", (40, 40)).save(tmp_path / "pile" / "top.png")
    (tmp_path / "pile" / "notes.txt").write_text("no image")
    flags = ["--data_path", str(imnet), "--unlabeled", str(tmp_path / "pile")]
    args = parse_args([*flags, *map(str, teacher_flags(__file__))])
    train = datasets.open_splits(args).train
    assert len(train) == 24 + 5 and train.targets[24:].tolist() == [3] * 5
    paths = [train.path(index) for index in range(24, 29)]
    assert sorted(path.rsplit("/", 1)[-1] for path in paths) == [
        *("0.jpg", "0.jpg", "1.jpg", "1.jpg"),
        "top.png",
    ]
    assert np.asarray(train.load(paths.index(str(tmp_path / "pile" / "top.png")) + 24)).max() == 0
    before, identity = train.fingerprint(), train.identity()
    Image.new("RGB", (400, 400)).save(tmp_path / "pile" / "top.png")  # more bytes
    assert train.fingerprint() != before and train.identity() != identity


# ---------------------------------------------------------------------------------------- runs


def test_cached_and_interrupted_runs_end_as_the_run_that_asks_the_teacher(run_main, kd, tmp_path):
    """With mixup, smoothing and images without a label; resumed from its middle by its file."""
    flags = [*REST, *kd, "--mixup_mode", "pair", "--save_ckpt_num", 2]
    online = run_main(*flags, output_dir=tmp_path / "online")
    assert "48 images are labeled (8 per batch on average)" in online.out, online.err
    assert "Teacher on 48 unlabeled images: top probability" in online.out
    names = {"train_ce", "train_kd", "train_kd_labeled", "train_kd_unlabeled", "train_labeled"}
    assert names < online.log[0].keys() and "train_teacher_acc1" not in online.log[0]
    assert online.log[0]["train_labeled"] == pytest.approx(0.5)
    cache = ["--teacher_cache", tmp_path / "cache", "--teacher_cache_dtype", "float32"]
    for name in ("filled", "read"):
        cached = run_main(*flags, *cache, output_dir=tmp_path / name)
        assert cached.log == online.log, cached.err
    rest = run_main(
        "--resume", tmp_path / "online" / "checkpoint-0.pth", output_dir=tmp_path / "rest"
    )
    assert rest.code == 0 and "another recipe" not in rest.out, rest.err
    assert rest.log == online.log[1:]
    assert is_same(rest.checkpoint(1)["model"], online.checkpoint(1)["model"])
    other = run_main(*flags[2:4], *flags[4:], "--train_samples", 40, output_dir=tmp_path / "online")
    assert other.code == 2 and "was trained on different images" in other.err
    scored = run_main("--eval", "true", "--resume", tmp_path / "online" / "checkpoint-1.pth")
    assert f"test_acc1 {online.log[1]['test_acc1']:.4f}" in scored.out, scored.err


def test_images_that_are_foreign_or_of_the_validation_set_are_warned_of(
    run_main, imnet, tmp_path, monkeypatch
):
    flags = ["--data_path", imnet, "--input_size", 32, "--batch_size", 8, "--epochs", 6]
    flags += "--lr 1e-2 --smoothing 0 --mixup 0 --cutmix 0 --aa none --reprob 0".split()
    assert run_main(*flags, output_dir=tmp_path / "teacher").code == 0
    kd = teacher_flags(tmp_path / "teacher" / "checkpoint-5.pth")
    pile = tmp_path / "pile"
    shutil.copytree(imnet / "train", pile)
    shutil.copyfile(imnet / "val" / "bee" / "1.jpg", pile / "x.jpg")
    run = run_main(*flags[:-16], *kd, "--epochs", 1, "--unlabeled", pile)
    assert run.code == 0 and "unsure of the unlabeled" not in run.out, run.err
    # The training images 0 to 2 of 'ant' are validation images of that class.
    assert (
        f"4 of 25 images without a label are validation images too ({pile}/x.jpg, {pile}" in run.out
    )
    monkeypatch.setattr(prepare, "FOREIGN", -1.0)  # less sure than of validation images, plus 1
    run = run_main(*flags[:-16], *kd, "--epochs", 1, "--unlabeled", pile)
    assert "the teacher is unsure of the unlabeled images: its mean top probability is" in run.out


def test_a_flat_folder_has_the_classes_of_its_teacher_or_of_the_validation_images(
    run_main, imnet, tmp_path
):
    flags = ["--input_size", 32, "--batch_size", 8, "--epochs", 1]
    assert run_main(*flags, "--data_path", imnet, output_dir=tmp_path / "t").code == 0
    pile = tmp_path / "pile"
    shutil.copytree(imnet / "train", pile)
    shutil.copyfile(pile / "ant" / "0.jpg", pile / "x.jpg")
    kd = teacher_flags(tmp_path / "t" / "checkpoint-0.pth")
    (tmp_path / "one_level").mkdir()
    shutil.copyfile(pile / "x.jpg", tmp_path / "one_level" / "x.jpg")
    alpha = [*kd, "--kd_alpha", 1, "--data_path"]
    run = run_main(*flags, *alpha, tmp_path / "one_level", "--mixup", 0, "--cutmix", 0)
    assert run.code == 0 and "1 images, 3 classes" in run.out, run.err
    flags += [*alpha, pile]
    run = run_main(*flags, output_dir=tmp_path / "flat")
    assert run.code == 0 and "25 images, 3 classes" in run.out, run.err
    assert "No image has a label: the student learns from the teacher alone" in run.out
    assert run.checkpoint(0)["data"]["classes"] == ["ant", "bee", "cat"]
    assert run.log[0]["train_kd"] > 0 and "train_ce" not in run.log[0]
    flags += ["--data_set", "image_folder", "--eval_data_path", imnet / "val"]
    run = run_main(*flags, output_dir=tmp_path / "scored")
    assert run.code == 0 and "test_acc1" in run.log[0], run.err
    bare = tmp_path / "bare.pth"
    torch.save(run.checkpoint(0)["model"], bare)
    run = run_main(*flags[:6], *teacher_flags(bare), "--kd_alpha", 1, "--data_path", pile)
    assert run.code == 2 and "does not name its classes; name each of its outputs" in run.err


def test_without_a_teacher_such_images_are_refused_or_reported_and_left_out(run_main, kd, short):
    run = run_main(*short, "--unlabeled", "rest")
    assert run.code == 2 and "--unlabeled rest has no effect without --kd true" in run.err
    for switch, value in (("--kd", "false"), ("--kd_alpha", 0)):
        run = run_main(*short, *kd, "--unlabeled", "rest", switch, value)
        assert run.code == 0 and "64 images, 10 classes" in run.out and "--unlabeled" in run.out


def test_an_empty_folder_is_refused(run_main, kd, tmp_path):
    (tmp_path / "empty").mkdir()
    run = run_main(*kd, "--unlabeled", tmp_path / "empty")
    assert run.code == 2 and f"--unlabeled {tmp_path}/empty: holds no image" in run.err
