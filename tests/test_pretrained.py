"""timm's own weights, for students and teachers; from folders here, since tests have no network."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers import is_same, write_images
from timm.data import ImageNetInfo

import models
from models.classes import pretrained_classes
from utils import UserError

QUICK = "--batch_size 8 --epochs 1 --mixup 0 --cutmix 0 --reprob 0 --aa none".split()


def save_hub_folder(folder: Path, arch: str, num_classes: int, **config: object) -> str:
    """A folder as timm uploads it, with random weights; returns its name for timm."""
    torch.manual_seed(2)
    network = timm.create_model(arch, num_classes=num_classes)
    keywords = {"model_config": {"num_classes": num_classes, **config}}
    network.pretrained_cfg |= {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    timm.models.save_for_hf(network, folder, **keywords)
    return f"local-dir:{folder}"


@pytest.fixture
def vit(tmp_path) -> str:
    """A tiny ViT for 160 pixels with 7 classes."""
    return save_hub_folder(tmp_path / "vit", "test_vit", 7)


def test_a_pretrained_student_follows_its_weights(run_main, imnet, vit, tmp_path):
    """Their normalization, size and all but the classifier; nothing is fetched on a resume."""
    still = ["--lr", 0, "--min_lr", 0]
    flags = ["--model", vit, "--pretrained", "true", "--data_path", imnet, *QUICK]
    run = run_main(*flags, *still, output_dir=tmp_path / "out")
    assert run.code == 0 and "timm's pre-trained weights" in run.out, run.err
    saved, data = run.checkpoint(0)["model"], run.checkpoint(0)["data"]
    assert (data["mean"], data["std"], data["input_size"]) == ([0.5] * 3, [0.25] * 3, 160)
    released = timm.create_model(vit, pretrained=True).state_dict()
    for name in released:
        if not name.startswith("head."):
            assert torch.equal(saved[name], released[name]), name
    assert saved["head.weight"].shape == (3, 64)
    shutil.move(tmp_path / "vit" / "pytorch_model.bin", tmp_path / "gone")
    again = run_main(*flags, "--epochs", 2, output_dir=tmp_path / "out")
    assert again.code == 0 and "epoch 0 is done" in again.out, again.err
    flags = ["--eval", "true", "--resume", tmp_path / "out" / "checkpoint-1.pth", "--model", vit]
    scored = run_main(*flags)
    assert scored.code == 0 and f"test_loss {again.log[1]['test_loss']:.4f}" in scored.out


def test_a_classifier_of_as_many_other_classes_is_not_kept(run_main, imnet, tmp_path):
    flags = ["--pretrained", "true", "--data_path", imnet, *QUICK, "--input_size", 32]
    flags += ["--lr", 0, "--min_lr", 0]
    for names in (["ant", "bee", "cat"], ["bee", "ant", "cat"], ["x", "y", "z"]):
        folder = tmp_path / names[0]
        arch = save_hub_folder(folder, "test_resnet", 3, label_names=names)
        run = run_main(*flags, "--model", arch, output_dir=folder / "out")
        released = timm.create_model(arch, pretrained=True).fc.weight
        is_kept = torch.equal(run.checkpoint(0)["model"]["fc.weight"], released)
        assert is_kept == (names == ["ant", "bee", "cat"]), run.err
        assert ("new classifier" in run.out) != is_kept


def test_weights_are_fetched_where_no_checkpoint_can_be_read(run_main, imnet, vit, tmp_path):
    """Else the run would begin with random weights."""
    flags = ["--model", vit, "--pretrained", "true", "--data_path", imnet, *QUICK]
    flags += ["--lr", 0, "--min_lr", 0]
    first = run_main(*flags, output_dir=tmp_path / "out")
    for path in (tmp_path / "out").glob("*.pth"):
        path.write_bytes(b"cut short")
    again = run_main(*flags, output_dir=tmp_path / "out")
    assert again.code == 0 and "trying the checkpoint before it" in again.out, again.err
    assert "timm's pre-trained weights" in again.out and again.log == first.log


def test_a_fetch_is_reported_before_it_begins(capsys):
    """Without a network, it fails after a minute."""
    with pytest.raises(UserError, match="could not be fetched"), models.fetching("resnet18"):
        assert "Loading resnet18 from timm's copy" in capsys.readouterr().out
        raise OSError("no route")


def test_flags_overrule_the_size_and_positions_are_resampled(run_main, imnet, tmp_path):
    vit = save_hub_folder(tmp_path / "fixed", "vit_tiny_patch16_224", 7)
    flags = ["--model", vit, "--data_path", imnet, *QUICK, "--input_size", 64, "--lr", 0]
    flags += ["--min_lr", 0, "--imagenet_default_mean_and_std", "true"]
    run = run_main(*flags, "--pretrained", "true", output_dir=tmp_path / "a")
    assert run.code == 0, run.err
    first = run.checkpoint(0)
    assert first["data"]["input_size"] == 64 and first["data"]["mean"][0] == 0.485
    expected = timm.create_model(vit, pretrained=True, img_size=64).pos_embed
    assert torch.equal(first["model"]["pos_embed"], expected)
    large = timm.create_model(vit, pretrained=True)
    torch.save(large.state_dict(), tmp_path / "large.pth")
    run = run_main(*flags, "--finetune", tmp_path / "large.pth", output_dir=tmp_path / "b")
    assert run.code == 0, run.err
    assert is_same(run.checkpoint(0)["model"]["pos_embed"], first["model"]["pos_embed"])


def teach(run_main, arch: str, data: Path, *flags: object):
    teacher = ["--kd", "true", "--teacher_path", "pretrained", "--teacher_arch", arch]
    return run_main(*teacher, "--data_path", data, "--input_size", 32, *QUICK, *flags)


def test_weights_whose_folder_names_the_classes_teach_by_name(run_main, imnet, tmp_path):
    names = ["cat", "dog", "ant", "bee"]
    arch = save_hub_folder(tmp_path / "r", "test_resnet", 4, label_names=names)
    run = teach(run_main, arch, imnet, "--teacher_cache", tmp_path / "cache")
    assert run.code == 0 and "timm's pre-trained weights" in run.out, run.err
    assert "4 classes (3 matched by name), 160 px, mean 0.5/0.5/0.5" in run.out
    again = teach(run_main, arch, imnet, "--teacher_cache", tmp_path / "cache")
    assert again.code == 0 and "the teacher is not loaded" in again.out, again.err
    other = timm.create_model(arch, pretrained=True)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    timm.models.save_for_hf(
        other, tmp_path / "r", model_config={"num_classes": 4, "label_names": names}
    )
    changed = teach(run_main, arch, imnet, "--teacher_cache", tmp_path / "cache")
    assert changed.code == 2 and "teacher_path" in changed.err


def test_imagenet_teachers_know_wordnet_ids_and_names(run_main, tmp_path):
    arch = save_hub_folder(tmp_path / "r", "test_resnet", 1000)
    info = ImageNetInfo()
    ids = [info.index_to_label_name(index) for index in (3, 700)]
    names = [info.index_to_description(index).split(",")[0] for index in (3, 700)]
    for number, classes in enumerate((ids, [name.replace(" ", "_") for name in names])):
        data = tmp_path / f"data{number}"
        for part in ("train", "val"):
            write_images(data / part, classes)
        run = teach(run_main, arch, data)
        assert run.code == 0 and "1000 classes (2 matched by name)" in run.out, run.err
    for part in ("train", "val"):
        write_images(tmp_path / "twice" / part, [names[0], "crane"])
    run = teach(run_main, arch, tmp_path / "twice")
    assert run.code == 2 and "several outputs of the teacher have the same class name" in run.err


def test_short_names_that_may_mean_another_class_are_explained(capsys):
    """ImageNet's mouse (673) belongs to a computer; two of its classes are called missile."""
    names = pretrained_classes("resnet18", ["mouse", "hen", "missile"])
    assert [names.index(name) for name in ("mouse", "hen", "missile")] == [673, 8, 657]
    out = capsys.readouterr().out
    assert "first of their names: missile (not projectile, missile); mouse, computer mouse; " in out
    pretrained_classes("resnet18", ["n03793489", "n01514859"])
    assert not capsys.readouterr().out


