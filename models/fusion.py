"""Layers of a network that is not trained, fused into fewer layers with the same output."""

from collections import Counter
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from runtime.device import may_choose_kernels, untried_kernels


def fuse_layers(network: nn.Module, size: int, *, for_device: bool = False) -> nn.Module:
    """Fuse BatchNorms into the convolutions before them, and parallel branches into one layer.

    Parallel branches become one convolution if timm knows how (RepVGG, Ding et al. 2021; FastViT
    and others). In evaluation a BatchNorm scales and shifts each channel by constants, which fit
    into the weights and bias of the convolution before it (Jacob et al. 2018, section 3.2). The
    result is compared with the original.

    Args:
        network: in eval mode, for images (B, 3, size, size).
        for_device: whether to also put layers in place of convolutions that compute the same in
            less time on the network's device.
    Returns: a fused copy, in which a convolution whose output is also used elsewhere is left as it
        is; the network itself if it has no BatchNorm, or if fusing would change its output.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    # timm creates the fused layers in float32, on the CPU and trainable.
    weight = next(network.parameters())
    fused = reparameterize_model(network).to(weight).requires_grad_(False).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    images[0] = torch.linspace(-2, 2, images[0].numel()).view_as(images[0])  # smooth, then noise
    images = images.to(weight)
    with torch.no_grad(), untried_kernels():
        names = {module: name for name, module in fused.named_modules()}
        for conv, norm in find_pairs(fused, images, nn.Conv2d, nn.BatchNorm2d):
            # Not weights that are computed anew in each pass, nor statistics of the batch.
            if "weight" not in conv._parameters or norm.running_mean is None:
                continue
            fused.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
            # timm's BatchNormAct2d is a BatchNorm together with its activation.
            fused.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))
        if for_device and may_choose_kernels(images.device):
            join_biases(fused, images)
        elif for_device and images.is_cpu and torch.backends.mkldnn.is_available():
            pack_weights(fused)
        expected = network(images)
        difference = (fused(images) - expected).abs().max()
    is_same = difference <= 0.01 * expected.abs().max()  # TF32 rounds to a thousandth
    return fused if is_same else network


def join_biases(network: nn.Module, images: torch.Tensor) -> None:
    """Replace convolutions whose bias would take a pass of its own, for a network on CUDA.

    Such a pass takes longer than the BatchNorm that the bias came from (docs/benchmarks.md).
    """
    names = {module: name for name, module in network.named_modules()}
    relus = dict(find_pairs(network, images, nn.Conv2d, nn.ReLU))
    for conv, name in names.items():
        if not is_plain(conv) or conv.bias is None or conv.groups > 1:
            continue
        if conv in relus:
            network.set_submodule(name, ConvReLU(conv))
            network.set_submodule(names[relus[conv]], nn.Identity())
        elif conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0):
            network.set_submodule(name, PointwiseConv(conv))


def pack_weights(network: nn.Module) -> None:
    """Replace convolutions whose weights would be rearranged in each pass, on a CPU with oneDNN."""
    for name, conv in list(network.named_modules()):
        if is_plain(conv):
            network.set_submodule(name, PackedConv(conv))


def is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a convolution that pads with zeros, by numbers of pixels."""
    is_conv = type(layer) is nn.Conv2d
    return is_conv and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def find_pairs(
    network: nn.Module, images: torch.Tensor, first: type[nn.Module], second: type[nn.Module]
) -> list[tuple[Any, Any]]:
    """The layers of one type whose output only a layer of a second type reads, with that layer.

    One forward pass shows them: each first layer marks its output, each second layer looks for the
    mark on its input, and calls that read a marked tensor are counted. Unlike torch.fx this traces
    nothing, so it works for every timm network.
    """
    pairs, runs, readings = [], Counter[nn.Module](), Counter[nn.Module]()

    def mark(layer: nn.Module, inputs: Any, output: Any) -> None:
        output.made_by = layer, output._version

    def maker_of(value: Any) -> Any:
        maker, version = getattr(value, "made_by", (None, None))
        return maker if maker and version == value._version else None  # else changed in place

    def pair(layer: nn.Module, inputs: Any) -> None:
        runs[layer] += 1
        if maker := maker_of(inputs[0]):
            pairs.append((maker, layer))

    class Reading(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            makers = [maker for maker in map(maker_of, tree_leaves((args, kwargs))) if maker]
            result = function(*args, **(kwargs or {}))
            if any(isinstance(value, torch.Tensor) for value in tree_leaves(result)):  # not a shape
                readings.update(makers)
            return result

    modules = list(network.modules())
    hooks = [m.register_forward_hook(mark) for m in modules if isinstance(m, first)]
    hooks += [m.register_forward_pre_hook(pair) for m in modules if isinstance(m, second)]
    with Reading():
        network(images)
    for hook in hooks:
        hook.remove()
    return [(maker, layer) for maker, layer in pairs if runs[layer] == readings[maker] == 1]


class ReplacedConv(nn.Conv2d):
    """Takes the place of a convolution, with its weights and its names."""

    def __init__(self, conv: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)


class ConvReLU(ReplacedConv):
    """A convolution with a bias and the ReLU after it; on CUDA one call of cuDNN."""

    @staticmethod
    def is_one_call(x: torch.Tensor) -> bool:
        """Whether cuDNN computes it; the compiler fuses by itself."""
        return x.is_cuda and not torch.compiler.is_compiling()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w), in autocast's dtype if it is on, else in that of x"""
        if not self.is_one_call(x):
            return F.relu(super().forward(x))
        assert self.bias is not None
        is_cast = torch.is_autocast_enabled("cuda")  # which does not know cuDNN's call
        dtype = torch.get_autocast_dtype("cuda") if is_cast else x.dtype
        x, weight, bias = x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)
        place: Any = self.stride, self.padding, self.dilation, self.groups
        return torch.cudnn_convolution_relu(x, weight, bias, *place)


class PointwiseConv(nn.Linear):
    """A convolution of 1 x 1 pixels as a matrix product, which adds the bias by itself.

    In torch.channels_last both permutations only change how the memory is read.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, device="meta")
        assert conv.bias is not None
        self.weight = nn.Parameter(conv.weight.flatten(1), requires_grad=False)
        self.bias = nn.Parameter(conv.bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, H, W)"""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PackedConv(ReplacedConv):
    """A convolution whose weights lie in memory as oneDNN reads them.

    Otherwise torch rearranges them in each pass. The output is the same, bit for bit, except for
    batches of a few images for which torch does not use oneDNN. Single images are left to torch:
    weights that are arranged for one image suit a batch less well.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.packed: torch.Tensor | None = None
        self.packed_from: tuple[int, int] | None = None  # the weights' place and version then

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: torch can do neither with weights in oneDNN's order."""
        return self.__dict__ | {"packed": None}

    def _apply(self, *args: Any, **keywords: Any) -> "PackedConv":
        self.packed = None  # to(), half() and the like change the weights
        return super()._apply(*args, **keywords)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w)"""
        weight = self.weight
        is_float = x.is_cpu and x.dtype == weight.dtype == torch.float32
        has_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        is_other = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        if not is_float or has_gradient or is_other or len(x) == 1:
            return super().forward(x)
        place = self.padding, self.stride, self.dilation, self.groups
        weights = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if self.packed is None or self.packed_from != weights:  # new, changed or replaced
            pack = torch.ops.mkldnn._reorder_convolution_weight
            self.packed, self.packed_from = pack(weight, *place, x.shape), weights
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, self.packed, self.bias, *place, "none", [], "")
