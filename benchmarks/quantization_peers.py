"""Post-training quantisation by other tools: their files, and the numbers to beat.

    python benchmarks/quantization_peers.py            all peers, 100 calibration photos
    python benchmarks/quantization_peers.py --quick    ONNX Runtime with min-max only, 16 photos
    --only accuracy | latency                          one of the two tables
    --peers NAME ...                                   these peers

EfficientNet-Lite0 with its ImageNet weights: calibrated on the photos' calibration split, judged
on its validation split. SQNR is of the logits against fp32 torch, agreement is of the first
choice with it. Every peer works in a process of its own; seconds are of the peer's call, memory
is what that process grew by. ResNet-18 and MobileNetV2 with random weights are timed: batch 1,
one thread, all files in turn. Nothing is written but a table; the last line is one JSON object.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import nncf_peer
import onnxruntime_peer
import torch
from efficientnet_lite import load_efficientnet_lite0
from peer_process import quantize_apart, save_images
from photos import load_photos
from speed_networks import SPEED_NETWORKS, make_noise
from torch import nn

from sft.exporters.onnxruntime import OnnxRuntimeExporter
from sft.runtimes.runner import Runner

ORT = tuple(onnxruntime_peer.LAYOUTS)
NNCF = tuple(nncf_peer.SETTINGS)
QUICK = tuple(name for name in ORT if name not in onnxruntime_peer.KEEPS_ACTIVATIONS)
TIMED = (*QUICK, "nncf-onnx", "nncf-openvino")
IMAGES, QUICK_IMAGES, NOISE_IMAGES = 100, 16, 16
ROUNDS, RUNS = 8, 8


@dataclasses.dataclass(frozen=True)
class PeerFile:
    """One exported file, what it took to make (seconds, bytes of memory), and its size."""

    name: str
    path: Path
    file_bytes: int
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def runtime(self) -> str:
        return "openvino" if self.path.suffix == ".xml" else "onnxruntime"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("accuracy", "latency"))
    parser.add_argument("--peers", nargs="+", choices=(*ORT, *NNCF), metavar="NAME")
    options = parser.parse_args()
    names = options.peers or (QUICK if options.quick else (*ORT, *NNCF))
    timed = tuple(name for name in TIMED if name in names)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        if options.only != "latency":
            count = QUICK_IMAGES if options.quick else IMAGES
            figures |= print_accuracy(names, count, Path(folder))
        if options.only != "accuracy":
            for network in SPEED_NETWORKS:
                figures |= print_latency(network, timed, Path(folder) / network)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def write_float(network: nn.Module, images: torch.Tensor, folder: Path) -> PeerFile:
    """The network as fp32 ONNX with a batch of 1, as SFT exports it; every peer starts from it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "float.onnx"
    OnnxRuntimeExporter().write(network, images[:1], path)
    return PeerFile("fp32", path, path.stat().st_size)


def ort_variants(
    network: nn.Module, images: torch.Tensor, folder: Path, names: Sequence[str] = ORT
) -> Iterator[PeerFile]:
    """The fp32 file, then those that ONNX Runtime's `quantize_static` makes, each when it is there.

    images : ``(N, 3, H, W)`` to calibrate on. names : of `onnxruntime_peer.LAYOUTS`.
    """
    yield from write_peers(network, images, folder, names)


def nncf_variants(
    network: nn.Module, images: torch.Tensor, folder: Path, names: Sequence[str] = NNCF
) -> Iterator[PeerFile]:
    """The fp32 file, then NNCF's for ONNX Runtime (.onnx) and for OpenVINO (.xml with .bin).

    images : ``(N, 3, H, W)`` to calibrate on. names : of `nncf_peer.SETTINGS`.
    """
    yield from write_peers(network, images, folder, names)


def write_peers(
    network: nn.Module, images: torch.Tensor, folder: Path, names: Sequence[str]
) -> Iterator[PeerFile]:
    """The fp32 file, then those of the peers named, of both tools, each as soon as it is there."""
    original = write_float(network, images, folder)
    yield original
    images_path = save_images(images.numpy(), folder)
    for name in names:
        module = onnxruntime_peer if name in ORT else nncf_peer
        path = folder / f"{name}{module.SUFFIX[name]}"
        seconds, peak = quantize_apart(module.__name__, name, original.path, images_path, path)
        parts = [path, *folder.glob(f"{name}.bin")]
        yield PeerFile(name, path, sum(p.stat().st_size for p in parts), seconds, peak)


