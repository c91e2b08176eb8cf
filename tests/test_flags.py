"""The rules of flags: ranges, spellings, mistyped names, and no flag without effect in silence."""

import errno
import itertools
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import timm.data
from helpers import ROOT, teacher_flags

from arguments.checks import REMEDIES, effects_line
from arguments.defaults import fill_data_defaults
from arguments.derived import teachers_of
from arguments.flags import (
    COMPARED,
    DATA,
    FILE,
    FLAGS,
    FOLDER,
    FOLLOWED,
    IF_MIXED,
    MACHINE,
    OF_TEACHER,
    REPEAT,
    SWITCH,
    VALIDATION,
    with_cache,
    with_role,
)
from arguments.parsing import parse_args
from examples import label_curve
from tools import kill_test, weight_hashes
from utils import UserError, write_whole


@pytest.fixture
def parse(capsys):
    """Parses a command line; returns the arguments, or the error without the line of usage."""

    def run(*words: object, saved: dict | None = None):
        try:
            return parse_args([*map(str, words)], saved)
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and len(error.splitlines()) == 2 and "Traceback" not in error
            return error.splitlines()[1]

    return run


# ------------------------------------------------------------------------------------ numbers

NUMERIC = [flag for flag in FLAGS.values() if flag.kind.remedy]


@pytest.mark.parametrize("value", ["nan", "inf", "-2"])
def test_no_numeric_flag_takes_nan_infinity_or_a_negative_number(parse, value):
    assert len(NUMERIC) >= 48
    for flag in NUMERIC:
        if flag.name == "local_rank" and value == "-2":
            continue  # old launchers pass -1; the flag is ignored
        error = parse(f"--{flag.name}", *[value] * (2 if flag.nargs else 1))
        assert isinstance(error, str), flag.name
        assert f"--{flag.name}" in error and value in error
        assert "is not a whole number" in error or re.search(r"must (be|lie) ", error)
        assert "negative" not in error


