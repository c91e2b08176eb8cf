"""Train a small image classifier, alone or distilled from a large one: a run from top to bottom."""

import gc
import os
import signal

import utils
from arguments.parsing import parse_args

utils.let_threads_sleep()  # before torch is imported

if __name__ == "__main__":
    # The imports below take seconds. Ctrl-C ends them without a traceback, and --help and mistyped
    # flags are answered before them.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    utils.open_streams()
    parse_args()
    gc.disable()  # until main: imports leave nothing to collect, and looking takes half a second

import argparse
import copy
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed
from timm.utils import distribute_bn
from torch import nn

import models
from arguments.checks import effects_line
from arguments.defaults import cores_per_process
from arguments.derived import views_of
from arguments.parsing import follow_checkpoint
from data.checks import read_validation
from data.loaders import Batch, Loader
from data.sources import ImageSource
from datasets import Data, build_data, check_outputs
from distillation import DistillationLoss, StudentWithDistillation
from engine import TrainedModel, evaluate, train_one_epoch
from evaluation import score_checkpoint
from models.checkpoint import read_checkpoint
from reporting import metrics, summary
from reporting.recorder import Recorder
from reporting.summary import (
    Outcome,
    costs_of,
    images_scored,
    lines_of,
    settings_of,
    show_mistakes,
    write_report,
    write_summary,
)
from reporting.timing import TimedLoader, TimeSplit
from runtime import distributed, signals
from runtime.device import (
    choose_kernels,
    choose_threads,
    default_device,
    find_device,
    keep_freed_memory,
    peak_memory,
)
from runtime.distributed import log
from teacher.manifest import hashes_of_teachers
from teacher.prepare import RunTeacher, fill_store, prepare_teacher
from training import linear_probe
from training.checkpoints import RunState, check_resumable, claim_output_dir, newest_checkpoint
from training.criterion import make_loss
from training.history import History
from training.optimizer import (
    Schedule,
    check_optimizer,
    default_lr,
    make_optimizer,
    make_schedule,
    report_schedule,
)
from training.settings import LoopSettings, loop_settings
from training.student import (
    ModelEma,
    check_architectures,
    explain_batch_norm,
    make_ema,
    make_student,
)
from utils import UserError, flags_for, freeze_imports


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    freeze_imports()
    code = 1
    try:
        run(argv)
        code = 0
    except UserError as error:
        where = f" [rank {distributed.rank()}]" if distributed.rank() else ""
        print(f"main.py: error{where}: {error}", file=sys.stderr, flush=True)
        code = 2
    except signals.Interrupted as stop:
        log(f"Stopped: {stop}")
        distributed.leave_group(0)  # all processes stop together
        return stop.exit_code
    except KeyboardInterrupt:  # the second one: the first asks for a checkpoint
        print("main.py: stopped at once; nothing more was saved", file=sys.stderr, flush=True)
        code = 128 + signal.SIGINT
    except Exception:
        if distributed.world_size() == 1:
            raise
        if not distributed.has_failed():  # else this is the echo of an error that was printed
            traceback.print_exc()
    finally:
        signals.end_workers()
    distributed.leave_group(code)
    return code


