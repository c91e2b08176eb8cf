"""Train every combination of some flags of main.py, with one teacher cache for all that may share.

    python sweep.py --vary kd=false,true --vary seed=0,1,2,3 --out runs -- FLAGS of main.py

Each combination is a run in a folder of its own below --out, such as runs/kd=true,seed=0. The same
command goes on where an earlier one was stopped: finished runs are skipped, others are resumed.
`python compare.py runs/*` then says what differed and whether that is more than the noise.
"""

import argparse
import itertools
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import utils
from arguments.flags import (
    AUGMENTATION,
    MIXING,
    OF_TEACHER,
    TEACHER,
    flags_of_group,
    get_args_parser,
    str2bool,
)
from arguments.parsing import unknown_flags

MAIN = Path(__file__).resolve().parent / "main.py"
RECORD = "sweep.json"  # in --out: the commands of the runs that are finished, by folder
# Flags that change what the teacher sees or answers: runs that differ in one of them need caches of
# their own. main.py compares all of them, so a flag that is missing here ends in an error.
OF_CACHE = {
    *flags_of_group(AUGMENTATION),
    *flags_of_group(MIXING),
    *flags_of_group(TEACHER),
    *"teacher_path teacher_arch data_set data_path train_samples holdout unlabeled".split(),
    *"input_size imagenet_default_mean_and_std batch_size use_amp amp_dtype".split(),
    *"teacher_views teacher_cache_dtype teacher_cache_topk".split(),
}

Values = dict[str, str]  # of the varied flags, as they were typed


