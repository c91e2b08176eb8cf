"""The networks for MNIST of Hinton, Vinyals and Dean, 2015, section 3 (see distillation.py)."""

import math
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn


class MnistMlp(nn.Module):
    """Two hidden layers of rectified linear units, on the pixels of an image.

    Args:
        width: units of each hidden layer.
        input_drop, drop_rate: dropout of the pixels and of the hidden units.
        img_size: side of the images in pixels.
    """

    def __init__(
        self,
        width: int,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 28,
        input_drop: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = width
        self.input_drop, self.drop = nn.Dropout(input_drop), nn.Dropout(drop_rate)
        self.fc1 = nn.Linear(in_chans * math.prod(to_2tuple(img_size)), width)
        self.fc2 = nn.Linear(width, width)
        self.fc = nn.Linear(width, num_classes)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions by which timm's layer decay groups the parameters."""
        return {"stem": r"^fc1\.", "blocks": r"^fc(2)\."}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, width)"""
        x = self.drop(self.fc1(self.input_drop(x.flatten(1))).relu())
        return self.drop(self.fc2(x).relu())

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, width) -> (B, num_classes), or (B, width) if pre_logits"""
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 10,
            "input_size": (3, 28, 28),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "mean": (0.1307, 0.1307, 0.1307),  # of MNIST's training images
            "std": (0.3081, 0.3081, 0.3081),
            "first_conv": "fc1",
            "classifier": "fc",
        }
        for name in ("mnist_mlp_800", "mnist_mlp_1200")
    }
)


@register_model
def mnist_mlp_800(pretrained: bool = False, **kwargs: Any) -> MnistMlp:
    """The small network, without regularization."""
    return build_model_with_cfg(MnistMlp, "mnist_mlp_800", pretrained, width=800, **kwargs)


@register_model
def mnist_mlp_1200(pretrained: bool = False, **kwargs: Any) -> MnistMlp:
    """The large network, with dropout of 20 % of the pixels and half of the hidden units."""
    dropout = {"input_drop": 0.2, "drop_rate": 0.5} | kwargs
    return build_model_with_cfg(MnistMlp, "mnist_mlp_1200", pretrained, width=1200, **dropout)
