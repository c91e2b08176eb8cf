"""Small architectures that timm lacks, registered with timm on import, and how a model is built."""

import copy
import dataclasses
import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg
from torch import nn

from arguments.derived import is_own_module
from runtime.distributed import log
from utils import UserError, few, first_line

from . import cifar, mnist  # noqa: F401
from .own import make_network, own_cfg

FLAG_OF = {"drop_path_rate": "--drop_path", "drop_rate": "--drop"}  # by timm's keyword


def check_architecture(arch: str) -> None:
    """Raise UserError, with similar names, for an architecture or a tag that timm does not know."""
    if ":" in arch:
        return  # known once it is fetched or imported
    if not timm.is_model(arch):
        name, known = arch.split(".")[0], timm.list_models()
        similar = [other for other in known if other.endswith(f"_{name}")][:2]
        similar += difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        remedy = f"did you mean {', '.join(similar)}?" if similar else "see timm.list_models()"
        raise UserError(f"{arch}: timm knows no such architecture; {remedy}", "architecture")
    tags = timm.models.get_arch_pretrained_cfgs(arch)
    if "." in arch and arch not in tags:
        name = arch.partition(".")[0]
        raise UserError(
            f"{arch}: timm has no such weights of {name}; it has {few(tags, most=5) or 'none'}",
            "architecture",
        )


def input_config(arch: str) -> dict[str, Any]:
    """The input that a network expects: mean and std (of RGB in 0…1) and input_size (pixels).

    Of a network of the user's own only what it says.
    """
    if is_own_module(arch):
        return own_cfg(arch)
    cfg = pretrained_cfg(arch)
    return {"mean": list(cfg.mean), "std": list(cfg.std), "input_size": cfg.input_size[-1]}


