"""Train a small image classifier, alone or distilled from a large one: a run from top to bottom."""

import os
import signal

import arguments

# Threads of torch that wait for work spin for 10,000 turns and then sleep. By default they spin 30
# times longer, which made a small network 60 times slower on cores that other processes used too;
# threads that sleep at once made it 3 times slower on quiet cores. Measured in docs/benchmarks.md;
# read once, when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if __name__ == "__main__":
    # The imports below take seconds. Ctrl-C ends them without a traceback, and --help and mistyped
    # flags are answered before them.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    arguments.parse_args()

import argparse
import copy
import inspect
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from timm.layers import convert_sync_batchnorm
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import losses
import metrics
import models
import probe
import runtime
import summary
import utils
from arguments import (
    cores_per_process,
    follow_checkpoint,
    is_mixed,
    parse_args,
    teachers_of,
    views_of,
)
from check_data import check_images, read_validation
from checkpoints import (
    EMA_KEYS,
    RAW_KEYS,
    RunState,
    files_of_run,
    load_finetune,
    load_network,
    move_aside,
    newest_checkpoint,
    read_checkpoint,
    saved_args,
)
from datasets import ImageSource, Source
from distillation import (
    DistillationLoss,
    PartlyLabelledLoss,
    SelectClasses,
    StudentWithDistillation,
    names_of_weights,
)
from engine import (
    LoopSettings,
    Schedule,
    TrainedModel,
    cosine_schedule,
    evaluate,
    train_one_epoch,
)
from evaluation import Tempered, calibrate, images_to_calibrate, open_scored
from loaders import Batch, Data, Loader, build_data, build_eval_loader
from logs import History, Recorder, TimeSplit
from runtime import log
from teacher import RunTeacher, fill_store, prepare_teacher
from terminal import MANY_CLASSES
from utils import RandomUse, UserError, name_flags

Part = Callable[[nn.Module], nn.Module]  # which part of a network takes what a loader yields


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    code = 1
    try:
        run(argv)
        code = 0
    except UserError as error:
        where = f" [rank {runtime.rank()}]" if runtime.rank() else ""
        print(f"main.py: error{where}: {error}", file=sys.stderr, flush=True)
        code = 2
    except runtime.Interrupted as stop:
        log(f"Stopped: {stop}")
        runtime.leave_group(0)  # all processes stop together
        return stop.exit_code
    except KeyboardInterrupt:  # the second one: the first asks for a checkpoint
        print("main.py: stopped at once; nothing more was saved", file=sys.stderr, flush=True)
        code = 128 + signal.SIGINT
    except Exception:
        if runtime.world_size() == 1:
            raise
        if not runtime.has_failed():  # else this is the echo of another error, told already
            traceback.print_exc()
    finally:
        runtime.end_workers()
    runtime.leave_group(code)
    return code


