"""What a run tells at its end: calibration, classes and confusions, time, costs, TensorBoard."""

import json
import os
import shlex
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import BOARD, CPU, ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

import compare
import main
from data.loaders import Batch
from deploy.model import open_model
from distillation import DistillationLoss
from engine import evaluate
from models import cost
from reporting import metrics, summary, terminal
from reporting.summary import cost_text
from reporting.tensorboard import (
    answer_text,
    board_folder,
    grid,
    label_text,
    shortened,
    to_pictures,
)
from training.settings import LoopSettings

torch.manual_seed(0)
LOGITS = torch.randn(400, 5, dtype=torch.float64) * 2
TARGETS = torch.where(torch.rand(400) < 0.6, LOGITS.argmax(dim=1), torch.randint(0, 5, (400,)))


def error_by_hand(logits: np.ndarray, targets: np.ndarray) -> float:
    """Guo et al. 2017, eq. 3, image by image, in percent."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    bins = [[] for _ in range(15)]
    for row, target in zip(probabilities, targets, strict=True):
        confidence = row.max()
        number = next(m for m in range(1, 16) if (m - 1) / 15 < confidence <= m / 15)
        bins[number - 1].append((row.argmax() == target, confidence))
    gaps = [abs(sum(r for r, _ in b) - sum(c for _, c in b)) for b in bins]
    return 100 * sum(gaps) / len(targets)


def test_calibration_error_is_that_of_the_paper_over_any_batches():
    total = torch.zeros(15, dtype=torch.float64)
    for logits, targets in zip(LOGITS.split(33), TARGETS.split(33), strict=True):
        confidences, predictions = logits.softmax(dim=1).max(dim=1)
        total += metrics.calibration_gaps(confidences, predictions == targets)
    found = metrics.calibration_error(total.tolist(), len(TARGETS))
    assert found == pytest.approx(error_by_hand(LOGITS.numpy(), TARGETS.numpy()), abs=1e-9)
    assert metrics.bins_of(torch.tensor([1e-9, 1 / 15, 0.5, 1.0])).tolist() == [0, 0, 7, 14]


def test_fitted_temperature_has_the_smallest_loss():
    best, problem = metrics.fit_temperature(LOGITS.float(), TARGETS)
    assert not problem

    def loss(temperature):
        return F.cross_entropy(LOGITS / temperature, TARGETS).item()

    assert all(loss(best) < loss(best * factor) for factor in (0.5, 0.99, 1.01, 2))


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (LOGITS.argmax(dim=1), "all 400 held-out images are right"),  # the colder, the better
        (LOGITS.argmin(dim=1), "all 400 held-out images are wrong"),
        (torch.cat([LOGITS.argmin(dim=1)[:399], LOGITS.argmax(dim=1)[399:]]), "not between"),
    ],
)
def test_no_temperature_is_fitted_to_images_that_allow_none(targets, reason):
    temperature, problem = metrics.fit_temperature(LOGITS, targets)
    assert temperature == 1 and reason in problem


def test_report_counts_classes_and_confusions():
    answers = [
        metrics.answers_of(LOGITS[i::2].float(), TARGETS[i::2], range(i, 400, 2)) for i in range(2)
    ]
    joined = metrics.join(answers, shared=True)
    assert joined.targets.tolist() == TARGETS.tolist()  # in the order of the data
    found = metrics.report(joined, [*"abcde", "never seen"])
    predictions = LOGITS.argmax(dim=1)
    for index, row in enumerate(found["per_class"][:5]):
        of_class = TARGETS.eq(index)
        assert row["images"] == of_class.sum()
        assert row["acc1"] == pytest.approx(100 * (predictions[of_class] == index).double().mean())
    assert found["per_class"][5] == {"class": "never seen", "images": 0, "acc1": None}
    assert sum(c["images"] for c in found["confusions"]) == (predictions != TARGETS).sum()
    first = found["confusions"][0]
    pair = ["abcde".index(first[name]) for name in ("class", "predicted")]
    is_pair = TARGETS.eq(pair[0]) & predictions.eq(pair[1])
    assert first["images"] == is_pair.sum() == max(c["images"] for c in found["confusions"])
    assert found["nll"] == pytest.approx(F.cross_entropy(LOGITS, TARGETS).item(), rel=1e-6)
    assert found["ece"] == pytest.approx(error_by_hand(LOGITS.numpy(), TARGETS.numpy()), abs=1e-4)
    matrix = np.zeros((5, 5), dtype=int)
    np.add.at(matrix, (TARGETS.numpy(), predictions.numpy()), 1)
    title, head, *rows = metrics.report_lines(found, 40)
    assert "rows" in title and head.split() == [*"abcde"]  # 'never seen' was never predicted either
    for row, counts in zip(rows, matrix, strict=True):
        name, *cells, accuracy, _ = row.split()
        assert cells == [str(n) if n else "." for n in counts] and len(row) <= 40
        assert float(accuracy) == round(100 * counts["abcde".index(name)] / counts.sum(), 2)
    narrow = metrics.report_lines(found, 20)  # no room for the counts: a list
    assert "Lowest accuracy of 5 classes:" in narrow and "Most confused:" in narrow
    pair = f"  {first['class']} taken for {first['predicted']} ({first['images']} of"
    assert any(line.startswith(pair) for line in narrow)


def test_evaluation_reports_and_calibrates_on_held_out_images(run_main, tmp_path):
    train = ["--train_samples", 200, "--epochs", 3, "--lr", "3e-3"]
    run = run_main(*train, "--holdout", 100, "--report", tmp_path / "r.json", output_dir=tmp_path)
    assert run.code == 0 and "Answers (columns)" in run.out, run.err
    report = json.loads((tmp_path / "r.json").read_text())["student"]
    last = run.log[-1]
    assert (report["acc1"], report["nll"]) == pytest.approx((last["test_acc1"], last["test_loss"]))
    assert report["ece"] == pytest.approx(last["test_ece"], abs=1e-6) and report["images"] == 100

    resume = ["--eval", "true", "--resume", tmp_path / "checkpoint-2.pth"]
    scored = run_main(*resume, "--calibrate", "true", "--report", tmp_path / "r.json")
    assert scored.code == 0 and "DIGITS: 360 images" in scored.out, scored.err
    report = json.loads((tmp_path / "r.json").read_text())["student"]
    plain = run_main(*resume, "--data_set", "DIGITS")
    assert f"test_loss {report['nll']:.4f}" in plain.out and "calibrated" not in plain.out
    assert report["nll_calibrated"] < report["nll"]  # after 3 epochs a network is far too unsure
    assert report["ece_calibrated"] < report["ece"] and 0.01 < report["temperature"] < 1
    model = open_model(str(resume[-1]), torch.device("cpu"))
    assert model.card.temperature == report["temperature"]

    same = run_main(*resume, "--calibrate", "true", "--holdout", 100)
    assert same.code == 2 and "leaves only the held-out images" in same.err
    for file in (tmp_path, tmp_path / "r.json" / "below_a_file.json"):
        run = run_main(*resume, "--report", file)
        assert run.code == 2 and "--report" in run.err and "Model" not in run.out, run.err
    none = run_main(*train, "--epochs", 1, output_dir=tmp_path / "all")
    asked = ["--eval", "true", "--resume", none.folder / "checkpoint-0.pth", "--calibrate", "true"]
    scored = run_main(*asked, "--report", tmp_path / "r.json")
    assert "held out no images" in scored.out and "calibrated" not in scored.out.split("Scored")[1]
    report = json.loads((tmp_path / "r.json").read_text())["student"]
    assert report["temperature"] != 1 and "ece_calibrated" not in report
    model = open_model(str(asked[3]), torch.device("cpu"))
    assert model.card.temperature == report["temperature"]


def test_end_of_a_run_tells_scores_costs_time_and_what_to_do(run_main, short, kd, tmp_path):
    ema = ["--model_ema", "true", "--model_ema_eval", "true"]
    run = run_main(*short, *kd, *ema, *BOARD, output_dir=tmp_path)
    lines = run.out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == ["student", "EMA", "teacher"])
    last = run.log[-1]
    names = ["test_acc1", "test_acc1_ema", "teacher_acc1"]
    rows = {line[:22].strip(): line[22:].split() for line in lines[head + 1 : head + 7]}
    rows |= {line[:16].strip(): line[16:].split() for line in lines[head + 9 : head + 13]}
    assert rows["accuracy %, last epoch"] == [f"{last[name]:.2f}" for name in names]
    assert rows["parameters"] == ["78,042", "78,042"]
    assert len(rows["multiply-adds"]) == 2 and "ms for 1 image" in rows
    best = run.checkpoint(1)["best"]
    name = max(best, key=best.get)
    assert f"main.py --eval true --resume {tmp_path}/checkpoint-{name}.pth" in run.out
    assert f"tensorboard --logdir {tmp_path}/tb" in run.out
    assert f"--format pt2 --out {tmp_path}/student.pt2" in run.out  # timm has no cifar_resnet8
    summary = json.loads((tmp_path / "summary.json").read_text())
    parts = ["evaluation", "saving", "student", "teacher", "waiting for data"]
    assert sorted(summary["seconds"]) == parts
    assert all(value > 0 for value in summary["seconds"].values())
    assert summary["costs"]["student"]["parameters"] == 78042
    assert summary["scores"]["test_acc1"] == last["test_acc1"]


def printed_commands(out):
    """name -> command, of the last lines of a run."""
    lines = out[out.rindex("\nTime ") :].splitlines()
    return {
        name.strip(): text for line in lines if line for name, _, text in [line.partition("  ")]
    }


def test_the_commands_at_the_end_work_where_the_user_stands(
    run_main, short, imnet, tmp_path, monkeypatch
):
    """Also the one that distills the network: run as they are printed, from another folder."""
    monkeypatch.chdir(tmp_path)
    data = ["--data_path", imnet, "--input_size", 16, "--batch_size", 4, "--epochs", 1]
    out = run_main(*data, output_dir="my teacher").out
    commands = printed_commands(out)
    assert "Scored on 9 validation images:" in out
    for command in (commands["Evaluate"], commands["Distill"]):
        program, *flags = shlex.split(command.replace("FOLDER", "student"))[1:]
        assert (tmp_path / program).resolve() == ROOT / "main.py"
        flags = [*flags, *"--device cpu --num_workers 0 --epochs 1".split()]
        flags = [flag.replace("STUDENT", "cifar_resnet8") for flag in flags]
        assert main.main(flags) == 0
    assert (tmp_path / "student" / "summary.json").exists()
    monkeypatch.setattr(sys, "argv", ["../x/main.py"])  # as typed, if it is this program
    assert summary.program("export") == f"python {os.path.relpath(ROOT / 'export.py')}"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "main.py")])
    assert summary.program("export") == f"python {shlex.quote(str(ROOT / 'export.py'))}"


def test_the_end_says_which_images_and_which_time_and_the_best_file(run_main, short, kd, tmp_path):
    ema = ["--model_ema", "true", "--model_ema_eval", "true"]
    held = [*short, "--holdout", 40, *ema]
    first = run_main(*held, "--epochs", 1, output_dir=tmp_path)
    assert "Scored on 40 held-out training images:" in first.out
    assert "since the restart" not in first.out
    best = first.checkpoint(0)["best"]
    name = max(best, key=best.get)  # the student's, if both are equal
    assert f"summary.json, checkpoint-{name}.pth" in first.out
    longer = run_main(*held, "--epochs", 2, output_dir=tmp_path)
    assert " since the restart: student " in longer.out
    folder = tmp_path / "ties"
    folder.mkdir()
    for which in ("best", "best-ema"):
        (folder / f"checkpoint-{which}.pth").touch()
    for ema_score, which in ((50.0, "best"), (50.1, "best-ema")):
        scores = {"best": 50.0, "best-ema": ema_score}
        assert summary.checkpoint_of(folder, scores).stem == f"checkpoint-{which}"
    scored = run_main("--eval", "true", "--resume", tmp_path / "checkpoint-1.pth")
    assert "Scored on 40 held-out training images:\ntest_loss" in scored.out

    moved = run_main("--resume", tmp_path / "checkpoint-1.pth", "--epochs", 3)
    assert f"pass --output_dir {tmp_path} for that" in moved.out
    unused = run_main(*short, *kd, "--kd_alpha", 0)
    assert "--kd_alpha 0: the teacher is neither loaded nor used" in unused.out
    assert "Distill" not in unused.out


def test_rows_say_what_the_run_has_and_no_more(run_main, short, kd, tmp_path):
    plain = run_main(*short, "--print_seconds", 0, output_dir=tmp_path)
    assert " kd " not in plain.out and "acc5" not in plain.out and "[4/4]" in plain.out
    assert "train_kd" not in plain.log[0] and plain.log[0]["train_ce"] > 0
    lines = plain.out.splitlines()
    head = next(line for line in lines if line.startswith("epoch"))
    rows = [line for line in lines if line[:5].strip().isdigit() and ":" in line]
    ends = [head.index("acc1") + 4, head.index("val loss") + 8]
    assert [[line[:end].split()[-1] for end in ends] for line in rows] == [
        [f"{record['test_acc1']:.2f}", f"{record['test_loss']:.4f}"] for record in plain.log
    ]
    distilled = run_main(*short, *kd)
    assert " kd " in distilled.out and distilled.out.count("Teacher on the 360") == 1
    assert "[4/4]" not in distilled.out  # less than ten seconds


def test_cost_counts_attention_and_what_timm_counts():
    """A vision transformer of 12 layers, width 192 and 197 tokens, by hand."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    found = cost.cost_of(network, 224, 7)
    tokens, width = 197, 192
    layer = 12 * tokens * width**2 + 2 * tokens**2 * width
    by_hand = 196 * 3 * 16**2 * width + 12 * layer + width * 10
    assert found.multiply_adds == by_hand
    assert found.parameters == 7  # as told: counted before layers are fused
    assert found.ms_single > 0
    by_attention = timm.create_model("test_vit3", num_classes=10)  # pools with a learned query
    assert cost.cost_of(by_attention, 160, 7).multiply_adds > 0


