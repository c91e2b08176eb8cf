"""Sweeps and the comparison of their runs: commands, pairs, intervals, tables, and bad input."""

import json
import math
import os
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from forked import Group, program
from helpers import QUICK, teacher_flags

import compare
import sweep
from reporting.plots import draw_curves
from reporting.runs import group_runs, read_run
from reporting.verdicts import Verdict, t_quantile

BASE = {"kd": False, "lr": 0.1, "epochs": 2, "seed": 0, "model": "s"}
BASE |= {"val_images": "10000:0123456789abcdef"}
KD = {"kd": True, "teacher_arch": "a", "kd_alpha": 0.7, "kd_temperature": 4.0, "unlabeled": ""}


NO_DIFFERENCE = "no difference larger than the noise"


def write_run(folder: Path, scores: list[float], **args: object) -> Path:
    """A run as main.py leaves it, with the accuracy of each epoch."""
    folder.mkdir(parents=True)
    given = ["kd", "lr", "seed", *args]
    (folder / "args.json").write_text(json.dumps(BASE | {"given": given} | args))
    lines = [json.dumps({"epoch": e, "test_acc1": score}) for e, score in enumerate(scores)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_pairs(root: Path, gains: list[float], **args: object) -> list[Path]:
    """Runs of 90 % with --lr 0.1, and runs that gain so much with the arguments, by seed."""
    for seed, gain in enumerate(gains):
        write_run(root / f"a{seed}", [50, 90.0], seed=seed)
        write_run(root / f"b{seed}", [50, 90.0 + gain], seed=seed, **({"lr": 0.2} | args))
    return sorted(root.iterdir())


ALONE, HELPED = [90.0, 92.0, 91.0, 89.5], [93.0, 93.5, 95.0, 91.0]


@pytest.fixture
def runs(tmp_path) -> Path:
    """Four seeds alone, and distilled by the teacher of each seed."""
    for seed, (alone, helped) in enumerate(zip(ALONE, HELPED, strict=True)):
        write_run(tmp_path / f"alone_{seed}", [50, alone], seed=seed)
        teacher = {"teacher_path": f"teachers/t_{seed}/best.pth"}
        write_run(tmp_path / f"kd_{seed}", [99, helped], seed=seed, **KD, **teacher)
    return tmp_path


def printed(capsys, *argv: object) -> str:
    assert compare.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def row_of(out: str, name: str) -> str:
    return next(line for line in out.splitlines() if line.startswith(f"{name} "))


def test_runs_are_paired_by_seed_and_judged_by_student_t(runs, capsys):
    """Differences 3, 1.5, 4, 1.5: mean 2.5, deviation 1.2247; t with 3 degrees is 3.182446."""
    out = printed(capsys, *sorted(runs.iterdir()))
    row = row_of(out, "kd=true")
    assert "93.12 ± 1.65" in row and "99.00 ± 0.00" in row  # the last epoch, and the best
    half = 3.182446305 * 1.22474487 / 2
    assert f"kd=false → kd=true: helps (+2.50 ± {half:.2f} points, 4 seeds)" in out


def test_equal_networks_share_their_latencies_and_show_the_range(runs, capsys):
    """Student s: 0.5, 0.6, 0.7, 0.8 ms alone and 0.9 ms four times distilled: median 0.85."""
    cost = {"parameters": 78042, "multiply_adds": 781952, "ms_large": None}
    for folder in runs.iterdir():
        kd, seed = folder.name.split("_")
        of_student = cost | {"ms_single": 0.5 + int(seed) / 10 if kd == "alone" else 0.9}
        of_teacher = cost | {"parameters": 272474, "ms_single": 9.25}
        costs = {"student": of_student} | ({"teacher": of_teacher} if kd == "kd" else {})
        summary = {"costs": costs, "images_per_second": 1234.5}
        (folder / "summary.json").write_text(json.dumps(summary))
    folders = sorted(runs.iterdir())
    plain = printed(capsys, *folders)
    assert "78,042" not in plain and "1,234" in plain
    out = printed(capsys, *folders, "--cost")
    for name in ("kd=false", "kd=true"):
        row = row_of(out, name)
        assert "78,042" in row and "781,952" in row and "0.85 (0.50 to 0.90)" in row
    assert "Teacher a: parameters 272,474, multiply-adds 781,952" in out
    assert "ms for 1 image 9.25 (9.25 to 9.25)" in out


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062047), (3, 3.1824463), (9, 2.2621572), (99, 1.9842169)]
)
def test_the_quantile_is_that_of_the_tables(freedom, quantile):
    assert t_quantile(0.95, freedom) == pytest.approx(quantile, abs=1e-6)


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([-1.0, -1.2, -0.9], "hurts"),
        # Mean 0.4667, deviation 0.8386: (2.8016 * 0.8386 / 0.4667)^2 + 1.92 = 27.3 seeds.
        ([1.0, -0.5, 0.9], f"{NO_DIFFERENCE} (+0.47 ± 2.08 points, 3 seeds; about 25 more would"),
        ([0.28, 0.28], f"{NO_DIFFERENCE} (+0.28 ± 1.02 points, 2 seeds; about 2 more would"),
        ([1.0], "no verdict from one seed"),
    ],
)
def test_a_verdict_says_no_more_than_the_seeds_do(tmp_path, capsys, gains, words):
    """One image in 360 is 0.28 points: a deviation of 0 between two seeds is not believed."""
    images = {"val_images": "360:01" if 0.28 in gains else "10000:01"}
    for folder in write_pairs(tmp_path, gains):
        args = json.loads((folder / "args.json").read_text()) | images
        (folder / "args.json").write_text(json.dumps(args))
    assert f"lr=0.1 → lr=0.2: {words}" in printed(capsys, *sorted(tmp_path.iterdir()))


