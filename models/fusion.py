"""Layers of a network that is not trained, fused into fewer layers with the same output."""

from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fuse_layers(network: nn.Module, size: int) -> nn.Module:
    """Fuse BatchNorms into the convolutions before them, and parallel branches into one layer.

    Parallel branches become one convolution if timm knows how (RepVGG, Ding et al. 2021; FastViT
    and others). In evaluation a BatchNorm scales and shifts each channel by constants, which fit
    into the weights and bias of the convolution before it (Jacob et al. 2018, section 3.2).

    One forward pass shows which convolution feeds which BatchNorm: each convolution marks its
    output, and each BatchNorm looks for the mark on its input. Unlike torch.fx this traces nothing,
    so it works for every timm network. The result is then compared with the original.

    Args:
        network: in eval mode, for images (B, 3, size, size).
    Returns: a fused copy; the network itself if there is nothing to fuse, or if fusing would
        change its output, as when the output of a convolution is also used elsewhere.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    # timm creates the fused layers in float32, on the CPU and trainable.
    weight = next(network.parameters())
    fused = reparameterize_model(network).to(weight).requires_grad_(False).eval()
    names = {module: name for name, module in fused.named_modules()}
    pairs: list[tuple[Any, Any]] = []  # (convolution, the BatchNorm that takes its output)

    def mark(conv: nn.Module, inputs: Any, output: Any) -> None:
        output.made_by = conv

    def pair(norm: nn.Module, inputs: Any) -> None:
        if hasattr(inputs[0], "made_by"):
            pairs.append((inputs[0].made_by, norm))

    hooks = [m.register_forward_hook(mark) for m in names if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(pair) for m in names if isinstance(m, nn.BatchNorm2d)]
    image = torch.linspace(-2, 2, 3 * size**2).view(1, 3, size, size).to(weight)
    with torch.no_grad():
        fused(image)
        for hook in hooks:
            hook.remove()
        for conv, norm in pairs:
            fused.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
            # timm's BatchNormAct2d is a BatchNorm together with its activation.
            fused.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))
        expected = network(image)
        difference = (fused(image) - expected).abs().max()
    is_same = difference <= 0.01 * expected.abs().max()  # TF32 rounds to a thousandth
    return fused if is_same else network