def open_file(file: PeerFile, threads: int = 1) -> contextlib.AbstractContextManager[Runner]:
    """The file in its own runtime, with `run(x)` and `time(count)` of `sft.runtimes.runner`."""
    if file.runtime == "openvino":
        opened: Runner = nncf_peer.OpenVinoFile(file.path, threads)  # type: ignore[assignment]
        return contextlib.nullcontext(opened)
    return Runner(file.path, "onnxruntime", threads)


def measure_accuracy(
    file: PeerFile, images: torch.Tensor, wanted: torch.Tensor
) -> tuple[float, float]:
    """SQNR in dB and share of equal first choices of a file's logits against `wanted` (N, C)."""
    with open_file(file) as opened:
        found = torch.from_numpy(opened.run(images.numpy())).double()
    noise = (found - wanted).square().sum()
    sqnr = 10 * math.log10(float(wanted.double().square().sum() / noise))
    return sqnr, float((found.argmax(1) == wanted.argmax(1)).double().mean())


def measure_latency(
    files: Sequence[PeerFile], rounds: int = ROUNDS, runs: int = RUNS
) -> dict[str, tuple[float, float]]:
    """Median and minimum milliseconds of each file by name: batch 1, one thread, in turn."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_file(file)) for file in files]
        seconds: list[list[float]] = [[] for _ in opened]
        for index in range(rounds + 1):
            for runner, own in zip(opened, seconds, strict=True):
                measured = runner.time(runs)
                own += measured if index > 0 else []
    pairs = zip(files, seconds, strict=True)
    return {file.name: (1e3 * statistics.median(own), 1e3 * min(own)) for file, own in pairs}


def fastest(latency: dict[str, tuple[float, float]]) -> str:
    """ONNX Runtime's best layout on this machine: the `ort-` file with the least minimum."""
    return min((name for name in latency if name in ORT), key=lambda name: latency[name][1])


def print_accuracy(names: Sequence[str], count: int, folder: Path) -> dict[str, float]:
    """EfficientNet-Lite0 by every peer; the SQNR figures by name."""
    network = load_efficientnet_lite0()
    calibration, images = load_photos("calibration")[:count], load_photos("validation")
    with torch.no_grad():
        wanted = torch.cat([network(x) for x in images.split(16)])
    print(f"EfficientNet-Lite0: {len(calibration)} to calibrate, {len(images)} to judge")
    print(f"{'file':28} {'SQNR dB':>8} {'agree %':>8} {'bytes':>10} {'s':>7} {'MiB':>6}")
    figures = {}
    for file in write_peers(network, calibration, folder, names):
        sqnr, agreement = measure_accuracy(file, images, wanted)
        print(
            f"{file.name:28} {sqnr:8.2f} {100 * agreement:8.2f} {file.file_bytes:10} "
            f"{file.seconds:7.1f} {file.peak_bytes / 2**20:6.0f}",
            flush=True,
        )
        figures[f"efflite0_sqnr_{file.name}"] = sqnr
    return figures


def print_latency(network: str, names: Sequence[str], folder: Path) -> dict[str, float]:
    """One speed network by every peer; the minima in milliseconds by name."""
    model, noise = SPEED_NETWORKS[network](), make_noise(NOISE_IMAGES)
    files = list(write_peers(model, noise, folder, names))
    latency = measure_latency(files)
    print(f"{network}: median and minimum ms, fp32's minimum over it, bytes")
    for file in files:
        median, least = latency[file.name]
        gain = latency["fp32"][1] / least
        print(f"{file.name:28} {median:8.2f} {least:8.2f} {gain:6.2f}x {file.file_bytes:10}")
    print(f"best ONNX Runtime layout: {fastest(latency)}", flush=True)
    return {f"{network}_ms_{name}": least for name, (_, least) in latency.items()}


if __name__ == "__main__":
    main()
