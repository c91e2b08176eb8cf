"""Knowledge distillation: the frozen teacher, the student that carries it, and the loss.

Hinton, Vinyals and Dean, 'Distilling the Knowledge in a Neural Network', 2015.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import models
import utils
from utils import UserError

# EMA weights first: they are what a trainer that kept them would deploy.
TEACHER_KEYS = ("model_ema", "state_dict_ema", "model", "state_dict")


class DistillationLoss(nn.Module):
    """(1-alpha) * CE(student, target) + alpha * T^2 * KL(softmax(teacher/T) || softmax(student/T))

    The divergence is summed over the classes and averaged over the batch; T^2 keeps its gradient of
    one size for every temperature (Hinton et al. 2015, section 2.1). All of it is computed in
    float32, whatever the dtype of the logits.

    Args:
        criterion: the loss on the labels, called as criterion(student_logits, targets).
        alpha: weight of the distillation part, in 0…1. At 0 no teacher is needed; at 1 the labels
            reach the log but not the gradient.
        temperature: T > 0.
    Raises: ValueError for alpha or temperature out of range.
    """

    def __init__(self, criterion: nn.Module, alpha: float, temperature: float) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in 0…1, got {alpha}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.criterion = criterion
        self.alpha = alpha
        self.temperature = temperature

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            student_logits: (B, C), any floating dtype.
            teacher_logits: (B, C), or None where alpha is 0.
            targets: (B,) int64 class indices, or (B, C) probabilities, as the criterion wants.
        Returns: the loss, and its two parts without a graph, 'ce' and 'kd' (T^2 included).
        """
        student_logits = student_logits.float()  # (B, C)
        with torch.set_grad_enabled(self.alpha < 1 and torch.is_grad_enabled()):
            ce = self.criterion(student_logits, targets)
        if self.alpha == 0:
            return ce, {"ce": ce.detach(), "kd": torch.zeros_like(ce)}
        if teacher_logits is None:
            raise ValueError(f"alpha is {self.alpha}, so the loss needs teacher_logits")
        kd = self.temperature**2 * F.kl_div(
            F.log_softmax(student_logits / self.temperature, dim=-1),
            F.log_softmax(teacher_logits.float() / self.temperature, dim=-1),
            reduction="batchmean",
            log_target=True,  # p * log p of a p that rounds to 0 would be NaN
        )
        loss = kd if self.alpha == 1 else (1 - self.alpha) * ce + self.alpha * kd
        return loss, {"ce": ce.detach(), "kd": kd.detach()}


