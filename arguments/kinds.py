"""The kinds of values that flags take, and how --help shows them."""

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple


def str2bool(value: str) -> bool:
    """'true' and 'false', and their usual other spellings."""
    if value.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if value.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{value}' is neither true nor false")


def number(text: str, kind: type = float, what: str = "a number") -> Any:
    """Any number, NaN and infinity included."""
    try:
        return kind(text)
    except ValueError as error:
        hint = "; decimals take a point, as in 0.5" if "," in text and kind is float else ""
        raise argparse.ArgumentTypeError(f"'{text}' is not {what}{hint}") from error


whole = partial(number, kind=int, what="a whole number")


def as_typed(value: Any) -> str:
    """A value as one types it on the command line."""
    values = value if isinstance(value, list) else [value]
    return " ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)


class ShowDefaults(argparse.HelpFormatter):
    """Adds '(default: …)' to the help of every flag that does not state its default in words."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        width = shutil.get_terminal_size((100, 24)).columns - 2  # 100 if stdout is no terminal
        super().__init__(*args, **{"width": width, "max_help_position": width * 3 // 8} | keywords)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        help_text = action.help or ""
        is_stated = "(default" in help_text or action.default in (None, "", argparse.SUPPRESS)
        return help_text if is_stated else f"{help_text} (default: {as_typed(action.default)})"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        text = self._metavar_formatter(action, default_metavar)(1)[0]
        if action.nargs == "?":  # argparse would print [true|false]
            return text
        if action.nargs == "+":  # and FILE [FILE ...]
            return f"{text} ..."
        return super()._format_args(action, default_metavar)


def script_parser(name: str, usage: str, doc: str | None) -> tuple[argparse.ArgumentParser, Any]:
    """The parser of a script beside main.py, and a function that adds a flag for true or false.

    Args:
        usage: what follows the script's name.
        doc: of the script; its first line says what the script does.
    """
    parser = argparse.ArgumentParser(
        name,
        usage=f"python {name} {usage}",
        description=(doc or "").partition("\n")[0],
        formatter_class=ShowDefaults,
        allow_abbrev=False,
    )
    add: Any = parser.add_argument
    switch = partial(add, type=str2bool, nargs="?", const=True, metavar="true|false")
    return parser, partial(switch, default=False)


class Kind(NamedTuple):
    """What a flag takes."""

    parse: Callable[[str], Any]
    metavar: str  # what --help shows for the value
    remedy: str = ""  # 'must …' for a number that is out of range; every kind of number has one
    holds: Callable[[float], bool] = lambda value: True  # False for NaN, as every comparison is
    choices: tuple[str, ...] = ()  # the only values, if they are few; the flag's help names them
