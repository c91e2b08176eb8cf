"""Time of a training step: alone, with the teacher, with cached logits, and in timm's task.

Every variant runs in the project's own loop, engine.train_one_epoch, on images that lie in memory;
for the last pair, on digits that are loaded and augmented as in a run. Each round runs all variants
in an order of its own, and ratios are medians over rounds. "timm", with its defaults, has a process
of its own, since it leaves the memory allocator as it is.

The place of a process's memory changes steps of a few milliseconds by 1 %, so the smallest pair is
measured in several processes, one after another.
"""

import multiprocessing
import random
import shlex
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from torch import nn

import datasets
import engine
import reporting.terminal
from arguments.parsing import parse_args
from data import loaders
from data.loaders import Batch
from distillation import DistillationLoss, StudentWithDistillation, TeacherAdapter, TeacherInfo
from examples import label_curve
from runtime.device import choose_kernels, keep_freed_memory, synchronize
from teacher.logit_store import LogitStore, RowFormat, StoredTeacher
from training.optimizer import Schedule
from training.settings import LoopSettings


class Pair(NamedTuple):
    """A student and a teacher, and what is measured of them."""

    student: str
    teacher: str
    pixels: int
    classes: int
    batch_size: int
    steps: int | None  # per round; None: as many as all digits make, loaded as in a run
    processes: int = 1


PAIRS = (
    Pair("vit_tiny_patch16_224", "vit_small_patch16_224", 224, 1000, batch_size=8, steps=2),
    Pair("convnext_atto", "convnext_pico", 160, 1000, batch_size=8, steps=4),
    Pair("resnet18", "resnet50", 128, 1000, batch_size=16, steps=3),
    Pair("cifar_resnet8", "cifar_resnet20", 8, 10, batch_size=50, steps=50, processes=8),
    Pair("cifar_resnet8", "cifar_resnet20", 8, 10, batch_size=50, steps=None, processes=4),
)
# On a GPU, in bfloat16: two of its usual size, and one whose steps only launch small kernels.
GPU_PAIRS = (
    Pair("resnet18", "resnet50", 224, 1000, batch_size=256, steps=10),
    Pair("vit_tiny_patch16_224", "vit_small_patch16_224", 224, 1000, batch_size=256, steps=10),
    Pair("cifar_resnet8", "cifar_resnet20", 32, 10, batch_size=64, steps=50),
)
# "teacher" is timm's network as it is; "teacher, fused" is the one that this project asks.
VARIANTS = (
    "plain",
    "online",
    "cached",
    "teacher",
    "teacher, fused",
    "timm",
    "timm, our settings",
)
ALPHA, TEMPERATURE = 0.7, 4.0