def run(argv: list[str] | None) -> None:
    """Connect data, student, teacher and optimizer, then train or evaluate.

    Raises: UserError for whatever the user can correct.
    """
    args = parse_args(argv)
    with flags_for(device="--device"):
        device = find_device(args.device or default_device())
        distributed.init_process(device, args.dist_url)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        choose_kernels(args.fast_cuda)
    if args.resume:
        with flags_for(checkpoint="--resume"):
            checkpoint = read_checkpoint(args.resume)
            if not args.eval:
                check_resumable(checkpoint)
        args = parse_args(argv, follow_checkpoint(checkpoint.run_args, args.given, args.eval))
    check_architectures(args)
    if args.sync_bn and device.type != "cuda":
        raise UserError(f"--sync_bn true: works on CUDA only, and this run uses {device}")
    if args.report:
        with flags_for(folder="--report"):
            summary.check_report(Path(args.report))
    if idle := effects_line(args):
        log(idle)
    if args.eval:
        score_checkpoint(args, checkpoint, device)
        distributed.require_output("the scores")
        return
    check_optimizer(args)
    check_outputs(args)
    with flags_for(folder="--output_dir"):
        lock = claim_output_dir(args)  # held until the end of the run

    data = open_data(args, device)
    settings = loop_settings(args, device)
    if args.teacher_cache_only:
        teacher = prepare_teacher(args, settings, data)
        fill_store(teacher, data, settings, views_of(args))
        return
    # One for all processes, whatever each of them sees in the folder.
    resumed = args.resume or distributed.from_main(lambda: run_to_resume(args))
    student = make_student(args, device, data.classes, args.pretrained and not resumed)
    if args.lr is None:
        args.lr = default_lr(args, student, len(data.train))
    ema = make_ema(args, student)
    teacher = prepare_teacher(args, settings, data)
    teacher.warn_if_smaller(student)
    with (
        flags_for(output="--output_dir", cache="--teacher_cache", log="--log_dir"),
        explain_batch_norm(),
    ):
        training = prepare_training(args, settings, data, student, ema, teacher, resumed)
        train(args, settings, data, training, teacher)
    if lock is not None:
        lock.close()


def open_data(args: argparse.Namespace, device: torch.device) -> Data:
    """Open the images of a run, and print what they are and how they are loaded. Collective."""
    log(f"Data {args.data_set}{f' in {args.data_path}' if args.data_path else ''}, on {device}")
    data = build_data(args, device)
    each = f"batches of {args.batch_size}, {args.num_workers} loader worker(s)"
    if device.type == "cpu":
        threads = choose_threads(args.batch_size * args.input_size**2)
        each += f", {threads} CPU thread(s)"
    log(
        f"{len(data.train)} images, {len(data.classes)} classes, {args.input_size} pixels; "
        f"{distributed.world_size()} process(es), each with {each}"
    )
    if data.labeled_share == 0:
        log("No image has a label: the student learns from the teacher alone")
    elif data.labeled_share < 1:
        labeled, in_batch = (data.labeled_share * n for n in (len(data.train), args.batch_size))
        log(
            f"{labeled:,.0f} images are labeled ({in_batch:.3g} per batch on average); the rest "
            "contribute to the distillation loss only"
        )
    if device.type == "cuda" and (cores := cores_per_process()) < 2:
        log(f"Warning: {cores:.1f} cores per process; see docs/distributed.md for SLURM's setting")
    return data


@dataclass
class Training:
    """What the loop of a run works with."""

    state: RunState
    model: TrainedModel
    loss: DistillationLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    times: TimeSplit
    train_loader: Loader
    val_loader: Iterable[Batch] | None
    part: Callable[[nn.Module], nn.Module] | None  # takes what val_loader yields; None: all
    start: int  # the first epoch
    steps: int  # optimizer steps of an epoch
    first_step: int  # of the run, since its beginning


def prepare_training(
    args: argparse.Namespace,
    settings: LoopSettings,
    data: Data,
    student: nn.Module,
    ema: ModelEma | None,
    teacher: RunTeacher,
    resumed: str,
) -> Training:
    """Make what trains the student, and restore it from a checkpoint.

    Args:
        resumed: the checkpoint; '' to start from the beginning.
    """
    loss = make_loss(args, data).to(settings.device)
    network = models.classifier_of(student) if args.linear_probe else student
    optimizer = make_optimizer(args, network, settings.device)
    scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.amp_dtype == torch.float16)
    steps = math.ceil(data.train_loader.batches_in_epoch / args.update_freq)
    schedule = make_schedule(args, steps)
    noted = vars(args) | {"teacher_hashes": hashes_of_teachers(args)}
    state = RunState(student, ema, optimizer, scaler, noted, data.config, data.images)
    with flags_for(checkpoint="--resume" if args.resume else "--output_dir"):
        start = state.resume(resumed, args.start_epoch)
    report_schedule(args, schedule, steps, start * steps, state.changes)
    if state.epoch < 0 and state.progress is None:  # not resumed
        read_validation(data.val_loader, data.val)

    times = TimeSplit(settings.device)
    model: TrainedModel
    train_loader: Loader = data.train_loader
    val_loader: Iterable[Batch] | None = data.val_loader
    part = None
    if args.linear_probe:
        features = None
        if start < args.epochs:
            features = linear_probe.compute_features(args, settings, data, student)
        model = linear_probe.TrainedClassifier(student, takes_features=features is not None)
        if features is not None:
            train_loader = features.train
            if features.val is not None:
                val_loader, part = features.val, linear_probe.head_of
    else:
        zeros = torch.zeros(2, 3, args.input_size, args.input_size, device=settings.device)
        is_alone = distributed.world_size() == 1
        exchanged = student if is_alone else distributed.exchange_gradients(student, zeros)
        # The teacher stays outside DDP.
        model = StudentWithDistillation(
            exchanged, teacher.model, partial(times.on_device, "teacher")
        )
        if args.compile:
            student.compile()
    first_step = start * steps + (state.progress.updates if state.progress else 0)
    loaders = TimedLoader(train_loader, times), val_loader, part
    made = state, model, loss, optimizer, scaler, schedule, times
    return Training(*made, *loaders, start, steps, first_step)


