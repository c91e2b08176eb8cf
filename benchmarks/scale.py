"""Start-up, memory and the change of epochs for N images that exist only as numbers (Linux).

    python benchmarks/scale.py                           # 1.28, 14, 100 million; 1 and 8 ranks
    python benchmarks/scale.py --images 14000000 --ranks 2 --holdout 50000

Each row is a run of real processes that goes through the loaders of a training run: subsets,
identity of the images, order, mixup in pairs, one loader worker per rank. Only the pixels are made
up, and no network is trained. Memory is the proportional set size (PSS), in which a page that
several processes share counts once in all.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import datasets
from arguments.parsing import parse_args
from data.sources import ImageSource
from runtime import distributed, signals

CLASSES = 1000
FLAGS = (
    "--data_set DIGITS --model cifar_resnet8 --device cpu --num_workers 1 --batch_size 256 "
    "--mixup_mode pair --disable_eval true"
).split()
GIB = 2**30


class Numbers(ImageSource):
    """Images (8, 8, 3) uint8 whose gray and whose labels follow from the index alone."""

    def __init__(self, images: int) -> None:
        (targets,) = distributed.once_per_machine(lambda: [np.arange(images) % CLASSES])
        super().__init__(targets, [str(label) for label in range(CLASSES)])

    def load(self, index: int) -> np.ndarray:
        return np.full((8, 8, 3), index % 251, np.uint8)


def run_rank(images: int, holdout: int) -> None:
    """One rank; rank 0 prints the seconds of the slowest rank as JSON."""
    started = time.perf_counter()
    device = torch.device("cpu")
    distributed.init_process(device, "env://")
    datasets.open_split = lambda args, is_train, classes=None: Numbers(images)
    data = datasets.build_data(
        parse_args(FLAGS + (["--holdout", str(holdout)] if holdout else [])), device
    )
    assert isinstance(data.train, ImageSource)
    distributed.from_main(data.train.identity)
    loader = data.train_loader
    loader.set_epoch(0)
    next(iter(loader))
    seconds = [time.perf_counter() - started]

    loader.set_epoch(0, loader.batches_in_epoch - 2)
    for _ in loader:
        pass
    distributed.barrier()
    started = time.perf_counter()
    loader.set_epoch(1)
    next(iter(loader))
    seconds.append(time.perf_counter() - started)
    slowest = distributed.largest(seconds, torch.device("cpu"))
    distributed.log(json.dumps(slowest))
    time.sleep(1)  # for a last reading of the memory
    signals.end_workers()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def children_of(pid: int) -> list[int]:
    """The processes that a process has started; none where it has ended."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def pss(pid: int) -> float:
    """Proportional set size in GiB of a process and of all that it has started."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process has ended
        return 0.0
    own = sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / GIB
    return own + sum(pss(child) for child in children_of(pid))


def measure(images: int, ranks: int, holdout: int) -> dict[str, float]:
    """Run `ranks` processes over a source of `images`; returns seconds and GiB."""
    argv = [__file__, "--as_rank", "--images", str(images), "--holdout", str(holdout)]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        argv = launcher + argv
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    rank_peak = node_peak = 0.0
    while process.poll() is None:
        found = [pss(pid) for pid in (children_of(process.pid) if ranks > 1 else [process.pid])]
        rank_peak = max([rank_peak, *found])
        node_peak = max(node_peak, sum(found))
        time.sleep(0.1)
    if process.returncode or process.stdout is None:
        sys.exit(f"{images:,} images with {ranks} rank(s): the run failed")
    first_batch, epochs = json.loads(process.stdout.read().splitlines()[-1])
    return {
        "images": images,
        "ranks": ranks,
        "holdout": holdout,
        "seconds to the first batch": first_batch,
        "seconds between epochs": epochs,
        "GiB of the largest rank": rank_peak,
        "GiB of the node": node_peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1_280_000, 14 * 10**6, 10**8])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--holdout", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--as_rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        run_rank(args.images[0], args.holdout)
        return
    is_first = True
    for images, ranks in itertools.product(args.images, args.ranks):
        row = measure(images, ranks, args.holdout)
        if is_first:
            print(f"| {' | '.join(row)} |\n|{' --- |' * len(row)}", flush=True)
            is_first = False
        cells = [f"{v:,}" if isinstance(v, int) else f"{v:.3g}" for v in row.values()]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
