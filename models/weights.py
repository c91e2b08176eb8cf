"""Weights from any checkpoint file: read, found, renamed, compared and loaded."""

import argparse
import hashlib
import pickle
import re
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from models import classifier_of
from utils import UserError, few, is_url, lock, missing_file

# Of the checkpoints of a run; raised where the same seed begins to show other images. Older files,
# and those from before the number, are read as well.
FORMAT = 2


# ------------------------------------------------------------------------- reading any file


def local_file(path: str) -> str:
    """The path of a checkpoint file on this machine; an http(s) address is downloaded once.

    Raises: UserError for a file that does not exist or cannot be downloaded.
    """
    if not is_url(path):
        if problem := missing_file(path):
            raise UserError(problem, "checkpoint")
        return path
    # Named by the whole address: files of two releases often have the same last part.
    name = f"{hashlib.sha256(path.encode()).hexdigest()[:12]}-{Path(urlparse(path).path).name}"
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not cached.exists():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{cached}.lock", "wb") as file:
                lock(file)  # one process per machine downloads, the others wait
                if not cached.exists():
                    torch.hub.download_url_to_file(path, str(cached), progress=False)
        except OSError as error:
            raise UserError(
                f"{path}: download failed ({error}); fetch the file and pass its path", "checkpoint"
            ) from error
    return str(cached)


def read_checkpoint(path: str) -> "Checkpoint":
    """Read a checkpoint file (local or http) to the CPU without running any code in it.

    `torch.load(weights_only=True)` accepts tensors and plain types. One more type is allowed,
    `argparse.Namespace`, which the DeiT and ConvNeXt releases carry beside their weights.

    Args:
        path: a `.safetensors` file or anything that torch.save wrote.
    Raises: UserError for a file that is missing, unreadable or would run code, or that holds no
        dict.
    """
    content = _read(local_file(path))
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path}: holds a {kind}, not a dict of weights", "checkpoint")
    return Checkpoint(path, content)


def _read(path: str) -> Any:
    damaged = f"{path}: not a readable checkpoint, perhaps cut short"
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file  # comes with timm

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, not read: the processes of a machine share the pages, and what is not used,
            # such as a teacher's optimizer state, is never read.
            is_mapped = zipfile.is_zipfile(path)  # torch.save's format since 1.6
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except pickle.UnpicklingError as error:
        if not (refused := _refused_names(path, error)):
            raise UserError(f"{damaged}; fetch or save it again", "checkpoint") from error
        raise UserError(
            f"{path}: refused, since reading it would run code ({refused[0]}); nothing was run. "
            "Save its weights with torch.save(model.state_dict(), FILE) and pass that file",
            "checkpoint",
        ) from error
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        reason = type(error).__name__
        raise UserError(f"{damaged} ({reason}); fetch or save it again", "checkpoint") from error