@pytest.mark.parametrize(("images", "deviation"), [(100, 1.0), (360, 0.2), (360, 0.5)])
@pytest.mark.parametrize("seeds", [2, 3])
def test_a_change_without_effect_is_called_one_in_5_percent_of_sweeps_at_most(
    images, deviation, seeds
):
    """2,000 sweeps, so that a true 5 % is measured as at most 6.5 % (three deviations)."""
    noise = np.random.default_rng(0).normal(90, deviation, (2, 2_000, seeds))
    before, after = (noise * images / 100).round() * 100 / images  # a whole number of images
    called = [
        Verdict("lr", "", "", list(gains), 100 / images).words in ("helps", "hurts")
        for gains in after - before
    ]
    assert np.mean(called) < 0.065


@pytest.mark.parametrize(("effect", "t"), [(0.5, 2.0345153), (1.0, 2.2621572)])
def test_the_seeds_that_a_verdict_asks_for_find_the_effect_in_80_percent_of_sweeps(effect, t):
    """Effects in deviations of the gains; the t of 33 and of 9 degrees of freedom is tabulated."""
    gains = [100 * effect - 100 / math.sqrt(2), 100 * effect + 100 / math.sqrt(2)]
    seeds = Verdict("lr", "", "", gains, 0.01).seeds_needed()
    assert seeds == {0.5: 34, 1.0: 10}[effect]
    sweeps = np.random.default_rng(0).normal(effect, 1, (20_000, seeds))
    width = t * sweeps.std(axis=1, ddof=1) / math.sqrt(seeds)
    assert np.mean(np.abs(sweeps.mean(axis=1)) > width) == pytest.approx(0.8, abs=0.02)


def test_runs_that_differ_in_more_than_one_flag_are_not_judged_and_one_line_says_why(
    tmp_path, capsys
):
    for name, args in {
        "a": {},
        "two": {"lr": 0.2, "smoothing": 0.3},
        "data": {"data_path": "elsewhere"},
    }.items():
        for seed in range(2):
            args = {"smoothing": 0.1, "data_path": "here"} | args
            write_run(tmp_path / f"{name}{seed}", [50, 90 + seed], seed=seed, **args)
    out = printed(capsys, *sorted(tmp_path.iterdir()))
    assert "→" not in out and out.count("90.50 ± 0.71") >= 3
    assert "No verdict for 1 pair(s) that differ in more than one flag: lr, smoothing" in out
    assert "No verdict for 2 pair(s) trained on different data: data_path" in out


