"""What the parts of `quantization.py` share: settings, quantised networks, files and their scores.

Every layer is kept whole and rounded to the same bits, the first and the last too.
"""

import dataclasses
from pathlib import Path

import torch
from quantization_peers import PeerFile
from torch import Tensor, nn

import sft
from sft.core.data import Loader
from sft.core.records import DENSE, Artifact, Cost, Option, Plan, PlanRow, totals
from sft.exporters.base import storage_of
from sft.exporters.storage import mean_bits
from sft.models.inspect import inspect
from sft.models.zoo import fashion_mnist
from sft.quantizers.grid import offending_pairs
from sft.runtimes.runner import Runner, predict_with
from sft.surgery.quantize import QuantizedModel

TARGET, RUNTIME = "onnxruntime", "onnxruntime"
PAIR_SUM = 128  # two weights of one sign beyond it saturate where there is no VNNI


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured, where files may lie, and threads for everything that is not timed."""

    quick: bool
    folder: Path
    threads: int
    qat_steps: int


Found = dict[str, float | str]


def dense_plan(network: nn.Module, example: Tensor, bits: int, target: str = TARGET) -> Plan:
    """Every layer whole, in integers of `bits` bits. example : ``(1, ...)``."""
    layers = inspect(network, example).layers
    costs = [Cost(x.params, x.macs, x.params * bits // 8) for x in layers]
    whole = totals({layer.name: cost for layer, cost in zip(layers, costs, strict=True)})
    rows = tuple(
        PlanRow(layer.name, Option(DENSE, (), bits), None, cost, "the same for all layers")
        for layer, cost in zip(layers, costs, strict=True)
    )
    shape = tuple(example.shape[1:])
    return Plan("model", target, {}, rows, whole, whole, "edited", 0.0, 0.0, 0.0, input_shape=shape)


def quantize_dense(
    network: nn.Module, images: Tensor, bits: int = 8, target: str = TARGET
) -> QuantizedModel:
    """The verb `quantize` with its defaults. images : ``(N, ...)`` to calibrate on."""
    plan = dense_plan(network, images[:1], bits, target)
    batches = sft.Batches(images, batch_size=min(50, len(images)))
    return sft.quantize(sft.apply(network, plan), plan, target, batches)


def export_file(model: nn.Module, name: str, folder: Path, example: Tensor) -> Artifact:
    """The file of a network, in float or quantised, as ``folder/name.onnx``."""
    folder.mkdir(parents=True, exist_ok=True)
    target = model.target.name if isinstance(model, QuantizedModel) else TARGET
    return sft.export(model, None, folder / f"{name}.onnx", target, example=example[:1])


def as_peer(artifact: Artifact, name: str) -> PeerFile:
    """An exported file as one of those that are compared."""
    return PeerFile(name, Path(artifact.path), artifact.file_bytes)


def accuracy_of(artifact: Artifact, test: Loader) -> float:
    """Percent of right answers of the file, run by ONNX Runtime on one thread."""
    with Runner(artifact.path, RUNTIME) as runner:
        return 100 * sft.top1(predict_with(runner), test)


def bits_of(artifact: Artifact) -> tuple[float, int]:
    """Bits that a weight takes in the file, and bits in which the runtime multiplies."""
    with Runner(artifact.path, RUNTIME) as runner:
        whole = all(kernel.integer for kernel in runner.place())
    return mean_bits(storage_of(artifact)), 8 if whole else 32


def saturating_pairs(model: QuantizedModel) -> int:
    """Pairs of weights that could saturate in a 16-bit sum; depthwise kernels never do.

    The kernel reads taps first, then the channels of each.
    """
    count = 0
    for weight, rounding in model.weights().values():
        if weight.shape[1] > 1:
            rows = rounding.integers(weight.detach())
            rows = rows.flatten(2).mT.flatten(1) if rows.ndim > 2 else rows
            count += offending_pairs(rows, PAIR_SUM)
    return count


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor, batch_size: int = 25) -> Tensor:
    """``(N, ...) -> (N, C)`` batch by batch."""
    return torch.cat([network(x) for x in images.split(batch_size)])


def sqnr_db(found: Tensor, wanted: Tensor) -> float:
    """Signal over noise of outputs ``(N, C)``, in dB."""
    noise = (found.double() - wanted.double()).square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / noise))


def fashion_images(start: int, count: int | None) -> Tensor:
    """Training images without labels, ``(count, 1, 28, 28)``; all from `start` on for None."""
    images = fashion_mnist.load_split("train")[0][start:][:count]
    return torch.from_numpy(fashion_mnist.normalise(images))
