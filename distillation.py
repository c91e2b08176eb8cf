"""Knowledge distillation: the frozen teacher, the student that asks the teacher, and the loss.

Hinton, Vinyals and Dean, 'Distilling the Knowledge in a Neural Network', 2015.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import models
from arguments.derived import PRETRAINED, is_own_module
from losses import Divergence, kl, kl_per_image, standardize
from models.checkpoint import Checkpoint, read_checkpoint
from models.classes import match_outputs, order_of_script, pretrained_classes
from models.fusion import fuse_layers
from models.weights import load_weights
from runtime.device import channels_last, fetch, has_streams, send
from runtime.distributed import unwrap
from utils import UserError, few


class DistillationLoss(nn.Module):
    """(1-alpha) * CE(student, target) + alpha * T^2 * KL(softmax(teacher/T) || softmax(student/T))

    Both parts are computed in float32, whatever the dtype of the logits; see losses.kl_divergence.

    Args:
        criterion: the loss on the labels, called as criterion(student_logits, targets).
        alpha: weight of the distillation part, in 0…1. With 0 no teacher is needed; with 1 the
            labels reach the log but not the gradient.
        temperature: T > 0.
        divergence: one of losses.DIVERGENCES, in place of KL.
        standardized: compare z-scores of the logits, see losses.standardize.
        ce_weight, kd_weight: in place of 1-alpha and alpha.
        warmup_epochs: the distillation part grows linearly over these epochs, see `start_epoch`.
    Raises: ValueError for alpha or temperature out of range.
    """

    def __init__(
        self,
        criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        alpha: float,
        temperature: float,
        *,
        divergence: Divergence = kl,
        standardized: bool = False,
        ce_weight: float | None = None,
        kd_weight: float | None = None,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in 0…1, got {alpha}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.criterion, self.alpha, self.temperature = criterion, alpha, temperature
        self.divergence, self.standardized = divergence, standardized
        self.ce_weight = 1 - alpha if ce_weight is None else ce_weight
        self.kd_weight = alpha if kd_weight is None else kd_weight
        self.warmup_epochs, self.growth = warmup_epochs, 1.0

    def start_epoch(self, epoch: int) -> None:
        """Give the distillation part its weight in an epoch: (epoch + 1) / warmup_epochs, up to 1.

        As in the published code of DKD (Zhao et al. 2022).
        """
        if self.warmup_epochs:
            self.growth = min(1.0, (epoch + 1) / self.warmup_epochs)

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            student_logits: (B, C), any floating dtype.
            teacher_logits: (B, C), or None if alpha is 0.
            targets: (B,) int64 class indices, or (B, C) probabilities, as the criterion expects.
        Returns: the loss, and its parts without a graph: 'ce' and, for alpha above 0, 'kd' (T^2
            included).
        """
        student_logits = student_logits.float()  # (B, C)
        with torch.set_grad_enabled(self.alpha < 1 and torch.is_grad_enabled()):
            ce = self.criterion(student_logits, targets)
        if self.alpha == 0:
            return ce, {"ce": ce.detach()}
        student_logits, teacher_logits = self.compared(student_logits, teacher_logits)
        kd = self.divergence(student_logits, teacher_logits, targets, self.temperature)
        return self.combined(ce, kd), {"ce": ce.detach(), "kd": kd.detach()}

    def compared(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits as the divergence takes them."""
        if teacher_logits is None:
            raise ValueError(f"alpha is {self.alpha}, so the loss needs teacher_logits")
        if self.standardized:
            return standardize(student_logits), standardize(teacher_logits)
        return student_logits, teacher_logits

    def combined(self, ce: torch.Tensor, kd: torch.Tensor) -> torch.Tensor:
        """The weighted sum of both parts; with alpha 1 without the labels."""
        weights = self.ce_weight, self.growth * self.kd_weight
        if weights == (1 - self.alpha, self.alpha):
            return kd if self.alpha == 1 else torch.lerp(ce, kd, self.alpha)
        return weights[1] * kd if self.alpha == 1 else weights[0] * ce + weights[1] * kd


class PartlyLabeledLoss(DistillationLoss):
    """The same loss where some images have no label, which only the distillation part sees.

    (1-alpha) * w * ce + alpha * T^2 * KL

    ce is the sum over a batch of CE(student, label), divided by the labeled images that a batch
    holds on average. So it is a mean over the labeled images of an epoch, each of which counts the
    same, however many share its batch and however a global batch is divided among processes. The
    weight w is the mean number of labeled images of an optimizer step, at most 1: without it, the
    few steps that see a label would be ruled by it (docs/unlabeled.md has a measurement).

    Args:
        criterion: cross-entropy with probabilities, mean over the batch.
        alpha: above 0; 1 where no image has a label.
        labeled_share: the labeled part of the training images, in 0…1.
        images_per_step: images of an optimizer step, over all processes.
    """

    def __init__(
        self,
        criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        alpha: float,
        temperature: float,
        labeled_share: float,
        images_per_step: int,
        **options: Any,
    ) -> None:
        super().__init__(criterion, alpha, temperature, **options)
        if alpha == 0 or (alpha < 1 and not labeled_share):
            raise ValueError(f"alpha is {alpha}, but {1 - labeled_share:.0%} have no label")
        self.labeled_share = labeled_share
        self.label_weight = min(1.0, labeled_share * images_per_step)

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            targets: (B, C); a row sums to the labeled part of its image, see PartialLabels.
        Returns: the loss, and without a graph 'ce', 'kd', its means 'kd_labeled' and 'kd_unlabeled'
            over the labeled and the other images, and 'labeled', the labeled part of the batch.
        """
        student_logits, share = student_logits.float(), self.labeled_share
        labeled, parts = targets.sum(dim=1), {}  # (B,)
        ce = torch.zeros((), device=student_logits.device)
        if share:
            with torch.set_grad_enabled(self.alpha < 1 and torch.is_grad_enabled()):
                ce = self.criterion(student_logits, targets) / share
            parts["ce"] = ce.detach()
        compared = self.compared(student_logits, teacher_logits)
        if self.divergence is kl:
            of_image = kl_per_image(*compared, self.temperature)  # (B,)
            kd, of_image = of_image.mean(), of_image.detach()
            if share:
                parts["kd_labeled"] = (labeled * of_image).mean() / share
            parts["kd_unlabeled"] = ((1 - labeled) * of_image).mean() / (1 - share)
        else:
            kd = self.divergence(*compared, targets, self.temperature)
        parts |= {"kd": kd.detach(), "labeled": labeled.mean()}
        return self.combined(self.label_weight * ce, kd), parts


class InputConversion(nn.Module):
    """Converts images that are normalized and sized for the student to what the teacher expects.

    Args:
        source, target: data configurations: mean and std (of RGB in 0…1), input_size (pixels).
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, source: dict[str, Any], target: dict[str, Any]) -> None:
        super().__init__()
        self.size = target["input_size"] if target["input_size"] != source["input_size"] else None
        mean, std = torch.tensor(source["mean"]), torch.tensor(source["std"])
        target_mean, target_std = torch.tensor(target["mean"]), torch.tensor(target["std"])
        self.renormalize = not (torch.equal(mean, target_mean) and torch.equal(std, target_std))
        self.register_buffer("scale", (std / target_std).view(1, 3, 1, 1))
        self.register_buffer("shift", ((mean - target_mean) / target_std).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3, size, size)"""
        if self.renormalize:
            images = images * self.scale + self.shift
        if self.size:
            images = F.interpolate(images, (self.size,) * 2, mode="bicubic", antialias=True)
        return images


class SelectClasses(nn.Module):
    """A network whose logits are put into the order of other classes.

    Args:
        index: which of its outputs stand for those classes; None for all in order.
    """

    def __init__(self, network: nn.Module, index: list[int] | None) -> None:
        super().__init__()
        self.network = network
        self.index: torch.Tensor | None
        # A tensor, since indexing with a list would wait for the GPU.
        device = next(network.parameters()).device
        tensor = None if index is None else torch.tensor(index, device=device)
        self.register_buffer("index", tensor, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, C)"""
        logits = self.network(images)
        return logits if self.index is None else logits[:, self.index]


class TeacherAdapter(nn.Module):
    """A frozen network that takes the student's input and returns logits of the student's classes.

    Args:
        network: from `load_teacher`; its `info` says what to convert.
        source: the data configuration of the images that the adapter will be given.
        dtype: of weights and computation; smaller types save memory.
    """

    def __init__(
        self, network: Any, source: dict[str, Any], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.info: TeacherInfo = network.info
        config = self.info.data_config
        self.parameters_before_fusing = sum(p.numel() for p in network.parameters())
        network = fuse_layers(network, config["input_size"], for_device=True)
        network = channels_last(network.to(dtype))
        self.network = SelectClasses(network, self.info.class_index)
        self.convert = InputConversion(source, config).to(next(network.parameters()).device)

    def train(self, mode: bool = True) -> "TeacherAdapter":
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), on any device -> (B, C) on the network's device"""
        weight = next(self.network.parameters())
        inputs = self.convert(send(images, weight.device)).to(weight.dtype)
        return self.network(inputs)


class TeacherEnsemble(nn.Module):
    """Several teachers whose tempered probabilities are averaged (Hinton et al. 2015, section 3).

    The output is T * log of that average, so that a loss with the same temperature T sees exactly
    the averaged probabilities. Averaging the logits instead would give a sharper distribution.

    Args:
        weights: one number above 0 per teacher; scaled to a sum of 1.
    """

    def __init__(
        self, teachers: Sequence[nn.Module], weights: Sequence[float], temperature: float
    ) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.weights = [weight / sum(weights) for weight in weights]
        self.temperature = temperature

    def train(self, mode: bool = True) -> "TeacherEnsemble":
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, C)"""
        log_probabilities = [
            F.log_softmax(teacher(images).float() / self.temperature, dim=-1) + math.log(weight)
            for teacher, weight in zip(self.teachers, self.weights, strict=True)
        ]
        return self.temperature * torch.logsumexp(torch.stack(log_probabilities), dim=0)


class StudentWithDistillation(nn.Module):
    """A student that also asks its teacher while training.

    In training `forward(images)` returns (student_logits, teacher_logits); in evaluation it returns
    student_logits alone. The teacher is frozen and put in eval mode here, and stays so. It is held
    outside the module tree: `parameters()`, `state_dict()`, `train()` and DistributedDataParallel
    never see it. `to()`, `half()` and the like reach student and teacher.

    Args:
        student: the network to train, or its DistributedDataParallel.
        teacher: a network that takes the same images, a StoredTeacher, or None to train without a
            teacher (teacher_logits is then None).
        around_teacher: makes a context in which the teacher is asked, such as one that takes time.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        around_teacher: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        super().__init__()
        self.student, self.around_teacher = student, around_teacher
        if isinstance(teacher, nn.Module):
            teacher.requires_grad_(False).eval()
        self._outside_the_tree = (teacher,)  # a tuple is not registered as a child

    @property
    def teacher(self) -> Any:
        return self._outside_the_tree[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "StudentWithDistillation":
        if isinstance(self.teacher, nn.Module):
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, images: torch.Tensor, key: tuple[int, range] | None = None) -> Any:
        """
        Args:
            images: (B, 3, H, W).
            key: which images of the data these are, (view, places); only a teacher whose logits
                are cached needs it.
        Returns: in training (student_logits, teacher_logits), (B, C) each; in evaluation
            student_logits.
        """
        if not self.training:
            # Not through DDP: its buffer broadcast would wait for ranks that have fewer batches.
            return unwrap(self.student)(images)
        if self.teacher is None:
            return self.student(images), None
        if has_streams(images.device) and self._asks_host():
            # The GPU computes the student's answer while the host is busy with the teacher's.
            question = fetch(images) if isinstance(self.teacher, nn.Module) else lambda: images
            student_logits = self.student(images)
            teacher_logits = self._ask(question(), key)
        else:
            teacher_logits = self._ask(images, key)
            student_logits = self.student(images)
        # Only now, so that a teacher on another GPU computes beside the student.
        if teacher_logits.device != student_logits.device:
            with self.around_teacher():
                teacher_logits = send(teacher_logits, student_logits.device)
        return student_logits, teacher_logits

    def _ask(self, images: torch.Tensor, key: tuple[int, range] | None) -> torch.Tensor:
        keyed = (key,) if getattr(self.teacher, "needs_key", False) else ()
        with torch.no_grad(), self.around_teacher():
            return self.teacher(images, *keyed)

    def _asks_host(self) -> bool:
        """Whether the teacher computes on the CPU, or all its logits are read from disk."""
        if isinstance(self.teacher, nn.Module):
            weight = next(self.teacher.parameters(), None)
            return weight is not None and weight.device.type == "cpu"
        return getattr(self.teacher, "teacher", self.teacher) is None

    def no_sync(self) -> AbstractContextManager:
        """DistributedDataParallel's `no_sync` for accumulation steps; nothing on one process."""
        student = self.student
        return student.no_sync() if isinstance(student, DistributedDataParallel) else nullcontext()