def test_runs_scored_on_different_images_are_not_paired(tmp_path, capsys):
    halved = {"val_images": "30:abcdefabcdef", "given": ["smoothing"]}
    write_pairs(tmp_path, [1.0, 1.1], smoothing=0.0, lr=0.1, **halved)
    out = printed(capsys, *sorted(tmp_path.iterdir()))
    assert "→" not in out
    line = "scored on different validation images: 10000:01234567 and 30:abcdefab"
    assert f"No verdict for 1 pair(s) {line}\n" in out and "val_images=30:abcdefab" in out


def test_a_run_that_changed_on_the_way_is_marked_in_table_and_verdict(tmp_path, capsys):
    write_pairs(tmp_path, [1.0, 1.1, 1.2])
    changes = ["--epochs 1 → 2 after epoch 0"]
    write_run(tmp_path / "b3", [50, 91.0], seed=3, lr=0.2, changes=changes)
    out = printed(capsys, *sorted(tmp_path.iterdir()))
    assert row_of(out, "lr=0.2 *") and "lr=0.1 → lr=0.2 *: helps" in out
    assert f"3 seeds); * changed on the way: {tmp_path}/b3\n" in out
    assert f"* {tmp_path}/b3 changed on the way: --epochs 1 → 2 after epoch 0" in out


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("seeds", [[(1, 3), (2, 3)], [(1, 2), (1, 2)], [(1,), (2, 3)]])
def test_two_teachers_are_never_taken_for_one_that_is_named_by_the_seed(
    tmp_path, seeds, is_reversed
):
    for teacher, of_teacher in enumerate(seeds, start=1):
        for seed in of_teacher:
            path = f"teacher_{teacher}/best.pth"
            args = KD | {"teacher_path": path, "seed": seed}
            write_run(tmp_path / f"{teacher}{seed}", [50, 90.0], **args)
    folders = sorted(tmp_path.iterdir(), reverse=is_reversed)
    groups = group_runs([read_run(folder) for folder in folders])
    found = {group.name: tuple(sorted(group.runs)) for group in groups}
    assert found == {f"teacher_path=teacher_{n + 1}/best.pth": s for n, s in enumerate(seeds)}


def test_rows_are_named_by_flags_that_were_typed(tmp_path, capsys):
    """The warmup follows --epochs: it is no second change, and the verdict mentions it."""
    for seed in range(2):
        typed = {"seed": seed, "given": ["seed", "epochs"]}
        write_run(tmp_path / f"a{seed}", [50, 90.0], epochs=2, warmup_epochs=0.4, **typed)
        write_run(tmp_path / f"b{seed}", [50, 90.0, 92], epochs=3, warmup_epochs=0.6, **typed)
    out = printed(capsys, *sorted(tmp_path.iterdir()))
    assert row_of(out, "epochs=2")[8:].strip().startswith("2")
    assert "epochs=2 → epochs=3: helps" in out and "with --warmup_epochs 0.4 → 0.6" in out


def test_many_verdicts_are_followed_by_the_number_that_chance_gives(tmp_path, capsys):
    for lr in range(4):
        for seed in range(2):
            write_run(tmp_path / f"{lr}{seed}", [50, 90 + seed], seed=seed, lr=lr)
    out = printed(capsys, *sorted(tmp_path.iterdir()))
    assert out.count("→") == 6 and "Of 6 pairs, about 0.3 would look different" in out
    few = printed(capsys, *sorted(tmp_path.glob("[01]?")))
    assert few.count("→") == 1 and "by chance" not in few


def test_a_narrow_terminal_gets_a_paragraph_per_group(runs):
    groups = group_runs([read_run(folder) for folder in sorted(runs.iterdir())])
    narrow, wide = (compare.table(groups, width).splitlines() for width in (40, 120))
    assert max(map(len, narrow)) <= 40 and max(map(len, wide)) <= 120
    assert len(narrow) > 3 == len(wide)


