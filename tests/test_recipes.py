"""Recipes on the command line, the recipes that come with the project, and the step schedule."""

import re
import shlex

import pytest
from helpers import ROOT, is_same, teacher_flags

import models
import sweep
from arguments.checks import effects_line
from arguments.derived import teachers_of
from arguments.flags import DATA_FLAGS, MACHINE, with_role
from arguments.parsing import given_flags, parse
from training.optimizer import check_optimizer, make_schedule, step_schedule
from utils import UserError

RECIPES = sorted((ROOT / "recipes").glob("*.args"))


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe; returns the word for the command line."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "my.args"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return f"@{path}"

    return write


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_names_what_timm_has(path, teacher_file):
    given = given_flags([f"@{path}"])
    words = ["--data_set", "MNIST" if "mnist" in path.stem else "hfds/x", "--data_path", "x"]
    if given.get("kd") and "teacher_path" not in given:
        words += ["--teacher_path", str(teacher_file)]
    if given.get("kd") and "teacher_arch" not in given:
        words += ["--teacher_arch", "cifar_resnet8"]
    words += ["--teacher_cache", "cache"] if "teacher_cache_topk" in given else []
    args = parse([f"@{path}", *words])
    assert not effects_line(args)
    check_optimizer(args)
    for arch in [args.model, *(teacher.arch for teacher in teachers_of(args))]:
        models.check_architecture(arch)
    assert not given.keys() & (DATA_FLAGS | with_role(MACHINE))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_begins_with_source_figure_command_and_whether_it_was_run(path):
    head = path.read_text().partition("\n--")[0]
    assert "# Published" in head and re.search(r"^# (Nobody has run|Run )", head, re.MULTILINE)
    (command,) = set(re.findall(r"@(recipes/\S+)", head))
    assert ROOT / command == path and path.stem in (ROOT / "docs" / "recipes.md").read_text()


def test_the_recipes_of_the_guide_are_its_commands():
    guide = (ROOT / "docs" / "guide.md").read_text()
    commands = re.findall(r"```bash\npython main.py \\\n(.*?)```", guide, re.DOTALL)
    commands = [given_flags(shlex.split(text.replace("\\\n", " "))) for text in commands]
    for command in commands:
        del command["teacher_path"]
    ours = [given_flags([f"@{path}"]) for path in RECIPES if path.stem.startswith("guide")]
    assert len(ours) == 3 and all(flags in commands for flags in ours)


def test_later_flags_win_and_those_of_a_recipe_are_flags_like_any_other(recipe):
    word = recipe("# why\n\n--epochs 7  # short\n--opt-betas 0.8 0.9\n--lr=1e-2\n--model_ema\n")
    args = parse(["--epochs", "3", "--seed", "5", word, "--lr", "2e-2"])
    assert (args.epochs, args.opt_betas, args.lr, args.model_ema) == (7, [0.8, 0.9], 2e-2, True)
    assert args.given == ["epochs", "lr", "model_ema", "opt_betas", "seed"]


BAD_LINES = {
    "--modle x": "unrecognized arguments: --modle; did you mean --model?",
    "--epochs 1.5": "--epochs: '1.5' is not a whole number",
    "--kd_alpha 1.5": "--kd_alpha 1.5: must lie in 0…1",
    "--kd_loss dk": "--kd_loss: invalid choice: 'dk'",
    "--lr": "--lr: expected one argument",
    "--lr 1 2": "unrecognized arguments: 2",
    "kd true": "kd: is no flag; begin each line with one",
    "@other.args": "@other.args: a recipe cannot hold a recipe",
    "--data_path 'x": "No closing quotation",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_an_error_in_a_recipe_names_file_and_line(recipe, run_main, line):
    run = run_main(recipe(f"# first\n--epochs 1\n{line}\n"))
    assert run.code == 2 and f"my.args, line 3: {BAD_LINES[line]}" in run.err
    assert len(run.err.splitlines()) == 2 and run.err.startswith("usage: ")


def test_what_is_no_recipe_is_refused(recipe, tmp_path):
    for word, problem in (
        (f"@{tmp_path}/missing.args", "No such file"),
        (f"@{tmp_path}", "Is a directory"),
        (recipe(b"--epochs 1\n\xff\xfe\x00"), "not a text file"),
    ):
        with pytest.raises(UserError, match=f"cannot read this recipe .{problem}.*; pass @"):
            given_flags([word])


def test_a_sweep_takes_a_recipe_and_varies_its_flags(recipe, teacher_file, capsys):
    word = recipe(shlex.join(["--epochs", "3"]) + "\n--kd true\n--kd_alpha 0.9\n")
    argv = ["--out", "runs", "--print_commands", "--vary", "kd=false,true", "--", word]
    assert sweep.main([*argv, *teacher_flags(teacher_file)[2:]]) == 0
    alone, distilled = map(shlex.split, capsys.readouterr().out.splitlines())
    assert "--kd_alpha" in distilled and "--kd_alpha" not in alone and "--epochs" in alone
    assert sweep.main([*argv[:-1], recipe("--output_dir x")]) == 2
    assert "--output_dir: is set by the sweep" in capsys.readouterr().err


# ------------------------------------------------------------------------------ step schedule


def test_a_step_schedule_is_multiplied_at_each_milestone():
    """Warm-up over 3 steps, epochs of 4 steps, milestones after epochs 1 and 3."""
    expected = []
    for step in range(20):
        rate = 0.5 * min(1, (step + 1) / 3)
        for milestone in (4, 12):
            rate *= 0.2 if step >= milestone else 1
        expected.append(rate)
    lr = step_schedule(0.5, 0.2, [4, 12], 20, warmup_steps=3)
    assert lr.tolist() == pytest.approx(expected, rel=1e-12)
    flags = "--sched step --decay_epochs 1 3 --decay_rate 0.2 --lr 0.5 --epochs 5 --warmup_steps 3"
    schedule = make_schedule(parse(flags.split()), steps_per_epoch=4)
    assert schedule.lr.tolist() == lr.tolist() and len(set(schedule.weight_decay)) == 1


def test_a_resumed_step_schedule_ends_with_the_same_bits(run_main, short, tmp_path):
    flags = [*short, "--epochs", 3, "--sched", "step", "--decay_epochs", 1, 2, "--opt", "momentum"]
    run = run_main(*flags, output_dir=tmp_path)
    assert "times 0.1 after 1 2 epochs" in run.out
    whole = run.checkpoint(2)
    for name in ("2", "best"):
        (tmp_path / f"checkpoint-{name}.pth").unlink()
    resumed = run_main(*flags, output_dir=tmp_path)
    assert "Resumed from" in resumed.out
    assert is_same(resumed.checkpoint(2)["model"], whole["model"])
    assert is_same(resumed.checkpoint(2)["optimizer"], whole["optimizer"])
