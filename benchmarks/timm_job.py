"""The job of benchmarks/endtoend.py in timm's own pieces, put together as timm's train.py does.

    python benchmarks/timm_job.py '{"data_path": …}'

takes the fields of `endtoend.Job` and prints the accuracy after each epoch.
"""

import json
import logging
import os
import sys
import time
from typing import Any

import timm
import torch
from timm.data import FastCollateMixup, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import LogitDistillationTask
from timm.utils import AverageMeter, CheckpointSaver, accuracy, random_seed, update_summary
from torch import nn

CPU = torch.device("cpu")
LOG_INTERVAL = 50  # as in timm's train.py
logger = logging.getLogger("train")


def loaders(job: dict[str, Any]) -> tuple[Any, Any]:
    """timm's loaders of both splits."""
    mixup = FastCollateMixup(
        mixup_alpha=job["mixup"],
        cutmix_alpha=job["cutmix"],
        label_smoothing=job["smoothing"],
        num_classes=job["classes"],
    )
    common: dict[str, Any] = {
        "input_size": (3, job["input_size"], job["input_size"]),
        "interpolation": "bicubic",
        "num_workers": job["num_workers"],
        "device": CPU,
    }
    return create_loader(
        create_dataset("", job["data_path"], split="train", is_training=True),
        batch_size=job["batch_size"],
        is_training=True,
        hflip=job["hflip"],
        auto_augment=job["aa"],
        re_prob=job["reprob"],
        re_mode="pixel",
        collate_fn=mixup,
        **common,
    ), create_loader(
        create_dataset("", job["data_path"], split="val"),
        batch_size=2 * job["batch_size"],
        crop_pct=job["crop_pct"],
        **common,
    )


def train_one_epoch(
    epoch: int, task: nn.Module, loader: Any, optimizer: torch.optim.Optimizer, scheduler: Any
) -> dict[str, float]:
    """Train for one epoch; returns the mean loss of the steps that were logged."""
    losses, step_time = AverageMeter(), AverageMeter()
    task.train()
    started = time.time()
    last = len(loader) - 1
    for batch, (images, targets) in enumerate(loader):
        optimizer.zero_grad()
        loss = task(images, targets)["loss"]
        loss.backward()
        optimizer.step()
        step_time.update(time.time() - started)
        if batch == last or batch % LOG_INTERVAL == 0:
            losses.update(loss.item(), len(images))
            rate = len(images) / step_time.avg
            logger.info(f"Train: {epoch} [{batch}/{last}] {losses.val:.4g} {rate:.0f}/s")
        scheduler.step_update(epoch * len(loader) + batch + 1)
        started = time.time()
    return {"loss": losses.avg}


@torch.no_grad()
def validate(network: nn.Module, loader: Any) -> dict[str, float]:
    """Score the student: mean cross-entropy, and accuracy in percent."""
    losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    network.eval()
    for images, targets in loader:
        logits = network(images)
        acc1, acc5 = accuracy(logits, targets, topk=(1, 5))
        losses.update(nn.functional.cross_entropy(logits, targets).item(), len(images))
        top1.update(acc1.item(), len(images))
        top5.update(acc5.item(), len(images))
    return {"loss": losses.avg, "top1": top1.avg, "top5": top5.avg}


def main(job: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO)
    random_seed(job["seed"])
    teacher: Any = timm.create_model(
        job["teacher"], num_classes=job["classes"], checkpoint_path=job["teacher_path"]
    )
    student: Any = timm.create_model(job["model"], num_classes=job["classes"])
    optimizer = create_optimizer_v2(
        student, opt="adamw", lr=job["lr"], weight_decay=job["weight_decay"]
    )
    train_loader, val_loader = loaders(job)
    task = LogitDistillationTask(
        student,
        teacher,
        SoftTargetCrossEntropy(),
        task_loss_weight=1 - job["alpha"],
        temperature=job["temperature"],
        device=CPU,
    )
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=job["epochs"],
        warmup_epochs=job["warmup_epochs"],
        min_lr=job["min_lr"],
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    folder = job["output_dir"]
    os.makedirs(folder)
    saver = CheckpointSaver(student, optimizer, checkpoint_dir=folder, recovery_dir=folder)
    summary = os.path.join(folder, "summary.csv")
    for epoch in range(epochs):
        trained = train_one_epoch(epoch, task, train_loader, optimizer, scheduler)
        scores = validate(student, val_loader)
        scheduler.step(epoch + 1, scores["top1"])
        update_summary(epoch, trained, scores, summary, write_header=epoch == 0)
        saver.save_checkpoint(epoch, metric=scores["top1"])
        print(json.dumps({"epoch": epoch, "test_acc1": scores["top1"]}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