def test_other_classes_and_backbones_get_no_random_classifier(run_main, imnet, tmp_path):
    arch = save_hub_folder(tmp_path / "r", "test_resnet", 1000)
    run = teach(run_main, arch, imnet)
    assert run.code == 2 and "not all classes of the data (" in run.err
    assert "fine-tune or probe this network on the data first" in run.err
    arch = save_hub_folder(tmp_path / "b", "test_resnet", 0)
    run = teach(run_main, arch, imnet)
    assert run.code == 2 and "these weights have no classifier" in run.err


BAD = {
    "--model test_resnet.nonsense": "timm has no such weights of test_resnet; it has test_resnet.",
    "--model local-dir:/nowhere": "could not be fetched or loaded (Config file not found",
    "--model cifar_resnet8": "timm has no pre-trained weights of this architecture",
    "--model resnet18 --finetune {file}": "beside --pretrained true, which starts from other",
    "--model resnet81": "did you mean",
}


@pytest.mark.parametrize("flags", BAD)
def test_what_timm_does_not_have_is_told_in_one_line(run_main, teacher_file, flags):
    words = flags.format(file=teacher_file).split()
    run = run_main(*words, "--pretrained", "true", "--train_samples", 64, "--epochs", 1)
    assert run.code == 2 and BAD[flags] in run.err, run.err
    assert len(run.err.strip().splitlines()) <= 2


def test_without_a_network_the_remedy_is_told(monkeypatch):
    def fails(*args, **keywords):
        raise FileNotFoundError("An error happened while trying to locate the file on the Hub")

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(UserError, match="could not be fetched .* on the Hub.*there is a network"):
        models.create_model("resnet18", 10, 64, pretrained=True)


# ------------------------------------------------------------------------- networks of one's own

