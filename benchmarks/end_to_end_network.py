"""A small residual network and 6,000 images, on which whole trainings take a minute.

Its weights lie in `networks/`; `python benchmarks/end_to_end_network.py` trains them anew.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sft
from sft.models.zoo import fashion_mnist
from sft.models.zoo.augment import augment
from sft.models.zoo.resnet import ResidualBlock

WEIGHTS = Path(__file__).parent / "networks" / "fashion_small_resnet.safetensors"
WIDTHS = (16, 32, 64)
IMAGES, CALIBRATION, BATCH = 6000, 1000, 64
EPOCHS, LEARNING_RATE, DECAY = 30, 3e-3, 1e-2


class FashionSmallResNet(nn.Module):
    """FashionResNet at 16, 32 and 64 channels, behind a stem of stride 2 (0.18 M parameters).

    Shapes: ``(N, 1, 28, 28) -> (N, 10)`` logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, WIDTHS[0], 3, 2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        blocks: list[nn.Module] = []
        inputs = WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            for block in range(2):
                stride = 2 if stage and not block else 1
                blocks.append(ResidualBlock(inputs, width, stride))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(torch.relu(self.bn(self.conv(x))))
        logits: torch.Tensor = self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def load_small_resnet() -> nn.Module:
    """The trained network in evaluation mode."""
    network = FashionSmallResNet()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


def small_data() -> sft.Data:
    """6,000 of the embedded training images; all validation and all test images."""
    folder = fashion_mnist.EMBEDDED
    images = fashion_mnist.read_idx(folder / "train-images-idx3-ubyte.gz")
    labels = fashion_mnist.read_idx(folder / "train-labels-idx1-ubyte.gz")
    picked = fashion_mnist.balanced_indices(labels, IMAGES, 0)
    train = _batches(images[picked], labels[picked], BATCH)
    train.shuffle, train.transform = True, augment
    return sft.Data(
        calibration=_batches(images[picked][:CALIBRATION], labels[picked][:CALIBRATION], 100),
        train=train,
        validation=_batches(*fashion_mnist.load_split("validation"), 500),
        test=_batches(*fashion_mnist.load_split("test"), 500),
        name="fashion-mnist (6,000 training images)",
    )


def train_small_resnet() -> nn.Module:
    """AdamW, one cycle of the learning rate, cross-entropy with labels smoothed by 0.1."""
    torch.manual_seed(0)
    network, data = FashionSmallResNet(), small_data()
    train = data.split("train")[0]
    assert isinstance(train, sft.Batches)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=DECAY)
    steps = EPOCHS * len(train)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for _ in range(EPOCHS):
        for x, y in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y, label_smoothing=0.1).backward()
            optimizer.step()
            rates.step()
    return network.eval()


def _batches(
    images: fashion_mnist.Bytes, labels: fashion_mnist.Bytes, batch_size: int
) -> sft.Batches:
    inputs = torch.from_numpy(fashion_mnist.normalise(images))
    return sft.Batches(inputs, torch.from_numpy(labels.astype(np.int64)), batch_size)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = train_small_resnet()
    save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, WEIGHTS)
    print("validation accuracy", sft.top1(lambda x: trained(x).detach(), small_data().validation))
