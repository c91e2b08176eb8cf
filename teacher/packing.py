"""A teacher cache in one file: packed for a server, and unpacked once per machine."""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from models.checkpoint import local_file
from utils import UserError, is_url, lock, replacing

FORMAT = 1
CONTENTS = "pack.json"  # the last file of a pack: SHA-256 of each of the others
MEMBER = re.compile(
    r"(manifest|pack)\.json|(view-\d{5,}|val-\w{16})\.(sums|logits)|images-\w+\.npy"
)


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        part = self.file.read(size)
        self.digest.update(part)
        return part


def pack(files: Sequence[Path], destination: Path) -> None:
    """Write files into one tar file, and their SHA-256 after them.

    The same files give the same bytes. A kill leaves nothing under the destination's name.

    Raises: UserError if the file system refuses.
    """
    hashes = {}
    with (
        replacing(destination, "cache") as temporary,
        tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for path in files:
            with open(path, "rb") as file:
                entry, hashed = tarfile.TarInfo(path.name), _Hashed(file)
                entry.size = os.fstat(file.fileno()).st_size
                tar.addfile(entry, hashed)  # type: ignore[arg-type]
            hashes[path.name] = hashed.digest.hexdigest()
        contents = json.dumps({"format": FORMAT, "sha256": hashes}, indent=1).encode()
        entry = tarfile.TarInfo(CONTENTS)
        entry.size = len(contents)
        tar.addfile(entry, io.BytesIO(contents))


def local_cache(path: str) -> Path:
    """The folder of a teacher cache; a pack or its http(s) address is unpacked once per machine.

    It is unpacked below torch's hub folder (TORCH_HOME). Collective on each machine: of several
    processes, one downloads and unpacks, and the others wait.

    Raises: UserError for a pack that cannot be downloaded, or is not whole.
    """
    if not is_url(path) and not os.path.isfile(path):
        if path.endswith(".tar") and not os.path.isdir(path):
            raise UserError(f"{path}: no such file; pass a file that cache.py pack wrote", "cache")
        return Path(path)
    name = path
    if not is_url(path):  # a file may be replaced; an address stands for one pack for ever
        status = os.stat(path)
        name = f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"
    key = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
    folder = Path(torch.hub.get_dir()) / "teacher_caches" / f"{key}-{Path(path).stem}"
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{folder}.lock", "wb") as file:
                lock(file)
                if not folder.exists():
                    _fetch_and_unpack(path, folder)
        except OSError as error:
            raise UserError(f"{path}: cannot be unpacked ({error})", "cache") from error
    return folder


def _fetch_and_unpack(path: str, folder: Path) -> None:
    try:
        file = local_file(path)
    except UserError as error:
        raise UserError(str(error), "cache") from error
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        if problem := _unpack(file, temporary):
            raise UserError(f"{path}: {problem}", "cache")
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_url(path):  # the folder holds all of it, or the next try asks the server again
            os.unlink(file)


def _unpack(pack: str, folder: Path) -> str:
    """Unpack into a folder; returns what is wrong with the pack, '' if nothing is."""
    hashes: dict[str, Any] = {}
    try:
        with tarfile.open(pack, "r:") as tar:
            for entry in tar:
                content = tar.extractfile(entry)
                if content is None or not MEMBER.fullmatch(entry.name):
                    return f"holds {entry.name}, so cache.py pack did not write it; pass a pack"
                hashed = _Hashed(content)
                with open(folder / entry.name, "wb") as file:
                    shutil.copyfileobj(hashed, file, 2**20)
                    os.fsync(file.fileno())
                hashes[entry.name] = hashed.digest.hexdigest()
    except tarfile.TarError as error:
        with open(pack, "rb") as file:
            if file.read(512).lstrip().lower().startswith((b"<!doctype html", b"<html")):
                return "is a web page, not the pack that it links to; pass the address of the pack"
        if not hashes:
            return f"is not a pack of cache.py ({error}); pass a file that cache.py pack wrote"
    if hashes.pop(CONTENTS, None) is None:
        return "was cut short; download or copy the pack again"
    try:
        contents = json.loads((folder / CONTENTS).read_bytes())
        packed, found = contents["sha256"], contents["format"]
    except (ValueError, TypeError, KeyError):
        return f"was damaged: its {CONTENTS} cannot be read; download or copy the pack again"
    (folder / CONTENTS).unlink()
    if found != FORMAT:
        return f"is a pack of format {found}, but this version reads {FORMAT}; pack the cache again"
    if wrong := [name for name in packed | hashes if packed.get(name) != hashes.get(name)]:
        return f"was damaged: {wrong[0]} is not what was packed; download or copy the pack again"
    return ""
