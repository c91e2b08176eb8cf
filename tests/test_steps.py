"""What a training step costs beside the network's work: its moving average, gradients, waits."""

import copy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import models  # noqa: F401, registers cifar_resnet8
from training.optimizer import clip_gradients
from training.student import ModelEma


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_the_moving_average_is_that_of_timm_to_the_bit(is_elsewhere):
    student = network()
    options = {"decay": 0.9, "use_warmup": True}
    ours, theirs = ModelEma(student, **options), ModelEmaV3(student, **options)
    if is_elsewhere:  # as if the student were on a GPU and the average in host memory
        ours._copies = [torch.empty_like(where[name]) for where, name in ours._weights]
    for step in range(1, 6):
        student(torch.randn(3, 3, 4, 4)).sum().backward()  # which moves BatchNorm's buffers
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        if step == 3:  # a network may replace a buffer
            student[1].running_mean = student[1].running_mean + 1
        for ema in (ours, theirs):
            ema.update(student, step=step)
        if is_elsewhere:
            assert not same(ours.module, theirs.module)  # one update behind until it is read
        if step in (1, 2, 5):
            assert same(ours.average, theirs.module)


def same(one, other):
    states = one.state_dict(), other.state_dict()
    pairs = zip(states[0].items(), states[1].items(), strict=True)
    return all(name == named and torch.equal(a, b) for (name, a), (named, b) in pairs)


@pytest.mark.parametrize("most", [None, 0.5, 1e6])
def test_gradients_are_clipped_as_by_torch_to_the_bit(most):
    ours = timm.create_model("cifar_resnet8", num_classes=5)
    ours(torch.randn(2, 3, 8, 8)).square().sum().backward()
    theirs = copy.deepcopy(ours)
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.grad = parameter.grad.clone()
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), most or 1e9)
    assert torch.equal(clip_gradients([p.grad for p in ours.parameters()], most), expected)
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
