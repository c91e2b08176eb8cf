"""The networks of the CIFAR distillation literature, for images of 8 pixels or more.

Parameter names, shapes and functions are those of the teacher checkpoints published with
'Contrastive Representation Distillation' (Tian et al. 2020), so those files load unchanged.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import nn


class CifarNet(nn.Module):
    """timm's interface for a network of small images: subclasses have `forward_features`.

    Attributes:
        classifier_name, first_conv_name: of the last and the first layer among the modules.
        stem_names, block_names, last_names: regular expressions of parameter names, by which timm's
            layer decay groups the parameters; the two parts of `block_names` are stage and block.
    """

    classifier_name, first_conv_name = "fc", "conv1"
    stem_names, block_names = r"^(?:conv1|bn1)\.", (r"^layer(\d+)", r"\.(\d+)")
    last_names = ""

    def __init__(
        self,
        num_features: int,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = num_features
        self.num_classes, self.in_chans = num_classes, in_chans
        self.pool_type, self.drop_rate = global_pool, drop_rate

    def add_classifier(self) -> None:
        """Add pooling, dropout and classifier, and initialize the convolutions (He et al. 2015)."""
        self.head_drop = nn.Dropout(self.drop_rate)
        self.global_pool, classifier = create_classifier(
            self.num_features, self.num_classes, self.pool_type
        )
        name, _, inside = self.classifier_name.partition(".")
        self.add_module(name, nn.Sequential(classifier) if inside else classifier)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions by which timm's layer decay groups the parameters."""
        stage, block = self.block_names
        blocks = [(stage if coarse else stage + block, None)]
        last = [(self.last_names, (99999,))] if self.last_names else []
        return {"stem": self.stem_names, "blocks": blocks + last}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        self.num_classes = num_classes
        self.global_pool, classifier = create_classifier(
            self.num_features, num_classes, global_pool
        )
        self.set_submodule(self.classifier_name, classifier)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_features, h, w)"""
        raise NotImplementedError

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, num_features, h, w) -> (B, num_classes), or (B, num_features) if pre_logits"""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class CifarResNet(CifarNet):
    """He et al. 2016, section 4.2: a 3x3 stem and three stages of basic blocks.

    Args:
        depth: number of weighted layers, 6n + 2.
        widths: channels of the stem and of the three stages.
    """

    def __init__(self, depth: int, widths: Sequence[int] = (16, 16, 32, 64), **kwargs: Any) -> None:
        super().__init__(widths[-1], **kwargs)
        self.conv1, self.bn1 = _conv(self.in_chans, widths[0], 3), nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = _blocks(_basic_block, widths[0], widths[1], 1, blocks)
        self.layer2 = _blocks(_basic_block, widths[1], widths[2], 2, blocks)
        self.layer3 = _blocks(_basic_block, widths[2], widths[3], 2, blocks)
        self.add_classifier()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H/4, W/4)"""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


def _basic_block(inputs: int, width: int, stride: int) -> nn.Module:
    is_equal = stride == 1 and inputs == width
    shortcut = None if is_equal else downsample_conv(inputs, width, kernel_size=1, stride=stride)
    return BasicBlock(inputs, width, stride, shortcut)


def _conv(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class Bottleneck(nn.Module):
    """He et al. 2016, figure 5, with the stride in the 3x3 convolution."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Sequential()
        if inputs != 4 * width:
            self.shortcut.append(_conv(inputs, 4 * width, stride=stride))
            self.shortcut.append(nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def _blocks(block: Any, inputs: int, width: int, stride: int, count: int) -> nn.Sequential:
    """A stage: blocks of which the first has the stride."""
    outputs = width * getattr(block, "expansion", 1)
    rest = (block(outputs, width, 1) for _ in range(count - 1))
    return nn.Sequential(block(inputs, width, stride), *rest)


class BottleneckResNet(CifarNet):
    """ResNet-50 with a 3x3 stem and without its first pooling."""

    classifier_name = "linear"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(2048, **kwargs)
        self.conv1, self.bn1 = _conv(self.in_chans, 64, 3), nn.BatchNorm2d(64)
        self.layer1 = _blocks(Bottleneck, 64, 64, 1, 3)
        self.layer2 = _blocks(Bottleneck, 256, 128, 2, 4)
        self.layer3 = _blocks(Bottleneck, 512, 256, 2, 6)
        self.layer4 = _blocks(Bottleneck, 1024, 512, 2, 3)
        self.add_classifier()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, 2048, H/8, W/8)"""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class PreActBlock(nn.Module):
    """Zagoruyko and Komodakis, 'Wide Residual Networks', 2016: BatchNorm and ReLU come first."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width, 3)
        self.convShortcut = _conv(inputs, width, stride=stride) if inputs != width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideResNet(CifarNet):
    """A wide residual network.

    Args:
        depth: number of weighted layers, 6n + 4.
        widen: factor on the channels 16, 32 and 64 of the three stages.
    """

    block_names = (r"^block(\d+)", r"\.layer\.(\d+)")
    last_names = r"^bn1\."

    def __init__(self, depth: int, widen: int, **kwargs: Any) -> None:
        super().__init__(64 * widen, **kwargs)
        self.conv1 = _conv(self.in_chans, 16, 3)
        width, blocks = 16 * widen, (depth - 4) // 6
        stage1 = _blocks(PreActBlock, 16, width, 1, blocks)
        stage2 = _blocks(PreActBlock, width, 2 * width, 2, blocks)
        stage3 = _blocks(PreActBlock, 2 * width, 4 * width, 2, blocks)
        stages = [nn.ModuleDict({"layer": stage}) for stage in (stage1, stage2, stage3)]
        self.block1, self.block2, self.block3 = stages
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.add_classifier()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H/4, W/4)"""
        x = self.conv1(x)
        for block in (self.block1, self.block2, self.block3):
            x = block["layer"](x)
        return F.relu(self.bn1(x))


class CifarVgg(CifarNet):
    """Simonyan and Zisserman 2015, with BatchNorm and one linear layer.

    As published, the fourth pooling is used only for images of 64 pixels.

    Args:
        convolutions: of each of the five blocks.
    """

    classifier_name, first_conv_name = "classifier", "block0.0"
    stem_names, block_names = r"^block0\.", (r"^block(\d+)", r"\.(\d+)")
    block0: nn.Sequential
    block1: nn.Sequential
    block2: nn.Sequential
    block3: nn.Sequential
    block4: nn.Sequential

    def __init__(self, convolutions: Sequence[int], **kwargs: Any) -> None:
        super().__init__(512, **kwargs)
        inputs = self.in_chans
        for number, (count, width) in enumerate(
            zip(convolutions, (64, 128, 256, 512, 512), strict=True)
        ):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            self.add_module(f"block{number}", nn.Sequential(*layers[:-1]))
        self.add_classifier()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, 512, H/8, W/8), or of 64 pixels (B, 512, 4, 4)"""
        has_fourth_pooling = x.shape[2] == 64
        x = F.max_pool2d(F.relu(self.block0(x)), 2)
        x = F.max_pool2d(F.relu(self.block1(x)), 2)
        x = F.max_pool2d(F.relu(self.block2(x)), 2)
        x = F.relu(self.block3(x))
        return F.relu(self.block4(F.max_pool2d(x, 2) if has_fourth_pooling else x))


