"""Weights of a file put into a network: renamed, compared, loaded."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models import classifiers_of
from models.checkpoint import RAW_KEYS, Checkpoint, Weights, read_checkpoint
from utils import UserError, few


@dataclass(frozen=True)
class Loaded:
    """What became of the weights of a file."""

    fresh: list[str]  # names of the network's weights that were left as initialized
    left_out: list[str]  # names in the file that belong to no weight of the network

    @property
    def note(self) -> str:
        """Continues a sentence; '' if every tensor of the file was loaded."""
        count = len(self.left_out)
        return f", {count} other tensor(s) left out ({few(self.left_out)})" if count else ""


def load_weights(
    model: nn.Module,
    weights: Weights,
    *,
    remedy: str,
    classes_remedy: str = "",
    names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    allow_new_classifier: bool = False,
) -> Loaded:
    """Rename the weights as the model names them, compare them with the model's, and load them.

    Args:
        remedy: what to do if the weights do not fit; ends the error.
        classes_remedy: the same if only the number of classes differs.
        names, classes: of the outputs in the file and of the model, if the classifier's rows are
            to be put into the model's order; it stays as initialized if a class is not in the file.
        allow_new_classifier: leave a classifier that does not fit as it was initialized.
    Raises: UserError if the weights do not fit; the model is then unchanged.
    """
    wanted, classifiers = model.state_dict(), classifier_prefixes(model)
    # Counters that files before torch 0.4.1 and some libraries lack; inference never reads them.
    counters = {n: v for n, v in wanted.items() if n.endswith("num_batches_tracked")}
    needed = wanted.keys() - counters.keys()
    if allow_new_classifier:
        needed = {name for name in needed if not name.startswith(classifiers)}
    state, left_out, note = _as_named_by(model, weights.state, needed)
    state = counters | state
    if names and classes:
        if list(names) != list(classes) and not classifiers:
            raise UserError(
                f"{weights.source}: was trained on different classes, or in another order, and the "
                "network does not say which of its layers is the classifier; add a method "
                "get_classifier to it",
                "checkpoint",
            )
        _order_classifier(model, state, names, classes)
    fresh: list[str] = []
    if allow_new_classifier:
        head = [name for name in wanted if name.startswith(classifiers)]
        fresh = [n for n in head if n not in state or state[n].shape != wanted[n].shape]
        # The projection heads and decoders of self-supervised training.
        parts = {name.partition(".")[0] for name in wanted}
        surplus = [
            name
            for name in state.keys() - wanted.keys()
            if name.startswith(classifiers) or name.partition(".")[0] not in parts
        ]
        left_out += surplus
        state = {name: value for name, value in state.items() if name not in {*surplus, *fresh}}
    for weight in (f"{prefix}weight" for prefix in output_prefixes(model)):
        rows = len(state[weight]) if weight in state else len(wanted[weight])
        if rows != len(wanted[weight]):
            raise UserError(
                f"{weights.source}: the checkpoint's classifier has {rows} outputs, but "
                f"{len(wanted[weight])} classes are expected; {classes_remedy or remedy}",
                "checkpoint",
            )
    expected = {name: value for name, value in wanted.items() if name not in fresh}
    if difference := describe_mismatch(expected, state):
        remedy = _torchvision_remedy(model, weights.state) or remedy
        message = f"{weights.source}: does not fit the model: {difference}{note}; {remedy}"
        raise UserError(message, "checkpoint")
    model.load_state_dict(state, strict=not fresh)
    return Loaded(sorted(fresh), sorted(left_out))


def _as_named_by(
    model: nn.Module, state: dict[str, torch.Tensor], needed: Set[str]
) -> tuple[dict[str, torch.Tensor], list[str], str]:
    """The weights under the model's names and resampled for its size.

    Args:
        needed: the names without which nothing fits.
    Returns: the weights, the names that were left out, and a note of a failure.
    """
    # Of torch's AveragedModel, and of counters of multiply-adds (thop).
    extra = ("n_averaged", "total_ops", "total_params")
    left_out = [name for name in state if name.rpartition(".")[2] in extra]
    state = {name: value for name, value in state.items() if name not in left_out}
    # Internal to timm: the function that each family's file has for its original releases, and for
    # position embeddings of another size.
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    wanted, note, best = model.state_dict(), "", state
    classifiers = classifier_prefixes(model)
    for prefix in _prefixes(state, needed):
        inside = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        inside = _without_place(inside, wanted, classifiers)
        fits = needed <= inside.keys()
        is_whole = fits and not inside.keys() - wanted.keys()
        same_size = all(
            n.startswith(classifiers) or inside[n].shape == wanted[n].shape
            for n in needed & inside.keys()
        )
        if rename is not None and not (is_whole and same_size):
            try:
                inside = rename(dict(inside), model)
            except Exception as error:  # written for one family's files, it fails on others
                note = f" (timm could not rename the weights: {type(error).__name__})"
            fits = needed <= inside.keys()
        if fits:
            outside = [name for name in state if not name.startswith(prefix)]
            return inside, left_out + outside, ""
        if len(needed & inside.keys()) > len(needed & best.keys()):
            best = inside
    return best, left_out, note


def _prefixes(state: dict[str, torch.Tensor], needed: Set[str]) -> list[str]:
    """What may stand before every name of the network in a file, best first.

    Wrappers put one prefix before all names, such as module., net. or model.backbone.; beside these
    a file may hold other tensors, such as a loss's.
    """
    common, prefixes = "", [""]
    while True:  # the prefixes of most of the names
        counts = Counter(
            name.removeprefix(common).partition(".")[0] for name in state if name.startswith(common)
        )
        part, count = counts.most_common(1)[0] if counts else ("", 0)
        if not part or 2 * count <= len(state) or f"{common}{part}" in state:
            break
        common += f"{part}."
        prefixes.append(common)
    anchor = max(needed, key=len, default="")
    others = [name.removesuffix(anchor) for name in state if name.endswith(f".{anchor}")]
    # Of several networks in a file, the average and the teacher come last.
    return list(
        dict.fromkeys(prefixes + sorted(others, key=lambda p: ("ema" in p, "teacher" in p)))
    )


def _without_place(
    state: dict[str, torch.Tensor], wanted: Mapping[str, Any], classifiers: Iterable[str]
) -> dict[str, torch.Tensor]:
    """fc.1.weight -> fc.weight, of a classifier that stood behind a dropout in a Sequential."""
    renamed: dict[str, str] = {}
    for prefix in classifiers:
        within = {name for name in state if name.startswith(prefix)}
        places = {name.removeprefix(prefix).partition(".")[0] for name in within}
        inner = {
            name: prefix + name.removeprefix(f"{prefix}{min(places, default='')}.")
            for name in within
        }
        if len(places) == 1 and set(inner.values()) <= wanted.keys():
            renamed |= inner
    return {renamed.get(name, name): value for name, value in state.items()}


def _torchvision_remedy(model: nn.Module, state: dict[str, torch.Tensor]) -> str:
    """What to do about weights under the names of torchvision's network of this kind, else ''."""
    from torchvision import models as networks

    family = re.split(r"[^a-z]", type(model).__name__.lower())[0][:4]
    family = {"visi": "vit_"}.get(family, family)
    shapes = {name: value.shape for name, value in state.items()}
    for name in networks.list_models(networks):
        if name.startswith(family):
            with torch.device("meta"):
                theirs = networks.get_model(name, weights=None).state_dict()
            if all(
                name in shapes and shapes[name][1:] == value.shape[1:]
                for name, value in theirs.items()
            ):
                return f"its names are torchvision's: pass torchvision.models:{name} instead"
    return ""


