"""The choices that a distillation makes for its user: each in one place, with its evidence."""

from dataclasses import dataclass

from arguments.derived import SMALL


@dataclass(frozen=True)
class Choice:
    """A choice, the reason for it, and the flag that overrules it."""

    what: str
    value: str
    reason: str
    overruled_by: str


# Passes over all images of a training, and how many images it shows at least: from random weights
# as for the digits in docs/results.md; weights need less.
PASSES = {"nothing": (40, 6_000), "weights": (15, 2_000)}
MOST_VIEWS = 10
MOST_EPOCHS = 1_000
PROBE_EPOCHS = 50  # docs/teachers.md; on features, which are computed once
FOR_WEIGHTS = 96  # pixels below which the features of ImageNet networks say little


def default_networks(side: int) -> tuple[str, str]:
    """Teacher and student if none is named."""
    if side < SMALL:
        return "cifar_resnet20", "cifar_resnet8"
    return "tf_efficientnet_lite2", "tf_efficientnet_lite0"


def input_size(side: int, has_weights: bool, is_slow: bool) -> int:
    """Pixels of the images that a network is trained on.

    Args:
        side: the median of the images' shorter sides.
        is_slow: whether there is no GPU.
    """
    if side < SMALL and not has_weights:
        return max(8, side)
    most = 128 if is_slow else 224
    return max(FOR_WEIGHTS, min(most, side // 32 * 32))


def epochs(images: int, shown: int, has_weights: bool, share: float) -> int:
    """Passes over some images that show as many as the usual passes over `shown` images do.

    Args:
        share: of the usual passes.
    """
    passes, least = PASSES["weights" if has_weights else "nothing"]
    return max(1, min(MOST_EPOCHS, round(share * max(least, passes * shown) / images)))


def augmentation(side: int) -> tuple[list[str], Choice]:
    """Flags of main.py for the augmentation."""
    if side < SMALL:
        return ["--aa", "none", "--color_jitter", "0", "--reprob", "0"], Choice(
            "augmentation",
            "crops and mixing only",
            f"images of {side} pixels leave little to distort or erase",
            "-- --aa POLICY",
        )
    return [], Choice("augmentation", "that of main.py", "photographs", "-- --aa POLICY")


def distillation(unlabeled: int) -> tuple[list[str], list[Choice]]:
    """Flags of main.py for the loss of a distilled student."""
    if unlabeled:
        alpha = 0.9, "with images without labels, 0.9 was better than 0.7 (docs/unlabeled.md)"
    else:
        alpha = 0.7, "the default of the guide (docs/results.md)"
    temperature = 4.0, "the default of the guide; it hardly mattered (docs/results.md)"
    return ["--kd_alpha", str(alpha[0]), "--kd_temperature", str(temperature[0])], [
        Choice("alpha", str(alpha[0]), alpha[1], "--recipe FILE"),
        Choice("temperature", str(temperature[0]), temperature[1], "--recipe FILE"),
    ]


def views(epochs: int, share: float) -> int:
    """Augmented views of each image that the teacher is asked about; later epochs repeat them."""
    return min(epochs, max(2, round(MOST_VIEWS * share)))
