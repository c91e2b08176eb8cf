"""Export the network of a checkpoint, and prove that the file computes what the checkpoint does.

    python export.py student/checkpoint-best.pth --format onnx --out student.onnx

The file is loaded back and compared with the checkpoint's network on validation images, or on noise
if there are none. If the two differ by more than rounding, nothing is left at --out.
"""

import utils

utils.let_threads_sleep()  # before torch is imported

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import datasets
import models
from arguments.derived import is_own_module
from arguments.kinds import script_parser, whole
from data import pictures
from data.sources import ImageSource, Source, evenly
from data.transforms import eval_transform
from deploy import comparison, hub, model, writers
from deploy.comparison import Images, Row, size_of
from deploy.model import CPU, ModelCard, open_model, open_onnx, run_network
from evaluation import evaluation_args, open_scored
from models.checkpoint import Checkpoint, local_file
from reporting.tables import table
from runtime.distributed import log
from utils import UserError, exit_code, few, flags_for

ENDING = {"onnx": ".onnx", "pt2": ".pt2"}
CALIBRATION = 256  # training images that INT8 takes the ranges of activations from
NOISE = 32  # images


def get_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    usage = "CHECKPOINT --format timm|onnx|pt2 --out PATH [--flag value ...]"
    parser, switch = script_parser("export.py", usage, __doc__)
    add = parser.add_argument
    # fmt: off
    add("checkpoint", help="a checkpoint that main.py wrote")
    add("--format", required=True, choices=("timm", "onnx", "pt2"), help=
        "output format: a folder for timm.create_model('local-dir:PATH', pretrained=True) (timm), "
        "a file for onnxruntime and others (onnx) or for torch.export.load (pt2)")
    add("--out", required=True, type=Path, help="file or folder to write; must not exist")
    add("--use_ema", default="auto", choices=("auto", "true", "false"), help=
        "weights to export: those with the better recorded accuracy, else the EMA (auto), the "
        "EMA (true) or the raw weights (false)")
    switch("--with_preprocessing", help=
        "include normalization and softmax: the file takes RGB pixels (B, H, W, 3) uint8 and "
        "returns probabilities; onnx and pt2")
    switch("--half", help=
        "store weights in float16 and compute in float16 (onnx, pt2); input and output stay "
        "float32")
    switch("--int8", help=
        "quantize weights and activations to 8 bits with onnxruntime, calibrated on training "
        "images; onnx")
    add("--opset", type=whole, metavar="N", default=writers.OPSET, help=
        f"version of the ONNX operators, at least {writers.OPSET}; onnx")
    add("--push_to_hub", metavar="NAME", help=
        "after the comparison, upload the folder to the Hugging Face hub as NAME; timm")
    add("--data_set", help="data set to compare on (default: that of the checkpoint)")
    add("--data_path", help="folder of the images to compare on (default: that of the checkpoint)")
    add("--eval_data_path", help="folder of validation images, as for main.py (default: none)")
    add("--compare_images", type=whole, metavar="N", default=512, help=
        "maximum number of validation images to compare on, spread evenly over all")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export a checkpoint; returns the exit code."""
    args = get_parser().parse_args(argv)
    return exit_code("export.py", lambda: export(args), stopped="stopped; nothing was written")


def export(args: argparse.Namespace) -> None:
    """Write an export under a temporary name, compare it, and rename it.

    Raises: UserError for whatever the user can correct, and for an export that differs.
    """
    check_flags(args)
    with flags_for(use_ema="--use_ema"):
        network, card, checkpoint = model.network_from_checkpoint(args.checkpoint, args.use_ema)
    check_architecture(args, card)
    images, data = open_images(args, checkpoint, card)
    reason = checkpoint.weights(args.use_ema).reason
    log(
        f"{args.checkpoint}: {card.architecture}, {len(card.classes)} classes, {card.input_size} "
        f"pixels, {card.weights} weights{reason}"
    )
    if card.temperature != 1:
        log(f"Logits are divided by the temperature {card.temperature:.4f} of --calibrate true")
    is_onnx = args.format == "onnx"
    runtime = f" in onnxruntime {model.import_onnxruntime().__version__}" if is_onnx else ""
    log(f"Compared{runtime} on {images.words}")
    precision = "int8" if args.int8 else "float16" if args.half else "float32"
    card = replace(card, dtype=precision, with_preprocessing=args.with_preprocessing)
    with writers.temporary_folder(args.out) as folder:
        path = Path(folder, args.out.name)
        if args.format == "timm":
            accuracy = checkpoint.recorded_acc1(card.weights == "EMA")
            writers.write_timm(network, card, path, accuracy)
        else:
            # INT8 begins with a float32 file.
            precise = replace(card, dtype="float32") if args.int8 else card
            writers.write_program(network, precise, path, args.opset)
        rows = []
        checked = run_network(network, replace(card, with_preprocessing=False), CPU)
        if args.int8:
            rows.append(Row("float32 .onnx", open_onnx(str(path), CPU), size_of(path)))
            log(
                f"INT8 is calibrated on up to {CALIBRATION} training images; runtimes other than "
                "onnxruntime may give different answers"
            )
            path = writers.quantize(path, card, calibration_batches(data, card))
        exported = open_model(str(path), CPU)
        comparison.check_card(exported.card, card)
        file = Path(local_file(args.checkpoint))
        rows.insert(0, Row(f"checkpoint, {card.weights}", checked, size_of(file)))
        rows.append(Row(args.out.name, exported, size_of(path)))
        comparison.compare(rows, images)
        log("\n".join(table([comparison.HEADS, *(row.cells for row in rows)])))
        threads = torch.get_num_threads()
        log(f"Latency: median of {comparison.LATENCIES} runs on {threads} CPU thread(s)")
        for row in rows[1:-1]:
            comparison.check_difference(row, "float32", args.out, images)
        comparison.check_difference(rows[-1], card.dtype, args.out, images)
        writers.publish(path, args.out, "" if args.format == "timm" else card.to_json())
    if args.format == "timm":
        log(f"Wrote {args.out}: timm.create_model('local-dir:{args.out}', pretrained=True)")
        if args.push_to_hub:
            name = hub.upload(args.out, args.push_to_hub)
            log(f"Uploaded as {name}: timm.create_model('hf-hub:{name}', pretrained=True)")
    else:
        kind = f"ONNX opset {args.opset}" if args.format == "onnx" else "torch.export"
        log(f"Wrote {args.out} ({kind}, any batch size) and {writers.sidecar(args.out)}")


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that cannot work, before anything is read."""
    if args.compare_images < 1:
        raise UserError(f"--compare_images {args.compare_images}: must be at least 1")
    if args.format == "timm":
        for flag in ("with_preprocessing", "int8"):
            if getattr(args, flag):
                raise UserError(
                    f"--{flag} true: --format timm holds only the network; pass --format onnx"
                    f"{' or pt2' if flag == 'with_preprocessing' else ''}, or remove the flag"
                )
        if args.push_to_hub:
            hub.check_upload(args.push_to_hub)
    elif args.push_to_hub:
        raise UserError(f"--push_to_hub {args.push_to_hub}: only with --format timm")
    elif args.out.suffix != ENDING[args.format]:
        raise UserError(
            f"--out {args.out}: must end in {ENDING[args.format]} for --format {args.format}: "
            "predict.py knows a file by its ending"
        )
    if args.opset < writers.OPSET:
        raise UserError(f"--opset {args.opset}: torch writes versions from {writers.OPSET} on")
    if args.opset != writers.OPSET and args.format != "onnx":
        raise UserError(f"--opset {args.opset}: --format {args.format} has no ONNX operators")
    if args.int8 and args.format != "onnx":
        raise UserError("--int8 true: onnxruntime quantizes; pass --format onnx")
    if args.int8 and args.half:
        raise UserError("--int8 true --half true: pass one of them")
    for path in (args.out, writers.sidecar(args.out)) if args.format != "timm" else (args.out,):
        if os.path.lexists(path):
            raise UserError(f"--out {args.out}: {path} exists; remove it, or pass another name")
    if args.format == "onnx" and (missing := model.missing_onnx_packages()):
        raise UserError(f"--format onnx: {few(missing)} missing; {model.ONNX_PACKAGES}")


