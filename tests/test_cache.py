"""A teacher cache as a thing to keep and share: described, verified, merged, packed, downloaded."""

import http.server
import json
import os
import random
import re
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import is_same

import cache
from teacher import packing, upkeep
from teacher.logit_store import LogitFile, RowFormat
from utils import UserError

ROWS, CLASSES = 500, 10
MANIFEST = {
    "format": 3,
    "seed": 0,
    "teacher_arch": "resnet50",
    "teacher_path": ["sha256 0"],
    "teacher_cache_dtype": "float16",
    "teacher_cache_topk": None,
    "amp_dtype": "None",
    "classes": CLASSES,
    "images": ROWS,
    "image_contents": "1234",
    "augmented": [0.5],
    "note": {"kd_temperature": 4.0},
}


def row_of(view: int, places: np.ndarray) -> np.ndarray:
    """A different row for each view and place."""
    columns = np.arange(CLASSES) + view * 16
    return (places[:, None] + columns / 64).astype(np.float16)


def write_cache(folder: Path, rows: dict[int, range], **fields: object) -> Path:
    """A cache that holds these rows of views."""
    folder.mkdir()
    manifest = MANIFEST | {"id": folder.name} | fields
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for view, places in rows.items():
        add_rows(folder, view, np.arange(ROWS)[places.start : places.stop])
    return folder


def add_rows(folder: Path, view: int, places: np.ndarray, shift: float = 0) -> None:
    row_format, store_id = (
        RowFormat(CLASSES, "float16"),
        json.loads((folder / "manifest.json").read_text())["id"],
    )
    file = LogitFile.open(folder / f"view-{view:05d}", ROWS, row_format, store_id)
    file.write_rows(places, (row_of(view, places) + np.float16(shift)).astype(np.float16))


def complete_rows(folder: Path) -> dict[str, list[int]]:
    """Places of the complete rows of each view, every one of which must be the right one."""
    store = upkeep.open_cache(folder)
    assert upkeep.damages(store) == []
    found = {}
    for name in store.names:
        if (file := store.open(name)) is not None:
            places = np.flatnonzero(file.sums)
            assert np.array_equal(file.rows[places], row_of(int(name[5:]), places))
            found[name] = places.tolist()
    return found