def run(argv: list[str] | None) -> None:
    """Connect data, student, teacher and optimizer, then train or evaluate.

    Raises: UserError for whatever the user can correct.
    """
    args = parse_args(argv)
    with name_flags(device="--device"):
        device = runtime.init_process(args.device, args.dist_url)
    if device.type == "cpu":
        runtime.keep_freed_memory()
    elif device.type == "cuda" and args.fast_cuda:
        runtime.allow_fast_kernels()
    if args.resume:
        with name_flags(checkpoint="--resume"):
            checkpoint = read_checkpoint(args.resume)
        args = parse_args(argv, follow_checkpoint(saved_args(checkpoint), args.given, args.eval))
    if arguments.follows_network(args) and not args.resume and "input_size" not in args.given:
        with name_flags(architecture="--model"):
            args.input_size = models.input_config(args.model).get("input_size", args.input_size)
    if args.use_amp and not args.amp_dtype:
        args.amp_dtype = runtime.default_amp_dtype(device)
    if args.sync_bn and device.type != "cuda":
        raise UserError(f"--sync_bn true: works on CUDA only, and this run uses {device}")
    if args.report:
        with name_flags(folder="--report"):
            summary.check_report(Path(args.report))
    if idle := arguments.effects_line(args):
        log(idle)
    if args.eval:
        score_checkpoint(args, checkpoint, device)
        return
    check_optimizer(args)
    with name_flags(folder="--output_dir"):
        lock = claim_output_dir(args)  # held until the end of the run

    log(f"Data {args.data_set}{f' in {args.data_path}' if args.data_path else ''}, on {device}")
    data = build_data(args, device, args.teacher_views, fill=args.teacher_cache_only)
    each = f"batches of {args.batch_size}, {args.num_workers} loader worker(s)"
    if device.type == "cpu":
        threads = runtime.choose_threads(args.batch_size * args.input_size**2)
        each += f", {threads} CPU thread(s)"
    log(
        f"{len(data.train)} images, {len(data.classes)} classes, {args.input_size} pixels; "
        f"{runtime.world_size()} process(es), each with {each}"
    )
    if data.labelled_share == 0:
        log("No image has a label: the student learns from the teacher alone")
    elif data.labelled_share < 1:
        labelled, in_batch = (data.labelled_share * n for n in (len(data.train), args.batch_size))
        log(
            f"{labelled:,.0f} of the images have a label, {in_batch:.3g} per batch on average; the "
            "others are only distilled"
        )
    if device.type == "cuda" and (cores := cores_per_process()) < 2:
        log(f"Warning: {cores:.1f} cores per process; see docs/distributed.md for SLURM's setting")
    if args.check_data:
        check_images([data.train, data.val], args.num_workers)
        if data.val_loader is not None:
            data.val_loader.is_read = True
    settings = loop_settings(args, device)
    if args.teacher_cache_only:
        teacher = prepare_teacher(args, settings, data)
        fill_store(teacher, data, settings, views_of(args))
        return
    # One for all processes, whatever each of them sees in the folder.
    resumed = args.resume or runtime.from_main(lambda: run_to_resume(args))
    student = make_student(args, device, data.classes, args.pretrained and not resumed)
    if args.lr is None:
        args.lr = probe.default_lr(student)
    ema = make_ema(args, student)
    teacher = prepare_teacher(args, settings, data)
    with (
        name_flags(output="--output_dir", cache="--teacher_cache", log="--log_dir"),
        explain_batch_norm(),
    ):
        train(args, settings, data, student, ema, teacher, resumed)
    if lock is not None:
        lock.close()


