"""Layers that hold their kernel as factors: drop-in replacements for the layers of `torch.nn`."""

from sft.core.kernels import build_layer, compose, from_canonical, geometry_of, to_canonical
from sft.layers.chains import CHAINS
from sft.layers.conv import Conv1dSFT, Conv2dSFT, Conv3dSFT
from sft.layers.conv_transpose import ConvTranspose1dSFT, ConvTranspose2dSFT, ConvTranspose3dSFT
from sft.layers.convolutional_recurrent import ConvGRU, ConvGRUCell, ConvLSTM, ConvLSTMCell
from sft.layers.factorized import FactorizedSFT
from sft.layers.interpolative import InterpolativeSFT
from sft.layers.like import factorized_like, interpolative_like, residual_like
from sft.layers.linear import LinearSFT
from sft.layers.opened import close_recurrent, open_recurrent
from sft.layers.recurrent import GRUSFT, LSTMSFT, GRUCellSFT, LSTMCellSFT
from sft.layers.residual import ResidualSFT

__all__ = [
    "CHAINS",
    "GRUSFT",
    "LSTMSFT",
    "Conv1dSFT",
    "Conv2dSFT",
    "Conv3dSFT",
    "ConvGRU",
    "ConvGRUCell",
    "ConvLSTM",
    "ConvLSTMCell",
    "ConvTranspose1dSFT",
    "ConvTranspose2dSFT",
    "ConvTranspose3dSFT",
    "FactorizedSFT",
    "GRUCellSFT",
    "InterpolativeSFT",
    "LSTMCellSFT",
    "LinearSFT",
    "ResidualSFT",
    "build_layer",
    "close_recurrent",
    "compose",
    "factorized_like",
    "from_canonical",
    "geometry_of",
    "interpolative_like",
    "open_recurrent",
    "residual_like",
    "to_canonical",
]