NOT_ALLOWED = {
    "--kd_alpha 1.5": "--kd_alpha 1.5: must lie in 0…1",
    "--kd_alpha nan": "--kd_alpha nan: must lie in 0…1",
    "--kd_temperature 0": "--kd_temperature 0.0: must be above 0",
    "--kd_temperature -1": "--kd_temperature -1.0: must be above 0",
    "--kd maybe": "--kd: 'maybe' is neither true nor false",
    "--kd_alpha 0,5": "--kd_alpha: '0,5' is not a number; decimals take a point, as in 0.5",
    "--epochs 1.5": "--epochs: '1.5' is not a whole number",
    "--batch_size 15": "--batch_size 15: mixup and cutmix need an even batch size",
    "--batch_size 0": "--batch_size 0: must be 1 or more",
    "--eval_freq 0": "--eval_freq 0: must be 1 or more",
    "--epochs 5 --warmup_epochs 6": "--warmup_epochs 6: longer than the run of 5 epochs",
    "--drop_path 2": "--drop_path 2.0: must lie in 0…1",
    "--data_set IMNET": "--data_set IMNET: needs a folder; pass --data_path FOLDER",
    "--eval true": "--eval true: needs a checkpoint to score; pass --resume FILE",
    "--lr nan": "--lr nan: must be 0 or more and finite",
    "--momentum 5": "--momentum 5.0: must lie in 0…1",
    "--smoothing 1": "--smoothing 1.0: must be 0 or more and below 1",
    "--crop_pct 0": "--crop_pct 0.0: must be above 0 and at most 1",
    "--opt_betas 0.9 1": "--opt_betas 0.9 1.0: must be 0 or more and below 1",
    "--opt_betas 0.9": "--opt_betas 0.9: pass two numbers",
    "--teacher_min_acc1 101": "--teacher_min_acc1 101.0: must be 0, or lie in 1…100",
    "--teacher_min_acc1 0.4": "pass 40 for a fraction of 0.4",
    "--model_ema_decay 1": "--model_ema_decay 1.0: must be 0 or more and below 1",
    "--start_epoch 5 --epochs 5": "--start_epoch 5: must be below the number of epochs (5)",
    "--min_lr 1 --lr 0.1": "--min_lr 1.0: above --lr 0.1",
    "--lr 1e-7": "--min_lr 1e-06: above --lr 1e-07",
    "--cutmix_minmax 0.9 0.1": "--cutmix_minmax 0.9 0.1: pass the smaller ratio first",
    "--cutmix_minmax 0.5 0.5": "at --input_size 8 the ratios must differ by 0.12",
    "--cutmix_minmax 0.2 1.5": "--cutmix_minmax 0.2 1.5: must lie in 0…1",
    "--data_set CIFRA10": "--data_set CIFRA10: no such data set; did you mean CIFAR10",
    "--linear_probe true": "needs weights to start from; pass --finetune FILE or --pretrained true",
    "KD --linear_probe true --finetune x": "--linear_probe true: trains on labels alone, without a "
    "teacher; remove --kd true",
    "KD --unlabeled rest": "--unlabeled rest: means the images that --train_samples leaves out",
    "KD --unlabeled nowhere": "--unlabeled nowhere: is not a folder",
    "KD --kd_loss dkd": "--kd_loss dkd: needs one class per image, and mixup and cutmix mix them; "
    "pass --mixup 0 --cutmix 0",
    "KD --kd_loss dkd --mixup 0 --cutmix 0 --unlabeled rest": "--unlabeled adds images without one",
    "KD --kd_loss dpk": "invalid choice: 'dpk'",
    "KD --kd_weight 0": "--kd_weight 0.0: must be above 0",
    "KD --ce_weight -1": "--ce_weight -1.0: must be 0 or more",
    "KD --kd_warmup_epochs 301": "--kd_warmup_epochs 301: longer than the run of 300 epochs",
    "--loss bce --class_weights balanced": "--class_weights balanced: weighs --loss ce",
    "--sched step": "--sched step: needs the epochs after which the learning rate is lowered",
    "--sched step --decay_epochs 3 3 --epochs 9": "pass each epoch once, in ascending order",
    "--sched step --decay_epochs 3 9 --epochs 9": "9 is not below the number of epochs (9)",
}


def words_of(flags: str, path: object = "t.pth") -> list[str]:
    """The words of a command line in which KD stands for the flags of a teacher in a file."""
    return [w for word in flags.split() for w in (teacher_flags(path) if word == "KD" else [word])]


@pytest.mark.parametrize("flags", NOT_ALLOWED)
def test_a_value_that_cannot_work_is_named_with_what_is_allowed(parse, flags):
    assert NOT_ALLOWED[flags] in parse(*words_of(flags))


def test_the_ends_of_the_ranges_are_allowed(parse):
    flags = "--lr 0 --min_lr 0 --momentum 0 --smoothing 0 --crop_pct 1 --hflip 1 --weight_decay 0"
    args = parse(*flags.split(), "--local_rank", -1, "--cutmix_minmax", 0, 1)
    assert (args.momentum, args.crop_pct, args.cutmix_minmax) == (0.0, 1.0, [0.0, 1.0])


