"""Small architectures that timm lacks, registered with timm on import, and how a model is made."""

import difflib
from typing import Any

import timm
import torch

from utils import UserError

from . import cifar_resnet  # noqa: F401


def check_architecture(arch: str, flag: str) -> None:
    """Raise UserError, with near names, for an architecture that timm does not know."""
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch.split(".")[0], timm.list_models(), n=3, cutoff=0.4)
        raise UserError(
            f"{flag} {arch}: timm knows no such architecture; "
            + (f"did you mean {', '.join(near)}?" if near else "see timm.list_models()")
        )


def own_input_size(arch: str, flag: str) -> int:
    """Pixels that an architecture was made for; raises UserError for one that is not known."""
    check_architecture(arch, flag)
    return timm.models.get_pretrained_cfg(arch).input_size[-1]


def create_model(
    arch: str, num_classes: int, input_size: int, drop_path: float = 0.0, flag: str = "--model"
) -> torch.nn.Module:
    """timm's `create_model` with only the keywords that this architecture takes.

    Raises: UserError for an architecture that is not known, takes no stochastic depth though
        `drop_path` asks for it, or can't take images of `input_size` pixels.
    """
    check_architecture(arch, flag)
    keywords: dict[str, Any] = {"num_classes": num_classes}
    cfg = timm.models.get_pretrained_cfg(arch)
    if cfg.fixed_input_size and cfg.input_size[-1] != input_size:
        keywords["img_size"] = input_size
    if drop_path:
        keywords["drop_path_rate"] = drop_path
    try:
        model = timm.create_model(arch, **keywords)
    except TypeError as error:
        raise UserError(
            f"{flag} {arch} does not take {', '.join(keywords)} ({error}); leave out --drop_path"
        ) from error
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"{flag} {arch} can't be built for {input_size} pixels: {error}") from error
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(2, 3, input_size, input_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{flag} {arch} can't take images of {input_size} pixels ({reason}); "
            "give a larger --input_size or a model made for small images, such as cifar_resnet20"
        ) from error
    return model.train()