class InputConversion(nn.Module):
    """Turns images normalised and sized for the student into what the teacher was trained on.

    Args:
        source, target: data configurations: mean and std (of RGB in 0…1), input_size (pixels).
    """

    def __init__(self, source: dict[str, Any], target: dict[str, Any]) -> None:
        super().__init__()
        self.size = target["input_size"] if target["input_size"] != source["input_size"] else None
        mean, std = torch.tensor(source["mean"]), torch.tensor(source["std"])
        target_mean, target_std = torch.tensor(target["mean"]), torch.tensor(target["std"])
        self.renormalise = not (torch.equal(mean, target_mean) and torch.equal(std, target_std))
        self.register_buffer("scale", (std / target_std).view(1, 3, 1, 1))
        self.register_buffer("shift", ((mean - target_mean) / target_std).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3, size, size)"""
        if self.renormalise:
            images = images * self.scale + self.shift
        if self.size:
            images = F.interpolate(images, (self.size,) * 2, mode="bicubic", antialias=True)
        return images


class StudentWithDistillation(nn.Module):
    """A student that, while training, also asks its teacher.

    In training `forward(images)` returns (student_logits, teacher_logits); in evaluation it returns
    student_logits alone. The teacher is held outside the module tree: `parameters()`,
    `state_dict()`, `train()`, `to()` and DistributedDataParallel never see it.

    Args:
        student: the network to train, or its DistributedDataParallel.
        teacher: a frozen network from `load_teacher`, or None to train without one
            (teacher_logits is then None).
        convert: applied to the images before the teacher sees them.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, convert: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.student = student
        self._outside_the_tree = (teacher, convert)  # a tuple is not registered as a child

    @property
    def teacher(self) -> nn.Module | None:
        return self._outside_the_tree[0]

    @torch.no_grad()
    def teacher_logits(self, images: torch.Tensor) -> torch.Tensor:
        """The teacher's (B, C) answer to images (B, 3, H, W) prepared for the student."""
        teacher, convert = self._outside_the_tree
        return teacher(images if convert is None else convert(images))

    def forward(
        self, images: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        if not self.training:
            # Not through DDP: its buffer broadcast would wait for ranks that have fewer batches.
            return unwrap(self.student)(images)
        teacher_logits = None if self.teacher is None else self.teacher_logits(images)
        return self.student(images), teacher_logits

    def no_sync(self) -> AbstractContextManager:
        """DistributedDataParallel's `no_sync` for accumulation steps; nothing on one process."""
        is_ddp = isinstance(self.student, DistributedDataParallel)
        return self.student.no_sync() if is_ddp else nullcontext()


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside a DistributedDataParallel, or the network itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def load_teacher(arch: str, path: str, num_classes: int, device: torch.device | str) -> nn.Module:
    """Create a timm architecture, load a checkpoint into it strictly, and freeze it.

    The file may be this project's, timm's, a ConvNeXt, DeiT or RepDistiller release, a bare
    state_dict or a .safetensors. Where it holds EMA weights, those are loaded.

    Args:
        arch: a timm architecture name.
        path: the checkpoint file, or its http(s) address.
        num_classes: classes of the data.
        device: where the teacher computes.
    Returns: the network in eval mode, its parameters without gradient, with two more attributes:
        `data_config` (mean, std, input_size it was trained with) and `origin` (one line that says
        what was loaded).
    Raises: UserError for an unknown architecture or a file that does not fit it.
    """
    checkpoint = utils.read_checkpoint(path, "--teacher_path")
    try:
        state, key = utils.find_state_dict(checkpoint, TEACHER_KEYS)
    except ValueError as error:
        raise UserError(f"--teacher_path {path}: {error}; give a model checkpoint") from error

    models.check_architecture(arch, "--teacher_arch")
    config, config_from = _data_config(arch, checkpoint)
    teacher = models.create_model(arch, num_classes, config["input_size"], flag="--teacher_arch")
    state = utils.convert_state_dict(teacher, state)
    wanted = teacher.state_dict()

    classes = _rows_of_classifier(teacher, state)
    if classes not in (None, num_classes):
        raise UserError(
            f"--teacher_path {path}: this teacher tells {classes} classes apart, the data has "
            f"{num_classes}; give a teacher of the same classes, or fine-tune it on this data first"
        )
    if difference := utils.describe_mismatch(wanted, state):
        raise UserError(
            f"--teacher_arch {arch} does not fit --teacher_path {path}: {difference}; "
            "give the architecture that the file was trained as"
        )
    teacher.load_state_dict(state, strict=True)
    teacher.requires_grad_(False).eval().to(device)
    teacher.data_config = config
    parameters = sum(p.numel() for p in teacher.parameters())
    teacher.origin = (
        f"Teacher {arch} from {path}: weights '{key or 'bare state_dict'}'"
        f"{' (EMA)' if 'ema' in key else ''}, {parameters:,} parameters, {num_classes} classes, "
        f"{config['input_size']} px, mean {_short(config['mean'])}, std {_short(config['std'])} "
        f"(input as {config_from} says)"
    )
    return teacher


def _short(values: list[float]) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def _data_config(arch: str, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What the teacher was trained to see, and where that is known from."""
    cfg = timm.models.get_pretrained_cfg(arch)
    config = {"mean": list(cfg.mean), "std": list(cfg.std), "input_size": cfg.input_size[-1]}
    if isinstance(saved := checkpoint.get("data"), dict):  # this project's
        return config | {name: saved[name] for name in config}, "the file"
    return config, "the architecture's pretrained_cfg"


def _rows_of_classifier(model: nn.Module, state: dict[str, torch.Tensor]) -> int | None:
    """How many classes a state_dict's classifier has; None where it has none that can be found."""
    classifier = model.get_classifier()
    names = [name for name, module in model.named_modules() if module is classifier]
    weight = state.get(f"{names[0]}.weight") if names else None
    return None if weight is None else weight.shape[0]
