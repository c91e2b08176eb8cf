"""Every flag of main.py with its type, its default and its help.

Nothing here imports torch, so that `--help` and a mistyped flag are answered at once.
"""

import argparse
from os.path import expanduser
from typing import Any

# Groups of flags that other files ask for.
KD = "knowledge distillation"
TEACHER = "teacher"
TEACHER_CACHE = "teacher cache (teacher logits on disk)"
EMA = "exponential moving average (EMA)"
OPTIMIZER = "optimizer and label loss"
# These decide which pixels the networks see. A teacher cache depends on every flag in them, so a
# new flag that changes training images belongs in one of these groups.
AUGMENTATION = "augmentation of training images"
MIXING = "mixup and cutmix (student and teacher see the same mixed images)"


def str2bool(value: str) -> bool:
    """'true' and 'false', and their usual other spellings."""
    if value.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if value.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{value}' is neither true nor false")


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds '(default: …)' to the help of every flag that does not state its default in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        help_text = action.help or ""
        is_told = "(default" in help_text or action.default is None
        return help_text if is_told else super()._get_help_string(action)


def get_args_parser() -> argparse.ArgumentParser:
    """Every flag with its type, its default and its help."""
    parser = argparse.ArgumentParser(
        "main.py",
        usage="%(prog)s [--flag value ...]",
        description="Train and evaluate image classifiers, with knowledge distillation.",
        formatter_class=ShowDefaults,
        allow_abbrev=False,
    )
    _add_distillation_flags(parser)
    _add_run_flags(parser)
    _add_student_flags(parser)
    _add_optimizer_flags(parser)
    _add_image_flags(parser)
    _add_data_flags(parser)
    _add_output_flags(parser)
    for action in parser._actions:
        if action.type is str2bool:  # --kd alone means --kd true
            action.nargs, action.const = "?", True
    return parser


def _add_distillation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(KD).add_argument
    add("--kd", type=str2bool, default=False, help="enable knowledge distillation")
    add(
        "--teacher_path",
        nargs="+",
        help="checkpoint file of the teacher, or of several (required with --kd true)",
    )
    add(
        "--teacher_arch",
        nargs="+",
        help="timm architecture of the teacher, or of several (required with --kd true)",
    )
    add(
        "--kd_alpha",
        type=float,
        default=0.7,
        help="weight of the distillation loss, from 0 (labels only) to 1 (teacher only)",
    )
    add(
        "--kd_temperature",
        type=float,
        default=4.0,
        help="temperature that softens the outputs of student and teacher, above 0",
    )

    add = parser.add_argument_group(TEACHER).add_argument
    add(
        "--teacher_weights",
        nargs="+",
        help="weight of each teacher where several are given, such as 2,1 (default: equal)",
    )
    add(
        "--teacher_norm",
        default="auto",
        choices=("auto", "student", "arch"),
        help="how to normalize the teacher's input: from its checkpoint or else timm (auto), "
        "like the student's (student), or timm's for the architecture (arch)",
    )
    add(
        "--teacher_input_size",
        type=int,
        help="side of the teacher's input in pixels (default: from its checkpoint or else timm)",
    )
    add(
        "--teacher_classes",
        type=expanduser,
        help="text file with the teacher's class names, one per line in the order of its outputs "
        "(default: the names in its checkpoint)",
    )
    add(
        "--teacher_eval",
        type=str2bool,
        default=True,
        help="score the teacher on the validation images before training",
    )
    add(
        "--teacher_min_acc1",
        type=float,
        default=0.0,
        help="stop if the teacher's accuracy is below this, in percent",
    )
    add(
        "--teacher_device",
        help="device that runs the teacher, such as cpu or cuda:1 (default: the same as --device)",
    )
    add(
        "--teacher_dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="data type of the teacher's weights and computation",
    )

    add = parser.add_argument_group(TEACHER_CACHE).add_argument
    add(
        "--teacher_cache",
        type=expanduser,
        help="cache folder for teacher logits; filled by the first run and read by later ones",
    )
    add(
        "--teacher_views",
        type=int,
        help="number of distinct augmented epochs; later epochs repeat them "
        "(default: as many as epochs)",
    )
    add(
        "--teacher_cache_dtype",
        default="float16",
        choices=("float16", "float32"),
        help="data type of cached logits",
    )
    add(
        "--teacher_cache_topk",
        type=int,
        help="cache only the k largest logits per image (default: all)",
    )
    add(
        "--teacher_cache_only",
        type=str2bool,
        default=False,
        help="fill the teacher cache and exit without training",
    )
    add(
        "--teacher_cache_range",
        help="fill only these views with --teacher_cache_only, such as 0:50 (default: all)",
    )


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add(
        "--batch_size",
        type=int,
        help="images per process and forward pass (default: 64, or 32, 16 or 8 so that an epoch "
        "of few images has 50 batches)",
    )
    add("--epochs", type=int, default=300, help="number of passes over the training images")
    add(
        "--update_freq",
        type=int,
        default=1,
        help="number of batches accumulated into one optimizer step",
    )
    add("--seed", type=int, default=0, help="random seed")
    add(
        "--data_seed",
        type=int,
        help="random seed of the order, the augmentation and the subset of the training images; a "
        "teacher cache serves every --seed with one --data_seed (default: the same as --seed)",
    )
    add(
        "--device",
        help="device to train on: cuda, cuda:1, mps or cpu (default: the first that is available)",
    )
    add("--compile", type=str2bool, default=False, help="compile student and teacher with torch")
    add("--use_amp", type=str2bool, default=False, help="train with automatic mixed precision")
    add(
        "--amp_dtype",
        choices=("float16", "bfloat16"),
        help="data type of mixed precision; float16 also scales the loss "
        "(default: bfloat16 on the CPU and on GPUs that compute in it, else float16)",
    )
    add(
        "--fast_cuda",
        type=str2bool,
        default=True,
        help="on CUDA, use TF32 and let cuDNN choose the fastest kernels; pass false for restarts "
        "that are as exact as the GPU's kernels",
    )
    add(
        "--sync_bn",
        type=str2bool,
        default=False,
        help="on CUDA, compute BatchNorm statistics over the batches of all processes",
    )
    add(
        "--start_epoch",
        type=int,
        default=0,
        help="number of the first epoch; a resumed run takes it from the checkpoint",
    )

    add = parser.add_argument_group("processes (set by torchrun)").add_argument
    add("--dist_url", default="env://", help="address at which the processes meet")
    add(
        "--local_rank",
        type=int,
        help="accepted for old launchers and ignored; the variable LOCAL_RANK is used instead",
    )


