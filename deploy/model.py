"""A trained network ready to use: from a checkpoint, timm's folder, an .onnx or a .pt2 file."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import timm
import torch
from torch import nn
from torch.export.passes import move_to_device_pass

import models
from data.transforms import HostBatch, ToNetwork
from models.calibration import Tempered, read_temperature
from models.checkpoint import Checkpoint, read_checkpoint
from models.weights import load_network
from runtime.device import channels_last, send
from utils import UserError, few, first_line

CPU = torch.device("cpu")
CARD = "card.json"  # the name of the card inside .onnx and .pt2 files
ONNX_PACKAGES = "pip install onnx onnxscript onnxruntime"


@dataclass
class ModelCard:
    """What one must know about a network to use it; written beside and into every export."""

    architecture: str  # a name of timm or of models/
    classes: list[str]  # names, in the order of the outputs
    # From an image to pixels, see datasets.data_config.
    input_size: int
    mean: list[float]
    std: list[float]
    crop_pct: float
    crop_mode: str
    interpolation: str
    weights: str = "raw"  # or 'EMA'
    dtype: str = "float32"  # of the weights; or float16, int8
    # Whether the network takes pixels (B, H, W, 3) uint8 and returns probabilities, instead of
    # normalized images (B, 3, H, W) and logits.
    with_preprocessing: bool = False
    temperature: float = 1.0  # divides the logits in the network, see models/calibration.py

    @property
    def config(self) -> dict[str, Any]:
        """The data configuration, as transforms.eval_transform and ToNetwork take it."""
        names = "input_size mean std crop_pct crop_mode interpolation".split()
        return {name: getattr(self, name) for name in names}

    @property
    def output(self) -> str:
        """What the network returns."""
        return "probabilities" if self.with_preprocessing else "logits"

    @property
    def preprocessing(self) -> str:
        """How an image file becomes RGB pixels, in words (data/pictures.py, eval_transform)."""
        size, resized = self.input_size, int(self.input_size / self.crop_pct)
        sides = f"the shorter side has {resized} pixels"
        if self.crop_mode == "squash":
            sides = f"both sides have {resized} pixels"
        return (
            "turned upright (EXIF orientation), transparency on white, 16-bit values divided by "
            f"257, RGB; resized so that {sides} ({self.interpolation}, antialiased); the central "
            f"{size} x {size} pixels"
        )

    def to_json(self) -> str:
        """The card, with its preprocessing, input and output in words."""
        size = self.input_size
        input_ = f"normalized images (batch, 3, {size}, {size}) float32: (RGB / 255 - mean) / std"
        if self.with_preprocessing:
            input_ = f"RGB pixels (batch, {size}, {size}, 3) uint8"
        words = {"preprocessing": self.preprocessing, "input": input_}
        words["output"] = f"{self.output} (batch, {len(self.classes)}) float32"
        text = json.dumps(asdict(self) | words, indent=2, ensure_ascii=False)
        # A name need not be UTF-8; its other bytes become escapes of JSON.
        return text.encode(errors="backslashreplace").decode()

    @classmethod
    def from_json(cls, text: str, source: object) -> "ModelCard":
        """Read a card. Raises: UserError for text that is no card."""
        try:
            values = json.loads(text)
            return cls(**{field.name: values[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{source}: does not say which classes and which input this network has "
                f"({type(error).__name__}: {first_line(error)}); export the checkpoint again with "
                "export.py",
            ) from error


@dataclass
class Model:
    """A network that is ready to use, wherever it came from."""

    card: ModelCard
    # Input on `device`, see ModelCard.with_preprocessing -> output (B, C).
    run: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device

    def __post_init__(self) -> None:
        self.to_network = ToNetwork(self.card.config, self.device)

    def prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, H, W, 3) uint8 -> what `run` takes."""
        if self.card.with_preprocessing:
            return send(pixels, self.device)
        no_boxes = torch.empty(0, 5, dtype=torch.int64)
        batch = HostBatch(pixels, torch.empty(0, dtype=torch.int64), no_boxes, torch.empty(0))
        return self.to_network(batch)

    def outputs(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, H, W, 3) uint8 -> logits or probabilities (B, C) float32 on the CPU."""
        with torch.inference_mode():
            return self.run(self.prepare(pixels)).float().cpu()

    def probabilities(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, H, W, 3) uint8 -> (B, C) float32 on the CPU"""
        outputs = self.outputs(pixels)
        return outputs if self.card.with_preprocessing else outputs.softmax(dim=-1)


def network_from_checkpoint(path: str, use_ema: str) -> tuple[nn.Module, ModelCard, Checkpoint]:
    """The network of a checkpoint of main.py in eval mode on the CPU, its card, and the checkpoint.

    The logits of weights that were calibrated (`--calibrate true`) are divided by the temperature.

    Args:
        use_ema: 'true', 'false' or 'auto', see Checkpoint.weights.
    Returns: for images (B, 3, H, W) of the card's input_size -> logits (B, C); the card; the file.
    Raises: UserError for a file that is not a checkpoint of main.py, or has no such weights.
    """
    checkpoint = read_checkpoint(path)
    classes, data = checkpoint.classes, checkpoint.data
    if not checkpoint.run_args or not classes:
        raise UserError(
            f"{path}: does not say which classes and which input its network has (its keys: "
            f"{few(checkpoint.content)}); pass a checkpoint that main.py wrote into --output_dir",
            "checkpoint",
        )
    architecture, size = checkpoint.run_args["model"], data["input_size"]
    network = models.create_model(architecture, len(classes), size)
    weights = load_network(network, checkpoint, use_ema)
    if (temperature := read_temperature(weights)) != 1:
        network = Tempered(network, temperature)
    card = ModelCard(
        architecture,
        classes,
        size,
        data["mean"],
        data["std"],
        data["crop_pct"],
        data["crop_mode"],
        data.get("interpolation", "bicubic"),  # which 0.1.0 did not record
        weights="EMA" if weights.is_ema else "raw",
        temperature=temperature,
    )
    return network.eval(), card, checkpoint