def test_latency_has_the_range_of_its_rounds(monkeypatch):
    """Rounds of 1, 2, 3, 4 and 50 ms: a busy moment is seen and does not count as the latency."""
    rounds = iter([9.0, 9.0] + [ms for ms in (3.0, 1.0, 50.0, 2.0, 4.0) for _ in range(2)])
    monkeypatch.setattr(cost, "_milliseconds", lambda *args, **kwargs: next(rounds))
    found = cost.cost_of(timm.create_model("cifar_resnet8", num_classes=10), 8, 7)
    assert (found.ms_single, found.ms_large) == (3.0, 3.0)
    assert found.ranges == {"ms_single": (1.0, 50.0), "ms_large": (1.0, 50.0)}
    assert cost_text(found, "ms_single", True) == "3.00 (1.00–50.00)"
    both = cost.total([found, found])
    assert both.ms_large == 6.0 and both.ranges["ms_large"] == (2.0, 100.0)


def test_of_equal_logits_the_first_class_is_the_answer_everywhere():
    """As argmax has it: with all logits equal, an image is right if it is of class 0."""
    batch = Batch(torch.zeros(8, 8, 1, 1), torch.arange(8), 0, range(8))
    found = evaluate([batch], torch.nn.Flatten(), LoopSettings(CPU, None, 1, None, 0))
    report = metrics.report(metrics.join(found.answers, shared=False), list("abcdefgh"))
    assert found.scores["acc1"] == report["acc1"] == 12.5
    assert found.scores["acc5"] == 62.5
    ranks = metrics.ranks_of(LOGITS, TARGETS)  # without equal logits as by sorting
    by_sorting = LOGITS.argsort(dim=1, descending=True).eq(TARGETS[:, None]).int().argmax(dim=1)
    assert torch.equal(ranks, by_sorting)