def train(
    args: argparse.Namespace,
    settings: LoopSettings,
    data: Data,
    training: Training,
    teacher: RunTeacher,
) -> None:
    """Train from where `training` stands to the last epoch, and report how the run ended."""
    state, times, steps = training.state, training.times, training.steps
    n_parameters = sum(p.numel() for p in state.student.parameters() if p.requires_grad)
    with flags_for(folder="--log_dir"):
        recorder = Recorder.open(
            state.args, settings.device, data.config, training.start, training.first_step
        )
    answers: dict[str, list[metrics.Answers]] = {}
    with closing(recorder), signals.stop_on_signals():
        for epoch in range(training.start, args.epochs):
            began = time.perf_counter()
            training.loss.start_epoch(epoch)
            stats = train_one_epoch(
                training.model,
                training.loss,
                training.train_loader,
                training.optimizer,
                training.scaler,
                training.schedule,
                epoch,
                settings,
                ema=state.ema,
                recorder=recorder,
                progress=state.progress,
                after_update=partial(save_inside_epoch, args.save_ckpt_steps, training, teacher),
            )
            done = (epoch + 1) * steps
            images = (done - max(epoch * steps, training.first_step)) * recorder.images_per_step
            rate = images / (time.perf_counter() - began)
            teacher.flush()
            record = {"epoch": epoch} | {f"train_{name}": value for name, value in stats.items()}
            is_last = epoch + 1 == args.epochs
            is_due = (epoch + 1) % args.eval_freq == 0 or is_last
            if training.val_loader is not None and is_due and not args.disable_eval:
                with times.spent_on("evaluation"):
                    scores, answers = evaluate_all(args, settings, training, teacher, not is_last)
                record |= scores
            record |= teacher.scores
            improved = state.finish_epoch(epoch, record)
            record |= {"n_parameters": n_parameters}
            recorder.write(record, done, state.best.get("best"), rate)
            if state.folder is not None:
                is_kept = (epoch + 1) % args.save_ckpt_freq == 0 or is_last
                signalled = distributed.stop_requested(settings.device)
                with times.spent_on("saving"):
                    state.save(improved, is_kept or bool(signalled), args.save_ckpt_num)
                if signalled and not is_last:
                    raise signals.Interrupted(signalled, f"epoch {epoch}", state.folder)
        teacher.warn_if_below(state.scores)
        summarize(args, settings, data, training, teacher, recorder, answers)


def save_inside_epoch(
    every: int, training: Training, teacher: RunTeacher, history: History, updates: int
) -> None:
    """After an optimizer step, write a checkpoint every few steps, or after a signal.

    Args:
        every: steps; 0 for no checkpoint without a signal.
    Raises: runtime.signals.Interrupted after a signal.
    """
    if updates == history.updates:  # the evaluation and the checkpoint of the epoch follow
        training.state.progress = history.flush(updates)
        return
    if not (every and updates % every == 0 or history.stop):
        return
    teacher.flush()
    with training.times.spent_on("saving"):
        saved = training.state.save_inside_epoch(history.flush(updates))
    if history.stop:
        raise signals.Interrupted(history.stop, f"step {updates} of epoch {history.epoch}", saved)


