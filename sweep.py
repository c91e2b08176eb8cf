"""Train every combination of some flags of main.py, with one teacher cache for all that may share.

    python sweep.py --vary kd=false,true --vary seed=0,1,2,3 --out runs -- FLAGS of main.py

Each combination is a run in a folder of its own below --out, such as runs/kd=true,seed=0. The same
command goes on after an interruption: finished runs are skipped, and the others are resumed.
`python compare.py runs/*` then prints what differed and whether that is more than the noise.
"""

import argparse
import itertools
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from arguments.checks import check_numbers
from arguments.derived import is_own_module
from arguments.flags import (
    COMPARED,
    FLAGS,
    FOLLOWED,
    IF_MIXED,
    NOT_RECIPE,
    OF_TEACHER,
    Flag,
    with_cache,
)
from arguments.kinds import script_parser
from arguments.parsing import command_words, given_flags, parse, unknown_flags, without
from utils import UserError, exit_code, read_commands, write_whole

MAIN = Path(__file__).resolve().parent / "main.py"
RECORD = "sweep.json"  # in --out: the commands of the runs that are finished, by folder
REFUSED = dict.fromkeys(("output_dir", "resume", "eval"), "is set by the sweep")
REFUSED["report"] = "would be written anew by each run"
SET_BY_SWEEP = ("output_dir", "teacher_cache", "resume", "eval", "log_dir")  # or for no sweep
DECIMALS = " (commas separate values; decimals take a point, as in 0.5)"

Values = dict[str, str]  # of the varied flags, as they were typed


def get_parser() -> argparse.ArgumentParser:
    """The flags of this script; those of main.py follow after --."""
    usage = "--vary FLAG=VALUE,VALUE [--vary …] --out FOLDER -- FLAGS of main.py"
    parser, switch = script_parser("sweep.py", usage, __doc__)
    add = parser.add_argument
    # fmt: off
    add("--vary", action="append", required=True, metavar="FLAG=VALUE,VALUE", help=
        "main.py flag and its values")
    add("--out", type=Path, required=True, metavar="FOLDER", help=
        "folder of all runs and of their teacher caches")
    add("--launcher", default="", metavar="COMMAND", help=
        'launch command for main.py, such as "torchrun --nproc_per_node=8" (default: this Python)')
    switch("--share_teacher", default=True, help=
        "give runs with a teacher one --teacher_cache if their flags allow it")
    switch("--print_commands", help=
        "print the commands of unfinished runs, one per line, and run nothing")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep; returns the exit code."""
    return exit_code("sweep.py", partial(sweep, argv))


def sweep(argv: Sequence[str] | None) -> int:
    """Run a sweep; raises UserError for flags with which a run cannot work."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = get_parser()
    args, unknown = parser.parse_known_args(words[:cut])
    if unknown:
        raise UserError(
            f"unrecognized arguments: {' '.join(unknown)}; flags of main.py follow after --, as in "
            "sweep.py --vary seed=0,1 --out runs -- --epochs 10"
        )
    runs = commands(args, varied_flags(args.vary), words[cut + 1 :])
    record = finished_runs(args.out, runs)
    left = [name for name in runs if name not in record]
    if args.print_commands:
        for name in left:
            print(shlex.join(runs[name]))
        return 0
    print(f"{len(runs)} runs, {len(record)} of them finished", flush=True)
    for number, name in enumerate(left, start=len(record) + 1):
        print(f"\n[{number}/{len(runs)}] {shlex.join(runs[name])}", flush=True)
        if code := run(runs[name]):
            then = "once the cause of its error is removed, " if code == 2 else ""
            print(
                f"\nsweep.py: {args.out / name} ended with exit code {code}; {then}the same "
                "command goes on with this run",
                file=sys.stderr,
            )
            return code
        record[name] = runs[name]
        # Of other combinations too, which an earlier command with this --out may have run.
        write_whole(
            args.out / RECORD, json.dumps(read_commands(args.out / RECORD) | record, indent=1)
        )
    is_all = read_commands(args.out / RECORD).keys() <= runs.keys()
    folders = f"{args.out}/*" if is_all else shlex.join(str(args.out / name) for name in runs)
    print(f"\nAll {len(runs)} runs are finished: python compare.py {folders}")
    return 0


def varied_flags(vary: Sequence[str]) -> dict[str, list[str]]:
    """The values of each flag of --vary, as typed; UserError for what is no flag of main.py."""
    varied: dict[str, list[str]] = {}
    for text in vary:
        flag, equals, listed = text.partition("=")
        flag = flag.lstrip("-").replace("-", "_")
        values = [value.strip() for value in listed.split(",") if value.strip()]
        if not equals or not values:
            raise UserError(f"--vary {text}: needs a flag and its values, such as kd_alpha=0.5,0.9")
        if flag not in FLAGS:
            raise UserError(f"--vary {text}: {unknown_flags([f'--{flag}'])}")
        meant = [meaning(text, FLAGS[flag], value) for value in values]
        if flag in varied or len(set(meant)) < len(meant):
            raise UserError(
                f"--vary {text}: a flag or a value is there twice; remove one of them{DECIMALS}"
            )
        if flag in SET_BY_SWEEP:
            raise UserError(f"--vary {text}: is not a setting of a training run; vary another flag")
        varied[flag] = values
    return varied


def meaning(text: str, flag: Flag, value: str) -> str:
    """A value of --vary, alike for 0.1 and 1e-1. Raises: UserError for one that never works."""
    try:
        given = given_flags([f"--{flag.name}", value])
        check_numbers(given)
        return repr(given)
    except UserError as error:
        raise UserError(f"--vary {text}: {error}{DECIMALS}") from error


