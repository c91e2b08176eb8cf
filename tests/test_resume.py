"""What a run takes from an earlier one, what it refuses, and whose files it leaves alone."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from forked import Group, program
from helpers import QUICK, is_same, teacher_flags, write_images

from deploy.model import network_from_checkpoint
from models.checkpoint import Checkpoint
from reporting.recorder import drop_lines_from
from training.checkpoints import lock_folder

FOLDER = ["--input_size", 32, "--batch_size", 8]


def score(out: str, name: str = "test_acc1") -> float:
    """A score that --eval true prints."""
    return float(next(line.split()[1] for line in out.splitlines() if line.startswith(f"{name} ")))


# ---------------------------------------------------------------------------------- evaluation


def test_evaluation_takes_normalization_size_and_data_from_the_checkpoint(
    run_main, imnet, tmp_path
):
    flags = [*FOLDER, "--data_path", imnet, "--imagenet_default_mean_and_std", "false"]
    flags += ["--crop_pct", 0.6, "--holdout", 9, "--lr", "1e-2", "--epochs", 2]
    run = run_main(*flags, output_dir=tmp_path / "out")
    scored = run_main("--eval", "true", "--resume", tmp_path / "out" / "checkpoint-1.pth")
    assert scored.code == 0 and "Warning" not in scored.out, scored.err
    last = run.log[-1]
    for name in ("test_loss", "test_acc1"):
        assert score(scored.out, name) == pytest.approx(last[name], abs=1e-4)
    other = ["--imagenet_default_mean_and_std", "true"]
    other = run_main("--eval", "true", "--resume", tmp_path / "out" / "checkpoint-1.pth", *other)
    assert "Warning: scored with mean [0.485" in other.out
    assert score(other.out, "test_loss") != score(scored.out, "test_loss")


@pytest.fixture
def trained(run_main, imnet, tmp_path) -> Path:
    """A checkpoint of ant, bee and cat."""
    run = run_main(*FOLDER, "--data_path", imnet, "--epochs", 3, output_dir=tmp_path / "trained")
    assert run.code == 0, run.err
    return tmp_path / "trained" / "checkpoint-2.pth"


def logits_of(checkpoint: Path, folder: Path, run_main) -> float:
    run = run_main("--eval", "true", "--resume", checkpoint, "--data_path", folder)
    assert run.code == 0, run.err
    return score(run.out, "test_loss")


def test_classes_are_scored_by_name_in_any_order(run_main, trained, imnet, tmp_path):
    """A folder is read in alphabetical order, so the checkpoint gets another order here."""
    expected = logits_of(trained, imnet, run_main)
    saved = torch.load(trained, weights_only=True)
    order = [2, 0, 1]
    for name in ("fc.weight", "fc.bias"):
        saved["model"][name] = saved["model"][name][order]
    saved["data"]["classes"] = [saved["data"]["classes"][index] for index in order]
    torch.save(saved, tmp_path / "other_order.pth")
    assert logits_of(tmp_path / "other_order.pth", imnet, run_main) == pytest.approx(expected)


def test_some_of_the_classes_are_scored_on_those_and_others_are_refused(
    run_main, trained, tmp_path
):
    """Only val/ is needed."""
    write_images(tmp_path / "some" / "val", ["bee", "cat"], count=3)
    run = run_main("--eval", "true", "--resume", trained, "--data_path", tmp_path / "some")
    assert run.code == 0 and "Scored on 2 of the 3 classes of the checkpoint" in run.out, run.err
    write_images(tmp_path / "other" / "val", ["bee", "cat", "dog"])
    run = run_main("--eval", "true", "--resume", trained, "--data_path", tmp_path / "other")
    assert run.code == 2 and "classes that the checkpoint does not know (dog)" in run.err
    assert f"--data_path {tmp_path / 'other'}: the data has" in run.err
    run = run_main("--eval", "true", "--resume", trained, "--data_path", tmp_path / "some" / "val")
    assert run.code == 2 and "holds no folder val; pass the folder that holds it, or" in run.err
    run = run_main("--eval", "true", "--resume", trained, "--model", "cifar_resnet20")
    assert run.code == 2 and run.err.endswith("of another model: pass its --model\n")


def test_data_that_the_checkpoint_names_and_that_has_moved_is_asked_for(run_main, trained, imnet):
    imnet.rename(imnet.with_name("moved"))
    run = run_main("--eval", "true", "--resume", trained)
    assert run.code == 2 and run.err.count("\n") == 1
    assert f"--data_path {imnet}: not found from this folder; {trained} was trained with" in run.err
    assert run_main("--eval", "true", "--resume", trained, "--data_path", imnet).code == 2
    moved = run_main("--eval", "true", "--resume", trained, "--data_path", imnet.with_name("moved"))
    assert moved.code == 0


def test_a_file_that_names_no_data_is_not_scored_on_the_digits(run_main, teacher_file):
    run = run_main("--eval", "true", "--resume", teacher_file)
    assert (
        run.code == 2
        and "does not name the data that it was trained on; pass --data_path" in run.err
    )


# -------------------------------------------------------------------------------------- resume

OTHER_RUNS = {
    "--imagenet_default_mean_and_std false": "was trained with mean [0.485",
    "--model cifar_resnet20": "was trained with --model cifar_resnet8, but this run uses cifar_res",
    "--opt sgd": "was trained with --opt adamw, but this run uses sgd",
    "--train_samples 66": "was trained on different images (64 images, now 66)",
    "--seed 1": "was trained on different images (equally many)",
    "--input_size 16": "was trained with input_size 8, but this run uses 16",
    "KD": "was trained with --kd false, but this run uses true",
}


@pytest.mark.parametrize("flags", OTHER_RUNS)
def test_the_folder_of_another_run_is_refused_by_the_first_difference(
    run_main, short, kd, tmp_path, flags
):
    assert run_main(*short, output_dir=tmp_path).code == 0
    before = {p.name: p.read_bytes() for p in tmp_path.glob("[cl]*")}
    words = kd if flags == "KD" else flags.split()
    run = run_main(*short, "--epochs", 3, *words, output_dir=tmp_path)
    assert run.code == 2 and OTHER_RUNS[flags] in run.err and "another --output_dir" in run.err
    assert before == {p.name: p.read_bytes() for p in tmp_path.glob("[cl]*")}


def test_classes_of_another_folder_are_refused(run_main, imnet, tmp_path):
    run_main(*FOLDER, "--data_path", imnet, "--epochs", 1, output_dir=tmp_path / "out")
    write_images(tmp_path / "b" / "train", ["ant", "bee", "yak"])
    write_images(tmp_path / "b" / "val", ["ant", "bee", "yak"])
    flags = [*FOLDER, "--data_path", tmp_path / "b", "--epochs", 2]
    run = run_main(*flags, output_dir=tmp_path / "out")
    assert run.code == 2 and "was trained on different classes (cat, yak)" in run.err


def test_images_that_were_replaced_under_their_names_are_refused(run_main, imnet, tmp_path):
    flags = [*FOLDER, "--data_path", imnet, "--output_dir", tmp_path / "out", "--epochs"]
    assert run_main(*flags, 1).code == 0
    shutil.copytree(imnet, tmp_path / "copy")  # with other times
    copied = run_main(*flags, 2, "--data_path", tmp_path / "copy")
    assert copied.code == 0 and "epoch 0 is done" in copied.out, copied.err
    write_images(tmp_path / "other", ["bee"], size=(48, 32))
    shutil.copyfile(tmp_path / "other" / "bee" / "3.jpg", imnet / "train" / "bee" / "3.jpg")
    run = run_main(*flags, 3)
    assert run.code == 2 and "(the same names and labels, but different contents)" in run.err


def test_fewer_epochs_than_are_done_do_not_make_a_finished_run(run_main, short, tmp_path):
    run_main(*short, "--epochs", 4, output_dir=tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    shutil.copyfile(tmp_path / "whole" / "checkpoint-2.pth", tmp_path / "cut" / "checkpoint-2.pth")
    for epochs in (2, 3):
        run = run_main(*short, "--epochs", epochs, output_dir=tmp_path / "cut")
        assert run.code == 2 and "3 of 4 epochs are done, so there is nothing left" in run.err
        assert "finished" not in run.out + run.err


def test_the_warm_up_that_was_chosen_for_more_epochs_is_chosen_anew(run_main, short, tmp_path):
    flags = ["--train_samples", 64, "--epochs", 12, "--save_ckpt_num", 12, "--eval_freq", 12]
    run_main(*flags, output_dir=tmp_path)
    run = run_main("--resume", tmp_path / "checkpoint-0.pth", "--epochs", 2)
    assert run.code == 0 and "--warmup_epochs 2.4 → 0.4" in run.out, run.err


def test_another_recipe_is_listed_once_with_what_it_does_to_the_learning_rate(
    run_main, short, tmp_path
):
    run_main(*short, "--lr", "1e-3", output_dir=tmp_path)
    flags = [*short, "--epochs", 4, "--lr", "2e-3", "--smoothing", 0]
    run = run_main(*flags, output_dir=tmp_path)
    assert run.code == 0, run.err
    (line,) = [line for line in run.out.splitlines() if "another recipe" in line]
    for change in ("--epochs 2 → 4", "--lr 0.001 → 0.002", "--smoothing 0.1 → 0.0"):
        assert change in line
    assert "Warning: the learning rate goes on from" in run.out
    assert [line["epoch"] for line in run.log] == [0, 1, 2, 3]


def test_a_finished_run_says_so_and_is_not_reported_for_another_recipe(run_main, short, tmp_path):
    first = run_main(*short, output_dir=tmp_path)
    again = run_main(*short, output_dir=tmp_path)
    assert again.code == 0 and "This run was finished already (2 epochs)" in again.out
    assert again.log == first.log
    for flags in (["--lr", "5e-5"], ["--epochs", 1]):
        other = run_main(*short, *flags, output_dir=tmp_path)
        assert other.code == 2 and "was trained with another recipe" in other.err
        assert "Accuracy" not in other.out


def test_a_run_that_is_resumed_by_its_file_follows_its_recipe(run_main, short, kd, tmp_path):
    flags = [*short, *kd, "--lr", "2e-3", "--smoothing", 0, "--epochs", 4, "--mixup_mode", "elem"]
    whole = run_main(*flags, output_dir=tmp_path / "whole")
    middle = tmp_path / "whole" / "checkpoint-1.pth"
    rest = run_main("--resume", middle, output_dir=tmp_path / "rest")
    assert rest.code == 0 and "another recipe" not in rest.out, rest.err
    assert rest.log == whole.log[2:]
    assert is_same(rest.checkpoint(3)["model"], whole.checkpoint(3)["model"])


# ------------------------------------------------------------------------------ output folders


def test_without_an_output_folder_the_first_line_says_that_nothing_is_kept(run_main, short):
    run = run_main(*short)
    assert run.out.startswith("No --output_dir: checkpoints and log.txt will not be saved")


def test_a_damaged_line_of_log_txt_costs_no_other_line(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text('{"epoch": 0}\n{"epo\n{"epoch": 2}\n{"epoch": 3}\n')
    drop_lines_from(path, 3)
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 2}\n'


def test_starting_over_moves_the_earlier_run_aside(run_main, short, tmp_path):
    first = run_main(*short, "--lr", "5e-3", output_dir=tmp_path)
    best = (tmp_path / "checkpoint-best.pth").read_bytes()
    second = run_main(*short, "--epochs", 1, "--auto_resume", "false", output_dir=tmp_path)
    assert second.code == 0 and len(second.log) == 1
    assert (tmp_path / "earlier-1" / "checkpoint-best.pth").read_bytes() == best
    assert len((tmp_path / "earlier-1" / "log.txt").read_text().splitlines()) == 2
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "checkpoint-0.pth",
        "checkpoint-best.pth",
    ]
    assert first.code == 0


@pytest.mark.parametrize("flag", ["--teacher_path", "--finetune"])
def test_a_file_that_the_run_reads_is_never_overwritten_by_it(run_main, short, tmp_path, flag):
    run_main(*short, output_dir=tmp_path)
    best = tmp_path / "checkpoint-best.pth"
    before = best.read_bytes()
    flags = teacher_flags(best) if flag == "--teacher_path" else [flag, best]
    for resume in ("true", "false"):
        run = run_main(*short, *flags, "--auto_resume", resume, output_dir=tmp_path)
        assert run.code == 2 and f"{flag} {best}: lies in --output_dir" in run.err
    assert best.read_bytes() == before


def hold(folder: Path) -> None:
    lock = lock_folder(folder)
    print("held", flush=True)
    time.sleep(60)
    lock.close()


@pytest.mark.skipif(os.name != "posix", reason="needs fcntl")
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_ends(run_main, short, tmp_path):
    with Group(hold, tmp_path) as holder:
        holder.wait_for("held")
        with Group(program, [*QUICK, *short, "--output_dir", str(tmp_path)]) as second:
            assert second.wait() == [2]
            assert f"(process {holder.processes[0].pid} on " in second.err
            assert f"--output_dir {tmp_path}: another run is using this folder" in second.err
    # A killed run leaves its file behind, and no lock.
    assert (tmp_path / ".lock").exists() and run_main(*short, output_dir=tmp_path).code == 0


# --------------------------------------------------------------------------- which weights teach


@pytest.mark.parametrize(
    ("scores", "use_ema", "chosen"),
    [
        ({"test_acc1": 27.0, "test_acc1_ema": 25.0}, "auto", "model"),
        ({"test_acc1": 27.0, "test_acc1_ema": 28.0}, "auto", "model_ema"),
        ({"test_acc1": 27.0}, "auto", "model"),
        ({}, "auto", "model_ema"),
        ({"test_acc1": 27.0, "test_acc1_ema": 25.0}, "true", "model_ema"),
        ({}, "false", "model"),
    ],
)
def test_the_better_weights_of_a_file_are_chosen_by_their_recorded_accuracy(
    scores, use_ema, chosen
):
    state = {"w": torch.ones(1)}
    content = {"model": state, "model_ema": state, "scores": scores}
    weights = Checkpoint("c.pth", content).weights(use_ema)
    assert weights.key == chosen
    assert ("recorded accurac" in weights.description) == (use_ema == "auto")


def test_a_poor_average_does_not_teach(run_main, short, tmp_path):
    """An EMA without warm-up stays near its first weights in a short run."""
    flags = ["--train_samples", 320, "--epochs", 5, "--lr", "5e-3", "--model_ema", "true"]
    flags += ["--model_ema_warmup", "false", "--model_ema_eval", "true"]
    teacher = run_main(*flags, output_dir=tmp_path)
    scores = teacher.checkpoint(4)["scores"]
    assert scores["test_acc1"] > scores["test_acc1_ema"] + 10
    path = tmp_path / "checkpoint-4.pth"
    run = run_main(*short, *teacher_flags(path))
    assert f"weights 'model', recorded accuracy {scores['test_acc1']:.2f} %" in run.out
    assert f"acc1 {scores['test_acc1']:.2f}" in run.out
    run = run_main(*short, *teacher_flags(path), "--use_ema", "true")
    assert "weights 'model_ema' (EMA)" in run.out
    scored = run_main("--eval", "true", "--resume", path, "--use_ema", "false")
    assert "test_acc1_ema" not in scored.out
    assert score(scored.out) == pytest.approx(scores["test_acc1"], abs=1e-4)


# ------------------------------------------------------------- files of an earlier commit

EARLIER = Path(__file__).parent / "earlier"  # written by commit 6fca50f; see network.py there
OF_EARLIER = ["--model", "earlier.network:make", "--input_size", 8, "--epochs", 1, "--lr", "1e-2"]
OF_EARLIER += ["--train_samples", 32, "--batch_size", 16, "--aa", "none"]


def test_a_checkpoint_of_an_earlier_commit_is_scored_resumed_and_exported_as_then(
    run_main, tmp_path
):
    file = EARLIER / "teacher.pth"
    scored = run_main("--eval", "true", "--resume", file, *OF_EARLIER[:2])
    assert scored.code == 0 and "Warning" not in scored.out, scored.err
    assert score(scored.out, "test_loss") == pytest.approx(2.323681, abs=1e-4)
    assert score(scored.out, "test_loss_ema") == pytest.approx(2.324366, abs=1e-4)
    resumed = run_main(*OF_EARLIER, "--epochs", 2, "--resume", file, output_dir=tmp_path / "out")
    assert resumed.code == 0 and "epoch 0 is done; best so far: best 9.72 %" in resumed.out
    assert [line["epoch"] for line in resumed.log] == [1], resumed.err
    network, card, _ = network_from_checkpoint(str(file), "false")
    assert torch.equal(network.fc.weight, torch.load(file)["model"]["fc.weight"])
    assert (card.input_size, card.crop_pct, card.weights) == (8, 1.0, "raw")


def test_a_teacher_cache_of_an_earlier_commit_stands_in_for_its_teacher(run_main, tmp_path):
    shutil.copytree(EARLIER / "cache", tmp_path / "cache")
    flags = [*OF_EARLIER, "--kd", "true", "--teacher_arch", "earlier.network:make"]
    flags += ["--teacher_path", EARLIER / "teacher.pth", "--teacher_cache", tmp_path / "cache"]
    run = run_main(*flags, output_dir=tmp_path / "out")
    assert run.code == 0 and "the teacher is not loaded" in run.out, run.err
    # The run that filled this cache: its log.txt. float16 rows, so not to the last digit.
    assert run.log[0]["train_loss"] == pytest.approx(0.697992, abs=1e-4)
    assert run.log[0]["teacher_loss"] == pytest.approx(2.324366, abs=1e-4)