def evaluate_all(
    args: argparse.Namespace,
    settings: LoopSettings,
    training: Training,
    teacher: RunTeacher,
    stops: bool,
) -> tuple[dict[str, float], dict[str, list[metrics.Answers]]]:
    """Score the student, and its EMA with --model_ema_eval.

    Args:
        stops: whether a signal ends the evaluation, which the resumed run then begins again.
    Returns: test_loss, test_acc1, test_acc5, test_ece, and of the EMA the same names with _ema; if
        the teacher was scored on the same images, also test_agreement and test_kl. And the answers
        of 'student' and 'ema'.
    Raises: runtime.signals.Interrupted after a signal.
    """
    assert training.val_loader is not None
    networks = {"student": training.state.student}
    ema = training.state.ema
    if ema is not None and args.model_ema_eval:
        networks["ema"] = ema.average
    record: dict[str, float] = {}
    answers = {}
    for name, network in networks.items():
        if name == "ema" and args.model_ema_force_cpu:
            network = copy.deepcopy(network).to(settings.device)
        if distributed.world_size() > 1:  # every rank scores what rank 0 will save
            distribute_bn(network, distributed.world_size())
        part = training.part(network) if training.part else network
        loader = training.val_loader
        loader = signals.until_signal(loader) if stops else loader
        scored = evaluate(loader, part, settings, args.dist_eval, teacher.logits)
        # Each process stops at a batch of its own, so one question per evaluation is enough.
        if stops and (number := distributed.stop_requested(settings.device)):
            state = training.state
            assert state.progress is not None  # all steps of the epoch
            saved = state.save_inside_epoch(state.progress)
            raise signals.Interrupted(number, f"the last step of epoch {state.epoch + 1}", saved)
        suffix = "" if name == "student" else f"_{name}"
        record |= {f"test_{score}{suffix}": value for score, value in scored.scores.items()}
        answers[name] = scored.answers
    return record, answers


def run_to_resume(args: argparse.Namespace) -> str:
    """The newest checkpoint of an earlier run in --output_dir; '' if none is to be resumed."""
    return newest_checkpoint(Path(args.output_dir)) if args.output_dir and args.auto_resume else ""


def summarize(
    args: argparse.Namespace,
    settings: LoopSettings,
    data: Data,
    training: Training,
    teacher: RunTeacher,
    recorder: Recorder,
    answers: dict[str, list[metrics.Answers]],
) -> None:
    """Report how a run ended: terminal, summary.json, --report and TensorBoard. Collective.

    Args:
        answers: of the last evaluation, by network; empty if there was none.
    """
    state, board = training.state, recorder.board
    steps = args.epochs * training.steps - training.first_step
    if not steps:  # the run was finished already
        log(state.summary())
        return
    seconds = training.times.parts()
    joined = {name: metrics.join(batches, args.dist_eval) for name, batches in answers.items()}
    if not distributed.is_main_process():
        return
    memory = peak_memory(training.times.device)  # before costs are measured, which takes memory too
    with settings.autocast():  # as the run computes
        costs = costs_of(state.student, teacher.model, data.config["input_size"])
    outcome = Outcome(
        state.scores,
        state.best,
        costs,
        seconds,
        steps * recorder.images_per_step,
        memory,
        {name: metrics.report(of_network, data.classes) for name, of_network in joined.items()},
        images_scored(len(data.val), bool(args.holdout)) if data.val is not None else "",
        is_resumed=training.first_step > args.start_epoch * training.steps,
    )
    if recorder.path is not None:
        write_summary(recorder.path.parent, outcome)
    log("\n".join(lines_of(outcome, vars(args), state.folder, board.folder if board else None)))
    if not joined:
        return
    with flags_for(output="--report"):
        write_report(args.report, outcome.reports)
    if board is not None:
        board.settings(settings_of(vars(args)), outcome.best)
        if isinstance(data.val, ImageSource):
            show_mistakes(data, joined["student"], board)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
