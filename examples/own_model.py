"""Compress a model of your own: any `nn.Module`, any loaders, any score.

    python examples/own_model.py [OUT]

The model here is a small residual network on made images, trained in a few seconds, so that the
example runs anywhere; put your own in its place.
"""

import sys

import torch
from torch import nn

import sft
from sft.pipeline import Training


class Network(nn.Module):
    """A stand-in for your network: ``(N, 1, 16, 16) -> (N, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.body(x)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def made_images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gratings of four directions in noise, and their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    angle = labels * torch.pi / 4
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    along = angle.cos()[:, None, None] * rows + angle.sin()[:, None, None] * columns
    noise = torch.randn(count, 16, 16, generator=generator)
    return (torch.sin(along) + noise)[:, None], labels


def pretrain(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()


def main(out: str = "out/own") -> sft.Result:
    torch.manual_seed(0)
    network = Network()
    pretrain(network, *made_images(256, 0))
    data = sft.Data(
        calibration=sft.Batches(*made_images(128, 1)),
        train=sft.Batches(*made_images(512, 2), batch_size=64, shuffle=True),
        validation=sft.Batches(*made_images(200, 3)),
        test=sft.Batches(*made_images(200, 4)),
    )
    budget = sft.Budget(size=0.6, macs=0.6, max_drop=0.02)
    result = sft.compress(
        network, data, budget, evaluate=sft.top1, out=out, training=Training(60, 20)
    )
    print(result.summary)
    print(result.plan)
    result.raise_if_failed()
    return result


if __name__ == "__main__":
    main(*sys.argv[1:2])