def test_what_is_not_a_finished_run_is_left_out_and_named(runs, capsys):
    half = write_run(runs / "half", [50.0, 60.0], seed=9, epochs=3)
    with (half / "log.txt").open("a") as file:
        file.write('{"epoch": 2, "te')  # cut short by a kill
    (runs / "empty").mkdir()
    (runs / "teacher_cache,seed=0").mkdir()
    (runs / "sweep.json").write_text("{}")
    assert compare.main(["--json", *map(str, sorted(runs.iterdir()))]) == 0
    outputs = capsys.readouterr()
    assert f"{half}: 2 of 3 epochs are done; finish it first" in outputs.err
    assert f"{runs}/empty: no run of main.py" in outputs.err
    assert "teacher_cache" not in outputs.err and "sweep.json" not in outputs.err
    verdicts = json.loads(outputs.out)["verdicts"]
    assert [(one["flag"], one["verdict"], one["seeds"]) for one in verdicts] == [("kd", "helps", 4)]
    assert verdicts[0]["mean"] == 2.5 and verdicts[0]["seeds_for_80_percent_power"] == 4
    write_run(runs / "again", [50.0, 60.0], seed=0)
    assert compare.main(list(map(str, sorted(runs.iterdir())))) == 2
    assert "has the flags and the seed of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nope", "nope: no such folder"),
        ("nope/*", "nope/*: nothing matches this pattern"),
        ("alone_0/log.txt", "alone_0/log.txt: is a file; pass the run's folder, such as"),
        ("", ": holds runs and is none itself; pass"),
    ],
)
def test_a_path_that_is_no_run_is_named_with_the_reason(runs, capsys, path, reason):
    assert compare.main([str(runs / path)]) == 2
    outputs = capsys.readouterr()
    assert reason in outputs.err and "no finished run among these paths" in outputs.err


def test_scores_that_are_not_finite_are_named(tmp_path, capsys):
    folders = write_pairs(tmp_path, [1.0, 1.1, 1.2])
    for folder, score, loss in [(folders[0], math.nan, 0.5), (folders[1], 90.0, math.nan)]:
        record = {"epoch": 1, "test_acc1": score, "test_loss": loss}
        (folder / "log.txt").write_text(json.dumps(record))  # as another program may write it
    assert compare.main(list(map(str, folders))) == 0
    outputs = capsys.readouterr()
    assert f"{folders[0]}: test_acc1 of its last epoch is nan in log.txt" in outputs.err
    assert "not finite" in outputs.out and "lr=0.1 → lr=0.2: " in outputs.out


BAD_PICTURES = {
    "kd_0": "kd_0: is a folder; pass the name of a picture",
    "curves": "curves: is not the name of a picture; end it in .png",
    "curves.xyz": "curves.xyz: is not the name of a picture",
    "nowhere/curves.png": "nowhere does not exist; create it first",
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_picture_that_cannot_be_written_is_refused_first(runs, capsys, name):
    before = sorted(runs.iterdir())
    assert compare.main(["--plot", str(runs / name), *map(str, before)]) == 2
    outputs = capsys.readouterr()
    assert outputs.out == "" and outputs.err.startswith("compare.py: error: --plot ")
    assert BAD_PICTURES[name] in outputs.err and outputs.err.count("\n") == 1
    assert sorted(runs.iterdir()) == before


def test_a_picture_is_drawn_after_the_table_or_the_missing_package_named(tmp_path, capsys):
    for alpha in (0.5, 0.9):
        for temperature in (2.0, 4.0):
            args = KD | {"kd_alpha": alpha, "kd_temperature": temperature}
            write_run(tmp_path / f"{alpha}-{temperature}", [50, 90 + alpha], **args)
    folders = list(map(str, tmp_path.iterdir()))
    grid = compare.grid_of(group_runs([read_run(Path(folder)) for folder in folders]))
    assert grid.alphas == [0.5, 0.9] and grid.temperatures == [2, 4]
    assert grid.means == [[90.5] * 2, [90.9] * 2]
    code = compare.main([*folders, "--plot", str(tmp_path / "a.png")])
    outputs = capsys.readouterr()
    assert "90.90" in outputs.out
    assert (tmp_path / "a.png").exists() if code == 0 else "pip install matplotlib" in outputs.err


def test_the_band_of_a_picture_is_the_deviation_over_the_seeds(monkeypatch):
    """Also where the seeds have different epochs; a single run has no band."""
    for name in ("matplotlib", "matplotlib.ticker"):  # what they draw is not looked at
        monkeypatch.setitem(sys.modules, name, MagicMock())
    axes = MagicMock(**{"get_ylim.return_value": (31.2, 46)})
    seeds = [{0: 10.0, 1: 20.0}, {0: 14.0, 1: 20.0, 2: 50.0}, {0: 18.0, 1: 26.0}]
    draw_curves(axes, {"alone": seeds, "distilled": [{0: 5.0, 1: 7.0}]})
    ((epochs, low, high), band), *more = axes.fill_between.call_args_list
    assert epochs == [0, 1] and not more and band["color"] == "C0"
    # Means 14 and 22; sums of squares 16 + 0 + 16 and 4 + 4 + 16, each over two degrees of freedom.
    assert low == pytest.approx([10, 22 - 12**0.5]) and high == pytest.approx([18, 22 + 12**0.5])
    lines = [(call.args, call.kwargs["color"]) for call in axes.plot.call_args_list]
    means, single = (([0, 1], [14, 22]), "C0"), (([0, 1], [5, 7]), "C1")
    runs = [(([0, 1], scores), "C0") for scores in ([10, 20], [14, 20], [18, 26])]
    assert lines == [means, *runs, single]
    assert axes.set.call_args.kwargs["ylabel"] == "test accuracy % (axis from 31)"
    assert "± 1 standard deviation over seeds" in axes.set_title.call_args.args[0]


# -------------------------------------------------------------------------------------- sweeps


@pytest.fixture
def sweep_lines(capsys):
    """The commands that a sweep would run, in words."""

    def lines(*argv: object) -> list[list[str]]:
        words = ["--out", "runs", "--print_commands", *map(str, argv)]
        capsys.readouterr()  # of the test so far
        assert sweep.main(words) == 0
        return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]

    return lines