def _refused_names(path: str, error: pickle.UnpicklingError) -> list[str]:
    """The functions and classes that a checkpoint asks for and `weights_only` refuses."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not one of torch's zip files, or damaged
        # Old files have no list of names; torch's message is the only place that tells them.
        return re.findall(r"GLOBAL (\S+)", str(error))


# ------------------------------------------- from a checkpoint's weights to a model's weights

RAW_KEYS = ("model", "state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")


@dataclass(frozen=True)
class Weights:
    """A state_dict that was found in a checkpoint.

    Args:
        state: tensors by name, without the prefixes of wrappers.
        key: the key in the checkpoint; '' for a bare state_dict.
        source: the file, for messages.
        reason: why these, if there was a choice; continues a sentence.
    """

    state: dict[str, torch.Tensor]
    key: str
    source: str
    reason: str = ""

    @property
    def is_ema(self) -> bool:
        return "ema" in self.key

    @property
    def description(self) -> str:
        if not self.key:
            return "weights of a bare state_dict"
        return f"weights '{self.key}'{' (EMA)' if self.is_ema else ''}{self.reason}"


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds, whoever wrote it; see `read_checkpoint`.

    Whatever the file does not say is empty or None here.

    Args:
        path: the file or its address, for messages.
        content: the whole file: its entries by key, or the weights of a bare state_dict by name.
    """

    path: str
    content: dict[str, Any]

    def _dict(self, key: str) -> dict[str, Any]:
        value = self.content.get(key)
        return value if isinstance(value, dict) else {}

    def _key(self, keys: tuple[str, ...]) -> str:
        """The first of these keys that holds weights; '' without any."""
        return next((key for key in keys if self._dict(key)), "")

    @property
    def is_ours(self) -> bool:
        """Whether a run of this project wrote the file."""
        return isinstance(self.content.get("data"), dict)

    @property
    def data(self) -> dict[str, Any]:
        """What the network is fed, see datasets.data_config, and its classes; of ours only."""
        return self._dict("data")

    @property
    def classes(self) -> list[str] | None:
        """The names of the network's outputs, in order; of ours only."""
        return self.data.get("classes")

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of whatever script wrote the file, by name."""
        args = self.content.get("args")
        return vars(args) if isinstance(args, argparse.Namespace) else self._dict("args")

    @property
    def run_args(self) -> dict[str, Any]:
        """`args` if a run of this project wrote the file, else empty."""
        return self.args if self.is_ours else {}

    @property
    def images(self) -> dict[str, Any]:
        """What identifies the training images (ImageSource.identity); of ours only."""
        return self._dict("images")

    @property
    def scores(self) -> dict[str, float]:
        """Recorded scores such as test_acc1 and test_acc1_ema, in %; of ours only."""
        return self._dict("scores")

    @property
    def epoch(self) -> int | None:
        """The last finished epoch; None if the file holds no run that could go on."""
        epoch = self.content.get("epoch")
        # The ConvNeXt script's best checkpoint has the word 'best' for its epoch.
        return epoch if "optimizer" in self.content and isinstance(epoch, int) else None

    @property
    def format(self) -> int:
        return self.content.get("format", 0) if self.is_ours else 0

    @property
    def has_ema(self) -> bool:
        return bool(self._key(EMA_KEYS))

    def weights(
        self, use_ema: str = "auto", keys: tuple[str, ...] = (), prefix: str = ""
    ) -> Weights:
        """The network's weights, with the prefixes of wrappers removed from their names.

        A bare state_dict is found without a key.

        Args:
            use_ema: 'true' for the EMA, 'false' for the raw weights, 'auto' for those with the
                better recorded accuracy: if only the raw weights have one, the raw weights, else
                the EMA.
            keys: where to look instead, best first.
            prefix: take only the weights with this prefix, and remove it.
        Raises: UserError if there are no such weights, and for a file of a newer version.
        """
        if self.format > FORMAT:
            raise UserError(
                f"{self.path}: written by a newer version (format {self.format}; this version "
                f"reads up to {FORMAT}); update this code",
                "checkpoint",
            )
        reason = ""
        if not keys:
            if use_ema == "true" and not self.has_ema:
                raise UserError(
                    f"true: {self.path} holds no EMA weights; pass auto or false", "use_ema"
                )
            keys, reason = self._choose(use_ema)
        key = self._key(keys)
        state = self._dict(key) if key else self.content
        state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        if prefix:
            state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        if not state:
            below = f" with the prefix '{prefix}'" if prefix else ""
            raise UserError(
                f"{self.path}: holds no weights under {', '.join(keys)}{below} (its keys: "
                f"{few(self.content)}); pass a model checkpoint",
                "checkpoint",
            )
        wrappers = ("module.", "_orig_mod.", "model.", "student.")
        while wrapper := next((w for w in wrappers if all(n.startswith(w) for n in state)), ""):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
        return Weights(state, key, self.path, reason)

    def _choose(self, use_ema: str) -> tuple[tuple[str, ...], str]:
        """Under which keys to look, best first, and why, if there was a choice."""
        if use_ema != "auto":
            return (EMA_KEYS if use_ema == "true" else RAW_KEYS), ""
        raw, ema = self.scores.get("test_acc1"), self.scores.get("test_acc1_ema")
        if not (self.has_ema and self._key(RAW_KEYS)):
            return EMA_KEYS + RAW_KEYS, ""
        if raw is None and ema is None:
            return EMA_KEYS, ", chosen without recorded accuracies"
        other = "that of the {} {:.2f} %".format
        if ema is None or (raw is not None and raw > ema):
            rest = "none of the EMA" if ema is None else other("EMA", ema)
            return RAW_KEYS, f", recorded accuracy {raw:.2f} %, {rest}"
        rest = "none of the raw weights" if raw is None else other("raw weights", raw)
        return EMA_KEYS, f", recorded accuracy {ema:.2f} %, {rest}"


def load_weights(
    model: nn.Module,
    weights: Weights,
    *,
    remedy: str,
    classes_remedy: str = "",
    allow_new_classifier: bool = False,
) -> list[str]:
    """Rename the weights as timm names them, compare them with the model's, and load them.

    Args:
        remedy: what to do where the weights do not fit; ends the error.
        classes_remedy: the same where only the number of classes differs.
        allow_new_classifier: leave a classifier that does not fit as it was initialized.
    Returns: the names of the weights that were left as initialized.
    Raises: UserError where the weights do not fit; the model is then unchanged.
    """
    state, note = _rename_as_timm(model, weights.state)
    wanted = model.state_dict()
    classifier = classifier_name(model)
    fresh = []
    if allow_new_classifier and classifier is not None:
        names = [name for name in wanted if name.startswith(f"{classifier}.")]
        fresh = [n for n in names if n not in state or state[n].shape != wanted[n].shape]
    elif (weight := f"{classifier}.weight") in state and weight in wanted:
        rows, outputs = len(state[weight]), len(wanted[weight])
        if rows != outputs:
            raise UserError(
                f"{weights.source}: the checkpoint's classifier has {rows} outputs, but {outputs} "
                f"classes are expected; {classes_remedy or remedy}",
                "checkpoint",
            )
    state = {name: value for name, value in state.items() if name not in fresh}
    expected = {name: value for name, value in wanted.items() if name not in fresh}
    if difference := describe_mismatch(expected, state):
        message = f"{weights.source}: does not fit the model: {difference}{note}; {remedy}"
        raise UserError(message, "checkpoint")
    model.load_state_dict(state, strict=not fresh)
    return sorted(fresh)


def _rename_as_timm(
    model: nn.Module, state: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """Weights under timm's names and resampled for the model's size, and a note of a failure."""
    # Internal to timm: the function that each family's file has for its original releases, and for
    # position embeddings of another size.
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    wanted, classifier = model.state_dict(), f"{classifier_name(model)}."
    fits = all(
        n in state and (n.startswith(classifier) or state[n].shape == wanted[n].shape)
        for n in wanted
    )
    if rename is None or (fits and len(state) == len(wanted)):
        return state, ""
    try:
        return rename(state, model), ""
    except Exception as error:  # written for one family's files, it fails on others in any way
        return state, f" (timm could not rename the weights: {type(error).__name__})"


def describe_mismatch(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str:
    """How two state_dicts differ, with a few names of each kind; '' where they fit."""
    parts = []
    if missing := wanted.keys() - found.keys():
        parts.append(f"{len(missing)} weights missing ({few(sorted(missing))})")
    if unexpected := found.keys() - wanted.keys():
        parts.append(f"{len(unexpected)} unexpected ({few(sorted(unexpected))})")
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and wanted[name].shape != found[name].shape
    ]
    if shapes:
        parts.append(f"{len(shapes)} of another shape ({few(shapes)})")
    return "; ".join(parts)


def classifier_name(model: nn.Module) -> str | None:
    """The name of a timm model's classifier among its modules; None where it has none."""
    classifier = classifier_of(model)
    return next((name for name, module in model.named_modules() if module is classifier), None)