def _add_student_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("student").add_argument
    add(
        "--model",
        help="timm architecture to train "
        "(default: convnext_tiny, or cifar_resnet20 for images below 64 pixels)",
    )
    add("--drop_path", type=float, default=0.0, help="stochastic depth rate")
    add(
        "--input_size",
        type=int,
        help="side of the input images in pixels "
        "(default: 224, or the size of the data set's images for cifar_* and mnist_* models)",
    )
    add(
        "--pretrained",
        type=str2bool,
        default=False,
        help="start the student from timm's weights of its architecture, with their input size and "
        "normalization where no flag says otherwise, and with a new classifier for other classes",
    )
    add(
        "--finetune",
        type=expanduser,
        default="",
        help="checkpoint file whose weights the student starts from",
    )
    add(
        "--linear_probe",
        type=str2bool,
        default=False,
        help="train only the classifier, on the features of a frozen backbone from --finetune or "
        "--pretrained true; augmentation is then off unless one of its flags is given",
    )
    add(
        "--head_init_scale",
        type=float,
        default=1.0,
        help="factor on the classifier's initial weights",
    )
    add(
        "--model_key",
        default="model|module",
        help="keys under which --finetune looks for weights, separated by |",
    )
    add("--model_prefix", default="", help="load only the weights of --finetune with this prefix")

    add = parser.add_argument_group(EMA).add_argument
    add(
        "--model_ema",
        type=str2bool,
        default=False,
        help="keep an exponential moving average of the student's weights",
    )
    add("--model_ema_decay", type=float, default=0.9999, help="EMA decay per optimizer step")
    add(
        "--model_ema_warmup",
        type=str2bool,
        default=True,
        help="let the EMA decay grow from 0, so that the average follows a short run",
    )
    add("--model_ema_force_cpu", type=str2bool, default=False, help="keep the EMA in host memory")
    add(
        "--model_ema_eval",
        type=str2bool,
        default=False,
        help="also evaluate the EMA after each epoch",
    )


