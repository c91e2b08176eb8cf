"""Writes a network as timm's folder, as ONNX, or as a program of torch.export."""

import copy
import io
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from timm.models import save_for_hf
from torch import nn

from arguments.derived import is_own_module
from deploy import hub
from deploy.model import CARD, CPU, ModelCard, open_onnx
from models.calibration import Tempered
from models.fusion import fuse_layers
from runtime.device import channels_last
from utils import UserError, first_line, flags_for, make_folder, remedy_of

OPSET = 18  # of ONNX: the oldest that torch writes, and the default


def sidecar(out: Path) -> Path:
    """The path of the card beside an export."""
    return out.with_name(f"{out.name}.json")


@contextmanager
def saving(path: Path, action: str = "written") -> Iterator[None]:
    """Turn whatever a library raises while it writes a file into a UserError."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(path.parent).free / 1e6
        remedy = remedy_of(error)
        raise UserError(
            f"--out: {path.name} could not be {action} ({first_line(error)}; {free:.0f} MB are "
            f"free); {remedy if action == 'written' or free < 100 else 'leave --int8 out'}"
        ) from error


def temporary_folder(out: Path) -> tempfile.TemporaryDirectory:
    """A folder beside --out, so that its content can be renamed; removed at the end."""
    with flags_for(folder="--out"):
        make_folder(out.parent)
    return tempfile.TemporaryDirectory(None, ".export.", out.parent, ignore_cleanup_errors=True)


def publish(path: Path, out: Path, card: str) -> None:
    """Rename a finished export to --out, and write its card beside it unless the card is ''."""
    if os.path.lexists(out):
        raise UserError(f"--out {out}: another program has just written it; pass another name")
    with saving(out):
        if card:
            sidecar(path).write_text(card + "\n", encoding="utf-8")
            os.rename(sidecar(path), sidecar(out))
        try:
            os.rename(path, out)
        except OSError:
            if card:
                sidecar(out).unlink()
            raise


def write_timm(
    network: nn.Module, card: ModelCard, folder: Path, accuracy: float | None = None
) -> None:
    """Write config.json and model.safetensors, as timm uploads them to the hub, and README.md.

    Args:
        accuracy: see hub.readme.
    """
    if isinstance(network, Tempered):
        network = network.folded()
    if card.dtype == "float16":
        network = copy.deepcopy(network).half()
    config = card.config | {"input_size": (3, card.input_size, card.input_size)}
    # Without these, timm names its own weights for this architecture, and their license.
    extra: dict[str, Any] = {"pretrained_cfg": {"tag": "", "license": None}}
    extra |= {"label_names": card.classes, "temperature": card.temperature}
    extra["preprocessing"] = card.preprocessing
    with saving(folder):
        save_for_hf(network, str(folder), extra, safe_serialization=True, data_config=config)
        # The number of classes stands in the file already, and transformers' TimmWrapper passes
        # both to timm.create_model, which takes it once.
        file = folder / "config.json"
        content = json.loads(file.read_text("utf-8"))
        content.get("model_args", {}).pop("num_classes", None)
        file.write_text(json.dumps(content, indent=2), "utf-8")
        readme = hub.readme(card, accuracy)
        (folder / "README.md").write_text(readme, "utf-8", "backslashreplace")


class Preprocessed(nn.Module):
    """A network that takes pixels and returns probabilities."""

    def __init__(self, network: nn.Module, card: ModelCard) -> None:
        super().__init__()
        self.network = network
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        mean, std = torch.tensor(card.mean), torch.tensor(card.std)
        # The same arithmetic as in transforms.ToNetwork.
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, C)"""
        images = torch.addcmul(self.shift, pixels.float(), self.scale)
        return self.network(images.permute(0, 3, 1, 2)).softmax(dim=-1)


class Half(nn.Module):
    """A network that computes in float16 between float32 input and output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, C)"""
        return self.network(images.half()).float()


