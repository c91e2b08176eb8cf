"""Time of a training step: alone, with the teacher, with its stored logits, and in timm's task.

Every variant runs in the project's own loop, engine.train_one_epoch, on images that lie in memory,
the last pair also on digits as a run loads and augments them. Rounds go over the variants in
changing order, and ratios are medians over rounds. "timm", with its defaults, has a process of its
own, since it leaves the memory allocator as it is.

Where a process's memory happens to lie makes 1 % of difference to steps of a few milliseconds, so
the smallest pair is measured in several processes, one after another.
"""

import multiprocessing
import random
import shlex
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from torch import nn

import datasets
import engine
import main
from distillation import DistillationLoss, StudentWithDistillation, Teacher
from examples import digits_demo
from logit_store import LogitStore, RowFormat, StoredTeacher
from utils import keep_freed_memory

# student, teacher, pixels, classes, batch size, steps a round (None: all digits); processes
PAIRS = (
    (("vit_tiny_patch16_224", "vit_small_patch16_224", 224, 1000, 8, 2), 1),
    (("convnext_atto", "convnext_pico", 160, 1000, 8, 4), 1),
    (("resnet18", "resnet50", 128, 1000, 16, 3), 1),
    (("cifar_resnet8", "cifar_resnet20", 8, 10, 50, 50), 8),
    (("cifar_resnet8", "cifar_resnet20", 8, 10, 50, None), 4),
)
# "teacher" is timm's network as it is, "teacher, fused" the one that this project asks.
VARIANTS = (
    *("plain", "online", "cached", "teacher", "teacher, fused"),
    *("timm", "timm, our settings"),
)


