"""The temperature that calibrates a checkpoint, kept in a small file beside the checkpoint."""

import copy
import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

from models.checkpoint import Weights, local_file
from models.weights import output_prefixes
from utils import read_map, write_whole


class Tempered(nn.Module):
    """A network whose logits are divided by a temperature (Guo et al. 2017)."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, C)"""
        return self.network(images) / self.temperature

    def folded(self) -> nn.Module:
        """A copy of the network whose classifier divides by the temperature."""
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            for prefix in output_prefixes(network):
                for parameter in network.get_submodule(prefix[:-1]).parameters():
                    parameter.div_(self.temperature)
        return network


def file_of(checkpoint: str) -> Path:
    """The file beside a checkpoint (a path or an address) that holds its temperatures."""
    path = Path(local_file(checkpoint))
    return path.with_name(f"{path.name}.calibration.json")


def _identity(weights: Weights) -> str:
    """What identifies weights, wherever they are stored: a resumed run replaces checkpoints."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights.state.items()):
        total.update(name.encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{'EMA' if weights.is_ema else 'raw'} {total.hexdigest()[:16]}"


def _read(path: Path) -> dict[str, float]:
    """Temperatures by the identity of their weights. Raises: UserError for a damaged file."""
    problem = f"{path}: does not hold the temperatures of a checkpoint"
    return read_map(path, float, problem, "remove it, or calibrate the checkpoint again")


def read_temperature(weights: Weights) -> float:
    """The temperature that was kept for the weights of a checkpoint; 1 if there is none.

    Warns on stderr if the file beside the checkpoint is for other weights.
    Raises: UserError for a damaged file.
    """
    path = file_of(weights.source)
    temperatures, identity = _read(path), _identity(weights)
    if temperatures and identity not in temperatures:
        line = f"Warning: {path} holds no temperature for these weights; calibrate them again"
        print(line, file=sys.stderr)
    return temperatures.get(identity, 1.0)


def write_temperature(weights: Weights, temperature: float) -> Path:
    """Keep the temperature of the weights of a checkpoint; returns the file beside the checkpoint.

    Raises: UserError if the file system refuses.
    """
    path = file_of(weights.source)
    temperatures = _read(path) | {_identity(weights): temperature}
    write_whole(path, json.dumps(temperatures, indent=1) + "\n")
    return path