def commands(
    args: argparse.Namespace, varied: dict[str, list[str]], common: Sequence[str]
) -> dict[str, list[str]]:
    """The command of each run by the name of its folder, in the order of --vary.

    Raises: UserError for a run that cannot work, or if two runs would share a folder.
    """
    outside_recipes = given_flags([word for word in common if not word.startswith("@")])
    common = command_words(common)
    try:
        launcher = shlex.split(args.launcher) or [sys.executable]
    except ValueError as error:
        raise UserError(f"--launcher {args.launcher}: {error}; pass one command") from error
    for flag in given_flags(common):
        is_varied = flag in varied and flag in outside_recipes  # --vary comes after recipes
        if why := "is set by --vary" if is_varied else REFUSED.get(flag):
            raise UserError(f"--{flag}: {why}; remove it from the flags after --")
    runs: dict[str, list[str]] = {}
    for values in itertools.product(*varied.values()):
        chosen, flags = dict(zip(varied, values, strict=True)), list(common)
        typed = given_flags([*flags, *as_words(chosen)])
        if not typed.get("kd"):  # several combinations may become one
            chosen = {flag: value for flag, value in chosen.items() if flag not in OF_TEACHER}
            flags = without(common, OF_TEACHER)
        flags += as_words(chosen)
        if args.share_teacher and typed.get("kd") and "teacher_cache" not in typed:
            flags += ["--teacher_cache", str(args.out / cache_name(chosen, typed))]
        name = folder_name(chosen)
        flags += ["--output_dir", str(args.out / name)]
        argv = [*launcher, str(MAIN), *flags]
        if runs.get(name, argv) != argv:
            raise UserError(f"--vary: two combinations would share the folder {name}; rename one")
        if name not in runs:
            check_run(name, flags)
        runs[name] = argv
    idle = [flag for flag in varied if flag in OF_TEACHER]
    if idle and not any(recipe_of(argv).get("kd") for argv in runs.values()):
        raise UserError(
            f"--vary {idle[0]}={','.join(varied[idle[0]])}: has no effect without --kd true; add "
            "that to the flags after --, or --vary kd=false,true"
        )
    return runs


def check_run(name: str, flags: Sequence[str]) -> None:
    """Raise UserError, as that run would before it reads any image, for flags that cannot work."""
    try:
        args = parse(flags)
        # Imported here, since this takes seconds and a mistyped flag is answered without it.
        from training.optimizer import check_optimizer
        from training.student import check_architectures

        check_architectures(args)
        check_optimizer(args)
    except UserError as error:
        raise UserError(f"run {name}: {error}") from error


def as_words(chosen: Values) -> list[str]:
    """{'seed': '0'} -> ['--seed', '0']"""
    return [word for flag, value in chosen.items() for word in (f"--{flag}", value)]


def folder_name(values: Values) -> str:
    """'kd=true,seed=0'; only letters that every file system takes."""
    text = ",".join(f"{flag}={value}" for flag, value in values.items())
    return "".join(letter if letter.isalnum() or letter in "=,.-_+" else "_" for letter in text)


def cache_name(chosen: Values, typed: Mapping[str, Any]) -> str:
    """The folder of the teacher cache of a run: one for all runs whose images are the same.

    The order, the augmentation and the subset of the images follow --data_seed, or else --seed.
    main.py compares all that a cache depends on, so a flag that is missing here ends in an error.

    Args:
        typed: every flag on the command line of the run.
    """
    telling = {*with_cache(COMPARED, IF_MIXED, FOLLOWED)}
    telling.add("data_seed" if "data_seed" in typed else "seed")
    if typed.get("pretrained") or is_own_module(typed.get("model", "")):
        telling |= {"pretrained", "model"}  # which then say how images are normalized
    shared = {flag: value for flag, value in chosen.items() if flag in telling}
    return folder_name({"teacher_cache": "", **shared}).replace("teacher_cache=", "teacher_cache")


def finished_runs(out: Path, runs: dict[str, list[str]]) -> dict[str, list[str]]:
    """The runs that are finished, as RECORD holds them.

    Raises: UserError if the folder holds a sweep of other commands.
    """
    record = read_commands(out / RECORD)
    for name, argv in record.items():
        if name in runs and recipe_of(argv) != recipe_of(runs[name]):
            raise UserError(
                f"--out {out}: {name} was trained by another command ({shlex.join(argv)}); pass "
                "another --out"
            )
    return {name: argv for name, argv in record.items() if name in runs}


def recipe_of(argv: Sequence[str]) -> Mapping[str, Any]:
    """The flags of a recorded command that say what it trains, not where this project lies."""
    start = next((i for i, word in enumerate(argv) if Path(word).name == MAIN.name), 0)
    try:
        flags = given_flags(argv[start + 1 :])
    except UserError:  # of a version with other flags
        return {"command": argv}
    skipped = NOT_RECIPE | {"teacher_cache"}
    return {name: value for name, value in flags.items() if name not in skipped}


def run(argv: Sequence[str]) -> int:
    """Run a command to its end; returns its exit code.

    A terminal sends Ctrl-C to both processes: the run saves a checkpoint, and this one waits for
    it. SIGTERM is handed on.

    Raises: UserError if the program of --launcher cannot be started.
    """
    try:
        process = subprocess.Popen(argv)
    except OSError as error:
        raise UserError(
            f"--launcher {argv[0]}: cannot be started ({error.strerror}); pass a program that is "
            "installed here"
        ) from error
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