def run_network(network: nn.Module, card: ModelCard, device: torch.device) -> Model:
    """A network in this process, run as an evaluation runs it."""
    return Model(card, channels_last(network.eval().to(device)), device)


def open_model(path: str, device: torch.device, use_ema: str = "auto") -> Model:
    """A model of any of the four kinds, ready to use.

    Raises: UserError for a file or folder of no such kind, or that cannot be read.
    """
    if os.path.isdir(path):
        return open_timm(path, device)
    if not path.endswith((".onnx", ".pt2")):
        network, card, _ = network_from_checkpoint(path, use_ema)
        return run_network(network, card, device)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; pass a model that export.py wrote")
    return open_onnx(path, device) if path.endswith(".onnx") else open_pt2(path, device)


@contextmanager
def _loading(path: str, library: str, what: str = "file") -> Iterator[None]:
    """Raise UserError for whatever a library raises about a damaged file, which may be anything."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path}: {library} cannot load this {what} ({type(error).__name__}: "
            f"{first_line(error)}); export the checkpoint again",
        ) from error


def open_timm(folder: str, device: torch.device) -> Model:
    """A folder with config.json and model.safetensors, loaded by timm.

    Raises: UserError for a folder that timm cannot load or that names no classes.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder}: holds no config.json; pass a folder that export.py --format timm wrote, a "
            "checkpoint, an .onnx or a .pt2 file",
        )
    with _loading(folder, "timm", "folder"):
        config = json.loads(file.read_text(encoding="utf-8"))
        network: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    classes, architecture = config.get("label_names"), config.get("architecture")
    if not isinstance(classes, list) or len(classes) != network.num_classes:
        raise UserError(
            f"{file}: does not name the {network.num_classes} classes (label_names); export the "
            "checkpoint with export.py, which writes them",
        )
    data = timm.data.resolve_model_data_config(network)
    fed = {name: data[name] for name in ("crop_pct", "crop_mode", "interpolation")}
    fed |= {"mean": list(data["mean"]), "std": list(data["std"])}
    temperature = config.get("temperature", 1.0)
    card = ModelCard(architecture, classes, data["input_size"][-1], **fed, temperature=temperature)
    return run_network(network, card, device)


def open_pt2(path: str, device: torch.device) -> Model:
    """A program of torch.export. Loading runs whatever code the file's author put in (pickle).

    Raises: UserError for a file that torch cannot load, or that has no card.
    """
    inside = {CARD: ""}
    with _loading(path, "torch.export"):
        program = torch.export.load(path, extra_files=inside)
        if device.type != "cpu":
            program = move_to_device_pass(program, device)
        network = program.module()
    return Model(ModelCard.from_json(inside[CARD] or "{}", path), network, device)


def missing_onnx_packages() -> list[str]:
    """The packages without which ONNX files cannot be written and compared, if they are missing."""
    return [name for name in ONNX_PACKAGES.split()[2:] if find_spec(name) is None]


def import_onnxruntime() -> ModuleType:
    """onnxruntime. Raises: UserError if it is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f".onnx files need onnxruntime ({error}); pip install onnxruntime"
        ) from error
    return onnxruntime


def open_onnx(path: str, device: torch.device) -> Model:
    """An ONNX file, run by onnxruntime with as many threads as torch.

    Raises: UserError for a file that onnxruntime cannot load, that has no card, or a device for
        which this onnxruntime is not built.
    """
    onnxruntime = import_onnxruntime()
    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    provider = providers.get(device.type)
    if provider not in onnxruntime.get_available_providers():
        raise UserError(
            f"{device.type}: this onnxruntime has no provider for it (only "
            f"{few(onnxruntime.get_available_providers())}); pass cpu, or pip install "
            "onnxruntime-gpu for CUDA",
            "device",
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin while they wait for work slow torch and whatever else uses these cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only: the result is compared, not its fused operators
    with _loading(path, "onnxruntime"):
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    if provider not in session.get_providers():  # onnxruntime falls back to the CPU by itself
        raise UserError(
            f"{device.type}: onnxruntime cannot start {provider}; pass cpu, or install the CUDA "
            "that this onnxruntime was built for",
            "device",
        )
    card = session.get_modelmeta().custom_metadata_map.get(CARD, "{}")
    name = session.get_inputs()[0].name

    def run(images: torch.Tensor) -> torch.Tensor:
        array = np.ascontiguousarray(images.cpu().numpy())
        return torch.from_numpy(session.run(None, {name: array})[0])

    return Model(ModelCard.from_json(card, path), run, device)
