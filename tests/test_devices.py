"""What is asked of devices that are not here: copies, dtypes and kernels, with stand-ins."""

import http.server
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from models.weights import local_file, read_checkpoint
from runtime.device import default_amp_dtype, send


class Copied:
    """Stands in for a tensor; notes how it is copied."""

    def to(self, device: torch.device, non_blocking: bool) -> tuple:
        return device.type, non_blocking


@pytest.mark.parametrize(("device", "is_beside"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_copies_run_beside_the_cpu_on_cuda_alone(device, is_beside):
    assert send(Copied(), torch.device(device)) == (device, is_beside)


@pytest.mark.parametrize("is_supported", [True, False])
def test_mixed_precision_is_bfloat16_where_the_gpu_has_it(monkeypatch, is_supported):
    asked = {}

    def support(including_emulation=True):
        asked["emulation"] = including_emulation
        return is_supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", support)
    wanted = "bfloat16" if is_supported else "float16"
    assert default_amp_dtype(torch.device("cuda")) == wanted
    assert asked == {"emulation": False}  # which would be slower than float32
    assert default_amp_dtype(torch.device("cpu")) == "bfloat16"


def test_an_address_is_downloaded_once_per_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "teacher.pth")
    asked = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, form, *args):
            asked.append(args[0])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/teacher.pth"
        with ThreadPoolExecutor(4) as pool:
            files = set(pool.map(local_file, [address] * 4))
        server.shutdown()
    assert len(files) == 1 and asked == ["GET /teacher.pth HTTP/1.1"]
    assert torch.equal(read_checkpoint(files.pop()).content["model"]["a"], torch.ones(2))