@contextmanager
def explain_batch_norm() -> Iterator[None]:
    """Say what to do where BatchNorm has a single value per channel to normalise."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "--batch_size 1: this model's BatchNorm layers cannot train on a single image of this "
            "size; pass --batch_size 2 or more, or a larger --input_size"
        ) from error


def claim_output_dir(args: argparse.Namespace) -> FileIO | None:
    """Prepare --output_dir for this run alone; returns the lock, or None without a folder."""
    if not args.output_dir:
        if not args.teacher_cache_only:
            log("Nothing will be saved: pass --output_dir FOLDER to keep checkpoints and log.txt")
        return None
    folder = Path(args.output_dir)
    utils.make_folder(folder)
    files = [("teacher_path", teacher.path) for teacher in teachers_of(args)]
    for flag, path in [*files, ("finetune", args.finetune)]:
        if path and Path(path).resolve() in [f.resolve() for f in files_of_run(folder)]:
            raise UserError(
                f"--{flag} {path}: lies in --output_dir {folder}, where this run would overwrite "
                "it; pass another --output_dir"
            )
    lock = runtime.lock_folder(folder) if runtime.is_main_process() else None
    if not args.auto_resume and not args.resume and runtime.is_main_process():
        move_aside(folder)
    runtime.barrier()
    return lock


def score_checkpoint(args: argparse.Namespace, checkpoint: Any, device: torch.device) -> None:
    """`--eval true`: score the weights of a checkpoint as the checkpoint says.

    Model, data, normalisation and crop are those of the training run where no flag says otherwise.
    Classes are matched by name; data that has only some of the classes is scored on those.
    """
    config, val, classes, positions, saved = open_scored(args, checkpoint)
    log(
        f"Data {args.data_set}{f' in {args.data_path}' if args.data_path else ''}: {len(val)} "
        f"{'held-out ' if args.holdout else ''}images, {len(val.classes)} classes; "
        f"{config['input_size']} pixels, on {device}"
    )
    for name, (old, new) in utils.changes(saved, config).items():
        log(f"Warning: scored with {name} {new}, but the checkpoint was trained with {old}")
    if len(val.classes) < len(classes):
        log(f"Scored on {len(val.classes)} of the {len(classes)} classes of the checkpoint")

    if args.check_data:
        check_images([val], args.num_workers)
    settings = loop_settings(args, device)
    loader = build_eval_loader(args, val, config, device)
    held_out = None
    if args.calibrate:
        every = argparse.Namespace(**{**vars(args), "dist_eval": False})  # on each process
        held_out = build_eval_loader(every, images_to_calibrate(args, checkpoint), config, device)
    student = make_student(args, device, classes)
    network = SelectClasses(student, positions)
    reports = {}
    for suffix, keys in (("", RAW_KEYS), ("_ema", EMA_KEYS)):
        is_ema, is_there = bool(suffix), any(checkpoint.get(key) for key in keys)
        if args.use_ema == str(not is_ema).lower() or (is_ema and not is_there):
            continue
        with name_flags(checkpoint="--resume"):
            load_network(checkpoint, args.resume, student, keys)
        answers: list[metrics.Answers] = []
        scores = evaluate(loader, network, settings, args.dist_eval, answers=answers)
        found = metrics.report(metrics.join(answers, args.dist_eval), val.classes)
        if held_out is not None:
            temperature = calibrate(held_out, student, settings)
            found["temperature"] = temperature
            scaled = evaluate(loader, Tempered(network, temperature), settings, args.dist_eval)
            scores |= {f"{name}_calibrated": scaled[name] for name in ("loss", "ece")}
            found |= {"nll_calibrated": scaled["loss"], "ece_calibrated": scaled["ece"]}
            log(f"temperature{suffix} {temperature:.4f}")
        for name, value in scores.items():
            if name != "acc5" or len(val.classes) > MANY_CLASSES:
                log(f"test_{name}{suffix} {value:.4f}")
        reports["ema" if is_ema else "student"] = found
        log("\n".join(metrics.report_lines(found)))
    with name_flags(output="--report"):
        summary.write_report(args.report, reports)


def train(
    args: argparse.Namespace,
    settings: LoopSettings,
    data: Data,
    student: nn.Module,
    ema: ModelEmaV3 | None,
    teacher: RunTeacher,
    resumed: str,
) -> None:
    """Train from the checkpoint `resumed`, or from the beginning for '', to the last epoch."""
    loss = make_loss(args, data).to(settings.device)
    trained = models.classifier_of(student) if args.linear_probe else student
    optimizer = make_optimizer(args, trained, settings.device)
    scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.amp_dtype == torch.float16)
    steps = math.ceil(data.train_loader.batches_in_epoch / args.update_freq)
    schedule = make_schedule(args, steps)
    state = RunState(student, ema, optimizer, scaler, vars(args), data.config, data.images)
    with name_flags(checkpoint="--resume" if args.resume else "--output_dir"):
        start = state.resume(resumed, args.start_epoch)
    report_schedule(args, schedule, steps, start * steps, state.changes)
    if state.epoch < 0 and state.progress is None:  # not resumed
        read_validation(data)

    times = TimeSplit(settings.device)
    model: TrainedModel
    features = None
    if args.linear_probe:
        if start < args.epochs:
            features = probe.compute_features(args, settings, data, student)
        model = probe.TrainedClassifier(student, takes_features=features is not None)
    else:
        ddp = exchange_gradients(student, settings.device) if runtime.world_size() > 1 else student
        # The teacher stays outside DDP.
        model = StudentWithDistillation(ddp, teacher.model, partial(times.on_device, "teacher"))
        if args.compile:
            student.compile()
    train_loader: Loader = data.train_loader
    val_loader: Iterable[Batch] | None = data.val_loader
    part: Part = whole
    if features is not None:
        train_loader = features.train
        if features.val is not None:
            val_loader, part = features.val, probe.head_of
    train_loader = times.timed(train_loader)
    first_step = start * steps + (state.progress.updates if state.progress else 0)
    n_parameters = sum(p.numel() for p in student.parameters() if p.requires_grad)

    def after_update(history: History, updates: int) -> None:
        is_due = args.save_ckpt_steps and updates % args.save_ckpt_steps == 0
        if not (is_due or history.stop) or updates == history.updates:
            return  # the last step of an epoch is followed by the checkpoint of the epoch
        teacher.flush()
        with times.spent_on("saving"):
            saved = state.save_inside_epoch(history.flush(updates))
        if history.stop:
            raise runtime.Interrupted(
                history.stop, f"step {updates} of epoch {history.epoch}", saved
            )

    with name_flags(folder="--log_dir"):
        recorder = Recorder.open(vars(args), settings.device, data.config, start, first_step)
    answers: dict[str, list[metrics.Answers]] = {}
    with recorder:
        for epoch in range(start, args.epochs):
            began = time.perf_counter()
            stats = train_one_epoch(
                model,
                loss,
                train_loader,
                optimizer,
                scaler,
                schedule,
                epoch,
                settings,
                ema=ema,
                recorder=recorder,
                progress=state.progress,
                after_update=after_update,
            )
            steps_now = (epoch + 1) * steps - first_step if epoch == start else steps
            rate = steps_now * recorder.images_per_step / (time.perf_counter() - began)
            teacher.flush()
            record = {"epoch": epoch} | {f"train_{name}": value for name, value in stats.items()}
            is_last = epoch + 1 == args.epochs
            is_due = (epoch + 1) % args.eval_freq == 0 or is_last
            if val_loader is not None and is_due and not args.disable_eval:
                collected = answers if is_last else None
                with times.spent_on("evaluation"):
                    record |= evaluate_all(
                        args, val_loader, student, ema, settings, teacher, part, collected
                    )
            record |= teacher.scores
            improved = state.finish_epoch(epoch, record)
            recorder.write(
                record | {"n_parameters": n_parameters},
                (epoch + 1) * steps,
                state.best.get("best"),
                rate,
            )
            if state.folder is not None:
                is_kept = (epoch + 1) % args.save_ckpt_freq == 0 or is_last
                signalled = runtime.stop_requested(settings.device)
                with times.spent_on("saving"):
                    state.save(improved, is_kept or bool(signalled), args.save_ckpt_num)
                if signalled and not is_last:
                    raise runtime.Interrupted(signalled, f"epoch {epoch}", state.folder)
        teacher.warn_if_below(state.scores)
        trained = (args.epochs * steps - first_step) * recorder.images_per_step
        summary.conclude(args, data, state, teacher, times, recorder, answers, trained)


def exchange_gradients(student: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The student with gradients averaged over the processes after each backward pass.

    Buffers are not sent with each forward pass: rank 0 computes with its own, as it would with
    them sent, and `evaluate_all` and the checkpoints hand these to all ranks.
    """
    keywords: dict[str, Any] = {"gradient_as_bucket_view": True}
    if device.type == "cuda":
        keywords["device_ids"] = [device]
    # Newer than the oldest torch that we support.
    known = inspect.signature(DistributedDataParallel).parameters
    newer = {"forward_sync_buffers": False, "batched_grad_copy": True}
    keywords |= {name: value for name, value in newer.items() if name in known}
    return DistributedDataParallel(student, **keywords)