def check_architecture(args: argparse.Namespace, card: ModelCard) -> None:
    """Raise UserError for --format timm with an architecture that timm itself does not have."""
    if args.format != "timm" or models.is_in_timm(card.architecture):
        return
    is_own = is_own_module(card.architecture)
    kind = "a network of your own" if is_own else "an architecture of this repository"
    raise UserError(
        f"--format timm: {card.architecture} is {kind}, which timm alone cannot build; pass "
        "--format onnx or pt2, whose files hold the network itself"
    )


def open_images(
    args: argparse.Namespace, checkpoint: Checkpoint, card: ModelCard
) -> tuple[Images, argparse.Namespace]:
    """Validation images as in an evaluation, or noise if there are none.

    Returns: the images, and the arguments that opened them.
    Raises: UserError for data that flags name, and for --int8 without any.
    """
    names = ("data_set", "data_path", "eval_data_path")
    given = [w for n in names if getattr(args, n) for w in (f"--{n}", getattr(args, n))]
    try:
        data = evaluation_args(checkpoint, given)
        scored = open_scored(data, checkpoint)
        pixels, targets = load_pixels(scored.images, args.compare_images, card)
    except UserError as error:
        if given or args.int8:
            raise
        log(f"No validation images ({error}); pass --data_path to compare on yours")
        shape = (NOISE, card.input_size, card.input_size, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return Images(torch.from_numpy(noise), None, None, f"{NOISE} images of noise"), args
    number = f"{len(pixels)} of {len(scored.images)}"
    if len(pixels) == len(scored.images):
        number = f"all {len(pixels)}"
    words = f"{number} {'held-out training' if data.holdout else 'validation'} images"
    return Images(pixels, targets, scored.positions, words), data


def load_pixels(source: Source, most: int, card: ModelCard) -> tuple[torch.Tensor, torch.Tensor]:
    """Images spread evenly over a source, cropped: (N, H, W, 3) uint8, and their targets (N,)."""
    transform = eval_transform(card.config)
    if isinstance(source, ImageSource):
        chosen = evenly(len(source), most)
        pairs = [(source.load(i), source.targets[i]) for i in chosen.tolist()]
    else:
        source.stream.transform = pictures.decode_of_stream
        pairs = [pair for pair, _ in zip(source.stream, range(most), strict=False)]
    pixels = np.stack([transform(image)[0] for image, _ in pairs])
    return torch.from_numpy(pixels), torch.tensor([int(target) for _, target in pairs])


def calibration_batches(data: argparse.Namespace, card: ModelCard) -> Iterator[torch.Tensor]:
    """Pixels (1, H, W, 3) of training images, from which INT8 takes the ranges of activations.

    One image at a time, since onnxruntime keeps every activation: a ResNet-50 at 224 pixels took
    0.25 s per image and 1.5 GB, against 3.4 GB and no time saved with batches of 24.
    """
    train = datasets.open_splits(data, with_validation=False).train
    return iter(load_pixels(train, CALIBRATION, card)[0].split(1))


if __name__ == "__main__":
    # As after Ctrl-C, what was written so far is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
