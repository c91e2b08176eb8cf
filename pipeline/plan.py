"""What a distillation runs, in which order, and how long that takes on this machine."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import models
from arguments.defaults import default_batch_size
from arguments.derived import is_own_module
from data.sources import hash_of
from models.checkpoint import read_checkpoint
from pipeline import rules
from pipeline.commands import HAND_OVER
from pipeline.images import Images
from utils import UserError, flags_for

KINDS = {
    "given": "its file knows these classes",
    "probe": "only its classifier is trained",
    "finetuned": "all of it is trained, from its weights",
    "scratch": "all of it is trained, from random weights",
}
EVALUATIONS = 5  # of a training


class Network(NamedTuple):
    """A network and its weights.

    Attributes:
        text: ARCH or ARCH=FILE, as it was typed.
        weights: flags of main.py that start from the weights; () if there are none.
        file: a checkpoint that knows the classes of the images; ''.
        missing: why there are no weights.
        size: side of its input in pixels.
    """

    text: str
    weights: tuple[str, ...]
    file: str
    missing: str
    size: int
    parameters: int

    @property
    def arch(self) -> str:
        return self.text.partition("=")[0]

    @property
    def name(self) -> str:
        """For folders: the architecture, and a mark of the file."""
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in self.arch)
        return f"{name}-{hash_of(self.text.encode())[:6]}" if "=" in self.text else name

    @property
    def flags(self) -> list[str]:
        return ["--model", self.arch, "--input_size", str(self.size), *self.weights]

    @property
    def kinds(self) -> list[str]:
        """The ways to make a teacher of it."""
        if self.file:
            return ["given"]
        return ["probe", "finetuned"] if self.weights else ["scratch"]


def label_of(network: Network, kind: str) -> str:
    """What the scores call a way to train a network."""
    return kind if kind == "alone" else f"{network.text}, {kind}"


def find_network(
    text: str, flag: str, classes: Sequence[str], size: Callable[[bool], int]
) -> Network:
    """Find the weights of ARCH or ARCH=FILE: those of the file, or of timm.

    Args:
        size: whether there are weights -> pixels of the input.
    Raises: UserError for an architecture or a file that cannot be used.
    """
    arch, _, file = text.partition("=")
    weights: tuple[str, ...] = ()
    pixels, missing = None, ""
    with flags_for(architecture=flag, checkpoint=flag):
        models.check_architecture(arch)
        if file:
            checkpoint = read_checkpoint(file)
            weights = "--finetune", file
            pixels = checkpoint.data.get("input_size")
            if sorted(checkpoint.classes or []) != sorted(classes):
                file = ""
        elif not is_own_module(arch) and models.pretrained_cfg(arch).has_weights:
            try:
                expected = models.input_config(arch).get("input_size", 224)
                models.create_model(arch, len(classes), expected, pretrained=True)
                weights = "--pretrained", "true"
            except UserError as error:
                missing = str(error)
        pixels = pixels or size(bool(weights))
        network = models.create_model(arch, len(classes), pixels)
    parameters = sum(p.numel() for p in network.parameters())
    return Network(text, weights, file, missing, pixels, parameters)


class Scale(NamedTuple):
    """How much of everything is run."""

    share: float  # of the passes over the images
    seeds: int
    candidates: int  # ways to make a teacher that are tried


class Speed(NamedTuple):
    """Of a network on this machine."""

    start: float  # seconds before the first step of a run
    image: float  # seconds per image of a training step; an evaluation takes a third


@dataclass
class Plan:
    """The commands of a distillation.

    Attributes:
        teachers: (network, kind); a small budget drops those at the end.
        common: flags of every training.
        device: those of its flags that name the device, for evaluations.
        alone, distilled: more flags of the student's trainings.
        speeds: by the name of the network.
        jobs: trainings at the same time.
    """

    images: Images
    teachers: list[tuple[Network, str]]
    student: Network
    common: list[str]
    device: list[str]
    alone: list[str]
    distilled: list[str]
    speeds: dict[str, Speed]
    scale: Scale
    jobs: int

    # ------------------------------------------------------------------------------ lengths

    def epochs_of(self, network: Network, kind: str, images: int, shown: int) -> int:
        """Epochs of a training on some images, with the budget of a training on `shown`."""
        if kind == "probe":
            return rules.PROBE_EPOCHS
        return rules.epochs(images, shown, bool(network.weights), self.scale.share)

    @property
    def all_images(self) -> int:
        """Labeled and not."""
        return self.images.labeled + self.images.unlabeled

    # ----------------------------------------------------------------------------- commands

    def training(self, network: Network, kind: str, fold: int | None, shown: int) -> list[str]:
        """Flags of main.py for a training without a teacher."""
        count = self.images.labeled
        if fold is not None:
            count -= self.images.chosen_by // self.images.folds
        epochs = self.epochs_of(network, kind, count, shown * count // self.images.labeled)
        lengths = self._lengths(epochs, count, shown)
        flags = [*self.images.flags(fold), *network.flags, *lengths, *self.common]
        return flags + {"probe": ["--linear_probe", "true"], "alone": self.alone}.get(kind, [])

    def student_flags(self, teacher: Network | None, teacher_file: str) -> list[str]:
        """Flags of the students that judge, distilled or alone, but for the seed."""
        if teacher is None:
            return self.training(self.student, "alone", None, self.all_images)
        epochs = self.epochs_of(self.student, "alone", self.all_images, self.all_images)
        lengths = self._lengths(epochs, self.all_images, self.all_images)
        flags = [*self.images.flags(), *self.student.flags, *lengths, *self.common]
        if self.images.pile:
            flags += ["--unlabeled", self.images.pile]
        flags += ["--teacher_arch", teacher.arch, "--teacher_path", teacher_file]
        views = str(rules.views(epochs, self.scale.share))
        return flags + ["--kd", "true", "--teacher_views", views, *self.distilled]

    def _lengths(self, epochs: int, images: int, shown: int) -> list[str]:
        """Flags of a training on some images with the budget, and the batches, of `shown`."""
        every = max(1, epochs // EVALUATIONS)
        flags = ["--epochs", str(epochs), "--batch_size", str(batch_size(images, shown))]
        return flags + ["--eval_freq", str(every), "--save_ckpt_freq", str(every)]

    # -------------------------------------------------------------------------------- times

    def seconds(self) -> dict[str, float]:
        """About how long each step takes, with the slowest of the teachers."""
        images, scale = self.images, self.scale
        fold = images.labeled - images.chosen_by // images.folds
        alone = self._seconds(self.student, "alone", self.all_images, images.test)
        of_fold = [
            self._seconds(network, kind, fold, images.chosen_by // images.folds)
            for network, kind in [*self.teachers[: scale.candidates], (self.student, "alone")]
        ]
        teachers = self.teachers[: scale.candidates]
        teacher = max(self._seconds(*one, images.labeled, 0) for one in teachers)
        epochs = self.epochs_of(self.student, "alone", self.all_images, self.all_images)
        answers = max(self.speeds[network.name].image for network, _ in teachers) / 3
        answers *= rules.views(epochs, self.scale.share) * self.all_images + images.test
        return {
            "choose": images.folds * sum(of_fold) / self.jobs,
            "teacher": 0 if images.folds == 1 else teacher,
            "students": scale.seeds * (2 * alone + answers) / self.jobs,
            HAND_OVER: 30,
        }

    def _seconds(self, network: Network, kind: str, shown: int, scored: int) -> float:
        """Of a training with the budget of a training on `shown` images."""
        speed = self.speeds[network.name]
        if kind == "given":
            return speed.start + scored * speed.image / 3
        if kind == "probe":  # features once; an epoch on features takes nothing
            return speed.start + (shown + scored) * speed.image / 3
        passes = self.epochs_of(network, kind, shown, shown)
        return speed.start + speed.image * (passes * shown + scored * (EVALUATIONS + 1) / 3)


def batch_size(images: int, shown: int) -> int:
    """Of a training on some images with the batches of `shown`: even, since images are mixed."""
    return min(images // 2 * 2, default_batch_size(shown))


def scales(candidates: int, seeds: int | None) -> Iterator[Scale]:
    """What is given up for a smaller budget, in this order.

    Args:
        seeds: None for 4, or fewer.
    """
    order = itertools.product(
        range(candidates, 0, -1),
        [seeds] if seeds else (4, 3, 2),
        (1.0, 0.5, 0.25),
    )
    for count, repeats, share in order:
        yield Scale(share, repeats, count)


def fit(plan: Plan, budget: float, seeds: int | None) -> Scale:
    """The most that fits into a budget in seconds.

    Raises: UserError if nothing does, with what would fit.
    """
    least = float("inf")
    for scale in scales(len(plan.teachers), seeds):
        plan.scale = scale
        least = min(least, sum(plan.seconds().values()))
        if least <= budget:
            return scale
    minutes, enough = math.ceil(least / 60), math.ceil(1.2 * least / 60)
    raise UserError(
        f"--budget: the shortest plan takes about {minutes} min on this machine; pass --budget "
        f"{enough}m, smaller networks, or a smaller --input_size"
    )
