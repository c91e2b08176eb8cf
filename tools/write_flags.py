"""Write docs/flags.md, the table of every flag, from the parser itself.

    python tools/write_flags.py

A test compares the file with what this writes, so run it after every change of a flag.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from arguments.flags import get_args_parser  # noqa: E402

HEAD = """# Every flag

`python main.py --help` prints the same texts, and `python tools/write_flags.py` writes this page.
Names and defaults follow the ConvNeXt and DeiT scripts where those have the flag. Switches take
`true` or `false`.
"""
TABLE = "| flag | default | meaning |\n| --- | --- | --- |\n"


def row(action: argparse.Action) -> str:
    """One line of the table."""
    meaning, _, stated = (action.help or "").partition(" (default: ")
    if stated:
        default = stated.rstrip(")")
    elif isinstance(action.default, bool):
        default = str(action.default).lower()
    elif action.default in (None, ""):
        default = "none"
    else:
        default = str(action.default)
    if action.choices and not all(choice in meaning for choice in action.choices):
        meaning += f" ({', '.join(action.choices)})"
    cells = [f"`{action.option_strings[0]}`", default, meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """The whole page."""
    text = HEAD
    for group in get_args_parser()._action_groups:
        actions = [a for a in group._group_actions if a.dest != "help"]
        if actions:
            title = f"{group.title}"
            title = title[:1].upper() + title[1:]
            rows = [row(action) for action in actions]
            text += "\n".join(
                ["", f"## {title}", "", "| flag | default | meaning |", "| --- | --- | --- |"]
            )
            text += "\n" + "\n".join(rows) + "\n"
    return text


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(page(), encoding="utf-8")
