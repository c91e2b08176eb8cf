"""The teacher cache of a run: what its logits belong to, and whether a run may use them."""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
import utils
from arguments.derived import (
    PRETRAINED,
    Teacher,
    follows_network,
    is_mixed,
    is_own_module,
    teachers_of,
)
from arguments.flags import COMPARED, IF_MIXED, with_cache
from data.content import ContentIndex
from data.loaders import image_sample
from data.order import EpochBatches
from data.pictures import DECODER
from data.sources import ImageSource, hash_of_plain
from datasets import Data, teacher_classes
from models.checkpoint import local_file, read_checkpoint
from models.classes import order_of_script
from models.own import code_file
from runtime import distributed
from teacher.logit_store import LogitStore, RowFormat
from teacher.packing import local_cache
from utils import UserError, few, flags_for

MANIFEST = "manifest.json"
FORMAT = 3  # of the files and of the order of their rows; rises when a program would misread others
NEEDED = {"id", "classes", "teacher_cache_dtype", "teacher_cache_topk", "note"}
SAME_IMAGE = 0.05  # tolerance of means of normalized pixels; rounding of processors is far below
CONTENTS = "image_contents"  # the field of images that are known by their bytes
REPLACED_IMAGES = {  # fields of ImageSource.fingerprint, and what a difference says
    "image_names": "they have different paths in the data folder, or different ones were chosen",
    "image_sizes": "their files have different sizes in bytes",
    "image_times": "they have the same paths and sizes, but different times of modification, "
    "because they were edited, or copied without time stamps (cp -p and rsync -a keep time stamps)",
    CONTENTS: "the bytes of their files differ",
    "pixels": "they have different pixels",
    "table": "Hugging Face's fingerprint of their table differs",
}


def open_teacher_cache(
    args: argparse.Namespace, data: Data, amp_dtype: torch.dtype | None
) -> LogitStore:
    """The store that --teacher_cache names, created or proven to belong to this run. Collective.

    Raises: UserError if the store was created with something else.
    """
    if not isinstance(data.train, ImageSource):
        raise UserError(
            f"--teacher_cache {args.teacher_cache}: needs images in a fixed order, which the "
            f"stream {args.data_set} does not have; use a folder, or leave the flag out"
        )
    order = data.train_loader.order
    assert isinstance(order, EpochBatches)  # as for every ImageSource
    num_classes = len(data.classes)
    if args.teacher_cache_topk and args.teacher_cache_topk > num_classes:
        raise UserError(
            f"--teacher_cache_topk {args.teacher_cache_topk}: there are only {num_classes} "
            "classes; pass a smaller number, or leave the flag out"
        )
    folder = local_cache(args.teacher_cache)
    manifest = distributed.from_main(lambda: _claim(folder, args, data, amp_dtype))
    return LogitStore(folder, len(data.train), order.end, row_format_of(manifest), manifest["id"])


def row_format_of(manifest: dict[str, Any]) -> RowFormat:
    """How the logits on training images are stored."""
    dtype, topk = manifest["teacher_cache_dtype"], manifest["teacher_cache_topk"]
    # Of top-k rows, the temperature of the run that created the cache is used.
    return RowFormat(manifest["classes"], dtype, topk, manifest["note"]["kd_temperature"])


def validation_fingerprint(folder: Path, val: ImageSource) -> dict[str, Any]:
    """What tells validation images from others, by bytes or stamps as the cache's manifest does."""
    index = ContentIndex(folder) if _is_by_content(read_manifest(folder)) else None
    fingerprint = val.fingerprint(index)
    if index is not None:
        index.save()
    return fingerprint