def load_finetune(
    model: nn.Module, path: str, keys: str, prefix: str, classes: Sequence[str]
) -> str:
    """Load pre-trained weights into `model`; a classifier of other classes stays as initialized.

    Where the file names its classes, the classifier is taken by these names: whole, or not at all.

    Args:
        keys: keys to look under, separated by '|'; EMA weights are taken only if named.
        prefix: load only the weights with this prefix.
        classes: the model's classes in order.
    Returns: a line that says what was loaded.
    Raises: UserError where no weight, or only part of the network, fits.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint.weights(keys=(*keys.split("|"), "state_dict"), prefix=prefix)
    names = checkpoint.classes
    if names:
        _order_classifier(model, weights.state, names, classes)
    remedy = "pass the architecture that the file was trained as"
    fresh = load_weights(model, weights, remedy=remedy, allow_new_classifier=True)
    if fresh:
        of_classes = f" (other classes: {few(names)})" if names else ""
        note = f"newly initialized: {', '.join(fresh)}{of_classes}"
    else:
        note = "classifier " + ("matched by class name" if names else "in the file's order")
    return f"Fine-tuning from {path}: {weights.description}; {note}"


def _order_classifier(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    names: Sequence[str],
    classes: Sequence[str],
) -> None:
    """Put the classifier's rows into the order of other classes; remove it where one is unknown.

    Args:
        state: weights under the model's names; changed.
        names: the classes of the rows.
    """
    position = {name: row for row, name in enumerate(names)}
    rows = [position[name] for name in classes if name in position]
    for name in [name for name in state if name.startswith(f"{classifier_name(model)}.")]:
        if len(rows) < len(classes):
            del state[name]
        else:
            state[name] = state[name][rows]


def load_network(
    network: nn.Module, checkpoint: Checkpoint, use_ema: str = "false", other: str = ""
) -> Weights:
    """Load a checkpoint of a run into a network of the same architecture.

    Args:
        use_ema: see Checkpoint.weights.
        other: what else to do about a checkpoint of another model, such as ', or …'.
    Returns: the weights that were loaded.
    Raises: UserError for a checkpoint of another model or from a newer version of this project.
    """
    weights = checkpoint.weights(use_ema)
    remedy = f"the checkpoint is of another model: pass its --model{other}"
    load_weights(network, weights, remedy=remedy)
    return weights