class MemoryLoader:
    """A few random batches that lie on the device."""

    def __init__(
        self, pair: Pair, steps: int, device: torch.device, layout: torch.memory_format
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        size, shape = pair.batch_size, (pair.batch_size, 3, pair.pixels, pair.pixels)
        count = min(steps, 4)
        random: dict[str, Any] = {"generator": generator, "device": device}
        images = [torch.randn(shape, **random) for _ in range(count)]
        labels = torch.rand((steps, size, pair.classes), **random)
        targets = labels.softmax(dim=2)  # soft, as after mixup
        self.batches = [
            Batch(
                images=images[step % count].to(memory_format=layout),
                targets=targets[step],
                view=0,
                places=range(step * size, (step + 1) * size),
            )
            for step in range(steps)
        ]

    @property
    def batches_in_epoch(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Every epoch shows the same batches."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def digits_loader(batch_size: int, device: torch.device) -> loaders.DeviceLoader:
    """All training digits as examples/label_curve.py shows them, by the project's own loader."""
    flags = [*shlex.split(label_curve.COMMON), "--batch_size", str(batch_size)]
    flags += ["--output_dir", "unused"]  # what COMMON says of checkpoints needs a folder
    return datasets.build_data(parse_args(flags), device).train_loader


class TimmTask(nn.Module):
    """timm's task in our loop: it does all its work where the loss is asked for."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.task = LogitDistillationTask(
            student,
            teacher,
            SoftTargetCrossEntropy(),
            task_loss_weight=1 - ALPHA,
            temperature=TEMPERATURE,
            device=next(student.parameters()).device,
            verbose=False,
        )

    def forward(
        self, images: torch.Tensor, key: tuple[int, range]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.images = images
        return images[0, 0, 0], None  # in place of logits, which timm's task does not return

    def loss(
        self, instead_of_logits: torch.Tensor, none: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        out = self.task(self.images, targets)
        return out["loss"], {"ce": out["task_loss"].detach(), "kd": out["kd_loss"].detach()}

    def no_sync(self) -> AbstractContextManager:
        return nullcontext()


class Runner:
    """One variant of one pair, ready to be timed."""

    def __init__(self, variant: str, pair: Pair, folder: Path, device: torch.device) -> None:
        self.variant = variant
        amp_dtype = None if device.type == "cpu" else torch.bfloat16
        self.settings = LoopSettings(
            device=device,
            amp_dtype=amp_dtype,
            update_freq=1,
            clip_grad=None,
            seed=0,
            print_freq=1000,
        )
        torch.manual_seed(0)
        # timm's own defaults neither reorder the memory nor fuse the optimizer.
        has_our_settings = variant != "timm"
        layout = torch.channels_last if has_our_settings else torch.contiguous_format
        sized: dict[str, Any] = {"img_size": pair.pixels} if "vit" in pair.student else {}
        student: Any = timm.create_model(pair.student, num_classes=pair.classes, **sized)
        network: Any = timm.create_model(pair.teacher, num_classes=pair.classes, **sized)
        student = student.to(device).to(memory_format=layout)
        network = network.to(device).to(memory_format=layout).eval().requires_grad_(False)
        cfg = student.pretrained_cfg
        config = {"mean": cfg["mean"], "std": cfg["std"], "input_size": pair.pixels}
        network.info = TeacherInfo(config)
        self.loader: loaders.Loader
        if pair.steps:
            self.loader = MemoryLoader(pair, pair.steps, device, layout)
        else:
            self.loader = digits_loader(pair.batch_size, device)
        self.steps = self.loader.batches_in_epoch
        self.images = [batch.images for batch in self.loader]  # so that no teacher waits for them
        fused: dict[str, Any] = {"fused": True} if has_our_settings else {}
        self.optimizer = create_optimizer_v2(
            student, opt="adamw", lr=1e-4, weight_decay=0.05, **fused
        )
        self.model: engine.TrainedModel
        self.loss: engine.Criterion
        self.teacher = network  # asked as it is, where the variant is "teacher"

        def adapted() -> nn.Module:
            dtype = amp_dtype or torch.float32
            return TeacherAdapter(network, network.info.data_config, dtype)

        if variant.startswith("timm"):
            self.model = task = TimmTask(student, network)
            self.loss = task.loss
        elif variant == "plain":
            self.model = StudentWithDistillation(student, None)
            self.loss = DistillationLoss(SoftTargetCrossEntropy(), 0.0, TEMPERATURE)
        elif variant == "teacher, fused":
            self.teacher = adapted()
        elif variant != "teacher":
            teacher: Any = adapted()
            if variant == "cached":
                teacher = self._cached(teacher, pair, folder)
            self.model = StudentWithDistillation(student, teacher)
            self.loss = DistillationLoss(SoftTargetCrossEntropy(), ALPHA, TEMPERATURE)

    def _cached(self, teacher: nn.Module, pair: Pair, folder: Path) -> StoredTeacher:
        """The teacher's logits on disk, complete, as a later run finds them."""
        images, row_format = pair.batch_size * self.steps, RowFormat(pair.classes, "float16")
        store = LogitStore(folder, images, images, row_format, "benchmark")
        for batch in self.loader:
            with torch.inference_mode(), self.settings.autocast():
                store.put(batch.view, batch.places, teacher(batch.images))
        store.flush()
        return StoredTeacher(LogitStore(folder, images, images, row_format, "benchmark"), None)

    def seconds(self) -> float:
        """Mean time of one step in a round."""
        started = time.perf_counter()
        if self.variant.startswith("teacher"):
            for images in self.images:
                with torch.no_grad(), self.settings.autocast():
                    self.teacher(images)
        else:
            self._train()
        synchronize(self.settings.device)
        return (time.perf_counter() - started) / self.steps

    def _train(self) -> None:
        constant = np.full(self.steps, 1e-4)
        engine.train_one_epoch(
            model=self.model,
            criterion=self.loss,
            loader=self.loader,
            optimizer=self.optimizer,
            scaler=torch.amp.GradScaler(self.settings.device.type, enabled=False),
            schedule=Schedule(constant, constant),
            epoch=0,
            settings=self.settings,
        )


class RunnerElsewhere:
    """A Runner in a process of its own, which waits while the others run."""

    def __init__(self, variant: str, pair: Pair, folder: Path, device: torch.device) -> None:
        self.variant = variant
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        args = (other, variant, pair, folder, device)
        context.Process(target=self.serve, args=args, daemon=True).start()
        other.close()  # the child's alone, so that its end is an error here and not a wait

    @staticmethod
    def serve(
        pipe: Connection, variant: str, pair: Pair, folder: Path, device: torch.device
    ) -> None:
        """Run rounds for as long as the other end of the pipe asks for them."""
        prepare_process()
        runner = Runner(variant, pair, folder, device)
        while pipe.recv():
            pipe.send(runner.seconds())

    def seconds(self) -> float:
        """Mean time of one step in a round."""
        self.pipe.send(True)
        return self.pipe.recv()

    def stop(self) -> None:
        """End the process."""
        self.pipe.send(False)


def prepare_process() -> None:
    """Keep the loop from printing its lines, in this process; choose kernels as a run does."""
    if torch.cuda.is_available():
        choose_kernels(is_fast=True)
    reporting.terminal.log = lambda *words: None


def measure(rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row per pair: milliseconds of each variant, and the ratios that matter.

    Args:
        rounds: in each process.
    """
    context = multiprocessing.get_context("spawn")
    one_process = partial(_times, rounds=rounds, device=device)
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as fresh:
        pairs = PAIRS if device.type == "cpu" else GPU_PAIRS
        return [_row(pair, list(fresh.map(one_process, [pair] * pair.processes))) for pair in pairs]


def _times(pair: Pair, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step of each variant in each round."""
    prepare_process()
    if device.type == "cpu":
        keep_freed_memory()  # as main.run does
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runners: list[Runner | RunnerElsewhere] = [
            Runner(variant, pair, folder, device) for variant in VARIANTS if variant != "timm"
        ]
        elsewhere = RunnerElsewhere("timm", pair, folder, device)
        runners.append(elsewhere)
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for round_number in range(-2, rounds):  # two to warm up
            # Shuffled, since what ran before leaves the processor's caches its own way.
            for runner in random.Random(round_number).sample(runners, len(runners)):
                seconds = runner.seconds()
                if round_number >= 0:
                    times[runner.variant].append(seconds)
        elsewhere.stop()
    return times


def _row(pair: Pair, processes: list[dict[str, list[float]]]) -> dict[str, Any]:
    def seconds(variant: str) -> list[float]:
        return [value for times in processes for value in times[variant]]

    def ratio(above: str, *below: str) -> float:
        rounds = zip(seconds(above), *map(seconds, below), strict=True)
        return statistics.median(first / sum(others) for first, *others in rounds)

    return {
        "student": pair.student,
        "teacher": pair.teacher,
        "pixels": pair.pixels,
        "classes": pair.classes,
        "batch_size": pair.batch_size,
        "input": "in memory" if pair.steps else "all digits, with loader",
        "processes": len(processes),
        "ms": {variant: 1000 * statistics.median(seconds(variant)) for variant in VARIANTS},
        "ratios": {
            "cached / plain": ratio("cached", "plain"),
            "online / parts": ratio("online", "plain", "teacher"),
            "online / parts, fused": ratio("online", "plain", "teacher, fused"),
            "online / timm": ratio("online", "timm"),
            "online / timm, our settings": ratio("online", "timm, our settings"),
        },
    }