class InvertedResidual(nn.Module):
    """Sandler et al., 'MobileNetV2', 2018, table 1; with plain ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.has_shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *(_conv(inputs, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(_conv(width, width, 3, stride, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(_conv(width, outputs), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class CifarMobileNetV2(CifarNet):
    """MobileNetV2 of half the width, whose last two strides of 2 are 1."""

    classifier_name, first_conv_name = "classifier.0", "conv1.0"
    stem_names, block_names = r"^conv1\.", (r"^blocks\.(\d+)", r"\.(\d+)")
    last_names = r"^conv2\."
    # Expansion, channels, blocks and stride of each stage.
    stages = (
        *((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(1280, **kwargs)
        inputs = 16
        self.conv1 = nn.Sequential(
            _conv(self.in_chans, inputs, 3, 2), nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential()
        for expansion, channels, count, stride in self.stages:
            stage, width = nn.Sequential(), channels // 2
            for index in range(count):
                stage.append(InvertedResidual(inputs, width, 1 if index else stride, expansion))
                inputs = width
            self.blocks.append(stage)
        self.conv2 = nn.Sequential(_conv(inputs, 1280), nn.BatchNorm2d(1280), nn.ReLU(inplace=True))
        self.add_classifier()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, 1280, H/16, W/16)"""
        return self.conv2(self.blocks(self.conv1(x)))


