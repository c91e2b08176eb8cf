"""The small architectures: the published layout, and timm's interface."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from helpers import CPU
from timm.optim import create_optimizer_v2
from torch import nn

import models
from arguments.parsing import parse
from runtime.device import avoid_faulty_kernel, channels_last
from training.student import make_student
from utils import UserError

# Names and shapes of the checkpoints published with 'Contrastive Representation Distillation'.
PUBLISHED = json.loads((Path(__file__).parent / "zoo_keys.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_the_published_checkpoints(name):
    state = timm.create_model(name, num_classes=100).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == PUBLISHED[name]


@pytest.mark.parametrize("name", timm.list_models(["cifar_*", "mnist_*"]))
def test_timms_interface(name):
    is_mlp = name.startswith("mnist")
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    for size in (28,) if is_mlp else (8, 37):
        assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)
    images = torch.randn(2, 1, 28, 28)
    features = model.forward_features(images)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]).weight, nn.Parameter)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    rates = [scale[id(p)] for p in model.parameters() if p.ndim > 1]
    assert rates == sorted(rates) and rates[0] < rates[-1] == 1.0


# What the published networks compute, written with functions alone, in float64.


def norm(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    values = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *values)


def conv(state: dict, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    weight = state[f"{name}.weight"]
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[2] // 2, 1, groups)


def vgg11(state: dict, x: torch.Tensor) -> torch.Tensor:
    side = x.shape[2]
    for block, layers in enumerate((1, 1, 2, 2, 2)):
        for layer in range(0, 3 * layers, 3):
            x = norm(state, f"block{block}.{layer + 1}", conv(state, f"block{block}.{layer}", x))
            x = x.clamp(min=0)
        if block < 3 or (block == 3 and side == 64):
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5))
    return F.linear(x.mean(dim=(2, 3)), state["classifier.weight"], state["classifier.bias"])


def wrn_16_2(state: dict, x: torch.Tensor) -> torch.Tensor:
    x = conv(state, "conv1", x)
    for block in (1, 2, 3):
        for layer in (0, 1):
            name, stride = f"block{block}.layer.{layer}", 2 if block > 1 and layer == 0 else 1
            first = norm(state, f"{name}.bn1", x).clamp(min=0)
            shortcut = conv(state, f"{name}.convShortcut", first, stride) if layer == 0 else x
            second = norm(state, f"{name}.bn2", conv(state, f"{name}.conv1", first, stride))
            x = shortcut + conv(state, f"{name}.conv2", second.clamp(min=0))
    x = norm(state, "bn1", x).clamp(min=0).mean(dim=(2, 3))
    return F.linear(x, state["fc.weight"], state["fc.bias"])


def mobilenetv2(state: dict, x: torch.Tensor) -> torch.Tensor:
    x = norm(state, "conv1.1", conv(state, "conv1.0", x, 2)).clamp(min=0)
    for stage, (blocks, first) in enumerate(
        ((1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))
    ):
        for block in range(blocks):
            name, stride = f"blocks.{stage}.{block}.conv", first if block == 0 else 1
            y = norm(state, f"{name}.1", conv(state, f"{name}.0", x)).clamp(min=0)
            y = norm(state, f"{name}.4", conv(state, f"{name}.3", y, stride)).clamp(min=0)
            y = norm(state, f"{name}.7", conv(state, f"{name}.6", y))
            x = x + y if stride == 1 and x.shape == y.shape else y
    x = norm(state, "conv2.1", conv(state, "conv2.0", x)).clamp(min=0).mean(dim=(2, 3))
    return F.linear(x, state["classifier.0.weight"], state["classifier.0.bias"])


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def shufflenetv1(state: dict, x: torch.Tensor) -> torch.Tensor:
    x = norm(state, "bn1", conv(state, "conv1", x)).clamp(min=0)
    for stage, blocks in ((1, 4), (2, 8), (3, 4)):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 1 if block else 2
            y = norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", x)).clamp(min=0)
            y = shuffle(y, 1 if stage == 1 and block == 0 else 3)
            y = norm(state, f"{name}.bn2", conv(state, f"{name}.conv2", y, stride)).clamp(min=0)
            y = norm(state, f"{name}.bn3", conv(state, f"{name}.conv3", y))
            x = torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if stride == 2 else y + x
            x = x.clamp(min=0)
    return F.linear(x.mean(dim=(2, 3)), state["linear.weight"], state["linear.bias"])


def resnet50(state: dict, x: torch.Tensor) -> torch.Tensor:
    """timm's, with the stem of the small one; its tensors come in the same order."""
    network = timm.create_model("resnet50", num_classes=100)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return loaded_in_order(network, state)(x)


