"""Two small networks for the spoken keywords: one of 1-d convolutions, one recurrent.

`examples/train_keyword_networks.py` trained both; their weights lie in `networks/`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from sft.core.errors import InputError

WEIGHTS = Path(__file__).parent / "networks"
CLASSES = 16


class WaveformNet(nn.Module):
    """Raw 8 kHz sound `(N, 1, 8000)` to `(N, 16)`: five 1-d convolutions.

    Source: the M5 network of Dai et al. 2017 (arXiv:1610.00087), with other widths and steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block1d(1, 64, kernel=79, stride=8),
            nn.MaxPool1d(2),
            *_block1d(64, 64),
            nn.MaxPool1d(2),
            *_block1d(64, 128),
            nn.MaxPool1d(4),
            *_block1d(128, 128),
            nn.MaxPool1d(4),
            *_block1d(128, 128),
        )
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.classifier = nn.Linear(128, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


class SpectrogramNet(nn.Module):
    """Log-mel spectrogram `(N, 1, 40, 61)` to `(N, 16)`: two 2-d convolutions, then a GRU.

    The GRU reads 31 steps of 480 features (48 channels of 10 bands) and the last state decides.
    """

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.features = nn.Sequential(*_block2d(1, 32, (2, 1)), *_block2d(32, 48, (2, 2)))
        self.gru = nn.GRU(48 * 10, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = self.features(x).flatten(1, 2).transpose(1, 2)
        states, _ = self.gru(steps)
        return self.classifier(states[:, -1])


NETWORKS: dict[str, type[nn.Module]] = {"waveform": WaveformNet, "spectrogram": SpectrogramNet}


def load_keyword_network(name: str) -> nn.Module:
    """The trained network "waveform" or "spectrogram", in evaluation mode."""
    if name not in NETWORKS:
        raise InputError(f"There is no keyword network '{name}'. Known: {', '.join(NETWORKS)}.")
    network = NETWORKS[name]()
    network.load_state_dict(load_file(weights_of(name)))
    return network.eval()


def weights_of(name: str) -> Path:
    """The file of a network's weights."""
    return WEIGHTS / f"keywords_{name}.safetensors"


def _block1d(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv1d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm1d(outputs), nn.ReLU()


def _block2d(inputs: int, outputs: int, stride: tuple[int, int]) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()
