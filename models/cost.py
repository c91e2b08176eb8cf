"""What a network costs to use: parameters, multiply-adds, and time on this machine."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from runtime.device import synchronize

LARGE_BATCH = 32  # images
MOST_SECONDS = 0.02  # spent on the repetitions of one batch size
LEAST_REPEATS = 3
LONGEST = 3.0  # seconds of a large batch above which it is not measured


@dataclass(frozen=True)
class Cost:
    """Of a network in evaluation; times are medians on the device that it is on."""

    parameters: int
    multiply_adds: int  # per image
    ms_single: float  # for a batch of one image
    ms_large: float | None  # for a batch of LARGE_BATCH images; None where that takes too long


def cost_of(network: nn.Module, input_size: int, parameters: int) -> Cost:
    """Count and time a network on images of random numbers. The network is left in eval mode.

    Args:
        network: images (B, 3, H, W) -> logits.
        input_size: H and W.
        parameters: of the network before its layers were fused.
    """
    network.eval()
    device = next(network.parameters()).device
    single = torch.randn(1, 3, input_size, input_size, device=device)
    single = single.to(memory_format=torch.channels_last)
    # Attention is counted only where it is computed step by step.
    plain_attention = sdpa_kernel(SDPBackend.MATH)
    with torch.inference_mode(), plain_attention, FlopCounterMode(display=False) as counter:
        network.forward(single)  # what is compiled or hooked does not count
    seconds = _median_seconds(network, single)
    large = None
    if LARGE_BATCH * seconds < LONGEST:
        large = 1000 * _median_seconds(network, single.expand(LARGE_BATCH, -1, -1, -1).contiguous())
    # Two operations, a product and a sum, are one multiply-add.
    return Cost(parameters, counter.get_total_flops() // 2, 1000 * seconds, large)


def total(costs: list[Cost]) -> Cost:
    """The cost of several networks, one after the other."""
    larges = [cost.ms_large for cost in costs]
    return Cost(
        sum(cost.parameters for cost in costs),
        sum(cost.multiply_adds for cost in costs),
        sum(cost.ms_single for cost in costs),
        None if None in larges else sum(large for large in larges if large is not None),
    )


@torch.inference_mode()
def _median_seconds(network: nn.Module, images: torch.Tensor) -> float:
    """The median time of a forward pass, after one that is not counted."""
    found: list[float] = []
    network.forward(images)
    while len(found) < LEAST_REPEATS or (sum(found) < MOST_SECONDS and len(found) < 20):
        synchronize(images.device)
        started = time.perf_counter()
        network.forward(images)
        synchronize(images.device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)