# ------------------------------------------------------------------------------ TensorBoard


def curve(folder, name):
    events = EventAccumulator(str(folder / name))
    events.Reload()
    return events


def points(folder, name, chart):
    return [(event.step, event.value) for event in curve(folder, name).Scalars(chart)]


def test_tensorboard_shares_charts_over_the_images_seen(run_main, short, kd, tmp_path):
    run = run_main(*short, *kd, *BOARD, output_dir=tmp_path)
    tb = tmp_path / "tb"
    assert [step for step, _ in points(tb, "train", "loss/kd")] == [64, 128]
    for chart in ("loss/total", "loss/ce", "opt/lr", "opt/grad_norm", "speed/images_per_second"):
        assert len(points(tb, "train", chart)) == 2
    for name, key in (("test", "test_acc1"), ("teacher", "teacher_acc1")):
        wanted = [(64 * (r["epoch"] + 1), pytest.approx(r[key])) for r in run.log]
        assert points(tb, name, "acc/acc1") == wanted
    assert "acc/acc5" not in curve(tb, "test").Tags()["scalars"]  # ten classes
    assert not [*tb.glob("*events*")]  # would be one more color
    train = curve(tb, "train").Tags()
    assert set(train["images"]) == {"training_images", "validation_mistakes"}
    assert {"command/text_summary", "settings/text_summary"} <= set(train["tensors"])
    best = max(r["test_acc1"] for r in run.log)
    assert points(tb, "test", "final/best") == [(128, pytest.approx(best))]
    pages = curve(tb, "test").PluginTagToContent("hparams")
    assert "_hparams_/experiment" not in pages  # the first run's would hide what others have
    start = metadata.parse_session_start_info_plugin_data(pages["_hparams_/session_start_info"])
    first = [(name, start.hparams[name].string_value) for name in sorted(start.hparams)[:3]]
    assert first == [("KD", "true"), ("Model", "cifar_resnet8"), ("Teacher", "cifar_resnet8")]