@pytest.mark.parametrize("mixing", [[], ["--mixup", "0", "--cutmix", "0"]])
def test_a_batch_size_is_only_recommended_if_it_leaves_out_fewer_images(monkeypatch, mixing):
    """And any number of images has a batch size, or none that is named."""
    recommended = 0
    for images, processes in itertools.product(range(1, 41), (1, 2, 3)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        for typed in ([], *(["--batch_size", str(size)] for size in range(2, 50, 6))):
            args = parse_args([*mixing, *typed])
            lines = fill_data_defaults(args, images)
            total = args.batch_size * processes
            assert total <= images and (typed or not any("--batch_size" in x for x in lines[:-1]))
            if not total:
                assert not lines and images < processes * (1 if mixing else 2)
            for size, left in re.findall(r"--batch_size (\d+) leaves out (\d+)", " ".join(lines)):
                assert int(left) == images % (int(size) * processes) < images % total
                assert int(size) % 2 == 0 or mixing
                recommended += 1
    assert recommended > 50


OPTIMIZERS = {
    "--opt sgd --opt_betas 0.9 0.95": "--opt_betas: --opt sgd has no such setting",
    "--opt adamw --momentum 0.8": "--momentum: --opt adamw has no such setting",
    "--opt lion --opt_eps 1e-6": "--opt_eps: --opt lion has no such setting",
    "--opt adan --opt_betas 0.9 0.95": "--opt_betas: --opt adan needs 3 numbers, not 2",
    "--opt_betas 0.9 0.95 0.99": "--opt_betas: --opt adamw needs 2 numbers, not 3",
}


@pytest.mark.parametrize("flags", OPTIMIZERS)
def test_a_setting_that_the_optimizer_ignores_is_refused_before_data_is_read(run_main, flags):
    run = run_main(*flags.split(), "--data_path", "/nowhere")
    assert run.code == 2 and OPTIMIZERS[flags] in run.err and len(run.err.splitlines()) == 1


def test_a_batch_of_one_image_that_batch_norm_cannot_train_on(run_main):
    flags = "--batch_size 1 --mixup 0 --cutmix 0 --train_samples 4 --epochs 1".split()
    run = run_main(*flags, "--model", "resnet18", "--input_size", 32)
    assert run.code == 2 and "--batch_size 1: this model's BatchNorm" in run.err
    assert len(run.err.splitlines()) == 1
    assert run_main(*flags).code == 0  # cifar_resnet8 has 2x2 values left


# ------------------------------------------------------------------------ flags without effect

WITHOUT_EFFECT = {
    "--kd_alpha 0.9 --kd_temperature 2": "--kd_alpha 0.9 and --kd_temperature 2.0 have no effect "
    "without --kd true; add that, or remove the flags",
    "--teacher_arch resnet18": "without --kd true",
    "--teacher_classes nofile --teacher_min_acc1 50": "without --kd true",
    "--teacher_cache x": "--teacher_cache x has no effect without --kd true",
    "--use_ema true": "without --kd true or --eval true",
    "--eval_data_path x": "without --data_set image_folder",
    "--data_set image_folder --data_path x --eval_data_path x --holdout 2": "beside --holdout",
    "--data_set DIGITS --data_path x": "--data_path x has no effect beside --data_set DIGITS; "
    "remove one of the two",
    "--model_ema_eval true": "--model_ema_eval true has no effect without --model_ema true",
    "--model_ema_decay 0.9": "without --model_ema true",
    "--amp_dtype bfloat16": "without --use_amp true",
    "--cutmix_minmax 0.2 0.8 --cutmix 1": "--cutmix 1.0 has no effect beside --cutmix_minmax",
    "--model_key state_dict": "without --finetune FILE",
    "--model_prefix encoder.": "without --finetune FILE",
    "--save_ckpt_freq 2": "without --output_dir FOLDER",
    "--save_ckpt_num 2 --save_ckpt_steps 5": "without --output_dir FOLDER",
    "--warmup_epochs 1 --warmup_steps 5": "--warmup_epochs 1 has no effect beside --warmup_steps",
    "--color_jitter 0.4": "without --aa none",
    "KD --dkd_beta 2": "--dkd_beta 2.0 has no effect without --kd_loss dkd",
    "KD --teacher_min_acc1 70 --teacher_eval false": "70.0 has no effect without --teacher_eval",
    "--decay_epochs 3": "--decay_epochs 3 has no effect without --sched step",
    "--decay_rate 0.2": "--decay_rate 0.2 has no effect without --sched step",
}


@pytest.mark.parametrize("flags", WITHOUT_EFFECT)
def test_a_flag_without_effect_is_refused_with_its_remedy(parse, flags):
    error = parse(*words_of(flags))
    assert "no effect" in error and WITHOUT_EFFECT[flags] in error and "; " in error


@pytest.mark.parametrize("flag", sorted(OF_TEACHER - {"unlabeled", "use_ema"}))
def test_no_flag_of_the_teacher_is_swallowed_without_kd(parse, flag):
    choices = FLAGS[flag].kind.choices
    assert "--kd true" in parse(f"--{flag}", choices[0] if choices else "1")


# If the switch itself is on the command line, as in a script that varies the switch.
REPORTED = {
    "--kd false --kd_alpha 0.9 --teacher_arch a --teacher_path b": "--teacher_path, "
    "--teacher_arch, --kd_alpha (without --kd true)",
    "--kd false --teacher_cache x --teacher_cache_dtype float32": "--teacher_cache_dtype (without",
    "KD --kd_alpha 0 --teacher_dtype bfloat16": "--teacher_dtype (with --kd_alpha 0)",
    "KD --kd_alpha 1 --smoothing 0.2": "--smoothing (with --kd_alpha 1, which ignores labels)",
    "--model_ema false --model_ema_decay 0.9": "--model_ema_decay (without --model_ema true)",
    "--use_amp false --amp_dtype bfloat16": "--amp_dtype (without --use_amp true)",
    "--mixup 0 --cutmix 0 --mixup_prob 0.5": "--mixup_prob (without --mixup or --cutmix)",
    "--mixup 0 --mixup_switch_prob 0.5": "--mixup_switch_prob (without both --mixup and --cutmix)",
    "--reprob 0 --remode rand --recount 2": "--remode, --recount (with --reprob 0)",
    "--aa rand-m9 --color_jitter 0.4": "--color_jitter (without --aa none)",
    "--aa none --train_interpolation random": "--train_interpolation (with --aa none and images",
    "--weight_decay 0 --weight_decay_end 0.1": "--weight_decay_end (with --weight_decay 0)",
    "--output_dir x --save_ckpt false --save_ckpt_num 2": "--save_ckpt_num (with --save_ckpt",
    "KD --teacher_cache x --teacher_cache_only true --lr 1 --save_ckpt_num 2": "--lr, "
    "--save_ckpt_num (with --teacher_cache_only true)",
    "EVAL --epochs 5 --lr 1 --kd_alpha 0.4": "(with --eval true)",
}


@pytest.mark.parametrize("typed", REPORTED)
def test_a_flag_without_effect_is_reported_where_its_switch_is_given(parse, teacher_file, typed):
    flags = typed.replace("EVAL", f"--eval true --resume {teacher_file}")
    args = parse(*words_of(flags, teacher_file), saved={})
    line = effects_line(args)
    assert line.startswith("Without effect in this run: ") and REPORTED[typed] in line
    assert len(line.splitlines()) == 1


def test_what_is_reported_is_printed_once_at_the_start(run_main, short):
    run = run_main(*short, "--kd", "false", "--kd_alpha", 0.5)
    assert run.code == 0 and run.out.count("--kd_alpha (without --kd true)") == 1
    assert run.out.index("Without effect") < run.out.index("Data DIGITS")
    assert "Without effect" not in run_main(*short).out


def test_an_evaluation_names_the_flags_of_training_and_scores_the_same(run_main, short, tmp_path):
    run_main(*short, output_dir=tmp_path)
    flags = ["--eval", "true", "--resume", tmp_path / "checkpoint-1.pth"]
    plain, named = run_main(*flags), run_main(*flags, "--epochs", 7, "--mixup", 0)
    first, rest = named.out.split("\n", 1)
    assert first == "Without effect in this run: --epochs, --mixup, --log_dir (with --eval true)"
    assert plain.out.split("\n", 1)[1] == rest


def test_a_resumed_run_judges_flags_with_those_of_its_checkpoint(parse, teacher_file):
    words = ["--resume", teacher_file, "--kd_alpha", 0.3]
    saved = {"kd": True, "teacher_arch": "cifar_resnet8", "teacher_path": str(teacher_file)}
    assert parse(*words, saved=saved).kd_alpha == 0.3
    assert "--kd_alpha 0.3 has no effect without --kd true" in parse(*words, saved={})


def test_what_a_flag_needs_names_flags_and_a_remedy():
    for flag in FLAGS.values():
        assert len(set(flag.needs)) == len(flag.needs), flag.name
        for need in flag.needs:
            assert set(need.switches) <= FLAGS.keys(), flag.name
            assert need.otherwise.split()[0] in REMEDIES
            assert set(re.findall(r"--(\w+)", need.otherwise)) <= FLAGS.keys()


ROLES = {
    DATA: "labels nb_classes unlabeled",
    VALIDATION: "data_path data_set eval_data_path eval_labels holdout",
    REPEAT: "check_data data_seed eval_freq seed teacher_cache teacher_cache_identity "
    "teacher_cache_only teacher_cache_range teacher_eval teacher_min_acc1",
    MACHINE: "auto_resume calibrate compile device dist_eval dist_url eval fast_cuda local_rank "
    "log_dir num_workers output_dir pin_mem print_seconds report resume save_ckpt save_ckpt_freq "
    "save_ckpt_num save_ckpt_steps start_epoch teacher_device use_ema",
}
IN_CACHE = {
    COMPARED: "aa color_jitter hflip imagenet_default_mean_and_std input_size recount remode "
    "reprob teacher_arch teacher_cache_dtype teacher_cache_topk teacher_dtype teacher_input_size "
    "teacher_norm train_interpolation",
    IF_MIXED: "cutmix cutmix_minmax mixup mixup_mode mixup_prob mixup_switch_prob",
    FOLLOWED: "amp_dtype batch_size data_path data_set eval_data_path eval_labels holdout labels "
    "nb_classes no_aug teacher_classes teacher_path teacher_views teacher_weights train_samples "
    "unlabeled use_amp use_ema",
}


WITH_A_TEACHER = (
    "ce_weight dkd_alpha dkd_beta kd_alpha kd_loss kd_standardize kd_temperature "
    "kd_warmup_epochs kd_weight teacher_arch teacher_cache teacher_cache_dtype "
    "teacher_cache_identity teacher_cache_only teacher_cache_range teacher_cache_topk "
    "teacher_classes teacher_device teacher_dtype teacher_eval teacher_input_size "
    "teacher_min_acc1 teacher_norm teacher_path teacher_weights unlabeled use_ema"
)


def test_a_new_flag_enters_these_lists_on_purpose():
    """What is in none of them is part of the recipe, and does not change what a cache holds."""
    for role, names in ROLES.items():
        assert sorted(with_role(role)) == names.split(), role
    for kind, names in IN_CACHE.items():
        assert sorted(with_cache(kind)) == names.split(), kind
    assert sorted(OF_TEACHER) == WITH_A_TEACHER.split()


def test_the_commands_of_the_pages_and_tools_parse_without_a_word(parse, tmp_path):
    for name in ("teacher", "other", "five"):
        (tmp_path / f"{name}.pth").touch()
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").touch()
    guide = (ROOT / "docs" / "guide.md").read_text()
    recipes = re.findall(r"```bash\npython main.py \\\n(.*?)```", guide, re.DOTALL)
    recipes = [re.sub(r"/path/\S+\.pth", "{folder}/teacher.pth", recipe) for recipe in recipes]
    demo = [label_curve.teacher_command(0), f"{label_curve.student_flags(50)} {label_curve.COMMON}"]
    kills = f"{kill_test.FLAGS} --teacher_path {{folder}}/teacher.pth --output_dir x"
    commands = [*recipes, *demo, *weight_hashes.RUNS.values(), kills]
    assert len(recipes) == 3 and len(commands) > 20
    for command in commands:
        if "--output_dir" not in command:
            command += " --output_dir x"
        args = parse(*shlex.split(command.replace("\\\n", " ").format(folder=tmp_path)))
        assert not isinstance(args, str) and not effects_line(args), (command, args)


# ---------------------------------------------------------------------- names and spellings

MISTYPED = {
    "--modle x": "unrecognized arguments: --modle; did you mean --model?",
    "--bath_size 4": "--bath_size; did you mean --batch_size?",
    "--bath-size=4": "--bath-size; did you mean --batch_size?",
    "--epoch 3": "--epoch; did you mean --epochs?",
    "--learning-rate 1": "--learning-rate; did you mean --lr?",
    "--img-size 64 --modle x": "--img-size; did you mean --input_size? --modle; did you mean",
    "--zzz 1": "unrecognized arguments: --zzz; see --help",
    "--epochs 3 4": "unrecognized arguments: 4; see --help",
}


@pytest.mark.parametrize("words", MISTYPED)
def test_a_mistyped_flag_gets_near_names(parse, words):
    assert MISTYPED[words] in parse(*words.split())


def test_no_name_that_other_scripts_use_is_a_flag_or_leads_to_two():
    names = [name for flag in FLAGS.values() for name in flag.known_as.split()]
    assert len(names) == len(set(names)) >= 13 and not set(names) & FLAGS.keys()


def test_dashes_are_taken_for_underscores(parse):
    args = parse("--batch-size", 16, "--weight-decay=0.1", "--local-rank", 3)
    assert (args.batch_size, args.weight_decay, args.local_rank) == (16, 0.1, 3)
    assert {"batch_size", "weight_decay", "local_rank"} == set(args.given)


def test_a_switch_alone_means_true(parse, teacher_file):
    switches = [flag.name for flag in FLAGS.values() if flag.kind == SWITCH]
    assert {"kd", "model_ema", "use_amp", "eval", "compile"} <= set(switches)
    for switch in switches:
        alone = parse("--resume", teacher_file, *teacher_flags(teacher_file)[2:], f"--{switch}")
        text = parse("--resume", teacher_file, *teacher_flags(teacher_file)[2:], f"--{switch}=true")
        assert alone == text if isinstance(alone, str) else getattr(alone, switch) is True
    assert parse("--kd", *teacher_flags(teacher_file)[2:]).kd is True


def test_a_tilde_in_a_path_is_the_home_folder(parse, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    paths = {flag.name for flag in FLAGS.values() if flag.kind in (FILE, FOLDER)}
    paths -= {"teacher_path", "unlabeled"}  # a list, and one that must exist: see below
    words = [f"--{flag}=~/a.pth" for flag in paths]
    words += "--kd true --data_set image_folder --teacher_arch cifar_resnet8,resnet18".split()
    args = parse(*words, "--teacher_path", "~/a.pth,~/b.pth", "--unlabeled", "~")
    assert args.unlabeled == str(tmp_path)
    assert {getattr(args, flag) for flag in paths} == {f"{tmp_path}/a.pth"}
    assert args.teacher_path == f"{tmp_path}/a.pth,{tmp_path}/b.pth"


@pytest.mark.parametrize("paths", [["{},{}"], ["{}, {}"], ["{},", "{}"], ["{}", "{}"]])
def test_a_list_of_teachers_may_have_blanks(parse, teacher_file, paths):
    paths = [path.replace("{}", str(teacher_file)) for path in paths]
    words = ["--kd", "true", "--teacher_arch", "cifar_resnet8,", "cifar_resnet8"]
    args = parse(*words, "--teacher_path", *paths, "--teacher_weights", "2,", "1")
    assert args.teacher_path == f"{teacher_file},{teacher_file}"
    assert args.teacher_arch == "cifar_resnet8,cifar_resnet8"
    assert [teacher.weight for teacher in teachers_of(args)] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("typed", "name"),
    [("CIFAR100", "CIFAR"), ("cifar10", "CIFAR10"), ("cifar-10", "CIFAR10"), ("mnist", "MNIST")]
    + [("imagenet", "IMNET"), ("ImageNet", "IMNET"), ("fashion_mnist", "FashionMNIST")]
    + [("digits", "DIGITS"), ("hfds/x/y", "hfds/x/y"), ("folder", "folder")],
)
def test_common_names_of_data_sets_are_known(parse, typed, name):
    words = [] if name == "DIGITS" else ["--data_path", "x"]
    assert parse("--data_set", typed, *words).data_set == name


POLICIES = "rand rand-m9-mstd0.5-inc1 rand-n3-p0.5-mmax9 rand-tweights-mstd101 rand-m9-t3aw "
POLICIES += "augmix augmix-m5-w4-d2-b1-mstd0.5-a0.5 original originalr-mstd0.5 v0 v0r 3a"


@pytest.mark.parametrize("policy", POLICIES.split())
def test_every_policy_that_is_accepted_is_one_of_timms(parse, policy):
    assert parse("--aa", policy).aa == policy
    timm.data.create_transform(32, is_training=True, auto_augment=policy)


@pytest.mark.parametrize("policy", "foo autoaugment randaug rand-x1 rand-m rand-m9.5 v0-m9".split())
def test_an_unknown_policy_is_refused(parse, policy):
    error = parse("--aa", policy)
    assert f"--aa {policy}: timm knows no such policy; pass rand, augmix" in error
    assert "none for no policy" in error


@pytest.mark.parametrize("policy", ["none", "None", ""])
def test_a_policy_of_none_is_no_policy(parse, policy):
    assert parse("--aa", policy).aa == ""


# --------------------------------------------------------------------- full disks and Ctrl-C


def full_disk(*args, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("flag", ["output_dir", "log_dir", "teacher_cache"])
def test_a_full_disk_is_told_at_the_start(run_main, short, kd, tmp_path, monkeypatch, flag):
    @contextmanager
    def full_file(**keywords):
        yield SimpleNamespace(write=full_disk)

    monkeypatch.setattr("utils.tempfile.TemporaryFile", full_file)
    run = run_main(*short, *kd, f"--{flag}", tmp_path / "x")
    assert run.code == 2 and f"--{flag} {tmp_path / 'x'}: cannot write there" in run.err
    assert "No space left" in run.err and "free some space" in run.err
    assert len(run.err.splitlines()) == 1


@pytest.mark.parametrize("writes", [0, 1, 9])
def test_a_disk_that_fills_under_tensorboard_is_one_line(
    run_main, short, tmp_path, monkeypatch, writes
):
    from tensorboard.summary.writer.record_writer import RecordWriter

    written, write = [], RecordWriter.write

    def write_until_full(self, data):
        written.append(data)
        full_disk() if len(written) > writes else write(self, data)

    monkeypatch.setattr(RecordWriter, "write", write_until_full)
    run = run_main(*short, "--log_dir", tmp_path / "tb")
    assert run.code == 2 and f"--log_dir {tmp_path / 'tb'}" in run.err
    assert "No space left" in run.err and len(run.err.splitlines()) == 1


def test_a_new_cache_on_a_disk_that_fills_is_one_line_and_leaves_no_manifest(
    run_main, short, kd, tmp_path, monkeypatch
):
    flags = [*short, *kd, "--teacher_cache", tmp_path / "cache"]
    with monkeypatch.context() as full:
        full.setattr("teacher.logit_store.os.fsync", full_disk)
        run = run_main(*flags)
    assert run.code == 2 and f"--teacher_cache {tmp_path / 'cache'}" in run.err
    assert "free some space" in run.err and len(run.err.splitlines()) == 1
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert run_main(*flags).code == 0


def test_a_folder_that_is_removed_during_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="gone/log.txt: could not be written, because its folder"):
        write_whole(tmp_path / "gone" / "log.txt", "")


IMPORTING = """
import importlib.abc, runpy, sys, time
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
sys.argv = ["main.py"]
runpy.run_path("main.py", run_name="__main__")
"""


def test_ctrl_c_during_the_imports_ends_without_a_traceback():
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING], cwd=ROOT, stdout=-1, stderr=-1, text=True
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (130, "", "")
