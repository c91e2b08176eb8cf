"""Whole runs in one process: what they write, resume, keep and stop at."""

import json
import platform
import resource
import statistics

import pytest
import timm
import torch
from forked import Group
from helpers import CPU, RECORDS, is_same, teacher_flags
from timm.loss import BinaryCrossEntropy
from torch import nn

import engine
import main
import test_kd
import utils
from arguments.parsing import parse_args
from distillation import DistillationLoss, StudentWithDistillation
from models.checkpoint import FORMAT
from reporting.recorder import Recorder
from runtime import device
from runtime.device import choose_threads
from training import checkpoints, history
from training.criterion import make_criterion
from training.optimizer import Schedule, cosine_schedule, default_lr, make_optimizer
from training.settings import LoopSettings


def test_plain_training_makes_a_teacher_that_teaches(run_main, short, tmp_path):
    teacher = run_main(
        "--train_samples", 320, "--epochs", 6, "--lr", "5e-3", output_dir=tmp_path / "t"
    )
    assert teacher.code == 0, teacher.err
    flags = teacher_flags(tmp_path / "t" / "checkpoint-best.pth")
    student = run_main(*short, *flags, output_dir=tmp_path / "s")
    assert student.code == 0, student.err
    assert "Teacher cifar_resnet8" in student.out and "78,042 parameters" in student.out
    last = student.log[-1]
    assert last["train_kd"] > 0
    total = 0.3 * last["train_ce"] + 0.7 * last["train_kd"]
    assert last["train_loss"] == pytest.approx(total, rel=1e-6)


def test_the_log_has_one_line_an_epoch_with_the_promised_keys(run_main, short, kd, tmp_path):
    run = run_main(
        *short, *kd, "--model_ema", "true", "--model_ema_eval", "true", output_dir=tmp_path
    )
    assert [line["epoch"] for line in run.log] == [0, 1]
    assert {
        *("epoch", "train_loss", "train_ce", "train_kd", "train_lr", "n_parameters"),
        *("test_acc1", "test_acc5", "test_loss", "test_acc1_ema"),
    } <= run.log[0].keys()
    assert run.log[0]["n_parameters"] == 78042


def test_checkpoints_hold_plain_values_and_no_teacher(run_main, short, kd, tmp_path):
    run = run_main(
        *short, *kd, "--model_ema", "true", "--model_ema_eval", "true", output_dir=tmp_path
    )
    for name in (1, "best", "best-ema"):
        saved = run.checkpoint(name)
        assert {"model", "model_ema", "optimizer", "scaler", "epoch", "args"} <= saved.keys()
        assert saved["format"] == FORMAT == 2
        assert saved["model"].keys() == saved["model_ema"].keys()
        assert sum(v.numel() for k, v in saved["model"].items() if "num_batches" not in k) < 80_000
        assert saved["args"]["kd_alpha"] == 0.7 and saved["data"]["classes"][3] == "3"
    assert run.checkpoint(1)["best"]["best"] == max(line["test_acc1"] for line in run.log)


def test_only_the_newest_checkpoints_are_kept(run_main, tmp_path):
    flags = ["--train_samples", 32, "--epochs", 6, "--save_ckpt_num", 2, "--save_ckpt_freq", 2]
    run_main(*flags, "--disable_eval", "true", output_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "checkpoint-3.pth",
        "checkpoint-5.pth",
    ]


def test_an_earlier_longer_runs_checkpoints_do_not_push_out_the_new_ones(run_main, short, tmp_path):
    for epoch in (57, 58, 59):
        torch.save({"model": {}, "epoch": epoch}, tmp_path / f"checkpoint-{epoch}.pth")
    run = run_main(*short, "--auto_resume", "false", output_dir=tmp_path)
    assert run.checkpoint(0)["epoch"] == 0 and run.checkpoint(1)["epoch"] == 1