def write_program(network: nn.Module, card: ModelCard, path: Path, opset: int = OPSET) -> None:
    """Write an .onnx or .pt2 file for any batch size, with BatchNorms fused and the card inside.

    Raises: UserError for a network that cannot be traced or converted.
    """
    size = card.input_size
    fused = fuse_layers(copy.deepcopy(network), size)
    if card.dtype == "float16":
        fused = Half(fused)
    example = torch.zeros(2, 3, size, size)
    if card.with_preprocessing:
        fused = Preprocessed(fused, card)
        example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    if path.suffix == ".pt2":
        channels_last(fused)  # half the time of a ResNet on the CPU
    batch = torch.export.Dim("batch", min=1)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(fused.eval(), (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # from any layer of the network, or from the tracer
        remedy = "let no branch of its forward method depend on the values or number of images"
        if not is_own_module(card.architecture):
            remedy = "pass --format timm"
        raise UserError(
            f"--format {path.suffix[1:]}: torch.export cannot trace {card.architecture} for any "
            f"batch size ({explain(error)}); {remedy}"
        ) from error
    if path.suffix == ".pt2":
        content = io.BytesIO()  # torch's own writer kills the process if the disk is full
        with quiet():
            torch.export.save(program, content, extra_files={CARD: card.to_json()})
        with saving(path):
            path.write_bytes(content.getbuffer())
        return
    try:
        with quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: "batch"},),
                input_names=[input_name(card)],
                output_names=[card.output],
                verbose=False,
            )
    except Exception as error:
        raise UserError(
            f"--format onnx: {card.architecture} cannot be written as ONNX ({explain(error)}); "
            "pass --format pt2"
        ) from error
    assert converted is not None
    if converted.model.opset_imports[""] != opset:  # torch goes on with a log line
        raise UserError(
            f"--opset {opset}: torch cannot convert {card.architecture} to this version; pass a "
            "lower one"
        )
    converted.model.metadata_props[CARD] = card.to_json()
    with saving(path):
        converted.save(path, external_data=False)


def input_name(card: ModelCard) -> str:
    """The name of an ONNX file's input."""
    return "pixels" if card.with_preprocessing else "images"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the pages that exporters print, above all on errors, off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def explain(error: BaseException) -> str:
    """The operator or the line of code that an exporter's error names, and its first cause."""
    texts = [str(error)]
    while cause := error.__cause__ or error.__context__:
        error = cause
        texts.append(str(error))
    parts = [first_line(error)]
    if operator := re.search(r"(?:OpOverload\(op='|torch\.ops\.)(\w+[.:]+\w+)", "\n".join(texts)):
        parts.insert(0, f"operator {operator[1]}")
    elif places := re.findall(r'File "(.+)", line (\d+), in forward', "\n".join(texts)):
        parts.insert(0, "{}, line {}".format(*places[-1]))
    return ": ".join(parts)


def quantize(path: Path, card: ModelCard, batches: Iterator[torch.Tensor]) -> Path:
    """Quantize a float32 .onnx file to INT8.

    onnxruntime's static quantization of convolutions and matrix products, weights per channel.
    Everything else stays in float32: 8-bit additions and softmax cost a ViT accuracy and saved no
    time (docs/export.md). Weights use 7 of 8 bits, since CPUs without VNNI saturate with 8: the
    file would compute something else there than what was compared here.

    Args:
        batches: pixels (1, H, W, 3) uint8, from which the ranges of activations are taken.
    Returns: the path of the INT8 file, of the same name in a folder beside the float32 file.
    Raises: UserError if onnxruntime cannot quantize or the file cannot be written.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_static

    prepared, quantized = path.with_name("prepared.onnx"), path.parent / "int8" / path.name
    quantized.parent.mkdir()
    model = open_onnx(str(path), CPU)
    name, arrays = input_name(model.card), (model.prepare(batch).numpy() for batch in batches)
    inputs = ({name: np.ascontiguousarray(array)} for array in arrays)
    reader = SimpleNamespace(get_next=lambda: next(inputs, None))  # a CalibrationDataReader
    with quiet(), saving(quantized, "quantized"):
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantized,
            reader,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        written = onnx.load(quantized)
        del written.metadata_props[:]
        onnx.helper.set_model_props(written, {CARD: card.to_json()})
        onnx.save(written, quantized)
    return quantized
