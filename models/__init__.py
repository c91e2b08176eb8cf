"""Small architectures that timm lacks, registered with timm on import, and how a model is built."""

from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

from arguments import unknown_architecture
from utils import UserError, first_line

from . import cifar_resnet  # noqa: F401


def check_architecture(arch: str) -> None:
    """Raise UserError, with similar names, for an architecture that timm does not know."""
    if not timm.is_model(arch):
        raise UserError(unknown_architecture(arch, timm.list_models()), "architecture")


def pretrained_cfg(arch: str) -> PretrainedCfg:
    """What timm knows of an architecture's released weights: mean, std, input_size and more."""
    cfg = timm.models.get_pretrained_cfg(arch)
    if cfg is None:
        raise UserError(f"{arch}: timm has no description of this architecture", "architecture")
    return cfg


def classifier_of(model: nn.Module) -> nn.Module:
    """The last layer of a timm model; nn.Identity where it has none."""
    return model.get_classifier()  # type: ignore[operator]


def create_model(arch: str, num_classes: int, input_size: int, drop_path: float = 0.0) -> nn.Module:
    """timm's `create_model` with only the keywords that this architecture takes.

    Returns: the network in training mode, for images (B, 3, input_size, input_size).
    Raises: UserError for an architecture that is not known, that takes no stochastic depth although
        `drop_path` asks for it, or that cannot take images of `input_size` pixels.
    """
    check_architecture(arch)
    keywords: dict[str, Any] = {"num_classes": num_classes}
    cfg = pretrained_cfg(arch)
    if cfg.fixed_input_size and cfg.input_size[-1] != input_size:
        keywords["img_size"] = input_size
    if drop_path:
        keywords["drop_path_rate"] = drop_path
    try:
        model = timm.create_model(arch, **keywords)
    except TypeError as error:
        raise UserError(
            f"{arch}: does not take {', '.join(keywords)} ({error}); set drop_path to 0",
            "architecture",
        ) from error
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{arch}: cannot be built for images of {input_size} pixels ({error})", "architecture"
        ) from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None) or (1, 1)
    if input_size % patch[0] and not getattr(model.patch_embed, "dynamic_img_pad", False):
        less = input_size - input_size % patch[0]
        raise UserError(
            f"{arch}: {input_size} pixels are not whole patches of {patch[0]}, so some would be "
            f"lost; use an input size of {less} or {less + patch[0]}",
            "architecture",
        )
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(2, 3, input_size, input_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{arch}: cannot take images of {input_size} pixels ({first_line(error)}); use a "
            "larger input size, or a model made for small images such as cifar_resnet20",
            "architecture",
        ) from error
    return model.train()
