"""The distillation loss against references that share no code with it."""

import numpy as np
import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.task import LogitDistillationTask
from torch import nn

import losses
from distillation import DistillationLoss, PartlyLabeledLoss

B, C = 7, 11


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    student = (3 * torch.randn(B, C, generator=generator)).requires_grad_()
    teacher = 3 * torch.randn(B, C, generator=generator)
    return student, teacher, torch.randint(C, (B,), generator=generator)


def softmax64(rows):
    exps = np.exp(rows - rows.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


def reference(student, teacher, targets, alpha, temperature):
    """Value and gradient from the definition, in float64; targets are (B, C) probabilities."""
    s, t = student.detach().double().numpy(), teacher.double().numpy()
    p, q = softmax64(t / temperature), softmax64(s / temperature)
    kd = temperature**2 * (p * np.log(p / q)).sum(axis=1).mean()
    ce = -(targets * np.log(softmax64(s))).sum(axis=1).mean()
    gradient = (1 - alpha) * (softmax64(s) - targets) + alpha * temperature * (q - p)
    return (1 - alpha) * ce + alpha * kd, ce, kd, gradient / len(s)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_value_and_gradient_equal_the_float64_closed_form(logits, alpha, temperature):
    student, teacher, targets = logits
    criterion = DistillationLoss(nn.CrossEntropyLoss(), alpha, temperature)
    loss, parts = criterion(student, teacher if alpha else None, targets)
    loss.backward()
    expected = reference(student, teacher, np.eye(C)[targets], alpha, temperature)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert parts["ce"].item() == pytest.approx(expected[1], rel=1e-5)
    assert ("kd" in parts) == (alpha > 0)
    if alpha:
        assert parts["kd"].item() == pytest.approx(expected[2], rel=1e-5)
    np.testing.assert_allclose(student.grad.numpy(), expected[3], rtol=1e-4, atol=1e-6)


def test_soft_targets_reach_the_label_loss(logits):
    student, teacher, _ = logits
    soft = torch.softmax(torch.randn(B, C, generator=torch.Generator().manual_seed(4)), dim=1)
    loss, _ = DistillationLoss(SoftTargetCrossEntropy(), 0.6, 3.0)(student, teacher, soft)
    expected = reference(student, teacher, soft.double().numpy(), 0.6, 3.0)[0]
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_equals_timms_distillation_task(logits):
    student, teacher, targets = logits

    class Fixed(nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer = nn.Parameter(answer.detach().clone())
            self.num_classes, self.in_chans = C, 3
            self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

        def forward(self, images):
            return self.answer

    task = LogitDistillationTask(
        Fixed(student),
        Fixed(teacher),
        nn.CrossEntropyLoss(),
        distill_loss_weight=0.7,
        task_loss_weight=0.3,
        temperature=4.0,
        verbose=False,
    )
    theirs = task(torch.zeros(B, 3, 2, 2), targets)["loss"]
    ours, _ = DistillationLoss(nn.CrossEntropyLoss(), 0.7, 4.0)(student, teacher, targets)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_a_student_equal_to_its_teacher_has_no_distillation_loss(logits):
    student, _, targets = logits
    loss, parts = DistillationLoss(nn.CrossEntropyLoss(), 1.0, 4.0)(
        student, student.detach().clone(), targets
    )
    loss.backward()
    assert parts["kd"].item() == pytest.approx(0.0, abs=1e-5)
    assert student.grad.abs().max().item() < 1e-6


def test_alpha_one_keeps_the_labels_out_of_the_gradient(logits):
    student, teacher, targets = logits
    criterion = DistillationLoss(nn.CrossEntropyLoss(), 1.0, 4.0)
    gradients = []
    for labels in (targets, (targets + 1) % C):
        student.grad = None
        criterion(student, teacher, labels)[0].backward()
        gradients.append(student.grad.clone())
    assert torch.equal(*gradients)


def test_gradient_reaches_the_student_and_not_the_teacher(logits):
    student, teacher, targets = logits
    teacher.requires_grad_()
    with torch.no_grad():
        answer = teacher * 1
    loss, parts = DistillationLoss(nn.CrossEntropyLoss(), 0.7, 4.0)(student, answer, targets)
    loss.backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(logits, dtype):
    student, teacher, targets = (
        x.detach().to(dtype) if x.is_floating_point() else x for x in logits
    )
    criterion = DistillationLoss(nn.CrossEntropyLoss(), 0.7, 4.0)
    loss, _ = criterion(student, teacher, targets)
    expected, _ = criterion(student.float(), teacher.float(), targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_extreme_logits_stay_finite():
    student = torch.tensor([[6e4, -6e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-6e4, 6e4, 0.0]])
    loss, _ = DistillationLoss(nn.CrossEntropyLoss(), 0.7, 1.0)(student, teacher, torch.tensor([1]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize(("alpha", "temperature"), [(-0.1, 4), (1.1, 4), (0.7, 0), (0.7, -1)])
def test_impossible_settings_are_refused(alpha, temperature):
    with pytest.raises(ValueError, match="must"):
        DistillationLoss(nn.CrossEntropyLoss(), alpha, temperature)


# The divergences as their papers write them, in float64: student (B, C), teacher (B, C), labels.


def by_kl(s, t, y, T):
    p, q = softmax64(t / T), softmax64(s / T)
    return T**2 * (p * np.log(p / q)).sum(axis=1).mean()


def by_dkd(s, t, y, T, alpha=1.0, beta=8.0):
    total = 0.0
    for student, teacher, label in zip(softmax64(s / T), softmax64(t / T), y, strict=True):
        others = [c for c in range(C) if c != label]
        b, b_teacher = student[label], teacher[label]
        tckd = b_teacher * np.log(b_teacher / b)
        tckd += (1 - b_teacher) * np.log((1 - b_teacher) / (1 - b))
        q, p = student[others] / (1 - b), teacher[others] / (1 - b_teacher)
        total += alpha * tckd + beta * (p * np.log(p / q)).sum()
    return T**2 * total / len(s)


def by_dist(s, t, y, T):
    q, p = softmax64(s / T), softmax64(t / T)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return T**2 * (inter + intra)


def by_hard(s, t, y, T):
    return -np.log(softmax64(s))[np.arange(len(s)), t.argmax(axis=1)].mean()


def by_bce(s, t, y, T):
    p, q = 1 / (1 + np.exp(-t / T)), 1 / (1 + np.exp(-s / T))
    return -(T**2) * (p * np.log(q) + (1 - p) * np.log(1 - q)).sum(axis=1).mean()


REFERENCES = {"kl": by_kl, "dkd": by_dkd, "dist": by_dist, "hard": by_hard, "bce": by_bce}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_each_divergence_equals_its_formula(logits, name, standardized, temperature):
    student, teacher, targets = logits
    criterion = DistillationLoss(
        nn.CrossEntropyLoss(),
        1.0,
        temperature,
        divergence=losses.DIVERGENCES[name],
        standardized=standardized,
    )
    loss, parts = criterion(student, teacher, targets)
    loss.backward()

    def expected(rows):
        both = rows, teacher.double().numpy()
        if standardized:
            both = [(x - x.mean(1, keepdims=True)) / x.std(1, ddof=1, keepdims=True) for x in both]
        return REFERENCES[name](*both, targets.numpy(), temperature)

    rows = student.detach().double().numpy()
    assert loss.item() == pytest.approx(expected(rows), rel=1e-4)
    assert torch.equal(parts["kd"], loss.detach())
    gradient, step = np.zeros_like(rows), 1e-5
    for place in np.ndindex(*rows.shape):  # by central differences
        change = np.zeros_like(rows)
        change[place] = step
        gradient[place] = (expected(rows + change) - expected(rows - change)) / (2 * step)
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=1e-3, atol=1e-5)


def test_dkd_with_the_weights_of_its_equation_7_is_kl(logits):
    """KL = TCKD + (1 - p_teacher[y]) * NCKD, image by image."""
    student, teacher, targets = (x[:1] for x in logits)
    beta = 1 - (teacher / 4).softmax(dim=1)[0, targets[0]].item()
    decoupled = losses.dkd(student, teacher, targets, 4.0, alpha=1.0, beta=beta)
    torch.testing.assert_close(decoupled, losses.kl_divergence(student, teacher, 4.0))


def test_a_peaked_teacher_keeps_dkd_finite():
    student = torch.tensor([[60.0, -60.0, 0.0]], requires_grad=True)
    loss = losses.dkd(student, torch.tensor([[-80.0, 80.0, 0.0]]), torch.tensor([1]), 1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_weights_are_free_and_the_distillation_part_grows(logits):
    student, teacher, targets = logits
    usual = DistillationLoss(nn.CrossEntropyLoss(), 0.7, 4.0)(student, teacher, targets)[1]
    criterion = DistillationLoss(
        nn.CrossEntropyLoss(), 0.7, 4.0, ce_weight=1.0, kd_weight=9.0, warmup_epochs=4
    )
    for epoch, share in ((0, 0.25), (2, 0.75), (3, 1.0), (9, 1.0)):
        criterion.start_epoch(epoch)
        loss, parts = criterion(student, teacher, targets)
        assert loss.item() == pytest.approx(usual["ce"].item() + 9 * share * usual["kd"].item())
        assert parts == usual


@pytest.mark.parametrize("name", ["kl", "dist", "hard", "bce"])
def test_images_without_labels_are_compared_by_every_loss_without_labels(logits, name):
    student, teacher, targets = logits
    labels = torch.eye(C)[targets]
    labels[::2] = 0  # every second image has no label
    share = labels.sum().item() / B
    criterion = PartlyLabeledLoss(
        nn.CrossEntropyLoss(), 0.7, 4.0, share, 64, divergence=losses.DIVERGENCES[name]
    )
    loss, parts = criterion(student, teacher, labels)
    rows = student.detach().double().numpy(), teacher.double().numpy()
    kd = REFERENCES[name](*rows, None, 4.0)
    log_q = np.log(softmax64(rows[0]))
    ce = -(labels.numpy() * log_q).sum() / (B * share)
    assert parts["kd"].item() == pytest.approx(kd, rel=1e-4)
    assert loss.item() == pytest.approx(0.3 * ce + 0.7 * kd, rel=1e-4)