def _add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(OPTIMIZER).add_argument
    add("--opt", default="adamw", help="any optimizer of timm's create_optimizer_v2")
    add("--opt_eps", type=float, default=1e-8, help="epsilon of the optimizer")
    add(
        "--opt_betas",
        type=float,
        nargs="+",
        help="betas of the optimizer, such as 0.9 0.999 (default: those of the optimizer)",
    )
    add(
        "--clip_grad",
        type=float,
        help="maximum gradient norm; larger gradients are scaled down (default: no clipping)",
    )
    add("--momentum", type=float, default=0.9, help="SGD momentum")
    add(
        "--weight_decay",
        type=float,
        help="weight decay; not applied to biases and normalization layers "
        "(default: 0.05, or 1e-4 for SGD)",
    )
    add(
        "--weight_decay_end",
        type=float,
        help="final weight decay of a cosine schedule (default: constant weight decay)",
    )
    add(
        "--lr",
        type=float,
        help="peak learning rate (default: 4e-3 at a total batch of 4096, or 0.1 at 128 for SGD, "
        "scaled by the square root of the batch; higher for few steps from scratch; for "
        "--linear_probe 2 divided by the number of features, unless with SGD)",
    )
    add(
        "--layer_decay",
        type=float,
        default=1.0,
        help="factor on the learning rate from each layer to the layer below",
    )
    add("--min_lr", type=float, default=1e-6, help="learning rate at the end of the cosine")
    add(
        "--warmup_epochs",
        type=int,
        help="epochs of linear warm-up (default: 20, or a fifth of a short run)",
    )
    add(
        "--warmup_steps",
        type=int,
        default=-1,
        help="optimizer steps of warm-up, instead of --warmup_epochs; -1 for unset",
    )
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add(
        "--class_weights",
        default="none",
        choices=("none", "balanced"),
        help="weights of the classes in the label loss: all equal (none), or the inverse of each "
        "class's share of the training images (balanced)",
    )


def _add_image_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(AUGMENTATION).add_argument
    add(
        "--color_jitter",
        type=float,
        default=0.4,
        help="strength of color jitter; used only with --aa none",
    )
    add(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        help="AutoAugment, RandAugment or AugMix policy in timm's notation; none for no policy",
    )
    add(
        "--hflip",
        type=float,
        help="probability of a horizontal flip (default: 0.5; 0 for DIGITS and MNIST)",
    )
    add(
        "--train_interpolation",
        default="bicubic",
        choices=("random", "bilinear", "bicubic"),
        help="interpolation of the random crop",
    )
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add(
        "--remode",
        default="pixel",
        choices=("const", "rand", "pixel"),
        help="fill for random erasing: zeros, one random color, or random pixels",
    )
    add("--recount", type=int, default=1, help="maximum number of erased rectangles per image")

    add = parser.add_argument_group(MIXING).add_argument
    add("--mixup", type=float, default=0.8, help="alpha of mixup; 0 for none")
    add("--cutmix", type=float, default=1.0, help="alpha of cutmix; 0 for none")
    add(
        "--cutmix_minmax",
        type=float,
        nargs=2,
        help="minimum and maximum cut ratio; replaces --cutmix",
    )
    add("--mixup_prob", type=float, default=1.0, help="probability that images are mixed at all")
    add(
        "--mixup_switch_prob",
        type=float,
        default=0.5,
        help="probability of cutmix instead of mixup where both are on",
    )
    add(
        "--mixup_mode",
        default="batch",
        choices=("batch", "pair", "elem"),
        help="draw the mix once per batch, per pair or per image; pair mixes neighbors in the "
        "order of the epoch, where timm's pair mode mixes mirrored positions of the batch",
    )


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--data_set",
        help="DIGITS (included), IMNET (a folder with train/ and val/), image_folder (one folder "
        "of class folders), CIFAR (100 classes), CIFAR10, MNIST, FashionMNIST, or a name for "
        "timm's create_dataset such as hfds/… (default: DIGITS without --data_path, else IMNET, or "
        "image_folder where that folder holds neither train/ nor val/)",
    )
    add("--data_path", type=expanduser, help="folder of the data set")
    add(
        "--eval_data_path",
        type=expanduser,
        help="folder of the validation images of --data_set image_folder (default: a fifth of the "
        "training images is held out)",
    )
    add(
        "--labels",
        type=expanduser,
        help="text file with a path below --data_path and a class per line, separated by a comma, "
        "a tab or a space, for training images that are not sorted into class folders",
    )
    add(
        "--eval_labels",
        type=expanduser,
        help="text file like --labels for the validation images, with paths below "
        "--eval_data_path, or without that flag below --data_path",
    )
    add("--nb_classes", type=int, help="expected number of classes (default: counted)")
    add(
        "--train_samples",
        type=int,
        help="train on a random subset of this many images, with every class in its proportion "
        "(default: all)",
    )
    add(
        "--unlabeled",
        type=expanduser,
        default="",
        help="folder of images without labels, at any depth, that join the training images for the "
        "distillation part of the loss; or 'rest': the images that --train_samples leaves out, "
        "their labels unused (default: none)",
    )
    add(
        "--holdout",
        type=int,
        help="hold out this many training images and evaluate on them instead of the validation "
        "images; for tuning (default: none, or a fifth for image_folder without validation images)",
    )
    add(
        "--imagenet_default_mean_and_std",
        type=str2bool,
        default=True,
        help="normalize with the mean and standard deviation of ImageNet; false for 0.5 and 0.5",
    )
    add(
        "--check_data",
        type=str2bool,
        default=False,
        help="read every image before training; if some cannot be read, list all of them and stop",
    )
    add(
        "--num_workers",
        type=int,
        help="loader workers per process (default: the cores per process, at most one per batch)",
    )
    add(
        "--pin_mem",
        type=str2bool,
        default=True,
        help="copy batches through page-locked memory on CUDA",
    )


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add(
        "--output_dir",
        type=expanduser,
        default="",
        help="folder for checkpoints and log.txt; nothing is saved where this is empty",
    )
    add(
        "--log_dir",
        type=expanduser,
        help="folder for TensorBoard files, or 'none' (default: tb in --output_dir)",
    )
    add(
        "--print_seconds",
        type=float,
        default=10,
        help="least seconds between two lines within an epoch, where the output is no terminal",
    )
    add(
        "--resume",
        type=expanduser,
        default="",
        help="checkpoint to resume from, or to score with --eval true; flags that are not given "
        "follow the checkpoint",
    )
    add(
        "--auto_resume",
        type=str2bool,
        default=True,
        help="resume from the newest checkpoint in --output_dir; false moves the files of the "
        "earlier run aside",
    )
    add("--save_ckpt", type=str2bool, default=True, help="save checkpoints")
    add("--save_ckpt_freq", type=int, default=1, help="epochs between two checkpoints")
    add("--save_ckpt_num", type=int, default=3, help="number of epoch checkpoints to keep")
    add(
        "--save_ckpt_steps",
        type=int,
        help="optimizer steps between two checkpoints within an epoch (default: none within)",
    )

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", type=str2bool, default=False, help="score the checkpoint of --resume and exit")
    add(
        "--use_ema",
        default="auto",
        choices=("auto", "true", "false"),
        help="which weights of a checkpoint with an EMA to use as a teacher: the better ones by "
        "their recorded accuracy, else the EMA (auto), the EMA (true) or the raw weights (false); "
        "--eval true scores both with auto",
    )
    add(
        "--report",
        type=expanduser,
        default="",
        help="JSON file for accuracy per class, confusions and calibration of the last evaluation",
    )
    add(
        "--calibrate",
        type=str2bool,
        default=False,
        help="with --eval true: fit a temperature on the images that the training held out "
        "(--holdout), and score with it too",
    )
    add(
        "--crop_pct",
        type=float,
        help="fraction of the resized image that evaluation crops (default: 0.875; 1 for images "
        "below 64 pixels or from 384 pixels up)",
    )
    add(
        "--dist_eval",
        type=str2bool,
        default=True,
        help="divide the validation images among the processes",
    )
    add(
        "--eval_freq",
        type=int,
        default=1,
        help="epochs between two evaluations; the last epoch is always evaluated",
    )
    add("--disable_eval", type=str2bool, default=False, help="train without evaluation")