OWN = """
from torch import nn
def plain(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))
def told(num_classes):
    network = plain(num_classes)
    network.default_cfg = {"mean": (0.4,) * 3, "std": (0.2,) * 3, "input_size": (3, 24, 24)}
    return network
def wrong(num_classes):
    return "a network"
class Returns(nn.Module):
    def __init__(self, num_classes, what):
        super().__init__()
        self.network, self.what = plain(num_classes), what
    def forward(self, images):
        return self.what(self.network(images), self.training)
def auxiliary(num_classes):
    return Returns(num_classes, lambda logits, training: (logits, logits) if training else logits)
def named(num_classes):
    return Returns(num_classes, lambda logits, training: {"logits": logits})
def maps(num_classes):
    return Returns(num_classes, lambda logits, training: logits[:, :, None, None])
def thousand(num_classes):
    return plain(1000)
def lazy(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(num_classes))
def failing(num_classes):
    raise RuntimeError("no such layer")
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """The name of a module that is in the current folder."""
    monkeypatch.chdir(tmp_path)
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    return name


def test_a_network_of_ones_own_is_student_and_teacher(run_main, own, short, tmp_path):
    """Its input is what it says, else what the flags say; cached as any other; resumed; scored."""
    flags = [*short, "--model_ema", "true"]
    first = run_main(*flags, "--model", f"{own}:told", output_dir=tmp_path / "t")
    assert first.code == 0, first.err
    data = first.checkpoint(1)["data"]
    assert (data["mean"], data["input_size"]) == ([0.4] * 3, 24)
    teacher = ["--kd", "true", "--teacher_arch", f"{own}:told", "--teacher_path"]
    teacher += [tmp_path / "t" / "checkpoint-1.pth", "--teacher_cache", tmp_path / "cache"]
    flags += ["--model", f"{own}:plain", "--input_size", 16, *teacher]
    run = run_main(*flags, output_dir=tmp_path / "s")
    assert run.code == 0 and "24 px, mean 0.4/0.4/0.4" in run.out, run.err
    assert run.checkpoint(1)["data"]["input_size"] == 16
    longer = run_main(*flags, "--epochs", 3, output_dir=tmp_path / "s")
    assert longer.code == 0 and "epoch 1 is done" in longer.out, longer.err
    scored = ["--eval", "true", "--resume", tmp_path / "s" / "checkpoint-2.pth"]
    scored = run_main(*scored, "--model", f"{own}:plain", "--input_size", 16)
    assert f"test_acc1 {longer.log[2]['test_acc1']:.4f}" in scored.out, scored.err
    with open(tmp_path / f"{own}.py", "a") as file:
        file.write("# another network, perhaps\n")
    changed = run_main(*flags, output_dir=tmp_path / "changed")
    assert changed.code == 2 and "teacher_path" in changed.err
    bare = tmp_path / "bare.pth"
    torch.save(first.checkpoint(1)["model"], bare)
    teacher = ["--kd", "true", "--teacher_arch", f"{own}:plain", "--teacher_path", bare]
    run = run_main(*short, "--model", f"{own}:plain", "--input_size", 16, *teacher)
    assert "16 px, mean 0.485" in run.out and "the network, else the student" in run.out, run.err


FAULTS = {
    "nowhere:make": "cannot import nowhere (ModuleNotFoundError",
    "{own}:missing": "has no function missing; its functions are plain, told, wrong, auxiliary",
    "{own}:wrong": "the factory returned a str, not a torch.nn.Module",
    "{own}:auxiliary": "returns tuple, not a tensor, for 2 images in training mode; logits (2, 10)",
    "{own}:named": "returns dict, not a tensor, for 2 images in eval mode; logits (2, 10)",
    "{own}:maps": "returns a tensor (2, 10, 1, 1) for 2 images in eval mode; logits (2, 10)",
    "{own}:thousand": "returns a tensor (2, 1000) for 2 images in eval mode; logits (2, 10)",
    "{own}:failing": "(RuntimeError: no such layer); it must take num_classes",
    "{own}:plain --head_init_scale 0.1": "does not tell its classifier; add a method",
    "{own}:plain --pretrained true": "timm has no weights of --model",
}


@pytest.mark.parametrize("flags", FAULTS)
def test_what_makes_no_network_is_told_in_one_line(run_main, own, short, flags):
    run = run_main(*short, "--model", *flags.format(own=own).split())
    assert run.code == 2 and FAULTS[flags] in run.err, run.err
    assert len(run.err.strip().splitlines()) <= 2


def test_lazy_layers_are_trained(run_main, own, short):
    run = run_main(*short, "--model", f"{own}:lazy", "--epochs", 1)
    assert run.code == 0, run.err


def test_a_patch_size_that_is_one_number_is_understood():
    assert models.create_model("xcit_nano_12_p16_224", 3, 32).training
    with pytest.raises(UserError, match="should divide image dimensions evenly"):
        models.create_model("xcit_nano_12_p16_224", 3, 40)


def test_a_network_of_torchvision_can_be_trained(run_main, short):
    arch = "torchvision.models:shufflenet_v2_x0_5"
    run = run_main(*short, "--model", arch, "--input_size", 32)
    assert run.code == 0 and f"Model {arch}" in run.out, run.err
