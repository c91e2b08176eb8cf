"""The command line: the guide's defaults, and a clear end for everything a user can get wrong."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, teacher_flags, write_images

from arguments.flags import get_args_parser
from arguments.parsing import parse_args
from tools import write_flags


def flags_of(parser) -> dict:
    return {s: a for a in parser._actions for s in a.option_strings if s.startswith("--")}


def test_the_five_flags_have_the_guides_defaults():
    args = parse_args([])
    assert (args.kd, args.kd_alpha, args.kd_temperature) == (False, 0.7, 4.0)
    assert args.teacher_path is None and args.teacher_arch is None


def test_every_flag_of_the_family_is_accepted():
    family = """
    kd teacher_path teacher_arch kd_alpha kd_temperature model batch_size epochs update_freq
    drop_path input_size model_ema model_ema_decay model_ema_force_cpu model_ema_eval opt
    opt_eps opt_betas clip_grad momentum weight_decay weight_decay_end lr layer_decay min_lr
    warmup_epochs warmup_steps color_jitter aa smoothing train_interpolation crop_pct reprob
    remode recount mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode finetune
    head_init_scale model_key model_prefix data_path eval_data_path nb_classes
    imagenet_default_mean_and_std data_set output_dir log_dir device seed resume auto_resume
    save_ckpt save_ckpt_freq save_ckpt_num start_epoch eval dist_eval disable_eval num_workers
    pin_mem use_amp dist_url
    """
    assert {f"--{name}" for name in family.split()} <= flags_of(get_args_parser()).keys()


def test_every_flag_states_its_default_or_that_it_has_none():
    for flag, action in flags_of(get_args_parser()).items():
        states = action.default not in (None, "") or "(default: " in action.help
        without = "required|folder|file|timm architecture|prefix|ignored|expected|resume from|ratio"
        assert states or re.search(without, action.help), flag


def test_every_help_line_stands_alone():
    for flag, action in flags_of(get_args_parser()).items():
        assert len(action.help.split()) >= 2, flag
        first = action.help.split()[0].lower()
        assert first not in ("it", "its", "of", "them", "one", "where", "so"), flag
        assert all(choice in action.help for choice in action.choices or ()), flag


def test_help_fits_250_lines_and_shows_each_flag_beside_its_meaning(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # as if stdout is a pipe
    lines = get_args_parser().format_help().splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 100
    for flag, action in flags_of(get_args_parser()).items():
        (line,) = (line for line in lines if f" {flag} " in line[: len(flag) + 8])
        assert action.help[:20] in line or flag == "--imagenet_default_mean_and_std"


def test_the_page_of_flags_is_what_the_parser_says():
    assert (ROOT / "docs" / "flags.md").read_text() == write_flags.page()


def test_the_guide_is_kept_and_the_readme_has_its_commands():
    guide, readme = ((ROOT / name).read_text() for name in ("docs/guide.md", "README.md"))
    for text in (
        "`--kd_temperature`: temperature for the distillation loss (default: 4.0)",
        "- **Training**: combined loss = (1-α) × CE_loss + α × KD_loss",
        "4. **Alpha tuning**: common values are 0.6-0.8, higher for more challenging data sets",
        "run the teacher on the CPU (`--teacher_device cpu`)",
    ):
        assert text in guide
    recipes = re.findall(r"```bash\npython main.py \\\n.*?```", guide, re.DOTALL)
    assert len(recipes) == 3
    for recipe in recipes:
        assert recipe in readme


def test_links_between_the_pages_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "data").glob("*.md")]
    assert len(pages) > 10
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            if path.startswith(("http://", "https://")):
                continue
            linked = page.parent / path if path else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
                assert anchor in slugs, f"{page.name}: {target}"


def refused_without_torch(*flags: object) -> str:
    """The error of main.py in a process of its own, which must not import torch."""
    code = f"import sys; sys.argv = {['main.py', *map(str, flags)]}; import runpy\n"
    code += "try: runpy.run_path('main.py', run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_kd_alone_names_the_missing_flags_at_once_and_exits_2():
    missing = "--kd true needs --teacher_path and --teacher_arch"
    assert missing in refused_without_torch("--kd", "true")


@pytest.mark.parametrize("flag", ["--teacher_path", "--finetune", "--resume"])
def test_a_mistyped_file_is_reported_before_torch_is_imported(flag, teacher_file, tmp_path):
    """And so before any image is looked for: the data folder does not even exist."""
    flags = [*teacher_flags(teacher_file), "--data_path", tmp_path / "none", flag, "resnet19"]
    problem = f"{flag} resnet19: no such file; pass the path of a checkpoint file"
    assert problem in refused_without_torch(*flags)


@pytest.mark.parametrize("flag", ["--model", "--teacher_arch"])
def test_a_mistyped_architecture_is_reported_before_any_image_is_looked_for(
    flag, teacher_file, run_main, tmp_path
):
    flags = [*teacher_flags(teacher_file), "--data_path", tmp_path / "none", flag, "resnet8"]
    run = run_main(*flags)
    known = "timm knows no such architecture; did you mean cifar_resnet8, resnet18"
    assert run.code == 2 and f"{flag} resnet8: {known}" in run.err


def refused(run, *texts: str) -> None:
    assert run.code == 2, run.out + run.err
    for text in texts:
        assert text in run.err
    assert "Traceback" not in run.err and "Epoch" not in run.out
    assert len(run.err.strip().splitlines()) <= 2


def test_a_teacher_path_that_is_a_folder(run_main, tmp_path):
    refused(run_main(*teacher_flags(tmp_path)), "is a folder")


@pytest.mark.parametrize("length", [0, 100, 5000])
def test_a_teacher_file_cut_short(run_main, teacher_file, length):
    teacher_file.write_bytes(teacher_file.read_bytes()[:length])
    refused(run_main(*teacher_flags(teacher_file)), "not a readable checkpoint")


def test_a_teacher_file_that_would_run_code_is_refused_and_does_not(run_main, tmp_path):
    class Malice:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it_ran",)

    torch.save({"model": Malice()}, tmp_path / "zip.pth")
    torch.save({"model": Malice()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("zip.pth", "old.pth"):
        refused(
            run_main(*teacher_flags(tmp_path / name)), "refused, since reading it would run code"
        )
    with open(tmp_path / "plain.pth", "wb") as file:
        pickle.dump({"model": Malice()}, file)
    refused(run_main(*teacher_flags(tmp_path / "plain.pth")), "not a readable checkpoint")
    assert not (tmp_path / "it_ran").exists()


def test_a_checkpoint_of_another_architecture_says_what_differs(run_main, teacher_file):
    run = run_main(*teacher_flags(teacher_file, "cifar_resnet20"))
    refused(run, "--teacher_path", "does not fit", "layer1.1.bn1.bias", "pass the architecture")
    run = run_main("--model", "cifar_resnet20", "--finetune", teacher_file)
    refused(run, "--finetune", "does not fit the model", "layer1.1.bn1.bias")


def test_a_missing_data_folder(run_main, tmp_path):
    refused(run_main("--data_path", tmp_path / "none"), f"{tmp_path / 'none'}: is not a folder")
    (tmp_path / "images.zip").touch()
    refused(run_main("--data_path", tmp_path / "images.zip"), "images.zip: is a file; pass a")


def test_an_empty_data_folder(run_main, tmp_path):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    (tmp_path / "val").mkdir()
    refused(run_main("--data_path", tmp_path, "--input_size", 32), "holds no images")


def test_train_and_val_with_different_classes(run_main, tmp_path):
    write_images(tmp_path / "train", ["ant", "bee"])
    write_images(tmp_path / "val", ["ant", "wasp"])
    refused(run_main("--data_path", tmp_path, "--input_size", 32), "only in training: bee")


def test_a_corrupt_image_ends_the_run_with_its_name(run_main, imnet):
    broken = imnet / "train" / "bee" / "3.jpg"
    broken.write_bytes(b"not a picture")
    run = run_main("--data_path", imnet, "--input_size", 32, "--batch_size", 4, "--epochs", 9)
    assert run.code == 2 and str(broken) in run.err and "Traceback" not in run.err


def test_an_output_directory_that_can_not_be_written(run_main, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(run_main(output_dir=tmp_path / "file" / "out"), "--output_dir", "cannot write there")


def test_fewer_images_than_a_batch_are_trained_on_all_the_same(run_main, tmp_path):
    flags = ["--epochs", 1, "--batch_size", 16, "--disable_eval", "true", "--train_samples"]
    run = run_main(*flags, 10, output_dir=tmp_path)
    assert run.code == 0, run.err
    assert (
        "--batch_size 16 on 1 process(es) is more than the 10 training images: batches of 10"
        in (run.out)
    )
    assert run.checkpoint(0)["args"]["batch_size"] == run.checkpoint(0)["global_batch"] == 10
    run = run_main(*flags, 9)  # mixup needs pairs
    assert run.code == 0 and "batches of 8 are used" in run.out
    assert "1 of 9 images do not fill a batch" in run.out
    refused(run_main(*flags, 1), "1 training image(s) are too few for 1 process(es)")


def test_images_that_do_not_fill_a_batch_are_told_of(run_main, teacher_file):
    flags = ["--epochs", 1, "--batch_size", 50, "--disable_eval", "true", "--train_samples"]
    run = run_main(*flags, 90)
    told = "--batch_size 50: 40 of 90 images do not fill a batch and are left out of each epoch"
    assert told in run.out and "--batch_size 44 leaves out 2" in run.out
    assert "do not fill" not in run_main(*flags, 105).out  # 5 of 105
    kd = teacher_flags(teacher_file)
    run = run_main(*flags, 105, *kd, "--teacher_views", 1)
    assert (
        "--teacher_views 1: 5 of 105 images do not fill a batch and are never trained on" in run.out
    )


REFUSED = {
    "--train_samples 2000": "--train_samples 2000: at most 1437",
    "--nb_classes 11": "--nb_classes 11: the data has 10 classes",
    "--data_set wds/nowhere": "--data_set wds/nowhere: timm could not open it",
    "--opt adamm": "--opt adamm",
    "--device nonsense": "--device nonsense: Expected one of cpu",
    "--use_amp true --amp_dtype float16": "--amp_dtype float16",  # on the CPU
}


@pytest.mark.parametrize("flags", REFUSED)
def test_values_that_cannot_work_with_this_data_or_device_are_refused(run_main, flags):
    refused(run_main(*flags.split()), REFUSED[flags])


def test_many_tasks_without_torchrun(run_main, monkeypatch):
    """As with 'srun python main.py': each process would train the whole run in the same folder."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    refused(run_main(), "srun started 8 processes", "torchrun")


def test_a_gpu_that_processes_would_share(run_main, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    refused(run_main("--device", "cuda:1"), "--device cuda:1: 8 processes", "pass cuda")
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    refused(run_main("--device", "cuda"), "which has 4 GPU(s)", "--nproc_per_node=4")
