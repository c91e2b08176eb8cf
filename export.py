"""Export the network of a checkpoint, and prove that the file computes what the checkpoint does.

    python export.py student/checkpoint-best.pth --format onnx --out student.onnx

The file is loaded back and compared with the checkpoint's network on validation images, or on noise
where there are none. Where the two differ by more than rounding, nothing is left at --out.
"""

import argparse
import copy
import io
import logging
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.models import save_for_hf
from torch import nn

import arguments
import datasets
import models
import pictures
import utils
from checkpoints import local_file, weight_keys
from datasets import ImageSource, Source
from evaluation import evaluation_args, open_scored
from exported import (
    CARD,
    ONNX_PACKAGES,
    Card,
    Model,
    open_model,
    open_onnx,
    read_network,
    run_network,
)
from flags import ShowDefaults, str2bool
from models.fusion import fuse_layers
from runtime import log
from terminal import table
from transforms import eval_transform
from utils import UserError, first_line, name_flags

CPU = torch.device("cpu")
OPSET = 18  # of ONNX; the one that torch's exporter writes without converting
ENDING = {"onnx": ".onnx", "pt2": ".pt2"}
# Largest difference from the checkpoint's outputs, as a part of the largest of these.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
LEAST_AGREEMENT = 95.0  # percent of images that INT8 has to put into the same class
CALIBRATION = 256  # training images that INT8 takes the ranges of activations from
NOISE = 32  # images
BATCH = 32
LATENCIES, ROUNDS = 30, 5  # of which the median is told; from network to network