def get_parser() -> argparse.ArgumentParser:
    """The flags of this script; those of main.py follow after --."""
    parser = argparse.ArgumentParser(
        usage="python sweep.py --vary FLAG=VALUE,VALUE [--vary …] --out FOLDER -- FLAGS of main.py",
        description=__doc__.partition("\n")[0],
    )
    add = parser.add_argument
    add("--vary", action="append", required=True, help="a flag of main.py and its values")
    add("--out", type=Path, required=True, help="folder of all runs and of their teacher caches")
    add(
        "--launcher",
        default="",
        help='what starts main.py, such as "torchrun --nproc_per_node=8" (default: this Python)',
    )
    add(
        "--share_teacher",
        type=str2bool,
        default=True,
        help="give runs with a teacher one --teacher_cache where their flags allow it",
    )
    add(
        "--print_commands",
        type=str2bool,
        nargs="?",
        const=True,
        default=False,
        help="print the commands of the runs that are not finished, one per line, and run nothing",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = get_parser()
    args = parser.parse_args(words[:cut])
    common = words[cut + 1 :]
    varied = varied_flags(parser, args.vary)
    check_common(parser, common, varied)
    try:
        runs = commands(args, varied, common)
        record = finished_runs(args.out, runs)
    except ValueError as error:
        parser.error(str(error))
    left = [name for name in runs if name not in record]
    if args.print_commands:
        for name in left:
            print(shlex.join(runs[name]))
        return 0
    print(f"{len(runs)} runs, {len(record)} of them finished", flush=True)
    for number, name in enumerate(left, start=len(record) + 1):
        print(f"\n[{number}/{len(runs)}] {shlex.join(runs[name])}", flush=True)
        if code := run(runs[name]):
            print(
                f"\nsweep.py: {args.out / name} ended with exit code {code}; the same command goes "
                "on with this run",
                file=sys.stderr,
            )
            return code
        record[name] = runs[name]
        write_record(args.out, record)
    print(f"\nAll {len(runs)} runs are finished: python compare.py {args.out}/*")
    return 0


def varied_flags(parser: argparse.ArgumentParser, vary: Sequence[str]) -> dict[str, list[str]]:
    """The values of each flag of --vary; exits with code 2 for what is not a flag of main.py."""
    known = {action.dest for action in get_args_parser()._actions}
    varied: dict[str, list[str]] = {}
    for text in vary:
        flag, equals, values = text.partition("=")
        flag = flag.lstrip("-").replace("-", "_")
        found = [value.strip() for value in values.split(",") if value.strip()]
        if not equals or not found:
            parser.error(f"--vary {text}: needs a flag and its values, such as kd_alpha=0.5,0.9")
        if flag not in known:
            parser.error(f"--vary {text}: {unknown_flags([f'--{flag}'], known)}")
        if flag in varied or len(set(found)) < len(found):
            parser.error(f"--vary {text}: a flag or a value is there twice; remove one of them")
        if flag in ("output_dir", "teacher_cache", "resume", "eval", "log_dir"):
            parser.error(f"--vary {text}: is not a setting of a training run; vary another flag")
        varied[flag] = found
    return varied


def check_common(
    parser: argparse.ArgumentParser, common: Sequence[str], varied: dict[str, list[str]]
) -> None:
    """Exit with code 2 for flags after -- that the sweep itself sets."""
    ours = {*varied, "output_dir", "resume", "eval"}
    for word in common:
        flag = word.partition("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--") and flag in ours:
            where = "--vary" if flag in varied else "the sweep"
            parser.error(f"--{flag}: is set by {where}; remove it from the flags after --")


def commands(
    args: argparse.Namespace, varied: dict[str, list[str]], common: Sequence[str]
) -> dict[str, list[str]]:
    """The command of each run by the name of its folder, in the order of --vary.

    Raises: ValueError where two runs would share a folder.
    """
    runs: dict[str, list[str]] = {}
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        is_plain = not has_teacher(chosen, common)
        if is_plain:  # several combinations may become one
            chosen = {flag: value for flag, value in chosen.items() if flag not in OF_TEACHER}
        flags = without(common, OF_TEACHER) if is_plain else list(common)
        for flag, value in chosen.items():
            flags += [f"--{flag}", value]
        if args.share_teacher and not is_plain and not flag_values(common, "teacher_cache"):
            flags += ["--teacher_cache", str(args.out / cache_name(chosen, common))]
        name = folder_name(chosen)
        launcher = shlex.split(args.launcher) or [sys.executable]
        argv = [*launcher, str(MAIN), *flags, "--output_dir", str(args.out / name)]
        if runs.setdefault(name, argv) != argv:
            raise ValueError(f"--vary: two combinations would share the folder {name}; rename one")
    return runs


def has_teacher(chosen: Values, common: Sequence[str]) -> bool:
    """Whether a run has a teacher, as far as --kd says."""
    typed = [chosen["kd"]] if "kd" in chosen else flag_values(common, "kd")
    return bool(typed) and str2bool(typed[-1] or "true")


def flag_values(words: Sequence[str], flag: str) -> list[str]:
    """What follows each occurrence of a flag; '' where nothing does."""
    found = []
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") == flag:
            after = words[index + 1] if index + 1 < len(words) else ""
            found.append(value if equals else "" if after.startswith("--") else after)
    return found


def without(words: Sequence[str], flags: set[str]) -> list[str]:
    """A command line without some flags and their values."""
    kept: list[str] = []
    is_kept = True
    for word in words:
        if word.startswith("--"):
            is_kept = word.partition("=")[0][2:].replace("-", "_") not in flags
        if is_kept:
            kept.append(word)
    return kept


def folder_name(values: Values) -> str:
    """'kd=true,seed=0'; only letters that every file system takes."""
    text = ",".join(f"{flag}={value}" for flag, value in values.items())
    return "".join(letter if letter.isalnum() or letter in "=,.-_+" else "_" for letter in text)


def cache_name(values: Values, common: Sequence[str]) -> str:
    """The folder of the teacher cache of a run: one for all runs whose images are the same.

    The order, the augmentation and the subset of the images follow --data_seed, or else --seed.
    """
    has_data_seed = "data_seed" in values or flag_values(common, "data_seed")
    telling = OF_CACHE | {"data_seed" if has_data_seed else "seed"}
    shared = {flag: value for flag, value in values.items() if flag in telling}
    return folder_name({"teacher_cache": "", **shared}).replace("teacher_cache=", "teacher_cache")


def finished_runs(out: Path, runs: dict[str, list[str]]) -> dict[str, list[str]]:
    """The runs that are finished, as RECORD holds them.

    Raises: ValueError where the folder holds a sweep of other commands.
    """
    path = out / RECORD
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    for name, argv in record.items():
        if name in runs and argv != runs[name]:
            raise ValueError(
                f"--out {out}: {name} was trained by another command ({shlex.join(argv)}); pass "
                "another --out"
            )
    return {name: argv for name, argv in record.items() if name in runs}


def write_record(out: Path, finished: dict[str, list[str]]) -> None:
    """Add finished runs to RECORD, which is always the old or the new file."""
    path = out / RECORD
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    utils.write_whole(path, json.dumps(earlier | finished, indent=1))


def run(argv: Sequence[str]) -> int:
    """Run a command to its end; returns its exit code.

    A terminal sends Ctrl-C to both processes: the run saves a checkpoint, and this one waits for
    it. SIGTERM is handed on.
    """
    process = subprocess.Popen(argv)
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda n, frame: process.send_signal(n)),
    }
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
