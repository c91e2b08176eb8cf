"""A linear probe: what it trains, what it leaves alone, and what it is refused for."""

import pytest
import timm
import torch
from helpers import is_same, teacher_flags
from torch import nn

import main
from training import linear_probe
from utils import UserError


@pytest.fixture
def backbone(tmp_path):
    """The weights of a cifar_resnet8 without its classifier."""
    torch.manual_seed(2)
    state = timm.create_model("cifar_resnet8", num_classes=3).state_dict()
    path = tmp_path / "backbone.pth"
    torch.save({name: value for name, value in state.items() if "fc" not in name}, path)
    return path


@pytest.fixture
def flags(backbone) -> list[str]:
    """A short probe."""
    flags = ["--linear_probe", "true", "--finetune", str(backbone)]
    return [*flags, "--train_samples", "72", "--epochs", "3", "--lr", "0.02"]


def backbone_of(checkpoint: dict, key: str = "model") -> dict:
    return {name: value for name, value in checkpoint[key].items() if "fc" not in name}


AUGMENTED = ["--hflip", "0"]
PATHS = pytest.mark.parametrize("more", [[], AUGMENTED], ids=["features", "augmented"])


@PATHS
def test_only_the_classifier_is_trained(run_main, flags, backbone, tmp_path, more):
    """The BatchNorm statistics are buffers of the backbone, and stay too."""
    ema = ["--model_ema", "true", "--model_ema_eval", "true"]
    run = run_main(*flags, *more, *ema, output_dir=tmp_path / "out")
    assert run.code == 0, run.err
    assert "650 parameters are trained" in run.out and run.log[0]["n_parameters"] == 650
    assert ("images are augmented" in run.out) == bool(more)
    last = run.checkpoint(2)
    start = torch.load(backbone, weights_only=True)
    assert is_same(backbone_of(last), start)
    assert is_same(backbone_of(last, "model_ema"), start)
    assert not is_same(last["model"]["fc.weight"], run.checkpoint(0)["model"]["fc.weight"])
    assert len(last["optimizer"]["state"]) == 2  # weight and bias of the classifier
    assert run.log[-1]["train_loss"] < run.log[0]["train_loss"]