def whole(network: nn.Module) -> nn.Module:
    """The part of a network that takes images."""
    return network


def evaluate_all(
    args: argparse.Namespace,
    loader: Iterable[Batch],
    student: nn.Module,
    ema: ModelEmaV3 | None,
    settings: LoopSettings,
    teacher: RunTeacher | None = None,
    part: Part = whole,
    answers: dict[str, list[metrics.Answers]] | None = None,
) -> dict[str, float]:
    """Score the student, and its EMA where asked: test_loss, test_acc1, test_acc5, …_ema.

    Where the teacher was scored on the same images also test_agreement and test_kl.

    Args:
        part: which part of a network takes what the loader yields, such as probe.head_of.
        answers: filled with the answers of 'student' and 'ema'.
    """
    teacher_logits = teacher.logits if teacher else None

    def score(model: nn.Module, name: str) -> dict[str, float]:
        if runtime.world_size() > 1:
            distribute_bn(model, runtime.world_size())  # every rank scores what rank 0 will save
        collected = None if answers is None else answers.setdefault(name, [])
        return evaluate(
            loader, part(model), settings, args.dist_eval, teacher_logits, answers=collected
        )

    record = {f"test_{name}": value for name, value in score(student, "student").items()}
    if ema is not None and args.model_ema_eval:
        averaged = ema.module
        if args.model_ema_force_cpu:
            averaged = copy.deepcopy(averaged).to(settings.device)
        record |= {f"test_{name}_ema": value for name, value in score(averaged, "ema").items()}
    return record