def test_an_interrupted_run_continues_its_curves(run_main, short, tmp_path):
    run_main(*short, *BOARD, "--epochs", 3, output_dir=tmp_path)
    (tmp_path / "checkpoint-2.pth").unlink()
    run_main(*short, *BOARD, "--epochs", 3, output_dir=tmp_path)
    events = points(tmp_path / "tb", "test", "acc/acc1")
    assert [step for step, _ in events] == [64, 128, 192]


def test_runs_in_one_log_folder_do_not_hide_each_other(tmp_path):
    def folder(output_dir, is_resumed=False):
        found = board_folder(str(tmp_path / "tb"), output_dir, is_resumed)
        return found.relative_to(tmp_path).as_posix()

    assert folder("a") == "tb" and folder("b") == "tb/run-2" and folder("") == "tb/run-3"
    assert folder("b", is_resumed=True) == "tb/run-2" and folder("a", is_resumed=True) == "tb"
    assert folder("a") == "tb/run-4" and folder("", is_resumed=True) == "tb/run-5"
    assert board_folder(None, "", False) is None
    assert board_folder("none", "out", False) is None


def test_pictures_are_shown_as_the_network_sees_them_with_their_captions():
    pixels = torch.randint(0, 256, (3, 3, 6, 8), dtype=torch.uint8)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    columns = torch.tensor([mean, std]).view(2, 1, 3, 1, 1)
    images = (pixels / 255 - columns[0]) / columns[1]
    pictures = to_pictures(images, mean, std)
    assert np.array_equal(np.stack(pictures), pixels.permute(0, 2, 3, 1).numpy())
    sheet = grid([Image.new("RGB", (8, 8), "red")] * 5, ["a\nb"] * 5)
    assert sheet.shape[2] == 3 and (sheet[10, 10] == (255, 0, 0)).all()

    classes = ["ant", "bee", "cat"]
    assert label_text(torch.tensor(1), classes) == "bee"
    assert label_text(torch.tensor(3), classes) == "no label"
    assert label_text(torch.tensor([0.3, 0.0, 0.7]), classes) == "cat 0.70\nant 0.30"
    assert label_text(torch.zeros(3), classes) == "no label"
    logits = torch.tensor([0.0, 2.0, -1.0])
    assert answer_text(logits, classes) == "bee 0.84\nant 0.11"
    assert shortened("Smileys & Emotion 0.52", lambda text: len(text) <= 14) == "Smileys … 0.52"
    assert shortened("Wolkenkratzer", lambda text: len(text) <= 8) == "Wolkenk…"


