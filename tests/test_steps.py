"""What a training step does beside the network's work: averages, clips, copies, waits, is timed."""

import contextlib
import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch._dynamo
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import models  # noqa: F401, registers cifar_resnet8
from data import loaders
from data.mixup import MixingSettings, make_mixup
from data.transforms import HostBatch, ToNetwork
from distillation import (
    DistillationLoss,
    PartlyLabeledLoss,
    SelectClasses,
    StudentWithDistillation,
)
from reporting import timing
from runtime import device
from runtime.device import send
from teacher.logit_store import StoredTeacher
from training import student as students
from training.history import History, Progress
from training.optimizer import Schedule, clip_gradients
from training.settings import LoopSettings
from training.student import ModelEma


def network():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.num_batches_tracked = torch.zeros((), dtype=torch.int64)  # fake tensors are no constants
    return nn.Sequential(nn.Conv2d(3, 4, 5), norm, nn.Flatten(), nn.Linear(64, 5))


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_the_moving_average_is_that_of_timm_to_the_bit(is_elsewhere):
    student = network()
    options = {"decay": 0.9, "use_warmup": True}
    ours, theirs = ModelEma(student, **options), ModelEmaV3(student, **options)
    if is_elsewhere:  # as if the student were on a GPU and the average in host memory
        ours._copies = [torch.empty_like(where[name]) for where, name in ours._weights]
    for step in range(1, 6):
        student(torch.randn(3, 3, 8, 8)).sum().backward()  # which moves BatchNorm's buffers
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


CUDA, STEPS, CLASSES = torch.device("cuda", 0), 12, 5


class Copies(TorchDispatchMode):
    """Notes each copy between devices and each read of a GPU's scalar that waits for the GPU."""

    def __init__(self):
        super().__init__()
        self.waits, self.copies = [], 0
        self.pinned = {}  # tensors in page-locked memory, by their identity

    def pin(self, tensor):
        self.pinned[id(tensor)] = tensor
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [args[0]] if isinstance(args[0] if args else None, torch.Tensor) else []
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero"):
            self.waits += [func.name() for tensor in tensors if tensor.device.type == "cuda"]
        if func.name() in ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_"):
            pair = (args[0], out) if func.name() == "aten::_to_copy" else args[:2]
            kinds = {(t[0] if isinstance(t, list) else t).device.type for t in pair}
            is_beside = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if kinds == {"cpu", "cuda"}:
                self.copies += 1
                is_to_gpu = func.name() == "aten::_to_copy" and out.device.type == "cuda"
                if not is_beside or (is_to_gpu and id(args[0]) not in self.pinned):
                    self.waits.append(func.name())
        return out


class Gpu:
    """Stands in for torch.cuda, and notes in which order batches are made and waited for."""

    def __init__(self):
        self.order, self.made = [], 0

    @staticmethod
    def expected(steps):
        """Each batch is made before the steps wait for the one before it."""
        made = [("make", number) for number in range(1, steps + 1)]
        waits = [("wait", number) for number in range(1, steps + 1)]
        pairs = zip(made[1:], waits, strict=False)
        return [made[0], *(event for pair in pairs for event in pair), waits[-1]]

    def Stream(self, of):  # noqa: N802
        return SimpleNamespace(wait_stream=lambda other: None, record_event=self.make)

    def make(self):
        self.made += 1
        self.order.append(("make", self.made))
        return "wait", self.made

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self, of):
        return SimpleNamespace(wait_event=self.order.append)

    def is_available(self):
        return False

    def manual_seed(self, seed):
        pass

    def max_memory_allocated(self, of):
        return 0


class HostBatches(loaders.Loader):
    """Pixels in host memory, as workers return them."""

    def __init__(self):
        self.order = SimpleNamespace(
            batches_in_epoch=STEPS,
            first_batch=0,
            view=0,
            places=lambda number: range(4 * number, 4 * number + 4),
            set_epoch=lambda *epoch: None,
        )
        self.batch = HostBatch(
            torch.zeros(4, 8, 8, 3, dtype=torch.uint8),
            torch.zeros(4, dtype=torch.int64),
            torch.empty(0, 5, dtype=torch.int64),
            torch.empty(0),
        )

    def __iter__(self):
        return iter([self.batch] * STEPS)


