"""ResNets for small images (He et al. 2016, section 4.2) and their widened distillation variants.

Parameter names and shapes are those of the teacher checkpoints published with 'Contrastive
Representation Distillation' (Tian et al. 2020), so those files load unchanged.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import nn


class CifarResNet(nn.Module):
    """A 3x3 stem and three stages of basic blocks; takes any input of 8 pixels or more.

    Args:
        depth: number of weighted layers, 6n + 2.
        widths: channels of the stem and of the three stages.
    """

    def __init__(
        self,
        depth: int,
        widths: Sequence[int] = (16, 16, 32, 64),
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2, got {depth}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = widths[-1]

        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, stride=2)
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, global_pool)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions by which timm's layer decay groups the parameters."""
        return {
            "stem": r"^(?:conv1|bn1)\.",
            "blocks": r"^layer(\d+)" + ("" if coarse else r"\.(\d+)"),
        }

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, global_pool)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H/4, W/4)"""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, num_features, h, w) -> (B, num_classes), or (B, num_features) if pre_logits"""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _stage(in_width: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1 or in_width != width:
        downsample = downsample_conv(in_width, width, kernel_size=1, stride=stride)
    first = BasicBlock(in_width, width, stride, downsample)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))


def _cfg() -> dict[str, Any]:
    # The statistics of CIFAR-100's training images, with which the published teachers were trained.
    return {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5071, 0.4867, 0.4408),
        "std": (0.2675, 0.2565, 0.2761),
        "first_conv": "conv1",
        "classifier": "fc",
    }


default_cfgs = generate_default_cfgs(
    {
        name: _cfg()
        for name in (
            "cifar_resnet8",
            "cifar_resnet20",
            "cifar_resnet56",
            "cifar_resnet8x4",
            "cifar_resnet32x4",
        )
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, **kwargs)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create("cifar_resnet8", pretrained, depth=8, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create("cifar_resnet20", pretrained, depth=20, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create("cifar_resnet56", pretrained, depth=56, **kwargs)


@register_model
def cifar_resnet8x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create("cifar_resnet8x4", pretrained, depth=8, widths=(32, 64, 128, 256), **kwargs)


@register_model
def cifar_resnet32x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create("cifar_resnet32x4", pretrained, depth=32, widths=(32, 64, 128, 256), **kwargs)
