"""The page about a distillation, and the card of a model."""

import json
import sys
from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from PIL import Image

import export
from pipeline import report
from pipeline.commands import Commands
from pipeline.images import Images
from pipeline.plan import Network, Scale
from reporting import page

CLASSES = ["<b>&", "cat"]
EMPTY = {"meta", "img", "br"}  # elements without an end


class WellFormed(HTMLParser):
    """Collects the text of a page; fails at an element that is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.text, self.elements = [], [], Counter()
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements[tag] += 1
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def distilled(tmp_path, monkeypatch):
    """A finished distillation of made-up figures; writes its page and returns it."""
    root, out = tmp_path / "photos", tmp_path / "out"
    rng = np.random.default_rng(0)
    (out / "images").mkdir(parents=True)
    root.mkdir()
    names = [f"{number}.png" for number in range(4)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(root / name)
    truths = [CLASSES[0], CLASSES[0], CLASSES[1], CLASSES[1]]
    lines = [f'"{n}","{t}"' for n, t in zip(names, truths, strict=True)]
    (out / "images" / "test.csv").write_text("\n".join(["path,class", *lines]))
    for kd, base in ((False, 60.0), (True, 70.0)):
        for seed in range(2):
            run = out / "students" / f"kd={str(kd).lower()},seed={seed}"
            run.mkdir(parents=True)
            args = {
                "kd": kd,
                "seed": seed,
                "val_images": "100:0123456789abcdef",
                "epochs": 2,
                "given": [],
            }
            (run / "args.json").write_text(json.dumps(args))
            log = [{"epoch": e, "test_acc1": base + e + seed, "test_ece": 5.0} for e in range(2)]
            (run / "log.txt").write_text("\n".join(map(json.dumps, log)))
    (out / "model").write_bytes(b"weights")

    def answer(self, stage, jobs):
        """In place of predict.py: the student takes the second image for a cat."""
        (out / "logs").mkdir(exist_ok=True)
        for job in jobs:
            taken = truths if "teacher" in job.name else [CLASSES[0], *[CLASSES[1]] * 3]
            best = [{"classes": [{"name": n, "probability": 0.875}]} for n in taken]
            self.log_of(job.name).write_text("\n".join(map(json.dumps, best)))

    monkeypatch.setattr(Commands, "run_all", answer)
    images = Images(
        root=str(root), folder=out / "images", classes=CLASSES, labeled=8, test=4, unlabeled=0,
        folds=1, chosen_by=2, chance=50, side=20, pile="", identity="0123",
    )  # fmt: skip
    teacher = Network("big=w.pth", (), "", "", 32, 100)
    plan = SimpleNamespace(
        images=images, student=Network("small", (), "", "", 32, 10), scale=Scale(1, 2, 1),
        teachers=[(teacher, "scratch"), (teacher._replace(text="huge"), "scratch")],
    )  # fmt: skip
    verdict = {"verdict": "helps", "mean": 10.0, "half_width": 4.5, "seeds": 2}
    scores = {"alone": 50.0, "big=w.pth, scratch": 75.0}
    result = {"choose": scores, "teacher": [teacher.name, "scratch"]}
    result |= {"line": "", "verdict": verdict, "files": [str(out / "model")]}
    result["temperature"] = 0.5

    def write() -> str:
        student = "students/kd=true,seed=0"
        words = [str(root), "--out", "my <model>"]
        file = report.write_report(plan, Commands(out, {}), result, student, "t.pth", words)
        return file.read_text()

    return write


def test_the_page_has_verdict_interval_and_mistakes_and_escapes_names(distilled, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
    html = distilled()
    found = WellFormed(html)
    text = " ".join(found.text)
    assert "Distillation helps: +10.0 ± 4.5 points" in text
    assert "+5.5 to +14.5 points (2 seeds" in text and "4 images" in text
    assert "61.50 ± 0.71" in text and "71.50 ± 0.71" in text  # means and deviations of 61, 62
    assert "divides its logits by 0.50, fitted on the 4 images" in text
    assert "pip install matplotlib" in text and found.elements["img"] == 1  # the mistake
    plain = text.replace("\N{NO-BREAK SPACE}", " ")
    assert "(1 of 1, the surest first)" in text and "cat, 88 %" in plain
    assert "<b>&, 88 %" in plain and found.elements["b"] == 0  # the teacher, with a foreign name
    assert "--out 'my <model>'" in text
    assert text.count("not tried, for --budget") == 1  # the second teacher
    assert "75.0" in found.text and "the teacher" in found.text
    assert "http" not in html.replace("http-equiv", "") and found.elements["script"] == 0


def test_pictures_are_in_the_page(distilled):
    pytest.importorskip("matplotlib")
    found = WellFormed(distilled())
    assert found.elements["img"] == 3


def test_the_matrix_counts_right_and_wrong_answers():
    result = report.report_of([("a", 0.9), ("b", 0.6), ("b", 0.7)], [0, 0, 1], ["a", "b"])
    cells = [text for text in WellFormed(page.matrix(result)).text if text.strip()]
    assert cells[:10] == ["a", "b", "a", "1", "1", "50.0 %", "b", "·", "1", "100.0 %"]


class Hub:
    """Stands in for the hub of huggingface_hub, which it reaches over the network."""

    files: list[str] = []

    def __init__(self, library_name):
        pass

    def create_repo(self, name, exist_ok):
        return SimpleNamespace(repo_id=f"me/{name}")

    def file_exists(self, name, file):
        return False

    def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
        if not self.files:
            raise OSError("Network is unreachable")
        assert repo_id == "me/birds" and ignore_patterns is None
        assert sorted(file.name for file in folder_path.iterdir()) == self.files


def test_an_exported_folder_has_a_model_card_and_is_uploaded(
    checkpoint, tmp_path, monkeypatch, capsys
):
    file = checkpoint("test_resnet", scores={"test_acc1": 87.654})
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)

    def push(out: str, token: str | None, name: str = "birds") -> tuple[int, str, str]:
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        argv = [str(file), "--format", "timm", "--out", str(tmp_path / out), "--push_to_hub", name]
        code, outputs = export.main(argv), capsys.readouterr()
        return code, outputs.out, outputs.err

    for out, token, name, words in (
        ("a", None, "birds", "hf auth login"),
        ("a", "secret", "birds of/a/feather", "pass OWNER/NAME"),
        ("b", "secret", "birds", "(Network is unreachable)"),
    ):
        code, _, err = push(out, token, name)
        assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "a").exists() and (tmp_path / "b").exists()
    monkeypatch.setattr(Hub, "files", ["README.md", "config.json", "model.safetensors"])
    code, out, _ = push("c", "secret")
    assert code == 0 and "hf-hub:me/birds" in out
    card = huggingface_hub.ModelCard.load(tmp_path / "c" / "README.md")
    assert card.data.library_name == "timm" and card.data.pipeline_tag == "image-classification"
    for words in ("test_resnet", "87.65 %", "timm.create_model", "python predict.py"):
        assert words in card.text