def get_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = argparse.ArgumentParser(
        "export.py",
        usage="python export.py CHECKPOINT --format timm|onnx|pt2 --out PATH [--flag value ...]",
        description=__doc__.partition("\n")[0],
        formatter_class=ShowDefaults,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", help="a checkpoint that main.py wrote")
    add(
        "--format",
        required=True,
        choices=("timm", "onnx", "pt2"),
        help="timm: a folder for timm.create_model('local-dir:PATH', pretrained=True); onnx: a "
        "file for onnxruntime and others; pt2: a file for torch.export.load",
    )
    add("--out", required=True, type=Path, help="the file or folder to write; must not exist")
    add(
        "--use_ema",
        default="auto",
        choices=("auto", "true", "false"),
        help="which weights to export: the better ones by their recorded accuracy, else the EMA "
        "(auto), the EMA (true) or the raw weights (false)",
    )
    add(
        "--with_preprocessing",
        type=str2bool,
        nargs="?",
        const=True,
        default=False,
        help="put normalisation and softmax into the file: it takes RGB pixels (B, H, W, 3) uint8 "
        "and returns probabilities; onnx and pt2",
    )
    add(
        "--half",
        type=str2bool,
        nargs="?",
        const=True,
        default=False,
        help="store the weights in float16, and compute in it (onnx, pt2); input and output stay "
        "float32",
    )
    add(
        "--int8",
        type=str2bool,
        nargs="?",
        const=True,
        default=False,
        help="quantize weights and activations to 8 bits with onnxruntime, calibrated on training "
        "images; onnx",
    )
    add("--data_set", help="data set to compare on (default: that of the checkpoint)")
    add("--data_path", help="folder of the images to compare on (default: that of the checkpoint)")
    add("--eval_data_path", help="folder of the validation images, as for main.py (default: none)")
    add(
        "--compare_images",
        type=int,
        default=512,
        help="most validation images to compare on, spread evenly over all of them",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export a checkpoint; returns the exit code."""
    args = get_parser().parse_args(argv)
    try:
        export(args)
    except UserError as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of `export.py … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell says of SIGPIPE
    except KeyboardInterrupt:
        print("export.py: stopped; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def export(args: argparse.Namespace) -> None:
    """Write an export to a temporary name, compare it, and give it its name.

    Raises: UserError for whatever the user can correct, and where the export differs.
    """
    check_flags(args)
    with name_flags(use_ema="--use_ema"):
        network, card, checkpoint = read_network(args.checkpoint, args.use_ema)
    check_architecture(args, card)
    images, data = open_images(args, checkpoint, card)
    _, reason = weight_keys(checkpoint, args.use_ema)
    log(
        f"{args.checkpoint}: {card.architecture}, {len(card.classes)} classes, {card.input_size} "
        f"pixels, {card.weights} weights{reason}"
    )
    log(f"Compared on {images.words}")
    precision = "int8" if args.int8 else "float16" if args.half else "float32"
    card = replace(card, dtype=precision, with_preprocessing=args.with_preprocessing)
    with temporary_folder(args.out) as folder:
        path = folder / args.out.name
        if args.format == "timm":
            write_timm(network, card, path)
        else:
            # INT8 begins with a float32 file.
            precise = replace(card, dtype="float32") if args.int8 else card
            write_program(network, precise, path)
        rows = []
        checked = run_network(network, replace(card, with_preprocessing=False), CPU, "checkpoint")
        if args.int8:
            rows.append(Row("float32 .onnx", open_onnx(str(path), CPU), size_of(path)))
            log(f"INT8 is calibrated on up to {CALIBRATION} training images")
            path = quantize(path, card, calibration_batches(data, card))
        exported = open_model(str(path), CPU)
        check_card(exported.card, card)
        file = Path(local_file(args.checkpoint))
        rows.insert(0, Row(f"checkpoint, {card.weights}", checked, size_of(file)))
        rows.append(Row(args.out.name, exported, size_of(path)))
        compare(rows, images)
        log("\n".join(table([HEADS, *(row.cells for row in rows)])))
        log(f"Latency: median of {LATENCIES} runs on {torch.get_num_threads()} CPU thread(s)")
        for row in rows[1:-1]:
            check_difference(row, "float32", args.out, images)
        check_difference(rows[-1], card.dtype, args.out, images)
        publish(path, args.out, "" if args.format == "timm" else card.to_json())
    if args.format == "timm":
        log(f"Wrote {args.out}: timm.create_model('local-dir:{args.out}', pretrained=True)")
    else:
        kind = f"ONNX opset {OPSET}" if args.format == "onnx" else "torch.export"
        log(f"Wrote {args.out} ({kind}, any batch size) and {sidecar(args.out)}")


# -------------------------------------------------------------------------- before the export


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that cannot work, before anything is read."""
    if args.compare_images < 1:
        raise UserError(f"--compare_images {args.compare_images}: must be at least 1")
    if args.format == "timm":
        for flag in ("with_preprocessing", "int8"):
            if getattr(args, flag):
                raise UserError(
                    f"--{flag} true: a folder of timm holds only the network; pass --format onnx"
                    f"{' or pt2' if flag == 'with_preprocessing' else ''}, or remove the flag"
                )
    elif args.out.suffix != ENDING[args.format]:
        raise UserError(
            f"--out {args.out}: must end in {ENDING[args.format]} for --format {args.format}, by "
            "which predict.py knows the file"
        )
    if args.int8 and args.format != "onnx":
        raise UserError("--int8 true: onnxruntime does the quantization; pass --format onnx")
    if args.int8 and args.half:
        raise UserError("--int8 true --half true: pass one of them")
    for path in (args.out, sidecar(args.out)) if args.format != "timm" else (args.out,):
        if os.path.lexists(path):
            raise UserError(f"--out {args.out}: {path} exists; remove it, or pass another name")
    if args.format == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"--format onnx: needs more packages ({error}); {ONNX_PACKAGES}"
            ) from error


def check_architecture(args: argparse.Namespace, card: Card) -> None:
    """Raise UserError for --format timm with an architecture that timm itself does not have."""
    if args.format != "timm" or models.is_in_timm(card.architecture):
        return
    is_own = arguments.is_own_module(card.architecture)
    where = "a network of your own" if is_own else "an architecture of this repository"
    raise UserError(
        f"--format timm: {card.architecture} is {where}, which timm alone cannot build; pass "
        "--format onnx or pt2, whose files hold the network itself"
    )


def sidecar(out: Path) -> Path:
    """The file beside an export that says its classes and its input."""
    return out.with_name(f"{out.name}.json")


# ------------------------------------------------------------------------- images to compare on


class Images(NamedTuple):
    """What both networks are shown.

    Attributes:
        pixels: (N, H, W, 3) uint8, as the evaluation crops them.
        targets: (N,) classes, or None for noise.
        positions: see evaluation.Scored.
        words: what they are.
    """

    pixels: torch.Tensor
    targets: torch.Tensor | None
    positions: list[int] | None
    words: str


def open_images(
    args: argparse.Namespace, checkpoint: Any, card: Card
) -> tuple[Images, argparse.Namespace]:
    """Validation images as an evaluation shows them, or noise where there are none.

    Returns: the images, and the arguments that opened them.
    Raises: UserError for data that flags name, and for --int8 without any.
    """
    names = ("data_set", "data_path", "eval_data_path")
    given = [w for n in names if getattr(args, n) for w in (f"--{n}", getattr(args, n))]
    try:
        data = evaluation_args(checkpoint, args.checkpoint, given)
        scored = open_scored(data, checkpoint)
        pixels, targets = load_pixels(scored.images, args.compare_images, card)
    except UserError as error:
        if given or args.int8:
            raise
        log(f"No validation images ({error}); pass --data_path to compare on yours")
        shape = (NOISE, card.input_size, card.input_size, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return Images(torch.from_numpy(noise), None, None, f"{NOISE} images of noise"), args
    words = f"{len(pixels)} of {len(scored.images)} validation images"
    if len(pixels) == len(scored.images):
        words = f"all {len(pixels)} validation images"
    return Images(pixels, targets, scored.positions, words), data


def load_pixels(source: Source, most: int, card: Card) -> tuple[torch.Tensor, torch.Tensor]:
    """Images spread evenly over a source, cropped: (N, H, W, 3) uint8, and their targets (N,)."""
    transform = eval_transform(card.config)
    if isinstance(source, ImageSource):
        chosen = datasets.evenly(len(source), most)
        found = [(source.load(i), source.targets[i]) for i in chosen.tolist()]
    else:
        source.stream.transform = pictures.decode_of_stream
        found = [pair for pair, _ in zip(source.stream, range(most), strict=False)]
    pixels = np.stack([transform(image)[0] for image, _ in found])
    return torch.from_numpy(pixels), torch.tensor([int(target) for _, target in found])


def calibration_batches(data: argparse.Namespace, card: Card) -> Iterator[torch.Tensor]:
    """Pixels (1, H, W, 3) of training images, with which INT8 chooses its ranges.

    One at a time, since onnxruntime keeps every activation: a ResNet-50 at 224 pixels took 1.5 GB
    and 0.25 s per image, and in batches of 24 the same time and 3.4 GB.
    """
    train_only = vars(data) | {"disable_eval": True, "teacher_eval": False}
    train, _ = datasets.open_splits(argparse.Namespace(**train_only))
    return iter(load_pixels(train, CALIBRATION, card)[0].split(1))


# ------------------------------------------------------------------------------------ writing


@contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """A folder beside --out, so that what is in it can be renamed; removed at the end."""
    with name_flags(folder="--out"):
        utils.make_folder(out.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def saving(path: Path, action: str = "written") -> Iterator[None]:
    """Raise UserError where a library cannot write a file; each has errors of its own for it."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(path.parent).free / 1e6
        remedy = "free some space, or pass another folder"
        raise UserError(
            f"--out: {path.name} could not be {action} ({first_line(error)}; {free:.0f} MB are "
            f"free); {remedy if action == 'written' or free < 100 else 'leave --int8 out'}"
        ) from error


def publish(path: Path, out: Path, card: str) -> None:
    """Give a finished export its name, and write its card beside it unless that is ''."""
    if os.path.lexists(out):
        raise UserError(f"--out {out}: another program wrote it meanwhile; pass another name")
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


def write_timm(network: nn.Module, card: Card, folder: Path) -> None:
    """config.json and model.safetensors, as timm uploads them to the hub."""
    if card.dtype == "float16":
        network = copy.deepcopy(network).half()
    config = card.config | {"input_size": (3, card.input_size, card.input_size)}
    # timm would keep the name and the licence of the weights that it has of this architecture.
    told = {"label_names": card.classes, "pretrained_cfg": {"tag": "", "license": None}}
    with saving(folder):
        save_for_hf(network, str(folder), told, safe_serialization=True, data_config=config)


class Preprocessed(nn.Module):
    """A network that takes pixels and returns probabilities."""

    def __init__(self, network: nn.Module, card: Card) -> None:
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


def write_program(network: nn.Module, card: Card, path: Path) -> None:
    """An .onnx or .pt2 file for any batch size, with BatchNorms fused and the card inside.

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
        fused.to(memory_format=torch.channels_last)  # half the time of a ResNet on the CPU
    batch = torch.export.Dim("batch", min=1)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(fused.eval(), (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # of any layer of the network, or of the tracer
        remedy = "keep what depends on the images' values or number out of its forward method"
        if not arguments.is_own_module(card.architecture):
            remedy = "pass --format timm"
        raise UserError(
            f"--format {path.suffix[1:]}: torch.export cannot trace {card.architecture} for any "
            f"batch size ({explain(error)}); {remedy}"
        ) from error
    if path.suffix == ".pt2":
        content = io.BytesIO()  # torch's own writer ends the process where a disk is full
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
                opset_version=OPSET,
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
    converted.model.metadata_props[CARD] = card.to_json()
    with saving(path):
        converted.save(path, external_data=False)


def input_name(card: Card) -> str:
    """What an ONNX file calls its input."""
    return "pixels" if card.with_preprocessing else "images"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the pages that exporters print, most of all on errors, off the terminal."""
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
    told = [first_line(error)]
    if found := re.search(r"(?:OpOverload\(op='|torch\.ops\.)(\w+[.:]+\w+)", "\n".join(texts)):
        told.insert(0, f"operator {found[1]}")
    elif places := re.findall(r'File "(.+)", line (\d+), in forward', "\n".join(texts)):
        told.insert(0, "{}, line {}".format(*places[-1]))
    return ": ".join(told)


class Calibration:
    """Calibration images as onnxruntime asks for them."""

    def __init__(self, model: Model, batches: Iterator[torch.Tensor]) -> None:
        self.model, self.batches = model, batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The input of one batch by its name; None after the last one."""
        pixels = next(self.batches, None)
        if pixels is None:
            return None
        name = input_name(self.model.card)
        return {name: np.ascontiguousarray(self.model.prepare(pixels).numpy())}


def quantize(path: Path, card: Card, batches: Iterator[torch.Tensor]) -> Path:
    """A float32 .onnx file -> one of the same name, in a folder beside it, that computes in INT8.

    onnxruntime's static quantization of convolutions and matrix products, weights per channel.
    Everything else stays in float32: 8 bits of additions and of softmax cost a ViT accuracy, and
    saved no time (docs/export.md). Weights use 7 of their 8 bits, since CPUs without VNNI would
    saturate with more, so that the file would compute something else there than it does here.

    Args:
        batches: pixels (1, H, W, 3) uint8, from which the ranges of activations are taken.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_static

    prepared, quantized = path.with_name("prepared.onnx"), path.parent / "int8" / path.name
    quantized.parent.mkdir()
    reader = Calibration(open_onnx(str(path), CPU), batches)
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
        model = onnx.load(quantized)
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {CARD: card.to_json()})
        onnx.save(model, quantized)
    return quantized


# ------------------------------------------------------------------------------- loading back


@dataclass
class Row:
    """A network and how it does, as the table tells it."""

    name: str
    model: Model
    megabytes: float
    accuracy: float | None = None  # percent
    agreement: float | None = None  # percent of images in the class that the checkpoint gives
    difference: float | None = None  # from the checkpoint, as a part of its largest output
    latency: float = 0.0  # milliseconds at batch size 1

    @property
    def cells(self) -> list[str]:
        """What the table shows."""
        of_100 = ["" if v is None else f"{v:.2f}" for v in (self.accuracy, self.agreement)]
        part = "" if self.difference is None else f"{self.difference:.1e}"
        return [self.name, *of_100, part, f"{self.latency:.2f}", f"{self.megabytes:.2f}"]


HEADS = ["", "accuracy %", "same class %", "difference", "ms, batch 1", "MB"]


def size_of(path: Path) -> float:
    """The megabytes (10^6 bytes) of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def check_card(found: Card, wanted: Card) -> None:
    """Raise UserError where a file does not say what was written into it."""
    names = ["classes", *wanted.config]
    if other := [name for name in names if getattr(found, name) != getattr(wanted, name)]:
        raise UserError(
            f"the file says {other[0]} {getattr(found, other[0])}, but the checkpoint "
            f"{getattr(wanted, other[0])}; nothing was written. Please report this"
        )


def compare(rows: Sequence[Row], images: Images) -> None:
    """Fill in what each network computes of the images, next to the first one, and how fast."""
    reference: torch.Tensor | None = None
    for row in rows:
        # The first image by itself: the batch size is free.
        parts = [images.pixels[:1], *images.pixels[1:].split(BATCH)]
        outputs = torch.cat([row.model.outputs(part) for part in parts if len(part)])  # (N, C)
        if reference is None:
            reference = outputs
            if not reference.isfinite().all():
                raise UserError(
                    f"{row.name}: the network's logits are not finite; its weights hold NaN or "
                    "Inf. Pass another checkpoint of the run"
                )
        else:
            wanted = reference.softmax(-1) if row.model.card.with_preprocessing else reference
            row.difference = float((outputs - wanted).abs().max() / wanted.abs().max())
            same = outputs.argmax(dim=1) == reference.argmax(dim=1)
            row.agreement = 100 * same.double().mean().item()
        if images.targets is not None:
            known = outputs if images.positions is None else outputs[:, images.positions]
            row.accuracy = 100 * (known.argmax(dim=1) == images.targets).double().mean().item()
    one = [row.model.prepare(images.pixels[:1]) for row in rows]
    times: list[list[float]] = [[] for _ in rows]
    with torch.inference_mode():
        for _ in range(ROUNDS):  # in turn, so that a busy machine slows all of them
            for row, image, found in zip(rows, one, times, strict=True):
                row.model.run(image)  # the first run waits for memory
                for _ in range(LATENCIES // ROUNDS):
                    start = time.perf_counter()
                    row.model.run(image)
                    found.append(1000 * (time.perf_counter() - start))
    for row, found in zip(rows, times, strict=True):
        row.latency = statistics.median(found)


def check_difference(row: Row, dtype: str, out: Path, images: Images) -> None:
    """Raise UserError where an export is not what the checkpoint is."""
    assert row.difference is not None and row.agreement is not None
    if dtype == "int8":
        if row.agreement >= LEAST_AGREEMENT:
            return
        raise UserError(
            f"--int8 true: {row.agreement:.2f} % of {images.words} get the class that the "
            f"checkpoint gives, and {LEAST_AGREEMENT:g} % are needed; nothing was written. Remove "
            "the flag, or pass --half true"
        )
    if row.difference <= TOLERANCE[dtype]:  # false for NaN as well
        return
    remedy = "--half false" if dtype == "float16" else "another --format"
    raise UserError(
        f"--out {out}: the export differs from the checkpoint by {row.difference:.1e} of the "
        f"largest output on {images.words}, and {TOLERANCE[dtype]:.0e} are allowed; nothing was "
        f"written. Pass {remedy}"
    )


if __name__ == "__main__":
    # As for Ctrl-C, what was written so far is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