def _settings(
    args: argparse.Namespace, data: Data, amp_dtype: torch.dtype | None
) -> dict[str, Any]:
    """Everything but the images that the teacher's logits on them depend on, in plain values.

    Other flags may differ between runs that share a cache. A flag says in arguments/flags.py what
    a cache makes of it.
    """
    flags = with_cache(COMPARED)
    if is_mixed(args):
        flags += with_cache(IF_MIXED)
        if args.mixup_mode != "pair":  # an image is mixed with another image of its batch
            flags.append("batch_size")
    teachers = teachers_of(args)
    if len(teachers) > 1:  # their average depends on the temperature
        flags += ["teacher_weights", "kd_temperature"]
    fields = {"decoder": DECODER, "seed": args.data_seed} | {
        name: getattr(args, name) for name in flags
    }
    if follows_network(args):  # normalized as the student asks
        fields |= {name: data.config[name] for name in ("mean", "std")}
    fields["amp_dtype"] = str(amp_dtype).removeprefix("torch.")
    with flags_for(checkpoint="--teacher_path"):
        fields["teacher_path"] = [_identity_of(teacher, args.use_ema) for teacher in teachers]
    names = teacher_classes(args)
    fields["teacher_classes"] = names and hash_of_plain(names)
    return fields


def _images(data: Data, index: ContentIndex | None) -> dict[str, Any]:
    """What identifies the training images, by their bytes with an index, and how they look."""
    assert isinstance(data.train, ImageSource)
    return data.train.fingerprint(index) | {"augmented": image_sample(data.train_loader)}


def hash_of_file(path: str) -> str:
    """64 hexadecimal digits that stand for the contents of a file."""
    status = os.stat(path)
    return _sha256(path, status.st_size, status.st_mtime_ns)


@functools.cache  # a run asks for that of its teacher's file twice
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes_of_teachers(args: argparse.Namespace) -> list[str]:
    """SHA-256 of the file of each teacher, on every process; '' for timm's weights. Collective."""
    paths = [teacher.path for teacher in teachers_of(args)]
    return distributed.from_main(
        lambda: ["" if path == PRETRAINED else hash_of_file(local_file(path)) for path in paths]
    )


def _identity_of(teacher: Teacher, use_ema: str) -> str:
    """What tells a teacher from others: a hash of its file, or of timm's weights.

    And of the file with the code of a network of the user's own, though not of what that imports.
    """
    if teacher.path != PRETRAINED:
        identity = f"sha256 {hash_of_file(local_file(teacher.path))}"
        if use_ema != "auto":
            checkpoint = read_checkpoint(teacher.path)
            if checkpoint.has_ema and checkpoint.weights().is_ema != (use_ema == "true"):
                identity = f"--use_ema {use_ema}, {identity}"  # not the weights that auto chooses
        if is_own_module(teacher.arch):
            with flags_for(architecture="--teacher_arch"):
                identity += f", code sha256 {hash_of_file(code_file(teacher.arch))}"
        return identity
    with flags_for(architecture="--teacher_arch"):
        cfg = models.pretrained_cfg(teacher.arch)
        size = cfg.input_size[-1]
        network = models.create_model(teacher.arch, cfg.num_classes, size, pretrained=True)
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return f"timm's weights, sha256 {digest.hexdigest()}"


def _require_order(args: argparse.Namespace, classes: list[str]) -> None:
    """Raise UserError if the order of a teacher's outputs is unclear, see order_of_script."""
    for path in [t.path for t in teachers_of(args) if t.path != PRETRAINED]:
        if not (checkpoint := read_checkpoint(path)).classes:
            order_of_script(checkpoint.args, classes, path)


