"""The embedded network: a CIFAR-style residual network for 28x28 grey images."""

import torch
from torch import nn

WIDTHS = (32, 64, 128)
BLOCKS_PER_STAGE = 2


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the (projected) input.

    Shapes: ``(N, I, H, W) -> (N, O, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.shortcut(x))


class FashionResNet(nn.Module):
    """Residual network with 32, 64 and 128 channels, two blocks a stage (0.70 M parameters).

    Shapes: ``(N, 1, 28, 28) -> (N, classes)`` logits. Source: He et al. 2016, section 4.2, at
    double width (thin layers gain nothing from any runtime).
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, WIDTHS[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        self.stages = nn.Sequential(*(_stage(i) for i in range(len(WIDTHS))))
        self.fc = nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = self.stages(x)
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: torch.Tensor = self.fc(x)
        return logits


def _stage(index: int) -> nn.Sequential:
    first_in = WIDTHS[max(index - 1, 0)]
    stride = 1 if index == 0 else 2
    blocks = [ResidualBlock(first_in, WIDTHS[index], stride)]
    blocks += [ResidualBlock(WIDTHS[index], WIDTHS[index]) for _ in range(BLOCKS_PER_STAGE - 1)]
    return nn.Sequential(*blocks)