@pytest.mark.skipif(
    torch.__version__ < (2, 10), reason="fake CUDA tensors of torch 2.9 need a driver"
)
@pytest.mark.parametrize(
    ("set_up", "mode"),
    [
        ("plain", "pair"),
        ("taught", "pair"),
        ("taught by the CPU", "pair"),
        ("taught from disk", "pair"),
        ("taught, with classes by name", "batch"),
        ("taught, images mixed one by one", "elem"),
        ("taught, with partial labels", "elem"),
    ],
)
def test_no_step_waits_for_the_gpu(monkeypatch, set_up, mode):
    """On a GPU of fake tensors: mixing, clipping, and the average in host memory."""
    gpu, done = Gpu(), []
    event = SimpleNamespace(synchronize=lambda: None)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())
    monkeypatch.setattr(torch, "get_device_module", lambda of: gpu)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    for module in (device, students):
        monkeypatch.setattr(module, "record_event", lambda *args: event)

    def record(history, look):
        done.append(look.done)
        return look.tables(), look.norms()

    monkeypatch.setattr(History, "_record", record)
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: copies.pin(tensor))
        with CUDA:
            student, teacher = network(), network()
        if set_up == "taught by the CPU":
            teacher = network()
        if set_up == "taught from disk":
            rows = SimpleNamespace(
                will_need=lambda places: None,
                require=lambda places, name, device: send(torch.rand(4, CLASSES), device),
            )
            store = SimpleNamespace(file_of=lambda view: rows, needed=4 * STEPS)
            teacher = StoredTeacher(store, None)
        if "by name" in set_up:
            teacher = SelectClasses(teacher, list(reversed(range(CLASSES))))
        parameters = list(student.parameters())

        def backward(loss):  # which torch refuses without a driver
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        # Fake parameters do not move, so timm's copy is one that lies in host memory.
        monkeypatch.setattr("timm.utils.model_ema.deepcopy", lambda student: network())
        ema = ModelEma(student)
        config = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": 8}
        mixing = MixingSettings(0.8, 1.0, None, 1.0, 0.5, mode, 0.1)
        is_partial = "partial" in set_up
        mixup = make_mixup(mixing, CLASSES, batch_size=4, seed=0, partial_labels=is_partial)
        host = HostBatches()
        loss = partial(PartlyLabeledLoss, labeled_share=0.5, images_per_step=4)
        loss = loss if is_partial else DistillationLoss
        loader = loaders.DeviceLoader(host.order, host, ToNetwork(config, CUDA), mixup)
        copies.waits.clear()
        engine.train_one_epoch(
            StudentWithDistillation(student, None if set_up == "plain" else teacher),
            loss(SoftTargetCrossEntropy(), 0.0 if set_up == "plain" else 0.7, 4.0),
            loader,
            torch.optim.SGD(parameters, lr=0.1),
            torch.amp.GradScaler("cuda", enabled=False),
            Schedule(np.ones(STEPS), np.ones(STEPS)),
            0,
            LoopSettings(CUDA, None, 1, 1.0, 0),
            ema=ema,
        )
    assert copies.copies >= 3 * STEPS and copies.waits == []
    assert gpu.order == gpu.expected(STEPS)
    assert done == sorted(done) and done[-1] == STEPS


def test_a_slow_teacher_on_the_cpu_is_asked_after_the_student(monkeypatch):
    """And the logits are those of the other order."""
    asked = []

    class Named(nn.Linear):
        def forward(self, images):
            asked.append(self.bias.numel())
            return super().forward(images)

    student, teacher, images = Named(4, 2), Named(4, 3), torch.randn(5, 4)
    model = StudentWithDistillation(student, teacher)
    expected = model(images)
    monkeypatch.setattr("distillation.has_streams", lambda device: True)
    found = model(images)
    assert asked == [3, 2, 2, 3]
    assert all(map(torch.equal, found, expected))