@pytest.fixture
def command(capsys):
    """Runs cache.py; returns exit code, output and errors."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = cache.main(list(map(str, argv)))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty folder in place of torch's hub folder."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "teacher_caches"


def test_halves_that_are_merged_are_the_whole(tmp_path, command):
    whole = write_cache(tmp_path / "whole", {0: range(500), 1: range(500), 2: range(300)})
    first = write_cache(tmp_path / "first", {0: range(500), 1: range(0, 260)})
    second = write_cache(tmp_path / "second", {1: range(250, 500), 2: range(300)})
    merged = tmp_path / "merged"
    for _ in range(2):  # the second time adds nothing
        code, out, err = command("merge", first, second, merged)
        assert code == 0, err
        assert complete_rows(merged) == complete_rows(whole)
    assert "views       0 to 1: 500 of 500 rows, whole" in out
    assert "views       2: 300 of 500 rows, incomplete" in out
    ids = {json.loads((f / "manifest.json").read_text())["id"] for f in (first, second, merged)}
    assert len(ids) == 3
    out = command("info", write_cache(tmp_path / "gap", {0: range(500), 2: range(500)}))[1]
    assert "views       0: 500 of 500 rows, whole\nviews       2: 500" in out
    assert "--teacher_views 3 " in out


@pytest.mark.parametrize(
    ("fields", "shift", "message"),
    [
        ({}, 1, "second and {}/first hold different rows 250 of view-00001; nothing was written."),
        ({"seed": 1}, 0, "second: holds other logits than {}/first: seed is 1 there and 0 here"),
        ({"teacher_path": ["sha256 1"]}, 0, "teacher_path is"),
        ({"image_contents": "1"}, 0, "image_contents is"),
    ],
)
def test_what_does_not_belong_together_is_not_merged(tmp_path, command, fields, shift, message):
    first = write_cache(tmp_path / "first", {0: range(500), 1: range(0, 260)})
    second = write_cache(tmp_path / "second", {}, **fields)
    add_rows(second, 1, np.arange(250, 500), shift)
    code, _, err = command("merge", first, second, tmp_path / "merged")
    assert code == 2 and message.format(tmp_path) in err and err.count("\n") == 1, err
    assert not (tmp_path / "merged").exists()


def test_every_damaged_row_and_file_is_listed(tmp_path, command):
    folder = write_cache(tmp_path / "c", {0: range(500), 1: range(400), 2: range(10)})
    assert command("verify", folder)[0] == 0
    content = bytearray((folder / "view-00001.logits").read_bytes())
    for place in (7, 399, 450):  # the last is not complete
        content[place * 20] ^= 1
    (folder / "view-00001.logits").write_bytes(content)
    os.truncate(folder / "view-00002.logits", 1000)
    code, out, _ = command("verify", folder)
    assert code == 1 and len(out.splitlines()) == 2
    assert "view-00001.logits: 2 of 500 rows do not match their checksums (7, 399)" in out
    assert "view-00002.logits: has 1,000 bytes, but must have 10,000 bytes: it was cut off" in out
    for argv in (["pack", folder, tmp_path / "c.tar"], ["merge", folder, tmp_path / "m"]):
        code, _, err = command(*argv)
        assert code == 2 and err.count("\n") == 1 and "view-0000" in err
    assert not (tmp_path / "c.tar").exists() and not (tmp_path / "m").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_while_merging_and_packing_leave_nothing_false(tmp_path, hub):
    parts = [
        write_cache(tmp_path / name, {view: places for view in range(6)})
        for name, places in (("a", range(0, 260)), ("b", range(250, 500)))
    ]
    merged, pack, rng = tmp_path / "merged", tmp_path / "merged.tar", random.Random(0)

    def run_killed(action, seconds: float) -> bool:
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                action()
            finally:
                os._exit(0)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1] != 0

    def merge() -> None:
        upkeep.merge([upkeep.open_cache(part) for part in parts], merged)

    for _ in range(6):
        run_killed(merge, rng.uniform(0, 0.1))
        if (merged / "manifest.json").exists():
            rows = sum(map(len, complete_rows(merged).values()))
            if rows == 6 * 500:
                shutil.rmtree(merged)
    merge()
    assert complete_rows(merged) == {f"view-{v:05d}": list(range(500)) for v in range(6)}
    for _ in range(6):
        run_killed(lambda: upkeep.pack(upkeep.open_cache(merged), pack), rng.uniform(0, 0.05))
        if pack.exists():
            shutil.rmtree(hub, ignore_errors=True)
            run_killed(lambda: packing.local_cache(str(pack)), rng.uniform(0, 0.02))
            assert complete_rows(pack) == complete_rows(merged)
            pack.unlink()


BAD = {
    "a web page": lambda content: b"<!DOCTYPE html><html>sign in</html>",
    "not a pack": lambda content: b"PK" * 5000,
    "cut short": lambda content: content[:7000],
    "was cut short": lambda content: content[: 512 * 3],  # between two files
    "is not what was packed": lambda content: content[:700] + b"?" + content[701:],
    "its pack.json cannot be read": lambda content: content.replace(b'"sha256"', b'"sha25!"'),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_pack_is_one_line_and_leaves_nothing(tmp_path, command, hub, problem):
    folder = write_cache(tmp_path / "c", {0: range(500)})
    pack = tmp_path / "c.tar"
    assert command("pack", folder, pack)[0] == 0
    content = pack.read_bytes()
    pack.write_bytes(BAD[problem](content))
    code, _, err = command("info", pack)
    assert code == 2 and err.count("\n") == 1 and problem in err and str(pack) in err, err
    assert not any(path.is_dir() for path in hub.iterdir())
    pack.write_bytes(content)
    assert complete_rows(pack) == complete_rows(folder)


def test_a_pack_that_is_not_there_is_no_new_folder(tmp_path, command):
    code, _, err = command("info", tmp_path / "no.tar")
    assert code == 2 and "no.tar: no such file" in err and not list(tmp_path.iterdir())
    code, _, err = command("info", tmp_path)
    assert code == 2 and f"{tmp_path}: is not a teacher cache" in err


def test_a_downloaded_cache_trains_the_same_bits_elsewhere(
    run_main, command, imnet, teacher_file, tmp_path, hub
):
    """Other paths, other time stamps, no teacher; the flags are those that info prints."""
    torch.save(
        {n: v[:3] if n.startswith("fc.") else v for n, v in torch.load(teacher_file).items()},
        teacher_file,
    )
    flags = [*"--input_size 32 --epochs 2 --batch_size 8 --kd true".split()]
    flags += ["--teacher_arch", "cifar_resnet8", "--teacher_path", teacher_file]
    flags += "--mixup_mode pair --aa none --seed 2 --teacher_cache_topk 2".split()
    there = [*flags, "--teacher_cache", tmp_path / "cache"]
    filled = run_main(*there, "--data_path", imnet, output_dir=tmp_path / "filled")
    assert filled.code == 0, filled.err
    (tmp_path / "server").mkdir()
    assert command("pack", tmp_path / "cache", tmp_path / "server" / "c.tar")[0] == 0
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(imnet, elsewhere, copy_function=shutil.copyfile)
    shutil.rmtree(imnet)
    shutil.rmtree(tmp_path / "cache")
    asked = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "server"))

        def log_message(self, form, *args):
            asked.append(str(args[0]))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/c.tar"
        code, out, err = command("info", address)
        assert code == 0, err
        words = shlex.split(re.search("flags +(.*)", out)[1])
        assert words[:2] == ["--teacher_cache", address] and words[-1] == "FILE"
        words[-1] = str(teacher_file)
        rest = ["--data_path", elsewhere, "--epochs", 2, "--batch_size", 8, "--seed", 2]
        read = run_main(*words, *rest, output_dir=tmp_path / "read")
        assert read.code == 0, read.err
        refused = run_main(*words, *rest, "--teacher_cache", f"{address}.no")
        server.shutdown()
    assert asked[0] == "GET /c.tar HTTP/1.1" and sum("/c.tar " in line for line in asked) == 1
    assert "the teacher is not loaded" in read.out and read.log == filled.log
    for part in ("model", "optimizer"):
        assert is_same(read.checkpoint(1)[part], filled.checkpoint(1)[part])
    assert refused.code == 2 and "--teacher_cache" in refused.err and "404" in refused.err


def test_flags_and_folders_that_are_wrong_are_refused(tmp_path, command):
    folder = write_cache(tmp_path / "c", {0: range(500)})
    for argv, message in (
        (["pack", folder, tmp_path / "c.zip"], "ends in .tar"),
        (["pack", folder, folder], "exists already"),
        (["merge", folder, tmp_path], "is neither empty nor a teacher cache"),
        (["merge", folder, folder / "manifest.json"], "is neither empty nor a teacher cache"),
        (["pack", folder, folder / "manifest.json" / "c.tar"], "cannot write there"),
    ):
        code, _, err = command(*argv)
        assert code == 2 and message in err
    with pytest.raises(UserError, match="is neither empty"):
        upkeep.merge([upkeep.open_cache(folder)], tmp_path)
    for end in (".sums", ".logits"):  # the name that a file manager gives to a copy
        shutil.copy(folder / f"view-00000{end}", folder / f"view-00000 (1){end}")
    assert command("info", folder)[0] == command("verify", folder)[0] == 0
    assert command("pack", folder, tmp_path / "new" / "c.tar")[0] == 0
