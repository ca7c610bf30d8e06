"""Train the embedded network `fashion-resnet` on 58,000 Fashion-MNIST images; resumable.

    python examples/train_fashion_resnet.py --out build/fashion-resnet --threads 2

The recipe: SGD with Nesterov momentum 0.9, batch 128, weight decay 5e-4 on kernels only, the
learning rate rises to 0.2 over the first 10 % of the steps and falls linearly to zero, label
smoothing 0.05. Images are shifted by up to 2 pixels, mirrored, and half of them lose a random
square of up to 8 pixels. The first epochs see the images at 20x20 pixels (half the cost).
The validation images watch progress; the schedule is fixed beforehand and the last weights are
kept, so they choose nothing here. The test images are touched once, at the end.

State is written every minute; the same command continues after any interruption and gives the
same weights as an uninterrupted run. A finished run writes `fashion-resnet.safetensors`.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from sft.models.zoo import fashion_mnist as fm
from sft.models.zoo.resnet import FashionResNet

BATCH, PEAK_RATE, DECAY, SMOOTHING = 128, 0.2, 5e-4, 0.05
LOW_RESOLUTION = 20
SAVE_SECONDS = 60.0


def main() -> None:
    options = parse("fashion-resnet", epochs=22, low_resolution_epochs=9)
    torch.manual_seed(options.seed)
    train(FashionResNet(), options)


def train(net: nn.Module, options: argparse.Namespace) -> None:
    """Train, and write the weights in half precision into `options.out`."""
    torch.set_num_threads(options.threads)
    images, labels = _tensors("train")
    net = net.to(options.device, memory_format=torch.channels_last)
    optimizer = _optimizer(net)
    steps = len(images) // BATCH
    total = options.epochs * steps
    state = options.out / "state.safetensors"
    options.out.mkdir(parents=True, exist_ok=True)
    first = _resume(state, net, optimizer)
    saved_at = started = time.monotonic()
    for step in range(first, total):
        epoch, within = divmod(step, steps)
        if within == 0 or step == first:
            order = torch.randperm(
                len(images), generator=torch.Generator().manual_seed(options.seed + epoch)
            )
        picked = order[within * BATCH : (within + 1) * BATCH]
        small = epoch < options.low_resolution_epochs
        x = _augment(images[picked], torch.Generator().manual_seed(step), small).to(options.device)
        _set_rate(optimizer, step, total)
        loss = _step(net, optimizer, x, labels[picked].to(options.device))
        if time.monotonic() - saved_at > SAVE_SECONDS or step == total - 1:
            _save(state, net, optimizer, step + 1)
            saved_at = time.monotonic()
            left = (saved_at - started) / (step + 1 - first) * (total - step - 1) / 60
            print(f"epoch {epoch} step {within}/{steps} loss {loss:.3f} left {left:.0f} min")
        if within == steps - 1:
            score = _accuracy(net, *_tensors("validation"), device=options.device)
            print(f"epoch {epoch} done, validation accuracy {score:.4f}", flush=True)
    state_dict = {k: v.cpu().contiguous() for k, v in net.state_dict().items()}
    weights = {k: v.half() if v.is_floating_point() else v for k, v in state_dict.items()}
    save_file(weights, options.out / f"{options.name}.safetensors")
    net.load_state_dict({k: v.float() for k, v in weights.items()})
    score = _accuracy(net, *_tensors("test"), device=options.device)
    print(f"test accuracy of the stored half-precision weights {score:.4f}")


def parse(name: str, epochs: int, low_resolution_epochs: int) -> argparse.Namespace:
    """The options of the command line; `name` is that of the network and of its file."""
    parser = argparse.ArgumentParser(description=f"Train {name} on Fashion-MNIST; resumable.")
    parser.add_argument("--out", type=Path, default=Path("build") / name)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--low-resolution-epochs", type=int, default=low_resolution_epochs)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(name=name)
    return parser.parse_args()


def _tensors(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = fm.load_split(split)
    return torch.from_numpy(fm.normalise(images)), torch.from_numpy(labels.astype("int64"))


def _optimizer(net: nn.Module) -> torch.optim.SGD:
    kernels = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim == 1]
    groups = [
        {"params": kernels, "weight_decay": DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=PEAK_RATE, momentum=0.9, nesterov=True)


def _set_rate(optimizer: torch.optim.SGD, step: int, total: int) -> None:
    rising = 0.1 * total
    fraction = min((step + 1) / rising, (total - step) / (total - rising))
    for group in optimizer.param_groups:
        group["lr"] = PEAK_RATE * fraction


def _augment(x: torch.Tensor, generator: torch.Generator, small: bool) -> torch.Tensor:
    count, _, height, width = x.shape
    x = functional.pad(x, (2, 2, 2, 2), value=-fm.MEAN / fm.STD)
    mirrored = torch.rand(count, generator=generator) < 0.5
    erased = torch.rand(count, generator=generator) < 0.5
    down, right = torch.randint(0, 5, (2, count), generator=generator)
    rows = down[:, None] + torch.arange(height)
    columns = right[:, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    x = x[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    side = torch.randint(2, 9, (count,), generator=generator)
    top, left = torch.randint(0, height, (2, count), generator=generator)
    inside_rows = (torch.arange(height) - top[:, None]).abs() * 2 < side[:, None]
    inside_columns = (torch.arange(width) - left[:, None]).abs() * 2 < side[:, None]
    hole = inside_rows[:, :, None] & inside_columns[:, None, :] & erased[:, None, None]
    x = x.masked_fill(hole, 0.0)[:, None]
    if small:
        x = functional.interpolate(
            x, size=LOW_RESOLUTION, mode="bilinear", antialias=True, align_corners=False
        )
    return x.contiguous(memory_format=torch.channels_last)


def _step(
    net: nn.Module, optimizer: torch.optim.SGD, x: torch.Tensor, target: torch.Tensor
) -> float:
    net.train()
    optimizer.zero_grad()
    loss = functional.cross_entropy(net(x), target, label_smoothing=SMOOTHING)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def _accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, device: str) -> float:
    net.eval()
    right = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        right += int((net(x.to(device)).argmax(1).cpu() == y).sum())
    return right / len(labels)


def _save(path: Path, net: nn.Module, optimizer: torch.optim.SGD, step: int) -> None:
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
    save_file(tensors, path.with_suffix(".new"), metadata={"step": str(step)})
    path.with_suffix(".new").replace(path)


def _resume(path: Path, net: nn.Module, optimizer: torch.optim.SGD) -> int:
    if not path.exists():
        return 0
    tensors = load_file(path)
    net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
    for name, parameter in net.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = (
            tensors[f"momentum.{name}"]
            .to(parameter.device)
            .clone(memory_format=torch.preserve_format)
        )
    with safe_open(path, "pt") as stored:
        return int(stored.metadata()["step"])


if __name__ == "__main__":
    main()
