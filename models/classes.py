"""Which output of a network is which class."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils import natural_key

import models
from runtime.distributed import log
from utils import UserError, few


def match_classes(wanted: list[str], known: list[str]) -> list[int] | None:
    """Positions of the wanted class names among the known names; None for all in order.

    Raises: UserError that lists names that are not known.
    """
    if missing := [name for name in wanted if name not in known]:
        raise UserError(
            f"the data has classes that the checkpoint does not know ({few(missing)}); its classes "
            f"are {few(known)}. Use data of the same classes",
            "classes",
        )
    return None if wanted == known else [known.index(name) for name in wanted]


def names_of_weights(arch: str, classes: Sequence[str]) -> list[str] | None:
    """The names of the outputs of timm's weights, in the data's spelling if the data has them.

    Those in the configuration of the weights, else ImageNet's: WordNet ids, or the names of a
    class, the first or all of them.
    Returns: None if the weights do not know all classes of the data.
    """
    wanted = {_normalized(name): name for name in classes}
    for names in _namings(arch):
        if wanted.keys() <= set(map(_normalized, names)):
            return [wanted.get(_normalized(name), name) for name in names]
    return None


def _namings(arch: str) -> list[list[str]]:
    """The ways in which the outputs of timm's weights are named."""
    cfg = models.pretrained_cfg(arch)
    namings = [list(cfg.label_names or [])]
    if subset := infer_imagenet_subset({"num_classes": cfg.num_classes}):
        info = ImageNetInfo(subset)
        descriptions = info.label_descriptions()
        namings += [info.label_names(), [text.split(",")[0] for text in descriptions]]
        namings += [list(descriptions)]
    return [names for names in namings if names]


def pretrained_classes(arch: str, classes: Sequence[str]) -> list[str]:
    """`names_of_weights`, for a teacher; prints what ImageNet calls classes with a short name.

    Raises: UserError if the data has other classes, or if there is no classifier.
    """
    outputs = models.pretrained_cfg(arch).num_classes
    if not outputs:
        raise UserError(
            f"{arch}: these weights have no classifier; fine-tune or probe them on this data first",
            "architecture",
        )
    if names := names_of_weights(arch, classes):
        *_, first, full = [[], *_namings(arch)]
        if list(map(_normalized, names)) == list(map(_normalized, first)):
            _report_meanings(arch, [(name, full[names.index(name)]) for name in classes], full)
        return names
    known = next(iter(reversed(_namings(arch))), [f"{outputs} classes without names"])
    unknown = [name for name in classes if _normalized(name) not in set(map(_normalized, known))]
    raise UserError(
        f"{arch}: timm's weights know {few(known)}, and not all classes of the data ({few(unknown)}"
        "); fine-tune or probe this network on the data first (docs/teachers.md), then pass its "
        "checkpoint",
        "architecture",
    )


def _report_meanings(arch: str, meanings: Sequence[tuple[str, str]], full: Sequence[str]) -> None:
    """Print what ImageNet calls the classes of the data in full, doubtful classes first.

    A mouse is the computer's, and a missile is also an output named 'projectile, missile'.
    """
    rivals: dict[str, str] = {}
    for text in full:
        rivals |= dict.fromkeys(map(_normalized, text.split(",")[1:]), text)
    doubtful, longer = [], []
    for name, text in meanings:
        if rival := rivals.get(_normalized(name)):
            doubtful.append(f"{text} (not {rival})")
        elif "," in text:
            longer.append(text)
    if doubtful or longer:
        log(
            f"{arch}: classes are taken for ImageNet's by the first of their names: "
            f"{'; '.join([*doubtful, *longer][:5])}; if others are meant, name the teacher's "
            "outputs with teacher_classes"
        )


def _normalized(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def order_of_script(
    script_args: Mapping[str, Any], classes: Sequence[str], path: str
) -> tuple[list[str] | None, str]:
    """The names of the outputs of a file that names none, by the script that wrote it.

    torchvision, and so most scripts, numbers class folders in text order; timm's train.py in
    natural, case-insensitive order: a2 before a10, beagle before Bengal.

    Args:
        script_args: the arguments in the file, by name; empty if it has none.
        classes: of the data, in order.
    Returns: the names, or None if both orders are the same or the data has an order of its own;
        and a note on the order.
    Raises: UserError if the orders differ, and the file does not say which script wrote it.
    """
    text, natural = sorted(classes), sorted(classes, key=natural_key)
    is_timm = "class_map" in script_args
    of_folders = script_args.get("dataset") in (None, "", "folder")
    if text == natural or list(classes) not in (text, natural) or (is_timm and not of_folders):
        return None, "assumed to be in the data's order"
    if is_timm and not script_args["class_map"]:
        return natural, "in the order in which timm's train.py numbers class folders"
    if script_args and not is_timm:
        return text, "in text order, as torchvision numbers class folders"
    differ = next(i for i, names in enumerate(zip(text, natural, strict=True)) if len({*names}) > 1)
    raise UserError(
        f"{path}: names no classes, so it is unclear which output is which: output {differ} is "
        f"{text[differ]} if torchvision numbered the class folders, {natural[differ]} if timm did",
        "order",
    )


def match_outputs(
    names: Sequence[str] | None, classes: Sequence[str] | None, path: str
) -> tuple[list[int] | None, str]:
    """Which of the teacher's outputs stand for the data's classes, and a note on their order."""
    if not names or not classes:
        return None, "assumed to be in the data's order"
    if missing := [name for name in classes if name not in names]:
        raise UserError(
            f"{path}: this teacher does not know {len(missing)} of the data's classes "
            f"({few(missing)}); it knows {few(names)}. Use a teacher that does, or name its "
            "classes in the data's spelling with teacher_classes",
            "checkpoint",
        )
    count = Counter(names)
    if repeated := [name for name in classes if count[name] > 1]:
        raise UserError(
            f"{few(repeated)}: several outputs of the teacher have the same class name, so it is "
            "unclear which of them is meant; give every output a name of its own",
            "names",
        )
    position = {name: index for index, name in enumerate(names)}
    index = [position[name] for name in classes]
    if index == list(range(len(names))):
        return None, "in the data's order"
    return index, f"{len(index)} matched by name"