def flags_of_group(title: str) -> list[str]:
    """Names of the flags in one group of the parser, without dashes, as attributes of `args`."""
    groups = get_args_parser()._action_groups
    return [a.dest for group in groups if group.title == title for a in group._group_actions]


# Flags that say where and how a run computes and what it writes, not what it computes. They are
# neither taken from a checkpoint nor compared with it.
NOT_RECIPE = frozenset(
    "given output_dir log_dir resume auto_resume start_epoch device teacher_device num_workers "
    "pin_mem compile dist_url local_rank eval use_ema dist_eval save_ckpt save_ckpt_freq "
    "save_ckpt_num save_ckpt_steps fast_cuda print_seconds report calibrate".split()
)
# Flags that name the data. A checkpoint knows its data by its contents, which may have moved.
DATA_FLAGS = (
    "data_set",
    "data_path",
    "eval_data_path",
    "labels",
    "eval_labels",
    "holdout",
    "nb_classes",
    "unlabeled",
)


# Flags that set nothing in a run without a teacher; --teacher_views also repeats epochs without.
OF_TEACHER = {*flags_of_group(KD), *flags_of_group(TEACHER), *flags_of_group(TEACHER_CACHE)}
OF_TEACHER = (OF_TEACHER | {"unlabeled", "use_ema"}) - {"kd", "teacher_views"}


def as_typed(value: Any) -> str:
    """A value as one types it on the command line."""
    values = value if isinstance(value, list) else [value]
    return " ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)