def describe_mismatch(wanted: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> str:
    """How two state_dicts differ, with a few names of each kind; '' if they fit."""
    parts = []
    if missing := wanted.keys() - state.keys():
        parts.append(f"{len(missing)} weights missing ({few(sorted(missing))})")
    if unexpected := state.keys() - wanted.keys():
        parts.append(f"{len(unexpected)} unexpected ({few(sorted(unexpected))})")
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and wanted[name].shape != state[name].shape
    ]
    if shapes:
        parts.append(f"{len(shapes)} of another shape ({few(shapes)})")
    return "; ".join(parts)


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of a network's classifiers begin with, such as 'head.' and 'head_dist.'."""
    classifiers = classifiers_of(model)
    return tuple(f"{n}." for n, m in model.named_modules() if any(m is c for c in classifiers))


def output_prefixes(model: nn.Module) -> list[str]:
    """`classifier_prefixes`, of the one layer in each classifier whose rows are the classes."""
    prefixes = []
    for classifier in classifier_prefixes(model):
        modules = model.get_submodule(classifier[:-1]).named_modules(prefix=classifier[:-1])
        layers = [f"{n}." for n, m in modules if isinstance(m, nn.Linear | nn.Conv2d)]
        prefixes += layers[-1:]
    return prefixes


def load_finetune(
    model: nn.Module, path: str, keys: str, prefix: str, classes: Sequence[str]
) -> str:
    """Load pre-trained weights into `model`; a classifier of other classes stays as initialized.

    If the file names its classes, the classifier is taken by these names: whole, or not at all.

    Args:
        keys: keys to look under, separated by '|'; EMA weights are taken only if named.
        prefix: load only the weights with this prefix.
        classes: the model's classes in order.
    Returns: a line that says what was loaded.
    Raises: UserError if no weight, or only part of the network, fits.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint.weights(keys=(*keys.split("|"), *RAW_KEYS[1:]), prefix=prefix)
    names = checkpoint.classes
    loaded = load_weights(
        model,
        weights,
        remedy=checkpoint.architecture_remedy,
        names=names,
        classes=classes,
        allow_new_classifier=True,
    )
    if loaded.fresh:
        of_classes = f" (other classes: {few(names)})" if names else ""
        note = f"newly initialized: {', '.join(loaded.fresh)}{of_classes}"
    else:
        note = "classifier " + ("matched by class name" if names else "in the file's order")
    return f"Fine-tuning from {path}: {weights.description}{loaded.note}; {note}"


def _order_classifier(
    model: nn.Module, state: dict[str, torch.Tensor], names: Sequence[str], classes: Sequence[str]
) -> None:
    """Put the classifiers' rows into the order of other classes; remove them if one is unknown.

    Args:
        state: weights under the model's names; changed.
        names: the classes of the rows.
    """
    position = {name: row for row, name in enumerate(names)}
    rows = [position[name] for name in classes if name in position]
    is_known = len(rows) == len(classes)
    prefixes = tuple(output_prefixes(model)) if is_known else classifier_prefixes(model)
    for name in [name for name in state if name.startswith(prefixes)]:
        if is_known:
            state[name] = state[name][rows]
        else:
            del state[name]


def load_network(
    network: nn.Module, checkpoint: Checkpoint, use_ema: str = "false", other: str = ""
) -> Weights:
    """Load a checkpoint of a run into a network of the same architecture.

    Args:
        other: what else to do about a checkpoint of another model, such as ', or …'.
    Raises: UserError for a checkpoint of another model or from a newer version of this project.
    """
    weights = checkpoint.weights(use_ema)
    remedy = f"the checkpoint is of another model: pass its --model{other}"
    load_weights(network, weights, remedy=remedy)
    return weights
