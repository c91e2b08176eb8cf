"""Train a small image classifier, alone or taught by a big one: arguments, wiring, epochs."""

import argparse
import copy
import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any


def str2bool(value: str) -> bool:
    """'true' and 'false', and their usual other spellings."""
    if value.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if value.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{value}' is neither true nor false")


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds '(default: …)' to every flag's help that does not tell its default in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = "(default" in action.help or action.default is None
        return action.help if told else super()._get_help_string(action)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "main.py",
        usage="%(prog)s [--flag value ...]",
        description="Train and evaluate image classifiers, with knowledge distillation.",
        formatter_class=ShowDefaults,
        allow_abbrev=False,
    )

    kd = parser.add_argument_group("knowledge distillation")
    add = kd.add_argument
    add("--kd", type=str2bool, default=False, help="learn from a teacher")
    add("--teacher_path", help="checkpoint of the teacher (required with --kd true)")
    add("--teacher_arch", help="timm architecture of the teacher (required with --kd true)")
    add("--kd_alpha", type=float, default=0.7, help="teacher's weight: 0 labels only, 1 no labels")
    add("--kd_temperature", type=float, default=4.0, help="softens both distributions; above 0")

    teacher = parser.add_argument_group("teacher (the flags above name it)")
    add = teacher.add_argument
    add("--teacher_weights", help="of several teachers, as 2,1 (default: equal)")
    norms = "its normalisation: the file's or else timm's, the student's, or timm's"
    add("--teacher_norm", default="auto", choices=("auto", "student", "arch"), help=norms)
    add("--teacher_input_size", type=int, help="its pixels (default: the file's or else timm's)")
    add("--teacher_classes", help="file with its class names, a line each (default: the file's)")
    add("--teacher_eval", type=str2bool, default=True, help="score it before the first step")
    add("--teacher_min_acc1", type=float, default=0.0, help="stop where it scores less, in percent")
    add("--teacher_device", help="where it computes, such as cpu or cuda:1 (default: --device)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--teacher_dtype", default="float32", choices=dtypes, help="of its weights")

    cache = parser.add_argument_group("the teacher's logits, kept on disk")
    add = cache.add_argument
    add("--teacher_cache", help="folder for them: made once, then read instead of the teacher")
    add(
        "--teacher_views",
        type=int,
        help="epoch e shows the images augmented and ordered as in epoch e mod this "
        "(default: as many as epochs)",
    )
    dtypes = ("float16", "float32")
    add("--teacher_cache_dtype", default="float16", choices=dtypes, help="of each logit kept")
    add("--teacher_cache_topk", type=int, help="keep only so many largest a row (default: all)")
    add("--teacher_cache_only", type=str2bool, default=False, help="fill it, and do not train")
    add("--teacher_cache_range", help="fill only these views, as 0:50 (default: all)")

    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--batch_size", type=int, default=64, help="images per process and forward pass")
    add("--epochs", type=int, default=300, help="passes over the training images")
    add("--update_freq", type=int, default=1, help="batches accumulated into one optimizer step")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first of these that is there)")
    add("--compile", type=str2bool, default=False, help="torch.compile student and teacher")
    add("--use_amp", type=str2bool, default=False, help="automatic mixed precision")
    add(
        "--amp_dtype",
        choices=("float16", "bfloat16"),
        help="with --use_amp (default: bfloat16 on the CPU, else float16, which scales the loss)",
    )
    add("--start_epoch", type=int, default=0, help="the first epoch; a resumed run knows it")

    model = parser.add_argument_group("student")
    add = model.add_argument
    add("--model", help="timm architecture (default: convnext_tiny; cifar_resnet20 below 64 px)")
    add("--drop_path", type=float, default=0.0, help="stochastic depth rate")
    add("--input_size", type=int, help="pixels (default: 224; a small model's: the data's own)")
    add("--finetune", default="", help="start from the weights of this checkpoint")
    add("--head_init_scale", type=float, default=1.0, help="scales the classifier's first weights")
    add("--model_key", default="model|module", help="where --finetune finds the weights")
    add("--model_prefix", default="", help="prefix of the weights that --finetune takes")

    ema = parser.add_argument_group("moving average of the student's weights (EMA)")
    add = ema.add_argument
    add("--model_ema", type=str2bool, default=False, help="keep one")
    add("--model_ema_decay", type=float, default=0.9999, help="decay per optimizer step")
    warmup = "start with a short average that grows, so that short runs profit too"
    add("--model_ema_warmup", type=str2bool, default=True, help=warmup)
    add("--model_ema_force_cpu", type=str2bool, default=False, help="keep it in host memory")
    add("--model_ema_eval", type=str2bool, default=False, help="evaluate it beside the student")

    opt = parser.add_argument_group("optimizer")
    add = opt.add_argument
    add("--opt", default="adamw", help="any optimizer of timm's create_optimizer_v2")
    add("--opt_eps", type=float, default=1e-8, help="epsilon")
    add("--opt_betas", type=float, nargs="+", help="betas (default: the optimizer's)")
    add("--clip_grad", type=float, help="largest gradient norm (default: no clipping)")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight_decay", type=float, default=0.05, help="not applied to biases and norms")
    add("--weight_decay_end", type=float, help="final value of a cosine (default: constant)")
    peak = "peak learning rate (default: 4e-3 at a total batch of 4096, scaled by its root)"
    add("--lr", type=float, help=peak)
    add("--layer_decay", type=float, default=1.0, help="factor of lr from a layer to the one below")
    add("--min_lr", type=float, default=1e-6, help="where the cosine ends")
    add("--warmup_epochs", type=int, help="linear warm-up (default: 20, or a fifth of a short run)")
    add("--warmup_steps", type=int, default=-1, help="optimizer steps of it, in place of epochs")

    aug = parser.add_argument_group("augmentation")
    add = aug.add_argument
    add("--color_jitter", type=float, default=0.4, help="strength; used where --aa is ''")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's AutoAugment policy, '' for none")
    add("--hflip", type=float, help="chance of a mirror image (default: 0.5; for digits 0)")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    modes = ("random", "bilinear", "bicubic")
    add("--train_interpolation", default="bicubic", choices=modes, help="of the random crop")
    add("--crop_pct", type=float, help="part that is evaluated (default: 0.875; small images 1)")
    add("--reprob", type=float, default=0.25, help="chance of random erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what erasing leaves")
    add("--recount", type=int, default=1, help="most rectangles erased")

    mix = parser.add_argument_group("mixup and cutmix (teacher and student see the same mix)")
    add = mix.add_argument
    add("--mixup", type=float, default=0.8, help="alpha of mixup; 0 for none")
    add("--cutmix", type=float, default=1.0, help="alpha of cutmix; 0 for none")
    add("--cutmix_minmax", type=float, nargs=2, help="least and most that is cut, not by alpha")
    add("--mixup_prob", type=float, default=1.0, help="chance that a batch is mixed at all")
    add("--mixup_switch_prob", type=float, default=0.5, help="chance of cutmix where both are on")
    modes = ("batch", "pair", "elem")
    add("--mixup_mode", default="batch", choices=modes, help="one for a batch, a pair or an image")

    data = parser.add_argument_group("data")
    add = data.add_argument
    add(
        "--data_set",
        help="DIGITS (comes along), IMNET (a folder with train/ and val/), image_folder, "
        "CIFAR (of 100 classes), CIFAR10, MNIST, FashionMNIST, or a name for timm's create_dataset "
        "such as hfds/… (default: IMNET where --data_path is given, else DIGITS)",
    )
    add("--data_path", help="folder of the data")
    add("--eval_data_path", help="folder of the validation images of image_folder")
    add("--nb_classes", type=int, help="number of classes (default: counted)")
    add("--train_samples", type=int, help="train on this many images, of every class its share")
    add("--holdout", type=int, help="evaluate on this many training images held out (for tuning)")
    norm = "normalise with ImageNet's statistics; false: with 0.5"
    add("--imagenet_default_mean_and_std", type=str2bool, default=True, help=norm)
    add("--num_workers", type=int, help="loader processes (default: the cores, at most 10)")
    add("--pin_mem", type=str2bool, default=True, help="page-locked batches, on CUDA")

    out = parser.add_argument_group("output")
    add = out.add_argument
    add("--output_dir", default="", help="folder for checkpoints and log.txt; '' saves nothing")
    add("--log_dir", help="folder for TensorBoard (default: none)")
    add("--resume", default="", help="checkpoint to continue from, or to score with --eval true")
    add("--auto_resume", type=str2bool, default=True, help="go on from --output_dir's newest one")
    add("--save_ckpt", type=str2bool, default=True, help="save checkpoints")
    add("--save_ckpt_freq", type=int, default=1, help="epochs between two checkpoints")
    add("--save_ckpt_num", type=int, default=3, help="how many of them are kept")
    add("--save_ckpt_steps", type=int, help="also save after so many steps (default: epochs only)")

    ev = parser.add_argument_group("evaluation")
    add = ev.add_argument
    add("--eval", type=str2bool, default=False, help="only score --resume's checkpoint")
    add("--dist_eval", type=str2bool, default=True, help="share the images out over the processes")
    add("--disable_eval", type=str2bool, default=False, help="train without evaluating")

    dist = parser.add_argument_group("processes (torchrun sets them)")
    add = dist.add_argument
    add("--dist_url", default="env://", help="where the processes meet")
    ignored = "ignored: LOCAL_RANK of the environment counts"
    add("--local_rank", "--local-rank", type=int, help=ignored)
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2 for values that can't work; fill in the defaults that follow from others."""

    def require(holds: bool, flag: str, remedy: str) -> None:
        if not holds:
            parser.error(f"--{flag} {getattr(args, flag)}: {remedy}")

    if args.kd:
        missing = [f"--{f}" for f in ("teacher_path", "teacher_arch") if not getattr(args, f)]
        if missing:
            parser.error(f"--kd true needs {' and '.join(missing)}")
    elif args.teacher_path or args.teacher_arch:
        parser.error(
            "--teacher_path and --teacher_arch are for --kd true; add it or leave them out"
        )
    check_teachers(parser, args)
    check_cache(parser, args)
    require(
        0 <= args.kd_alpha <= 1, "kd_alpha", "must lie in 0…1 (0: labels only, 1: teacher only)"
    )
    require(
        0 < args.kd_temperature < float("inf"), "kd_temperature", "must be above 0, usually 2 to 6"
    )
    for flag in (
        *("batch_size", "epochs", "update_freq", "save_ckpt_freq", "save_ckpt_num", "recount"),
    ):
        require(getattr(args, flag) >= 1, flag, "must be 1 or more")
    for flag in ("seed", "start_epoch", "lr", "min_lr", "weight_decay", "opt_eps", "num_workers"):
        value = getattr(args, flag)
        require(value is None or value >= 0, flag, "must not be negative")
    for flag in (
        *("input_size", "train_samples", "holdout", "nb_classes", "clip_grad", "layer_decay"),
        *("save_ckpt_steps", "teacher_views", "teacher_cache_topk"),
    ):
        value = getattr(args, flag)
        require(value is None or value > 0, flag, "must be above 0")
    for flag in (
        *("drop_path", "smoothing", "reprob", "mixup_prob", "mixup_switch_prob"),
        *("model_ema_decay", "hflip", "crop_pct"),
    ):
        value = getattr(args, flag)
        require(value is None or 0 <= value <= 1, flag, "must lie in 0…1")

    args.data_set = args.data_set or ("IMNET" if args.data_path else "DIGITS")
    needs_path = args.data_set in ("IMNET", "image_folder")
    require(
        bool(args.data_path) or not needs_path, "data_path", f"{args.data_set} needs its folder"
    )
    if args.data_set == "image_folder" and not (args.disable_eval or args.holdout):
        remedy = "image_folder needs a folder of validation images, or --holdout N"
        require(bool(args.eval_data_path), "eval_data_path", remedy)
    require(
        args.warmup_epochs is None or args.warmup_epochs <= args.epochs,
        "warmup_epochs",
        f"longer than the run of {args.epochs} epochs; shorten it or leave it out",
    )
    if args.warmup_epochs is None:
        args.warmup_epochs = min(20, args.epochs / 5)
    if is_mixed(args):
        remedy = "mixup and cutmix work on pairs; give an even one, or --mixup 0 --cutmix 0"
        require(args.batch_size % 2 == 0, "batch_size", remedy)
    require(
        bool(args.resume) or not args.eval, "resume", "--eval true needs the checkpoint to score"
    )
    if args.num_workers is None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.num_workers = min(10, max(1, _cores() // here))


def is_mixed(args: argparse.Namespace) -> bool:
    """Whether images are mixed by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or bool(args.cutmix_minmax)


def check_teachers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Several teachers are given as a,b: as many files as architectures, as many weights."""
    archs, paths = (args.teacher_arch or "").split(","), (args.teacher_path or "").split(",")
    if len(archs) != len(paths):
        parser.error(
            f"--teacher_arch names {len(archs)} and --teacher_path {len(paths)} teachers; "
            "give as many of both, separated by commas"
        )
    if args.teacher_weights:
        try:
            weights = [float(weight) for weight in args.teacher_weights.split(",")]
        except ValueError:
            weights = []
        if len(weights) != len(archs) or not all(0 < w < float("inf") for w in weights):
            parser.error(
                f"--teacher_weights {args.teacher_weights}: give {len(archs)} number(s) above 0, "
                "separated by commas"
            )


def check_cache(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The flags of the kept logits."""
    if args.teacher_cache and not args.kd:
        parser.error(f"--teacher_cache {args.teacher_cache}: is for --kd true; add it")
    if args.teacher_cache_only and not (args.teacher_cache and args.kd_alpha > 0):
        parser.error(
            "--teacher_cache_only true needs --teacher_cache FOLDER to fill, --kd true with its "
            "teacher, and --kd_alpha above 0"
        )
    if args.teacher_cache_range and not (args.teacher_cache_only and views_to_fill(args)):
        parser.error(
            f"--teacher_cache_range {args.teacher_cache_range}: give --teacher_cache_only true and "
            f"a part of 0:{all_views(args)}, such as 0:{max(1, all_views(args) // 2)}"
        )


def all_views(args: argparse.Namespace) -> int:
    """How many views of each image the run shows."""
    return min(args.teacher_views or args.epochs, args.epochs)


def views_to_fill(args: argparse.Namespace) -> range:
    """What --teacher_cache_range names; empty where that is no part of the run's views."""
    first, _, last = (args.teacher_cache_range or f"0:{all_views(args)}").partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(last) <= all_views(args)):
        return range(0)
    return range(int(first), int(last))


def _cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


if __name__ == "__main__":
    # --help and wrong flags answer at once; torch and timm, below, take seconds to import.
    command_line = parse_args()

import torch
import torch.distributed
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import datasets
import models
import transforms
import utils
from distillation import DistillationLoss, StudentWithDistillation
from engine import History, LoopSettings, Progress, Schedule, evaluate, train_one_epoch
from teacher import TeacherInUse
from utils import UserError, log


def main(args: argparse.Namespace) -> int:
    """Run; returns the exit code."""
    try:
        run(args)
    except UserError as error:
        where = f" [rank {utils.rank()}]" if utils.rank() else ""
        print(f"main.py: error{where}: {error}", file=sys.stderr, flush=True)
        return 2
    except utils.Interrupted as stop:
        log(f"Stopped: {stop}")
        return stop.exit_code
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def run(args: argparse.Namespace) -> None:
    """Wire data, student, teacher and optimizer together, then train or evaluate.

    Raises: UserError for whatever the user can put right.
    """
    device = utils.init_process(args.device, args.dist_url)
    if args.output_dir:
        utils.make_folder(args.output_dir, "--output_dir")
    scored = utils.read_checkpoint(args.resume, "--resume") if args.eval else None
    follow_defaults(args, scored)
    log(f"Data {args.data_set}{f' in {args.data_path}' if args.data_path else ''}, on {device}")
    data = datasets.build_data(args, device)
    log(
        f"{len(data.train)} images, {len(data.classes)} classes, {args.input_size} pixels; "
        f"{utils.world_size()} process(es) with {args.num_workers} loader worker(s) each"
    )
    settings = LoopSettings(
        device, amp_dtype(args, device), args.update_freq, args.clip_grad, args.seed
    )
    if args.teacher_cache_only:
        TeacherInUse(args, settings, data, views_to_fill(args)).fill_store()
        return
    student = make_student(args, device, len(data.classes))
    ema = make_ema(args, student)
    if args.eval:
        utils.load_weights(scored, args.resume, student, ema)
        for name, value in evaluate_all(args, data, student, ema, settings).items():
            log(f"{name} {value:.4f}")
        return
    teacher = TeacherInUse(args, settings, data, views_to_fill(args))
    train(args, settings, data, student, ema, teacher)


def train(
    args: argparse.Namespace,
    settings: LoopSettings,
    data: datasets.Data,
    student: nn.Module,
    ema: ModelEmaV3 | None,
    teacher: TeacherInUse,
) -> None:
    """The epochs, from wherever an earlier run stopped."""
    loss = DistillationLoss(
        make_criterion(args), args.kd_alpha if args.kd else 0.0, args.kd_temperature
    )
    optimizer = make_optimizer(args, student, settings.device)
    scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.amp_dtype == torch.float16)
    steps = -(-len(data.train_loader) // args.update_freq)
    schedule = make_schedule(args, steps)
    state = utils.RunState(student, ema, optimizer, scaler, vars(args), data.config)
    start = state.resume(args.output_dir, args.resume, args.auto_resume, args.start_epoch)

    ddp = student
    if utils.world_size() > 1:
        device_ids = [settings.device] if settings.device.type == "cuda" else None
        ddp = DistributedDataParallel(student, device_ids, gradient_as_bucket_view=True)
    model = StudentWithDistillation(ddp, teacher.answer)  # the teacher stays outside DDP
    if args.compile:
        student.compile()
    first_step = start * steps + (state.progress["updates"] if state.progress else 0)
    recorder = utils.Recorder(args.output_dir, args.log_dir, start, first_step)
    n_parameters = sum(p.numel() for p in student.parameters() if p.requires_grad)
    started = time.time()

    def after_update(history: History, updates: int) -> None:
        is_due = args.save_ckpt_steps and updates % args.save_ckpt_steps == 0
        if not (is_due or history.stop) or updates == history.updates:
            return  # an epoch's last step is followed by its own checkpoint
        teacher.flush()
        saved = state.save_inside_epoch(asdict(history.progress(updates)))
        if history.stop:
            raise utils.Interrupted(history.stop, f"step {updates} of epoch {history.epoch}", saved)

    for epoch in range(start, args.epochs):
        stats = train_one_epoch(
            *(model, loss, data.train_loader, optimizer, scaler, schedule, epoch, settings),
            ema=ema,
            writer=recorder.writer,
            progress=Progress(**state.progress) if state.progress else None,
            after_update=after_update,
        )
        state.progress = None
        teacher.flush()
        record = {"epoch": epoch} | {f"train_{name}": value for name, value in stats.items()}
        if data.val_loader is not None:
            record |= evaluate_all(args, data, student, ema, settings, teacher.logits)
        record |= teacher.record
        recorder.write(record | {"n_parameters": n_parameters})
        improved = state.finish_epoch(epoch, record)
        if args.output_dir and args.save_ckpt:
            is_due = (epoch + 1) % args.save_ckpt_freq == 0 or epoch + 1 == args.epochs
            signalled = utils.stop_requested(settings.device)
            state.save(improved, is_due or bool(signalled), args.save_ckpt_num)
            if signalled and epoch + 1 < args.epochs:
                raise utils.Interrupted(signalled, f"epoch {epoch}", Path(args.output_dir))
    recorder.close()
    teacher.compare(state.scores)
    duration = timedelta(seconds=int(time.time() - started))
    log(f"Trained {max(0, args.epochs - start)} epochs in {duration}")
    log(state.summary())


def evaluate_all(
    args: argparse.Namespace,
    data: datasets.Data,
    student: nn.Module,
    ema: ModelEmaV3 | None,
    settings: LoopSettings,
    teacher_logits: list[torch.Tensor] | None = None,
) -> dict[str, float]:
    """Score the student, and its EMA where asked: test_loss, test_acc1, test_acc5, …_ema.

    With a teacher's logits on the same batches also test_agreement and test_kl.
    """

    def score(model: nn.Module) -> dict[str, float]:
        if utils.world_size() > 1:
            distribute_bn(model, utils.world_size())  # every rank scores what rank 0 will save
        return evaluate(data.val_loader, model, settings, args.dist_eval, teacher_logits)

    record = {f"test_{name}": value for name, value in score(student).items()}
    if ema is not None and (args.model_ema_eval or args.eval):
        averaged = ema.module
        if args.model_ema_force_cpu:
            averaged = copy.deepcopy(averaged).to(settings.device)
        record |= {f"test_{name}_ema": value for name, value in score(averaged).items()}
    return record


def follow_defaults(args: argparse.Namespace, scored: dict[str, Any] | None) -> None:
    """Choose what was not given: from the checkpoint to score, else from the data set."""
    if scored is not None and isinstance(scored.get("args"), dict):
        args.model = args.model or scored["args"].get("model")
        args.input_size = args.input_size or scored["args"].get("input_size")
        if not args.model_ema:
            args.model_ema = scored.get("model_ema") is not None
    native_size = datasets.NATIVE_SIZE.get(args.data_set, 224)
    if args.model is None:
        is_small = (args.input_size or native_size) < transforms.SMALL
        args.model = "cifar_resnet20" if is_small else "convnext_tiny"
    if args.input_size is None:
        is_small = models.own_input_size(args.model, "--model") < transforms.SMALL
        args.input_size = native_size if is_small else 224
    if args.hflip is None:
        args.hflip = 0.0 if args.data_set in datasets.MIRRORED_CHANGES_MEANING else 0.5
    if args.lr is None:
        # Adam's noise scale grows with sqrt(batch) (Malladi et al. 2022), not with the batch.
        total_batch = args.batch_size * args.update_freq * utils.world_size()
        args.lr = 4e-3 * (total_batch / 4096) ** 0.5


def amp_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None without --use_amp."""
    if not args.use_amp:
        return None
    name = args.amp_dtype or ("bfloat16" if device.type == "cpu" else "float16")
    if device.type == "cpu" and name == "float16":
        raise UserError("--amp_dtype float16: the CPU trains in bfloat16; leave the flag out")
    return getattr(torch, name)


def make_student(args: argparse.Namespace, device: torch.device, num_classes: int) -> nn.Module:
    utils.seed_rng(device, args.seed)
    student = models.create_model(args.model, num_classes, args.input_size, args.drop_path)
    if args.head_init_scale != 1:
        with torch.no_grad():
            for parameter in student.get_classifier().parameters():
                parameter.mul_(args.head_init_scale)
    if args.finetune:
        log(utils.load_finetune(student, args.finetune, args.model_key, args.model_prefix))
    log(f"Student {args.model}: {sum(p.numel() for p in student.parameters()):,} parameters")
    # Never slower, and a quarter faster on convolutional networks.
    return student.to(device=device, memory_format=torch.channels_last)


def make_ema(args: argparse.Namespace, student: nn.Module) -> ModelEmaV3 | None:
    if not args.model_ema:
        return None
    return ModelEmaV3(
        student,
        decay=args.model_ema_decay,
        use_warmup=args.model_ema_warmup,
        device=torch.device("cpu") if args.model_ema_force_cpu else None,
    )


def make_criterion(args: argparse.Namespace) -> nn.Module:
    """The loss on labels; where images are mixed, the labels come mixed and smoothed already."""
    if is_mixed(args):
        return SoftTargetCrossEntropy()
    if args.smoothing > 0:
        return LabelSmoothingCrossEntropy(args.smoothing)
    return nn.CrossEntropyLoss()


def make_optimizer(
    args: argparse.Namespace, student: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    keywords = {"eps": args.opt_eps}
    if args.opt_betas:
        keywords["betas"] = args.opt_betas
    try:
        fused = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
        if get_optimizer_class(args.opt, bind_defaults=False) in fused and device.type != "mps":
            keywords["fused"] = True  # one kernel a step, and no wait for fp16's overflow check
        return create_optimizer_v2(
            student,
            opt=args.opt,
            lr=args.lr,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            layer_decay=args.layer_decay if args.layer_decay != 1 else None,
            **keywords,
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--opt {args.opt}: {error}; see timm.optim.list_optimizers()") from error


def make_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    steps = args.epochs * steps_per_epoch
    warmup = args.warmup_steps if args.warmup_steps >= 0 else args.warmup_epochs * steps_per_epoch
    if warmup > steps:
        raise UserError(
            f"--warmup_steps {warmup}: longer than the run of {steps} steps; shorten it"
        )
    decay_end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    log(f"{steps} optimizer steps, {int(warmup)} of them warm-up; learning rate {args.lr:.3g}")
    return Schedule(
        lr=utils.cosine_schedule(args.lr, args.min_lr, steps, int(warmup)),
        weight_decay=utils.cosine_schedule(args.weight_decay, decay_end, steps),
    )


if __name__ == "__main__":
    utils.stop_on_signals()
    sys.exit(main(command_line))