def _claim(
    folder: Path, args: argparse.Namespace, data: Data, amp_dtype: torch.dtype | None
) -> dict[str, Any]:
    """Write the manifest of a new cache, or prove that an existing cache belongs to this run.

    Returns: the manifest of the cache, with its format and its random id.
    Raises: UserError that names the first field that differs, both values and the remedy.
    """
    path, existing = folder / MANIFEST, read_manifest(folder)
    manifest = _settings(args, data, amp_dtype)
    if existing:  # compared before any image is read
        _compare(folder, manifest, {name: existing.get(name) for name in manifest})
    elif not args.teacher_classes:
        _require_order(args, data.classes)
    is_known = _is_by_content(existing) if existing else args.teacher_cache_identity == "content"
    index = ContentIndex(folder) if is_known else None
    manifest |= _images(data, index)
    versions = {p: importlib.metadata.version(p) for p in ("torch", "timm", "numpy", "pillow")}
    # A complete cache is of use on every device, so what it was made on is not compared.
    device = torch.device(args.teacher_device or data.train_loader.to_network.device).type
    made_on = {"device": device} | ({"fast_cuda": args.fast_cuda} if device == "cuda" else {})
    manifest["note"] = versions | {"kd_temperature": args.kd_temperature} | made_on
    if not existing:  # a complete store may be on a read-only disk
        utils.make_folder(folder)
        with open(folder / ".lock", "wb") as file:
            utils.lock(file)  # of several runs at once, one creates the manifest
            # The manifest is written first, so rows without one have lost it.
            if any(folder.glob("view-*.sums")) and not path.exists():
                raise UserError(
                    f"{folder}: holds logits but no {MANIFEST}, which says what they belong "
                    "to; restore that file, or pass another folder",
                    "cache",
                )
            if not path.exists():
                new = {"format": FORMAT, "id": secrets.token_hex(16)} | manifest
                utils.write_whole(path, json.dumps(new, indent=1), "cache")
        existing = read_manifest(folder)
    _compare(folder, manifest, existing, index.changed if index else [])
    if index is not None:
        index.save()
    return existing


def _compare(
    folder: Path, manifest: dict[str, Any], existing: dict[str, Any], changed: Sequence[str] = ()
) -> None:
    if fields := differing(manifest, existing):
        message = _difference(fields[0], manifest, existing, changed)
        raise UserError(f"{folder}: {message}", "cache")


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The fields in which two manifests do not belong to the same logits.

    'augmented', a list of floats, is compared with some tolerance; 'note' and what is random or
    fixed not at all.
    """
    fields = [f for f in ours | theirs if f not in ("format", "id", "note")]
    different = [field for field in fields if ours.get(field) != theirs.get(field)]
    if "augmented" in different and _is_close(ours.get("augmented"), theirs.get("augmented")):
        different.remove("augmented")
    return different


def _is_by_content(manifest: dict[str, Any]) -> bool:
    return any(field.startswith(CONTENTS) for field in manifest)


def _difference(
    field: str, manifest: dict[str, Any], existing: dict[str, Any], changed: Sequence[str]
) -> str:
    """The message about a field that differs between the manifests of this run and of a store.

    Args:
        changed: paths of the image files that have other bytes, as far as known.
    """
    if why := REPLACED_IMAGES.get(field.removesuffix("_without_label")):
        if changed and field.startswith(CONTENTS):
            why = f"{len(changed):,} of them have different bytes ({few(changed)})"
        return (
            f"the images changed since their logits were cached: {why}; use the same images, or "
            "another folder"
        )
    if field == "augmented":
        return (
            "every flag is the same, but the augmented images differ: different pixels, or "
            f"versions ({existing.get('note')}; here {manifest['note']}); use the same images and "
            "versions, or another folder"
        )
    return (
        f"created with {field} {_short(existing.get(field))}, but this run uses "
        f"{_short(manifest.get(field))}; use the same value or another folder"
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache; {} without one. Raises: UserError for another format."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        is_whole = manifest.get("format") != FORMAT or manifest.keys() >= NEEDED
    except (ValueError, AttributeError):  # not JSON, or no dict
        is_whole = False
    if not is_whole:
        raise UserError(
            f"{path}: is incomplete, perhaps cut short; remove this cache and fill it again",
            "cache",
        )
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder}: holds a cache of format {manifest.get('format')}, but this version reads "
            f"and writes format {FORMAT}; pass another folder, which this run then fills",
            "cache",
        )
    return manifest


def _is_close(ours: Any, theirs: Any) -> bool:
    is_alike = isinstance(theirs, list) and len(ours) == len(theirs)
    return is_alike and np.allclose(ours, theirs, rtol=0, atol=SAME_IMAGE)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