class MemoryLoader:
    """A few batches on the device; tells their places as datasets.DeviceLoader does."""

    def __init__(
        self, size: int, classes: int, batch: int, steps: int, device: torch.device, layout: Any
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (batch, 3, size, size)
        self.images = [torch.randn(shape, generator=generator).to(device) for _ in range(steps)]
        self.images = [images.to(memory_format=layout) for images in self.images]
        labels = torch.rand((steps, batch, classes), generator=generator)
        self.targets = labels.softmax(dim=2).to(device)  # soft, as after mixup
        self.batches_in_epoch, self.view, self.places = steps, 0, range(0)

    def set_epoch(self, epoch: int, first_batch: int) -> None:
        pass

    def __iter__(self):
        for number, batch in enumerate(zip(self.images, self.targets, strict=True)):
            start = number * len(batch[0])
            self.places = range(start, start + len(batch[0]))
            yield batch


def digits(batch: int, device: torch.device) -> Any:
    """All training digits as the demo shows them, by the project's own loader."""
    args = main.parse_args([*shlex.split(digits_demo.COMMON), "--batch_size", str(batch)])
    main.follow_defaults(args, None)
    return datasets.build_data(args, device).train_loader


class TimmTask(nn.Module):
    """timm's task in our loop: it does all its work where the loss is asked for."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.task = LogitDistillationTask(
            *(student, teacher, SoftTargetCrossEntropy()),
            task_loss_weight=0.3,
            temperature=4.0,
            device=next(student.parameters()).device,
            verbose=False,
        )
        self.teacher_is_frozen = teacher.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.images = images
        return images[0, 0, 0], None

    def loss(self, first: Any, none: None, targets: torch.Tensor) -> tuple[torch.Tensor, dict]:
        out = self.task(self.images, targets)
        return out["loss"], {"ce": out["task_loss"].detach(), "kd": out["kd_loss"].detach()}


class Runner:
    """One variant of one pair, ready to be timed."""

    def __init__(self, variant: str, pair: tuple, folder: Path, device: torch.device) -> None:
        student_arch, teacher_arch, size, classes, batch, steps = pair
        torch.manual_seed(0)
        sized = {"img_size": size} if "vit" in student_arch else {}
        student = timm.create_model(student_arch, num_classes=classes, **sized).to(device)
        network = timm.create_model(teacher_arch, num_classes=classes, **sized).to(device).eval()
        network.requires_grad_(False)
        cfg = student.pretrained_cfg
        network.class_index = None
        network.data_config = {"mean": cfg["mean"], "std": cfg["std"], "input_size": size}
        is_ours = variant != "timm"
        layout = torch.channels_last if is_ours else torch.contiguous_format
        student = student.to(memory_format=layout)
        network = network.to(memory_format=layout)
        self.variant, self.device, self.epoch = variant, device, 0
        if steps:
            self.loader = MemoryLoader(size, classes, batch, steps, device, layout)
        else:
            self.loader = digits(batch, device)
        self.steps = self.loader.batches_in_epoch
        self.images = [images for images, _ in self.loader]  # the teacher alone waits for no loader
        self.settings = engine.LoopSettings(device, None, 1, None, 0, print_freq=1000)
        self.optimizer = create_optimizer_v2(
            student, opt="adamw", lr=1e-4, weight_decay=0.05, **({"fused": True} if is_ours else {})
        )
        teacher: Any = Teacher(network, network.data_config)
        if variant.startswith("timm"):
            self.model = TimmTask(student, network)
            self.model.student = student
            self.loss = self.model.loss
            self.model.no_sync = None
        else:
            alpha = 0.0 if variant == "plain" else 0.7
            self.loss = DistillationLoss(SoftTargetCrossEntropy(), alpha, 4.0)
            if variant == "cached":
                images = batch * self.steps
                form = folder, images, images, RowFormat(classes, "float16")
                store = LogitStore(*form)
                for inputs, _ in self.loader:
                    with torch.inference_mode():
                        store.keep(0, self.loader.places, teacher(inputs))
                store.flush()
                # Opened again, as by a later run, which finds the view whole.
                teacher = StoredTeacher(LogitStore(*form), self.loader, None)
            self.model = StudentWithDistillation(student, None if variant == "plain" else teacher)
        self.teacher = network if variant == "teacher" else teacher

    def seconds(self) -> float:
        """Of one step, a round's mean."""
        started = time.perf_counter()
        if self.variant.startswith("teacher"):
            for images in self.images:
                with torch.no_grad():
                    self.teacher(images)
        else:
            self._train()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / self.steps

    def _train(self) -> None:
        constant = engine.np.full((self.epoch + 1) * self.steps, 1e-4)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        schedule = engine.Schedule(constant, constant)
        engine.train_one_epoch(
            *(self.model, self.loss, self.loader, self.optimizer, scaler, schedule),
            *(self.epoch, self.settings),
        )


class RunnerElsewhere:
    """A Runner in a process of its own, which waits while the others run."""

    def __init__(self, *args: Any) -> None:
        self.variant = args[0]
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        context.Process(target=self.serve, args=(other, *args), daemon=True).start()
        other.close()  # the child's alone, so that its end is an error here and not a wait

    @staticmethod
    def serve(pipe: Any, *args: Any) -> None:
        engine.log = lambda *words: None
        runner = Runner(*args)
        while pipe.recv():
            pipe.send(runner.seconds())

    def seconds(self) -> float:
        self.pipe.send(True)
        return self.pipe.recv()

    def stop(self) -> None:
        self.pipe.send(False)


def measure(rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row a pair: milliseconds of each variant, and the ratios that matter.

    Args:
        rounds: in each process.
    """
    context = multiprocessing.get_context("spawn")
    one_process = partial(_times, rounds=rounds, device=device)
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as fresh:
        return [_row(pair, list(fresh.map(one_process, [pair] * n))) for pair, n in PAIRS]


def _times(pair: tuple, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step of each variant in each round."""
    engine.log = lambda *words: None  # the loop's own lines
    if device.type == "cpu":
        keep_freed_memory()  # as utils.init_process does
    with tempfile.TemporaryDirectory() as folder:
        common = pair, Path(folder), device
        runners = [Runner(variant, *common) for variant in VARIANTS if variant != "timm"]
        elsewhere = RunnerElsewhere("timm", *common)
        runners.append(elsewhere)
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for round_number in range(-2, rounds):  # two to warm up
            # Shuffled, since what ran before leaves the caches its own way.
            for runner in random.Random(round_number).sample(runners, len(runners)):
                seconds = runner.seconds()
                if round_number >= 0:
                    times[runner.variant].append(seconds)
        elsewhere.stop()
    return times


def _row(pair: tuple, processes: list[dict[str, list[float]]]) -> dict[str, Any]:
    def seconds(variant: str) -> list[float]:
        return [value for times in processes for value in times[variant]]

    def ratio(above: str, *below: str) -> float:
        rounds = zip(seconds(above), *map(seconds, below), strict=True)
        return statistics.median(first / sum(others) for first, *others in rounds)

    return {
        "student": pair[0],
        "teacher": pair[1],
        "pixels": pair[2],
        "classes": pair[3],
        "batch_size": pair[4],
        "input": "in memory" if pair[5] else "all digits, loaded and augmented as in a run",
        "processes": len(processes),
        "ms": {variant: 1000 * statistics.median(seconds(variant)) for variant in VARIANTS},
        "cached / plain": ratio("cached", "plain"),
        "online / parts": ratio("online", "plain", "teacher"),
        "online / parts, fused": ratio("online", "plain", "teacher, fused"),
        "online / timm": ratio("online", "timm"),
        "online / timm, our settings": ratio("online", "timm, our settings"),
    }