def test_features_are_computed_once_and_train_what_the_network_trains(
    run_main, flags, tmp_path, monkeypatch
):
    calls = []
    real = linear_probe.features_of
    monkeypatch.setattr(linear_probe, "features_of", lambda *a: calls.append(len(a[1])) or real(*a))
    once = run_main(*flags, output_dir=tmp_path / "once")
    assert sum(calls) == 2 + 72 + 360  # the check, training and validation images

    def without_features(*args, **kwargs):
        data = real_build(*args, **kwargs)
        data.feature_loader = None
        return data

    real_build = main.build_data
    monkeypatch.setattr(main, "build_data", without_features)
    usual = run_main(*flags, output_dir=tmp_path / "usual")
    assert sum(calls) == 2 + 72 + 360 + 2 + 3 * 64
    a, b = once.checkpoint(2)["model"], usual.checkpoint(2)["model"]
    torch.testing.assert_close(a["fc.weight"], b["fc.weight"], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(once.log, usual.log, strict=True):
        for name in ("train_loss", "test_loss", "test_acc1"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


@pytest.mark.parametrize("more", [[], ["--use_amp", "true"]], ids=["float32", "bfloat16"])
def test_eval_gives_the_score_that_the_features_gave(run_main, flags, tmp_path, more):
    run = run_main(*flags, *more, output_dir=tmp_path)
    assert run.code == 0, run.err
    path = tmp_path / "checkpoint-2.pth"
    scored = run_main("--eval", "true", "--resume", path, *more)
    assert f"test_loss {run.log[-1]['test_loss']:.4f}" in scored.out
    assert f"test_acc1 {run.log[-1]['test_acc1']:.4f}" in scored.out


@PATHS
def test_a_probe_that_was_stopped_ends_in_the_same_bits(
    run_main, flags, tmp_path, monkeypatch, more
):
    flags = [*flags, *more, "--update_freq", 2, "--model_ema", "true", "--save_ckpt_steps", 1]
    whole = run_main(*flags, output_dir=tmp_path / "whole")
    real = main.train_one_epoch

    def stop_in_second_epoch(*args, after_update, **kwargs):
        def stop(history, updates):
            after_update(history, updates)
            if history.epoch == 1:
                raise UserError("stopped here")

        return real(*args, after_update=stop, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(main, "train_one_epoch", stop_in_second_epoch)
        stopped = run_main(*flags, output_dir=tmp_path / "parts")
    assert "stopped here" in stopped.err
    path = tmp_path / "parts" / "checkpoint-step.pth"
    # By the file alone: whether images are augmented comes from the checkpoint.
    parts = run_main("--resume", path, output_dir=tmp_path / "parts")
    assert parts.code == 0 and "epoch 0 is done and 1 steps" in parts.out, parts.err
    for part in ("model", "model_ema", "optimizer", "scores"):
        assert is_same(whole.checkpoint(2)[part], parts.checkpoint(2)[part]), part
    assert parts.log == whole.log


def test_the_default_learning_rate_is_2_divided_by_the_number_of_features(run_main, backbone):
    flags = ["--linear_probe", "true", "--finetune", backbone, "--train_samples", 32]
    flags += ["--epochs", 1]
    assert "learning rate 0.0312" in run_main(*flags).out
    assert "learning rate 0.0354" in run_main(*flags, "--opt", "sgd").out


def test_a_probe_is_not_continued_as_another_run(run_main, flags, tmp_path):
    run_main(*flags, output_dir=tmp_path)
    again = run_main(*flags, "--linear_probe", "false", output_dir=tmp_path)
    assert again.code == 2
    assert "was trained with --linear_probe true, but this run uses false" in again.err


def test_a_probe_teaches_and_is_finetuned(run_main, flags, short, tmp_path):
    run_main(*flags, output_dir=tmp_path)
    path = tmp_path / "checkpoint-best.pth"
    taught = run_main(*short, *teacher_flags(path))
    assert taught.code == 0 and "10 classes (in the data's order)" in taught.out, taught.err
    tuned = run_main(*short, "--finetune", path)
    assert tuned.code == 0 and "classifier matched by class name" in tuned.out, tuned.err


def test_what_a_frozen_backbone_leaves_without_effect_is_told(run_main, flags):
    run = run_main(*flags, "--drop_path", 0, "--compile", "true", "--epochs", 1)
    assert run.code == 0, run.err
    assert "Without effect in this run: --compile, --drop_path (with --linear_probe true)" in (
        run.out
    )


def test_features_that_do_not_fit_into_memory_are_refused(run_main, flags, monkeypatch):
    monkeypatch.setattr(linear_probe, "free_memory", lambda: 100_000)
    run = run_main(*flags)
    assert run.code == 2 and "72 images, 64 numbers per image" in run.err
    assert len(run.err.splitlines()) == 1
    assert run_main(*flags, *AUGMENTED, "--epochs", 1).code == 0


@pytest.mark.parametrize(
    "arch", "resnet18 convnext_atto vit_tiny_patch16_224 efficientnet_lite0 regnety_002".split()
)
def test_the_head_of_the_features_is_the_network(arch):
    network = timm.create_model(arch, num_classes=5).eval()
    size = timm.get_pretrained_cfg(arch).input_size[-1] if "vit" in arch else 64
    before = {name: value.clone() for name, value in network.state_dict().items()}
    linear_probe.freeze_backbone(network, arch, size)
    assert is_same(dict(network.state_dict()), before) and not network.training
    images = torch.randn(2, 3, size, size)
    found = linear_probe.head_of(network)(linear_probe.features_of(network, images))
    torch.testing.assert_close(found, network(images), rtol=1e-4, atol=1e-5)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trained == 5 * (linear_probe.features_of(network, images).shape[1] + 1)


class Scaled(nn.Module):
    """A network with more behind its classifier; in one of two ways."""

    def __init__(self, classifier: object) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.found = classifier

    def get_classifier(self) -> object:
        return self.fc if self.found is None else self.found

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return features if pre_logits else 2 * self.fc(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


UNSUITED = {
    "no classifier": nn.Identity(),
    "several classifiers": (nn.Linear(3, 4), nn.Linear(3, 4)),
    "the output is not the classifier": None,
}


@pytest.mark.parametrize("why", UNSUITED)
def test_a_network_whose_classifier_is_not_its_output_is_refused(why):
    network = Scaled(UNSUITED[why])
    nn.init.zeros_(network.fc.weight)  # with zeros, every feature gives the same output
    nn.init.zeros_(network.fc.bias)
    with pytest.raises(UserError, match=f"^ours: .*{why}"):
        linear_probe.freeze_backbone(network, "ours", 8)