@dataclass(frozen=True)
class TeacherInfo:
    """What is known of a teacher besides its weights."""

    data_config: dict[str, Any]  # mean, std (of RGB in 0…1) and input_size (pixels) of its training
    class_index: list[int] | None = None  # its outputs for the data's classes; None: all, in order
    origin: str = ""  # a line that says what was loaded
    is_ema: bool = False  # whether EMA weights were loaded
    is_size_guessed: bool = False  # whether only timm says the input_size, for the architecture
    recorded_acc1: float | None = None  # the accuracy in % that the file records of these weights
    # What the file says of its training, see Checkpoint.
    data: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)


def load_teacher(
    arch: str,
    path: str,
    num_classes: int,
    device: torch.device | str,
    *,
    classes: Sequence[str] | None = None,
    teacher_classes: Sequence[str] | None = None,
    input_config: Mapping[str, Any] | None = None,
    default_config: Mapping[str, Any] | None = None,
    use_ema: str = "auto",
) -> nn.Module:
    """Create a timm architecture, load a checkpoint into it strictly, and freeze it.

    Args:
        arch: a name of timm's create_model, or MODULE:FACTORY for a network of the user's own.
        path: the file, see models.checkpoint.read_checkpoint, or its http(s) address; 'pretrained'
            for timm's weights, whose classes are ImageNet's or named by their configuration.
        num_classes: number of classes of the data.
        device: where the teacher computes.
        classes: names of the data's classes in order, to match with the teacher's by name.
        teacher_classes: names of the teacher's classes, if the file does not hold them.
        input_config: any of mean, std and input_size, to overrule what the file or timm says.
        default_config: the same, if neither the file nor a network of the user's own says.
        use_ema: 'true' for the EMA weights in the file, 'false' for the raw weights, 'auto' for
            those with the better recorded accuracy, else the EMA.
    Returns: the network in eval mode, its parameters without gradient, with a TeacherInfo as its
        attribute `info`.
    Raises: UserError for an unknown architecture, for a file that does not fit it or the data, and
        for weights that are not finite.
    """
    models.check_architecture(arch)
    checkpoint, weights = Checkpoint(path, {}), None
    if path != PRETRAINED:
        checkpoint = read_checkpoint(path)
        weights = checkpoint.weights(use_ema)
    names, guessed = teacher_classes or checkpoint.classes, ""
    if path == PRETRAINED:
        names = teacher_classes or pretrained_classes(arch, classes or [])
    elif classes and not names:
        names, guessed = order_of_script(checkpoint.args, classes, path)
    outputs = len(names) if names and (classes or not weights) else num_classes
    config, config_from, is_size_guessed = _data_config(
        arch, checkpoint, default_config, input_config
    )
    teacher: Any = models.create_model(arch, outputs, config["input_size"], pretrained=not weights)
    description = "timm's pre-trained weights"
    if weights:
        loaded = load_weights(
            teacher,
            weights,
            remedy=checkpoint.architecture_remedy,
            classes_remedy=_name_outputs(teacher_classes) if teacher_classes else OTHER_TEACHER,
        )
        description = f"{weights.description}{loaded.note}"
    _check_finite(teacher, path)
    teacher.requires_grad_(False).eval().to(device)
    index, order = match_outputs(names, classes, path)
    parameters = sum(p.numel() for p in teacher.parameters())
    mean, std = ("/".join(f"{value:.3g}" for value in config[name]) for name in ("mean", "std"))
    origin = (
        f"Teacher {arch} from {path}: {description}, {parameters:,} parameters, {outputs} classes "
        f"({guessed or order}), {config['input_size']} px, mean {mean}, std {std} (input from "
        f"{config_from})"
    )
    is_ema = weights is not None and weights.is_ema
    acc1 = checkpoint.recorded_acc1(is_ema)
    parts = checkpoint.data, checkpoint.args, checkpoint.images
    teacher.info = TeacherInfo(config, index, origin, is_ema, is_size_guessed, acc1, *parts)
    return teacher


