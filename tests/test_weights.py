"""Files of weights, whoever wrote them: understood, or refused with the way out."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import CLASSES, CONFIG, teacher_flags, write_images

import main
import models
from deploy.model import network_from_checkpoint
from deploy.writers import write_timm
from distillation import TeacherAdapter, load_teacher
from models.classes import order_of_script
from models.weights import load_finetune, output_prefixes
from utils import UserError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
KEYS = "model|module"


def network(arch: str = "cifar_resnet8", num_classes: int = 10, seed: int = 1):
    torch.manual_seed(seed)
    return timm.create_model(arch, num_classes=num_classes).eval()


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


GOOD, OTHER = network(seed=1).state_dict(), network(seed=2).state_dict()
COUNT = torch.tensor(3)
UNDERSTOOD = {
    "bare": GOOD,
    "this project": {"model": GOOD, "model_ema": None, "epoch": 3, "args": {"lr": 1.0}},
    "this project with EMA": {"model": OTHER, "model_ema": GOOD},
    "timm": {"arch": "x", "state_dict": GOOD, "args": argparse.Namespace(lr=1.0)},
    "timm with EMA": {"state_dict": OTHER, "state_dict_ema": GOOD},
    "ConvNeXt script": {"model": GOOD, "epoch": "best", "args": argparse.Namespace(lr=1.0)},
    "RepDistiller": {"epoch": 240, "model": GOOD, "best_acc": 75.6, "optimizer": {"state": {}}},
    "compiled and distributed": {"model": under("module._orig_mod.", GOOD)},
    "an unknown prefix": {"state_dict": under("net.backbone.", GOOD)},
    "a loss beside the network": {
        "state_dict": under("model.", GOOD) | {"criterion.weight": torch.ones(10)}
    },
    "an average beside the network": {
        "state_dict": under("ema_model.", OTHER) | under("model.", GOOD)
    },
    "torchvision's EMA": {
        "model": OTHER,
        "model_ema": under("module.", GOOD) | {"n_averaged": COUNT},
        "args": argparse.Namespace(),
    },
    "counters of multiply-adds": GOOD | {"total_ops": COUNT, "layer1.total_params": COUNT},
    "no counters of batches": {n: v for n, v in GOOD.items() if "num_batches" not in n},
    "PyTorch's tutorial": {"model_state_dict": GOOD, "optimizer_state_dict": {"state": {}}},
    "the only dict of tensors": {"net": GOOD, "acc": 93.1, "epoch": 3},
    "a number of numpy": {"state_dict": GOOD, "best_acc1": np.float64(91.25)},
    "a classifier behind a dropout": {
        name.replace("fc.", "fc.1."): value for name, value in GOOD.items()
    },
}


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_the_right_network_is_found_under_whatever_names(kind, tmp_path):
    torch.save(UNDERSTOOD[kind], tmp_path / "t.pth")
    teacher = load_teacher("cifar_resnet8", str(tmp_path / "t.pth"), 10, "cpu")
    student = models.create_model("cifar_resnet8", 10, 32)
    keys = f"model_ema|state_dict_ema|{KEYS}"
    load_finetune(student, str(tmp_path / "t.pth"), keys, "", list("0123456789"))
    assert ("(EMA)" in teacher.info.origin) == ("EMA" in kind)
    with torch.no_grad():
        assert torch.equal(teacher(IMAGES), network()(IMAGES))
        assert torch.equal(student.eval()(IMAGES), network()(IMAGES))


def test_what_is_left_out_of_a_file_is_said(tmp_path):
    torch.save(UNDERSTOOD["a loss beside the network"], tmp_path / "t.pth")
    teacher = load_teacher("cifar_resnet8", str(tmp_path / "t.pth"), 10, "cpu")
    assert "1 other tensor(s) left out (criterion.weight)" in teacher.info.origin


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_a_deeper_network_is_not_cut_to_fit(prefix, tmp_path):
    """Each name of cifar_resnet8 is one of cifar_resnet20 too."""
    torch.save(under(prefix, network("cifar_resnet20").state_dict()), tmp_path / "t.pth")
    with pytest.raises(UserError, match="unexpected"):
        load_teacher("cifar_resnet8", str(tmp_path / "t.pth"), 10, "cpu")
    with pytest.raises(UserError, match="unexpected"):
        load_finetune(network(), str(tmp_path / "t.pth"), KEYS, "", list("0123456789"))


def test_the_architecture_that_a_file_names_is_the_remedy(tmp_path):
    state = network("cifar_resnet20").state_dict()
    torch.save({"state_dict": state, "arch": "cifar_resnet20"}, tmp_path / "t.pth")
    with pytest.raises(UserError, match=r"the file was trained as \(cifar_resnet20\)$"):
        load_teacher("cifar_resnet8", str(tmp_path / "t.pth"), 10, "cpu")


def test_names_of_torchvision_point_to_torchvisions_network(tmp_path):
    state = torchvision.models.mobilenet_v3_small(num_classes=10).state_dict()
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(UserError, match="pass torchvision.models:mobilenet_v3_small instead$"):
        load_teacher("mobilenetv3_small_100", str(tmp_path / "t.pth"), 10, "cpu")


def test_heads_and_decoders_of_self_supervised_training_give_way_to_a_new_classifier(tmp_path):
    body = {n: v for n, v in GOOD.items() if not n.startswith("fc.")}
    projection = {"fc.0.weight": torch.zeros(64, 64), "fc.2.weight": torch.zeros(128, 64)}
    moco = under("module.encoder_q.", body | projection) | {"module.queue": torch.zeros(128, 9)}
    moco |= under("module.encoder_k.", body | projection)
    decoder = {"decoder_pred.weight": torch.zeros(9, 9), "mask_token": torch.zeros(9)}
    for name, state in {"moco": {"state_dict": moco}, "mae": {"model": body | decoder}}.items():
        torch.save(state, tmp_path / name)
        student = network(seed=5)
        line = load_finetune(student, str(tmp_path / name), KEYS, "", list("0123456789"))
        assert "newly initialized: fc.bias, fc.weight" in line and "left out" in line
        assert torch.equal(student.conv1.weight, GOOD["conv1.weight"])


def test_a_prefix_that_no_name_has_is_answered_with_those_that_there_are(tmp_path):
    torch.save({"model": under("module.", GOOD)}, tmp_path / "t.pth")
    with pytest.raises(UserError, match="begins with 'body.'; they begin with module."):
        load_finetune(network(), str(tmp_path / "t.pth"), KEYS, "body.", list("0123456789"))


# ------------------------------------------------------------------------- other kinds of file


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))


def program(path: Path) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), path)


def onnx(path: Path) -> None:  # as torch's exporter begins: ir_version, producer_name
    path.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x062.14.1")


KINDS = {
    torchscript: "is a TorchScript program",
    program: "is a program of torch.export",
    onnx: "is an ONNX program",
    b"\x89HDF\r\n\x1a\n": "is an HDF5 file",
    b"version https://git-lfs.github.com/spec/v1\n": "is a pointer of Git LFS",
    b"\n<!DOCTYPE html><html>": "is a web page",
    b"\x89PNG\r\n\x1a\n": "is a picture",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("content", KINDS)
def test_a_file_without_weights_is_called_what_it_is(content, tmp_path):
    path = tmp_path / ("t.pt2" if content is program else "t.pth")
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(UserError) as caught:
        load_teacher("cifar_resnet8", str(path), 10, "cpu")
    assert str(caught.value).startswith(f"{path}: {KINDS[content]}")


def test_a_folder_of_a_distributed_checkpoint_is_refused_with_its_converter(run_main, tmp_path):
    (tmp_path / ".metadata").write_bytes(b"x")
    run = run_main(*teacher_flags(tmp_path))
    assert run.code == 2 and f"format_utils dcp_to_torch {tmp_path} FILE" in run.err


# --------------------------------------------------------- files of other projects, and --resume


def test_only_a_run_of_this_project_is_resumed(run_main, short, tmp_path):
    timms = {"state_dict": GOOD, "optimizer": {}, "epoch": 3, "arch": "cifar_resnet8"}
    torch.save(timms | {"args": argparse.Namespace(lr=1.0)}, tmp_path / "checkpoint-3.pth")
    run = run_main(*short, "--resume", tmp_path / "checkpoint-3.pth")
    assert run.code == 2 and run.err.endswith("to start from its weights, pass it as --finetune\n")
    run = run_main(*short, output_dir=tmp_path)
    assert run.code == 2 and "nothing to resume" in run.err


def test_a_bare_file_is_scored_without_a_batch_size(capsys, tmp_path, imnet):
    torch.save(network(num_classes=3).state_dict(), tmp_path / "bare.pth")
    flags = ["--eval", "true", "--model", "cifar_resnet8", "--device", "cpu", "--num_workers", "0"]
    files = ["--resume", str(tmp_path / "bare.pth"), "--data_path", str(imnet)]
    assert main.main([*flags, *files, "--input_size", "32"]) == 0
    assert "test_acc1 " in capsys.readouterr().out


# --------------------------------------------------------------------------------- class order

# Text order: Abys, Bengal, american, c10, c9. Natural order: Abys, american, Bengal, c9, c10.
FOLDERS = ["Abys", "Bengal", "american", "c10", "c9"]
TIMM = {"data_dir": "pets", "class_map": "", "dataset": ""}


@pytest.mark.parametrize(
    ("args", "index"),
    [
        (TIMM, [0, 2, 1, 4, 3]),  # american is timm's output 1, c10 its output 4
        ({"lr": 1.0, "data_set": "image_folder"}, None),  # ConvNeXt's script: ImageFolder
    ],
)
def test_a_file_without_class_names_has_its_own_scripts_order(args, index, tmp_path):
    state = network(num_classes=5).state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(**args)}, tmp_path / "t.pth")
    teacher = load_teacher("cifar_resnet8", str(tmp_path / "t.pth"), 5, "cpu", classes=FOLDERS)
    assert teacher.info.class_index == index
    with torch.no_grad():
        logits = TeacherAdapter(teacher, teacher.info.data_config)(IMAGES)
        expected = network(num_classes=5)(IMAGES)[:, index or [0, 1, 2, 3, 4]]
        torch.testing.assert_close(logits, expected)


def test_orders_that_agree_or_that_belong_to_the_data_need_no_name():
    for classes in (["ant", "bee", "cat"], ["T-shirt", "Trouser", "Bag"]):
        assert order_of_script({}, classes, "t.pth")[0] is None
    assert order_of_script(TIMM | {"dataset": "tfds/pets"}, FOLDERS, "t.pth")[0] is None


@pytest.fixture
def in_folders(tmp_path) -> list:
    """The flags of a distillation on images in FOLDERS, from the file t.pth."""
    for part in ("train", "val"):
        write_images(tmp_path / "data" / part, FOLDERS, count=2, size=(8, 8))
    flags = ["--data_path", tmp_path / "data", "--input_size", 8, "--epochs", 1]
    return [*flags, *teacher_flags(tmp_path / "t.pth")]


def test_an_unclear_order_is_refused_with_a_file_to_correct(run_main, in_folders, tmp_path):
    torch.save(network(num_classes=5).state_dict(), tmp_path / "t.pth")
    names = tmp_path / "out" / "teacher_classes.txt"
    for cache in ([], ["--teacher_cache", tmp_path / "cache"]):
        run = run_main(*in_folders, *cache, output_dir=tmp_path / "out")
        assert run.code == 2 and f"pass --teacher_classes {names}" in run.err
        told = "output 1 is Bengal if torchvision numbered the class folders, american if"
        assert told in run.err and names.read_text().split() == FOLDERS
        names.unlink()
    names.write_text("\n".join(FOLDERS))
    assert run_main(*in_folders, "--teacher_classes", names).code == 0


# -------------------------------------------------------------------------- recorded accuracies


def test_the_accuracy_that_timm_records_is_compared(run_main, short, tmp_path):
    for metric, args in ((99.5, {}), (99.5, {"eval_metric": "loss"}), (0.0, {})):
        timms = {"state_dict": GOOD, "args": argparse.Namespace(**args), "metric": metric}
        torch.save(timms, tmp_path / "t.pth")
        run = run_main(*short, "--epochs", 1, *teacher_flags(tmp_path / "t.pth"))
        records = "Warning: the file of the teacher records 99.50 % on its own validation images"
        assert (records in run.out) == (metric == 99.5 and not args), run.err


def test_a_wrong_file_of_class_names_is_named_as_the_cause(run_main, tmp_path):
    flags = ["--train_samples", 400, "--epochs", 8, "--lr", "3e-3", "--mixup", 0, "--cutmix", 0]
    run_main(*flags, output_dir=tmp_path)
    (tmp_path / "names.txt").write_text("\n".join("9876543210"))
    kd = [
        *teacher_flags(tmp_path / "checkpoint-7.pth"),
        "--teacher_classes",
        tmp_path / "names.txt",
    ]
    run = run_main("--train_samples", 16, "--epochs", 1, *kd)
    assert f"--teacher_classes {tmp_path / 'names.txt'}: probably not the order" in run.out
    assert "prepared differently" not in run.out


def test_a_teacher_below_the_size_of_its_student_is_asked_about(run_main, short, kd):
    run = run_main(*short, *kd, "--model", "cifar_resnet20", "--epochs", 1)
    assert "Warning: the teacher has 78,042 parameters and the student 272,474" in run.out
    assert "swapped" not in run_main(*short, *kd, "--epochs", 1).out


# ----------------------------------------------------------------------- a folder of export.py


@pytest.fixture
def exported(checkpoint, tmp_path) -> tuple[Path, Path]:
    """A checkpoint of test_resnet, and the folder that export.py --format timm makes of it."""
    path = checkpoint("test_resnet")
    model, card, _ = network_from_checkpoint(str(path), "false")
    write_timm(model, card, tmp_path / "folder")
    return path, tmp_path / "folder"


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_an_exported_folder_is_a_teacher_that_is_fed_as_its_checkpoint(exported, name):
    path, folder = exported
    order = sorted(CLASSES, reverse=True)
    for file in (path, folder / name):
        teacher = load_teacher("test_resnet", str(file), 3, "cpu", classes=order)
        for key in ("mean", "std", "input_size"):
            assert teacher.info.data_config[key] == CONFIG[key]
        assert teacher.info.class_index == [CLASSES.index(name) for name in order]
        assert "(input from the checkpoint)" in teacher.info.origin


def test_an_exported_folder_is_scored_and_fine_tuned_as_its_checkpoint(
    run_main, exported, photos, tmp_path
):
    path, folder = exported
    flags = ["--eval", "true", "--model", "test_resnet", "--data_path", photos, "--resume"]
    whole, of_folder = (run_main(*flags, file) for file in (path, folder))
    assert whole.code == of_folder.code == 0, of_folder.err
    of_scores = [
        [line for line in r.out.splitlines() if line.startswith("test_")]
        for r in (whole, of_folder)
    ]
    assert of_scores[0] == of_scores[1] != []
    student = models.create_model("test_resnet", 3, 32)
    assert "matched by class name" in load_finetune(student, str(folder), KEYS, "", CLASSES[::-1])
    rows = torch.load(path)["model"]["fc.weight"].flip(0)
    assert torch.equal(student.fc.weight, rows)


def test_a_guessed_size_far_from_the_students_is_warned_of(run_main, short, tmp_path):
    torch.save(network("test_resnet").state_dict(), tmp_path / "t.pth")
    flags = [*short, "--epochs", 1, *teacher_flags(tmp_path / "t.pth", "test_resnet")]
    assert "does not say the size of its images; 160 pixels is timm's" in run_main(*flags).out
    assert "does not say" not in run_main(*flags, "--teacher_input_size", 32).out


# ------------------------------------------------------------------------- networks with two heads


def test_both_heads_are_put_in_order_renewed_and_scaled(tmp_path):
    arch, file = "deit_tiny_distilled_patch16_224", str(tmp_path / "t.pth")
    old = models.create_model(arch, 3, 32)
    data = {"classes": ["cat", "dog", "owl"]}
    torch.save({"model": old.state_dict(), "data": data, "args": {"model": arch}}, file)
    new = models.create_model(arch, 3, 32)
    line = load_finetune(new, file, KEYS, "", ["owl", "cat", "dog"])
    assert "matched by class name" in line
    for name in ("head", "head_dist"):
        mine, theirs = (net.get_submodule(name).weight for net in (new, old))
        assert torch.equal(mine, theirs[[2, 0, 1]])
    new = models.create_model(arch, 2, 32)
    line = load_finetune(new, file, KEYS, "", ["ant", "bee"])
    assert "head.bias, head.weight, head_dist.bias, head_dist.weight (other classes" in line
    with pytest.raises(UserError, match="classifier has 3 outputs, but 2 classes are expected"):
        load_teacher(arch, file, 2, "cpu", input_config={"input_size": 32})


def test_only_the_rows_of_the_classes_are_put_in_order():
    """LeViT's heads begin with a BatchNorm of the features."""
    assert output_prefixes(network("levit_128s", 3)) == ["head.linear.", "head_dist.linear."]


def test_the_scale_of_the_head_reaches_both(run_main, tmp_path):
    flags = ["--model", "deit_tiny_distilled_patch16_224", "--input_size", 32, "--epochs", 1]
    flags += ["--train_samples", 16, "--lr", 0, "--min_lr", 0, "--disable_eval", "true"]
    run_main(*flags, output_dir=tmp_path / "whole")
    run = run_main(*flags, "--head_init_scale", 0.5, output_dir=tmp_path / "half")
    whole, half = (
        torch.load(tmp_path / n / "checkpoint-0.pth")["model"] for n in ("whole", "half")
    )
    assert run.code == 0, run.err
    for name in ("head.weight", "head_dist.weight"):
        assert torch.equal(half[name], whole[name] / 2)