class GroupedBlock(nn.Module):
    """Zhang et al., 'ShuffleNet', 2018, figure 2 b and c; with a ReLU after the 3x3 convolution.

    Args:
        outputs: channels; with a stride of 2 they include those of the pooled input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 3) -> None:
        super().__init__()
        own = outputs - inputs if stride == 2 else outputs
        width, self.stride = own // 4, stride
        self.groups = 1 if inputs == 24 else groups
        self.conv1, self.bn1 = _conv(inputs, width, groups=self.groups), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride, width), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, own, groups=groups), nn.BatchNorm2d(own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.stride == 1:
            return F.relu(y + x)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], dim=1))


class SplitBlock(nn.Module):
    """Ma et al., 'ShuffleNet V2', 2018, figure 3 c."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // 2
        self.conv1, self.bn1 = _conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, groups=width), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, width), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, y = x.chunk(2, dim=1)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(y)))))
        y = F.relu(self.bn3(self.conv3(y)))
        return F.channel_shuffle(torch.cat([left, y], dim=1), 2)


class DownBlock(nn.Module):
    """Ma et al. 2018, figure 3 d: both branches halve the sides."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        width = outputs // 2
        self.conv1, self.bn1 = _conv(inputs, inputs, 3, 2, inputs), nn.BatchNorm2d(inputs)
        self.conv2, self.bn2 = _conv(inputs, width), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(inputs, width), nn.BatchNorm2d(width)
        self.conv4, self.bn4 = _conv(width, width, 3, 2, width), nn.BatchNorm2d(width)
        self.conv5, self.bn5 = _conv(width, width), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        y = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        y = F.relu(self.bn5(self.conv5(y)))
        return F.channel_shuffle(torch.cat([left, y], dim=1), 2)


class CifarShuffleNet(CifarNet):
    """ShuffleNet with three groups (version 1) or ShuffleNet V2 of width 1 (version 2)."""

    classifier_name = "linear"
    last_names = r"^(?:conv2|bn2)\."
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, version: int, **kwargs: Any) -> None:
        super().__init__(960 if version == 1 else 1024, **kwargs)
        self.conv1, self.bn1 = _conv(self.in_chans, 24), nn.BatchNorm2d(24)
        inputs, widths = 24, (240, 480, 960) if version == 1 else (116, 232, 464)
        for number, (width, count) in enumerate(zip(widths, (4, 8, 4), strict=True), start=1):
            first = GroupedBlock(inputs, width, 2) if version == 1 else DownBlock(inputs, width)
            stage = nn.Sequential(first)
            for _ in range(count - 1):
                stage.append(GroupedBlock(width, width, 1) if version == 1 else SplitBlock(width))
            self.add_module(f"layer{number}", stage)
            inputs = width
        if version == 2:
            self.conv2, self.bn2 = _conv(inputs, 1024), nn.BatchNorm2d(1024)
        self.version = version
        self.add_classifier()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H/8, W/8)"""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x if self.version == 1 else F.relu(self.bn2(self.conv2(x)))


WIDE = (32, 64, 128, 256)
CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
NETWORKS: dict[str, tuple[type[CifarNet], dict[str, Any]]] = {  # name -> class, its arguments
    "cifar_resnet50": (BottleneckResNet, {}),
    "cifar_mobilenetv2_half": (CifarMobileNetV2, {}),
    "cifar_shufflenetv1": (CifarShuffleNet, {"version": 1}),
    "cifar_shufflenetv2": (CifarShuffleNet, {"version": 2}),
}
for _depth in (8, 14, 20, 32, 44, 56, 110):
    NETWORKS[f"cifar_resnet{_depth}"] = CifarResNet, {"depth": _depth}
for _depth in (8, 32):
    NETWORKS[f"cifar_resnet{_depth}x4"] = CifarResNet, {"depth": _depth, "widths": WIDE}
for _depth, _widen in ((16, 1), (16, 2), (40, 1), (40, 2)):
    NETWORKS[f"cifar_wrn_{_depth}_{_widen}"] = WideResNet, {"depth": _depth, "widen": _widen}
for _depth, _counts in CONVOLUTIONS.items():
    NETWORKS[f"cifar_vgg{_depth}"] = CifarVgg, {"convolutions": _counts}

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 100,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            # Of CIFAR-100's training images, with which the published teachers were trained.
            "mean": (0.5071, 0.4867, 0.4408),
            "std": (0.2675, 0.2565, 0.2761),
            "first_conv": network.first_conv_name,
            "classifier": network.classifier_name,
        }
        for name, (network, _) in NETWORKS.items()
    }
)


def _register(name: str) -> None:
    network, arguments = NETWORKS[name]

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(network, name, pretrained, **arguments, **kwargs)

    create.__name__ = create.__qualname__ = name  # by which timm knows the function
    register_model(create)


for _name in NETWORKS:
    _register(_name)