def test_a_file_whose_epoch_is_a_word_is_not_resumed(run_main, short, tmp_path):
    first = run_main(*short, output_dir=tmp_path / "first").checkpoint(1)
    torch.save(first | {"epoch": "best"}, tmp_path / "b.pth")
    run = run_main(*short, "--resume", tmp_path / "b.pth", output_dir=tmp_path / "second")
    assert run.code == 2 and "pass it as --finetune" in run.err, run.err


@pytest.mark.parametrize("teacher", [False, True], ids=["plain", "distilled"])
def test_a_checkpoint_from_before_the_format_number_is_resumed(
    run_main, short, kd, tmp_path, monkeypatch, teacher
):
    """Inside an epoch too, where it held the sums of loss, ce and kd without their names."""
    flags = [*short, *(kd if teacher else []), "--save_ckpt_steps", 2]
    whole = run_main(*flags, output_dir=tmp_path / "whole")

    def stop(*args, **kwargs):
        raise utils.UserError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr("main.evaluate_all", stop)
        assert "stopped here" in run_main(*flags, output_dir=tmp_path / "old").err
    path = tmp_path / "old" / checkpoints.INSIDE_EPOCH
    saved = torch.load(path, weights_only=True)
    del saved["format"]
    sums = saved["progress"]["sums"]
    values = [sums["loss"], sums["ce"], sums.get("kd", 0.0)]
    saved["progress"]["sums"] = values + ([sums["teacher_acc1"]] if teacher else [])
    torch.save(saved, path)
    resumed = run_main(*flags, output_dir=tmp_path / "old")
    assert resumed.code == 0 and "2 steps of the next" in resumed.out, resumed.err
    assert "written by an earlier version" in resumed.out
    assert resumed.log[1] == whole.log[1]
    shared = whole.log[0].keys() - {"train_kd"} if not teacher else whole.log[0].keys()
    assert {key: resumed.log[0][key] for key in shared} == {
        key: whole.log[0][key] for key in shared
    }
    assert is_same(resumed.checkpoint(1)["model"], whole.checkpoint(1)["model"])


def test_a_checkpoint_of_a_newer_version_is_refused(run_main, short, tmp_path):
    saved = run_main(*short, output_dir=tmp_path).checkpoint(1)
    torch.save(saved | {"format": 3}, tmp_path / "newer.pth")
    run = run_main(*short, "--resume", tmp_path / "newer.pth")
    assert run.code == 2 and "written by a newer version (format 3; this version reads" in run.err


def test_nothing_is_saved_where_it_is_not_wanted(run_main, short, tmp_path):
    run_main(*short, "--save_ckpt", "false", "--save_ckpt_steps", 1, output_dir=tmp_path)
    records = [".lock", *RECORDS]
    assert sorted(path.name for path in tmp_path.iterdir()) == records


HARD = ["--model_ema", "true", "--model_ema_eval", "true", "--update_freq", "3", "--drop_path", "0"]


def test_a_run_that_was_stopped_ends_in_the_same_bits(run_main, kd, tmp_path, monkeypatch):
    """With EMA, accumulation with a remainder, mixup, augmentation and a teacher."""
    flags = ["--train_samples", "64", "--epochs", "4", *HARD, *kd]
    whole = run_main(*flags, output_dir=tmp_path / "whole")

    class Stop(Exception):
        pass

    real = engine.evaluate

    def stop_in_third_epoch(*args, **kwargs):
        stop_in_third_epoch.calls += 1
        if stop_in_third_epoch.calls == 6:  # the teacher once, then two an epoch
            raise Stop
        return real(*args, **kwargs)

    stop_in_third_epoch.calls = 0
    monkeypatch.setattr("main.evaluate", stop_in_third_epoch)
    with pytest.raises(Stop):
        run_main(*flags, output_dir=tmp_path / "parts")
    monkeypatch.setattr("main.evaluate", real)
    parts = run_main(*flags, output_dir=tmp_path / "parts")
    assert "epoch 1 is done" in parts.out
    assert parts.log == whole.log
    for name in ("3", "best", "best-ema"):
        a, b = whole.checkpoint(name), parts.checkpoint(name)
        for part in ("model", "model_ema", "optimizer", "epoch", "best", "scores"):
            assert is_same(a[part], b[part]), f"{part} of {name}"


