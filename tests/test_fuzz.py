"""Hostile files: an error of one line that names the file, or the right content; nothing else."""

import io
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as save_tensors

from data import pictures
from models.checkpoint import read_checkpoint
from utils import UserError

MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
WEIGHTS = {"model": {"w": torch.arange(50.0), "b": torch.ones(3)}, "epoch": 3, "args": {"lr": 0.1}}


def written(**keywords) -> bytes:
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer, **keywords)
    return buffer.getvalue()


CHECKPOINTS = [written(), written(_use_new_zipfile_serialization=False), pickle.dumps({"model": 1})]


def picture(mode: str, kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


PICTURES = [
    *(picture("RGB", kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")),
    *(picture("L", "PNG"), picture("P", "PNG"), picture("CMYK", "JPEG"), picture("I;16", "PNG")),
]


@st.composite
def damaged(draw, originals: list[bytes]) -> bytes:
    """A file cut short, with bytes changed, with bytes added, or of something else altogether."""
    data = bytearray(draw(st.sampled_from(originals)))
    match draw(st.sampled_from(["cut", "change", "add", "foreign"])):
        case "cut":
            return bytes(data[: draw(st.integers(0, len(data) - 1))])
        case "change":
            for _ in range(draw(st.integers(1, 20))):
                data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
            return bytes(data)
        case "add":
            at = draw(st.integers(0, len(data)))
            return bytes(data[:at] + draw(st.binary(min_size=1, max_size=100)) + data[at:])
        case _:
            return draw(st.binary(max_size=300))


def read_or_refused(data: bytes, name: str, read: Callable[[str], object]) -> object:
    """What `read` makes of the file; None where it refuses it in a line that names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            return read(str(path))
        except UserError as error:
            assert str(path) in str(error) and "Traceback" not in str(error)
            assert len(str(error).splitlines()) <= 2
            return None


@MANY
@given(data=damaged(CHECKPOINTS))
def test_a_damaged_checkpoint_is_refused_by_name_or_read(data):
    def read(path: str) -> None:
        read_checkpoint(path).weights("false")

    read_or_refused(data, "c.pth", read)


@MANY
@given(data=damaged([save_tensors(WEIGHTS["model"])]))
def test_a_damaged_safetensors_file_is_refused_by_name_or_read(data):
    state = read_or_refused(data, "c.safetensors", lambda path: read_checkpoint(path).content)
    assert state is None or all(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow
@MANY
@given(data=damaged(PICTURES))
def test_a_damaged_picture_is_refused_by_name_or_shown(data):
    picture = read_or_refused(data, "p.img", lambda path: pictures.decode(path, path))
    assert picture is None or (picture.ndim == 3 and picture.shape[2] == 3)
