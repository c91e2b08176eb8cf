"""Sweeps and the comparison of their runs: commands, pairs, intervals, tables, and bad input."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import QUICK, ROOT

import compare
import sweep

BASE = {"kd": False, "lr": 0.1, "epochs": 2, "seed": 0, "given": ["kd", "lr", "seed"]}
KD = {"kd": True, "teacher_arch": "a", "kd_alpha": 0.7, "kd_temperature": 4.0, "unlabeled": ""}


def write_run(folder: Path, scores: list[float], **args: object) -> Path:
    """A run as main.py leaves it, with the accuracy of each epoch."""
    folder.mkdir(parents=True)
    given = ["kd", "lr", "seed", *args]
    (folder / "args.json").write_text(json.dumps(BASE | args | {"given": given}))
    lines = [json.dumps({"epoch": e, "test_acc1": score}) for e, score in enumerate(scores)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    return folder


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


def test_runs_are_paired_by_seed_and_judged_by_student_t(runs, capsys):
    """Differences 3, 1.5, 4, 1.5: mean 2.5, deviation 1.2247; t with 3 degrees is 3.182446."""
    out = printed(capsys, *sorted(runs.iterdir()))
    row = next(line for line in out.splitlines() if line.startswith("kd=true"))
    assert "93.12 ± 1.65" in row and "99.00 ± 0.00" in row  # the last epoch, and the best
    half = 3.182446305 * 1.22474487 / 2
    assert f"kd=false → kd=true: helps (+2.50 ± {half:.2f} points, 4 seeds)" in out


def test_costs_of_student_and_teacher_are_shown_where_asked(runs, capsys):
    cost = {"parameters": 78042, "multiply_adds": 781952, "ms_single": 0.5, "ms_large": None}
    teacher = cost | {"parameters": 272474, "ms_large": 9.25}
    for folder in runs.glob("kd_*"):
        summary = {"costs": {"student": cost, "teacher": teacher}, "images_per_second": 1234.5}
        (folder / "summary.json").write_text(json.dumps(summary))
    folders = sorted(runs.iterdir())
    plain = printed(capsys, *folders)
    assert "78,042" not in plain and "1,234" in plain
    out = printed(capsys, *folders, "--cost")
    row = next(line for line in out.splitlines() if line.startswith("kd=true"))
    assert "78,042" in row and "781,952" in row and "0.50 ± 0.00" in row
    assert "Teacher a: parameters 272,474, multiply-adds per image 781,952" in out


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062047), (3, 3.1824463), (9, 2.2621572), (99, 1.9842169)]
)
def test_the_quantile_is_that_of_the_tables(freedom, quantile):
    assert compare.t_quantile(0.95, freedom) == pytest.approx(quantile, abs=1e-6)


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([-1.0, -1.2, -0.9], "hurts"),
        ([1.0, -0.5, 0.9], "no difference larger than the noise; 12 more seed(s) would show"),
        ([1.0], "no verdict from one seed"),
    ],
)
def test_a_verdict_says_no_more_than_the_seeds_do(tmp_path, capsys, gains, words):
    for seed, gain in enumerate(gains):
        write_run(tmp_path / f"a{seed}", [50, 90.0], seed=seed)
        write_run(tmp_path / f"b{seed}", [50, 90.0 + gain], seed=seed, lr=0.2)
    assert f"lr=0.1 → lr=0.2: {words}" in printed(capsys, *sorted(tmp_path.iterdir()))


def test_runs_of_two_changes_and_of_other_data_are_not_judged(tmp_path, capsys):
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


def test_many_pairs_are_told_to_differ_by_chance(tmp_path, capsys):
    for lr in range(4):
        for seed in range(2):
            write_run(tmp_path / f"{lr}{seed}", [50, 90 + seed], seed=seed, lr=lr)
    out = printed(capsys, *sorted(tmp_path.iterdir()))
    assert out.count("→") == 6 and "Of 6 pairs, about 0.3 would look different" in out
    few = printed(capsys, *sorted(tmp_path.glob("[01]?")))
    assert few.count("→") == 1 and "by chance" not in few


def test_a_narrow_terminal_gets_a_paragraph_per_group(runs):
    groups = compare.group_runs([compare.read_run(folder) for folder in sorted(runs.iterdir())])
    for width in (40, 120):
        lines = compare.table(groups, width).splitlines()
        assert max(map(len, lines)) <= width
    assert (
        len(compare.table(groups, 40).splitlines())
        > 3
        == len(compare.table(groups, 120).splitlines())
    )


def test_what_is_not_a_finished_run_is_left_out_and_named(runs, capsys):
    half = write_run(runs / "half", [50.0, 60.0], seed=9, epochs=3)
    with (half / "log.txt").open("a") as file:
        file.write('{"epoch": 2, "te')  # cut short by a kill
    (runs / "empty").mkdir()
    (runs / "teacher_cache,seed=0").mkdir()
    assert compare.main(["--json", *map(str, sorted(runs.iterdir()))]) == 0
    found = capsys.readouterr()
    assert f"{half}: 2 of 3 epochs are done; finish it first" in found.err
    assert f"{runs}/empty: no run of main.py" in found.err and "teacher_cache" not in found.err
    told = json.loads(found.out)["verdicts"]
    assert [(one["flag"], one["verdict"], one["seeds"]) for one in told] == [("kd", "helps", 4)]
    write_run(runs / "again", [50.0, 60.0], seed=0)
    assert compare.main(list(map(str, sorted(runs.iterdir())))) == 2
    assert "has the flags and the seed of" in capsys.readouterr().err
    assert compare.main([str(runs / "empty")]) == 2


def test_a_picture_is_drawn_or_the_missing_package_named(tmp_path, capsys):
    for alpha in (0.5, 0.9):
        for temperature in (2.0, 4.0):
            args = KD | {"kd_alpha": alpha, "kd_temperature": temperature}
            write_run(tmp_path / f"{alpha}-{temperature}", [50, 90 + alpha], **args)
    folders = list(map(str, tmp_path.iterdir()))
    groups = compare.group_runs([compare.read_run(Path(folder)) for folder in folders])
    alphas, temperatures, means = compare.grid_of(groups)
    assert (alphas, temperatures) == ([0.5, 0.9], [2, 4]) and means == [[90.5] * 2, [90.9] * 2]
    code = compare.main([*folders, "--plot", str(tmp_path / "a.png")])
    err = capsys.readouterr().err
    assert (tmp_path / "a.png").exists() if code == 0 else "pip install matplotlib" in err


# -------------------------------------------------------------------------------------- sweeps


def sweep_lines(capsys, *argv: object) -> list[list[str]]:
    words = ["--out", "runs", "--print_commands", *map(str, argv)]
    assert sweep.main(words) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def after(flag: str, argv: list[str]) -> str | None:
    return argv[argv.index(flag) + 1] if flag in argv else None


def test_flags_of_the_teacher_are_dropped_and_one_cache_serves_a_seed(capsys):
    vary = ["--vary", "kd=false,true", "--vary", "kd_alpha=0.5,0.9", "--vary", "seed=0,1"]
    common = ["--epochs", 2, "--teacher_arch", "a", "--teacher_path", "b c.pth", "--lr", "1e-3"]
    lines = sweep_lines(capsys, *vary, "--", *common)
    plain, distilled = lines[:2], lines[2:]
    assert len(lines) == 6 and not any("--teacher_path" in argv for argv in plain)
    assert not any({"--kd_alpha", "--teacher_cache"} & set(argv) for argv in plain)
    assert all(after("--teacher_path", argv) == "b c.pth" for argv in distilled)
    caches = {after("--seed", argv): after("--teacher_cache", argv) for argv in distilled}
    assert caches == {"0": "runs/teacher_cache,seed=0", "1": "runs/teacher_cache,seed=1"}
    assert len({after("--output_dir", argv) for argv in lines}) == 6
    assert all(after("--lr", argv) == "1e-3" for argv in lines)
    shared = sweep_lines(capsys, *vary, "--", *common, "--data_seed", 0)
    assert {after("--teacher_cache", argv) for argv in shared[2:]} == {"runs/teacher_cache"}
    launched = sweep_lines(capsys, "--launcher", "torchrun --nproc_per_node=8", *vary)
    assert launched[0][:2] == ["torchrun", "--nproc_per_node=8"]


BAD_SWEEPS = {
    "--vary kd_alhpa=1": "did you mean --kd_alpha?",
    "--vary seed": "needs a flag and its values",
    "--vary seed=0,0": "is there twice",
    "--vary output_dir=a,b": "is not a setting of a training run",
    "--vary seed=0 -- --seed 1": "--seed: is set by --vary",
    "--vary seed=0 -- --output_dir x": "--output_dir: is set by the sweep",
    "--vary data_path=a/b,a_b": "two combinations would share the folder data_path=a_b",
}


@pytest.mark.parametrize("flags", BAD_SWEEPS)
def test_a_sweep_that_cannot_work_is_refused(capsys, tmp_path, flags):
    with pytest.raises(SystemExit) as stop:
        sweep.main(["--out", str(tmp_path / "runs"), *flags.split()])
    assert stop.value.code == 2 and BAD_SWEEPS[flags] in capsys.readouterr().err


def test_a_sweep_is_resumed_skips_what_is_finished_and_refuses_other_commands(tmp_path):
    """Interrupted in its second run."""
    argv = [sys.executable, "sweep.py", "--vary", "seed=0,1", "--out", str(tmp_path), "--"]
    argv += [*QUICK, "--train_samples", "64", "--epochs", "40", "--eval_freq", "40"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    process = start()
    for line in process.stdout:
        if line.startswith("[2/2]"):
            break
    assert any(line.split()[:2] == ["Epoch", "1"] for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command goes on with this run" in err
    out, err = start().communicate(timeout=120)
    assert "2 runs, 1 of them finished" in out and "Resumed from" in out, err
    assert out.count("accuracy %, last epoch") == 1 and "All 2 runs are finished" in out
    argv[-3] = "41"
    _, err = start().communicate(timeout=60)
    assert "seed=0 was trained by another command" in err
