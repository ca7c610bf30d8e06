"""Augmentation of the embedded images while training."""

import torch
from torch import Tensor
from torch.nn import functional

from sft.models.zoo.fashion_mnist import MEAN, STD

SHIFT = 2
BLACK = -MEAN / STD


def augment(x: Tensor) -> Tensor:
    """Mirror half of the images, and shift each by up to `SHIFT` pixels in both directions.

    Shapes: ``(N, C, H, W) -> (N, C, H, W)``. What comes in at the borders is black. Drawn from
    torch's global generator.
    """
    count, _, height, width = x.shape
    mirrored = torch.rand(count) < 0.5
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, count))
    rows = down[:, None] + torch.arange(height)
    columns = right[:, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = functional.pad(x, (SHIFT, SHIFT, SHIFT, SHIFT), value=BLACK)
    image = torch.arange(count)[:, None, None]
    # Indices around the slice put the channels last; they go back to where they were.
    moved = padded[image, :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()
