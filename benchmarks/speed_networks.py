"""ResNet-18, ResNet-50 and MobileNetV2 at ImageNet size, random weights: to time, not to score.

Batch-norm statistics are estimated on noise images, so that activations keep a sane scale.
"""

from collections.abc import Callable

import torch
from torch import nn

from sft.core.data import Batches
from sft.core.randomness import forked_rng
from sft.training.batch_norm import reestimate_batch_norm

SIZE = 224
NOISE_BATCHES, NOISE_BATCH = 2, 8
MOBILENET_STAGES = (  # expansion, channels, blocks, first stride
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class Residual(nn.Module):
    """A body and a shortcut, added and rectified; the shortcut projects where shapes differ."""

    def __init__(self, body: list[nn.Module], inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(*_conv_norm(inputs, outputs, 1, stride))
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.activation(self.body(x) + self.shortcut(x))
        return y


def basic_block(inputs: int, outputs: int, stride: int) -> Residual:
    """Two 3x3 convolutions: ``(N, I, H, W) -> (N, O, ceil(H / stride), ceil(W / stride))``."""
    body = [*_conv_norm(inputs, outputs, 3, stride), nn.ReLU(), *_conv_norm(outputs, outputs, 3, 1)]
    return Residual(body, inputs, outputs, stride)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """1x1, 3x3 with the stride, 1x1 to four times the width.

    Shapes: ``(N, I, H, W) -> (N, 4 W, ceil(H / stride), ceil(W / stride))``.
    """
    body = [*_conv_norm(inputs, width, 1, 1), nn.ReLU()]
    body += [*_conv_norm(width, width, 3, stride), nn.ReLU()]
    return Residual([*body, *_conv_norm(width, 4 * width, 1, 1)], inputs, 4 * width, stride)


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 linear projection; added to the input where shapes agree.

    Shapes: ``(N, I, H, W) -> (N, O, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.body = nn.Sequential(
            *([] if expansion == 1 else [_relu6_block(inputs, hidden, 1)]),
            _relu6_block(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return x + y if self.adds else y


def make_resnet18(seed: int = 0) -> nn.Module:
    """ResNet-18 in eval mode: ``(N, 3, 224, 224) -> (N, 1000)``, 11,689,512 parameters.

    Source: He et al. 2015 (arXiv:1512.03385).
    """
    return _drawn(_resnet18, seed)


def make_resnet50(seed: int = 0) -> nn.Module:
    """ResNet-50 in eval mode: ``(N, 3, 224, 224) -> (N, 1000)``, 25,557,032 parameters.

    Source: He et al. 2015 (arXiv:1512.03385), with the stride of a block in its 3x3.
    """
    return _drawn(_resnet50, seed)


def make_mobilenet_v2(seed: int = 0) -> nn.Module:
    """MobileNetV2 in eval mode: ``(N, 3, 224, 224) -> (N, 1000)``, 3,504,872 parameters.

    Source: Sandler et al. 2018 (arXiv:1801.04381).
    """
    return _drawn(_mobilenet_v2, seed)


def make_noise(count: int, seed: int = 0) -> torch.Tensor:
    """Standard normal images, ``(count, 3, 224, 224)``."""
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


SPEED_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": make_resnet18,
    "mobilenet-v2": make_mobilenet_v2,
}


def _drawn(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with forked_rng(seed):
        network = build().eval()
    noise = make_noise(NOISE_BATCHES * NOISE_BATCH, seed)
    return reestimate_batch_norm(network, Batches(noise, batch_size=NOISE_BATCH)).eval()


def _resnet18() -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [basic_block(inputs, outputs, stride), basic_block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def _resnet50() -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(blocks):
            layers.append(bottleneck(inputs, width, stride if index == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def _mobilenet_v2() -> nn.Module:
    layers: list[nn.Module] = [_relu6_block(3, 32, 3, 2)]
    inputs = 32
    for expansion, outputs, count, first in MOBILENET_STAGES:
        for index in range(count):
            stride = first if index == 0 else 1
            layers.append(InvertedResidual(inputs, outputs, stride, expansion))
            inputs = outputs
    layers.append(_relu6_block(inputs, 1280, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


def _relu6_block(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())
