"""Is my set-up sound? Checks every part of knowledge distillation on dummy data, on the CPU.

    python test_kd.py

needs no pytest, no data and no GPU. It prints one line per component; the exit code is 1 when a
check fails. `pytest test_kd.py` runs the same checks.
"""

import contextlib
import io
import math
import sys
import tempfile
import traceback
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.loaders import Batch
from distillation import DistillationLoss, StudentWithDistillation, load_teacher
from engine import train_one_epoch
from models.checkpoint import read_checkpoint
from training import checkpoints
from training.optimizer import Schedule
from training.settings import LoopSettings

CLASSES, SIZE, BATCH = 10, 16, 8
CPU = torch.device("cpu")


def make_student() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet8", num_classes=CLASSES)


def make_teacher() -> nn.Module:
    """A teacher with random weights, saved as plain training would save it, and loaded."""
    torch.manual_seed(1)
    weights = timm.create_model("cifar_resnet20", num_classes=CLASSES).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.pth"
        checkpoints.save_checkpoint({"model": weights}, path)
        return load_teacher("cifar_resnet20", str(path), CLASSES, CPU)


class DummyLoader(list):
    """A few batches of noise, the same in every epoch."""

    def __init__(self, batches: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for number in range(batches):
            images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
            targets = torch.randint(CLASSES, (BATCH,), generator=generator)
            places = range(number * BATCH, (number + 1) * BATCH)
            self.append(Batch(images, targets, view=0, places=places))
        self.batches_in_epoch = batches

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Every epoch has the same batches."""


def train_two_steps(model: StudentWithDistillation, ema: ModelEmaV3 | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Schedule(lr=torch.full((2,), 0.1).numpy(), weight_decay=torch.zeros(2).numpy())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = DistillationLoss(nn.CrossEntropyLoss(), alpha=0.7, temperature=4.0)
    settings = LoopSettings(CPU, None, update_freq=1, clip_grad=None, seed=0)
    with contextlib.redirect_stdout(io.StringIO()):  # the epoch's own lines
        train_one_epoch(
            model, loss, DummyLoader(2), optimizer, scaler, schedule, 0, settings, ema=ema
        )


def copy_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_same(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_teacher_is_loaded_and_frozen() -> None:
    teacher = make_teacher()
    torch.manual_seed(1)
    saved = timm.create_model("cifar_resnet20", num_classes=CLASSES)
    assert is_same(teacher, saved.state_dict()), "weights differ from the file's"
    assert not any(p.requires_grad for p in teacher.parameters()), "a parameter is trainable"
    assert not any(module.training for module in teacher.modules()), "not in eval mode"


def test_wrapper_in_training_returns_both_logits() -> None:
    student, teacher = make_student(), make_teacher()
    model = StudentWithDistillation(student, teacher).train()
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    student_logits, teacher_logits = model(images)
    assert student_logits.shape == teacher_logits.shape == (BATCH, CLASSES)
    assert student_logits.requires_grad and not teacher_logits.requires_grad
    assert torch.equal(teacher_logits, teacher(images)), "not the teacher's own logits"
    assert student.training and not teacher.training, "train() reached the teacher"
    assert len(list(model.parameters())) == len(list(student.parameters()))


def test_wrapper_in_evaluation_returns_student_logits() -> None:
    student = make_student()
    model = StudentWithDistillation(student, make_teacher()).eval()
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(model(images), student(images))


def test_loss_equals_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(BATCH, CLASSES, generator=generator)
    teacher = torch.randn(BATCH, CLASSES, generator=generator)
    targets = torch.randint(CLASSES, (BATCH,), generator=generator)
    alpha, temperature = 0.7, 4.0

    def softmax(row: list[float]) -> list[float]:
        exps = [math.exp(x) for x in row]
        return [e / sum(exps) for e in exps]

    expected = 0.0  # in Python's float64, from the definition
    rows = zip(student.tolist(), teacher.tolist(), targets.tolist(), strict=True)
    for s, t, target in rows:
        p = softmax([x / temperature for x in t])
        q = softmax([x / temperature for x in s])
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        ce = -math.log(softmax(s)[target])
        expected += ((1 - alpha) * ce + alpha * temperature**2 * kl) / BATCH
    loss, _ = DistillationLoss(nn.CrossEntropyLoss(), alpha, temperature)(student, teacher, targets)
    assert math.isclose(loss.item(), expected, rel_tol=1e-6), f"{loss.item()} is not {expected}"


def test_step_changes_student_and_not_teacher() -> None:
    student, teacher = make_student(), make_teacher()
    student_before, teacher_before = copy_of(student), copy_of(teacher)
    train_two_steps(StudentWithDistillation(student, teacher))
    assert not is_same(student, student_before), "the student did not learn"
    assert is_same(teacher, teacher_before), "the teacher changed"


def test_ema_follows_student_only() -> None:
    student, teacher = make_student(), make_teacher()
    ema = ModelEmaV3(student, decay=0.5)
    names, before = set(student.state_dict()), copy_of(ema.module)
    train_two_steps(StudentWithDistillation(student, teacher), ema)
    assert set(ema.module.state_dict()) == names, "more than the student is averaged"
    assert not is_same(ema.module, before), "the average stood still"


def test_checkpoint_holds_no_teacher() -> None:
    student = make_student()
    model = StudentWithDistillation(student, make_teacher())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with tempfile.TemporaryDirectory() as folder:
        state = checkpoints.RunState(student, None, optimizer, scaler, {"output_dir": folder}, {})
        state.finish_epoch(0, {})
        state.save(improved=[], is_due=True, keep=1)
        saved = read_checkpoint(f"{folder}/checkpoint-0.pth").content
    assert saved["model"].keys() == student.state_dict().keys()
    stored = sum(len(group["params"]) for group in saved["optimizer"]["param_groups"])
    assert stored == len(list(student.parameters())), "the optimizer holds more than the student"


def test_two_processes_stay_in_step() -> None:
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = (Path(folder) / "processes").as_uri()
        torch.multiprocessing.spawn(_distributed_worker, args=(meeting_point,), nprocs=2)


def _distributed_worker(rank: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=2)
    student, teacher = make_student(), make_teacher()
    ddp = DistributedDataParallel(student)
    model = StudentWithDistillation(ddp, teacher)
    assert len(list(ddp.parameters())) == len(list(student.parameters())), "teacher inside DDP"
    images, targets, *_ = DummyLoader(1, seed=rank)[0]
    loss, _ = DistillationLoss(nn.CrossEntropyLoss(), 0.7, 4.0)(*model.train()(images), targets)
    loss.backward()
    gradient = student.fc.weight.grad
    both = [torch.empty_like(gradient) for _ in range(2)]
    dist.all_gather(both, gradient)
    assert gradient.abs().sum() > 0 and torch.equal(*both), "gradients differ between processes"
    dist.destroy_process_group()


def main() -> int:
    checks = [check for name, check in globals().items() if name.startswith("test_")]
    failed = 0
    for check in checks:
        name = check.__name__.removeprefix("test_").replace("_", " ")
        try:
            check()
            print(f"ok      {name}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {name}", flush=True)
            traceback.print_exc()
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
