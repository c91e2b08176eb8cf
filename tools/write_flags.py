"""Write docs/flags.md, the table of every flag, from the parser itself.

    python tools/write_flags.py

A test compares the file with what this writes, so run it after every change of a flag.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from arguments.flags import FLAGS, Flag, flags_of_group  # noqa: E402
from arguments.kinds import as_typed  # noqa: E402

HEAD = """# Every flag

`python main.py --help` prints the same texts, and `python tools/write_flags.py` writes this page.
Names and defaults follow the ConvNeXt and DeiT scripts if those have the flag. Switches take
`true` or `false`.
"""


def row(flag: Flag) -> str:
    """One line of the table."""
    meaning, _, stated = flag.help.partition(" (default: ")
    no_default = flag.default in (None, "")
    default = stated.rstrip(")") or ("none" if no_default else as_typed(flag.default))
    cells = [f"`--{flag.name}`", default, meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """The whole page."""
    text = HEAD
    for title in dict.fromkeys(flag.group for flag in FLAGS.values()):
        text += f"\n## {title[:1].upper()}{title[1:]}\n\n| flag | default | meaning |\n"
        text += "| --- | --- | --- |\n"
        text += "".join(f"{row(FLAGS[name])}\n" for name in flags_of_group(title))
    return text


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(page(), encoding="utf-8")
