"""Checkpoint files, whoever wrote them: read without running their code, their weights found."""

import argparse
import hashlib
import json
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from safetensors.torch import load_file  # comes with timm

from utils import FOLDER_WEIGHTS, UserError, few, is_url, lock, missing_file

# Of the checkpoints of a run; raised if the same seed begins to show different images. Older files,
# and those from before the number, are read as well.
FORMAT = 2
# What a file may hold besides tensors and plain types: argparse.Namespace, which timm, DeiT and
# ConvNeXt save beside their weights, and numbers of numpy, such as a best accuracy.
NUMPY_TYPES = [type(np.dtype(code)) for code in "?bBhHiIqQefd"]
SAFE: list[Any] = [argparse.Namespace, np.dtype, np.float64(0).__reduce__()[0], *NUMPY_TYPES]
# The same function in the files of numpy 1 (numpy.core) and numpy 2 (numpy._core).
SAFE += [(SAFE[2], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
OTHER_KINDS = {
    (b"version https://git-lfs",): "is a pointer of Git LFS, not the file; run git lfs pull",
    (b"<!doctype html", b"<html"): "is a web page, not the file that it links to; download the "
    "file itself",
    (b"\x89hdf",): "is an HDF5 file, as Keras writes; pass weights of PyTorch",
    (b"\x89png", b"\xff\xd8\xff", b"gif8"): "is a picture; pass a checkpoint",
}


# ------------------------------------------------------------------------- reading any file


def local_file(path: str) -> str:
    """The path of a checkpoint file on this machine; an http(s) address is downloaded once.

    Raises: UserError for a file that does not exist or cannot be downloaded.
    """
    if not is_url(path):
        if problem := missing_file(path):
            raise UserError(problem, "checkpoint")
        return os.path.join(path, FOLDER_WEIGHTS) if os.path.isdir(path) else path
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

    `torch.load(weights_only=True)` accepts tensors and plain types; a few more are SAFE.

    Args:
        path: anything that torch.save wrote, a `.safetensors` file, or a folder of export.py
            (--format timm), whose config.json is read too.
    Raises: UserError for a file that is missing, unreadable or would run code, or that holds no
        dict.
    """
    file = local_file(path)
    content = _read(file)
    if Path(file).name == FOLDER_WEIGHTS:
        content = _of_folder(content, Path(file).with_name("config.json"))
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path}: holds a {kind}, not a dict of weights", "checkpoint")
    return Checkpoint(path, content)


def _of_folder(state: dict[str, torch.Tensor], config: Path) -> dict[str, Any]:
    """A folder in timm's format as the checkpoint of a run; a bare state_dict if it says less."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        cfg, classes = values["pretrained_cfg"], values["label_names"]
        data = {name: cfg[name] for name in ("mean", "std", "crop_pct", "interpolation")}
        data |= {"input_size": cfg["input_size"][-1], "crop_mode": cfg.get("crop_mode", "center")}
        args = {"model": values["architecture"], "input_size": data["input_size"]}
    except (OSError, ValueError, KeyError, TypeError):  # of another library, or without names
        return state
    return {"model": state, "data": data | {"classes": classes}, "args": args}


def _read(path: str) -> Any:
    damaged = f"{path}: not a readable checkpoint, perhaps cut short"
    try:
        if kind := _other_kind(path):
            raise UserError(f"{path}: {kind}", "checkpoint")
        if path.endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals(SAFE):
            # Mapped, not read: the processes of a machine share the pages, and what is not used,
            # such as a teacher's optimizer state, is never read.
            is_mapped = zipfile.is_zipfile(path)  # torch.save's format since 1.6
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except UserError:
        raise
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


def _other_kind(path: str) -> str:
    """What a file is that holds no weights of PyTorch, and what to do; '' if it may hold some."""
    with open(path, "rb") as file:
        head = file.read(512)
    for starts, kind in OTHER_KINDS.items():
        if head.lstrip().lower().startswith(starts):
            return kind
    save = "pass a file that torch.save(model.state_dict(), FILE) wrote"
    if head[:1] == b"\x08" and (b"onnx" in head or b"pytorch" in head):
        return f"is an ONNX program; {save}"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
        if any("/code/" in name for name in names):
            return f"is a TorchScript program; {save}"
        if any(name.endswith(("archive_format", "exported_program.json")) for name in names):
            return f"is a program of torch.export (.pt2); {save}"
    return ""


def _refused_names(path: str, error: pickle.UnpicklingError) -> list[str]:
    """The functions and classes that a checkpoint asks for and `weights_only` refuses."""
    try:
        with torch.serialization.safe_globals(SAFE):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not one of torch's zip files, or damaged
        # Old files have no list of names; only torch's message holds them.
        return re.findall(r"GLOBAL (\S+)", str(error))


# -------------------------------------------------------------- what a file holds

RAW_KEYS = ("model", "state_dict", "model_state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class Weights:
    """A state_dict that was found in a checkpoint."""

    state: dict[str, torch.Tensor]  # by the names in the file
    key: str  # in the checkpoint; '' for a bare state_dict
    source: str  # the file, for messages
    reason: str = ""  # why these, if there was a choice; continues a sentence

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
    """

    path: str  # the file or its address, for messages
    content: dict[str, Any]  # entries by key, or the weights of a bare state_dict by name

    def _dict(self, key: str) -> dict[str, Any]:
        value = self.content.get(key)
        return value if isinstance(value, dict) else {}

    def _key(self, keys: tuple[str, ...]) -> str:
        """The first of these keys that holds weights; '' without any."""
        return next((key for key in keys if self._dict(key)), "")

    @property
    def is_ours(self) -> bool:
        """Whether the file says what its network is fed: those of this project do."""
        return isinstance(self.content.get("data"), dict)

    @property
    def data(self) -> dict[str, Any]:
        """What the network is fed (datasets.data_config) and its classes; {} if not `is_ours`."""
        return self._dict("data")

    @property
    def classes(self) -> list[str] | None:
        """The names of the network's outputs, in order; None if the file does not name them."""
        return self.data.get("classes")

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of whatever script wrote the file, by name."""
        args = self.content.get("args")
        return vars(args) if isinstance(args, argparse.Namespace) else self._dict("args")

    @property
    def run_args(self) -> dict[str, Any]:
        """`args` if the file `is_ours`, else empty."""
        return self.args if self.is_ours else {}

    @property
    def architecture_remedy(self) -> str:
        """What to do if the weights do not fit; names the architecture if the file does."""
        name = self.args.get("model") or self.content.get("arch")
        known = f" ({name})" if isinstance(name, str) else ""
        return f"pass the architecture that the file was trained as{known}"

    @property
    def images(self) -> dict[str, Any]:
        """What identifies the training images (ImageSource.identity); of ours only."""
        return self._dict("images")

    @property
    def scores(self) -> dict[str, float]:
        """Recorded scores such as test_acc1 and test_acc1_ema, in %; of ours only."""
        return self._dict("scores")

    def recorded_acc1(self, is_ema: bool) -> float | None:
        """The accuracy in % that the file records of its EMA or its raw weights."""
        if self.is_ours:
            return self.scores.get("test_acc1_ema" if is_ema else "test_acc1")
        # timm's train.py: of the EMA if there is one. Another --eval-metric may be a loss.
        metric = self.content.get("metric")
        is_acc1 = self.args.get("eval_metric", "top1") == "top1" and is_ema == self.has_ema
        return float(metric) if is_acc1 and isinstance(metric, int | float) else None

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
        """The network's weights.

        A bare state_dict is found without a key, and so is the only dict of tensors in the file.

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
        key = self._key(keys) or self._only_weights()
        state = _tensors(self._dict(key) if key else self.content)
        if not state:
            raise UserError(
                f"{self.path}: holds no weights under {', '.join(keys)} (its keys: "
                f"{few(self.content)}); pass a model checkpoint",
                "checkpoint",
            )
        if prefix:
            starts = sorted({name.split(".")[0] + "." for name in state})
            state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        if not state:
            raise UserError(
                f"{self.path}: no name of its weights begins with '{prefix}'; they begin with "
                f"{few(starts, most=5)}",
                "checkpoint",
            )
        return Weights(state, key, self.path, reason)

    def _only_weights(self) -> str:
        """The key of the only dict of tensors, such as 'net'; '' if there is none, or several."""
        counts = {key: len(_tensors(self._dict(key))) for key in self.content}
        keys = [key for key, count in counts.items() if count > len(_tensors(self.content))]
        return keys[0] if len(keys) == 1 else ""

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
