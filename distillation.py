"""Knowledge distillation: the frozen teacher, the student that carries it, and the loss.

Hinton, Vinyals and Dean, 'Distilling the Knowledge in a Neural Network', 2015.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval

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
        self._divisor = torch.tensor(float(temperature))  # of a number, each division makes one

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
        divergence = F.kl_div(
            F.log_softmax(student_logits / self._divisor, dim=-1),
            F.log_softmax(teacher_logits.float() / self._divisor, dim=-1),
            reduction="sum",
            log_target=True,  # p * log p of a p that rounds to 0 would be NaN
        )
        kd = divergence * (self.temperature**2 / len(student_logits))
        loss = kd if self.alpha == 1 else torch.lerp(ce, kd, self.alpha)
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


def fuse_layers(network: nn.Module, size: int) -> nn.Module:
    """Let one convolution do what several layers of a network that is not trained do in a row.

    Parallel branches become one convolution where timm knows how (RepVGG, Ding et al. 2021; FastViT
    and others). A BatchNorm in evaluation scales and shifts each channel by constants, which the
    weights and bias of the convolution before it can hold (Jacob et al. 2018, section 3.2).

    Args:
        network: in eval mode, for images (B, 3, size, size).
    Returns: a fused copy; the network itself where nothing can be fused, or where that would change
        its answers, as when a convolution's output is also used elsewhere.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    # Some of timm's new layers come in float32 on the CPU, and to be trained.
    weight = next(network.parameters())
    fused = reparameterize_model(network).to(weight).requires_grad_(False).eval()
    names = {module: name for name, module in fused.named_modules()}
    pairs = []  # a convolution and the BatchNorm that takes its output

    def mark(conv: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.made_by = conv

    def pair(norm: nn.Module, inputs: Any) -> None:
        if hasattr(inputs[0], "made_by"):
            pairs.append((inputs[0].made_by, norm))

    hooks = [m.register_forward_hook(mark) for m in names if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(pair) for m in names if isinstance(m, nn.BatchNorm2d)]
    image = torch.linspace(-2, 2, 3 * size**2).view(1, 3, size, size).to(weight)
    with torch.no_grad():
        fused(image)
        for hook in hooks:
            hook.remove()
        for conv, norm in pairs:
            fused.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
            # timm's BatchNormAct2d is a BatchNorm with its activation.
            fused.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))
        answer = network(image)
        difference = (fused(image) - answer).abs().max()
    is_same = difference <= 0.01 * answer.abs().max()  # TF32 rounds to a thousandth
    return fused if is_same else network


class Teacher(nn.Module):
    """A frozen network that takes the student's input and answers in the student's classes.

    Args:
        network: from `load_teacher`; its `data_config` and `class_index` say what to convert.
        source: the data configuration of the images it will be given.
        dtype: of weights and computation; smaller ones save memory.
    """

    def __init__(
        self, network: nn.Module, source: dict[str, Any], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        network = fuse_layers(network, network.data_config["input_size"])
        self.network = network.to(dtype=dtype, memory_format=torch.channels_last)
        self.device, self.dtype = next(network.parameters()).device, dtype
        self.convert = InputConversion(source, network.data_config).to(self.device)
        self.class_index = network.class_index

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), on any device -> (B, C) on the same"""
        # A copy from a GPU to the host must be waited for: without, it would be read half-written.
        images_here = images.to(self.device, non_blocking=self.device.type == "cuda")
        inputs = self.convert(images_here).to(self.dtype)
        logits = self.network(inputs)  # (B, the teacher's classes)
        if self.class_index is not None:
            logits = logits[:, self.class_index]  # (B, C)
        return logits.to(images.device, non_blocking=images.is_cuda)


class TeacherEnsemble(nn.Module):
    """Several teachers whose tempered probabilities are averaged (Hinton et al. 2015, section 3).

    The answer is T * log of that average, so that a loss of the same temperature T sees exactly the
    averaged probabilities. Averaging logits would be another, sharper thing.

    Args:
        weights: one a teacher, above 0; scaled to a sum of 1.
    """

    def __init__(
        self, teachers: Sequence[nn.Module], weights: Sequence[float], temperature: float
    ) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.weights = [weight / sum(weights) for weight in weights]
        self.temperature = temperature

    def train(self, mode: bool = True) -> "TeacherEnsemble":
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, C)"""
        log_probabilities = [
            F.log_softmax(teacher(images).float() / self.temperature, dim=-1) + math.log(weight)
            for teacher, weight in zip(self.teachers, self.weights, strict=True)
        ]
        return self.temperature * torch.logsumexp(torch.stack(log_probabilities), dim=0)