def test_args_json_notes_what_changed_when_a_run_was_resumed(
    run_main, short, kd, teacher_file, tmp_path
):
    def changes():
        return json.loads((tmp_path / "args.json").read_text())["changes"]

    other = tmp_path / "other.pth"
    other.write_bytes(teacher_file.read_bytes())
    flags = [*short, *kd, "--lr", 1e-3, "--min_lr", 0, "--warmup_epochs", 0]
    run_main(*flags, output_dir=tmp_path)
    assert changes() == []
    longer = [*flags, "--epochs", 3]
    assert "Resumed with another recipe" in run_main(*longer, output_dir=tmp_path).out
    first = "--epochs 2 → 3 after epoch 1"
    assert changes() == [first]
    last = [*longer, "--epochs", 4, "--teacher_path", other]
    run_main(*last, output_dir=tmp_path)
    both = [first, f"--teacher_path {teacher_file} → {other}, --epochs 3 → 4 after epoch 2"]
    assert changes() == both
    (tmp_path / "checkpoint-3.pth").unlink()
    again = run_main(*last, output_dir=tmp_path)  # from the checkpoint of epoch 2, once more
    assert changes() == both and again.checkpoint(3)["args"]["changes"] == both
    torch.save(torch.load(other) | {"fc.bias": torch.ones(10)}, other)
    run_main(*last, "--epochs", 5, output_dir=tmp_path)
    replaced = f"--teacher_path {other} → {other} (a different file)"
    assert changes() == [*both, f"--epochs 4 → 5, {replaced} after epoch 3"]


def test_a_truncated_newest_checkpoint_is_passed_over(run_main, short, tmp_path):
    whole = run_main(*short, output_dir=tmp_path)
    final = whole.checkpoint(1)
    newest = tmp_path / "checkpoint-1.pth"
    newest.write_bytes(newest.read_bytes()[:20_000])
    again = run_main(*short, output_dir=tmp_path)
    assert again.code == 0 and "trying the checkpoint before it" in again.out
    assert is_same(again.checkpoint(1)["model"], final["model"])
    assert [line["epoch"] for line in again.log] == [0, 1]


@pytest.mark.parametrize("workers", [1, 4])
def test_weights_do_not_depend_on_the_number_of_workers(run_main, short, tmp_path, workers):
    alone = run_main(*short, output_dir=tmp_path / "alone")
    other = run_main(*short, "--num_workers", workers, output_dir=tmp_path / "other")
    assert is_same(alone.checkpoint(1)["model"], other.checkpoint(1)["model"])


def test_accumulated_batches_are_one_large_batch(run_main, tmp_path):
    """Without BatchNorm, which sees the small batches; 5 batches by 2: the last step is shorter."""
    flags = ["--train_samples", 80, "--epochs", 1, "--model", "test_convnext", "--input_size", 32]
    flags += ["--mixup", 0, "--cutmix", 0, "--opt", "sgd", "--lr", 0.05, "--batch_size", 16]
    run = run_main(*flags, "--update_freq", 2, output_dir=tmp_path / "a")
    assert "3 optimizer steps" in run.out
    flags = [*flags, "--train_samples", 64, "--warmup_epochs", 0]
    accumulated = run_main(*flags, "--update_freq", 2, output_dir=tmp_path / "b")
    large = run_main(*flags, "--batch_size", 32, output_dir=tmp_path / "c")
    assert accumulated.log[0]["train_loss"] == pytest.approx(large.log[0]["train_loss"], rel=1e-5)
    a, c = accumulated.checkpoint(0)["model"], large.checkpoint(0)["model"]
    for name in a:
        torch.testing.assert_close(a[name], c[name], rtol=1e-4, atol=1e-5)