def _name_outputs(names: Sequence[str]) -> str:
    return f"name each of its outputs in teacher_classes, which holds {len(names)} names"


OTHER_TEACHER = (
    "use a teacher of the same classes, name the classes of this teacher with teacher_classes, or "
    "fine-tune the teacher on this data first"
)


def _data_config(
    arch: str,
    checkpoint: Checkpoint,
    default: Mapping[str, Any] | None,
    given: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], str, bool]:
    """What the teacher was trained to see, who says so, and whether its size is a guess."""
    config: dict[str, Any] = models.normalization(True) | {"input_size": 224}
    config |= {name: default[name] for name in config if default and name in default}
    config |= models.input_config(arch)
    source = "the network, else the student" if is_own_module(arch) else "timm's pretrained_cfg"
    config |= {name: value for name, value in checkpoint.data.items() if name in config}
    args = {} if checkpoint.is_ours else checkpoint.args
    if isinstance(args.get("imagenet_default_mean_and_std"), bool):  # the ConvNeXt script's
        config |= models.normalization(args["imagenet_default_mean_and_std"])
    told = [args.get(name) for name in ("imagenet_default_mean_and_std", "mean", "std")]
    size = args.get("input_size") or args.get("img_size")  # timm's is (3, size, size), or img_size
    if checkpoint.is_ours:
        source = "the checkpoint"
    elif size or any(value is not None for value in told):
        source = "the checkpoint's arguments"
    if size:
        config["input_size"] = size if isinstance(size, int) else size[-1]
    for name in ("mean", "std"):  # timm's, where they were given by hand
        if args.get(name):
            config[name] = list(args[name])
    says = size or checkpoint.is_ours or is_own_module(arch) or checkpoint.path == PRETRAINED
    if given:
        config, source = config | dict(given), f"{source}, except the given values"
    return config, source, not says and "input_size" not in (given or {})


def _check_finite(teacher: nn.Module, path: str) -> None:
    # Not every buffer: some architectures keep infinite limits in buffers.
    statistics = [(n, b) for n, b in teacher.named_buffers() if "running_" in n]
    tensors = [*teacher.named_parameters(), *statistics]
    if bad := [name for name, tensor in tensors if not tensor.isfinite().all()]:
        raise UserError(
            f"{path}: NaN or infinity in {len(bad)} of the teacher's weights ({few(bad)}), so its "
            "training failed; use an earlier checkpoint or another teacher",
            "checkpoint",
        )