def normalization(is_imagenet: bool) -> dict[str, list[float]]:
    """Mean and std of RGB in 0…1: those of ImageNet, or 0.5 and 0.5."""
    if is_imagenet:
        return {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    return {"mean": [0.5] * 3, "std": [0.5] * 3}


def is_in_timm(arch: str) -> bool:
    """Whether timm alone, without this repository, can build an architecture."""
    if is_own_module(arch):
        return False
    name = pretrained_cfg(arch).architecture
    return name is not None and timm.models.model_entrypoint(name).__module__.startswith("timm.")


def pretrained_cfg(arch: str) -> PretrainedCfg:
    """What timm knows of an architecture's released weights: mean, std, input_size and more."""
    if ":" in arch:
        return _config_of_address(arch)
    check_architecture(arch)
    cfg = timm.models.get_pretrained_cfg(arch)
    assert cfg is not None  # every architecture of timm's has one
    return cfg


@cache
def _config_of_address(arch: str) -> PretrainedCfg:
    with fetching(arch):
        network: Any = timm.create_model(arch)
    names = {field.name for field in dataclasses.fields(PretrainedCfg)}
    return PretrainedCfg(**{n: v for n, v in network.pretrained_cfg.items() if n in names})


@contextmanager
def fetching(arch: str) -> Iterator[None]:
    """Report that timm may fetch a model, which can take a minute; UserError if that fails."""
    if not arch.startswith("local-dir:"):
        log(f"Loading {arch} from timm's copy on this machine, else from the network")
    # Its retries without a network would be twelve lines.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # of the hub, files and timm
        problem = f"could not be fetched or loaded ({first_line(error)}); check the name, and that "
        problem += "there is a network, or a copy of timm's cache (HF_HOME)"
        if "No pretrained weights exist" in str(error):
            problem = "timm has no pre-trained weights of this architecture; see "
            problem += "timm.list_pretrained()"
        raise UserError(f"{arch}: {problem}", "architecture") from error


def classifiers_of(model: nn.Module) -> list[nn.Module]:
    """The classifiers of a timm model; none if it has none, or has no method get_classifier.

    Networks with a head for the labels and a head for a teacher have two: distilled DeiT, LeViT,
    EfficientFormer.
    """
    last: Any = getattr(model, "get_classifier", lambda: ())()
    modules = last if isinstance(last, tuple | list | nn.ModuleList) else [last]
    return [m for m in modules if isinstance(m, nn.Module) and any(True for _ in m.parameters())]


def classifier_of(model: nn.Module) -> nn.Module:
    """The only classifier of a timm model; nn.Identity if it has none, or several."""
    classifiers = classifiers_of(model)
    return classifiers[0] if len(classifiers) == 1 else nn.Identity()


def create_model(
    arch: str,
    num_classes: int,
    input_size: int,
    drop_path: float = 0.0,
    drop: float | None = None,
    *,
    pretrained: bool = False,
) -> nn.Module:
    """timm's `create_model` with only the keywords that this architecture takes.

    Args:
        arch: a name of timm's, with or without a tag, or hf-hub:NAME or local-dir:FOLDER; or
            MODULE:FACTORY, see own.make_network.
        drop_path, drop: rates of stochastic depth and dropout; None is the dropout of the network.
        pretrained: start from timm's weights, with position embeddings resampled for `input_size`,
            and with a new classifier if they have another number of classes.
    Returns: the network in training mode, for images (B, 3, input_size, input_size).
    Raises: UserError for an architecture that is not known, that takes no stochastic depth or
        dropout although `drop_path` or `drop` asks for it, or that cannot take images of
        `input_size` pixels; and for weights that cannot be fetched.
    """
    keywords: dict[str, Any] = {"num_classes": num_classes}
    if drop_path:
        keywords["drop_path_rate"] = drop_path
    if drop is not None:
        keywords["drop_rate"] = drop
    try:
        if is_own_module(arch):
            model = make_network(arch, keywords)
        else:
            cfg = pretrained_cfg(arch)
            if cfg.fixed_input_size and cfg.input_size[-1] != input_size:
                keywords["img_size"] = input_size
            with fetching(arch) if pretrained else nullcontext():
                model = timm.create_model(arch, pretrained=pretrained, **keywords)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        cause = f"cannot be built for images of {input_size} pixels ({error})"
        for keyword, flag in FLAG_OF.items():
            if f"unexpected keyword argument '{keyword}'" in str(error):
                cause = f"does not take {flag}; remove that flag"
        raise UserError(f"{arch}: {cause}", "architecture") from error
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None) or 1
    patch = patch if isinstance(patch, int) else patch[0]  # XCiT's is a number
    proj = getattr(embed, "proj", None)
    is_padded = isinstance(proj, nn.Conv2d) and proj.padding != (0, 0)  # PVT's patches overlap
    if input_size % patch and not (is_padded or getattr(embed, "dynamic_img_pad", False)):
        less = input_size - input_size % patch
        raise UserError(
            f"{arch}: {input_size} pixels are not whole patches of {patch}, so some would be "
            f"lost; use an input size of {less} or {less + patch}",
            "architecture",
        )
    _try(arch, model.eval(), num_classes, input_size)
    if is_own_module(arch):  # some of torchvision's return more in training than in evaluation
        with torch.random.fork_rng(devices=[]):
            _try(arch, copy.deepcopy(model).train(), num_classes, input_size)
    return model.train()


def _try(arch: str, model: nn.Module, num_classes: int, input_size: int) -> None:
    """Raise UserError if a network cannot take two images, or does not return their logits."""
    try:
        with torch.no_grad():  # not inference_mode: lazy layers make their weights here
            outputs = model(torch.zeros(2, 3, input_size, input_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{arch}: cannot take images of {input_size} pixels ({first_line(error)}); use a "
            "larger input size, or a model made for small images such as cifar_resnet20",
            "architecture",
        ) from error
    kind = f"{type(outputs).__name__}, not a tensor,"
    if isinstance(outputs, torch.Tensor):
        if outputs.shape == (2, num_classes):
            return
        kind = f"a tensor {tuple(outputs.shape)}"
    raise UserError(
        f"{arch}: returns {kind} for 2 images in {'training' if model.training else 'eval'} mode; "
        f"logits {(2, num_classes)} are needed, one row per image and one column per class",
        "architecture",
    )
