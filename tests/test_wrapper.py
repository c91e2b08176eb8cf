"""The student that carries its teacher, and what the teacher is shown."""

import pytest
import timm
import torch
from torch import nn
from torchvision import transforms

import models  # noqa: F401
from distillation import (
    InputConversion,
    StudentWithDistillation,
    TeacherAdapter,
    TeacherInfo,
    load_teacher,
)
from teacher.logit_store import StoredTeacher


@pytest.fixture
def pair(teacher_file):
    student = timm.create_model("cifar_resnet8", num_classes=10)
    return student, load_teacher("cifar_resnet8", str(teacher_file), 10, "cpu")


def test_the_teacher_is_outside_parameters_state_and_modules(pair):
    student, teacher = pair
    model = StudentWithDistillation(student, teacher)
    assert model.teacher is teacher
    assert {id(p) for p in model.parameters()} == {id(p) for p in student.parameters()}
    assert len(model.state_dict()) == len(student.state_dict())
    assert not any(module is teacher for module in model.modules())


def test_batch_norm_of_the_teacher_stands_still_while_the_student_trains(pair):
    student, teacher = pair
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = StudentWithDistillation(student, teacher)
    for _ in range(3):
        model.train()
        model(torch.randn(4, 3, 16, 16) * 5)[0].sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())


def test_without_a_teacher_training_returns_none_for_it(pair):
    student, _ = pair
    logits, teacher_logits = StudentWithDistillation(student, None).train()(torch.randn(2, 3, 8, 8))
    assert logits.shape == (2, 10) and teacher_logits is None


CASTS = {
    "nothing": lambda model: model,
    "train": lambda model: model.train(),
    "eval and train": lambda model: model.eval().train(),
    "to": lambda model: model.to("cpu", torch.float64),
    "double": lambda model: model.double(),
    "half": lambda model: model.half().float(),
    "to channels_last": lambda model: model.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_raw_teacher_is_frozen_and_in_eval_mode_whatever_becomes_of_the_wrapper(cast):
    """The teacher comes as any network does: in training mode, with gradients."""
    student = timm.create_model("cifar_resnet8", num_classes=10)
    teacher = timm.create_model("cifar_resnet20", num_classes=10)
    assert teacher.training and next(teacher.parameters()).requires_grad
    model = CASTS[cast](StudentWithDistillation(student, teacher)).train()
    statistics = teacher.bn1.running_mean.clone()
    dtype = next(model.parameters()).dtype
    student_logits, teacher_logits = model(torch.randn(4, 3, 16, 16, dtype=dtype))
    assert student_logits.dtype == teacher_logits.dtype == dtype
    student_logits.sum().backward()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher.bn1.running_mean, statistics) and not teacher_logits.requires_grad
    assert all(module.training for module in student.modules())


def test_cached_logits_are_not_looked_up_without_the_key_of_a_batch():
    model = StudentWithDistillation(nn.Identity(), StoredTeacher(None, None)).train()
    with pytest.raises(ValueError, match="pass its key"):
        model(torch.zeros(2, 3, 8, 8))


class Mean(nn.Module):
    """Stands for any network: answers with the mean of each channel and of each quarter."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return torch.cat([images.mean((2, 3)), images[:, :, ::2, 1::2].mean((2, 3))], dim=1)


def test_the_teacher_sees_the_normalization_it_was_trained_with():
    student_config = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_size": 24}
    teacher_config = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "input_size": 24}
    pixels = torch.rand(5, 3, 24, 24)
    for_student = transforms.Normalize(student_config["mean"], student_config["std"])(pixels)
    for_teacher = transforms.Normalize(teacher_config["mean"], teacher_config["std"])(pixels)
    network = Mean()
    network.info = TeacherInfo(teacher_config)
    model = StudentWithDistillation(nn.Identity(), TeacherAdapter(network, student_config)).train()
    torch.testing.assert_close(model(for_student)[1], network(for_teacher), rtol=1e-5, atol=1e-5)


def test_the_teacher_sees_the_size_it_was_trained_with():
    config = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": 48}
    pixels = torch.rand(2, 3, 48, 48)
    shown = InputConversion(config, config | {"input_size": 16})(pixels)
    expected = transforms.functional.resize(
        pixels, [16, 16], transforms.InterpolationMode.BICUBIC, antialias=True
    )
    assert shown.shape == (2, 3, 16, 16)
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_converted_where_nothing_differs():
    config = {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1], "input_size": 16}
    images = torch.rand(2, 3, 16, 16)
    assert InputConversion(config, dict(config))(images) is images