def loop_settings(args: argparse.Namespace, device: torch.device) -> LoopSettings:
    """What stays the same over the epochs of a run."""
    dtype = amp_dtype(args, device)
    return LoopSettings(device, dtype, args.update_freq, args.clip_grad, args.seed)


def amp_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None without --use_amp."""
    if not args.use_amp:
        return None
    name = args.amp_dtype
    if device.type == "cpu" and name == "float16":
        raise UserError("--amp_dtype float16: the CPU trains in bfloat16; leave the flag out")
    return getattr(torch, name)


def make_student(
    args: argparse.Namespace,
    device: torch.device,
    classes: Sequence[str],
    pretrained: bool = False,
) -> nn.Module:
    """The network to train, on the device.

    Its initial weights are seeded, those of --finetune, or for `pretrained` those of timm.
    """
    utils.seed_rng(device, RandomUse.WEIGHTS, args.seed)
    with name_flags(architecture="--model", checkpoint="--finetune"):
        student = models.create_model(
            args.model,
            len(classes),
            args.input_size,
            args.drop_path,
            pretrained=pretrained,
        )
        origin = ""
        if pretrained:
            # Else timm would keep a classifier of as many other classes.
            is_kept = names_of_weights(args.model, classes) == list(classes)
            if not is_kept:
                student.reset_classifier(len(classes))  # type: ignore[operator]
            classifier = "classifier of the same classes" if is_kept else "new classifier"
            origin = f" (timm's pre-trained weights, {classifier})"
        if args.head_init_scale != 1:
            scaled = list(models.classifier_of(student).parameters())
            if not scaled:
                raise UserError(
                    f"--head_init_scale {args.head_init_scale}: --model {args.model} does not tell "
                    "its classifier; add a method get_classifier, or remove the flag"
                )
            with torch.no_grad():
                for parameter in scaled:
                    parameter.mul_(args.head_init_scale)
        if args.finetune:
            log(load_finetune(student, args.finetune, args.model_key, args.model_prefix, classes))
        if args.linear_probe:
            probe.freeze_backbone(student, args.input_size)
    log(f"Model {args.model}: {sum(p.numel() for p in student.parameters()):,} parameters{origin}")
    if args.sync_bn and runtime.world_size() > 1:
        student = convert_sync_batchnorm(student)
    # Never slower, and a quarter faster on convolutional networks.
    return student.to(device).to(memory_format=torch.channels_last)


def run_to_resume(args: argparse.Namespace) -> str:
    """The newest checkpoint of an earlier run in --output_dir; '' where none is to be resumed."""
    return newest_checkpoint(Path(args.output_dir)) if args.output_dir and args.auto_resume else ""


def make_ema(args: argparse.Namespace, student: nn.Module) -> ModelEmaV3 | None:
    """A moving average of the student's weights, or None without --model_ema."""
    if not args.model_ema:
        return None
    return ModelEmaV3(
        student,
        decay=args.model_ema_decay,
        use_warmup=args.model_ema_warmup,
        device=torch.device("cpu") if args.model_ema_force_cpu else None,
    )


