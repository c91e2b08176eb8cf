"""Writes the included digits as a user would have them: python examples/write_digits.py FOLDER.

FOLDER/images holds 50 labeled digits, which FOLDER/few.csv names, and the 360 test digits, which
FOLDER/test.csv names. FOLDER/pile holds the other 1,387 training digits, without labels.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from data.readers import digits  # noqa: E402
from data.sources import stratified  # noqa: E402

LABELS = 50


def main(folder: Path) -> None:
    train, test = digits(is_train=True), digits(is_train=False)
    few = {*stratified(train.targets, LABELS, seed=0).tolist()}
    rows: dict[str, list[list[str]]] = {"few": [], "test": []}
    for kind, source in (("train", train), ("test", test)):
        for index, (image, target) in enumerate(source):
            is_named = kind == "test" or index in few
            file = folder / ("images" if is_named else "pile") / f"{kind}_{index:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(image[..., 0])).save(file)
            if is_named:
                rows["few" if kind == "train" else "test"].append([file.name, str(target)])
    for name, named in rows.items():
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["path", "class"], *named])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
