"""A small depthwise network for 28x28 grey images, of the kind that is hard to quantise.

`examples/train_fashion_mobilenet.py` trained it; its weights lie in `networks/`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).parent / "networks" / "fashion_mobilenet.safetensors"
STAGES = ((16, 1, 1), (24, 2, 2), (40, 3, 2), (80, 2, 1))  # channels, blocks, first stride
EXPANSION = 4


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 linear projection; added to the input where shapes agree.

    Shapes: ``(N, I, H, W) -> (N, O, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = EXPANSION * inputs
        self.expand = _block(inputs, hidden, 1)
        self.depthwise = _block(hidden, hidden, 3, stride, groups=hidden)
        self.project = _block(hidden, outputs, 1)[:2]
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class FashionMobileNet(nn.Module):
    """MobileNetV2 in small: ``(N, 1, 28, 28) -> (N, 10)`` logits.

    Source: Sandler et al. 2018 (arXiv:1801.04381), with fewer, thinner blocks and earlier strides.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = _block(1, 16, 3)
        blocks: list[nn.Module] = []
        inputs = 16
        for outputs, count, first in STAGES:
            for index in range(count):
                blocks.append(InvertedResidual(inputs, outputs, first if index == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _block(inputs, 240, 1)
        self.classifier = nn.Linear(240, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(self.blocks(self.stem(x)))
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: torch.Tensor = self.classifier(x)
        return logits


def load_fashion_mobilenet() -> nn.Module:
    """The trained network in evaluation mode."""
    network = FashionMobileNet()
    network.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    return network.eval()


def _block(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())
