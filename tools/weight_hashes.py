"""Print a SHA-256 of the final weights of a few fixed runs, to prove that a change changed nothing.

    python tools/weight_hashes.py > after.txt
    python tools/weight_hashes.py --tree ../another_checkout > before.txt
    diff before.txt after.txt

The runs cover plain training, distillation, EMA with accumulation in every mixup mode, a teacher
cache that is filled and read, images without labels, a linear probe, weights of classes, files of
labels, two kinds of restart, JPEGs, other normalization and two processes. They take about four
minutes on two CPU cores. The hash covers the student, its EMA and the
optimizer; the scores of the last epoch follow it. Kernels differ between machines, so compare only
hashes from the same machine and the same versions.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

COMMON = "--device cpu --num_workers 1 --model cifar_resnet8"
SHORT = f"{COMMON} --train_samples 200 --batch_size 16 --epochs 3"
TEACHER = "--kd true --teacher_arch cifar_resnet8 --teacher_path {folder}/teacher.pth"
LONGER = "--train_samples 640 --epochs 2"
HARD = "--model_ema true --model_ema_eval true --update_freq 3"
CACHE = "--teacher_cache {folder}/cache --teacher_cache_dtype float32"
PHOTOS = "--device cpu --num_workers 2 --data_path {folder}/photos --batch_size 8 --epochs 2"
RUNS = {
    "plain": SHORT,
    "plain, no augmentation": f"{SHORT} --mixup 0 --cutmix 0 --aa= --reprob 0 --opt momentum",
    "distilled": f"{SHORT} {TEACHER}",
    "distilled, 40 steps per epoch": f"{SHORT} {TEACHER} {LONGER}",
    "EMA, accumulation, mixup batch": f"{SHORT} {TEACHER} {HARD} --mixup_mode batch",
    "EMA, accumulation, mixup pair": f"{SHORT} {TEACHER} {HARD} --mixup_mode pair",
    "EMA, accumulation, mixup elem": f"{SHORT} {TEACHER} {HARD} --mixup_mode elem",
    "cutmix_minmax, pair": f"{SHORT} {TEACHER} --mixup_mode pair --cutmix_minmax 0.2 0.8",
    "cache, filled": f"{SHORT} {TEACHER} {CACHE}",
    "cache, read": f"{SHORT} {TEACHER} {CACHE} --kd_alpha 0.5",
    "cache, top 3": f"{SHORT} {TEACHER} --teacher_cache {{folder}}/top --teacher_cache_topk 3",
    "two views": f"{SHORT} {TEACHER} --teacher_views 2",
    "two teachers": f"{SHORT} --kd true --teacher_arch cifar_resnet8,cifar_resnet8 "
    "--teacher_path {folder}/teacher.pth,{folder}/other.pth --teacher_weights 2,1",
    "bfloat16": f"{SHORT} {TEACHER} --use_amp true --teacher_dtype bfloat16",
    "clipped, layer decay": f"{SHORT} --clip_grad 0.5 --layer_decay 0.8 --weight_decay_end 0.2",
    "photographs": f"{PHOTOS} --model convnext_atto --input_size 64 --drop_path 0.1",
    "teacher of another input": f"{PHOTOS} --model vit_tiny_patch16_224 --input_size 32 "
    "--kd true --teacher_arch cifar_resnet8 --teacher_path {folder}/five.pth "
    "--teacher_classes {folder}/names.txt --teacher_norm arch --teacher_input_size 16",
    "finetuned": f"{SHORT} --finetune {{folder}}/five.pth --holdout 100 --smoothing 0",
    "the rest unlabeled": f"{SHORT} {TEACHER} --unlabeled rest --epochs 1",
    "linear probe": f"{SHORT} --finetune {{folder}}/teacher.pth --linear_probe true",
    "balanced classes": f"{SHORT} --class_weights balanced --mixup 0 --cutmix 0",
    "files of labels": f"{PHOTOS} --model cifar_resnet8 --input_size 32 "
    "--labels {folder}/train.csv --eval_labels {folder}/val.csv",
}
# Fills a cache without training, and trains with what it holds.
FILL = f"{SHORT} {TEACHER} --teacher_cache {{folder}}/filled --teacher_cache_only true"
READ = f"{SHORT} {TEACHER} --teacher_cache {{folder}}/filled"


def make_inputs(folder: Path, tree: Path) -> None:
    """Teachers with seeded random weights, and a folder of JPEGs."""
    sys.path.insert(0, str(tree))
    import timm

    import models  # noqa: F401

    for name, seed, classes in (("teacher", 1, 10), ("other", 2, 10), ("five", 3, 5)):
        torch.manual_seed(seed)
        network = timm.create_model("cifar_resnet8", num_classes=classes)
        with torch.no_grad():
            network.fc.weight.mul_(10)
        torch.save(network.state_dict(), folder / f"{name}.pth")
    (folder / "names.txt").write_text("wasp\ncat\nbee\nant\ndog\n")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for number, label in enumerate(("ant", "bee", "cat")):
            (folder / "photos" / split / label).mkdir(parents=True)
            for index in range(count):
                noise = rng.integers(0, 100, (70, 90, 3)) + 50 * number
                path = folder / "photos" / split / label / f"{index}.jpg"
                Image.fromarray(noise.astype(np.uint8)).save(path)
        lines = [f"{split}/{c}/{i}.jpg,{c}\n" for c in ("ant", "bee", "cat") for i in range(count)]
        (folder / f"{split}.csv").write_text("".join(lines))


def run(tree: Path, flags: str, folder: Path, output: Path, processes: int = 1) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(flags, folder, output, processes),
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"main.py {flags}\n{done.stdout}{done.stderr}")


def command(flags: str, folder: Path, output: Path, processes: int = 1) -> list[str]:
    argv = [sys.executable, "-u"]
    if processes > 1:
        argv += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [
        *argv,
        "main.py",
        *shlex.split(flags.format(folder=folder)),
        "--output_dir",
        str(output),
    ]


def interrupt_and_resume(tree: Path, flags: str, folder: Path, output: Path) -> None:
    """Stop with SIGTERM inside the second epoch, then run the same command to its end."""
    process = subprocess.Popen(
        command(f"{flags} --print_seconds 0", folder, output),
        cwd=tree,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("Epoch 1 [10/"):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    if process.wait() != 128 + signal.SIGTERM or not (output / "checkpoint-step.pth").exists():
        sys.exit("the run was not interrupted inside its second epoch")
    run(tree, flags, folder, output)


def digest(output: Path) -> str:
    """Hash of every tensor in the newest checkpoint, and the last epoch's scores."""
    newest = max(output.glob("checkpoint-[0-9]*.pth"), key=lambda path: int(path.stem[11:]))
    saved = torch.load(newest, weights_only=True)
    total = hashlib.sha256()
    for part in ("model", "model_ema", "optimizer"):
        for tensor in tensors(saved[part]):
            total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    last = json.loads((output / "log.txt").read_text().splitlines()[-1])
    scores = "  ".join(f"{name} {last[name]:.6f}" for name in ("train_loss", "test_loss"))
    return f"{total.hexdigest()}  {scores}"


def tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors(value[key])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to run (default: this)")
    tree = parser.parse_args().tree.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_inputs(folder, tree)
        outputs = {name: folder / f"run-{number}" for number, name in enumerate(RUNS)}
        for name, flags in RUNS.items():
            run(tree, flags, folder, outputs[name])
            print(f"{name:32} {digest(outputs[name])}", flush=True)

        name = "EMA, accumulation, mixup batch"
        again = folder / "again"
        shutil.copytree(outputs[name], again, ignore=shutil.ignore_patterns("*-[12].pth", "*best*"))
        run(tree, RUNS[name], folder, again)
        print(f"{'resumed after an epoch':32} {digest(again)}", flush=True)
        interrupt_and_resume(tree, f"{SHORT} {TEACHER} {LONGER}", folder, folder / "step")
        print(f"{'resumed inside an epoch':32} {digest(folder / 'step')}", flush=True)
        run(tree, FILL, folder, folder / "nothing")
        run(tree, READ, folder, folder / "read")
        print(f"{'cache, filled without training':32} {digest(folder / 'read')}", flush=True)
        run(tree, f"{SHORT} {TEACHER} {HARD}", folder, folder / "two", processes=2)
        print(f"{'two processes':32} {digest(folder / 'two')}", flush=True)


if __name__ == "__main__":
    main()
