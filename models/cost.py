"""What a network costs to use: parameters, multiply-adds, and time on this machine."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from runtime.device import synchronize

LARGE_BATCH = 32  # images
ROUNDS = 5  # of measurements, whose medians give a range
MOST = 4.0  # ms of a round that repetitions may take
LONGEST = 1000.0  # ms of a large batch above which it is not measured


@dataclass(frozen=True)
class Cost:
    """Of a network in evaluation, on the device that it is on."""

    parameters: int
    multiply_adds: int  # per image
    ms_single: float  # for a batch of one image, median over rounds
    ms_large: float | None  # for a batch of LARGE_BATCH images; None if that takes too long
    ranges: dict[str, tuple[float, float]]  # of both times: the fastest and the slowest round


def cost_of(network: nn.Module, input_size: int, parameters: int) -> Cost:
    """Count and time a network on images of random numbers; it is left frozen and in eval mode.

    Args:
        network: images (B, 3, H, W) -> logits.
        input_size: H and W.
        parameters: of the network before its layers were fused.
    """
    # The counter fails for a parameter with a gradient that is the input of a layer.
    network.eval().requires_grad_(False)
    device = next(network.parameters()).device
    single = torch.randn(1, 3, input_size, input_size, device=device)
    single = single.to(memory_format=torch.channels_last)
    # Attention is counted only if it is computed step by step.
    plain_attention = sdpa_kernel(SDPBackend.MATH)
    unknown = {torch.ops.aten.cudnn_convolution_relu: _of_conv_relu}
    counter = FlopCounterMode(display=False, custom_mapping=unknown)
    with torch.inference_mode(), plain_attention, counter:
        network.forward(single)  # what is compiled or hooked does not count
    first = _milliseconds(network, single, repeats=1)
    batches = {"ms_single": single}
    if LARGE_BATCH * first < LONGEST:
        batches["ms_large"] = single.expand(LARGE_BATCH, -1, -1, -1).contiguous()
        _milliseconds(network, batches["ms_large"], repeats=1)  # takes memory, which is then kept
    times: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(ROUNDS):  # in turn, so that a busy moment does not fall on one batch size
        for name, images in batches.items():
            repeats = max(1, min(4, int(MOST / (len(images) * first))))
            times[name].append(_milliseconds(network, images, repeats))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Cost(
        parameters,
        counter.get_total_flops() // 2,  # two operations, a product and a sum, per multiply-add
        medians["ms_single"],
        medians.get("ms_large"),
        {name: (min(values), max(values)) for name, values in times.items()},
    )


def _of_conv_relu(x: Any, weight: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    """Operations of models.fusion.ConvReLU, from the shapes of its input, weight and output."""
    return conv_flop_count(x, weight, out_shape)


def total(costs: list[Cost]) -> Cost:
    """The cost of several networks, one after the other."""
    larges = [cost.ms_large for cost in costs]
    names = set.intersection(*(set(cost.ranges) for cost in costs))
    limits = {name: zip(*(cost.ranges[name] for cost in costs), strict=True) for name in names}
    return Cost(
        sum(cost.parameters for cost in costs),
        sum(cost.multiply_adds for cost in costs),
        sum(cost.ms_single for cost in costs),
        None if None in larges else sum(large for large in larges if large is not None),
        {name: (sum(lows), sum(highs)) for name, (lows, highs) in limits.items()},
    )


@torch.inference_mode()
def _milliseconds(network: nn.Module, images: torch.Tensor, repeats: int) -> float:
    """The median time of a forward pass, after one of one image that is not counted."""
    times = []
    network.forward(images[:1])
    for _ in range(repeats):
        synchronize(images.device)
        started = time.perf_counter()
        network.forward(images)
        synchronize(images.device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)