def test_time_is_what_the_device_spent_and_waited(monkeypatch):
    """Six steps of 3 s on the device, 1 s of which the teacher's; the host needs 0.1 s for each.

    Batches take the host 0.1 s, and the second one 8 s, in which the device runs out of work.
    """
    host, device_free = [0.0], [0.0]

    class Event:
        def __init__(self, *args, **kwargs):
            self.at = device_free[0] = max(device_free[0], host[0])

        def query(self):
            return self.at <= host[0]

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    def compute(seconds):
        host[0] += 0.05
        device_free[0] = max(device_free[0], host[0]) + seconds

    class Batches(loaders.Loader):
        order = None

        def __iter__(self):
            for number in range(6):
                host[0] += 8.0 if number == 1 else 0.1
                yield number

    monkeypatch.setattr(timing, "record_event", Event)
    monkeypatch.setattr(
        timing, "synchronize", lambda device: host.__setitem__(0, max(host[0], device_free[0]))
    )
    monkeypatch.setattr(timing.time, "perf_counter", lambda: host[0])
    times = timing.TimeSplit(CUDA)
    for _ in timing.TimedLoader(Batches(), times):
        with times.on_device("teacher"):
            compute(1.0)
        compute(2.0)
    parts = times.parts()
    # The device is idle for the first 0.1 s; for 5.05 s after its first step, which ends at 3.15 s,
    # since the second batch is there at 8.2 s; and for 0.05 s after each of these two batches.
    assert parts["waiting for data"] == pytest.approx(0.1 + 5.05)
    assert parts["teacher"] == pytest.approx(6 * 1.0 + 2 * 0.05)
    assert sum(parts.values()) == pytest.approx(host[0]) == pytest.approx(0.15 + 3 + 5.1 + 5 * 3)


def test_a_run_compiles_each_network_once():
    """Though images are scored in batches of other sizes, before, between and after the epochs."""
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    # Torch 2.9 would not compile an nn.Sequential, which is torch's own.
    student, teacher = (timm.create_model("cifar_resnet8", num_classes=CLASSES) for _ in range(2))
    for part in (student, teacher):
        part.compile(backend="eager")
    model = StudentWithDistillation(student, teacher)
    settings = LoopSettings(torch.device("cpu"), None, 1, None, 0)

    def batches(sizes):
        targets = torch.arange(8) % CLASSES
        return [loaders.Batch(torch.randn(n, 3, 8, 8), targets[:n], 0, range(n)) for n in sizes]

    class Four(loaders.Loader):
        batches_in_epoch = 3

        def set_epoch(self, *epoch):
            pass

        def __iter__(self):
            return iter(batches([4, 4, 4]))

    for epoch in range(2):
        for part in (teacher, student):
            engine.evaluate(batches([8, 8, 3]), part, settings)
        engine.train_one_epoch(
            model,
            DistillationLoss(nn.CrossEntropyLoss(), 0.7, 4.0),
            Four(),
            torch.optim.SGD(student.parameters(), lr=0.1),
            torch.amp.GradScaler("cpu", enabled=False),
            Schedule(np.ones(6), np.ones(6)),
            epoch,
            settings,
        )
    assert counted["unique_graphs"] - before == 2


def test_processes_with_gpus_learn_of_a_signal_at_the_next_look(monkeypatch):
    """So that no step waits for what all of them report."""
    asked, read = [], []

    def begin_largest(numbers, device):
        asked.append(numbers)
        number = len(asked)

        def answer():
            read.append(number)
            return [15 if number == 3 else 0, numbers[1]]

        return answer

    monkeypatch.setattr("training.history.distributed.begin_largest", begin_largest)
    monkeypatch.setattr("training.history.distributed.world_size", lambda: 2)
    constant = Schedule(np.ones(9), np.ones(9))
    settings = LoopSettings(CUDA, None, 1, None, 0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    history = History(0, 9, constant, settings, scaler, None, Progress())
    stops = []
    for _ in range(4):
        history._plan(seconds=2.0)
        stops.append((history.every, history.stop))
        assert read == list(range(1, len(asked)))
    assert stops == [(0, 0), (2, 0), (2, 0), (2, 15)]
