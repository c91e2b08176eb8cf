"""The command line: parsed, spelled in one way, checked, with every default filled in."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from arguments.checks import (
    check_combinations,
    check_distillation,
    check_effects,
    check_names,
    check_numbers,
)
from arguments.defaults import fill_defaults
from arguments.derived import DATA_SETS, NO_AUGMENTATION
from arguments.flags import (
    AUGMENTATION,
    DATA_FLAGS,
    MIXING,
    NOT_RECIPE,
    flags_of_group,
    get_args_parser,
)

# What other scripts call our flags and data sets.
OTHER_FLAGS = {
    "alpha": "kd_alpha",
    "amp": "use_amp",
    "arch": "model",
    "data": "data_path",
    "data_dir": "data_path",
    "dataset": "data_set",
    "img_size": "input_size",
    "learning_rate": "lr",
    "num_classes": "nb_classes",
    "output": "output_dir",
    "temperature": "kd_temperature",
    "wd": "weight_decay",
    "workers": "num_workers",
}
OTHER_DATA_SETS = {"cifar100": "CIFAR", "imagenet": "IMNET"}


def parse_args(
    argv: list[str] | None = None, saved: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Parse and check the command line and fill in every default.

    Args:
        argv: the flags; None for those of this process.
        saved: values for flags that are not given, such as those in a checkpoint.
    Exits with code 2 and one line on stderr for a value that cannot work.
    """
    parser = get_args_parser()
    words = _words(parser, argv)
    parser.set_defaults(**(saved or {}))
    args, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(unknown_flags(unknown, [action.dest for action in parser._actions]))
    args.given = given_flags(words)
    unify_spelling(args)
    check_numbers(parser, args)
    check_distillation(parser, args)
    of_images = {*flags_of_group(AUGMENTATION), *flags_of_group(MIXING)}
    if args.linear_probe and not of_images & {*args.given, *(saved or ())}:
        vars(args).update(NO_AUGMENTATION)
    fill_defaults(args)
    if not args.resume or saved is not None:  # else the checkpoint's flags are still to come
        check_combinations(parser, args)
        check_effects(parser, args)
    check_names(parser, args)
    return args


def given_flags(words: list[str]) -> list[str]:
    """Names of the flags that a command line sets, whatever their values."""
    parser = get_args_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return sorted(vars(parser.parse_args(words)))


def _words(parser: argparse.ArgumentParser, argv: list[str] | None) -> list[str]:
    """A command line, or that of this process for None, with --batch-size as --batch_size."""
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        flag, equals, value = word.partition("=")
        underscored = flag[:2] + flag[2:].replace("-", "_")
        is_flag = underscored in parser._option_string_actions
        words.append(underscored + equals + value if is_flag else word)
    return words


def unknown_flags(words: Sequence[str], known: Collection[str]) -> str:
    """The error for words of a command line that belong to no flag, with similar flags."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    told = []
    for flag in flags:
        name = flag.lstrip("-").replace("-", "_")
        other = OTHER_FLAGS.get(name)
        similar = [other] if other else difflib.get_close_matches(name, known, n=2, cutoff=0.75)
        names = " or ".join(f"--{flag}" for flag in similar)
        told.append(f"{flag}; did you mean {names}?" if names else f"{flag}; see --help")
    return "unrecognized arguments: " + " ".join(told or [*words[:-1], f"{words[-1]}; see --help"])


def unify_spelling(args: argparse.Namespace) -> None:
    """Write values that can be spelled in several ways in one way.

    So checkpoints, teacher caches and every comparison see the same value.
    """
    for flag in ("teacher_path", "teacher_arch", "teacher_weights"):
        value = getattr(args, flag)
        if value is not None:  # 'a,b', 'a, b' and 'a b' name the same teachers
            words = [value] if isinstance(value, str) else value
            parts = [part.strip() for word in words for part in word.split(",")]
            setattr(args, flag, ",".join(os.path.expanduser(part) for part in parts if part))
    if args.aa.lower() == "none":
        args.aa = ""
    if args.data_set:
        names = {_plain(name): name for name in DATA_SETS} | OTHER_DATA_SETS
        args.data_set = names.get(_plain(args.data_set), args.data_set)


def _plain(name: str) -> str:
    return re.sub("[-_]", "", name.lower())


def follow_checkpoint(
    saved_args: Mapping[str, Any], given: Collection[str], is_eval: bool
) -> dict[str, Any]:
    """What a run takes from the arguments in a checkpoint where the command line says nothing.

    Args:
        is_eval: take the model and the data, but not the recipe of training.
    Returns: values for `parse_args(argv, saved=…)`.
    """
    skipped = set(NOT_RECIPE)
    if {"data_set", "data_path"} & set(given):
        skipped |= set(DATA_FLAGS)  # other data: none of the old flags belongs to it
    if {"eval_data_path", "eval_labels"} & set(given):
        skipped.add("holdout")  # was chosen where there were no validation images
    for flag, chosen in (("epochs", "warmup_epochs"), ("seed", "data_seed")):
        if flag in given and chosen not in saved_args.get("given", ()):
            skipped.add(chosen)  # was chosen by default for the earlier value of the flag
    known = {action.dest for action in get_args_parser()._actions} - skipped
    if is_eval:
        known &= {"model", "input_size", "batch_size", *DATA_FLAGS} - {"unlabeled"}
    return {name: value for name, value in saved_args.items() if name in known}
