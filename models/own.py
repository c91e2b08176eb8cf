"""Networks of the user's own: made by a function that is named MODULE:FACTORY."""

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from timm.models import PretrainedCfg
from torch import nn

from utils import UserError, few, first_line


def make_network(arch: str, keywords: dict[str, Any]) -> nn.Module:
    """Call the factory of a name such as my_package.my_module:make.

    Args:
        keywords: num_classes, and others that were asked for.
    Raises: UserError for a module or factory that does not exist, fails, or makes something else.
    """
    factory = _factory(arch)
    try:
        network = factory(**keywords)
    except Exception as error:  # the user's own code
        cause = f"{type(error).__name__}: {first_line(error)}"
        passed = ", ".join(f"{name}={value}" for name, value in keywords.items())
        raise UserError(
            f"{arch}: the factory failed when it was called with {passed} ({cause}); it must take "
            "num_classes and return a torch.nn.Module",
            "architecture",
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"{arch}: the factory returned a {type(network).__name__}, not a torch.nn.Module; "
            "return the network",
            "architecture",
        )
    return network


def _factory(arch: str) -> Callable[..., Any]:
    name, _, attribute = arch.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # missing, or an error in the module itself
        raise UserError(
            f"{arch}: cannot import {name} ({type(error).__name__}: {first_line(error)}); it is "
            f"looked for in {here} and in Python's path (PYTHONPATH)",
            "architecture",
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        own = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        others = f"its functions are {few(own, most=8)}" if own else "it has no function"
        raise UserError(
            f"{arch}: {getattr(module, '__file__', name)} has no function {attribute}; {others}",
            "architecture",
        )
    return factory


def code_file(arch: str) -> str:
    """The file with the code of a factory."""
    return inspect.getfile(inspect.unwrap(_factory(arch)))


@cache
def own_cfg(arch: str) -> dict[str, Any]:
    """What a network's pretrained_cfg or default_cfg says: any of mean, std and input_size."""
    network = make_network(arch, {"num_classes": 10})
    cfg = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    values = dataclasses.asdict(cfg) if isinstance(cfg, PretrainedCfg) else dict(cfg)
    config: dict[str, Any] = {n: list(values[n]) for n in ("mean", "std") if values.get(n)}
    if size := values.get("input_size"):
        config["input_size"] = size if isinstance(size, int) else size[-1]
    return config
