"""distill.py: from a folder of images to a small model with a verdict."""

import json
import multiprocessing
import re
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import CONFIG, write_checkpoint
from PIL import Image

import distill
from arguments.defaults import usable_cores
from pipeline import commands, images, planning, rules
from pipeline.images import look
from pipeline.plan import Network, Plan, Scale, Speed, fit
from pipeline.planning import identity_of
from utils import UserError


def write_images(folder: Path, count: int, classes: str = "ab") -> Path:
    """Class folders of noisy images of 8 pixels; each class has a brightness of its own."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count // len(classes)):
            pixels = rng.normal(60 + 90 * label, 40, (8, 8, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """The scripts that run; the trainings are short, of the few seeds and images a path needs."""
    scripts, start = [], commands.Commands._start

    def spy(self: commands.Commands, command: commands.Command, stage: str) -> BaseProcess:
        scripts.append(command.script)
        return start(self, command, stage)

    monkeypatch.setattr(commands.Commands, "_start", spy)
    monkeypatch.setattr(rules, "PASSES", {"nothing": (1, 100), "weights": (1, 100)})
    monkeypatch.setattr(images, "CROSS_VALIDATED", 10)
    monkeypatch.setattr(distill, "missing_onnx_packages", lambda: ["onnx"])
    return scripts


def test_the_whole_path_ends_with_a_verdict_and_a_model_and_is_not_run_twice(
    started, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(distill, "anything_to_move", lambda *args: ("too little", False))
    folder, out = write_images(tmp_path / "images", 60), tmp_path / "out"
    argv = [str(folder), "--out", str(out), "--student", "cifar_resnet8", "--seeds", "2"]
    assert distill.main(argv) == 0
    assert "Nothing to move: no teacher is better than the" in capsys.readouterr().out
    assert "too little" in (out / "report.html").read_text()
    assert [folder.name for folder in (out / "students").iterdir()] == ["kd=false,seed=0"]
    argv += ["--always_distill", "true"]  # which keeps what there is
    assert distill.main(argv) == 0
    printed = capsys.readouterr().out
    assert "48 labeled to train on, 0 without labels; 12 judge; 2 classes" in printed
    result = json.loads((out / "result.json").read_text())
    scores = [
        json.loads((out / f"students/kd={kd},seed={seed}/log.txt").read_text().splitlines()[-1])
        for kd in ("false", "true")
        for seed in (0, 1)
    ]
    alone, other, distilled, another = (record["test_acc1"] for record in scores)
    assert result["verdict"]["mean"] == pytest.approx((distilled + another - alone - other) / 2)
    assert f"{result['verdict']['verdict']}: {result['verdict']['mean']:+.2f}" in printed
    assert (out / "model.pt2").exists() and result["files"] == [str(out / "model.pt2")]
    assert "12 images" in (out / "report.html").read_text()
    trained = started.count("main.py")
    assert distill.main(argv) == 0
    is_new = result["verdict"]["mean"] > 0  # the student that is handed over, so calibrated
    once = {"measured": 2, "choosing": 2, "judged": 4, "calibrated": 1 + is_new}
    assert started.count("main.py") == trained == sum(once.values())
    assert distill.main([*argv, "--", "--lr", "1e-3"]) == 2
    assert "was begun with different flags (none became --lr 1e-3)" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(folder / "a" / "0.png", optimize=True, dpi=(72, 72))
    assert distill.main(argv) == 2
    assert "was begun with different images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--", "--kd", "true"], "--kd: is set by distill.py"),
        (["--", "--kd_alpha", "0.5"], "--kd_alpha: is for distilled students alone; put it into"),
        (["--", "--sched", "step"], "pass --decay_epochs, such as 150 225"),
        (["--teacher", "resnet18=none.pth"], "--teacher none.pth: no such file"),
        (["--student", "resnt18"], "did you mean resnet18"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_any_image_is_read(more, expected, tmp_path, capsys):
    argv = [str(tmp_path / "none"), "--out", str(tmp_path / "out"), *more]
    assert distill.main(argv) == 2 and expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "args.json").touch()
    assert distill.main([*argv[:2], str(tmp_path)]) == 2
    assert "holds a run of main.py" in capsys.readouterr().err


def test_a_plan_may_be_changed_until_something_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning, "measure", lambda *args: Speed(1, 1e-3))
    folder, out = write_images(tmp_path / "images", 60), tmp_path / "out"
    file = tmp_path / "weights.pth"  # which sees as many pixels as its student
    torch.save(timm.create_model("cifar_resnet20", num_classes=5).state_dict(), file)
    argv = [str(folder), "--out", str(out), "--plan", "true", "--student", "cifar_resnet8"]
    argv += ["--teacher", f"cifar_resnet20={file}", "--input_size", "24"]
    for more in ([], ["--seeds", "2"]):
        assert distill.main([*argv, *more]) == 0
        printed = capsys.readouterr().out
        assert printed.count("24 pixels") == 4 and f"{2 if more else 4} seeds" in printed
    (out / commands.RECORD).write_text('{"plan/a": [], "choose/a": []}')
    assert distill.main(argv) == 2
    assert "flags (--seeds 2 --budget 2h became --seeds" in capsys.readouterr().err


class Brightness(torch.nn.Module):
    """Bright images are of the second class; where that begins is in the middle of this class."""

    def __init__(self, num_classes: int, sureness: float = 1) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, num_classes)
        self.fc.weight.data = sureness * torch.tensor([[0.0] * 3, [1.0] * 3])
        self.fc.bias.data = sureness * torch.tensor([0.0, -3 * 150 / 255])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.mean((2, 3)))


def test_a_recipe_with_an_ema_hands_over_and_calibrates_the_weights_that_are_exported(
    started, tmp_path, monkeypatch
):
    """Here the EMA, by the accuracies in the checkpoint; it is five times as sure.

    Beside a GPU: --device cpu decides about the plan, and reaches the evaluation.
    """
    monkeypatch.setattr(planning, "measure", lambda *args: Speed(1, 1e-3))
    monkeypatch.setattr(planning, "default_device", lambda: "cuda")
    folder, out = write_images(tmp_path / "images", 60), tmp_path / "out"
    (tmp_path / "ema.args").write_text("--model_ema true\n--model_ema_eval true\n")
    argv = [str(folder), "--out", str(out), "--recipe", str(tmp_path / "ema.args")]
    args = distill.get_parser().parse_args([*argv, "--student", "test_distill:Brightness"])
    args.input_size = 8
    found, device = look(str(folder), "", "", "", out / "images"), ["--device", "cpu"]
    plan, _ = planning.make_plan(args, found, device, 3600)
    assert plan.jobs == min(planning.MOST_JOBS, usable_cores())
    for teacher in (None, plan.teachers[0][0]):
        assert "--model_ema true" in " ".join(plan.student_flags(teacher, "teacher.pth"))

    student = distill.hand_over(plan, {"mean": 1.0})
    (out / student).mkdir(parents=True)
    config = CONFIG | {"input_size": 8, "mean": [0.0] * 3, "std": [1.0] * 3}
    file = write_checkpoint(
        out / student / "checkpoint-0.pth", plan.student.arch, ["a", "b"], config,
        data_path=str(folder), scores={"test_acc1": 50.0, "test_acc1_ema": 60.0},
    )  # fmt: skip
    weights = {"model": Brightness(2).state_dict(), "model_ema": Brightness(2, 5).state_dict()}
    torch.save(torch.load(file, weights_only=True) | weights, file)
    runs = commands.Commands(out, {"export and report": 0.0})
    temperature = distill.calibrate(plan, runs, student)
    assert " ".join(device) in " ".join(runs.finished["calibrate"])
    kept = json.loads(file.with_name(f"{file.name}.calibration.json").read_text())
    (of_raw,) = (value for name, value in kept.items() if name.startswith("raw"))
    assert temperature == pytest.approx(5 * of_raw) and of_raw != 1
    distill.export(plan, runs, student)
    images = torch.randn(2, 3, 8, 8)
    exported = torch.export.load(out / "model.pt2").module()(images)
    torch.testing.assert_close(exported, Brightness(2, 5)(images) / temperature)


def test_a_command_that_fails_is_named_with_its_last_lines_and_is_run_again(started, tmp_path):
    runs = commands.Commands(tmp_path, {"choose": 0.0})
    flags = ["--epochs", "0"]
    for _ in range(2):
        with pytest.raises(UserError, match=re.escape("--epochs 0: must be 1 or more")):
            runs.run("choose", "one", "main.py", flags)
    assert started == ["main.py", "main.py"] and not runs.finished


def test_a_command_starts_processes_as_a_program_of_its_own_does(tmp_path, monkeypatch):
    (tmp_path / "what.py").write_text(
        "import multiprocessing, sys\n"
        "def main(argv):\n"
        "    print(multiprocessing.get_start_method(), sys.argv[1:] == argv, *argv)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    log = commands.Commands(tmp_path, {"choose": 0.0}).run("choose", "one", "what.py", ["--a", "b"])
    assert log.read_text().split() == [multiprocessing.get_start_method(), "True", "--a", "b"]


def plan_of(labeled: int, unlabeled: int, folds: int = 5) -> Plan:
    """A plan for images that are not there, of two networks that take 1 and 2 ms per image."""
    of = ["a", "b"], labeled, 100, unlabeled, folds, labeled, 50.0, 32
    some = images.Images("root", Path("folder"), *of, "pile" if unlabeled else "", "id")
    student = Network("cifar_resnet8", (), "", "", 32, 78_042)
    teacher = Network("cifar_resnet20", (), "", "", 32, 272_474)
    speeds = {"cifar_resnet8": Speed(5, 1e-3), "cifar_resnet20": Speed(5, 2e-3)}
    scale = Scale(1, 4, 1)
    return Plan(some, [(teacher, "scratch")], student, [], [], [], [], speeds, scale, jobs=1)


def value_of(flags: list[str], flag: str) -> int:
    return int(flags[flags.index(flag) + 1])


def test_the_student_alone_sees_as_many_images_as_the_distilled_student():
    plan = plan_of(100, 900)
    alone = plan.student_flags(None, "")
    distilled = plan.student_flags(plan.teachers[0][0], "teacher.pth")
    shown = [value_of(alone, "--epochs") * 100, value_of(distilled, "--epochs") * 1000]
    assert shown == [40_000, 40_000]
    assert value_of(alone, "--batch_size") == value_of(distilled, "--batch_size")
    assert "--unlabeled" in distilled and "--unlabeled" not in alone


def test_a_budget_is_kept_and_one_that_is_too_small_says_what_would_fit():
    plan = plan_of(100, 900)
    sums = []
    for budget in (3600, 600, 250):
        plan.scale = fit(plan, budget, None)
        sums.append(sum(plan.seconds().values()))
        assert sums[-1] <= budget
    assert sums == sorted(sums, reverse=True) and plan.scale.share == 0.25
    with pytest.raises(UserError) as caught:
        fit(plan, 60, None)
    needed = int(re.search(r"--budget (\d+)m", str(caught.value))[1])
    assert sum(plan.seconds().values()) <= 60 * needed
    assert fit(plan, 60 * needed, None).share == 0.25


def test_weights_that_were_replaced_under_their_name_are_noticed(tmp_path):
    file = tmp_path / "teacher.pth"
    network = Network(f"resnet18={file}", ("--finetune", str(file)), "", "", 32, 1)
    identities = set()
    for content in (b"one", b"two"):
        file.write_bytes(content)
        identities.add(identity_of(network))
    assert len(identities) == 2
    assert identity_of(network) in identities


@pytest.mark.parametrize(
    ("teacher", "images", "goes_on"), [(60, 100, True), (55, 100, False), (55, 1000, True)]
)
def test_a_teacher_must_be_better_than_the_student_by_a_standard_error(teacher, images, goes_on):
    # sqrt((0.5 · 0.5 + 0.6 · 0.4) / 100) = 7.0 points, and 2.2 for 1,000 images.
    plan = plan_of(images, 0)
    scores = {"alone": 50.0, "cifar_resnet20, scratch": float(teacher)}
    line, is_above = distill.anything_to_move(plan, scores, plan.teachers[0])
    assert is_above is goes_on and ("nothing to move" in line) is not goes_on


@pytest.mark.parametrize(("alone", "images", "warns"), [(54, 100, True), (56, 100, False)])
def test_a_student_that_learns_nothing_is_warned_of(alone, images, warns):
    # Two classes: 50 % by chance, with a standard error of 5 points.
    assert bool(distill.warning_of_chance(plan_of(images, 0), alone)) is warns


def test_the_images_that_choose_and_those_that_judge_are_different_and_complete(tmp_path, capsys):
    root = write_images(tmp_path / "images", 60)
    (root / "c").mkdir()
    Image.new("RGB", (8, 8)).save(root / "c" / "without.png")
    names = [f"{name}/{index}.png" for name in "ab" for index in range(30)]
    (tmp_path / "few.csv").write_text("".join(f"{n},{n[0]}\n" for n in names[::2]))
    found = look(str(root), str(tmp_path / "few.csv"), "", "rest", tmp_path / "out")
    rows = {
        file.stem: {line.split('"')[1] for line in file.read_text().splitlines()[1:]}
        for file in (tmp_path / "out").glob("*.csv")
    }
    assert rows["train"] | rows["test"] == {*names[::2]} and not rows["train"] & rows["test"]
    held_out = [rows[f"fold_{fold}_val"] for fold in range(5)]
    assert set.union(*held_out) == rows["train"] and sum(map(len, held_out)) == len(rows["train"])
    for fold in range(5):
        assert rows[f"fold_{fold}_train"] == rows["train"] - held_out[fold]
    pile = {str(p.relative_to(found.pile)) for p in Path(found.pile).rglob("*.png")}
    assert pile == {*names[1::2], "c/without.png"} and found.unlabeled == 31
    assert found.chance == 50


BAD = {
    "--budget soon": "--budget soon: is no time",
    "--out {images}/out": "lies inside IMAGES",
    "--student cifar_resnet20 --teacher cifar_resnet8": "--student cifar_resnet20: has 271,",
    "--teacher resnet5": "--teacher resnet5: timm knows no such architecture",
    "--labels {few}": "1 labeled image(s) of b: 5 of each class are needed",
    "--unlabeled {nowhere}": "--unlabeled {nowhere}: is not a folder",
    "-- --epoch 3": "--epoch; did you mean --epochs?",
    "--seeds 0": "--seeds 0: must be at least 1",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_before_anything_is_trained(flags, tmp_path, capsys):
    folder = write_images(tmp_path / "images", 60)
    few = tmp_path / "few.csv"
    few.write_text("".join(f"a/{n}.png a\n" for n in range(5)) + "b/1.png b\n")
    names = {"images": folder, "few": few, "nowhere": tmp_path / "nowhere"}
    argv = flags.format(**names).split()
    if "--out" not in flags:
        argv = ["--out", str(tmp_path / "out"), *argv]
    assert distill.main([str(folder), *argv]) == 2
    error = capsys.readouterr().err
    assert BAD[flags].format(**names) in error and "Traceback" not in error
    assert len(error.splitlines()) <= 2
