"""Train the depthwise network of the quantisation benchmark on 58,000 Fashion-MNIST images.

    python examples/train_fashion_mobilenet.py --out build/fashion_mobilenet --threads 2

The recipe, its resuming and its use of the splits are those of `train_fashion_resnet.py`.
"""

import sys
from pathlib import Path

import torch
from train_fashion_resnet import parse, train

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from depthwise_network import FashionMobileNet


def main() -> None:
    options = parse("fashion_mobilenet", epochs=12, low_resolution_epochs=5)
    torch.manual_seed(options.seed)
    train(FashionMobileNet(), options)


if __name__ == "__main__":
    main()
