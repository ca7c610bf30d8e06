"""The small network of the published description, through its four steps.

    python examples/description_net.py

    1. pre-train    a float network with a dense convolution
    2. decompose    its convolution into two factors of rank 16
    3. quantise     every weight to 2-bit integers, one scale per output channel
    4. fine-tune    so that the weights that leave training are those integers

It runs for seconds on data it makes: coloured gratings. The factors are in the order "channel_out"
(3x3 to 16 channels, then 1x1 to 64): with the published order, 1x1 first, a layer of 3 input
channels has rank 3 at most. docs/description.md says where else the published snippet needed care.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import sft
from sft.quantizers import dequantize_weight, quantize_weight

CLASSES, RANK, BITS = 10, 16, 2
BATCH, EPOCHS, TUNING_EPOCHS, RATE, TUNING_RATE = 50, 6, 2, 2e-3, 3e-4
NOISE = 0.2

Quantised = dict[str, tuple[Tensor, Tensor, Tensor]]


class Net(nn.Module):
    """A convolution, ReLU, 2x2 max-pooling and a linear layer: ``(N, 3, 32, 32) -> (N, 10)``."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.fc = nn.Linear(64 * 16 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(torch.relu(self.conv(x)), 2)
        logits: Tensor = self.fc(x.flatten(1))
        return logits


class StraightThrough(nn.Module):
    """Forward: the weight on its integer grid. Backward: as if nothing had been rounded."""

    def forward(self, weight: Tensor) -> Tensor:
        on_grid = dequantize_weight(*quantize_weight(weight, BITS, axis=0), axis=0)
        return on_grid + (weight - weight.detach())  # the bracket is zero, and has the gradient


def main() -> dict[str, float | bool]:
    torch.manual_seed(0)
    train_data, test_data = gratings(800, seed=1), gratings(500, seed=2)
    outcome: dict[str, float | bool] = {}

    dense = Net(nn.Conv2d(3, 64, 3, padding=1))
    train(dense, train_data, EPOCHS, RATE)
    outcome["pretrained"] = accuracy(dense, test_data)

    small = copy.deepcopy(dense)
    small.conv = sft.factorize(dense.conv, scheme="channel_out", rank=RANK)
    outcome["decomposed"] = accuracy(small, test_data)

    rounded = copy.deepcopy(small)
    quantised = store_quantised(rounded)
    outcome["quantised"] = accuracy(rounded, test_data)
    outcome["on_grid_after_quantising"] = is_on_grid(rounded, quantised)
    train(rounded, (train_data[0][:BATCH], train_data[1][:BATCH]), epochs=1, rate=TUNING_RATE)
    outcome["on_grid_after_one_plain_step"] = is_on_grid(rounded, quantised)

    outcome["end_of_training"], quantised = finetune(small, train_data, test_data)
    outcome["finetuned"] = accuracy(small, test_data)
    outcome["on_grid_after_finetuning"] = is_on_grid(small, quantised)

    outcome["dense_parameters"] = count(dense.conv)
    outcome["small_parameters"] = count(small.conv)
    show(outcome)
    return outcome


def finetune(
    net: nn.Module, train_data: tuple[Tensor, Tensor], test_data: tuple[Tensor, Tensor]
) -> tuple[float, Quantised]:
    """Train through the rounding, then store the integers.

    Returns the accuracy that training ended with, and the integers.
    """
    for layer in layers_of(net).values():
        parametrize.register_parametrization(layer, "weight", StraightThrough())
    train(net, train_data, TUNING_EPOCHS, TUNING_RATE)
    reached = accuracy(net, test_data)
    for layer in layers_of(net).values():
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    return reached, store_quantised(net)


def gratings(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Striped 32x32 colour images in noise; the class is the direction of the stripes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    angle = (labels * torch.pi / CLASSES)[:, None, None]
    phase, red, green, blue = torch.rand(4, samples, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    stripes = torch.sin((x * angle.cos() + y * angle.sin()) * 1.2 + 2 * torch.pi * phase)
    colour = torch.stack([red, green, blue], dim=1) + 0.2
    noise = torch.randn(samples, 3, 32, 32, generator=generator)
    return stripes[:, None] * colour + NOISE * noise, labels


def train(net: nn.Module, data: tuple[Tensor, Tensor], epochs: int, rate: float) -> None:
    optimizer = torch.optim.Adam(net.parameters(), rate)
    images, labels = data
    for _ in range(epochs):
        for picked in torch.randperm(len(labels)).view(-1, BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(images[picked]), labels[picked])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    images, labels = data
    return float((net(images).argmax(1) == labels).float().mean())


def layers_of(net: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def store_quantised(net: nn.Module) -> Quantised:
    """Put every weight on its grid; returns what a file holds: integers, scales, zero points."""
    stored = {n: quantize_weight(m.weight, BITS, axis=0) for n, m in layers_of(net).items()}
    for name, layer in layers_of(net).items():
        layer.weight.data.copy_(dequantize_weight(*stored[name], axis=0))
    return stored


def is_on_grid(net: nn.Module, stored: Quantised) -> bool:
    """Is every weight of the network exactly ``(q - zero_point) * scale``?"""
    return all(
        torch.equal(layer.weight, dequantize_weight(*stored[name], axis=0))
        for name, layer in layers_of(net).items()
    )


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def show(outcome: dict[str, float | bool]) -> None:
    yes_no = {key: "yes" if value else "no" for key, value in outcome.items()}
    print(f"1. pre-trained            accuracy {outcome['pretrained']:.3f}")
    print(f"2. decomposed, rank {RANK}    accuracy {outcome['decomposed']:.3f}")
    print(f"3. quantised to {BITS} bits    accuracy {outcome['quantised']:.3f}")
    print(f"4. fine-tuned             accuracy {outcome['finetuned']:.3f}")
    before, after = outcome["dense_parameters"], outcome["small_parameters"]
    print(f"convolution: {before} parameters before, {after} after")
    print("every weight is exactly an integer times its scale")
    print(f"   after quantising:                        {yes_no['on_grid_after_quantising']}")
    print(f"   after one plain training step:           {yes_no['on_grid_after_one_plain_step']}")
    print(f"   after fine-tuning through the rounding:  {yes_no['on_grid_after_finetuning']}")


if __name__ == "__main__":
    main()
