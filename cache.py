"""Look after a teacher cache: what it holds, whether it is sound, several as one, one file.

    python cache.py info FOLDER                    # images, teacher, views, flags that use it
    python cache.py verify FOLDER                  # every checksum; exit code 1 if a row is damaged
    python cache.py merge PART1 PART2 … FOLDER     # caches that several machines filled
    python cache.py pack FOLDER FILE.tar           # one file for a server

main.py takes a folder, a pack or the http(s) address of a pack: --teacher_cache FILE.tar
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from teacher import upkeep
from utils import exit_code

CACHE = "folder of a cache, a pack (.tar), or the address of a pack"


def get_parser() -> argparse.ArgumentParser:
    """The commands of this script."""
    parser = argparse.ArgumentParser("cache.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = partial(commands.add_parser, allow_abbrev=False)
    info = add("info", help="what a cache holds, and the flags that use it")
    info.add_argument("cache", metavar="FOLDER", help=CACHE)
    verify = add("verify", help="compare every row with its checksum")
    verify.add_argument("cache", metavar="FOLDER", help=CACHE)
    merge = add("merge", help="put caches of the same logits together")
    merge.add_argument("sources", nargs="+", metavar="FOLDER", help=CACHE)
    merge.add_argument("destination", type=Path, help="folder to create, or a cache to add to")
    pack = add("pack", help="write a cache into one file")
    pack.add_argument("cache", metavar="FOLDER", help="folder of a cache")
    pack.add_argument("destination", type=Path, metavar="FILE.tar", help="file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = get_parser().parse_args(argv)
    stopped = "stopped; what was written is complete"
    return exit_code("cache.py", partial(run, args), stopped)


def run(args: argparse.Namespace) -> int:
    """Run one command. Raises: UserError for a cache that cannot be read, merged or packed."""
    if args.command == "merge":
        sources = [upkeep.open_cache(source) for source in args.sources]
        merged = upkeep.merge(sources, args.destination)
        print("\n".join(upkeep.describe(merged, str(args.destination))))
        return 0
    cache = upkeep.open_cache(args.cache)
    if args.command == "pack":
        print(f"{args.destination}: {upkeep.pack(cache, args.destination):,} bytes")
    elif args.command == "info":
        print("\n".join(upkeep.describe(cache, args.cache)))
    elif lines := upkeep.damages(cache):
        print("\n".join(lines))
        return 1
    else:
        print(f"{args.cache}: every row matches its checksum")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
