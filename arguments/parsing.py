"""The command line: parsed, spelled in one way, checked, with every default filled in."""

import argparse
import difflib
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
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
    FLAGS,
    MIXING,
    NOT_RECIPE,
    flags_of_group,
    get_args_parser,
)
from utils import UserError

OTHER_DATA_SETS = {"cifar100": "CIFAR", "imagenet": "IMNET"}


NOT_GIVEN = object()  # the value of a flag that a command line does not set


def given_flags(argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags that a command line sets, with their values; UserError for one that is unknown."""
    args = argparse.Namespace(**dict.fromkeys(FLAGS, NOT_GIVEN))
    _, unknown = get_args_parser().parse_known_args(command_words(argv), args)
    if unknown:
        raise UserError(unknown_flags(unknown))
    return {name: value for name, value in vars(args).items() if value is not NOT_GIVEN}


def parse_args(
    argv: Sequence[str] | None = None, saved: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """As `parse`, but a UserError ends the process with its line on stderr and code 2."""
    try:
        return parse(argv, saved)
    except UserError as error:
        argparse.ArgumentParser.error(get_args_parser(), str(error))


def parse(
    argv: Sequence[str] | None = None, saved: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Parse and check the command line and fill in every default.

    Args:
        argv: the flags; None for those of this process.
        saved: values for flags that are not given, such as those in a checkpoint.
    Raises: UserError for a value that cannot work.
    """
    typed = given_flags(argv)
    defaults = {flag.name: flag.default for flag in FLAGS.values()}
    args = argparse.Namespace(**defaults | dict(saved or {}) | typed, given=sorted(typed))
    unify_spelling(args)
    check_numbers(vars(args))
    check_distillation(args)
    of_images = {*flags_of_group(AUGMENTATION), *flags_of_group(MIXING)}
    if args.no_aug or args.linear_probe and not of_images & {*args.given, *(saved or ())}:
        vars(args).update(NO_AUGMENTATION)
    fill_defaults(args)
    if not args.resume or saved is not None:  # else the checkpoint's flags are still to come
        check_combinations(args)
        check_effects(args)
    check_names(args)
    return args


def command_words(argv: Sequence[str] | None) -> list[str]:
    """A command line, or that of this process for None, in words of flags and values alone.

    Recipes (@FILE) are replaced by what they hold, and --batch-size by --batch_size.
    """
    words: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("@"):
            words += _recipe_words(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        is_flag = flag.startswith("--") and name in FLAGS
        words.append(f"--{name}{equals}{value}" if is_flag else word)
    return words


def _recipe_words(recipe: str) -> Iterator[str]:
    """The words of @FILE, a text file with one flag and its values per line.

    Raises: UserError that names file and line, for a flag that is unknown or a value that its flag
        never takes.
    """
    try:
        text = Path(os.path.expanduser(recipe[1:])).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        problem = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"{recipe}: cannot read this recipe ({problem}); pass @ and the path of a text file "
            "with one flag per line, such as @recipes/deit_hard.args"
        ) from error
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            # A '#' begins a comment only at the beginning of a word, as in a shell.
            words = shlex.split(re.sub(r"(^|\s)#.*", "", line))
            if nested := [word for word in words if word.startswith("@")]:
                raise UserError(f"{nested[0]}: a recipe cannot hold a recipe; pass both")
            if words and not words[0].startswith("--"):
                raise UserError(f"{words[0]}: is no flag; begin each line with one")
            words = command_words(words)
            check_numbers(given_flags(words))
        except (UserError, ValueError) as error:
            raise UserError(f"{recipe[1:]}, line {number}: {error}") from error
        yield from words


def without(words: Sequence[str], flags: Collection[str]) -> list[str]:
    """A command line without some flags and their values."""
    kept: list[str] = []
    is_kept = True
    for word in words:
        if word.startswith("--"):
            is_kept = word.partition("=")[0][2:].replace("-", "_") not in flags
        if is_kept:
            kept.append(word)
    return kept


def unknown_flags(words: Sequence[str]) -> str:
    """The error for words of a command line that belong to no flag, with similar flags."""
    elsewhere = {word: flag.name for flag in FLAGS.values() for word in flag.known_as.split()}
    problems = []
    for typed in [word.partition("=")[0] for word in words if word.startswith("--")]:
        name = typed.lstrip("-").replace("-", "_")
        similar = difflib.get_close_matches(name, FLAGS, n=2, cutoff=0.75)
        names = [elsewhere[name]] if name in elsewhere else similar
        guess = " or ".join(f"--{flag}" for flag in names)
        problems.append(f"{typed}; did you mean {guess}?" if guess else f"{typed}; see --help")
    problems = problems or [*words[:-1], f"{words[-1]}; see --help"]
    return f"unrecognized arguments: {' '.join(problems)}"


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
    """What a run takes from the arguments in a checkpoint for flags that are not given.

    Args:
        is_eval: take the model and the data, but not the recipe of training.
    Returns: values for `parse(argv, saved=…)`.
    """
    skipped = set(NOT_RECIPE)
    if {"data_set", "data_path"} & set(given):
        skipped |= set(DATA_FLAGS)  # other data: none of the old flags belongs to it
    if {"eval_data_path", "eval_labels"} & set(given):
        skipped.add("holdout")  # was chosen for want of validation images
    for flag, chosen in (("epochs", "warmup_epochs"), ("seed", "data_seed")):
        if flag in given and chosen not in saved_args.get("given", ()):
            skipped.add(chosen)  # was chosen by default for the earlier value of the flag
    known = FLAGS.keys() - skipped
    if is_eval:
        known &= {"model", "input_size", "batch_size", *DATA_FLAGS} - {"unlabeled"}
    return {name: value for name, value in saved_args.items() if name in known}