@pytest.mark.parametrize("width", [50, 80, 120])
def test_rows_and_status_lines_fit_the_terminal_the_important_first(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    clock = iter(range(0, 1000, 10))  # seconds
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    shown = terminal.Terminal(epochs=40, seconds=0, num_classes=1000, first_step=50)
    losses = {"loss": 12.34567, "ce": 2.5, "kd": 0.01234}
    record = {"epoch": 1, **{f"train_{name}": value for name, value in losses.items()}}
    shown.step(1, 1, 50, losses, 1e-3, 12345, 3 << 30)
    shown.epoch(record, None, 12345, 100)  # not evaluated
    record |= {f"test_{name}": 100.0 for name in ("loss", "acc1", "acc5", "acc1_ema", "agreement")}
    shown.epoch(record | {"epoch": 2}, 100.0, 12345, 150)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    status, _, _, head, row = lines
    cells = dict(zip(head.replace("val loss", "val").split(), row.split(), strict=True))
    assert (cells["loss"], cells["acc1"], cells["val"]) == ("12.346", "100.00", "100.00")
    assert cells["left"] == "0:18:30"  # 100 steps took 60 s by that clock; 1,850 are to come
    everything = ["loss", "ce", "kd", "val", "acc1", "best", "EMA", "agree", "acc5", "left"]
    fits = {50: {"loss", "val", "acc1", "best", "left"}, 80: {*everything} - {"acc5"}}
    assert set(cells) - {"epoch", "images/s"} == fits.get(width, {*everything})
    assert ("images/s" in status, "GiB" in status, "kd" in status) == (
        (False, False, False) if width == 50 else (True, width == 120, width == 120)
    )


def test_a_network_that_cannot_be_measured_does_not_fail_the_run(run_main, short, monkeypatch):
    def refuse(*args):
        raise RuntimeError("only batches of 16")

    monkeypatch.setattr(cost, "cost_of", refuse)
    run = run_main(*short)
    assert run.code == 0 and "latency could not be measured: only batches of 16" in run.out
    assert "accuracy %, last epoch" in run.out and "parameters  " not in run.out


def test_a_loss_part_and_a_score_that_nobody_listed_are_shown_everywhere(
    run_main, short, kd, tmp_path, monkeypatch, capsys
):
    class Hinted(DistillationLoss):
        def forward(self, *outputs_and_targets):
            loss, parts = super().forward(*outputs_and_targets)
            return loss, parts | {"hint": torch.tensor(0.25)}

    def score_more(*args, **kwargs):
        scores, answers = evaluate_all(*args, **kwargs)
        return scores | {"test_charm": 0.5}, answers

    evaluate_all = main.evaluate_all
    monkeypatch.setattr("training.criterion.DistillationLoss", Hinted)
    monkeypatch.setattr(main, "evaluate_all", score_more)
    run = run_main(*short, *kd, *BOARD, output_dir=tmp_path)
    assert run.code == 0 and "    hint  " in run.out and "  0.2500  " in run.out, run.err
    assert run.log[1]["train_hint"] == 0.25 and run.log[1]["test_charm"] == 0.5
    assert points(tmp_path / "tb", "train", "loss/hint") == [(64, 0.25), (128, 0.25)]
    assert points(tmp_path / "tb", "test", "scores/charm") == [(64, 0.5), (128, 0.5)]
    assert ["charm", "0.5000"] in [line.split() for line in run.out.splitlines()]
    assert compare.main([str(tmp_path)]) == 0
    heads, row = (line.split() for line in capsys.readouterr().out.splitlines()[:2])
    assert "charm" in heads and "0.5000" in row