@pytest.fixture
def refused_sweep(capsys, tmp_path):
    """The error of a sweep that ends with code 2."""

    def error(*argv: str) -> str:
        assert sweep.main(["--out", str(tmp_path / "runs"), *argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return error


def after(flag: str, argv: list[str]) -> str | None:
    return argv[argv.index(flag) + 1] if flag in argv else None


def test_flags_of_the_teacher_are_dropped_and_one_cache_serves_a_seed(sweep_lines, tmp_path):
    teacher = tmp_path / "b c.pth"
    teacher.touch()
    vary = ["--vary", "kd=false,true", "--vary", "kd_alpha=0.5,0.9", "--vary", "seed=0,1"]
    common = ["--epochs", 2, "--teacher_arch", "resnet18", "--teacher_path", teacher]
    common += ["--lr", "1e-3"]
    lines = sweep_lines(*vary, "--", *common)
    plain, distilled = lines[:2], lines[2:]
    assert len(lines) == 6 and not any("--teacher_path" in argv for argv in plain)
    assert not any({"--kd_alpha", "--teacher_cache"} & set(argv) for argv in plain)
    assert all(after("--teacher_path", argv) == str(teacher) for argv in distilled)
    caches = {after("--seed", argv): after("--teacher_cache", argv) for argv in distilled}
    assert caches == {"0": "runs/teacher_cache,seed=0", "1": "runs/teacher_cache,seed=1"}
    assert len({after("--output_dir", argv) for argv in lines}) == 6
    assert all(after("--lr", argv) == "1e-3" for argv in lines)
    shared = sweep_lines(*vary, "--", *common, "--data_seed", 0)
    assert {after("--teacher_cache", argv) for argv in shared[2:]} == {"runs/teacher_cache"}
    launcher = ["--launcher", "torchrun --nproc_per_node=8"]
    launched = sweep_lines(*launcher, "--vary", "seed=0,1")
    assert launched[0][:2] == ["torchrun", "--nproc_per_node=8"]


BAD_SWEEPS = {
    "--vary kd_alhpa=1": "did you mean --kd_alpha or",
    "--vary seed": "needs a flag and its values",
    "--vary seed=0,0": "is there twice",
    "--vary lr=1e-3,0.001": "is there twice",
    "--vary seed=0 -- --report r.json": "--report: would be written anew by each run",
    "--vary output_dir=a,b": "is not a setting of a training run",
    "--vary seed=0 -- --seed 1": "--seed: is set by --vary",
    "--vary seed=0 -- --output_dir x": "--output_dir: is set by the sweep",
    "--vary data_path=a/b,a_b": "two combinations would share the folder data_path=a_b",
    "--vary seed=0,1 --epochs 1": "unrecognized arguments: --epochs 1; flags of main.py follow "
    "after --",
    "--vary lr=1e-3,abc": "--vary lr=1e-3,abc: --lr: 'abc' is not a number (commas separate",
    "--vary kd_alpha=0.5,0.9 --vary seed=0,1": "kd_alpha=0.5,0.9: has no effect without --kd true",
    "--vary kd=false,true": "run kd=true: --kd true needs --teacher_path and --teacher_arch",
    "--vary kd_alpha=0.5,0,9 -- KD": "kd_alpha=0.5,0,9: --kd_alpha 9.0: must lie in 0…1 (commas "
    "separate values; decimals take a point",
    "--vary model=cifar_resnet8,resnet19": "run model=resnet19: --model resnet19: timm knows no "
    "such architecture",
    "--vary opt=adamw,adamm": "run opt=adamm: --opt adamm: ",
    "--print_commands --vary lr=1e-3,nan": "lr=1e-3,nan: --lr nan: must be 0 or more",
    "--vary seed=0 --launcher 'x": "--launcher 'x: No closing quotation; pass one command",
}


@pytest.mark.parametrize("flags", BAD_SWEEPS)
def test_a_sweep_that_cannot_work_is_refused_before_its_first_run(
    refused_sweep, tmp_path, teacher_file, monkeypatch, flags
):
    monkeypatch.setattr(sweep, "run", lambda argv: pytest.fail("a run was started"))
    kd = teacher_flags(teacher_file)
    words = [w for word in flags.split() for w in (kd if word == "KD" else [word])]
    assert BAD_SWEEPS[flags] in refused_sweep(*words)


def test_a_moved_clone_or_another_python_is_the_same_sweep(
    sweep_lines, refused_sweep, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep, "run", lambda argv: 0)
    out = tmp_path / "runs"
    out.mkdir()
    argv = ["--vary", "seed=0,1", "--out", str(out), "--", "--epochs", "3"]
    assert sweep.main(argv) == 0
    record = out / sweep.RECORD
    moved = record.read_text().replace(str(sweep.MAIN.parent), "/elsewhere")
    record.write_text(moved.replace(sys.executable, "/usr/bin/python4"))
    assert "/elsewhere/main.py" in record.read_text()
    assert sweep_lines("--vary", "seed=0,1,2", "--out", out, "--", "--epochs=3")[0][-3] == "2"
    error = refused_sweep("--vary", "seed=0,1", "--", "--epochs", "4")
    assert "seed=0 was trained by another command" in error


def test_a_missing_launcher_and_a_damaged_record_are_one_line(refused_sweep, tmp_path):
    argv = ["--vary", "seed=0", "--launcher", "nosuchrun --nodes=2"]
    assert "--launcher nosuchrun: cannot be started (No such file" in refused_sweep(*argv)
    (tmp_path / "runs").mkdir()
    for text in ("{", "[1]"):
        (tmp_path / "runs" / sweep.RECORD).write_text(text)
        assert f"{tmp_path / 'runs'}: sweep.json there cannot be read" in refused_sweep(*argv)


class ForkedRun:
    """What sweep.py uses of subprocess.Popen."""

    def __init__(self, argv: list[str]) -> None:
        assert argv[:2] == [sys.executable, str(sweep.MAIN)]
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(program(argv[2:]))

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def sweep_that_forks(argv: list[str]) -> int:
    sweep.subprocess = SimpleNamespace(Popen=ForkedRun)
    return sweep.main(argv)


def test_a_sweep_is_resumed_skips_what_is_finished_and_refuses_other_commands(tmp_path):
    """Interrupted in its second run."""
    argv = ["--vary", "seed=0,1", "--out", str(tmp_path), "--"]
    argv += [*QUICK, "--train_samples", "64", "--epochs", "20", "--eval_freq", "20"]
    with Group(sweep_that_forks, argv) as group:
        group.wait_for("\n    1  ", after="[2/2]")
        os.kill(group.processes[0].pid, signal.SIGTERM)
        assert group.wait() == [143] and "the same command goes on with this run" in group.err
    with Group(sweep_that_forks, argv) as group:
        assert group.wait() == [0], group.err
        assert "2 runs, 1 of them finished" in group.out and "Resumed from" in group.out
        assert group.out.count("accuracy %, last epoch") == 1
        assert "All 2 runs are finished" in group.out
    argv[-3] = "21"
    with Group(sweep_that_forks, argv) as group:
        assert group.wait() == [2] and "seed=0 was trained by another command" in group.err
