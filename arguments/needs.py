"""What a flag needs for an effect: conditions on other flags, each with the words of its error."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from arguments.derived import SMALL, is_mixed, teachers_of


class Need(NamedTuple):
    """A condition without which a flag has no effect.

    On the command line, a flag without effect is refused. If one of `switches` is there too, as in
    a script that varies the switch, the flag is only reported.
    """

    otherwise: str  # 'without …', 'with …' or 'beside …', which decides the remedy
    holds: Callable[[argparse.Namespace], Any]  # true if the flag has an effect
    switches: tuple[str, ...] = ()


def on(flag: str) -> Need:
    """A switch must be true."""
    return Need(f"without --{flag} true", lambda a: getattr(a, flag), (flag,))


def off(flag: str) -> Need:
    """A switch must be false."""
    return Need(f"with --{flag} true", lambda a: not getattr(a, flag), (flag,))


def given(flag: str, metavar: str) -> Need:
    """A flag must name a file or a folder."""
    return Need(f"without --{flag} {metavar}", lambda a: getattr(a, flag))


# Those of several flags; what a single flag needs stands beside that flag.
TRAINING = off("eval")
STUDENT = off("teacher_cache_only")
ALL_LAYERS = off("linear_probe")
EVALUATION = off("disable_eval")
WITH_KD = on("kd")
WITH_EMA = on("model_ema")
ASKED = Need("with --kd_alpha 0", lambda a: not a.kd or a.kd_alpha > 0, ("kd_alpha",))
KD_OR_EVAL = Need("without --kd true or --eval true", lambda a: a.kd or a.eval, ("kd",))
CACHE = given("teacher_cache", "FOLDER")
FINETUNE = given("finetune", "FILE")
OUTPUT = given("output_dir", "FOLDER")
SAVING = Need("with --save_ckpt false", lambda a: a.save_ckpt, ("save_ckpt",))
USES_LABELS = Need(
    "with --kd_alpha 1, which ignores labels",
    lambda a: not a.kd or a.kd_alpha < 1,
    ("kd_alpha",),
)
ERASED = Need("with --reprob 0", lambda a: a.reprob > 0, ("reprob",))
RATIOS = ("mixup", "cutmix", "cutmix_minmax")
MIXED = Need("without --mixup or --cutmix", is_mixed, RATIOS)
BOTH_MIXES = Need(
    "without both --mixup and --cutmix",
    lambda a: a.mixup > 0 and (a.cutmix > 0 or a.cutmix_minmax),
    RATIOS,
)
INTERPOLATED = Need(
    f"with --aa none and images below {SMALL} pixels",
    lambda a: a.aa or a.input_size >= SMALL,
    ("aa", "input_size"),
)
NOT_INCLUDED = Need("beside --data_set DIGITS", lambda a: a.data_set != "DIGITS")
CLASS_FOLDERS = Need("without --data_set image_folder", lambda a: a.data_set == "image_folder")
NO_HOLDOUT = Need("beside --holdout", lambda a: not a.holdout)
SOMETHING_SCORED = Need(
    "with --disable_eval true", lambda a: not a.disable_eval or teachers_of(a), ("disable_eval",)
)
