"""The network of the files here; its bytes are part of what the cache belongs to, so keep them."""

import torch
from torch import nn


class Network(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))


def make(num_classes: int) -> nn.Module:
    return Network(num_classes)