def make_loss(args: argparse.Namespace, data: Data) -> DistillationLoss:
    """The loss of a training step: on labels, and on the teacher's logits with --kd true."""
    alpha, temperature = args.kd_alpha if args.kd else 0.0, args.kd_temperature
    weights = class_weights(args, data.train)
    if data.labelled_share == 1:
        return DistillationLoss(make_criterion(args, weights), alpha, temperature)
    images = args.batch_size * args.update_freq * runtime.world_size()
    criterion = nn.CrossEntropyLoss(weight=weights)  # labels arrive mixed and smoothed
    return PartlyLabelledLoss(criterion, alpha, temperature, data.labelled_share, images)


def class_weights(args: argparse.Namespace, train: Source) -> torch.Tensor | None:
    """The weight of each class in the label loss; None where all are the same.

    Raises: UserError for a stream, whose labels are not known.
    """
    if args.class_weights == "none":
        return None
    if not isinstance(train, ImageSource):
        raise UserError(
            f"--class_weights {args.class_weights}: the images of each class must be counted, and "
            f"the stream {args.data_set} does not tell its labels; use a folder, or remove the flag"
        )
    labelled = train.targets[train.targets < len(train.classes)]
    return losses.balanced_weights(labelled, len(train.classes))


def make_criterion(args: argparse.Namespace, weights: torch.Tensor | None = None) -> nn.Module:
    """The loss on labels; where images are mixed, labels arrive mixed and smoothed already.

    With weights w of the classes, it is torch's CrossEntropyLoss(weight=w), with l = -log softmax
    of the logits, smoothing s and C classes. For labels y of a batch of B images, a weighted mean:

        (1-s) * sum_i w[y_i] l_i[y_i] / W + (s/C) * sum_i sum_c w[c] l_i[c] / W,  W = sum_i w[y_i]

    and for mixed and smoothed labels p, of which torch divides by the number of images:

        sum_i sum_c w[c] p_i[c] l_i[c] / B

    W belongs to one batch of one process. With several processes or --update_freq, the gradient is
    the mean of those of the batches, each of which weighs the same: for labels that are not mixed,
    an image then counts w[y] / W of its own batch, not of the whole step.

    Args:
        weights: (C,) float32; None for plain means.
    """
    if weights is not None:
        smoothing = 0.0 if is_mixed(args) else args.smoothing
        return nn.CrossEntropyLoss(weight=weights, label_smoothing=smoothing)
    if is_mixed(args):
        return SoftTargetCrossEntropy()
    if args.smoothing > 0:
        return LabelSmoothingCrossEntropy(args.smoothing)
    return nn.CrossEntropyLoss()


