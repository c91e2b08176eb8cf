"""Every flag of main.py: what it takes, its default, its help, what it needs, and its role.

Nothing here imports torch, so that `--help` and a mistyped flag are answered at once.
"""

import argparse
import math
from collections.abc import Callable
from functools import cache
from os.path import expanduser
from typing import Any, NamedTuple, NoReturn

from arguments.derived import FROM_FILES, SMALL, is_mixed, teachers_of
from arguments.kinds import Kind, ShowDefaults, number, str2bool, whole
from utils import UserError

NAME = Kind(str, "NAME")
FILE = Kind(expanduser, "FILE")
FOLDER = Kind(expanduser, "FOLDER")
SWITCH = Kind(str2bool, "true|false")  # alone, the flag means true

WHOLE = Kind(whole, "N", "must be a whole number")
COUNT = Kind(whole, "N", "must be 1 or more", lambda value: value >= 1)
FROM_0 = Kind(whole, "N", "must be 0 or more", lambda value: value >= 0)
FROM_0_OR_UNSET = Kind(whole, "N", "must be 0 or more, or -1 for unset", lambda value: value >= -1)
POSITIVE = Kind(number, "X", "must be above 0 and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Kind(number, "X", "must be 0 or more and finite", lambda x: 0 <= x < math.inf)
SHARE = Kind(number, "X", "must lie in 0…1", lambda value: 0 <= value <= 1)
SHARE_BELOW_1 = Kind(number, "X", "must be 0 or more and below 1", lambda value: 0 <= value < 1)
SHARE_ABOVE_0 = Kind(number, "X", "must be above 0 and at most 1", lambda value: 0 < value <= 1)
PERCENT = Kind(
    number,
    "X",
    "must be 0, or lie in 1…100: it is in percent, so pass 40 for a fraction of 0.4",
    lambda value: value == 0 or 1 <= value <= 100,
)


class Need(NamedTuple):
    """A condition without which a flag has no effect.

    On the command line, a flag without effect is refused. If one of `switches` is there too, as in
    a script that varies the switch, the flag is only reported.
    """

    otherwise: str  # 'without …', 'with …' or 'beside …', which decides the remedy
    holds: Callable[[argparse.Namespace], Any]  # true if the flag has an effect
    switches: tuple[str, ...] = ()


def on(flag: str) -> Need:
    """A switch must be true."""
    return Need(f"without --{flag} true", lambda a: getattr(a, flag), (flag,))


def off(flag: str) -> Need:
    """A switch must be false."""
    return Need(f"with --{flag} true", lambda a: not getattr(a, flag), (flag,))


def given(flag: str, metavar: str) -> Need:
    """A flag must name a file or a folder."""
    return Need(f"without --{flag} {metavar}", lambda a: getattr(a, flag))


# Needs of several flags; what a single flag needs stands beside that flag.
TRAINING = off("eval")
STUDENT = off("teacher_cache_only")
ALL_LAYERS = off("linear_probe")
EVALUATION = off("disable_eval")
WITH_KD = on("kd")
WITH_EMA = on("model_ema")
ASKED = Need("with --kd_alpha 0", lambda a: not a.kd or a.kd_alpha > 0, ("kd_alpha",))
KD_OR_EVAL = Need("without --kd true or --eval true", lambda a: a.kd or a.eval, ("kd",))
CACHE = given("teacher_cache", "FOLDER")
FINETUNE = given("finetune", "FILE")
OUTPUT = given("output_dir", "FOLDER")
SAVING = Need("with --save_ckpt false", lambda a: a.save_ckpt, ("save_ckpt",))
USES_LABELS = Need(
    "with --kd_alpha 1, which ignores labels", lambda a: not a.kd or a.kd_alpha < 1, ("kd_alpha",)
)
ERASED = Need("with --reprob 0", lambda a: a.reprob > 0, ("reprob",))
RATIOS = ("mixup", "cutmix", "cutmix_minmax")
MIXED = Need("without --mixup or --cutmix", is_mixed, RATIOS)
BOTH_MIXES = Need(
    "without both --mixup and --cutmix",
    lambda a: a.mixup > 0 and (a.cutmix > 0 or a.cutmix_minmax),
    RATIOS,
)
INTERPOLATED = Need(
    f"with --aa none and images below {SMALL} pixels",
    lambda a: a.aa or a.input_size >= SMALL,
    ("aa", "input_size"),
)
NOT_INCLUDED = Need("beside --data_set DIGITS", lambda a: a.data_set != "DIGITS")
OWN_IMAGES = Need("without --data_set image_folder or tars", lambda a: a.data_set in FROM_FILES)
NO_HOLDOUT = Need("beside --holdout", lambda a: not a.holdout)
SOMETHING_SCORED = Need(
    "with --disable_eval true", lambda a: not a.disable_eval or teachers_of(a), ("disable_eval",)
)

# The role of a flag: what a resumed run and compare.py make of it.
RECIPE = "recipe"  # what a run computes: follows the checkpoint, and a change is reported
REPEAT = "repeat"  # follows the checkpoint; compare.py takes runs that differ in it for equal
DATA = "data"  # names the data: a checkpoint knows its data by its contents, which may have moved
VALIDATION = "validation data"  # the same, and these images score students and teachers
MACHINE = "machine"  # where a run computes and what it writes: neither followed nor compared

# What a teacher cache makes of a flag. A new flag that changes what the teacher is shown or what is
# stored of its answers needs one of these.
COMPARED = "compared"  # the manifest of the cache holds its value
IF_MIXED = "compared if images are mixed"
FOLLOWED = "followed"  # the manifest holds what follows from the flag, such as the file's hash


class Flag(NamedTuple):
    """One flag."""

    name: str
    kind: Kind
    default: Any
    help: str
    group: str  # title in --help
    needs: tuple[Need, ...]  # without one of them, the flag is refused
    role: str
    cache: str
    nargs: int | str | None
    known_as: str  # what other scripts call it, separated by blanks


FLAGS: dict[str, Flag] = {}  # by name, in the order of --help


def group(title: str, *common: Need, role: str = RECIPE, cache: str = "") -> Callable[..., None]:
    """A function that declares flags of one group of --help, with what they have in common."""

    def declare(
        name: str,
        kind: Kind | tuple[str, ...],
        default: Any,
        *needs: Need,
        help: str,
        role: str = role,
        cache: str = cache,
        nargs: int | str | None = None,
        known_as: str = "",
    ) -> None:
        kind = kind if isinstance(kind, Kind) else Kind(str, "NAME", choices=kind)
        rest = title, common + needs, role, cache, nargs, known_as
        FLAGS[name] = Flag(name, kind, default, help, *rest)

    return declare


AUGMENTATION = "augmentation of training images"
MIXING = "mixup and cutmix (student and teacher see the same mixed images)"

# One paragraph per flag: what the program reads, then the help; a formatter would triple the lines.
# fmt: off
# ------------------------------------------------------------------------------ distillation

add = group("knowledge distillation", TRAINING)
add("kd", SWITCH, False, help="enable knowledge distillation")
add = group("knowledge distillation", TRAINING, WITH_KD)
add("teacher_path", FILE, None, cache=FOLLOWED, nargs="+", help=
    "teacher checkpoint file(s) (required with --kd true)")
add("teacher_arch", NAME, None, cache=COMPARED, nargs="+", help=
    "teacher's timm architecture(s) (required with --kd true)")
SHARED = Need("beside --ce_weight and --kd_weight",
    lambda a: a.kd_alpha in (0, 1) or None in (a.ce_weight, a.kd_weight))
add("kd_alpha", SHARE, 0.7, SHARED, known_as="alpha", help=
    "weight of the distillation loss: 0 for labels only, 1 for teacher only")
SOFT = Need("with --kd_loss hard",
    lambda a: a.kd_loss != "hard" or "," in a.teacher_arch, ("kd_loss",))
add("kd_temperature", POSITIVE, 4.0, ASKED, SOFT, known_as="temperature", help=
    "temperature that softens both networks' outputs")
add("kd_loss", ("kl", "dkd", "dist", "hard", "bce"), "kl", ASKED, help=
    "distillation loss: KL divergence (kl), Decoupled KD (dkd), DIST (dist), the teacher's class "
    "(hard, without a temperature), or sigmoids of the logits (bce)")
add("kd_standardize", SWITCH, False, ASKED, help=
    "compare z-scores of the logits: mean 0 and deviation 1 per image")
add("ce_weight", NOT_NEGATIVE, None, ASKED, USES_LABELS, help=
    "weight of the label loss (default: 1 - alpha)")
add("kd_weight", POSITIVE, None, ASKED, help="weight of the distillation loss (default: alpha)")
add("kd_warmup_epochs", FROM_0, 0, ASKED, help=
    "epochs over which the weight of the distillation loss grows linearly from 0")
DKD = Need("without --kd_loss dkd", lambda a: a.kd_loss == "dkd", ("kd_loss",))
add("dkd_alpha", NOT_NEGATIVE, 1.0, ASKED, DKD, help="weight of the target class in --kd_loss dkd")
add("dkd_beta", NOT_NEGATIVE, 8.0, ASKED, DKD, help=
    "weight of the other classes in --kd_loss dkd: 8 for CIFAR-100, 1 for ImageNet")

add = group("teacher", TRAINING, WITH_KD, ASKED)
add("teacher_weights", NAME, None,
    Need("with a single teacher", lambda a: "," in a.teacher_arch), cache=FOLLOWED, nargs="+", help=
    "relative weights of several teachers, e.g. 2,1 (default: equal)")
add("teacher_norm", ("auto", "student", "arch"), "auto", cache=COMPARED, help=
    "teacher's input normalization: its checkpoint's, else timm's (auto), the student's (student), "
    "or timm's for the architecture (arch)")
add("teacher_input_size", COUNT, None, cache=COMPARED, help=
    "side of the teacher's input in pixels (default: its checkpoint's, else timm's)")
add("teacher_classes", FILE, None, cache=FOLLOWED, help=
    "text file with the teacher's class names, one per line in the order of its outputs (default: "
    "the names in its checkpoint)")
add("teacher_eval", SWITCH, True, role=REPEAT, help=
    "score the teacher on the validation images before training")
add("teacher_min_acc1", PERCENT, 0.0,
    Need("without --teacher_eval true", lambda a: a.teacher_eval), role=REPEAT, help=
    "stop if the teacher's accuracy is below this, in percent")
add("teacher_device", NAME, None, role=MACHINE, help=
    "teacher's device, such as cpu or cuda:1 (default: --device)")
add("teacher_dtype", ("float32", "bfloat16", "float16"), None, cache=COMPARED, help=
    "data type of the teacher's weights and computation: float32, bfloat16 or float16 (default: "
    "float32; with --use_amp true that of --amp_dtype, unless the teacher runs on another kind of "
    "device)")

add = group("teacher cache (teacher logits on disk)", TRAINING)
add("teacher_cache", FOLDER, None, WITH_KD, ASKED, role=REPEAT, help=
    "folder of cached teacher logits, filled by the first run and read by later runs; or a pack "
    "that cache.py wrote (.tar), or the address of one")
# Repeats augmented epochs without a cache and without a teacher, too.
add("teacher_views", COUNT, None, cache=FOLLOWED, help=
    "number of distinct augmented epochs (views); later epochs cycle through them (default: "
    "--epochs)")
add = group("teacher cache (teacher logits on disk)", TRAINING, WITH_KD, ASKED, CACHE)
add("teacher_cache_dtype", ("float16", "float32"), "float16", cache=COMPARED, help=
    "data type of cached logits: float16 or float32")
add("teacher_cache_topk", COUNT, None, cache=COMPARED, help=
    "cache only the k largest logits per image (default: all)")
add("teacher_cache_identity", ("content", "stamps"), "content", role=REPEAT, help=
    "how a new cache identifies image files: by a hash of their bytes, so that copies on other "
    "machines are accepted (content), or by sizes and times of modification (stamps)")
add("teacher_cache_only", SWITCH, False, role=REPEAT, help="fill the teacher cache and exit")
add("teacher_cache_range", Kind(str, "FIRST:END"), None,
    on("teacher_cache_only"), role=REPEAT, help=
    "views for --teacher_cache_only, such as 0:50 (default: all)")

# --------------------------------------------------------------------------------------- run

add = group("run")
add("batch_size", COUNT, None, cache=FOLLOWED, help=
    "images per process and forward pass (default: 64; 32, 16 or 8 if an epoch would have fewer "
    "than 50 batches)")
add("epochs", COUNT, 300, TRAINING, help="passes over the training images")
add("update_freq", COUNT, 1, TRAINING, STUDENT, help="batches accumulated into one optimizer step")
add("seed", FROM_0, 0, role=REPEAT, help="random seed")
add("data_seed", FROM_0, None, role=REPEAT, help=
    "seed of the order, augmentation and subset of training images; runs with one --data_seed can "
    "share a teacher cache (default: --seed)")
add("device", NAME, None, role=MACHINE, help=
    "device to train on: cuda, cuda:1, xpu, mps or cpu (default: the first available)")
add("compile", SWITCH, False, TRAINING, ALL_LAYERS, role=MACHINE, help=
    "compile both networks with torch.compile")
add("use_amp", SWITCH, False, cache=FOLLOWED, known_as="amp", help="use automatic mixed precision")
add("amp_dtype", ("float16", "bfloat16"), None, on("use_amp"), cache=FOLLOWED, help=
    "data type of mixed precision: bfloat16, or float16 with a scaled loss (default: bfloat16 on "
    "the CPU and on GPUs that compute in it, else float16)")
add("fast_cuda", SWITCH, True, role=MACHINE, help=
    "use TF32 and cuDNN's fastest kernels on CUDA; false for restarts as exact as its kernels")
add("sync_bn", SWITCH, False, ALL_LAYERS, help=
    "share BatchNorm statistics among all processes (CUDA only)")
add("start_epoch", FROM_0, 0, TRAINING, STUDENT, role=MACHINE, help=
    "first epoch; a resumed run takes it from the checkpoint")

add = group("processes (set by torchrun)", role=MACHINE)
add("dist_url", Kind(str, "URL"), "env://", help="address at which the processes meet")
add("local_rank", WHOLE, None, help="ignored, for old launchers; the variable LOCAL_RANK counts")

# ----------------------------------------------------------------------------------- student

add = group("student")
add("model", NAME, None, known_as="arch", help=
    "timm architecture to train (default: convnext_tiny; cifar_resnet20 below 64 pixels)")
add("drop_path", SHARE, 0.0, TRAINING, STUDENT, ALL_LAYERS, help="stochastic depth rate")
add("drop", SHARE, None, TRAINING, STUDENT, ALL_LAYERS, help=
    "dropout rate (default: the network's own, 0 for most)")
add("input_size", COUNT, None, cache=COMPARED, known_as="img_size", help=
    "side of the input images in pixels (default: 224; for cifar_* and mnist_* the data set's)")
add = group("student", TRAINING, STUDENT)
add("pretrained", SWITCH, False, help=
    "start from timm's weights, with their input size and normalization unless a flag says "
    "otherwise, and a new classifier for different classes")
add("finetune", FILE, "", help="start from the weights of this checkpoint file")
add("linear_probe", SWITCH, False, help=
    "train only the classifier, on frozen features of --finetune or --pretrained true; without "
    "augmentation unless one of its flags is given")
add("head_init_scale", NOT_NEGATIVE, 1.0, help="factor on the classifier's initial weights")
add("model_key", Kind(str, "KEY|KEY"), "model|module", FINETUNE, help=
    "keys under which --finetune looks for weights, separated by |")
add("model_prefix", NAME, "", FINETUNE, help=
    "load only the parameters of --finetune with this prefix, and strip it")

add = group("exponential moving average (EMA)", TRAINING, STUDENT)
add("model_ema", SWITCH, False, help="average the student's weights over steps")
add("model_ema_decay", SHARE_BELOW_1, 0.9999, WITH_EMA, help="EMA decay per optimizer step")
add("model_ema_warmup", SWITCH, True, WITH_EMA, help=
    "let the EMA decay grow from 0, for short runs")
add("model_ema_force_cpu", SWITCH, False, WITH_EMA, help="keep the EMA in host memory")
add("model_ema_eval", SWITCH, False, EVALUATION, WITH_EMA, help="also evaluate the EMA")

# --------------------------------------------------------------------------------- optimizer

add = group("optimizer and label loss", TRAINING, STUDENT)
add("opt", NAME, "adamw", help="optimizer, any of timm's create_optimizer_v2")
add("opt_eps", NOT_NEGATIVE, 1e-8, help="epsilon of the optimizer")
add("opt_betas", SHARE_BELOW_1, None, nargs="+", help=
    "betas of the optimizer, such as 0.9 0.999 (default: those of the optimizer)")
add("clip_grad", POSITIVE, None, help="clip gradients to this norm (default: no clipping)")
add("momentum", SHARE, 0.9, help="SGD momentum")
add("weight_decay", NOT_NEGATIVE, None, known_as="wd", help=
    "weight decay, except of biases and normalization layers (default: 0.05; 1e-4 for SGD)")
add("weight_decay_end", NOT_NEGATIVE, None,
    Need("with --weight_decay 0", lambda a: a.weight_decay > 0, ("weight_decay",)), help=
    "final weight decay of a cosine schedule (default: constant)")
add("lr", NOT_NEGATIVE, None, known_as="learning_rate", help=
    "peak learning rate (default: 4e-3 at a total batch of 4096, or 0.1 at 128 for SGD, scaled by "
    "the square root of the batch; higher for few steps from scratch; for --linear_probe 2 divided "
    "by the number of features, unless with SGD)")
add("layer_decay", POSITIVE, 1.0, ALL_LAYERS, help=
    "factor on the learning rate from each layer to the layer below")
add("sched", ("cosine", "step"), "cosine", known_as="lr_scheduler", help=
    "course of the learning rate after warm-up: half a cosine down to --min_lr (cosine), or "
    "multiplied by --decay_rate at each of --decay_epochs (step)")
add("min_lr", NOT_NEGATIVE, 1e-6,
    Need("with --sched step", lambda a: a.sched == "cosine", ("sched",)), help=
    "learning rate at the end of the cosine")
STEP = Need("without --sched step", lambda a: a.sched == "step", ("sched",))
add("decay_epochs", COUNT, None, STEP, nargs="+", known_as="decay_milestones lr_decay_epochs", help=
    "epochs after which --sched step lowers the learning rate, such as 150 180 210; required there")
add("decay_rate", POSITIVE, 0.1, STEP, known_as="lr_decay_rate", help=
    "factor on the learning rate at each of --decay_epochs")
add("warmup_epochs", FROM_0, None,
    Need("beside --warmup_steps", lambda a: a.warmup_steps < 0), help=
    "epochs of linear warm-up (default: 20, or a fifth of a short run)")
add("warmup_steps", FROM_0_OR_UNSET, -1, help=
    "optimizer steps of warm-up, in place of --warmup_epochs")
add("loss", ("ce", "bce"), "ce", USES_LABELS, help=
    "label loss: cross-entropy (ce), or binary cross-entropy of each class (bce)")
add("bce_target_thresh", SHARE_BELOW_1, None, USES_LABELS,
    Need("without --loss bce", lambda a: a.loss == "bce", ("loss",)), help=
    "count smoothed and mixed labels above this as 1 and others as 0 (default: none)")
add("smoothing", SHARE_BELOW_1, 0.1, USES_LABELS, help="label smoothing")
add("class_weights", ("none", "balanced"), "none", USES_LABELS, help=
    "weights of the classes in the label loss: all equal (none), or inverse to their share of the "
    "training images (balanced)")

# ------------------------------------------------------------------------------------ images

add = group("data", TRAINING, cache=FOLLOWED)
add("no_aug", SWITCH, False, help=
    "resize and crop training images as in evaluation, and change nothing else")
add = group(AUGMENTATION, TRAINING, off("no_aug"), cache=COMPARED)
add("color_jitter", NOT_NEGATIVE, 0.4,
    Need("without --aa none", lambda a: not a.aa or "3a" in a.aa, ("aa",)), help=
    "strength of color jitter, only with --aa none")
add("aa", Kind(str, "POLICY"), "rand-m9-mstd0.5-inc1", help=
    "AutoAugment, RandAugment or AugMix policy in timm's notation; none for no policy")
add("hflip", SHARE, None, help=
    "probability of a horizontal flip (default: 0.5; 0 for DIGITS and MNIST)")
add("train_interpolation", ("random", "bilinear", "bicubic"), "bicubic", INTERPOLATED, help=
    "interpolation of the random crop: random, bilinear or bicubic")
add("reprob", SHARE, 0.25, help="probability of random erasing")
add("remode", ("const", "rand", "pixel"), "pixel", ERASED, help=
    "fill for random erasing: zeros (const), one random color (rand) or random pixels (pixel)")
add("recount", COUNT, 1, ERASED, help="maximum number of rectangles to erase per image")

add = group(MIXING, TRAINING, off("no_aug"), cache=IF_MIXED)
add("mixup", NOT_NEGATIVE, 0.8, help="alpha of mixup; 0 for none")
add("cutmix", NOT_NEGATIVE, 1.0,
    Need("beside --cutmix_minmax", lambda a: not a.cutmix_minmax), help=
    "alpha of cutmix; 0 for none")
add("cutmix_minmax", SHARE, None, nargs=2, help="minimum and maximum cut ratio; replaces --cutmix")
add("mixup_prob", SHARE, 1.0, MIXED, help="probability of mixing at all")
add("mixup_switch_prob", SHARE, 0.5, BOTH_MIXES, help="probability of cutmix if both are on")
add("mixup_mode", ("batch", "pair", "elem"), "batch", MIXED, help=
    "draw the mix per batch (batch), per image (elem) or per pair of neighbors in the epoch (pair; "
    "timm pairs mirrored positions of the batch)")

add = group("data", role=VALIDATION, cache=FOLLOWED)
add("data_set", NAME, None, known_as="dataset", help=
    "DIGITS (included), IMNET (a folder with train/ and val/), image_folder (one folder of class "
    "folders), tars (tar files of images), CIFAR (100 classes), CIFAR10, MNIST, FashionMNIST, or a "
    "name for timm's create_dataset such as hfds/… (default: DIGITS without --data_path, else "
    "IMNET, tars for names of tar files, or image_folder for a folder without train/ and val/)")
add("data_path", FOLDER, None, NOT_INCLUDED, known_as="data data_dir", help=
    "folder of the data set; of tars also a glob in quotes ('shards/*.tar') or a list with commas")
add("eval_data_path", FOLDER, None, OWN_IMAGES, NO_HOLDOUT, help=
    "folder of the validation images of --data_set image_folder, or tar files (default: a fifth of "
    "the training images is held out)")
add("labels", FILE, None, OWN_IMAGES, role=DATA, help=
    "text file with the labels of training images without class folders: a path below --data_path "
    "and a class per line, separated by a comma, a semicolon, a tab or a space")
add("eval_labels", FILE, None, OWN_IMAGES, NO_HOLDOUT, help=
    "text file like --labels for the validation images, with paths below --eval_data_path, or "
    "without that flag below --data_path")
add("holdout", COUNT, None, help=
    "training images to hold out and evaluate on, in place of the validation images; for tuning "
    "(default: none, or a fifth for image_folder and tars without validation images)")
add("unlabeled", FOLDER, "", TRAINING, WITH_KD, ASKED, role=DATA, help=
    "folder of images without labels, at any depth, or tar files ('pile/*.tar'), for the "
    "distillation part of the loss; or 'rest': the images that --train_samples leaves out, their "
    "labels unused (default: none)")
add("nb_classes", COUNT, None, role=DATA, known_as="num_classes", help=
    "expected number of classes (default: counted)")
add = group("data")
add("train_samples", COUNT, None, TRAINING, cache=FOLLOWED, help=
    "train on a random subset of this many images, with every class in its proportion (default: "
    "all)")
add("imagenet_default_mean_and_std", SWITCH, True, cache=COMPARED, help=
    "normalize with ImageNet's mean and standard deviation; false for 0.5 and 0.5")
add("check_data", SWITCH, False, role=REPEAT, help=
    "read every image before training; stop with a list of unreadable images")
add("num_workers", FROM_0, None, role=MACHINE, known_as="workers", help=
    "loader workers per process (default: the cores per process, at most one per batch)")
add("pin_mem", SWITCH, True, role=MACHINE, help="use page-locked memory on CUDA")

# ------------------------------------------------------------------------------------ output

add = group("output", role=MACHINE)
add("output_dir", FOLDER, "", STUDENT, known_as="output", help=
    "folder for checkpoints and log.txt (default: no files)")
add("resume", FILE, "", STUDENT, help=
    "checkpoint to resume from, or to score with --eval true; flags that are not given follow it "
    "(for scores, model and data only)")
add = group("output", TRAINING, STUDENT, role=MACHINE)
add("log_dir", FOLDER, None, help="folder for TensorBoard, or 'none' (default: tb in --output_dir)")
add("print_seconds", NOT_NEGATIVE, 10, help=
    "minimum seconds between progress lines if stdout is not a terminal")
add("auto_resume", SWITCH, True, OUTPUT, help=
    "resume from the newest checkpoint in --output_dir; false moves its files aside")
add("save_ckpt", SWITCH, True, help="save checkpoints")
add("save_ckpt_freq", COUNT, 1, OUTPUT, SAVING, help="epochs between two checkpoints")
add("save_ckpt_num", COUNT, 3, OUTPUT, SAVING, help="number of epoch checkpoints to keep")
add("save_ckpt_steps", COUNT, None, OUTPUT, SAVING, help=
    "optimizer steps between two checkpoints within an epoch (default: none)")

add = group("evaluation", role=MACHINE)
add("eval", SWITCH, False, help="score --resume FILE and exit")
add("use_ema", ("auto", "true", "false"), "auto", KD_OR_EVAL, cache=FOLLOWED, help=
    "teacher's weights if its checkpoint holds an EMA: those with the better recorded accuracy, "
    "else the EMA (auto), the EMA (true) or the raw weights (false); --eval true scores both with "
    "auto")
add("report", FILE, "", help=
    "JSON file for accuracy per class, confusions and calibration of the last evaluation")
add("calibrate", SWITCH, False, help=
    "with --eval true, fit a temperature on the held-out training images, report calibrated scores "
    "and keep the temperature beside the checkpoint for export.py and predict.py; without held-out "
    "images, fit on those that are scored")
add("crop_pct", SHARE_ABOVE_0, None, role=RECIPE, help=
    "fraction of the resized image that evaluation crops (default: 0.875; 1 for images below 64 "
    "pixels or from 384 pixels up)")
add("dist_eval", SWITCH, True, SOMETHING_SCORED, help="divide validation images among processes")
add("eval_freq", COUNT, 1, TRAINING, EVALUATION, role=REPEAT, help=
    "epochs between two evaluations; the last epoch is always evaluated")
add("disable_eval", SWITCH, False, TRAINING, role=RECIPE, help="train without evaluation")

# fmt: on
# ------------------------------------------------------------------------------- the parser


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, for the caller to print."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


@cache
def get_args_parser() -> Parser:
    """Every flag with its type, its default and its help."""
    parser = Parser(
        "main.py",
        usage="%(prog)s [@FILE] [--flag value ...]",
        description="Train and evaluate image classifiers, with knowledge distillation. @FILE "
        "stands for the flags in that file, one per line; later flags win.",
        formatter_class=ShowDefaults,
        allow_abbrev=False,
    )
    titles = dict.fromkeys(flag.group for flag in FLAGS.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    for flag in FLAGS.values():
        is_switch = flag.kind == SWITCH  # --kd alone means --kd true
        groups[flag.group].add_argument(
            f"--{flag.name}",
            type=flag.kind.parse,
            metavar=flag.kind.metavar,
            choices=flag.kind.choices or None,
            nargs="?" if is_switch else flag.nargs,
            const=is_switch or None,
            default=flag.default,
            help=flag.help,
        )
    return parser


# ------------------------------------------------------------------------- flags by what they do


def with_role(*roles: str) -> frozenset[str]:
    """Names of the flags with one of these roles."""
    return frozenset(flag.name for flag in FLAGS.values() if flag.role in roles)


def with_cache(*kinds: str) -> list[str]:
    """Names of the flags that a teacher cache treats in one of these ways."""
    return [flag.name for flag in FLAGS.values() if flag.cache in kinds]


def flags_of_group(title: str) -> list[str]:
    """Names of the flags in one group of --help."""
    return [flag.name for flag in FLAGS.values() if flag.group == title]


NOT_RECIPE = with_role(MACHINE) | {"given"}  # neither taken from a checkpoint nor compared with it
DATA_FLAGS = with_role(DATA, VALIDATION)
# Flags that set nothing in a run without a teacher.
OF_TEACHER = frozenset(f.name for f in FLAGS.values() if {WITH_KD, KD_OR_EVAL} & {*f.needs})