def shufflenetv2(state: dict, x: torch.Tensor) -> torch.Tensor:
    """torchvision's, with the stem of the small one; its tensors come in the same order."""
    network = torchvision.models.ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], 100)
    network.conv1[0], network.maxpool = nn.Conv2d(3, 24, 1, bias=False), nn.Identity()
    return loaded_in_order(network, state)(x)


def loaded_in_order(network: nn.Module, state: dict) -> nn.Module:
    names = list(network.double().state_dict())
    network.load_state_dict(dict(zip(names, state.values(), strict=True)))
    return network.eval()


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("cifar_vgg11", vgg11),
        ("cifar_wrn_16_2", wrn_16_2),
        ("cifar_mobilenetv2_half", mobilenetv2),
        ("cifar_shufflenetv1", shufflenetv1),
        ("cifar_shufflenetv2", shufflenetv2),
        ("cifar_resnet50", resnet50),
    ],
)
def test_a_published_checkpoint_computes_what_it_computed_there(name, reference):
    network = timm.create_model(name, num_classes=100).double()
    generator = torch.Generator().manual_seed(0)
    for key, value in network.state_dict().items():
        if "running" in key or value.ndim == 1:  # not 0 and 1, with which an error would not show
            value.copy_(torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.5)
    for size in (32, 64) if name == "cifar_vgg11" else (32,):  # which pools once more at 64 pixels
        images = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            expected = reference(network.state_dict(), images)
            torch.testing.assert_close(network.eval()(images), expected)


def test_a_vit_is_built_for_the_size_asked_for():
    model = models.create_model("vit_tiny_patch16_224", 10, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_dropout_reaches_the_network_and_what_a_network_does_not_take_is_refused():
    assert models.create_model("mnist_mlp_1200", 10, 28).drop.p == 0.5  # its own
    assert models.create_model("mnist_mlp_1200", 10, 28, drop=0.3).drop.p == 0.3
    assert models.create_model("mnist_mlp_1200", 10, 28, drop=0.0).drop.p == 0
    with pytest.raises(UserError, match="^cifar_resnet8: does not take --drop_path; remove that"):
        models.create_model("cifar_resnet8", 10, 28, drop_path=0.1, drop=0.1)


@pytest.mark.parametrize("channels", [1, 3, 12])
def test_a_strided_convolution_of_few_channels_has_its_gradient(channels):
    """A kernel of oneDNN crashes here, or is wrong: see avoid_faulty_kernel."""
    conv, images = nn.Conv2d(channels, 32, 1, stride=2), torch.randn(8, channels, 112, 113)
    exact = copy.deepcopy(conv).double()
    exact(images.double()).square().sum().backward()
    conv = avoid_faulty_kernel(channels_last(conv))
    conv(images.to(memory_format=torch.channels_last)).square().sum().backward()
    assert conv.stride == (1, 1)  # so that no layout, such as that of --compile, brings it back
    torch.testing.assert_close(conv.weight.grad.double(), exact.weight.grad, rtol=1e-4, atol=1e-2)


def test_a_student_on_the_cpu_avoids_the_faulty_kernel():
    args = parse(["--model", "repvgg_a0", "--input_size", "64"])
    student = make_student(args, CPU, list("abc"))
    hooked = [name for name, module in student.named_modules() if module._forward_pre_hooks]
    assert hooked == ["stem.conv_1x1.conv"]


def test_an_image_too_small_for_the_network_is_told_before_training():
    with pytest.raises(UserError, match="larger input size"):
        models.create_model("convnext_atto", 10, 8)


def test_an_input_that_would_lose_pixels_between_patches_is_refused():
    with pytest.raises(UserError, match="50 pixels are not whole patches of 16.* of 48 or 64"):
        models.create_model("vit_tiny_patch16_224", 10, 50)
    models.create_model("pvt_v2_b0", 10, 64)  # patches of 7 pixels that overlap