def check_optimizer(args: argparse.Namespace) -> None:
    """Raise UserError for an optimizer that does not exist, or that ignores a flag that is given.

    timm drops such flags without a word.
    """
    if args.teacher_cache_only:
        return
    try:
        info = get_optimizer_info(args.opt.split("_")[-1])  # lookahead_adamw is an adamw
    except ValueError as error:
        raise UserError(f"--opt {args.opt}: {error}; see timm.optim.list_optimizers()") from error
    takes = {"opt_betas": info.has_betas, "opt_eps": info.has_eps, "momentum": info.has_momentum}
    for flag in [flag for flag in takes if flag in args.given and not takes[flag]]:
        raise UserError(f"--{flag}: --opt {args.opt} has no such setting; remove the flag")
    if args.opt_betas and info.has_betas and len(args.opt_betas) != info.num_betas:
        raise UserError(
            f"--opt_betas: --opt {args.opt} needs {info.num_betas} numbers, not "
            f"{len(args.opt_betas)}; pass {info.num_betas}"
        )


def make_optimizer(
    args: argparse.Namespace, network: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    """timm's optimizer of that name, for a network or part of one; fused where torch has that."""
    keywords = {"eps": args.opt_eps}
    if args.opt_betas:
        keywords["betas"] = args.opt_betas
    try:
        fused = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
        if get_optimizer_class(args.opt, bind_defaults=False) in fused and device.type != "mps":
            keywords["fused"] = True  # one kernel per step, and no wait for fp16's overflow check
        optimizer = create_optimizer_v2(
            network,
            opt=args.opt,
            lr=args.lr,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            layer_decay=args.layer_decay if args.layer_decay != 1 else None,
            **keywords,
        )
        if isinstance(optimizer, torch.optim.SGD):
            begin_momentum(optimizer)
        return optimizer
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--opt {args.opt}: {error}; see timm.optim.list_optimizers()") from error


def begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Give SGD its momentum from the start: zeros, with which the first step is the same.

    Else the fused kernel makes the buffers in the first step, uninitialised, and leaves them so
    where the gradient scaler skips that step.
    """
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def make_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """Learning rate and weight decay of every optimizer step of the run."""
    steps, warmup = args.epochs * steps_per_epoch, warmup_steps(args, steps_per_epoch)
    if args.min_lr > args.lr:
        raise UserError(
            f"--min_lr {args.min_lr}: above {args.lr:.3g}, the peak that was chosen by default; "
            "pass a smaller --min_lr, or a --lr"
        )
    if warmup > steps:
        raise UserError(
            f"--warmup_steps {warmup}: longer than the run of {steps} steps; shorten it"
        )
    decay_end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    return Schedule(
        lr=cosine_schedule(args.lr, args.min_lr, steps, warmup),
        weight_decay=cosine_schedule(args.weight_decay, decay_end, steps),
    )


def warmup_steps(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """Optimizer steps of linear warm-up."""
    return int(
        args.warmup_steps if args.warmup_steps >= 0 else args.warmup_epochs * steps_per_epoch
    )


def report_schedule(
    args: argparse.Namespace,
    schedule: Schedule,
    steps_per_epoch: int,
    first_step: int,
    changes: Mapping[str, tuple[Any, Any]],
) -> None:
    """Print the schedule, and what another recipe does to it where a run is resumed."""
    log(
        f"{len(schedule.lr)} optimizer steps, {warmup_steps(args, steps_per_epoch)} of them "
        f"warm-up; learning rate {args.lr:.3g}"
    )
    if changes.keys() & {"epochs", "lr", "min_lr", "warmup_epochs", "warmup_steps"}:
        old_values = {name: old for name, (old, _) in changes.items()}
        before = make_schedule(argparse.Namespace(**{**vars(args), **old_values}), steps_per_epoch)
        old = before.lr[first_step] if first_step < len(before.lr) else before.lr[-1]
        log(
            f"Warning: the learning rate goes on from {schedule.lr[first_step]:.3g} at step "
            f"{first_step}; with the earlier flags it would be {old:.3g}"
        )


if __name__ == "__main__":
    runtime.stop_on_signals()
    sys.exit(main())
