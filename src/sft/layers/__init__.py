"""Layers that hold their kernel as factors: drop-in replacements for the layers of `torch.nn`."""

from sft.layers.conv2d import Conv2dSFT

__all__ = ["Conv2dSFT"]