class StudentWithDistillation(nn.Module):
    """A student that, while training, also asks its teacher.

    In training `forward(images)` returns (student_logits, teacher_logits); in evaluation it returns
    student_logits alone. The teacher is held outside the module tree: `parameters()`,
    `state_dict()`, `train()`, `to()` and DistributedDataParallel never see it.

    Args:
        student: the network to train, or its DistributedDataParallel.
        teacher: a frozen network in eval mode that takes the same images, or None to train without
            one (teacher_logits is then None).
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None) -> None:
        super().__init__()
        self.student = student
        self._outside_the_tree = (teacher,)  # a tuple is not registered as a child

    @property
    def teacher(self) -> nn.Module | None:
        return self._outside_the_tree[0]

    def forward(
        self, images: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        if not self.training:
            # Not through DDP: its buffer broadcast would wait for ranks that have fewer batches.
            return unwrap(self.student)(images)
        teacher_logits = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_logits = self.teacher(images)
        return self.student(images), teacher_logits

    def no_sync(self) -> AbstractContextManager:
        """DistributedDataParallel's `no_sync` for accumulation steps; nothing on one process."""
        is_ddp = isinstance(self.student, DistributedDataParallel)
        return self.student.no_sync() if is_ddp else nullcontext()


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside a DistributedDataParallel, or the network itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def load_teacher(
    arch: str,
    path: str,
    num_classes: int,
    device: torch.device | str,
    *,
    classes: Sequence[str] | None = None,
    teacher_classes: Sequence[str] | None = None,
    input_config: dict[str, Any] | None = None,
) -> nn.Module:
    """Create a timm architecture, load a checkpoint into it strictly, and freeze it.

    The file may be this project's, timm's, a ConvNeXt, DeiT or RepDistiller release, a bare
    state_dict or a .safetensors. Where it holds EMA weights, those are loaded.

    Args:
        arch: a timm architecture name.
        path: the checkpoint file, or its http(s) address.
        num_classes: classes of the data.
        device: where the teacher computes.
        classes: names of the data's classes in order, to match with the teacher's by name.
        teacher_classes: names of the teacher's, where the file does not tell them.
        input_config: any of mean, std and input_size, to overrule what the file or timm says.
    Returns: the network in eval mode, its parameters without gradient, with three more attributes:
        `data_config` (mean, std, input_size it was trained with), `class_index` (which of its
        outputs answer for the data's classes, None for all in order) and `origin` (a line that
        says what was loaded).
    Raises: UserError for an unknown architecture or a file that does not fit it or the data.
    """
    checkpoint = utils.read_checkpoint(path, "--teacher_path")
    try:
        state, key = utils.find_state_dict(checkpoint, TEACHER_KEYS)
    except ValueError as error:
        raise UserError(f"--teacher_path {path}: {error}; give a model checkpoint") from error

    models.check_architecture(arch, "--teacher_arch")
    config, config_from = _data_config(arch, checkpoint)
    if input_config:
        config, config_from = config | input_config, f"{config_from}, but for the flags given,"
    names = teacher_classes or _class_names(checkpoint)
    outputs = len(names) if names and classes else num_classes
    teacher = models.create_model(arch, outputs, config["input_size"], flag="--teacher_arch")
    state = utils.convert_state_dict(teacher, state)
    rows = _rows_of_classifier(teacher, state)
    if rows not in (None, outputs):
        remedy = (
            "--teacher_classes must name each of them"
            if teacher_classes
            else "give a teacher of the same classes, name the classes of this one with "
            "--teacher_classes, or fine-tune it on this data first"
        )
        raise UserError(
            f"--teacher_path {path}: this teacher tells {rows} classes apart, not {outputs}; "
            + remedy
        )
    if difference := utils.describe_mismatch(teacher.state_dict(), state):
        raise UserError(
            f"--teacher_arch {arch} does not fit --teacher_path {path}: {difference}; "
            "give the architecture that the file was trained as"
        )
    teacher.load_state_dict(state, strict=True)
    teacher.requires_grad_(False).eval().to(device)
    teacher.data_config = config
    teacher.class_index, order = _match_classes(names, classes, path)
    parameters = sum(p.numel() for p in teacher.parameters())
    teacher.origin = (
        f"Teacher {arch} from {path}: weights '{key or 'bare state_dict'}'"
        f"{' (EMA)' if 'ema' in key else ''}, {parameters:,} parameters, {outputs} classes "
        f"({order}), {config['input_size']} px, mean {_short(config['mean'])}, "
        f"std {_short(config['std'])} (input as {config_from} says)"
    )
    return teacher