def test_alpha_zero_is_plain_training_and_never_loads_the_teacher(run_main, short, tmp_path):
    plain = run_main(*short, output_dir=tmp_path / "plain")
    kd = teacher_flags("nowhere.pth", arch="resnet18")
    zero = run_main(*short, *kd, "--kd_alpha", 0, output_dir=tmp_path / "zero")
    assert zero.code == 0, zero.err
    assert is_same(plain.checkpoint(1)["model"], zero.checkpoint(1)["model"])


def test_eval_gives_the_score_that_training_logged(run_main, short, tmp_path):
    run = run_main(*short, "--model_ema", "true", "--model_ema_eval", "true", output_dir=tmp_path)
    scored = run_main(
        "--eval", "true", "--resume", tmp_path / "checkpoint-1.pth", "--batch_size", 7
    )
    assert scored.code == 0, scored.err  # an odd batch: nothing is mixed in an evaluation
    assert f"test_acc1 {run.log[-1]['test_acc1']:.4f}" in scored.out
    assert f"test_acc1_ema {run.log[-1]['test_acc1_ema']:.4f}" in scored.out


def test_the_student_is_finetuned_from_a_file_of_other_classes(run_main, short, tmp_path):
    model = timm.create_model("cifar_resnet8", num_classes=100)
    torch.save(
        {"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "f.pth"
    )
    run = run_main(
        *short, "--finetune", tmp_path / "f.pth", "--lr", 0, "--min_lr", 0, output_dir=tmp_path
    )
    assert "newly initialized: fc.bias, fc.weight" in run.out
    assert torch.equal(run.checkpoint(1)["model"]["conv1.weight"], model.conv1.weight)


def test_a_final_rate_above_the_default_peak_is_refused(run_main, short):
    run = run_main(*short, "--min_lr", 1)
    assert run.code == 2 and "--min_lr 1.0: above 0.002, the peak that was chosen by" in run.err


def test_a_finetuned_classifier_keeps_the_classes_that_its_file_names(run_main, short, tmp_path):
    still = [*short, "--lr", 0, "--min_lr", 0]
    first = run_main(*still, output_dir=tmp_path / "first")
    saved = first.checkpoint(1)
    rows = saved["model"]["fc.weight"]
    saved["data"]["classes"] = [str(9 - digit) for digit in range(10)]
    torch.save(saved, tmp_path / "turned.pth")
    run = run_main(*still, "--finetune", tmp_path / "turned.pth", output_dir=tmp_path / "turned")
    assert "classifier matched by class name" in run.out
    assert torch.equal(run.checkpoint(1)["model"]["fc.weight"], rows.flip(0))
    saved["data"]["classes"] = [f"animal {number}" for number in range(10)]
    torch.save(saved, tmp_path / "other.pth")
    run = run_main(
        *still, "--finetune", tmp_path / "other.pth", "--seed", 1, output_dir=tmp_path / "new"
    )
    assert "newly initialized: fc.bias, fc.weight (other classes: animal 0" in run.out
    assert not torch.equal(run.checkpoint(1)["model"]["fc.weight"], rows)


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(run_main, tmp_path):
    flags = "--train_samples 64 --epochs 3 --opt sgd --lr 1e30 --warmup_epochs 0".split()
    run = run_main(*flags, output_dir=tmp_path)
    assert run.code == 2
    assert "at step 1 (epoch 0)" in run.err and "learning rate 9.83e+29" in run.err
    assert not list(tmp_path.glob("*.pth"))


def test_bfloat16_autocast_trains_on_the_cpu(run_main, kd):
    run = run_main("--train_samples", 16, "--epochs", 1, "--use_amp", "true", *kd)
    assert run.code == 0, run.err


@pytest.mark.parametrize(
    "flags",
    [
        "--opt sgd --momentum 0.8 --clip_grad 0.5",
        "--opt adamw --opt_betas 0.8 0.95 --opt_eps 1e-6 --weight_decay_end 0.2",
        "--layer_decay 0.8 --warmup_steps 3 --head_init_scale 0.1",
        "--mixup_mode pair --mixup_prob 0.9 --mixup_switch_prob 0.3",
        "--mixup_mode elem --cutmix_minmax 0.2 0.8",
        "--mixup 0 --cutmix 0 --smoothing 0 --aa v0 --color_jitter 0.2 --reprob 0.5 --remode const",
        "--aa= --recount 2 --remode rand --hflip 0.5 --train_interpolation random --crop_pct 0.9",
        "--imagenet_default_mean_and_std false --input_size 16 --dist_eval false --pin_mem false",
        "--model_ema true --model_ema_force_cpu true --model_ema_eval true --model_ema_warmup 0",
        "--save_ckpt false --start_epoch 1 --nb_classes 10 --holdout 50",
        "--kd_alpha 1 --kd_temperature 2",
        "--model test_vit --input_size 32 --drop_path 0.1 --drop 0.1",
    ],
)
def test_the_flags_of_the_family_run(run_main, short, kd, tmp_path, flags):
    run = run_main(*short, *kd, *flags.split(), output_dir=tmp_path)
    assert run.code == 0, run.err
    assert run.log[-1]["epoch"] == 1


def test_clip_grad_bounds_the_step(run_main, tmp_path):
    flags = ["--train_samples", 16, "--epochs", 1, "--opt", "momentum", "--momentum", 0]
    flags += ["--warmup_epochs", 0, "--weight_decay", 0, "--lr", 1]
    start = run_main(*flags, "--lr", 0, "--min_lr", 0, output_dir=tmp_path / "start").checkpoint(0)
    end = run_main(*flags, "--clip_grad", 1e-3, output_dir=tmp_path / "end").checkpoint(0)
    moved = [
        (end["model"][k] - start["model"][k]).double().square().sum()
        for k in start["model"]
        if "running" not in k and "num_batches" not in k
    ]
    assert sum(moved).sqrt().item() == pytest.approx(1e-3, rel=1e-3)


def test_an_average_of_decay_zero_is_the_student_and_nothing_of_the_teacher(
    run_main, short, kd, tmp_path
):
    run = run_main(*short, *kd, "--model_ema", "true", "--model_ema_decay", 0, output_dir=tmp_path)
    saved = run.checkpoint(1)
    assert is_same(saved["model_ema"], saved["model"])


def test_a_file_left_by_a_kill_does_not_lead_into_another_checkpoint(tmp_path):
    """A kill between link and rename leaves a second name of the best checkpoint."""
    best, last, ema = (tmp_path / f"checkpoint-{name}.pth" for name in ("best", 3, "best-ema"))
    checkpoints.save_checkpoint({"epoch": 2}, best)
    for path in (last, ema):
        path.with_name(f".{path.name}.tmp").hardlink_to(best)
    checkpoints.save_checkpoint({"epoch": 3}, last)
    checkpoints.link_checkpoint(last, ema)
    read = [torch.load(path, weights_only=True)["epoch"] for path in (best, last, ema)]
    assert read == [2, 3, 3]


def test_peak_memory_is_that_of_the_training(run_main, short, tmp_path, monkeypatch):
    """And not of the measurement of latency, which runs 32 images at once, computing as the run."""
    measured = []

    def measure(*args):
        measured.append(torch.is_autocast_enabled("cpu"))
        return {"student": None, "teacher": None}

    monkeypatch.setattr(main, "costs_of", measure)
    monkeypatch.setattr(main, "peak_memory", lambda device: len(measured))
    run_main(*short, "--use_amp", "true", output_dir=tmp_path)
    assert measured == [True]
    assert json.loads((tmp_path / "summary.json").read_text())["peak_memory"] == 0


def test_an_evaluation_computes_in_mixed_precision_only_if_asked(run_main, short, tmp_path):
    made = run_main(*short, "--use_amp", "true", output_dir=tmp_path)
    score = ["--eval", "true", "--resume", tmp_path / "checkpoint-1.pth"]
    plain, mixed = run_main(*score), run_main(*score, "--use_amp", "true")
    assert "Scored in float32" in plain.out and "Scored in float32" not in mixed.out
    assert f"test_loss {made.log[-1]['test_loss']:.4f}" in mixed.out


def test_a_full_disk_keeps_the_older_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-0.pth"
    checkpoints.save_checkpoint({"model": torch.ones(3)}, path)

    def no_space(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", no_space)
    with pytest.raises(utils.UserError, match="No space left.*what was written before is complete"):
        checkpoints.save_checkpoint({"model": torch.zeros(3)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["model"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-0.pth"]


def test_a_temporary_file_that_cannot_be_removed_is_a_user_error(tmp_path):
    (tmp_path / ".log.tmp").mkdir()
    with pytest.raises(utils.UserError, match="log: could not be written"):
        utils.write_whole(tmp_path / "log", "")


def test_the_schedule_warms_up_and_ends_at_the_minimum():
    lr = cosine_schedule(1.0, 0.1, 100, warmup_steps=20)
    assert len(lr) == 100 and lr[0] == pytest.approx(0.05) and lr[9] == pytest.approx(0.5)
    assert lr[19] == lr[20] == 1.0  # as in the ConvNeXt script, whose first step has rate 0
    assert lr[60] == pytest.approx(0.55) and 0.1 < lr[99] < 0.102
    assert cosine_schedule(1.0, 0.1, 3, warmup_steps=3).tolist() == pytest.approx([1 / 3, 2 / 3, 1])


def test_the_first_step_trains(run_main, tmp_path):
    flags = ["--train_samples", 16, "--epochs", 1, "--warmup_epochs", 1, "--disable_eval", "true"]
    start = run_main(*flags, "--lr", 0, "--min_lr", 0, output_dir=tmp_path / "start").checkpoint(0)
    end = run_main(*flags, output_dir=tmp_path / "end").checkpoint(0)
    assert not torch.equal(start["model"]["conv1.weight"], end["model"]["conv1.weight"])


def test_eval_freq_leaves_evaluations_out_and_changes_nothing_else(
    run_main, kd, tmp_path, monkeypatch
):
    flags = ["--train_samples", 32, "--epochs", 6, *kd]
    whole = run_main(*flags, output_dir=tmp_path / "whole")
    flags += ["--eval_freq", 4]
    some = run_main(*flags, output_dir=tmp_path / "some")
    assert is_same(whole.checkpoint(5)["model"], some.checkpoint(5)["model"])
    for epoch, (all_of_it, line) in enumerate(zip(whole.log, some.log, strict=True)):
        is_evaluated = epoch in (3, 5)
        measured = {key for key in all_of_it if key.startswith("test_")}
        assert line == {k: all_of_it[k] for k in all_of_it if is_evaluated or k not in measured}
    best = max(whole.log[epoch]["test_acc1"] for epoch in (3, 5))
    assert some.checkpoint(5)["best"]["best"] == best
    assert some.checkpoint(4)["scores"]["test_acc1"] == whole.log[3]["test_acc1"]

    real = checkpoints.RunState.save

    def stop_after_epoch_3(state, *args):
        real(state, *args)
        if state.epoch == 3:
            raise utils.UserError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.RunState, "save", stop_after_epoch_3)
        run_main(*flags, output_dir=tmp_path / "parts")
    parts = run_main(*flags, output_dir=tmp_path / "parts")
    assert "epoch 3 is done" in parts.out and parts.log == some.log
    for name in (4, 5, "best"):
        assert is_same(
            parts.checkpoint(name), some.checkpoint(name) | {"args": parts.checkpoint(name)["args"]}
        )


def test_log_lines_are_json_and_a_cut_line_is_dropped(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"epoch": 1}\n{"epo')
    args = {"output_dir": str(tmp_path), "log_dir": "none", "lr": 0.1, "epochs": 2}
    args |= {"batch_size": 1, "update_freq": 1, "print_seconds": 10}
    Recorder.open(args, CPU, {"classes": ["a"]}, start_epoch=1, first_step=1)
    assert json.loads((tmp_path / "args.json").read_text()) == args
    assert json.loads((tmp_path / "environment.json").read_text())["device"] == "cpu"
    assert [json.loads(x) for x in (tmp_path / "log.txt").read_text().splitlines()] == [
        {"epoch": 0}
    ]


def train_with_a_fault(scaled, fault, faulty=(2,), init_scale=2.0**16):
    """Six optimizer steps of which the third has the fault; returns (result, student)."""
    torch.manual_seed(0)
    student = timm.create_model("cifar_resnet8", num_classes=10)
    model = StudentWithDistillation(student, None)
    calls = iter(range(100))

    class Faulty(DistillationLoss):
        def forward(self, student_logits, teacher_logits, targets):
            loss, parts = super().forward(student_logits, teacher_logits, targets)
            if next(calls) in faulty:
                if fault == "loss":
                    loss = loss * float("nan")
                else:  # a finite loss whose gradient is not
                    loss = loss + 0 * torch.sqrt((student_logits * 0).abs().sum())
            return loss, parts

    schedule = Schedule(lr=torch.full((6,), 0.01).numpy(), weight_decay=torch.zeros(6).numpy())
    result = engine.train_one_epoch(
        model,
        Faulty(nn.CrossEntropyLoss(), 0.0, 4.0),
        test_kd.DummyLoader(6),
        torch.optim.SGD(student.parameters(), lr=0.01),
        torch.amp.GradScaler("cpu", init_scale, enabled=scaled),
        schedule,
        0,
        LoopSettings(test_kd.CPU, None, update_freq=1, clip_grad=None, seed=0),
    )
    return result, student


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_and_counted_under_a_scaler(fault):
    result, student = train_with_a_fault(scaled=True, fault=fault)
    assert result["skipped_steps"] == 1
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert 0 < result["loss"] < 10


def test_a_run_whose_every_step_is_skipped_stops():
    """Whatever the number of steps per epoch: the scale, which is saved, shows how many."""
    result, _ = train_with_a_fault(scaled=True, fault="loss", faulty=range(6))
    assert result["skipped_steps"] == 6 and "loss" not in result  # no mean of nothing
    with pytest.raises(utils.UserError, match="No checkpoint was written after this happened"):
        train_with_a_fault(scaled=True, fault="loss", faulty=range(6), init_scale=16)


def test_momentum_is_sound_where_the_scaler_skips_the_first_step():
    """The fused kernel would keep uninitialized memory as its momentum."""
    args = parse_args("--opt sgd --lr 0.1 --weight_decay 0".split())
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    weights = []
    for factors in ([1.0], [float("nan"), 1.0]):
        torch.manual_seed(0)
        network = timm.create_model("resnet18", num_classes=10).eval()
        optimizer = make_optimizer(args, network, torch.device("cpu"))
        scaler = torch.amp.GradScaler("cpu")
        for factor in factors:
            optimizer.zero_grad()
            scaler.scale(factor * network(images).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(nn.utils.parameters_to_vector(network.parameters()))
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_a_run_without_a_scaler(fault):
    with pytest.raises(
        utils.UserError, match=r"at step 2 \(epoch 0\), learning rate 0.01, largest"
    ):
        train_with_a_fault(scaled=False, fault=fault)


def test_the_log_does_not_depend_on_when_its_scalars_are_computed(
    run_main, short, kd, tmp_path, monkeypatch
):
    together = run_main(*short, *kd, "--update_freq", 2, output_dir=tmp_path / "together")
    monkeypatch.setattr(history, "WAITING_BYTES", 0)  # of each batch at once
    one_by_one = run_main(*short, *kd, "--update_freq", 2, output_dir=tmp_path / "one")
    assert together.log == one_by_one.log and len(together.log) == 2


def fetch_and_free() -> None:
    device.keep_freed_memory()
    for _ in range(40):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MiB, 16,384 pages
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_on_the_cpu_freed_memory_is_kept_for_the_next_step():
    with Group(fetch_and_free) as group:
        assert group.wait() == [0], group.err
        counts = list(map(int, group.out.split()))
    # The heap grows for some turns until a freed block fits; then nothing is fetched any more.
    assert len(counts) == 40 and statistics.median(counts[20:]) < 1000, counts


def test_small_batches_take_one_thread_and_a_given_number_of_threads_is_kept(
    run_main, short, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(device, "DEFAULT_THREADS", 3)
    given = torch.get_num_threads()
    try:
        assert ", 1 CPU thread(s)" in run_main(*short).out  # 16 digits of 8 x 8 pixels
        assert torch.get_num_threads() == 1
        assert choose_threads(16 * 32 * 32) == 2
        assert choose_threads(16 * 128 * 128) == torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert ", 3 CPU thread(s)" in run_main(*short).out
    finally:
        torch.set_num_threads(given)


KD_LOSSES = {  # flags -> the weights of both parts in the last of two epochs
    "--kd_loss dist --kd_standardize true --ce_weight 1 --kd_weight 2": (1, 2),
    "--kd_loss dkd --dkd_beta 2 --kd_warmup_epochs 2 --mixup 0 --cutmix 0": (0.3, 0.7),
    "--loss bce --bce_target_thresh 0.2 --kd_loss hard": (0.3, 0.7),
    "--kd_loss bce --unlabeled rest --epochs 1 --kd_alpha 0.9": (0.1 * 16 * 64 / 1437, 0.9),
}


@pytest.mark.parametrize("flags", KD_LOSSES)
def test_a_run_trains_with_the_loss_that_is_asked_for(run_main, kd, short, tmp_path, flags):
    run = run_main(*short, *kd, *flags.split(), output_dir=tmp_path)
    assert run.code == 0, run.err
    last, (ce_weight, kd_weight) = run.log[-1], KD_LOSSES[flags]
    expected = ce_weight * last["train_ce"] + kd_weight * last["train_kd"]
    assert last["train_kd"] > 0 and last["train_loss"] == pytest.approx(expected, rel=1e-4)
    if "warmup" in flags:  # half of the weight in the first of two epochs
        first = run.log[0]
        expected = ce_weight * first["train_ce"] + kd_weight / 2 * first["train_kd"]
        assert first["train_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_loss_that_does_not_fit_the_labels_is_refused(run_main, kd, short):
    run = run_main(*short, *kd, "--loss", "bce", "--unlabeled", "rest")
    assert run.code == 2 and "--loss bce: needs a label for every image" in run.err, run.err
    assert run.err.count("\n") == 1


def test_bce_on_labels_is_timms():
    args = parse_args(["--loss", "bce", "--smoothing", "0.2", "--mixup", "0", "--cutmix", "0"])
    ours, theirs = make_criterion(args), BinaryCrossEntropy(smoothing=0.2)
    logits, targets = torch.randn(5, 7), torch.arange(5)
    assert torch.equal(ours(logits, targets), theirs(logits, targets))


@pytest.mark.parametrize(
    ("network", "flags", "rate"),
    [
        ("test_resnet", "--epochs 15", 2e-3),  # 750 steps of 8 images
        ("test_vit", "--epochs 15", 5e-4),
        ("test_convnext", "--epochs 15", 5e-4),
        ("test_vit", "--epochs 400", 1.76777e-4),  # 4e-3 · sqrt(8 / 4096)
        ("test_vit", "--epochs 300", 2e-4),  # 3 / 15,000
        ("test_resnet", "--opt sgd", 0.025),  # 0.1 · sqrt(8 / 128)
        ("test_resnet", "--pretrained true", 1.76777e-4),
    ],
)
def test_the_default_learning_rate_follows_the_kind_of_network(network, flags, rate):
    args = parse_args(f"--model {network} --batch_size 8 {flags}".split())
    student = timm.create_model(network, num_classes=10)
    assert default_lr(args, student, 403) == pytest.approx(rate, rel=1e-4)
