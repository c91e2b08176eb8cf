"""Networks of torchvision as students or teachers, each by a function on the command line.

    python main.py --model examples.torchvision_student:shufflenet --data_path my_images

Any function that takes num_classes and returns a torch.nn.Module will do. `pretrained_cfg` tells
the input that the network expects; without it, the flags decide.
"""

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.models import mobilenet_v3_small, shufflenet_v2_x0_5

INPUT = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "input_size": (3, 224, 224)}


def shufflenet(num_classes: int) -> nn.Module:
    """ShuffleNet V2 with half of the channels (Ma et al. 2018)."""
    network = shufflenet_v2_x0_5(num_classes=num_classes)
    network.pretrained_cfg = INPUT
    # Where the classifier is; needed only by --finetune from other classes and --head_init_scale.
    network.get_classifier = lambda: network.fc
    return network


def mobilenet(num_classes: int) -> nn.Module:
    """The small MobileNet V3 (Howard et al. 2019); its input is what the flags say."""
    return mobilenet_v3_small(num_classes=num_classes)
