"""The teacher of a run: made as the flags say, scored, and kept on disk or read from there."""

import argparse
from typing import Any

import timm
import torch
from torch import nn

import datasets
import logit_store
import utils
from distillation import Teacher, TeacherEnsemble, load_teacher
from engine import LoopSettings, evaluate
from logit_store import LogitFile, LogitStore, StoredTeacher
from utils import UserError, log

CAUSES = (
    "likely causes: another normalisation (--teacher_norm), another size (--teacher_input_size), "
    "another order of classes (--teacher_classes), a file of other weights, or a weak teacher"
)


def make_teacher(args: argparse.Namespace, device: torch.device, data: datasets.Data) -> nn.Module:
    """The frozen teacher, or the average of several."""
    place = utils.find_device(args.teacher_device, "--teacher_device", device)
    names = utils.read_lines(args.teacher_classes, "--teacher_classes")
    teachers = []
    for arch, path in zip(args.teacher_arch.split(","), args.teacher_path.split(","), strict=True):
        config = {"input_size": args.teacher_input_size} if args.teacher_input_size else {}
        if args.teacher_norm != "auto":
            cfg = timm.models.get_pretrained_cfg(arch) if args.teacher_norm == "arch" else None
            source = data.config if cfg is None else {"mean": cfg.mean, "std": cfg.std}
            config |= {"mean": list(source["mean"]), "std": list(source["std"])}
        network = load_teacher(
            *(arch, path, len(data.classes), place),
            classes=data.classes,
            teacher_classes=names,
            input_config=config,
        )
        log(network.origin)
        teachers.append(Teacher(network, data.config, getattr(torch, args.teacher_dtype)))
    teacher = teachers[0]
    if len(teachers) > 1:
        weights = args.teacher_weights or ",".join("1" * len(teachers))
        weights = [float(weight) for weight in weights.split(",")]
        teacher = TeacherEnsemble(teachers, weights, args.kd_temperature)
    if args.compile:
        teacher.compile()
    return teacher


class TeacherInUse:
    """The teacher of a run, or what is kept of its answers, and how it scores.

    `answer` is what the student's wrapper asks: the network, the store that stands for it, or None.
    The network is made only where there is no store, or where the store lacks something.

    Args:
        views: whose images the teacher will be asked about.
    """

    def __init__(
        self, args: argparse.Namespace, settings: LoopSettings, data: datasets.Data, views: range
    ) -> None:
        self.args, self.settings, self.data, self.views = args, settings, data, views
        self.answer: Any = None
        self.store: LogitStore | None = None
        self.record: dict[str, float] = {}  # teacher_acc1, teacher_loss
        self.logits: Any = None  # for each validation batch
        if not args.kd or args.kd_alpha == 0:
            return
        if not args.teacher_cache:
            self.answer = make_teacher(args, settings.device, data)
            self._score(self.answer)
            return
        self.store = logit_store.open_store(args, data, settings.amp_dtype)
        lacking = self.store.check_space(views)
        scored = self.store.validation(data) if self._is_scored() else None
        missing = torch.tensor([lacking, scored.missing() if scored else 0])
        missing = missing.to(settings.device)
        utils.all_reduce_(missing, torch.distributed.ReduceOp.MAX)  # one decision for all
        lacking, unscored = missing.tolist()
        teacher = make_teacher(args, settings.device, data) if lacking or unscored else None
        if teacher is None:
            log("Every answer is there: the teacher itself is not loaded")
        if scored:
            self._score(teacher, scored if not unscored else None)
            if unscored:
                batches = data.val_loader.batches
                scored.write([(batches.places(b), kept) for b, kept in enumerate(self.logits)])
            self.logits = logit_store.KeptBatches(scored, data.val_loader.batches)
        self.answer = StoredTeacher(self.store, data.train_loader, teacher if lacking else None)

    def _is_scored(self) -> bool:
        return self.data.val_loader is not None and self.args.teacher_eval

    def _score(self, teacher: nn.Module | None, kept: LogitFile | None = None) -> None:
        """Show the teacher the validation images once, through the student's own pipeline, or score
        what is kept of that. Warns of one near chance; raises UserError for --teacher_min_acc1."""
        if not self._is_scored():
            return
        args, data, settings = self.args, self.data, self.settings
        logits: list[torch.Tensor] = []
        if kept is None:
            scores = evaluate(data.val_loader, teacher, settings, args.dist_eval, keep=logits)
        else:
            answers = logit_store.KeptBatches(kept, data.val_loader.batches)
            labelled = answers.with_targets(data.val.targets, settings.device)
            scores = evaluate(labelled, nn.Identity(), settings, args.dist_eval)
        if isinstance(data.val, datasets.ImageSource):  # a stream's order is not promised
            self.logits = logits
        self.record = {f"teacher_{name}": scores[name] for name in ("acc1", "loss")}
        acc1, chance = scores["acc1"], 100 / len(data.classes)
        log(f"Teacher on the validation images: acc1 {acc1:.2f}, loss {scores['loss']:.4f}")
        if acc1 < args.teacher_min_acc1:
            raise UserError(
                f"--teacher_min_acc1 {args.teacher_min_acc1}: the teacher scores {acc1:.2f}; "
                f"{CAUSES}"
            )
        if acc1 < 2 * chance:
            log(f"WARNING: the teacher is near chance ({chance:.2f} %); {CAUSES}")

    def flush(self) -> None:
        """Write what the store still holds in memory."""
        if self.store is not None:
            self.store.flush()

    def compare(self, scores: dict[str, float]) -> None:
        """Warn of a teacher that is below its student in the end."""
        student, teacher = scores.get("test_acc1"), self.record.get("teacher_acc1")
        if student is not None and teacher is not None and teacher < student:
            log(
                f"WARNING: the teacher ({teacher:.2f} %) is below its student ({student:.2f} %); "
                f"{CAUSES}"
            )

    def fill_store(self) -> None:
        """Ask the teacher for every image of the views that the store lacks; keep the answers."""
        loader, store = self.data.train_loader, self.store
        stopwatch, images_since = utils.Stopwatch(), 0
        for view in self.views:
            first = store.view(view).first_missing(store.needed)
            # An earlier run kept the rows before it; the processes' batches go round.
            loader.set_epoch(view, first // (loader.batches.batch_size * utils.world_size()))
            for batch, (images, _) in enumerate(loader, start=1):
                with torch.inference_mode(), self.settings.autocast():
                    self.answer(images)
                images_since += len(images) * utils.world_size()
                if batch % 50 == 0 or batch == len(loader):
                    done = f"{loader.places.stop:,}/{store.needed:,}"
                    log(f"View {view} [{done}]  {stopwatch.rate(images_since):.0f} images/s")
                    images_since = 0
                if number := utils.received_signal():
                    self.flush()
                    raise utils.Interrupted(number, f"a batch of view {view}", store.folder)
            self.flush()