def _short(values: Sequence[float]) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def _data_config(arch: str, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What the teacher was trained to see, and where that is known from."""
    cfg = timm.models.get_pretrained_cfg(arch)
    config = {"mean": list(cfg.mean), "std": list(cfg.std), "input_size": cfg.input_size[-1]}
    if isinstance(saved := checkpoint.get("data"), dict):  # this project's
        return config | {name: saved[name] for name in config}, "the file"
    args = checkpoint.get("args")
    args = args if isinstance(args, dict) else vars(args) if args is not None else {}
    if isinstance(args.get("imagenet_default_mean_and_std"), bool):  # the ConvNeXt script's
        is_imagenet = args["imagenet_default_mean_and_std"]
        config["mean"] = list(IMAGENET_DEFAULT_MEAN if is_imagenet else IMAGENET_INCEPTION_MEAN)
        config["std"] = list(IMAGENET_DEFAULT_STD if is_imagenet else IMAGENET_INCEPTION_STD)
    told = [args.get(name) for name in ("imagenet_default_mean_and_std", "mean", "std")]
    size = args.get("input_size") or args.get("img_size")  # timm's is (3, size, size), or img_size
    is_told = size or any(value is not None for value in told)
    if size:
        config["input_size"] = size if isinstance(size, int) else size[-1]
    for name in ("mean", "std"):  # timm's, where they were given by hand
        if args.get(name):
            config[name] = list(args[name])
    return config, "the file's arguments" if is_told else "the architecture's pretrained_cfg"


def _class_names(checkpoint: dict[str, Any]) -> list[str] | None:
    saved = checkpoint.get("data")
    return saved.get("classes") if isinstance(saved, dict) else None


def _match_classes(
    names: Sequence[str] | None, classes: Sequence[str] | None, path: str
) -> tuple[list[int] | None, str]:
    """Which of the teacher's outputs answer for the data's classes, and a word on it."""
    if not names or not classes:
        return None, "taken to be in the data's order"
    if missing := [name for name in classes if name not in names]:
        raise UserError(
            f"--teacher_path {path}: this teacher does not know {len(missing)} of the data's "
            f"classes ({', '.join(missing[:3])}); it knows {', '.join(names[:3])} …: give one that "
            "does, or its names in the data's spelling with --teacher_classes"
        )
    position = {name: index for index, name in enumerate(names)}
    index = [position[name] for name in classes]
    if index == list(range(len(names))):
        return None, "in the data's order"
    return index, f"{len(index)} of them matched by name"


def _rows_of_classifier(model: nn.Module, state: dict[str, torch.Tensor]) -> int | None:
    """How many classes a state_dict's classifier has; None where it has none that can be found."""
    weight = state.get(f"{utils.classifier_name(model)}.weight")
    return None if weight is None else weight.shape[0]
